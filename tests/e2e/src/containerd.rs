//! A containerd of our own: Debian's 1.6, or another release as `tests/tools/install.sh` builds it.
//!
//! Root, state and sockets are in the workdir; nothing is shared with a containerd of the machine. Pods use the
//! host's network, so no CNI plug-in is needed. The configuration is written for a machine without systemd and with
//! control groups of version 1 as well as for one with version 2.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::installation::Installation;
use crate::need::{CONTAINERD_2, containerd_dir, program};
use crate::process::{Process, output, socket_accepts};
use crate::registry::Login;
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
    /// Another release, one of [`crate::need::CONTAINERDS`].
    Release(&'static str),
}

impl Version {
    /// Directory of its programs.
    fn programs(self) -> Result<PathBuf> {
        match self {
            Self::V1 => {
                let containerd = program("containerd").context("containerd is not installed")?;
                Ok(containerd.parent().unwrap_or(Path::new("/usr/bin")).to_owned())
            }
            Self::V2 => Ok(containerd_dir(CONTAINERD_2)),
            Self::Release(release) => Ok(containerd_dir(release)),
        }
    }

    /// 1 or 2.
    pub fn major(self) -> u32 {
        match self {
            Self::V1 => 1,
            Self::Release(release) if release.starts_with("1.") => 1,
            Self::V2 | Self::Release(_) => 2,
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
    /// A running daemon of somebody else.
    Other {
        /// Under which containerd and its clients know it.
        name: &'static str,
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
            Self::Other { name, .. } => name,
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
    pub fn dir_name(version: Version) -> String {
        format!("containerd{}", version.major())
    }
}

/// What the bench changes of a containerd's settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tuning {
    /// Lines at the head of a table of its configuration file, such as `[plugins."..."]`.
    pub lines: Option<(&'static str, String)>,
    /// Its environment, besides that of this process.
    pub env: Vec<(&'static str, &'static str)>,
    /// A directory of programs that it finds first.
    pub programs: Option<PathBuf>,
}

/// A running containerd.
#[derive(Debug)]
pub struct Containerd {
    options: ContainerdOptions,
    tuning: Tuning,
    dir: PathBuf,
    installation: Option<Installation>,
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
        Self::start_as(work, &ContainerdOptions::dir_name(options.version), options)
    }

    /// The same under a name of its own: a second one in the same workdir.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn start_as(work: &Workdir, name: &str, options: ContainerdOptions) -> Result<Self> {
        let dir = work.dir(name)?;
        let text = config_text(&dir, &options);
        Self::start_with(work, name, options, &text, None, Tuning::default())
    }

    /// The same with lines in front of a table of its configuration file, such as `[plugins."..."]`; what a test of one setting needs.
    ///
    /// # Errors
    ///
    /// If there is no such table, or it does not start.
    pub fn start_set(work: &Workdir, options: ContainerdOptions, table: &str, lines: &str) -> Result<Self> {
        Self::start_lined(work, options, Some((table, lines)), Tuning::default())
    }

    /// The same with these settings.
    ///
    /// # Errors
    ///
    /// If there is no such table, or it does not start.
    pub fn start_tuned(work: &Workdir, options: ContainerdOptions, tuning: Tuning) -> Result<Self> {
        let lines = tuning.lines.clone();
        let lines = lines.as_ref().map(|(table, lines)| (*table, lines.as_str()));
        Self::start_lined(work, options, lines, tuning)
    }

    fn start_lined(
        work: &Workdir,
        options: ContainerdOptions,
        lines: Option<(&str, &str)>,
        tuning: Tuning,
    ) -> Result<Self> {
        let name = ContainerdOptions::dir_name(options.version);
        let mut text = config_text(&work.dir(&name)?, &options);
        if let Some((table, lines)) = lines {
            ensure!(text.contains(table), "the configuration has no {table}");
            text = text.replacen(table, &format!("{table}\n{lines}"), 1);
        }
        Self::start_with(work, &name, options, &text, None, tuning)
    }

    /// Starts it in an installation: its file says where its root, state and sockets are, and imports what is in
    /// `/etc/containerd/conf.d`; everything else is as the imported files say.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn start_in(work: &Workdir, installation: &Installation, options: ContainerdOptions) -> Result<Self> {
        let name = format!("containerd{}", options.version.major());
        let text = importing_text(&work.dir(&name)?, options.version);
        Self::start_with(work, &name, options, &text, Some(installation.clone()), Tuning::default())
    }

    fn start_with(
        work: &Workdir,
        name: &str,
        options: ContainerdOptions,
        text: &str,
        installation: Option<Installation>,
        tuning: Tuning,
    ) -> Result<Self> {
        let dir = work.dir(name)?;
        std::fs::write(dir.join("config.toml"), text)?;
        let mut containerd = Self { options, tuning, dir, installation, log: work.log(name), process: None };
        containerd.launch()?;
        Ok(containerd)
    }

