//! A containerd of our own: Debian's 1.6, or 2.x as `tests/tools/install.sh` builds it.
//!
//! Root, state and sockets are in the workdir; nothing is shared with a containerd of the machine. Pods use the
//! host's network, so no CNI plug-in is needed. The configuration is written for a machine without systemd and with
//! control groups of version 1 as well as for one with version 2.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::need::{containerd_2_dir, program};
use crate::process::{Process, output, socket_accepts};
use crate::workdir::Workdir;

const READY: Duration = Duration::from_secs(30);

/// Name under which containerd knows the snapshotter of this project.
pub const MILLSTREAM: &str = "millstream";

/// Which containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Debian's containerd 1.6: configuration version 2, no transfer service.
    V1,
    /// The 2.x that was built: configuration version 3, transfer service.
    V2,
}

impl Version {
    /// Directory of its programs.
    fn programs(self) -> Result<PathBuf> {
        match self {
            Self::V1 => {
                let containerd = program("containerd").context("containerd is not installed")?;
                Ok(containerd.parent().unwrap_or(Path::new("/usr/bin")).to_owned())
            }
            Self::V2 => Ok(containerd_2_dir()),
        }
    }
}

/// What unpacks and mounts the images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Snapshotter {
    /// containerd's own.
    Overlayfs,
    /// A running millstreamd.
    Millstream {
        /// The socket of its snapshot service.
        socket: PathBuf,
        /// Its root directory, for the accounting of disk space.
        root: PathBuf,
    },
}

impl Snapshotter {
    /// The name that clients give.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::Millstream { .. } => MILLSTREAM,
        }
    }
}

/// How containerd is to be set up.
#[derive(Debug, Clone)]
pub struct ContainerdOptions {
    /// Which containerd.
    pub version: Version,
    /// The snapshotter that CRI uses.
    pub snapshotter: Snapshotter,
    /// Reference of the image of the pod's own container.
    pub pause_image: String,
    /// Directory in the manner of `certs.d` that says how registries are reached.
    pub certs_d: PathBuf,
    /// For 2.x: whether CRI pulls through the transfer service rather than by itself. 1.6 has no such service.
    pub transfer: bool,
    /// Whether clients tell the snapshotter which image they pull. Many configurations in the field do not.
    pub labels: bool,
}

impl ContainerdOptions {
    /// Name of the directory in the workdir, and so place of the socket, of a containerd that is started with
    /// [`Containerd::start`].
    pub fn dir_name(version: Version) -> &'static str {
        match version {
            Version::V1 => "containerd1",
            Version::V2 => "containerd2",
        }
    }
}

/// A running containerd.
#[derive(Debug)]
pub struct Containerd {
    options: ContainerdOptions,
    dir: PathBuf,
    log: PathBuf,
    process: Option<Process>,
}

impl Containerd {
    /// Starts it and waits until it answers.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn start(work: &Workdir, options: ContainerdOptions) -> Result<Self> {
        Self::start_as(work, ContainerdOptions::dir_name(options.version), options)
    }

    /// The same under a name of its own: a second one in the same workdir.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn start_as(work: &Workdir, name: &str, options: ContainerdOptions) -> Result<Self> {
        let dir = work.dir(name)?;
        std::fs::write(dir.join("config.toml"), config_text(&dir, &options))?;
        let mut containerd = Self { options, dir, log: work.log(name), process: None };
        containerd.launch()?;
        Ok(containerd)
    }

    fn launch(&mut self) -> Result<()> {
        let programs = self.options.version.programs()?;
        let mut command = Command::new(programs.join("containerd"));
        command.arg("--config").arg(self.dir.join("config.toml"));
        // The shim is looked for on the search path.
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs =
            [programs].into_iter().chain(std::env::split_paths(&path)).chain(["/usr/sbin".into(), "/sbin".into()]);
        command.env("PATH", std::env::join_paths(dirs)?);
        let mut process = Process::spawn("containerd", command, &self.log)?;
        let socket = self.socket();
        process.wait_ready(READY, || socket_accepts(&socket) && self.ctr("default", &["version"]).is_ok())?;
        self.process = Some(process);
        Ok(())
    }

    /// Kills it and starts it again on the same state; containers live on, as their shims do.
    ///
    /// # Errors
    ///
    /// If it does not end or does not start again.
    pub fn restart(&mut self) -> Result<()> {
        if let Some(process) = self.process.take() {
            process.crash()?;
        }
        self.launch()
    }

    /// Its socket, for CRI and for its own interface.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("c.sock")
    }

    /// Where it keeps state that lives until reboot; root file systems of running containers are below it.
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// The mounted root file system of a running container.
    pub fn rootfs(&self, namespace: &str, container: &str) -> PathBuf {
        self.state().join("io.containerd.runtime.v2.task").join(namespace).join(container).join("rootfs")
    }

    /// Name of the snapshotter that CRI uses.
    pub fn snapshotter(&self) -> &'static str {
        self.options.snapshotter.name()
    }

    /// Runs `ctr` of the same version and returns its output.
    ///
    /// # Errors
    ///
    /// If it does not end well.
    pub fn ctr(&self, namespace: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(self.options.version.programs()?.join("ctr"));
        command.arg("--address").arg(self.socket()).args(["--namespace", namespace]).args(arguments);
        output(&mut command)
    }

    /// Pulls an image with `ctr`, the way that needs no CRI.
    ///
    /// # Errors
    ///
    /// If the pull fails.
    pub fn ctr_pull(&self, namespace: &str, image: &str) -> Result<()> {
        let certs_d = self.options.certs_d.display().to_string();
        let snapshotter = self.snapshotter();
        self.ctr(namespace, &["image", "pull", "--hosts-dir", &certs_d, "--snapshotter", snapshotter, image]).map(drop)
    }

    /// Runs a command in a new container with `ctr`, on the host's network, and returns its output.
    ///
    /// # Errors
    ///
    /// If the container cannot be started or the command does not end well.
    pub fn ctr_run(&self, work: &Workdir, namespace: &str, image: &str, id: &str, command: &[&str]) -> Result<String> {
        let cgroup = format!("{}/{id}", work.cgroup());
        let mut arguments = vec!["run", "--rm", "--net-host", "--cgroup", &cgroup];
        arguments.extend(["--snapshotter", self.snapshotter(), image, id]);
        arguments.extend_from_slice(command);
        self.ctr(namespace, &arguments)
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        crate::process::tail(&self.log, 40)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Asked to end it closes its databases; the shims stay and are the workdir's to end.
        if let Some(process) = self.process.take() {
            process.stop().ok();
        }
    }
}

