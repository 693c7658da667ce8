//! Whatever the network does and whoever lies on it: right bytes or `EIO` within the bound, the next source is tried, and it is
//! counted, logged and explained. Afterwards the same read succeeds, with the same worker.

#![allow(clippy::unwrap_used, missing_docs)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use millstream_e2e::containerd::{Containerd, Version};
use millstream_e2e::cri::{ContainerSpec, Cri};
use millstream_e2e::daemons::{Node, NodeOptions, metrics_page, sample};
use millstream_e2e::image::{Image, shell};
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::liar::{Liar, Lie, Window};
use millstream_e2e::need::product;
use millstream_e2e::process::{eventually, output};
use millstream_e2e::registry::free_address;
use millstream_e2e::spoil::{BlackHole, OURS, Spoiler, Spoiling};
use millstream_e2e::stage::{CLI, Pushed, Stage, await_decision, can_be_set};
use millstream_wire::millstream::v1::decision::Outcome;
use tonic::Code;

/// `fetch.read_deadline` of the node under test.
const READ: Duration = Duration::from_secs(3);
/// What a read may take: the kernel asks a second time for the page that a failed read-ahead has not brought.
const BOUND: Duration = Duration::from_secs(2 * 3 + 4);
/// How long what is well again may take to be used again.
const RECOVERY: Duration = Duration::from_secs(20);
/// Bytes of one file: less than a span, so that a row needs one request.
const SIZE: usize = 200 << 10;
/// Bytes of a layer before what needs a window.
const BEFORE: usize = 1536 << 10;

/// What a reader gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Promise {
    /// The right bytes.
    Bytes,
    /// `EIO`.
    Error,
    /// One of both: chance decides which bytes are hit.
    Either,
}
use Promise::{Bytes, Either, Error};

/// One fault.
struct Row {
    name: &'static str,
    registry: Spoiling,
    /// How many requests it concerns; none: all.
    first: Option<u32>,
    server: Lie,
    promise: Promise,
    /// The code under which a failed attempt is counted and logged; empty: none fails.
    code: &'static str,
}

/// The registry is spoiled, and the server could help.
fn helped(name: &'static str, registry: Spoiling, code: &'static str) -> Row {
    Row { name, registry, first: None, server: Lie::None, promise: Bytes, code }
}

/// The registry is spoiled for so many requests, and nobody else has the bytes.
fn alone(name: &'static str, registry: Spoiling, first: Option<u32>, promise: Promise, code: &'static str) -> Row {
    Row { name, registry, first, server: Lie::Refuse(Code::NotFound), promise, code }
}

/// The registry refuses so many requests, and the server lies.
fn lied(name: &'static str, server: Lie, first: Option<u32>, promise: Promise, code: &'static str) -> Row {
    Row { name, registry: Spoiling::Status(500), first, server, promise, code }
}

/// The server gives wrong windows, and right content.
fn window(name: &'static str, how: Window, code: &'static str) -> Row {
    Row { name, registry: Spoiling::None, first: None, server: Lie::Window(how), promise: Bytes, code }
}

fn busy(status: u16, date: bool) -> Spoiling {
    Spoiling::Busy { status, after: Duration::from_secs(1), date }
}

fn signed(to: SocketAddr, life: Duration) -> Spoiling {
    Spoiling::Signed { to, life, mark: "signature".to_owned() }
}

