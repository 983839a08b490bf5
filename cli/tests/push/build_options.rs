//! What `docker build` takes too: values of `ARG`s, stages, secrets, another platform, nothing from the cache; by each of
//! the builders that Debian has.

use serde_json::Value;

use crate::{
    bed::{Registry, has},
    docker::context,
    interop::{only, podman, run_pulled, storage},
    runner::{Home, Ran, ran},
};

/// A stage that writes what it is told, and one after it that shows if too much was built.
const STAGES: &str = "FROM scratch AS first\nCOPY rootfs/ /\nARG WHO=nobody\nARG FROM_ENV=unset\n\
    RUN --mount=type=secret,id=token --mount=type=secret,id=other \
    echo \"$WHO $FROM_ENV $(cat /run/secrets/token) $(cat /run/secrets/other)\" > /made\n\
    FROM first\nRUN echo last > /last\n";

/// All of them, by a builder that is run by `build`; it may run containers.
fn takes_options(registry: &Registry, home: &Home, build: impl Fn(&[&str]) -> Ran) {
    let folder = context(home, STAGES);
    let token = home.file("token", "s3cret");
    let secret = format!("id=token,src={token}");
    let done = build(&[
        &folder,
        "-t",
        "options:v1",
        "--target=first",
        "--build-arg=WHO=you and me",
        "--build-arg=FROM_ENV",
        "--secret",
        &secret,
        "--secret=id=other,env=ANYPLACE_TEST_VARIABLE",
    ]);
    done.ok();
    let script = "cat /made; for file in /last /run/secrets/*; do test -s $file && echo $file; done; true";
    assert_eq!(run_pulled(registry, home, "options:v1", script), "you and me value s3cret another\n");
    // A secret that isn't there is found before anything is built.
    let missing = build(&[&folder, "-t", "options:v2", "--secret=id=token,src=nowhere"]).failed();
    assert!(missing.contains("the secret `token`: there is no such file"), "{missing}");
    let unset = build(&[&folder, "-t", "options:v2", "--secret=id=token,env=ANYPLACE_TEST_UNSET"]).failed();
    assert!(unset.contains("ANYPLACE_TEST_UNSET, which isn't set"), "{unset}");
    // A stage that the Dockerfile doesn't have is the builder's to refuse.
    let stage = build(&[&folder, "-t", "options:v2", "--target=third"]).failed();
    assert!(stage.contains("third"), "{stage}");
}

/// The architecture of an image's configuration.
fn architecture(registry: &Registry, reference: &str) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (client, reference) = (registry.client(), reference.parse().unwrap());
    let config = runtime.block_on(async {
        let manifest = client.get_manifest(&reference).await.unwrap();
        let manifest: Value = serde_json::from_slice(&manifest.bytes).unwrap();
        let digest = manifest["config"]["digest"].as_str().unwrap().parse().unwrap();
        client.get_blob(&reference, &digest, None).await.unwrap().read(1 << 20).await.unwrap()
    });
    serde_json::from_slice::<Value>(&config).unwrap()["architecture"].as_str().unwrap().to_owned()
}

/// A platform that nothing here can run, and a build from the cache and not.
fn takes_platform_and_cache(registry: &Registry, home: &Home, build: impl Fn(&[&str]) -> Ran) {
    let folder = context(home, "FROM scratch\nCOPY rootfs/ /\n");
    let (own, other) = if cfg!(target_arch = "x86_64") { ("amd64", "arm64") } else { ("arm64", "amd64") };
    let platform = format!("--platform=linux/{other}");
    // What was built for one platform is not taken for another from the builder's cache, before or after.
    build(&[&folder, "-t", "own:v1"]).ok();
    build(&[&folder, "-t", "other:v1", &platform]).ok();
    let folder = context(home, "FROM scratch\nCOPY rootfs/ /more/\n");
    build(&[&folder, "-t", "other:v2", &platform]).ok();
    build(&[&folder, "-t", "own:v2"]).ok();
    for (name, expected) in [("own:v1", own), ("other:v1", other), ("other:v2", other), ("own:v2", own)] {
        assert_eq!(architecture(registry, name), expected, "{name}");
    }
    let folder = context(home, "FROM scratch\nCOPY rootfs/ /again/\n");
    for (more, cached) in [(None, false), (None, true), (Some("--no-cache"), false)] {
        let args = [&[folder.as_str(), "-t", "cached:v1"][..], more.as_slice()].concat();
        let done = build(&args);
        let said = done.err.to_lowercase().contains("using cache");
        done.ok();
        assert_eq!(said, cached, "{more:?}");
    }
}

/// The command's builds in storage of their own, with a builder that is found in the path.
fn builds(registry: &Registry, home: &Home, program: &str, args: &[&str]) -> Ran {
    let args = [&["build"], args].concat();
    let mut command = registry.command(home, &registry.url(), &args);
    storage(&mut command, home);
    command
        .env("PATH", only(home, &[program]))
        .env("FROM_ENV", "value")
        .env("ANYPLACE_TEST_VARIABLE", "another");
    ran(command.output().unwrap())
}

#[test]
fn buildah_takes_options() {
    if !has(&["buildah", "podman", "runc", "unshare"]) {
        return;
    }
    let (registry, home) = (Registry::start(), Home::new());
    let build = |args: &[&str]| builds(&registry, &home, "/usr/bin/buildah", args);
    takes_options(&registry, &home, build);
    takes_platform_and_cache(&registry, &home, build);
    podman(&home, &["rmi", "--force", "--all"]);
}

#[test]
fn podman_takes_options() {
    if !has(&["podman", "runc", "unshare"]) {
        return;
    }
    let (registry, home) = (Registry::start(), Home::new());
    let build = |args: &[&str]| builds(&registry, &home, "/usr/bin/podman", args);
    takes_options(&registry, &home, build);
    takes_platform_and_cache(&registry, &home, build);
    podman(&home, &["rmi", "--force", "--all"]);
}

#[test]
fn options_that_cannot_be_are_refused_before_anything_is_built() {
    let (registry, home) = (Registry::start(), Home::new());
    let folder = context(&home, "FROM scratch\n");
    for (option, expected) in [
        ("--build-arg==x", "expected NAME=VALUE or NAME"),
        ("--platform=arm64", "expected one platform, such as linux/arm64"),
        ("--platform=linux/amd64,linux/arm64", "expected one platform, such as linux/arm64"),
        ("--secret=token", "expected id=NAME,src=FILE or id=NAME,env=VARIABLE"),
        ("--target=", "a value is required"),
    ] {
        let done = builds(&registry, &home, "/usr/bin/buildah", &[&folder, "-t", "bad:v1", option]);
        assert!(done.code == 2 && done.err.contains(expected), "{option}: {done:?}");
    }
}
