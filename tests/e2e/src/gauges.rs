//! What a node holds of the machine, to see afterwards whether it gave back everything that work had cost.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::containerd::Containerd;
use crate::daemons::Node;
use crate::process::{anonymous_memory, let_pass};

/// How long what was used may take to be given back. The threads of tokio's pool for blocking work live 10 s longer than their
/// work, so nothing below that would do.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause between two looks. None of these looks asks the node to do anything for it but the one at its page of metrics.
const LOOK: Duration = Duration::from_millis(200);
/// Connections to the registry that are kept for the next request, for 90 s and at most `fetch.connections`. Each has a task.
const IDLE_CONNECTIONS: usize = 8;
/// Threads of the pool for blocking work that containerd keeps busy: it asks for the usage of snapshots every 10 s.
const BUSY_THREADS: usize = 4;
/// Bytes of memory that an allocator keeps for the next work. glibc returns to the system what is free at the end of an arena
/// only, and each thread that worked at once has left an arena. What leaks grows with the work, and this does not:
/// the work of these tests would leak more than this if a hundredth of what it handles stayed. Seen on two cores: up to 26 MiB,
/// after 64 pulls at once. What leaks slowly is found by `leaks`, round by round.
const KEPT_MEMORY: u64 = 32 << 20;

/// What a process holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Open descriptors by what they refer to. Sockets and pipes are not told apart.
    pub descriptors: BTreeMap<String, usize>,
    /// Its threads.
    pub threads: usize,
    /// Bytes of memory of its own, that is without mapped files.
    pub memory: u64,
}

impl Process {
    /// Of a living process.
    ///
    /// # Errors
    ///
    /// If it has ended.
    pub fn of(id: i32) -> Result<Self> {
        let proc = PathBuf::from(format!("/proc/{id}"));
        let mut descriptors = BTreeMap::new();
        for entry in std::fs::read_dir(proc.join("fd")).context("listing descriptors")? {
            // It may have been closed since.
            let Ok(target) = std::fs::read_link(entry?.path()) else { continue };
            let target = target.display().to_string();
            // `socket:[4711]`; the name of a file that was deleted says so at its end.
            let kind = target.split_once(":[").map_or(target.as_str(), |(kind, _)| kind);
            *descriptors.entry(kind.to_owned()).or_default() += 1;
        }
        let threads = std::fs::read_dir(proc.join("task")).context("listing threads")?.count();
        Ok(Self { descriptors, threads, memory: anonymous_memory(id.unsigned_abs())? })
    }

    /// Open descriptors.
    pub fn descriptor_count(&self) -> usize {
        self.descriptors.values().sum()
    }

    fn beyond(&self, before: &Self, who: &str) -> Vec<String> {
        let mut found = Vec::new();
        for (kind, count) in &self.descriptors {
            let was = before.descriptors.get(kind).copied().unwrap_or_default();
            let allowed = if kind == "socket" { was + IDLE_CONNECTIONS } else { was };
            if *count > allowed {
                found.push(format!("{who}: {count} descriptors of {kind}, were {was}"));
            }
        }
        if self.threads > before.threads + BUSY_THREADS {
            found.push(format!("{who}: {} threads, were {}", self.threads, before.threads));
        }
        if self.memory > before.memory + KEPT_MEMORY {
            found.push(format!("{who}: {} KiB of memory, were {}", self.memory >> 10, before.memory >> 10));
        }
        found
    }
}

/// What a node and its containerd hold.
#[derive(Debug, Clone)]
pub struct Gauges {
    worker_id: i32,
    /// The process that does the work.
    pub worker: Process,
    /// The one that starts it.
    pub supervisor: Process,
    /// Tasks of the worker's runtime.
    pub tasks: u64,
    /// Mount points below the workdir, snapshots of the node, directories of its store, leases of containerd.
    pub things: Vec<String>,
}

impl Gauges {
    /// Of no node that runs, to try out what is made of them.
    #[cfg(test)]
    pub(crate) fn of(worker: Process, supervisor: Process, tasks: u64, things: Vec<String>) -> Self {
        Self { worker_id: 0, worker, supervisor, tasks, things }
    }
}

