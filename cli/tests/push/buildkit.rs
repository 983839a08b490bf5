//! BuildKit by itself: `buildctl` and its daemon.
//!
//! Debian has them in no package, only in the source of docker.io, so the test runs where both are in the path. The daemon
//! is alone in namespaces of its own for processes and mounts, and keeps the machine's network.

use std::process::{Command, Stdio};

use crate::{
    bed::{Registry, has},
    docker::{Daemon, context, groups, media_types},
    interop::{only, run_pulled},
    runner::{Home, ran},
};

/// A program of the path.
fn program(name: &str) -> Option<String> {
    let path = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|at| at.is_file());
    found.map(|at| at.display().to_string())
}

/// The daemon, with runc.
fn start(home: &Home, buildkitd: &str) -> Daemon {
    let at = |name: &str| home.path().join(name).display().to_string();
    let group = format!("/anyplace-test-buildkit-{}", std::process::id());
    let host = format!("unix://{}", at("buildkit.sock"));
    let config = format!("[worker.oci]\ndefaultCgroupParent = \"{group}\"\n");
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", buildkitd]);
    command.args([
        "--config",
        &home.file("buildkitd.toml", &config),
        "--root",
        &at("buildkit"),
        "--addr",
        &host,
    ]);
    command.args(["--containerd-worker=false", "--oci-worker-snapshotter=native", "--oci-worker-net=host"]);
    let log = std::fs::File::create(home.path().join("buildkitd.log")).unwrap();
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    Daemon::of(command, home, "buildkitd", host, group, |host| {
        let mut command = Command::new("buildctl");
        command.args(["--addr", host, "debug", "workers"]);
        command
    })
}

#[test]
fn buildctl_builds_by_a_daemon_of_buildkit() {
    let (Some(buildctl), Some(buildkitd)) = (program("buildctl"), program("buildkitd")) else {
        eprintln!("NOT TESTED: needs buildctl and buildkitd in the path, which no package of Debian has");
        return;
    };
    if !has(&["runc", "unshare"]) {
        return;
    }
    let (registry, home) = (Registry::start(), Home::new());
    let daemon = start(&home, &buildkitd);
    let run = |args: &[&str]| {
        let mut command = registry.command(&home, &registry.url(), args);
        command.env("BUILDKIT_HOST", daemon.host()).env("PATH", only(&home, &[&buildctl]));
        ran(command.output().unwrap())
    };
    let folder = context(
        &home,
        "FROM scratch\nCOPY rootfs/ /\nRUN echo made > /made\n\
         ENTRYPOINT [\"/bin/sh\", \"-c\", \"echo hello kit\"]\n",
    );
    let done = run(&["build", &folder, "-t", "kit:v1"]);
    assert!(done.err.contains("load build definition"), "{done:?}");
    let built = done.ok().trim().to_owned();
    assert!(built.starts_with("kit:v1@sha256:"), "{built}");
    let again = run(&["build", &folder, "-t", "kit:v1"]).ok().trim().to_owned();
    assert_eq!(again, built, "from the builder's cache, the same bytes");
    let packed = "application/vnd.oci.image.layer.v1.tar+zstd";
    assert_eq!(media_types(&registry, &built), [packed, packed]);
    assert_eq!(run_pulled(&registry, &home, "kit:v1", "cat /made /etc/motd"), "made\npacked by anyplace\n");
    // What is asked of it beside the Dockerfile.
    let more = context(
        &home,
        "FROM scratch AS first\nCOPY rootfs/ /\nARG WHO=nobody\n\
         RUN --mount=type=secret,id=token echo $WHO $(cat /run/secrets/token) > /made\nFROM first\nCOPY rootfs/ /more/\n",
    );
    let secret = format!("id=token,src={}", home.file("token", "s3cret"));
    let options = ["--target=first", "--build-arg=WHO=you", "--secret", &secret, "--no-cache"];
    run(&[&["build", &more, "-t", "more:v1"], &options[..]].concat()).ok();
    assert_eq!(run_pulled(&registry, &home, "more:v1", "cat /made; test ! -e /more"), "you s3cret\n");
    // A Dockerfile elsewhere, and what the builder says of one that it can't build.
    let elsewhere = home.file("Other", "FROM scratch\nCOPY rootfs/etc/ /etc/\n");
    let other = run(&["build", &folder, "-t", "other:v1", "-f", &elsewhere]).ok().trim().to_owned();
    assert_eq!(media_types(&registry, &other), [packed]);
    context(&home, "FROM scratch\nCOPY nothing /\n");
    let failed = run(&["build", &folder, "-t", "bad:v1"]);
    let output = failed.err.lines().any(|line| line.contains(r#""event":"output""#));
    assert!(output && failed.code == 1 && failed.err.contains("nothing"), "{failed:?}");

    let group = daemon.group().to_owned();
    drop(daemon);
    assert!(groups(&group).is_empty(), "{:?}", groups(&group));
}
