//! Chooses the backends of each bucket of a virtual IP. Pure: a route in, tables out.
//!
//! The rule is a function of the route alone, without history, so that all routers of a location build the same
//! tables, also one that started a moment ago. Each bucket ranks the candidates by a hash of bucket and address
//! (rendezvous hashing): the first *ready* one owns the bucket now, and the best-ranked *other* candidate is the one
//! that a flow may still belong to:
//!
//! - a new instance that takes a bucket pushes the owner before to the second rank, so it is found there;
//! - a draining instance keeps its rank but takes nothing new, so it is the second hop of exactly its own buckets.
//!
//! While any local instance is ready, new connections stay in the location; else they go to the nearest other one;
//! only where nothing is ready anywhere they go to instances that drain.
//!
//! This crate must not know about deployments, images, sockets or maps.

use std::net::Ipv4Addr;

use anyplace_model::Route;

/// Buckets of a VIP with at least one backend. A location's instances of one VIP are tens at most for now; with
/// 256 buckets the largest share of 16 backends is within 60 % of the mean (tested). A bucket costs 8 bytes.
pub const BUCKETS: usize = 256;

/// One bucket: where its new flows go, and where its older flows may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    /// Takes new flows.
    pub now: Ipv4Addr,
    /// May hold older flows.
    pub before: Option<Ipv4Addr>,
}

/// The tables of one VIP; an empty table has no backend.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tables {
    /// For packets from clients.
    pub full: Vec<Bucket>,
    /// For packets that another location sent on: never leaves this location again.
    pub local: Vec<Bucket>,
}

/// Builds the tables of a route.
pub fn tables(route: &Route) -> Tables {
    let mut ready = Vec::new();
    let mut candidates = Vec::new();
    for endpoint in &route.local {
        if endpoint.ready && !endpoint.draining {
            ready.push(endpoint.address);
        }
        if endpoint.ready || endpoint.draining {
            candidates.push(endpoint.address);
        }
    }
    let remote = nearest(route);
    // With nothing ready, draining instances keep serving the flows that they have, and a relayed flow must still
    // find them.
    let local = table(if ready.is_empty() { &candidates } else { &ready }, &candidates, &[]);
    let full = if !ready.is_empty() {
        // Flows that went abroad before the first local instance was ready stay there.
        table(&ready, &candidates, &remote)
    } else if !remote.is_empty() {
        // Flows of a draining local instance stay with it while new ones leave.
        table(&remote, if candidates.is_empty() { &remote } else { &candidates }, &[])
    } else {
        local.clone()
    };
    Tables { full, local }
}

/// Addresses of the nearest location that has ready instances and machines to send to.
fn nearest(route: &Route) -> Vec<Ipv4Addr> {
    route
        .remote
        .iter()
        .filter(|remote| remote.ready > 0 && !remote.ingress.is_empty())
        .min_by(|a, b| a.distance_km.total_cmp(&b.distance_km).then_with(|| a.location.cmp(&b.location)))
        .map(|remote| remote.ingress.clone())
        .unwrap_or_default()
}

fn table(ready: &[Ipv4Addr], candidates: &[Ipv4Addr], fallback: &[Ipv4Addr]) -> Vec<Bucket> {
    (0..BUCKETS as u64)
        .map_while(|bucket| {
            let now = first(bucket, ready, None)?;
            let before = first(bucket, candidates, Some(now)).or_else(|| first(bucket, fallback, Some(now)));
            Some(Bucket { now, before })
        })
        .collect()
}

/// The best-ranked address of a bucket, `except` left out.
fn first(bucket: u64, addresses: &[Ipv4Addr], except: Option<Ipv4Addr>) -> Option<Ipv4Addr> {
    addresses
        .iter()
        .copied()
        .filter(|address| Some(*address) != except)
        .max_by_key(|address| (rank(bucket, *address), *address))
}

/// A hash of bucket and address: the finaliser of splitmix64, whose output bits all depend on all input bits.
fn rank(bucket: u64, address: Ipv4Addr) -> u64 {
    let mut x = (bucket << 32 | u64::from(u32::from(address))).wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests;
