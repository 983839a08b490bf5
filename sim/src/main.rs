//! Runs seeds: `anyplace-sim FIRST COUNT`. Prints those that fail, with how to replay them, to standard error, and the
//! figures to standard output. `cargo xtask sim` calls it.

use std::{
    io::{IsTerminal as _, Write as _},
    process::ExitCode,
};

fn main() -> ExitCode {
    let numbers: Option<Vec<u64>> = std::env::args().skip(1).map(|word| word.parse().ok()).collect();
    match numbers.as_deref() {
        Some([first, seeds]) => run(*first, *seeds),
        _ => {
            eprintln!("error: expected FIRST COUNT, two numbers; or run `cargo xtask sim --seeds N`");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn run(first: u64, seeds: u64) {
    let (mut simulated_ms, mut violations) = (0, 0);
    let shows = std::io::stderr().is_terminal();
    for seed in first..first.saturating_add(seeds) {
        let outcome = if seeds == 1 { anyplace_sim::replay(seed) } else { anyplace_sim::run(seed, None) };
        simulated_ms += outcome.simulated_ms;
        if let Some(violation) = &outcome.violation {
            violations += 1;
            eprintln!("seed {seed}: {violation}\nreplay with: cargo xtask sim --seed {seed}");
        }
        let done = seed - first + 1;
        if seeds == 1 {
            eprintln!("seed {seed}: {} events, trace {:016x}", outcome.steps, outcome.trace);
        } else if shows && (done.is_multiple_of(100) || done == seeds) {
            eprint!("\r{done} of {seeds} seeds, {violations} violations");
            let end = if done == seeds { "\n" } else { "" };
            eprint!("{end}");
            // Only a sign of life.
            let _ = std::io::stderr().flush();
        }
    }
    let minutes = simulated_ms as f64 / 60_000.0;
    for (figure, value) in [
        ("seeds", seeds as f64),
        ("violations", violations as f64),
        ("minutes", minutes),
        ("minutes_per_cpu_second", minutes / cpu_s().max(1e-9)),
    ] {
        println!("{{\"figure\":\"{figure}\",\"value\":{value}}}");
    }
}

/// Seconds of CPU that this process has had.
fn cpu_s() -> f64 {
    let text = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    let nanoseconds = text.split(' ').next().and_then(|word| word.parse::<f64>().ok());
    nanoseconds.unwrap_or(f64::NAN) / 1e9
}
