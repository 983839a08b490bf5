//! Many VIPs, shared tables, capacities, and what a restart makes of them.

use std::net::Ipv4Addr;

use anyplace_ebpf::{Bucket, Capacity, DataPlane, Error, Options, Protocol, VipKey, VipTable};

use crate::namespaces::{BpfFs, Namespace, object, root_or_skip};

/// More than a batch.
const MANY: u32 = 10_000;

struct Machine {
    namespace: Namespace,
    bpffs: BpfFs,
}

impl Machine {
    fn new() -> Self {
        let namespace = Namespace::new("vips");
        namespace.ip("link add eth0 type veth peer name router\n");
        Self { namespace, bpffs: BpfFs::new() }
    }

    fn load(&self, capacity: Capacity) -> DataPlane {
        self.try_load(capacity).unwrap_or_else(|error| panic!("{error}: {error:?}"))
    }

    fn try_load(&self, capacity: Capacity) -> Result<DataPlane, Error> {
        let options = Options {
            uplink: "eth0".into(),
            address: Ipv4Addr::new(10, 1, 1, 1),
            address6: None,
            pin_dir: self.bpffs.path.join("anyplace"),
            object: object(),
        };
        self.namespace.enter(|| DataPlane::load_for(options, capacity))
    }
}

fn key(vip: u32, port: u16) -> VipKey {
    VipKey { address: Ipv4Addr::from(0xcb00_0000 + vip).into(), port, protocol: Protocol::Tcp }
}

/// A table of `len` buckets that differs between seeds.
fn table(seed: u32, len: u32) -> Vec<Bucket> {
    (0..len).map(|slot| Bucket::steady(Ipv4Addr::from(0x0a00_0000 + seed * 64 + slot % 16))).collect()
}

fn both(buckets: Vec<Bucket>) -> VipTable {
    VipTable { local: buckets.clone(), buckets }
}

#[test]
fn many_vips_are_set_at_once_and_adopted_by_the_next_router() {
    if !root_or_skip() {
        return;
    }
    let machine = Machine::new();
    let capacity = Capacity::for_vips(MANY);
    let mut plane = machine.load(capacity);
    assert_eq!(plane.capacity(), capacity);
    let tables: Vec<VipTable> = (0..MANY).map(|vip| both(table(vip, 64))).collect();
    let all = || tables.iter().enumerate().map(|(vip, table)| (key(vip as u32, 80), table));
    assert!(plane.set_vips(all()).is_empty());
    let one_more = plane.set_vip(key(MANY, 80), &tables[0]);
    assert!(matches!(one_more, Err(Error::Full { .. })), "{one_more:?}");

    // The next router finds them, and has room for as many as the first, whatever it asks for.
    drop(plane);
    let mut plane = machine.load(Capacity::for_vips(10));
    assert_eq!(plane.capacity(), capacity);
    assert_eq!(plane.vips().len(), MANY as usize);
    for vip in [0, 1, MANY / 2, MANY - 1] {
        assert_eq!(plane.vip_table(key(vip, 80)).unwrap(), tables[vip as usize]);
        assert_eq!(plane.vip_counters(key(vip, 80)).unwrap().unwrap().packets, 0);
    }
    assert!(plane.set_vips(all()).is_empty(), "what is there already needs no room");
    plane.remove_vip(key(7, 80)).unwrap();
    plane.set_vip(key(MANY, 80), &tables[7]).unwrap();
    assert_eq!(plane.vips().len(), MANY as usize);
    assert_eq!(plane.vip_table(key(MANY, 80)).unwrap(), tables[7]);
}

#[test]
fn equal_tables_of_a_vip_are_stored_once_and_freed_once() {
    if !root_or_skip() {
        return;
    }
    let machine = Machine::new();
    // Room for two tables of 512.
    let mut plane = machine.load(Capacity { vips: 8, buckets: 1024 });
    let (first, second) = (both(table(1, 512)), both(table(2, 512)));
    for round in 0..4 {
        for table in [&first, &second] {
            let failed = plane.set_vips([(key(1, 80), table), (key(1, 443), table), (key(1, 8080), table)]);
            assert!(failed.is_empty(), "round {round}: {failed:?}");
            for port in [80, 443, 8080] {
                assert_eq!(plane.vip_table(key(1, port)).unwrap(), *table);
            }
        }
    }
    // One port leaves the table, the others keep it.
    plane.remove_vip(key(1, 443)).unwrap();
    plane.set_vip(key(1, 80), &first).unwrap();
    let third = plane.set_vip(key(2, 80), &first);
    assert!(matches!(third, Err(Error::ArenaFull { .. })), "both tables are in use: {third:?}");
    assert_eq!(plane.vip_table(key(1, 8080)).unwrap(), second);
    plane.remove_vip(key(1, 8080)).unwrap();
    plane.set_vip(key(2, 80), &second).unwrap();
    // Nothing is in use after all are gone, and a table of the whole arena fits.
    plane.remove_vip(key(1, 80)).unwrap();
    plane.remove_vip(key(2, 80)).unwrap();
    plane.set_vip(key(3, 80), &both(table(3, 1024))).unwrap();
}

#[test]
fn a_batch_that_fails_in_the_middle_keeps_what_was_before() {
    if !root_or_skip() {
        return;
    }
    let machine = Machine::new();
    let mut plane = machine.load(Capacity { vips: 20, buckets: 1 << 16 });
    let table = both(table(1, 64));
    let wanted: Vec<VipKey> = (0..30).map(|vip| key(vip, 80)).collect();
    let failed = plane.set_vips(wanted.iter().map(|key| (*key, &table)));
    assert_eq!(failed.len(), 10);
    assert_eq!(plane.vips(), wanted[..20]);
    // The same port twice in a call: the last one counts.
    let (other, empty) = (both(self::table(2, 128)), VipTable::default());
    assert!(plane.set_vips([(key(0, 80), &other), (key(0, 80), &empty)]).is_empty());
    assert_eq!(plane.vip_table(key(0, 80)).unwrap(), empty);
    let reserved = plane.set_vip(key(0, 0), &empty);
    assert!(matches!(reserved, Err(Error::ReservedKey(_))), "{reserved:?}");
}
