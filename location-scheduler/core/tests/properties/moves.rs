//! Moves carried out: each way that they can end, and random histories.

use anyplace_location_core::{Life, Plan, Stage};
use anyplace_model::{InstanceId, MachineMode, MoveCause, MoveStep, ReasonCode};
use anyplace_seed::{Seed, rounds};

use crate::{
    oracle,
    world::{Op, World},
};

/// Acts, plans and judges.
fn act(world: &mut World, op: Op) -> Plan {
    world.act(op);
    let before = world.state.clone();
    let plan = world.step();
    let judged = oracle::judge(&before, &plan, &world.state)
        .and_then(|()| oracle::under_way(&before, &world.state))
        .and_then(|()| oracle::physical(world))
        .and_then(|()| oracle::stable(world));
    judged.unwrap_or_else(|error| panic!("after {op:?}: {error}"));
    plan
}

fn room() -> MoveCause {
    MoveCause::Room("d1".parse().unwrap())
}

/// Two slices hold both GPUs of m0, and m1's is free. The newcomer d1 asks for the whole GPU that m0 alone has, and a move to
/// m1 has begun: who moves, and its copy.
fn begun() -> (World, InstanceId, InstanceId) {
    let mut world = World::new(2);
    for op in
        [Op::Silence(1), Op::Change(0, 5), Op::Work(0), Op::Return(1), Op::Change(1, 4), Op::Scale(1, 1)]
    {
        act(&mut world, op);
    }
    assert!(world.state.moves.under_way.is_empty(), "first it may go elsewhere");
    let plan = act(&mut world, Op::Time(1_000));
    assert_eq!(plan.starts.len(), 1, "{plan:?}");
    let refusals = &plan.placements["d1"].refusals;
    assert!(refusals.iter().any(|it| it.reason == ReasonCode::MakingRoom), "{refusals:?}");
    let moving = world.state.moves.under_way[&room()].clone();
    let old = moving.moves[0].instance.clone();
    assert_eq!(moving.moves.len(), 1);
    let copy = copy_of(&world, &old).unwrap();
    assert_eq!(world.state.reservations[&copy].machine.as_str(), "m1");
    assert_eq!(step_of(&world), [MoveStep::Starting]);
    (world, old, copy)
}

fn copy_of(world: &World, old: &InstanceId) -> Option<InstanceId> {
    let held = world.state.reservations.values();
    let mut copies = held.filter(|held| held.replaces.as_ref().is_some_and(|it| it.instance == *old));
    copies.next().map(|held| held.assignment.instance.clone())
}

fn step_of(world: &World) -> Vec<MoveStep> {
    anyplace_location_core::move_statuses(&world.state).iter().map(|status| status.step).collect()
}

fn stage(world: &World, instance: &InstanceId) -> Option<Stage> {
    world.state.reservations.get(instance).map(|held| held.stage)
}

fn newcomers(world: &World) -> usize {
    let held = world.state.reservations.values();
    held.filter(|held| held.deployment().is_some_and(|name| name.as_str() == "d1")).count()
}

#[test]
fn a_copy_starts_gets_ready_takes_over_and_then_the_newcomer_has_the_room() {
    let (mut world, old, copy) = begun();
    act(&mut world, Op::Work(0));
    assert_eq!(stage(&world, &old), Some(Stage::Serving), "the copy isn't ready");
    act(&mut world, Op::Work(1));
    assert!(matches!(stage(&world, &old), Some(Stage::Draining { .. })));
    assert_eq!(step_of(&world), [MoveStep::Draining]);
    // Whatever else comes, the room is kept.
    act(&mut world, Op::Change(2, 5));
    for op in [Op::Work(0), Op::Time(500), Op::Time(60_000), Op::Work(0)] {
        act(&mut world, op);
        assert_eq!(newcomers(&world), 0, "the old one isn't known to be gone");
    }
    act(&mut world, Op::Work(0));
    assert_eq!((newcomers(&world), stage(&world, &old)), (1, None));
    assert!(world.state.moves.under_way.is_empty());
    assert_eq!(step_of(&world), [MoveStep::Done], "why it is where it is stays known");
    let newcomer =
        world.state.reservations.values().find(|held| held.deployment() == Some(&"d1".parse().unwrap()));
    let newcomer = newcomer.unwrap();
    assert_eq!((newcomer.machine.as_str(), newcomer.assignment.gpus.as_slice()), ("m0", &[0][..]));
    assert_eq!(stage(&world, &copy), Some(Stage::Serving));
}

