//! The order of the queue against an oracle that looks through everything at each step, and compares fractions exactly.

use anyplace_model::{Bytes, GpuBlock, Held, JobName, Team, TeamSettings};
use anyplace_seed::{Seed, rounds};
use jiff::SignedDuration;

use super::*;

const GIB: u64 = 1 << 30;

fn team(name: &str) -> Team {
    name.parse().unwrap()
}

fn work(name: &str, team: &str, more: &str) -> QueuedJob {
    let mut value = serde_json::json!({"kind": "Job", "name": name, "team": team, "image": "work:1",
        "resources": {"cpu": "1", "memory": "1Gi"}});
    let more: serde_json::Value = serde_json::from_str(more).unwrap();
    value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let spec: JobSpec = serde_json::from_value(value).unwrap();
    QueuedJob { name: spec.name.clone(), spec, refused: BTreeMap::new() }
}

/// One location with one machine.
fn machine(cpu: u64, memory_gib: u64, gpus: u32) -> State {
    let mut advert = advert();
    advert.machines = 1;
    (advert.cpu, advert.free_cpu, advert.largest_free_cpu) = (MilliCpu(cpu), MilliCpu(cpu), MilliCpu(cpu));
    let memory = Bytes(memory_gib * GIB);
    (advert.memory, advert.free_memory, advert.largest_free_memory) = (memory, memory, memory);
    let disk = Bytes(1 << 50);
    (advert.free_disk, advert.largest_free_disk) = (disk, disk);
    if gpus > 0 {
        advert.gpus = BTreeMap::from([("L4".into(), gpus)]);
        let memory = Bytes(24 * GIB);
        let block =
            GpuBlock { model: "L4".into(), memory, whole: true, count: gpus, most_in_one_machine: gpus };
        advert.gpu_blocks = vec![block];
    }
    let mut state = State::default();
    state.locations.insert(id("ams"), location(advert));
    state
}

/// Names of those that are placed, in their order, and of those that wait, by position.
fn outcome(state: &State) -> (Vec<String>, Vec<(String, Option<Timestamp>)>) {
    let (mut placed, mut waiting) = (Vec::new(), Vec::new());
    for decision in plan_jobs(state, noon()) {
        match decision.outcome {
            JobOutcome::Place(_) => placed.push(decision.job.to_string()),
            JobOutcome::Wait { position, predicted_start, .. } => {
                waiting.push((decision.job.to_string(), predicted_start));
                assert_eq!(position as usize, waiting.len());
            }
        }
    }
    (placed, waiting)
}

fn placed(state: &State) -> Vec<String> {
    outcome(state).0
}

#[test]
fn teams_take_turns_by_what_they_hold_and_their_weight() {
    let mut state = machine(4_000, 64, 0);
    state.queue = (0..4).map(|index| work(&format!("a{index}"), "ants", "{}")).collect();
    state.queue.extend((0..4).map(|index| work(&format!("b{index}"), "bees", "{}")));
    assert_eq!(placed(&state), ["a0", "b0", "a1", "b1"]);
    let waiting: Vec<String> = outcome(&state).1.into_iter().map(|(name, _)| name).collect();
    assert_eq!(waiting, ["a2", "b2", "a3", "b3"]);
    // What ants hold already counts; memory does, where it is the larger part.
    let held = Held { cpu: MilliCpu(0), memory: Bytes(40 * GIB), gpus: 0 };
    state.teams.insert(team("ants"), TeamState { held, ..TeamState::default() });
    assert_eq!(placed(&state), ["b0", "b1", "b2", "a0"]);
    state.teams.get_mut(&team("ants")).unwrap().settings.weight = 10;
    assert_eq!(placed(&state), ["b0", "a0", "a1", "a2"]);
}