fn rows(registry: SocketAddr, storage: SocketAddr, hole: SocketAddr) -> Vec<Row> {
    let redirect = |to: String| Spoiling::Redirect(to);
    let nobody = free_address().unwrap();
    vec![
        helped("no answer", Spoiling::Mute, "source.timed-out"),
        helped("stall", Spoiling::Stall(1000), "source.timed-out"),
        helped("slow loris", Spoiling::Slow(1), "source.timed-out"),
        helped("reset", Spoiling::Reset(1000), "source.unavailable"),
        helped("cut", Spoiling::Cut(1000), "source.unavailable"),
        helped("too short", Spoiling::Short(10), "source.unavailable"),
        helped("too long", Spoiling::Long(10), "source.malformed"),
        helped("other range", Spoiling::OtherRange, "source.malformed"),
        helped("forged range", Spoiling::ForgedRange, "source.digest-mismatch"),
        helped("multipart", Spoiling::Multipart, "source.malformed"),
        helped("content encoding", Spoiling::Gzip, "source.malformed"),
        helped("200 for a range", Spoiling::NoRange, "source.no-range"),
        helped("416", Spoiling::Status(416), "source.malformed"),
        helped("wrong bit", Spoiling::WrongByte, ""),
        helped("404", Spoiling::Status(404), "source.not-found"),
        helped("403", Spoiling::Status(403), "source.denied"),
        helped("401", Spoiling::Challenge("Negotiate".to_owned()), "source.unauthorized"),
        helped("500", Spoiling::Status(500), "source.unavailable"),
        helped("429", busy(429, false), "source.exhausted"),
        helped("503 until a date", busy(503, true), "source.unavailable"),
        helped("redirect loop", redirect(format!("http://{registry}{{path}}")), "source.malformed"),
        helped("redirect to the link", redirect("http://169.254.169.254/latest".to_owned()), "source.malformed"),
        helped("redirect to nobody", redirect(format!("http://{nobody}{{path}}")), "source.unavailable"),
        helped("redirect to a black hole", redirect(format!("http://{hole}{{path}}")), "source.timed-out"),
        alone("burst of 503", Spoiling::Status(503), Some(2), Bytes, "source.unavailable"),
        alone("two resets", Spoiling::Reset(1000), Some(2), Bytes, "source.unavailable"),
        alone("429 once", busy(429, false), Some(1), Bytes, "source.exhausted"),
        alone("503 once until a date", busy(503, true), Some(1), Bytes, "source.unavailable"),
        alone("one wrong range", Spoiling::OtherRange, Some(1), Bytes, "source.malformed"),
        alone("slow", Spoiling::Slow(400 << 10), None, Bytes, ""),
        alone("redirect to another port", redirect(format!("http://{storage}{{path}}")), None, Bytes, ""),
        alone(
            "redirect to another host",
            redirect(format!("http://localhost:{}{{path}}", storage.port())),
            None,
            Bytes,
            "",
        ),
        alone("signed address", signed(storage, Duration::from_secs(2)), None, Bytes, ""),
        alone("signed address, expired", signed(storage, Duration::ZERO), None, Error, "source.unavailable"),
        alone("no answer from anybody", Spoiling::Mute, None, Error, "source.timed-out"),
        alone("500 from anybody", Spoiling::Status(500), None, Error, "source.unavailable"),
        alone("deleted", Spoiling::Status(404), None, Error, "source.not-found"),
        alone("right withdrawn", Spoiling::Status(403), None, Error, "source.denied"),
        alone("lies only", Spoiling::ForgedRange, None, Error, "source.digest-mismatch"),
        alone("one bit wrong always", Spoiling::WrongByte, None, Either, ""),
        lied("server: wrong bit", Lie::WrongBit, Some(1), Bytes, "source.digest-mismatch"),
        lied("server: other place", Lie::OtherPlace, Some(1), Bytes, "source.digest-mismatch"),
        lied("server: other layer", Lie::OtherLayer, Some(1), Bytes, "source.digest-mismatch"),
        lied("server: short", Lie::Short, Some(1), Bytes, "source.malformed"),
        lied("server: long", Lie::Long, Some(1), Bytes, "source.malformed"),
        lied("server: endless", Lie::Endless, Some(1), Bytes, "source.timed-out"),
        lied("server: hangs", Lie::Hang, Some(1), Bytes, "source.timed-out"),
        lied("server: cut", Lie::Cut, Some(1), Bytes, "source.unavailable"),
        lied("server: lies, nobody else", Lie::WrongBit, None, Error, "source.digest-mismatch"),
        lied("server: unavailable, nobody else", Lie::Refuse(Code::Unavailable), None, Error, "source.unavailable"),
        window("windows: wrong bit", Window::WrongBit, "source.digest-mismatch"),
        window("windows: other layer", Window::OtherLayer, "source.digest-mismatch"),
        window("windows: short", Window::Short, "source.digest-mismatch"),
        window("windows: long", Window::Long, "source.malformed"),
        window("windows: garbage", Window::Garbage, "source.malformed"),
        window("windows: one too few", Window::Missing, "source.malformed"),
        window("windows: empty", Window::Empty, "source.digest-mismatch"),
        window("windows: none", Window::Hang, "source.timed-out"),
    ]
}

fn content(row: usize, file: u32) -> Vec<u8> {
    noise(u32::try_from(row).unwrap() * 2 + file + 1, SIZE)
}