#[test]
fn moves_are_undone_when_the_newcomer_goes_elsewhere_or_is_deleted() {
    for end in [Op::Scale(1, 0), Op::Delete(1), Op::Change(1, 0)] {
        let (mut world, old, copy) = begun();
        act(&mut world, Op::Work(0));
        act(&mut world, end);
        assert!(world.state.moves.under_way.is_empty(), "{end:?}");
        assert_eq!(stage(&world, &old), Some(Stage::Serving), "{end:?}");
        assert!(!matches!(stage(&world, &copy), Some(Stage::Serving)), "{end:?}");
        world.heal();
        assert_eq!((stage(&world, &old), stage(&world, &copy)), (Some(Stage::Serving), None), "{end:?}");
    }
}

#[test]
fn moves_end_when_the_copys_machine_is_lost_or_the_newcomers() {
    for (lost, kept) in [(1, 0), (0, 1)] {
        let (mut world, old, copy) = begun();
        act(&mut world, Op::Silence(lost));
        assert!(world.state.moves.under_way.contains_key(&room()), "silent isn't lost");
        act(&mut world, Op::Lose(lost));
        assert!(world.state.moves.under_way.is_empty());
        let (gone, stays) = if lost == 1 { (copy, old) } else { (old, copy) };
        act(&mut world, Op::Work(kept));
        assert_eq!((stage(&world, &gone), stage(&world, &stays)), (None, Some(Stage::Serving)));
    }
}

#[test]
fn a_copy_that_does_not_get_ready_in_time_is_given_up_and_tried_again_later() {
    let (mut world, old, copy) = begun();
    // Both machines report, but nothing gets ready.
    let pass = |world: &mut World, ms: u64| {
        for op in [Op::Time(ms), Op::Sync(0), Op::Report(0), Op::Sync(1), Op::Report(1)] {
            act(world, op);
        }
    };
    pass(&mut world, 1_900);
    assert_eq!(stage(&world, &copy), Some(Stage::Serving));
    pass(&mut world, 100);
    assert!(!matches!(stage(&world, &copy), Some(Stage::Serving)));
    assert_eq!(stage(&world, &old), Some(Stage::Serving));
    let gave_up = world.state.moves.under_way[&room()].gave_up.clone().unwrap();
    assert_eq!(gave_up.why, format!("{copy} on m1 was not ready within 2 s"));
    let plan = act(&mut world, Op::Time(10));
    let said = &plan.placements["d1"].refusals.last().unwrap().message;
    assert!(said.contains(&gave_up.why), "{said}");
    // Tried again, and this time it works.
    pass(&mut world, 1_000);
    assert_eq!(newcomers(&world), 0);
    pass(&mut world, 1_000);
    world.heal();
    assert_eq!((newcomers(&world), stage(&world, &old)), (1, None));
}

#[test]
fn a_new_generation_of_what_moves_ends_the_move() {
    let (mut world, ..) = begun();
    act(&mut world, Op::Change(0, 6));
    assert!(world.state.moves.under_way.is_empty());
    world.heal();
    let held: Vec<_> = world.state.reservations.values().collect();
    assert!(held.iter().all(|held| held.stage == Stage::Serving), "{held:?}");
}

