//! A few bpf() calls and an assembler of the instructions that the wrappers need; numbers as in linux/bpf.h.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

const BPF_MAP_CREATE: i64 = 0;
const BPF_MAP_UPDATE_ELEM: i64 = 2;
const BPF_PROG_LOAD: i64 = 5;
const BPF_PROG_TEST_RUN: i64 = 10;
pub(crate) const MAP_TYPE_ARRAY: u32 = 2;
pub(crate) const MAP_TYPE_PROG_ARRAY: u32 = 3;

/// What a program is attached to: its type, and the attach type that a tail call compares.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Classifier,
    Xdp,
}

/// Runs a program `repeat` times on one packet; the return value of the last run, the packet's length after it, and the
/// nanoseconds of one run, on average.
pub(crate) fn test_run(program: &OwnedFd, packet: &[u8], repeat: u32) -> io::Result<(u32, u32, u32)> {
    #[repr(C)]
    struct Attributes {
        program: u32,
        return_value: u32,
        size_in: u32,
        size_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        context: [u32; 2],
        contexts: [u64; 2],
    }
    let mut out = [0u8; 4096];
    let mut attributes = Attributes {
        program: program.as_raw_fd() as u32,
        return_value: 0,
        size_in: packet.len() as u32,
        size_out: out.len() as u32,
        data_in: packet.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat,
        duration: 0,
        context: [0; 2],
        contexts: [0; 2],
    };
    bpf(BPF_PROG_TEST_RUN, &mut attributes)?;
    Ok((attributes.return_value, attributes.size_out, attributes.duration))
}

/// Loads a program; the verifier's words are in the error.
pub(crate) fn load(kind: Kind, instructions: &[u64]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        version_and_flags: [u32; 2],
        name: [u8; 16],
        interface: u32,
        attach: u32,
    }
    let mut log = vec![0u8; 1 << 16];
    let (kind, attach) = match kind {
        Kind::Classifier => (3, 0),
        Kind::Xdp => (6, 37),
    };
    let mut attributes = Attributes {
        kind,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        log_level: 1,
        log_size: log.len() as u32,
        log: log.as_mut_ptr() as u64,
        version_and_flags: [0; 2],
        name: [0; 16],
        interface: 0,
        attach,
    };
    match bpf(BPF_PROG_LOAD, &mut attributes) {
        Ok(fd) => Ok(owned(fd)),
        Err(error) => {
            let text = String::from_utf8_lossy(&log);
            Err(io::Error::other(format!("{error}: {}", text.trim_end_matches('\0'))))
        }
    }
}

/// Makes a map with keys of four bytes.
pub(crate) fn create_map(kind: u32, value_bytes: u32) -> io::Result<OwnedFd> {
    let mut attributes: [u32; 5] = [kind, 4, value_bytes, 1, 0];
    bpf(BPF_MAP_CREATE, &mut attributes).map(owned)
}

/// Writes a map's only element.
pub(crate) fn set_element(map: &OwnedFd, value: &[u8]) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        map: u64,
        key: u64,
        value: u64,
        flags: u64,
    }
    let key = 0u32;
    let mut attributes = Attributes {
        map: map.as_raw_fd() as u64,
        key: &raw const key as u64,
        value: value.as_ptr() as u64,
        flags: 0,
    };
    bpf(BPF_MAP_UPDATE_ELEM, &mut attributes).map(drop)
}

fn bpf<T>(command: i64, attributes: &mut T) -> io::Result<RawFd> {
    // SAFETY: each caller's structure is the beginning of `union bpf_attr` for its command, and what it points to lives
    // until the call returns.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes as *mut T, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as RawFd) }
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: bpf() has just returned it, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Instructions in the order in which they run.
#[derive(Default)]
pub(crate) struct Assembler(Vec<u64>);

/// Sizes of loads and stores.
#[derive(Clone, Copy)]
pub(crate) enum Size {
    U16 = 0x08,
    U32 = 0x00,
    U64 = 0x18,
}

impl Assembler {
    fn push(&mut self, code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> &mut Self {
        let registers = u64::from(dst | src << 4);
        self.0.push(
            u64::from(code)
                | registers << 8
                | u64::from(offset as u16) << 16
                | u64::from(immediate as u32) << 32,
        );
        self
    }

    pub(crate) fn mov(&mut self, dst: u8, src: u8) -> &mut Self {
        self.push(0xbf, dst, src, 0, 0)
    }

    pub(crate) fn mov_immediate(&mut self, dst: u8, value: i32) -> &mut Self {
        self.push(0xb7, dst, 0, 0, value)
    }

    pub(crate) fn add_immediate(&mut self, dst: u8, value: i32) -> &mut Self {
        self.push(0x07, dst, 0, 0, value)
    }

    pub(crate) fn add(&mut self, dst: u8, src: u8) -> &mut Self {
        self.push(0x0f, dst, src, 0, 0)
    }

    pub(crate) fn and_immediate(&mut self, dst: u8, value: i32) -> &mut Self {
        self.push(0x57, dst, 0, 0, value)
    }

    pub(crate) fn shift_right(&mut self, dst: u8, bits: i32) -> &mut Self {
        self.push(0x77, dst, 0, 0, bits)
    }

    pub(crate) fn multiply(&mut self, dst: u8, src: u8) -> &mut Self {
        self.push(0x2f, dst, src, 0, 0)
    }

    pub(crate) fn multiply_immediate(&mut self, dst: u8, value: i32) -> &mut Self {
        self.push(0x27, dst, 0, 0, value)
    }

    pub(crate) fn big_endian_32(&mut self, dst: u8) -> &mut Self {
        self.push(0xdc, dst, 0, 0, 32)
    }

    pub(crate) fn load(&mut self, size: Size, dst: u8, src: u8, offset: i16) -> &mut Self {
        self.push(0x61 | size as u8, dst, src, offset, 0)
    }

    pub(crate) fn store(&mut self, size: Size, dst: u8, offset: i16, src: u8) -> &mut Self {
        self.push(0x63 | size as u8, dst, src, offset, 0)
    }

    pub(crate) fn constant(&mut self, dst: u8, value: u64) -> &mut Self {
        self.push(0x18, dst, 0, 0, value as u32 as i32);
        self.push(0, 0, 0, 0, (value >> 32) as u32 as i32)
    }

    pub(crate) fn map(&mut self, dst: u8, map: &OwnedFd) -> &mut Self {
        self.push(0x18, dst, 1, 0, map.as_raw_fd());
        self.push(0, 0, 0, 0, 0)
    }

    /// The address of an array's first element.
    pub(crate) fn map_value(&mut self, dst: u8, map: &OwnedFd) -> &mut Self {
        self.push(0x18, dst, 2, 0, map.as_raw_fd());
        self.push(0, 0, 0, 0, 0)
    }

    pub(crate) fn call(&mut self, helper: i32) -> &mut Self {
        self.push(0x85, 0, 0, 0, helper)
    }

    /// Leaves with `r0` as it is if `left` is greater than `right`.
    pub(crate) fn exit_if_greater(&mut self, left: u8, right: u8) -> &mut Self {
        // Over the exit unless greater (JLE).
        self.push(0xbd, left, right, 1, 0);
        self.exit()
    }

    pub(crate) fn exit(&mut self) -> &mut Self {
        self.push(0x95, 0, 0, 0, 0)
    }

    pub(crate) fn finish(&self) -> &[u64] {
        &self.0
    }
}
