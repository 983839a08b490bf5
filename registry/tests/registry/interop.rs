//! podman and containerd push to and pull from our registry, and run what we packed; our client pulls from Debian's
//! docker-registry. Each tool keeps its state below the test's folder, and what it mounts goes with its mount
//! namespace.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyplace_images::{
    Client, ImageSpec, NoProgress, Options, PullOptions, Reference, Source, Store, pack, push,
};

use crate::support::{Registry, is_root};

const BUSYBOX: &str = "/bin/busybox";
const PATIENCE: Duration = Duration::from_secs(60);

/// False, with the reason printed, where the test can't run; in CI it must.
pub(crate) fn can_run(programs: &[&str]) -> bool {
    if !is_root() {
        return false;
    }
    let there = |program: &&str| {
        let folders = std::env::var_os("PATH").unwrap_or_default();
        let sbin = [PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")];
        std::env::split_paths(&folders).chain(sbin).any(|folder| folder.join(program).is_file())
    };
    let missing: Vec<_> = programs.iter().filter(|program| !there(program)).collect();
    let in_ci = std::env::var_os("CI").is_some();
    assert!(missing.is_empty() || !in_ci, "this test needs {missing:?}; run `cargo xtask setup`");
    if !missing.is_empty() {
        eprintln!("skipped: there is no {missing:?}");
    }
    missing.is_empty()
}

/// A root file system of busybox, packed and pushed as `ours/app:v1`.
async fn pushed(registry: &Registry, dir: &Path) {
    let root = dir.join("rootfs");
    std::fs::create_dir_all(root.join("bin")).unwrap();
    std::fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
    std::os::unix::fs::symlink("busybox", root.join("bin/echo")).unwrap();
    let spec = ImageSpec { cmd: vec!["/bin/echo".into(), "packed by us".into()], ..ImageSpec::default() };
    let progress = NoProgress::shared();
    let packed = pack(&Source::Directory { root, spec }, &dir.join("work"), &progress).await.unwrap();
    push(&packed, &"ours/app:v1".parse().unwrap(), &registry.client(), &progress).await.unwrap();
}

/// Runs a program to its end with all it mounts out of sight.
async fn run(mut command: Command) -> Output {
    command.stdin(Stdio::null());
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

fn text(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// podman with its state below the folder, in a mount namespace of its own.
fn podman(dir: &Path, script: &str) -> Command {
    let mut command = Command::new("unshare");
    let tool = format!(
        "umount /sys/fs/cgroup/unified 2>/dev/null; mount -t tmpfs tmpfs /var/lib && mount -t tmpfs tmpfs /run && \
         podman() {{ command podman --root {0}/graph --runroot {0}/run --storage-driver vfs --cgroup-manager cgroupfs \
         --runtime crun \"$@\"; }}; set -e; {script}",
        dir.display()
    );
    command.args(["--mount", "sh", "-c", &tool]).env("HOME", dir).env("TMPDIR", dir);
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn podman_pulls_runs_and_pushes() {
    if !can_run(&["podman", "crun", "unshare"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(&dir.path().join("registry")).await;
    pushed(&registry, dir.path()).await;
    let creds = registry.credentials();
    let (at, login) =
        (registry.address, format!("--creds {}:{} --tls-verify=false", creds.user, creds.password));
    // Its own copy as a new image, with a layer on top, goes back to the registry in podman's format.
    let script = format!(
        "podman pull --quiet {login} {at}/ours/app:v1 >&2; \
         podman run --rm --network none --cgroups=disabled --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 {at}/ours/app:v1; \
         podman create --name c --network none {at}/ours/app:v1 >&2; echo changed > {0}/f; \
         podman cp {0}/f c:/changed >&2; podman commit --quiet c {at}/theirs/app:v1 >&2; \
         podman push --quiet {login} {at}/theirs/app:v1 >&2; podman rm c >&2",
        dir.path().display()
    );
    let output = run(podman(dir.path(), &script)).await;
    assert_eq!(text(&output), "packed by us\n");
    let store = Store::open(&dir.path().join("store"), Options::default()).unwrap();
    let theirs: Reference = "theirs/app:v1".parse().unwrap();
    let image = store.pull(&theirs, &registry.client(), &PullOptions::default()).await.unwrap();
    assert_eq!(image.stats.layers, 2);
    registry.stop().await;
}

/// A containerd below the folder; ended when dropped.
struct Containerd {
    child: Child,
    socket: PathBuf,
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Containerd {
    async fn start(dir: &Path) -> Containerd {
        let at = |name: &str| dir.join(name);
        let (root, state, socket) = (at("root"), at("state"), at("c.sock"));
        let config = format!(
            "version = 2\nroot = {root:?}\nstate = {state:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = {socket:?}\n"
        );
        std::fs::write(at("config.toml"), config).unwrap();
        let log = std::fs::File::create(at("containerd.log")).unwrap();
        let mut command = Command::new("unshare");
        command.args(["--mount", "containerd", "--config"]).arg(at("config.toml"));
        let child =
            command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let daemon = Containerd { child, socket };
        let begun = Instant::now();
        while !run(daemon.ctr(&["version"])).await.status.success() {
            let log = std::fs::read_to_string(at("containerd.log")).unwrap();
            assert!(begun.elapsed() < PATIENCE, "containerd doesn't answer: {log}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        daemon
    }

    fn ctr(&self, words: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(&self.socket).args(words);
        command
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn containerd_pulls_and_pushes() {
    if !can_run(&["containerd", "ctr", "unshare"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(&dir.path().join("registry")).await;
    pushed(&registry, dir.path()).await;
    let daemon = Containerd::start(dir.path()).await;
    let creds = registry.credentials();
    let login = format!("{}:{}", creds.user, creds.password);
    let (ours, theirs) =
        (format!("{}/ours/app:v1", registry.address), format!("{}/theirs/app:v1", registry.address));
    let access = ["--plain-http", "--user", &login];
    for words in [
        [&["images", "pull", "--snapshotter", "native"], &access[..], &[&ours]].concat(),
        ["images", "tag", &ours, &theirs].to_vec(),
        [&["images", "push"], &access[..], &[&theirs]].concat(),
    ] {
        text(&run(daemon.ctr(&words)).await);
    }
    let store = Store::open(&dir.path().join("store"), Options::default()).unwrap();
    let name: Reference = "theirs/app:v1".parse().unwrap();
    let image = store.pull(&name, &registry.client(), &PullOptions::default()).await.unwrap();
    // The same bytes came back: containerd keeps what it pulls.
    let first = registry.client().head_manifest(&"ours/app:v1".parse().unwrap()).await.unwrap();
    assert_eq!(Some(image.digest.clone()), first.digest);
    drop(daemon);
    registry.stop().await;
}

/// Debian's docker-registry; ended when dropped.
pub(crate) struct DockerRegistry(Child, pub(crate) String);

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl DockerRegistry {
    pub(crate) async fn start(dir: &Path) -> DockerRegistry {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let (config, root) = (dir.join("docker-registry.yml"), dir.join("docker-registry"));
        let settings = format!(
            "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {root:?}}}}}\nhttp: {{addr: \"{address}\"}}\n"
        );
        std::fs::write(&config, settings).unwrap();
        let log = std::fs::File::create(dir.join("docker-registry.log")).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let registry = DockerRegistry(command.spawn().unwrap(), format!("http://{address}"));
        let begun = Instant::now();
        while std::net::TcpStream::connect(address).is_err() {
            let log = std::fs::read_to_string(dir.join("docker-registry.log")).unwrap();
            assert!(begun.elapsed() < PATIENCE, "docker-registry doesn't answer: {log}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        registry
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_pushes_to_and_pulls_from_docker_registry() {
    if !can_run(&["docker-registry", "skopeo"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, progress) = (dir.path(), NoProgress::shared());
    let theirs = DockerRegistry::start(path).await;
    anyplace_service::install_crypto_provider();
    let client = Client::new(&theirs.1, None).unwrap();
    let root = path.join("rootfs");
    std::fs::create_dir_all(&root).unwrap();
    std::fs::write(root.join("data"), crate::support::noise(5, 3_000_000)).unwrap();
    let source = Source::Directory { root, spec: ImageSpec::default() };
    let packed = pack(&source, &path.join("work"), &progress).await.unwrap();
    let name: Reference = "ours/app:v1".parse().unwrap();
    push(&packed, &name, &client, &progress).await.unwrap();
    let store = Store::open(&path.join("store"), Options::default()).unwrap();
    let image = store.pull(&name, &client, &PullOptions::default()).await.unwrap();
    assert_eq!(Some(&image.digest), packed.digest());
    assert!(image.stats.bytes_fetched >= 3_000_000);
    // A layer in gzip, as docker's tools push it.
    let layout = path.join("layout");
    packed.save(&layout, "v1").unwrap();
    let to = format!("docker://{}/ours/gzip:v1", theirs.1.trim_start_matches("http://"));
    let script = "mount -t tmpfs tmpfs /var/lib && exec skopeo \"$@\"";
    let mut skopeo = Command::new("unshare");
    skopeo.args([
        "--mount",
        "sh",
        "-c",
        script,
        "skopeo",
        "copy",
        "--insecure-policy",
        "--dest-tls-verify=false",
    ]);
    skopeo.args(["--dest-compress-format", "gzip", &format!("oci:{}:v1", layout.display()), &to]);
    text(
        &run({
            skopeo.env("HOME", path).env("TMPDIR", path);
            skopeo
        })
        .await,
    );
    let gzip: Reference = "ours/gzip:v1".parse().unwrap();
    let again = store.pull(&gzip, &client, &PullOptions::default()).await.unwrap();
    assert_eq!(again.config.rootfs.diff_ids, image.config.rootfs.diff_ids);
    let manifest = client.get_manifest(&gzip).await.unwrap();
    assert!(String::from_utf8_lossy(&manifest.bytes).contains("tar+gzip"));
}
