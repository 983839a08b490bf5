//! Hostile and odd archives, each unpacked beside a canary that must stay as it was.

use std::io::Cursor;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use tar::{EntryType, Header};

use super::unpack::unpack;
use super::{OPAQUE_XATTR, Store};
use crate::digest::Digest;
use crate::error::Error;
use crate::manifest::ImageConfig;
use crate::store::PulledImage;

/// One entry: kind, name, link target, mode, contents.
type Entry<'a> = (EntryType, &'a str, &'a str, u32, &'a [u8]);

/// An archive with exactly these names, which the tar crate's own checks would refuse.
fn archive(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (kind, name, link, mode, contents) in entries {
        let mut header = Header::new_ustar();
        header.set_entry_type(*kind);
        header.set_mode(*mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.set_size(contents.len() as u64);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        let ustar = header.as_ustar_mut().unwrap();
        ustar.name[..name.len()].copy_from_slice(name.as_bytes());
        ustar.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        builder.append(&header, *contents).unwrap();
    }
    builder.into_inner().unwrap()
}

const FILE: EntryType = EntryType::Regular;
const DIR: EntryType = EntryType::Directory;
const LINK: EntryType = EntryType::Symlink;
const HARD: EntryType = EntryType::Link;

struct Bed {
    dir: tempfile::TempDir,
    dest: PathBuf,
}

impl Bed {
    /// None, with the reason printed, where this user can't make device nodes and change owners.
    fn new() -> Option<Bed> {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "this test needs root");
            eprintln!("skipped: unpacking layers needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("canary"), "alive").unwrap();
        let dest = dir.path().join("a/b/dest");
        std::fs::create_dir_all(&dest).unwrap();
        Some(Bed { dir, dest })
    }

    fn unpack(&self, entries: &[Entry<'_>]) -> Result<(), Error> {
        let result = unpack(&mut Cursor::new(archive(entries)), &self.dest);
        assert_eq!(std::fs::read(self.dir.path().join("canary")).unwrap(), b"alive");
        let outside: Vec<_> =
            walk(self.dir.path()).into_iter().filter(|path| !path.starts_with(&self.dest)).collect();
        assert_eq!(outside.len(), 3, "written outside: {outside:?}");
        result
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dest.join(path)
    }
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(walk(&path));
        }
        found.push(path);
    }
    found
}

#[test]
fn names_that_lead_outside_are_refused() {
    for name in ["../canary", "x/../../canary", "..", "a/.."] {
        let Some(bed) = Bed::new() else { return };
        let error = bed.unpack(&[(FILE, name, "", 0o644, b"dead")]).unwrap_err();
        assert!(matches!(error, Error::UnsafeEntry { .. }), "{name}: {error}");
    }
    for target in ["../canary", "../../../canary", "canary", "/canary", "up/canary"] {
        let Some(bed) = Bed::new() else { return };
        let entries = [(LINK, "up", "../..", 0o777, &b""[..]), (HARD, "x", target, 0o644, b"")];
        let error = bed.unpack(&entries).unwrap_err();
        assert!(matches!(error, Error::UnsafeEntry { .. }), "{target}: {error}");
    }
    for name in [".wh...", ".wh..", ".wh."] {
        let Some(bed) = Bed::new() else { return };
        assert!(bed.unpack(&[(FILE, name, "", 0o644, b"")]).is_err(), "{name}");
    }
}

#[test]
fn links_are_followed_inside_the_layer_only() {
    let Some(bed) = Bed::new() else { return };
    bed.unpack(&[
        (LINK, "root", "/", 0o777, b""),
        (FILE, "root/one", "", 0o644, b"1"),
        (LINK, "up", "../../..", 0o777, b""),
        (FILE, "up/two", "", 0o644, b"2"),
        (LINK, "out", "/tmp", 0o777, b""),
        (DIR, "tmp", "", 0o1777, b""),
        (FILE, "out/three", "", 0o644, b"3"),
        (FILE, "/four", "", 0o644, b"4"),
        (LINK, "file", "../../canary", 0o777, b""),
        (FILE, "file", "", 0o644, b"5"),
    ])
    .unwrap();
    for (path, contents) in [("one", "1"), ("two", "2"), ("tmp/three", "3"), ("four", "4"), ("file", "5")] {
        assert_eq!(std::fs::read_to_string(bed.at(path)).unwrap(), contents);
    }
    assert_eq!(std::fs::metadata(bed.at("tmp")).unwrap().mode() & 0o7777, 0o1777);
}

