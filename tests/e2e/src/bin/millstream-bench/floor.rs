//! What a start really touches, recorded apart from the product, and how fast nobody can be faster.
//!
//! The image is unpacked by containerd's own overlayfs onto an ext4 on a loop device without read-ahead, all caches are
//! dropped, and the application is started until its first answer. Pages of files that are in the page cache then were
//! touched.

use std::fs::File;
use std::io::{BufRead as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use flate2::{Compression, write::GzEncoder};
use millstream_e2e::containerd::{Containerd, ContainerdOptions, Version};
use millstream_e2e::cri::{Container, ContainerSpec, Cri, Pod};
use millstream_e2e::disk::{Disk, FileSystem};
use millstream_e2e::need::bench_tool;
use millstream_e2e::process::{Process, eventually, output};
use millstream_e2e::registry::free_address;
use millstream_e2e::rig::{Rig, drop_caches};
use serde::{Deserialize, Serialize};

use crate::images::{Form, Ready, question};
use crate::matrix::Link;
use crate::peers::{Daemon, Subject};
use crate::{processor, say, statistics};

/// Bytes of the disk; it takes space as it is filled.
const DISK: u64 = 24 << 30;
/// Of a page of the page cache.
const PAGE: u64 = 4096;
/// Starts with everything in memory.
const WARM: usize = 3;
const PATIENCE: Duration = Duration::from_secs(180);
/// Round trips that no pull and start can do without: to open a connection, and for the manifest, the config and the content.
const ROUND_TRIPS: u32 = 4;
const TOOL: &str = "millstream-bench-tool";

/// What a start touched.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct WorkingSet {
    /// Of which image it was recorded, and with which version of this.
    of: String,
    /// Pages, of how many files.
    pub(crate) pages: u64,
    pub(crate) files: u64,
    /// Bytes of these pages as gzip -6 leaves them.
    pub(crate) compressed: u64,
    /// Seconds from the creation of a container to its answer, with everything in memory.
    pub(crate) warm_s: f64,
    /// Seconds of processor time to inflate the whole image and to hash what comes and what comes out.
    pub(crate) cpu_s: f64,
    /// Files in the order in which they were opened first.
    pub(crate) opens: Vec<String>,
}

impl WorkingSet {
    /// The floor on this link, in seconds.
    pub(crate) fn floor(&self, link: Link) -> f64 {
        let transfer = self.compressed as f64 / link.bytes_per_second();
        link.round_trip().as_secs_f64() * f64::from(ROUND_TRIPS) + transfer.max(self.warm_s)
    }
}

/// The floor of having these bytes local.
pub(crate) fn floor_of_transfer(bytes: u64, link: Link) -> f64 {
    link.round_trip().as_secs_f64() * f64::from(ROUND_TRIPS) + bytes as f64 / link.bytes_per_second()
}

/// What an earlier run recorded, if it was of this image on this machine.
pub(crate) fn recorded(image: &Ready, machine: &str) -> Option<WorkingSet> {
    let text = std::fs::read(file(image)).ok()?;
    serde_json::from_slice(&text).ok().filter(|set: &WorkingSet| set.of == identity(image, machine))
}

fn file(image: &Ready) -> PathBuf {
    image.dir.join("working-set.json")
}

fn identity(image: &Ready, machine: &str) -> String {
    format!("1 {} {machine}", image.info.manifest)
}

/// Records it.
pub(crate) fn record(rig: &Rig, image: &Ready, machine: &str) -> Result<WorkingSet> {
    say(format_args!("{}: recording what a start touches", image.name));
    rig.wipe(&["containerd2", "pods"])?;
    let root = rig.work.dir(&ContainerdOptions::dir_name(Version::V2))?.join("root");
    let disk = Disk::make(&rig.work, "floor", FileSystem::Ext4, DISK, &root)?;
    let device = output(Command::new("findmnt").args(["-n", "-o", "SOURCE"]).arg(disk.path()))?;
    output(Command::new("blockdev").args(["--setra", "0", device.trim()]))?;
    let subject = Subject::Overlayfs { version: Version::V2, tuned: true };
    let containerd = subject.containerd(rig, &Daemon::None)?;
    let mut cri = Cri::connect(&rig.work, &containerd.socket())?;
    let pod = cri.run_pod("floor")?;
    let reference = rig.registry.reference(&image.registry_name(Form::Plain));
    cri.pull(&reference, None)?;
    drop_caches()?;
    let mut start = Start { rig, containerd: &containerd, cri: &cri, pod: &pod, reference: &reference, image };
    let (container, opens) = start.watched()?;
    let layers = lower_directories(&containerd.rootfs("k8s.io", &container.id), &root)?;
    let (pages, files, compressed) = touched(&layers)?;
    cri.remove(&container)?;
    let warm = (0..WARM).map(|round| start.warm(round)).collect::<Result<Vec<f64>>>()?;
    let warm_s = statistics::median(&warm).context("no warm start")?;
    cri.remove_pods()?;
    drop(cri);
    drop(containerd);
    drop(disk);
    std::fs::remove_file(rig.work.path().join("floor.img"))?;
    let cpu_s = processor::least(&image.layout, &image.info)?;
    let set = WorkingSet { of: identity(image, machine), pages, files, compressed, warm_s, cpu_s, opens };
    std::fs::write(file(image), serde_json::to_vec(&set)?)?;
    say(format_args!(
        "  {pages} pages of {files} files, {:.1} MB compressed; {:.2} s when everything is in memory",
        compressed as f64 / 1e6,
        warm_s
    ));
    Ok(set)
}

