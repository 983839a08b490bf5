//! Where images come from, as far as that needs no other program than tar and gzip.

use std::{
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    path::Path,
    process::{Command, Stdio},
};

use anyplace_images::{Client, Digest, PIECES_ANNOTATION, Pieces, Reference};
use anyplace_seed::Seed;
use serde_json::{Value, json};

use crate::{
    bed::{Registry, tree},
    runner::{Home, Ran, ran},
};

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CHECKSUM: &str = "io.github.containers.zstd-chunked.manifest-checksum";

fn output(program: &str, args: &[&str], input: &[u8]) -> Vec<u8> {
    let mut command = Command::new(program);
    let mut child = command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_owned();
    let writer = std::thread::spawn(move || stdin.write_all(&input).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success(), "{program} {args:?}");
    output.stdout
}

/// GNU tar's archive of a folder.
pub(crate) fn archive(root: &Path) -> Vec<u8> {
    output("tar", &["--create", "--numeric-owner", "--directory", root.to_str().unwrap(), "."], b"")
}

/// An OCI layout with one image for each platform, whose layers are gzip and plain archives in turn.
fn layout(dir: &Path, layers: &[Vec<u8>], platforms: &[&str]) {
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let put = |media_type: &str, bytes: &[u8]| {
        let digest = Digest::of(bytes);
        std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
        json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    };
    let described: Vec<Value> = layers
        .iter()
        .enumerate()
        .map(|(index, layer)| match index % 2 {
            0 => {
                let gzip = output("gzip", &["-n", "-c"], layer);
                put("application/vnd.oci.image.layer.v1.tar+gzip", &gzip)
            }
            _ => put("application/vnd.oci.image.layer.v1.tar", layer),
        })
        .collect();
    let diff_ids: Vec<Digest> = layers.iter().map(|layer| Digest::of(layer)).collect();
    let mut manifests = Vec::new();
    for architecture in platforms {
        let config = json!({
            "architecture": architecture, "os": "linux", "config": { "Cmd": ["/bin/data"] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = put("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
        let manifest = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": described,
            "annotations": { "kept": "yes" },
        });
        let mut manifest = put(OCI_MANIFEST, manifest.to_string().as_bytes());
        manifest["platform"] = json!({ "architecture": architecture, "os": "linux" });
        manifests.push(manifest);
    }
    // What buildkit adds: no image, but a name of one.
    let empty = put(
        "application/vnd.oci.image.config.v1+json",
        b"{\"rootfs\":{\"type\":\"layers\",\"diff_ids\":[]}}",
    );
    let statement = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": empty, "layers": [],
    });
    let mut statement = put(OCI_MANIFEST, statement.to_string().as_bytes());
    statement["platform"] = json!({ "architecture": "unknown", "os": "unknown" });
    statement["annotations"] = json!({ "vnd.docker.reference.digest": manifests[0]["digest"] });
    manifests.push(statement);
    // A platform that the layout doesn't have.
    manifests.push(json!({
        "mediaType": OCI_MANIFEST, "digest": Digest::of(b"elsewhere"), "size": 9,
        "platform": { "architecture": "s390x", "os": "linux" },
    }));
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index = json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": manifests });
    let index = put(media_type, index.to_string().as_bytes());
    let top = json!({ "schemaVersion": 2, "manifests": [index] });
    std::fs::write(dir.join("index.json"), top.to_string()).unwrap();
}

fn host() -> &'static str {
    if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" }
}

/// What a registry has under a name.
struct Pulled {
    client: Client,
    reference: Reference,
    runtime: tokio::runtime::Runtime,
    digest: Digest,
    manifest: Value,
}

impl Pulled {
    fn new(registry: &Registry, reference: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (client, reference): (_, Reference) = (registry.client(), reference.parse().unwrap());
        let raw = runtime.block_on(client.get_manifest(&reference)).unwrap();
        let manifest = serde_json::from_slice(&raw.bytes).unwrap();
        Self { client, reference, runtime, digest: raw.digest, manifest }
    }

    fn at(&self, registry: &Registry, descriptor: &Value) -> Self {
        Self::new(registry, &self.reference.at(&digest(descriptor)).to_string())
    }

    fn blob(&self, descriptor: &Value) -> Vec<u8> {
        let size = descriptor["size"].as_u64();
        let read = async {
            self.client
                .get_blob(&self.reference, &digest(descriptor), size)
                .await
                .unwrap()
                .read(1 << 30)
                .await
        };
        self.runtime.block_on(read).unwrap()
    }

