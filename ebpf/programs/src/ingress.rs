//! `ingress`: where clients' packets enter the fleet.
//!
//! No flow state: the hash of the 5-tuple picks a bucket, the bucket names the owner now and the owner before, and
//! both travel with the packet. So any machine may take any packet of a flow.
//!
//! Here is the way of plain TCP and UDP packets. Fragments, IP options and ICMP are `unusual`, and IPv6 is `ingress6`, in
//! functions of their own, so that they cost the others one branch each.

use core::mem::offset_of;

use anyplace_ebpf_common::{
    Config, Counter, ENCAPSULATION_BYTES, Encapsulation, GUE_FLAGS_AND_PROTOCOL, GUE_FLAGS_AND_PROTOCOL_IPV6,
    GUE_PORT, HOPS, Ipv4Header, Ports, TCP, TTL, UdpHeader, VipKey, VipValue, flow_hash, ipv4_checksum,
    source_port,
};
use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX},
    helpers::bpf_xdp_adjust_head,
    macros::xdp,
    programs::XdpContext,
};

use crate::{
    answers, answers6, events, ingress6, maps,
    packet::{self, ETHERNET, ETHERTYPE_IPV4, IPV4, TCP_FLAGS},
    packet6::ETHERTYPE_IPV6,
    unusual,
};

/// Ethernet header; even alignment, as the kernel guarantees for received frames.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Ethernet {
    destination: [u16; 3],
    source: [u16; 3],
    ethertype: u16,
}

impl Ethernet {
    /// To where it came from.
    #[inline(always)]
    pub(crate) fn back(&self) -> Self {
        Self { destination: self.source, source: self.destination, ethertype: self.ethertype }
    }
}

/// What an encapsulated frame begins with.
#[repr(C)]
struct Headers {
    ethernet: Ethernet,
    outer: Encapsulation,
}

const _: () = assert!(size_of::<Headers>() == ETHERNET + ENCAPSULATION_BYTES);

#[xdp]
pub fn ingress(ctx: XdpContext) -> u32 {
    match try_ingress(&ctx) {
        Ok(action) => action,
        Err(reason) => {
            maps::count(reason);
            XDP_DROP
        }
    }
}

/// A verdict, or the reason for a drop.
#[inline(always)]
fn try_ingress(ctx: &XdpContext) -> Result<u32, Counter> {
    let Some(ethernet) = at::<Ethernet>(ctx, 0) else { return Ok(XDP_PASS) };
    // SAFETY: `at` checked the bounds, and no helper moved the packet since.
    let ethernet = unsafe { *ethernet };
    if ethernet.ethertype != ETHERTYPE_IPV4 {
        let ipv6 = ethernet.ethertype == ETHERTYPE_IPV6;
        if !ipv6 {
            return Ok(XDP_PASS);
        }
        return Ok(match ingress6::ingress6(ctx.ctx) {
            ingress6::UNUSUAL => ingress6::unusual6(ctx.ctx),
            action => action,
        });
    }
    let Some(ip) = at::<Ipv4Header>(ctx, ETHERNET) else { return Ok(XDP_PASS) };
    // SAFETY: as above.
    let ip = unsafe { &*ip };
    if ip.version_ihl != 0x45 || !packet::is_tcp_or_udp(ip.protocol) || packet::is_fragment(ip) {
        return Ok(unusual::unusual(ctx.ctx));
    }
    let vip_address = u32::from_ne_bytes(ip.destination);
    let Some(ports) = at::<Ports>(ctx, ETHERNET + IPV4) else {
        return refuse_if_vip(vip_address, Counter::Malformed);
    };
    // SAFETY: as above.
    let ports = unsafe { *ports };
    let Some(vip) = maps::vip(&VipKey::new(vip_address, ports.destination, ip.protocol)) else {
        return refuse_if_vip(vip_address, Counter::UnknownPort);
    };

    let length = u16::from_be(ip.total_length);
    if (length as usize) < IPV4 + packet::transport_bytes(ip.protocol)
        || ETHERNET + length as usize > ctx.data_end() - ctx.data()
    {
        return Err(Counter::Malformed);
    }
    let mut opens = false;
    if ip.protocol == TCP {
        let flags = at::<u8>(ctx, ETHERNET + IPV4 + TCP_FLAGS).ok_or(Counter::Malformed)?;
        // SAFETY: as above.
        opens = packet::opens_connection(unsafe { *flags });
    }
    let flow = Flow { source: u32::from_ne_bytes(ip.source), ports, protocol: ip.protocol, opens };
    let result = forward(ctx, &flow.client(ip), &vip);
    if result == Err(Counter::NoBackend) {
        events::refused_at_ingress(ctx.ctx);
    }
    result
}

/// What a packet for a VIP belongs to: its own flow, or the one that an ICMP error is about.
pub(crate) struct Flow {
    pub(crate) source: u32,
    pub(crate) ports: Ports,
    pub(crate) protocol: u8,
    pub(crate) opens: bool,
}

