//! How many instructions the programs have, beside what is recorded in `ebpf/loader/instructions.json`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use anyplace_ebpf::Capacity;
use serde::{Deserialize, Serialize};

use crate::{Bed, report};

/// Of one program.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Count {
    /// After the verifier's rewriting, as loaded.
    instructions: u32,
    /// That the verifier walked through, all paths together.
    verified: u32,
}

pub(crate) fn measure(bed: &Bed) -> Result<()> {
    let recorded: BTreeMap<String, Count> =
        serde_json::from_slice(&std::fs::read(path()).with_context(|| format!("read {}", path().display()))?)
            .context("instructions.json")?;
    for (name, count) in counts(bed)? {
        report(&format!("instructions_{name}"), f64::from(count.instructions));
        report(&format!("verified_{name}"), f64::from(count.verified));
        if let Some(recorded) = recorded.get(&name) {
            let growth = |now: u32, then: u32| f64::from(now) / f64::from(then.max(1));
            let growth = growth(count.instructions, recorded.instructions)
                .max(growth(count.verified, recorded.verified));
            report(&format!("growth_{name}"), growth);
        }
    }
    Ok(())
}

/// Writes the record anew.
pub(crate) fn record(bed: &Bed) -> Result<()> {
    let text = serde_json::to_string_pretty(&counts(bed)?)? + "\n";
    std::fs::write(path(), text).with_context(|| format!("write {}", path().display()))
}

fn counts(bed: &Bed) -> Result<BTreeMap<String, Count>> {
    let plane = bed.plane("instructions", Capacity::default())?;
    let mut counts = BTreeMap::new();
    for (name, program) in plane.object().programs() {
        if program.fd().is_err() {
            continue;
        }
        let info = program.info()?;
        let instructions =
            info.size_translated().context("the kernel doesn't show the translated program")? / 8;
        let verified = info.verified_instruction_count().unwrap_or(0);
        counts.insert(name.to_owned(), Count { instructions, verified });
    }
    plane.unload()?;
    Ok(counts)
}

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../ebpf/loader/instructions.json")
}