/// A layer for each row, so that no row profits from what another one has fetched; with more than a span before its files where
/// the row is about windows.
fn image(windows: &[bool]) -> Image {
    let layers = windows.iter().enumerate().map(|(row, windows)| {
        let files =
            ["a", "b"].iter().zip(0..).map(|(name, file)| Entry::file(format!("r{row}/{name}"), content(row, file)));
        let before = windows.then(|| Entry::file(format!("r{row}/0"), noise(u32::try_from(row).unwrap(), BEFORE)));
        std::iter::once(Entry::directory(format!("r{row}"))).chain(before).chain(files).collect()
    });
    layers.fold(Image::new().layer(shell().unwrap(), Packing::Gzip), |image, layer| image.layer(layer, Packing::Gzip))
}

/// A lazy container whose files are read from outside.
struct Scene {
    // In the order in which they end: the stage's directory is the last.
    _cri: Cri,
    _containerd: Containerd,
    node: Node,
    liar: Liar,
    storage: Spoiler,
    stage: Stage,
    metrics: SocketAddr,
    root: PathBuf,
}

impl Scene {
    /// With a layer for each row; `true` where it is about windows.
    fn set(rows: &[bool]) -> Self {
        let mut stage = Stage::with_spoiled_nodes().unwrap();
        let pushed = stage.push_many("net", &[image(rows)]).unwrap().remove(0);
        stage.import(&pushed).unwrap();
        let liar = Liar::start(&stage.server_address()).unwrap();
        liar.layers(pushed.layers());
        let metrics = free_address().unwrap();
        let options = NodeOptions {
            server: liar.url(),
            hydration: false,
            read_deadline: READ,
            metrics: Some(metrics),
            ..stage.node_options()
        };
        let node = Node::start(&stage.work, &options).unwrap();
        let containerd = stage.containerd(Version::V1, &node, false).unwrap();
        let mut cri = stage.cri(&containerd).unwrap();
        cri.pull(&pushed.reference, None).unwrap();
        await_decision(&node, &pushed, Outcome::Lazy, "").unwrap();
        let pod = cri.run_pod("pod").unwrap();
        let command = &["/bin/sleep", "100000"];
        let spec = ContainerSpec { image: &pushed.reference, command, ..ContainerSpec::default() };
        let container = cri.create(&pod, "reader", &spec).unwrap();
        cri.start(&container).unwrap();
        let root = containerd.rootfs("k8s.io", &container.id);
        let storage = Spoiler::start(stage.registry().unwrap().address()).unwrap();
        stage.count_from_now().unwrap();
        Self { _cri: cri, _containerd: containerd, node, liar, storage, stage, metrics, root }
    }

    fn sample(&self, name: &str) -> u64 {
        sample(&metrics_page(self.metrics).unwrap(), name)
    }

    fn failures(&self, code: &str) -> u64 {
        self.sample(&format!("millstream_fetch_failures_total{{code=\"{code}\"}}"))
    }

    /// What the node has logged since it had logged so many bytes.
    fn logged(&self, since: usize) -> (String, usize) {
        let log = std::fs::read(self.node.log()).unwrap();
        (String::from_utf8_lossy(&log[since.min(log.len())..]).into_owned(), log.len())
    }

