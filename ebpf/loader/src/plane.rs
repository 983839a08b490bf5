//! Start and state of the data plane.

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use anyplace_ebpf_common as common;
use aya::{Ebpf, EbpfLoader, util::KernelVersion};

use crate::{
    Error, MapMemory, VipKey, XdpMode,
    attach::{self, INGRESS, Links, REPLY, TARGET, TARGET6},
    counter_slots::CounterSlots,
    fleet,
    maps::{self, CONFIG, CONFIG6, INSTANCE_COUNTERS, Maps, Plain, VIP_COUNTERS},
    sys,
    types::address,
};

/// The object built by `cargo xtask ebpf`; `build.rs` has compared it with the sources.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../anyplace.bpf.o");

/// Layout versions before [`common::SCHEMA`].
const OLDER_SCHEMAS: [&str; 1] = ["v1"];

/// Nanoseconds between two ICMP answers of one kind on one CPU: 1,000 a second, bursts aside.
const ICMP_INTERVAL: u32 = 1_000_000;

/// What a [`DataPlane`] needs to know of its machine.
#[derive(Clone, Debug)]
pub struct Options {
    /// The interface to the fabric.
    pub uplink: String,
    /// The machine's address: other locations relay to it.
    pub address: Ipv4Addr,
    /// The machine's IPv6 address: it and its containers reach IPv6 VIPs from there.
    pub address6: Option<Ipv6Addr>,
    /// A folder on a bpffs, for this machine alone.
    pub pin_dir: PathBuf,
    /// An object to load instead of the built-in one.
    pub object: Option<PathBuf>,
}

/// How much fits. The kernel takes the memory when the maps are made, used or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Ports of VIPs.
    pub vips: u32,
    /// Buckets of all tables together, 8 bytes each. Tables that are equal within a VIP count once; an update needs room
    /// for the new table beside the old.
    pub buckets: u32,
}

impl Capacity {
    /// Smallest table that a VIP with backends has.
    const TABLE: u32 = 64;

    /// Room for the smallest tables of this many VIP ports, one sixteenth more for updates, and at least 8 MiB.
    pub const fn for_vips(vips: u32) -> Self {
        let buckets = vips.saturating_mul(Self::TABLE + Self::TABLE / 16);
        let least = common::ARENA_BUCKETS;
        Self { vips, buckets: if buckets < least { least } else { buckets } }
    }
}

impl Default for Capacity {
    fn default() -> Self {
        Self::for_vips(common::MAX_VIPS)
    }
}

/// The machine's data plane. Dropping it leaves everything in force; [`DataPlane::unload`] takes it away.
pub struct DataPlane {
    pub(crate) object: Ebpf,
    pub(crate) links: Links,
    pub(crate) maps: Maps,
    /// What stands in the maps of VIPs, address markers left out.
    pub(crate) vips: BTreeMap<VipKey, common::VipValue>,
    pub(crate) vip_counters: CounterSlots,
    pub(crate) instance_counters: CounterSlots,
    capacity: Capacity,
    mode: XdpMode,
    folder: PathBuf,
    /// Held to keep a second router out; the kernel lets go when the process ends, however it ends.
    _lock: File,
}

impl DataPlane {
    /// Loads the programs, adopts or makes the maps, and attaches; what was pinned before goes on without a gap.
    pub fn load(options: Options) -> Result<Self, Error> {
        Self::load_for(options, Capacity::default())
    }

    /// As [`DataPlane::load`], with room for `capacity` if the maps are made now; see [`DataPlane::capacity`].
    pub fn load_for(options: Options, capacity: Capacity) -> Result<Self, Error> {
        let folder = options.pin_dir.join(common::SCHEMA);
        let links = folder.join("links");
        check_system(&options.pin_dir)?;
        fs::create_dir_all(&links).map_err(|source| Error::File {
            call: "mkdir",
            path: links.clone(),
            source,
        })?;
        let lock = lock(&folder)?;
        check_versions(&options.pin_dir)?;
        let interface = |call| {
            let name = options.uplink.clone();
            move |source| Error::Interface { name, call, source }
        };
        let uplink = sys::interface_index(&options.uplink).map_err(interface("if_nametoindex"))?;
        let uplink_mtu = sys::interface_mtu(&options.uplink).map_err(interface("ioctl SIOCGIFMTU"))?;
        let clean = [&VIP_COUNTERS, &INSTANCE_COUNTERS].map(|spec| !maps::is_pinned(&folder, spec));
        let sizes = maps::sizes(&folder, capacity)?;

        let mut loader = EbpfLoader::new();
        loader.default_map_pin_directory(&folder);
        for (map, entries) in sizes.by_name() {
            loader.map_max_entries(map, entries);
        }
        let object = match &options.object {
            Some(path) => loader.load_file(path),
            None => loader.load(OBJECT),
        };
        let mut object = object.map_err(|source| Error::Load(Box::new(source)))?;
        attach::load_programs(&mut object)?;
        let (mut maps, entries) = Maps::take(&mut object, &sizes)?;
        let config = common::Config {
            address: address(options.address),
            uplink,
            uplink_mtu,
            icmp_interval: ICMP_INTERVAL,
            fleet_only: u32::from(fleet::is_set(&maps)?),
            flow_sample: 0,
        };
        maps.config.set(0, Plain(config), 0).map_err(|source| CONFIG.error("bpf_map_update_elem", source))?;
        let address6 = options.address6.unwrap_or(Ipv6Addr::UNSPECIFIED);
        let config6 = common::Config6 { address: common::address6(address6.octets()) };
        let result = maps.config6.set(0, Plain(config6), 0);
        result.map_err(|source| CONFIG6.error("bpf_map_update_elem", source))?;
        let vip_counters = CounterSlots::new(
            VIP_COUNTERS.name,
            0,
            sizes.counters,
            entries.iter().map(|(_, _, value)| value.counter),
            clean[0],
        );
        let instance_counters = CounterSlots::new(
            INSTANCE_COUNTERS.name,
            1,
            common::MAX_INSTANCE_COUNTERS,
            maps.port_counters()?.into_iter(),
            clean[1],
        );
        let mut plane = Self {
            object,
            links: Links::new(links),
            maps,
            vips: BTreeMap::new(),
            vip_counters,
            instance_counters,
            capacity: Capacity { vips: sizes.counters.min(sizes.vips / 2), buckets: sizes.buckets },
            mode: XdpMode::Native,
            folder,
            _lock: lock,
        };
        plane.adopt_vips(entries)?;
        // Maps of another layout can't be adopted, and an interface takes one XDP program: theirs goes, then ours comes.
        for older in OLDER_SCHEMAS {
            remove_folder(&options.pin_dir.join(older))?;
        }
        plane.attach(uplink, &options.uplink)?;
        plane.forget_lost_instances()?;
        Ok(plane)
    }

