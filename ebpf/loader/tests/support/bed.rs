//! A machine with two instances and a few VIPs, and the rows of packet tables that run on it.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use anyplace_ebpf::{
    Bucket, Counter, DataPlane, FlowEvents, Instance, Meters, Options, Port, Protocol, VipKey, VipTable,
    flow_hash,
};
use anyplace_ebpf_common as common;
use aya::{
    maps::{Array, Map, MapData, MapType},
    programs::{Program, ProgramError, TestRun as _, TestRunOptions},
};

use crate::{
    namespaces::{BpfFs, Namespace, object},
    packets::{End, Ip, assert_checksums, gue},
};

pub(crate) const XDP_DROP: u32 = 1;
pub(crate) const XDP_PASS: u32 = 2;
pub(crate) const XDP_TX: u32 = 3;
pub(crate) const TC_UNSPEC: u32 = u32::MAX;
pub(crate) const TC_SHOT: u32 = 2;
pub(crate) const TC_REDIRECT: u32 = 7;

pub(crate) const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 9);
pub(crate) const OTHER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
pub(crate) const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
pub(crate) const VIP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 1);
pub(crate) const MACHINE: Ipv4Addr = Ipv4Addr::new(10, 1, 1, 1);
pub(crate) const MACHINE6: Ipv6Addr = Ipv6Addr::new(0xfd61, 1, 1, 0, 0, 0, 0, 1);
/// Two instances of this machine.
pub(crate) const HERE: Ipv4Addr = Ipv4Addr::new(10, 1, 1, 65);
pub(crate) const HERE_TOO: Ipv4Addr = Ipv4Addr::new(10, 1, 1, 66);
/// In this machine's range, but nobody's.
pub(crate) const GONE: Ipv4Addr = Ipv4Addr::new(10, 1, 1, 99);
/// Instances of another machine.
pub(crate) const THERE: Ipv4Addr = Ipv4Addr::new(10, 1, 2, 65);
pub(crate) const THERE_TOO: Ipv4Addr = Ipv4Addr::new(10, 1, 2, 66);
/// A machine of another location.
pub(crate) const FAR: Ipv4Addr = Ipv4Addr::new(10, 2, 1, 1);
/// Who encapsulated what `target` receives.
pub(crate) const SENDER: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 1, 9, 1), 50_000);
pub(crate) const CONTAINER_PORT: u16 = 8080;

/// The machine under test.
pub(crate) struct Bed {
    pub(crate) plane: DataPlane,
    pub(crate) namespace: Namespace,
    bpffs: BpfFs,
}

impl Bed {
    pub(crate) fn new() -> Self {
        let namespace = Namespace::new("packets");
        namespace.ip("link add eth0 mtu 1500 type veth peer name router\n\
             link add apv0a010141 type veth peer name inner1\n\
             link add apv0a010142 type veth peer name inner2\n");
        let bpffs = BpfFs::new();
        let plane = load(&namespace, &bpffs);
        let mut bed = Self { plane, namespace, bpffs };
        bed.vip(80, bucket(THERE, THERE), bucket(HERE, HERE));
        bed.vip(81, bucket(THERE, THERE_TOO), bucket(THERE, THERE));
        bed.vip(82, bucket(HERE, HERE), bucket(HERE, HERE));
        bed.vip(83, bucket(FAR, HERE), bucket(THERE, HERE));
        bed.vip(84, bucket(HERE, THERE), bucket(HERE, HERE_TOO));
        for key in keys(85) {
            bed.plane.set_vip(key, &VipTable::default()).unwrap();
        }
        for (address, name) in [(HERE, "apv0a010141"), (HERE_TOO, "apv0a010142")] {
            let ports = (80..85)
                .flat_map(keys)
                .map(|vip| Port { vip, container_port: CONTAINER_PORT + vip.port - 80 })
                .collect();
            bed.set_instance(&Instance { address, host_interface: name.into(), ports });
        }
        bed
    }

    /// The next router on the same maps.
    pub(crate) fn restart(self) -> Self {
        let Self { plane, namespace, bpffs } = self;
        drop(plane);
        let plane = load(&namespace, &bpffs);
        Self { plane, namespace, bpffs }
    }

    pub(crate) fn set_instance(&mut self, instance: &Instance) {
        let Bed { plane, namespace, .. } = self;
        namespace.enter(|| plane.set_instance(instance).unwrap());
    }

    pub(crate) fn vip(&mut self, port: u16, full: Bucket, local: Bucket) {
        let table = VipTable { buckets: vec![full], local: vec![local] };
        for key in keys(port) {
            self.plane.set_vip(key, &table).unwrap();
        }
    }

    /// Runs one frame through a program.
    pub(crate) fn run(&self, program: &str, frame: &[u8]) -> (u32, Vec<u8>) {
        self.namespace.enter(|| test_run(&self.plane, program, frame).unwrap())
    }

    /// The counters, as one reads them beside the router.
    pub(crate) fn meters(&self) -> Meters {
        Meters::open(&self.bpffs.path.join("anyplace")).unwrap()
    }

    /// What the flow log is told.
    pub(crate) fn flow_events(&self) -> FlowEvents {
        FlowEvents::open(&self.bpffs.path.join("anyplace")).unwrap()
    }

    /// Where the maps are pinned.
    pub(crate) fn maps_folder(&self) -> PathBuf {
        self.bpffs.path.join("anyplace").join(common::SCHEMA)
    }

