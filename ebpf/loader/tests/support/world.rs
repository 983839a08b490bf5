//! One machine twice: in the kernel's maps, and in the model.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    num::NonZeroU32,
    sync::Mutex,
};

use anyplace_ebpf::{Bucket, Counter, FlowEvent, FlowEvents, Instance, Port, Protocol, VipKey, VipTable};
use anyplace_ebpf_model::{
    Event, Flow, InstanceCount, Machine, Program, Tables, Verdict, VipCount, instance6,
};
use anyplace_seed::Seed;
use aya::{
    Pod,
    maps::{HashMap, MapData},
};

use crate::{
    bed::{
        Bed, CONTAINER_PORT, HERE, HERE_TOO, MACHINE, MACHINE6, OTHER, TC_REDIRECT, TC_SHOT, TC_UNSPEC, VIP,
        VIP6, XDP_DROP, XDP_PASS, XDP_TX, hex, test_run,
    },
    random::{HOPS, PORTS, VIP_TOO},
    random6::VIP6_TOO,
};

const VIPS: [IpAddr; 4] = [IpAddr::V4(VIP), IpAddr::V4(VIP_TOO), IpAddr::V6(VIP6), IpAddr::V6(VIP6_TOO)];

type FlowMap = HashMap<MapData, [u8; 16], [u8; 4]>;
type FlowMap6 = HashMap<MapData, [u8; 40], [u8; 4]>;
type FragmentMap = HashMap<MapData, [u8; 12], [u8; 4]>;
type FragmentMap6 = HashMap<MapData, [u8; 36], [u8; 8]>;

pub(crate) struct World {
    bed: Bed,
    model: Machine,
    flows: Mutex<FlowMap>,
    embryonic: Mutex<FlowMap>,
    fragments: Mutex<FragmentMap>,
    flows6: Mutex<FlowMap6>,
    embryonic6: Mutex<FlowMap6>,
    fragments6: Mutex<FragmentMap6>,
    events: FlowEvents,
    /// What was counted by IPv6 packets.
    six: Vec<u64>,
    /// Counters before the present tables.
    base: BTreeMap<&'static str, u64>,
    /// Counters before any packet.
    first: BTreeMap<&'static str, u64>,
}

impl World {
    pub(crate) fn new() -> Self {
        let mut bed = Bed::new();
        bed.set_icmp_interval(0);
        bed.plane.set_flow_events(NonZeroU32::new(1)).unwrap();
        let events = bed.flow_events();
        let flows = Mutex::new(bed.map("FLOWS").try_into().unwrap());
        let embryonic = Mutex::new(bed.map("EMBRYONIC").try_into().unwrap());
        let fragments = Mutex::new(bed.map("FRAGMENTS").try_into().unwrap());
        let flows6 = Mutex::new(bed.map("FLOWS6").try_into().unwrap());
        let embryonic6 = Mutex::new(bed.map("EMBRYONIC6").try_into().unwrap());
        let fragments6 = Mutex::new(bed.map("FRAGMENTS6").try_into().unwrap());
        let model = machine();
        let (base, first, six) = (BTreeMap::new(), BTreeMap::new(), vec![0; Counter::ALL.len()]);
        let mut world = Self {
            bed,
            model,
            flows,
            embryonic,
            fragments,
            flows6,
            embryonic6,
            fragments6,
            events,
            six,
            base,
            first,
        };
        world.first = world.counters();
        world
    }

    /// New tables, new instances, no flows.
    pub(crate) fn draw_tables(&mut self, random: &mut Seed) {
        clear(&self.flows);
        clear(&self.embryonic);
        clear(&self.fragments);
        clear(&self.flows6);
        clear(&self.embryonic6);
        clear(&self.fragments6);
        self.model = machine();
        for vip in VIPS {
            for port in PORTS {
                for protocol in [Protocol::Tcp, Protocol::Udp] {
                    self.draw_vip(random, VipKey { address: vip, port, protocol });
                }
            }
        }
        let World { bed, model, .. } = self;
        for (address, name) in [(HERE, "apv0a010141"), (HERE_TOO, "apv0a010142")] {
            if random.chance(20) {
                bed.namespace.enter(|| bed.plane.remove_instance(address).unwrap());
                continue;
            }
            let mut ports = Vec::new();
            for (index, vip) in VIPS.into_iter().enumerate() {
                for (port, protocol) in PORTS.flat_map(|port| [(port, Protocol::Tcp), (port, Protocol::Udp)])
                {
                    if random.chance(15) {
                        continue;
                    }
                    let container_port = CONTAINER_PORT + 100 * (index as u16 % 2) + port - PORTS.start;
                    ports.push(Port { vip: VipKey { address: vip, port, protocol }, container_port });
                    let number = number(protocol);
                    model.ports.insert((address, (vip, port, number)), container_port);
                    let own = if vip.is_ipv4() { address.into() } else { instance6(address).into() };
                    model.replies.insert((own, container_port, number), (vip, port));
                }
            }
            let [a, b, c, d] = address.octets();
            model.instances.insert(address, [0x02, 0x61, a, b, c, d]);
            let instance = Instance { address, host_interface: name.into(), ports };
            // Serving nothing first, so that its counters start at zero.
            bed.set_instance(&Instance { ports: Vec::new(), ..instance.clone() });
            bed.set_instance(&instance);
        }
        let fleet = match random.index(3) {
            0 => vec![],
            1 => vec![(Ipv4Addr::new(10, 1, 0, 0), 16), (OTHER, 32)],
            _ => vec![(Ipv4Addr::new(10, 0, 0, 0), 8)],
        };
        self.bed.plane.set_fleet(&fleet).unwrap();
        self.model.fleet = fleet;
        self.base = self.counters();
    }

