use super::*;

fn at(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(1_000_000 + ms).unwrap()
}

fn exit(ms: i64, exit_code: i32) -> Event {
    Event::Exited(Exit { exit_code, signal: None, oom_killed: false, ended_at: at(ms) })
}

fn reason(life: &Lifecycle) -> Option<ReasonCode> {
    life.reason().map(|refusal| refusal.reason)
}

fn running(restart: bool, timeout_ms: Option<u64>, has_readiness: bool) -> Lifecycle {
    let mut life = Lifecycle::new(restart, timeout_ms, has_readiness, 0);
    assert_eq!(life.handle(at(0), Event::Begin), Some(Action::Pull));
    assert_eq!((life.phase(), reason(&life)), (InstancePhase::Pulling, Some(ReasonCode::PullingImage)));
    assert_eq!(life.handle(at(0), Event::ImageReady), Some(Action::Start));
    assert_eq!(life.phase(), InstancePhase::Starting);
    assert_eq!(life.handle(at(0), Event::Started { at: at(0) }), None);
    assert_eq!(life.phase(), InstancePhase::Running);
    life
}

#[test]
fn a_deployment_restarts_at_once_and_then_with_growing_pauses_until_it_is_stable() {
    let mut life = running(true, None, false);
    assert!(life.ready());
    let mut now = 0;
    let mut pauses = Vec::new();
    for _ in 0..12 {
        assert_eq!(life.handle(at(now), Event::InitGone), None);
        assert!(!life.ready());
        assert_eq!(life.handle(at(now), exit(now, 1)), None);
        assert_eq!((life.phase(), reason(&life)), (InstancePhase::BackOff, Some(ReasonCode::BackOff)));
        let due = life.deadline().unwrap();
        pauses.push(due.duration_since(at(now)).as_millis());
        now += i64::try_from(*pauses.last().unwrap()).unwrap();
        assert_eq!(life.handle(at(now), Event::Deadline), Some(Action::Start));
        life.handle(at(now), Event::Started { at: at(now) });
    }
    assert_eq!(pauses, [0, 100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 30_000, 30_000]);
    assert_eq!(life.restarts, 12);
    now += 30_000;
    life.handle(at(now), exit(now, 1));
    assert_eq!(life.deadline(), Some(at(now)));
}

#[test]
fn readiness_comes_and_goes_and_draining_takes_it_away() {
    let mut life = running(true, None, true);
    assert!(!life.ready());
    assert_eq!(reason(&life), Some(ReasonCode::NotReady));
    life.handle(at(1), Event::Ready);
    assert!(life.ready() && life.reason().is_none());
    life.handle(at(2), Event::NotReady("status 500".into()));
    assert!(!life.ready());
    life.handle(at(3), Event::Ready);
    life.handle(at(4), Event::Draining(true));
    assert!(!life.ready());
    assert_eq!(life.phase(), InstancePhase::Stopping);
    life.handle(at(5), Event::Draining(false));
    assert!(life.ready());
}

#[test]
fn a_job_ends_once_and_stays_until_it_is_deleted() {
    for (code, expected) in [(0, None), (3, Some(ReasonCode::ExitedNonZero))] {
        let mut life = running(false, None, false);
        assert_eq!(life.handle(at(9), exit(9, code)), None);
        assert_eq!((life.phase(), reason(&life)), (InstancePhase::Exited, expected));
        assert_eq!(life.deadline(), None);
        assert_eq!(life.handle(at(10), exit(10, 77)), None);
        assert_eq!(life.last_exit.as_ref().unwrap().exit_code, code);
        assert_eq!(life.handle(at(11), Event::Removed), Some(Action::Clean));
        assert_eq!(life.handle(at(12), Event::Cleaned), None);
        assert!(life.gone());
    }
}

#[test]
fn a_job_past_its_timeout_is_terminated_then_killed_and_says_so() {
    let mut life = running(false, Some(1_000), false);
    assert_eq!(life.deadline(), Some(at(1_000)));
    assert_eq!(life.handle(at(1_000), Event::Deadline), Some(Action::Terminate));
    assert_eq!(life.deadline(), Some(at(6_000)));
    assert_eq!(life.handle(at(6_000), Event::Deadline), Some(Action::Kill));
    life.handle(at(6_001), exit(6_001, 137));
    assert_eq!((life.phase(), reason(&life)), (InstancePhase::Exited, Some(ReasonCode::TimedOut)));
}

#[test]
fn an_unhealthy_instance_is_restarted_and_says_why() {
    let mut life = running(true, None, false);
    assert_eq!(life.handle(at(1), Event::Unhealthy("no answer".into())), Some(Action::Terminate));
    assert!(!life.ready());
    life.handle(at(2), exit(2, 143));
    assert_eq!((life.phase(), reason(&life)), (InstancePhase::BackOff, Some(ReasonCode::Unhealthy)));
    assert_eq!(life.handle(at(2), Event::Deadline), Some(Action::Start));
}

