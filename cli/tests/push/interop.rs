//! The same images in other tools' hands: podman, containerd, buildah, skopeo and Debian's docker-registry.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyplace_images::{Digest, Reference};
use anyplace_seed::Seed;
use serde_json::Value;

use crate::{
    bed::{Registry, has, tree},
    runner::{Home, ran},
};

/// How long a server may take to start on a busy machine.
const START_MAX: Duration = Duration::from_secs(60);

/// A server of another project; it ends with this value.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < START_MAX, "{what} doesn't start");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Storage for podman and buildah below `home`, by the variables that both read.
pub(crate) fn storage(command: &mut Command, home: &Home) {
    let at = |name: &str| home.path().join(name).display().to_string();
    let conf = format!(
        "[storage]\ndriver = \"vfs\"\ngraphroot = \"{}\"\nrunroot = \"{}\"\n",
        at("graph"),
        at("run")
    );
    let conf = home.file("storage.conf", &conf);
    let engine = format!(
        "[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nruntime = \"runc\"\ntmp_dir = \"{}\"\n",
        at("tmp")
    );
    let engine = home.file("containers.conf", &engine);
    command.env("CONTAINERS_STORAGE_CONF", conf).env("CONTAINERS_CONF", engine);
    command.env("BUILDAH_ISOLATION", "chroot").env("HOME", home.path()).env("XDG_RUNTIME_DIR", home.path());
}

pub(crate) fn podman(home: &Home, args: &[&str]) -> String {
    let mut command = Command::new("podman");
    command.args(args).stdin(Stdio::null());
    storage(&mut command, home);
    let done = ran(command.output().unwrap());
    assert_eq!(done.code, 0, "podman {args:?}: {done:?}");
    done.out
}

/// The command, in the same storage.
fn anyplace(registry: &Registry, home: &Home, args: &[&str]) -> String {
    let mut command = registry.command(home, &registry.url(), args);
    storage(&mut command, home);
    ran(command.output().unwrap()).ok().trim().to_owned()
}

