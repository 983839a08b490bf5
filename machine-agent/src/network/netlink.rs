//! What the network needs of rtnetlink: links, addresses, routes and neighbours, by the kernel's own messages. Starting
//! iproute2 for them would take longer than starting the container.
//!
//! A request is a header (length, type, flags, sequence, 0), a fixed part by its type, and attributes (length, type,
//! bytes, padded to four). Several go out in one write, and each is answered by an acknowledgement with an error number
//! (rtnetlink(7), and `linux/rtnetlink.h`, `linux/if_link.h`, `linux/veth.h`).

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
};

use anyhow::Context as _;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

const HEADER_BYTES: usize = 16;
/// `struct ifinfomsg`.
const LINK_BYTES: usize = 16;
/// Attribute of a veth's data that describes its peer.
const VETH_INFO_PEER: u16 = 1;
/// `RTNH_F_ONLINK`: the gateway needs no network that it is in.
const ONLINK: u32 = 4;
/// An acknowledgement quotes the request that failed, and no request here is near this long.
const ANSWER_BYTES: usize = 8 << 10;

/// A connection to the kernel, for the namespace in which it was opened.
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// What is known of an interface.
#[derive(Clone, Copy)]
pub(super) struct Link {
    pub(super) index: u32,
    /// Zeroes where it has none.
    pub(super) mac: [u8; 6],
}

impl Link {
    /// From a message's body.
    fn read(body: &[u8]) -> Option<Self> {
        let index = u32::from_ne_bytes(*body.get(4..8)?.first_chunk()?);
        let mut attributes = body.get(LINK_BYTES..)?;
        let mut mac = [0; 6];
        while let Some([a, b, c, d]) = attributes.first_chunk::<4>() {
            let length = usize::from(u16::from_ne_bytes([*a, *b]));
            let Some(value) = attributes.get(4..length) else { break };
            if u16::from_ne_bytes([*c, *d]) == libc::IFLA_ADDRESS {
                mac = value.first_chunk().copied().unwrap_or(mac);
            }
            attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Some(Self { index, mac })
    }
}

/// A request, with the words that an error calls it by.
pub(super) struct Request {
    what: &'static str,
    kind: u16,
    flags: i32,
    body: Vec<u8>,
}

impl Netlink {
    /// For the namespace that the thread is in.
    pub(super) fn open() -> anyhow::Result<Self> {
        let (family, flags) = (AddressFamily::Netlink, SockFlag::SOCK_CLOEXEC);
        let socket = socket(family, SockType::Raw, flags, SockProtocol::NetlinkRoute)
            .context("can't open a netlink socket")?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Carries out requests, in order. After an error some may have been.
    pub(super) fn run(&mut self, requests: &[Request]) -> anyhow::Result<()> {
        let first = self.sequence + 1;
        let mut bytes = Vec::new();
        for request in requests {
            self.sequence += 1;
            request.write(self.sequence, libc::NLM_F_ACK, &mut bytes);
        }
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty()).context("can't write to netlink")?;
        let (mut answered, mut failure) = (0, None);
        while answered < requests.len() {
            for (kind, sequence, body) in messages(&self.receive()?) {
                if kind != libc::NLMSG_ERROR as u16 || sequence < first {
                    continue;
                }
                let error = body.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
                let what = requests.get((sequence - first) as usize).map_or("a request", |it| it.what);
                if error != 0 && failure.is_none() {
                    failure = Some((what, io::Error::from_raw_os_error(-error)));
                }
                answered += 1;
            }
        }
        match failure {
            Some((what, error)) => Err(error).with_context(|| format!("the kernel refused {what}")),
            None => Ok(()),
        }
    }

