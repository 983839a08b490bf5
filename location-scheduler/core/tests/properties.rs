//! Random histories of a location, with agents that act on what they are told, judged by an oracle that shares no
//! code with the planner.

#![allow(clippy::unwrap_used, reason = "a test: it should stop there")]

#[path = "properties/moves.rs"]
mod moves;
#[path = "properties/oracle.rs"]
mod oracle;
#[path = "properties/preemption.rs"]
mod preemption;
#[path = "properties/world.rs"]
mod world;

use anyplace_location_core::{Limits, plan_room};
use anyplace_model::MachineMode;
use proptest::prelude::*;
use world::{Op, World};

fn mode() -> impl Strategy<Value = Option<MachineMode>> {
    prop_oneof![Just(None), Just(Some(MachineMode::Cordoned)), Just(Some(MachineMode::Draining))]
}

fn op() -> impl Strategy<Value = Op> {
    let (machine, name) = (0..4_usize, 0..3_usize);
    prop_oneof![
        8 => machine.clone().prop_map(Op::Sync),
        8 => machine.clone().prop_map(Op::Report),
        8 => machine.clone().prop_map(Op::Work),
        6 => (machine.clone(), any::<u8>()).prop_map(|(m, mask)| Op::Health(m, mask)),
        3 => machine.clone().prop_map(Op::Silence),
        2 => machine.clone().prop_map(Op::Lose),
        4 => machine.clone().prop_map(Op::Return),
        6 => (0..400_u64).prop_map(Op::Time),
        5 => (name.clone(), 0..6_u32).prop_map(|(n, count)| Op::Scale(n, count)),
        4 => (name.clone(), 0..8_usize).prop_map(|(n, shape)| Op::Change(n, shape)),
        1 => name.prop_map(Op::Delete),
        3 => (0..4_usize, 0..8_usize).prop_map(|(job, shape)| Op::Submit(job, shape)),
        2 => (0..4_usize).prop_map(Op::Forget),
        2 => machine.clone().prop_map(Op::Finish),
        2 => machine.clone().prop_map(Op::Fetch),
        1 => any::<bool>().prop_map(Op::DrainLocation),
        2 => (machine, mode()).prop_map(|(m, mode)| Op::Close(m, mode)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_history_overbooks_and_every_wish_is_met_or_explained(
        machines in 0..5_usize,
        ops in proptest::collection::vec(op(), 1..120),
    ) {
        let mut world = World::new(machines);
        for op in ops {
            world.act(op);
            let before = world.state.clone();
            let plan = world.step();
            oracle::judge(&before, &plan, &world.state)?;
            oracle::moves(&world.state, &plan)?;
            oracle::under_way(&before, &world.state)?;
            oracle::physical(&world)?;
            oracle::stable(&world)?;
        }
        world.heal();
        oracle::settled(&world)?;
    }
}

#[test]
fn room_is_made_for_whom_only_a_gpu_that_others_use_will_do() {
    let mut world = World::new(2);
    let act = |world: &mut World, op| {
        world.act(op);
        world.step()
    };
    // While the other machine is silent, two slices take both GPUs of the first, of models A and B.
    for op in [Op::Silence(1), Op::Change(0, 5), Op::Work(0), Op::Return(1), Op::Change(1, 4)] {
        act(&mut world, op);
    }
    let newcomer: anyplace_model::DeploymentName = "d1".parse().unwrap();
    let plan = act(&mut world, Op::Scale(1, 1));
    assert_eq!(plan.placements[&newcomer].refused, 1);
    let room = plan_room(&world.state, &newcomer, Limits::default()).unwrap();
    let moved = &world.state.reservations[&room.moves[0].instance];
    assert_eq!(moved.deployment().unwrap().as_str(), "d0");
    assert_eq!(moved.assignment.gpus, [0], "the one of model A");
    let to: Vec<&str> = room.moves.iter().map(|step| step.machine.as_str()).collect();
    assert_eq!((to, room.machine.as_str(), room.gpus), (vec!["m1"], "m0", vec![0]));
    // A deployment that has fewer ready ones than it should isn't touched.
    act(&mut world, Op::Health(0, 0b10));
    act(&mut world, Op::Report(0));
    assert_eq!(plan_room(&world.state, &newcomer, Limits::default()), None);
}

#[test]
fn room_is_free_only_by_a_report_of_who_knew_what_was_taken_back() {
    let mut world = World::new(1);
    let act = |world: &mut World, op| {
        world.act(op);
        world.step();
    };
    act(&mut world, Op::Change(0, 0));
    assert_eq!(world.state.reservations.len(), 2);
    act(&mut world, Op::Delete(0));
    // The machine has heard neither of the instances nor of their end: what it reports proves nothing, however late.
    for _ in 0..3 {
        act(&mut world, Op::Time(60_000));
        act(&mut world, Op::Report(0));
    }
    assert_eq!(world.state.reservations.len(), 2);
    act(&mut world, Op::Sync(0));
    act(&mut world, Op::Report(0));
    assert!(world.state.reservations.is_empty());
    // Nor does a machine take anything that came back from a loss and doesn't know yet what it lost.
    act(&mut world, Op::Change(0, 0));
    act(&mut world, Op::Lose(0));
    assert!(world.state.reservations.is_empty());
    act(&mut world, Op::Return(0));
    assert!(world.state.reservations.is_empty(), "they may begin any time");
    act(&mut world, Op::Sync(0));
    act(&mut world, Op::Report(0));
    assert_eq!(world.state.reservations.len(), 2);
}
