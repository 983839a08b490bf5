//! The programs against their model: the same packets and tables, and each verdict, packet, counter and flow compared.
//!
//! Tables are drawn anew for each few thousand packets. A difference is reported with the seed and the frame; once it
//! is understood, the frame goes into `ebpf/model/corpus`, which is run here too.
//!
//! `ANYPLACE_SEED` replays a run, `ANYPLACE_PACKETS` makes it longer.

use std::{fs, path::Path};

use anyplace_ebpf_model::Program;
use anyplace_seed::Seed;

use crate::world::World;
use crate::{namespaces::root_or_skip, random};

/// Packets of an ordinary run.
const PACKETS: usize = 200_000;
/// Packets for each set of tables.
const PACKETS_A_TABLE: usize = 10_000;

#[test]
fn programs_and_model_agree_on_random_packets() {
    if !root_or_skip() {
        return;
    }
    let packets = std::env::var("ANYPLACE_PACKETS")
        .map_or(PACKETS, |count| count.parse().expect("ANYPLACE_PACKETS is a number"));
    let mut random = Seed::from_env();
    let mut world = World::new();
    let (mut done, mut refused) = (0, 0);
    while done < packets {
        world.draw_tables(&mut random);
        for number in done..done + PACKETS_A_TABLE {
            let (program, frame) = random::packet(&mut random);
            if !world.check(program, &frame, &format!("packet {number}")) {
                refused += 1;
            }
        }
        done += PACKETS_A_TABLE;
        world.check_state(&format!("before packet {done}"));
    }
    eprintln!("{done} packets, {refused} of them refused by the kernel before any program");
    assert!(refused < done / 10);
    for (what, coverage) in [("packet", world.coverage()), ("IPv6 packet", world.coverage6())] {
        eprintln!("by {what}s: {coverage:?}");
        // The model knows no clock, so the rate limit is off here.
        let missed: Vec<_> =
            coverage.iter().filter(|(name, count)| **count == 0 && **name != "icmp_limited").collect();
        assert!(missed.is_empty(), "no {what} came to {missed:?}");
    }
}

#[test]
fn programs_and_model_agree_on_the_corpus() {
    if !root_or_skip() {
        return;
    }
    let mut world = World::new();
    world.draw_tables(&mut Seed::new(1));
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/corpus");
    let mut count = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            let line = line.split('#').next().unwrap().trim();
            let Some((program, hex)) = line.split_once(' ') else { continue };
            let program = match program {
                "ingress" => Program::Ingress,
                "target" => Program::Target,
                "reply" => Program::Reply,
                other => panic!("{}:{}: program {other}", path.display(), number + 1),
            };
            let frame: Vec<u8> = (0..hex.len() / 2)
                .map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap())
                .collect();
            world.check(program, &frame, &format!("{}:{}", path.display(), number + 1));
            count += 1;
        }
    }
    assert!(count > 0, "{} is empty", folder.display());
    world.check_state("after the corpus");
}
