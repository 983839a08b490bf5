//! Events of flows: which are told, and the reader of the ring buffer that they come through.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroU32,
    os::fd::{AsRawFd, RawFd},
    path::Path,
    time::{Duration, SystemTime},
};

use anyplace_ebpf_common::{self as common, Outcome};
use aya::maps::{MapData, RingBuf};

use crate::{
    DataPlane, Error, Protocol, VipKey,
    maps::{FLOW_EVENTS, open},
    sys,
    types::{ipv4, ipv6},
};

/// What became of a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowEvent {
    /// When.
    pub time: SystemTime,
    /// What.
    pub outcome: Outcome,
    /// The client.
    pub client: SocketAddr,
    /// The VIP port.
    pub vip: VipKey,
    /// The instance that got the flow; none for a refusal.
    pub instance: Option<Ipv4Addr>,
}

impl DataPlane {
    /// From now on about one event in so many is told, chosen by chance; none for `None`. After a start it is none.
    pub fn set_flow_events(&mut self, one_in: Option<NonZeroU32>) -> Result<(), Error> {
        self.change_config(|config| {
            config.flow_sample = common::flow_sample(one_in.map_or(0, NonZeroU32::get));
        })
    }
}

/// Reads the events, through the pinned map: one reader at a time. Those that nobody reads wait, 4,096 at most.
///
/// Its descriptor is readable when there are events; where that is told once for each change (edge-triggered), read until
/// there are none.
pub struct FlowEvents(RingBuf<MapData>);

impl FlowEvents {
    /// Of the data plane that is pinned below `pin_dir`.
    pub fn open(pin_dir: &Path) -> Result<Self, Error> {
        open(&pin_dir.join(common::SCHEMA), &FLOW_EVENTS).map(Self)
    }
}

/// The events that are there, oldest first; each is gone from the buffer then. After the last there may be more later. What
/// can't be an event is left out.
impl Iterator for FlowEvents {
    type Item = FlowEvent;

    fn next(&mut self) -> Option<FlowEvent> {
        loop {
            let bytes = self.0.next()?;
            let event = sys::read_layout::<common::FlowEvent>(&bytes).and_then(event);
            drop(bytes);
            if event.is_some() {
                return event;
            }
        }
    }
}

impl AsRawFd for FlowEvents {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn event(event: common::FlowEvent) -> Option<FlowEvent> {
    let age = sys::monotonic_ns().saturating_sub(event.time_ns);
    let vip = VipKey {
        address: address(event.vip),
        port: common::port(event.vip_port),
        protocol: Protocol::from_number(event.protocol)?,
    };
    Some(FlowEvent {
        time: SystemTime::now().checked_sub(Duration::from_nanos(age))?,
        outcome: *Outcome::ALL.get(usize::from(event.outcome))?,
        client: SocketAddr::new(address(event.source), common::port(event.source_port)),
        vip,
        instance: (event.instance != 0).then(|| ipv4(event.instance)),
    })
}

fn address(address: common::Address6) -> IpAddr {
    ipv6(address).to_canonical()
}
