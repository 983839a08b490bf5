//! The judge: sums what is there, by the simplest means.

use std::{collections::BTreeSet, net::Ipv4Addr};

use anyplace_location_core::{
    InstanceMove, Life, Limits, Plan, Reservation, Stage, State, plan, plan_room, plan_tidying, routes,
};
use anyplace_model::{
    Assignment, DeploymentName, InstancePhase, Isolation, MachineId, MachineMode, MachineReport, MoveCause,
    ReasonCode, Resources, RouteRecord,
};
use proptest::{prelude::*, test_runner::TestCaseError};

#[path = "under_way.rs"]
mod under_way;

pub(crate) use under_way::under_way;

use crate::{
    preemption::{self, ends, without},
    world::{World, apply},
};

pub(crate) type Verdict = Result<(), TestCaseError>;

/// Whether all of these fit on the machine together.
fn fits(report: &MachineReport, held: &[&Assignment]) -> Result<(), String> {
    let sum = |value: &dyn Fn(&Resources) -> u64| held.iter().map(|a| value(&a.resources)).sum::<u64>();
    for (what, used, there) in [
        ("cpu", sum(&|r| r.cpu.0), report.cpu.0),
        ("memory", sum(&|r| r.memory.0), report.memory.0),
        ("disk", sum(&|r| r.disk.0), report.disk.0),
    ] {
        if used > there {
            return Err(format!("{what}: {used} of {there}"));
        }
    }
    let mut addresses = BTreeSet::new();
    for assignment in held {
        let address = assignment.address;
        let cidr = report.instance_cidr;
        if !cidr.contains(&address) || address == cidr.network() || address == cidr.broadcast() {
            return Err(format!("{address} is no instance address of {cidr}"));
        }
        if !addresses.insert(address) {
            return Err(format!("{address} twice"));
        }
    }
    for (index, gpu) in report.gpus.iter().enumerate() {
        let on: Vec<_> = held.iter().filter(|a| a.gpus.contains(&(index as u32))).collect();
        let slices: u64 =
            on.iter().filter_map(|a| a.resources.gpu.as_ref()?.memory).map(|memory| memory.0).sum();
        let whole = on.iter().filter(|a| a.resources.gpu.as_ref().unwrap().memory.is_none()).count();
        if slices > gpu.memory.0 || whole > 1 || (whole == 1 && on.len() > 1) {
            return Err(format!("GPU {index}: {slices} bytes in slices, {whole} whole, {} in all", on.len()));
        }
    }
    for assignment in held {
        if let Some(request) = &assignment.resources.gpu {
            let different: BTreeSet<_> = assignment.gpus.iter().collect();
            let models = |index: &u32| report.gpus.get(*index as usize).map(|gpu| gpu.model.clone());
            let allowed = |index: &u32| {
                models(index).is_some_and(|m| request.models.is_empty() || request.models.contains(&m))
            };
            if different.len() != request.count as usize || !assignment.gpus.iter().all(allowed) {
                return Err(format!("{:?} for {request:?}", assignment.gpus));
            }
        }
        if !report.isolations.contains(&assignment.isolation) {
            return Err("isolation".into());
        }
    }
    Ok(())
}

fn on<'a>(state: &'a State, machine: &MachineId) -> Vec<&'a Assignment> {
    let holds = |held: &&Reservation| held.machine == *machine && held.stage != Stage::Preempted;
    state.reservations.values().filter(holds).map(|h| &h.assignment).collect()
}

fn ready(state: &State, held: &Reservation) -> bool {
    let machine = &state.machines[&held.machine];
    held.stage == Stage::Serving
        && machine.life == Life::Alive
        && machine.report.instances.iter().any(|s| s.instance == held.assignment.instance && s.ready)
}

fn of<'a>(state: &'a State, name: &'a DeploymentName) -> impl Iterator<Item = &'a Reservation> + 'a {
    state.reservations.values().filter(move |held| held.deployment() == Some(name))
}

