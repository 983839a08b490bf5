//! One location: its scheduler's process, its store, its machines, and the network between them.

mod machines;
mod verdict;

use std::{collections::BTreeMap, rc::Rc};

use anyplace_location_core::{
    Change, Plan, carry_out, desired, desired_of_stranger, plan, routes, wait_anew,
};
use anyplace_model::{MachineReport, RouteRecord};

use crate::{
    Fence,
    agent::{Agent, Desired},
    clock::Clock,
    fleet,
    oracle::Memory,
    scheduler::{Process, Store, TICK_MS, Wanted},
    things,
};

pub(crate) const MACHINES: usize = 3;
const HEARTBEAT_MS: u64 = 200;
/// Reports that are lost in a row: more of them are a partition, which is a fault by itself.
const MAX_LOSSES: u32 = 2;
/// Reports that come twice do so within this time.
const REPEAT_MS: u64 = 1_000;
/// A new agent reports within this time.
const SETTLING_MS: u64 = 400;
/// The least time on any scheduler's clock.
const BEGINNING_MS: u64 = 1_000_000;
/// What follows from a machine's absence does so within this time of its end.
const LOSS_MS: u64 = 4_000;
/// Clocks differ by at most this.
const SKEW_MS: u64 = 3_600_000;

/// What happens in a location.
pub(crate) enum Event {
    Start,
    /// The scheduler's process of this number looks at the time, or at everything.
    Tick(u64),
    Look(u64),
    /// A plan arrives at the store, and the store's answer at the process.
    Commit(Box<Transaction>),
    Answer(Box<Transaction>, Option<u64>),
    /// A report that was written at this time.
    Heard(u64, (u64, u64), Rc<MachineReport>),
    /// Of a machine: its agent reports, for the first time in a while or because something has changed.
    Beat(usize, u64),
    Changed(usize, u64),
    Tidy(usize),
    /// Its agent connects, and is told on a connection.
    Connect(usize, u64),
    Told(usize, u64, Rc<Desired>),
    /// It reads what came while it was frozen.
    Read(usize),
    Closed(usize, u64),
}

pub(crate) struct Transaction {
    process: u64,
    revision: u64,
    plan: Plan,
    changes: Vec<Change>,
}

pub(crate) struct Location {
    index: usize,
    pub(crate) store: Store,
    pub(crate) process: Option<Process>,
    processes: u64,
    names: u64,
    /// How far the clocks of the scheduler's machine and of the others are from the simulator's.
    skew_ms: u64,
    skews_ms: [u64; MACHINES],
    pub(crate) agents: Vec<Agent>,
    memory: Memory,
    /// Whether what is judged has changed since it was.
    unjudged: bool,
}

type Judged = Result<(), String>;

impl Location {
    pub(crate) fn new(clock: &mut Clock, index: usize) -> Self {
        let agents = (0..MACHINES).map(|at| Agent::new(things::machine(index, at))).collect();
        let mut location = Self {
            index,
            store: Store::default(),
            process: None,
            processes: 0,
            names: 0,
            skew_ms: clock.seed.below(SKEW_MS),
            skews_ms: [0; MACHINES].map(|_| clock.seed.below(SKEW_MS)),
            agents,
            memory: Memory::default(),
            unjudged: false,
        };
        location.after(clock, 0, Event::Start);
        for at in 0..MACHINES {
            location.boot(clock, at);
        }
        location
    }

    fn after(&self, clock: &mut Clock, wait_ms: u64, event: Event) {
        clock.after(wait_ms, fleet::Event::Location(self.index, event));
    }

    /// The time on the clock of the scheduler's machine.
    fn clock_ms(&self, clock: &Clock) -> u64 {
        BEGINNING_MS + self.skew_ms + clock.now_ms
    }

    /// The time as the scheduler's process counts it.
    fn steady_ms(&self, clock: &Clock) -> u64 {
        match &self.process {
            Some(process) if !clock.is_without(Fence::Steady) => {
                process.began_clock_ms + clock.now_ms - process.started_ms
            }
            _ => self.clock_ms(clock),
        }
    }

    /// Somebody sets a clock, by up to an hour.
    pub(crate) fn set_clock(&mut self, clock: &mut Clock) {
        let skew_ms = clock.seed.below(SKEW_MS);
        clock.tell(self.index, || format!("a clock is set, to {skew_ms} ms ahead"));
        match self.skews_ms.get_mut(clock.seed.index(MACHINES * 2)) {
            Some(machine) => *machine = skew_ms,
            None => self.skew_ms = skew_ms,
        }
    }

