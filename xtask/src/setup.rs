//! The Debian packages that the build, the demo and the tests need, and programs that Debian doesn't have.

pub(crate) mod tools;

use anyhow::{Context, Result, bail};

use crate::shell;

/// What a package is recognised by.
enum Sign {
    Program(&'static str),
    File(&'static str),
    Python(&'static str),
}

use Sign::{File, Program, Python};

/// Package, how to see that it is there, and what it is for.
const PACKAGES: &[(&str, Sign, &str)] = &[
    ("gcc", Program("cc"), "linking, and the C parts of ring and zstd"),
    ("libc6-dev", File("/usr/include/stdlib.h"), "linking"),
    ("protobuf-compiler", Program("protoc"), "building the client of etcd"),
    ("libprotobuf-dev", File("/usr/include/google/protobuf/descriptor.proto"), "building the client of etcd"),
    ("iproute2", Program("ip"), "network namespaces and links"),
    ("ethtool", Program("ethtool"), "offloads of the testbed's links"),
    ("bird2", Program("bird"), "BGP between locations and clients"),
    ("nftables", Program("nft"), "what containers may reach"),
    ("runc", Program("runc"), "containers"),
    ("crun", Program("crun"), "containers, where the cgroup set-up allows it"),
    ("runsc", Program("runsc"), "containers with `isolation: sandbox`"),
    ("busybox-static", File("/bin/busybox"), "the demo's image"),
    ("erofs-utils", Program("fsck.erofs"), "checking images that the machine's store makes"),
    ("buildah", Program("buildah"), "`anyplace build`, and tests with another reader of layers"),
    ("podman", Program("podman"), "the tests and benches with another engine"),
    ("zstd", Program("zstd"), "the tests with another reader of layers"),
    ("docker-registry", Program("docker-registry"), "the tests and benches with another registry"),
    ("containerd", Program("ctr"), "the tests and benches with another engine"),
    ("docker.io", Program("dockerd"), "the tests with another engine"),
    ("skopeo", Program("skopeo"), "the tests and benches with another client"),
    ("faketime", Program("faketime"), "the registry's tests with clocks that are set"),
    ("openssl", Program("openssl"), "the store's tests with TLS"),
    ("curl", Program("curl"), "looking at the platform from outside"),
    ("procps", Program("ps"), "looking at the platform from outside"),
    ("tzdata", File("/usr/share/zoneinfo/Asia/Tokyo"), "the locations' time zones"),
    ("ca-certificates", File("/etc/ssl/certs/ca-certificates.crt"), "fetching crates"),
    ("python3-venv", Python("import ensurepip, venv"), "the registry's tests on another S3 server"),
    ("nodejs", Program("node"), "the registry's tests on Azure"),
    ("npm", Program("npm"), "the registry's tests on Azure"),
    ("wrk", Program("wrk"), "the registry's bench"),
];

/// Installs what is missing; says what it does.
pub(crate) fn ensure() -> Result<()> {
    let missing = missing();
    if missing.is_empty() {
        println!("packages: all {} are installed", PACKAGES.len());
        return Ok(());
    }
    println!("packages: missing");
    for (package, _, purpose) in &missing {
        println!("  {package:<16} {purpose}");
    }
    let names: Vec<_> = missing.iter().map(|(package, _, _)| *package).collect();
    let install = format!("apt-get install --yes --no-install-recommends {}", names.join(" "));
    if !nix::unistd::geteuid().is_root() {
        bail!("run as root: {install}");
    }
    if !shell::has_program("apt-get") {
        bail!("no apt-get here; install these with your distribution's tool: {}", names.join(" "));
    }
    let apt = |words: &str| -> Result<()> {
        let words: Vec<_> = words.split(' ').skip(1).collect();
        let mut command = shell::command("apt-get", &words)?;
        command.env("DEBIAN_FRONTEND", "noninteractive");
        shell::show(command)
    };
    // Package lists may be absent or old; try without first, it is faster.
    if apt(&install).is_err() {
        apt("apt-get update").context("fetch the package lists")?;
        apt(&install)?;
    }
    let still: Vec<_> = self::missing().iter().map(|(package, _, _)| *package).collect();
    if !still.is_empty() {
        bail!("installed, and still not found: {}", still.join(", "));
    }
    Ok(())
}

fn missing() -> Vec<&'static (&'static str, Sign, &'static str)> {
    let is_missing = |(_, sign, _): &&(&str, Sign, &str)| match sign {
        Program(name) => !shell::has_program(name),
        File(path) => !std::path::Path::new(path).exists(),
        Python(line) => !shell::command("python3", &["-c", line])
            .and_then(|mut python| Ok(python.stderr(std::process::Stdio::null()).status()?.success()))
            .unwrap_or(false),
    };
    PACKAGES.iter().filter(is_missing).collect()
}
