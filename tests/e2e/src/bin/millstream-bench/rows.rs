//! What was measured, one line of JSON for each run, kept as soon as it is there: a bench that was stopped goes on.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use millstream_e2e::process::output;
use serde::{Deserialize, Serialize};

/// After the commit of a tree with changes that are not committed.
const DIRTY: &str = "-dirty";

/// Where a run belongs in the matrix.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct Key {
    pub(crate) image: String,
    pub(crate) link: String,
    pub(crate) peer: String,
    pub(crate) settings: String,
    /// What was done: `start`, `pull` or `files`.
    pub(crate) job: String,
    /// From 0. Runs of one round were made in turns and are a pair.
    pub(crate) round: u32,
}

/// What a run gave. Times in seconds from the start of the pull; `None`: was not measured, or the peer does not tell.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Values {
    pub(crate) pull_s: f64,
    pub(crate) ready_s: Option<f64>,
    pub(crate) bytes_until_ready: Option<u64>,
    /// Compressed bytes of the pages that a start touches, as the floor has them.
    #[serde(default)]
    pub(crate) bytes_needed: Option<u64>,
    pub(crate) bytes_demanded: Option<u64>,
    pub(crate) requests: Option<u64>,
    pub(crate) daemon_cpu_s: Option<f64>,
    pub(crate) floor_s: Option<f64>,
    /// Until the whole image was local and verified.
    pub(crate) local_s: Option<f64>,
    /// Most requests under way at once for one blob.
    pub(crate) blob_peak: Option<u64>,
    /// Requests that containerd itself made during the pull.
    pub(crate) containerd_requests: Option<u64>,
    /// Bytes of the image in the registry.
    pub(crate) image_bytes: u64,
    /// What inflated the layers of an ordinary pull.
    pub(crate) decompressor: Option<String>,
    /// Further figures of this job, by name.
    #[serde(default)]
    pub(crate) more: BTreeMap<String, f64>,
}

/// A line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    #[serde(flatten)]
    pub(crate) key: Key,
    #[serde(flatten)]
    pub(crate) values: Values,
    /// Digest of the image's manifest.
    pub(crate) manifest: String,
    #[serde(flatten)]
    pub(crate) origin: Origin,
    /// Seconds since 1970.
    pub(crate) time: u64,
}

/// On what it was measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin {
    pub(crate) commit: String,
    pub(crate) machine: String,
}

impl Origin {
    /// This machine, and the commit that is checked out: the last one that changed the product, so that what is written about
    /// a measurement does not end it.
    pub(crate) fn here() -> Result<Self> {
        // A source tree without its history can be measured too.
        let commit = git(&["log", "-1", "--format=%h", "--abbrev=12", "--"]).unwrap_or_else(|_| "unknown".to_owned());
        let changed = git(&["status", "--porcelain", "--"]).is_ok_and(|changes| !changes.is_empty());
        let commit = if changed { format!("{commit}{DIRTY}") } else { commit };
        Ok(Self { commit, machine: machine()? })
    }
}

/// What git says of the product's files.
fn git(arguments: &[&str]) -> Result<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut git = Command::new("git");
    git.arg("-C").arg(root).args(arguments).args(["crates", "proto", "Cargo.toml", "Cargo.lock", ":(exclude)*.md"]);
    Ok(output(&mut git)?.trim().to_owned())
}

fn machine() -> Result<String> {
    let processors = std::fs::read_to_string("/proc/cpuinfo").context("reading the kind of processor")?;
    let model = processors.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or(std::env::consts::ARCH, |(_, model)| model);
    let count = std::thread::available_parallelism()?;
    let memory = std::fs::read_to_string("/proc/meminfo").context("reading the size of memory")?;
    let kibibytes = memory.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kibibytes: u64 = kibibytes.unwrap_or_default().trim().trim_end_matches(" kB").parse().unwrap_or_default();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the kernel's release")?;
    Ok(format!("{count} x {model}, {} GiB, Linux {}", kibibytes >> 20, kernel.trim()))
}

/// The file with all rows.
#[derive(Debug)]
pub(crate) struct Rows {
    path: PathBuf,
    rows: Vec<Row>,
}

