//! The daemons of this project, with settings of their own in a workdir.

use std::fmt::Write as _;
use std::io::Read as _;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use millstream_wire::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use millstream_wire::containerd::services::snapshots::v1::{Info, ListSnapshotsRequest};
use millstream_wire::millstream::v1::layer_status::State;
use millstream_wire::millstream::v1::node_client::NodeClient;
use millstream_wire::millstream::v1::{
    ExplainRequest, ExplainResponse, GcRequest, SetHydrationRequest, SetStreamingRequest, StatusRequest, StatusResponse,
};

use crate::containerd::Snapshotter;
use crate::cri::connect;
use crate::installation::Installation;
use crate::link::Link;
use crate::machine;
use crate::names;
use crate::need::product;
use crate::process::{Process, eventually, peak_memory, socket_accepts};
use crate::registry::Tls;
use crate::workdir::Workdir;

/// The node daemon.
pub const NODE: &str = "millstreamd";
/// The server.
pub const SERVER: &str = "millstream-server";
const READY: Duration = Duration::from_secs(30);
const CALL: Duration = Duration::from_secs(30);

/// How the node daemon is to be set up; see `config/millstreamd.toml` for the meanings.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// `http://` or `https://` address of the server; empty: none.
    pub server: String,
    /// Without a server: how long an image is left alone after its pull, before the node indexes it.
    pub index_after: Duration,
    /// The server's authority, for `https://`.
    pub ca: Option<PathBuf>,
    /// Directory in the manner of `certs.d`.
    pub certs_d: PathBuf,
    /// A docker `config.json` with credentials.
    pub docker_config: Option<PathBuf>,
    /// Socket of the containerd that it may ask; none: it asks none.
    pub containerd: Option<PathBuf>,
    /// Whether images are made local in the background.
    pub hydration: bool,
    /// Whether it learns what starts of images read, and uses what is known.
    pub profiles: bool,
    /// Of so many starts for which something is known, one is recorded; the others are helped. Not the default, so that tests are
    /// not drawn by lot.
    pub record_one_in: u32,
    /// How long a read may wait for its bytes.
    pub read_deadline: Duration,
    /// Further tables of the settings, as they stand in the file.
    pub more: String,
    /// Where its metrics are shown, if anywhere.
    pub metrics: Option<SocketAddr>,
    /// Filter of its log.
    pub log_level: &'static str,
    /// What it finds in the place of `/etc/resolv.conf`, if not that. Its mount is then to be seen below [`Node::sees`] only.
    pub resolv_conf: Option<PathBuf>,
}

impl NodeOptions {
    /// Hydration on, anonymous, images are indexed at once, reads wait up to 60 s.
    pub fn new(server: &str, certs_d: &Path) -> Self {
        Self {
            server: server.to_owned(),
            index_after: Duration::ZERO,
            ca: None,
            certs_d: certs_d.to_owned(),
            docker_config: None,
            containerd: None,
            hydration: true,
            profiles: true,
            record_one_in: u32::MAX,
            read_deadline: Duration::from_secs(60),
            more: String::new(),
            metrics: None,
            log_level: "debug,h2=info,hyper=info,tonic=info,tower=info",
            resolv_conf: None,
        }
    }
}

/// A running `millstreamd`. Its state survives [`Node::stop`], [`Node::crash`] and a new start.
#[derive(Debug)]
pub struct Node {
    config: PathBuf,
    socket: PathBuf,
    root: PathBuf,
    metrics: Option<SocketAddr>,
    installation: Option<Installation>,
    resolv_conf: Option<PathBuf>,
    log: PathBuf,
    process: Option<Process>,
}

