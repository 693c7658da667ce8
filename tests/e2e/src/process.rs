//! Programs that the harness starts: each in a process group of its own, with its output in a file.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// How long a program may take to end after SIGTERM before it is killed.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// Pause between two looks at something that is awaited.
const POLL: Duration = Duration::from_millis(10);

/// A running program. Dropping it kills its whole process group.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`; output and errors are appended to `log`.
    ///
    /// # Errors
    ///
    /// If the log cannot be opened or the program cannot be started.
    pub fn spawn(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        use std::os::unix::process::CommandExt as _;
        let out = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("opening {}", log.display()))?;
        let child = command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Where its output is.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Waits until `ready` says so.
    ///
    /// # Errors
    ///
    /// If the program ends before, or `deadline` passes; the end of its log is part of the error.
    pub fn wait_ready(&mut self, deadline: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
        let started = Instant::now();
        while !ready() {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended with {status} before it was ready:\n{}", self.name, self.log_tail());
            }
            ensure!(
                started.elapsed() < deadline,
                "{} is not ready after {deadline:?}:\n{}",
                self.name,
                self.log_tail()
            );
            pause();
        }
        Ok(())
    }

    /// Asks the program to end (SIGTERM to it alone) and waits; kills its group if it does not end.
    ///
    /// # Errors
    ///
    /// If its end cannot be awaited.
    pub fn stop(mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM);
        if let Some(status) = self.wait(STOP_DEADLINE)? {
            return Ok(status);
        }
        self.kill_group();
        self.child.wait().with_context(|| format!("waiting for {}", self.name))
    }

    /// SIGKILL to the program alone, as a crash would be, and waits for its end. Its children live on.
    ///
    /// # Errors
    ///
    /// If its end cannot be awaited.
    pub fn crash(mut self) -> Result<()> {
        self.signal(Signal::KILL);
        let ended = self.wait(STOP_DEADLINE)?;
        ensure!(ended.is_some(), "{} survived SIGKILL", self.name);
        // The group is left alone: that is the point. The drop finds the child reaped.
        Ok(())
    }

    /// Waits until it has ended by itself.
    ///
    /// # Errors
    ///
    /// If it has not after `deadline`.
    pub fn await_end(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let ended = self.wait(deadline)?;
        ended.with_context(|| format!("{} runs still after {deadline:?}:\n{}", self.name, self.log_tail()))
    }

    /// Waits until it ends by itself; `None`: it has not within `deadline`.
    ///
    /// # Errors
    ///
    /// If its end cannot be awaited.
    pub fn wait(&mut self, deadline: Duration) -> Result<Option<ExitStatus>> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().with_context(|| format!("waiting for {}", self.name))? {
                return Ok(Some(status));
            }
            if started.elapsed() >= deadline {
                return Ok(None);
            }
            pause();
        }
    }

    fn pid(&self) -> Option<Pid> {
        i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            // It may have ended by itself; it is not reaped yet, so the id cannot belong to another.
            kill_process(pid, signal).ok();
        }
    }

    fn kill_group(&self) {
        if let Some(pid) = self.pid() {
            kill_process_group(pid, Signal::KILL).ok();
        }
    }

    /// The last lines of its output.
    pub fn log_tail(&self) -> String {
        tail(&self.log, 40)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill_group();
            self.child.wait().ok();
        }
    }
}

/// The last `lines` lines of a text file; empty if it cannot be read.
pub fn tail(file: &Path, lines: usize) -> String {
    let text = String::from_utf8_lossy(&std::fs::read(file).unwrap_or_default()).into_owned();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Runs a program to its end and returns its standard output as text.
///
/// # Errors
///
/// If it cannot be started or does not end well; its standard error is part of the error.
pub fn output(command: &mut Command) -> Result<String> {
    let result = command.stdin(Stdio::null()).output().with_context(|| format!("starting {command:?}"))?;
    let text = String::from_utf8_lossy(&result.stdout).into_owned();
    ensure!(
        result.status.success(),
        "{command:?} ended with {}:\n{text}{}",
        result.status,
        String::from_utf8_lossy(&result.stderr)
    );
    Ok(text)
}

/// Waits until `check` gives a value.
///
/// # Errors
///
/// If `deadline` passes; `what` says what was awaited.
pub fn eventually<T>(what: &str, deadline: Duration, mut check: impl FnMut() -> Option<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(value) = check() {
            return Ok(value);
        }
        ensure!(started.elapsed() < deadline, "{what}: not within {deadline:?}");
        pause();
    }
}

/// A moment between two looks at another process, which sends no event when it changes. Callers have a deadline.
#[allow(clippy::disallowed_methods)]
pub fn pause() {
    std::thread::sleep(POLL);
}

/// Lets time pass that the behaviour under test is about: a period of quiet, the life of something remembered.
#[allow(clippy::disallowed_methods)]
pub fn let_pass(time: Duration) {
    std::thread::sleep(time);
}

/// Whether something accepts connections on the unix socket.
pub fn socket_accepts(socket: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(socket).is_ok()
}

/// The most memory, in bytes, that a process has had so far: its own and what it has mapped of files.
///
/// # Errors
///
/// If it has ended.
pub fn peak_memory(process: u32) -> Result<u64> {
    let status =
        std::fs::read_to_string(format!("/proc/{process}/status")).context("reading the state of a process")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("the process has no memory")?;
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes * 1024)
}

/// The memory of its own, in bytes, that a process has now: without mapped files.
///
/// # Errors
///
/// If it has ended.
pub fn anonymous_memory(process: u32) -> Result<u64> {
    let status =
        std::fs::read_to_string(format!("/proc/{process}/status")).context("reading the state of a process")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("the process has no memory")?;
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes * 1024)
}
