//! `millstreamd`, the node daemon of Millstream: containerd's snapshotter, one FUSE mount, the local store.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::Parser;
use millstream_node::program::read_settings;
use millstream_node::{service, supervisor, upgrade, warm, worker};
use millstream_settings::arguments::{NodeArguments, NodeCommand};
use millstream_settings::node::Settings;
use millstream_settings::{LogFormat, LogSettings};
use tracing_subscriber::EnvFilter;

/// For the buffers of FUSE requests, which are to outlive a worker.
#[global_allocator]
static ALLOCATOR: millstream_sys::lent::Lender = millstream_sys::lent::Lender;

fn main() -> std::process::ExitCode {
    match run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("millstreamd: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    millstream_sys::heap::keep_little();
    let arguments = NodeArguments::parse();
    match &arguments.command {
        Some(NodeCommand::Worker) => return work(),
        Some(NodeCommand::Warm { view }) => return warm::read_ahead(view),
        _ => {}
    }
    let config = arguments.config.as_deref();
    let text = read_settings(config)?;
    let settings: Settings = millstream_settings::parse(&text)
        .with_context(|| format!("in settings {}", config.map_or("(none)".into(), Path::to_string_lossy)))?;
    if arguments.check_config {
        println!("settings are fine");
        return Ok(());
    }
    match arguments.command {
        Some(NodeCommand::Upgrade { binary }) => println!("{}", upgrade::ask(&settings, binary.as_deref())?),
        _ => {
            start_logging(&settings.log)?;
            restrict_new_files();
            supervisor::run(&settings, &text, config)?;
        }
    }
    Ok(())
}

fn work() -> anyhow::Result<()> {
    // The program was started by the number of a descriptor; this is what `ps` shows.
    let _ = rustix::thread::set_name(c"millstreamd");
    let (inherited, settings) = worker::Inheritance::take()?;
    start_logging(&settings.log)?;
    service::offer_worker();
    restrict_new_files();
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow!("a TLS provider is installed already"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("worker")
        // Any of the idle threads takes the next piece of blocking work: with a little of it now and then, a long life would keep
        // as many as there ever were.
        .thread_keep_alive(Duration::from_secs(1))
        .build()?;
    let result = runtime.block_on(worker::run(&settings, inherited));
    // Reads that still wait for a source must not hold up the end. To drop them would answer EIO; unanswered, they wait for the
    // next worker, or end with the mount.
    std::mem::forget(runtime);
    result
}

/// What libraries make below the root, the database first of all, is for nobody else.
fn restrict_new_files() {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
}

fn start_logging(settings: &LogSettings) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&settings.level).with_context(|| format!("log.level {:?}", settings.level))?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    match settings.format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().init(),
    }
    Ok(())
}
