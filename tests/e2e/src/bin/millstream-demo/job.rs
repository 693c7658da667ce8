//! One job: pull the image, run it in a pod, wait for the application's first real answer.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use millstream_e2e::containerd::{Containerd, ContainerdOptions, Snapshotter, Version};
use millstream_e2e::cri::{ContainerSpec, Cri};
use millstream_e2e::daemons::Node;
use millstream_e2e::process::eventually;
use millstream_e2e::registry::free_address;
use millstream_wire::millstream::v1::layer_status::State;

use crate::say;
use crate::stage::Stage;

const READY: Duration = Duration::from_secs(180);
const HYDRATED: Duration = Duration::from_secs(300);
const PAGE: &str = "/dokuwiki/doku.php";
const ON_THE_PAGE: &str = "It works";

/// On what the job is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Overlayfs,
    Millstream,
    /// Millstream, background downloads held back.
    Demand,
    /// overlayfs on containerd 2.x.
    Overlayfs2,
    /// Millstream on containerd 2.x.
    Millstream2,
}

impl Kind {
    /// What `make demo` does, with Debian's containerd 1.6.
    pub(crate) const DEMO: [Self; 3] = [Self::Overlayfs, Self::Millstream, Self::Demand];
    /// What `make bench` does besides, with a containerd 2.x.
    pub(crate) const BENCH: [Self; 2] = [Self::Overlayfs2, Self::Millstream2];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::Millstream => "Millstream",
            Self::Demand => "Millstream, no background download",
            Self::Overlayfs2 => "overlayfs, containerd 2",
            Self::Millstream2 => "Millstream, containerd 2",
        }
    }

    fn version(self) -> Version {
        match self {
            Self::Overlayfs | Self::Millstream | Self::Demand => Version::V1,
            Self::Overlayfs2 | Self::Millstream2 => Version::V2,
        }
    }

    /// Whether Millstream does it, and then whether it downloads in the background.
    fn hydration(self) -> Option<bool> {
        match self {
            Self::Overlayfs | Self::Overlayfs2 => None,
            Self::Millstream | Self::Millstream2 => Some(true),
            Self::Demand => Some(false),
        }
    }
}

/// What was measured. Times from the start of the pull.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Measured {
    pub(crate) pull: Duration,
    pub(crate) ready: Duration,
    /// Bytes that the link's near end had received when the application answered.
    pub(crate) link_bytes: u64,
    /// What Millstream itself counted until then: compressed content on demand, TOCs and windows.
    pub(crate) demanded: u64,
    /// Requests to the registry during the pull, and how many of them Millstream made.
    pub(crate) pull_requests: (u64, u64),
    pub(crate) hydrated: Option<Duration>,
    pub(crate) verified: bool,
}

/// Does the job from nothing: daemons with empty state, cold caches.
pub(crate) fn run(stage: &mut Stage, kind: Kind) -> Result<Measured> {
    say(format_args!("{}: pull, run, wait for the first answer", kind.name()));
    for dir in ["containerd1", "containerd2", "node", "pods"] {
        match std::fs::remove_dir_all(stage.work.path().join(dir)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    let mut node = kind.hydration().map(|hydration| Node::start(&stage.work, &stage.node(hydration))).transpose()?;
    let options = ContainerdOptions {
        version: kind.version(),
        snapshotter: node.as_ref().map_or(Snapshotter::Overlayfs, Node::snapshotter),
        pause_image: stage.registry.reference("demo/pause:1"),
        certs_d: stage.certs_d.clone(),
        // As containerd 2.x does it by itself.
        transfer: true,
        labels: true,
    };
    let containerd = Containerd::start(&stage.work, options)?;
    let mut cri = Cri::connect(&stage.work, &containerd.socket())?;
    // The pod's own container is the same for all and not part of the job.
    let pod = cri.run_pod("web")?;
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("dropping caches")?;

    let measured = measure(stage, &cri, &pod, node.as_ref())?;
    say(format_args!("  pulled after {:.2?}, ready after {:.2?}", measured.pull, measured.ready));

    cri.remove_pods()?;
    cri.remove_image(&stage.image)?;
    drop(cri);
    drop(containerd);
    if let Some(node) = &mut node {
        node.stop()?;
    }
    Ok(measured)
}

fn measure(stage: &Stage, cri: &Cri, pod: &millstream_e2e::cri::Pod, node: Option<&Node>) -> Result<Measured> {
    let port = free_address()?.port();
    let before = stage.link.traffic()?;
    let requests_before = stage.registry.requests()?.len();
    let transferred_before = transferred(node)?;
    let started = Instant::now();
    let pull = cri.pull(&stage.image, None)?;
    let requests = stage.registry.requests()?;
    let of_pull = requests.get(requests_before..).unwrap_or_default();
    // Only Millstream asks for parts of blobs.
    let ours = of_pull.iter().filter(|request| request.status == 206).count() as u64;
    let port_text = port.to_string();
    let spec = ContainerSpec { image: &stage.image, env: &[("PORT", &port_text)], ..ContainerSpec::default() };
    let container = cri.create(pod, "web", &spec)?;
    cri.start(&container)?;
    wait_for_answer(SocketAddr::from(([127, 0, 0, 1], port)), started + READY)
        .with_context(|| cri.output(&container).unwrap_or_default())?;
    let ready = started.elapsed();
    let after = stage.link.traffic()?;
    let demanded = transferred(node)? - transferred_before;
    let link_bytes = after.received_bytes - before.received_bytes;
    // What Millstream counts is what crossed the link, but for headers, manifests and the application's own.
    ensure!(demanded <= link_bytes, "Millstream counts {demanded} bytes, the link saw only {link_bytes}");
    let mut measured = Measured {
        pull,
        ready,
        link_bytes,
        demanded,
        pull_requests: (of_pull.len() as u64, ours),
        hydrated: None,
        verified: false,
    };
    if let Some(node) = node
        && node.status()?.hydration_enabled
    {
        say(format_args!("  ready after {ready:.2?}; waiting until every layer is local and verified"));
        eventually("every layer to be verified", HYDRATED, || is_verified(node).then_some(()))?;
        measured.hydrated = Some(started.elapsed());
        measured.verified = true;
    }
    Ok(measured)
}

fn transferred(node: Option<&Node>) -> Result<u64> {
    let Some(node) = node else { return Ok(0) };
    let transfer = node.status()?.transfer.unwrap_or_default();
    Ok(transfer.demand_bytes + transfer.metadata_bytes)
}

fn is_verified(node: &Node) -> bool {
    node.status().is_ok_and(|status| {
        !status.layers.is_empty() && status.layers.iter().all(|layer| layer.state() == State::Verified)
    })
}

fn wait_for_answer(address: SocketAddr, deadline: Instant) -> Result<()> {
    loop {
        if ask(address).is_ok_and(|answer| answer.starts_with("HTTP/1.1 200") && answer.contains(ON_THE_PAGE)) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the application did not answer in time");
        millstream_e2e::process::pause();
    }
}

fn ask(address: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(READY))?;
    write!(stream, "GET {PAGE} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
