//! Registry and server are cut off from the node while programs read: what is local is served throughout, what is not waits no
//! longer than it may, and afterwards all is well with the same worker, also where nobody said that a connection had ended.

#![allow(clippy::unwrap_used, missing_docs)]

use std::fs::File;
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use millstream_e2e::containerd::{Containerd, ContainerdOptions, Version};
use millstream_e2e::cri::{ContainerSpec, Cri};
use millstream_e2e::daemons::{Node, NodeOptions, Server, ServerOptions, metrics_page, sample};
use millstream_e2e::image::{Image, pause, shell};
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::link::{FAR, FILTER, Link, LinkOptions};
use millstream_e2e::need::{Need, product};
use millstream_e2e::process::{eventually, let_pass, output};
use millstream_e2e::registry::{Registry, RegistryOptions, Tls, free_address};
use millstream_e2e::stage::{CLI, Pushed, await_decision, can_be_set};
use millstream_e2e::workdir::Workdir;
use millstream_wire::millstream::v1::decision::Outcome;
use rustix::fs::{Advice, fadvise};

/// Where the registry is.
const REGISTRY: IpAddr = FAR;
/// Where the server is.
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 231, 77, 6);
/// `fetch.read_deadline` of the node, where a test does not try the default.
const READ: Duration = Duration::from_secs(4);
/// How long what is well again may take to be used again.
const RECOVERY: Duration = Duration::from_secs(20);
/// A read of what is local, on a machine with other things to do.
const AT_ONCE: Duration = Duration::from_secs(2);
/// Bytes of a file that is read as a whole.
const SMALL: usize = 200 << 10;
/// Bytes before [`NEEDS_BOTH`] in a layer: more than a span, so that a window is needed.
const BEFORE: usize = 1536 << 10;
/// Bytes of the file that is being read when the line is cut.
const LONG: usize = 8 << 20;
/// Files of every layer: one that the registry alone can give, and one for which it needs the server, too.
const NEEDS_REGISTRY: &str = "a";
const NEEDS_BOTH: &str = "b";

/// One partition.
struct Row {
    name: &'static str,
    cut: fn(&Link, bool),
    /// What is read meanwhile, and whether it is read right.
    reads: &'static [(&'static str, bool)],
    /// The code under which failed attempts are counted and logged.
    code: &'static str,
}

fn registry_cut(link: &Link, cut: bool) {
    link.silence(REGISTRY, cut).unwrap();
}

fn server_cut(link: &Link, cut: bool) {
    link.silence(SERVER.into(), cut).unwrap();
}

fn both_cut(link: &Link, cut: bool) {
    registry_cut(link, cut);
    server_cut(link, cut);
}

fn unplugged(link: &Link, cut: bool) {
    link.plug(!cut).unwrap();
}

const ROWS: &[Row] = &[
    // The server has it from the registry, which it still reaches.
    Row {
        name: "no registry",
        cut: registry_cut,
        reads: &[(NEEDS_REGISTRY, true), (NEEDS_BOTH, true)],
        code: "source.timed-out",
    },
    Row {
        name: "no server",
        cut: server_cut,
        reads: &[(NEEDS_REGISTRY, true), (NEEDS_BOTH, false)],
        code: "source.timed-out",
    },
    Row {
        name: "neither",
        cut: both_cut,
        reads: &[(NEEDS_REGISTRY, false), (NEEDS_BOTH, false)],
        code: "source.timed-out",
    },
    Row { name: "line unplugged", cut: unplugged, reads: &[(NEEDS_REGISTRY, false)], code: "source.unavailable" },
];

fn content(layer: usize, file: &str) -> Vec<u8> {
    noise(u32::try_from(layer).unwrap() * 2 + u32::from(file == NEEDS_BOTH) + 100, SMALL)
}

