//! The main job on real input: one stock containerd pulls one image and runs it, the ordinary way and lazily.

mod job;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use millstream_e2e::link::LinkOptions;
use millstream_e2e::need::{CONTAINERS, Need};
use millstream_e2e::rig::{Offered, Rig};
use millstream_e2e::{recipe, web};

/// Pulls and runs an image of some hundred megabytes over a slow link: on overlayfs, on Millstream, on Millstream with background
/// downloads held back, and on a node whose server knows what a start reads. Needs root.
#[derive(Debug, Parser)]
struct Arguments {
    /// Where images are kept between runs, and where the summary goes.
    #[arg(long, default_value = "target/demo")]
    dir: PathBuf,
    /// How often each of the jobs is done, in turns; the table has the medians.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=50))]
    rounds: u32,
    /// Does the job on containerd 2.x too (tests/tools/install.sh builds it).
    #[arg(long)]
    containerd2: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("millstream-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let needs = [Need::Program(web::PROGRAM), Need::Product("millstreamd"), Need::Product("millstream-server")];
    for need in CONTAINERS.iter().chain(&needs) {
        ensure!(need.is_met(), "missing: {need:?}; hint: run `make demo`, as root");
    }
    let mut kinds = job::Kind::DEMO.to_vec();
    if arguments.containerd2 {
        ensure!(Need::Containerd2.is_met(), "containerd 2.x is missing; hint: run tests/tools/install.sh, as root");
        kinds.extend(job::Kind::BENCH);
    }
    std::fs::create_dir_all(&arguments.dir).with_context(|| format!("making {}", arguments.dir.display()))?;
    // Mount options and commands elsewhere need whole paths.
    let dir = arguments.dir.canonicalize().with_context(|| format!("finding {}", arguments.dir.display()))?;
    let layout = web::layout(&dir)?;
    say("putting the image behind a link of 200 Mbit/s with a round trip of 20 ms");
    let offered = [Offered::new(&layout, web::TAG, job::IMAGE), Offered::new(&layout, recipe::PAUSE, job::PAUSE)];
    let rig = Rig::set(LinkOptions::default(), &offered, None)?;
    say("importing the image on the server (makes the tables of contents, once for all nodes)");
    let import = rig.import(&rig.registry.reference(job::IMAGE))?;
    say("a first start on a node, from which the server learns what starts of the image read");
    job::run(&rig, job::Kind::Profile)?;
    let mut results = report::Results::new(web::info(&layout)?.layers.iter().map(|layer| layer.size).sum(), import);
    for round in 0..arguments.rounds {
        // Interleaved, and the first one of a round changes: a busy machine must not favour one of them.
        let first = round as usize % kinds.len();
        for &kind in kinds.iter().cycle().skip(first).take(kinds.len()) {
            results.add(kind, job::run(&rig, kind)?);
        }
    }
    println!("\n{}", results.table());
    let summary = dir.join("summary.json");
    std::fs::write(&summary, results.json()?).with_context(|| format!("writing {}", summary.display()))?;
    println!("The same as JSON: {}", summary.display());
    Ok(())
}

/// One line of progress.
fn say(text: impl std::fmt::Display) {
    println!("- {text}");
}