    /// Something happens.
    ///
    /// # Errors
    /// What was violated.
    pub(crate) fn step(&mut self, clock: &mut Clock, event: Event) -> Judged {
        match event {
            Event::Start => self.start(clock)?,
            Event::Tick(process) => self.tick(clock, process)?,
            Event::Look(process) => self.look(clock, process),
            Event::Commit(transaction) => self.commit(clock, transaction),
            Event::Answer(transaction, revision) => self.answer(clock, *transaction, revision)?,
            Event::Heard(written_ms, numbers, report) => self.hear(clock, written_ms, numbers, report)?,
            Event::Beat(at, boot) => {
                if self.agents[at].boot == boot {
                    self.report(clock, at);
                    self.after(clock, HEARTBEAT_MS, Event::Beat(at, boot));
                }
            }
            Event::Changed(at, boot) => {
                if self.agents[at].boot == boot {
                    self.report(clock, at);
                }
            }
            Event::Tidy(at) => {
                let deeds = self.agents[at].tidy(clock.now_ms, &mut clock.seed);
                self.done(clock, at, deeds)?;
            }
            Event::Connect(at, boot) => self.connect(clock, at, boot),
            Event::Told(at, connection, wanted) => self.told(clock, at, connection, wanted)?,
            Event::Read(at) => self.read(clock, at)?,
            Event::Closed(at, connection) => self.closed(clock, at, connection),
        }
        if std::mem::take(&mut self.unjudged) { self.judge() } else { Ok(()) }
    }

    fn start(&mut self, clock: &mut Clock) -> Judged {
        if self.process.is_some() {
            return Ok(());
        }
        self.processes += 1;
        clock.tell(self.index, || format!("scheduler {} starts", self.processes));
        clock.note(self.processes);
        self.memory.forget();
        if !clock.is_without(Fence::Claim) {
            self.store.write(&[]);
        }
        let clock_ms = self.clock_ms(clock);
        self.process = Some(Process::start(clock, self.processes, self.index, &self.store, clock_ms));
        self.after(clock, 1, Event::Tick(self.processes));
        self.publish(clock)
    }

    /// The process ends at once. What it has sent is still under way, and another one begins.
    pub(crate) fn kill(&mut self, clock: &mut Clock) {
        let Some(process) = self.process.take() else { return };
        clock.tell(self.index, || format!("scheduler {} is killed", process.number));
        for at in 0..MACHINES {
            let agent = &self.agents[at];
            if agent.stream.served_by == Some(process.number) {
                let end_ms = agent.stream.last_ms.max(agent.cut_until_ms).max(clock.now_ms) + 1;
                let number = agent.stream.number;
                self.after(clock, end_ms - clock.now_ms, Event::Closed(at, number));
            }
        }
        let pause_ms = 1 + clock.seed.below(400);
        self.after(clock, pause_ms, Event::Start);
    }

    pub(crate) fn freeze(&mut self, clock: &mut Clock, until_ms: u64) {
        clock.tell(self.index, || format!("the scheduler is frozen until {until_ms} ms"));
        if let Some(process) = &mut self.process {
            let from_ms = process.frozen_until_ms.max(clock.now_ms);
            process.frozen_until_ms = until_ms.max(from_ms);
            process.forgive(process.frozen_until_ms - from_ms);
        }
    }

    /// The process of this number, if it is there and runs; while it is frozen, the event comes again at its end.
    fn running(&mut self, clock: &mut Clock, event: impl FnOnce() -> Event) -> Option<&mut Process> {
        let until_ms = self.process.as_ref()?.frozen_until_ms;
        if until_ms > clock.now_ms {
            // What lay unread is read in any order.
            let wait_ms = until_ms - clock.now_ms + clock.seed.below(3);
            self.after(clock, wait_ms, event());
            return None;
        }
        self.process.as_mut()
    }

