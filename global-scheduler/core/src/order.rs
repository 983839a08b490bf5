//! In which order waiting jobs get their turn: the team that holds the least of its part goes first, with the first of
//! its own jobs (docs/decisions/0019-turns.md).

use std::collections::{BTreeMap, BTreeSet};

use anyplace_model::{Advert, Held, ReasonCode, Refusal, Team};
use jiff::Timestamp;

use crate::{Liveness, QueuedJob, State, room::one};

/// Of what all locations have, for which a team's share is one whole. Fine enough that divided by the largest weight it
/// still tells a thousandth of a core among millions.
const WHOLE: u128 = 1_000_000_000_000;

/// What all locations that report have.
#[derive(Debug, Clone, Copy, Default)]
pub struct Totals {
    cpu: u64,
    memory: u64,
    gpus: u64,
}

impl Totals {
    /// The sum of adverts.
    pub fn new<'a>(adverts: impl Iterator<Item = &'a Advert>) -> Self {
        adverts.fold(Self::default(), |sum, advert| Self {
            cpu: sum.cpu.saturating_add(advert.cpu.0),
            memory: sum.memory.saturating_add(advert.memory.0),
            gpus: sum.gpus.saturating_add(advert.gpus.values().map(|count| u64::from(*count)).sum()),
        })
    }

    fn of(state: &State) -> Self {
        let there = state.locations.values().filter(|location| location.liveness != Liveness::Lost);
        Self::new(there.filter_map(|location| location.advert.as_ref()))
    }

    /// The dominant share: of that resource of which it is the largest part.
    fn share(&self, held: &Held) -> u128 {
        // Of what nobody has (any more), whatever is held is the whole.
        let part = |held: u64, all: u64| {
            if held == 0 {
                0
            } else {
                (u128::from(held) * WHOLE).checked_div(u128::from(all)).unwrap_or(WHOLE)
            }
        };
        part(held.cpu.0, self.cpu)
            .max(part(held.memory.0, self.memory))
            .max(part(u64::from(held.gpus), self.gpus))
    }

    /// The dominant share in thousandths, rounded up.
    pub fn share_permille(&self, held: &Held) -> u32 {
        u32::try_from(self.share(held).div_ceil(WHOLE / 1_000)).unwrap_or(u32::MAX)
    }
}

/// Order among the teams whose turn it could be: the smallest is next.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Turn<'a> {
    /// Dominant share by weight.
    share: u128,
    /// Deadline of the team's first job.
    deadline: Timestamp,
    /// Place of that job among all submissions.
    submitted: usize,
    /// Whose turn it is.
    team: &'a Team,
}

/// The waiting jobs of one team.
#[derive(Debug)]
struct Line {
    /// The first is at the end.
    jobs: Vec<usize>,
    /// What the team's jobs hold.
    held: Held,
    weight: u128,
}

/// Waiting jobs, in the order of their turns.
pub(crate) struct Order<'a> {
    state: &'a State,
    totals: Totals,
    lines: BTreeMap<&'a Team, Line>,
    turns: BTreeSet<Turn<'a>>,
    /// Whose turn it was: it comes again once what it took is known.
    last: Option<&'a Team>,
}

impl<'a> Order<'a> {
    /// Of these jobs of the queue, beside what teams hold.
    pub(crate) fn new(
        state: &'a State,
        held: &BTreeMap<&'a Team, Held>,
        jobs: impl Iterator<Item = usize>,
    ) -> Self {
        let mut lines: BTreeMap<&Team, Line> = BTreeMap::new();
        for index in jobs {
            let team = &state.queue[index].spec.team;
            let weight = state.teams.get(team).map_or(1, |team| u128::from(team.settings.weight.max(1)));
            let held = held.get(team).copied().unwrap_or_default();
            lines.entry(team).or_insert(Line { jobs: Vec::new(), held, weight }).jobs.push(index);
        }
        for line in lines.values_mut() {
            line.jobs.sort_by_key(|index| {
                let spec = &state.queue[*index].spec;
                (std::cmp::Reverse(spec.priority), deadline(&state.queue[*index]), *index)
            });
            line.jobs.reverse();
        }
        let mut order = Self { state, totals: Totals::of(state), lines, turns: BTreeSet::new(), last: None };
        let teams: Vec<&Team> = order.lines.keys().copied().collect();
        teams.into_iter().for_each(|team| order.enter(team));
        order
    }

    fn enter(&mut self, team: &'a Team) {
        let Some(line) = self.lines.get(team) else { return };
        let Some(first) = line.jobs.last() else { return };
        self.turns.insert(Turn {
            share: self.totals.share(&line.held) / line.weight,
            deadline: deadline(&self.state.queue[*first]),
            submitted: *first,
            team,
        });
    }

    /// The next job, by its place in the queue.
    pub(crate) fn next(&mut self) -> Option<usize> {
        if let Some(team) = self.last.take() {
            self.enter(team);
        }
        let turn = self.turns.pop_first()?;
        self.last = Some(turn.team);
        self.lines.get_mut(turn.team)?.jobs.pop()
    }

    /// Counts the job among what its team holds.
    pub(crate) fn hold(&mut self, job: &QueuedJob) {
        if let Some(line) = self.lines.get_mut(&job.spec.team) {
            line.held.add(&job.spec.resources);
        }
    }
}

/// Its deadline; later than any where it has none.
fn deadline(job: &QueuedJob) -> Timestamp {
    job.spec.deadline.unwrap_or(Timestamp::MAX)
}

/// What teams hold before anything is planned.
pub(crate) fn held(state: &State) -> BTreeMap<&Team, Held> {
    state.teams.iter().map(|(name, team)| (name, team.held)).collect()
}

/// Why the team's quota allows no such job beside what is held; nothing where it does.
pub(crate) fn over_quota(state: &State, job: &QueuedJob, held: Option<&Held>) -> Option<Refusal> {
    let team = &job.spec.team;
    let settings = &state.teams.get(team)?.settings;
    let (field, wanted, quota) = settings.exceeded(held.copied().unwrap_or_default(), &job.spec.resources)?;
    let text = format!("{wanted} {field} asked for beside what team {team} holds, its quota is {quota}");
    Some(one(ReasonCode::OverQuota, text))
}

/// What decides about the job's turn, as a phrase.
pub(crate) fn describe(state: &State, job: &QueuedJob) -> String {
    let team = &job.spec.team;
    let (held, weight) = match state.teams.get(team) {
        Some(team) => (team.held, team.settings.weight),
        None => (Held::default(), 1),
    };
    let permille = Totals::of(state).share_permille(&held);
    let weight = if weight == 1 { String::new() } else { format!(" with weight {weight}") };
    format!(
        "priority {} in team {team}, which holds {}.{} %{weight}",
        job.spec.priority,
        permille / 10,
        permille % 10
    )
}
