//! The machine's surroundings: a second network namespace at the other end of its uplink.

use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    process::{Command, Stdio},
    sync::{Mutex, mpsc},
};

use nix::sched::{CloneFlags, unshare};

use crate::bed::{MACHINE, MACHINE6, METADATA, OPEN, OPEN6, PRIVATE6, PROTECTED, PROTECTED6};

/// The second namespace: a thread that lives in it and does what it is told.
pub(crate) struct Fabric(Mutex<mpsc::Sender<Box<dyn FnOnce() + Send>>>);

impl Fabric {
    pub(crate) fn new() -> Self {
        let (sender, jobs) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            tell.send(nix::unistd::gettid()).unwrap();
            jobs.into_iter().for_each(|job| job());
        });
        let netns = format!("/proc/{}/task/{}/ns/net", std::process::id(), told.recv().unwrap());
        ip(&format!(
            "link set lo up\nlink add eth0 type veth peer name eth0 netns {netns}\n\
             addr add {MACHINE}/31 dev eth0\naddr add {MACHINE6}/127 dev eth0 nodad\nlink set eth0 up\n\
             route add default via {PROTECTED} dev eth0 onlink\nroute add default via {PROTECTED6} dev eth0\n"
        ));
        let fabric = Self(Mutex::new(sender));
        fabric.run(|| {
            ip(&format!(
                "link set lo up\naddr add {PROTECTED}/31 dev eth0\naddr add {OPEN}/32 dev lo\naddr add {METADATA}/32 dev lo\n\
                 addr add {PROTECTED6}/127 dev eth0 nodad\naddr add {OPEN6}/128 dev lo\naddr add {PRIVATE6}/128 dev lo\n\
                 link set eth0 up\n\
                 route add 10.9.1.64/26 via {MACHINE} dev eth0 onlink\n"
            ));
            answer();
        });
        fabric
    }

    pub(crate) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, result) = mpsc::channel();
        let job = Box::new(move || sender.send(job()).unwrap_or(()));
        self.0.lock().unwrap().send(job).unwrap();
        result.recv().unwrap()
    }
}

fn ip(batch: &str) {
    let mut child = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(batch.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "ip refused {batch}");
}

/// Answers whoever connects to port 9999 of this namespace with who that is.
pub(crate) fn answer() {
    let listener = TcpListener::bind("[::]:9999").unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let peer = stream.peer_addr().unwrap().ip().to_canonical();
            let mut request = [0; 1_024];
            let _ = stream.read(&mut request);
            let _ = write!(stream, "HTTP/1.0 200 OK\r\n\r\nseen as {peer}\n");
        }
    });
}
