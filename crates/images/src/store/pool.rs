//! Threads for hashing, decompressing and writing: one set for live pulls, one for prewarming at the lowest priority.
//!
//! Jobs wait in a short queue; whoever hands one over waits when it is full, which is what bounds memory.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock};

use super::Lane;
use super::objects::lock;
use crate::error::{Error, Result};

/// Whom a pull is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PullClass {
    /// Something waits for it.
    #[default]
    Live,
    /// Nothing waits for it: it leaves network and CPU to live pulls.
    Prewarm,
}

/// The priority of a pull, which rises when something live waits for what was only prewarmed.
#[derive(Clone)]
pub(super) struct Priority {
    pub(super) class: PullClass,
    /// What the pull fetches: image and layer.
    pub(super) lanes: [Arc<Lane>; 2],
}

impl Priority {
    /// The class that the pull has now.
    pub(super) fn now(&self) -> PullClass {
        let hurry = self.lanes.iter().any(|lane| lane.urgent.load(Ordering::Relaxed));
        if hurry { PullClass::Live } else { self.class }
    }

    /// Raises this thread's priority where the pull's has risen since it was started.
    pub(super) fn keep_up(&self) {
        if STEPPED_BACK.get() && self.now() == PullClass::Live {
            step(NORMAL, NO_IO_CLASS);
            STEPPED_BACK.set(false);
        }
    }
}

thread_local! {
    static STEPPED_BACK: Cell<bool> = const { Cell::new(false) };
}

/// What a thread keeps from job to job.
pub(super) struct Worker {
    /// A new context for each of many small frames costs six times as much as decoding them.
    pub(super) zstd: Option<zstd::bulk::Decompressor<'static>>,
}

type Job = Box<dyn FnOnce(&mut Worker) + Send>;

/// Both sets of threads, each started when it is first needed.
#[derive(Default)]
pub(super) struct Pools {
    live: OnceLock<Pool>,
    prewarm: OnceLock<Pool>,
}

pub(super) struct Pool {
    jobs: SyncSender<Job>,
}

impl Pools {
    pub(super) fn of(&self, class: PullClass) -> &Pool {
        match class {
            PullClass::Live => self.live.get_or_init(|| Pool::start(class)),
            PullClass::Prewarm => self.prewarm.get_or_init(|| Pool::start(class)),
        }
    }
}

impl Pool {
    fn start(class: PullClass) -> Pool {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (jobs, queue) = sync_channel::<Job>(cores);
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..cores {
            let queue = queue.clone();
            // Without any thread the queue is gone, and `run` says so.
            let _ = spawn(class, "images-worker", move || work(&queue));
        }
        Pool { jobs }
    }

    /// Hands a job over; waits while the queue is full.
    pub(super) fn run(&self, job: impl FnOnce(&mut Worker) + Send + 'static) -> Result<()> {
        self.jobs.send(Box::new(job)).map_err(|_| Error::Cancelled)
    }
}

fn work(queue: &Mutex<Receiver<Job>>) {
    let mut worker = Worker { zstd: zstd::bulk::Decompressor::new().ok() };
    loop {
        let job = lock(queue).recv();
        let Ok(job) = job else { return };
        // A job that panics has dropped its sender, which tells whoever waits for it.
        let _ = catch_unwind(AssertUnwindSafe(|| job(&mut worker)));
    }
}

/// Starts a thread of a class.
pub(super) fn spawn(
    class: PullClass,
    name: &str,
    body: impl FnOnce() + Send + 'static,
) -> Result<std::thread::JoinHandle<()>> {
    let start = move || {
        if class == PullClass::Prewarm {
            step(LOWEST, IO_IDLE);
            STEPPED_BACK.set(true);
        }
        body();
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(start).map_err(Error::io("starting", name))
}

/// Nice values, and classes of I/O in the upper bits of a priority (3 is idle, 0 follows the nice value).
const LOWEST: libc::c_int = 19;
const NORMAL: libc::c_int = 0;
const IO_IDLE: libc::c_long = 3 << 13;
const NO_IO_CLASS: libc::c_long = 0;

/// Gives this thread a priority for CPU and disk. Where that fails, the work is done all the same.
fn step(nice: libc::c_int, io: libc::c_long) {
    const IOPRIO_WHO_PROCESS: libc::c_long = 1;
    // SAFETY: both calls take numbers only; 0 is the calling thread.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, nice);
        libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0 as libc::c_long, io);
    }
}
