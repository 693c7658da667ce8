//! A real server that imports on demand, and callers who would like it to reach what only it can reach: its own machine, its link,
//! its private networks. It says no, the user learns why, and nobody there is visited.

#![allow(clippy::unwrap_used, missing_docs)]

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use millstream_e2e::caller::Caller;
use millstream_e2e::daemons::{Node, NodeOptions, Server, ServerOptions, metrics_page, sample};
use millstream_e2e::image::Image;
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::link::{FAR, Link, LinkOptions};
use millstream_e2e::names::{Answer, Names, asking};
use millstream_e2e::need::Need;
use millstream_e2e::process::{eventually, pause};
use millstream_e2e::registry::{Registry, RegistryOptions, Tls, free_address};
use millstream_e2e::spoil::{OURS, Spoiler, Spoiling};
use millstream_e2e::stage::{Pushed, await_decision, can_be_set};
use millstream_e2e::workdir::Workdir;
use millstream_wire::millstream::v1::decision::Outcome;

/// The port of everybody in the server's network.
const PORT: u16 = 5000;
/// Where the server finds those who must not be visited.
const LOOPBACK: Ipv4Addr = Ipv4Addr::LOCALHOST;
const LINK_LOCAL: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 7);
/// An address like any in the Internet, of a registry that means no good; it is in the server's network as well.
const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 5);
const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 53);
/// Bytes of an image's one file.
const SIZE: usize = 100 << 10;
const RECOVERY: Duration = Duration::from_secs(20);

/// One attempt: the registry that is named, what it answers, the code of the decision, and a part of the reason.
struct Row {
    registry: &'static str,
    answer: Spoiling,
    code: &'static str,
    reason: &'static str,
}

fn named(registry: &'static str, code: &'static str, reason: &'static str) -> Row {
    Row { registry, answer: Spoiling::None, code, reason }
}

fn redirect(to: &str, code: &'static str, reason: &'static str) -> Row {
    Row { registry: "public.test:5000", answer: Spoiling::Redirect(to.to_owned()), code, reason }
}

fn realm(realm: &str, code: &'static str, reason: &'static str) -> Row {
    let challenge = format!("Bearer realm=\"{realm}\",service=\"registry\"");
    Row { registry: "public.test:5000", answer: Spoiling::Challenge(challenge), code, reason }
}

fn rows() -> Vec<Row> {
    const DENIED: &str = "server.denied";
    const INSIDE: &str = "is in a private network; hint: registry.private";
    const NOT_SERVED: &str = "does not serve images of registry";
    const REDIRECTS: &str = "redirects to this machine or its link";
    const TOKENS: &str = "names a token server at an address of this machine or its networks";
    vec![
        named("127.0.0.1:5000", DENIED, NOT_SERVED),
        named("localhost:5000", DENIED, NOT_SERVED),
        named("127.1:5000", DENIED, NOT_SERVED),
        named("169.254.169.254:5000", DENIED, INSIDE),
        named("10.99.0.7:5000", DENIED, INSIDE),
        named("loopback.test:5000", DENIED, INSIDE),
        named("link.test:5000", DENIED, INSIDE),
        named("private.test:5000", DENIED, INSIDE),
        redirect("http://127.0.0.1:5000{path}", "server.malformed", REDIRECTS),
        redirect("http://169.254.169.254:5000{path}", "server.malformed", REDIRECTS),
        redirect("http://10.99.0.7:5000{path}", DENIED, INSIDE),
        redirect("http://loopback.test:5000{path}", DENIED, INSIDE),
        redirect("http://private.test:5000{path}", DENIED, INSIDE),
        realm("http://127.0.0.1:5000/token", DENIED, TOKENS),
        realm("http://169.254.169.254:5000/token", DENIED, TOKENS),
        realm("http://10.99.0.7:5000/token", DENIED, TOKENS),
        realm("http://private.test:5000/token", DENIED, INSIDE),
    ]
}

