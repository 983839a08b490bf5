//! What a new router version does to packets, and to the maps of another version.
//!
//! ```text
//! edge (client) --- m1 eth0 --- ingress, target --- container, echoes UDP
//!      <----------- reply ----------------------------'
//! ```

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyplace_ebpf::{
    Bucket, Counter, DataPlane, Error, Instance, Meters, Options, Port, Protocol, VipKey, VipTable, XdpMode,
};

use crate::namespaces::{BpfFs, Namespace, object, root_or_skip};

/// Routers that take over from one another.
const UPGRADES: usize = 100;
/// Packets that the client sends in a second, at most: a busy machine may be slower.
const RATE: f64 = 50_000.0;
/// Packets under way: fewer than a veth's ring holds, so that a machine that stalls loses none by itself.
const WINDOW: u64 = 64;
/// A packet that isn't back after this is lost.
const PATIENCE: Duration = Duration::from_secs(2);

const VIP: VipKey =
    VipKey { address: IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)), port: 80, protocol: Protocol::Udp };
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 1, 1, 1);
const INSIDE: Ipv4Addr = Ipv4Addr::new(10, 1, 1, 65);
const CONTAINER_PORT: u16 = 8080;
/// From linux/ethtool.h.
const ETHTOOL_STXCSUM: u32 = 0x17;

struct Bed {
    edge: Namespace,
    host: Namespace,
    container: Namespace,
    bpffs: BpfFs,
    _pass: OwnedFd,
}

impl Bed {
    fn new() -> Self {
        let [edge, host, container] = ["edge", "m1", "c1"].map(Namespace::new);
        edge.ip(&format!(
            "link add m1 type veth peer name eth0 netns {}\n\
             addr add 10.1.1.0/31 dev m1\n\
             link set m1 up\n",
            host.name
        ));
        host.ip(&format!(
            "addr add {ADDRESS}/31 dev eth0\n\
             link set eth0 up\n\
             route add default via 10.1.1.0\n\
             link add apv0a010141 type veth peer name eth0 netns {}\n\
             addr add 169.254.1.1/32 dev apv0a010141\n\
             link set apv0a010141 up\n\
             route add {INSIDE}/32 dev apv0a010141\n",
            container.name
        ));
        host.sysctl("net.ipv4.ip_forward", "1");
        container.ip(&format!(
            "link set eth0 address 02:61:0a:01:01:41\n\
             addr add {INSIDE}/32 dev eth0\n\
             link set eth0 up\n\
             route add 169.254.1.1 dev eth0\n\
             route add default via 169.254.1.1\n"
        ));
        edge.sysctl("net.ipv4.conf.m1.rp_filter", "0");
        edge.sysctl("net.ipv4.conf.all.rp_filter", "0");
        edge.ip(&format!("route add {}/32 via {ADDRESS}\n", VIP.address));
        // XDP forwards frames with unfinished checksums as they are.
        edge.ethtool("m1", ETHTOOL_STXCSUM, 0);
        let pass = edge.enter(|| anyplace_tests::attach_pass("m1").unwrap());
        Self { edge, host, container, bpffs: BpfFs::new(), _pass: pass }
    }

    fn pin_dir(&self) -> PathBuf {
        self.bpffs.path.join("anyplace")
    }

    fn load(&self) -> Result<DataPlane, Error> {
        let options = Options {
            uplink: "eth0".into(),
            address: ADDRESS,
            address6: None,
            pin_dir: self.pin_dir(),
            object: object(),
        };
        self.host.enter(|| DataPlane::load(options))
    }

