//! The routes as last seen, on disk too.

use std::{collections::BTreeMap, path::PathBuf};

use anyplace_api::WatchEvent;
use anyplace_model::{Announcement, Route, RouteRecord};

/// The routes of the location. What a snapshot leaves out goes away only once the snapshot is complete.
#[derive(Debug)]
pub(crate) struct Routes {
    path: PathBuf,
    records: BTreeMap<String, RouteRecord>,
    /// A snapshot being received.
    incoming: Option<BTreeMap<String, RouteRecord>>,
}

impl Routes {
    /// The routes of the last run; none where there was none or the file can't be read.
    pub(crate) fn load(path: PathBuf) -> Self {
        let records = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::warn!(path = %path.display(), %error, "the snapshot of the routes can't be used");
                BTreeMap::new()
            }),
            Err(_) => BTreeMap::new(),
        };
        Self { path, records, incoming: None }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Takes one event of the watch in; returns whether the routes changed.
    pub(crate) fn apply(&mut self, event: WatchEvent<RouteRecord>) -> bool {
        match (event, &mut self.incoming) {
            (WatchEvent::Reset { .. }, incoming) => {
                *incoming = Some(BTreeMap::new());
                false
            }
            (WatchEvent::Put { key, value, .. }, Some(incoming)) => {
                incoming.insert(key, value);
                false
            }
            (WatchEvent::Delete { key, .. }, Some(incoming)) => {
                incoming.remove(&key);
                false
            }
            (WatchEvent::Synced { .. }, incoming) => match incoming.take() {
                Some(complete) if complete != self.records => {
                    self.records = complete;
                    true
                }
                _ => false,
            },
            (WatchEvent::Put { key, value, .. }, None) => {
                let changed = self.records.get(&key) != Some(&value);
                self.records.insert(key, value);
                changed
            }
            (WatchEvent::Delete { key, .. }, None) => self.records.remove(&key).is_some(),
        }
    }

    /// The routes of all virtual IPs.
    pub(crate) fn vips(&self) -> impl Iterator<Item = &Route> {
        self.records.values().filter_map(|record| match record {
            RouteRecord::Vip(route) => Some(route),
            RouteRecord::Announcement(_) => None,
        })
    }

    /// What to announce, once that is known.
    pub(crate) fn announcement(&self) -> Option<&Announcement> {
        self.records.values().find_map(|record| match record {
            RouteRecord::Announcement(announcement) => Some(announcement),
            RouteRecord::Vip(_) => None,
        })
    }

    /// Keeps the routes for the next run. A failure costs only that run's early start.
    pub(crate) fn save(&self) {
        let result = serde_json::to_vec(&self.records)
            .map_err(std::io::Error::from)
            .and_then(|bytes| anyplace_service::write_atomically(&self.path, &bytes, 0o600));
        if let Err(error) = result {
            tracing::warn!(path = %self.path.display(), %error, "can't keep the routes for the next start");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn vip(last: u8) -> RouteRecord {
        let vip = Ipv4Addr::new(203, 0, 113, last);
        RouteRecord::Vip(Route { vip, ports: vec![], local: vec![], remote: vec![] })
    }

    fn put(key: &str, value: RouteRecord) -> WatchEvent<RouteRecord> {
        WatchEvent::Put { revision: 1, key: key.into(), value }
    }

    #[test]
    fn a_snapshot_replaces_the_routes_only_once_it_is_complete_and_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("routes.json");
        let mut routes = Routes::load(path.clone());
        let synced = || WatchEvent::Synced { revision: 1 };
        routes.apply(WatchEvent::Reset { epoch: 1 });
        routes.apply(put("vips/1", vip(1)));
        assert!(routes.is_empty());
        assert!(routes.apply(synced()));
        routes.save();

        let mut routes = Routes::load(path);
        assert_eq!(routes.vips().count(), 1);
        routes.apply(WatchEvent::Reset { epoch: 2 });
        routes.apply(put("vips/2", vip(2)));
        assert_eq!(
            routes.vips().next().unwrap().vip,
            Ipv4Addr::new(203, 0, 113, 1),
            "the old one still serves"
        );
        assert!(routes.apply(synced()));
        assert_eq!(routes.vips().next().unwrap().vip, Ipv4Addr::new(203, 0, 113, 2));
        assert!(!routes.apply(put("vips/2", vip(2))), "nothing new");
        assert!(routes.apply(WatchEvent::Delete { revision: 2, key: "vips/2".into() }));
        assert!(routes.is_empty());
    }
}
