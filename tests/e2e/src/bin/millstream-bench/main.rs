//! Measures Millstream beside its peers: every cell a pull and a start from nothing, in turns, until the application answers.

mod files;
mod floor;
mod images;
mod job;
mod matrix;
mod memory;
mod metrics;
mod peers;
mod plots;
mod processor;
mod report;
mod rows;
mod run;
mod statistics;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::{Args, Parser, Subcommand};

/// Time to ready, bytes, requests and processor time of Millstream and of its peers, side by side.
///
/// Needs root, and what `tests/tools/install.sh bench` installs. tests/bench/README.md says what is measured and how.
#[derive(Debug, Parser)]
#[command(name = "millstream-bench")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes what is missing, measures what is not measured yet, and writes the report. May be stopped and run again.
    Run(RunArguments),
    /// Writes summary, table and plots from what was measured so far.
    Report {
        #[command(flatten)]
        place: Place,
        /// Also writes the table to this file.
        #[arg(long)]
        table: Option<PathBuf>,
    },
    /// Makes images and floors and nothing else.
    Prepare(RunArguments),
}

#[derive(Debug, Args)]
struct Place {
    /// Where images, rows and results are kept.
    #[arg(long, default_value = "target/bench")]
    dir: PathBuf,
}

#[derive(Debug, Args)]
struct RunArguments {
    #[command(flatten)]
    place: Place,
    /// One image, one link, three runs: ten minutes once the image is made.
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Every image, every peer and every setting.
    #[arg(long)]
    full: bool,
    /// Only this image; may be given more than once.
    #[arg(long)]
    image: Vec<String>,
    /// Only this link (100mbit-20ms, 1gbit-10ms, 1gbit-210ms); may be given more than once.
    #[arg(long)]
    link: Vec<String>,
    /// Only subjects whose name has this, such as `stargz` or `millstream, profile`; may be given more than once.
    #[arg(long)]
    peer: Vec<String>,
    /// How often each cell is run, instead of what the matrix says.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: Option<u32>,
}

impl RunArguments {
    fn matrix(&self) -> Result<matrix::Matrix> {
        let links = matrix::Link::ALL.map(matrix::Link::name);
        if let Some(unknown) = self.link.iter().find(|link| !links.contains(&link.as_str())) {
            bail!("there is no link {unknown}; hint: {}", links.join(", "));
        }
        let mut matrix = match (self.quick, self.full) {
            (true, _) => matrix::Matrix::quick(),
            (_, true) => matrix::Matrix::full(),
            _ => matrix::Matrix::usual(),
        };
        matrix.restrict(&self.image, &self.link, &self.peer, self.rounds);
        Ok(matrix)
    }
}

fn main() -> ExitCode {
    match act(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("millstream-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(arguments: Arguments) -> Result<()> {
    match arguments.command {
        Command::Run(arguments) => {
            let dir = whole(&arguments.place)?;
            run::run(&dir, &arguments.matrix()?)?;
            report::write(&dir, None)
        }
        Command::Prepare(arguments) => run::prepare(&whole(&arguments.place)?, &arguments.matrix()?).map(drop),
        Command::Report { place, table } => report::write(&whole(&place)?, table.as_deref()),
    }
}

/// Mount options and commands elsewhere need whole paths.
fn whole(place: &Place) -> Result<PathBuf> {
    std::fs::create_dir_all(&place.dir).with_context(|| format!("making {}", place.dir.display()))?;
    place.dir.canonicalize().with_context(|| format!("finding {}", place.dir.display()))
}

/// One line of progress.
fn say(text: impl std::fmt::Display) {
    println!("- {text}");
}
