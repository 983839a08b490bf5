//! The oracle computes with fractions of GPUs in floating point, from the paper's definition, and remembers nothing.

use anyplace_seed::Seed;

use super::*;

const GIB: i64 = 1 << 30;

fn machine(seed: &mut Seed) -> Free {
    let cpu = 1_000 * seed.pick(&[8, 32, 96]);
    let gpus = seed.pick(&[0, 1, 2, 8]);
    let (model, size) = seed.pick(&[(0, 16 * GIB), (1, 80 * GIB)]);
    let gpus = vec![Gpu::new(model, size); gpus];
    Free { cpu, memory: cpu / 1_000 * 4 * GIB, disk: 100 * GIB, gpus, all_cpu: cpu }
}

fn ask(seed: &mut Seed) -> Ask {
    let slice = Some(GIB * seed.pick(&[2, 5, 8, 13, 16]));
    let (gpus, slice) =
        seed.pick(&[(0, None), (1, slice), (1, slice), (1, None), (2, None), (2, slice), (8, None)]);
    let models = seed.pick(&[Models::ANY, Models::ANY, Models::these([1])]);
    Ask {
        cpu: 500 * seed.pick(&[1, 4, 16]),
        memory: GIB * seed.pick(&[1, 8]),
        disk: GIB,
        gpus,
        slice,
        models,
    }
}

fn free_part(gpu: &Gpu) -> f64 {
    gpu.free() as f64 / gpu.size as f64
}

fn is_able(gpu: &Gpu, ask: &Ask) -> bool {
    let is_allowed = ask.models == Models::ANY || gpu.model == 1;
    is_allowed && ask.slice.map_or(gpu.is_whole(), |slice| gpu.free() >= slice)
}

/// The part of a machine's GPUs that is of no use, in GPUs.
fn fragments(free: &Free, asks: &[(Ask, u64)]) -> f64 {
    let (mut sum, mut all) = (0.0, 0.0);
    for (ask, count) in asks.iter().filter(|(ask, _)| ask.gpus > 0) {
        let able = free.gpus.iter().filter(|gpu| is_able(gpu, ask)).count();
        let fits = able >= ask.gpus as usize && free.cpu >= ask.cpu && free.memory >= ask.memory;
        let lost = free.gpus.iter().filter(|gpu| !fits || !is_able(gpu, ask)).map(free_part).sum::<f64>();
        sum += lost * *count as f64;
        all += *count as f64;
    }
    if all == 0.0 { 0.0 } else { sum / all }
}

/// Growth and unevenness of the best choice, in GPUs.
fn least(free: &Free, ask: &Ask, asks: &[(Ask, u64)]) -> Option<f64> {
    let able: Vec<u32> =
        (0..free.gpus.len() as u32).filter(|index| is_able(&free.gpus[*index as usize], ask)).collect();
    if free.cpu < ask.cpu
        || free.memory < ask.memory
        || free.disk < ask.disk
        || able.len() < ask.gpus as usize
    {
        return None;
    }
    let mut choices: Vec<Vec<u32>> = able.iter().map(|gpu| vec![*gpu]).collect();
    if ask.gpus != 1 {
        let mut tightest = able;
        tightest.sort_by(|a, b| {
            let part = |gpu: &u32| free_part(&free.gpus[*gpu as usize]);
            part(a).total_cmp(&part(b)).then(a.cmp(b))
        });
        choices = vec![tightest[..ask.gpus as usize].to_vec()];
    }
    let costs = choices.into_iter().map(|gpus| {
        let mut after = free.clone();
        after.take(ask, GpuSet::of(gpus));
        let uneven = match after.gpus.len() {
            0 => 0.0,
            gpus => {
                let free = after.gpus.iter().map(free_part).sum::<f64>() / gpus as f64;
                (after.cpu as f64 / after.all_cpu as f64 - free).abs()
            }
        };
        fragments(&after, asks) - fragments(free, asks) + 0.14 * uneven
    });
    costs.min_by(f64::total_cmp)
}

