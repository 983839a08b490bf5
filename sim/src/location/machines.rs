//! What machines do: agents start, report, and follow their watches.

use std::rc::Rc;

use anyplace_location_core::{Reservation, Stage};

use super::{BEGINNING_MS, Event, Judged, LOSS_MS, Location, MAX_LOSSES, REPEAT_MS, SETTLING_MS};
use crate::{
    agent::{Deed, Desired},
    clock::Clock,
    fleet,
    scheduler::DRAIN_MS,
};

impl Location {
    /// An agent starts, for the first time or again.
    pub(crate) fn boot(&mut self, clock: &mut Clock, at: usize) {
        // Later than the last one's, whatever the clock says.
        let epoch = self.agents[at].report.epoch + 1;
        let epoch = epoch.max(BEGINNING_MS + self.skews_ms[at] + clock.now_ms);
        self.agents[at].restart(epoch);
        clock.tell(self.index, || format!("the agent of m{at} starts"));
        let boot = self.agents[at].boot;
        self.after(clock, 1, Event::Connect(at, boot));
        let settling_ms = 1 + clock.seed.below(SETTLING_MS);
        self.after(clock, settling_ms, Event::Beat(at, boot));
    }

    pub(super) fn report(&mut self, clock: &mut Clock, at: usize) {
        let (now_ms, agent) = (clock.now_ms, &mut self.agents[at]);
        if agent.frozen_until_ms > now_ms {
            return;
        }
        let (numbers, report) = agent.report(now_ms);
        if agent.cut_until_ms > now_ms {
            return;
        }
        if agent.losses < MAX_LOSSES && clock.fails(5) {
            agent.losses += 1;
            return;
        }
        agent.losses = 0;
        let delay_ms = clock.delay();
        if clock.fails(5) {
            let delay_ms = clock.seed.below(REPEAT_MS);
            self.after(clock, delay_ms, Event::Heard(now_ms, numbers, report.clone()));
        }
        self.after(clock, delay_ms, Event::Heard(now_ms, numbers, report));
    }

    pub(super) fn connect(&mut self, clock: &mut Clock, at: usize, boot: u64) {
        let (now_ms, agent) = (clock.now_ms, &mut self.agents[at]);
        if agent.boot != boot {
            return;
        }
        let server = self.process.as_ref().filter(|process| process.frozen_until_ms <= now_ms);
        match server {
            Some(process) if agent.frozen_until_ms <= now_ms && agent.cut_until_ms <= now_ms => {
                let stream = &mut agent.stream;
                stream.number += 1;
                (stream.served_by, stream.sent) = (Some(process.number), None);
                (stream.last_ms, stream.stalled_until_ms) = (now_ms, 0);
                self.tell(clock, at);
            }
            _ => {
                let retry_ms = 50 + clock.seed.below(if clock.faults { 1_000 } else { 50 });
                self.after(clock, retry_ms, Event::Connect(at, boot));
            }
        }
    }

    pub(super) fn closed(&mut self, clock: &mut Clock, at: usize, connection: u64) {
        let agent = &mut self.agents[at];
        if agent.stream.number == connection && agent.stream.served_by.take().is_some() {
            let boot = agent.boot;
            self.after(clock, 1, Event::Connect(at, boot));
        }
    }

    pub(super) fn told(
        &mut self,
        clock: &mut Clock,
        at: usize,
        connection: u64,
        wanted: Rc<Desired>,
    ) -> Judged {
        self.agents[at].inbox.push_back((connection, wanted));
        self.read(clock, at)
    }

    /// An agent that isn't frozen reads what has come on its present connection, in order.
    pub(super) fn read(&mut self, clock: &mut Clock, at: usize) -> Judged {
        let now_ms = clock.now_ms;
        while let Some((connection, wanted)) = self.agents[at].inbox.pop_front() {
            let agent = &mut self.agents[at];
            if agent.frozen_until_ms > now_ms {
                agent.inbox.push_front((connection, wanted));
                let wait_ms = agent.frozen_until_ms - now_ms;
                self.after(clock, wait_ms, Event::Read(at));
                return Ok(());
            }
            if agent.stream.number == connection {
                let deeds = agent.told(now_ms, &wanted, &mut clock.seed);
                self.done(clock, at, deeds)?;
            }
        }
        Ok(())
    }

    /// An agent has done something: it says so, and looks again when time changes anything.
    pub(super) fn done(&mut self, clock: &mut Clock, at: usize, deeds: Vec<Deed>) -> Judged {
        let (now_ms, index, agent) = (clock.now_ms, self.index, &mut self.agents[at]);
        if agent.look(now_ms) {
            self.unjudged = true;
            clock.after(1, fleet::Event::Location(index, Event::Changed(at, agent.boot)));
        }
        let wakes_ms =
            agent.next_ms(now_ms).filter(|at_ms| agent.wakes_ms <= now_ms || *at_ms < agent.wakes_ms);
        if let Some(wakes_ms) = wakes_ms {
            agent.wakes_ms = wakes_ms;
            clock.after(wakes_ms - now_ms, fleet::Event::Location(index, Event::Tidy(at)));
        }
        for deed in deeds {
            match deed {
                Deed::Started(assignment) => {
                    clock.tell(self.index, || format!("m{at} starts {}", assignment.instance));
                    clock.note(1);
                    self.memory.starts(&assignment)?;
                }
                Deed::Stopping(instance, serves) => {
                    clock.tell(self.index, || format!("m{at} stops {instance}"));
                    clock.note(2);
                    if let Some(held) =
                        self.store.reservations.get(&instance).filter(|held| is_assigned(held))
                    {
                        return Err(format!("{instance} is ended, and its reservation is {:?}", held.stage));
                    }
                    // What a loss breaks isn't planned.
                    let agent = &self.agents[at];
                    let away_ms = agent.cut_until_ms.max(agent.frozen_until_ms);
                    if serves && (away_ms == 0 || now_ms > away_ms + LOSS_MS) {
                        self.memory.ends(&instance, now_ms, DRAIN_MS)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// An instance of a machine stops being ready for a while.
    pub(crate) fn ail(&mut self, clock: &mut Clock, at: usize) {
        let (for_ms, which) = (clock.seed.below(2_000), clock.seed.index(3));
        self.agents[at].ails(clock.now_ms, for_ms, which);
        self.after(clock, 0, Event::Tidy(at));
    }
}

fn is_assigned(held: &Reservation) -> bool {
    matches!(held.stage, Stage::Serving | Stage::Draining { .. })
}
