//! Removes every trace of a run: processes, mounts, network namespace, control groups, files.
//!
//! Everything is found by the run's path or id, never by a program's name alone, so that neighbours on the machine
//! are safe.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};

use crate::process::pause;

/// How long killed processes may take to disappear.
const END_DEADLINE: Duration = Duration::from_secs(10);
/// Unmounting one layer of a stack may reveal another.
const UNMOUNT_PASSES: usize = 8;
/// Programs that may carry a run's path in their arguments and are then taken for the run's own.
const PROGRAMS: &[&str] = &[
    "containerd",
    "containerd-shim-runc-v2",
    "containerd-stargz-grpc",
    "ctr",
    "runc",
    "docker-registry",
    "skopeo",
    "soci",
    "soci-snapshotter-grpc",
    "ip",
    "qemu-system-x86_64",
];
/// Ours, by the beginning of the name.
const OURS: &str = "millstream";

/// Name of a run's network namespace and control group.
pub(crate) fn run_name(id: &str) -> String {
    format!("ms-{id}")
}

/// Removes all that belongs to the run with this directory and id.
///
/// # Errors
///
/// If something cannot be removed. The directory is left when something is still mounted below it.
pub(crate) fn sweep(path: &Path, id: &str) -> Result<()> {
    end_processes(path, id)?;
    unmount_below(path)?;
    remove_netns(id);
    remove_cgroups(id);
    std::fs::remove_dir_all(path).with_context(|| format!("removing {}", path.display()))
}

fn end_processes(path: &Path, id: &str) -> Result<()> {
    let started = Instant::now();
    loop {
        let found = processes_of(path, id);
        if found.is_empty() {
            return Ok(());
        }
        ensure!(started.elapsed() < END_DEADLINE, "processes {found:?} of {} do not end", path.display());
        for pid in found {
            if let Some(pid) = Pid::from_raw(pid) {
                kill_process(pid, Signal::KILL).ok();
            }
        }
        // A process that waits for a file system of ours that nobody serves any more cannot end before this.
        abort_fuse_below(path);
        pause();
    }
}

/// Living processes that name `path` in their arguments, that run in the run's control groups, and all their
/// descendants. Never this process.
fn processes_of(path: &Path, id: &str) -> Vec<i32> {
    let mut parents: HashMap<i32, i32> = HashMap::new();
    let mut found: HashSet<i32> = HashSet::new();
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let Some((state, parent)) = state_and_parent(&entry.path()) else { continue };
        // Zombies are dead already; init or their parent reaps them.
        if state == 'Z' || state == 'X' {
            continue;
        }
        parents.insert(pid, parent);
        if pid != own && (names_path(&entry.path(), path) || in_cgroup(&entry.path(), id)) {
            found.insert(pid);
        }
    }
    loop {
        let more: Vec<i32> = parents
            .iter()
            .filter(|(pid, parent)| found.contains(parent) && !found.contains(pid) && **pid != own)
            .map(|(pid, _)| *pid)
            .collect();
        if more.is_empty() {
            return found.into_iter().collect();
        }
        found.extend(more);
    }
}

fn state_and_parent(proc: &Path) -> Option<(char, i32)> {
    let stat = std::fs::read_to_string(proc.join("stat")).ok()?;
    // The name is in parentheses and may hold anything, also parentheses.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

fn names_path(proc: &Path, path: &Path) -> bool {
    let cmdline = std::fs::read(proc.join("cmdline")).unwrap_or_default();
    let mut arguments = cmdline.split(|byte| *byte == 0);
    let program = arguments.next().unwrap_or_default();
    let name = program.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let known = PROGRAMS.iter().any(|known| known.as_bytes() == name) || name.starts_with(OURS.as_bytes());
    let wanted = path.as_os_str().as_bytes();
    known && cmdline.windows(wanted.len()).any(|window| window == wanted)
}

fn in_cgroup(proc: &Path, id: &str) -> bool {
    let wanted = format!("/{}", run_name(id));
    std::fs::read_to_string(proc.join("cgroup"))
        .is_ok_and(|text| text.lines().any(|line| line.ends_with(&wanted) || line.contains(&format!("{wanted}/"))))
}

/// One line of the table of mounts.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MountLine {
    /// Device number's minor part, which is the connection's number for FUSE.
    minor: u32,
    at: PathBuf,
    kind: String,
}