#[test]
fn a_machine_is_drained_by_what_is_ready_elsewhere_and_a_cordoned_one_keeps_what_it_has() {
    let mut world = World::new(2);
    for op in [Op::Change(0, 0), Op::Scale(0, 3), Op::Work(0), Op::Work(1), Op::Submit(0, 0)] {
        act(&mut world, op);
    }
    let on = |world: &World, machine: &str| {
        let held = world.state.reservations.values().filter(|held| held.machine.as_str() == machine);
        held.filter(|held| held.stage == Stage::Serving && held.attempt().is_none()).count()
    };
    let before = (on(&world, "m0"), on(&world, "m1"));
    act(&mut world, Op::Close(0, Some(MachineMode::Cordoned)));
    act(&mut world, Op::Scale(0, 4));
    assert_eq!((on(&world, "m0"), on(&world, "m1")), (before.0, before.1 + 1), "it goes to the other one");
    act(&mut world, Op::Work(1));
    act(&mut world, Op::Scale(0, 3));
    act(&mut world, Op::Close(0, Some(MachineMode::Draining)));
    for turn in 0..60 {
        // What is new gets ready only now and then; nobody leaves before: `act` judges that.
        act(&mut world, Op::Time(200));
        act(&mut world, if turn % 3 == 0 { Op::Work(1) } else { Op::Work(0) });
    }
    assert_eq!((on(&world, "m0"), on(&world, "m1")), (0, 3));
}

#[test]
fn moves_for_their_own_sake_pay_come_seldom_and_can_be_switched_off() {
    let mut world = World::new(5);
    // Slices on both GPUs of m0, whose A would be of use whole as m4's is, and m1's B is free.
    for op in [Op::Silence(1), Op::Silence(4), Op::Change(0, 5), Op::Work(0), Op::Return(4)] {
        act(&mut world, op);
    }
    for op in [Op::Change(1, 4), Op::Scale(1, 1), Op::Work(4), Op::Return(1), Op::Work(1)] {
        act(&mut world, op);
    }
    let pass = |world: &mut World, ms: u64| {
        act(world, Op::Time(ms));
        (0..5).for_each(|machine| drop(act(world, Op::Work(machine))));
    };
    pass(&mut world, 10_000_000);
    assert!(world.state.moves.under_way.is_empty(), "switched off");
    world.state.moves.policy.tidy_pause_ms = Some(600_000);
    world.state.moves.tidied_ms = Some(world.state.now_ms);
    pass(&mut world, 599_999);
    assert!(world.state.moves.under_way.is_empty(), "too soon");
    act(&mut world, Op::Time(1));
    let moving = world.state.moves.under_way[&MoveCause::Tidying].clone();
    let held = &world.state.reservations[&moving.moves[0].instance];
    assert_eq!((moving.moves.len(), held.machine.as_str(), held.assignment.gpus[0]), (1, "m0", 0));
    assert_eq!(moving.moves[0].machine.as_str(), "m1");
    for _ in 0..8 {
        pass(&mut world, 300);
    }
    assert!(world.state.moves.under_way.is_empty());
    let statuses = anyplace_location_core::move_statuses(&world.state);
    assert_eq!(statuses.len(), 1);
    assert!(
        statuses[0].step == MoveStep::Done && statuses[0].message.contains("useless pieces"),
        "{statuses:?}"
    );
    // Nothing more pays.
    for _ in 0..10 {
        pass(&mut world, 600_000);
        assert!(world.state.moves.under_way.is_empty());
    }
}

#[test]
fn records_are_read_as_they_were_written_and_older_reservations_too() {
    let (world, old, copy) = begun();
    let moving = &world.state.moves.under_way[&room()];
    let text = serde_json::to_string(moving).unwrap();
    assert_eq!(serde_json::from_str::<anyplace_location_core::Moving>(&text).unwrap(), *moving);
    let text = serde_json::to_string(&world.state.reservations[&copy]).unwrap();
    let read: anyplace_location_core::Reservation = serde_json::from_str(&text).unwrap();
    assert_eq!(read, world.state.reservations[&copy]);
    let before = serde_json::to_value(&world.state.reservations[&old]).unwrap();
    assert!(before.get("replaces").is_none(), "written as before there were moves");
}

