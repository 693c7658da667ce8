//! The supervisor's loop: a worker, whenever there is none, and another program for it, when that is asked for.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use millstream_settings::node::Settings;
use millstream_source::names;
use millstream_sys::fuse_device;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use tracing::{error, info, warn};

use super::outside::{Child, Instant, Mounting, Signals, oom_kills, spawn_with, terminate};
use crate::line::{Line, PROTOCOL, Report, Start};
use crate::program::{Program, Version, read_settings};
use crate::service;
use crate::supervisor::mountpoint;
use crate::upgrade::Requests;

/// First pause before a worker that died is started again; doubled with every death, reset after [`GOOD_LIFE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause.
const LAST_PAUSE: Duration = Duration::from_secs(10);
/// A worker that lived this long was of use: programs got on, and the next one is not held back for its sake.
const GOOD_LIFE: Duration = Duration::from_secs(1);
/// How long a worker may take to serve the connection after its start (it checks every table in the store), and to end when
/// asked.
const WORKER_PATIENCE: Duration = Duration::from_secs(120);
/// Longest time that a worker may take to serve the connection, after several were not ready in time.
const LAST_PATIENCE: Duration = Duration::from_secs(3600);
/// How long the worker of an upgrade may take to check what it can while the old one serves.
const CHECK_PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to serve once the old one has ended, unless the last start took a good part of that: programs wait.
const TAKE_OVER_PATIENCE: Duration = Duration::from_secs(10);
/// How long the old one may take to end before it is killed; it serves meanwhile.
const END_PATIENCE: Duration = Duration::from_secs(15);
/// Guards against a signal that was lost.
const POLL: Duration = Duration::from_secs(5);

/// What outlives every worker.
#[derive(Debug)]
pub struct Kept<'a> {
    /// SIGTERM, SIGINT, SIGHUP and SIGCHLD, blocked.
    pub signals: &'a Signals,
    /// The socket for containerd.
    pub listener: &'a UnixListener,
    /// Where upgrades are asked for; `None`: only by SIGHUP.
    pub requests: Option<&'a Requests>,
    /// Root and socket of these are kept for good.
    pub settings: &'a Settings,
    /// The file that an upgrade reads anew.
    pub config: Option<&'a Path>,
}

/// The loop and what it remembers.
#[derive(Debug)]
pub struct Workers<'a> {
    kept: Kept<'a>,
    /// The connection; another one once the kernel has ended it.
    mounting: Mounting,
    /// What served last; an upgrade that fails comes back to it.
    current: Version,
    /// The first worker's answer to INIT, once the kernel has it.
    answer: Option<Vec<u8>>,
    restarts: u64,
    /// What the kernel's killer of processes had counted when it was last looked at.
    oom_kills: Option<u64>,
    /// How long the last worker took to serve after it might open the store.
    took: Duration,
    /// A SIGHUP has come that nobody has answered yet.
    reload: Cell<bool>,
}

/// A worker and our end of the line to it.
#[derive(Debug)]
struct Worker {
    child: Child,
    line: Line,
}

/// Why there is no worker.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    /// We were asked to stop, and the worker has ended.
    Asked,
    /// The worker died by itself, or was of no use.
    Died,
    /// It ended for an upgrade that failed.
    RolledBack,
}

/// Why a worker does not get as far as it should.
#[derive(Debug)]
enum Obstacle {
    /// We were asked to stop.
    Asked,
    /// It says itself why it cannot work with what it is given.
    Refused(String),
    /// It died, or took too long.
    Failed(String),
}

/// How far a worker has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Ready,
    Serves,
}

impl<'a> Workers<'a> {
    /// Workers are of `current` until an upgrade.
    #[must_use]
    pub(crate) const fn new(kept: Kept<'a>, mounting: Mounting, current: Version) -> Self {
        Self {
            kept,
            mounting,
            current,
            answer: None,
            restarts: 0,
            oom_kills: None,
            took: Duration::ZERO,
            reload: Cell::new(false),
        }
    }