    /// An interface by its name.
    pub(super) fn link(&mut self, name: &str) -> anyhow::Result<Link> {
        let mut body = link(0, 0);
        attribute(&mut body, libc::IFLA_IFNAME, &text(name));
        let request = Request { what: "the look for an interface", kind: libc::RTM_GETLINK, flags: 0, body };
        self.sequence += 1;
        let mut bytes = Vec::new();
        request.write(self.sequence, 0, &mut bytes);
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty()).context("can't write to netlink")?;
        loop {
            for (kind, sequence, body) in messages(&self.receive()?) {
                if sequence != self.sequence {
                    continue;
                }
                let link = (kind == libc::RTM_NEWLINK).then(|| Link::read(body)).flatten();
                return link.with_context(|| format!("there is no interface {name}"));
            }
        }
    }

    fn receive(&self) -> anyhow::Result<Vec<u8>> {
        let mut bytes = vec![0; ANSWER_BYTES];
        loop {
            match recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
                Ok(length) => {
                    bytes.truncate(length);
                    return Ok(bytes);
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error).context("can't read from netlink"),
            }
        }
    }
}

/// A veth pair: one end here, the other in a namespace.
pub(super) fn veth(
    name: &str,
    peer: &str,
    peer_mac: [u8; 6],
    namespace: BorrowedFd<'_>,
    mtu: u32,
) -> Request {
    let mut inside = link(0, 0);
    attribute(&mut inside, libc::IFLA_IFNAME, &text(peer));
    attribute(&mut inside, libc::IFLA_ADDRESS, &peer_mac);
    attribute(&mut inside, libc::IFLA_MTU, &mtu.to_ne_bytes());
    attribute(&mut inside, libc::IFLA_NET_NS_FD, &namespace.as_raw_fd().to_ne_bytes());
    let (mut data, mut info, mut body) = (Vec::new(), Vec::new(), link(0, 0));
    attribute(&mut data, VETH_INFO_PEER, &inside);
    attribute(&mut info, libc::IFLA_INFO_KIND, b"veth");
    attribute(&mut info, libc::IFLA_INFO_DATA, &data);
    attribute(&mut body, libc::IFLA_IFNAME, &text(name));
    attribute(&mut body, libc::IFLA_MTU, &mtu.to_ne_bytes());
    attribute(&mut body, libc::IFLA_LINKINFO, &info);
    create("a veth pair", libc::RTM_NEWLINK, body)
}

/// Removes an interface, and with a veth its peer.
pub(super) fn delete(index: u32) -> Request {
    Request { what: "the removal of an interface", kind: libc::RTM_DELLINK, flags: 0, body: link(index, 0) }
}

pub(super) fn up(index: u32) -> Request {
    let body = link(index, libc::IFF_UP as u32);
    Request { what: "an interface's start", kind: libc::RTM_NEWLINK, flags: 0, body }
}

/// One address, without a network.
pub(super) fn address(index: u32, address: impl Into<IpAddr>, scope: u8) -> Request {
    let (family, bits, bytes) = parts(address.into());
    // Nobody else is on the wire that could have an IPv6 address too.
    let flags = if family == libc::AF_INET6 as u8 { libc::IFA_F_NODAD as u8 } else { 0 };
    let mut body = vec![family, bits, flags, scope];
    body.extend(index.to_ne_bytes());
    attribute(&mut body, libc::IFA_LOCAL, &bytes);
    attribute(&mut body, libc::IFA_ADDRESS, &bytes);
    create("an address", libc::RTM_NEWADDR, body)
}

/// The default route, over a gateway that no network has.
pub(super) fn default_route(index: u32, gateway: impl Into<IpAddr>) -> Request {
    let (family, _, gateway) = parts(gateway.into());
    let mut body = route(family, 0, libc::RT_SCOPE_UNIVERSE, ONLINK);
    attribute(&mut body, libc::RTA_OIF, &index.to_ne_bytes());
    attribute(&mut body, libc::RTA_GATEWAY, &gateway);
    create("the default route", libc::RTM_NEWROUTE, body)
}

