use super::*;

fn address(last: u8) -> IpAddr {
    IpAddr::from([203, 0, 113, last])
}

fn put(last: u8, ports: u16) -> WatchEvent<RouteRecord> {
    let vip = address(last);
    let port =
        |port: u16| serde_json::from_value(serde_json::json!({ "port": port, "protocol": "tcp" })).unwrap();
    let value = RouteRecord::Vip(Route {
        vip,
        ports: (1..=ports).map(port).collect(),
        local: vec![],
        remote: vec![],
        away: Vec::new(),
        nearest: Vec::new(),
    });
    WatchEvent::Put { revision: 1, key: format!("vips/{vip}"), value }
}

fn delete(last: u8) -> WatchEvent<RouteRecord> {
    WatchEvent::Delete { revision: 2, key: format!("vips/{}", address(last)) }
}

fn announce(prefix: &str) -> WatchEvent<RouteRecord> {
    let value = RouteRecord::Announcement(Announcement {
        prefixes: vec![prefix.parse().unwrap()],
        machines: Default::default(),
    });
    WatchEvent::Put { revision: 1, key: "announcement".into(), value }
}

const RESET: WatchEvent<RouteRecord> = WatchEvent::Reset { epoch: 1 };
const SYNCED: WatchEvent<RouteRecord> = WatchEvent::Synced { revision: 1 };

/// The VIPs that are known, with their number of ports.
fn known(routes: &Routes) -> Vec<(u8, usize)> {
    let mut known = Vec::new();
    let last = |vip| match vip {
        IpAddr::V4(vip) => vip.octets()[3],
        IpAddr::V6(vip) => vip.octets()[15],
    };
    routes.for_each(|route| known.push((last(route.vip), route.ports.len()))).unwrap();
    known.sort_unstable();
    known
}

#[test]
fn a_snapshot_takes_routes_away_only_once_it_is_complete_and_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("routes.log");
    let mut routes = Routes::load(path.clone());
    assert!(routes.is_empty());
    routes.apply(RESET);
    assert_eq!(routes.apply(put(1, 1)).len(), 1, "served at once");
    routes.apply(announce("203.0.113.0/24"));
    assert!(routes.announcement().is_none(), "announced only when all is there");
    routes.apply(SYNCED);

    let mut routes = Routes::load(path.clone());
    assert_eq!(known(&routes), [(1, 1)]);
    assert_eq!(routes.announcement().unwrap().prefixes.len(), 1);
    routes.apply(RESET);
    routes.apply(put(2, 1));
    routes.apply(announce("203.0.113.0/24"));
    assert!(routes.contains(address(1)), "the old one still serves");
    let changes = routes.apply(SYNCED);
    assert!(matches!(changes[..], [Change::Remove(vip)] if vip == address(1)), "{changes:?}");
    assert!(routes.apply(put(2, 1)).is_empty(), "nothing new");
    assert_eq!(routes.apply(put(2, 3)).len(), 1);
    assert_eq!(known(&Routes::load(path.clone())), [(2, 3)]);
    assert_eq!(routes.apply(delete(2)).len(), 1);
    assert!(routes.apply(delete(2)).is_empty());
    assert!(known(&Routes::load(path)).is_empty());
}

#[test]
fn the_text_of_a_record_is_what_the_scheduler_made_it_from_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("routes.log");
    let mut routes = Routes::load(path.clone());
    let text = |event: &WatchEvent<RouteRecord>| match event {
        WatchEvent::Put { value, .. } => serde_json::to_vec(value).unwrap(),
        other => panic!("{other:?}"),
    };
    for event in [put(1, 1), put(2, 7), put(1, 3), announce("203.0.113.0/24"), SYNCED] {
        routes.apply(event);
    }
    for routes in [routes, Routes::load(path)] {
        assert_eq!(routes.text("vips/203.0.113.1"), Some(text(&put(1, 3))));
        assert_eq!(routes.text("vips/203.0.113.2"), Some(text(&put(2, 7))));
        assert_eq!(routes.text("announcement"), Some(text(&announce("203.0.113.0/24"))));
        assert_eq!((routes.text("vips/203.0.113.3"), routes.text("else")), (None, None));
    }
}

#[test]
fn a_log_that_was_cut_off_or_damaged_gives_what_was_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("routes.log");
    let mut routes = Routes::load(path.clone());
    routes.apply(put(1, 1));
    let whole = std::fs::metadata(&path).unwrap().len();
    routes.apply(put(2, 1));
    let all = std::fs::read(&path).unwrap();
    for cut in whole..all.len() as u64 {
        std::fs::write(&path, &all[..cut as usize]).unwrap();
        let mut routes = Routes::load(path.clone());
        assert_eq!(known(&routes), [(1, 1)], "cut at {cut}");
        routes.apply(put(3, 2));
        assert_eq!(known(&Routes::load(path.clone())), [(1, 1), (3, 2)], "cut at {cut}");
    }
    std::fs::write(&path, [&all[..whole as usize], b"nonsense\n"].concat()).unwrap();
    assert_eq!(known(&Routes::load(path)), [(1, 1)]);
}

#[test]
fn the_log_does_not_grow_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("routes.log");
    let mut routes = Routes::load(path.clone());
    routes.apply(announce("203.0.113.0/24"));
    for round in 0..600 {
        for vip in 0..10 {
            routes.apply(put(vip, 1 + round % 20));
        }
        routes.apply(SYNCED);
    }
    assert!(std::fs::metadata(&path).unwrap().len() < 3 * GARBAGE_BYTES);
    let all: Vec<_> = (0..10).map(|vip| (vip, 20)).collect();
    assert_eq!(known(&routes), all);
    let routes = Routes::load(path);
    assert_eq!(known(&routes), all);
    assert!(routes.announcement().is_some());
}

#[test]
fn a_log_that_cannot_be_written_costs_only_the_next_start() {
    let mut routes = Routes::load("/proc/none/routes.log".into());
    assert_eq!(routes.apply(put(1, 1)).len(), 1);
    assert_eq!(routes.apply(put(2, 1)).len(), 1);
    assert!(routes.contains(address(2)));
}
