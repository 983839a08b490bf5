//! A batch job, counted from outside: it calls a listener in a client's network, which writes down every call.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyplace_tests::{Node, platform::Options};

use super::world::{World, hello, wait_for};

/// Longer than every lease and every pause before another start.
const LONG_AFTER: Duration = Duration::from_secs(4);

/// Writes down the first line of every request, until dropped.
struct Witness {
    stop: Arc<AtomicBool>,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Witness {
    fn start(node: &Node, address: &str) -> Self {
        let witness = Self { stop: Arc::default(), lines: Arc::default() };
        let (node, address) = (node.clone(), address.to_owned());
        let (stop, lines) = (witness.stop.clone(), witness.lines.clone());
        let (ready_send, ready) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            node.enter().unwrap();
            let listener = TcpListener::bind(address).unwrap();
            listener.set_nonblocking(true).unwrap();
            ready_send.send(()).unwrap();
            while !stop.load(Ordering::Relaxed) {
                let Ok((mut stream, from)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(2));
                    continue;
                };
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
                let mut buffer = [0; 1024];
                let length = stream.read(&mut buffer).unwrap_or(0);
                let line = String::from_utf8_lossy(&buffer[..length]).lines().next().unwrap_or("").to_owned();
                lines.lock().unwrap().push(format!("{} {line}", from.ip()));
                let _ =
                    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            }
        });
        ready.recv().unwrap();
        witness
    }

    fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Says from outside whether its file system is new, and ends with `code`.
fn job(name: &str, code: i32, attempts: u32) -> String {
    format!(
        r#"kind: Job
name: {name}
image: hello:v1
resources: {{cpu: 50m, memory: 32Mi}}
max_attempts: {attempts}
timeout: 30s
command:
  - /bin/busybox
  - sh
  - -c
  - |
    state=fresh
    if [ -e /mark ]; then state=used; fi
    echo mark > /mark
    echo "{name} begins on $ANYPLACE_MACHINE"
    # Debian's static busybox has a wget that crashes where there are no C libraries.
    echo "GET /{name}/$state " | busybox nc -w 5 198.51.100.10 9000 || exit 99
    echo "{name} ends"
    exit {code}
"#
    )
}

#[test]
fn a_job_runs_once_in_a_fresh_container() {
    let Some(world) = World::start("tsjob", 1) else { return };
    let client = world.platform.bed().node("ams-client").unwrap();
    // Clients know the virtual IPs only; the witness has to answer a machine.
    client.run("ip", &["route", "add", "10.1.0.0/16", "via", "198.51.100.11"]).unwrap();
    let witness = Witness::start(client, "198.51.100.10:9000");
    let run = |name: &str, code: i32, attempts: u32| {
        let path = world.spec(name, &job(name, code, attempts));
        let output = world.cli(&["jobs", "run", "-f", &path, "--wait", "--timeout", "40s"]);
        // Shown if the test fails.
        eprintln!("{}\n{}", String::from_utf8_lossy(&output.stderr), world.cli_ok(&["jobs", "logs", name]));
        output.status.code()
    };
    assert_eq!(run("good", 0, 3), Some(0));
    assert_eq!(run("bad", 7, 1), Some(1));
    assert_eq!(run("again", 7, 2), Some(1));
    std::thread::sleep(LONG_AFTER);

    let lines = witness.lines();
    let calls = |name: &str| -> Vec<&String> {
        lines.iter().filter(|line| line.contains(&format!("GET /{name}/"))).collect()
    };
    assert_eq!(calls("good").len(), 1, "once, though three attempts were allowed: {lines:?}");
    assert_eq!(calls("bad").len(), 1, "{lines:?}");
    assert_eq!(calls("again").len(), 2, "as often as allowed: {lines:?}");
    assert!(lines.iter().all(|line| line.contains("/fresh ")), "every attempt's files are new: {lines:?}");
    assert!(lines.iter().all(|line| line.starts_with("10.1.")), "under a machine's address: {lines:?}");

    for (name, code) in [("good", 0), ("bad", 7), ("again", 7)] {
        let job = world.json(&["jobs", "get", name]);
        assert_eq!(job["exit_code"].as_i64(), Some(code), "{job}");
        let log = world.cli_ok(&["jobs", "logs", name]);
        assert!(
            log.contains(&format!("{name} begins on ams-")) && log.contains(&format!("{name} ends")),
            "{log}"
        );
    }
    let pids = wait_for("the jobs' processes to be gone", 5, || match world.pids("") {
        pids if pids.is_empty() => Ok(pids),
        pids => Err(format!("{pids:?}")),
    });
    assert!(pids.is_empty());
    world.end();
}

/// Has the only GPU, until it is asked to end; tells both from outside.
const NIGHTLY: &str = r#"kind: Job
name: nightly
image: hello:v1
scheduling_policy: off-peak
resources: {cpu: 50m, memory: 32Mi, gpu: {models: [A]}}
command:
  - /bin/busybox
  - sh
  - -c
  - |
    tell() { echo "GET /$1/$ANYPLACE_ATTEMPT " | busybox nc -w 5 198.51.100.10 9000; }
    trap 'tell asked; exit 0' TERM
    tell begins
    while true; do busybox sleep 0.1; done
"#;

#[test]
fn an_off_peak_job_makes_way_for_a_deployment_and_runs_again_afterwards() {
    let gpus = [("ams-1".to_owned(), vec![("A".to_owned(), "16Gi".to_owned())])].into();
    let Some(world) = World::start_with("tsway", 1, Options { gpus, ..Options::default() }) else { return };
    let client = world.platform.bed().node("ams-client").unwrap();
    client.run("ip", &["route", "add", "10.1.0.0/16", "via", "198.51.100.11"]).unwrap();
    let witness = Witness::start(client, "198.51.100.10:9000");
    let told = |what: &str| witness.lines().iter().filter(|line| line.contains(what)).count();
    let until_told = |what: &str| {
        wait_for(what, 60, || match told(what) {
            0 => Err(format!("{:?}", witness.lines())),
            times => Ok(times),
        })
    };
    world.cli_ok(&["location", "set", "ams", "--off-peak", "00:00:00-23:59:59.999"]);
    let job = world.spec("nightly", NIGHTLY);
    world.cli_ok(&["jobs", "run", "-f", &job]);
    until_told("/begins/1");

    // Its GPU is the only one.
    let spec = hello("big", 1, "").replace("memory: 32Mi}", "memory: 32Mi, gpu: {models: [A]}}");
    let vip = world.apply("big", &spec);
    assert!(world.call("ams-client", &vip).unwrap().contains("machine ams-1"));
    assert_eq!(until_told("/asked/1"), 1, "it was asked to end: {:?}", witness.lines());
    let view = world.json(&["jobs", "get", "nightly"]);
    assert_eq!((view["phase"].as_str(), view["attempt"].as_i64()), (Some("queued"), Some(1)), "{view}");
    assert_eq!((view["preemptions"].as_i64(), view["exit_code"].as_i64()), (Some(1), None), "{view}");
    let why = world.cli_ok(&["why", "nightly"]);
    assert!(why.contains("attempts that made way for deployments: 1"), "{why}");

    world.cli_ok(&["delete", "deployment", "big"]);
    until_told("/begins/2");
    assert_eq!((told("/begins/1"), told("/begins/2")), (1, 1), "{:?}", witness.lines());
    world.cli_ok(&["jobs", "cancel", "nightly"]);
    until_told("/asked/2");
    world.end();
}