    /// Every layer is zstd:chunked, and has the hashes of its pieces.
    fn assert_packed(&self, layers: usize) {
        let all = self.manifest["layers"].as_array().unwrap();
        assert_eq!(all.len(), layers);
        for layer in all {
            assert_eq!(layer["mediaType"], "application/vnd.oci.image.layer.v1.tar+zstd");
            assert!(layer["annotations"][CHECKSUM].is_string(), "{layer}");
            let pieces: Pieces = layer["annotations"][PIECES_ANNOTATION].as_str().unwrap().parse().unwrap();
            let blob = self.blob(layer);
            assert!(pieces.fits(blob.len() as u64) && !pieces.is_empty());
            for index in 0..pieces.len() {
                let range = pieces.range(index, blob.len() as u64);
                let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
                assert!(pieces.verify(index, &blob[range]));
            }
        }
    }
}

fn digest(descriptor: &Value) -> Digest {
    descriptor["digest"].as_str().unwrap().parse().unwrap()
}

fn push(registry: &Registry, home: &Home, args: &[&str]) -> Ran {
    ran(registry.command(home, &registry.url(), &[&["push"][..], args].concat()).output().unwrap())
}

fn summary(done: &Ran) -> Value {
    serde_json::from_str(done.err.lines().last().unwrap()).unwrap()
}

#[test]
fn layouts_are_packed_again_and_mirrored() {
    let mut seed = Seed::new(1);
    let (registry, second, home) = (Registry::start(), Registry::start(), Home::new());
    let root = home.path().join("tree");
    tree(&root, &mut seed, 5_000_000);
    let layers = [archive(&root), archive(&root.join("etc"))];
    let dir = home.path().join("layout");
    layout(&dir, &layers, &["riscv64", host()]);
    let path = dir.to_str().unwrap();

    push(&registry, &home, &[path, "app:v1"]).ok();
    let index = Pulled::new(&registry, "app:v1");
    let entries = index.manifest["manifests"].as_array().unwrap();
    assert_eq!(entries.len(), 4);
    for entry in &entries[..2] {
        let image = index.at(&registry, entry);
        image.assert_packed(2);
        assert_eq!(image.manifest["annotations"]["kept"], "yes");
        let config: Value = serde_json::from_slice(&image.blob(&image.manifest["config"])).unwrap();
        assert_eq!(config["rootfs"]["diff_ids"][0], Digest::of(&layers[0]).as_str());
    }
    // The statement follows the image that it is about; what isn't there stays listed.
    assert_eq!(entries[2]["annotations"]["vnd.docker.reference.digest"], entries[0]["digest"]);
    assert_eq!(entries[3]["digest"], Digest::of(b"elsewhere").as_str());
    // The same input gives the same digest, and nothing is sent twice.
    let again = push(&registry, &home, &[path, "app:v2"]);
    assert_eq!(summary(&again)["bytes_sent"], 0, "{again:?}");
    assert!(again.ok().trim_end().ends_with(index.digest.as_str()));

    // As they are.
    push(&registry, &home, &[path, "kept:v1", "--keep-layers"]).ok();
    let kept = Pulled::new(&registry, "kept:v1");
    let top: Value = serde_json::from_slice(&std::fs::read(dir.join("index.json")).unwrap()).unwrap();
    assert_eq!(kept.digest, digest(&top["manifests"][0]));

    // To another registry: one platform, or all; what is packed keeps its digest and isn't read for it.
    let from = format!("registry:{}/app:v1", registry.host);
    let login = registry.credentials_file.to_str().unwrap();
    let refused = push(&second, &home, &[&from, "one:v1"]).failed();
    assert!(refused.contains("refused access to `app`"), "{refused}");
    push(&second, &home, &[&from, "one:v1", "--source-credentials-file", login]).ok();
    let one = Pulled::new(&second, "one:v1");
    assert_eq!(one.digest, digest(&entries[1]));
    one.assert_packed(2);
    push(&second, &home, &[&from, "all:v1", "--source-credentials-file", login, "--all-platforms"]).ok();
    assert_eq!(Pulled::new(&second, "all:v1").digest, index.digest);
    // By URL, packed on the way.
    let from = format!("registry:http://{}/kept:v1", registry.host);
    push(&second, &home, &[&from, "packed:v1", "--source-credentials-file", login]).ok();
    let packed = Pulled::new(&second, "packed:v1");
    assert_eq!(packed.manifest["layers"], one.manifest["layers"]);

    // Inside one registry blobs are mounted, not sent.
    let from = format!("registry:{}/app:v1", registry.host);
    let mounted = push(&registry, &home, &[&from, "other/name:v1"]);
    assert_eq!(summary(&mounted)["bytes_sent"], 0, "{mounted:?}");
    Pulled::new(&registry, "other/name:v1").assert_packed(2);
    mounted.ok();
}

