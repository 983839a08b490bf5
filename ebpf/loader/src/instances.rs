//! Instances of this machine.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, Ipv4Addr},
};

use anyplace_ebpf_common::{
    self as common, INTERFACE_NAME_BYTES, InstanceValue, PortKey, PortKey6, PortValue, ReplyKey, ReplyValue,
    ReplyValue6,
};

use crate::{
    DataPlane, Error,
    attach::REPLY,
    sys,
    types::{Instance, MapKey as _, Port, Protocol, VipKey, address, container_mac, ipv4},
};

impl DataPlane {
    /// Makes an instance reachable: its replies are rewritten first, then packets go to it. Repeating it is harmless,
    /// and it changes what the instance serves.
    pub fn set_instance(&mut self, instance: &Instance) -> Result<(), Error> {
        check_replies(instance)?;
        let name = &instance.host_interface;
        let failed = |source| Error::Interface { name: name.clone(), call: "if_nametoindex", source };
        let interface = sys::interface_index(name).map_err(failed)?;
        let mut name_bytes = [0; INTERFACE_NAME_BYTES];
        name_bytes
            .get_mut(..name.len())
            .ok_or_else(|| failed(std::io::ErrorKind::InvalidInput.into()))?
            .copy_from_slice(name.as_bytes());
        let key = address(instance.address);
        let value = InstanceValue {
            interface,
            mac: container_mac(instance.address),
            reserved: [0; 2],
            name: name_bytes,
        };
        let old = self.maps.instances.get(key)?;

        for port in &instance.ports {
            let reply = reply_key(key, port);
            let vip_port = common::port(port.vip.port);
            match port.vip.address {
                IpAddr::V4(vip) => {
                    let original = ReplyValue { vip: address(vip), port: vip_port, reserved: 0 };
                    self.maps.replies.set(reply, original)?;
                }
                IpAddr::V6(vip) => {
                    let vip = common::address6(vip.octets());
                    self.maps.replies6.set(reply, ReplyValue6 { vip, port: vip_port, reserved: 0 })?;
                }
            }
        }
        self.links.attach_classifier(&mut self.object, REPLY, interface, name)?;
        for port in &instance.ports {
            self.set_port(key, port)?;
        }
        self.maps.filter.add(key)?;
        self.maps.instances.set(key, value)?;
        self.remove_ports(key, &instance.ports)?;
        if let Some(old) = old.filter(|old| old.interface != interface) {
            self.links.remove(REPLY, old.interface)?;
        }
        Ok(())
    }

    /// Takes an instance away: its packets go to the next hop from now on. One that isn't there is fine, also one
    /// whose interface is gone already.
    pub fn remove_instance(&mut self, instance: Ipv4Addr) -> Result<(), Error> {
        let key = address(instance);
        let old = self.maps.instances.get(key)?;
        self.maps.instances.remove(key)?;
        let left = self.maps.instances.entries()?;
        self.maps.filter.remove(key, left.into_iter().map(|(address, _)| address))?;
        self.remove_ports(key, &[])?;
        match old {
            Some(old) => self.links.remove(REPLY, old.interface),
            None => Ok(()),
        }
    }

    /// The instances that are set, by address; after a restart, those of the process before.
    pub fn instances(&self) -> Result<Vec<Instance>, Error> {
        let mut ports: HashMap<u32, Vec<Port>> = HashMap::new();
        let mut add = |instance, vip: Option<VipKey>, value: PortValue| {
            let port = vip.map(|vip| Port { vip, container_port: common::port(value.port) });
            ports.entry(instance).or_default().extend(port);
        };
        for (key, value) in self.maps.ports.entries()? {
            add(key.instance, common::VipKey::new(key.vip, key.vip_port, key.protocol).vip(), value);
        }
        for (key, value) in self.maps.ports6.entries()? {
            add(key.instance, common::VipKey6::new(key.vip, key.vip_port, key.protocol).vip(), value);
        }
        let mut found = BTreeMap::new();
        for (key, value) in self.maps.instances.entries()? {
            let mut ports = ports.remove(&key).unwrap_or_default();
            ports.sort();
            let instance = Instance { address: ipv4(key), host_interface: interface_name(&value), ports };
            found.insert(instance.address, instance);
        }
        Ok(found.into_values().collect())
    }

    /// Drops instances of an earlier process whose interface is gone or is another one by now.
    pub(crate) fn forget_lost_instances(&mut self) -> Result<(), Error> {
        let entries = self.maps.instances.entries()?;
        let mut live = BTreeSet::new();
        for (key, value) in entries {
            if sys::interface_index(&interface_name(&value)).ok() == Some(value.interface) {
                live.insert(value.interface);
            } else {
                self.remove_instance(ipv4(key))?;
            }
        }
        // A process that was killed between two steps can leave a link that no instance names.
        for interface in self.links.interfaces(REPLY)? {
            if !live.contains(&interface) {
                self.links.remove(REPLY, interface)?;
            }
        }
        Ok(())
    }