pub(crate) fn mounts_below(path: &Path) -> Result<Vec<MountLine>> {
    let table = std::fs::read("/proc/self/mountinfo").context("reading the table of mounts")?;
    let mut mounts: Vec<MountLine> =
        table.split(|byte| *byte == b'\n').filter_map(parse_mount).filter(|mount| mount.at.starts_with(path)).collect();
    // Deepest first; of several at one place the latest first.
    mounts.reverse();
    mounts.sort_by_key(|mount| std::cmp::Reverse(mount.at.components().count()));
    Ok(mounts)
}

fn parse_mount(line: &[u8]) -> Option<MountLine> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let device = std::str::from_utf8(fields.get(2)?).ok()?;
    let dash = fields.iter().position(|field| *field == b"-")?;
    Some(MountLine {
        minor: device.split_once(':')?.1.parse().ok()?,
        at: PathBuf::from(OsString::from_vec(unescape(fields.get(4)?))),
        kind: String::from_utf8_lossy(fields.get(dash + 1)?).into_owned(),
    })
}

/// The kernel writes blanks, tabs, newlines and backslashes as a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = (byte == b'\\')
            .then(|| after.get(..3))
            .flatten()
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(value) => {
                out.push(value);
                rest = &after[3..];
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    out
}

fn abort_fuse_below(path: &Path) {
    for mount in mounts_below(path).unwrap_or_default() {
        if mount.kind == "fuse" || mount.kind.starts_with("fuse.") {
            // Not there where the control file system is not mounted; then killed processes end by themselves or not.
            std::fs::write(format!("/sys/fs/fuse/connections/{}/abort", mount.minor), "1").ok();
        }
    }
}

/// Takes away what is mounted below this directory, whoever still serves it.
///
/// # Errors
///
/// If something stays.
pub(crate) fn unmount_below(path: &Path) -> Result<()> {
    for _ in 0..UNMOUNT_PASSES {
        let mounts = mounts_below(path)?;
        if mounts.is_empty() {
            return Ok(());
        }
        for mount in mounts {
            unmount(&mount.at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).ok();
        }
    }
    let left = mounts_below(path)?;
    ensure!(left.is_empty(), "still mounted: {left:?}");
    Ok(())
}

fn remove_netns(id: &str) {
    let name = run_name(id);
    if Path::new("/run/netns").join(&name).exists() {
        Command::new("ip").args(["netns", "delete", &name]).status().ok();
    }
}

/// Empty groups of every hierarchy of version 1, and of version 2.
fn remove_cgroups(id: &str) {
    let name = run_name(id);
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    for hierarchy in hierarchies.chain([root.to_owned()]) {
        remove_groups(&hierarchy.join(&name));
    }
}

fn remove_groups(group: &Path) {
    for entry in std::fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    std::fs::remove_dir(group).ok();
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_mount_point_with_a_blank_is_understood() {
        let line = br"36 35 0:46 / /tmp/a\040b\134c rw,noatime shared:1 - fuse.mill mill rw";
        let mount = parse_mount(line).unwrap();
        assert_eq!(mount, MountLine { minor: 46, at: PathBuf::from("/tmp/a b\\c"), kind: "fuse.mill".to_owned() });
    }

    #[test]
    fn a_process_that_only_looks_like_ours_is_not_taken() {
        // This test's own arguments name no run.
        assert!(processes_of(Path::new("/tmp/millstream-e2e/none"), "ffffffff-none").is_empty());
    }
}
