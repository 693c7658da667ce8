//! `millstream-server`: settings, log, signals; all else is in the library.

mod options;

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use millstream_metrics::{Page, Readiness};
use millstream_registry::Registry;
use millstream_server::{ImagesService, Listener, Store};
use millstream_settings::arguments::ServerArguments;
use millstream_settings::server::Settings;
use millstream_settings::{LogFormat, LogSettings};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    match start(&ServerArguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("millstream-server: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: &ServerArguments) -> anyhow::Result<()> {
    let settings: Settings = millstream_settings::read(&arguments.config)?;
    if arguments.check_config {
        println!("{}: settings are fine", arguments.config.display());
        return Ok(());
    }
    start_log(&settings.log)?;
    // What is kept of private images is for nobody else.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    // Refused only when something else in this process chose a provider already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(run(settings))
}

async fn run(settings: Settings) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let store = Store::open(&settings.store)?;
    let registry = Registry::new(options::registry(&settings))?;
    let service = ImagesService::new(store, registry, options::service(&settings));
    let listener = Listener::bind(&options::listen(&settings))?;
    if let Some(address) = settings.metrics.listen {
        show_metrics(address, &service).await?;
    }
    tracing::info!(address = %listener.address(), store = %settings.store, tls = settings.tls.is_some(), "listening");
    let shutdown = async {
        tokio::select! {
            _ = terminate.recv() => (),
            _ = interrupt.recv() => (),
        }
        tracing::info!("shutting down");
    };
    listener.serve(service, shutdown).await?;
    Ok(())
}

/// Shows metrics and probes for as long as the process lives.
async fn show_metrics(address: SocketAddr, service: &ImagesService) -> anyhow::Result<()> {
    let listener = millstream_metrics::bind(address).await?;
    tracing::info!(%address, "metrics are shown");
    let registry = service.metrics().registry();
    let service = service.clone();
    let ready = move || -> Readiness {
        let service = service.clone();
        Box::pin(async move { service.ready().await.map_err(|error| format!("the store cannot be read: {error}")) })
    };
    tokio::spawn(millstream_metrics::serve(listener, Page { registry, ready: Box::new(ready) }));
    Ok(())
}

fn start_log(settings: &LogSettings) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&settings.level).with_context(|| format!("log.level {:?}", settings.level))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    match settings.format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}
