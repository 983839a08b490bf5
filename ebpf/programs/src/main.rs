//! The data plane in four programs.
//!
//! - `ingress` (XDP, uplink): a client's packet for a VIP gets a hop list and goes to the first hop.
//! - `target` (TCX ingress, uplink): an encapsulated packet is delivered to an instance of this machine, or passed on.
//! - `target6` (behind `target`): the same for encapsulated IPv6 packets. A program of its own, so that the verifier looks
//!   at each by itself.
//! - `reply` (TCX ingress, outer end of each container's veth): an instance's answer leaves as the VIP's.
//!
//! The layouts of the maps and the wire format are `anyplace-ebpf-common`'s; the packet paths are drawn in
//! `ebpf/README.md`. What is there for IPv6 stands in modules named `...6`. This crate must not know about locations, weights or health: tables come finished from user space.

#![no_std]
#![no_main]

mod answers;
mod answers6;
mod deliver;
mod events;
mod ingress;
mod ingress6;
mod inner;
mod maps;
mod maps6;
mod packet;
mod packet6;
mod quoted;
mod quoted6;
mod reply;
mod reply6;
mod target;
mod target6;
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
