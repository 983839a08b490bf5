//! The life of an instance as a pure state machine: events go in, with the time; actions come out.
//!
//! ```text
//! New -> Pulling -> Starting -> Running -> Terminating -> BackOff -> Starting ...   (deployments)
//!  \-> Adopting ---------------/     \----------\-------> Exited                    (jobs)
//! any -> Cleaning -> Gone   (when the assignment is deleted)
//! ```
//! At most one deadline is set at a time, and it belongs to the state.

use anyplace_model::{InstancePhase, ReasonCode, Refusal};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

/// The first restart comes at once, since most containers that end once don't end twice; then pauses grow from
/// here, doubling.
const FIRST_PAUSE: SignedDuration = SignedDuration::from_millis(100);
/// The longest pause: short enough that a dependency which comes back is used soon.
const LAST_PAUSE: SignedDuration = SignedDuration::from_secs(30);
/// A container that ran for so long works: the next restart counts as the first.
const STABLE: SignedDuration = SignedDuration::from_secs(30);
/// Between asking a container to end and killing it, and between one kill and the next.
const GRACE: SignedDuration = SignedDuration::from_secs(5);
const FIRST_PULL_PAUSE: SignedDuration = SignedDuration::from_millis(250);
const LAST_PULL_PAUSE: SignedDuration = SignedDuration::from_secs(10);

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Exit {
    /// Status; 128 + n after signal n.
    pub(crate) exit_code: i32,
    /// The signal that ended it.
    pub(crate) signal: Option<i32>,
    /// Whether the kernel killed something of it for want of memory.
    pub(crate) oom_killed: bool,
    /// When.
    pub(crate) ended_at: Timestamp,
}

/// What happens to an instance.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Event {
    /// Nothing of it is here: make it.
    Begin,
    /// An earlier agent has begun it; what became of it follows as another event.
    Adopt,
    ImageReady,
    ImageFailed {
        reason: ReasonCode,
        message: String,
        permanent: bool,
    },
    Started {
        at: Timestamp,
    },
    StartFailed {
        message: String,
    },
    /// The container's first process has ended; how, follows as [`Event::Exited`].
    InitGone,
    Exited(Exit),
    Ready,
    NotReady(String),
    Unhealthy(String),
    Draining(bool),
    /// The assignment is deleted.
    Removed,
    Deadline,
    Cleaned,
}

/// What has to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Make sure of the image; answers `ImageReady` or `ImageFailed`.
    Pull,
    /// Start a container; answers `Started` or `StartFailed`.
    Start,
    /// Ask the container to end.
    Terminate,
    /// Kill the container.
    Kill,
    /// Remove everything but the log; answers `Cleaned`.
    Clean,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    New,
    Adopting,
    Pulling,
    Starting,
    Running,
    Terminating(Cause),
    BackOff,
    Exited,
    Failed,
    Cleaning,
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    Removed,
    TimedOut,
    Unhealthy,
}

/// The state of one instance.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    restart: bool,
    timeout: Option<SignedDuration>,
    has_readiness: bool,
    state: State,
    deadline: Option<Timestamp>,
    draining: bool,
    removed: bool,
    image_here: bool,
    ready: bool,
    /// Failed starts and short runs in a row.
    failures: u32,
    failed_pulls: u32,
    pub(crate) restarts: u32,
    pub(crate) started_at: Option<Timestamp>,
    pub(crate) last_exit: Option<Exit>,
    reason: Option<Refusal>,
}

impl Lifecycle {
    pub(crate) fn new(restart: bool, timeout_ms: Option<u64>, has_readiness: bool, restarts: u32) -> Self {
        let timeout = timeout_ms
            .map(|ms| SignedDuration::from_millis(i64::try_from(ms).unwrap_or(i64::MAX).min(MAX_TIMEOUT_MS)));
        Self {
            restart,
            timeout,
            has_readiness,
            state: State::New,
            deadline: None,
            draining: false,
            removed: false,
            image_here: false,
            ready: false,
            failures: 0,
            failed_pulls: 0,
            restarts,
            started_at: None,
            last_exit: None,
            reason: None,
        }
    }