#[test]
fn costs_are_those_of_the_definition_whatever_happened_before() {
    let mut seed = Seed::from_env();
    for _ in 0..40 {
        let asks: Vec<(Ask, u64)> =
            (0..1 + seed.index(12)).map(|_| (ask(&mut seed), 1 + seed.below(9))).collect();
        let mut packer = Packer::new(Mix::of(asks.iter().copied()));
        let machines: Vec<usize> = (0..6).map(|_| packer.add(machine(&mut seed))).collect();
        let mut placed: Vec<(usize, Ask, GpuSet)> = Vec::new();
        for _ in 0..120 {
            if !placed.is_empty() && seed.one_in(3) {
                let (machine, ask, gpus) = placed.swap_remove(seed.index(placed.len()));
                packer.give_back(machine, &ask, gpus);
            }
            let ask = if seed.one_in(2) { asks[seed.index(asks.len())].0 } else { ask(&mut seed) };
            for machine in &machines {
                let free = packer.free(*machine).clone();
                let found = packer.fit(*machine, &ask);
                match (found, least(&free, &ask, &asks)) {
                    (Ok(fit), Some(least)) => {
                        let found = (fit.cost.growth * GRAIN) as f64 / PARTS as f64;
                        // A grain, and what whole numbers of parts lose.
                        assert!((found - least).abs() < 0.0045, "{found} {least} {free:?} {ask:?}");
                        assert_eq!(fit.gpus.iter().count(), ask.gpus as usize);
                        assert!(fit.gpus.iter().all(|gpu| is_able(&free.gpus[gpu as usize], &ask)));
                    }
                    (Err(_), None) => {}
                    (found, least) => panic!("{found:?} {least:?} {free:?} {ask:?}"),
                }
            }
            let machine = seed.pick(&machines);
            if let Ok(fit) = packer.fit(machine, &ask) {
                packer.take(machine, &ask, fit.gpus);
                placed.push((machine, ask, fit.gpus));
            }
        }
        for (machine, ask, gpus) in placed {
            packer.give_back(machine, &ask, gpus);
        }
        assert!(machines.iter().all(|machine| packer.free(*machine).gpus.iter().all(Gpu::is_whole)));
    }
}

#[test]
fn a_slice_goes_where_nothing_larger_would_fit_any_more() {
    let slice =
        |gib: i64| Ask { cpu: 0, memory: 0, disk: 0, gpus: 1, slice: Some(gib * GIB), models: Models::ANY };
    let mix = Mix::of([(slice(8), 5), (slice(5), 5), (Ask { slice: None, ..slice(0) }, 1)]);
    let mut packer = Packer::new(mix);
    let gpus = vec![Gpu::new(0, 16 * GIB); 3];
    let machine = packer.add(Free { cpu: 1_000, memory: GIB, disk: 0, gpus, all_cpu: 1_000 });
    packer.take(machine, &slice(11), GpuSet::of([0]));
    packer.take(machine, &slice(8), GpuSet::of([2]));
    // Five of five, eight of eight, and a whole one stays whole.
    assert_eq!(packer.fit(machine, &slice(5)).unwrap().gpus, GpuSet::of([0]));
    assert_eq!(packer.fit(machine, &slice(8)).unwrap().gpus, GpuSet::of([2]));
    assert_eq!(packer.fit(machine, &Ask { slice: None, ..slice(0) }).unwrap().gpus, GpuSet::of([1]));
    assert_eq!(packer.fit(machine, &Ask { gpus: 2, slice: None, ..slice(0) }), Err(Lack::Gpus(1)));
}

#[test]
fn sizes_that_no_machine_has_overflow_nothing() {
    let huge = Ask {
        cpu: i64::MAX,
        memory: i64::MAX,
        disk: i64::MAX,
        gpus: 64,
        slice: Some(i64::MAX),
        models: Models::ANY,
    };
    let mut packer = Packer::new(Mix::of([(huge, u64::MAX), (Ask { cpu: 0, ..huge }, u64::MAX)]));
    let gpus = vec![Gpu::new(Models::UNNAMED, i64::MAX); 80];
    let machine =
        packer.add(Free { cpu: i64::MAX, memory: i64::MAX, disk: i64::MAX, gpus, all_cpu: i64::MAX });
    let fit = packer.fit(machine, &huge).unwrap();
    assert_eq!(fit.gpus.iter().count(), 64);
    for _ in 0..3 {
        packer.take(machine, &huge, fit.gpus);
    }
    // Sixteen are beyond those that can be used; none of the others is free.
    assert!(packer.fit(machine, &Ask { cpu: i64::MIN, memory: i64::MIN, disk: i64::MIN, ..huge }).is_err());
}