/// The route to one address, which may be used from a certain other one.
pub(super) fn host_route(index: u32, address: impl Into<IpAddr>, source: Option<IpAddr>) -> Request {
    let (family, bits, address) = parts(address.into());
    let mut body = route(family, bits, libc::RT_SCOPE_LINK, 0);
    attribute(&mut body, libc::RTA_DST, &address);
    attribute(&mut body, libc::RTA_OIF, &index.to_ne_bytes());
    if let Some(source) = source {
        attribute(&mut body, libc::RTA_PREFSRC, &parts(source).2);
    }
    create("the route to an instance", libc::RTM_NEWROUTE, body)
}

/// A neighbour that is never asked for.
pub(super) fn neighbour(index: u32, address: impl Into<IpAddr>, mac: [u8; 6]) -> Request {
    let (family, _, address) = parts(address.into());
    // struct ndmsg: family, padding, interface, state, flags, type.
    let mut body = vec![family, 0, 0, 0];
    body.extend(index.to_ne_bytes());
    body.extend(libc::NUD_PERMANENT.to_ne_bytes());
    body.extend([0, 0]);
    attribute(&mut body, libc::NDA_DST, &address);
    attribute(&mut body, libc::NDA_LLADDR, &mac);
    create("a neighbour", libc::RTM_NEWNEIGH, body)
}

/// Family, bits and bytes of an address.
fn parts(address: IpAddr) -> (u8, u8, Vec<u8>) {
    match address {
        IpAddr::V4(address) => (libc::AF_INET as u8, 32, address.octets().to_vec()),
        IpAddr::V6(address) => (libc::AF_INET6 as u8, 128, address.octets().to_vec()),
    }
}

impl Request {
    /// The same, also where what it makes is there already, perhaps another way.
    pub(super) fn or_replace(mut self) -> Self {
        self.flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
        self
    }
}

fn create(what: &'static str, kind: u16, body: Vec<u8>) -> Request {
    Request { what, kind, flags: libc::NLM_F_CREATE | libc::NLM_F_EXCL, body }
}

/// `struct ifinfomsg`: family, padding, type, index, flags, which flags count.
fn link(index: u32, flags: u32) -> Vec<u8> {
    let mut body = vec![0; 4];
    for field in [index, flags, flags] {
        body.extend(field.to_ne_bytes());
    }
    debug_assert_eq!(body.len(), LINK_BYTES);
    body
}

/// `struct rtmsg`: family, bits of destination and source, service, table, who made it, scope, type, flags.
fn route(family: u8, bits: u8, scope: u8, flags: u32) -> Vec<u8> {
    let mut body = vec![family, bits, 0, 0, libc::RT_TABLE_MAIN, libc::RTPROT_BOOT, scope, libc::RTN_UNICAST];
    body.extend(flags.to_ne_bytes());
    body
}

/// Interfaces' names end with a zero.
fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    pad(body);
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

impl Request {
    fn write(&self, sequence: u32, more: i32, bytes: &mut Vec<u8>) {
        let length = u32::try_from(HEADER_BYTES + self.body.len()).unwrap_or(u32::MAX);
        let flags = (libc::NLM_F_REQUEST | self.flags | more) as u16;
        bytes.extend(length.to_ne_bytes());
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(&self.body);
        pad(bytes);
    }
}

/// Type, sequence and body of each message.
fn messages(mut bytes: &[u8]) -> Vec<(u16, u32, &[u8])> {
    let mut found = Vec::new();
    while let Some(header) = bytes.first_chunk::<HEADER_BYTES>() {
        let [a, b, c, d, e, f, _, _, i, j, k, l, ..] = *header;
        let length = u32::from_ne_bytes([a, b, c, d]) as usize;
        let Some(body) = bytes.get(HEADER_BYTES..length) else { break };
        found.push((u16::from_ne_bytes([e, f]), u32::from_ne_bytes([i, j, k, l]), body));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}
