//! Cold pulls by us, podman and containerd: from nothing on disk to a mounted root file system that a program of the
//! image runs in.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::super::daemon::Daemon;
use super::network::inside;
use crate::shell;

/// Who pulls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tool {
    Anyplace,
    Podman,
    Containerd,
}

/// What a pull needs to know.
pub(crate) struct Pull<'a> {
    pub(crate) tool: Tool,
    pub(crate) binary: &'a Path,
    pub(crate) registry: SocketAddr,
    pub(crate) credentials: &'a Path,
    /// Repository and tag.
    pub(crate) image: &'a str,
    /// Namespace of the client; none: this one.
    pub(crate) namespace: Option<&'a str>,
    /// An empty folder.
    pub(crate) work: &'a Path,
}

impl Pull<'_> {
    /// Pulls, mounts, and runs `busybox true` of the image; the seconds that took.
    pub(crate) fn run(&self) -> Result<f64> {
        std::fs::create_dir_all(self.work)?;
        match self.tool {
            Tool::Anyplace => self.anyplace(),
            Tool::Podman => self.podman(),
            Tool::Containerd => self.containerd(),
        }
        .with_context(|| format!("{:?} pulls {}", self.tool, self.image))
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        match self.namespace {
            Some(namespace) => inside(namespace, program, args),
            None => {
                let mut command = Command::new(program);
                command.args(args).stdin(Stdio::null());
                command
            }
        }
    }

    fn anyplace(&self) -> Result<f64> {
        let (store, target) = (self.work.join("store"), self.work.join("root"));
        std::fs::create_dir_all(&target)?;
        let begun = Instant::now();
        let mut pull = self.anyplace_pull(&store);
        let mut pull =
            pull.arg("--mount").arg(&target).stdout(Stdio::piped()).spawn().context("start a pull")?;
        // It says that the image is mounted, and then stays until all is on the disk; peers leave that to the kernel.
        let output = BufReader::new(pull.stdout.take().context("the pull's output")?);
        let mounted = output.lines().map_while(Result::ok).any(|line| line == "}");
        let seconds = match mounted {
            true => run_inside(&target).map(|()| begun.elapsed().as_secs_f64()),
            false => Err(anyhow::anyhow!("it printed no result")),
        };
        anyhow::ensure!(pull.wait()?.success(), "the pull failed; see {}", self.log_path().display());
        unmount(&target)?;
        seconds
    }

    /// Our pull into a store.
    pub(crate) fn anyplace_pull(&self, store: &Path) -> Command {
        let registry = format!("http://{}", self.registry);
        let mut pull = self
            .command(&self.binary.to_string_lossy(), &["image", "pull", self.image, "--registry", &registry]);
        pull.arg("--registry-credentials-file")
            .arg(self.credentials)
            .arg("--store")
            .arg(store)
            .args(["-o", "json"]);
        pull
    }

    /// Progress and errors of our pull.
    pub(crate) fn log(&self) -> Result<std::fs::File> {
        std::fs::File::create(self.log_path()).context("make the pull's log")
    }

    fn log_path(&self) -> PathBuf {
        self.work.join("pull.log")
    }

    fn podman(&self) -> Result<f64> {
        // podman takes no longer path than 50 characters for its state.
        let (root, state) =
            (self.work.join("root"), PathBuf::from(format!("/run/apb-{}", std::process::id())));
        let podman = |words: &[&str]| {
            let mut command = self.command(
                "podman",
                &["--root", &root.to_string_lossy(), "--runroot", &state.to_string_lossy()],
            );
            command.args(["--storage-driver", "overlay", "--cgroup-manager", "cgroupfs"]).args(words);
            shell::output(&mut command)
        };
        let image = format!("{}/{}", self.registry, self.image);
        let begun = Instant::now();
        podman(&["pull", "--quiet", "--tls-verify=false", &image])?;
        let container = podman(&["create", "--network", "none", &image])?;
        let target = podman(&["mount", container.trim()])?;
        run_inside(Path::new(target.trim()))?;
        let seconds = begun.elapsed().as_secs_f64();
        podman(&["umount", container.trim()])?;
        podman(&["rm", container.trim()])?;
        // What podman mounted below its own root folder, so that the folder can be removed.
        let _ = unmount(&root.join("overlay"));
        let _ = std::fs::remove_dir_all(&state);
        Ok(seconds)
    }

    fn containerd(&self) -> Result<f64> {
        let daemon = Containerd::start(self)?;
        let image = format!("{}/{}", self.registry, self.image);
        let target = self.work.join("target");
        std::fs::create_dir_all(&target)?;
        let begun = Instant::now();
        daemon.ctr(self, &["images", "pull", "--plain-http", &image])?;
        daemon.ctr(self, &["images", "mount", &image, &target.to_string_lossy()])?;
        run_inside(&target)?;
        let seconds = begun.elapsed().as_secs_f64();
        unmount(&target)?;
        Ok(seconds)
    }
}

/// A containerd of our own, below a folder of its own.
struct Containerd {
    _daemon: Child,
    socket: PathBuf,
}

/// Ended when dropped.
struct Child(std::process::Child);

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Containerd {
    fn start(pull: &Pull<'_>) -> Result<Containerd> {
        // A socket's path has at most 107 bytes.
        let state = PathBuf::from(format!("/run/anyplace-bench-{}", std::process::id()));
        std::fs::create_dir_all(&state)?;
        let (socket, config) = (state.join("c.sock"), pull.work.join("containerd.toml"));
        let root = pull.work.join("root");
        let text = format!(
            "version = 2\nroot = {root:?}\nstate = {state:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {socket:?}\n"
        );
        std::fs::write(&config, text)?;
        let log = std::fs::File::create(pull.work.join("containerd.log"))?;
        let mut command = pull.command("containerd", &["--config", &config.to_string_lossy()]);
        command.stdout(log.try_clone()?).stderr(log);
        let child = Child(command.spawn().context("start containerd")?);
        let daemon = Containerd { _daemon: child, socket };
        let begun = Instant::now();
        while let Err(error) = daemon.ctr(pull, &["version"]) {
            anyhow::ensure!(
                begun.elapsed() < Duration::from_secs(20),
                "containerd doesn't answer: {error:#}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(daemon)
    }

    fn ctr(&self, pull: &Pull<'_>, words: &[&str]) -> Result<String> {
        let mut ctr = pull.command("ctr", &["--address", &self.socket.to_string_lossy()]);
        shell::output(ctr.args(words))
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if let Some(state) = self.socket.parent() {
            let _ = std::fs::remove_dir_all(state);
        }
    }
}

/// The image's own program, inside its root file system.
fn run_inside(root: &Path) -> Result<()> {
    shell::output(Command::new("chroot").arg(root).args(["/bin/busybox", "true"])).map(drop)
}

pub(crate) fn unmount(target: &Path) -> Result<()> {
    shell::output(Command::new("umount").arg(target)).map(drop)
}

impl Daemon {
    /// The server's address as clients in another namespace see it.
    pub(crate) fn at(&self, host: &str) -> Result<SocketAddr> {
        Ok(SocketAddr::new(host.parse().context("an address")?, self.address.port()))
    }
}
