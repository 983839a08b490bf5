//! The `anyplace` command: every role of the platform, and everything that its users run.
//!
//! `main.rs` chooses between the three ways to run: the shim (no threads), a role (until a signal), a client
//! command (until it is done). This crate must not know how anything is stored, or how packets travel.

mod args;
mod commands;
mod context;
mod output;
mod progress;
mod reference;
mod roles;
mod schema;
mod target;
mod wait;

use std::{path::PathBuf, process::ExitCode};

use clap::Parser as _;

use args::{Cli, Command, RegistryArgs, RoleCommand};

fn main() -> ExitCode {
    let result = match shim_folder() {
        // Each container has a shim: it must stay one small thread, so it gets no runtime.
        Some(state) => roles::shim(&state).map(|()| ExitCode::SUCCESS),
        None => run(Cli::parse()),
    };
    match result {
        Ok(code) => code,
        // `anyplace get ... | head` is no failure.
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::note(format_args!("error: {}", output::chain(&error)));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Shim { state } => roles::shim(&state).map(|()| ExitCode::SUCCESS),
        Command::Role(RoleCommand::Registry(RegistryArgs { command: Some(command), .. })) => {
            commands::registry(&cli.connection, command)
        }
        Command::Role(role) => roles::run(role).map(|()| ExitCode::SUCCESS),
        Command::Client(command) => commands::run(&cli.connection, command),
    }
}

/// What the agent calls a shim with. A container's start waits for it, and reading a command line as people write it
/// means to set up all commands first.
fn shim_folder() -> Option<PathBuf> {
    let mut arguments = std::env::args_os().skip(1);
    let agents = arguments.next()? == "shim" && arguments.next()? == "--state";
    let folder = arguments.next().filter(|_| agents)?;
    arguments.next().is_none().then(|| folder.into())
}
