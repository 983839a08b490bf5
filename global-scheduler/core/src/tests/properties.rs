//! Random states; every plan is judged by a validator that shares no code with the planner.

use std::collections::BTreeMap;

use anyplace_model::{Bytes, GpuBlock, Isolation, MilliCpu};
use proptest::prelude::*;

use super::*;

const GIB: u64 = 1 << 30;

fn any_advert() -> impl Strategy<Value = Advert> {
    (1u32..4, 1u64..9, 1u64..9, 0u32..4, 0..2usize, any::<bool>()).prop_map(
        |(machines, cpu, memory, gpus, region, sandbox)| {
            let mut advert = advert();
            advert.machines = machines;
            advert.region = ["eu", "us"][region].into();
            let all = u64::from(machines);
            (advert.cpu, advert.free_cpu) = (MilliCpu(cpu * 1_000 * all), MilliCpu(cpu * 1_000 * all));
            advert.largest_free_cpu = MilliCpu(cpu * 1_000);
            (advert.memory, advert.free_memory) = (Bytes(memory * GIB * all), Bytes(memory * GIB * all));
            advert.largest_free_memory = Bytes(memory * GIB);
            if gpus > 0 {
                advert.gpus = BTreeMap::from([("L4".to_string(), gpus)]);
                advert.gpu_blocks = vec![GpuBlock {
                    model: "L4".into(),
                    memory: Bytes(24 * GIB),
                    whole: true,
                    count: gpus,
                    most_in_one_machine: gpus.min(2),
                }];
            }
            if sandbox {
                advert.isolations.push(Isolation::Sandbox);
            }
            advert
        },
    )
}

prop_compose! {
    fn any_location()(
        advert in any_advert(), liveness in 0..8, draining in 0..6, withdrawn in 0..6,
    ) -> Location {
        let mut location = location(advert);
        location.liveness = match liveness {
            0 => Liveness::Lost,
            1 => Liveness::Unknown,
            _ => Liveness::Alive,
        };
        location.settings.draining = draining == 0;
        location.settings.withdrawn = withdrawn == 0;
        location
    }
}

prop_compose! {
    fn any_deployment(locations: usize)(
        min in 1u32..7, cpu in 1u64..5, memory in 1u64..5, region in 0..4, sandbox in 0..5, gpu in 0u32..5,
        shares in prop::collection::vec((0u32..3, 0u32..2, 0u32..3), locations),
        demand in prop::collection::vec(0.0..100.0, 0..=locations),
    ) -> Deployment {
        let mut spec = deployment("{}");
        spec.instances.min = min;
        spec.resources.cpu = MilliCpu(cpu * 500);
        spec.resources.memory = Bytes(memory * GIB / 2);
        if region == 0 {
            spec.placement.regions = vec!["us".into()];
        }
        if sandbox == 0 {
            spec.isolation = Isolation::Sandbox;
        }
        spec.resources.gpu = match gpu {
            0 => Some(anyplace_model::GpuRequest { count: 1, memory: Some(Bytes(10 * GIB)), models: vec![] }),
            1 => Some(anyplace_model::GpuRequest { count: 2, memory: None, models: vec!["L4".into()] }),
            _ => None,
        };
        let shares = shares.into_iter().enumerate().filter(|(_, share)| share.0 > 0).map(
            |(index, (count, refused, ready))| {
                // Nothing is on its way: the oracle adds up without knowing what else needs room.
                let refused = refused.min(count);
                let reserved = count - refused;
                let share = Share { count, reserved, refused, ready: ready.min(count) };
                (id(&format!("l{index}")), share)
            },
        ).collect();
        let demand = demand.into_iter().zip(0..).map(|(rate, index)| (id(&format!("l{index}")), rate)).collect();
        Deployment { spec, shares, demand }
    }
}

