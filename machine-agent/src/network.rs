//! The instance's network: a namespace of its own and a veth pair into it.
//!
//! The host's end (named after the address) has 169.254.1.1 and a route to the address; inside, `eth0` has the
//! address and its default route over 169.254.1.1. For clients of IPv6 virtual IPs it has an IPv6 address too, which
//! follows from the other, with its default route over fe80::61; the state router delivers and takes those packets. If
//! the machine has an IPv6 address, the host's end takes the instance's other packets too, and has a route to it; else
//! the host's end has no IPv6. Nothing is bridged. The namespace stays over restarts of the container, so that what the
//! state router attached to the pair stays too.
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
use anyplace_model::{GATEWAY, GATEWAY6, container_mac, host_interface, instance_address6};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};

use crate::{Config, paths::InstancePaths, rootfs};
use netlink::{Link, Netlink, Request};

/// Taken off the uplink's MTU: the GUE encapsulation between machines needs up to 60 bytes, rounded up.
const ENCAPSULATION_BYTES: u32 = 100;
/// What fits through the internet; more gains little, and breaks where path MTU discovery does.
const MAX_MTU: u32 = 1_500;
/// Where the uplink can't be asked.
const FALLBACK_MTU: u32 = 1_400;
/// In the mark of a network that is complete inside; those from before IPv6 are empty.
const INSIDE6: &[u8] = b"6";
/// The same, and the host's end takes the instance's IPv6 packets.
const BOTH6: &[u8] = b"66";
/// Settings of an instance's IPv6: its addresses and routes are the agent's, who knows that nobody else is on the wire.
const IPV6_SETTINGS: [(&str, &str); 4] =
    [("addr_gen_mode", "1"), ("accept_ra", "0"), ("accept_dad", "0"), ("disable_ipv6", "0")];
/// Filesystem type of network namespaces.
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// Prepares the machine's own namespace: forwards packets, and doesn't drop what comes in on another interface
/// than replies would leave by.
pub(crate) fn prepare_machine(config: &Config) {
    for (file, value) in [("ip_forward", "1"), ("conf/all/rp_filter", "0")] {
        sysctl(&format!("ipv4/{file}"), value);
    }
    if config.address6.is_some() {
        forward_ipv6();
    }
}