impl Node {
    /// Starts it and waits until its socket answers.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn start(work: &Workdir, options: &NodeOptions) -> Result<Self> {
        let dir = work.dir("node")?;
        let (config, socket, root) = (dir.join("millstreamd.toml"), dir.join("m.sock"), dir.join("root"));
        std::fs::write(&config, node_settings(&dir, options)?)?;
        let (metrics, log, resolv_conf) = (options.metrics, work.log(NODE), options.resolv_conf.clone());
        let mut node = Self { config, socket, root, metrics, installation: None, resolv_conf, log, process: None };
        node.launch()?;
        Ok(node)
    }

    /// Starts it in an installation, with these settings, whose paths are the defaults.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn start_in(work: &Workdir, installation: &Installation, settings: &str) -> Result<Self> {
        // Its file is not below /etc, so that its arguments name the workdir and a sweep finds it.
        let config = work.dir("node")?.join("millstreamd.toml");
        std::fs::write(&config, settings)?;
        let socket = installation.at("/run/millstream/millstream.sock");
        let root = installation.at("/var/lib/millstream");
        let installation = Some(installation.clone());
        let log = work.log(NODE);
        let (metrics, resolv_conf) = (None, None);
        let mut node = Self { config, socket, root, metrics, installation, resolv_conf, log, process: None };
        node.launch()?;
        Ok(node)
    }

    /// Starts it again on the same state and settings; one that runs is left alone.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn launch(&mut self) -> Result<()> {
        if self.process.is_some() {
            return Ok(());
        }
        let program = product(NODE).context("millstreamd is not built")?;
        let mut command = match (&self.installation, &self.resolv_conf) {
            (Some(installation), _) => installation.command(&program),
            (None, Some(resolv_conf)) => names::asking(resolv_conf, &program),
            (None, None) => Command::new(program),
        };
        command.arg("--config").arg(&self.config);
        let mut process = Process::spawn(NODE, command, &self.log)?;
        let socket = self.socket();
        process.wait_ready(READY, || socket_accepts(&socket) && status_of(&socket).is_ok())?;
        self.process = Some(process);
        Ok(())
    }

    /// The socket for containerd and for the command line.
    pub fn socket(&self) -> PathBuf {
        self.socket.clone()
    }

    /// Directory of its state.
    pub fn root(&self) -> PathBuf {
        self.root.clone()
    }

    /// Where the mounts that it sees are, for a path that it knows.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub fn sees(&self, path: &Path) -> Result<PathBuf> {
        let supervisor = self.supervisor().with_context(|| format!("{NODE} does not run"))?;
        Ok(Path::new(&format!("/proc/{supervisor}/root")).join(path.strip_prefix("/")?))
    }

    /// File with its settings; what is changed there holds from its next start on.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Its output.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// What containerd is told of it.
    pub fn snapshotter(&self) -> Snapshotter {
        Snapshotter::Millstream { socket: self.socket(), root: self.root() }
    }

    /// Where it shows its metrics, if it does.
    pub fn metrics(&self) -> Option<SocketAddr> {
        self.metrics
    }

    /// The id of the process that starts the workers, while it runs.
    pub fn supervisor(&self) -> Option<i32> {
        self.process.as_ref().and_then(|process| i32::try_from(process.id()).ok())
    }

    /// The ids of the processes below the supervisor, which do the work and may be killed alone.
    pub fn workers(&self) -> Vec<i32> {
        let Some(process) = &self.process else { return Vec::new() };
        let id = process.id();
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
    }

    /// The most memory that one of its workers has had so far; see [`peak_memory`].
    ///
    /// # Errors
    ///
    /// If there is no worker.
    pub fn peak_memory(&self) -> Result<u64> {
        let peaks: Result<Vec<u64>> = self.workers().into_iter().map(|pid| peak_memory(pid.unsigned_abs())).collect();
        peaks?.into_iter().max().with_context(|| format!("{NODE} has no worker"))
    }

    /// SIGKILL to its workers, as a crash would be, and waits until a new one answers.
    ///
    /// # Errors
    ///
    /// If there is no worker, or none comes back.
    pub fn crash_worker(&self) -> Result<()> {
        let before = self.workers();
        anyhow::ensure!(!before.is_empty(), "{NODE} has no worker");
        for pid in before.iter().filter_map(|pid| rustix::process::Pid::from_raw(*pid)) {
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
        }
        eventually("a new worker", READY, || {
            let now = self.workers();
            (!now.is_empty() && now.iter().all(|pid| !before.contains(pid))).then_some(())
        })?;
        eventually("an answer of the new worker", READY, || self.status().ok()).map(drop)
    }

    /// SIGKILL to the supervisor itself.
    ///
    /// # Errors
    ///
    /// If it does not end.
    pub fn crash(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), Process::crash)
    }

    /// SIGKILL to the supervisor and its workers at once, as when the machine fails.
    ///
    /// # Errors
    ///
    /// If they do not end.
    pub fn crash_wholly(&mut self) -> Result<()> {
        let workers = self.workers();
        self.crash()?;
        eventually("the end of the workers", READY, || {
            for pid in workers.iter().filter_map(|pid| rustix::process::Pid::from_raw(*pid)) {
                // It ends by itself when its supervisor does.
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
            }
            let ended = |pid: &i32| {
                let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                stat.is_empty() || stat.contains(") Z ")
            };
            workers.iter().all(ended).then_some(())
        })
    }

    /// Asks it to end.
    ///
    /// # Errors
    ///
    /// If its end cannot be awaited.
    pub fn stop(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), |process| process.stop().map(drop))
    }

    /// Its layers and what it has fetched.
    ///
    /// # Errors
    ///
    /// If it does not answer.
    pub fn status(&self) -> Result<StatusResponse> {
        status_of(&self.socket())
    }

    /// Whether it has lazy layers, and all of them are wholly local and verified.
    pub fn is_all_local(&self) -> bool {
        self.status().is_ok_and(|status| {
            !status.layers.is_empty() && status.layers.iter().all(|layer| layer.state() == State::Verified)
        })
    }

    /// All its snapshots, of whatever namespace, as garbage collection lists them.
    ///
    /// # Errors
    ///
    /// If it does not answer.
    pub fn snapshots(&self) -> Result<Vec<Info>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut client = SnapshotsClient::new(connect(&self.socket()).await?);
            let mut list = client.list(ListSnapshotsRequest::default()).await?.into_inner();
            let mut found = Vec::new();
            while let Some(part) = list.message().await? {
                found.extend(part.info);
            }
            Ok(found)
        })
    }

    /// Why an image streams or why not.
    ///
    /// # Errors
    ///
    /// If it does not answer.
    pub fn explain(&self, image: &str) -> Result<ExplainResponse> {
        let request = ExplainRequest { image: image.to_owned() };
        call(&self.socket(), async |mut node| node.explain(request).await)
    }

    /// Gives back at once what nothing uses.
    ///
    /// # Errors
    ///
    /// If it does not answer.
    pub fn give_back(&self) -> Result<()> {
        call(&self.socket(), async |mut node| node.gc(GcRequest { dry_run: false }).await).map(drop)
    }

    /// Switches streaming of new images on or off.
    ///
    /// # Errors
    ///
    /// If it does not answer.
    pub fn set_streaming(&self, enabled: bool) -> Result<()> {
        call(&self.socket(), async |mut node| node.set_streaming(SetStreamingRequest { enabled }).await).map(drop)
    }

    /// Holds hydration back or lets it go on.
    ///
    /// # Errors
    ///
    /// If it does not answer.
    pub fn set_hydration(&self, enabled: bool) -> Result<()> {
        call(&self.socket(), async |mut node| node.set_hydration(SetHydrationRequest { enabled }).await).map(drop)
    }
}