    /// How `ingress` is attached.
    pub fn xdp_mode(&self) -> XdpMode {
        self.mode
    }

    /// How much fits: that of the maps, which an earlier process may have made for another capacity. Only
    /// [`DataPlane::unload`] and a new start change it.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// The kernel memory of each map.
    pub fn memory(&self) -> Result<Vec<MapMemory>, Error> {
        maps::memory(&self.folder)
    }

    /// Detaches the programs and removes the maps: packets for VIPs are the kernel's again.
    pub fn unload(self) -> Result<(), Error> {
        remove_folder(&self.folder)
    }

    /// The loaded programs, for tests that run single packets through them.
    #[doc(hidden)]
    pub fn object(&self) -> &Ebpf {
        &self.object
    }

    /// Changes what the programs know of their machine.
    pub(crate) fn change_config(&mut self, change: impl FnOnce(&mut common::Config)) -> Result<(), Error> {
        let config = self.maps.config.get(&0, 0);
        let Plain(mut config) = config.map_err(|source| CONFIG.error("bpf_map_lookup_elem", source))?;
        change(&mut config);
        let result = self.maps.config.set(0, Plain(config), 0);
        result.map_err(|source| CONFIG.error("bpf_map_update_elem", source))
    }

    fn attach(&mut self, uplink: u32, uplink_name: &str) -> Result<(), Error> {
        // Deliverers first, ingress last: no packet is encapsulated that nobody would take.
        for interface in self.links.interfaces(REPLY)? {
            self.links.update_classifier(&mut self.object, REPLY, interface)?;
        }
        for target in [TARGET, TARGET6] {
            self.links.attach_classifier(&mut self.object, target, uplink, uplink_name)?;
        }
        self.mode = self.links.attach_ingress(&mut self.object, uplink)?;
        for program in [INGRESS, TARGET, TARGET6] {
            for other in self.links.interfaces(program)? {
                if other != uplink {
                    self.links.remove(program, other)?;
                }
            }
        }
        Ok(())
    }
}

/// Detaches the programs of a folder of maps and links, and removes it; one that isn't there is fine.
fn remove_folder(folder: &Path) -> Result<(), Error> {
    Links::new(folder.join("links")).remove_all()?;
    match fs::remove_dir_all(folder) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::File { call: "rmdir", path: folder.into(), source })
        }
        _ => Ok(()),
    }
}

/// What must hold before the first bpf() call, so that the message names the cause.
fn check_system(pin_dir: &Path) -> Result<(), Error> {
    let read = |path: &str| {
        let path = path.into();
        move |source| Error::File { call: "read", path, source }
    };
    if let Some(found) = sys::missing_capabilities().map_err(read("/proc/thread-self/status"))? {
        return Err(Error::Privilege { found });
    }
    if KernelVersion::current().is_ok_and(|version| version < KernelVersion::new(6, 6, 0)) {
        return Err(Error::KernelTooOld);
    }
    let found = sys::file_system_type(pin_dir).map_err(|source| Error::File {
        call: "statfs",
        path: pin_dir.into(),
        source,
    })?;
    if found == sys::BPF_FS_MAGIC { Ok(()) } else { Err(Error::NotBpffs { path: pin_dir.into(), found }) }
}

/// Refuses to start beside the attached programs of a router with other layouts: the kernel would refuse our own, and its
/// message names no fix.
fn check_versions(pin_dir: &Path) -> Result<(), Error> {
    let failed = |source| Error::File { call: "readdir", path: pin_dir.into(), source };
    for entry in fs::read_dir(pin_dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_version =
            name.strip_prefix('v').is_some_and(|rest| rest.parse::<u32>().is_ok()) && name != common::SCHEMA;
        let attached = fs::read_dir(entry.path().join("links")).is_ok_and(|mut links| links.next().is_some());
        if is_version && attached {
            return Err(Error::OtherVersion { path: entry.path(), found: name, expected: common::SCHEMA });
        }
    }
    Ok(())
}

fn lock(folder: &Path) -> Result<File, Error> {
    let failed = |call| {
        let path = folder.to_path_buf();
        move |source| Error::File { call, path, source }
    };
    let file = File::open(folder).map_err(failed("open"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Locked(folder.into())),
        Err(TryLockError::Error(source)) => Err(failed("flock")(source)),
    }
}
