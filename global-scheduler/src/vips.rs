//! Virtual IPs: each deployment has one, from its first apply until it is deleted.

use std::{collections::BTreeMap, net::Ipv4Addr};

use anyplace_api::{ErrorCode, Problem};
use anyplace_model::DeploymentName;
use ipnet::Ipv4Net;

/// The lowest free address of the pools, leaving out network and broadcast addresses.
pub(crate) fn allocate(
    pools: &[Ipv4Net],
    taken: &BTreeMap<Ipv4Addr, DeploymentName>,
) -> Result<Ipv4Addr, Problem> {
    pools.iter().flat_map(Ipv4Net::hosts).find(|address| !taken.contains_key(address)).ok_or_else(|| {
        let pools: Vec<String> = pools.iter().map(ToString::to_string).collect();
        Problem::new(
            ErrorCode::LimitExceeded,
            format!("no_virtual_ip: all {} addresses of {} are in use", taken.len(), pools.join(", ")),
        )
        .fix("delete a deployment, or add a pool to `vip_pools` of the global scheduler")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_in_order_and_pools_end() {
        let pools: Vec<Ipv4Net> = vec!["203.0.113.0/30".parse().unwrap(), "198.51.100.7/32".parse().unwrap()];
        let mut taken = BTreeMap::new();
        let mut found = Vec::new();
        while let Ok(address) = allocate(&pools, &taken) {
            taken.insert(address, "hello".parse().unwrap());
            found.push(address.to_string());
        }
        assert_eq!(found, ["203.0.113.1", "203.0.113.2", "198.51.100.7"]);
        let problem = allocate(&pools, &taken).unwrap_err();
        assert_eq!(problem.code, ErrorCode::LimitExceeded);
        assert!(problem.to_string().contains("vip_pools"), "{problem}");
    }
}