/// How the server is to be set up; see `config/millstream-server.toml` for the meanings.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Where it listens.
    pub address: SocketAddr,
    /// TLS; absent: plaintext, for a loopback address only.
    pub tls: Option<Tls>,
    /// Directory in the manner of `certs.d`.
    pub certs_d: PathBuf,
    /// Whether an image that a node asks for is imported without being told to.
    pub import_on_demand: bool,
    /// Most files of a layer, where the default would take a test too long to exceed.
    pub max_entries: Option<u64>,
    /// Whether the content of layers that cannot be entered is kept.
    pub packed_content: bool,
}

/// A running `millstream-server`.
#[derive(Debug)]
pub struct Server {
    process: Process,
}

impl Server {
    /// Starts it, on the far side of a link if one is given, and waits until it listens.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn start(work: &Workdir, options: &ServerOptions, link: Option<&Link>) -> Result<Self> {
        Self::start_as(work, options, |program| {
            link.map_or_else(|| Command::new(program), |link| link.command(program))
        })
    }

    /// The same by a command that starts the program.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn start_as(work: &Workdir, options: &ServerOptions, command: impl FnOnce(&Path) -> Command) -> Result<Self> {
        let dir = work.dir("server")?;
        let file = dir.join("millstream-server.toml");
        std::fs::write(&file, server_settings(&dir, options)?)?;
        let mut command = command(&product(SERVER).context("millstream-server is not built")?);
        command.arg("--config").arg(&file);
        let mut process = Process::spawn(SERVER, command, &work.log(SERVER))?;
        let port = options.address.port();
        let id = process.id();
        process.wait_ready(READY, || listens(id, port))?;
        Ok(Self { process })
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// The most memory that it has had so far; see [`peak_memory`].
    ///
    /// # Errors
    ///
    /// If it has ended.
    pub fn peak_memory(&self) -> Result<u64> {
        peak_memory(self.process.id())
    }

    /// Asks it to end.
    ///
    /// # Errors
    ///
    /// If its end cannot be awaited.
    pub fn stop(self) -> Result<()> {
        self.process.stop().map(drop)
    }

    /// SIGKILL.
    ///
    /// # Errors
    ///
    /// If it does not end.
    pub fn crash(self) -> Result<()> {
        self.process.crash()
    }
}