/// What the moves under way still have to take: what their instances have now, elsewhere.
fn kept(state: &State) -> Vec<(MachineId, Assignment)> {
    let mut kept = Vec::new();
    for moving in state.moves.under_way.values().filter(|moving| moving.gave_up.is_none()) {
        for step in &moving.moves {
            let Some(old) = state.reservations.get(&step.instance) else { continue };
            if old.stage == Stage::Serving && copy_of(state, old).is_none() {
                let mut new = old.assignment.clone();
                new.gpus = step.gpus.clone();
                kept.push((step.machine.clone(), new));
            }
        }
        let MoveCause::Room(newcomer) = &moving.cause else { continue };
        let isolation = state.placements[newcomer].spec.isolation;
        let place = moving.place.as_ref().unwrap();
        let mut new = probe(&place.resources, isolation, Ipv4Addr::UNSPECIFIED);
        new.gpus = place.gpus.clone();
        kept.push((place.machine.clone(), new));
    }
    kept
}

fn copy_of<'a>(state: &'a State, old: &Reservation) -> Option<&'a Reservation> {
    let instance = &old.assignment.instance;
    state.reservations.values().find(|held| {
        held.stage == Stage::Serving && held.replaces.as_ref().is_some_and(|it| it.instance == *instance)
    })
}

/// Whether one that serves is there to take the place of another that serves still.
fn is_extra(state: &State, held: &Reservation) -> bool {
    let old = held.replaces.as_ref().and_then(|replaced| state.reservations.get(&replaced.instance));
    let wanted = held.deployment().and_then(|name| state.placements.get(name));
    old.is_some_and(|old| {
        let stays = state.settings.machines.get(&old.machine) != Some(&MachineMode::Draining);
        old.stage == Stage::Serving && stays && wanted.is_some_and(|placement| same(old, placement))
    })
}

/// Whether an instance is as the placement says.
fn same(held: &Reservation, placement: &anyplace_model::Placement) -> bool {
    let (made, spec) = (&held.assignment, &placement.spec);
    (&made.image, &made.resources, made.isolation) == (&spec.image, &spec.resources, spec.isolation)
}

/// Whether one more would fit on a machine from which no attempt is about to go: such room may be another one's.
fn some_machine_takes(state: &State, resources: &Resources, isolation: Isolation) -> bool {
    let ending = |name: &MachineId| state.reservations.values().any(|h| h.machine == *name && ends(state, h));
    takes(state, resources, isolation, |name| !ending(name))
}

/// Whether one more would fit on one of these machines, by trying every combination of at most two GPUs.
pub(crate) fn takes(
    state: &State,
    resources: &Resources,
    isolation: Isolation,
    among: impl Fn(&MachineId) -> bool,
) -> bool {
    let kept = kept(state);
    state.machines.iter().filter(|(name, _)| among(name)).any(|(name, machine)| {
        let held = on(state, name);
        let kept: Vec<&Assignment> = kept.iter().filter(|(at, _)| at == name).map(|(_, it)| it).collect();
        let stranger = machine.report.instances.iter().any(|s| !state.reservations.contains_key(&s.instance));
        let closed = state.settings.draining || state.settings.machines.contains_key(name);
        // What was given away when it was lost may still be in use.
        let knew = machine.report.mark.is_some_and(|mark| mark.number >= machine.given_away);
        if machine.life != Life::Alive || closed || stranger || !knew {
            return false;
        }
        let Some(address) = machine
            .report
            .instance_cidr
            .hosts()
            .find(|host| held.iter().all(|a| a.address != *host) && *host != Ipv4Addr::UNSPECIFIED)
        else {
            return false;
        };
        let gpus = machine.report.gpus.len() as u32;
        let mut choices: Vec<Vec<u32>> = vec![Vec::new()];
        choices.extend((0..gpus).map(|g| vec![g]));
        choices.extend((0..gpus).flat_map(|a| (a + 1..gpus).map(move |b| vec![a, b])));
        let wanted = resources.gpu.as_ref().map_or(0, |gpu| gpu.count as usize);
        choices.retain(|gpus| gpus.len() == wanted);
        choices.into_iter().any(|gpus| {
            let mut one: Assignment = probe(resources, isolation, address);
            one.gpus = gpus;
            let mut all = held.clone();
            all.push(&one);
            // What is kept counts beside what holds it yet: only what neither needs is free.
            let mut free = machine
                .report
                .instance_cidr
                .hosts()
                .filter(|host| *host != address && held.iter().all(|a| a.address != *host));
            let kept: Option<Vec<Assignment>> = kept
                .iter()
                .map(|kept| Some(Assignment { address: free.next()?, ..(*kept).clone() }))
                .collect();
            let Some(kept) = kept else { return false };
            all.extend(&kept);
            fits(&machine.report, &all).is_ok()
        })
    })
}

