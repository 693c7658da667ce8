//! The process that does the work; it may die at any time and is started again by the supervisor.

use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use millstream_chunkstore::{MAX_NUMBER, Store, StoreOptions};
use millstream_containerd::{Containerd, ContainerdOptions};
use millstream_fuse::{Adapter, Connection, Journal, Session};
use millstream_layerfs::LayerFs;
use millstream_prefetch::{FetchOptions, Fetcher};
use millstream_registry::{Registry, RegistryOptions};
use millstream_settings::node::Settings;
use millstream_snapshots::{Options, SnapshotService, Snapshots};
use millstream_source::names;
use millstream_sys::process::take_passed;
use millstream_wire::containerd::services::snapshots::v1::snapshots_server::SnapshotsServer;
use millstream_wire::millstream::v1::node_server::NodeServer;
use redb::{Database, StorageError, TransactionError};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server as GrpcServer;
use tracing::{error, info, warn};

use crate::catalog::Catalog;
use crate::check::Checker;
use crate::content::NodeContent;
use crate::control::Control;
use crate::damage::{self, Damages};
use crate::database::{self, Found};
use crate::embedded::{Embedded, EmbeddedOptions};
use crate::format;
use crate::garbage::Garbage;
use crate::images::{NodeImages, Reporter, SharedImages};
use crate::index::Indexer;
use crate::line::{Line, Report, Start};
use crate::lookup::Lookup;
use crate::lost_mounts::LostMounts;
use crate::memory;
use crate::metrics::NodeMetrics;
use crate::mount_keeper::MountKeeper;
use crate::origin::Origins;
use crate::page;
use crate::quota::{Keeper, Limits};
use crate::repair::Repairer;
use crate::server_client::Server;
use crate::supervisor::mountpoint;
use crate::views::Views;

/// How long requests that are under way may go on after we were asked to stop.
const DRAIN: Duration = Duration::from_secs(5);
/// How long a source may give nothing; less where reads have to be answered within a minute.
const LONGEST_IDLE: Duration = Duration::from_secs(15);

/// How often it is looked whether the database still works.
const DATABASE_CHECK: Duration = Duration::from_secs(1);

/// Seconds from 1970 to 2026, before which nobody had a node.
const FIRST_RELEASE: u64 = 1_767_225_600;

/// Bytes that must be free on the disk before a database that failed is opened again.
const DATABASE_ROOM: u64 = 32 * 1024 * 1024;

/// What the supervisor passed to this process.
#[derive(Debug)]
pub struct Inheritance {
    connection: Connection,
    listener: UnixListener,
    line: Arc<Line>,
    journal: Option<Arc<Journal>>,
    restarts: u64,
}

impl Inheritance {
    /// Takes over what the supervisor passed, with the settings to work with; works once in a process.
    ///
    /// # Errors
    /// When this process was not started by a supervisor of this version, or the settings cannot work; the supervisor knows.
    pub fn take() -> anyhow::Result<(Self, Settings)> {
        let mut passed =
            take_passed(4).context("this command is for millstreamd itself; hint: run millstreamd without it")?;
        let [Some(journal), Some(line), Some(listener), Some(device)] = std::array::from_fn(|_| passed.pop()) else {
            anyhow::bail!("the supervisor passed too few descriptors");
        };
        let line = Arc::new(Line::new(line));
        let begun = line.await_start().and_then(|start| Ok((settings_of(&start)?, start)));
        let (settings, start) = begun.inspect_err(|error| refuse(&line, error))?;
        // Without it nothing is lost but what two deaths would need.
        let journal = Journal::open(&journal).map(Arc::new);
        let journal = journal.inspect_err(|error| warn!(%error, "requests are not noted for the next worker")).ok();
        let connection = Connection { device, init: start.init, answer: start.answer };
        Ok((Self { connection, listener: listener.into(), line, journal, restarts: start.restarts }, settings))
    }
}

/// Settings as the supervisor passes them. What it has taken possession of cannot change under it.
fn settings_of(start: &Start) -> anyhow::Result<Settings> {
    let settings: Settings = millstream_settings::parse(&start.settings).context("in the settings")?;
    for (key, set, kept) in [("root", &settings.root, &start.root), ("socket", &settings.socket, &start.socket)] {
        if set != kept {
            anyhow::bail!(
                "{key} is {} and would become {}; hint: restart millstreamd for that, which ends the lazy containers",
                kept.display(),
                set.display()
            );
        }
    }
    format::check(&settings.root)?;
    Ok(settings)
}

