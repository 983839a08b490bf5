//! The data plane in plain Rust: a packet and the maps' contents in; a verdict, a packet and counters out.
//!
//! The oracle of the programs in `ebpf/programs`, for tests only. It shares no code with them, only numbers: the
//! constants and the list of counters of `anyplace-ebpf-common`. It reads bytes where the programs read structures,
//! speaks host byte order where they don't, and is written to be read, not to be fast. Where the kernel's helpers have
//! habits (which of two zeroes a checksum becomes), it has the same.
//!
//! Tables are unbounded here, and ICMP answers unlimited: a test that fills a bounded map of the kernel's, or leaves its
//! rate limit on, must expect differences.

mod bytes;
mod bytes6;
mod icmp;
mod ingress;
mod ingress6;
mod opening;
mod reply;
mod reply6;
mod target;
mod target6;

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyplace_ebpf_common::{Counter, Outcome};

pub use bytes6::instance6;
pub use opening::opening;

/// A program of the data plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// XDP on the uplink.
    Ingress,
    /// TCX ingress of the uplink; for IPv6 inside, the program behind it too.
    Target,
    /// TCX ingress of an instance's veth, outside.
    Reply,
}

impl Program {
    /// Its name in the object.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Target => "target",
            Self::Reply => "reply",
        }
    }
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The stack's.
    Pass,
    /// Gone.
    Drop,
    /// Out of the interface that it came from.
    Transmit,
    /// To another interface.
    Redirect,
}

/// A VIP's port.
pub type Vip = (IpAddr, u16, u8);
/// A flow: client, VIP, client's port, VIP's port, protocol.
pub type Flow = (IpAddr, IpAddr, u16, u16, u8);
/// A packet in fragments: source, destination, identification, protocol (0 for IPv6, which doesn't tell by it).
pub type Fragmented = (IpAddr, IpAddr, u32, u8);

/// Owner now, owner before; 0.0.0.0 for nobody.
pub type Bucket = (Ipv4Addr, Ipv4Addr);

/// The tables of a VIP.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    /// For packets of clients.
    pub full: Vec<Bucket>,
    /// For packets of other locations.
    pub local: Vec<Bucket>,
}

/// What ingress counts for one VIP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VipCount {
    /// Packets.
    pub packets: u64,
    /// Bytes from the IP header on.
    pub bytes: u64,
    /// SYNs.
    pub connections: u64,
}

/// What the target counts for one VIP port at one instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InstanceCount {
    /// Packets.
    pub packets: u64,
    /// Bytes from the client's IP header on.
    pub bytes: u64,
    /// Flows established.
    pub new_flows: u64,
}

/// What is told of a flow: the outcome, the flow, the instance that got it.
pub type Event = (Outcome, Flow, Option<Ipv4Addr>);

/// A machine: its maps, its counters.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its address.
    pub address: Ipv4Addr,
    /// Its IPv6 address; unspecified if it has none.
    pub address6: Ipv6Addr,
    /// MTU of the uplink.
    pub mtu: usize,
    /// The VIPs.
    pub vips: BTreeMap<Vip, Tables>,
    /// MAC addresses of the instances here.
    pub instances: BTreeMap<Ipv4Addr, [u8; 6]>,
    /// The port that an instance serves a VIP's port on.
    pub ports: BTreeMap<(Ipv4Addr, Vip), u16>,
    /// The VIP's port that an instance's port stands for, by the instance's address of the VIP's family.
    pub replies: BTreeMap<(IpAddr, u16, u8), (IpAddr, u16)>,
    /// Who owns a flow.
    pub flows: HashMap<Flow, Ipv4Addr>,
    /// Who has seen the one packet of a flow.
    pub embryonic: HashMap<Flow, Ipv4Addr>,
    /// The ports and the protocol of packets that come in fragments.
    pub fragments: HashMap<Fragmented, (u16, u16, u8)>,
    /// Prefixes that may encapsulate; none for everybody.
    pub fleet: Vec<(Ipv4Addr, u8)>,
    /// Indexed by [`Counter`].
    pub counters: Vec<u64>,
    /// By VIP.
    pub vip_counters: BTreeMap<Vip, VipCount>,
    /// By instance and VIP.
    pub instance_counters: BTreeMap<(Ipv4Addr, Vip), InstanceCount>,
    /// What the flow log is told, of every flow.
    pub events: Vec<Event>,
}

impl Machine {
    /// A machine without VIPs and instances.
    pub fn new(address: Ipv4Addr, mtu: usize) -> Self {
        Self {
            address,
            address6: Ipv6Addr::UNSPECIFIED,
            mtu,
            vips: BTreeMap::new(),
            instances: BTreeMap::new(),
            ports: BTreeMap::new(),
            replies: BTreeMap::new(),
            flows: HashMap::new(),
            embryonic: HashMap::new(),
            fragments: HashMap::new(),
            fleet: Vec::new(),
            counters: vec![0; Counter::ALL.len()],
            vip_counters: BTreeMap::new(),
            instance_counters: BTreeMap::new(),
            events: Vec::new(),
        }
    }

    /// Runs a frame through a program; the frame becomes what leaves it.
    pub fn run(&mut self, program: Program, frame: &mut Vec<u8>) -> Verdict {
        let result = match program {
            Program::Ingress => self.ingress(frame),
            Program::Target => self.target(frame),
            Program::Reply => self.reply(frame),
        };
        result.unwrap_or_else(|reason| {
            self.count(reason);
            Verdict::Drop
        })
    }

    fn count(&mut self, counter: Counter) {
        self.add(counter, 1);
    }

    fn add(&mut self, counter: Counter, amount: u64) {
        self.counters[counter as usize] += amount;
    }

    /// Tells the flow log that a packet was dropped, if it was for one of these reasons.
    fn refuse(&mut self, reason: Counter, flow: Flow) {
        match reason {
            Counter::NoBackend => self.events.push((Outcome::NoBackend, flow, None)),
            Counter::NoInstance => self.events.push((Outcome::NoInstance, flow, None)),
            _ => {}
        }
    }

    fn is_vip(&self, address: IpAddr) -> bool {
        self.vips.keys().any(|vip| vip.0 == address)
    }
}

/// The bucket of a flow, if it has an owner.
fn bucket(table: &[Bucket], flow: &Flow) -> Option<Bucket> {
    let slot = ((bytes::flow_hash(flow) >> 32) * table.len() as u64) >> 32;
    table.get(slot as usize).copied().filter(|(now, _)| !now.is_unspecified())
}