#[derive(Debug, Default)]
struct Seen {
    begun: usize,
    moved: usize,
    gave_up: usize,
    ended: usize,
    tidied: usize,
}

/// Mostly GPUs that are nearly full, and machines that do as they are told.
fn any_op(seed: &mut Seed) -> Op {
    let (machine, name) = (seed.below(6) as usize, seed.below(4) as usize);
    let shape = [4, 5, 5, 6, 6, 2][seed.below(6) as usize];
    match seed.below(100) {
        0..20 => Op::Work(machine),
        20..25 => Op::Sync(machine),
        25..30 => Op::Report(machine),
        30..50 => Op::Time(seed.below(1_500)),
        50..55 => Op::Time(3_000),
        55..59 => Op::Health(machine, seed.next() as u8 | seed.next() as u8),
        59..65 => Op::Silence(machine),
        65..66 => Op::Lose(machine),
        66..74 => Op::Return(machine),
        74..94 => Op::Scale(name, seed.below(4) as u32),
        94..96 => Op::Change(name, shape),
        96..97 => Op::Delete(name),
        97..98 => Op::Submit(name, shape),
        98..99 => Op::Close(machine, [None, Some(MachineMode::Draining)][seed.below(2) as usize]),
        _ => Op::Forget(name),
    }
}

/// Slices have most GPUs of m0 and m5, others are free, and more ask for a whole one of model A than there are.
fn nearly_full(seed: &mut Seed) -> World {
    let mut world = World::new(6);
    world.state.moves.policy.tidy_pause_ms = [None, Some(1_000)][seed.below(2) as usize];
    let only = |machine: usize| (0..6).filter(move |other| *other != machine);
    for (name, machine) in [(0, 0), (1, 5)] {
        only(machine).for_each(|other| drop(act(&mut world, Op::Silence(other))));
        act(&mut world, Op::Change(name, 5));
        act(&mut world, Op::Scale(name, 1 + seed.below(2) as u32));
        act(&mut world, Op::Work(machine));
        only(machine).for_each(|other| drop(act(&mut world, Op::Return(other))));
    }
    for name in [2, 3] {
        act(&mut world, Op::Change(name, 4));
        act(&mut world, Op::Scale(name, 1 + seed.below(2) as u32));
    }
    act(&mut world, Op::Time(1_000));
    world
}

#[test]
fn random_histories_of_moves_keep_what_they_promise() {
    let (mut seed, mut seen) = (Seed::from_env(), Seen::default());
    for _ in 0..rounds(25, 2_000) {
        let mut world = nearly_full(&mut seed);
        for _ in 0..40 {
            let before = world.state.moves.under_way.clone();
            act(&mut world, any_op(&mut seed));
            // Mostly machines keep up.
            let at_work = if seed.below(10) < 6 { 6 } else { 0 };
            (0..at_work).for_each(|machine| drop(act(&mut world, Op::Work(machine))));
            let now = &world.state.moves.under_way;
            seen.begun += now.keys().filter(|cause| !before.contains_key(cause)).count();
            let tidies = |cause: &&MoveCause| **cause == MoveCause::Tidying && !before.contains_key(*cause);
            seen.tidied += now.keys().filter(tidies).count();
            seen.ended += before.keys().filter(|cause| !now.contains_key(cause)).count();
            let failed = |(cause, moving): &(&MoveCause, &anyplace_location_core::Moving)| {
                moving.gave_up.is_some() && before.get(*cause).is_some_and(|it| it.gave_up.is_none())
            };
            seen.gave_up += now.iter().filter(failed).count();
        }
        world.heal();
        oracle::settled(&world).unwrap();
        assert!(world.state.machines.values().all(|machine| machine.life == Life::Alive));
        let moved = |step: &&MoveStep| **step == MoveStep::Done;
        seen.moved += step_of(&world).iter().filter(moved).count();
    }
    println!("{seen:?}");
    // What else can happen has a test of its own.
    assert!(seen.ended > 0, "histories too dull to show anything");
}
