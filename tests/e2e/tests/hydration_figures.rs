//! Figures of background downloads on a line of 200 Mbit/s and 20 ms. Minutes, and only true on a machine with nothing else
//! to do: `cargo test --release -p millstream-e2e --test hydration_figures -- --ignored --nocapture`.

#![allow(clippy::unwrap_used, missing_docs)]

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use millstream_e2e::containerd::{Containerd, ContainerdOptions, Version};
use millstream_e2e::cri::{ContainerSpec, Cri};
use millstream_e2e::daemons::{Node, NodeOptions, Server, ServerOptions};
use millstream_e2e::image::{Image, pause, shell};
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::link::{FAR, Link, LinkOptions};
use millstream_e2e::need::product;
use millstream_e2e::process::{Process, eventually, let_pass, output};
use millstream_e2e::registry::{Registry, RegistryOptions, Tls, free_address};
use millstream_e2e::stage::{CLI, can_be_set};
use millstream_e2e::workdir::Workdir;

const LARGE: usize = 240 << 20;
const READS: u64 = 8;
/// Reads are this far from each other, so that each needs a span of its own.
const APART: u64 = 4 << 20;
const PATIENCE: Duration = Duration::from_secs(120);

/// Registry and server at the far end of a line, a node and containerd at the near one. Fields end in their order.
struct Stage {
    cri: Cri,
    _containerd: Containerd,
    node: Node,
    _server: Server,
    _registry: Registry,
    link: Link,
    image: String,
    large: String,
    work: Workdir,
}

fn stage() -> Stage {
    let work = Workdir::new().unwrap();
    let layout = work.dir("layout").unwrap();
    let cold = noise(7, usize::try_from(2 * READS * APART).unwrap());
    let image = Image::new()
        .layer(shell().unwrap(), Packing::Gzip)
        .layer(vec![Entry::file("large", noise(1, LARGE))], Packing::Gzip)
        .layer(vec![Entry::file("cold", cold)], Packing::Gzip);
    let info = image.write(&layout, "app").unwrap();
    pause().unwrap().write(&layout, "pause").unwrap();
    let inner = free_address().unwrap();
    let options = RegistryOptions { address: inner, tls: None, login: None };
    let registry = Registry::start(&work, options.clone()).unwrap();
    registry.push(&layout, "app", "app:1").unwrap();
    registry.push(&layout, "pause", "pause:1").unwrap();
    registry.stop().unwrap();

    let mut link = Link::up(&work, LinkOptions::default()).unwrap();
    let public = link.expose(5000, inner).unwrap();
    let registry = Registry::start_behind(&work, options, public, &link).unwrap();
    let certs_d = work.dir("certs.d").unwrap();
    registry.write_hosts(&certs_d).unwrap();
    let tls = Tls::generate(&work.dir("tls").unwrap(), &[&FAR.to_string()]).unwrap();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 7900));
    let options = ServerOptions {
        address,
        tls: Some(tls.clone()),
        certs_d: certs_d.clone(),
        import_on_demand: false,
        packed_content: true,
        max_entries: None,
    };
    let server = Server::start(&work, &options, Some(&link)).unwrap();
    let server_address = format!("https://{}", link.expose(7900, address).unwrap());
    let reference = registry.reference("app:1");
    let mut import = Command::new(product(CLI).unwrap());
    import.args(["import", &reference, "--server", &server_address, "--ca"]).arg(&tls.ca);
    output(&mut import).unwrap();

    let mut options = NodeOptions::new(&server_address, &certs_d);
    (options.ca, options.hydration) = (Some(tls.ca), false);
    let node = Node::start(&work, &options).unwrap();
    let options = ContainerdOptions {
        version: Version::V1,
        snapshotter: node.snapshotter(),
        pause_image: registry.reference("pause:1"),
        certs_d,
        transfer: false,
        labels: true,
    };
    let containerd = Containerd::start(&work, options).unwrap();
    let cri = Cri::connect(&work, &containerd.socket()).unwrap();
    let large = format!("sha256:{}", info.layers[1].digest);
    Stage {
        cri,
        _containerd: containerd,
        node,
        _server: server,
        _registry: registry,
        link,
        image: reference,
        large,
        work,
    }
}

impl Stage {
    /// The file of which nothing is here, as containers see it.
    fn cold(&self) -> PathBuf {
        let views = std::fs::read_dir(self.node.root().join("m")).unwrap();
        views.map(|view| view.unwrap().path().join("cold")).find(|file| file.exists()).unwrap()
    }

    fn received(&self) -> u64 {
        self.link.traffic().unwrap().received_bytes
    }

    /// What part of its content the large layer has.
    fn progress(&self) -> f64 {
        let layers = self.node.status().unwrap().layers;
        let layer = layers.iter().find(|layer| layer.layer == self.large).unwrap();
        layer.bytes_present as f64 / layer.bytes_total as f64
    }

