//! Docker's own daemon: images out of it and into it, and builds by both of its builders.
//!
//! The daemon is alone in namespaces of its own for processes and mounts, so that nothing of it outlives a test. It
//! keeps the machine's network, because that is where the registry is, and changes nothing there.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::Value;

use crate::{
    bed::{Registry, has},
    interop::{busybox, layers, only, run_pulled, wait_until},
    runner::{Home, Ran, ran},
};

/// The package's own client: another one in the path may come without its part of BuildKit.
const DOCKER: &str = "/usr/bin/docker";

/// A daemon that builds; it ends with this value, and everything that it started with it.
pub(crate) struct Daemon {
    /// `unshare`, which waits for the daemon.
    child: Child,
    host: String,
    /// The parent of its containers' control groups.
    group: String,
}

impl Daemon {
    fn start(home: &Home) -> Self {
        let at = |name: &str| home.path().join(name).display().to_string();
        // From the root: without the slash it would be below the test's own.
        let group = format!("/anyplace-test-docker-{}", std::process::id());
        let host = format!("unix://{}", at("docker.sock"));
        let config = serde_json::json!({ "cgroup-parent": group, "deprecated-key-path": at("docker.key") });
        let config = home.file("daemon.json", &config.to_string());
        std::fs::create_dir(home.path().join("run")).unwrap();
        // No option moves the folders of its plugins and of its containers' shims.
        let script = format!("mount --bind {} /run && exec dockerd \"$@\"", at("run"));
        let log = std::fs::File::create(home.path().join("dockerd.log")).unwrap();
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]);
        command.args([&script, "dockerd", "--config-file", &config, "--host", &host]);
        command.args(["--data-root", &at("docker"), "--exec-root", &at("exec"), "--pidfile", &at("pid")]);
        command.args(["--storage-driver=vfs", "--bridge=none", "--iptables=false", "--ip6tables=false"]);
        command.args(["--ip-forward=false", "--ip-masq=false"]);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let docker = |host: &str| Self::docker(host, home, &["version"]);
        Self::of(command, home, "dockerd", host, group, docker)
    }

    /// Starts one, by a command that writes to a log of its name, and waits until it answers.
    pub(crate) fn of(
        mut command: Command,
        home: &Home,
        name: &str,
        host: String,
        group: String,
        probe: impl Fn(&str) -> Command,
    ) -> Self {
        let daemon = Self { child: command.spawn().unwrap(), host, group };
        let log = || std::fs::read_to_string(home.path().join(format!("{name}.log"))).unwrap();
        wait_until(name, || {
            let done = ran(probe(&daemon.host).output().unwrap());
            let ended = Path::new(&format!("/proc/{}", daemon.child.id())).join("exe").read_link().is_err();
            assert!(done.code == 0 || !ended, "{name} ended: {}", log());
            done.code == 0
        });
        daemon
    }

    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    pub(crate) fn group(&self) -> &str {
        &self.group
    }

    fn docker(host: &str, home: &Home, args: &[&str]) -> Command {
        let mut command = Command::new(DOCKER);
        command.args(args).env("DOCKER_HOST", host).env("HOME", home.path()).stdin(Stdio::null());
        command
    }

    fn ok(&self, home: &Home, args: &[&str]) -> String {
        let done = ran(Self::docker(&self.host, home, args).output().unwrap());
        assert_eq!(done.code, 0, "docker {args:?}: {done:?}");
        done.out
    }

    /// The command, with this daemon and no other builder.
    fn anyplace(&self, registry: &Registry, home: &Home, args: &[&str], kit: bool) -> Ran {
        let mut command = registry.command(home, &registry.url(), args);
        command.env("DOCKER_HOST", &self.host).env("PATH", only(home, &[DOCKER]));
        command.env("DOCKER_BUILDKIT", if kit { "1" } else { "0" });
        ran(command.output().unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // The first process of the namespace: when it goes, all others go before it is gone itself.
        let id = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        for child in children.split_whitespace().filter_map(|text| text.parse().ok()) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), nix::sys::signal::SIGKILL);
        }
        let _ = self.child.wait();
        for place in groups(&self.group) {
            remove_groups(&place);
        }
    }
}

/// Where control groups of that name are: with version 1, in each hierarchy.
pub(crate) fn groups(name: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    hierarchies.chain([root.to_owned()]).map(|at| at.join(&name[1..])).filter(|at| at.is_dir()).collect()
}