    fn tick(&mut self, clock: &mut Clock, number: u64) -> Judged {
        let now_ms = clock.now_ms;
        let Some(process) = self.running(clock, || Event::Tick(number)).filter(|it| it.number == number)
        else {
            return Ok(());
        };
        let changed = process.expire(now_ms);
        if changed {
            let lives = process.state.machines.iter().map(|(name, it)| format!("{name} {:?}", it.life));
            let lives: Vec<String> = lives.collect();
            clock.tell(self.index, || lives.join(", "));
        }
        let due = now_ms / TICK_MS != now_ms.saturating_sub(HEARTBEAT_MS) / TICK_MS;
        if changed {
            self.publish(clock)?;
        }
        if changed || due {
            self.wake(clock);
        }
        self.after(clock, HEARTBEAT_MS, Event::Tick(number));
        Ok(())
    }

    /// Has everything looked at, soon.
    fn wake(&mut self, clock: &mut Clock) {
        if let Some(process) = self.process.as_mut().filter(|process| !process.woken) {
            process.woken = true;
            let number = process.number;
            self.after(clock, 1, Event::Look(number));
        }
    }

    /// The global scheduler wants something else.
    pub(crate) fn want(&mut self, clock: &mut Clock, change: impl FnOnce(&mut Wanted)) {
        change(&mut self.store.wanted);
        if let Some(process) = &mut self.process {
            process.want(&self.store.wanted);
        }
        self.wake(clock);
    }

    /// One round: plan, and the plan on its way to the store.
    fn look(&mut self, clock: &mut Clock, number: u64) {
        let clock_ms = self.steady_ms(clock);
        if self.running(clock, || Event::Look(number)).is_none() {
            return;
        }
        let Some(process) = self.process.as_mut().filter(|process| process.number == number) else { return };
        process.woken = false;
        if process.committing {
            process.again = true;
            return;
        }
        if !process.warm {
            return;
        }
        process.state.now_ms = clock_ms;
        if !process.planned && !clock.is_without(Fence::Anew) {
            wait_anew(&mut process.state);
        }
        let made = plan(&process.state);
        let images = made.prewarms != process.state.prewarms || made.warm != process.state.warm;
        let changes = if made.changes_nothing() {
            Vec::new()
        } else {
            let names = &mut self.names;
            made.changes(&process.state, |_| {
                *names += 1;
                things::id(&format!("i-{names}"))
            })
        };
        for (name, machine) in &process.state.machines {
            if !self.store.machines.contains_key(name) {
                let (images, instances) = Default::default();
                let record = MachineReport {
                    epoch: 0,
                    sequence: 0,
                    images,
                    instances,
                    mark: None,
                    ..machine.report.clone()
                };
                self.store.machines.insert(name.clone(), record);
            }
        }
        if let Some(wake_ms) = made.wake_at_ms {
            let wait_ms = wake_ms.saturating_sub(clock_ms).clamp(1, TICK_MS);
            let at_ms = clock.now_ms + wait_ms;
            if process.wakes_ms <= clock.now_ms || at_ms < process.wakes_ms {
                process.wakes_ms = at_ms;
                clock.after(wait_ms, fleet::Event::Location(self.index, Event::Look(number)));
            }
        }
        let transaction =
            Transaction { process: number, revision: process.state.revision, plan: made, changes };
        if transaction.changes.is_empty() {
            process.follow(transaction.plan);
            self.unjudged = true;
            if images {
                self.show(clock);
            }
            return;
        }
        process.committing = true;
        let late_ms = 1 + if clock.seed.one_in(10) { clock.seed.below(900) } else { clock.seed.below(20) };
        self.after(clock, late_ms, Event::Commit(Box::new(transaction)));
    }

    /// The store: all of a transaction or nothing. Several transactions may stop after any.
    fn commit(&mut self, clock: &mut Clock, transaction: Box<Transaction>) {
        let fenced = !clock.is_without(Fence::Revision);
        let mut outcome = None;
        if !fenced || transaction.revision == self.store.revision {
            if clock.fails(4) {
                let written = clock.seed.index(transaction.changes.len() + 1);
                if written > 0 {
                    self.store.write(&transaction.changes[..written]);
                }
            } else {
                self.store.write(&transaction.changes);
                // Written, but who asked isn't told.
                outcome = (!clock.fails(4)).then_some(self.store.revision);
            }
        }
        self.unjudged = true;
        clock.tell(self.index, || {
            let says = |change: &Change| match change {
                Change::Put(held) => {
                    format!("{} on {} {:?}", held.assignment.instance, held.machine, held.stage)
                }
                Change::Delete(instance) => format!("{instance} gone"),
                Change::Moves(cause, moving) => format!("moves of {cause:?}: {moving:?}"),
            };
            let changes: Vec<String> = transaction.changes.iter().map(says).collect();
            let (process, revision) = (transaction.process, transaction.revision);
            format!("plan of {process} on {revision}, written as {outcome:?}: {}", changes.join(", "))
        });
        clock.note(self.store.revision);
        self.after(clock, 1, Event::Answer(transaction, outcome));
    }