#[test]
fn a_link_to_nowhere_or_a_file_is_no_folder() {
    let Some(bed) = Bed::new() else { return };
    let error = bed.unpack(&[(LINK, "gone", "/missing", 0o777, b""), (FILE, "gone/x", "", 0o644, b"")]);
    assert!(error.unwrap_err().to_string().contains("used as a folder"));
    let error = bed.unpack(&[(FILE, "f", "", 0o644, b""), (FILE, "f/x/y", "", 0o644, b"")]);
    assert!(error.unwrap_err().to_string().contains("used as a folder"));
}

#[test]
fn whiteouts_take_overlayfs_form() {
    let Some(bed) = Bed::new() else { return };
    bed.unpack(&[
        (FILE, "etc/.wh.gone", "", 0o644, b""),
        (DIR, "fresh", "", 0o755, b""),
        (FILE, "fresh/.wh..wh..opq", "", 0o644, b""),
        (FILE, ".wh..wh.plnk", "", 0o644, b""),
        // Deleted below and made anew here, in both orders: the new folder hides the old one.
        (FILE, ".wh.again", "", 0o644, b""),
        (DIR, "again", "", 0o755, b""),
        (DIR, "other", "", 0o755, b""),
        (FILE, ".wh.other", "", 0o644, b""),
    ])
    .unwrap();
    let gone = std::fs::symlink_metadata(bed.at("etc/gone")).unwrap();
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    for dir in ["fresh", "again", "other"] {
        assert_eq!(xattr::get(bed.at(dir), OPAQUE_XATTR).unwrap().as_deref(), Some(&b"y"[..]), "{dir}");
    }
    assert!(walk(&bed.dest).iter().all(|path| !path.to_string_lossy().contains(".wh.")));
}

#[test]
fn modes_devices_and_replacements() {
    let Some(bed) = Bed::new() else { return };
    bed.unpack(&[
        (FILE, "su", "", 0o4755, b"x"),
        (EntryType::Char, "null", "", 0o666, b""),
        (EntryType::Fifo, "pipe", "", 0o600, b""),
        (DIR, "d", "", 0o700, b""),
        (FILE, "d/in", "", 0o644, b""),
        (FILE, "d", "", 0o644, b"now a file"),
        (LINK, "l", "d", 0o777, b""),
        (DIR, "l", "", 0o755, b""),
        (HARD, "su2", "su", 0o4755, b""),
        (DIR, "deep/er", "", 0o755, b""),
    ])
    .unwrap();
    assert_eq!(std::fs::metadata(bed.at("su")).unwrap().mode() & 0o7777, 0o4755);
    assert_eq!(
        std::fs::metadata(bed.at("su")).unwrap().ino(),
        std::fs::metadata(bed.at("su2")).unwrap().ino()
    );
    let null = std::fs::metadata(bed.at("null")).unwrap();
    assert_eq!((null.mode() & 0o777, null.rdev()), (0o666, nix::sys::stat::makedev(1, 3)));
    assert!(std::fs::metadata(bed.at("pipe")).unwrap().file_type().is_fifo());
    assert_eq!(std::fs::read_to_string(bed.at("d")).unwrap(), "now a file");
    assert!(std::fs::symlink_metadata(bed.at("l")).unwrap().is_dir());
    assert_eq!(std::fs::metadata(bed.at("deep")).unwrap().mode() & 0o7777, 0o755);
    assert_eq!(std::fs::metadata(bed.at("deep/er")).unwrap().mtime(), 1_000_000_000);
}

