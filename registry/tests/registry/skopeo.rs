//! skopeo, which shares no code with us, pushes to and pulls from the registry.

use std::path::Path;
use std::process::{Command, Output};

use anyplace_images::{
    NoProgress, Options, PackOptions, PullOptions, Reference, Source, Store, pack, pack_with, push,
};

use crate::images::layout;
use crate::support::{Registry, assert_mounts, is_root, source, tree};

/// False, with the reason printed, where there is no skopeo.
pub(crate) fn has_skopeo() -> bool {
    let found = Command::new("skopeo").arg("--version").output().is_ok();
    assert!(found || std::env::var_os("CI").is_none(), "this test needs skopeo; run `cargo xtask setup`");
    if !found {
        eprintln!("skipped: there is no skopeo");
    }
    found
}

/// Runs skopeo where what it remembers about registries is thrown away.
pub(crate) async fn output(dir: &Path, args: &[String]) -> Output {
    let script = "mount -t tmpfs tmpfs /var/lib && exec skopeo --insecure-policy \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "skopeo"]).args(args).env("HOME", dir).env("TMPDIR", dir);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

async fn skopeo(dir: &Path, args: Vec<String>) {
    let output = output(dir, &args).await;
    assert!(output.status.success(), "skopeo {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test]
async fn skopeo_copies_both_ways() {
    if !is_root() || !has_skopeo() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, root) = (dir.path(), dir.path().join("tree"));
    std::fs::create_dir(&root).unwrap();
    tree(&root);
    let registry = Registry::start(&path.join("registry")).await;
    let (client, progress) = (registry.client(), NoProgress::shared());
    let creds = registry.credentials();
    let creds = format!("{}:{}", creds.user, creds.password);
    let at = |name: &str| format!("docker://{}/{name}", registry.address);
    let local = |kind: &str, name: &str| format!("{kind}:{}", path.join(name).display());
    let to = |from: String, to: String| {
        let flags = ["copy", "--dest-tls-verify=false", "--dest-creds", &creds].map(str::to_owned);
        [flags.to_vec(), vec![from, to]].concat()
    };
    let from = |from: String, to: String| {
        let flags = ["copy", "--src-tls-verify=false", "--src-creds", &creds].map(str::to_owned);
        [flags.to_vec(), vec![from, to]].concat()
    };

    // Ours to the registry, by skopeo to an OCI layout, and by skopeo back under another name.
    let packed = pack(&source(&root), &path.join("work"), &progress).await.unwrap();
    let ours: Reference = "ours/app:v1".parse().unwrap();
    push(&packed, &ours, &client, &progress).await.unwrap();
    skopeo(path, from(at("ours/app:v1"), local("oci", "layout:v1"))).await;
    skopeo(path, to(local("oci", "layout:v1"), at("by/skopeo:v1"))).await;
    skopeo(path, from(at("by/skopeo:v1"), local("oci-archive", "archive.tar:v1"))).await;
    let archive = Source::detect(&path.join("archive.tar"), Default::default()).unwrap();
    let keep = PackOptions { keep_layers: true };
    let again = pack_with(&archive, &path.join("work"), &progress, keep).await.unwrap();
    assert_eq!(again.digest(), packed.digest(), "passing through changed the image");
    // So does packing what is packed already.
    let again = pack(&archive, &path.join("work"), &progress).await.unwrap();
    assert_eq!(again.digest(), packed.digest(), "packing again changed the image");

    // A tree that GNU tar archived; through a docker archive, skopeo makes gzip layers and docker's own manifest.
    let plain = path.join("plain");
    std::fs::create_dir(&plain).unwrap();
    tree(&plain);
    // GNU tar knows nothing of overlayfs' whiteouts.
    std::fs::remove_file(plain.join("etc/deleted")).unwrap();
    xattr::remove(plain.join("var/opaque"), "trusted.overlay.opaque").unwrap();
    let mut tar = Command::new("tar");
    tar.args(["--create", "--format=pax", "--xattrs", "--xattrs-include=user.*", "--numeric-owner", "-C"]);
    let output = tar.arg(&plain).arg(".").output().unwrap();
    assert!(output.status.success());
    layout(&path.join("gnu"), &[output.stdout]);
    skopeo(path, vec!["copy".into(), local("oci", "gnu"), local("docker-archive", "docker.tar:app:v1")])
        .await;
    skopeo(path, to(local("docker-archive", "docker.tar"), at("by/docker:v1"))).await;
    let docker: Reference = "by/docker:v1".parse().unwrap();
    let manifest = client.get_manifest(&docker).await.unwrap();
    assert_eq!(manifest.media_type, "application/vnd.docker.distribution.manifest.v2+json");
    assert!(String::from_utf8_lossy(&manifest.bytes).contains("tar.gzip"));

    let store = Store::open(&path.join("store"), Options::default()).unwrap();
    let image = store.pull(&"by/skopeo:v1".parse().unwrap(), &client, &PullOptions::default()).await.unwrap();
    assert_eq!(image.config.container().entrypoint.unwrap(), ["/bin/sh"]);
    assert_mounts(&root, &image);
    let image = store.pull(&docker, &client, &PullOptions::default()).await.unwrap();
    assert_mounts(&plain, &image);
    // From one registry to another, without a stop between.
    let second = Registry::start(&path.join("second")).await;
    let second_creds = second.credentials();
    let mut args = from(at("by/docker:v1"), format!("docker://{}/copy:v1", second.address));
    args.insert(1, "--dest-tls-verify=false".to_owned());
    args.insert(1, format!("--dest-creds={}:{}", second_creds.user, second_creds.password));
    skopeo(path, args).await;
    let copied = second.client().get_manifest(&"copy:v1".parse().unwrap()).await.unwrap();
    assert_eq!(copied.digest, manifest.digest);
    // A docker archive is a source of ours too.
    let source = Source::detect(&path.join("docker.tar"), Default::default()).unwrap();
    let packed = pack(&source, &path.join("work"), &progress).await.unwrap();
    let ours: Reference = "from/docker:v1".parse().unwrap();
    push(&packed, &ours, &client, &progress).await.unwrap();
    let image = store.pull(&ours, &client, &PullOptions::default()).await.unwrap();
    assert_mounts(&plain, &image);
    second.stop().await;
    registry.stop().await;
}