fn probe(resources: &Resources, isolation: Isolation, address: Ipv4Addr) -> Assignment {
    Assignment {
        instance: "probe".parse().unwrap(),
        workload: anyplace_model::Workload::Deployment("probe".parse().unwrap()),
        location: "ams".parse().unwrap(),
        generation: 1,
        image: String::new(),
        command: None,
        env: Default::default(),
        isolation,
        resources: resources.clone(),
        gpus: Vec::new(),
        address,
        ports: Vec::new(),
        health: Default::default(),
        restart: true,
        timeout_ms: None,
        draining: false,
    }
}

/// Judges a plan by what it made of the state.
pub(crate) fn judge(before: &State, plan: &Plan, after: &State) -> Verdict {
    for (name, machine) in &after.machines {
        let fit = fits(&machine.report, &on(after, name));
        prop_assert!(fit.is_ok(), "{name} is overbooked: {fit:?}");
    }
    for start in &plan.starts {
        prop_assert_eq!(before.machines[&start.machine].life, Life::Alive);
        prop_assert!(!before.settings.draining && !before.settings.machines.contains_key(&start.machine));
    }
    let machines = after.machines.len() as u32;
    let counted = |refusals: &[anyplace_model::Refusal]| {
        let about_moves =
            |it: &&anyplace_model::Refusal| matches!(it.reason, ReasonCode::MakingRoom | ReasonCode::NoMoves);
        let sum: u32 = refusals.iter().filter(|it| !about_moves(it)).map(|refusal| refusal.count).sum();
        let said = refusals.iter().all(|refusal| !refusal.message.is_empty());
        said && match machines {
            0 => refusals[0].reason == ReasonCode::NoMachines,
            _ => sum == machines,
        }
    };
    for (name, placement) in &after.placements {
        let verdict = &plan.placements[name];
        let held: Vec<_> = of(after, name).collect();
        let serving = |h: &&&Reservation| h.stage == Stage::Serving && !is_extra(after, h);
        let leaves =
            |h: &Reservation| after.settings.machines.get(&h.machine) == Some(&MachineMode::Draining);
        let stay = held.iter().filter(serving).filter(|h| !leaves(h));
        let current = stay.filter(|h| h.generation == placement.generation).count();
        let missing = placement.count.saturating_sub(current as u32);
        prop_assert!(current as u32 <= placement.count, "{name} has {current} of {}", placement.count);
        prop_assert_eq!((verdict.generation, verdict.count), (placement.generation, placement.count));
        if verdict.refused > 0 {
            prop_assert_eq!(verdict.refused, missing);
            prop_assert!(counted(&verdict.refusals), "{:?} of {machines}", verdict.refusals);
            let spec = &placement.spec;
            prop_assert!(
                !some_machine_takes(after, &spec.resources, spec.isolation),
                "{name} was refused although it fits"
            );
        } else {
            let changing = held.len() > current;
            let spec = &placement.spec;
            let rest = without(after, |held| ends(after, held));
            let enters = missing > 0 && takes(&rest, &spec.resources, spec.isolation, |_| true);
            prop_assert!(missing == 0 || changing || enters, "{name} misses {missing} for no reason");
        }
        // At most one ready instance fewer than before, and only where there is no room beside it.
        let was = of(before, name).filter(|h| ready(before, h)).count();
        let is = of(after, name).filter(|h| ready(after, h)).count();
        let floor = was.min(placement.count as usize);
        prop_assert!(is + 1 >= floor, "{name}: {was} ready before, {is} after, {} wanted", placement.count);
        if is < floor {
            prop_assert!(!some_machine_takes(after, &placement.spec.resources, placement.spec.isolation));
        }
    }
    for attempt in after.attempts.keys() {
        let holders = after.reservations.values().filter(|h| h.attempt() == Some(attempt)).count();
        prop_assert!(holders <= 1);
        prop_assert_eq!(holders == 0, plan.attempts.contains_key(attempt));
        if let Some(refusals) = plan.attempts.get(attempt) {
            prop_assert!(counted(refusals), "{refusals:?} of {machines}");
        }
    }
    preemption::judge(before, plan, after)?;
    for instance in &plan.removals {
        let held = &before.reservations[instance];
        let Stage::Draining { since_ms } = held.stage else { continue };
        let machine = &before.machines[&held.machine];
        let runs = machine.report.instances.iter().any(|status| {
            status.instance == *instance
                && matches!(status.phase, InstancePhase::Running | InstancePhase::Stopping)
        });
        let waited = before.now_ms >= since_ms + before.timing.drain_ms;
        prop_assert!(
            waited || machine.life != Life::Alive || !runs,
            "{instance} ends before its connections could"
        );
    }
    for start in &plan.starts {
        if let anyplace_model::Workload::Job(attempt) = &start.workload {
            let image = &before.attempts[attempt].image;
            prop_assert!(before.machines[&start.machine].report.images.contains_key(image), "not warm");
        }
    }
    for record in routes(after).into_values() {
        if let RouteRecord::Vip(route) = record {
            for endpoint in route.local {
                let alive = after.machines.get(&endpoint.machine).is_some_and(|m| m.life == Life::Alive);
                prop_assert!(!endpoint.ready || (alive && !endpoint.draining));
            }
        }
    }
    Ok(())
}