    pub(crate) fn phase(&self) -> InstancePhase {
        match self.state {
            State::New | State::Pulling => InstancePhase::Pulling,
            State::Adopting | State::Starting => InstancePhase::Starting,
            State::Running if self.draining => InstancePhase::Stopping,
            State::Running => InstancePhase::Running,
            State::Terminating(_) | State::Cleaning | State::Gone => InstancePhase::Stopping,
            State::BackOff => InstancePhase::BackOff,
            State::Exited => InstancePhase::Exited,
            State::Failed => InstancePhase::Failed,
        }
    }

    pub(crate) fn ready(&self) -> bool {
        self.state == State::Running && self.ready && !self.draining && !self.removed
    }

    pub(crate) fn reason(&self) -> Option<&Refusal> {
        self.reason.as_ref()
    }

    /// When [`Event::Deadline`] is due.
    pub(crate) fn deadline(&self) -> Option<Timestamp> {
        self.deadline
    }

    pub(crate) fn gone(&self) -> bool {
        self.state == State::Gone
    }

    /// Whether the container runs and should be checked.
    pub(crate) fn running(&self) -> bool {
        self.state == State::Running
    }

    /// Takes an event. Events that come too late for the state are ignored.
    pub(crate) fn handle(&mut self, now: Timestamp, event: Event) -> Option<Action> {
        match event {
            Event::Removed => return self.remove(now),
            Event::Draining(draining) => {
                self.draining = draining;
                return None;
            }
            _ => {}
        }
        match (self.state, event) {
            (State::New, Event::Begin) => self.pull(),
            (State::New, Event::Adopt) => self.enter(State::Adopting, None),
            // The earlier agent got no further than its plans.
            (State::Adopting, Event::Begin) => self.pull(),
            (State::Pulling, Event::ImageReady) => {
                self.image_here = true;
                self.failed_pulls = 0;
                self.start()
            }
            (State::Pulling, Event::ImageFailed { reason, message, permanent }) => {
                self.explain(reason, message);
                if permanent {
                    return self.enter(State::Failed, None);
                }
                let pause = doubled(FIRST_PULL_PAUSE, self.failed_pulls, LAST_PULL_PAUSE);
                self.failed_pulls += 1;
                self.deadline = later(now, pause);
                None
            }
            (State::Pulling, Event::Deadline) => self.pull_again(),
            (State::Starting | State::Adopting, Event::Started { at }) => {
                self.started_at = Some(at);
                self.ready = !self.has_readiness;
                self.reason = None;
                if self.has_readiness {
                    self.explain(ReasonCode::NotReady, "the readiness check has not passed yet".into());
                }
                self.enter(State::Running, self.timeout.and_then(|timeout| later(at, timeout)));
                if self.removed { self.terminate(now, Cause::Removed) } else { None }
            }
            (State::Starting | State::Adopting, Event::StartFailed { message }) => {
                self.explain(ReasonCode::StartFailed, message);
                match (self.removed, self.restart) {
                    (true, _) => self.clean(),
                    (false, true) => self.back_off(now, None),
                    (false, false) => self.enter(State::Failed, None),
                }
            }
            (State::Running, Event::InitGone) => {
                self.ready = false;
                self.explain(ReasonCode::BackOff, "the container has ended".into());
                None
            }
            (
                State::Running | State::Terminating(_) | State::Adopting | State::Starting,
                Event::Exited(exit),
            ) => self.exited(now, exit),
            (State::Running, Event::Ready) => {
                self.ready = true;
                self.reason = None;
                None
            }
            (State::Running, Event::NotReady(message)) => {
                self.ready = false;
                self.explain(ReasonCode::NotReady, message);
                None
            }
            (State::Running, Event::Unhealthy(message)) => {
                self.explain(ReasonCode::Unhealthy, message);
                self.terminate(now, Cause::Unhealthy)
            }
            (State::Running, Event::Deadline) => {
                self.explain(ReasonCode::TimedOut, "it ran longer than its timeout".into());
                self.terminate(now, Cause::TimedOut)
            }
            (State::Terminating(_), Event::Deadline) => {
                self.deadline = later(now, GRACE);
                Some(Action::Kill)
            }
            (State::BackOff, Event::Deadline) => {
                self.restarts += 1;
                if self.image_here { self.start() } else { self.pull() }
            }
            (State::Cleaning, Event::Cleaned) => self.enter(State::Gone, None),
            _ => None,
        }
    }