/// Somebody who counts his visitors; they are turned away at once.
struct Host {
    visitors: Arc<AtomicUsize>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Host {
    /// In the network of the caller.
    fn at(address: Ipv4Addr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((address, PORT))?;
        listener.set_nonblocking(true)?;
        let (visitors, ended) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let thread = std::thread::spawn({
            let (visitors, ended) = (Arc::clone(&visitors), Arc::clone(&ended));
            move || {
                while !ended.load(Ordering::Relaxed) {
                    match listener.accept() {
                        Ok(_) => drop(visitors.fetch_add(1, Ordering::Relaxed)),
                        Err(_) => pause(),
                    }
                }
            }
        });
        Ok(Self { visitors, ended, thread: Some(thread) })
    }

    fn visitors(&self) -> usize {
        self.visitors.load(Ordering::Relaxed)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
    }
}

/// Server and hosts in a network of their own, a node outside of it. Fields end in their order.
struct Scene {
    caller: Caller,
    node: Node,
    _server: Server,
    /// The registry that means no good.
    public: Spoiler,
    hosts: Vec<Host>,
    names: Names,
    registry: Registry,
    link: Link,
    metrics: SocketAddr,
    /// One that nobody ever gets, and two to be had: of what a node has a layer of it asks nobody any more.
    images: [Pushed; 3],
    work: Workdir,
}

fn write_host(certs_d: &Path, name: &str, url: &str) {
    let dir = certs_d.join(name);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("hosts.toml"), format!("server = {url:?}\n")).unwrap();
}

impl Scene {
    /// With an image that stands in as many repositories, `app0`, `app1`, ...
    fn set(repositories: usize) -> Self {
        let work = Workdir::new().unwrap();
        let layout = work.dir("layout").unwrap();
        let images = [0, 1, 2].map(|seed| {
            let image = Image::new().layer(vec![Entry::file("file", noise(seed + 1, SIZE))], Packing::Gzip);
            let info = image.write(&layout, &format!("app{seed}")).unwrap();
            Pushed { reference: String::new(), info }
        });
        let manifests = images.each_ref().map(|image| image.info.manifest.as_str());
        let link = Link::up(&work, LinkOptions::default()).unwrap();
        for address in [LINK_LOCAL, PRIVATE, PUBLIC] {
            link.add_address(address.into()).unwrap();
        }
        let options = RegistryOptions { address: (FAR, PORT).into(), tls: None, login: None };
        let registry = Registry::start_behind(&work, options.clone(), options.address, &link).unwrap();
        for repository in 0..repositories {
            registry.place(&layout, &format!("app{repository}"), &manifests).unwrap();
        }
        let hosts = [LOOPBACK, LINK_LOCAL, PRIVATE].map(|address| link.within(move || Host::at(address)).unwrap());
        let public = link.within(|| Spoiler::listen((PUBLIC, PORT).into(), (FAR, PORT).into(), 1)).unwrap();
        public.spoil_manifests(true);
        let names = link.within(|| Names::start(NAME_SERVER)).unwrap();
        for (name, address) in
            [("public.test", PUBLIC), ("loopback.test", LOOPBACK), ("link.test", LINK_LOCAL), ("private.test", PRIVATE)]
        {
            names.set(name, Answer::Addresses(vec![address]));
        }

        let of_server = work.dir("certs.d-of-server").unwrap();
        registry.write_hosts(&of_server).unwrap();
        write_host(&of_server, "public.test:5000", "http://public.test:5000");
        let tls = Tls::generate(&work.dir("tls").unwrap(), &[&FAR.to_string()]).unwrap();
        let options = ServerOptions {
            address: (FAR, 7900).into(),
            tls: Some(tls.clone()),
            certs_d: of_server,
            import_on_demand: true,
            packed_content: true,
            max_entries: None,
        };
        let resolv_conf = names.resolv_conf(&work).unwrap();
        let server = Server::start_as(&work, &options, |program| {
            let inner = asking(&resolv_conf, program);
            let mut command = link.command(Path::new(inner.get_program()));
            command.args(inner.get_args());
            command
        })
        .unwrap();

        let metrics = free_address().unwrap();
        let options = NodeOptions {
            ca: Some(tls.ca),
            hydration: false,
            metrics: Some(metrics),
            ..NodeOptions::new(&format!("https://{FAR}:7900"), &work.dir("certs.d").unwrap())
        };
        let node = Node::start(&work, &options).unwrap();
        let caller = Caller::connect(&node.socket()).unwrap();
        let hosts = hosts.into();
        Self { caller, node, _server: server, public, hosts, names, registry, link, metrics, images, work }
    }

    /// Has the node pull the image by this registry and repository. Whoever runs the node sees a good registry there: he has
    /// said in his own `hosts.toml` where it is.
    fn pull(&self, registry: &str, repository: usize) -> (Pushed, anyhow::Result<String>) {
        self.pull_this(&self.images[0], registry, repository)
    }