/// The supervisor passes it on to whoever asked for this worker; if it is gone, nobody did.
fn refuse(line: &Line, error: &anyhow::Error) {
    let _ = line.report(&Report::Refused(format!("{error:#}")));
}

/// Puts the stack together, serves until SIGTERM or until the mount is gone.
///
/// # Errors
/// When something of our own is broken: disk, database, descriptors. Registry and server may be down.
pub async fn run(settings: &Settings, inherited: Inheritance) -> anyhow::Result<()> {
    let line = Arc::clone(&inherited.line);
    work(settings, inherited).await.inspect_err(|error| refuse(&line, error))
}

async fn work(settings: &Settings, inherited: Inheritance) -> anyhow::Result<()> {
    raise_descriptor_limit();
    // A source that gives nothing is left early enough for the next one to be asked in time, and a host earlier still.
    let idle_timeout = (settings.fetch.read_deadline / 4).min(LONGEST_IDLE);
    let registry = Registry::new(RegistryOptions {
        hosts_dir: Some(settings.registry.hosts_dir.clone()),
        max_connections_per_host: settings.fetch.connections,
        connect_timeout: idle_timeout / 4,
        first_byte_timeout: idle_timeout / 2,
        idle_timeout,
        ..RegistryOptions::default()
    })?;
    let remote = Server::new(&settings.server, idle_timeout)?;
    let line = inherited.line;
    line.report(&Report::Ready(env!("CARGO_PKG_VERSION").into())).context("reporting to the supervisor")?;
    tokio::task::spawn_blocking({
        let line = Arc::clone(&line);
        move || line.await_go()
    })
    .await??;
    let (db, found) = database::open(&settings.root)?;
    let db = Arc::new(db);
    let damages = Damages::default();
    let numbers = Numbers::after(found, &damages);
    let lost = LostMounts::find(&settings.root, &mountpoint(settings), inherited.connection.answer.is_none());

    // world
    let options = StoreOptions {
        sync_interval: settings.store.sync_interval,
        numbers_above: numbers.layers,
        ..StoreOptions::default()
    };
    let store = Arc::new(Store::open(&settings.root, Arc::clone(&db), options).context("opening the store")?);
    let containerd = &settings.containerd.address;
    let containerd = (!containerd.as_os_str().is_empty()).then(|| Containerd::new(ContainerdOptions::new(containerd)));
    let lookup = containerd.clone().map(|containerd| Lookup::new(containerd, settings.registry.hosts_dir.clone()));
    let catalog = Catalog::open(Arc::clone(&db))?;
    let embedded = embedded_server(settings, &registry, containerd, &store, &catalog);
    let server = match &embedded {
        Some(embedded) => Some(Server::embedded(embedded.service())),
        None => remote,
    };
    let metrics = NodeMetrics::default();
    let docker_config = settings.registry.docker_config.clone();
    let origins = Origins {
        registry,
        server: server.clone(),
        embedded: embedded.clone(),
        docker_config,
        profiles: settings.fetch.profiles,
        record_one_in: settings.fetch.record_one_in,
        metrics: metrics.clone(),
    };

    // mechanism
    let fetch = FetchOptions {
        slots: settings.fetch.connections,
        read_deadline: settings.fetch.read_deadline,
        idle_timeout,
        share: settings.fetch.sharing,
        // Inflating is what takes a processor; more at once would only take memory.
        hydrations: std::thread::available_parallelism().map_or(1, |processors| processors.get().min(2)),
        ..FetchOptions::default()
    };
    let reporter = Reporter::default();
    tokio::spawn(memory::give_back(Arc::clone(&reporter.done)));
    let fetcher = Fetcher::new(Arc::clone(&store), fetch, Arc::new(reporter), tokio::runtime::Handle::current());
    fetcher.set_hydration(settings.fetch.hydration);
    let layerfs = Arc::new(LayerFs::new());
    let views = Arc::new(Views::new(Arc::clone(&store), Arc::clone(&layerfs), mountpoint(settings), damages));
    views.restore()?;

    // where they meet
    let images = Arc::new(NodeImages::new(
        Arc::clone(&store),
        Arc::clone(&fetcher),
        views,
        catalog,
        origins,
        lookup,
        settings.decision_deadline,
    ));
    let options =
        Options { decide_deadline: settings.decision_deadline, numbers_above: numbers.snapshots, ..Options::default() };
    let snapshots =
        Snapshots::open(&settings.root, Arc::clone(&db), Arc::new(SharedImages(Arc::clone(&images))), options)?;
    images.sweep(&snapshots.layers()?).await?;
    let repairer = Repairer::new(Arc::clone(&images), snapshots.clone(), lost);
    repairer.look()?;

    // the kernel's side, then containerd's
    let (resumed, whether_resumed) = watch::channel(false);
    tokio::spawn(repairer.clone().work(whether_resumed.clone()));
    let content = Arc::new(NodeContent::new(Arc::clone(&images), whether_resumed, metrics.clone()));
    let adapter = Adapter::new(layerfs, content, tokio::runtime::Handle::current(), inherited.journal.clone());
    // Now that it is certain that this program can work with the state.
    format::note(&settings.root)?;
    let session = Session::start(adapter, inherited.connection, inherited.journal.as_deref(), |answer| {
        line.report(&Report::Answer(answer.to_vec()))
    })
    .context("serving the FUSE connection")?;
    line.report(&Report::Serves).context("reporting to the supervisor")?;
    tokio::task::spawn_blocking({
        let images = Arc::clone(&images);
        move || {
            if let Err(error) = images.resume() {
                warn!(error = format!("{error:#}"), "background downloads are not resumed");
            }
            let _ = resumed.send(true);
        }
    });
    tokio::spawn(MountKeeper::work(mountpoint(settings)));
    tokio::spawn(images.views.readahead().clone().follow(Arc::clone(&store)));
    if let Some(server) = server {
        server.warm_up();
    }
    if let Some(embedded) = embedded {
        tokio::spawn(async move { Arc::clone(embedded.indexer()).work(embedded).await });
    }
    if let Some(address) = settings.metrics.listen {
        page::show(address, &metrics, Arc::clone(&images), Arc::clone(&db), mountpoint(settings), inherited.restarts)
            .await;
    }
    let garbage = Garbage::new(snapshots.clone(), Arc::clone(&images));
    tokio::spawn(garbage.clone().give_back_again_and_again());
    let keeper = Keeper::new(limits(settings), settings.root.clone(), snapshots.clone(), Arc::clone(&images));
    tokio::spawn(keeper.keep());
    let checker = Checker::new(repairer, Arc::clone(&db), session.invalidator());
    let control = Control::new(images, garbage, checker, settings.fetch.hydration, settings.store.quota);
    let result = tokio::select! {
        result = serve(inherited.listener, SnapshotService::new(snapshots), control, session) => result,
        error = database_failed(&db, &settings.root) => Err(error),
    };
    let synced = tokio::task::spawn_blocking(move || store.sync_all()).await?;
    if let Err(error) = synced {
        warn!(%error, "not everything is synced; it is fetched again after the next start");
    }
    result
}

