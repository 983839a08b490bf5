//! A server of datagrams behind a virtual IP, and who asks it.

use std::net::{IpAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::world::World;

/// Pushes the server and applies it at port 5353, with at least so many instances; its IPv4 virtual IP. It answers with
/// its name and what it was sent.
pub(super) fn apply(world: &World, instances: u32) -> String {
    let rootfs = world.platform.bed().state_dir().join("udp-image");
    write_image(&rootfs);
    world.cli_ok(&["push", rootfs.to_str().unwrap(), "udp:v1", "--entrypoint", "/server", "--cmd", "9053"]);
    let spec = format!(
        "kind: Deployment
name: udp
image: udp:v1
resources: {{cpu: 50m, memory: 32Mi}}
ports: [{{port: 5353, container_port: 9053, protocol: udp}}]
instances: {{min: {instances}}}
"
    );
    world.apply("udp", &spec)
}

/// One datagram and its answer, which a connected socket takes only from the address it asked.
pub(super) fn ask(world: &World, client: &str, vip: IpAddr, text: &str) -> Result<String, String> {
    let node = world.platform.bed().node(client).unwrap();
    let answer = node.inside(|| {
        let any = if vip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any)?;
        socket.connect((vip, 5353))?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        socket.send(text.as_bytes())?;
        let mut buffer = [0; 4096];
        let length = socket.recv(&mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    });
    answer.map_err(|error| format!("{client}, `{text}`: {error:#}"))
}

/// A root file system with the server and the libraries that it loads.
fn write_image(rootfs: &Path) {
    let server = env!("CARGO_BIN_EXE_anyplace-udp-server");
    let output = Command::new("ldd").arg(server).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let libraries = text.split_whitespace().filter(|word| word.starts_with('/'));
    for library in libraries {
        let inside = rootfs.join(library.trim_start_matches('/'));
        std::fs::create_dir_all(inside.parent().unwrap()).unwrap();
        std::fs::copy(library, inside).unwrap();
    }
    std::fs::copy(server, rootfs.join("server")).unwrap();
}