/// Judges how room would be made for whatever was refused, and what would be moved for its own sake.
pub(crate) fn moves(state: &State, plan: &Plan) -> Verdict {
    for (name, _) in plan.placements.iter().filter(|(_, verdict)| verdict.refused > 0) {
        let Some(room) = plan_room(state, name, Limits::default()) else { continue };
        let held = moved(state, &room.moves)?;
        prop_assert!((1..=3).contains(&room.moves.len()) && room.revision == state.revision, "{room:?}");
        let spec = &state.placements[name].spec;
        let mut one = probe(&spec.resources, spec.isolation, free_address(state, &held, &room.machine)?);
        one.gpus = room.gpus.clone();
        enters(state, &held, &room.machine, &one)?;
    }
    moved(state, &plan_tidying(state, 2))?;
    Ok(())
}

/// Carries moves out one by one, each with its old instance in place until the new one is; who has what on which machine.
fn moved<'a>(
    state: &'a State,
    moves: &[InstanceMove],
) -> Result<Vec<(MachineId, Assignment)>, TestCaseError> {
    let held = |held: &'a Reservation| (held.machine.clone(), held.assignment.clone());
    let holding = |held: &&Reservation| held.stage != Stage::Preempted;
    let mut all: Vec<(MachineId, Assignment)> =
        state.reservations.values().filter(holding).map(held).collect();
    for step in moves {
        let old = &state.reservations[&step.instance];
        prop_assert!(ready(state, old), "{step:?} isn't ready");
        let Some(deployment) = old.deployment() else { return Err(TestCaseError::fail("a job moves")) };
        let placement = &state.placements[deployment];
        let serving = of(state, deployment).filter(|held| ready(state, held)).count();
        prop_assert!(serving >= placement.count as usize, "{step:?}: {serving} are ready");
        let crowd = |all: &[(MachineId, Assignment)], machine: &MachineId| {
            let others = all.iter().filter(|(at, held)| {
                let serves = state.reservations[&held.instance].stage == Stage::Serving;
                serves && at == machine && held.workload == old.assignment.workload
            });
            others.filter(|(_, held)| held.instance != step.instance).count()
        };
        let before: Vec<_> = state.reservations.values().filter(holding).map(held).collect();
        let crowds = crowd(&all, &step.machine) > crowd(&before, &old.machine);
        prop_assert!(step.machine == old.machine || !crowds, "{step:?} crowds");
        let mut new = old.assignment.clone();
        new.gpus = step.gpus.clone();
        new.address = free_address(state, &all, &step.machine)?;
        enters(state, &all, &step.machine, &new)?;
        all.push((step.machine.clone(), new));
        all.retain(|(at, held)| (at, &held.address) != (&old.machine, &old.assignment.address));
    }
    Ok(all)
}

