//! One run: from nothing to the first answer, and beyond where that is asked.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use millstream_e2e::containerd::Containerd;
use millstream_e2e::cri::{Container, ContainerSpec, Cri};
use millstream_e2e::daemons::{metrics_page, sample};
use millstream_e2e::process::{eventually, tail};
use millstream_e2e::registry::free_address;
use millstream_e2e::rig::{REGISTRY_PORT, Rig, drop_caches};
use millstream_e2e::watch::Requests;

use crate::images::{Ready, question};
use crate::matrix::{Job, Link};
use crate::memory::Sampler;
use crate::peers::{DIRECTORY, Daemon, Known, Subject};
use crate::rows::Values;
use crate::{files, memory, processor};

const READY: Duration = Duration::from_secs(300);
const LOCAL: Duration = Duration::from_secs(900);
/// Between two looks whether everything is local.
const LOOK: Duration = Duration::from_millis(100);
/// What millstreamd fetches bytes for, as its metrics call it.
const PURPOSES: [&str; 6] = ["demand", "prefetch", "hydrate", "profile", "content", "table"];
/// Directories of all state of everybody who is measured.
const STATE: [&str; 5] = ["containerd1", "containerd2", "node", DIRECTORY, "pods"];

/// Does a run from nothing: daemons with empty state, cold caches, nobody else running.
pub(crate) fn run(rig: &mut Rig, image: &Ready, link: Link, subject: Subject, job: Job) -> Result<Values> {
    rig.wipe(&STATE)?;
    if subject.needs_server() {
        rig.start_server()?
    } else {
        rig.stop_server()?
    }
    let daemon = subject.daemon(rig)?;
    let containerd = subject.containerd(rig, &daemon)?;
    let mut cri = Cri::connect(&rig.work, &containerd.socket())?;
    // The pod's own container is the same for all and not part of the job.
    let pod = cri.run_pod("bench")?;
    let at = At { rig, image, link, subject, daemon: &daemon, containerd: &containerd, cri: &cri };
    drop_caches()?;
    let values = at.measure(&pod, job)?;
    cri.remove_pods()?;
    drop(cri);
    drop(containerd);
    daemon.stop()?;
    rig.wipe(&STATE)?;
    Ok(values)
}

/// Who and what is measured.
struct At<'r> {
    rig: &'r Rig,
    image: &'r Ready,
    link: Link,
    subject: Subject,
    daemon: &'r Daemon,
    containerd: &'r Containerd,
    cri: &'r Cri,
}

/// The counters at a moment.
struct Counters {
    received: u64,
    turns: u64,
    registry: Requests,
    cpu: f64,
    own_cpu: f64,
}

