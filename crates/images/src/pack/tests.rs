use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::Arc;

use super::*;
use crate::progress::{Item, NoProgress};

fn tree(root: &Path) {
    std::fs::create_dir_all(root.join("bin")).unwrap();
    std::fs::write(root.join("bin/run"), "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(root.join("bin/run"), PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::write(root.join("z"), vec![7; 100_000]).unwrap();
    std::fs::hard_link(root.join("z"), root.join("a")).unwrap();
    symlink("bin/run", root.join("link")).unwrap();
}

fn directory(root: &Path) -> Source {
    let spec = ImageSpec {
        entrypoint: vec!["/bin/run".into()],
        env: vec!["A=b".into()],
        ports: vec!["80".into(), "53/udp".into()],
        ..ImageSpec::default()
    };
    Source::Directory { root: root.to_owned(), spec }
}

#[tokio::test]
async fn the_same_tree_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two, work) = (dir.path().join("one"), dir.path().join("two"), dir.path().join("work"));
    tree(&one);
    std::thread::sleep(Duration::from_millis(20));
    tree(&two);
    let first = pack(&directory(&one), &work, &NoProgress::shared()).await.unwrap();
    let second = pack(&directory(&two), &work, &NoProgress::shared()).await.unwrap();
    assert_eq!(first.digest().unwrap(), second.digest().unwrap());
    assert_eq!(first.bytes_read, 100_010);
    let config = std::fs::read(&first.blobs[1].path).unwrap();
    let config: ImageConfig = serde_json::from_slice(&config).unwrap();
    let ports: Vec<_> = config.container().exposed_ports.unwrap().into_keys().collect();
    assert_eq!(ports, ["53/udp", "80/tcp"]);
    for blob in &first.blobs {
        assert_eq!(Digest::of(&std::fs::read(&blob.path).unwrap()), blob.digest);
    }
    std::fs::set_permissions(two.join("z"), PermissionsExt::from_mode(0o600)).unwrap();
    let changed = pack(&directory(&two), &work, &NoProgress::shared()).await.unwrap();
    assert_ne!(first.digest().unwrap(), changed.digest().unwrap());
    drop((first, second, changed));
    assert_eq!(std::fs::read_dir(&work).unwrap().count(), 0, "temporary files are left");
}

#[tokio::test]
async fn sources_that_cannot_be_packed_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    tree(&root);
    let work = dir.path().join("work");
    let error =
        async |source: &Source| pack(source, &work, &NoProgress::shared()).await.unwrap_err().to_string();

    let mut bad = directory(&root);
    if let Source::Directory { spec, .. } = &mut bad {
        spec.ports = vec!["http".into()];
    }
    assert!(error(&bad).await.contains("port `http`"));
    std::fs::write(root.join(".wh.z"), "").unwrap();
    assert!(error(&directory(&root)).await.contains("mean deletions"));
    assert!(error(&directory(&root.join("z"))).await.contains("is no folder"));
    assert!(error(&directory(&root.join("none"))).await.contains("reading"));

    let layout = |path: &Path| Source::Layout { path: path.to_owned(), name: None };
    assert!(error(&layout(&root)).await.contains("it has no `index.json`"));
    std::fs::write(dir.path().join("x.tar"), "no archive, but long enough to be a header ".repeat(30))
        .unwrap();
    assert!(error(&layout(&dir.path().join("x.tar"))).await.contains("oci-archive"));
}

/// Keeps what is said.
#[derive(Default)]
struct Said(std::sync::Mutex<Vec<String>>);

impl crate::progress::Progress for Said {
    fn started(&self, _: &Item, _: u64) {}
    fn advanced(&self, _: &Item, _: u64) {}
    fn said(&self, _: &Item, line: &str) {
        self.0.lock().unwrap().push(line.to_owned());
    }
    fn finished(&self, _: &Item) {}
    fn skipped(&self, _: &Item, _: u64) {}
}

#[tokio::test]
async fn what_the_image_lacks_of_the_folder_is_said() {
    use nix::sys::stat::{Mode, SFlag, mknod};
    let dir = tempfile::tempdir().unwrap();
    let (root, work) = (dir.path().join("root"), dir.path().join("work"));
    tree(&root);
    let sockets: Vec<_> = (10..22)
        .map(|number| std::os::unix::net::UnixListener::bind(root.join(format!("s{number}"))).unwrap())
        .collect();
    // Unprivileged users may make whiteouts on newer kernels; where not, only sockets are left out.
    let whiteout = mknod(&root.join("gone"), SFlag::S_IFCHR, Mode::empty(), 0).is_ok();
    let said = Arc::new(Said::default());
    let progress: SharedProgress = said.clone();
    pack(&directory(&root), &work, &progress).await.unwrap();
    let said = std::mem::take(&mut *said.0.lock().unwrap());
    assert_eq!(said.iter().any(|line| line.starts_with("gone: a device 0:0")), whiteout, "{said:?}");
    assert!(said.iter().any(|line| line.starts_with("s10: left out")), "{said:?}");
    let more = sockets.len() + usize::from(whiteout) - 10;
    assert_eq!(said.last().unwrap(), &format!("... and {more} more such entries"));
}