    fn remove(&mut self, now: Timestamp) -> Option<Action> {
        self.removed = true;
        match self.state {
            State::Running => self.terminate(now, Cause::Removed),
            // Its end is under way, or what is being started must first be known in order to be ended.
            State::Terminating(_) | State::Starting | State::Adopting | State::Cleaning | State::Gone => None,
            State::New | State::Pulling | State::BackOff | State::Exited | State::Failed => self.clean(),
        }
    }

    fn exited(&mut self, now: Timestamp, exit: Exit) -> Option<Action> {
        self.ready = false;
        let cause = match self.state {
            State::Terminating(cause) => Some(cause),
            _ => None,
        };
        let (code, oom_killed) = (exit.exit_code, exit.oom_killed);
        let ran = self.started_at.map(|started| exit.ended_at.duration_since(started));
        self.last_exit = Some(exit);
        if self.removed {
            return self.clean();
        }
        match cause {
            // Said when it was decided.
            Some(Cause::TimedOut | Cause::Unhealthy) => {}
            _ if oom_killed => {
                self.explain(ReasonCode::OutOfMemory, "it used more memory than its limit".into());
            }
            _ if self.restart => self.explain(ReasonCode::BackOff, format!("it exited with status {code}")),
            _ if code != 0 => {
                self.explain(ReasonCode::ExitedNonZero, format!("it exited with status {code}"));
            }
            _ => self.reason = None,
        }
        if self.restart { self.back_off(now, ran) } else { self.enter(State::Exited, None) }
    }

    fn back_off(&mut self, now: Timestamp, ran: Option<SignedDuration>) -> Option<Action> {
        if ran.is_some_and(|ran| ran >= STABLE) {
            self.failures = 0;
        }
        let pause = match self.failures {
            0 => SignedDuration::ZERO,
            failures => doubled(FIRST_PAUSE, failures - 1, LAST_PAUSE),
        };
        self.failures += 1;
        self.started_at = None;
        self.enter(State::BackOff, later(now, pause))
    }

    fn terminate(&mut self, now: Timestamp, cause: Cause) -> Option<Action> {
        self.ready = false;
        self.enter(State::Terminating(cause), later(now, GRACE));
        Some(Action::Terminate)
    }

    fn pull(&mut self) -> Option<Action> {
        self.explain(ReasonCode::PullingImage, "the image is being fetched".into());
        self.pull_again()
    }

    /// Keeps the reason of the last failure until there is a better one.
    fn pull_again(&mut self) -> Option<Action> {
        self.enter(State::Pulling, None);
        Some(Action::Pull)
    }

    fn start(&mut self) -> Option<Action> {
        self.explain(ReasonCode::Starting, "the container is being started".into());
        self.enter(State::Starting, None);
        Some(Action::Start)
    }

    fn clean(&mut self) -> Option<Action> {
        self.ready = false;
        self.enter(State::Cleaning, None);
        Some(Action::Clean)
    }

    fn enter(&mut self, state: State, deadline: Option<Timestamp>) -> Option<Action> {
        (self.state, self.deadline) = (state, deadline);
        None
    }

    fn explain(&mut self, reason: ReasonCode, message: String) {
        self.reason = Some(Refusal { reason, count: 1, message });
    }
}

/// A hundred years: what is longer is no timeout.
const MAX_TIMEOUT_MS: i64 = 100 * 366 * 86_400_000;

fn doubled(first: SignedDuration, times: u32, last: SignedDuration) -> SignedDuration {
    1_i32.checked_shl(times.min(30)).and_then(|factor| first.checked_mul(factor)).unwrap_or(last).min(last)
}

fn later(now: Timestamp, pause: SignedDuration) -> Option<Timestamp> {
    now.checked_add(pause).ok()
}

#[cfg(test)]
mod tests;
