//! Starts a testbed, or a whole platform on one, and waits to be killed: what is left then is what tests are about.

use std::time::Duration;

use anyhow::bail;
use anyplace_tests::{HELLO_ENTRY, Platform, Testbed, Topology, platform, write_hello_image};

/// Longer than any test waits; nothing stays for ever where nobody kills it.
const LONGEST_LIFE: Duration = Duration::from_secs(600);

fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["testbed", name] => {
            let _bed = Testbed::create(name, &Topology::three_locations())?;
            println!("built");
            std::thread::sleep(LONGEST_LIFE);
        }
        ["platform", name, spec] => {
            let bed = Testbed::create(name, &Topology::of_locations(2))?;
            let rootfs = bed.state_dir().join("image");
            write_hello_image(&rootfs)?;
            let platform = Platform::start(bed, platform::Options::default())?;
            let folder = rootfs.to_string_lossy().into_owned();
            platform.cli_output(["push", &folder, "hello:v1", "--entrypoint", HELLO_ENTRY])?;
            platform.cli_output(["apply", "-f", spec, "--wait"])?;
            std::thread::sleep(LONGEST_LIFE);
        }
        _ => bail!("expected `testbed NAME` or `platform NAME SPEC`"),
    }
    Ok(())
}
