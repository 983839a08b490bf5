//! What can go wrong, what it means, and what to do about it.

use std::{io, net::Ipv4Addr, path::PathBuf};

use aya::{EbpfError, maps::MapError, programs::ProgramError};

use crate::types::VipKey;

/// An error of the data plane.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pin folder is not on a bpffs.
    #[error(
        "{0} is not on a BPF file system (statfs type {found:#x}, expected 0xcafe4a11): \
         run `mkdir -p {0} && mount -t bpf bpf {0}`", path.display()
    )]
    NotBpffs {
        /// The folder.
        path: PathBuf,
        /// The type found.
        found: i64,
    },
    /// The process may not load programs.
    #[error(
        "loading eBPF programs needs CAP_BPF and CAP_NET_ADMIN (found capabilities {found:#x}): run it as root"
    )]
    Privilege {
        /// The effective capabilities.
        found: u64,
    },
    /// The kernel has no TCX.
    #[error("the data plane attaches through TCX, which needs kernel 6.6 or newer: this kernel is older")]
    KernelTooOld,
    /// Another process holds the pin folder.
    #[error("{} is in use by another process: stop the running state-router of this machine first", .0.display())]
    Locked(PathBuf),
    /// A network interface can't be found or asked.
    #[error(
        "{call} failed for network interface {name}: check `ip link show dev {name}` in this network namespace"
    )]
    Interface {
        /// Its name.
        name: String,
        /// The system call.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A file could not be made, read or removed.
    #[error("{call} failed for {}", path.display())]
    File {
        /// The system call or its kind.
        call: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The object can't be loaded.
    #[error(
        "the eBPF object can't be loaded: rebuild it with `cargo xtask ebpf` if it doesn't fit this kernel"
    )]
    Load(#[source] Box<EbpfError>),
    /// The object lacks a part.
    #[error("the eBPF object has no {kind} named {name}: rebuild it with `cargo xtask ebpf`")]
    Missing {
        /// Map or program.
        kind: &'static str,
        /// Its name.
        name: &'static str,
    },
    /// The verifier or the kernel refused a program, or its attachment.
    #[error("{action} program {program} failed{}", fix(.hint))]
    Program {
        /// What was tried.
        action: &'static str,
        /// The program.
        program: &'static str,
        /// What to do, or empty.
        hint: String,
        /// Why.
        source: Box<ProgramError>,
    },
    /// A link could not be pinned or adopted.
    #[error("{call} failed for link {}: remove it with `rm {}` (this detaches the program) and start again",
        path.display(), path.display())]
    Link {
        /// The system call.
        call: &'static str,
        /// The pinned link.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Programs of a router with other map layouts are attached.
    #[error(
        "the data plane of another router version is in force: {} has layout {found}, this version has {expected}. \
         Go on with the version that made it, or stop it and run `rm -r {}` (this detaches its programs; traffic stops \
         until the next start fills the tables)", path.display(), path.display()
    )]
    OtherVersion {
        /// Its folder.
        path: PathBuf,
        /// Its layout.
        found: String,
        /// Ours.
        expected: &'static str,
    },
    /// A pinned map has another layout.
    #[error(
        "the pinned map {} has {found}, this version expects {expected}: stop the router and run `rm -r {}` \
         (traffic stops until the next start fills the tables)", path.display(),
        path.parent().unwrap_or(path).display()
    )]
    Layout {
        /// The pinned map.
        path: PathBuf,
        /// Its sizes.
        found: String,
        /// The sizes wanted.
        expected: String,
    },
    /// A map operation failed.
    #[error("{call} failed on map {map}")]
    Map {
        /// The map.
        map: &'static str,
        /// The system call.
        call: &'static str,
        /// Why.
        source: MapError,
    },
    /// A map is full.
    #[error(
        "map {map} is full: it holds at most {limit} entries; remove some VIPs or instances of this machine"
    )]
    Full {
        /// The map.
        map: &'static str,
        /// Its bound.
        limit: u32,
    },
    /// An entry behind one that failed.
    #[error("not tried, because an entry before it in the same call failed: try it again")]
    NotTried,
    /// The arena has no room for a table.
    #[error("no room for {wanted} buckets in the arena of {capacity}: use smaller tables or fewer VIPs")]
    ArenaFull {
        /// Slots asked for.
        wanted: u64,
        /// Slots in all.
        capacity: u32,
    },
    /// A VIP key that means something else inside.
    #[error("{0} is not a VIP port: port 0 is reserved; name a port from 1 to 65535")]
    ReservedKey(VipKey),
    /// Two VIP ports behind one port of a container.
    #[error(
        "instance {instance}: {first} and {second} both lead to container port {port}, so a reply's source would be \
         ambiguous: give each its own container port"
    )]
    AmbiguousReply {
        /// The instance.
        instance: Ipv4Addr,
        /// The container's port.
        port: u16,
        /// One of them.
        first: VipKey,
        /// The other.
        second: VipKey,
    },
}

fn fix(hint: &str) -> String {
    if hint.is_empty() { String::new() } else { format!(": {hint}") }
}