    fn draw_vip(&mut self, random: &mut Seed, key: VipKey) {
        // Gone first, so that its counters start at zero.
        self.bed.plane.remove_vip(key).unwrap();
        if random.chance(8) {
            return;
        }
        let mut table = || -> Vec<Bucket> {
            (0..random.index(6))
                .map(|_| {
                    let now = random.pick(&HOPS);
                    let before = match random.index(4) {
                        0 => random.pick(&HOPS),
                        1 => Ipv4Addr::UNSPECIFIED,
                        _ => now,
                    };
                    let now = if random.chance(4) { Ipv4Addr::UNSPECIFIED } else { now };
                    Bucket { now, before }
                })
                .collect()
        };
        let tables = VipTable { buckets: table(), local: table() };
        self.bed.plane.set_vip(key, &tables).unwrap();
        let pairs = |buckets: &[Bucket]| buckets.iter().map(|bucket| (bucket.now, bucket.before)).collect();
        let tables = Tables { full: pairs(&tables.buckets), local: pairs(&tables.local) };
        self.model.vips.insert((key.address, key.port, number(key.protocol)), tables);
    }

    /// Runs a frame through both and compares; false if the kernel takes no such frame.
    pub(crate) fn check(&mut self, program: Program, frame: &[u8], what: &str) -> bool {
        let Ok((mut verdict, mut out)) = test_run(&self.bed.plane, program.name(), frame) else {
            return false;
        };
        if program == Program::Target && verdict == TC_UNSPEC {
            (verdict, out) = test_run(&self.bed.plane, "target6", &out).unwrap();
        }
        let mut expected = frame.to_vec();
        let before = self.model.counters.clone();
        let wanted = self.model.run(program, &mut expected);
        if is_ipv6(frame) {
            let growth = self.model.counters.iter().zip(before).map(|(now, then)| now - then);
            self.six.iter_mut().zip(growth).for_each(|(sum, growth)| *sum += growth);
        }
        let tc = program != Program::Ingress;
        let got = match (tc, verdict) {
            (false, XDP_PASS) | (true, TC_UNSPEC) => Verdict::Pass,
            (false, XDP_DROP) | (true, TC_SHOT) => Verdict::Drop,
            (false, XDP_TX) => Verdict::Transmit,
            (true, TC_REDIRECT) => Verdict::Redirect,
            _ => panic!("{what}: verdict {verdict} of {}", program.name()),
        };
        let line = || format!("{what}\ncorpus line: {} {}", program.name(), hex(frame));
        assert_eq!(got, wanted, "verdict (program, model) on {}", line());
        // Nobody sees what is left of a dropped packet.
        let same = got == Verdict::Drop || out == expected;
        assert!(same, "packet\n program {}\n   model {}\non {}", hex(&out), hex(&expected), line());
        let events: Vec<Event> = self.events.by_ref().map(told).collect();
        let wanted = std::mem::take(&mut self.model.events);
        assert_eq!(events, wanted, "events (program, model) on {}", line());
        let counted = self.counted();
        let wanted: BTreeMap<_, _> = self.model_counters();
        assert_eq!(counted, wanted, "counters since these tables (program, model) on {}", line());
        true
    }

