//! The workspace's tests: by cargo-nextest where it is installed, else by `cargo test`; the output is shown as it comes
//! and counted on the way.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::Count;
use crate::shell;

/// Builds what scenarios start, then runs all tests (or those that match).
pub(super) fn run(filter: Option<&str>) -> Result<Count> {
    // Scenarios start the binary and the delay relay, which no test target builds by itself.
    let build = shell::cargo(&["build", "--quiet", "-p", "anyplace", "-p", "anyplace-tests", "--bins"])?;
    if let Err(error) = shell::show(build) {
        println!("{error:#}");
        return Ok(Count { passed: 0, failed: 1 });
    }
    if shell::has_program("cargo-nextest") {
        let mut args = vec!["nextest", "run", "--workspace", "--no-fail-fast", "--no-tests", "pass"];
        args.extend(filter);
        return counted(shell::cargo(&args)?);
    }
    println!("cargo-nextest is not installed: running `cargo test`, scenarios one after the other");
    let mut others = vec!["test", "--workspace", "--exclude", "anyplace-tests", "--no-fail-fast"];
    others.extend(filter);
    let mut count = counted(shell::cargo(&others)?)?;
    let mut scenarios = vec!["test", "-p", "anyplace-tests", "--no-fail-fast"];
    scenarios.extend(filter);
    // They measure gaps in milliseconds: nothing may run beside them.
    scenarios.extend(["--", "--test-threads=1"]);
    count.add(counted(shell::cargo(&scenarios)?)?);
    Ok(count)
}

/// Runs a test command, shows its output, and counts; a failure that no summary counts (a build error) is one.
fn counted(mut command: Command) -> Result<Count> {
    println!("$ {}", shell::line(&command));
    // Both outputs into one pipe, so that lines keep their order.
    let (read, write) = std::io::pipe()?;
    command.stdout(write.try_clone()?).stderr(write).stdin(Stdio::null());
    let mut child = command.spawn().with_context(|| format!("start `{}`", shell::line(&command)))?;
    // The command holds the pipe's other end; without it the read below ends with the child.
    drop(command);
    let mut count = Count::default();
    for line in BufReader::new(read).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        println!("{line}");
        if let Some(more) = summary(&line) {
            count.add(more);
        }
    }
    let status = child.wait()?;
    if !status.success() && count.failed == 0 {
        count.failed = 1;
    }
    Ok(count)
}

/// Reads `Summary [...] 12 tests run: 11 passed, 1 failed, 3 skipped` (nextest) and
/// `test result: ok. 5 passed; 0 failed; ...` (libtest).
fn summary(line: &str) -> Option<Count> {
    let plain = without_colours(line);
    // Indented, it is what nextest shows of a failed test's own output, which its summary counts already.
    let text = match plain.strip_prefix("test result:") {
        Some(rest) => rest,
        None if plain.trim_start().starts_with("Summary [") => plain.split_once("run:")?.1,
        None => return None,
    };
    let mut count = Count::default();
    let words: Vec<_> = text.split([' ', ',', ';', '.', '(', ')']).filter(|word| !word.is_empty()).collect();
    for pair in words.windows(2) {
        let Ok(number) = pair[0].parse::<usize>() else { continue };
        match pair[1] {
            "passed" => count.passed += number,
            "failed" | "timed" | "exec" => count.failed += number,
            _ => {}
        }
    }
    Some(count)
}

fn without_colours(line: &str) -> String {
    let mut plain = String::new();
    let mut rest = line;
    while let Some((before, after)) = rest.split_once('\u{1b}') {
        plain.push_str(before);
        rest = after.split_once('m').map_or("", |(_, rest)| rest);
    }
    plain + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_runners_summaries_are_counted() {
        let nextest =
            "     Summary [  24.251s] 14 tests run: 11 passed (1 slow), 2 failed, 1 timed out, 3 skipped";
        assert_eq!(summary(nextest), Some(Count { passed: 11, failed: 3 }));
        let libtest = "test result: FAILED. 5 passed; 4 failed; 1 ignored; 0 measured; 0 filtered out";
        assert_eq!(summary(libtest), Some(Count { passed: 5, failed: 4 }));
        assert_eq!(
            summary("\u{1b}[32mtest result: ok\u{1b}[0m. 2 passed; 0 failed"),
            Some(Count { passed: 2, failed: 0 })
        );
        assert_eq!(summary("test a ... ok"), None);
        assert_eq!(summary("    test result: FAILED. 0 passed; 1 failed; 0 ignored"), None);
    }
}