    fn pull_this(&self, image: &Pushed, registry: &str, repository: usize) -> (Pushed, anyhow::Result<String>) {
        write_host(&self.work.path().join("certs.d"), registry, &format!("http://{}", self.registry.host()));
        let reference = format!("{registry}/app{repository}@{}", image.info.manifest);
        let image = Pushed { reference, ..image.clone() };
        let pulled = self.caller.pull(&image);
        (image, pulled)
    }

    /// The reason that `millstream explain` shows.
    fn reason(&self, image: &Pushed) -> String {
        let decisions = self.node.explain(&image.reference).unwrap().decisions;
        decisions.first().map(|decision| decision.reason.clone()).unwrap_or_default()
    }

    fn play(&self, repository: usize, row: &Row) -> Result<(), String> {
        let decisions = format!("millstream_layer_decisions_total{{outcome=\"deferred\",code=\"{}\"}}", row.code);
        let counted = || sample(&metrics_page(self.metrics).unwrap(), &decisions);
        let before = counted();
        self.public.set_for(OURS, row.answer.clone());
        let (image, pulled) = self.pull(row.registry, repository);
        if pulled.is_ok() {
            return Err("it was served".to_owned());
        }
        await_decision(&self.node, &image, Outcome::Deferred, row.code).map_err(|error| format!("{error:#}"))?;
        let reason = self.reason(&image);
        println!("{} {:?}: {reason}", row.registry, row.answer);
        if !reason.contains(row.reason) {
            return Err(format!("the reason is {reason:?}"));
        }
        if counted() <= before {
            return Err("not counted".to_owned());
        }
        let visitors: usize = self.hosts.iter().map(Host::visitors).sum();
        if visitors > 0 {
            return Err(format!("{visitors} visits where nobody may go"));
        }
        Ok(())
    }

    /// Pulls until the server has imported the image.
    fn is_served(&self, image: &Pushed, registry: &str, repository: usize) -> anyhow::Result<()> {
        eventually(registry, RECOVERY, || self.pull_this(image, registry, repository).1.ok()).map(drop)
    }
}

#[test]
fn a_server_is_not_led_to_what_only_it_can_reach() {
    if !can_be_set(&[Need::Program("unshare")]) {
        return;
    }
    let rows = rows();
    let scene = Scene::set(rows.len() + 5);
    let turns = rows.len();
    // What is not inward is served, on demand. First of all: the first decision of a node on a busy machine may be too slow.
    scene.is_served(&scene.images[1], &scene.registry.host(), turns).unwrap();
    let wrong: Vec<String> = rows
        .iter()
        .enumerate()
        .filter_map(|(at, row)| {
            let error = scene.play(at, row).err()?;
            Some(format!("{} {:?}: {error}", row.registry, row.answer))
        })
        .collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), rows.len(), wrong.join("\n"));

    // A name that is public while it is judged and private afterwards: whoever connects does not ask again, and who asks again
    // judges again.
    scene.names.set("rebind.test", Answer::InTurn(vec![PUBLIC, PRIVATE]));
    let (image, pulled) = scene.pull("rebind.test:5000", turns + 1);
    // There is nobody at the public address who speaks TLS; and whichever of the node's questions comes second is led inward.
    assert!(pulled.is_err(), "{}", scene.reason(&image));
    let (image, pulled) = scene.pull("rebind.test:5000", turns + 2);
    assert!(pulled.is_err() && scene.reason(&image).contains("private network"), "{}", scene.reason(&image));
    // Of two addresses the private one is left out.
    scene.names.set("both.test", Answer::Addresses(vec![PRIVATE, PUBLIC]));
    assert!(scene.pull("both.test:5000", turns + 3).1.is_err());
    assert!(scene.names.asked("rebind.test") > 1 && scene.names.asked("both.test") > 0);
    assert_eq!(scene.hosts.iter().map(Host::visitors).collect::<Vec<_>>(), [0, 0, 0]);

    // The same registry is served when it does not lead inward, and the hosts do count their visitors.
    scene.public.set(Spoiling::None);
    scene.is_served(&scene.images[2], "public.test:5000", turns + 4).unwrap();
    for address in [LOOPBACK, LINK_LOCAL, PRIVATE] {
        let address = SocketAddr::from((IpAddr::from(address), PORT));
        scene.link.within(move || Ok(TcpStream::connect(address)?)).unwrap();
    }
    let all = || scene.hosts.iter().all(|host| host.visitors() == 1).then_some(());
    eventually("three visits", RECOVERY, all).unwrap();
}