    /// Plays one row; says what is wrong with it.
    fn play(&self, at: usize, row: &Row) -> Result<Duration, String> {
        let spoiler = self.stage.spoiler().unwrap();
        let worker = self.node.workers();
        let (failures, failed) = (self.failures(row.code), self.sample("millstream_reads_total{result=\"failed\"}"));
        let content_before = self.sample("millstream_source_requests_total{source=\"content\",code=\"\"}");
        let (_, logged) = self.logged(0);
        self.liar.set(row.server);
        spoiler.set_first(OURS, row.first, row.registry.clone());

        let file = self.root.join(format!("r{at}/a"));
        let begun = Instant::now();
        let got = std::fs::read(&file);
        let took = begun.elapsed();
        let right = match &got {
            Ok(bytes) if *bytes != content(at, 0) => return Err("wrong bytes".to_owned()),
            Ok(_) => true,
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => false,
            Err(error) => return Err(format!("{error}")),
        };
        let check = |holds: bool, what: &str| {
            if holds { Ok(()) } else { Err(format!("{what}; read: {}, {took:?}", if right { "right" } else { "EIO" })) }
        };
        check(row.promise == Either || right == (row.promise == Bytes), "not as promised")?;
        check(took < BOUND, "too late")?;
        let (log, _) = self.logged(logged);
        if !row.code.is_empty() {
            check(self.failures(row.code) > failures, "not counted")?;
            check(log.contains(row.code), "not logged")?;
            check(guide().contains(&format!("`{}`", row.code)), "not in TROUBLESHOOTING")?;
        }
        if !right {
            check(self.sample("millstream_reads_total{result=\"failed\"}") > failed, "failed read not counted")?;
            let line = log.lines().find(|line| line.contains("a read failed with EIO")).unwrap_or_default();
            check(line.contains(&format!("r{at}/a")) && line.contains("source."), "no line about the read")?;
        }
        let about_windows = matches!(row.server, Lie::Window(_));
        if (row.server == Lie::None || about_windows) && !row.code.is_empty() {
            let content = self.sample("millstream_source_requests_total{source=\"content\",code=\"\"}");
            check(content > content_before, "the next source was not asked")?;
        }
        if !matches!(row.server, Lie::None) {
            // Where the registry's own fault happens not to meet what is read, nobody else is asked.
            check(self.liar.lied() > 0 || (right && !about_windows), "nobody lied")?;
        }
        self.status()?;
        self.recover(at, about_windows)?;
        check(self.node.workers() == worker, "another worker")?;
        Ok(took)
    }

    /// A person can ask while it lasts.
    fn status(&self) -> Result<(), String> {
        let mut command = Command::new(product(CLI).unwrap());
        command.args(["status", "--socket"]).arg(self.node.socket());
        output(&mut command).map(drop).map_err(|error| format!("status: {error:#}"))
    }

    /// Takes the fault away: the same file, and another one that only the registry gives, or it with the server's windows, are
    /// right.
    fn recover(&self, at: usize, about_windows: bool) -> Result<(), String> {
        self.stage.spoiler().unwrap().set(Spoiling::None);
        self.liar.set(if about_windows { Lie::None } else { Lie::Refuse(Code::NotFound) });
        for (name, file) in [("a", 0), ("b", 1)] {
            let path = self.root.join(format!("r{at}/{name}"));
            let found = eventually("a read after the fault", RECOVERY, || std::fs::read(&path).ok());
            if found.map_err(|error| format!("{error:#}"))? != content(at, file) {
                return Err("wrong bytes after the fault".to_owned());
            }
        }
        self.liar.set(Lie::None);
        Ok(())
    }
}

fn guide() -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crates/node/TROUBLESHOOTING.md");
    std::fs::read_to_string(file).unwrap()
}

