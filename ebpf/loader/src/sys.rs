//! The few system calls that aya doesn't cover.
//!
//! `bpf(BPF_MAP_UPDATE_BATCH)`, `bpf(BPF_LINK_DETACH)` and the `memlock` line of `fdinfo` are described in linux/bpf.h and in
//! the kernel's Documentation/bpf.

use std::{
    ffi::CString,
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use anyplace_ebpf_common::Layout;

/// statfs type of a bpffs.
pub(crate) const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
const CAP_NET_ADMIN: u64 = 1 << 12;
const CAP_SYS_ADMIN: u64 = 1 << 21;
const CAP_BPF: u64 = 1 << 39;

const BPF_OBJ_GET: libc::c_long = 7;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;
const BPF_LINK_DETACH: libc::c_long = 34;

/// The part of `union bpf_attr` that batch calls use.
#[repr(C)]
struct BatchAttributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// Adds or replaces all entries with one call. On failure also says how many were written.
pub(crate) fn update_batch<K: Layout, V: Layout>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> Result<(), (usize, io::Error)> {
    assert_eq!(keys.len(), values.len(), "each key has its value");
    let mut attributes = BatchAttributes {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: keys.len() as u32,
        map: map.as_raw_fd() as u32,
        element_flags: 0,
        flags: 0,
    };
    // SAFETY: the kernel reads `count` keys and values, which is what the slices hold in the sizes of the map (`Layout`
    // types, compared with the map's own when it was opened), and writes `count`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_MAP_UPDATE_BATCH,
            &raw mut attributes,
            size_of::<BatchAttributes>() as libc::c_long,
        )
    };
    if result == 0 { Ok(()) } else { Err((attributes.count as usize, io::Error::last_os_error())) }
}

/// The part of `union bpf_attr` that opens what is pinned.
#[repr(C)]
struct PathAttributes {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Opens what is pinned at a path.
pub(crate) fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = PathAttributes { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the kernel reads the structure and the path, a valid string.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_OBJ_GET,
            &raw mut attributes,
            size_of::<PathAttributes>() as libc::c_long,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that was just opened and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

/// Detaches a link's program before it returns; the link of an interface that is gone has none.
pub(crate) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    // The part of `union bpf_attr` that this call uses.
    let mut link = link.as_raw_fd() as u32;
    // SAFETY: the kernel reads the number.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_LINK_DETACH, &raw mut link, size_of::<u32>() as libc::c_long)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A structure that the kernel wrote as bytes; `None` if it is of another length.
pub(crate) fn read_layout<T: Layout>(bytes: &[u8]) -> Option<T> {
    // SAFETY: as many bytes as `T` has, and any bytes are a value of it (`Layout`).
    (bytes.len() == size_of::<T>()).then(|| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Nanoseconds on the clock that programs read by `bpf_ktime_get_ns`.
pub(crate) fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: room for the answer; this clock is always there.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Bytes of kernel memory that a map takes.
pub(crate) fn map_memory(map: BorrowedFd<'_>) -> io::Result<u64> {
    let info = std::fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", map.as_raw_fd()))?;
    info.lines()
        .find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// File system type of the nearest existing ancestor of `path`.
pub(crate) fn file_system_type(path: &Path) -> io::Result<i64> {
    let existing = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    let name = CString::new(existing.as_os_str().as_bytes())?;
    let mut stat = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: a valid path and room for the answer.
    if unsafe { libc::statfs(name.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: filled in by the successful call.
    Ok(unsafe { stat.assume_init() }.f_type & 0xffff_ffff)
}

/// Index of an interface in this thread's network namespace.
pub(crate) fn interface_index(name: &str) -> io::Result<u32> {
    let name = CString::new(name)?;
    // SAFETY: a valid string.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

/// MTU of an interface in this thread's network namespace.
pub(crate) fn interface_mtu(name: &str) -> io::Result<u32> {
    // SAFETY: no pointers.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that was just opened and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: SIOCGIFMTU reads the name and writes the MTU into the same structure.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU as _, &mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the successful call filled in this member.
    Ok(u32::try_from(unsafe { request.ifr_ifru.ifru_mtu }).unwrap_or(0))
}

/// The effective capabilities, if they don't suffice.
pub(crate) fn missing_capabilities() -> io::Result<Option<u64>> {
    let status = std::fs::read_to_string("/proc/thread-self/status")?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .ok_or(io::ErrorKind::InvalidData)?;
    let enough = effective & CAP_SYS_ADMIN != 0 || effective & CAP_BPF != 0;
    Ok(if enough && effective & CAP_NET_ADMIN != 0 { None } else { Some(effective) })
}
