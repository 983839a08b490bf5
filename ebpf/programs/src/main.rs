//! The data plane in three programs.
//!
//! - `ingress` (XDP, uplink): a client's packet for a VIP gets a hop list and goes to the first hop.
//! - `target` (TCX ingress, uplink): an encapsulated packet is delivered to an instance of this machine, or passed on.
//! - `reply` (TCX ingress, outer end of each container's veth): an instance's answer leaves as the VIP's.
//!
//! The layouts of the maps and the wire format are `anyplace-ebpf-common`'s; the packet paths are drawn in
//! `ebpf/README.md`. This crate must not know about locations, weights or health: tables come finished from user space.

#![no_std]
#![no_main]

mod answers;
mod ingress;
mod maps;
mod packet;
mod quoted;
mod reply;
mod target;
mod unusual;

/// The kernel's helpers used here are open to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // Nothing here panics: the linker drops this, and the verifier would refuse a loop without end.
    loop {}
}
