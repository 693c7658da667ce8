//! A control group with little memory, and a program that takes it all: so the kernel kills whom it can kill there.

use std::ffi::CStr;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::mount::{MountFlags, mount};

use crate::process::{Process, eventually};
use crate::workdir::Workdir;

/// How long the kernel may take to kill somebody: it first takes back what it can, which on a busy machine is used again at once.
const DEADLINE: Duration = Duration::from_secs(120);

/// Fills a file that lies in memory, piece by piece, until the kernel has killed as often as wanted, then ends. The memory is the
/// group's, and no process has it: so the one that is killed is not this one but the largest.
const HOG: &str = r#"
    my ($counter, $file, $wanted, $most) = @ARGV;
    sub kills {
        open(my $file, "<", $counter) or die "$counter: $!";
        while (<$file>) { return $1 if /^oom_kill (\d+)/ }
        die "$counter does not count";
    }
    open(my $out, ">", $file) or die "$file: $!";
    my $piece = "x" x (1 << 18);
    while (kills() < $wanted) {
        die "nobody was killed" if $most-- == 0;
        syswrite($out, $piece) or die "$file: $!";
    }
"#;
/// Pieces of 256 KiB that it takes at most.
const MOST: u32 = 4 << 10;
/// Times that another one may be killed in place of the one that is meant.
const TURNS: usize = 5;

/// Names of a version's files: what may be used, what is used, and who was killed.
type Files = [&'static str; 3];

/// Where groups that limit memory can be made.
pub(crate) fn hierarchy() -> Option<(PathBuf, Files)> {
    let root = Path::new("/sys/fs/cgroup");
    let first = root.join("memory");
    if first.join("memory.limit_in_bytes").exists() {
        return Some((first, ["memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control"]));
    }
    let given = fs::read_to_string(root.join("cgroup.subtree_control")).ok()?;
    let has = given.split_whitespace().any(|controller| controller == "memory");
    has.then(|| (root.to_owned(), ["memory.max", "memory.current", "memory.events"]))
}

/// A group of a test's own. Dropping it lets everybody out and removes it.
#[derive(Debug)]
pub struct MemoryGroup {
    path: PathBuf,
    /// Where its processes go when it is removed.
    root: PathBuf,
    files: Files,
    /// A file system in memory.
    place: PathBuf,
    log: PathBuf,
}

impl MemoryGroup {
    /// An empty one, without a limit.
    ///
    /// # Errors
    ///
    /// If there are none.
    pub fn new(work: &Workdir) -> Result<Self> {
        let (root, files) = hierarchy().context("no control groups that limit memory")?;
        // Beside those of containers.
        let parent = root.join(work.cgroup().trim_start_matches('/'));
        let path = parent.join("memory");
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        if parent.join("cgroup.subtree_control").exists() {
            fs::write(parent.join("cgroup.subtree_control"), "+memory").context("delegating memory")?;
        }
        let place = work.dir("hog")?;
        mount("hog", &place, "tmpfs", MountFlags::empty(), None::<&CStr>)
            .context("mounting a file system in memory")?;
        Ok(Self { path, root, files, place, log: work.log("hog") })
    }

    /// Moves a process here; what it starts from now on is here as well.
    ///
    /// # Errors
    ///
    /// If it has ended.
    pub fn take_in(&self, process: i32) -> Result<()> {
        fs::write(self.path.join("cgroup.procs"), process.to_string()).context("moving a process into a control group")
    }

    /// From now on only so many bytes more may be used here than are used now.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn leave(&self, bytes: u64) -> Result<()> {
        let [limit, usage, _] = self.files;
        let used: u64 = fs::read_to_string(self.path.join(usage))?.trim().parse()?;
        fs::write(self.path.join(limit), (used + bytes).to_string()).context("limiting the memory of a control group")
    }

    /// How many processes the kernel has killed here.
    fn kills(&self) -> Result<u64> {
        let text = fs::read_to_string(self.path.join(self.files[2]))?;
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill ")).context("no number of kills")?;
        Ok(count.trim().parse()?)
    }

    /// Uses memory up until the kernel has killed this process of the group.
    ///
    /// # Errors
    ///
    /// If it kills nobody, or others only.
    pub fn exhaust(&self, process: i32) -> Result<()> {
        for _ in 0..TURNS {
            let file = self.place.join("file");
            let mut hog = self.hog(&file)?;
            let ended = hog.await_end(DEADLINE)?;
            fs::remove_file(&file).ok();
            // Where it must not spare itself it may be the one that is killed.
            if ended.signal().is_some() {
                continue;
            }
            ensure!(ended.success(), "nobody was killed: {}", hog.log_tail());
            return eventually("the end of the process that is out of memory", DEADLINE, || {
                let state = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
                (state.is_empty() || state.contains(") Z ")).then_some(())
            });
        }
        bail!("the wrong one was killed {TURNS} times")
    }

    fn hog(&self, file: &Path) -> Result<Process> {
        let [wanted, most] = [self.kills()? + 1, u64::from(MOST)].map(|number| number.to_string());
        let mut command = Command::new("sh");
        // Where a millstreamd may spare itself, the hog may do so, too.
        let in_group = r#"echo -1000 >/proc/$$/oom_score_adj; echo $$ >"$0/cgroup.procs" && exec perl -e "$@""#;
        command.args(["-c", in_group]).arg(&self.path);
        command.arg(HOG).arg(self.path.join(self.files[2])).arg(file).args([wanted, most]);
        Process::spawn("hog", command, &self.log)
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // What is dying cannot be moved, and is gone soon.
        let removed = eventually("the end of a control group", DEADLINE, || {
            for process in fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default().lines() {
                fs::write(self.root.join("cgroup.procs"), process).ok();
            }
            fs::remove_dir(&self.path).ok()
        });
        if let Err(error) = removed {
            // A second panic would abort and hide the first; the next run sweeps.
            eprintln!("{}: {error:#}", self.path.display());
        }
    }
}