/// What a start needs.
struct Start<'r> {
    rig: &'r Rig,
    containerd: &'r Containerd,
    cri: &'r Cri,
    pod: &'r Pod,
    reference: &'r str,
    image: &'r Ready,
}

impl Start<'_> {
    fn create(&self, name: &str, port: u16) -> Result<Container> {
        let port = port.to_string();
        let spec = ContainerSpec { image: self.reference, env: &[("PORT", &port)], ..ContainerSpec::default() };
        self.cri.create(self.pod, name, &spec)
    }

    fn await_answer(&self, container: &Container, port: u16) -> Result<()> {
        let answer = question(&self.image.name).await_answer(port, Instant::now() + PATIENCE);
        answer.with_context(|| self.cri.output(container).unwrap_or_default())
    }

    /// With a look at the files that are opened.
    fn watched(&mut self) -> Result<(Container, Vec<String>)> {
        let port = free_address()?.port();
        let container = self.create("cold", port)?;
        let rootfs = self.containerd.rootfs("k8s.io", &container.id);
        let log = self.rig.work.log(&format!("opens-{}", self.image.name));
        let mut command = Command::new(bench_tool(TOOL).with_context(|| format!("{TOOL} is not built"))?);
        command.arg("opens").arg(&rootfs);
        let watcher = Process::spawn(TOOL, command, &log)?;
        self.cri.start(&container)?;
        self.await_answer(&container, port)?;
        watcher.stop()?;
        let prefix = rootfs.display().to_string();
        let text = std::fs::read_to_string(&log)?;
        let opens = text.lines().map(|line| line.strip_prefix(&prefix).unwrap_or(line).to_owned());
        let opens: Vec<String> = opens.filter(|path| path.starts_with('/')).collect();
        ensure!(!opens.is_empty(), "no file was seen to be opened");
        Ok((container, opens))
    }

    fn warm(&self, round: usize) -> Result<f64> {
        let port = free_address()?.port();
        let started = Instant::now();
        let container = self.create(&format!("warm-{round}"), port)?;
        self.cri.start(&container)?;
        self.await_answer(&container, port)?;
        let taken = started.elapsed().as_secs_f64();
        self.cri.remove(&container)?;
        Ok(taken)
    }
}

/// The layers below a container's root, as the table of mounts has them.
fn lower_directories(rootfs: &Path, root: &Path) -> Result<Vec<PathBuf>> {
    let snapshots = root.join("io.containerd.snapshotter.v1.overlayfs/snapshots");
    let wanted = rootfs.to_str().context("the path of a root file system is text")?;
    let line = eventually("the mount of the container", PATIENCE, || {
        let table = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        table.lines().find(|line| line.split(' ').nth(4) == Some(wanted)).map(str::to_owned)
    })?;
    let options = line.rsplit(' ').next().unwrap_or_default().split(',');
    let lower =
        options.filter_map(|option| option.split_once('=')).filter(|(key, _)| key.trim_end_matches('+') == "lowerdir");
    // A relative one is relative to where the mount was made.
    let all: Vec<PathBuf> =
        lower.flat_map(|(_, value)| value.split(':')).map(|directory| snapshots.join(directory)).collect();
    ensure!(!all.is_empty() && all.iter().all(|directory| directory.is_dir()), "no layers in {line}");
    Ok(all)
}

/// A line of the tool.
#[derive(Deserialize)]
struct Resident {
    path: PathBuf,
    pages: Vec<(u64, u64)>,
}

/// Pages, files and compressed bytes of what is in the page cache of these directories.
fn touched(directories: &[PathBuf]) -> Result<(u64, u64, u64)> {
    let tool = bench_tool(TOOL).with_context(|| format!("{TOOL} is not built"))?;
    let (mut pages, mut files) = (0, 0);
    let mut packer = GzEncoder::new(Counting(0), Compression::new(6));
    for directory in directories {
        // Listed as a whole first: reading a file for its pages would bring in others.
        let text = output(Command::new(&tool).arg("resident").arg(directory))?;
        for line in text.as_bytes().lines() {
            let line = line?;
            let found: Resident = serde_json::from_str(&line).with_context(|| format!("understanding {line}"))?;
            let file = File::open(&found.path)?;
            files += 1;
            for (first, end) in found.pages {
                pages += end - first;
                packer.write_all(&read(&file, first * PAGE, (end - first) * PAGE)?)?;
            }
        }
    }
    Ok((pages, files, packer.finish()?.0))
}

/// These bytes of a file, or as many as it has.
fn read(file: &File, offset: u64, length: u64) -> Result<Vec<u8>> {
    let length = length.min(file.metadata()?.len().saturating_sub(offset));
    let mut bytes = vec![0; usize::try_from(length)?];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// Forgets what it is given, but for how much that was.
struct Counting(u64);

impl std::io::Write for Counting {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_is_the_longer_of_transfer_and_start_after_four_round_trips() {
        let set = |compressed, warm_s| WorkingSet {
            of: String::new(),
            pages: 0,
            files: 0,
            compressed,
            warm_s,
            cpu_s: 0.0,
            opens: Vec::new(),
        };
        // 12.5 MB take a second.
        assert!((set(25_000_000, 0.5).floor(Link::Slow) - 2.08).abs() < 1e-9);
        assert!((set(1_000_000, 0.5).floor(Link::Slow) - 0.58).abs() < 1e-9);
        assert!((floor_of_transfer(125_000_000, Link::Fast) - 1.04).abs() < 1e-9);
    }
}
