//! Real connections through real namespaces: a client, the fabric's router, two machines with a container each.
//!
//! ```text
//! client --- edge --- m1 (eth0 10.1.1.1) --- c1 10.1.1.65
//!              \----- m2 (eth0 10.1.2.1) --- c2 10.1.2.65
//! ```
//! The edge routes the VIP to m1, so m1 is the ingress machine of every packet.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    time::Duration,
};

use anyplace_ebpf::{
    Bucket, Counter, DataPlane, Error, Instance, Options, Port, Protocol, VipKey, VipTable, XdpMode,
};
use aya::maps::{HashMap, Map, MapData};

use crate::namespaces::{BpfFs, Namespace, object, root_or_skip};

const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const C1: Ipv4Addr = Ipv4Addr::new(10, 1, 1, 65);
const C2: Ipv4Addr = Ipv4Addr::new(10, 1, 2, 65);
const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
const VIP_PORT: u16 = 80;
const CONTAINER_PORT: u16 = 8080;
/// Generous on a busy machine; a lost packet fails the test after it instead of hanging.
const PATIENCE: Duration = Duration::from_secs(5);

/// From linux/ethtool.h.
const ETHTOOL_STXCSUM: u32 = 0x17;

/// One machine: its namespace, its container's namespace, its data plane.
struct Machine {
    // Fields drop in order: first the programs' user, then what they are attached to.
    plane: Option<DataPlane>,
    host: Namespace,
    container: Namespace,
    bpffs: BpfFs,
    /// The XDP program on the edge's end of the uplink.
    _pass: OwnedFd,
    address: Ipv4Addr,
    instance: Instance,
}

impl Machine {
    fn new(edge: &Namespace, number: u8) -> Self {
        let host = Namespace::new(&format!("m{number}"));
        let container = Namespace::new(&format!("c{number}"));
        let address = Ipv4Addr::new(10, 1, number, 1);
        let inside = Ipv4Addr::new(10, 1, number, 65);
        let veth = format!("apv0a01{number:02x}41");
        edge.ip(&format!(
            "link add m{number} type veth peer name eth0 netns {host}\n\
             addr add 10.1.{number}.0/31 dev m{number}\n\
             link set m{number} up\n",
            host = host.name
        ));
        host.ip(&format!(
            "addr add {address}/31 dev eth0\n\
             link set eth0 up\n\
             route add default via 10.1.{number}.0\n\
             link add {veth} type veth peer name eth0 netns {container}\n\
             addr add 169.254.1.1/32 dev {veth}\n\
             link set {veth} up\n\
             route add {inside}/32 dev {veth}\n",
            container = container.name
        ));
        host.sysctl("net.ipv4.ip_forward", "1");
        container.ip(&format!(
            "link set eth0 address 02:61:0a:01:{number:02x}:41\n\
             addr add {inside}/32 dev eth0\n\
             link set eth0 up\n\
             route add 169.254.1.1 dev eth0\n\
             route add default via 169.254.1.1\n"
        ));
        edge.ip(&format!("route add 10.1.{number}.64/26 via {address}\n"));

        let ports = [Protocol::Tcp, Protocol::Udp]
            .map(|protocol| Port { vip: key(protocol), container_port: CONTAINER_PORT })
            .to_vec();
        let instance = Instance { address: inside, host_interface: veth, ports };
        let bpffs = BpfFs::new();
        let pass = edge.enter(|| anyplace_tests::attach_pass(&format!("m{number}")).unwrap());
        let mut machine = Self { plane: None, host, container, bpffs, _pass: pass, address, instance };
        machine.serve(number);
        machine.start();
        assert_ne!(machine.plane().xdp_mode(), XdpMode::Adopted);
        let (plane, instance) = (machine.plane.as_mut().unwrap(), &machine.instance);
        machine.host.enter(|| plane.set_instance(instance).unwrap());
        machine
    }

    fn options(&self) -> Options {
        let pin_dir = self.bpffs.path.join("anyplace");
        Options { uplink: "eth0".into(), address: self.address, address6: None, pin_dir, object: object() }
    }