#[test]
fn running_out_of_memory_is_named() {
    let mut life = running(false, None, false);
    life.handle(
        at(1),
        Event::Exited(Exit { exit_code: 137, signal: Some(9), oom_killed: true, ended_at: at(1) }),
    );
    assert_eq!(reason(&life), Some(ReasonCode::OutOfMemory));
}

#[test]
fn image_failures_are_retried_with_their_reason_unless_they_are_for_ever() {
    let failed = |permanent| Event::ImageFailed {
        reason: ReasonCode::RegistryUnreachable,
        message: "no answer".into(),
        permanent,
    };
    let mut life = Lifecycle::new(true, None, false, 0);
    life.handle(at(0), Event::Begin);
    assert_eq!(life.handle(at(0), failed(false)), None);
    assert_eq!(
        (life.phase(), reason(&life)),
        (InstancePhase::Pulling, Some(ReasonCode::RegistryUnreachable))
    );
    assert_eq!(life.deadline(), Some(at(250)));
    assert_eq!(life.handle(at(250), Event::Deadline), Some(Action::Pull));
    assert_eq!(reason(&life), Some(ReasonCode::RegistryUnreachable));
    life.handle(at(250), failed(false));
    assert_eq!(life.deadline(), Some(at(750)));
    life.handle(at(750), Event::Deadline);
    life.handle(at(750), failed(true));
    assert_eq!(life.phase(), InstancePhase::Failed);
    assert_eq!(life.handle(at(751), Event::Removed), Some(Action::Clean));
}

#[test]
fn a_failed_start_is_final_for_a_job_and_retried_for_a_deployment() {
    for (restart, phase) in [(false, InstancePhase::Failed), (true, InstancePhase::BackOff)] {
        let mut life = Lifecycle::new(restart, None, false, 0);
        life.handle(at(0), Event::Begin);
        life.handle(at(0), Event::ImageReady);
        life.handle(at(0), Event::StartFailed { message: "no such file".into() });
        assert_eq!((life.phase(), reason(&life)), (phase, Some(ReasonCode::StartFailed)));
    }
}

#[test]
fn a_removal_is_carried_out_from_every_state() {
    // Pulling and waiting: at once.
    let mut life = Lifecycle::new(true, None, false, 0);
    life.handle(at(0), Event::Begin);
    assert_eq!(life.handle(at(0), Event::Removed), Some(Action::Clean));
    // Starting: as soon as it is known what was started.
    let mut life = Lifecycle::new(true, None, false, 0);
    life.handle(at(0), Event::Begin);
    life.handle(at(0), Event::ImageReady);
    assert_eq!(life.handle(at(0), Event::Removed), None);
    assert_eq!(life.handle(at(1), Event::Started { at: at(1) }), Some(Action::Terminate));
    assert_eq!(life.handle(at(2), exit(2, 0)), Some(Action::Clean));
    // Running, and killed when it doesn't listen.
    let mut life = running(true, None, false);
    assert_eq!(life.handle(at(0), Event::Removed), Some(Action::Terminate));
    assert_eq!(life.phase(), InstancePhase::Stopping);
    assert_eq!(life.handle(at(5_000), Event::Deadline), Some(Action::Kill));
    assert_eq!(life.handle(at(5_001), exit(5_001, 137)), Some(Action::Clean));
    // Already ending for another reason.
    let mut life = running(true, None, false);
    life.handle(at(0), Event::Unhealthy("x".into()));
    assert_eq!(life.handle(at(0), Event::Removed), None);
    assert_eq!(life.handle(at(1), exit(1, 0)), Some(Action::Clean));
}

#[test]
fn an_adopted_instance_goes_on_from_what_is_found() {
    let mut life = Lifecycle::new(true, None, false, 4);
    assert_eq!(life.handle(at(0), Event::Adopt), None);
    life.handle(at(0), Event::Started { at: at(-5_000) });
    assert!(life.ready());
    assert_eq!(life.restarts, 4);
    // After its end the image has to be found again, since the earlier agent knew it and this one doesn't.
    life.handle(at(1), exit(1, 1));
    assert_eq!(life.handle(at(1), Event::Deadline), Some(Action::Pull));

    let mut job = Lifecycle::new(false, Some(1_000), false, 0);
    job.handle(at(0), Event::Adopt);
    job.handle(at(0), Event::Started { at: at(-5_000) });
    assert_eq!(job.deadline(), Some(at(-4_000)), "the time before counts");

    let mut job = Lifecycle::new(false, None, false, 0);
    job.handle(at(0), Event::Adopt);
    job.handle(at(0), exit(-9, 7));
    assert_eq!(job.phase(), InstancePhase::Exited);

    let mut fresh = Lifecycle::new(false, None, false, 0);
    fresh.handle(at(0), Event::Adopt);
    assert_eq!(fresh.handle(at(0), Event::Begin), Some(Action::Pull));
}