fn free_address(
    state: &State,
    held: &[(MachineId, Assignment)],
    machine: &MachineId,
) -> Result<Ipv4Addr, TestCaseError> {
    let is_free = |host: &Ipv4Addr| held.iter().all(|(at, held)| at != machine || held.address != *host);
    let free = state.machines[machine].report.instance_cidr.hosts().find(is_free);
    free.ok_or_else(|| TestCaseError::fail("no address is left"))
}

/// Whether one more may be there, with what is there already.
fn enters(state: &State, held: &[(MachineId, Assignment)], machine: &MachineId, one: &Assignment) -> Verdict {
    let there = &state.machines[machine];
    prop_assert!(there.life == Life::Alive && !state.settings.draining && there.report.conditions.is_empty());
    let mut all: Vec<&Assignment> =
        held.iter().filter(|(at, _)| at == machine).map(|(_, held)| held).collect();
    all.push(one);
    let fit = fits(&there.report, &all);
    prop_assert!(fit.is_ok(), "{one:?} doesn't fit on {machine}: {fit:?}");
    Ok(())
}

/// Judges what the machines really run, known to the scheduler or not.
pub(crate) fn physical(world: &World) -> Verdict {
    for (name, agent) in &world.agents {
        let report = &world.state.machines[name].report;
        let held: Vec<_> = agent.containers.values().map(|container| &container.assignment).collect();
        let fit = fits(report, &held);
        prop_assert!(fit.is_ok(), "{name} runs more than it has: {fit:?}");
    }
    for (attempt, runs) in &world.runs {
        prop_assert!(runs.len() <= 1, "{attempt} ran as {runs:?}");
    }
    Ok(())
}

/// With nothing new to see, planning comes to rest: at most the idle ones that were drained are removed.
pub(crate) fn stable(world: &World) -> Verdict {
    let mut state = world.state.clone();
    let second = plan(&state);
    prop_assert!(
        second.starts.is_empty() && second.drains.is_empty() && second.losses.is_empty(),
        "{second:?}"
    );
    prop_assert_eq!(&second.prewarms, &state.prewarms);
    let changes = second.changes(&state, |_| unreachable!("nothing starts"));
    apply(&mut state, &second, changes);
    let third = plan(&state);
    prop_assert!(third.changes_nothing(), "{third:?}");
    Ok(())
}

/// After everything works again, all that fits runs, in its newest generation, and nothing else is left.
pub(crate) fn settled(world: &World) -> Verdict {
    let plan = plan(&world.state);
    prop_assert!(plan.changes_nothing(), "{plan:?}");
    for (name, placement) in &world.state.placements {
        let held: Vec<_> = of(&world.state, name).collect();
        let current = held.iter().filter(|h| h.generation == placement.generation).count() as u32;
        let refused = plan.placements[name].refused;
        prop_assert_eq!(current + refused, placement.count);
        prop_assert!(refused > 0 || held.len() as u32 == placement.count, "old ones are left");
    }
    for held in world.state.reservations.values() {
        let wanted = held.deployment().is_some_and(|name| world.state.placements.contains_key(name))
            || held.attempt().is_some_and(|attempt| world.state.attempts.contains_key(attempt));
        prop_assert!(wanted, "{held:?} is left");
    }
    Ok(())
}