/// Where to look.
#[derive(Debug)]
pub struct Gauged<'n> {
    /// The node; it shows its metrics.
    pub node: &'n Node,
    /// Its client.
    pub containerd: &'n Containerd,
    /// Where mounts would be.
    pub below: &'n Path,
    /// Namespaces of containerd whose leases are looked for.
    pub namespaces: &'n [&'n str],
}

impl Gauged<'_> {
    fn processes(&self) -> Result<(i32, Process, Process)> {
        let worker = self.node.workers().first().copied().context("no worker")?;
        let supervisor = self.node.supervisor().context("no supervisor")?;
        Ok((worker, Process::of(worker)?, Process::of(supervisor)?))
    }

    fn things(&self) -> Result<Vec<String>> {
        let mut things = mounts_below(self.below)?;
        things.extend(self.node.snapshots()?.into_iter().map(|info| format!("snapshot {}", info.name)));
        for directory in ["layers", "views", "s", "trash"] {
            let listed = std::fs::read_dir(self.node.root().join(directory)).into_iter().flatten().flatten();
            things.extend(listed.map(|entry| format!("{directory}/{}", entry.file_name().display())));
        }
        for namespace in self.namespaces {
            let leases = self.containerd.ctr(namespace, &["leases", "ls", "-q"])?;
            things.extend(leases.lines().map(|lease| format!("lease {lease} of {namespace}")));
        }
        things.sort_unstable();
        Ok(things)
    }

    /// What is held now.
    ///
    /// # Errors
    ///
    /// If a program does not answer.
    pub fn now(&self) -> Result<Gauges> {
        let things = self.things()?;
        let (worker_id, worker, supervisor) = self.processes()?;
        Ok(Gauges { worker_id, worker, supervisor, tasks: self.tasks()?, things })
    }

    fn tasks(&self) -> Result<u64> {
        metric(self.node.metrics().context("the node shows no metrics")?, "millstream_tasks")
    }

    /// Waits until nothing is held that was not held `before`; gives what is.
    ///
    /// # Errors
    ///
    /// If something stays; the error says what.
    pub fn await_given_back(&self, before: &Gauges) -> Result<Gauges> {
        let started = Instant::now();
        let mut beyond = vec!["nobody looked".to_owned()];
        // What asks the node keeps its threads busy, so it comes first.
        while !beyond.is_empty() {
            ensure!(started.elapsed() < PATIENCE, "not given back: {beyond:#?}");
            let_pass(LOOK);
            beyond = self.things()?;
            beyond.retain(|thing| before.things.binary_search(thing).is_err());
        }
        loop {
            let (worker_id, worker, supervisor) = self.processes()?;
            ensure!(worker_id == before.worker_id, "the worker died");
            let tasks = self.tasks()?;
            let mut beyond = worker.beyond(&before.worker, "worker");
            beyond.extend(supervisor.beyond(&before.supervisor, "supervisor"));
            if tasks > before.tasks + IDLE_CONNECTIONS as u64 {
                beyond.push(format!("{tasks} tasks, were {}", before.tasks));
            }
            if beyond.is_empty() {
                return Ok(Gauges { worker_id, worker, supervisor, tasks, things: before.things.clone() });
            }
            ensure!(started.elapsed() < PATIENCE, "not given back: {beyond:#?}");
            let_pass(LOOK);
        }
    }
}

fn mounts_below(directory: &Path) -> Result<Vec<String>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").context("reading the table of mounts")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(points.filter(|point| Path::new(point).starts_with(directory)).map(|point| format!("mount {point}")).collect())
}

/// The value of a metric without labels on the page at this address.
///
/// # Errors
///
/// If the page cannot be had or does not have it.
pub fn metric(address: SocketAddr, name: &str) -> Result<u64> {
    let mut stream = TcpStream::connect(address).context("connecting to the page of metrics")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.with_context(|| format!("no {name} in\n{page}"))?.parse().with_context(|| format!("the value of {name}"))
}
