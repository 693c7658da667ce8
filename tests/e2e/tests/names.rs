//! The registry has a name, and the name server fails, says that there is no such name, or gives another address.

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use millstream_e2e::caller::{Caller, lower};
use millstream_e2e::daemons::{Node, NodeOptions};
use millstream_e2e::image::{Image, shell};
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::names::{Answer, Names};
use millstream_e2e::need::Need;
use millstream_e2e::process::eventually;
use millstream_e2e::registry::free_address;
use millstream_e2e::spoil::{BlackHole, Spoiler};
use millstream_e2e::stage::{Pushed, Stage, await_decision, can_be_set};
use millstream_wire::millstream::v1::decision::Outcome;

/// Where the name server is.
const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(127, 83, 0, 53);
/// What the registry is called, and its addresses, one after the other.
const NAME: &str = "registry.test";
const FIRST: Ipv4Addr = Ipv4Addr::new(127, 83, 0, 1);
const SECOND: Ipv4Addr = Ipv4Addr::new(127, 83, 0, 2);
const SWALLOWS: Ipv4Addr = Ipv4Addr::new(127, 83, 0, 3);
const READ: Duration = Duration::from_secs(8);
const RECOVERY: Duration = Duration::from_secs(20);
const SIZE: usize = 200 << 10;
/// Layers with a file each: every read needs the registry, and every request a connection of its own, whose name is looked up.
const FILES: u32 = 7;

fn image() -> Image {
    let base = Image::new().layer(shell().unwrap(), Packing::Gzip);
    (0..FILES).fold(base, |image, file| {
        image.layer(vec![Entry::file(format!("f{file}"), noise(file + 1, SIZE))], Packing::Gzip)
    })
}

/// A node that knows the registry by its name. Fields end in their order.
struct Scene {
    node: Node,
    names: Names,
    first: Option<Spoiler>,
    stage: Stage,
    port: u16,
    dir: PathBuf,
}

impl Scene {
    fn set() -> Self {
        let mut stage = Stage::set().unwrap();
        let real = stage.registry().unwrap().address();
        let port = free_address().unwrap().port();
        let names = Names::start(NAME_SERVER).unwrap();
        names.set(NAME, Answer::Addresses(vec![FIRST]));
        let first = Spoiler::listen((FIRST, port).into(), real, 1).unwrap();
        let host = |certs_d: &std::path::Path, name: &str, url: String| {
            let dir = certs_d.join(format!("{name}:{port}"));
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join("hosts.toml"), format!("server = {url:?}\n")).unwrap();
        };
        let of_node = stage.work.dir("certs.d-of-node").unwrap();
        // The server has its own way.
        host(stage.certs_d(), NAME, format!("http://{real}"));
        for name in [NAME, "never.test"] {
            host(&of_node, name, format!("http://{name}:{port}"));
        }
        let image = Pushed { reference: format!("{NAME}:{port}/app:1"), ..stage.push("app", &image()).unwrap() };
        stage.import(&image).unwrap();
        let options = NodeOptions {
            hydration: false,
            read_deadline: READ,
            resolv_conf: Some(names.resolv_conf(&stage.work).unwrap()),
            ..NodeOptions::new(&stage.server_address(), &of_node)
        };
        let node = Node::start(&stage.work, &options).unwrap();
        let caller = Caller::connect(&node.socket()).unwrap();
        // The first decision of a node on a busy machine may be too slow; what it has begun goes on.
        let top = eventually("a lazy pull", RECOVERY, || caller.pull(&image).ok()).unwrap();
        await_decision(&node, &image, Outcome::Lazy, "").unwrap();
        let mounts = caller.prepare("reader", &top, HashMap::new()).unwrap();
        let dir = node.sees(&lower(&mounts).unwrap()).unwrap();
        // Nobody but the registry has the bytes.
        stage.kill_server().unwrap();
        Self { node, names, first: Some(first), stage, port, dir }
    }

    fn read(&self, file: u32) -> std::io::Result<()> {
        let bytes = std::fs::read(self.dir.join(format!("f{file}")))?;
        assert!(bytes == noise(file + 1, SIZE), "wrong bytes");
        Ok(())
    }

    /// A read for which the name was looked up.
    fn read_looking_up(&self, file: u32) {
        let before = self.names.asked(NAME);
        self.read(file).unwrap();
        assert!(self.names.asked(NAME) > before, "nobody asked for the name");
    }

    fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.node.log()).unwrap()).into_owned()
    }

    fn spoiler_at(&self, address: Ipv4Addr) -> Spoiler {
        Spoiler::listen((address, self.port).into(), self.stage.registry().unwrap().address(), 1).unwrap()
    }
}

#[test]
fn a_name_that_is_not_resolved_or_moves_costs_no_read() {
    if !can_be_set(&[Need::Program("unshare")]) {
        return;
    }
    const KEPT: &str = "its last addresses are used";
    let mut scene = Scene::set();
    scene.read_looking_up(0);
    assert!(!scene.log().contains(KEPT));

    // What was known last serves, whether there is no answer or a wrong one.
    for (file, answer) in [(1, Answer::Silence), (2, Answer::NoSuchName), (3, Answer::Addresses(Vec::new()))] {
        scene.names.set(NAME, answer);
        scene.read_looking_up(file);
    }
    assert!(scene.log().contains(KEPT));

    // The registry moves, and its name with it.
    scene.first = None;
    let second = scene.spoiler_at(SECOND);
    scene.names.set(NAME, Answer::Addresses(vec![SECOND]));
    scene.read_looking_up(4);
    assert!(!second.seen().is_empty(), "the new address was not used");

    // It has moved before its name has: the read fails with what was tried, and succeeds once the name is right.
    drop(second);
    let first = scene.spoiler_at(FIRST);
    let error = scene.read(5).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    let log = scene.log();
    let line = log.lines().find(|line| line.contains("a read failed with EIO")).unwrap();
    assert!(line.contains(NAME) && line.contains("source.unavailable"), "{line}");
    scene.names.set(NAME, Answer::Addresses(vec![FIRST]));
    eventually("the new address", RECOVERY, || scene.read(5).ok()).unwrap();

    // An old address that swallows everything is passed over for the new one.
    let hole: SocketAddr = (SWALLOWS, scene.port).into();
    let _hole = BlackHole::at(hole).unwrap();
    let before = first.seen().len();
    scene.names.set(NAME, Answer::Addresses(vec![SWALLOWS, FIRST]));
    scene.read_looking_up(6);
    assert!(first.seen().len() > before);
}

#[test]
fn a_name_that_was_never_resolved_is_named() {
    if !can_be_set(&[Need::Program("unshare")]) {
        return;
    }
    let scene = Scene::set();
    let caller = Caller::connect(&scene.node.socket()).unwrap();
    // A layer that is here already would need no registry.
    let other = Image::new().layer(vec![Entry::file("other", noise(100, SIZE))], Packing::Gzip);
    let image = scene.stage.push("other", &other).unwrap();
    let image = Pushed { reference: format!("never.test:{}/other:1", scene.port), ..image };
    assert!(caller.pull(&image).is_err(), "pulled from nowhere");
    await_decision(&scene.node, &image, Outcome::Deferred, "registry.unreachable").unwrap();
    let reasons = format!("{:?}", scene.node.explain(&image.reference).unwrap());
    assert!(reasons.contains("never.test cannot be resolved"), "{reasons}");
}
