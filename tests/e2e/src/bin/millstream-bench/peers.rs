//! Who is measured, with which settings, and the daemon that this takes.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use millstream_e2e::containerd::{Containerd, ContainerdOptions, Snapshotter, Tuning, Version};
use millstream_e2e::daemons::{NODE, Node, NodeOptions};
use millstream_e2e::need::{CONTAINERD_2, Need, bench_tool, program};
use millstream_e2e::process::{Process, socket_accepts};
use millstream_e2e::registry::free_address;
use millstream_e2e::rig::Rig;

use crate::images::{Form, PAUSE_NAME};

/// The release of stargz-snapshotter; `tests/bench/peers/go.mod` has the same.
pub(crate) const STARGZ: &str = "0.19.1";
const STARGZ_PROGRAM: &str = "containerd-stargz-grpc";
/// The release of SOCI's library; `tests/bench/peers/soci/go.mod` has the same.
pub(crate) const SOCI: &str = "0.16.1";
const SOCI_PROGRAM: &str = "soci-snapshotter-grpc";
/// Where in the workdir somebody else's daemon has its state.
pub(crate) const DIRECTORY: &str = "peer";
const STARGZ_TUNING: &str = "no_background_fetch = true\n[blob]\nchunk_size = 262144\nprefetch_chunk_size = 4194304\n[fuse]\npassthrough = true\n";
const SOCI_PREFETCH: &str = "[prefetch]\nenable = true\n";
const READY: Duration = Duration::from_secs(30);
/// Layers that containerd unpacks at once where it is tuned: more than these images have on two processors is of no use.
const UNPACKS: &str = "  max_concurrent_unpacks = 4\n";
const TRANSFER: &str = "[plugins.\"io.containerd.transfer.v1.local\"]";
/// What keeps containerd from using a program to inflate layers.
const NO_PROGRAMS: [(&str, &str); 2] = [("CONTAINERD_DISABLE_IGZIP", "1"), ("CONTAINERD_DISABLE_PIGZ", "1")];

/// What the server knows of an image when a node pulls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    /// Its tables, and how another node started it.
    Profile,
    /// Its tables; the node neither has nor gives a profile.
    Indexed,
    /// Its tables; the first node that starts it tells what that reads. Not measured.
    First,
    /// There is no server, and this node has never seen the image.
    Nothing,
}

/// Somebody who pulls and starts images in some way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subject {
    /// containerd's own overlayfs; tuned: it unpacks in parallel and inflates with the fastest program that there is.
    Overlayfs { version: Version, tuned: bool },
    /// stargz-snapshotter; tuned: no background fetch beside the start, larger requests, passthrough.
    Stargz { form: Form, tuned: bool },
    /// soci-snapshotter, with or without prefetch of the files of a start.
    Soci { prefetch: bool },
    /// This project.
    Millstream { version: Version, known: Known, hydration: bool },
}

impl Subject {
    /// Name in the rows.
    pub(crate) fn peer(self) -> String {
        match self {
            Self::Overlayfs { version, .. } => format!("overlayfs, containerd {}", release(version)),
            Self::Stargz { .. } => format!("stargz {STARGZ}"),
            Self::Soci { .. } => format!("soci {SOCI}"),
            Self::Millstream { version: Version::V1, .. } => "millstream, containerd 1.6".to_owned(),
            Self::Millstream { .. } => "millstream".to_owned(),
        }
    }

    /// Settings in the rows.
    pub(crate) fn settings(self) -> String {
        match self {
            Self::Overlayfs { tuned: false, .. } => "default".to_owned(),
            Self::Overlayfs { tuned: true, .. } => "tuned".to_owned(),
            Self::Soci { prefetch } => if prefetch { "prefetch" } else { "default" }.to_owned(),
            Self::Stargz { form, tuned } => {
                let form = if form == Form::Optimized { "optimized" } else { "plain" };
                if tuned { format!("{form}, tuned") } else { form.to_owned() }
            }
            Self::Millstream { known, hydration, .. } => {
                let known = match known {
                    Known::Profile => "profile",
                    Known::Indexed => "indexed",
                    Known::First => "first",
                    Known::Nothing => "cold",
                };
                if hydration { known.to_owned() } else { format!("{known}, no hydration") }
            }
        }
    }