    /// Says which port an instance serves a VIP's port on; its counters go on, or begin at zero.
    fn set_port(&mut self, instance: u32, port: &Port) -> Result<(), Error> {
        let (key, key6) = (port_key(instance, port.vip), port_key6(instance, port.vip));
        let old = match (key, key6) {
            (Some(key), _) => self.maps.ports.get(key)?,
            (_, Some(key)) => self.maps.ports6.get(key)?,
            _ => None,
        };
        let counter = match old.map_or(0, |old| old.counter) {
            0 => self.new_instance_counter()?,
            counter => counter,
        };
        let value = PortValue { port: common::port(port.container_port), counter };
        let result = key.map_or(Ok(()), |key| self.maps.ports.set(key, value));
        let result = result.and_then(|()| key6.map_or(Ok(()), |key| self.maps.ports6.set(key, value)));
        if result.is_err() && old.is_none_or(|old| old.counter != counter) {
            self.release_instance_counter(counter);
        }
        result
    }

    /// A slot of the counters by instance; the common one once there are no others.
    fn new_instance_counter(&mut self) -> Result<u16, Error> {
        let Ok((index, clean)) = self.instance_counters.take() else { return Ok(0) };
        let Ok(counter) = u16::try_from(index) else { return Ok(0) };
        if !clean && let Err(error) = self.clear_instance_counters(index) {
            self.release_instance_counter(counter);
            return Err(error);
        }
        Ok(counter)
    }

    fn release_instance_counter(&mut self, counter: u16) {
        if counter != 0 {
            self.instance_counters.release(counter.into());
        }
    }

    /// Removes what the maps say of an instance's ports, but for `keep`.
    fn remove_ports(&mut self, instance: u32, keep: &[Port]) -> Result<(), Error> {
        let ports: BTreeSet<PortKey> = keep.iter().filter_map(|port| port_key(instance, port.vip)).collect();
        for (key, value) in self.maps.ports.entries()? {
            if key.instance == instance && !ports.contains(&key) {
                self.maps.ports.remove(key)?;
                self.release_instance_counter(value.counter);
            }
        }
        let ports: BTreeSet<PortKey6> =
            keep.iter().filter_map(|port| port_key6(instance, port.vip)).collect();
        for (key, value) in self.maps.ports6.entries()? {
            if key.instance == instance && !ports.contains(&key) {
                self.maps.ports6.remove(key)?;
                self.release_instance_counter(value.counter);
            }
        }
        let replies = |ipv6| -> HashSet<ReplyKey> {
            let keep = keep.iter().filter(|port| port.vip.address.is_ipv6() == ipv6);
            keep.map(|port| reply_key(instance, port)).collect()
        };
        let (replies, replies6) = (replies(false), replies(true));
        for (key, _) in self.maps.replies.entries()? {
            if key.instance == instance && !replies.contains(&key) {
                self.maps.replies.remove(key)?;
            }
        }
        for (key, _) in self.maps.replies6.entries()? {
            if key.instance == instance && !replies6.contains(&key) {
                self.maps.replies6.remove(key)?;
            }
        }
        Ok(())
    }
}

fn interface_name(value: &InstanceValue) -> String {
    value.name.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte)).collect()
}

fn port_key(instance: u32, vip: VipKey) -> Option<PortKey> {
    let key = common::VipKey::of(vip)?;
    Some(PortKey { instance, vip: key.address, vip_port: key.port, protocol: key.protocol, reserved: 0 })
}

fn port_key6(instance: u32, vip: VipKey) -> Option<PortKey6> {
    let key = common::VipKey6::of(vip)?;
    Some(PortKey6 { instance, vip: key.address, vip_port: key.port, protocol: key.protocol, reserved: 0 })
}

fn reply_key(instance: u32, port: &Port) -> ReplyKey {
    let (port, protocol) = (common::port(port.container_port), port.vip.protocol.number());
    ReplyKey { instance, port, protocol, reserved: 0 }
}

/// A reply is known by the container's port alone, so each may stand for one VIP port only, of each family.
fn check_replies(instance: &Instance) -> Result<(), Error> {
    let mut seen: HashMap<(u16, Protocol, bool), VipKey> = HashMap::new();
    for port in &instance.ports {
        let vip = port.vip;
        if vip.port == 0 {
            return Err(Error::ReservedKey(vip));
        }
        if let Some(first) = seen.insert((port.container_port, vip.protocol, vip.address.is_ipv6()), vip)
            && first != vip
        {
            let (instance, port) = (instance.address, port.container_port);
            return Err(Error::AmbiguousReply { instance, port, first, second: vip });
        }
    }
    Ok(())
}
