//! The image of the demo and the scenarios: a root file system with busybox and a page that says where it is served.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use anyhow::{Context, Result};

/// Debian's busybox-static: one program without libraries.
const BUSYBOX: &str = "/bin/busybox";
/// Commands worth having inside, for checks and for people who look around.
const APPLETS: &[&str] = &["cat", "date", "echo", "hostname", "ls", "nc", "ps", "sh", "sleep"];
/// The image's entrypoint, inside.
pub const HELLO_ENTRY: &str = "/entry.sh";
/// It ends as the server itself, so that signals and exit codes are the server's.
const ENTRY_TEXT: &str = "#!/bin/sh
/bin/busybox mkdir -p /www
echo \"hello from $ANYPLACE_LOCATION, machine $ANYPLACE_MACHINE, instance $ANYPLACE_INSTANCE\" > /www/index.html
echo \"serving on port 8080\"
exec /bin/busybox httpd -f -v -p 8080 -h /www
";

/// Writes the root file system into a new folder.
pub fn write_hello_image(rootfs: &Path) -> Result<()> {
    let bin = rootfs.join("bin");
    for folder in ["bin", "tmp", "www", "etc"] {
        fs::create_dir_all(rootfs.join(folder))?;
    }
    fs::copy(BUSYBOX, bin.join("busybox"))
        .with_context(|| format!("copy {BUSYBOX} (package busybox-static)"))?;
    for applet in APPLETS {
        symlink("busybox", bin.join(applet))?;
    }
    fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n")?;
    let entry = rootfs.join(HELLO_ENTRY.trim_start_matches('/'));
    fs::write(&entry, ENTRY_TEXT)?;
    fs::set_permissions(entry, fs::Permissions::from_mode(0o755))?;
    Ok(())
}