/// A layer that is local later, one that takes its time, and one for each row.
fn image(layers: usize) -> Image {
    let local = vec![Entry::file("local", noise(1, SMALL))];
    let long = vec![Entry::file("long", noise(2, LONG))];
    let image = Image::new().layer(shell().unwrap(), Packing::Gzip).layer(local, Packing::Gzip);
    (0..layers).fold(image.layer(long, Packing::Gzip), |image, layer| {
        let file = |name: &str| Entry::file(format!("r{layer}/{name}"), content(layer, name));
        let before = Entry::file(format!("r{layer}/before"), noise(3, BEFORE));
        let entries = vec![Entry::directory(format!("r{layer}")), file(NEEDS_REGISTRY), before, file(NEEDS_BOTH)];
        image.layer(entries, Packing::Gzip)
    })
}

/// A lazy container on this side of a line, registry and server on the other one. Fields end in their order.
struct Scene {
    _cri: Cri,
    _containerd: Containerd,
    node: Node,
    _server: Server,
    _registry: Registry,
    link: Link,
    metrics: SocketAddr,
    root: PathBuf,
    _work: Workdir,
}

impl Scene {
    fn set(layers: usize, read_deadline: Duration) -> Self {
        let work = Workdir::new().unwrap();
        let layout = work.dir("layout").unwrap();
        let info = image(layers).write(&layout, "app").unwrap();
        pause().unwrap().write(&layout, "pause").unwrap();
        let link = Link::up(&work, LinkOptions { megabits: 50, ..LinkOptions::default() }).unwrap();
        link.add_reachable(SERVER).unwrap();
        let options = RegistryOptions { address: (REGISTRY, 5000).into(), tls: None, login: None };
        let public = options.address;
        let registry = Registry::start_behind(&work, options, public, &link).unwrap();
        registry.push(&layout, "app", "app:1").unwrap();
        registry.push(&layout, "pause", "pause:1").unwrap();
        let certs_d = work.dir("certs.d").unwrap();
        registry.write_hosts(&certs_d).unwrap();
        let image = Pushed { reference: registry.reference("app:1"), info };

        let tls = Tls::generate(&work.dir("tls").unwrap(), &[&SERVER.to_string()]).unwrap();
        let options = ServerOptions {
            address: (SERVER, 7900).into(),
            tls: Some(tls.clone()),
            certs_d: certs_d.clone(),
            import_on_demand: false,
            packed_content: true,
            max_entries: None,
        };
        let server = Server::start(&work, &options, Some(&link)).unwrap();
        let server_address = format!("https://{}", options.address);
        let mut import = Command::new(product(CLI).unwrap());
        output(import.args(["import", &image.reference, "--server", &server_address, "--ca"]).arg(&tls.ca)).unwrap();

        let metrics = free_address().unwrap();
        let options = NodeOptions {
            ca: Some(tls.ca),
            hydration: false,
            read_deadline,
            metrics: Some(metrics),
            ..NodeOptions::new(&server_address, &certs_d)
        };
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
        let mut cri = Cri::connect(&work, &containerd.socket()).unwrap();
        cri.pull(&image.reference, None).unwrap();
        await_decision(&node, &image, Outcome::Lazy, "").unwrap();
        let pod = cri.run_pod("pod").unwrap();
        let spec =
            ContainerSpec { image: &image.reference, command: &["/bin/sleep", "100000"], ..ContainerSpec::default() };
        let container = cri.create(&pod, "reader", &spec).unwrap();
        cri.start(&container).unwrap();
        let root = containerd.rootfs("k8s.io", &container.id);
        assert_eq!(std::fs::read(root.join("local")).unwrap(), noise(1, SMALL));
        Self {
            _cri: cri,
            _containerd: containerd,
            node,
            _server: server,
            _registry: registry,
            link,
            metrics,
            root,
            _work: work,
        }
    }

    fn sample(&self, name: &str) -> u64 {
        sample(&metrics_page(self.metrics).unwrap(), name)
    }