    /// Runs until SIGTERM or SIGINT.
    ///
    /// # Errors
    /// When nothing can be mounted in place of a connection that is gone, or the first worker refuses what it is given.
    pub fn run(&mut self) -> anyhow::Result<()> {
        let mut pause = FIRST_PAUSE;
        // Grows when a worker was not ready in time: a large store on a slow disk takes long to check.
        let mut patience = WORKER_PATIENCE;
        loop {
            if self.is_gone()? {
                self.mount_again()?;
            }
            // The group may be another one by now.
            self.oom_kills = oom_kills();
            let started = Instant::now();
            let ended = match self.start(&self.current) {
                Ok(worker) => self.live(worker, patience)?,
                // No memory, no process number: it passes. To give up would end the connection, and with it every container.
                Err(error) => {
                    error!(error = format!("{error:#}"), "cannot start a worker now; trying again");
                    Ended::Died
                }
            };
            match ended {
                Ended::Asked => return Ok(()),
                Ended::RolledBack => continue,
                Ended::Died => self.restarts += 1,
            }
            if started.elapsed() >= patience {
                patience = (patience * 2).min(LAST_PATIENCE);
            }
            if started.elapsed() >= GOOD_LIFE {
                pause = FIRST_PAUSE;
            }
            if !self.sleep(pause)? {
                return Ok(());
            }
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    /// Whether the kernel has ended the connection.
    fn is_gone(&self) -> io::Result<bool> {
        has_event(self.mounting.mounted.device.as_fd(), PollFlags::empty())
    }

    fn mount_again(&mut self) -> anyhow::Result<()> {
        error!(
            { names::CODE } = "node.mount-lost",
            "the connection of the mount was ended (aborted, or unmounted by force): mounting again. Containers that ran on it \
             have lost the files of their images; new ones work. hint: `millstream status` names them"
        );
        self.mounting = Mounting::new(&mountpoint(self.kept.settings))?;
        self.answer = None;
        Ok(())
    }

    fn start(&self, version: &Version) -> anyhow::Result<Worker> {
        let (ours, theirs) = fuse_device::message_pair()?;
        let mut command = version.program.command();
        command.arg("worker");
        let Mounting { mounted, shared, .. } = &self.mounting;
        let passed = [mounted.device.as_fd(), self.kept.listener.as_fd(), theirs.as_fd(), shared.as_fd()];
        let child = spawn_with(command, &passed).context("starting the worker")?;
        info!(pid = child.id(), file = %version.program.path().display(), "worker started");
        let line = Line::new(ours);
        let start = Start {
            protocol: PROTOCOL,
            root: self.kept.settings.root.clone(),
            socket: self.kept.settings.socket.clone(),
            settings: version.settings.to_string(),
            restarts: self.restarts,
            init: mounted.init.clone(),
            answer: self.answer.clone(),
        };
        // It waits in the socket; to a worker that is dead already it cannot be sent, and its death is seen next.
        let _ = line.start(&start);
        Ok(Worker { child, line })
    }

    /// The life of a worker, and of those that replace it.
    fn live(&mut self, mut worker: Worker, patience: Duration) -> anyhow::Result<Ended> {
        let mut reached = self.wait_until(&mut worker, Stage::Ready, patience)?;
        if reached.is_ok() {
            reached = self.take_over(&mut worker, patience)?;
        }
        match reached {
            Ok(()) => {
                // Again after each death, which does no harm.
                service::is_ready();
                self.watch(&mut worker)
            }
            Err(Obstacle::Asked) => {
                self.stop(&mut worker, WORKER_PATIENCE)?;
                Ok(Ended::Asked)
            }
            // Nothing depends on us yet, and nothing will change by itself.
            Err(Obstacle::Refused(reason)) if self.answer.is_none() && self.restarts == 0 => {
                end(&mut worker)?;
                bail!("{reason}");
            }
            Err(Obstacle::Refused(reason) | Obstacle::Failed(reason)) => {
                error!(pid = worker.child.id(), reason, "the worker does not serve");
                end(&mut worker)?;
                Ok(Ended::Died)
            }
        }
    }

    fn watch(&mut self, worker: &mut Worker) -> anyhow::Result<Ended> {
        loop {
            if let Some(status) = worker.child.try_wait()? {
                let out_of_memory = self.note_death(worker, status);
                let (pid, signal, exit_code) = (worker.child.id(), status.signal(), status.code());
                error!(pid, signal, exit_code, out_of_memory, "worker died; starting another one");
                return Ok(Ended::Died);
            }
            let others: Vec<BorrowedFd<'_>> = self.kept.requests.iter().map(|requests| requests.as_fd()).collect();
            let wait = if self.reload.get() { Duration::ZERO } else { POLL };
            if self.asked_to_stop(self.kept.signals.wait_or(&others, wait)?) {
                self.stop(worker, WORKER_PATIENCE)?;
                return Ok(Ended::Asked);
            }
            let reload = self.reload.take();
            let request = self.kept.requests.and_then(Requests::next);
            if !reload && request.is_none() {
                continue;
            }
            let path = request.as_ref().and_then(|request| request.program.as_deref());
            let (result, ended) = self.upgrade(worker, path)?;
            match &result {
                Ok(said) => info!("{said}"),
                Err(error) => error!(error = format!("{error:#}"), "no upgrade"),
            }
            if let Some(request) = request {
                request.answer(&result);
            }
            if let Some(ended) = ended {
                return Ok(ended);
            }
        }
    }

    /// Puts a worker of another version into the place of `worker`. With the second value there is no worker afterwards.
    fn upgrade(
        &mut self,
        worker: &mut Worker,
        path: Option<&Path>,
    ) -> anyhow::Result<(anyhow::Result<String>, Option<Ended>)> {
        let prepared = self.version_at(path).and_then(|version| Ok((self.start(&version)?, version)));
        let (mut next, version) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return Ok((Err(error.context("nothing was changed")), None)),
        };
        match self.wait_until(&mut next, Stage::Ready, CHECK_PATIENCE)? {
            Ok(()) => {}
            Err(Obstacle::Asked) => {
                end(&mut next)?;
                self.stop(worker, WORKER_PATIENCE)?;
                return Ok((Err(anyhow!("millstreamd is asked to stop")), Some(Ended::Asked)));
            }
            Err(Obstacle::Refused(reason) | Obstacle::Failed(reason)) => {
                end(&mut next)?;
                return Ok((Err(anyhow!("nothing was changed: {reason}")), None));
            }
        }
        if self.stop(worker, END_PATIENCE)? {
            end(&mut next)?;
            return Ok((Err(anyhow!("millstreamd is asked to stop")), Some(Ended::Asked)));
        }
        let stopped = Instant::now();
        let patience = TAKE_OVER_PATIENCE.max(self.took * 4);
        match self.take_over(&mut next, patience)? {
            Ok(()) => {
                *worker = next;
                let said = format!(
                    "{} serves; programs waited for {} ms at most",
                    version.program.path().display(),
                    stopped.elapsed().as_millis()
                );
                self.current = version;
                Ok((Ok(said), None))
            }
            Err(Obstacle::Asked) => {
                self.stop(&mut next, WORKER_PATIENCE)?;
                Ok((Err(anyhow!("millstreamd is asked to stop")), Some(Ended::Asked)))
            }
            Err(Obstacle::Refused(reason) | Obstacle::Failed(reason)) => {
                end(&mut next)?;
                let error = anyhow!("went back to what served before, settings included: {reason}");
                Ok((Err(error), Some(Ended::RolledBack)))
            }
        }
    }

    /// The program at `path`, or at the path of the present one, with the settings that are in the file now.
    fn version_at(&self, path: Option<&Path>) -> anyhow::Result<Version> {
        let program = Program::at(path.unwrap_or_else(|| self.current.program.path()))?;
        Ok(Version { program: Rc::new(program), settings: read_settings(self.kept.config)?.into() })
    }

    /// Lets a worker that is ready open the store, and waits until it serves.
    fn take_over(&mut self, worker: &mut Worker, patience: Duration) -> anyhow::Result<Result<(), Obstacle>> {
        let begun = Instant::now();
        // To a worker that is dead already it cannot be sent, and its death is seen next.
        let _ = worker.line.go();
        let reached = self.wait_until(worker, Stage::Serves, patience)?;
        if reached.is_ok() {
            self.took = begun.elapsed();
        }
        Ok(reached)
    }

    /// Hears what a worker says until it has come to `stage`. Its answer to INIT is passed on to the kernel, if that has had
    /// none, and kept in the same breath, so that no later worker takes an answered connection for a new one.
    fn wait_until(
        &mut self,
        worker: &mut Worker,
        stage: Stage,
        patience: Duration,
    ) -> anyhow::Result<Result<(), Obstacle>> {
        let deadline = Instant::now() + patience;
        loop {
            // Before its death is looked for: a worker says why it ends.
            while has_event(worker.line.as_fd(), PollFlags::IN)? {
                match worker.line.await_report() {
                    Ok(Report::Ready(_)) if stage == Stage::Ready => return Ok(Ok(())),
                    Ok(Report::Serves) if stage == Stage::Serves => return Ok(Ok(())),
                    Ok(Report::Answer(answer)) if self.answer.is_none() => {
                        match fuse_device::write_message(self.mounting.mounted.device.as_fd(), &answer) {
                            Ok(()) => self.answer = Some(answer),
                            // The worker ends by itself then, and a new connection is made.
                            Err(_) if self.is_gone()? => {}
                            Err(error) => return Err(error).context("answering the kernel"),
                        }
                    }
                    Ok(Report::Refused(reason)) => return Ok(Err(Obstacle::Refused(reason))),
                    Ok(other) => warn!(found = ?other, "the worker says what it need not say now"),
                    Err(_) => break,
                }
            }
            if let Some(status) = worker.child.try_wait()? {
                self.note_death(worker, status);
                return Ok(Err(Obstacle::Failed(format!("the worker ended ({status}) before it served; see the log"))));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Err(Obstacle::Failed(format!("the worker does not get ready within {patience:?}"))));
            }
            if self.asked_to_stop(self.kept.signals.wait_or(&[worker.line.as_fd()], left.min(POLL))?) {
                return Ok(Err(Obstacle::Asked));
            }
        }
    }