    fn launch(&mut self) -> Result<()> {
        let programs = self.options.version.programs()?;
        let program = programs.join("containerd");
        let mut command = match &self.installation {
            Some(installation) => installation.command(&program),
            None => Command::new(program),
        };
        command.arg("--config").arg(self.dir.join("config.toml"));
        // The shim is looked for on the search path.
        let path = std::env::var_os("PATH").unwrap_or_default();
        let first = self.tuning.programs.iter().cloned();
        let dirs = first.chain(self.installation.iter().map(Installation::programs)).chain([programs]);
        let dirs = dirs.chain(std::env::split_paths(&path)).chain(["/usr/sbin".into(), "/sbin".into()]);
        command.env("PATH", std::env::join_paths(dirs)?).envs(self.tuning.env.iter().copied());
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

    /// Its process, while it runs.
    pub fn id(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
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

    /// The reference of the pods' own container that a containerd of this version takes without being told.
    ///
    /// # Errors
    ///
    /// If the program does not say.
    pub fn default_pause(version: Version) -> Result<String> {
        let text = output(Command::new(version.programs()?.join("containerd")).args(["config", "default"]))?;
        let keys = ["sandbox_image", "sandbox"];
        let value = text.lines().filter_map(|line| line.split_once(" = ")).find(|(key, _)| keys.contains(&key.trim()));
        let (_, value) = value.context("no image for sandboxes in the default configuration")?;
        Ok(value.trim_matches(['"', '\'']).to_owned())
    }

    /// Runs `ctr` of the same version and returns its output.
    ///
    /// # Errors
    ///
    /// If it does not end well.
    pub fn ctr(&self, namespace: &str, arguments: &[&str]) -> Result<String> {
        output(&mut self.ctr_command(namespace, arguments)?)
    }

    /// `ctr` with these arguments, not started yet.
    ///
    /// # Errors
    ///
    /// If it is not installed.
    pub fn ctr_command(&self, namespace: &str, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(self.options.version.programs()?.join("ctr"));
        command.arg("--address").arg(self.socket()).args(["--namespace", namespace]).args(arguments);
        Ok(command)
    }

    /// Pulls an image with `ctr`, the way that needs no CRI.
    ///
    /// # Errors
    ///
    /// If the pull fails.
    pub fn ctr_pull(&self, namespace: &str, image: &str) -> Result<()> {
        output(&mut self.ctr_pull_command(namespace, image, None, &[])?).map(drop)
    }

    /// The same with further options of `ctr image pull`.
    ///
    /// # Errors
    ///
    /// If the pull fails.
    pub fn ctr_pull_with(&self, namespace: &str, image: &str, options: &[&str]) -> Result<()> {
        output(&mut self.ctr_pull_command(namespace, image, None, options)?).map(drop)
    }

    /// `ctr` that pulls an image, as somebody or as nobody and with further options, not started yet.
    ///
    /// # Errors
    ///
    /// If it is not installed.
    pub fn ctr_pull_command(
        &self,
        namespace: &str,
        image: &str,
        login: Option<&Login>,
        options: &[&str],
    ) -> Result<Command> {
        let certs_d = self.options.certs_d.display().to_string();
        let user = login.map(|login| format!("{}:{}", login.user, login.password));
        let mut arguments = vec!["image", "pull", "--hosts-dir", &certs_d, "--snapshotter", self.snapshotter()];
        arguments.extend(user.iter().flat_map(|user| ["--user", user]));
        arguments.extend_from_slice(options);
        arguments.push(image);
        self.ctr_command(namespace, &arguments)
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
    if options.version.major() == 1 { config_v2(dir, options) } else { config_v3(dir, options) }
}

/// What moves a containerd into `dir`, and imports.
fn importing_text(dir: &Path, version: Version) -> String {
    let dir = dir.display();
    let number = version.major() + 1;
    // Snapshotters that this machine may lack the means for are left out: they only fill the log. So is NRI of 2.x, which has a
    // socket of its own.
    format!(
        r#"version = {number}
root = "{dir}/root"
state = "{dir}/state"
imports = ["/etc/containerd/conf.d/*.toml"]
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.nri.v1.nri"]
[grpc]
  address = "{dir}/c.sock"
[ttrpc]
  address = "{dir}/c.sock.ttrpc"
[debug]
  level = "debug"
"#
    )
}

/// The stanza that makes a snapshotter of a socket; the same in both versions of the file.
fn proxy_plugin(options: &ContainerdOptions) -> String {
    let (Snapshotter::Millstream { socket, root } | Snapshotter::Other { socket, root, .. }) = &options.snapshotter
    else {
        return String::new();
    };
    let name = options.snapshotter.name();
    format!(
        r#"
[proxy_plugins.{name}]
  type = "snapshot"
  address = "{socket}"
  [proxy_plugins.{name}.exports]
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
