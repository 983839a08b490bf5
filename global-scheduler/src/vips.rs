//! Virtual IPs: each deployment has one of each family that the pools have, from its first apply until it is deleted.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyplace_api::{ErrorCode, EventSeverity, Problem};
use anyplace_model::DeploymentName;
use anyplace_service::Failure;
use ipnet::IpNet;

use crate::{app::App, batch::Batch};

type Taken = BTreeMap<IpAddr, DeploymentName>;

/// The lowest free IPv4 address of the pools, leaving out network and broadcast addresses.
pub(crate) fn allocate(pools: &[IpNet], taken: &Taken) -> Result<Ipv4Addr, Problem> {
    let hosts = pools.iter().filter_map(|pool| match pool {
        IpNet::V4(pool) => Some(pool.hosts()),
        IpNet::V6(_) => None,
    });
    let free = hosts.flatten().find(|address| !taken.contains_key(&IpAddr::from(*address)));
    free.ok_or_else(|| exhausted(pools.iter().filter(|pool| pool.addr().is_ipv4())))
}

/// The lowest free IPv6 address of the pools, leaving out the routers' anycast address, which is the first of each;
/// nothing where the pools have no IPv6.
pub(crate) fn allocate6(pools: &[IpNet], taken: &Taken) -> Result<Option<Ipv6Addr>, Problem> {
    let pools6 = pools.iter().filter_map(|pool| match pool {
        IpNet::V4(_) => None,
        IpNet::V6(pool) => Some(pool),
    });
    if pools6.clone().next().is_none() {
        return Ok(None);
    }
    let hosts = pools6.flat_map(|pool| {
        let anycast = (pool.prefix_len() < 127).then_some(pool.network());
        pool.hosts().filter(move |address| Some(*address) != anycast)
    });
    let free = hosts.into_iter().find(|address| !taken.contains_key(&IpAddr::from(*address)));
    free.map(Some).ok_or_else(|| exhausted(pools.iter().filter(|pool| pool.addr().is_ipv6())))
}

fn exhausted<'a>(pools: impl Iterator<Item = &'a IpNet>) -> Problem {
    let pools: Vec<String> = pools.map(ToString::to_string).collect();
    let message = format!("no_virtual_ip: all addresses of {} are in use", pools.join(", "));
    Problem::new(ErrorCode::LimitExceeded, message)
        .fix("delete a deployment, or add a pool to `vip_pools` of the global scheduler")
}

/// Both families' addresses, for people.
pub(crate) fn text(vips: impl Iterator<Item = IpAddr>) -> String {
    vips.map(|vip| vip.to_string()).collect::<Vec<_>>().join(" and ")
}

impl App {
    /// Gives deployments from before there was an IPv6 pool their address.
    pub(crate) async fn complete_vips(&self) -> Result<(), Failure> {
        let writer = self.writer().await;
        let without: Vec<DeploymentName> = {
            let world = self.world();
            let without = world.deployments.iter().filter(|(_, stored)| stored.value.vip6.is_none());
            without.map(|(name, _)| name.clone()).collect()
        };
        for name in without {
            let batch = {
                let world = self.world();
                let Some(stored) = world.deployments.get(&name) else { continue };
                let vip = match allocate6(&self.config.vip_pools, &world.vips) {
                    Ok(Some(vip)) => vip,
                    Ok(None) => return Ok(()),
                    Err(problem) => {
                        tracing::warn!(%problem, "deployments without an IPv6 address stay so");
                        return Ok(());
                    }
                };
                let mut batch = Batch::default();
                let mut record = stored.value.clone();
                record.vip6 = Some(vip);
                batch.put_deployment(&world, record)?;
                let message = format!("has virtual IP {vip} too");
                batch.event(EventSeverity::Normal, format!("deployment/{name}"), message);
                batch
            };
            writer.commit(batch).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pools(prefixes: &[&str]) -> Vec<IpNet> {
        prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect()
    }

    #[test]
    fn addresses_come_in_order_and_pools_end() {
        let pools = pools(&["203.0.113.0/30", "2001:db8::/126", "198.51.100.7/32", "2001:db8:1::7/128"]);
        let mut taken = BTreeMap::new();
        let mut found = Vec::new();
        while let Ok(address) = allocate(&pools, &taken) {
            taken.insert(address.into(), "hello".parse().unwrap());
            found.push(address.to_string());
        }
        assert_eq!(found, ["203.0.113.1", "203.0.113.2", "198.51.100.7"]);
        let problem = allocate(&pools, &taken).unwrap_err();
        assert_eq!(problem.code, ErrorCode::LimitExceeded);
        assert!(problem.to_string().contains("vip_pools"), "{problem}");
        let mut found = Vec::new();
        while let Ok(Some(address)) = allocate6(&pools, &taken) {
            taken.insert(address.into(), "hello".parse().unwrap());
            found.push(address.to_string());
        }
        assert_eq!(found, ["2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8:1::7"]);
        let problem = allocate6(&pools, &taken).unwrap_err();
        assert!(problem.to_string().contains("2001:db8::/126"), "{problem}");
    }

    #[test]
    fn without_a_pool_there_is_no_ipv6_address() {
        assert_eq!(allocate6(&pools(&["203.0.113.0/30"]), &BTreeMap::new()).unwrap(), None);
    }
}