    fn answer(&mut self, clock: &mut Clock, transaction: Transaction, revision: Option<u64>) -> Judged {
        let clock_ms = self.steady_ms(clock);
        let Some(process) = self.process.as_mut().filter(|it| it.number == transaction.process) else {
            return Ok(());
        };
        if process.frozen_until_ms > clock.now_ms {
            let wait_ms = process.frozen_until_ms - clock.now_ms;
            self.after(clock, wait_ms, Event::Answer(Box::new(transaction), revision));
            return Ok(());
        }
        // As the product does: who can't tell what is written ends, and reads it.
        let Some(revision) = revision else {
            self.kill(clock);
            return Ok(());
        };
        let Transaction { plan, changes, .. } = transaction;
        let now_ms = if clock.is_without(Fence::Published) { 0 } else { clock_ms };
        carry_out(&mut process.state, changes, revision, now_ms);
        process.note_marks(clock.now_ms);
        process.follow(plan);
        process.committing = false;
        self.unjudged = true;
        if std::mem::take(&mut process.again) {
            self.wake(clock);
        }
        self.publish(clock)
    }

    /// Publishes what machines should have, and the routes.
    fn publish(&mut self, clock: &mut Clock) -> Judged {
        self.show(clock);
        self.route(clock)
    }

    fn show(&mut self, clock: &mut Clock) {
        let Some(process) = &mut self.process else { return };
        let mut all = desired(&process.state);
        for agent in &self.agents {
            let wanted = all.remove(&agent.name).unwrap_or_else(|| desired_of_stranger(&process.state));
            match process.published.get_mut(&agent.name) {
                Some(published) if **published == wanted => {}
                _ => drop(process.published.insert(agent.name.clone(), Rc::new(wanted))),
            }
        }
        for at in 0..MACHINES {
            self.tell(clock, at);
        }
    }

    /// Computes the routes, once it is known which machines are there.
    fn route(&mut self, clock: &Clock) -> Judged {
        let Some(process) = self.process.as_ref().filter(|process| process.warm) else { return Ok(()) };
        let mut routed = BTreeMap::new();
        for record in routes(&process.state).into_values() {
            let RouteRecord::Vip(route) = record else { continue };
            let takes = route.local.into_iter().filter(|it| it.ready && !it.draining);
            routed.extend(takes.map(|it| (it.instance, it.machine)));
        }
        self.memory.routes(clock.now_ms, routed)
    }

    /// Sends a machine what is new for it, if its watch is connected.
    fn tell(&mut self, clock: &mut Clock, at: usize) {
        let Some(process) = &self.process else { return };
        let agent = &mut self.agents[at];
        let stream = &mut agent.stream;
        let Some(wanted) = process.published.get(&agent.name) else { return };
        if stream.served_by != Some(process.number)
            || stream.sent.as_ref().is_some_and(|sent| Rc::ptr_eq(sent, wanted))
        {
            return;
        }
        let arrives_ms = clock.now_ms + clock.delay();
        let arrives_ms = arrives_ms.max(stream.last_ms).max(stream.stalled_until_ms).max(agent.cut_until_ms);
        stream.last_ms = arrives_ms;
        stream.sent = Some(wanted.clone());
        let (number, wanted) = (stream.number, wanted.clone());
        self.after(clock, arrives_ms - clock.now_ms, Event::Told(at, number, wanted));
    }

    fn hear(
        &mut self,
        clock: &mut Clock,
        written_ms: u64,
        numbers: (u64, u64),
        report: Rc<MachineReport>,
    ) -> Judged {
        let again = || Event::Heard(written_ms, numbers, report.clone());
        let Some(process) = self.running(clock, again) else { return Ok(()) };
        if !process.hear(clock, numbers, &report) {
            self.memory.hears(&report, written_ms);
            return Ok(());
        }
        self.memory.hears(&report, written_ms);
        self.wake(clock);
        self.route(clock)
    }
}
