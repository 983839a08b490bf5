//! Routes in, maps out: on a machine in a network namespace.

#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]
#![allow(dead_code, reason = "the support module serves other tests too")]

#[path = "../../ebpf/loader/tests/support/namespaces.rs"]
mod namespaces;

use std::net::{IpAddr, Ipv4Addr};

use anyplace_ebpf::{Capacity, DataPlane, Meters, Options, Protocol, VipKey};
use anyplace_model::Route;
use anyplace_state_router::{Change, Plane, render_metrics};
use namespaces::{BpfFs, Namespace, object, root_or_skip};
use serde_json::json;

const HERE: Ipv4Addr = Ipv4Addr::new(10, 1, 1, 65);
const THERE: Ipv4Addr = Ipv4Addr::new(10, 1, 2, 65);

struct Machine {
    namespace: Namespace,
    bpffs: BpfFs,
}

impl Machine {
    fn new() -> Self {
        let namespace = Namespace::new("plane");
        namespace.ip("link add eth0 type veth peer name router\n");
        Self { namespace, bpffs: BpfFs::new() }
    }

    fn plane(&self) -> Plane {
        let options = Options {
            uplink: "eth0".into(),
            address: Ipv4Addr::new(10, 1, 1, 1),
            address6: None,
            pin_dir: self.bpffs.path.join("anyplace"),
            object: object(),
        };
        let capacity = Capacity { vips: 16, buckets: 1 << 16 };
        let data_plane = self.namespace.enter(|| DataPlane::load_for(options, capacity).unwrap());
        Plane::new(data_plane, "ams-1".parse().unwrap())
    }

    fn apply(&self, plane: &mut Plane, changes: Vec<Change>) {
        self.namespace.enter(|| plane.apply(changes));
    }
}

fn vip(last: u8) -> IpAddr {
    IpAddr::from([203, 0, 113, last])
}

fn key(last: u8, port: u16) -> VipKey {
    VipKey { address: vip(last), port, protocol: Protocol::Tcp }
}

/// A VIP with an instance on each of some addresses; 10.1.1.* are this machine's.
fn route(last: u8, ports: &[u16], instances: &[Ipv4Addr]) -> Route {
    let ports: Vec<_> = ports.iter().map(|port| json!({ "port": port, "protocol": "tcp" })).collect();
    let local: Vec<_> = instances
        .iter()
        .map(|address| {
            let machine = format!("ams-{}", address.octets()[2]);
            let instance = format!("web-{}-{}", address.octets()[2], address.octets()[3]);
            json!({ "instance": instance, "machine": machine, "address": address, "ready": true, "draining": false })
        })
        .collect();
    serde_json::from_value(json!({ "vip": vip(last), "ports": ports, "local": local, "remote": [] })).unwrap()
}

fn instances(plane: &Plane) -> Vec<(Ipv4Addr, usize)> {
    let all = plane.data_plane().instances().unwrap();
    all.into_iter().map(|instance| (instance.address, instance.ports.len())).collect()
}

#[test]
fn only_what_changed_is_changed_and_what_fails_is_tried_again() {
    if !root_or_skip() {
        return;
    }
    let machine = Machine::new();
    let mut plane = machine.plane();
    let put = |last, ports: &[u16], at: &[Ipv4Addr]| Change::Put(route(last, ports, at));

    // The instance's interface isn't there yet; its VIP is served by the other one meanwhile, and another VIP too.
    machine.apply(&mut plane, vec![put(1, &[80, 443], &[HERE, THERE]), put(2, &[80], &[THERE])]);
    assert!(!plane.is_settled());
    assert_eq!(plane.data_plane().vips(), [key(1, 80), key(1, 443), key(2, 80)]);
    assert_eq!(instances(&plane), []);
    machine.namespace.ip("link add apv0a010141 type veth peer name inner\n");
    machine.namespace.enter(|| plane.retry());
    assert!(plane.is_settled());
    assert_eq!(instances(&plane), [(HERE, 2)]);

    // One port goes, one VIP comes, the last of two changes of a VIP counts.
    machine.apply(
        &mut plane,
        vec![put(1, &[443], &[HERE, THERE]), Change::Remove(vip(2)), put(2, &[81], &[THERE])],
    );
    assert!(plane.is_settled());
    assert_eq!(plane.data_plane().vips(), [key(1, 443), key(2, 81)]);
    assert_eq!(instances(&plane), [(HERE, 1)]);

    // The next router adopts all, and lets go of what the routes don't name any more.
    drop(plane);
    let mut plane = machine.plane();
    assert_eq!(plane.data_plane().vips().len(), 2);
    machine.apply(&mut plane, vec![put(2, &[81], &[THERE])]);
    machine.namespace.enter(|| plane.finish(|known| known == vip(2)));
    assert_eq!(plane.data_plane().vips(), [key(2, 81)]);
    assert_eq!(instances(&plane), []);

    // Its counters are there as text; VIPs without packets are left out.
    let meters = Meters::open(&machine.bpffs.path.join("anyplace")).unwrap();
    let text = render_metrics(&meters, &plane.names()).unwrap();
    assert!(
        text.contains("# TYPE anyplace_router_packets_total counter\nanyplace_router_packets_total 0\n"),
        "{text}"
    );
    assert!(!text.contains("_total{"), "{text}");

    // The instance comes to this VIP, and leaves it.
    machine.apply(&mut plane, vec![put(2, &[81], &[HERE])]);
    assert_eq!(instances(&plane), [(HERE, 1)]);
    machine.apply(&mut plane, vec![put(2, &[81], &[THERE])]);
    assert_eq!(instances(&plane), []);
    machine.apply(&mut plane, vec![Change::Remove(vip(2))]);
    assert_eq!(plane.data_plane().vips(), []);
}

#[test]
fn more_vips_than_fit_are_kept_for_later() {
    if !root_or_skip() {
        return;
    }
    let machine = Machine::new();
    let mut plane = machine.plane();
    let all = (0..20).map(|last| Change::Put(route(last, &[80], &[THERE]))).collect();
    machine.apply(&mut plane, all);
    assert!(!plane.is_settled());
    assert_eq!(plane.data_plane().vips().len(), 16);
    machine.apply(&mut plane, (0..4).map(|last| Change::Remove(vip(last))).collect());
    plane.retry();
    assert!(plane.is_settled());
    assert_eq!(plane.data_plane().vips().len(), 16);
    assert!(plane.data_plane().vips().contains(&key(19, 80)));
}
