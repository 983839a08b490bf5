//! Which nodes there are, how they are addressed, and how far apart they are.
//!
//! Location `L` (from 1) uses 10.L.0.0/16 inside the fabric; every link is a /31 whose odd or even end is fixed below,
//! so an address says which node and which link it belongs to. Links that clients' packets take have a /127 too, out
//! of fd61:L::/32 inside the fabric and 2001:db8:c::/48 for clients.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

/// The pool of virtual IPs that every location announces.
pub const VIP_PREFIX: &str = "203.0.113.0/24";
/// The same for IPv6.
pub const VIP_PREFIX6: &str = "2001:db8:a::/64";

/// One location: its name, number and what its scheduler tells the global one about it.
#[derive(Clone, Debug)]
pub struct Location {
    /// Short name, as users see it (`ams`).
    pub name: String,
    /// Number from 1; the second byte of every fabric address of this location.
    pub index: u8,
    /// Region label.
    pub region: String,
    /// ISO country code.
    pub country: String,
    /// Degrees north.
    pub latitude: f64,
    /// Degrees east.
    pub longitude: f64,
    /// IANA time zone.
    pub timezone: String,
}

impl Location {
    fn new(name: &str, index: u8, region: &str, country: &str, at: (f64, f64), timezone: &str) -> Self {
        Self {
            name: name.into(),
            index,
            region: region.into(),
            country: country.into(),
            latitude: at.0,
            longitude: at.1,
            timezone: timezone.into(),
        }
    }

    /// Node name of the edge router.
    pub fn edge(&self) -> String {
        format!("{}-edge", self.name)
    }

    /// Node name of the client near this location.
    pub fn client(&self) -> String {
        format!("{}-client", self.name)
    }

    /// Node name of the host of the location scheduler and the registry.
    pub fn control(&self) -> String {
        format!("{}-ctl", self.name)
    }

    /// Address of the location scheduler and the registry.
    pub fn control_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.index, 0, 10)
    }

    /// Address of the client near this location.
    pub fn client_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(198, 51, 100, self.index * 10)
    }

    /// IPv6 address of the client near this location.
    pub fn client_address6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0x2001, 0xdb8, 0xc, self.index.into(), 0, 0, 0, 1)
    }

    /// AS number of the machines of this location.
    pub fn machine_as(&self) -> u32 {
        65_000 + u32::from(self.index)
    }

    /// AS number of the edge.
    pub fn edge_as(&self) -> u32 {
        65_100 + u32::from(self.index)
    }

    /// AS number of the client.
    pub fn client_as(&self) -> u32 {
        65_200 + u32::from(self.index)
    }
}

/// One machine of a location.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Name, also the node's name (`ams-1`).
    pub name: String,
    /// The location's name.
    pub location: String,
    /// The location's number.
    pub location_index: u8,
    /// Number from 1 inside the location.
    pub index: u8,
}

impl Machine {
    /// Address of the uplink, and of the machine's agent and router.
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.location_index, self.index, 1)
    }

    /// The edge's end of the uplink.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.location_index, self.index, 0)
    }

    /// IPv6 address of the uplink.
    pub fn address6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd61, self.location_index.into(), self.index.into(), 0, 0, 0, 0, 1)
    }

    /// The edge's end of the uplink.
    pub fn gateway6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd61, self.location_index.into(), self.index.into(), 0, 0, 0, 0, 0)
    }

    /// Addresses of the instances on this machine.
    pub fn instance_cidr(&self) -> String {
        format!("10.{}.{}.64/26", self.location_index, self.index)
    }

    /// The edge's interface towards this machine.
    pub fn edge_interface(&self) -> String {
        format!("m{}", self.index)
    }
}

/// What a testbed is made of.
#[derive(Clone, Debug)]
pub struct Topology {
    /// The locations. The global scheduler hangs on the first one's edge.
    pub locations: Vec<Location>,
    /// Machines in each location.
    pub machines_per_location: u8,
    /// One-way delay between the edges of two locations, by name.
    pub delays: Vec<(String, String, Duration)>,
    /// One-way delay between a client and the edge near it.
    pub client_delay: Duration,
}

impl Topology {
    /// Amsterdam, Tokyo and São Paulo, two machines each.
    pub fn three_locations() -> Self {
        let delay = |a: &str, b: &str, ms| (a.to_owned(), b.to_owned(), Duration::from_millis(ms));
        Self {
            locations: vec![
                Location::new("ams", 1, "eu", "NL", (52.31, 4.76), "Europe/Amsterdam"),
                Location::new("nrt", 2, "ap", "JP", (35.76, 140.39), "Asia/Tokyo"),
                Location::new("gru", 3, "sa", "BR", (-23.43, -46.47), "America/Sao_Paulo"),
            ],
            machines_per_location: 2,
            delays: vec![delay("ams", "nrt", 60), delay("ams", "gru", 50), delay("nrt", "gru", 75)],
            client_delay: Duration::from_millis(2),
        }
    }

    /// The first `count` locations of [`Self::three_locations`].
    pub fn of_locations(count: usize) -> Self {
        let mut topology = Self::three_locations();
        topology.locations.truncate(count);
        let kept: Vec<_> = topology.locations.iter().map(|location| location.name.clone()).collect();
        topology.delays.retain(|(a, b, _)| kept.contains(a) && kept.contains(b));
        topology
    }

    /// All machines, in order.
    pub fn machines(&self) -> Vec<Machine> {
        self.locations.iter().flat_map(|location| self.machines_of(location)).collect()
    }

    /// The machines of one location.
    pub fn machines_of(&self, location: &Location) -> Vec<Machine> {
        (1..=self.machines_per_location)
            .map(|index| Machine {
                name: format!("{}-{index}", location.name),
                location: location.name.clone(),
                location_index: location.index,
                index,
            })
            .collect()
    }

    /// A location by name.
    pub fn location(&self, name: &str) -> Option<&Location> {
        self.locations.iter().find(|location| location.name == name)
    }

    /// A machine by name.
    pub fn machine(&self, name: &str) -> Option<Machine> {
        self.machines().into_iter().find(|machine| machine.name == name)
    }

    /// One-way delay between two locations' edges; none within one location.
    pub fn delay(&self, a: &str, b: &str) -> Duration {
        let pair = |(x, y, _): &&(String, String, Duration)| (x == a && y == b) || (x == b && y == a);
        self.delays.iter().find(pair).map_or(Duration::ZERO, |(_, _, delay)| *delay)
    }

    /// All node names.
    pub fn nodes(&self) -> Vec<String> {
        let mut nodes = vec!["global".to_owned()];
        for location in &self.locations {
            nodes.extend([location.edge(), location.control(), location.client()]);
        }
        nodes.extend(self.machines().into_iter().map(|machine| machine.name));
        nodes
    }
}

/// Address of the global scheduler.
pub(crate) const GLOBAL_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 10);
