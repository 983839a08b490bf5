//! The project's own commands: `cargo xtask demo`, `cargo xtask test`, `cargo xtask bench` and what they are made of.
//!
//! xtask installs the packages that the build needs, so it must itself build where nothing is installed: it depends on
//! the testbed library and a few small crates, never on the platform's.

mod bench;
mod demo;
mod ebpf;
mod setup;
mod shell;
mod sim;
mod test;

use std::process::ExitCode;

use anyhow::{Result, bail};

const HELP: &str = "\
Usage: cargo xtask COMMAND

Commands:
  demo           the platform on three locations, step by step; stays up until Ctrl-C
  demo --check   the same unattended: verifies every step, prints one JSON line, removes everything
  test [FILTER]  all that CI runs: format, lints, dependencies, licences, eBPF, tests, scenarios
  bench NAME [--only PART] [--json]
                 figures beside the peers': registry, images, router
  bench packing --nodes FILE --pods FILE [--json]
                 how much of a trace's GPUs are filled, beside the published figure
  sim [--seeds N] [--seed S] [--json]
                 the schedulers in simulated time, with faults from seeds, judged after every step; one seed alone
                 tells all that happens in it
  ebpf           rebuild the eBPF object that is committed
  setup [--garage]
                 install the Debian packages and tools that the other commands need; garage, an S3 cluster for
                 tests of lost nodes, only if asked for
  help           this text

demo and test need root: they make network namespaces, cgroups and containers.";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<ExitCode> {
    match words {
        [] | ["help" | "--help" | "-h"] => println!("{HELP}"),
        ["demo"] => return Ok(exit_code(demo::run(false)?)),
        ["demo", "--check"] => return Ok(exit_code(demo::run(true)?)),
        ["test"] => return test::run(None),
        ["test", filter] if !filter.starts_with('-') => return test::run(Some(filter)),
        ["bench", words @ ..] => return bench::run(words),
        ["sim", words @ ..] => return sim::run(words),
        ["ebpf"] => ebpf::build(&shell::root()?)?,
        ["setup"] => {
            setup::ensure()?;
            setup::tools::ensure(setup::tools::Which::Usual)?;
        }
        ["setup", "--garage"] => {
            setup::ensure()?;
            setup::tools::ensure(setup::tools::Which::All)?;
        }
        _ => bail!("found `{}`, expected one of the commands in `cargo xtask help`", words.join(" ")),
    }
    Ok(ExitCode::SUCCESS)
}

fn exit_code(is_good: bool) -> ExitCode {
    if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