fn any_state() -> impl Strategy<Value = State> {
    (1usize..5, 1usize..5).prop_flat_map(|(locations, deployments)| {
        let locations_of = prop::collection::vec(any_location(), locations);
        let ms = prop::collection::vec(1.0..300.0, locations * locations);
        (locations_of, prop::collection::vec(any_deployment(locations), deployments), ms).prop_map(
            |(locations, deployments, ms)| {
                let ids: Vec<LocationId> =
                    (0..locations.len()).map(|index| id(&format!("l{index}"))).collect();
                let between =
                    |from: usize, to: usize| if from == to { 0.0 } else { ms[from * ids.len() + to] };
                let mut state = State {
                    locations: (0..).map(|index| id(&format!("l{index}"))).zip(locations).collect(),
                    deployments: (0..).map(|index| name(&format!("d{index}"))).zip(deployments).collect(),
                    latency: Latency::between(&ids, between).into(),
                    ..State::default()
                };
                for (name, deployment) in &state.deployments {
                    for (id, _) in deployment.shares.iter().filter(|(_, share)| share.refused > 0) {
                        let until = noon() + jiff::SignedDuration::from_secs(10);
                        let refusal =
                            Refusal { reason: ReasonCode::NoAddress, count: 1, message: String::new() };
                        let refused = RefusedUntil { until, refusals: vec![refusal] };
                        let location = state.locations.get_mut(id).unwrap();
                        location.refused.insert(name.clone(), refused);
                        // Half of them have tried in vain to make room.
                        if name.as_str().ends_with(['0', '2']) {
                            location.hopeless.insert(name.clone(), until);
                        }
                    }
                }
                state
            },
        )
    })
}

fn allows(location: &Location, spec: &DeploymentSpec) -> bool {
    let advert = location.advert.as_ref().unwrap();
    (spec.placement.regions.is_empty() || spec.placement.regions.contains(&advert.region))
        && advert.isolations.contains(&spec.isolation)
}

