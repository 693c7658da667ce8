//! One job: pull the image, run it in a pod, wait for the application's first real answer.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use millstream_e2e::containerd::{Containerd, ContainerdOptions, Snapshotter, Version};
use millstream_e2e::cri::{ContainerSpec, Cri, Pod};
use millstream_e2e::daemons::{Node, NodeOptions};
use millstream_e2e::process::eventually;
use millstream_e2e::registry::free_address;
use millstream_e2e::rig::{Rig, drop_caches};
use millstream_e2e::web;

use crate::say;

/// What the registry calls the image.
pub(crate) const IMAGE: &str = "demo/web:1";
/// And that of the pod's own container.
pub(crate) const PAUSE: &str = "demo/pause:1";

const READY: Duration = Duration::from_secs(180);
const HYDRATED: Duration = Duration::from_secs(300);

/// On what the job is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Overlayfs,
    Millstream,
    /// Millstream, background downloads held back.
    Demand,
    /// Millstream, after a start of the image on another node.
    Profile,
    /// overlayfs on containerd 2.x.
    Overlayfs2,
    /// Millstream on containerd 2.x.
    Millstream2,
}

impl Kind {
    /// What `make demo` does, with Debian's containerd 1.6.
    pub(crate) const DEMO: [Self; 4] = [Self::Overlayfs, Self::Millstream, Self::Demand, Self::Profile];
    /// What `make bench` does besides, with a containerd 2.x.
    pub(crate) const BENCH: [Self; 2] = [Self::Overlayfs2, Self::Millstream2];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::Millstream => "Millstream",
            Self::Demand => "Millstream, no background download",
            Self::Profile => "Millstream, the next node",
            Self::Overlayfs2 => "overlayfs, containerd 2",
            Self::Millstream2 => "Millstream, containerd 2",
        }
    }

    fn version(self) -> Version {
        match self {
            Self::Overlayfs | Self::Millstream | Self::Demand | Self::Profile => Version::V1,
            Self::Overlayfs2 | Self::Millstream2 => Version::V2,
        }
    }

    /// Whether Millstream does it, and then whether it downloads in the background.
    fn hydration(self) -> Option<bool> {
        match self {
            Self::Overlayfs | Self::Overlayfs2 => None,
            Self::Millstream | Self::Millstream2 | Self::Profile => Some(true),
            Self::Demand => Some(false),
        }
    }

    /// Whether what earlier starts read is known, and this one is told of.
    fn has_profile(self) -> bool {
        self == Self::Profile
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
pub(crate) fn run(rig: &Rig, kind: Kind) -> Result<Measured> {
    say(format_args!("{}: pull, run, wait for the first answer", kind.name()));
    rig.wipe(&["containerd1", "containerd2", "node", "pods"])?;
    let start =
        |hydration| Node::start(&rig.work, &NodeOptions { profiles: kind.has_profile(), ..rig.node(hydration) });
    let mut node = kind.hydration().map(start).transpose()?;
    let options = ContainerdOptions {
        version: kind.version(),
        snapshotter: node.as_ref().map_or(Snapshotter::Overlayfs, Node::snapshotter),
        pause_image: rig.registry.reference(PAUSE),
        certs_d: rig.certs_d.clone(),
        // As containerd 2.x does it by itself.
        transfer: true,
        labels: true,
    };
    let containerd = Containerd::start(&rig.work, options)?;
    let mut cri = Cri::connect(&rig.work, &containerd.socket())?;
    // The pod's own container is the same for all and not part of the job.
    let pod = cri.run_pod("web")?;
    drop_caches()?;

    let measured = measure(rig, &cri, &pod, node.as_ref())?;
    say(format_args!("  pulled after {:.2?}, ready after {:.2?}", measured.pull, measured.ready));

    cri.remove_pods()?;
    cri.remove_image(&rig.registry.reference(IMAGE))?;
    drop(cri);
    drop(containerd);
    if let Some(node) = &mut node {
        node.stop()?;
    }
    Ok(measured)
}

fn measure(rig: &Rig, cri: &Cri, pod: &Pod, node: Option<&Node>) -> Result<Measured> {
    let port = free_address()?.port();
    let image = rig.registry.reference(IMAGE);
    let before = rig.link.traffic()?;
    let requests_before = rig.registry.requests()?.len();
    let transferred_before = transferred(node)?;
    let started = Instant::now();
    let pull = cri.pull(&image, None)?;
    let requests = rig.registry.requests()?;
    let of_pull = requests.get(requests_before..).unwrap_or_default();
    // Only Millstream asks for parts of blobs.
    let ours = of_pull.iter().filter(|request| request.status == 206).count() as u64;
    let port_text = port.to_string();
    let spec = ContainerSpec { image: &image, env: &[("PORT", &port_text)], ..ContainerSpec::default() };
    let container = cri.create(pod, "web", &spec)?;
    cri.start(&container)?;
    web::question().await_answer(port, started + READY).with_context(|| cri.output(&container).unwrap_or_default())?;
    let ready = started.elapsed();
    let after = rig.link.traffic()?;
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
        eventually("every layer to be verified", HYDRATED, || node.is_all_local().then_some(()))?;
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
