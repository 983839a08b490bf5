//! `capacity`: what each location has, and what it could take now.

use std::collections::BTreeMap;

use anyplace_api::CapacityView;
use anyplace_model::{Advert, Bytes};

use super::get::location_state;
use crate::{
    context::Session,
    output::{self, Format, Table, cores, size},
};

pub(super) async fn run(session: &Session, format: Format) -> anyhow::Result<()> {
    let views = session.api()?.capacity().await?;
    output::data(format, &views, || {
        let mut table = Table::new(&[
            "LOCATION",
            "STATE",
            "MACHINES",
            "CPU FREE/ALL",
            "MEMORY FREE/ALL",
            "GPUS (LARGEST FREE)",
            "OFF-PEAK",
            "NOW",
            "INSTANCES",
        ]);
        for view in &views {
            table.row(row(view));
        }
        if table.is_empty() {
            output::note("no locations; start a location scheduler with a token of the role `location`");
        }
        table.to_string()
    })
}

fn row(view: &CapacityView) -> [String; 9] {
    let advert = &view.advert;
    [
        view.location.to_string(),
        location_state(view.alive, view.withdrawn, view.draining),
        advert.machines.to_string(),
        format!("{}/{}", cores(advert.free_cpu), cores(advert.cpu)),
        format!("{}/{}", size(advert.free_memory), size(advert.memory)),
        gpus(advert),
        window(advert),
        output::yes_no(view.off_peak_now),
        view.instances.to_string(),
    ]
}

/// Each model with its number, and its largest free block.
pub(super) fn gpus(advert: &Advert) -> String {
    let mut largest: BTreeMap<&str, Bytes> = BTreeMap::new();
    for block in &advert.gpu_blocks {
        let entry = largest.entry(&block.model).or_default();
        *entry = (*entry).max(block.memory);
    }
    let model = |(model, count): (&String, &u32)| {
        let free = largest.get(model.as_str()).copied().unwrap_or_default();
        format!("{count}x {model} ({})", size(free))
    };
    advert.gpus.iter().map(model).collect::<Vec<_>>().join(", ")
}

/// The off-peak window with its time zone.
pub(super) fn window(advert: &Advert) -> String {
    advert.off_peak.map(|window| format!("{window} {}", advert.timezone)).unwrap_or_default()
}
