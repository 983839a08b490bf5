//! Figures, their targets, and how they are printed.

use serde_json::{Value, json};

/// How a figure compares with its target.
#[derive(Clone, Copy)]
pub(crate) enum Op {
    AtLeast,
    AtMost,
}

impl Op {
    fn symbol(self) -> &'static str {
        match self {
            Op::AtLeast => ">=",
            Op::AtMost => "<=",
        }
    }

    fn holds(self, value: f64, target: f64) -> bool {
        match self {
            Op::AtLeast => value >= target,
            Op::AtMost => value <= target,
        }
    }
}

struct Figure {
    name: String,
    value: f64,
    unit: &'static str,
    op: Op,
    target: f64,
    peer: Option<(String, f64)>,
}

/// The figures of one run.
pub(crate) struct Report {
    bench: String,
    json: bool,
    figures: Vec<Figure>,
}

impl Report {
    pub(crate) fn new(bench: &str, json: bool) -> Report {
        Report { bench: bench.to_owned(), json, figures: Vec::new() }
    }

    /// Adds a figure, and shows it at once.
    pub(crate) fn add(
        &mut self,
        name: &str,
        value: f64,
        unit: &'static str,
        op: Op,
        target: f64,
        peer: Option<(&str, f64)>,
    ) {
        let peer = peer.map(|(name, value)| (name.to_owned(), value));
        let figure = Figure { name: name.to_owned(), value, unit, op, target, peer };
        eprintln!("{}", figure.line());
        self.figures.push(figure);
    }

    /// Adds a figure that can't be measured, because what it measures isn't there: it doesn't hold.
    pub(crate) fn missing(&mut self, name: &str, unit: &'static str, op: Op, target: f64) {
        self.add(&format!("{name} (missing)"), f64::NAN, unit, op, target, None);
    }

    pub(crate) fn all_hold(&self) -> bool {
        self.figures.iter().all(Figure::holds)
    }

    /// The table, or the line of JSON.
    pub(crate) fn print(&self) {
        if self.json {
            println!("{}", self.to_json());
            return;
        }
        println!("{} on {}", self.bench, machine());
        for figure in &self.figures {
            println!("{}", figure.line());
        }
    }

    fn to_json(&self) -> Value {
        let figures: Vec<Value> = self.figures.iter().map(Figure::to_json).collect();
        json!({ "bench": self.bench, "machine": machine(), "figures": figures })
    }
}

impl Figure {
    fn holds(&self) -> bool {
        self.op.holds(self.value, self.target)
    }

    fn line(&self) -> String {
        let verdict = if self.holds() { "holds" } else { "MISSED" };
        let target = format!("{} {} {}", self.op.symbol(), round(self.target), self.unit);
        let mut line =
            format!("{:<44} {:>10} {:<7} {target:<22} {verdict:<7}", self.name, round(self.value), self.unit);
        if let Some((peer, value)) = &self.peer {
            line += &format!(" {peer}: {}", round(*value));
        }
        line
    }

    fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "value": rounded(self.value),
            "unit": self.unit,
            "op": self.op.symbol(),
            "target": rounded(self.target),
            "holds": self.holds(),
            "peer": self.peer.as_ref().map(|(name, _)| name),
            "peer_value": self.peer.as_ref().map(|(_, value)| rounded(*value)),
        })
    }
}

/// Three digits are as many as a shared machine repeats.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10f64.powi(2 - value.abs().log10().floor() as i32);
    if scale < 1.0 { value.round() } else { (value * scale).round() / scale }
}

fn round(value: f64) -> String {
    rounded(value).to_string()
}

/// Cores, memory, kernel.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().split(' ').next()?.parse::<u64>().ok());
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{cores} cores, {} GiB, Linux {}", kib.unwrap_or(0).div_ceil(1 << 20), kernel.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_says_whether_it_holds() {
        let mut report = Report::new("x", true);
        report.add("push", 431.26, "MB/s", Op::AtLeast, 420.0, Some(("peer", 213.0)));
        report.add("memory", 0.1234567, "MiB", Op::AtMost, 0.1, None);
        assert!(!report.all_hold());
        let json = report.to_json();
        assert_eq!(json["figures"][0]["holds"], true);
        assert_eq!(json["figures"][0]["value"], 431.0);
        assert_eq!(json["figures"][0]["peer_value"], 213.0);
        assert_eq!(json["figures"][1]["value"], 0.123);
        assert_eq!(json["figures"][1]["holds"], false);
        report.missing("not there", "ns", Op::AtMost, 1.0);
        let json = report.to_json();
        assert_eq!(json["figures"][2]["value"], Value::Null);
        assert_eq!(json["figures"][2]["holds"], false);
        assert_eq!(json["figures"][1]["peer"], Value::Null);
    }
}
