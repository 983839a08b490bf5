//! Putting programs on interfaces by links that are pinned.
//!
//! A pinned link outlives its process. Whoever comes next puts its own program into the link, in one step and without
//! a packet that meets none. A link whose interface is gone stays as a file that does nothing, and is replaced.

use std::{
    fs, io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType, Xdp,
        links::{FdLink, LinkError, PinnedLink},
        tc::TcAttachOptions,
    },
    sys::SyscallError,
};

use crate::{Error, sys};

/// How `ingress` came to its interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpMode {
    /// In the driver.
    Native,
    /// In the kernel's generic path, because the driver has no XDP: several times slower.
    Generic,
    /// Through the link of an earlier process, in the mode that one found.
    Adopted,
}

pub(crate) const INGRESS: &str = "ingress";
pub(crate) const TARGET: &str = "target";
pub(crate) const TARGET6: &str = "target6";
pub(crate) const REPLY: &str = "reply";

/// The folder of pinned links.
#[derive(Debug)]
pub(crate) struct Links(PathBuf);

impl Links {
    pub(crate) fn new(folder: PathBuf) -> Self {
        Self(folder)
    }

    fn path(&self, program: &str, interface: u32) -> PathBuf {
        self.0.join(format!("{program}_{interface}"))
    }

    /// Interfaces that have a pinned link of this program.
    pub(crate) fn interfaces(&self, program: &str) -> Result<Vec<u32>, Error> {
        let failed = |source| Error::File { call: "readdir", path: self.0.clone(), source };
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.0).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let index: Option<u32> =
                name.to_str().and_then(|name| name.strip_prefix(program)?.strip_prefix('_')?.parse().ok());
            found.extend(index);
        }
        Ok(found)
    }

    /// Detaches a program and removes its link; one that isn't there is fine.
    pub(crate) fn remove(&self, program: &str, interface: u32) -> Result<(), Error> {
        remove(&self.path(program, interface))
    }

    /// Detaches all programs and removes their links; a folder that isn't there is fine.
    pub(crate) fn remove_all(&self) -> Result<(), Error> {
        let failed = |source| Error::File { call: "readdir", path: self.0.clone(), source };
        let entries = match fs::read_dir(&self.0) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(failed)?,
        };
        entries.into_iter().try_for_each(|entry| remove(&entry.map_err(failed)?.path()))
    }

    /// Attaches `ingress`, natively if the driver can.
    pub(crate) fn attach_ingress(&self, object: &mut Ebpf, interface: u32) -> Result<XdpMode, Error> {
        let path = self.path(INGRESS, interface);
        let program: &mut Xdp = program(object, INGRESS)?;
        if let Some(link) = adopt(&path)? {
            let link = link.try_into().map_err(|source| link_error("adopt", &path, source))?;
            match program.attach_to_link(link) {
                Ok(id) => {
                    drop(program.take_link(id));
                    return Ok(XdpMode::Adopted);
                }
                Err(source) if is_defunct(&source) => remove(&path)?,
                Err(source) => return Err(refused("updating the link of", INGRESS, source)),
            }
        }
        let (id, mode) = match program.attach_to_if_index(interface, aya::programs::XdpMode::Driver) {
            Ok(id) => (id, XdpMode::Native),
            Err(source) if matches!(errno(&source), Some(libc::EBUSY | libc::EPERM)) => {
                return Err(refused("attaching", INGRESS, source));
            }
            // The driver's reason is lost here on purpose: generic XDP fails on its own grounds or works.
            Err(_) => match program.attach_to_if_index(interface, aya::programs::XdpMode::Skb) {
                Ok(id) => (id, XdpMode::Generic),
                Err(source) => return Err(refused("attaching", INGRESS, source)),
            },
        };
        let link = program.take_link(id).map_err(|source| refused("attaching", INGRESS, source))?;
        let link: FdLink = link.try_into().map_err(|source| link_error("bpf_link_create", &path, source))?;
        pin(link, &path)?;
        Ok(mode)
    }

    /// Attaches a classifier to the ingress of an interface.
    pub(crate) fn attach_classifier(
        &self,
        object: &mut Ebpf,
        name: &'static str,
        interface: u32,
        interface_name: &str,
    ) -> Result<(), Error> {
        if self.update_classifier(object, name, interface)? {
            return Ok(());
        }
        let path = self.path(name, interface);
        let program: &mut SchedClassifier = program(object, name)?;
        let options = TcAttachOptions::TcxOrder(LinkOrder::default());
        let id = program
            .attach_with_options(interface_name, TcAttachType::Ingress, options)
            .map_err(|source| refused("attaching", name, source))?;
        let link = program.take_link(id).map_err(|source| refused("attaching", name, source))?;
        let link: FdLink = link.try_into().map_err(|source| link_error("bpf_link_create", &path, source))?;
        pin(link, &path)
    }

    /// Puts this object's program into an existing link; false if there is none or its interface is gone.
    pub(crate) fn update_classifier(
        &self,
        object: &mut Ebpf,
        name: &'static str,
        interface: u32,
    ) -> Result<bool, Error> {
        let path = self.path(name, interface);
        let program: &mut SchedClassifier = program(object, name)?;
        let Some(link) = adopt(&path)? else { return Ok(false) };
        let link = link.try_into().map_err(|source| link_error("adopt", &path, source))?;
        match program.attach_to_link(link) {
            Ok(id) => {
                drop(program.take_link(id));
                Ok(true)
            }
            Err(source) if is_defunct(&source) => {
                remove(&path)?;
                Ok(false)
            }
            Err(source) => Err(refused("updating the link of", name, source)),
        }
    }
}

