//! The instance's network: a namespace of its own and a veth pair into it.
//!
//! The host's end (named after the address) has 169.254.1.1 and a route to the address; inside, `eth0` has the
//! address and its default route over 169.254.1.1. Nothing is bridged. The namespace stays over restarts of the
//! container, so that what the state router attached to the pair stays too.
//!
//! Everything is done by the kernel's own messages ([`netlink`]): a container's start waits for it.

mod netlink;

use std::{
    fs::{self, File},
    io::Write as _,
    net::Ipv4Addr,
    os::fd::AsFd as _,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::Context as _;
use anyplace_model::{GATEWAY, container_mac, host_interface};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use crate::{paths::InstancePaths, rootfs};
use netlink::Netlink;

/// Taken off the uplink's MTU: the GUE encapsulation between machines needs up to 60 bytes, rounded up.
const ENCAPSULATION_BYTES: u32 = 100;
/// What fits through the internet; more gains little, and breaks where path MTU discovery does.
const MAX_MTU: u32 = 1_500;
/// Where the uplink can't be asked.
const FALLBACK_MTU: u32 = 1_400;
/// Filesystem type of network namespaces.
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// Prepares the machine's own namespace: forwards packets, and doesn't drop what comes in on another interface
/// than replies would leave by.
pub(crate) fn prepare_machine() {
    for (file, value) in [("ip_forward", "1"), ("conf/all/rp_filter", "0")] {
        sysctl(&format!("ipv4/{file}"), value);
    }
}

/// MTU of instances' interfaces.
pub(crate) fn instance_mtu(uplink: &str) -> u32 {
    #[derive(serde::Deserialize)]
    struct Link {
        mtu: u32,
    }
    let output = Command::new("ip").args(["-json", "link", "show", "dev", uplink]).output().ok();
    let links: Option<Vec<Link>> = output.and_then(|output| serde_json::from_slice(&output.stdout).ok());
    match links.and_then(|links| links.first().map(|link| link.mtu)) {
        Some(mtu) => mtu.saturating_sub(ENCAPSULATION_BYTES).min(MAX_MTU),
        None => {
            tracing::warn!(uplink, mtu = FALLBACK_MTU, "the uplink is not there; check `uplink` (`ip link`)");
            FALLBACK_MTU
        }
    }
}

/// An interface's speed in bytes a second, where it tells one: those of some virtual machines don't.
pub(crate) fn bytes_per_s(interface: &str) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/sys/class/net/{interface}/speed")).ok()?;
    // Mbit/s; -1 where it isn't known.
    text.trim().parse::<u64>().ok().filter(|mbit| *mbit > 0).map(|mbit| mbit * 1_000_000 / 8)
}

/// Makes the instance's network, unless it is there and complete. Blocks.
pub(crate) fn ensure(paths: &InstancePaths, address: Ipv4Addr, mtu: u32) -> anyhow::Result<()> {
    let host = host_interface(address);
    if paths.network_mark.exists() && is_namespace(&paths.netns) && exists(&host) {
        return Ok(());
    }
    remove(paths, Some(address))?;
    let mut inside = make_namespace(&paths.netns)?;
    let netns = File::open(&paths.netns).context("can't open the network namespace")?;
    let mac = container_mac(address);
    let mut outside = Netlink::open()?;
    outside.run(&[netlink::veth(&host, "eth0", mac, netns.as_fd(), mtu)])?;
    // Before it is up: no IPv6 address, and nothing dropped after the router has decapsulated it.
    sysctl(&format!("ipv6/conf/{host}/disable_ipv6"), "1");
    sysctl(&format!("ipv4/conf/{host}/rp_filter"), "0");
    let (loopback, eth0) = (inside.index("lo")?, inside.index("eth0")?);
    inside.run(&[
        netlink::up(loopback),
        netlink::up(eth0),
        netlink::address(eth0, address, libc::RT_SCOPE_UNIVERSE),
        netlink::default_route(eth0, GATEWAY),
    ])?;
    let host = outside.index(&host)?;
    outside.run(&[
        netlink::address(host, GATEWAY, libc::RT_SCOPE_LINK),
        netlink::up(host),
        netlink::host_route(host, address, GATEWAY),
        netlink::neighbour(host, address, mac),
    ])?;
    fs::write(&paths.network_mark, b"").context("can't mark the network as complete")
}

/// Removes the instance's network, whatever there is of it. Blocks.
pub(crate) fn remove(paths: &InstancePaths, address: Option<Ipv4Addr>) -> anyhow::Result<()> {
    let _ = fs::remove_file(&paths.network_mark);
    if let Some(host) = address.map(host_interface).filter(|host| exists(host)) {
        remove_interface(&host)?;
    }
    remove_namespace(&paths.netns)
}

pub(crate) fn remove_interface(name: &str) -> anyhow::Result<()> {
    let Ok(index) = nix::net::if_::if_nametoindex(name) else { return Ok(()) };
    match Netlink::open()?.run(&[netlink::delete(index)]) {
        Err(error) if exists(name) => Err(error),
        _ => Ok(()),
    }
}

pub(crate) fn remove_namespace(path: &Path) -> anyhow::Result<()> {
    rootfs::unmount(path)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("can't remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Names of the host's ends that are there.
pub(crate) fn interfaces() -> Vec<String> {
    let prefix = &host_interface(Ipv4Addr::UNSPECIFIED)[..3];
    let names = nix::net::if_::if_nameindex();
    names.map_or_else(
        |_| Vec::new(),
        |names| {
            let names =
                names.iter().filter_map(|interface| interface.name().to_str().ok().map(str::to_owned));
            names.filter(|name| name.starts_with(prefix) && name.len() == prefix.len() + 8).collect()
        },
    )
}

fn exists(interface: &str) -> bool {
    nix::net::if_::if_nametoindex(interface).is_ok()
}

fn is_namespace(path: &Path) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|stat| stat.filesystem_type().0 == NSFS_MAGIC)
}

/// A new namespace, kept alive by a mount, and a connection to the kernel in it. Made in a thread of its own, which
/// moves into it and ends.
fn make_namespace(path: &Path) -> anyhow::Result<Netlink> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("can't make {}", folder.display()))?;
    }
    File::create(path).with_context(|| format!("can't make {}", path.display()))?;
    let path = path.to_owned();
    let made = std::thread::spawn(move || -> anyhow::Result<Netlink> {
        unshare(CloneFlags::CLONE_NEWNET).context("can't make a network namespace; run the agent as root")?;
        for scope in ["all", "default"] {
            sysctl(&format!("ipv6/conf/{scope}/disable_ipv6"), "1");
        }
        // A namespace of one app needs no root to listen on port 80.
        sysctl("ipv4/ip_unprivileged_port_start", "0");
        mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("can't mount {}", path.display()))?;
        Netlink::open()
    });
    made.join().map_err(|_| anyhow::anyhow!("the thread that makes a network namespace panicked"))?
}

/// Sets a value of the namespace that the thread is in. What isn't there (no IPv6) needs no setting.
fn sysctl(name: &str, value: &str) {
    let path = format!("/proc/sys/net/{name}");
    if let Err(error) = fs::write(&path, value)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path, value, %error, "can't set");
    }
}

/// Runs a program with a text on its standard input; its complaints become the error.
pub(crate) fn feed(mut command: Command, input: &str) -> anyhow::Result<()> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("can't be started")?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends early says why itself.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().context("can't be waited for")?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let complaint: Vec<&str> = complaint.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    anyhow::bail!("{}", if complaint.is_empty() { output.status.to_string() } else { complaint.join("; ") })
}