    pub(crate) fn form(self) -> Form {
        match self {
            Self::Stargz { form, .. } => form,
            Self::Soci { prefetch: true } => Form::SociPrefetch,
            Self::Soci { prefetch: false } => Form::Soci,
            Self::Overlayfs { .. } | Self::Millstream { .. } => Form::Plain,
        }
    }

    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Self::Millstream { .. })
    }

    /// Whether its pulls fetch little of an image.
    pub(crate) fn is_lazy(self) -> bool {
        !matches!(self, Self::Overlayfs { .. } | Self::Millstream { known: Known::Nothing, .. })
    }

    /// Whether millstream-server has a part in it.
    pub(crate) fn needs_server(self) -> bool {
        matches!(self, Self::Millstream { known: Known::Profile | Known::Indexed | Known::First, .. })
    }

    /// What it lacks on this machine.
    pub(crate) fn missing(self) -> Option<&'static str> {
        let old = matches!(
            self,
            Self::Overlayfs { version: Version::V1, .. } | Self::Millstream { version: Version::V1, .. }
        );
        if old && !Need::Program("containerd").is_met() {
            return Some("containerd");
        }
        if !old && !Need::Containerd2.is_met() {
            return Some("containerd 2.x");
        }
        let programs: &[&str] = match self {
            Self::Stargz { .. } => &[STARGZ_PROGRAM],
            Self::Soci { .. } => &[SOCI_PROGRAM, "soci"],
            Self::Overlayfs { .. } | Self::Millstream { .. } => &[],
        };
        programs.iter().copied().find(|name| bench_tool(name).is_none())
    }

    fn version(self) -> Version {
        match self {
            Self::Overlayfs { version, .. } | Self::Millstream { version, .. } => version,
            Self::Stargz { .. } | Self::Soci { .. } => Version::V2,
        }
    }

    /// What inflates the layers that containerd unpacks.
    pub(crate) fn decompressor(self) -> Option<String> {
        let Self::Overlayfs { version, tuned } = self else { return None };
        let found = match version {
            _ if !tuned => None,
            // It does not know the other one.
            Version::V1 => program("unpigz").map(|_| "unpigz"),
            _ if igzip().is_some() || program("igzip").is_some() => Some("igzip"),
            _ => program("unpigz").map(|_| "unpigz"),
        };
        Some(found.unwrap_or("Go's own").to_owned())
    }

    /// Starts its daemon, on nothing.
    pub(crate) fn daemon(self, rig: &Rig) -> Result<Daemon> {
        match self {
            Self::Overlayfs { .. } => Ok(Daemon::None),
            Self::Stargz { tuned, .. } => {
                let tuning = if tuned { STARGZ_TUNING } else { "" };
                other(rig, "stargz", STARGZ_PROGRAM, "", tuning)
            }
            Self::Soci { prefetch } => {
                let tuning = if prefetch { SOCI_PREFETCH } else { "" };
                other(rig, "soci", SOCI_PROGRAM, "http://", tuning)
            }
            Self::Millstream { version, known, hydration } => {
                let mut options = rig.node(hydration);
                if known == Known::Nothing {
                    let socket = rig.work.path().join(ContainerdOptions::dir_name(version)).join("c.sock");
                    options = NodeOptions { server: String::new(), ca: None, containerd: Some(socket), ..options };
                }
                options.metrics = Some(free_address()?);
                // The server may have learned one from another subject.
                options.profiles = known != Known::Indexed;
                // As the daemon has it by itself.
                options.record_one_in = 8;
                options.index_after = Duration::from_secs(10);
                options.log_level = "info";
                Ok(Daemon::Millstream(Box::new(Node::start(&rig.work, &options)?)))
            }
        }
    }

    /// Starts containerd before that daemon.
    pub(crate) fn containerd(self, rig: &Rig, daemon: &Daemon) -> Result<Containerd> {
        let options = ContainerdOptions {
            version: self.version(),
            snapshotter: daemon.snapshotter(),
            pause_image: rig.registry.reference(PAUSE_NAME),
            certs_d: rig.certs_d.clone(),
            // As containerd 2.x does it by itself.
            transfer: true,
            labels: true,
        };
        let mut tuning = Tuning::default();
        match self {
            Self::Overlayfs { version: Version::V2, tuned: true } => {
                tuning.lines = Some((TRANSFER, UNPACKS.to_owned()));
                tuning.programs = igzip().and_then(|program| program.parent().map(Path::to_owned));
            }
            Self::Overlayfs { tuned: false, .. } => tuning.env = NO_PROGRAMS.to_vec(),
            _ => {}
        }
        Containerd::start_tuned(&rig.work, options, tuning)
    }
}

