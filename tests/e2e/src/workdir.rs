//! One directory per test under which everything lives, and which leaves nothing behind.
//!
//! Making a [`Workdir`] takes the machine-wide run lock, so tests with containers run one after the other, whatever
//! the number of test threads and of processes. Dropping it, also by a panic, kills what still runs for it, unmounts
//! what is still mounted below it, and removes it. What a run left behind that was itself killed is swept by the next.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};

use crate::process::pause;
use crate::sweep;

/// Name of the file that a living run keeps locked in its directory.
const OWNER: &str = "owner.lock";
/// How long to wait for another run to end.
const RUN_DEADLINE: Duration = Duration::from_secs(3600);
/// Attempts to find an unused directory name.
const NAME_ATTEMPTS: u32 = 64;

/// The directory of one test. Its path is short, since unix sockets lie in it (108 bytes is their limit).
#[derive(Debug)]
pub struct Workdir {
    id: String,
    path: PathBuf,
    // Locks end with the descriptors, in this order: after the sweep of `drop`.
    _owner: File,
    _run: File,
}

impl Workdir {
    /// Waits for the run lock, sweeps what dead runs left, and makes a new directory.
    ///
    /// # Errors
    ///
    /// If the lock is not free within an hour, or the directory cannot be made.
    pub fn new() -> Result<Self> {
        let base = base();
        std::fs::create_dir_all(&base).with_context(|| format!("making {}", base.display()))?;
        let run = lock_run(&base)?;
        sweep_dead_runs(&base)?;
        for attempt in 0..NAME_ATTEMPTS {
            let id = new_id(attempt);
            let path = base.join(&id);
            match std::fs::create_dir(&path) {
                Ok(()) => {
                    let owner = File::create(path.join(OWNER))?;
                    ensure!(owner.try_lock().is_ok(), "locking {}", path.display());
                    return Ok(Self { id, path, _owner: owner, _run: run });
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).with_context(|| format!("making {}", path.display())),
            }
        }
        bail!("no unused name in {}", base.display())
    }

    /// Eight characters that no other living run has.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A directory in it, made if missing.
    ///
    /// # Errors
    ///
    /// If it cannot be made.
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.path.join(name);
        std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        Ok(dir)
    }

    /// The file for the output of a program of this name.
    pub fn log(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.log"))
    }

    /// Parent of the control groups of this run's containers.
    pub fn cgroup(&self) -> String {
        format!("/{}", sweep::run_name(&self.id))
    }

    /// Name of the network namespace of this run; [`crate::link`] makes it.
    pub fn netns(&self) -> String {
        sweep::run_name(&self.id)
    }
}

impl Drop for Workdir {
    fn drop(&mut self) {
        if std::thread::panicking() {
            keep_logs(&self.path, &self.id);
        }
        if let Err(error) = sweep::sweep(&self.path, &self.id) {
            // A second panic would abort and hide the first; the next run sweeps again.
            eprintln!("not wholly cleaned: {error:#}");
        }
    }
}

/// `MILLSTREAM_E2E_DIR`, else a directory among the temporary ones.
fn base() -> PathBuf {
    std::env::var_os("MILLSTREAM_E2E_DIR").map_or_else(|| std::env::temp_dir().join("millstream-e2e"), PathBuf::from)
}

fn lock_run(base: &Path) -> Result<File> {
    let file = File::create(base.join("run.lock")).context("opening the run lock")?;
    let started = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => {
                ensure!(started.elapsed() < RUN_DEADLINE, "another run holds {} for {RUN_DEADLINE:?}", base.display());
                pause();
            }
            Err(TryLockError::Error(error)) => return Err(error).context("taking the run lock"),
        }
    }
}

/// Directories whose owner's lock is free belong to runs that were killed.
fn sweep_dead_runs(base: &Path) -> Result<()> {
    for entry in std::fs::read_dir(base).with_context(|| format!("listing {}", base.display()))? {
        let path = entry?.path();
        let Ok(owner) = File::open(path.join(OWNER)) else { continue };
        if owner.try_lock().is_err() {
            continue;
        }
        let id = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if let Err(error) = sweep::sweep(&path, &id) {
            eprintln!("left by an earlier run: {error:#}");
        }
    }
    Ok(())
}

fn new_id(attempt: u32) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{:08x}", now.subsec_nanos() ^ std::process::id().rotate_left(12) ^ attempt)
}

/// Puts the logs of a failed test where they survive it, and says where.
fn keep_logs(path: &Path, id: &str) {
    let kept = base().join("failed").join(id);
    if std::fs::create_dir_all(&kept).is_err() {
        return;
    }
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        let file = entry.path();
        if file.extension().is_some_and(|extension| extension == "log") {
            std::fs::copy(&file, kept.join(entry.file_name())).ok();
        }
    }
    eprintln!("logs of the failed test: {}", kept.display());
}