    /// Times of reads of a page each, `between` apart, ascending.
    fn read(&self, first: u64, between: Duration) -> Vec<Duration> {
        let file = File::open(self.cold()).unwrap();
        let read = |n: u64| {
            let_pass(between);
            let started = Instant::now();
            file.read_exact_at(&mut [0; 4096], (first + n) * APART).unwrap();
            started.elapsed()
        };
        let mut times: Vec<Duration> = (0..READS).map(read).collect();
        times.sort_unstable();
        times
    }
}

fn say(what: &str, times: &[Duration]) {
    let median = times[times.len() / 2];
    println!("{what:<42} median {median:>8.1?}, worst {:>8.1?} of {}", times[times.len() - 1], times.len());
}

#[test]
#[ignore = "a measurement; see the head of this file"]
fn background_downloads_fill_an_idle_line_and_give_way_to_readers() {
    if !can_be_set(&[]) {
        return;
    }
    let mut stage = stage();
    stage.cri.pull(&stage.image, None).unwrap();
    let pod = stage.cri.run_pod("pod").unwrap();
    let command = &["/bin/sh", "-c", "sleep 1000000"];
    let spec = ContainerSpec { image: &stage.image, command, ..ContainerSpec::default() };
    let container = stage.cri.create(&pod, "sleeps", &spec).unwrap();
    stage.cri.start(&container).unwrap();

    // Longer than a reader's last request holds hydration up, so that each read meets one that is at full speed.
    let between = Duration::from_secs(1);
    say("a read, no background download", &stage.read(0, between));
    stage.node.set_hydration(true).unwrap();
    eventually("the background download", PATIENCE, || (stage.progress() > 0.02).then_some(())).unwrap();
    say("a read during a background download", &stage.read(READS, between));

    let_pass(between);
    let (started, before, from) = (Instant::now(), stage.received(), stage.progress());
    let whole =
        eventually("most of the layer", PATIENCE, || Some(stage.progress()).filter(|part| *part > 0.95)).unwrap();
    let (took, bytes) = (started.elapsed().as_secs_f64(), (stage.received() - before) as f64);
    let busy = bytes * 8.0 / took / f64::from(LinkOptions::default().megabits) / 1e6;
    println!(
        "an idle line, from {:.0} % to {:.0} % of the layer      {:.1} MB in {took:.1} s: {:.0} % busy",
        from * 100.0,
        whole * 100.0,
        bytes / 1e6,
        busy * 100.0
    );
    assert!(busy >= 0.85, "{busy}");
}

/// Programs that want all processors, each in a session of its own, so that the scheduler weighs them as it weighs containers.
struct Others {
    pids: Vec<u32>,
    /// Shells that the programs end with.
    _shells: Vec<Process>,
}

impl Others {
    fn start(work: &Workdir) -> Self {
        let processors = std::thread::available_parallelism().unwrap().get();
        let log = |number| work.path().join(format!("other-{number}.log"));
        let start = |number| {
            let mut command = Command::new("sh");
            command.args(["-c", "setsid setpriv --pdeathsig KILL sha256sum /dev/zero & echo $!; wait"]);
            Process::spawn("other", command, &log(number)).unwrap()
        };
        let shells = (0..processors).map(start).collect();
        let pid = |number| {
            let said = || std::fs::read_to_string(log(number)).ok()?.trim().parse().ok();
            eventually("another program", PATIENCE, said).unwrap()
        };
        Self { pids: (0..processors).map(pid).collect(), _shells: shells }
    }

    /// Processor time that they got, in ticks.
    fn ticks(&self) -> u64 {
        self.pids.iter().map(|pid| ticks_of(*pid)).sum()
    }

    fn ticks_in(&self, time: Duration) -> u64 {
        let before = self.ticks();
        let_pass(time);
        self.ticks() - before
    }
}

#[test]
#[ignore = "a measurement; see the head of this file"]
fn background_downloads_leave_the_processors_to_others() {
    const TIME: Duration = Duration::from_secs(4);
    if !can_be_set(&[]) {
        return;
    }
    let stage = stage();
    stage.cri.pull(&stage.image, None).unwrap();
    let others = Others::start(&stage.work);
    let worker = stage.node.workers()[0].cast_unsigned();
    let (mut without, mut with, mut own, mut done) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..3 {
        stage.node.set_hydration(false).unwrap();
        without.push(others.ticks_in(TIME));
        stage.node.set_hydration(true).unwrap();
        let (from, before) = (stage.progress(), ticks_of(worker));
        with.push(others.ticks_in(TIME));
        own.push(ticks_of(worker) - before);
        done.push(stage.progress() - from);
    }
    let all = median(without) as f64;
    println!("others have {:.0} % of what they have without a background download", median(with) as f64 / all * 100.0);
    let share = median(own) as f64 / all;
    println!("the node has {:.0} %; registry, server and line, which are elsewhere as a rule, the rest", share * 100.0);
    println!("the download comes on by {done:.3?} of the layer in {TIME:?}");
    assert!(done.iter().all(|part| *part > 0.0), "{done:?}");
    assert!(share <= 0.15, "{share}");
}

/// Processor time that a process has had, in ticks.
fn ticks_of(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_ascii_whitespace().collect();
    fields[11..=12].iter().map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values[values.len() / 2]
}