/// Loads all programs into the kernel.
pub(crate) fn load_programs(object: &mut Ebpf) -> Result<(), Error> {
    let ingress: &mut Xdp = program(object, INGRESS)?;
    ingress.load().map_err(|source| refused("loading", INGRESS, source))?;
    for name in [TARGET, TARGET6, REPLY] {
        let classifier: &mut SchedClassifier = program(object, name)?;
        classifier.load().map_err(|source| refused("loading", name, source))?;
    }
    Ok(())
}

fn program<'a, T>(object: &'a mut Ebpf, name: &'static str) -> Result<&'a mut T, Error>
where
    &'a mut T: TryFrom<&'a mut aya::programs::Program>,
{
    object
        .program_mut(name)
        .and_then(|program| program.try_into().ok())
        .ok_or(Error::Missing { kind: "program", name })
}

fn adopt(path: &Path) -> Result<Option<FdLink>, Error> {
    match PinnedLink::from_pin(path) {
        Ok(link) => Ok(Some(link.into())),
        Err(LinkError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(link_error("BPF_OBJ_GET", path, source)),
    }
}

fn pin(link: FdLink, path: &Path) -> Result<(), Error> {
    // The descriptor closes here; the file keeps the link.
    link.pin(path).map(drop).map_err(|source| link_error("BPF_OBJ_PIN", path, source))
}

/// Without its file the kernel frees a link, but later: until then the interface has the program, and refuses it.
fn remove(path: &Path) -> Result<(), Error> {
    match sys::open_pinned(path) {
        Ok(link) => {
            sys::detach_link(link.as_fd()).map_err(|source| link_error("BPF_LINK_DETACH", path, source))?
        }
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(link_error("BPF_OBJ_GET", path, source)),
    }
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(Error::File { call: "unlink", path: path.into(), source })
        }
        _ => Ok(()),
    }
}

/// The link's interface was deleted.
fn is_defunct(error: &ProgramError) -> bool {
    errno(error) == Some(libc::ENOLINK)
}

fn errno(error: &ProgramError) -> Option<i32> {
    let ProgramError::SyscallError(SyscallError { io_error, .. }) = error else { return None };
    io_error.raw_os_error()
}

fn refused(action: &'static str, program: &'static str, source: ProgramError) -> Error {
    let hint = match errno(&source) {
        Some(libc::EBUSY) => {
            "another XDP program is attached: detach it with `ip link set dev UPLINK xdp off`"
        }
        Some(libc::EPERM) => "run it as root",
        _ => "",
    };
    Error::Program { action, program, hint: hint.into(), source: Box::new(source) }
}

fn link_error(
    call: &'static str,
    path: &Path,
    source: impl std::error::Error + Send + Sync + 'static,
) -> Error {
    Error::Link { call, path: path.into(), source: Box::new(source) }
}