    /// A map, past the loader.
    pub(crate) fn map(&self, name: &str) -> Map {
        let map = MapData::from_pin(self.maps_folder().join(name)).unwrap();
        match map.info().unwrap().map_type().unwrap() {
            MapType::Array => Map::Array(map),
            _ => Map::LruHashMap(map),
        }
    }

    /// Sets the least time between two ICMP answers, in nanoseconds.
    pub(crate) fn set_icmp_interval(&self, nanoseconds: u32) {
        let mut config: Array<_, [u8; 24]> = self.map("CONFIG").try_into().unwrap();
        let mut value = config.get(&0, 0).unwrap();
        value[12..16].copy_from_slice(&nanoseconds.to_ne_bytes());
        config.set(0, value, 0).unwrap();
    }

    pub(crate) fn count(&self, counter: Counter) -> u64 {
        self.plane.counters().unwrap().get(counter)
    }

    /// Runs a fixture and compares everything.
    pub(crate) fn check(&self, fixture: Fixture) {
        let Fixture { what, program, packet, verdict, out, counter } = fixture;
        let before = counter.map(|counter| self.count(counter));
        let (got, bytes) = self.run(program, &packet);
        assert_eq!(got, verdict, "{what}: verdict");
        let expected = out.unwrap_or(packet);
        assert!(bytes == expected, "{what}: packet\n got {}\nwant {}", hex(&bytes), hex(&expected));
        if verdict == XDP_TX || verdict == TC_REDIRECT {
            assert_checksums(what, &bytes);
        }
        if let Some(counter) = counter {
            assert_eq!(Some(self.count(counter) - 1), before, "{what}: counter {}", counter.name());
        }
    }
}

fn load(namespace: &Namespace, bpffs: &BpfFs) -> DataPlane {
    let options = Options {
        uplink: "eth0".into(),
        address: MACHINE,
        address6: Some(MACHINE6),
        pin_dir: bpffs.path.join("anyplace"),
        object: object(),
    };
    namespace.enter(|| DataPlane::load(options).unwrap_or_else(|error| panic!("{}", chain(&error))))
}

/// Runs one frame through a program: the verdict and the frame that comes out. An error is the kernel's, which takes no
/// frame that is too short for its own headers.
pub(crate) fn test_run(
    plane: &DataPlane,
    program: &str,
    frame: &[u8],
) -> Result<(u32, Vec<u8>), ProgramError> {
    let mut out = vec![0; 4096];
    let options =
        TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::default() };
    let result = match plane.object().program(program).unwrap() {
        Program::Xdp(program) => program.test_run(options)?,
        Program::SchedClassifier(program) => program.test_run(options)?,
        _ => panic!("{program} is of an unknown kind"),
    };
    out.truncate(result.data_size_out as usize);
    Ok((result.return_value, out))
}

/// One row of the table.
pub(crate) struct Fixture {
    pub(crate) what: &'static str,
    pub(crate) program: &'static str,
    pub(crate) packet: Vec<u8>,
    pub(crate) verdict: u32,
    /// `None`: the packet as it came.
    pub(crate) out: Option<Vec<u8>>,
    pub(crate) counter: Option<Counter>,
}

/// A packet that `ingress` drops or leaves alone.
pub(crate) fn unchanged(
    what: &'static str,
    program: &'static str,
    packet: Vec<u8>,
    verdict: u32,
    counter: Option<Counter>,
) -> Fixture {
    Fixture { what, program, packet, verdict, out: None, counter }
}

pub(crate) fn changed(
    what: &'static str,
    program: &'static str,
    packet: Vec<u8>,
    verdict: u32,
    out: Vec<u8>,
    counter: Counter,
) -> Fixture {
    Fixture { what, program, packet, verdict, out: Some(out), counter: Some(counter) }
}

/// What `ingress` makes of a client's packet.
pub(crate) fn encapsulated(hop: Ipv4Addr, hops: &[Ipv4Addr], inner: &Ip) -> Ip {
    let port = |at: usize| u16::from_be_bytes([inner.payload[at], inner.payload[at + 1]]);
    encapsulated_as(hop, hops, inner, ((inner.source, port(0)), port(2), inner.protocol))
}

/// The same for a packet whose ports aren't its own: client, VIP's port, protocol.
pub(crate) fn encapsulated_as(
    hop: Ipv4Addr,
    hops: &[Ipv4Addr],
    inner: &Ip,
    (client, vip_port, protocol): (End, u16, u8),
) -> Ip {
    let hash = flow_hash(
        common::address(client.0.octets()),
        common::address(inner.destination.octets()),
        common::port(client.1),
        common::port(vip_port),
        protocol,
    );
    let source = u16::from_be(common::source_port(hash));
    assert!(source >= 49_152);
    let mut outer = gue((MACHINE, source), hop, hops, inner);
    outer.tos = inner.tos;
    outer
}

impl Fixture {
    pub(crate) fn counter(mut self, counter: Option<Counter>) -> Self {
        self.counter = counter;
        self
    }
}

pub(crate) fn key(port: u16, protocol: Protocol) -> VipKey {
    VipKey { address: VIP.into(), port, protocol }
}

/// A port of both VIPs and both protocols.
pub(crate) fn keys(port: u16) -> [VipKey; 4] {
    let key6 = |protocol| VipKey { address: VIP6.into(), port, protocol };
    [key(port, Protocol::Tcp), key(port, Protocol::Udp), key6(Protocol::Tcp), key6(Protocol::Udp)]
}

pub(crate) fn bucket(now: Ipv4Addr, before: Ipv4Addr) -> Bucket {
    Bucket { now, before }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text += &format!(": {error}");
        next = error.source();
    }
    text
}
