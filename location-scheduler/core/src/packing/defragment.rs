//! Moves for their own sake: those after which so much less is free and of no use that they pay.

use std::collections::HashMap;

use super::{Ask, GpuSet, Move, Packer, Tenant};

/// Machines that are kept for each ask: enough that one of them may take the tenant.
const LOOK_AMONG: usize = 16;

/// At most `most` moves, each of which lessens fragments by more than its price, the best first. The packer is left as
/// it is after them. `may` says whether a tenant may go to a machine.
pub fn defragment(
    packer: &mut Packer,
    tenants: &[Tenant],
    most: usize,
    may: &dyn Fn(usize, usize) -> bool,
) -> Vec<Move> {
    let mut moves: Vec<Move> = Vec::new();
    while moves.len() < most {
        let Some(best) = best(packer, tenants, &moves, may) else { break };
        let tenant = &tenants[best.tenant];
        packer.take(best.machine, &tenant.ask, best.gpus);
        packer.give_back(tenant.machine, &tenant.ask, tenant.gpus);
        moves.push(best);
    }
    moves
}

/// The move that pays most.
fn best(
    packer: &mut Packer,
    tenants: &[Tenant],
    moved: &[Move],
    may: &dyn Fn(usize, usize) -> bool,
) -> Option<Move> {
    let mut entries: HashMap<Ask, Vec<(i64, usize, GpuSet)>> = HashMap::new();
    let mut best: Option<(i64, Move)> = None;
    for (number, tenant) in tenants.iter().enumerate() {
        let Some(price) = tenant.price.and_then(|price| i64::try_from(price).ok()) else { continue };
        if tenant.ask.gpus == 0 || moved.iter().any(|done| done.tenant == number) {
            continue;
        }
        let entries = entries.entry(tenant.ask).or_insert_with(|| entries_of(packer, &tenant.ask));
        // What the best machine gains is more than enough for most: they needn't be looked at.
        let Some((growth, ..)) = entries.first() else { continue };
        let worth = best.map_or(0, |(most, _)| most);
        let leaving = packer.gain(tenant.machine, |free| free.give_back(&tenant.ask, tenant.gpus));
        if leaving - growth - price <= worth {
            continue;
        }
        let entry =
            entries.iter().find(|(_, machine, _)| *machine != tenant.machine && may(number, *machine));
        let Some((growth, machine, gpus)) = entry.copied() else { continue };
        let gain = leaving - growth - price;
        if gain > worth {
            best = Some((gain, Move { tenant: number, machine, gpus }));
        }
    }
    best.map(|(_, best)| best)
}

/// Where something could go, and by how much fragments would grow there; the best first.
fn entries_of(packer: &mut Packer, ask: &Ask) -> Vec<(i64, usize, GpuSet)> {
    let mut entries: Vec<(i64, usize, GpuSet)> = (0..packer.len())
        .filter_map(|machine| packer.fit(machine, ask).ok().map(|fit| (fit.fragments, machine, fit.gpus)))
        .collect();
    entries.sort_unstable();
    entries.truncate(LOOK_AMONG);
    entries
}