/// What the plan adds beyond what was there, by location and deployment.
fn added<'a>(state: &'a State, plan: &'a Plan) -> Vec<(&'a LocationId, &'a DeploymentSpec, u32)> {
    let mut added = Vec::new();
    for (name, counts) in &plan.counts {
        let deployment = &state.deployments[name];
        for (location, count) in counts {
            let before = deployment.shares.get(location).map_or(0, |share| share.count);
            // What is only hoped for is judged by itself.
            let hoped = u32::from(plan.hopes.get(name) == Some(location));
            if *count > before + hoped {
                added.push((location, &deployment.spec, count - before - hoped));
            }
        }
    }
    added
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_new_goes_where_it_may_not_or_exceeds_an_advert(state in any_state()) {
        let plan = plan(&state, noon());
        // CPU, memory, parts of GPUs, whole GPUs.
        let mut used: BTreeMap<&LocationId, (u64, u64, u64, u64)> = BTreeMap::new();
        for (location, spec, count) in added(&state, &plan) {
            let found = &state.locations[location];
            prop_assert_eq!(found.liveness, Liveness::Alive);
            prop_assert!(!found.settings.draining && !found.settings.withdrawn);
            prop_assert!(allows(found, spec));
            let advert = found.advert.as_ref().unwrap();
            prop_assert!(spec.resources.cpu <= advert.largest_free_cpu);
            prop_assert!(spec.resources.memory <= advert.largest_free_memory);
            let used = used.entry(location).or_default();
            let count = u64::from(count);
            used.0 += count * spec.resources.cpu.0;
            used.1 += count * spec.resources.memory.0;
            match &spec.resources.gpu {
                Some(gpu) if gpu.memory.is_some() => used.2 += count,
                Some(gpu) => used.3 += count * u64::from(gpu.count),
                None => {}
            }
        }
        for (location, (cpu, memory, parts, whole)) in used {
            let advert = state.locations[location].advert.as_ref().unwrap();
            prop_assert!(cpu <= advert.free_cpu.0);
            prop_assert!(memory <= advert.free_memory.0);
            // Two parts of 10Gi fit on a GPU of 24Gi.
            prop_assert!(parts.div_ceil(2) + whole <= u64::from(advert.gpus.values().sum::<u32>()));
        }
    }

    #[test]
    fn a_plan_that_was_carried_out_is_not_changed(mut state in any_state()) {
        let first = plan(&state, noon());
        carry_out(&mut state, &first);
        prop_assert_eq!(first.counts, plan(&state, noon()).counts);
    }

    #[test]
    fn hopes_are_few_and_only_for_what_is_missing(state in any_state()) {
        let plan = plan(&state, noon());
        for (name, location) in &plan.hopes {
            let (deployment, found) = (&state.deployments[name], &state.locations[location]);
            prop_assert!(plan.missing.contains_key(name) && plan.counts[name][location] > 0);
            prop_assert!(found.liveness == Liveness::Alive && !found.settings.draining && !found.settings.withdrawn);
            prop_assert!(allows(found, &deployment.spec) && !found.hopeless.contains_key(name));
            // While one location has it, no other is asked.
            let has_it = |(id, share): (&LocationId, &Share)| {
                let there = &state.locations[id];
                let is_left = there.settings.draining || !allows(there, &deployment.spec);
                let asks = !there.hopeless.contains_key(name) && there.liveness != Liveness::Lost;
                share.refused > 0 && asks && !(is_left && there.liveness == Liveness::Alive)
            };
            prop_assert!(!deployment.shares.iter().any(has_it));
        }
    }

    #[test]
    fn lost_instances_are_replaced_and_the_rest_stays(state in any_state()) {
        let plan = plan(&state, noon());
        for (name, deployment) in &state.deployments {
            let counts = &plan.counts[name];
            let at = |liveness: Liveness| -> u32 {
                let here = |id: &&LocationId| state.locations[*id].liveness == liveness;
                counts.keys().filter(here).map(|id| counts[id]).sum()
            };
            let total: u32 = counts.values().sum();
            let wanted = deployment.spec.instances.min;
            prop_assert!(plan.missing.get(name).map_or(0, |missing| missing.count) >= at(Liveness::Lost));
            match plan.missing.get(name) {
                None => prop_assert!(total - at(Liveness::Lost) >= wanted),
                Some(missing) => {
                    prop_assert!(missing.count <= wanted && !missing.refusals.is_empty());
                }
            }
            // Nobody moves from a location that is well while there are too few.
            for (id, share) in &deployment.shares {
                let location = &state.locations[id];
                let well = location.liveness == Liveness::Unknown
                    || (location.liveness == Liveness::Alive && !location.settings.draining
                        && allows(location, &deployment.spec));
                let present: u32 = deployment.shares.values().map(|share| share.count).sum();
                if well && present <= wanted {
                    let stays = share.count - share.refused;
                    prop_assert!(counts.get(id).copied().unwrap_or(0) >= stays);
                }
            }
        }
    }

    #[test]
    fn one_deployment_gets_all_that_there_is_room_for(
        locations in prop::collection::vec(any_location(), 1..5), wanted in 1u32..40, cpu in 1u64..5,
    ) {
        let mut spec = deployment("{}");
        spec.instances.min = wanted;
        spec.resources.cpu = MilliCpu(cpu * 500);
        let mut room = 0;
        for location in &locations {
            let advert = location.advert.as_ref().unwrap();
            let open = location.liveness == Liveness::Alive
                && !location.settings.draining && !location.settings.withdrawn;
            if open && advert.largest_free_cpu >= spec.resources.cpu {
                let by_memory = advert.free_memory.0 / spec.resources.memory.0;
                let by_disk = advert.free_disk.0 / spec.resources.disk.0;
                room += (advert.free_cpu.0 / spec.resources.cpu.0).min(by_memory).min(by_disk);
            }
        }
        let state = State {
            locations: (0..).map(|index| id(&format!("l{index}"))).zip(locations).collect(),
            deployments: BTreeMap::from([(name("hello"), Deployment { spec, shares: BTreeMap::new(), demand: BTreeMap::new() })]),
            ..State::default()
        };
        let plan = plan(&state, noon());
        let missing = plan.missing.get(&name("hello")).map_or(0, |missing| missing.count);
        prop_assert_eq!(u64::from(missing), u64::from(wanted).saturating_sub(room));
    }
}
