//! Programs that undo what the program under test did to the packet, choose the next flow and VIP, and tail-call it.
//!
//! BPF_PROG_TEST_RUN repeats a program on one packet and doesn't reset it. So each run begins by restoring the packet.
//! The wrapper's own cost is measured with the same instructions around a program that only returns: there the amount
//! to strip (or to put back) is zero, which takes the same helper call. What the program under test spends on its own
//! change of size is thus part of its figure.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd, RawFd},
};

use crate::bpf::{self, Assembler, Kind, Size};

/// Bytes of the encapsulation.
pub(crate) const ENCAPSULATION: i32 = 48;
const ETHERNET: usize = 14;
/// Ethernet header of all frames: destination, source.
pub(crate) const MACS: [u8; 12] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0xfe];

/// Length of an IPv6 header less that of an IPv4 header: what a change of the protocol takes or gives.
pub(crate) const GROWTH: i32 = 20;
const HELPER_TAIL_CALL: i32 = 12;
const HELPER_SKB_STORE_BYTES: i32 = 9;
const HELPER_SKB_CHANGE_PROTO: i32 = 31;
const HELPER_XDP_ADJUST_HEAD: i32 = 44;
const HELPER_SKB_ADJUST_ROOM: i32 = 50;
const ADJUST_ROOM_MAC: i32 = 1;

/// Flows and VIPs that the packets take in turn.
#[derive(Clone, Copy)]
pub(crate) struct Mix {
    /// A power of two.
    pub(crate) flows: u32,
    /// VIPs `base`, `base + 1`, ...; at most 65,536.
    pub(crate) vips: u32,
    pub(crate) base: u32,
}

/// A wrapper, and what must live as long as it.
pub(crate) struct Wrapper {
    pub(crate) program: OwnedFd,
    _targets: OwnedFd,
    _state: OwnedFd,
}

/// Around an XDP program that encapsulates: the frame loses its first 48 bytes.
pub(crate) fn around_ingress(program: RawFd, mix: Mix, strip: i32, version: u8) -> io::Result<Wrapper> {
    let targets = targets(program)?;
    let state = bpf::create_map(bpf::MAP_TYPE_ARRAY, 8)?;
    let ethertype = if version == 4 { 0x0008 } else { 0xdd86 };
    let first = u64::from_ne_bytes([MACS[0], MACS[1], MACS[2], MACS[3], MACS[4], MACS[5], MACS[6], MACS[7]]);
    let second = i32::from_ne_bytes([MACS[8], MACS[9], MACS[10], MACS[11]]);
    let mut code = Assembler::default();
    code.mov(6, 1).mov_immediate(2, strip).call(HELPER_XDP_ADJUST_HEAD);
    code.load(Size::U32, 7, 6, 0).load(Size::U32, 8, 6, 4);
    code.mov(1, 7).add_immediate(1, 64).mov_immediate(0, 0).exit_if_greater(1, 8);
    code.constant(1, first).store(Size::U64, 7, 0, 1);
    code.mov_immediate(1, second).store(Size::U32, 7, 8, 1);
    code.mov_immediate(1, ethertype).store(Size::U16, 7, 12, 1);
    code.map_value(9, &state);
    choose(&mut code, mix);
    let (source, destination, port) = match version {
        4 => (26, 30, 34),
        _ => (34, 50, 54),
    };
    code.store(Size::U32, 7, source, 2).store(Size::U16, 7, port, 2).store(Size::U32, 7, destination, 4);
    tail_call(&mut code, &targets);
    Ok(Wrapper { program: bpf::load(Kind::Xdp, code.finish())?, _targets: targets, _state: state })
}