    /// What the node has logged since it had logged so many bytes.
    fn logged(&self, since: usize) -> (String, usize) {
        let log = std::fs::read(self.node.log()).unwrap();
        (String::from_utf8_lossy(&log[since.min(log.len())..]).into_owned(), log.len())
    }

    /// Whether a file of this layer is read right; otherwise it is an input/output error.
    fn read(&self, layer: usize, file: &str) -> Result<bool, String> {
        match std::fs::read(self.root.join(format!("r{layer}/{file}"))) {
            Ok(bytes) if bytes == content(layer, file) => Ok(true),
            Ok(_) => Err(format!("{file}: wrong bytes")),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => Ok(false),
            Err(error) => Err(format!("{file}: {error}")),
        }
    }

    /// Reads what the row says while its partition lasts. The bound is twice the deadline: the kernel asks a second time for the
    /// page that a failed read-ahead has not brought.
    fn during(&self, layer: usize, row: &Row) -> Result<(), String> {
        for (file, promised) in row.reads {
            let begun = Instant::now();
            let right = self.read(layer, file)?;
            let took = begun.elapsed();
            println!("{:<16} {file}: {} after {took:.1?}", row.name, if right { "right" } else { "EIO" });
            if right != *promised {
                return Err(format!("{file}: not as promised, after {took:?}"));
            }
            if took > READ * 2 + AT_ONCE * 2 {
                return Err(format!("{file}: too late, after {took:?}"));
            }
        }
        Ok(())
    }

    fn play(&self, layer: usize, row: &Row) -> Result<(), String> {
        let failures = format!("millstream_fetch_failures_total{{code=\"{}\"}}", row.code);
        let failed = "millstream_reads_total{result=\"failed\"}";
        let (counted, failed_before, (_, logged)) = (self.sample(&failures), self.sample(failed), self.logged(0));
        let local = Local::start(&self.root);
        (row.cut)(&self.link, true);
        let during = self.during(layer, row);
        (row.cut)(&self.link, false);
        let over = Instant::now();
        during?;
        let (reads, longest) = local.end()?;
        if reads == 0 || longest > AT_ONCE {
            return Err(format!("{reads} local reads, the longest of {longest:?}"));
        }
        for (file, _) in row.reads {
            eventually(file, RECOVERY, || self.read(layer, file).map(|right| right.then_some(())).transpose())
                .map_err(|error| format!("afterwards: {error:#}"))??;
        }
        println!("{:<16} well after {:.1?}; {reads} local reads, at most {longest:.1?}", row.name, over.elapsed());
        let (log, _) = self.logged(logged);
        let fails = row.reads.iter().any(|(_, right)| !right);
        let line = log.lines().find(|line| line.contains("a read failed with EIO")).unwrap_or_default();
        for (holds, what) in [
            (self.sample(&failures) > counted, "not counted"),
            (log.contains(row.code), "not logged"),
            ((self.sample(failed) > failed_before) == fails, "failed reads wrongly counted"),
            (!fails || (line.contains(&format!("r{layer}/")) && line.contains("source.")), "no line about the read"),
            (guide().contains(&format!("`{}`", row.code)), "not in TROUBLESHOOTING"),
        ] {
            if !holds {
                return Err(what.to_owned());
            }
        }
        Ok(())
    }
}

fn guide() -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crates/node/TROUBLESHOOTING.md");
    std::fs::read_to_string(file).unwrap()
}

/// Somebody who reads the local file again and again, past the page cache.
struct Local {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<(usize, Duration), String>>,
}