    fn start(&mut self) {
        let options = self.options();
        self.plane = Some(self.host.enter(|| DataPlane::load(options).unwrap()));
    }

    fn plane(&mut self) -> &mut DataPlane {
        self.plane.as_mut().unwrap()
    }

    /// What a flood does to the flow table.
    fn forget_flows(&self) {
        let map = MapData::from_pin(self.bpffs.path.join("anyplace/v2/FLOWS")).unwrap();
        let mut flows: HashMap<_, [u8; 16], [u8; 4]> = Map::LruHashMap(map).try_into().unwrap();
        let keys: Vec<[u8; 16]> = flows.keys().collect::<Result<_, _>>().unwrap();
        assert!(!keys.is_empty());
        for key in keys {
            flows.remove(&key).unwrap();
        }
    }

    /// The agent's rule for what instances send to the world.
    fn masquerade(&self) {
        let cidr = Ipv4Addr::from(u32::from(self.instance.address) & !63);
        let rules = format!(
            "table inet test {{ chain postrouting {{ type nat hook postrouting priority srcnat; \
             ip saddr {cidr}/26 oifname eth0 masquerade; }}; }}"
        );
        self.host.enter(|| {
            let status = std::process::Command::new("nft").arg(&rules).status();
            assert!(status.expect("nft (Debian package nftables)").success(), "nft {rules}");
        });
    }

    /// Line echo servers that say who they are and who asks.
    fn serve(&self, number: u8) {
        let (ready, started) = std::sync::mpsc::channel();
        let udp_ready = ready.clone();
        self.container.spawn(move || {
            let listener = TcpListener::bind(("0.0.0.0", CONTAINER_PORT)).unwrap();
            ready.send(()).unwrap();
            while let Ok((stream, from)) = listener.accept() {
                std::thread::spawn(move || {
                    let mut reader = BufReader::new(stream.try_clone().unwrap());
                    let (mut writer, mut line) = (stream, String::new());
                    while reader.read_line(&mut line).is_ok_and(|n| n > 0) {
                        if writer.write_all(format!("c{number} {from} {line}").as_bytes()).is_err() {
                            return;
                        }
                        line.clear();
                    }
                });
            }
        });
        self.container.spawn(move || {
            let socket = UdpSocket::bind(("0.0.0.0", CONTAINER_PORT)).unwrap();
            udp_ready.send(()).unwrap();
            let mut buffer = [0; 2048];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                let _ = socket.send_to(format!("c{number} {from} {text}").as_bytes(), from);
            }
        });
        for _ in 0..2 {
            started.recv_timeout(PATIENCE).expect("the echo servers start");
        }
    }
}

/// All of it.
struct Bed {
    machines: [Machine; 2],
    client: Namespace,
    _edge: Namespace,
}

impl Bed {
    fn new() -> Self {
        let edge = Namespace::new("edge");
        let client = Namespace::new("client");
        edge.sysctl("net.ipv4.ip_forward", "1");
        // Answers come from m2, requests go to m1: that is direct server return.
        edge.sysctl("net.ipv4.conf.all.rp_filter", "0");
        edge.sysctl("net.ipv4.conf.default.rp_filter", "0");
        edge.ip(&format!(
            "link add client type veth peer name eth0 netns {}\n\
             addr add 198.51.100.1/24 dev client\n\
             link set client up\n",
            client.name
        ));
        client.ip(&format!(
            "addr add {CLIENT}/24 dev eth0\n\
             link set eth0 up\n\
             route add default via 198.51.100.1\n"
        ));
        // A veth leaves checksums to hardware that it doesn't have, and XDP_TX forgets that they are unfinished.
        client.ethtool("eth0", ETHTOOL_STXCSUM, 0);
        // And here the answers' checksums are finished in software, so that the client checks them.
        edge.ethtool("client", ETHTOOL_STXCSUM, 0);
        let machines = [Machine::new(&edge, 1), Machine::new(&edge, 2)];
        edge.ip(&format!("route add {VIP}/32 via 10.1.1.1\n"));
        Self { machines, client, _edge: edge }
    }

