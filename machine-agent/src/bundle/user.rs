//! From an image's `user` to numbers: numbers as they are, names looked up in the image's own files.

use std::{fs::File, io::Read as _, path::Path};

use anyhow::Context as _;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

/// More isn't read of an image's file of users.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Who runs the container's first process.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) more_gids: Vec<u32>,
    pub(super) home: String,
}

/// Resolves `user[:group]`; nothing is root.
pub(super) fn resolve(root: &Path, wanted: &str) -> anyhow::Result<User> {
    let passwd = read(root, "etc/passwd");
    let group = read(root, "etc/group");
    resolve_in(&passwd, &group, wanted)
}

fn resolve_in(passwd: &str, group: &str, wanted: &str) -> anyhow::Result<User> {
    let (name, wanted_group) = wanted.split_once(':').unwrap_or((wanted, ""));
    let name = if name.is_empty() { "0" } else { name };
    let fields = |line: &str| line.split(':').map(str::to_owned).collect::<Vec<String>>();
    let matches = |line: &Vec<String>| {
        line.first().is_some_and(|field| field == name) || line.get(2).is_some_and(|field| field == name)
    };
    let entry = passwd.lines().map(fields).find(matches);
    let number = |index: usize| entry.as_ref().and_then(|entry| entry.get(index)?.parse::<u32>().ok());
    let uid = name.parse().ok().or_else(|| number(2)).with_context(|| {
        format!(
            "the image's user `{name}` is not in its /etc/passwd; use a number, or add the user to the image"
        )
    })?;
    let gid = match wanted_group {
        "" => number(3).unwrap_or(0),
        wanted => wanted.parse().ok().or_else(|| group_id(group, wanted)).with_context(|| {
            format!(
                "the image's group `{wanted}` is not in its /etc/group; use a number, or add the group to the image"
            )
        })?,
    };
    let user_name = entry.as_ref().and_then(|entry| entry.first().cloned());
    let more_gids = user_name.map(|name| memberships(group, &name)).unwrap_or_default();
    let home = entry.as_ref().and_then(|entry| entry.get(5).cloned()).filter(|home| home.starts_with('/'));
    Ok(User { uid, gid, more_gids, home: home.unwrap_or_else(|| "/".into()) })
}

fn group_id(group: &str, wanted: &str) -> Option<u32> {
    let line = group.lines().find(|line| line.split(':').next() == Some(wanted))?;
    line.split(':').nth(2)?.parse().ok()
}

fn memberships(group: &str, user: &str) -> Vec<u32> {
    let member = |line: &&str| {
        line.split(':').nth(3).is_some_and(|members| members.split(',').any(|member| member == user))
    };
    group.lines().filter(member).filter_map(|line| line.split(':').nth(2)?.parse().ok()).collect()
}

/// The file's text, or nothing. Links are followed inside the root only: an image must not name the machine's files.
fn read(root: &Path, path: &str) -> String {
    let open = || {
        let root = File::open(root).ok()?;
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let file = File::from(openat2(&root, path, how).ok()?);
        let mut bytes = Vec::new();
        file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    };
    open().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n";
    const GROUP: &str = "root:x:0:\napp:x:1001:\naudio:x:29:app,root\nextra:x:30:nobody\n";

    #[test]
    fn users_are_found_by_name_and_number() {
        let resolve = |wanted| resolve_in(PASSWD, GROUP, wanted).unwrap();
        let app = User { uid: 1000, gid: 1001, more_gids: vec![29], home: "/home/app".into() };
        assert_eq!(resolve("app"), app);
        assert_eq!(resolve("1000"), app);
        assert_eq!(resolve("app:extra").gid, 30);
        assert_eq!(resolve("").home, "/root");
        assert_eq!(resolve("77:88"), User { uid: 77, gid: 88, more_gids: vec![], home: "/".into() });
        let error = resolve_in(PASSWD, GROUP, "ghost").unwrap_err().to_string();
        assert!(error.contains("`ghost` is not in its /etc/passwd; use a number"), "{error}");
        assert!(resolve_in("", "", "0").is_ok());
    }

    #[test]
    fn links_never_leave_the_root() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", dir.path().join("etc/passwd")).unwrap();
        assert_eq!(read(dir.path(), "etc/passwd"), "");
        std::fs::write(dir.path().join("etc/hostname"), "inside").unwrap();
        assert_eq!(read(dir.path(), "etc/passwd"), "inside");
    }
}
