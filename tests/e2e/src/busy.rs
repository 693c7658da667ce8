//! A node whose worker cannot be done without for a moment: a container that reads, and eight readers in its root.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest as _, Sha256};

use crate::containerd::{Containerd, Version};
use crate::cri::{Container, ContainerSpec, Cri};
use crate::daemons::Node;
use crate::image::{Image, shell};
use crate::layer::{Packing, noise};
use crate::machine;
use crate::process::eventually;
use crate::readers::{self, LARGE, Readers};
use crate::stage::{Pushed, Stage};

/// How long something may take that comes of itself.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same where the processor is emulated.
const PATIENCE_INSIDE: Duration = Duration::from_secs(120);
/// Bytes that the container reads at once.
const PIECE: usize = 1 << 20;

/// Everything, in the order in which it goes.
#[derive(Debug)]
pub struct Busy {
    readers: Readers,
    container: Container,
    cri: Cri,
    /// The containerd.
    pub containerd: Containerd,
    /// The node.
    pub node: Node,
    /// The image of the container.
    pub image: Pushed,
    /// Registry and server.
    pub stage: Stage,
}

/// What the readers did; times of the single longest check.
#[derive(Debug)]
pub struct Report {
    /// Checks done, and the longest, of each reader.
    pub readers: Vec<(&'static str, u64, Duration)>,
    /// Pieces of 1 MiB that the container read.
    pub pieces: usize,
}

impl Busy {
    /// Starts all of it; what is read is not local, and is fetched when it is read.
    ///
    /// # Errors
    ///
    /// If something does not start.
    pub fn start(seed: u64) -> Result<Self> {
        let stage = Stage::set()?;
        let image = Image::new().layer(shell()?, Packing::Gzip).layer(readers::layer()?, Packing::Gzip);
        let image = stage.publish("busy", &image)?;
        let node = stage.node_on_demand()?;
        let containerd = stage.containerd(Version::V1, &node, false)?;
        let mut cri = stage.cri(&containerd)?;
        cri.pull(&image.reference, None)?;
        let pod = cri.run_pod("busy")?;
        // Past the page cache; ends when the file `stop` appears.
        let script = format!(
            "i=0; until [ -e /tmp/stop ]; do
                dd if=/data/large bs={PIECE} count=1 skip=$i iflag=direct 2>/tmp/error | sha256sum || exit 1
                i=$(( (i + 1) % {} ))
            done",
            LARGE / PIECE
        );
        let command = &["/bin/sh", "-c", &script];
        let spec = ContainerSpec { image: &image.reference, command, ..ContainerSpec::default() };
        let container = cri.create(&pod, "reader", &spec)?;
        cri.start(&container)?;
        let root = containerd.rootfs("k8s.io", &container.id);
        let readers = Readers::start(&root, &view(&node)?, seed)?;
        let busy = Self { readers, container, cri, containerd, node, image, stage };
        busy.await_progress(&busy.done()?)?;
        Ok(busy)
    }

    /// Ends readers and container.
    ///
    /// # Errors
    ///
    /// If one of them saw an error or a wrong byte, or does not end.
    pub fn end(self) -> Result<Report> {
        let readers = self.readers.end()?;
        std::fs::write(self.containerd.rootfs("k8s.io", &self.container.id).join("tmp/stop"), "")?;
        let ended = self.cri.wait(&self.container, patience())?;
        ensure!(ended.exit_code == 0, "the container's reads ended with {}:\n{}", ended.exit_code, ended.output);
        let content = noise(1, LARGE);
        let sums: Vec<String> =
            content.chunks(PIECE).map(|piece| format!("{}  -", hex::encode(Sha256::digest(piece)))).collect();
        for (position, line) in ended.output.lines().enumerate() {
            let expected = &sums[position % sums.len()];
            ensure!(line == expected, "piece {position} in the container: {line:?} instead of {expected:?}");
        }
        Ok(Report { readers, pieces: ended.output.lines().count() })
    }

    /// How much each reader and the container have done.
    ///
    /// # Errors
    ///
    /// If the container's output cannot be read.
    pub fn done(&self) -> Result<Vec<u64>> {
        let mut done = self.readers.done();
        done.push(self.pieces()?);
        Ok(done)
    }

    fn pieces(&self) -> Result<u64> {
        Ok(self.cri.output(&self.container)?.lines().count() as u64)
    }

    /// Waits until each reader and the container have done more than `before` says.
    ///
    /// # Errors
    ///
    /// If one has failed, or does not get on in time.
    pub fn await_progress(&self, before: &[u64]) -> Result<()> {
        let Some((container, readers)) = before.split_last() else { bail!("nobody reads") };
        self.readers.await_progress(readers, patience())?;
        eventually("a piece read in the container", patience(), || {
            self.pieces().is_ok_and(|pieces| pieces > *container).then_some(())
        })
    }

    /// Waits for a read that began after `moment` and needed a worker; says when it had ended.
    ///
    /// # Errors
    ///
    /// If there is none in time, or a reader has failed.
    pub fn await_read(&self, moment: Instant) -> Result<Instant> {
        self.readers.await_read(moment, patience())
    }

    /// # Errors
    ///
    /// If a reader saw an error or a wrong byte.
    pub fn check(&self) -> Result<()> {
        self.readers.check()
    }

    /// The worker, when there is exactly one.
    ///
    /// # Errors
    ///
    /// If there is none in time.
    pub fn worker(&self) -> Result<Pid> {
        eventually("a worker", patience(), || match self.node.workers().as_slice() {
            [one] => Pid::from_raw(*one),
            _ => None,
        })
    }

    /// Ends the worker by a signal, and waits until it is gone. Says when the signal was sent, and when the worker was gone.
    ///
    /// # Errors
    ///
    /// If there is no worker, or it does not go.
    pub fn kill(&self, worker: Pid, signal: Signal) -> Result<(Instant, Instant)> {
        let sent = Instant::now();
        kill_process(worker, signal).context("killing the worker")?;
        let id = worker.as_raw_nonzero().get();
        eventually("the end of the worker", patience(), || (!self.node.workers().contains(&id)).then_some(()))?;
        Ok((sent, Instant::now()))
    }
}

fn patience() -> Duration {
    if machine::is_inside() { PATIENCE_INSIDE } else { PATIENCE }
}

/// The directory in the node's mount that shows the image.
fn view(node: &Node) -> Result<PathBuf> {
    let views = std::fs::read_dir(node.root().join("m"))?;
    let paths: std::io::Result<Vec<PathBuf>> = views.map(|view| Ok(view?.path())).collect();
    paths?.into_iter().find(|path| path.join("data/many").is_dir()).context("no view shows the image")
}
