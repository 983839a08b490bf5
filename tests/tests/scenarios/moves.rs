//! Room for what fits only in sum: another instance moves, and neither its connections nor new ones notice.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyplace_tests::platform::Options;

use super::world::{World, hello, wait_for};

/// Long enough to look at it on any machine.
const DRAIN_MS: u64 = 30_000;
const PATIENCE: Duration = Duration::from_secs(20);
/// Says who it is, then what it hears.
const ECHO: &str =
    r#"command: [/bin/busybox, nc, -ll, -p, "8080", -e, /bin/sh, -c, "echo $ANYPLACE_INSTANCE; exec cat"]"#;

struct Connection(BufReader<TcpStream>);

impl Connection {
    /// A new connection of the client; who answers.
    fn open(world: &World, vip: &str) -> (Self, String) {
        let target: SocketAddr = format!("{vip}:80").parse().unwrap();
        let node = world.platform.bed().node("ams-client").unwrap();
        let stream = node.inside(|| Ok(TcpStream::connect_timeout(&target, PATIENCE)?)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut connection = Self(BufReader::new(stream));
        let name = connection.read();
        (connection, name)
    }

    fn read(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    fn echo(&mut self, text: &str) {
        self.0.get_mut().write_all(format!("{text}\n").as_bytes()).unwrap();
        assert_eq!(self.read(), text);
    }
}

fn with_gpu(spec: String, gpu: &str) -> String {
    spec.replace("memory: 32Mi}", &format!("memory: 32Mi, gpu: {gpu}}}"))
}

#[test]
fn an_instance_moves_to_make_room_and_its_connections_live_on() {
    let gpu = |model: &str| vec![(model.to_owned(), "16Gi".to_owned())];
    let gpus = [("ams-1".to_owned(), gpu("A")), ("ams-2".to_owned(), gpu("B"))].into();
    let options = Options { gpus, drain_ms: Some(DRAIN_MS), ..Options::default() };
    let Some(world) = World::start_with("tsmoves", 1, options) else { return };
    // While another has B, half of A is all that there is for the small one.
    world.apply("filler", &with_gpu(hello("filler", 1, ""), "{models: [B]}"));
    let small = hello("small", 1, ECHO).replace("http: {path: /, port: 8080}", "tcp: {port: 8080}");
    let small = world.apply("small", &with_gpu(small, "{memory: 8Gi}"));
    world.cli_ok(&["delete", "deployment", "filler"]);
    let (mut open, old) = Connection::open(&world, &small);
    open.echo("before");

    let big = world.spec("big", &with_gpu(hello("big", 1, ""), "{models: [A]}"));
    world.cli_ok(&["apply", "-f", &big]);
    wait_for("room to be made", 120, || {
        let why = world.json(&["why", "big"]);
        let moves = why["locations"][0]["moves"].as_array().cloned().unwrap_or_default();
        let refusals = why["refusals"].to_string();
        match moves.first() {
            Some(it) if it["cause"]["room"] == "big" && refusals.contains("making_room") => Ok(()),
            _ => Err(why.to_string()),
        }
    });
    let text = world.cli_ok(&["why", "small"]);
    assert!(text.contains(&format!("{old} from ams-1 to ams-2, makes room for big")), "{text}");

    let new =
        wait_for("new connections to go to the copy", 120, || match Connection::open(&world, &small).1 {
            name if name != old => Ok(name),
            name => Err(name),
        });
    open.echo("while it drains");
    let page = wait_for("the newcomer", 180, || {
        assert_eq!(Connection::open(&world, &small).1, new, "new connections all go to the copy");
        world.call("ams-client", &world.vip("big")).map_err(|error| error.to_string())
    });
    assert!(page.contains("machine ams-1"), "{page}");
    let text = world.cli_ok(&["why", "small"]);
    assert!(text.contains(&format!("{new} took its place")), "{text}");
    world.end();
}
