//! What instances may send where, in the nftables table `inet anyplace` of the machine's network namespace.
//!
//! Instances reach neither the machine itself, nor each other on this machine, nor the protected networks, nor the
//! services that clouds have for their machines on link-local addresses, names (port 53) excepted; answers always
//! pass. What they send elsewhere leaves under the machine's address; IPv6 only if the machine has such an address, and
//! to no private network, where clouds and fabrics have what is for machines. Replies from virtual IPs aren't
//! concerned: the state router sends them out before netfilter sees them.

use std::{net::IpAddr, process::Command};

use anyhow::Context as _;
use anyplace_model::INSTANCE_NET6;
use axum::http::Uri;
use ipnet::IpNet;

use crate::{Config, network::feed, runtime::find_program};

/// Sets the table, replacing an earlier one in one transaction. Blocks.
pub(crate) fn install(config: &Config) -> anyhow::Result<()> {
    nft(&rules(config))
}

/// Removes the table. Blocks.
pub(crate) fn uninstall() -> anyhow::Result<()> {
    if find_program("nft").is_none() {
        return Ok(());
    }
    nft("table inet anyplace {}\ndelete table inet anyplace\n")
}

fn nft(rules: &str) -> anyhow::Result<()> {
    let program =
        find_program("nft").context("the program `nft` is not there; run `apt-get install nftables`")?;
    let mut command = Command::new(program);
    command.args(["-f", "-"]);
    feed(command, rules).context("`nft` refused the firewall's rules")
}

/// The control plane's servers that the agent itself knows by address: protected even where `protected_cidrs` leaves
/// them out.
fn servers(config: &Config) -> impl Iterator<Item = IpNet> + '_ {
    let registries = config.registries().map(|(url, _)| url);
    std::iter::once(config.location_scheduler.as_str()).chain(registries).filter_map(|url| {
        let url: Uri = url.parse().ok()?;
        let host = url.host()?.trim_matches(['[', ']']);
        Some(IpNet::from(host.parse::<IpAddr>().ok()?))
    })
}

fn rules(config: &Config) -> String {
    // One rule each: a set would be refused where two of them overlap.
    let protected: String = config
        .protected_cidrs
        .iter()
        .map(IpNet::trunc)
        .chain(servers(config))
        .map(|cidr| {
            let family = if cidr.addr().is_ipv4() { "ip" } else { "ip6" };
            format!("\n        iifname \"apv*\" {family} daddr {cidr} drop")
        })
        .collect();
    // Whose socket is told so (IPV6_FREEBIND) sends from any IPv6 address, which would leave as it is.
    let (refused6, translated6) = match config.address6 {
        Some(address) => (
            format!(
                "iifname \"apv*\" ip6 saddr != {INSTANCE_NET6} drop
        iifname \"apv*\" ip6 daddr fc00::/7 drop"
            ),
            format!(
                "\n        ip6 saddr {INSTANCE_NET6} oifname \"{}\" snat ip6 to {address}",
                config.uplink
            ),
        ),
        None => ("iifname \"apv*\" meta nfproto ipv6 drop".to_owned(), String::new()),
    };
    format!(
        r#"table inet anyplace {{}}
delete table inet anyplace
table inet anyplace {{
    chain input {{
        type filter hook input priority filter; policy accept;
        iifname "apv*" ct state established,related accept
        iifname "apv*" drop
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname "apv*" ct state established,related accept
        iifname "apv*" oifname "apv*" drop{protected}
        iifname "apv*" ip daddr 169.254.0.0/16 meta l4proto {{ tcp, udp }} th dport != 53 drop
        {refused6}
        iifname "apv*" ct state invalid drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {cidr} oifname "{uplink}" masquerade{translated6}
    }}
}}
"#,
        cidr = config.instance_cidr.trunc(),
        uplink = config.uplink,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"
        data_dir = "/var/lib/anyplace/machine"
        advertise = "http://10.1.1.1:7620"
        machine = "ams-1"
        location_scheduler = "http://10.1.0.10:7610"
        token_file = "/etc/anyplace/machine.token"
        registry = "http://registry.example:5000"
        address = "10.1.1.1"
        uplink = "eth0"
        instance_cidr = "10.1.1.64/26"
    "#;

    #[test]
    fn the_known_servers_are_protected_even_where_nothing_is_configured() {
        let rules = rules(&toml::from_str(CONFIG).unwrap());
        assert!(rules.contains("iifname \"apv*\" ip daddr 10.1.0.10/32 drop"), "{rules}");
        assert_eq!(rules.matches("daddr").count(), 2, "the other is that of link-local addresses: {rules}");
    }

    #[test]
    fn ipv6_leaves_only_behind_an_address_and_to_no_private_network() {
        let without = rules(&toml::from_str(CONFIG).unwrap());
        assert!(without.contains("iifname \"apv*\" meta nfproto ipv6 drop"), "{without}");
        assert!(!without.contains("snat"), "{without}");
        let more = "address6 = \"2001:db8:f::1\"\nprotected_cidrs = [\"2001:db8:f::1/48\", \"10.1.0.0/16\"]";
        let with = rules(&toml::from_str(&format!("{CONFIG}{more}")).unwrap());
        for rule in [
            "iifname \"apv*\" ip6 saddr != fd5b:27d6:914c::/96 drop",
            "iifname \"apv*\" ip6 daddr fc00::/7 drop",
            "iifname \"apv*\" ip6 daddr 2001:db8:f::/48 drop",
            "iifname \"apv*\" ip daddr 10.1.0.0/16 drop",
            "ip6 saddr fd5b:27d6:914c::/96 oifname \"eth0\" snat ip6 to 2001:db8:f::1",
        ] {
            assert!(with.contains(rule), "{rule}: {with}");
        }
        assert!(!with.contains("nfproto"), "{with}");
    }
}
