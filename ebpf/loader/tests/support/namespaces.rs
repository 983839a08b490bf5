//! Network namespaces, a bpffs and veth settings for tests; all of it goes away with its value, also on panic.

use std::{
    fs::File,
    io::Write as _,
    mem,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns},
};

/// Distinguishes the namespaces of tests that run in one process.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// Whether to run: as root yes; in CI a missing root is a failure, elsewhere a reason to skip.
pub(crate) fn root_or_skip() -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "this test needs root for namespaces and bpf()");
    eprintln!("skipped: needs root for namespaces and bpf()");
    false
}

/// The object under test: the built-in one, or the one that `cargo xtask test` has just rebuilt.
pub(crate) fn object() -> Option<PathBuf> {
    std::env::var_os("ANYPLACE_BPF_OBJECT").map(PathBuf::from)
}

/// A network namespace.
pub(crate) struct Namespace {
    pub(crate) name: String,
}

impl Namespace {
    pub(crate) fn new(label: &str) -> Self {
        let name = format!("apebpf-{}-{}-{label}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        run("ip", &["netns", "add", &name], "");
        let namespace = Self { name };
        namespace.ip("link set lo up");
        namespace
    }

    /// Runs lines of `ip -batch` inside.
    pub(crate) fn ip(&self, lines: &str) {
        run("ip", &["-netns", &self.name, "-batch", "-"], lines);
    }

    /// Writes a sysctl inside.
    pub(crate) fn sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        self.enter(|| std::fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}")));
    }

    /// Runs `action` on a thread inside and waits for it.
    pub(crate) fn enter<T: Send>(&self, action: impl FnOnce() -> T + Send) -> T {
        let file = self.file();
        let result = thread::scope(|scope| {
            scope
                .spawn(move || {
                    setns(&file, CloneFlags::CLONE_NEWNET).unwrap();
                    action()
                })
                .join()
        });
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Starts `action` on a thread of its own inside; it must end by itself or with the process.
    pub(crate) fn spawn(&self, action: impl FnOnce() + Send + 'static) {
        let file = self.file();
        thread::spawn(move || {
            setns(&file, CloneFlags::CLONE_NEWNET).unwrap();
            action();
        });
    }

    /// What `ethtool -K` does, without the program.
    pub(crate) fn ethtool(&self, interface: &str, command: u32, value: u32) {
        self.enter(|| {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            let mut setting = [command, value];
            // SAFETY: all zeroes is a valid ifreq.
            let mut request: libc::ifreq = unsafe { mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
                *to = from as libc::c_char;
            }
            request.ifr_ifru.ifru_data = setting.as_mut_ptr().cast();
            // SAFETY: SIOCETHTOOL with these commands reads the two numbers that `setting` holds.
            let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &mut request) };
            assert_eq!(result, 0, "ethtool {command:#x} on {interface}: {}", std::io::Error::last_os_error());
        });
    }

    fn file(&self) -> File {
        File::open(Path::new("/run/netns").join(&self.name)).unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// A bpffs of the test's own.
pub(crate) struct BpfFs {
    pub(crate) path: PathBuf,
}

impl BpfFs {
    pub(crate) fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("apebpf-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        let mounted = Self { path };
        mount(Some("bpf"), &mounted.path, Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
        mounted
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = std::fs::remove_dir(&self.path);
    }
}

fn run(program: &str, arguments: &[&str], input: &str) {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error} (Debian package iproute2)"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let status = child.wait().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}\n{input}");
}