    /// Compares what isn't compared for each packet: counters by VIP and by instance, and flows.
    pub(crate) fn check_state(&mut self, what: &str) {
        for key in self.bed.plane.vips() {
            let found = self.bed.plane.vip_counters(key).unwrap().unwrap();
            let found =
                VipCount { packets: found.packets, bytes: found.bytes, connections: found.connections };
            let vip = (key.address, key.port, number(key.protocol));
            let expected = self.model.vip_counters.get(&vip).copied().unwrap_or_default();
            assert_eq!(found, expected, "{what}: counters of {key} (program, model)");
        }
        let found: BTreeMap<_, _> = self.bed.meters().instances().unwrap().into_iter().collect();
        for ((key, instance), found) in found {
            let vip = (key.address, key.port, number(key.protocol));
            let expected = self.model.instance_counters.remove(&(instance, vip)).unwrap_or_default();
            let found =
                InstanceCount { packets: found.packets, bytes: found.bytes, new_flows: found.new_flows };
            assert_eq!(found, expected, "{what}: counters of {key} at {instance} (program, model)");
        }
        assert_eq!(self.model.instance_counters, BTreeMap::new(), "{what}: counted by the model alone");
        let expected: BTreeMap<Flow, Ipv4Addr> = self.model.flows.clone().into_iter().collect();
        let mut found = read(&self.flows);
        found.extend(read6(&self.flows6));
        assert_eq!(found, expected, "{what}: flows (program, model)");
        let expected: BTreeMap<Flow, Ipv4Addr> = self.model.embryonic.clone().into_iter().collect();
        let mut found = read(&self.embryonic);
        found.extend(read6(&self.embryonic6));
        assert_eq!(found, expected, "{what}: embryonic flows (program, model)");
    }

    /// What the programs counted since the beginning, by name.
    pub(crate) fn coverage(&self) -> BTreeMap<&'static str, u64> {
        self.counters().into_iter().map(|(name, value)| (name, value - self.first[name])).collect()
    }

    /// What the model counted for IPv6 packets since the beginning.
    pub(crate) fn coverage6(&self) -> BTreeMap<&'static str, u64> {
        Counter::ALL.iter().map(|counter| (counter.name(), self.six[*counter as usize])).collect()
    }

    fn counters(&self) -> BTreeMap<&'static str, u64> {
        let totals = self.bed.plane.counters().unwrap();
        totals.iter().map(|(counter, value)| (counter.name(), value)).collect()
    }

    /// Counters since the present tables, but those that stand still.
    fn counted(&self) -> BTreeMap<&'static str, u64> {
        let since = |(name, value): (&'static str, u64)| (name, value - self.base[name]);
        self.counters().into_iter().map(since).filter(|(_, value)| *value > 0).collect()
    }

    fn model_counters(&self) -> BTreeMap<&'static str, u64> {
        let all = Counter::ALL.iter().map(|counter| (counter.name(), self.model.counters[*counter as usize]));
        all.filter(|(_, value)| *value > 0).collect()
    }
}

fn machine() -> Machine {
    Machine { address6: MACHINE6, ..Machine::new(MACHINE, 1500) }
}

/// An event as the model has it.
fn told(event: FlowEvent) -> Event {
    let (client, vip) = (event.client, event.vip);
    let flow = (client.ip(), vip.address, client.port(), vip.port, number(vip.protocol));
    (event.outcome, flow, event.instance)
}

/// By its own type, or by that of the encapsulation's inside.
fn is_ipv6(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[0x86, 0xdd]) || frame.get(42..44) == Some(&[4, 41])
}

fn clear<K: Pod, V: Pod>(map: &Mutex<HashMap<MapData, K, V>>) {
    let mut map = map.lock().unwrap();
    let keys: Vec<K> = map.keys().collect::<Result<_, _>>().unwrap();
    for key in keys {
        map.remove(&key).unwrap();
    }
}

fn read(map: &Mutex<FlowMap>) -> BTreeMap<Flow, Ipv4Addr> {
    let map = map.lock().unwrap();
    map.iter()
        .map(|entry| {
            let (key, value) = entry.unwrap();
            let address = |at: usize| Ipv4Addr::new(key[at], key[at + 1], key[at + 2], key[at + 3]);
            let port = |at: usize| u16::from_be_bytes([key[at], key[at + 1]]);
            ((address(0).into(), address(4).into(), port(8), port(10), key[12]), Ipv4Addr::from(value))
        })
        .collect()
}

fn read6(map: &Mutex<FlowMap6>) -> BTreeMap<Flow, Ipv4Addr> {
    let map = map.lock().unwrap();
    map.iter()
        .map(|entry| {
            let (key, value) = entry.unwrap();
            let address = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&key[at..at + 16]).unwrap());
            let port = |at: usize| u16::from_be_bytes([key[at], key[at + 1]]);
            ((address(0), address(16), port(32), port(34), key[36]), Ipv4Addr::from(value))
        })
        .collect()
}

fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
    }
}
