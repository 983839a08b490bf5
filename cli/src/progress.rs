//! Progress of a push: a bar for each layer with rate and time left on a terminal, JSON lines elsewhere.
//!
//! A line is one of
//! - `{"event":"start","stage":"pack","item":"1f2e3d...","total":1048576}`; a total of 0 isn't known
//! - `{"event":"progress", ... ,"done":524288}`, a few a second at most
//! - `{"event":"finish", ... }`, or `{"event":"skip", ... }` where there was nothing to do
//! - `{"event":"output","stage":"build","item":"buildah","line":"STEP 1/2: ..."}`
//! - `{"event":"summary", ... }` at the end

use std::{
    collections::HashMap,
    io::IsTerminal as _,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyplace_images::{Item, Progress, SharedProgress, Stage};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::output;

/// Message, bar, bytes, speed and time left.
const BAR: &str = "{msg:22} [{bar:30}] {bytes:>10}/{total_bytes:10} {bytes_per_sec:>12} {eta:>4} left";
/// Where the total isn't known.
const SPINNER: &str = "{msg:22} {spinner} {bytes:>10} {bytes_per_sec}";
const DONE: &str = "{msg:22} done {bytes}";
/// How often an item's progress is told at most: all items together stay at a few lines a second.
const LINE_EVERY: Duration = Duration::from_millis(500);

/// The receiver that fits standard error.
pub(crate) fn for_stderr() -> SharedProgress {
    if std::io::stderr().is_terminal() { Arc::new(Bars::default()) } else { Arc::new(Lines::default()) }
}

/// Writes one JSON line to standard error.
pub(crate) fn event(name: &str, fields: &impl Serialize) {
    #[derive(Serialize)]
    struct Event<'a, T> {
        event: &'a str,
        #[serde(flatten)]
        fields: &'a T,
    }
    if let Ok(line) = serde_json::to_string(&Event { event: name, fields }) {
        output::note(line);
    }
}

fn word(stage: Stage) -> &'static str {
    match stage {
        Stage::Build => "build",
        Stage::Export => "export",
        Stage::Pack => "pack",
        Stage::Send => "send",
        Stage::Fetch => "fetch",
    }
}

fn title(item: &Item) -> String {
    format!("{} {}", word(item.stage), item.name)
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
            bar.set_style(style(if total_bytes == 0 { SPINNER } else { BAR }));
            bar.set_length(total_bytes);
            bar.set_position(0);
        });
    }

    fn advanced(&self, item: &Item, bytes: u64) {
        self.with(item, |bar| bar.inc(bytes));
    }

    fn moved(&self, item: &Item, done_bytes: u64) {
        self.with(item, |bar| {
            bar.set_position(done_bytes);
            // What an earlier push sent is no speed of this one.
            bar.reset_eta();
        });
    }

    fn said(&self, _: &Item, line: &str) {
        let _ = self.all.println(line);
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
            bar.set_position(total_bytes);
            bar.set_style(style(DONE));
            bar.finish_with_message(format!("{} (there)", title(item)));
        });
    }
}

#[derive(Default)]
struct Lines {
    items: Mutex<HashMap<Item, Line>>,
}

struct Line {
    total: u64,
    done: u64,
    told: Instant,
}

#[derive(Serialize)]
struct Fields<'a> {
    stage: &'static str,
    item: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    done: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<&'a str>,
}

impl<'a> Fields<'a> {
    fn new(item: &'a Item) -> Self {
        Fields { stage: word(item.stage), item: &item.name, done: None, total: None, line: None }
    }
}

impl Lines {
    fn change(&self, item: &Item, act: impl FnOnce(&mut Line)) {
        let mut items = self.items.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(line) = items.get_mut(item) else { return };
        act(line);
        if line.told.elapsed() >= LINE_EVERY {
            line.told = Instant::now();
            let (done, total) = (Some(line.done), Some(line.total));
            event("progress", &Fields { done, total, ..Fields::new(item) });
        }
    }
}

impl Progress for Lines {
    fn started(&self, item: &Item, total_bytes: u64) {
        event("start", &Fields { total: Some(total_bytes), ..Fields::new(item) });
        let line = Line { total: total_bytes, done: 0, told: Instant::now() };
        self.items.lock().unwrap_or_else(PoisonError::into_inner).insert(item.clone(), line);
    }

    fn advanced(&self, item: &Item, bytes: u64) {
        self.change(item, |line| line.done += bytes);
    }

    fn moved(&self, item: &Item, done_bytes: u64) {
        self.change(item, |line| line.done = done_bytes);
    }

    fn said(&self, item: &Item, line: &str) {
        event("output", &Fields { line: Some(line), ..Fields::new(item) });
    }

    fn finished(&self, item: &Item) {
        let line = self.items.lock().unwrap_or_else(PoisonError::into_inner).remove(item);
        let (done, total) = line.map_or((0, 0), |line| (line.done, line.total));
        event("finish", &Fields { done: Some(done), total: Some(total.max(done)), ..Fields::new(item) });
    }

    fn skipped(&self, item: &Item, total_bytes: u64) {
        event("skip", &Fields { total: Some(total_bytes), ..Fields::new(item) });
    }
}