/// Around a classifier that decapsulates IP of this version: the frame gets `grow` bytes back, and `frame`'s bytes from the
/// start on. What was IPv6 inside has become an IPv6 packet, and becomes an IPv4 packet again, which costs a helper call
/// more; see [`changing`].
pub(crate) fn around_target(
    program: RawFd,
    mix: Mix,
    grow: i32,
    frame: &[u8],
    version: u8,
) -> io::Result<Wrapper> {
    const COUNTER: usize = 8;
    let targets = targets(program)?;
    let (headers, source, destination, port) = if version == 4 { (40, 12, 16, 20) } else { (60, 20, 36, 40) };
    let headers = &frame[..ETHERNET + ENCAPSULATION as usize + headers];
    let state = bpf::create_map(bpf::MAP_TYPE_ARRAY, 256)?;
    let mut value = [0; 256];
    value[COUNTER..COUNTER + headers.len()].copy_from_slice(headers);
    bpf::set_element(&state, &value)?;
    let inner = (COUNTER + ETHERNET + ENCAPSULATION as usize) as i16;
    let mut code = Assembler::default();
    code.mov(6, 1);
    if version == 6 {
        code.mov_immediate(2, 0x0008).mov_immediate(3, 0).call(HELPER_SKB_CHANGE_PROTO).mov(1, 6);
    }
    code.mov_immediate(2, grow).mov_immediate(3, ADJUST_ROOM_MAC).mov_immediate(4, 0);
    code.call(HELPER_SKB_ADJUST_ROOM).map_value(9, &state);
    choose(&mut code, mix);
    code.store(Size::U32, 9, inner + source, 2).store(Size::U16, 9, inner + port, 2);
    code.store(Size::U32, 9, inner + destination, 4);
    code.mov(1, 6).mov_immediate(2, 0).mov(3, 9).add_immediate(3, COUNTER as i32);
    code.mov_immediate(4, headers.len() as i32).mov_immediate(5, 0).call(HELPER_SKB_STORE_BYTES);
    tail_call(&mut code, &targets);
    Ok(Wrapper { program: bpf::load(Kind::Classifier, code.finish())?, _targets: targets, _state: state })
}

/// A program that only returns a verdict.
pub(crate) fn trivial(kind: Kind, verdict: i32) -> io::Result<OwnedFd> {
    bpf::load(kind, Assembler::default().mov_immediate(0, verdict).exit().finish())
}

/// A classifier that makes an IPv6 packet of an IPv4 packet, twenty bytes longer, and returns a verdict: what the wrapper
/// undoes. Both changes together tell about what the one costs.
pub(crate) fn changing(verdict: i32) -> io::Result<OwnedFd> {
    let mut code = Assembler::default();
    code.mov_immediate(2, 0xdd86).mov_immediate(3, 0).call(HELPER_SKB_CHANGE_PROTO);
    bpf::load(Kind::Classifier, code.mov_immediate(0, verdict).exit().finish())
}

/// Counts in the state's first word; leaves the flow in `r2` and the VIP, as it stands in the packet, in `r4`.
///
/// Both walk by the golden ratio, each by another power of it: all are visited before one comes again, far apart from
/// each other, which is the worst that can be done to a cache.
fn choose(code: &mut Assembler, mix: Mix) {
    code.load(Size::U64, 1, 9, 0).add_immediate(1, 1).store(Size::U64, 9, 0, 1);
    code.constant(3, 0x9e37_79b9_7f4a_7c15).mov(2, 1).multiply(2, 3).shift_right(2, 40);
    code.and_immediate(2, mix.flows as i32 - 1).add_immediate(2, 0x0102);
    code.constant(3, 0x6180_339b_8fb6_2b1d).mov(4, 1).multiply(4, 3).shift_right(4, 48);
    code.multiply_immediate(4, mix.vips as i32).shift_right(4, 16).constant(3, u64::from(mix.base));
    code.add(4, 3).big_endian_32(4);
}

fn targets(program: RawFd) -> io::Result<OwnedFd> {
    let targets = bpf::create_map(bpf::MAP_TYPE_PROG_ARRAY, 4)?;
    bpf::set_element(&targets, &program.as_raw_fd().to_ne_bytes())?;
    Ok(targets)
}

/// Ends the program; 0 if the call fails.
fn tail_call(code: &mut Assembler, targets: &OwnedFd) {
    code.mov(1, 6).map(2, targets).mov_immediate(3, 0).call(HELPER_TAIL_CALL).mov_immediate(0, 0).exit();
}