fn limits(settings: &Settings) -> Limits {
    let store = &settings.store;
    Limits {
        quota: store.quota,
        high_water: store.high_water,
        low_water: store.low_water,
        reserve: store.reserve,
        evict_used: store.evict_used,
    }
}

/// Above which numbers begin in a database that has given out none. In a new root that is nothing; where the database was lost,
/// the kernel and mounts of containers may still know numbers of the old one.
#[derive(Debug, Default)]
struct Numbers {
    layers: u32,
    snapshots: u64,
}

impl Numbers {
    fn after(found: Found, damages: &Damages) -> Self {
        let named = |what| (database::FILE.to_owned(), what);
        match found {
            Found::Whole => Self::default(),
            Found::FromCopy { what } => {
                damages.set(damage::DATABASE_RESTORED, [named(what)].into());
                Self::default()
            }
            Found::Lost { what } => {
                let hint = "hint: remove all images of this snapshotter and pull them again";
                damages.set(damage::DATABASE_LOST, [named(format!("{what}; {hint}"))].into());
                // No node makes a layer a minute and a snapshot a second for years.
                let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
                let minutes = since.saturating_sub(FIRST_RELEASE) / 60;
                Self { layers: u32::try_from(minutes).unwrap_or(u32::MAX).min(MAX_NUMBER / 2), snapshots: since }
            }
        }
    }
}

