//! How things are printed: data to standard output, messages to standard error, tables, ages, sizes.

use std::{
    fmt::{self, Display},
    io::{self, Write as _},
};

use anyplace_model::{Bytes, MilliCpu, Refusal};
use clap::ValueEnum;
use jiff::Timestamp;
use serde::Serialize;

/// Spaces between columns.
const COLUMN_GAP: u16 = 3;

/// Format of data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    #[default]
    Table,
    /// The API's types as JSON
    Json,
    /// The API's types as YAML
    Yaml,
}

/// Prints a value of the API, or `table` of it.
pub(crate) fn data<T: Serialize>(
    format: Format,
    value: &T,
    table: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    let text = match format {
        Format::Table => table(),
        Format::Json => serde_json::to_string_pretty(value)?,
        Format::Yaml => serde_saphyr::to_string(value)?,
    };
    line(text.trim_end_matches('\n'))
}

/// One line, or several, of data.
pub(crate) fn line(text: impl Display) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}

/// Bytes of data, as they are.
pub(crate) fn bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    Ok(out.flush()?)
}

/// A message. Nobody reading it is no reason to fail.
pub(crate) fn note(text: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Whether whoever read the output has gone.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// An error and its causes in one line; what a cause repeats is left out.
pub(crate) fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// A table without lines: a header and rows.
pub(crate) struct Table(comfy_table::Table);

impl Table {
    pub(crate) fn new(header: &[&str]) -> Self {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        // A row is a line, however narrow the terminal: lines can be searched and cut.
        table.set_content_arrangement(comfy_table::ContentArrangement::Disabled);
        table.set_header(header.to_vec());
        for column in table.column_iter_mut() {
            column.set_padding((0, COLUMN_GAP));
        }
        Self(table)
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.0.add_row(cells.into_iter().map(|cell| if cell.is_empty() { "-".to_owned() } else { cell }));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.trim_fmt())
    }
}

/// The name that a value has in the API, such as `back_off`.
pub(crate) fn word<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}

/// `yes` or `no`.
pub(crate) fn yes_no(value: bool) -> String {
    if value { "yes" } else { "no" }.into()
}

/// A moment for people, to the second.
pub(crate) fn moment(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%SZ").to_string()
}

/// How long ago, in its largest unit.
pub(crate) fn age(at: Timestamp) -> String {
    let seconds = (Timestamp::now().as_second() - at.as_second()).max(0);
    seconds_in_words(seconds)
}

/// How long until then; `now` where it has passed.
pub(crate) fn until(at: Timestamp) -> String {
    match at.as_second() - Timestamp::now().as_second() {
        ..=0 => "now".into(),
        seconds => format!("in {}", seconds_in_words(seconds)),
    }
}

fn seconds_in_words(seconds: i64) -> String {
    match seconds {
        ..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..86_400 => format!("{}h{}m", seconds / 3_600, seconds % 3_600 / 60),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A size for people; the exact one is in the JSON.
pub(crate) fn size(bytes: Bytes) -> String {
    let mut unit = 0;
    let mut value = u128::from(bytes.0) * 10;
    while value >= 10_240 && unit < 4 {
        value /= 1_024;
        unit += 1;
    }
    let unit = ["B", "Ki", "Mi", "Gi", "Ti"][unit];
    match value % 10 {
        0 => format!("{}{unit}", value / 10),
        tenth => format!("{}.{tenth}{unit}", value / 10),
    }
}

/// Cores for people, such as `1.5`.
pub(crate) fn cores(cpu: MilliCpu) -> String {
    let text = format!("{}.{:03}", cpu.0 / 1_000, cpu.0 % 1_000);
    text.trim_end_matches('0').trim_end_matches('.').into()
}

/// The first reason for a table's cell.
pub(crate) fn reason(reasons: &[Refusal]) -> String {
    reasons.first().map(|first| first.reason.to_string()).unwrap_or_default()
}

/// Reasons with their counts, a line each.
pub(crate) fn reasons(reasons: &[Refusal], indent: &str) -> String {
    let mut text = String::new();
    for refusal in reasons {
        let times = if refusal.count > 1 { format!(" ({})", refusal.count) } else { String::new() };
        text += &format!("{indent}{}{times}: {}\n", refusal.reason, refusal.message);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_cores_are_short() {
        assert_eq!(size(Bytes(0)), "0B");
        assert_eq!(size(Bytes(1 << 30)), "1Gi");
        assert_eq!(size(Bytes(3 << 29)), "1.5Gi");
        assert_eq!(size(Bytes(7_935_692_000)), "7.3Gi");
        assert_eq!((cores(MilliCpu(1_500)), cores(MilliCpu(50)), cores(MilliCpu(10_000))), {
            ("1.5".into(), "0.05".into(), "10".into())
        });
        assert_eq!(seconds_in_words(59), "59s");
        assert_eq!(seconds_in_words(3_700), "1h1m");
    }

    #[test]
    fn a_table_has_a_line_for_each_row_and_no_space_at_its_end() {
        let mut table = Table::new(&["NAME", "REASON"]);
        table.row(["hello".into(), String::new()]);
        assert_eq!(table.to_string(), "NAME    REASON\nhello   -");
    }

    #[test]
    fn causes_are_said_once() {
        let error = anyhow::anyhow!("inner").context("outer: inner").context("top");
        assert_eq!(chain(&error), "top: outer: inner");
    }
}