    /// Gives every machine the same one-bucket table.
    fn table(&mut self, now: Ipv4Addr, before: Ipv4Addr) {
        let table = VipTable { buckets: vec![Bucket { now, before }], local: vec![Bucket { now, before }] };
        for machine in &mut self.machines {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                machine.plane().set_vip(key(protocol), &table).unwrap();
            }
        }
    }

    fn connect(&self) -> Connection {
        self.client.enter(|| {
            let to = SocketAddr::from((VIP, VIP_PORT));
            let stream = TcpStream::connect_timeout(&to, PATIENCE)
                .unwrap_or_else(|error| panic!("connect through the VIP: {error}\n{}", self.counters()));
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            Connection(BufReader::new(stream))
        })
    }

    fn udp(&self) -> Datagrams {
        self.client.enter(|| {
            let socket = UdpSocket::bind((CLIENT, 0)).unwrap();
            socket.connect((VIP, VIP_PORT)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            Datagrams(socket)
        })
    }

    /// All counters that aren't zero, for a failure's message.
    fn counters(&self) -> String {
        let mut text = String::new();
        for machine in &self.machines {
            let Some(plane) = &machine.plane else { continue };
            text += &format!("{} {:?}:", machine.address, plane.xdp_mode());
            for (counter, value) in plane.counters().unwrap().iter().filter(|(_, value)| *value > 0) {
                text += &format!(" {}={value}", counter.name());
            }
            text += "\n";
        }
        text
    }

    fn count(&self, machine: usize, counter: Counter) -> u64 {
        self.machines[machine].plane.as_ref().unwrap().counters().unwrap().get(counter)
    }
}

struct Connection(BufReader<TcpStream>);