impl Flow {
    #[inline(always)]
    pub(crate) fn client(&self, ip: &Ipv4Header) -> Client {
        let vip = u32::from_ne_bytes(ip.destination);
        Client {
            ipv6: false,
            class: ip.tos,
            length: u32::from(u16::from_be(ip.total_length)),
            hash: flow_hash(self.source, vip, self.ports.source, self.ports.destination, self.protocol),
            opens: self.opens,
            tell: true,
        }
    }
}

/// A client's packet, as far as its encapsulation depends on it.
pub(crate) struct Client {
    pub(crate) ipv6: bool,
    /// The class and the congestion marks.
    pub(crate) class: u8,
    /// From the IP header on.
    pub(crate) length: u32,
    /// Of its flow.
    pub(crate) hash: u64,
    /// Opens a connection.
    pub(crate) opens: bool,
    /// IPv6 only: the sender may be told that it is too big.
    pub(crate) tell: bool,
}

/// Sends a packet, whose length was checked, to the hops of its flow.
#[inline(always)]
pub(crate) fn forward(ctx: &XdpContext, client: &Client, vip: &VipValue) -> Result<u32, Counter> {
    maps::count_packet(u64::from(client.length));
    maps::count_vip(vip.counter, u64::from(client.length), client.opens);

    let config = maps::config().ok_or(Counter::HelperFailed)?;
    let outer_length = client.length + ENCAPSULATION_BYTES as u32;
    if outer_length > config.uplink_mtu {
        return Ok(if client.ipv6 {
            answers6::too_big(ctx.ctx, client.tell)
        } else {
            answers::too_big(ctx.ctx)
        });
    }
    let bucket = maps::bucket(&vip.full, client.hash).ok_or(Counter::NoBackend)?;
    let outer = encapsulation(config, client, bucket.now, bucket.before);
    let local = bucket.now == config.address || maps::is_instance(bucket.now);

    // SAFETY: the context is the kernel's; every packet pointer is fetched anew below.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -(ENCAPSULATION_BYTES as i32)) } != 0 {
        return Err(Counter::HelperFailed);
    }
    let headers = at::<Headers>(ctx, 0).ok_or(Counter::HelperFailed)?;
    // SAFETY: `at` checked the bounds after the packet moved. The old Ethernet header stands in the last bytes of the new
    // headers, and is copied before those are written.
    unsafe {
        let old = headers.byte_add(ENCAPSULATION_BYTES).cast::<Ethernet>();
        let new = &raw mut (*headers).ethernet;
        // A hop on this machine: `target` takes it as if it had been received. Else back to the fabric's router, which
        // forwards by the outer destination.
        if local {
            (*new).destination = (*old).destination;
            (*new).source = (*old).source;
        } else {
            (*new).destination = (*old).source;
            (*new).source = (*old).destination;
        }
        (*new).ethertype = ETHERTYPE_IPV4;
        (*headers).outer = outer;
    }
    Ok(if local { XDP_PASS } else { XDP_TX })
}

/// The header for a flow's packet: first hop as the destination, the rest right-aligned in the list.
#[inline(always)]
fn encapsulation(config: &Config, client: &Client, now: u32, before: u32) -> Encapsulation {
    let outer_length = client.length as u16 + ENCAPSULATION_BYTES as u16;
    let mut ip = Ipv4Header {
        version_ihl: 0x45,
        // The client's class and congestion marks, as RFC 6040 asks.
        tos: client.class,
        total_length: outer_length.to_be(),
        id: 0,
        fragment: 0x4000u16.to_be(),
        ttl: TTL,
        protocol: anyplace_ebpf_common::UDP,
        checksum: 0,
        source: config.address.to_ne_bytes(),
        destination: now.to_ne_bytes(),
    };
    ip.checksum = ipv4_checksum(&ip);
    let none = [0; 4];
    // A flow that its owner doesn't know is the former owner's; if it is unknown there too, it is new (UDP) or was
    // forgotten by whom it most likely belongs to, and comes back.
    let (next_hop, hops) = if before == now || before == 0 {
        (HOPS, [none, none, none])
    } else {
        (HOPS - 2, [none, before.to_ne_bytes(), now.to_ne_bytes()])
    };
    Encapsulation {
        ip,
        udp: UdpHeader {
            source: source_port(client.hash),
            destination: GUE_PORT.to_be(),
            length: (outer_length - IPV4 as u16).to_be(),
            checksum: 0,
        },
        gue: if client.ipv6 { GUE_FLAGS_AND_PROTOCOL_IPV6 } else { GUE_FLAGS_AND_PROTOCOL },
        private_type: 0,
        next_hop,
        hop_count: HOPS,
        hops,
    }
}

/// A packet that can't be forwarded: a drop if it was for a VIP, else none of our business.
#[inline(always)]
fn refuse_if_vip(address: u32, reason: Counter) -> Result<u32, Counter> {
    if maps::is_vip(address) { Err(reason) } else { Ok(XDP_PASS) }
}

/// A pointer to a `T` at `offset`, if the frame has that many bytes.
#[inline(always)]
pub(crate) fn at<T>(ctx: &XdpContext, offset: usize) -> Option<*mut T> {
    let start = ctx.data();
    if start + offset + size_of::<T>() > ctx.data_end() {
        return None;
    }
    Some((start + offset) as *mut T)
}

const _: () = assert!(offset_of!(Ethernet, ethertype) == 12);
