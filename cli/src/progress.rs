//! Progress of a push: a bar for each layer on a terminal, a line for each elsewhere.

use std::{
    collections::HashMap,
    io::IsTerminal as _,
    sync::{Arc, Mutex, PoisonError},
};

use anyplace_images::{Item, Progress, SharedProgress, Stage};
use anyplace_model::Bytes;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::output;

/// Message, bar, bytes and speed.
const BAR: &str = "{msg:22} [{bar:30}] {bytes:>10}/{total_bytes:10} {bytes_per_sec}";
const DONE: &str = "{msg:22} done {total_bytes}";

/// The receiver that fits standard error.
pub(crate) fn for_stderr() -> SharedProgress {
    if std::io::stderr().is_terminal() { Arc::new(Bars::default()) } else { Arc::new(Lines::default()) }
}

fn title(item: &Item) -> String {
    let stage = match item.stage {
        Stage::Pack => "pack",
        Stage::Send => "send",
        Stage::Fetch => "fetch",
    };
    format!("{stage} {}", item.name)
}

#[derive(Default)]
struct Bars {
    all: MultiProgress,
    bars: Mutex<HashMap<Item, ProgressBar>>,
}

impl Bars {
    fn with(&self, item: &Item, act: impl FnOnce(&ProgressBar)) {
        let mut bars = self.bars.lock().unwrap_or_else(PoisonError::into_inner);
        act(bars.entry(item.clone()).or_insert_with(|| {
            let bar = self.all.add(ProgressBar::new(0));
            bar.set_style(style(BAR));
            bar.set_message(title(item));
            bar
        }));
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

impl Progress for Bars {
    fn started(&self, item: &Item, total_bytes: u64) {
        // A blob that is sent again starts again.
        self.with(item, |bar| {
            bar.set_length(total_bytes);
            bar.set_position(0);
        });
    }

    fn advanced(&self, item: &Item, bytes: u64) {
        self.with(item, |bar| bar.inc(bytes));
    }

    fn finished(&self, item: &Item) {
        self.with(item, |bar| {
            bar.set_style(style(DONE));
            bar.finish();
        });
    }

    fn skipped(&self, item: &Item, total_bytes: u64) {
        self.with(item, |bar| {
            bar.set_length(total_bytes);
            bar.set_style(style(DONE));
            bar.finish_with_message(format!("{} (there)", title(item)));
        });
    }
}

#[derive(Default)]
struct Lines {
    totals: Mutex<HashMap<Item, u64>>,
}

impl Progress for Lines {
    fn started(&self, item: &Item, total_bytes: u64) {
        self.totals.lock().unwrap_or_else(PoisonError::into_inner).insert(item.clone(), total_bytes);
    }

    fn advanced(&self, _: &Item, _: u64) {}

    fn finished(&self, item: &Item) {
        let total = self.totals.lock().unwrap_or_else(PoisonError::into_inner).remove(item).unwrap_or(0);
        output::note(format_args!("{}: done, {}", title(item), output::size(Bytes(total))));
    }

    fn skipped(&self, item: &Item, total_bytes: u64) {
        output::note(format_args!("{}: there already, {}", title(item), output::size(Bytes(total_bytes))));
    }
}
