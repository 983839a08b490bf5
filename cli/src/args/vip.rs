//! Arguments of `vip`.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    str::FromStr,
};

use anyplace_model::{DeploymentName, LocationId, Protocol};
use clap::{Args, Subcommand};

use super::OutputArg;

/// Looking at virtual IPs.
#[derive(Debug, Subcommand)]
pub(crate) enum VipCommand {
    /// Show who serves a virtual IP, which part each has of what enters a location, and why
    Describe {
        /// A deployment, or its virtual IP
        #[arg(value_name = "NAME|VIP")]
        target: VipTarget,
        /// Only what enters at this location
        #[arg(long)]
        location: Option<LocationId>,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Say which instance a client's connection gets: its bucket, and the hops of that
    Trace(VipTraceArgs),
}

/// A flow to trace.
#[derive(Debug, Args)]
pub(crate) struct VipTraceArgs {
    /// A deployment, or its virtual IP
    #[arg(value_name = "NAME|VIP")]
    pub(crate) target: VipTarget,
    /// The client's address and port, such as `198.51.100.10:40000` or `[2001:db8::1]:40000`
    #[arg(value_name = "CLIENT")]
    pub(crate) client: ClientAddress,
    /// The virtual IP's port, such as `443` or `443/udp`; needed where it has several
    #[arg(long, value_name = "PORT")]
    pub(crate) to: Option<VipPort>,
    /// Only for packets that enter at this location; each location without
    #[arg(long)]
    pub(crate) location: Option<LocationId>,
    #[command(flatten)]
    pub(crate) output: OutputArg,
}

/// Which virtual IP is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum VipTarget {
    /// Those of a deployment.
    Deployment(DeploymentName),
    /// This one.
    Address(IpAddr),
}

impl FromStr for VipTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Address(address.to_canonical()));
        }
        text.parse().map(Self::Deployment).map_err(|error| match text.contains(['.', ':', '/']) {
            true => {
                "it is no address; give one without prefix or port, such as `203.0.113.1`, or a deployment's \
                     name"
                    .into()
            }
            false => error.to_string(),
        })
    }
}

/// A client's address and port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ClientAddress(pub(crate) SocketAddr);

impl FromStr for ClientAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse::<IpAddr>() {
            let with_port = SocketAddr::new(address, 40_000);
            return Err(format!("the port is missing; write the client's port too, such as `{with_port}`"));
        }
        let address: SocketAddr = text.parse().map_err(|_| {
            "write an address and a port, such as `198.51.100.10:40000` or `[2001:db8::1]:40000`".to_owned()
        })?;
        if address.port() == 0 {
            return Err("no connection comes from port 0".into());
        }
        Ok(Self(SocketAddr::new(address.ip().to_canonical(), address.port())))
    }
}

/// A port of a virtual IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VipPort {
    pub(crate) port: NonZeroU16,
    /// Any, if it isn't said.
    pub(crate) protocol: Option<Protocol>,
}

impl FromStr for VipPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (port, protocol) = match text.split_once('/') {
            None => (text, None),
            Some((port, "tcp")) => (port, Some(Protocol::Tcp)),
            Some((port, "udp")) => (port, Some(Protocol::Udp)),
            Some((_, other)) => return Err(format!("`{other}` is no protocol; write `tcp` or `udp`")),
        };
        let port = port.parse().map_err(|_| "write a port from 1 to 65535, such as `443` or `443/udp`")?;
        Ok(Self { port, protocol })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_are_told_apart() {
        let target = |text: &str| text.parse::<VipTarget>();
        assert_eq!(target("hello"), Ok(VipTarget::Deployment("hello".parse().unwrap())));
        let address = |text: &str| Ok(VipTarget::Address(text.parse().unwrap()));
        assert_eq!(target("203.0.113.1"), address("203.0.113.1"));
        assert_eq!(target("2001:db8::1"), address("2001:db8::1"));
        assert_eq!(target("::ffff:203.0.113.1"), address("203.0.113.1"));
        assert!(target("203.0.113.0/24").unwrap_err().contains("without prefix or port"));
        assert!(target("203.0.113.1:80").unwrap_err().contains("without prefix or port"));
        assert!(target("Hello").unwrap_err().contains("lower-case letters"));
    }

    #[test]
    fn a_client_has_a_port() {
        let client = |text: &str| text.parse::<ClientAddress>().map(|client| client.0.to_string());
        assert_eq!(client("198.51.100.10:40000"), Ok("198.51.100.10:40000".into()));
        assert_eq!(client("[2001:db8::1]:1"), Ok("[2001:db8::1]:1".into()));
        assert!(client("198.51.100.10").unwrap_err().contains("`198.51.100.10:40000`"));
        assert!(client("2001:db8::1").unwrap_err().contains("`[2001:db8::1]:40000`"));
        for wrong in ["198.51.100.10:0", "198.51.100.10:65536", "somewhere:80", ":80", ""] {
            assert!(client(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_port_may_have_a_protocol() {
        let port = |text: &str| text.parse::<VipPort>().map(|port| (port.port.get(), port.protocol));
        assert_eq!(port("443"), Ok((443, None)));
        assert_eq!(port("443/udp"), Ok((443, Some(Protocol::Udp))));
        for wrong in ["0", "65536", "https", "443/", "443/sctp", ""] {
            assert!(port(wrong).is_err(), "{wrong}");
        }
    }
}
