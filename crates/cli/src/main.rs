//! `millstream`, the command line of Millstream.

mod arguments;
mod ask;
mod check;
mod connect;
mod doctor;
mod exit;
mod generate;
mod import;
mod prefetch;
mod pull;
mod settings;
mod show;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::arguments::{Arguments, Command};
use crate::exit::Exit;

/// What a command prints to standard output, and how it ended.
pub(crate) struct Outcome {
    pub(crate) text: String,
    pub(crate) exit: Exit,
}

impl From<String> for Outcome {
    fn from(text: String) -> Self {
        Self { text, exit: Exit::Ok }
    }
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(outcome) => {
            // A closed pipe (`millstream status | head`) is no error worth a message.
            let _ = std::io::stdout().write_all(outcome.text.as_bytes());
            outcome.exit.into()
        }
        Err(error) => {
            eprintln!("millstream: {error:#}");
            exit::of(&error).into()
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn run(arguments: Arguments) -> anyhow::Result<Outcome> {
    // A second installation fails, which means that there is one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let Arguments { command, socket, output } = arguments;
    let node = connect::Node::at(socket.as_deref());
    let text = match command {
        Command::Status => ask::status(&node, output).await?,
        Command::Explain { image } => ask::explain(&node, image, output).await?,
        Command::Prefetch { image, wait, timeout } => {
            prefetch::run(&node, image, wait || timeout.is_some(), timeout, output).await?
        }
        Command::Pull(wanted) => pull::run(&wanted, &node, output).await?,
        Command::Gc { dry_run } => ask::gc(&node, dry_run, output).await?,
        Command::Check => return check::run(&node, output).await,
        Command::Doctor(arguments) => return doctor::run(&arguments, socket.as_deref(), output).await,
        Command::Import { image, server } => import::run(&image, &server, &node, output).await?,
        Command::Streaming { state } => ask::streaming(&node, state, output).await?,
        Command::Hydration { state } => ask::hydration(&node, state, output).await?,
        Command::Config(command) => settings::run(&command, output)?,
        Command::Completions { shell, program } => generate::completions(shell, program, output)?,
        Command::Man { dir } => generate::manual(dir.as_deref(), output)?,
    };
    Ok(text.into())
}