#[test]
fn readers_get_right_bytes_or_an_error_in_time_whatever_the_network_does() {
    if !can_be_set(&[]) {
        return;
    }
    let hole = BlackHole::open().unwrap();
    let windows = |row: &Row| matches!(row.server, Lie::Window(_));
    let layers: Vec<bool> = rows(hole.address, hole.address, hole.address).iter().map(windows).collect();
    let scene = Scene::set(&layers);
    let rows = rows(scene.stage.spoiler().unwrap().address(), scene.storage.address(), hole.address);
    let mut wrong = Vec::new();
    for (at, row) in rows.iter().enumerate() {
        match scene.play(at, row) {
            Ok(took) => println!("{:<34} {:?} {took:.1?}", row.name, row.promise),
            Err(error) => {
                println!("{:<34} {error}", row.name);
                wrong.push(format!("{}: {error}", row.name));
                scene.recover(at, layers[at]).ok();
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {} rows:\n{}", wrong.len(), rows.len(), wrong.join("\n"));
    assert_eq!(scene.sample("millstream_worker_restarts_total"), 0);
}

#[test]
fn a_server_that_is_killed_and_started_again_costs_time_and_no_byte() {
    if !can_be_set(&[]) {
        return;
    }
    let mut scene = Scene::set(&[false; 2]);
    scene.stage.spoiler().unwrap().set_for(OURS, Spoiling::Status(500));
    let worker = scene.node.workers();
    for at in 0..2 {
        let file = scene.root.join(format!("r{at}/a"));
        let (begun, reader) =
            (Instant::now(), std::thread::spawn(move || eventually("a read", RECOVERY, || std::fs::read(&file).ok())));
        scene.stage.kill_server().unwrap();
        scene.stage.start_server().unwrap();
        assert_eq!(reader.join().unwrap().unwrap(), content(at, 0));
        println!("server killed in mid-read: {:.1?}", begun.elapsed());
    }
    assert_eq!(scene.node.workers(), worker);
}

/// What a pull meets that only this project's programs see; containerd itself is served well.
fn pulls(registry: SocketAddr) -> Vec<(&'static str, Spoiling, Lie, Outcome, &'static str)> {
    let spoiled = |name, spoiling, code| (name, spoiling, Lie::None, Outcome::Deferred, code);
    let lied = |name, lie, code| (name, Spoiling::None, lie, Outcome::Deferred, code);
    vec![
        ("nothing", Spoiling::None, Lie::None, Outcome::Lazy, ""),
        spoiled("no answer", Spoiling::Mute, "registry.slow"),
        spoiled("stall", Spoiling::Stall(0), "registry.slow"),
        spoiled("reset", Spoiling::Reset(0), "registry.unreachable"),
        spoiled("cut", Spoiling::Cut(0), "registry.unreachable"),
        spoiled("200 for a range", Spoiling::NoRange, "registry.no-range"),
        spoiled("too long", Spoiling::Long(1), "registry.malformed"),
        spoiled("multipart", Spoiling::Multipart, "registry.malformed"),
        spoiled("content encoding", Spoiling::Gzip, "registry.malformed"),
        spoiled("416", Spoiling::Status(416), "registry.malformed"),
        spoiled("404", Spoiling::Status(404), "registry.not-found"),
        spoiled("403", Spoiling::Status(403), "registry.denied"),
        spoiled("401", Spoiling::Challenge("Negotiate".to_owned()), "registry.unauthorized"),
        spoiled("500", Spoiling::Status(500), "registry.unreachable"),
        spoiled("429", busy(429, false), "registry.rate-limited"),
        spoiled("503", busy(503, true), "registry.unreachable"),
        spoiled("redirect loop", Spoiling::Redirect(format!("http://{registry}{{path}}")), "registry.malformed"),
        spoiled("redirect to the link", Spoiling::Redirect("http://169.254.169.254/".to_owned()), "registry.malformed"),
        lied("server: hangs", Lie::Hang, "server.slow"),
        lied("server: unavailable", Lie::Refuse(Code::Unavailable), "server.unreachable"),
        lied("server: other table", Lie::OtherTable, "server.malformed"),
        lied("server: stale table", Lie::StaleTable, "image.mismatch"),
    ]
}

#[test]
fn a_pull_is_never_made_to_fail_or_to_hang_by_the_network() {
    if !can_be_set(&[]) {
        return;
    }
    let mut stage = Stage::with_spoiled_nodes().unwrap();
    let liar = Liar::start(&stage.server_address()).unwrap();
    let options = NodeOptions { server: liar.url(), hydration: false, ..stage.node_options() };
    let node = Node::start(&stage.work, &options).unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let cri = stage.cri(&containerd).unwrap();
    let mut wrong = Vec::new();
    for (at, (name, spoiling, lie, outcome, code)) in pulls(stage.spoiler().unwrap().address()).into_iter().enumerate()
    {
        let image = pullable(&stage, at);
        stage.count_from_now().unwrap();
        stage.spoiler().unwrap().set_for(OURS, spoiling);
        liar.set(lie);
        let took = cri.pull(&image.reference, None);
        stage.spoiler().unwrap().set(Spoiling::None);
        liar.set(Lie::None);
        let decided = await_decision(&node, &image, outcome, code);
        let explained = code.is_empty() || guide().contains(&format!("`{code}`"));
        println!("{name:<24} {took:.1?} {code}");
        match (took, decided) {
            // The decision's deadline of a second, and a busy machine's own time.
            (Ok(took), Ok(())) if took < Duration::from_secs(1 + 5) && explained => {}
            (took, decided) => wrong.push(format!("{name}: {took:?} {decided:?} {explained}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A small image of two layers in a repository of its own: what a row has learnt of a host is for that repository.
fn pullable(stage: &Stage, at: usize) -> Pushed {
    let file = |name: &str| vec![Entry::file(name, content(at, 0).split_off(SIZE - 5000))];
    let image = Image::new().layer(file("one"), Packing::Gzip).layer(file("two"), Packing::Gzip);
    let image = stage.push_many(&format!("p{at}"), &[image]).unwrap().remove(0);
    stage.import(&image).unwrap();
    image
}