/// Who forwards IPv6 takes no routes from its routers any more, unless told so before: the machine goes on as it did.
fn forward_ipv6() {
    let is = |name: &str, value: &str| {
        fs::read_to_string(format!("/proc/sys/net/{name}")).is_ok_and(|found| found.trim() == value)
    };
    for interface in fs::read_dir("/proc/sys/net/ipv6/conf").into_iter().flatten().flatten() {
        let folder = format!("ipv6/conf/{}", interface.file_name().to_string_lossy());
        if is(&format!("{folder}/forwarding"), "0") && is(&format!("{folder}/accept_ra"), "1") {
            sysctl(&format!("{folder}/accept_ra"), "2");
        }
    }
    sysctl("ipv6/conf/all/forwarding", "1");
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

/// Makes the instance's network, unless it is there and complete; `is_client6` if the instance may reach IPv6
/// destinations. Blocks.
pub(crate) fn ensure(
    paths: &InstancePaths,
    address: Ipv4Addr,
    mtu: u32,
    is_client6: bool,
) -> anyhow::Result<()> {
    let host = host_interface(address);
    if paths.network_mark.exists() && is_namespace(&paths.netns) && exists(&host) {
        return complete(paths, address, is_client6);
    }
    remove(paths, Some(address))?;
    let mut inside = make_namespace(&paths.netns)?;
    let netns = File::open(&paths.netns).context("can't open the network namespace")?;
    let mac = container_mac(address);
    let mut outside = Netlink::open()?;
    outside.run(&[netlink::veth(&host, "eth0", mac, netns.as_fd(), mtu)])?;
    // Before it is up: no IPv6 address, and nothing dropped after the router has decapsulated it.
    if !is_client6 {
        sysctl(&format!("ipv6/conf/{host}/disable_ipv6"), "1");
    }
    sysctl(&format!("ipv4/conf/{host}/rp_filter"), "0");
    let (loopback, eth0) = (inside.link("lo")?.index, inside.link("eth0")?.index);
    let gateway = outside.link(&host)?;
    let mut requests = vec![
        netlink::up(loopback),
        netlink::up(eth0),
        netlink::address(eth0, address, libc::RT_SCOPE_UNIVERSE),
        netlink::default_route(eth0, GATEWAY),
    ];
    requests.extend(ipv6(eth0, address, gateway));
    inside.run(&requests)?;
    if is_client6 {
        settings6(&host);
    }
    let index = gateway.index;
    outside.run(&[
        netlink::address(index, GATEWAY, libc::RT_SCOPE_LINK),
        netlink::up(index),
        netlink::host_route(index, address, Some(GATEWAY.into())),
        netlink::neighbour(index, address, mac),
    ])?;
    if is_client6 {
        outside.run(&outside6(index, address))?;
    }
    mark(paths, is_client6)
}

/// Gives the network of an instance what one made today has and one made by an earlier agent lacks. Blocks.
pub(crate) fn complete(paths: &InstancePaths, address: Ipv4Addr, is_client6: bool) -> anyhow::Result<()> {
    let found = fs::read(&paths.network_mark).unwrap_or_default();
    if found == BOTH6 || found == INSIDE6 && !is_client6 {
        return Ok(());
    }
    if found != INSIDE6 {
        complete_inside(paths, address)?;
    }
    if is_client6 {
        let host = host_interface(address);
        settings6(&host);
        let mut outside = Netlink::open()?;
        let index = outside.link(&host)?.index;
        outside.run(&outside6(index, address))?;
    }
    mark(paths, is_client6)
}

fn complete_inside(paths: &InstancePaths, address: Ipv4Addr) -> anyhow::Result<()> {
    let gateway = Netlink::open()?.link(&host_interface(address))?;
    let netns = File::open(&paths.netns).context("can't open the network namespace")?;
    let mut inside = in_thread(move || {
        setns(&netns, CloneFlags::CLONE_NEWNET).context("can't enter the network namespace")?;
        settings6("eth0");
        Netlink::open()
    })?;
    let eth0 = inside.link("eth0")?.index;
    inside.run(&ipv6(eth0, address, gateway).collect::<Vec<_>>())
}

fn mark(paths: &InstancePaths, is_client6: bool) -> anyhow::Result<()> {
    let mark = if is_client6 { BOTH6 } else { INSIDE6 };
    fs::write(&paths.network_mark, mark).context("can't mark the network as complete")
}

fn settings6(interface: &str) {
    for (name, value) in IPV6_SETTINGS {
        sysctl(&format!("ipv6/conf/{interface}/{name}"), value);
    }
}

/// The IPv6 side of the host's end, if the kernel has IPv6: the way to the instance.
fn outside6(index: u32, address: Ipv4Addr) -> Vec<Request> {
    let instance = instance_address6(address);
    let requests = [
        netlink::host_route(index, instance, None),
        netlink::neighbour(index, instance, container_mac(address)),
    ];
    if_ipv6(requests).collect()
}

/// The IPv6 side of `eth0`, if the kernel has IPv6. The gateway answers no questions, so its address is told.
fn ipv6(eth0: u32, address: Ipv4Addr, gateway: Link) -> impl Iterator<Item = Request> {
    let requests = [
        netlink::address(eth0, instance_address6(address), libc::RT_SCOPE_UNIVERSE),
        netlink::neighbour(eth0, GATEWAY6, gateway.mac),
        netlink::default_route(eth0, GATEWAY6),
    ];
    if_ipv6(requests)
}

fn if_ipv6<const N: usize>(requests: [Request; N]) -> impl Iterator<Item = Request> {
    let known = Path::new("/proc/sys/net/ipv6").exists();
    requests.into_iter().filter(move |_| known).map(Request::or_replace)
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
    in_thread(move || {
        unshare(CloneFlags::CLONE_NEWNET).context("can't make a network namespace; run the agent as root")?;
        settings6("default");
        // A namespace of one app needs no root to listen on port 80.
        sysctl("ipv4/ip_unprivileged_port_start", "0");
        mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("can't mount {}", path.display()))?;
        Netlink::open()
    })
}

/// In a thread of its own, which may move into another namespace, and ends.
fn in_thread(work: impl FnOnce() -> anyhow::Result<Netlink> + Send + 'static) -> anyhow::Result<Netlink> {
    let thread = std::thread::spawn(work);
    thread.join().map_err(|_| anyhow::anyhow!("a thread in a network namespace panicked"))?
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
