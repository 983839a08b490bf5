//! What instances may send where, in the nftables table `inet anyplace` of the machine's network namespace.
//!
//! Instances reach neither the machine itself, nor each other on this machine, nor the protected networks; answers
//! always pass. What they send elsewhere leaves under the machine's address. Replies from virtual IPs aren't
//! concerned: the state router sends them out before netfilter sees them.

use std::process::Command;

use anyhow::Context as _;

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

fn rules(config: &Config) -> String {
    // One rule each: a set would be refused where two of them overlap.
    let protected: String = config
        .protected_cidrs
        .iter()
        .map(|cidr| format!("\n        iifname \"apv*\" ip daddr {} drop", cidr.trunc()))
        .collect();
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
        iifname "apv*" ct state invalid drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {cidr} oifname "{uplink}" masquerade
    }}
}}
"#,
        cidr = config.instance_cidr.trunc(),
        uplink = config.uplink,
    )
}
