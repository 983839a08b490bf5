//! The agent on a real machine: real containers (runc), network namespaces, cgroups and packets. Needs root, runc,
//! iproute2, nftables and busybox-static.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod bed;
mod control;
mod fabric;
mod images;
mod ipv6;
mod marks;

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use anyplace_model::{
    Bytes, Check, DurationMs, Health, HttpCheck, ImageState, InstancePhase, MachineDesired, ReasonCode,
};
use bed::{MACHINE, METADATA, OPEN, PROTECTED, TOKEN, assignment};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

fn http_check() -> Check {
    let http = HttpCheck { path: "/".into(), port: 8080.try_into().unwrap() };
    Check {
        http: Some(http),
        tcp: None,
        exec: None,
        interval: DurationMs(200),
        timeout: DurationMs(1_000),
        failures: 2,
        initial_delay: DurationMs(0),
    }
}

fn web(name: &str, host: u8) -> anyplace_model::Assignment {
    let serve = ["/bin/httpd", "-f", "-p", "8080", "-h", "/www"];
    let mut web = assignment(name, host, true, &serve);
    web.health = Health { liveness: None, readiness: Some(http_check()) };
    web
}

fn kill_hard(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

/// What a shell in the network of a process says.
fn in_network_of(pid: i32, script: &str) -> String {
    let pid = pid.to_string();
    let output = Command::new("nsenter").args(["-t", &pid, "-n", "sh", "-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn reason(status: &anyplace_model::InstanceStatus) -> Option<ReasonCode> {
    status.reason.as_ref().map(|reason| reason.reason)
}

#[test]
fn a_web_server_serves_restarts_outlives_the_agent_and_leaves_nothing() {
    bed::with(|mut bed| async move {
        bed.start_agent();
        bed.feed.set("images/busybox:v1", MachineDesired::Image { image: "busybox:v1".into(), priority: 50 });
        let begun = Instant::now();
        bed.want(web("web-1", 65));
        bed.until_ready("web-1", 0).await;
        eprintln!("ready after {:?}", begun.elapsed());
        let last = bed.reports().pop().unwrap();
        assert_eq!(last.images.get("busybox:v1"), Some(&ImageState::Warm));
        assert!(last.conditions.is_empty() && !last.isolations.is_empty(), "{last:?}");
        let answer = bed.get_from_fabric("10.9.1.65".parse().unwrap(), 8080).unwrap();
        assert!(answer.ends_with("hello\n"), "{answer}");

        // Its end is known at once, and it is back soon.
        let known = bed.reports().len();
        let begun = Instant::now();
        kill_hard(bed.init_pid("web-1"));
        bed.until("web-1", "unready", |status| status.is_some_and(|status| !status.ready)).await;
        eprintln!("reported unready after {:?} and {} reports", begun.elapsed(), bed.reports().len() - known);
        let status = bed.until_ready("web-1", 1).await;
        eprintln!("ready again after {:?}", begun.elapsed());
        assert_eq!(status.exit_code, Some(137));

        // Without the agent it goes on; the next agent finds it, and never says that it isn't ready.
        let pid = bed.init_pid("web-1");
        bed.abort_agent().await;
        let known = bed.reports().len();
        assert!(bed.get_from_fabric("10.9.1.65".parse().unwrap(), 8080).is_ok());
        bed.start_agent();
        let epoch = bed.reports()[known - 1].epoch;
        while bed.reports().last().unwrap().epoch == epoch {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        bed.until_ready("web-1", 1).await;
        assert_eq!(bed.init_pid("web-1"), pid);
        for report in &bed.reports()[known..] {
            assert!(report.instances[0].ready, "{report:?}");
        }

        // A container that an earlier agent made has no IPv6; the next one gives it what it lacks.
        let mark = bed.data().join("instances/web-1/network");
        assert!(!fs::read(&mark).unwrap().is_empty());
        bed.abort_agent().await;
        in_network_of(pid, "echo 1 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6");
        fs::write(&mark, b"").unwrap();
        bed.start_agent();
        tokio::time::timeout(Duration::from_secs(20), async {
            while fs::read(&mark).unwrap().is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
        .unwrap();
        let shown = in_network_of(pid, "ip -6 addr show dev eth0; ip -6 route; ip -6 neigh");
        for part in
            ["fd5b:27d6:914c::a09:141/128", "default via fe80::61 dev eth0", "fe80::61 dev eth0 lladdr"]
        {
            assert!(shown.contains(part) && !shown.contains("tentative"), "{part}: {shown}");
        }
        bed.until_ready("web-1", 1).await;
        assert_eq!(bed.init_pid("web-1"), pid);

        // A shim that is killed takes its container along, and that counts as an end.
        kill_hard(bed.shim_pid("web-1"));
        bed.until_ready("web-1", 2).await;
        assert!(fs::metadata(format!("/proc/{pid}/ns/net")).is_err(), "the old container still runs");

        // Draining takes the traffic away and nothing else.
        let mut draining = web("web-1", 65);
        draining.draining = true;
        bed.want(draining);
        let status = bed.until_phase("web-1", InstancePhase::Stopping).await;
        assert!(!status.ready);
        assert!(bed.get_from_fabric("10.9.1.65".parse().unwrap(), 8080).is_ok());

        bed.unwant("web-1");
        bed.until_gone("web-1").await;
        assert_eq!(bed.leftovers(), Vec::<String>::new());
        bed.stop_agent().await;
    });
}

#[test]
fn a_sandboxed_web_server_has_a_kernel_of_its_own() {
    bed::with(|mut bed| async move {
        bed.start_agent();
        let mut web = web("boxed", 80);
        let script = "cat /proc/version; exec /bin/httpd -f -p 8080 -h /www";
        web.command = Some(["/bin/sh", "-c", script].map(str::to_owned).to_vec());
        web.isolation = anyplace_model::Isolation::Sandbox;
        web.resources.memory = Bytes(256 << 20);
        bed.want(web);
        bed.until_ready("boxed", 0).await;
        let answer = bed.get_from_fabric("10.9.1.80".parse().unwrap(), 8080).unwrap();
        assert!(answer.ends_with("hello\n"), "{answer}");
        let (_, _, log) = bed.agent_get("/v1/instances/boxed/logs", TOKEN).await;
        let host = fs::read_to_string("/proc/version").unwrap();
        assert!(log.contains("Linux version") && !log.contains(host.trim()), "{log}");
        bed.unwant("boxed");
        bed.until_gone("boxed").await;
        assert_eq!(bed.leftovers(), Vec::<String>::new());
        bed.stop_agent().await;
    });
}

#[test]
fn jobs_end_once_with_their_status_reason_and_log() {
    bed::with(|mut bed| async move {
        bed.start_agent();
        let sh = |script| ["/bin/sh", "-c", script];
        bed.want(assignment(
            "fails",
            66,
            false,
            &sh("echo out; echo err >&2; id; cat /proc/self/status; exit 3"),
        ));
        let mut slow =
            assignment("slow", 67, false, &sh("trap 'exit 9' TERM; while true; do sleep 0.05; done"));
        slow.timeout_ms = Some(300);
        bed.want(slow);
        let mut greedy = assignment("greedy", 68, false, &sh("x=aaaaaaaa; while true; do x=$x$x; done"));
        greedy.resources.memory = Bytes(16 << 20);
        bed.want(greedy);
        bed.want(assignment("absent", 69, false, &["/bin/absent"]));
        let mut unknown = assignment("unknown", 70, false, &["/bin/true"]);
        unknown.image = "nothing:v1".into();
        bed.want(unknown);

        let status = bed.until_phase("fails", InstancePhase::Exited).await;
        assert_eq!((status.exit_code, reason(&status)), (Some(3), Some(ReasonCode::ExitedNonZero)));
        let status = bed.until_phase("slow", InstancePhase::Exited).await;
        assert_eq!((status.exit_code, reason(&status)), (Some(9), Some(ReasonCode::TimedOut)));
        let status = bed.until_phase("greedy", InstancePhase::Exited).await;
        assert_eq!((status.exit_code, reason(&status)), (Some(137), Some(ReasonCode::OutOfMemory)));
        let status = bed.until_phase("absent", InstancePhase::Failed).await;
        let refusal = status.reason.unwrap();
        assert_eq!(refusal.reason, ReasonCode::StartFailed);
        assert!(refusal.message.contains("no such file or directory"), "{}", refusal.message);
        let missing = |status: Option<&anyplace_model::InstanceStatus>| {
            status.and_then(reason) == Some(ReasonCode::ImageNotFound)
        };
        let status = bed.until("unknown", "without image", missing).await.unwrap();
        assert_eq!(status.phase, InstancePhase::Pulling);

        let path = "/v1/instances/fails/logs?follow=true";
        let (code, kind, log) = bed.agent_get(path, TOKEN).await;
        assert_eq!((code, &*kind), (200, "text/plain; charset=utf-8"));
        assert!(log.contains(" stdout out\n") && log.contains(" stderr err\n"), "{log}");
        assert!(log.contains("NoNewPrivs:\t1") && log.contains("Seccomp:\t2"), "{log}");
        // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, SYS_CHROOT.
        assert!(log.contains("CapBnd:\t00000000000405fb"), "{log}");
        let (code, kind, body) = bed.agent_get(path, "wrong").await;
        assert_eq!((code, &*kind), (401, "application/problem+json"), "{body}");
        let (code, _, body) = bed.agent_get("/v1/instances/nobody/logs", TOKEN).await;
        assert!(code == 404 && body.contains("anyplace get"), "{body}");
        let (code, _, body) = bed.agent_get("/v1/instances", TOKEN).await;
        assert!(code == 200 && body.contains("\"unknown\""), "{body}");

        // A new agent runs none of them again.
        bed.abort_agent().await;
        let known = bed.reports().len();
        bed.start_agent();
        while bed.reports().len() < known + 5 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        for (name, code) in [("fails", 3), ("slow", 9), ("greedy", 137)] {
            assert_eq!(bed.until_phase(name, InstancePhase::Exited).await.exit_code, Some(code));
        }
        bed.until_phase("absent", InstancePhase::Failed).await;
        let (_, _, again) = bed.agent_get("/v1/instances/fails/logs", TOKEN).await;
        assert_eq!(again, log);

        for name in ["fails", "slow", "greedy", "absent", "unknown"] {
            bed.unwant(name);
            bed.until_gone(name).await;
        }
        assert_eq!(bed.leftovers(), Vec::<String>::new());
        // The log stays.
        let (code, _, tail) = bed.agent_get("/v1/instances/fails/logs?tail=1", TOKEN).await;
        assert_eq!((code, tail.lines().count()), (200, 1));
        assert!(log.ends_with(&tail));
        bed.stop_agent().await;
    });
}

#[test]
fn instances_reach_the_world_but_not_the_machine_each_other_or_what_is_protected() {
    bed::with(|mut bed| async move {
        bed.start_agent();
        bed.want(web("web-1", 65));
        bed.until_ready("web-1", 0).await;
        bed.answer_on_the_machine();
        for (address, port) in
            [(PROTECTED, 9999), (METADATA, 9999), (MACHINE, 9999), ("10.9.1.65".parse().unwrap(), 8080)]
        {
            assert!(bed.get_from_fabric(address.into(), port).is_ok(), "nobody listens on {address} at all");
        }
        let script = format!(
            // Not wget: the static one crashes where there is no C library to look names up with.
            "for at in '{OPEN} 9999' '{PROTECTED} 9999' '10.9.1.1 9999' '169.254.1.1 9999' '{METADATA} 9999' \
             '10.9.1.65 8080'; do \
             echo \"$at: $(echo | nc -w 1 $at 2>/dev/null | grep . || echo nothing)\"; done; \
             mount -t tmpfs none /tmp || echo no mount"
        );
        bed.want(assignment("probe", 66, false, &["/bin/sh", "-c", &script]));
        bed.until_phase("probe", InstancePhase::Exited).await;
        let (_, _, log) = bed.agent_get("/v1/instances/probe/logs", TOKEN).await;
        assert!(log.contains(&format!("{OPEN} 9999: HTTP/1.0 200 OK")), "{log}");
        assert!(log.contains("seen as 10.9.1.1\n"), "{log}");
        for at in [
            &format!("{PROTECTED} 9999"),
            &format!("{METADATA} 9999"),
            "10.9.1.1 9999",
            "169.254.1.1 9999",
            "10.9.1.65 8080",
        ]
        .map(str::to_owned)
        {
            assert!(log.contains(&format!("{at}: nothing\n")), "{at} in {log}");
        }
        assert!(log.contains("no mount\n"), "{log}");
        bed.unwant("probe");
        bed.unwant("web-1");
        bed.until_gone("web-1").await;
        bed.until_gone("probe").await;
        assert_eq!(bed.leftovers(), Vec::<String>::new());
        bed.stop_agent().await;
    });
}

#[test]
fn an_unhealthy_instance_is_restarted() {
    bed::with(|mut bed| async move {
        bed.start_agent();
        // Serves for a moment and then only pretends to live.
        let script = "trap 'exit 0' TERM; httpd -p 8080 -h /www; sleep 1; kill -9 $(cat /proc/[0-9]*/stat | \
                      while read pid name rest; do [ \"$name\" = '(httpd)' ] && echo $pid; done); \
                      while true; do sleep 0.05; done";
        let mut web = assignment("web-1", 65, true, &["/bin/sh", "-c", script]);
        web.health = Health { liveness: Some(http_check()), readiness: Some(http_check()) };
        bed.want(web);
        bed.until_ready("web-1", 0).await;
        let unhealthy = |status: Option<&anyplace_model::InstanceStatus>| {
            status.and_then(reason) == Some(ReasonCode::Unhealthy)
        };
        bed.until("web-1", "unhealthy", unhealthy).await;
        bed.until_ready("web-1", 1).await;
    });
}

#[test]
fn an_agent_killed_at_any_point_leaves_nothing_after_the_next_start() {
    bed::with(|mut bed| async move {
        for round in 0_u64..12 {
            let name = format!("web-{round}");
            bed.want(web(&name, 65));
            bed.start_agent();
            tokio::time::sleep(Duration::from_millis(15 * round)).await;
            bed.abort_agent().await;
            if round % 3 == 2 {
                bed.feed.replace(std::collections::BTreeMap::new());
            }
        }
        // What only a crash in the middle of something leaves.
        fs::create_dir_all(bed.data().join("instances/half/merged")).unwrap();
        fs::write(bed.data().join("netns/half"), "").unwrap();
        bed.feed.replace(std::collections::BTreeMap::new());
        bed.start_agent();
        let begun = Instant::now();
        while !bed.leftovers().is_empty() && begun.elapsed() < Duration::from_secs(15) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(bed.leftovers(), Vec::<String>::new());
        bed.stop_agent().await;
    });
}

#[test]
fn without_a_location_scheduler_what_is_here_goes_on() {
    bed::with(|mut bed| async move {
        bed.start_agent();
        bed.want(web("web-1", 65));
        bed.until_ready("web-1", 0).await;
        bed.abort_agent().await;
        // The next agent can't reach a scheduler at all, and still looks after the instance.
        bed.scheduler = "http://127.0.0.1:1".into();
        bed.start_agent();
        let pid = bed.init_pid("web-1");
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(bed.init_pid("web-1"), pid);
        kill_hard(pid);
        let begun = Instant::now();
        while bed.get_from_fabric("10.9.1.65".parse().unwrap(), 8080).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(10), "it does not come back");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
}