    /// Sends numbered packets and counts their echoes until `stop`; how many were sent, lost, and sent in a second.
    fn send(&self, stop: &AtomicBool) -> (u64, u64, f64) {
        self.edge.enter(|| {
            let socket = UdpSocket::bind(("10.1.1.0", 0)).unwrap();
            socket.connect((VIP.address, VIP.port)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            let (start, mut buffer) = (Instant::now(), [0; 64]);
            let (mut sent, mut back, mut lost) = (0u64, 0u64, 0u64);
            while !stop.load(Ordering::Relaxed) || sent > back + lost {
                let due = (start.elapsed().as_secs_f64() * RATE) as u64;
                if !stop.load(Ordering::Relaxed) && sent - back - lost < WINDOW && sent < due {
                    socket.send(&sent.to_be_bytes()).unwrap();
                    sent += 1;
                    continue;
                }
                if sent == back + lost {
                    std::thread::sleep(Duration::from_micros(20));
                    continue;
                }
                match socket.recv(&mut buffer) {
                    Ok(_) => back += 1,
                    // Nothing for so long: what is under way is gone.
                    Err(_) => lost = sent - back,
                }
            }
            (sent, lost, sent as f64 / start.elapsed().as_secs_f64())
        })
    }
}

#[test]
fn a_hundred_upgrades_lose_no_packet() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    let (ready, started) = std::sync::mpsc::channel();
    bed.container.spawn(move || {
        let socket = UdpSocket::bind(("0.0.0.0", CONTAINER_PORT)).unwrap();
        ready.send(()).unwrap();
        let mut buffer = [0; 64];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
    started.recv_timeout(Duration::from_secs(10)).unwrap();

    let mut plane = bed.load().unwrap();
    let steady = vec![Bucket::steady(INSIDE)];
    let ports = vec![Port { vip: VIP, container_port: CONTAINER_PORT }];
    let instance = Instance { address: INSIDE, host_interface: "apv0a010141".into(), ports };
    bed.host.enter(|| plane.set_instance(&instance).unwrap());
    plane.set_vip(VIP, &VipTable { buckets: steady.clone(), local: steady }).unwrap();

    let stop = AtomicBool::new(false);
    let (sent, lost, rate) = std::thread::scope(|scope| {
        let sender = scope.spawn(|| bed.send(&stop));
        let mut plane = Some(plane);
        for _ in 0..UPGRADES {
            drop(plane.take());
            let next = bed.load().unwrap();
            assert_eq!(next.xdp_mode(), XdpMode::Adopted);
            assert_eq!(next.vips(), [VIP]);
            plane = Some(next);
        }
        stop.store(true, Ordering::Relaxed);
        sender.join().unwrap()
    });
    eprintln!("{UPGRADES} upgrades: {lost} of {sent} packets lost, {rate:.0} packets/s both ways");
    assert_eq!(lost, 0, "of {sent} packets");
    // The counters went on counting, and can be read beside any router.
    let meters = Meters::open(&bed.pin_dir()).unwrap();
    assert_eq!(meters.totals().unwrap().get(Counter::Delivered), sent);
    assert_eq!(meters.vips().unwrap()[&VIP].packets, sent);
    assert!(sent > UPGRADES as u64, "packets were under way at each upgrade: {sent}");
}

#[test]
fn the_maps_of_another_version_are_refused_with_the_fix() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    drop(bed.load().unwrap());
    let folder = fs::read_dir(bed.pin_dir()).unwrap().next().unwrap().unwrap().path();

    // Another layout under its own name, with its programs attached.
    let other = bed.pin_dir().join("v0");
    fs::rename(&folder, &other).unwrap();
    let error = bed.load().err().unwrap();
    assert!(matches!(error, Error::OtherVersion { .. }), "{error:?}");
    let message = error.to_string();
    assert!(message.contains(&format!("rm -r {}", other.display())), "{message}");
    assert!(message.contains("layout v0"), "{message}");
    // What the message says helps.
    fs::remove_dir_all(&other).unwrap();
    drop(bed.load().unwrap());

    // An unknown layout under our name.
    fs::rename(folder.join("CONFIG"), folder.join("INSTANCES")).unwrap();
    let error = bed.load().err().unwrap();
    assert!(matches!(error, Error::Layout { .. }), "{error:?}");
    assert!(error.to_string().contains(&format!("rm -r {}", folder.display())), "{error}");
    fs::remove_dir_all(&folder).unwrap();
    drop(bed.load().unwrap());
}