/// The server in this process, for a node that is told of no other. Where its place on the disk cannot be used, the node works
/// without: what is here is served, new images are pulled as always.
fn embedded_server(
    settings: &Settings,
    registry: &Registry,
    containerd: Option<Containerd>,
    store: &Arc<Store>,
    catalog: &Catalog,
) -> Option<Embedded> {
    if !settings.server.address.is_empty() || !settings.server.embedded {
        return None;
    }
    let options = EmbeddedOptions { directory: settings.root.join("server"), limit: settings.server.embedded_limit };
    let opened = Indexer::new(catalog.clone(), settings.server.index_after).and_then(|indexer| {
        Embedded::open(options, registry.clone(), containerd, Arc::clone(store), Arc::new(indexer))
    });
    match opened {
        Ok(embedded) => Some(embedded),
        Err(error) => {
            error!(
                { names::CODE } = "node.local",
                error = format!("{error:#}"),
                "the embedded server cannot be used: new images are pulled the ordinary way"
            );
            None
        }
    }
}

/// Every layer keeps its data file open, and the usual limit of 1024 descriptors is that of a few dozen images.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        warn!(%error, ?limit, "cannot raise the limit of open files");
    }
}

/// Returns when a new worker has to open the database anew: after one failure of the disk it refuses everything. While the
/// disk is full that would not help, and local content can still be read.
async fn database_failed(db: &Database, root: &Path) -> anyhow::Error {
    let mut told = false;
    loop {
        tokio::time::sleep(DATABASE_CHECK).await;
        let Err(TransactionError::Storage(StorageError::PreviousIo)) = db.try_begin_write() else { continue };
        if !told {
            error!(
                { names::CODE } = "node.local",
                "the database failed; no snapshot can be made until it is opened again"
            );
            told = true;
        }
        if can_be_written(root) {
            return anyhow::anyhow!("the database failed and has to be opened again");
        }
    }
}

/// Whether the disk has room again, can be written and keeps what is written: else the next worker could not open the database
/// either, and nobody would serve what is here.
fn can_be_written(root: &Path) -> bool {
    let room = rustix::fs::statvfs(root).is_ok_and(|disk| disk.f_bavail.saturating_mul(disk.f_frsize) >= DATABASE_ROOM);
    let probe = root.join("probe.tmp");
    let written = || -> io::Result<()> {
        let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&probe)?;
        io::Write::write_all(&mut file, &[0; 4096])?;
        file.sync_all()
    };
    let result = room && written().is_ok();
    // Left behind it would be overwritten the next time.
    let _ = std::fs::remove_file(&probe);
    result
}

async fn serve(
    listener: UnixListener,
    snapshots: SnapshotService,
    control: Control,
    session: Session,
) -> anyhow::Result<()> {
    listener.set_nonblocking(true)?;
    let incoming = UnixListenerStream::new(tokio::net::UnixListener::from_std(listener)?);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let mut serving = tokio::spawn(
        GrpcServer::builder()
            .add_service(SnapshotsServer::new(snapshots))
            .add_service(NodeServer::new(control))
            .serve_with_incoming_shutdown(incoming, async {
                let _ = stopped.await;
            }),
    );
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mounted = tokio::task::spawn_blocking(move || session.wait());
    info!("worker serves");
    tokio::select! {
        _ = terminate.recv() => {}
        // A terminal sends it to the whole group; the supervisor decides.
        _ = interrupt.recv() => {}
        // Nobody would answer containerd any more: the next worker does.
        ended = &mut serving => {
            ended?.context("the service for containerd broke")?;
            anyhow::bail!("the service for containerd ended by itself");
        }
        ended = mounted => {
            ended?.context("the FUSE connection broke")?;
            anyhow::bail!("the connection of the mount was ended; the supervisor mounts a new one");
        }
    }
    let _ = stop.send(());
    match tokio::time::timeout(DRAIN, serving).await {
        Ok(served) => Ok(served??),
        // Streams that clients keep open do not hold us up.
        Err(_) => Ok(()),
    }
}