fn config_text(dir: &Path, options: &ContainerdOptions) -> String {
    match options.version {
        Version::V1 => config_v2(dir, options),
        Version::V2 => config_v3(dir, options),
    }
}

/// The stanza that makes a snapshotter of a socket; the same in both versions of the file.
fn proxy_plugin(options: &ContainerdOptions) -> String {
    let Snapshotter::Millstream { socket, root } = &options.snapshotter else { return String::new() };
    format!(
        r#"
[proxy_plugins.{MILLSTREAM}]
  type = "snapshot"
  address = "{socket}"
  [proxy_plugins.{MILLSTREAM}.exports]
    root = "{root}"
    enable_remote_snapshot_annotations = "{labels}"
"#,
        labels = options.labels,
        socket = socket.display(),
        root = root.display()
    )
}

fn config_v2(dir: &Path, options: &ContainerdOptions) -> String {
    let (dir, certs_d) = (dir.display(), options.certs_d.display());
    let (pause, snapshotter) = (&options.pause_image, options.snapshotter.name());
    let unlabelled = !options.labels;
    // Snapshotters that this machine may lack the means for are left out: they only fill the log.
    let mut text = format!(
        r#"version = 2
root = "{dir}/root"
state = "{dir}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
  address = "{dir}/c.sock"
[debug]
  level = "debug"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{snapshotter}"
    disable_snapshot_annotations = {unlabelled}
    discard_unpacked_layers = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{dir}/cni/bin"
    conf_dir = "{dir}/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{certs_d}"
"#
    );
    text.push_str(&proxy_plugin(options));
    text
}

fn config_v3(dir: &Path, options: &ContainerdOptions) -> String {
    let (dir, certs_d) = (dir.display(), options.certs_d.display());
    let (pause, snapshotter) = (&options.pause_image, options.snapshotter.name());
    // This one line makes CRI pull by itself; without it the transfer service pulls.
    let pull = if options.transfer || !options.labels { "" } else { "  disable_snapshot_annotations = false\n" };
    let mut text = format!(
        r#"version = 3
root = "{dir}/root"
state = "{dir}/state"
disabled_plugins = ["io.containerd.nri.v1.nri"]
[grpc]
  address = "{dir}/c.sock"
[ttrpc]
  address = "{dir}/c.sock.ttrpc"
[debug]
  level = "debug"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "{snapshotter}"
  discard_unpacked_layers = false
{pull}[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{pause}"
[plugins."io.containerd.cri.v1.images".registry]
  config_path = "{certs_d}"
[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["{dir}/cni/bin"]
  conf_dir = "{dir}/cni/net.d"
[plugins."io.containerd.transfer.v1.local"]
  config_path = "{certs_d}"
"#
    );
    // One entry replaces the default ones, so containerd's own snapshotter is named as well.
    let mut names = vec!["overlayfs"];
    if snapshotter != "overlayfs" {
        names.insert(0, snapshotter);
    }
    for name in names {
        text.push_str(&format!(
            "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n  platform = \"linux\"\n  snapshotter = \"{name}\"\n  differ = \"walking\"\n"
        ));
    }
    text.push_str(&proxy_plugin(options));
    text
}