/// Whether the process's network, whichever it is in, has a listener on the port.
pub(crate) fn listens(process: u32, port: u16) -> bool {
    const LISTEN: &str = "0A";
    ["tcp", "tcp6"].iter().any(|table| {
        let text = std::fs::read_to_string(format!("/proc/{process}/net/{table}")).unwrap_or_default();
        text.lines().skip(1).any(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let local = fields.next().and_then(|local| local.rsplit_once(':'));
            let found = local.and_then(|(_, port)| u16::from_str_radix(port, 16).ok());
            found == Some(port) && fields.nth(1) == Some(LISTEN)
        })
    })
}

fn status_of(socket: &Path) -> Result<StatusResponse> {
    call(socket, async |mut node| node.status(StatusRequest {}).await)
}

fn call<T>(
    socket: &Path,
    ask: impl AsyncFnOnce(NodeClient<tonic::transport::Channel>) -> Result<tonic::Response<T>, tonic::Status>,
) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let client = NodeClient::new(connect(socket).await?);
        let answer = tokio::time::timeout(CALL, ask(client)).await;
        Ok(answer.with_context(|| format!("no answer from {NODE}"))??.into_inner())
    })
}

fn node_settings(dir: &Path, options: &NodeOptions) -> Result<String> {
    let mut text = format!("root = {:?}\nsocket = {:?}\n", dir.join("root"), dir.join("m.sock"));
    if machine::is_inside() {
        // An emulated processor takes longer than the second that is usual.
        writeln!(text, "decision_deadline = \"20s\"")?;
    }
    writeln!(
        text,
        "\n[server]\naddress = {:?}\nindex_after = \"{}ms\"",
        options.server,
        options.index_after.as_millis()
    )?;
    if let Some(ca) = &options.ca {
        writeln!(text, "ca = {ca:?}")?;
    }
    writeln!(text, "\n[registry]\nhosts_dir = {:?}", options.certs_d)?;
    if let Some(file) = &options.docker_config {
        writeln!(text, "docker_config = {file:?}")?;
    }
    writeln!(text, "\n[containerd]\naddress = {:?}", options.containerd.as_deref().unwrap_or(Path::new("")))?;
    let deadline = options.read_deadline.as_millis();
    writeln!(text, "\n[fetch]\nhydration = {}\nread_deadline = \"{deadline}ms\"", options.hydration)?;
    writeln!(text, "profiles = {}\nrecord_one_in = {}", options.profiles, options.record_one_in)?;
    if let Some(address) = options.metrics {
        writeln!(text, "\n[metrics]\nlisten = \"{address}\"")?;
    }
    writeln!(text, "\n[log]\nlevel = {:?}", options.log_level)?;
    text.push_str(&options.more);
    Ok(text)
}

/// The page of metrics that somebody shows at `address`.
///
/// # Errors
///
/// If nobody answers.
pub fn metrics_page(address: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, CALL)?;
    stream.set_read_timeout(Some(CALL))?;
    let asked = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    std::io::Write::write_all(&mut stream, asked.as_bytes())?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
}

/// The value of one sample, written as on the page, such as `name_total{label="x"}`; 0 if it is not there.
#[must_use]
pub fn sample(page: &str, name: &str) -> u64 {
    let lines = page.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    lines.filter_map(|value| value.trim().parse().ok()).next().unwrap_or_default()
}

fn server_settings(dir: &Path, options: &ServerOptions) -> Result<String> {
    let (store, scratch) = (dir.join("store"), dir.join("scratch"));
    std::fs::create_dir_all(&scratch)?;
    let mut text = format!("listen = {:?}\nstore = {store:?}\n", options.address.to_string());
    if let Some(tls) = &options.tls {
        let (certificate, key) = tls.server();
        writeln!(text, "\n[tls]\ncert = {certificate:?}\nkey = {key:?}")?;
    }
    writeln!(text, "\n[registry]\nhosts_dir = {:?}", options.certs_d)?;
    writeln!(text, "\n[import]\non_demand = {}\nscratch = {scratch:?}", options.import_on_demand)?;
    if !options.packed_content {
        text.push_str("packed_max = \"0B\"\n");
    }
    if let Some(entries) = options.max_entries {
        writeln!(text, "\n[import.budget]\nentries = {entries}")?;
    }
    text.push_str("\n[log]\nlevel = \"debug,h2=info,hyper=info,tonic=info,tower=info\"\n");
    Ok(text)
}