#[test]
fn attributes_are_kept_but_not_overlayfs_own() {
    let Some(bed) = Bed::new() else { return };
    let mut builder = tar::Builder::new(Vec::new());
    let records = [
        ("SCHILY.xattr.user.note", &b"hello"[..]),
        ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        ("mtime", b"12.5"),
    ];
    builder.append_pax_extensions(records).unwrap();
    let mut header = Header::new_ustar();
    header.set_entry_type(DIR);
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    builder.append_data(&mut header, "d", std::io::empty()).unwrap();
    unpack(&mut Cursor::new(builder.into_inner().unwrap()), &bed.dest).unwrap();
    assert_eq!(xattr::get(bed.at("d"), "user.note").unwrap().as_deref(), Some(&b"hello"[..]));
    assert_eq!(xattr::get(bed.at("d"), "trusted.overlay.redirect").unwrap(), None);
    let metadata = std::fs::metadata(bed.at("d")).unwrap();
    assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (12, 500_000_000));
}

#[test]
fn archives_that_break_off_are_refused() {
    let Some(bed) = Bed::new() else { return };
    let whole = archive(&[(FILE, "f", "", 0o644, &[1; 5_000])]);
    for len in [600, 3_000, 5_000] {
        assert!(unpack(&mut Cursor::new(&whole[..len]), &bed.dest).is_err(), "{len} bytes");
    }
}

#[test]
fn damaged_archives_neither_panic_nor_lead_outside() {
    let Some(bed) = Bed::new() else { return };
    let whole = archive(&[
        (DIR, "d", "", 0o755, b""),
        (FILE, "d/f", "", 0o644, &[1; 700]),
        (LINK, "l", "../../..", 0o777, b""),
        (EntryType::XHeader, "pax", "", 0o644, b"13 path=l/up\n12 size=400\n"),
        (FILE, "x", "", 0o644, &[2; 400]),
        (HARD, "h", "d/f", 0o644, b""),
        (FILE, "d/.wh.gone", "", 0o644, b""),
    ]);
    // xorshift, so that a failure repeats; the checksum is put right, so that the damage gets past it.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    for round in 0..2_000 {
        let mut damaged = whole.clone();
        for _ in 0..1 + next(4) {
            let at = next(damaged.len());
            damaged[at] = [b'.', b'/', 0, 0xff, b'7', next(256) as u8][next(6)];
        }
        for block in damaged.chunks_mut(512).filter(|block| &block[257..262] == b"ustar") {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        let _ = std::fs::remove_dir_all(&bed.dest);
        std::fs::create_dir(&bed.dest).unwrap();
        let _ = unpack(&mut Cursor::new(damaged), &bed.dest);
        let outside = walk(bed.dir.path()).into_iter().filter(|path| !path.starts_with(&bed.dest)).count();
        assert_eq!(outside, 3, "round {round}");
    }
}

#[test]
fn a_store_belongs_to_one_process_and_cleans_up() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert!(matches!(Store::open(dir.path()), Err(Error::StoreInUse { .. })));
    std::fs::create_dir(dir.path().join("tmp/layer-x")).unwrap();
    std::fs::write(dir.path().join("tmp/layer-x/y"), "").unwrap();
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(std::fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    assert_eq!(std::fs::metadata(dir.path()).unwrap().mode() & 0o777, 0o700);
    assert_eq!(store.list().unwrap(), []);
    assert!(!store.has(&"app:v1".parse().unwrap()));
}

#[test]
fn overlay_options_name_the_upper_layer_first() {
    let image = |layers: &[&str]| PulledImage {
        digest: Digest::of(b""),
        config: ImageConfig::default(),
        layers: layers.iter().map(PathBuf::from).collect(),
    };
    let (upper, work) = (Path::new("/u"), Path::new("/w"));
    let options = image(&["/l/1", "/l/2", "/l/1"]).overlay_options(upper, work).unwrap();
    assert_eq!(options, "lowerdir=/l/1:/l/2,upperdir=/u,workdir=/w");
    let options = image(&["/l:1"]).overlay_options(Path::new("/a,b"), work).unwrap();
    assert_eq!(options, "lowerdir=/l\\:1,upperdir=/a\\,b,workdir=/w");
    assert!(image(&[]).overlay_options(upper, work).is_err());
    assert!(image(&[&"x".repeat(5_000)]).overlay_options(upper, work).is_err());
}
