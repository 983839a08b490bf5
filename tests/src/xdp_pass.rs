//! An XDP program that passes everything, for the far end of a veth.
//!
//! `ingress` answers with XDP_TX. When the uplink is a veth (testbeds, machines in namespaces), the kernel puts such a
//! frame into the peer's ring, but wakes the peer only if it has an XDP program of its own (measured on 6.18: with GRO
//! alone, frames stay in the ring). A machine with a network card doesn't need this.
//!
//! It stands here and not in the loader, because the loader only builds with an up-to-date eBPF object, and `xtask`,
//! which makes that object, depends on this crate.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

/// `r0 = XDP_PASS; exit`.
const PASS: [u64; 2] = [0x0000_0002_0000_00b7, 0x95];

// From linux/bpf.h and linux/if_link.h.
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
/// The driver's own XDP: the generic kind wakes nobody.
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// First members of `union bpf_attr` for BPF_PROG_LOAD.
#[repr(C)]
struct ProgramLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
}

/// First members of `union bpf_attr` for BPF_LINK_CREATE.
#[repr(C)]
struct LinkCreate {
    program: u32,
    interface: u32,
    attach_type: u32,
    flags: u32,
}

/// Attaches the program to `interface` of this thread's network namespace. It stays as long as the descriptor that
/// this returns is open, or the interface exists.
pub fn attach_pass(interface: &str) -> io::Result<OwnedFd> {
    let name = CString::new(interface)?;
    // SAFETY: a valid string.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(failed("if_nametoindex", interface));
    }
    let load = ProgramLoad {
        program_type: BPF_PROG_TYPE_XDP,
        instruction_count: PASS.len() as u32,
        instructions: PASS.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
    };
    let program = bpf(BPF_PROG_LOAD, &load).ok_or_else(|| failed("bpf(BPF_PROG_LOAD)", interface))?;
    let create = LinkCreate {
        program: program.as_raw_fd() as u32,
        interface: index,
        attach_type: BPF_XDP,
        flags: XDP_FLAGS_DRV_MODE,
    };
    bpf(BPF_LINK_CREATE, &create).ok_or_else(|| failed("bpf(BPF_LINK_CREATE)", interface))
}

/// A bpf() call that makes a descriptor; `None` leaves the reason in errno.
fn bpf<T>(command: libc::c_long, attr: &T) -> Option<OwnedFd> {
    // SAFETY: the kernel reads as many bytes as `T` has and takes the rest of the union as zero; what the block points
    // to outlives the call; neither command writes to it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    // SAFETY: the successful call returned a descriptor that belongs to nobody else.
    (result >= 0).then(|| unsafe { OwnedFd::from_raw_fd(result as i32) })
}

fn failed(call: &str, interface: &str) -> io::Error {
    let error = io::Error::last_os_error();
    io::Error::new(error.kind(), format!("{call} failed for network interface {interface}: {error}"))
}
