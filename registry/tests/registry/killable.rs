//! A registry or cache in a process of its own, which can be killed at any moment.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::clock::SetClock;

/// The child's folder.
const CHILD: &str = "ANYPLACE_TEST_REGISTRY_TO_KILL";
/// How long it may take to start on a busy machine.
const START_MAX: Duration = Duration::from_secs(120);

/// Not a test by itself: the process that is started and killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn to_be_killed() {
    let Some(dir) = std::env::var_os(CHILD) else { return };
    let dir = Path::new(&dir);
    let config = anyplace_service::load_config(&dir.join("registry.toml")).unwrap();
    let server = anyplace_registry::Server::bind(config).await.unwrap();
    std::fs::write(dir.join("address.new"), server.local_addr().unwrap().to_string()).unwrap();
    std::fs::rename(dir.join("address.new"), dir.join("address")).unwrap();
    server.serve(CancellationToken::new()).await.unwrap();
}

pub(crate) struct Killable {
    child: Child,
    /// Where it listens.
    pub(crate) address: String,
    pub(crate) url: String,
}

impl Killable {
    /// Starts one on a free port, with `settings` (TOML) beside its folder.
    pub(crate) async fn start(dir: &Path, settings: &str) -> Killable {
        Killable::start_at(dir, "127.0.0.1:0", settings).await
    }

    /// Starts one at an address.
    pub(crate) async fn start_at(dir: &Path, address: &str, settings: &str) -> Killable {
        Killable::wait_for(dir, command(dir, address, settings)).await
    }

    /// Starts one that goes by this clock.
    pub(crate) async fn start_by(clock: Option<&SetClock>, dir: &Path, settings: &str) -> Killable {
        let mut command = command(dir, "127.0.0.1:0", settings);
        clock.inspect(|clock| clock.show(&mut command));
        Killable::wait_for(dir, command).await
    }

    /// Starts one that can't: what it says.
    pub(crate) fn refused(clock: &SetClock, dir: &Path, settings: &str) -> String {
        let mut command = command(dir, "127.0.0.1:0", settings);
        clock.show(&mut command);
        let output = command.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    }

    async fn wait_for(dir: &Path, mut command: Command) -> Killable {
        #[allow(clippy::zombie_processes, reason = "kill and drop wait for it")]
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        let begun = Instant::now();
        loop {
            if let Ok(address) = std::fs::read_to_string(dir.join("address")) {
                return Killable { child, url: format!("http://{address}"), address };
            }
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the registry ended by itself: {status}");
            }
            if begun.elapsed() > START_MAX {
                let _ = child.kill();
                let _ = child.wait();
                panic!("the registry didn't start");
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What starts one, with its settings in its folder.
fn command(dir: &Path, address: &str, settings: &str) -> Command {
    let _ = std::fs::remove_file(dir.join("address"));
    let config = format!("data_dir = '{}'\nlisten = '{address}'\n{settings}", dir.display());
    std::fs::write(dir.join("registry.toml"), config).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "killable::to_be_killed"]).env(CHILD, dir);
    command
}

impl Drop for Killable {
    fn drop(&mut self) {
        self.kill();
    }
}