/// A root file system with a shell and `cat`.
pub(crate) fn busybox(root: &Path) {
    assert!(Path::new("/bin/busybox").is_file(), "this test needs busybox-static; run `cargo xtask setup`");
    std::fs::create_dir_all(root.join("bin")).unwrap();
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in ["sh", "cat"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    std::fs::create_dir_all(root.join("etc")).unwrap();
    std::fs::write(root.join("etc/motd"), "packed by anyplace\n").unwrap();
}

/// A folder in which these programs are, and no others.
pub(crate) fn only(home: &Home, programs: &[&str]) -> PathBuf {
    let folder = home.path().join("programs");
    std::fs::create_dir_all(&folder).unwrap();
    for program in programs {
        let at = folder.join(Path::new(program).file_name().unwrap());
        if !at.exists() {
            std::os::unix::fs::symlink(program, at).unwrap();
        }
    }
    folder
}

/// What a shell in the image prints, which our client pulled and mounted; the mount ends with its namespace.
pub(crate) fn run_pulled(registry: &Registry, home: &Home, name: &str, script: &str) -> String {
    let (root, store) = (home.path().join("mounted"), home.path().join("store"));
    std::fs::create_dir_all(&root).unwrap();
    let (root, store) = (root.display().to_string(), store.display().to_string());
    let pull = registry.command(
        home,
        &registry.url(),
        &["image", "--store", &store, "pull", name, "--mount", &root, "-o", "json"],
    );
    let inside = r#"root=$1; script=$2; shift 2; "$@" > /dev/null && chroot "$root" /bin/sh -c "$script""#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", inside, "sh", &root, script]);
    command.arg(pull.get_program()).args(pull.get_args()).stdin(Stdio::null());
    command.envs(pull.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let done = ran(command.output().unwrap());
    assert_eq!(done.code, 0, "{name}: {done:?}");
    done.out
}

#[test]
fn podman_runs_what_we_pack_and_gives_it_back() {
    if !has(&["podman", "runc"]) {
        return;
    }
    let (registry, home) = (Registry::start(), Home::new());
    let root = home.path().join("tree");
    busybox(&root);
    let entry = r#"["/bin/busybox", "cat", "/etc/motd"]"#;
    let pushed =
        anyplace(&registry, &home, &["push", root.to_str().unwrap(), "bb:v1", "--entrypoint", entry]);
    let name = format!("{}/bb:v1", registry.host);
    podman(&home, &["pull", "--quiet", "--tls-verify=false", "--creds", &registry.login(), &name]);
    let limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"];
    let args = [&["run", "--rm", "--network", "none"][..], &limits, &[&name]].concat();
    assert_eq!(podman(&home, &args), "packed by anyplace\n");
    // Out of podman's storage, where it lies unpacked, it is the same image again.
    let again = anyplace(&registry, &home, &["push", &format!("podman:{name}"), "bb:again"]);
    assert_eq!(layers(&registry, &again), layers(&registry, &pushed));
    podman(&home, &["rmi", "--force", &name]);
}

/// The digests of an image's layers.
pub(crate) fn layers(registry: &Registry, reference: &str) -> Vec<Digest> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let reference: Reference = reference.parse().unwrap();
    let raw = runtime.block_on(registry.client().get_manifest(&reference)).unwrap();
    let manifest: Value = serde_json::from_slice(&raw.bytes).unwrap();
    let layers = manifest["layers"].as_array().unwrap().iter();
    layers.map(|layer| layer["digest"].as_str().unwrap().parse().unwrap()).collect()
}

#[test]
fn buildah_builds_and_podman_runs_the_result() {
    if !has(&["buildah", "podman", "runc"]) {
        return;
    }
    let (registry, home) = (Registry::start(), Home::new());
    let context = home.path().join("context");
    busybox(&context.join("rootfs"));
    let dockerfile = "FROM scratch\nCOPY rootfs/ /\nENV WHO=world\n\
                      ENTRYPOINT [\"/bin/sh\", \"-c\", \"echo hello $WHO\"]\n";
    std::fs::write(context.join("Dockerfile"), dockerfile).unwrap();
    let folder = context.to_str().unwrap();
    let built = anyplace(&registry, &home, &["build", folder, "-t", "built:v1"]);
    assert!(built.starts_with("built:v1@sha256:"), "{built}");
    // From the builder's cache, the same bytes.
    assert_eq!(anyplace(&registry, &home, &["build", folder, "-t", "built:v1"]), built);
    // By a docker archive too, the layers are the same.
    let file = home.path().join("docker.tar").display().to_string();
    podman(
        &home,
        &["save", "--quiet", "--format", "docker-archive", "--output", &file, "localhost/built:v1"],
    );
    let archived = anyplace(&registry, &home, &["push", &file, "built:archive"]);
    assert_eq!(layers(&registry, &archived), layers(&registry, &built));
    let name = format!("{}/built:v1", registry.host);
    podman(&home, &["pull", "--quiet", "--tls-verify=false", "--creds", &registry.login(), &name]);
    let limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"];
    let args = [&["run", "--rm", "--network", "none"][..], &limits, &[&name]].concat();
    assert_eq!(podman(&home, &args), "hello world\n");
    podman(&home, &["rmi", "--force", "--all"]);

    // What the builder says is passed on.
    std::fs::write(context.join("Dockerfile"), "FROM scratch\nCOPY nothing /\n").unwrap();
    let mut command = registry.command(&home, &registry.url(), &["build", folder, "-t", "built:v2"]);
    storage(&mut command, &home);
    let failed = ran(command.output().unwrap());
    let output = failed.err.lines().any(|line| line.contains(r#""event":"output""#) && line.contains("STEP"));
    assert!(output && failed.code == 1 && failed.err.contains("nothing"), "{failed:?}");
}

#[test]
fn podman_builds_too() {
    if !has(&["podman", "runc", "unshare"]) {
        return;
    }
    let (registry, home) = (Registry::start(), Home::new());
    let context = home.path().join("context");
    busybox(&context.join("rootfs"));
    let dockerfile =
        "FROM scratch AS first\nCOPY rootfs/ /\nRUN echo made > /made\nFROM first\nENV WHO=world\n";
    std::fs::write(context.join("Containerfile"), dockerfile).unwrap();
    let args = ["build", context.to_str().unwrap(), "-t", "built:v1"];
    let build = || {
        let mut command = registry.command(&home, &registry.url(), &args);
        storage(&mut command, &home);
        // Without buildah, which is asked first.
        command.env("PATH", only(&home, &["/usr/bin/podman"]));
        let done = ran(command.output().unwrap());
        assert!(done.err.contains(r#""item":"podman""#), "{done:?}");
        done.ok().trim().to_owned()
    };
    let built = build();
    assert_eq!(build(), built, "from the builder's cache, the same bytes");
    assert_eq!(layers(&registry, &built).len(), 2);
    assert_eq!(run_pulled(&registry, &home, "built:v1", "cat /made /etc/motd"), "made\npacked by anyplace\n");
    podman(&home, &["rmi", "--force", "--all"]);
}

#[test]
fn containerd_pulls_what_we_pack_and_gives_it_back() {
    if !has(&["containerd", "ctr"]) {
        return;
    }
    let (mut seed, registry, home) = (Seed::new(3), Registry::start(), Home::new());
    let at = |name: &str| home.path().join(name).display().to_string();
    let config = format!(
        "version = 2\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
         [grpc]\naddress = \"{}\"\n[ttrpc]\naddress = \"{}\"\n",
        at("cd-root"),
        at("cd-state"),
        at("cd.sock"),
        at("cd-ttrpc.sock")
    );
    let config = home.file("containerd.toml", &config);
    let mut command = Command::new("containerd");
    command.args(["--config", &config]).stdout(Stdio::null()).stderr(Stdio::null());
    let _server = Server(command.spawn().unwrap());
    let ctr = |args: &[&str]| {
        let mut command = Command::new("ctr");
        ran(command.args(args).env("CONTAINERD_ADDRESS", at("cd.sock")).output().unwrap())
    };
    wait_until("containerd", || ctr(&["version"]).code == 0);

    let root = home.path().join("tree");
    tree(&root, &mut seed, 400_000);
    let pushed = anyplace(&registry, &home, &["push", root.to_str().unwrap(), "app:v1"]);
    let name = format!("{}/app:v1", registry.host);
    // It verifies each layer's digest, and that of the archive inside.
    let pull =
        ["images", "pull", "--plain-http", "--snapshotter", "native", "--user", &registry.login(), &name];
    ctr(&pull).ok();
    let mut command =
        registry.command(&home, &registry.url(), &["push", &format!("containerd:{name}"), "app:again"]);
    let again = ran(command.env("CONTAINERD_ADDRESS", at("cd.sock")).output().unwrap()).ok();
    assert_eq!(again.trim().split_once('@').unwrap().1, pushed.split_once('@').unwrap().1);
    let mut command = registry.command(&home, &registry.url(), &["push", "containerd:nowhere", "app:none"]);
    let none = ran(command.env("CONTAINERD_ADDRESS", at("cd.sock")).output().unwrap()).failed();
    assert!(none.contains("`ctr images` failed") && none.contains("not found"), "{none}");
}

#[test]
fn debians_registry_takes_and_gives_images() {
    if !has(&["docker-registry", "skopeo"]) {
        return;
    }
    let (mut seed, registry, home) = (Seed::new(4), Registry::start(), Home::new());
    // A port that was free a moment ago: this server can't tell which one it took.
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let config = format!(
        "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n",
        home.path().join("docker").display()
    );
    let config = home.file("docker-registry.yml", &config);
    let mut command = Command::new("docker-registry");
    command.args(["serve", &config]).stdout(Stdio::null()).stderr(Stdio::null());
    let _server = Server(command.spawn().unwrap());
    wait_until("docker-registry", || std::net::TcpStream::connect(&address).is_ok());

    let root = home.path().join("tree");
    tree(&root, &mut seed, 3_000_000);
    let there = format!("{address}/team/app:v1");
    let pushed = anyplace(&registry, &home, &["push", root.to_str().unwrap(), &there]);
    let (_, digest) = pushed.split_once('@').unwrap();
    // Back by a mirror, and under another name by a mount.
    let back = anyplace(&registry, &home, &["push", &format!("registry:{there}"), "back:v1"]);
    assert_eq!(back, format!("back:v1@{digest}"));
    let other = format!("{address}/other:v1");
    let moved = anyplace(&registry, &home, &["push", &format!("registry:{there}"), &other, "-o", "json"]);
    let moved: Value = serde_json::from_str(&moved).unwrap();
    assert_eq!((&moved["bytes_sent"], moved["digest"].as_str()), (&0.into(), Some(digest)), "{moved}");

    // skopeo makes an archive of it, which is the same image again.
    let file = home.path().join("skopeo.tar");
    let mut command = Command::new("skopeo");
    command.args([
        "--insecure-policy",
        "copy",
        "--quiet",
        "--src-tls-verify=false",
        &format!("docker://{there}"),
    ]);
    command.arg(format!("oci-archive:{}:app:v1", file.display())).env("TMPDIR", home.path());
    let done = ran(command.env("HOME", home.path()).output().unwrap());
    assert_eq!(done.code, 0, "{done:?}");
    let again = anyplace(&registry, &home, &["push", file.to_str().unwrap(), "again:v1"]);
    assert_eq!(again, format!("again:v1@{digest}"));
}