    /// What it was working on may have been the cause, unless somebody killed it. The kernel is not somebody: it kills who takes
    /// too much memory. Says whether it did.
    fn note_death(&mut self, worker: &Worker, status: ExitStatus) -> bool {
        let kills = oom_kills();
        let out_of_memory = kills > self.oom_kills.or(kills);
        self.oom_kills = kills;
        let by_itself = out_of_memory || status.signal() != Some(Signal::KILL.as_raw());
        self.mounting.journal.died(worker.child.id(), by_itself);
        out_of_memory
    }

    /// Asks the worker to end, and sees to it. Says whether we were asked to stop meanwhile.
    fn stop(&self, worker: &mut Worker, patience: Duration) -> anyhow::Result<bool> {
        info!(pid = worker.child.id(), "stopping the worker");
        if worker.child.try_wait()?.is_none() {
            terminate(&worker.child)?;
        }
        let (deadline, mut asked) = (Instant::now() + patience, false);
        while worker.child.try_wait()?.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                warn!("the worker does not end; killing it");
                end(worker)?;
                break;
            }
            asked |= self.asked_to_stop(self.kept.signals.wait(left.min(POLL))?);
        }
        Ok(asked)
    }

    /// Whether `signal` says to stop. One that says to reload is kept until there is a worker to replace.
    fn asked_to_stop(&self, signal: Option<i32>) -> bool {
        if signal == Some(Signal::HUP.as_raw()) {
            self.reload.set(true);
        }
        asked_to_stop(signal)
    }

    /// Sleeps for `pause`; `false` when a signal asked us to stop meanwhile.
    fn sleep(&self, pause: Duration) -> anyhow::Result<bool> {
        let deadline = Instant::now() + pause;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(true);
            }
            if self.asked_to_stop(self.kept.signals.wait(left)?) {
                return Ok(false);
            }
        }
    }
}

fn end(worker: &mut Worker) -> anyhow::Result<()> {
    worker.child.kill()?;
    worker.child.wait()?;
    Ok(())
}

pub(crate) fn asked_to_stop(signal: Option<i32>) -> bool {
    signal == Some(Signal::TERM.as_raw()) || signal == Some(Signal::INT.as_raw())
}

/// Whether one of `events`, an error or the end of the connection is there to be seen now. For the device an error says that
/// the kernel has ended the connection.
pub(crate) fn has_event(descriptor: BorrowedFd<'_>, events: PollFlags) -> io::Result<bool> {
    let mut polled = [PollFd::from_borrowed_fd(descriptor, events)];
    rustix::io::retry_on_intr(|| poll(&mut polled, Some(&Timespec::default())))?;
    Ok(polled.iter().any(|polled| !polled.revents().is_empty()))
}
