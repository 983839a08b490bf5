//! Random histories of a location, with agents that act on what they are told, judged by an oracle that shares no
//! code with the planner.

#![allow(clippy::unwrap_used, reason = "a test: it should stop there")]

#[path = "properties/oracle.rs"]
mod oracle;
#[path = "properties/world.rs"]
mod world;

use proptest::prelude::*;
use world::{Op, World};

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
        2 => machine.prop_map(Op::Fetch),
        1 => any::<bool>().prop_map(Op::DrainLocation),
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
            oracle::physical(&world)?;
            oracle::stable(&world)?;
        }
        world.heal();
        oracle::settled(&world)?;
    }
}
