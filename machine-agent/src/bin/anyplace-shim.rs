//! `anyplace-shim shim --state DIR`: what `anyplace shim` does, for the tests of this crate.

use std::{path::Path, process::ExitCode};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [subcommand, flag, state] = arguments.as_slice() else {
        eprintln!("found {} arguments; run `anyplace-shim shim --state DIR`", arguments.len());
        return ExitCode::from(2);
    };
    if subcommand != "shim" || flag != "--state" {
        eprintln!("found `{subcommand} {flag}`; run `anyplace-shim shim --state DIR`");
        return ExitCode::from(2);
    }
    match anyplace_machine_agent::shim::run(Path::new(state)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