/// The one that `install.sh bench` unpacked, where nobody else finds it.
fn igzip() -> Option<PathBuf> {
    bench_tool("igzip/igzip")
}

fn release(version: Version) -> &'static str {
    match version {
        Version::V1 => "1.6",
        Version::V2 => CONTAINERD_2,
        Version::Release(release) => release,
    }
}

/// The daemon beside containerd, if there is one.
#[derive(Debug)]
pub(crate) enum Daemon {
    None,
    Other { name: &'static str, process: Process, socket: PathBuf, root: PathBuf },
    Millstream(Box<Node>),
}

impl Daemon {
    fn snapshotter(&self) -> Snapshotter {
        match self {
            Self::None => Snapshotter::Overlayfs,
            Self::Other { name, socket, root, .. } => {
                Snapshotter::Other { name, socket: socket.clone(), root: root.clone() }
            }
            Self::Millstream(node) => node.snapshotter(),
        }
    }

    pub(crate) fn node(&self) -> Option<&Node> {
        if let Self::Millstream(node) = self { Some(node) } else { None }
    }

    /// Name of its log in the workdir.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::None => "containerd2",
            Self::Other { name, .. } => name,
            Self::Millstream(_) => NODE,
        }
    }

    /// Its processes.
    pub(crate) fn processes(&self) -> Vec<u32> {
        match self {
            Self::None => Vec::new(),
            Self::Other { process, .. } => vec![process.id()],
            Self::Millstream(node) => {
                let all = node.supervisor().into_iter().chain(node.workers());
                all.map(i32::unsigned_abs).collect()
            }
        }
    }

    /// Asks it to end.
    pub(crate) fn stop(self) -> Result<()> {
        match self {
            Self::None => Ok(()),
            Self::Other { process, .. } => process.stop().map(drop),
            Self::Millstream(mut node) => node.stop(),
        }
    }
}

/// Somebody else's daemon; `scheme` is what it wants before the name of a mirror.
fn other(rig: &Rig, name: &'static str, program: &'static str, scheme: &str, tuning: &str) -> Result<Daemon> {
    let dir = rig.work.dir(DIRECTORY)?;
    let (config, socket, root) = (dir.join("config.toml"), dir.join("s.sock"), dir.join("root"));
    std::fs::create_dir_all(&root)?;
    let host = rig.registry.host();
    let text = format!("{tuning}[[resolver.host.\"{host}\".mirrors]]\nhost = \"{scheme}{host}\"\ninsecure = true\n");
    std::fs::write(&config, text)?;
    let found = bench_tool(program).with_context(|| format!("{program} is not built"))?;
    let mut command = Command::new(found);
    for (word, path) in [("--address", &socket), ("--config", &config), ("--root", &root)] {
        command.arg(word).arg(path);
    }
    let mut process = Process::spawn(program, command, &rig.work.log(name))?;
    process.wait_ready(READY, || socket_accepts(&socket))?;
    Ok(Daemon::Other { name, process, socket, root })
}