fn remove_groups(at: &Path) {
    for entry in std::fs::read_dir(at).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_groups(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(at);
}

/// A context to build from.
pub(crate) fn context(home: &Home, dockerfile: &str) -> String {
    let context = home.path().join("context");
    if !context.is_dir() {
        busybox(&context.join("rootfs"));
    }
    std::fs::write(context.join("Dockerfile"), dockerfile).unwrap();
    context.display().to_string()
}

/// Media types of an image's layers.
pub(crate) fn media_types(registry: &Registry, reference: &str) -> Vec<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let raw = runtime.block_on(registry.client().get_manifest(&reference.parse().unwrap())).unwrap();
    let manifest: Value = serde_json::from_slice(&raw.bytes).unwrap();
    let layers = manifest["layers"].as_array().unwrap().iter();
    layers.map(|layer| layer["mediaType"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn docker_builds_and_its_daemon_gives_and_takes_images() {
    if !has(&["dockerd", "unshare", "runc"]) {
        return;
    }
    let (registry, home) = (Registry::start(), Home::new());
    let daemon = Daemon::start(&home);
    let ours = |args: &[&str]| daemon.anyplace(&registry, &home, args, false).ok().trim().to_owned();

    // By its own builder.
    let folder = context(
        &home,
        "FROM scratch\nCOPY rootfs/ /\nRUN echo made > /made\nENV WHO=world\n\
         ENTRYPOINT [\"/bin/sh\", \"-c\", \"echo hello $WHO; cat /made\"]\n",
    );
    let built = ours(&["build", &folder, "-t", "built:v1"]);
    assert!(built.starts_with("built:v1@sha256:"), "{built}");
    assert_eq!(
        ours(&["build", &folder, "-t", "built:v1"]),
        built,
        "from the builder's cache, the same bytes"
    );
    let packed = "application/vnd.oci.image.layer.v1.tar+zstd";
    assert_eq!(media_types(&registry, &built), [packed, packed]);
    assert_eq!(run_pulled(&registry, &home, "built:v1", "cat /made"), "made\n");

    // What the daemon holds, by its name. It is saved as plain archives: nothing is compressed and expanded in between.
    let again = ours(&["push", "docker-daemon:built:v1", "again:v1"]);
    assert_eq!(layers(&registry, &again), layers(&registry, &built));
    let plain = ours(&["push", "docker-daemon:built:v1", "plain:v1", "--keep-layers"]);
    let archive = "application/vnd.oci.image.layer.v1.tar";
    assert_eq!(media_types(&registry, &plain), [archive, archive]);
    let missing =
        daemon.anyplace(&registry, &home, &["push", "docker-daemon:none:v1", "none:v1"], false).failed();
    assert!(missing.contains("`docker save` failed") && missing.contains("`docker images`"), "{missing}");

    // By BuildKit, which it has inside; without a bridge that one can't run anything in its containers.
    let folder = context(
        &home,
        "FROM scratch AS first\nCOPY rootfs/ /\nFROM scratch\nCOPY --from=first / /\n\
         ENTRYPOINT [\"/bin/sh\", \"-c\", \"echo hello kit\"]\n",
    );
    let done = daemon.anyplace(&registry, &home, &["build", &folder, "-t", "kit:v1"], true);
    assert!(done.err.contains("load build definition"), "{done:?}");
    let kit = done.ok().trim().to_owned();
    assert_eq!(media_types(&registry, &kit), [packed]);
    assert_eq!(run_pulled(&registry, &home, "kit:v1", "cat /etc/motd"), "packed by anyplace\n");
    // What is asked of it beside the Dockerfile. Secrets are BuildKit's only.
    let folder = context(
        &home,
        "FROM scratch AS first\nARG WHO=nobody\nLABEL who=$WHO\nCOPY rootfs/ /\nFROM first\nCOPY rootfs/ /more/\n",
    );
    for kit in [false, true] {
        let args =
            ["build", &folder, "-t", "first:v1", "--target=first", "--build-arg=WHO=you", "--no-cache"];
        let first = daemon.anyplace(&registry, &home, &args, kit).ok();
        assert_eq!(media_types(&registry, first.trim()), [packed], "one stage");
        let label = daemon.ok(&home, &["inspect", "--format={{.Config.Labels.who}}", "first:v1"]);
        assert_eq!(label, "you\n", "{kit}");
    }
    let secret = format!("id=token,src={}", home.file("token", "s3cret"));
    let args = ["build", &folder, "-t", "secret:v1", "--secret", &secret];
    let refused = daemon.anyplace(&registry, &home, &args, false).failed();
    assert!(refused.contains("a secret for docker's builder without BuildKit"), "{refused}");
    daemon.anyplace(&registry, &home, &args, true).ok();

    // What both builders say is passed on.
    let folder = context(&home, "FROM scratch\nCOPY nothing /\n");
    for kit in [false, true] {
        let failed = daemon.anyplace(&registry, &home, &["build", &folder, "-t", "bad:v1"], kit);
        let output = failed.err.lines().any(|line| line.contains(r#""event":"output""#));
        assert!(output && failed.code == 1 && failed.err.contains("nothing"), "{failed:?}");
    }

    // Into the daemon from our registry, and out of it with docker's own push.
    let (user, password) = (registry.credentials().user, registry.credentials().password);
    daemon.ok(&home, &["login", "--username", &user, "--password", &password, &registry.host]);
    daemon.ok(&home, &["rmi", "--force", "built:v1"]);
    let name = format!("{}/plain:v1", registry.host);
    daemon.ok(&home, &["pull", "--quiet", &name]);
    assert_eq!(daemon.ok(&home, &["run", "--rm", "--network=none", &name]), "hello world\nmade\n");
    let name = format!("{}/built:v1", registry.host);
    daemon.ok(&home, &["pull", "--quiet", &name]);
    assert_eq!(daemon.ok(&home, &["run", "--rm", "--network=none", &name]), "hello world\nmade\n");
    let theirs = format!("{}/theirs:v1", registry.host);
    daemon.ok(&home, &["tag", &name, &theirs]);
    daemon.ok(&home, &["push", "--quiet", &theirs]);
    let gzip = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    assert_eq!(media_types(&registry, "theirs:v1"), [gzip, gzip]);
    assert_eq!(run_pulled(&registry, &home, "theirs:v1", "cat /made"), "made\n");

    let group = daemon.group.clone();
    drop(daemon);
    assert_eq!(groups(&group), Vec::<PathBuf>::new());
}
