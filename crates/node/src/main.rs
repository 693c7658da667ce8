//! `millstreamd`, the node daemon of Millstream: containerd's snapshotter, one FUSE mount, the local store.

use anyhow::{Context, anyhow};
use clap::Parser;
use millstream_node::{supervisor, worker};
use millstream_settings::arguments::{NodeArguments, NodeCommand};
use millstream_settings::node::Settings;
use millstream_settings::{LogFormat, LogSettings};
use tracing_subscriber::EnvFilter;

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
    let arguments = NodeArguments::parse();
    let settings = match &arguments.config {
        Some(path) => millstream_settings::read(path)?,
        None => Settings::default(),
    };
    if arguments.check_config {
        println!("settings are fine");
        return Ok(());
    }
    start_logging(&settings.log)?;
    // What libraries make below the root, the database first of all, is for nobody else.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    match arguments.command {
        None => supervisor::run(&settings, arguments.config.as_deref()),
        Some(NodeCommand::Worker { restarts }) => {
            let inherited = worker::Inheritance::take()?;
            rustls::crypto::ring::default_provider()
                .install_default()
                .map_err(|_| anyhow!("a TLS provider is installed already"))?;
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("worker").build()?;
            let result = runtime.block_on(worker::run(&settings, inherited, restarts));
            // Reads that still wait for a source must not hold up the end. To drop them would answer EIO; unanswered, they wait
            // for the next worker, or end with the mount.
            std::mem::forget(runtime);
            result
        }
    }
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