#[test]
fn docker_archives_are_read_and_verified() {
    let mut seed = Seed::new(2);
    let (registry, home) = (Registry::start(), Home::new());
    let root = home.path().join("tree");
    tree(&root, &mut seed, 100_000);
    let dir = home.path().join("archive");
    std::fs::create_dir_all(dir.join("one")).unwrap();
    std::fs::create_dir_all(dir.join("two")).unwrap();
    let layer = archive(&root);
    std::fs::write(dir.join("one/layer.tar"), &layer).unwrap();
    std::os::unix::fs::symlink("../one/layer.tar", dir.join("two/layer.tar")).unwrap();
    let config = json!({
        "architecture": host(), "os": "linux", "config": { "Env": null, "Cmd": ["x"] },
        "rootfs": { "type": "layers", "diff_ids": [Digest::of(&layer), Digest::of(&layer)] },
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let image = |tag: &str| {
        let layers = ["one/layer.tar", "two/layer.tar"];
        json!({ "Config": "config.json", "RepoTags": [tag], "Layers": layers })
    };
    let list = json!([image("app:v1"), image("app:v2")]);
    std::fs::write(dir.join("manifest.json"), list.to_string()).unwrap();
    let file = home.path().join("docker.tar");
    std::fs::write(&file, archive(&dir)).unwrap();
    let path = file.to_str().unwrap();

    let several = push(&registry, &home, &[path, "app:v1"]).failed();
    assert!(several.contains("app:v1, app:v2") && several.contains("--image"), "{several}");
    push(&registry, &home, &[path, "app:v1", "--image", "app:v2"]).ok();
    let pulled = Pulled::new(&registry, "app:v1");
    pulled.assert_packed(2);
    assert_eq!(pulled.blob(&pulled.manifest["config"]), config.to_string().into_bytes());
    push(&registry, &home, &[path, "app:raw", "--image", "app:v2", "--keep-layers"]).ok();
    let raw = Pulled::new(&registry, "app:raw");
    assert_eq!(raw.manifest["layers"][1]["digest"], Digest::of(&layer).as_str());

    // A flipped byte inside the layer's large file.
    let mut bytes = std::fs::File::options().read(true).write(true).open(&file).unwrap();
    let mut all = Vec::new();
    bytes.read_to_end(&mut all).unwrap();
    let at = all.windows(64).position(|window| window == &layer[50_000..50_064]).unwrap();
    bytes.seek(SeekFrom::Start(at as u64)).unwrap();
    bytes.write_all(&[all[at] ^ 1]).unwrap();
    let damaged = push(&registry, &home, &[path, "app:v3", "--image", "app:v2"]).failed();
    assert!(damaged.contains("wrong content") && damaged.contains(Digest::of(&layer).as_str()), "{damaged}");
}

#[test]
fn what_is_missing_is_named() {
    let (registry, home) = (Registry::start(), Home::new());
    std::fs::write(home.path().join("Dockerfile"), "FROM scratch\n").unwrap();
    let context = home.path().to_str().unwrap();
    let without = |args: &[&str]| {
        let mut command = registry.command(&home, &registry.url(), args);
        ran(command.env("PATH", home.path()).output().unwrap()).failed()
    };
    let message = without(&["build", context, "-t", "app:v1"]);
    for builder in ["buildah", "docker", "buildctl", "podman"] {
        assert!(message.contains(&format!("there is no program `{builder}` here")), "{message}");
    }
    assert!(without(&["build", "nowhere", "-t", "app:v1"]).contains("`nowhere` can't be packed"));
    let message = without(&["build", context, "-t", "app:v1", "-f", "Elsewhere"]);
    assert!(message.contains("there is no `Elsewhere`"), "{message}");
    for (source, program) in [("docker-daemon:x", "docker"), ("podman:x", "podman"), ("containerd:x", "ctr")]
    {
        let message = without(&["push", source, "app:v1"]);
        assert!(message.contains(&format!("there is no program `{program}` here")), "{message}");
    }
    assert!(without(&["push", "podman:--help", "app:v1"]).contains("expected the name of an image"));
    let message = without(&["push", "registry:none:v1", "app:v1"]);
    assert!(message.contains("no image `none:v1`"), "{message}");
}

#[test]
fn proxies_are_those_of_the_environment_and_never_for_loopback() {
    let (registry, home) = (Registry::start(), Home::new());
    let root = home.path().join("tree");
    std::fs::create_dir(&root).unwrap();
    let push = |url: &str, no_proxy: &str| {
        let mut command = registry.command(&home, url, &["push", root.to_str().unwrap(), "app:v1"]);
        // Nothing listens there.
        command.env("HTTP_PROXY", "http://127.0.0.1:1").env_remove("http_proxy").env_remove("no_proxy");
        ran(command.env("NO_PROXY", no_proxy).output().unwrap())
    };
    push(&registry.url(), "").ok();
    // An address of documentation (RFC 5737): the proxy is asked, and isn't there.
    let message = push("http://192.0.2.1:5000", "").failed();
    assert!(message.contains("no answer from the registry at http://192.0.2.1:5000"), "{message}");
    let mut command = registry.command(&home, &registry.url(), &["push", root.to_str().unwrap(), "app:v1"]);
    let message = ran(command.env("http_proxy", "://").output().unwrap()).failed();
    assert!(message.contains("the variable HTTP_PROXY") && message.contains("is no proxy"), "{message}");
}