impl Connection {
    /// Sends a line and returns who answered; checks that the client's address arrived.
    fn ask(&mut self, text: &str) -> String {
        let local = self.0.get_ref().local_addr().unwrap();
        self.0.get_mut().write_all(format!("{text}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        self.0.read_line(&mut answer).expect("an answer on the connection");
        who(answer.trim_end(), local, text)
    }
}

struct Datagrams(UdpSocket);

impl Datagrams {
    fn ask(&self, text: &str) -> String {
        self.0.send(text.as_bytes()).unwrap();
        let mut buffer = [0; 2048];
        let length = self.0.recv(&mut buffer).expect("an answer by UDP");
        who(&String::from_utf8_lossy(&buffer[..length]), self.0.local_addr().unwrap(), text)
    }
}

fn who(answer: &str, local: SocketAddr, text: &str) -> String {
    let mut parts = answer.splitn(3, ' ');
    let name = parts.next().unwrap().to_string();
    assert_eq!(parts.next(), Some(local.to_string().as_str()), "the server saw another client address");
    assert_eq!(parts.next(), Some(text));
    name
}

fn key(protocol: Protocol) -> VipKey {
    VipKey { address: VIP.into(), port: VIP_PORT, protocol }
}

#[test]
fn connections_find_their_owner_and_keep_it() {
    if !root_or_skip() {
        return;
    }
    let mut bed = Bed::new();

    // The owner is on the other machine.
    bed.table(C2, C2);
    let mut at_c2 = bed.connect();
    assert_eq!(at_c2.ask("one"), "c2");
    let udp_at_c2 = bed.udp();
    assert_eq!(udp_at_c2.ask("one"), "c2");
    assert!(bed.count(0, Counter::Packets) >= 4);
    assert_eq!(bed.count(1, Counter::Packets), 0, "m2 is no ingress here");

    // The owner is on the ingress machine itself; connections of before the change stay.
    bed.table(C1, C2);
    let mut at_c1 = bed.connect();
    assert_eq!(at_c1.ask("two"), "c1");
    let udp_at_c1 = bed.udp();
    assert_eq!(udp_at_c1.ask("two"), "c1");
    assert_eq!(udp_at_c1.ask("two again"), "c1");
    assert_eq!(at_c2.ask("three"), "c2");
    assert_eq!(udp_at_c2.ask("three"), "c2");
    assert!(bed.count(0, Counter::SecondHop) > 0);

    // And the other way round, with more than one segment.
    bed.table(C2, C1);
    assert_eq!(bed.connect().ask("four"), "c2");
    assert_eq!(at_c1.ask(&"5".repeat(100_000)), "c1");
    assert_eq!(udp_at_c1.ask("five"), "c1");
    assert_eq!(at_c2.ask(&"6".repeat(100_000)), "c2");

    // A flow that its owner forgot comes back to it, by way of the other hop.
    bed.machines[1].forget_flows();
    assert_eq!(at_c2.ask("forgotten"), "c2");
    assert_eq!(udp_at_c2.ask("forgotten"), "c2");

    // No second router beside the first.
    let options = bed.machines[0].options();
    let second = bed.machines[0].host.enter(|| DataPlane::load(options));
    assert!(matches!(second, Err(Error::Locked(_))), "{:?}", second.err());

    // Without a router, and with the next one, nothing changes for packets.
    for machine in &mut bed.machines {
        machine.plane = None;
    }
    assert_eq!(at_c1.ask("seven"), "c1");
    assert_eq!(bed.connect().ask("seven"), "c2");
    for machine in &mut bed.machines {
        machine.start();
        assert_eq!(machine.plane().xdp_mode(), XdpMode::Adopted);
        assert_eq!(machine.plane().vips(), [key(Protocol::Tcp), key(Protocol::Udp)]);
        let table = machine.plane().vip_table(key(Protocol::Udp)).unwrap();
        assert_eq!(table.buckets, [Bucket { now: C2, before: C1 }]);
        let instances = machine.plane().instances().unwrap();
        assert_eq!(instances, std::slice::from_ref(&machine.instance));
    }
    assert_eq!(at_c1.ask("eight"), "c1");
    assert_eq!(at_c2.ask("eight"), "c2");
    assert_eq!(udp_at_c1.ask("eight"), "c1");
    bed.table(C1, C1);
    assert_eq!(bed.connect().ask("nine"), "c1");

    // Relayed: the ingress names a machine, which chooses from its local table.
    let [m1, m2] = &mut bed.machines;
    let far = VipTable { buckets: vec![Bucket::steady(m2.address)], local: vec![] };
    let local = VipTable { buckets: vec![], local: vec![Bucket::steady(C2)] };
    m1.plane().set_vip(key(Protocol::Tcp), &far).unwrap();
    m2.plane().set_vip(key(Protocol::Tcp), &local).unwrap();
    assert_eq!(bed.connect().ask("ten"), "c2");
    assert!(bed.count(1, Counter::Relayed) > 0);
}

/// Clients inside the fleet: containers and machines. Their packets leave by the uplink, the agent's masquerading included,
/// and come back as any client's.
#[test]
fn containers_and_machines_are_clients_too() {
    if !root_or_skip() {
        return;
    }
    let mut bed = Bed::new();
    for machine in &bed.machines {
        machine.masquerade();
        machine.host.ethtool("eth0", ETHTOOL_STXCSUM, 0);
    }
    for (now, name) in [(C1, "c1"), (C2, "c2")] {
        bed.table(now, now);
        for (number, machine) in bed.machines.iter().enumerate() {
            for (what, client) in [("container", &machine.container), ("host", &machine.host)] {
                let what = format!("{what} of machine {}, served by {name}", number + 1);
                let counters = || bed.counters();
                let (tcp, udp) = client.enter(|| {
                    let stream = TcpStream::connect_timeout(&(VIP, VIP_PORT).into(), PATIENCE);
                    let mut stream = stream.unwrap_or_else(|error| panic!("{what}: {error}\n{}", counters()));
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    stream.write_all(b"hello\n").unwrap();
                    let mut tcp = String::new();
                    BufReader::new(stream).read_line(&mut tcp).expect(&what);
                    let socket = UdpSocket::bind(("0.0.0.0", 0)).unwrap();
                    socket.connect((VIP, VIP_PORT)).unwrap();
                    socket.set_read_timeout(Some(PATIENCE)).unwrap();
                    socket.send(b"hello").unwrap();
                    let mut buffer = [0; 2048];
                    let length = socket.recv(&mut buffer).expect(&what);
                    (tcp, String::from_utf8_lossy(&buffer[..length]).into_owned())
                });
                for answer in [tcp, udp] {
                    assert!(answer.starts_with(&format!("{name} {}:", machine.address)), "{what}: {answer}");
                }
            }
        }
    }
}

#[test]
fn a_container_that_is_gone_leaves_nothing() {
    if !root_or_skip() {
        return;
    }
    let edge = Namespace::new("edge");
    let mut machine = Machine::new(&edge, 1);
    let veth = machine.instance.host_interface.clone();

    // Gone while the router runs, and made again under the same name.
    machine.host.ip(&format!("link del {veth}\n"));
    let instance = machine.instance.clone();
    let plane = machine.plane.as_mut().unwrap();
    let missing = machine.host.enter(|| plane.set_instance(&instance));
    assert!(matches!(missing, Err(Error::Interface { .. })), "{missing:?}");
    machine.host.ip(&format!("link add {veth} type veth peer name inner\n"));
    machine.host.enter(|| plane.set_instance(&instance).unwrap());
    machine.host.ip(&format!("link del {veth}\n"));
    machine.host.enter(|| plane.remove_instance(instance.address).unwrap());
    machine.host.enter(|| plane.remove_instance(instance.address).unwrap());
    assert_eq!(links(&machine), 3, "ingress, target and target6");

    // Gone while no router ran.
    machine.host.ip(&format!("link add {veth} type veth peer name inner\n"));
    let plane = machine.plane.as_mut().unwrap();
    machine.host.enter(|| plane.set_instance(&instance).unwrap());
    assert_eq!(links(&machine), 4);
    machine.plane = None;
    machine.host.ip(&format!("link del {veth}\n"));
    machine.start();
    assert_eq!(machine.plane().instances().unwrap(), []);
    assert_eq!(links(&machine), 3);

    // A machine that came back with a new uplink under the old folder.
    machine.plane = None;
    machine.host.ip("link del eth0\nlink add eth0 type veth peer name router\n");
    machine.start();
    assert_ne!(machine.plane().xdp_mode(), XdpMode::Adopted);
    assert_eq!(links(&machine), 3);

    machine.plane.take().unwrap().unload().unwrap();
    assert!(!machine.bpffs.path.join("anyplace/v2").exists());
}

#[test]
fn what_was_removed_can_be_set_again_at_once() {
    if !root_or_skip() {
        return;
    }
    let edge = Namespace::new("edge");
    let mut machine = Machine::new(&edge, 1);
    for round in 0..20 {
        let (plane, instance) = (machine.plane.as_mut().unwrap(), &machine.instance);
        machine.host.enter(|| {
            plane.remove_instance(instance.address).unwrap();
            plane.set_instance(instance).unwrap_or_else(|error| panic!("round {round}: {error:?}"));
        });
    }
    for _ in 0..5 {
        machine.plane.take().unwrap().unload().unwrap();
        machine.start();
        assert_ne!(machine.plane().xdp_mode(), XdpMode::Adopted);
    }
}

fn links(machine: &Machine) -> usize {
    std::fs::read_dir(machine.bpffs.path.join("anyplace/v2/links")).unwrap().count()
}

#[test]
fn errors_name_the_fix() {
    if !root_or_skip() {
        return;
    }
    let namespace = Namespace::new("errors");
    let load = |uplink: &str, pin_dir: &std::path::Path| {
        let options = Options {
            uplink: uplink.into(),
            address: C1,
            address6: None,
            pin_dir: pin_dir.into(),
            object: object(),
        };
        namespace.enter(|| DataPlane::load(options).err().expect("an error").to_string())
    };
    let message = load("lo", std::path::Path::new("/tmp/anyplace-no-bpffs"));
    assert!(message.contains("mount -t bpf bpf /tmp/anyplace-no-bpffs"), "{message}");
    let bpffs = BpfFs::new();
    let message = load("nothere", &bpffs.path.join("anyplace"));
    assert!(message.contains("ip link show dev nothere"), "{message}");
}