impl At<'_> {
    fn measure(&self, pod: &millstream_e2e::cri::Pod, job: Job) -> Result<Values> {
        let reference = self.rig.registry.reference(&self.image.registry_name(self.subject.form()));
        let port = free_address()?.port();
        let mut values = Values {
            image_bytes: self.image.size(),
            decompressor: self.subject.decompressor(),
            floor_s: self.image.working_set.as_ref().map(|set| set.floor(self.link)),
            bytes_needed: self.image.working_set.as_ref().map(|set| set.compressed),
            ..Values::default()
        };
        let idle = memory::of(&self.daemon.processes());
        let sampler = Sampler::start(self.daemon.processes());
        let before = self.counters()?;
        let started = Instant::now();
        values.pull_s = self.cri.pull(&reference, None)?.as_secs_f64();
        self.check_lazy(&before)?;
        if job == Job::Pull {
            let seen = self.counters()?;
            values.requests = Some(seen.turns - before.turns);
            values.containerd_requests = Some(of_containerd(&seen.registry) - of_containerd(&before.registry));
            return Ok(values);
        }
        let text = port.to_string();
        let spec = ContainerSpec { image: &reference, env: &[("PORT", &text)], ..ContainerSpec::default() };
        let container = self.cri.create(pod, "app", &spec)?;
        self.cri.start(&container)?;
        question(&self.image.name)
            .await_answer(port, started + READY)
            .with_context(|| self.cri.output(&container).unwrap_or_default())?;
        values.ready_s = Some(started.elapsed().as_secs_f64());
        self.check_profile()?;
        self.note_ready(&mut values, &before)?;
        if matches!(job, Job::Local | Job::Files) {
            self.await_local(&mut values, started, &before)?;
        }
        self.await_recording()?;
        if self.subject.is_ours() {
            let more = &mut values.more;
            more.insert("memory_idle".to_owned(), idle as f64);
            more.insert("memory_after".to_owned(), memory::of(&self.daemon.processes()) as f64);
            more.insert("memory_peak".to_owned(), sampler.most() as f64);
        }
        drop(sampler);
        if job == Job::Files {
            values.more.extend(self.read_everything(&container)?);
        }
        Ok(values)
    }

    /// A lazy subject that quietly pulls as always would be measured as something else.
    fn check_lazy(&self, before: &Counters) -> Result<()> {
        let received = self.rig.link.traffic()?.received_bytes - before.received;
        let log = self.rig.work.log(self.daemon.name());
        let whole = self.subject.is_lazy() && received >= self.image.size();
        ensure!(
            !whole,
            "the pull was to be lazy, and the whole image came with it; the end of the daemon's log:\n{}",
            tail(&log, 20)
        );
        Ok(())
    }

    /// A start that was to have a profile, and had none, would be measured as something else.
    fn check_profile(&self) -> Result<()> {
        let Subject::Millstream { known: Known::Profile, .. } = self.subject else { return Ok(()) };
        let Some(node) = self.daemon.node() else { return Ok(()) };
        let pages = node.status()?.transfer.unwrap_or_default().profile_bytes;
        ensure!(pages > 0, "the server had no pages of a profile for this start");
        Ok(())
    }

    /// A start is over when nothing new was read for some seconds; then the node tells the server what it read.
    fn await_recording(&self) -> Result<()> {
        let Subject::Millstream { known: Known::First, .. } = self.subject else { return Ok(()) };
        let address = self.daemon.node().and_then(|node| node.metrics()).context("a node that shows no metrics")?;
        let told = "millstream_source_requests_total{source=\"recording\",code=\"\"}";
        eventually("the server to be told of the start", READY, || {
            metrics_page(address).is_ok_and(|page| sample(&page, told) > 0).then_some(())
        })
    }

    fn counters(&self) -> Result<Counters> {
        let own = self.daemon.processes();
        let all: Vec<u32> = self.containerd.id().into_iter().chain(own.iter().copied()).collect();
        // First: whoever asks the proxy next begins a new count of what is under way at once.
        let registry = self.rig.link.requests(REGISTRY_PORT)?;
        Ok(Counters {
            received: self.rig.link.traffic()?.received_bytes,
            turns: self.rig.link.counts()?.turns,
            registry,
            cpu: processor::used(&all),
            own_cpu: processor::used(&own),
        })
    }

    fn note_ready(&self, values: &mut Values, before: &Counters) -> Result<()> {
        let now = self.counters()?;
        values.bytes_until_ready = Some(now.received - before.received);
        values.requests = Some(now.turns - before.turns);
        values.daemon_cpu_s = Some(now.cpu - before.cpu);
        if let Some(address) = self.daemon.node().and_then(|node| node.metrics()) {
            values.note_fetched(&metrics_page(address)?);
        }
        values.containerd_requests = Some(of_containerd(&now.registry) - of_containerd(&before.registry));
        values.blob_peak = now.registry.blobs.values().map(|blob| blob.peak).max();
        Ok(())
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "another process sends no event when it is done; the wait has a bound"
    )]
    fn await_local(&self, values: &mut Values, started: Instant, before: &Counters) -> Result<()> {
        // Others are local once they are pulled, or never tell.
        let Some(node) = self.daemon.node() else { return Ok(()) };
        // Each look is work for the daemon whose work is measured.
        eventually("every layer to be verified", LOCAL, || {
            std::thread::sleep(LOOK);
            node.is_all_local().then_some(())
        })?;
        values.local_s = Some(started.elapsed().as_secs_f64());
        let used = processor::used(&self.daemon.processes()) - before.own_cpu;
        values.more.insert("cpu_local_s".to_owned(), used);
        if let Some(set) = &self.image.working_set {
            values.more.insert("cpu_floor_s".to_owned(), set.cpu_s);
        }
        Ok(())
    }

    fn read_everything(&self, container: &Container) -> Result<BTreeMap<String, f64>> {
        files::figures(&self.containerd.rootfs("k8s.io", &container.id))
    }
}

fn of_containerd(seen: &Requests) -> u64 {
    seen.agents.get("containerd").copied().unwrap_or_default()
}

impl Values {
    /// What millstreamd has fetched and what for, as it comes over the wire.
    fn note_fetched(&mut self, page: &str) {
        let of = |purpose: &str| sample(page, &format!("millstream_fetched_bytes_total{{purpose=\"{purpose}\"}}"));
        self.bytes_demanded = Some(of("demand") + of("content"));
        for purpose in PURPOSES {
            self.more.insert(format!("fetched_{purpose}"), of(purpose) as f64);
        }
    }
}