#[test]
fn priorities_order_a_team_and_deadlines_order_equals() {
    let mut state = machine(3_000, 64, 0);
    state.queue = vec![
        work("low", "ants", r#"{"priority": 10}"#),
        work("plain", "ants", "{}"),
        work("late", "ants", r#"{"deadline": "2026-11-26T12:00:00Z"}"#),
        work("soon", "ants", r#"{"deadline": "2026-11-25T12:00:00Z"}"#),
        work("high", "ants", r#"{"priority": 90}"#),
        // Another team's priority is its own affair.
        work("bee", "bees", r#"{"priority": 0}"#),
    ];
    assert_eq!(placed(&state), ["high", "bee", "soon"]);
    let waiting: Vec<String> = outcome(&state).1.into_iter().map(|(name, _)| name).collect();
    assert_eq!(waiting, ["late", "plain", "low"]);
}

#[test]
fn a_quota_and_a_deadline_keep_jobs_from_starting() {
    let mut state = machine(4_000, 64, 0);
    state.queue = vec![
        work("first", "ants", "{}"),
        work("second", "ants", "{}"),
        work("missed", "bees", r#"{"deadline": "2026-11-24T12:00:00Z"}"#),
    ];
    let settings = TeamSettings { max_cpu: Some(MilliCpu(1_500)), ..TeamSettings::default() };
    state.teams.insert(team("ants"), TeamState { settings, ..TeamState::default() });
    assert_eq!(placed(&state), ["first"]);
    let name = |name: &str| -> JobName { name.parse().unwrap() };
    let why = explain_job(&state, &name("second"), noon()).unwrap();
    assert_eq!(why.refusals[0].reason, ReasonCode::OverQuota);
    assert_eq!(why.refusals[0].message, "1 cpu asked for beside what team ants holds, its quota is 1500m");
    let why = explain_job(&state, &name("missed"), noon()).unwrap();
    assert_eq!(why.refusals[0].reason, ReasonCode::DeadlinePassed);
    assert!(why.summary.contains("it fails unless it starts by 2026-11-24T12:00:00Z"), "{}", why.summary);
    assert!(why.summary.contains("(priority 50 in team bees, which holds 0.0 %)"), "{}", why.summary);
}

#[test]
fn a_window_is_predicted_only_for_as_many_as_it_has_room_for() {
    let mut state = machine(2_000, 64, 0);
    let settings = &mut state.locations.get_mut(&id("ams")).unwrap().settings;
    settings.off_peak = Some("22:00-06:00".parse().unwrap());
    let night = r#"{"scheduling_policy": "off-peak"}"#;
    state.queue = (0..3).map(|index| work(&format!("n{index}"), "ants", night)).collect();
    let opens: Option<Timestamp> = Some("2026-11-24T22:00:00Z".parse().unwrap());
    let expected = [("n0", opens), ("n1", opens), ("n2", None)].map(|(name, at)| (name.to_string(), at));
    assert_eq!(outcome(&state).1, expected);
    // Not where it opens after the deadline, and then for the next.
    state.queue[0].spec.deadline = opens;
    let expected = [("n0", None), ("n1", opens), ("n2", opens)].map(|(name, at)| (name.to_string(), at));
    assert_eq!(outcome(&state).1, expected);
}

#[test]
fn head_room_stays_free_and_little_use_is_off_peak() {
    let mut state = machine(4_000, 64, 2);
    state.job_limits = JobLimits { headroom_percent: 50, off_peak_below_percent: 0 };
    let gpu = r#"{"resources": {"cpu": "100m", "gpu": {"count": 1}}}"#;
    state.queue = (0..3).map(|index| work(&format!("c{index}"), "ants", "{}")).collect();
    state.queue.extend((0..2).map(|index| work(&format!("g{index}"), "bees", gpu)));
    // Two cores, one GPU: and the one that needs a GPU needs a bit of a core, too.
    assert_eq!(placed(&state), ["c0", "g0"]);
    let why = explain_job(&state, &"g1".parse().unwrap(), noon()).unwrap();
    let words = "ams: with it, 2 of 2 GPUs would be reserved, and 50 % are kept free for deployments";
    assert_eq!((why.refusals[0].reason, &*why.refusals[0].message), (ReasonCode::Headroom, words));

    let night = r#"{"scheduling_policy": "off-peak"}"#;
    state.queue = (0..4).map(|index| work(&format!("n{index}"), "ants", night)).collect();
    assert_eq!(placed(&state), [""; 0]);
    state.job_limits = JobLimits { headroom_percent: 0, off_peak_below_percent: 75 };
    // The third would be 75 %, which isn't less.
    assert_eq!(placed(&state), ["n0", "n1"]);
    assert!(is_off_peak(&state.locations[&id("ams")], state.job_limits, noon()));
    state.job_limits.off_peak_below_percent = 0;
    assert!(!is_off_peak(&state.locations[&id("ams")], state.job_limits, noon()));
}

/// A fraction, and which of two is less.
type Fraction = (u128, u128);

fn less(a: Fraction, b: Fraction) -> bool {
    a.0 * b.1 < b.0 * a.1
}

#[derive(Clone, Copy, Default)]
struct Sum {
    cpu: u64,
    memory: u64,
    gpus: u64,
}

impl Sum {
    fn of(job: &QueuedJob) -> Self {
        let asked = &job.spec.resources;
        let gpus = asked.gpu.as_ref().map_or(0, |gpu| u64::from(gpu.count));
        Self { cpu: asked.cpu.0, memory: asked.memory.0, gpus }
    }

    fn plus(self, other: Self) -> Self {
        Self { cpu: self.cpu + other.cpu, memory: self.memory + other.memory, gpus: self.gpus + other.gpus }
    }

    /// What is left of it for jobs.
    fn less_headroom(self, percent: u8) -> Self {
        let left = |all: u64| all - all * u64::from(percent) / 100;
        Self { cpu: left(self.cpu), memory: left(self.memory), gpus: left(self.gpus) }
    }

    fn within(self, all: Self) -> bool {
        self.cpu <= all.cpu && self.memory <= all.memory && self.gpus <= all.gpus
    }
}

/// Whoever is next by the rules, looked for among all that are left.
struct Oracle<'a> {
    state: &'a State,
    all: Sum,
    used: Sum,
    left: Vec<usize>,
    held: BTreeMap<Team, Sum>,
}

impl Oracle<'_> {
    fn share(&self, team: &Team) -> Fraction {
        let held = self.held.get(team).copied().unwrap_or_default();
        let mut share: Fraction = (0, 1);
        for (part, all) in
            [(held.cpu, self.all.cpu), (held.memory, self.all.memory), (held.gpus, self.all.gpus)]
        {
            let fraction = if part == 0 {
                (0, 1)
            } else if all == 0 {
                (1, 1)
            } else {
                (u128::from(part), u128::from(all))
            };
            if less(share, fraction) {
                share = fraction;
            }
        }
        let weight = self.state.teams.get(team).map_or(1, |team| team.settings.weight);
        (share.0, share.1 * u128::from(weight))
    }

    /// Whether `a` goes before `b`.
    fn before(&self, a: usize, b: usize) -> bool {
        let (one, other) = (&self.state.queue[a].spec, &self.state.queue[b].spec);
        let sooner = match (one.deadline, other.deadline) {
            (Some(a), Some(b)) if a != b => Some(a < b),
            (Some(_), None) => Some(true),
            (None, Some(_)) => Some(false),
            _ => None,
        };
        if one.team == other.team {
            if one.priority != other.priority {
                return one.priority > other.priority;
            }
            return sooner.unwrap_or(a < b);
        }
        let (mine, theirs) = (self.share(&one.team), self.share(&other.team));
        if less(mine, theirs) || less(theirs, mine) {
            return less(mine, theirs);
        }
        sooner.unwrap_or(a < b)
    }

    /// The first of each team, and the first of those.
    fn next(&mut self) -> Option<usize> {
        let mut firsts: BTreeMap<Team, usize> = BTreeMap::new();
        for index in self.left.iter().copied() {
            let first = firsts.entry(self.state.queue[index].spec.team.clone()).or_insert(index);
            if self.before(index, *first) {
                *first = index;
            }
        }
        let mut best: Option<usize> = None;
        for index in firsts.into_values() {
            if best.is_none_or(|best| self.before(index, best)) {
                best = Some(index);
            }
        }
        self.left.retain(|index| Some(*index) != best);
        best
    }

    fn quota_allows(&self, held: &BTreeMap<Team, Sum>, job: &QueuedJob) -> bool {
        let Some(team) = self.state.teams.get(&job.spec.team) else { return true };
        let (asked, quota) = (Sum::of(job), &team.settings);
        let then = held.get(&job.spec.team).copied().unwrap_or_default().plus(asked);
        quota.max_cpu.is_none_or(|max| then.cpu <= max.0)
            && quota.max_memory.is_none_or(|max| then.memory <= max.0)
            && (asked.gpus == 0 || quota.max_gpus.is_none_or(|max| then.gpus <= u64::from(max)))
    }
}

fn count(held: &mut BTreeMap<Team, Sum>, job: &QueuedJob) {
    let sum = held.entry(job.spec.team.clone()).or_default();
    *sum = sum.plus(Sum::of(job));
}

fn expected(
    state: &State,
    all: Sum,
    opens: Option<Timestamp>,
) -> (Vec<String>, Vec<(String, Option<Timestamp>)>) {
    let sum = |team: &TeamState| Sum {
        cpu: team.held.cpu.0,
        memory: team.held.memory.0,
        gpus: u64::from(team.held.gpus),
    };
    let held: BTreeMap<Team, Sum> =
        state.teams.iter().map(|(name, team)| (name.clone(), sum(team))).collect();
    let left = (0..state.queue.len()).collect();
    let (limits, most) = (state.job_limits, all.less_headroom(state.job_limits.headroom_percent));
    let mut oracle = Oracle { state, all, used: Sum::default(), left, held };
    let (mut placed, mut waiting, mut rest) = (Vec::new(), Vec::new(), Vec::new());
    while let Some(index) = oracle.next() {
        let job = &state.queue[index];
        let then = oracle.used.plus(Sum::of(job));
        let below = |used: u64, all: u64| used * 100 / all < u64::from(limits.off_peak_below_percent);
        let open = job.spec.scheduling_policy == anyplace_model::SchedulingPolicy::Anytime
            || (below(then.cpu, all.cpu) && below(then.memory, all.memory));
        let in_time = job.spec.deadline.is_none_or(|deadline| deadline > noon());
        let fits = then.within(most);
        if open && in_time && fits && oracle.quota_allows(&oracle.held, job) {
            oracle.used = oracle.used.plus(Sum::of(job));
            count(&mut oracle.held, job);
            placed.push(job.name.to_string());
        } else {
            rest.push(index);
        }
    }
    oracle.left = rest;
    let mut really = oracle.held.clone();
    while let Some(index) = oracle.next() {
        let job = &state.queue[index];
        count(&mut oracle.held, job);
        let waits_for_night = job.spec.scheduling_policy != anyplace_model::SchedulingPolicy::Anytime;
        let at = opens.filter(|opens| {
            waits_for_night
                && job.spec.deadline.is_none_or(|deadline| *opens < deadline)
                && oracle.used.plus(Sum::of(job)).within(most)
                && oracle.quota_allows(&really, job)
        });
        if at.is_some() {
            oracle.used = oracle.used.plus(Sum::of(job));
            count(&mut really, job);
        }
        waiting.push((job.name.to_string(), at));
    }
    (placed, waiting)
}

fn random(seed: &mut Seed) -> (State, Sum, Option<Timestamp>) {
    let (cpu, memory, gpus) = (1 + seed.below(12), 1 + seed.below(12), seed.below(4));
    let mut state = machine(cpu * 1_000, memory, gpus as u32);
    let opens = seed.one_in(2).then(|| {
        state.locations.get_mut(&id("ams")).unwrap().settings.off_peak = Some("20:00-21:00".parse().unwrap());
        "2026-11-24T20:00:00Z".parse().unwrap()
    });
    state.job_limits = JobLimits {
        headroom_percent: seed.pick(&[0, 0, 10, 25]),
        off_peak_below_percent: seed.pick(&[0, 0, 40, 80]),
    };
    let teams = ["ants", "bees", "cats"];
    for name in teams {
        if seed.one_in(3) {
            continue;
        }
        let held = Held {
            cpu: MilliCpu(seed.below(4) * 500),
            memory: Bytes(seed.below(4) * GIB),
            gpus: seed.below(2) as u32,
        };
        let bound = |seed: &mut Seed| seed.one_in(3).then(|| seed.below(8));
        let settings = TeamSettings {
            weight: 1 + seed.below(3) as u32,
            max_cpu: bound(seed).map(|cores| MilliCpu(cores * 1_000)),
            max_memory: bound(seed).map(|size| Bytes(size * GIB)),
            max_gpus: bound(seed).map(|count| count as u32),
            max_queued: None,
        };
        state.teams.insert(team(name), TeamState { settings, held });
    }
    for index in 0..seed.below(14) {
        let mut job = work(&format!("j{index}"), seed.pick(&teams), "{}");
        job.spec.priority = seed.pick(&[50, 50, 50, 10, 90]);
        job.spec.resources.cpu = MilliCpu((1 + seed.below(6)) * 500);
        job.spec.resources.memory = Bytes((1 + seed.below(4)) * GIB);
        if seed.one_in(4) {
            let gpu = serde_json::json!({"count": 1 + seed.below(2)});
            job.spec.resources.gpu = Some(serde_json::from_value(gpu).unwrap());
        }
        if seed.one_in(3) {
            job.spec.scheduling_policy = anyplace_model::SchedulingPolicy::OffPeak;
        }
        if seed.one_in(3) {
            job.spec.deadline = Some(noon() + SignedDuration::from_hours(seed.below(16) as i64 - 2));
        }
        state.queue.push(job);
    }
    (state, Sum { cpu: cpu * 1_000, memory: memory * GIB, gpus }, opens)
}

#[test]
fn turns_positions_and_predictions_are_those_of_the_oracle() {
    let mut seeds = Seed::from_env();
    for _ in 0..rounds(2_000, 100_000) {
        let mut seed = seeds.fork();
        let (state, all, opens) = random(&mut seed);
        assert_eq!(outcome(&state), expected(&state, all, opens), "{state:#?}");
    }
}