impl Local {
    fn start(root: &Path) -> Self {
        let (stop, file) = (Arc::new(AtomicBool::new(false)), root.join("local"));
        let thread = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let (expected, mut reads, mut longest) = (noise(1, SMALL), 0, Duration::ZERO);
                while !stop.load(Ordering::Relaxed) {
                    let begun = Instant::now();
                    let read = || -> std::io::Result<Vec<u8>> {
                        let mut file = File::open(&file)?;
                        fadvise(&file, 0, None::<NonZeroU64>, Advice::DontNeed)?;
                        let mut bytes = Vec::new();
                        file.read_to_end(&mut bytes)?;
                        Ok(bytes)
                    };
                    if read().map_err(|error| format!("a local read: {error}"))? != expected {
                        return Err("wrong bytes in a local file".to_owned());
                    }
                    (reads, longest) = (reads + 1, longest.max(begun.elapsed()));
                    let_pass(Duration::from_millis(20));
                }
                Ok((reads, longest))
            }
        });
        Self { stop, thread }
    }

    /// How often it has read, and how long it took at most.
    fn end(self) -> Result<(usize, Duration), String> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

#[test]
fn a_partition_costs_what_is_not_local_and_is_over_when_it_is_over() {
    if !can_be_set(&[Need::Program(FILTER)]) {
        return;
    }
    let scene = Scene::set(ROWS.len(), READ);
    let worker = scene.node.workers();
    let wrong: Vec<String> = ROWS
        .iter()
        .enumerate()
        .filter_map(|(layer, row)| scene.play(layer, row).err().map(|error| format!("{}: {error}", row.name)))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    // In the middle of a file, and over before the deadline: nobody notices but by the clock.
    let (read, file) = (Arc::new(AtomicUsize::new(0)), scene.root.join("long"));
    let reader = std::thread::spawn({
        let read = Arc::clone(&read);
        move || -> std::io::Result<Vec<u8>> {
            let (mut file, mut bytes, mut piece) = (File::open(file)?, Vec::new(), vec![0; 64 << 10]);
            loop {
                let length = file.read(&mut piece)?;
                bytes.extend_from_slice(&piece[..length]);
                read.store(bytes.len(), Ordering::Relaxed);
                if length == 0 {
                    return Ok(bytes);
                }
            }
        }
    });
    eventually("the beginning of a file", RECOVERY, || (read.load(Ordering::Relaxed) > 0).then_some(())).unwrap();
    both_cut(&scene.link, true);
    let before = read.load(Ordering::Relaxed);
    let_pass(READ / 2);
    both_cut(&scene.link, false);
    let over = Instant::now();
    assert!(reader.join().unwrap().unwrap() == noise(2, LONG), "wrong bytes");
    println!("cut after {before} bytes of {LONG}, read to the end {:.1?} after the cut", over.elapsed());
    assert!(before < LONG, "it was not cut");
    assert_eq!(scene.node.workers(), worker);
}

/// What a quarter of `fetch.read_deadline` comes to by default: after it, a connection without a sign of life is given up.
const NOTICED: Duration = Duration::from_secs(15);

#[test]
fn connections_that_ended_without_a_word_are_noticed_in_time() {
    if !can_be_set(&[Need::Program(FILTER)]) {
        return;
    }
    let scene = Scene::set(3, Duration::from_secs(60));
    let worker = scene.node.workers();
    // Connections to both, of which some are kept.
    assert_eq!(scene.read(0, NEEDS_BOTH), Ok(true));
    both_cut(&scene.link, true);
    scene.link.forget(REGISTRY).unwrap();
    scene.link.forget(SERVER.into()).unwrap();
    both_cut(&scene.link, false);
    let forgotten = Instant::now();
    assert_eq!(scene.read(1, NEEDS_BOTH), Ok(true));
    let first = forgotten.elapsed();
    println!("the first read took {first:.1?}");
    // Half of it for a sign of life to be missed, and the time of an attempt that had begun before.
    assert!(first < NOTICED * 2, "{first:?}");
    let begun = Instant::now();
    assert_eq!(scene.read(2, NEEDS_BOTH), Ok(true));
    println!("the next one took {:.1?}", begun.elapsed());
    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    assert_eq!(scene.node.workers(), worker);
}