impl Rows {
    /// What is there of earlier runs; nothing if the file is missing.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("rows.jsonl");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        Ok(Self { path, rows: parse(&text) })
    }

    /// Whether this run was made, of this very image, with this commit on this machine.
    pub(crate) fn has(&self, key: &Key, manifest: &str, origin: &Origin) -> bool {
        // What a changed tree is nobody knows.
        let known = !origin.commit.ends_with(DIRTY);
        known && self.rows.iter().any(|row| row.key == *key && row.manifest == manifest && row.origin == *origin)
    }

    /// Keeps a row, also if the machine stops a moment later.
    pub(crate) fn add(&mut self, key: Key, values: Values, manifest: &str, origin: &Origin) -> Result<()> {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let row = Row { key, values, manifest: manifest.to_owned(), origin: origin.clone(), time };
        let mut file = File::options().create(true).append(true).open(&self.path)?;
        // A line that was cut off ends here, and not this one with it.
        let line = format!("\n{}\n", serde_json::to_string(&row)?);
        file.write_all(line.as_bytes()).with_context(|| format!("writing {}", self.path.display()))?;
        file.sync_data()?;
        self.rows.push(row);
        Ok(())
    }

    /// The rows of the commit and machine of the latest one; of each cell and round the latest.
    pub(crate) fn latest(&self) -> Vec<Row> {
        let Some(last) = self.rows.iter().max_by_key(|row| row.time) else { return Vec::new() };
        let mut found = BTreeMap::new();
        for row in self.rows.iter().filter(|row| row.origin == last.origin) {
            found.insert(row.key.clone(), row.clone());
        }
        found.into_values().collect()
    }
}

/// Lines that are no row were cut off when a bench was killed, or come from another version of it: they are measured again.
fn parse(text: &str) -> Vec<Row> {
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn key(round: u32) -> Key {
        let [image, link, peer, settings, job] = ["wiki", "slow", "millstream", "profile", "start"].map(str::to_owned);
        Key { image, link, peer, settings, job, round }
    }

    fn origin(commit: &str) -> Origin {
        Origin { commit: commit.to_owned(), machine: "m".to_owned() }
    }

    #[test]
    fn what_was_measured_is_found_again_after_a_stop_in_the_middle_of_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let values = Values { pull_s: 1.5, bytes_until_ready: Some(7), ..Values::default() };
        let mut rows = Rows::open(dir.path()).unwrap();
        rows.add(key(0), values.clone(), "sha256:a", &origin("1")).unwrap();
        let file = dir.path().join("rows.jsonl");
        let mut text = std::fs::read_to_string(&file).unwrap();
        text.push_str("{\"image\":\"wi");
        std::fs::write(&file, text).unwrap();
        let mut rows = Rows::open(dir.path()).unwrap();
        rows.add(key(1), values.clone(), "sha256:a", &origin("1")).unwrap();
        let rows = Rows::open(dir.path()).unwrap();
        assert_eq!(rows.rows.len(), 2);
        assert_eq!(rows.rows[0].values, values);
        assert!(rows.has(&key(1), "sha256:a", &origin("1")));
        assert!(!rows.has(&key(2), "sha256:a", &origin("1")), "not measured yet");
        assert!(!rows.has(&key(1), "sha256:b", &origin("1")), "another image");
        assert!(!rows.has(&key(1), "sha256:a", &origin("2")), "another commit");
    }

    #[test]
    fn a_report_is_about_the_latest_commit_only() {
        let dir = tempfile::tempdir().unwrap();
        let mut rows = Rows::open(dir.path()).unwrap();
        rows.add(key(0), Values::default(), "sha256:a", &origin("1")).unwrap();
        rows.rows[0].time -= 10;
        rows.add(key(0), Values { pull_s: 2.0, ..Values::default() }, "sha256:a", &origin("2")).unwrap();
        rows.add(key(0), Values { pull_s: 3.0, ..Values::default() }, "sha256:b", &origin("2")).unwrap();
        let latest = rows.latest();
        assert_eq!(latest.len(), 1);
        assert_eq!(latest[0].values.pull_s.to_bits(), 3.0_f64.to_bits(), "made anew");
    }
}
