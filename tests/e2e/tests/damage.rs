//! Whatever is damaged below the root while the daemon is away: it starts, with registry and server down and no credentials; all
//! the rest works; what is damaged is named; and it is whole again soon after its source came back.

#![allow(clippy::unwrap_used, missing_docs)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use millstream_e2e::containerd::{Containerd, MILLSTREAM, Version};
use millstream_e2e::daemons::{Node, NodeOptions};
use millstream_e2e::image::{Image, shell};
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::need::product;
use millstream_e2e::process::{eventually, output};
use millstream_e2e::registry::{Login, free_address};
use millstream_e2e::stage::{CLI, Pushed, Stage, await_verified, can_be_set};
use redb::{Database, ReadableTable, TableDefinition};

const DEADLINE: Duration = Duration::from_secs(60);
/// Damage is mended this soon after its source came back.
const MENDED: Duration = Duration::from_secs(45);
const ALL: &str = "find /bin /data -type f | sort | xargs cat | sha256sum";

/// What a damage is done to.
struct Place {
    root: PathBuf,
    /// Directory of the upper layer of the image that is wholly local.
    verified: PathBuf,
    /// The same of the image that is not.
    lazy: PathBuf,
}

impl Place {
    /// The only file below `dir` of this name, or the first.
    fn first(&self, dir: &str) -> PathBuf {
        let mut all: Vec<_> = fs::read_dir(self.root.join(dir)).unwrap().map(|entry| entry.unwrap().path()).collect();
        all.sort();
        all.swap_remove(0)
    }

    fn file(&self, wanted: Target) -> PathBuf {
        match wanted {
            Target::Verified(name) => self.verified.join(name),
            Target::Lazy(name) => self.lazy.join(name),
            Target::View => self.first("views"),
            Target::Database => self.root.join("state.redb"),
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Target {
    Verified(&'static str),
    Lazy(&'static str),
    View,
    Database,
}

#[derive(Debug, Clone, Copy)]
enum Harm {
    Gone,
    Half,
    Empty,
    Flipped,
    Directory,
    Unreadable,
    /// 4 KiB of garbage at this part of its length, in percent.
    Torn(u64),
}

const HARMS: [Harm; 6] = [Harm::Gone, Harm::Half, Harm::Empty, Harm::Flipped, Harm::Directory, Harm::Unreadable];

fn harm(file: &Path, how: Harm) {
    let open = || File::options().read(true).write(true).open(file).unwrap();
    let len = fs::metadata(file).map_or(0, |found| found.len());
    let remove = || fs::remove_file(file).unwrap();
    match how {
        Harm::Gone => remove(),
        Harm::Half => open().set_len(len / 2).unwrap(),
        Harm::Empty => open().set_len(0).unwrap(),
        Harm::Flipped => {
            let mut byte = [0];
            open().read_exact_at(&mut byte, len / 2).unwrap();
            open().write_all_at(&[byte[0] ^ 4], len / 2).unwrap();
        }
        Harm::Directory => {
            remove();
            fs::create_dir(file).unwrap();
            fs::write(file.join("something"), "else").unwrap();
        }
        // Root may read everything; nobody can follow this.
        Harm::Unreadable => {
            remove();
            std::os::unix::fs::symlink(file, file).unwrap();
        }
        Harm::Torn(percent) => {
            let last = len.saturating_sub(4096) / 4096;
            open().write_all_at(&noise(7, 4096), last * percent / 100 * 4096).unwrap();
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Touched {
    Nothing,
    Verified,
    Lazy,
    Ordinary,
}

struct Case {
    name: String,
    damage: Box<dyn Fn(&Place)>,
    touched: Touched,
    /// Code that names it.
    code: &'static str,
    /// Whether it is named for as long as this worker lives, or until somebody acts.
    stays: bool,
}

fn case(file: Target, how: Harm, touched: Touched, code: &'static str) -> Case {
    let damage = Box::new(move |place: &Place| harm(&place.file(file), how));
    Case { name: format!("{file:?} {how:?}"), damage, touched, code, stays: false }
}

const LAYER: &str = "store.layer-damaged";
const CONTENT: &str = "store.content-lost";
const VIEW: &str = "store.view-damaged";
const CHUNKS: &str = "store.chunks-damaged";
const RESTORED: &str = "store.database-restored";

/// One for each way in which something is mended.
fn some_cases() -> Vec<Case> {
    vec![
        case(Target::Verified("toc"), Harm::Flipped, Touched::Verified, LAYER),
        case(Target::Verified("data"), Harm::Half, Touched::Verified, CONTENT),
        case(Target::Lazy("present"), Harm::Flipped, Touched::Lazy, CONTENT),
        case(Target::View, Harm::Gone, Touched::Nothing, VIEW),
        Case { stays: true, ..case(Target::Database, Harm::Torn(0), Touched::Nothing, RESTORED) },
        garbage_record(),
        strange_files(),
    ]
}

fn all_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for how in HARMS {
        cases.push(case(Target::Verified("toc"), how, Touched::Verified, LAYER));
        cases.push(case(Target::Lazy("toc"), how, Touched::Lazy, LAYER));
        cases.push(case(Target::Lazy("present"), how, Touched::Lazy, CONTENT));
        cases.push(case(Target::View, how, Touched::Nothing, VIEW));
        // Flipped content is found by `millstream check`, and has a test of its own.
        if !matches!(how, Harm::Flipped) {
            cases.push(case(Target::Verified("data"), how, Touched::Verified, CONTENT));
            cases.push(case(Target::Lazy("data"), how, Touched::Lazy, CONTENT));
        }
    }
    let database = [Harm::Gone, Harm::Half, Harm::Empty, Harm::Directory, Harm::Unreadable, Harm::Torn(0)];
    for how in database {
        cases.push(Case { stays: true, ..case(Target::Database, how, Touched::Nothing, RESTORED) });
    }
    // A page that nothing uses may have been hit: then there is nothing to say.
    for percent in [50, 100] {
        cases.push(case(Target::Database, Harm::Torn(percent), Touched::Nothing, ""));
    }
    cases.push(garbage_record());
    cases.push(Case {
        name: "the directory of a layer is gone".to_owned(),
        damage: Box::new(|place| fs::remove_dir_all(&place.verified).unwrap()),
        touched: Touched::Verified,
        code: LAYER,
        stays: false,
    });
    cases.push(Case {
        name: "the directory of an ordinary snapshot is gone".to_owned(),
        damage: Box::new(|place| fs::remove_dir_all(place.first("s")).unwrap()),
        touched: Touched::Ordinary,
        code: "store.snapshot-damaged",
        stays: true,
    });
    cases.push(strange_files());
    cases
}

fn strange_files() -> Case {
    Case {
        name: "strange files".to_owned(),
        damage: Box::new(|place| {
            for dir in ["", "layers", "views", "s", "trash", "server"] {
                let dir = place.root.join(dir);
                fs::create_dir_all(dir.join("a strange\ndirectory/deep")).unwrap();
                fs::write(dir.join("7f"), "strange").unwrap();
                std::os::unix::fs::symlink("nowhere", dir.join("link")).unwrap();
            }
            fs::remove_file(place.verified.join("keys")).ok();
            fs::create_dir_all(place.verified.join("keys")).unwrap();
            fs::write(place.verified.join("present"), "strange").unwrap();
        }),
        touched: Touched::Nothing,
        code: "",
        stays: false,
    }
}

fn garbage_record() -> Case {
    Case {
        name: "the record of an image is garbage".to_owned(),
        damage: Box::new(|place| {
            const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("node_images");
            let db = Database::open(place.root.join("state.redb")).unwrap();
            let write = db.begin_write().unwrap();
            {
                let mut images = write.open_table(IMAGES).unwrap();
                let names: Vec<String> = images.iter().unwrap().map(|row| row.unwrap().0.value().to_owned()).collect();
                let lazy = names.iter().find(|name| name.contains("/lazy@")).unwrap();
                images.insert(lazy.as_str(), b"garbage".as_slice()).unwrap();
            }
            write.commit().unwrap();
        }),
        touched: Touched::Lazy,
        code: "store.image-damaged",
        stays: false,
    }
}

fn image(name: &str, seed: u32) -> Image {
    let mut own = shell().unwrap();
    own.push(Entry::file("bin/whose", name));
    let data = vec![
        Entry::directory("data"),
        Entry::file("data/name", name),
        Entry::file("data/large", noise(seed, 3 << 20)),
        Entry::symlink("data/link", "name"),
    ];
    Image::new().layer(own, Packing::Gzip).layer(data, Packing::Gzip)
}

fn login() -> Login {
    Login { user: "ada".to_owned(), password: "secret".to_owned() }
}

struct World {
    stage: Stage,
    node: Node,
    containerd: Containerd,
    /// Verified, lazy, ordinary.
    images: [Pushed; 3],
    sums: [String; 3],
    credentials: PathBuf,
    metrics: String,
    /// The root as it was when all was well.
    saved: PathBuf,
    runs: usize,
}

const KINDS: [Touched; 3] = [Touched::Verified, Touched::Lazy, Touched::Ordinary];

impl World {
    fn new() -> Self {
        let stage = Stage::with_login(&login()).unwrap();
        let verified = stage.publish("verified", &image("verified", 1)).unwrap();
        let lazy = stage.publish("lazy", &image("lazy", 2)).unwrap();
        let ordinary = stage.push("ordinary", &image("ordinary", 3)).unwrap();
        let credentials = stage.work.path().join("config.json");
        let host = verified.reference.split('/').next().unwrap();
        let Login { user, password } = login();
        let auth = serde_json::json!({ "auths": { host: { "username": user, "password": password } } });
        fs::write(&credentials, auth.to_string()).unwrap();
        let options = NodeOptions {
            docker_config: Some(credentials.clone()),
            hydration: false,
            read_deadline: Duration::from_secs(5),
            ..stage.node_options()
        };
        let node = Node::start(&stage.work, &options).unwrap();
        let metrics = free_address().unwrap().to_string();
        let settings = fs::read_to_string(node.config()).unwrap();
        fs::write(node.config(), format!("{settings}\n[metrics]\nlisten = {metrics:?}\n")).unwrap();
        let containerd = stage.containerd(Version::V1, &node, false).unwrap();
        let cri = stage.cri(&containerd).unwrap();
        cri.pull(&verified.reference, Some(&login())).unwrap();
        node.set_hydration(true).unwrap();
        await_verified(&node, &verified).unwrap();
        node.set_hydration(false).unwrap();
        for image in [&lazy, &ordinary] {
            cri.pull(&image.reference, Some(&login())).unwrap();
        }
        drop(cri);
        let saved = stage.work.path().join("saved");
        let images = [verified, lazy, ordinary];
        let mut world =
            Self { stage, node, containerd, images, sums: Default::default(), credentials, metrics, saved, runs: 0 };
        // Of the lazy image some content is local, and some is not.
        for image in 0..3 {
            assert_eq!(world.run(image, "cat /data/name").unwrap(), ["verified", "lazy", "ordinary"][image]);
        }
        for image in [0, 2] {
            world.sums[image] = world.run(image, ALL).unwrap();
        }
        world.node.stop().unwrap();
        let (root, saved) = (world.node.root(), &world.saved);
        output(Command::new("cp").args(["-a", "--sparse=always"]).arg(root).arg(saved)).unwrap();
        world
    }

    fn run(&mut self, image: usize, script: &str) -> anyhow::Result<String> {
        self.runs += 1;
        let id = format!("run-{}", self.runs);
        let cgroup = format!("{}/{id}", self.stage.work.cgroup());
        let reference = &self.images[image].reference;
        let arguments = ["run", "--rm", "--net-host", "--cgroup", &cgroup, "--snapshotter", MILLSTREAM, reference, &id];
        let arguments: Vec<&str> = arguments.into_iter().chain(["/bin/sh", "-c", script]).collect();
        let said = self.containerd.ctr("k8s.io", &arguments);
        if said.is_err() {
            for what in [vec!["task", "delete", "--force"], vec!["container", "delete"]] {
                self.containerd.ctr("k8s.io", &what.into_iter().chain([id.as_str()]).collect::<Vec<_>>()).ok();
            }
            self.containerd.ctr("k8s.io", &["snapshot", "--snapshotter", MILLSTREAM, "rm", &id]).ok();
        }
        let said = said?;
        // On a busy machine ctr may leave before the last output of a short container has come.
        anyhow::ensure!(!said.is_empty(), "it said nothing");
        Ok(said)
    }

    fn place(&self) -> Place {
        let layer = |image: &Pushed| {
            let digest = image.layers().pop().unwrap();
            self.node.root().join("layers").join(digest.trim_start_matches("sha256:"))
        };
        Place { root: self.node.root(), verified: layer(&self.images[0]), lazy: layer(&self.images[1]) }
    }

    fn named(&self) -> Vec<String> {
        self.node.status().unwrap().damages.into_iter().map(|damage| damage.code).collect()
    }

    fn damaged_metric(&self, code: &str) -> String {
        let page = output(Command::new("curl").args(["-s", &format!("http://{}/metrics", self.metrics)])).unwrap();
        let name = format!("millstream_damage_found_total{{code=\"{code}\"}} ");
        page.lines().find_map(|line| line.strip_prefix(&name)).unwrap_or("none").to_owned()
    }

    fn check(&mut self, case: &Case) {
        eprintln!("damage: {}", case.name);
        self.node.stop().unwrap();
        let root = self.node.root();
        fs::remove_dir_all(&root).unwrap();
        output(Command::new("cp").args(["-a", "--sparse=always"]).arg(&self.saved).arg(&root)).unwrap();
        (case.damage)(&self.place());
        self.stage.go_dark().unwrap();
        let credentials = fs::read(&self.credentials).unwrap();
        fs::remove_file(&self.credentials).unwrap();
        let log = fs::metadata(self.node.log()).unwrap().len();

        self.node.launch().unwrap();
        let dark = [ALL, "cat /data/name", ALL];
        for (image, kind) in KINDS.into_iter().enumerate() {
            if kind == case.touched {
                continue;
            }
            // containerd waits some seconds before it connects again.
            let said = eventually("a container", DEADLINE, || self.run(image, dark[image]).ok());
            let expected = if image == 1 { "lazy" } else { &self.sums[image] };
            assert_eq!(said.unwrap(), expected, "{}: {kind:?} in the dark", case.name);
        }
        if !case.code.is_empty() {
            let code = case.code;
            // A view is made again at once.
            assert!(self.named().iter().any(|named| named == code) || code == VIEW, "{}: status", case.name);
            let log = fs::read(self.node.log()).unwrap().split_off(usize::try_from(log).unwrap());
            let log = String::from_utf8_lossy(&log).into_owned();
            let lines = log.lines().filter(|line| line.contains("damage found") && line.contains(code)).count();
            assert_eq!(lines, 1, "{}: lines of the log", case.name);
            assert_eq!(self.damaged_metric(code), "1", "{}: metric", case.name);
        }

        fs::write(&self.credentials, credentials).unwrap();
        self.stage.come_back().unwrap();
        self.node.set_hydration(true).unwrap();
        eventually("the damage to be mended", MENDED, || {
            (case.stays || !self.named().iter().any(|named| named == case.code)).then_some(())
        })
        .unwrap();
        for image in 0..2 {
            await_verified(&self.node, &self.images[image]).unwrap();
        }
        for (image, kind) in KINDS.into_iter().enumerate() {
            if kind == Touched::Ordinary && case.touched == Touched::Ordinary {
                continue;
            }
            let said = eventually("a container", DEADLINE, || self.run(image, ALL).ok()).unwrap();
            if self.sums[image].is_empty() {
                self.sums[image].clone_from(&said);
            }
            assert_eq!(said, self.sums[image], "{}: {kind:?} in the end", case.name);
        }
    }
}

#[test]
fn what_is_damaged_is_named_and_mended_and_the_rest_works() {
    if can_be_set(&[]) {
        let mut world = World::new();
        some_cases().iter().for_each(|case| world.check(case));
    }
}

/// Runs `millstream check`; its document, and whether it ended well.
fn check(node: &Node) -> (serde_json::Value, bool) {
    let mut command = Command::new(product(CLI).unwrap());
    let done = command.arg("--socket").arg(node.socket()).args(["--output", "json", "check"]).output().unwrap();
    let document = serde_json::from_slice(&done.stdout);
    (document.unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&done.stderr))), done.status.success())
}

#[test]
fn a_check_finds_wrong_bytes_and_the_kernel_forgets_them() {
    if !can_be_set(&[]) {
        return;
    }
    let mut world = World::new();
    world.node.launch().unwrap();
    let (found, whole) = check(&world.node);
    assert!(whole && found["findings"].as_array().unwrap().is_empty(), "{found}");
    assert!(found["bytes"].as_u64().unwrap() > 3 << 20, "{found}");

    let data = world.place().verified.join("data");
    harm(&data, Harm::Flipped);
    let right = world.sums[0].clone();
    let wrong = eventually("a container", DEADLINE, || world.run(0, ALL).ok()).unwrap();
    assert_ne!(wrong, right, "bytes in the store are not compared at each read");
    let (found, whole) = check(&world.node);
    assert!(whole, "{found}");
    let finding = &found["findings"][0];
    assert_eq!((finding["code"].as_str(), finding["outcome"].as_str()), (Some(CHUNKS), Some("repaired")), "{found}");
    assert_eq!(world.run(0, ALL).unwrap(), right, "also what the kernel kept");
    await_verified(&world.node, &world.images[0]).unwrap();

    // Without a source it is never wrong bytes, and it is whole once the source is back.
    harm(&data, Harm::Flipped);
    world.stage.go_dark().unwrap();
    let (found, whole) = check(&world.node);
    assert!(!whole && found["findings"][0]["outcome"] == "waiting", "{found}");
    assert!(world.named().iter().any(|code| code == CHUNKS));
    assert!(world.run(0, "sha256sum /data/large").is_err(), "a program sees an error, not wrong bytes");
    world.stage.come_back().unwrap();
    await_verified(&world.node, &world.images[0]).unwrap();
    assert_eq!(world.run(0, ALL).unwrap(), right);
    eventually("the end of the damage", MENDED, || world.named().is_empty().then_some(())).unwrap();
    let (found, whole) = check(&world.node);
    assert!(whole && found["findings"].as_array().unwrap().is_empty(), "{found}");

    // The second file of the database, which nothing reads while the first one is whole.
    harm(&world.node.root().join("state.copy.redb"), Harm::Half);
    let (found, whole) = check(&world.node);
    let finding = &found["findings"][0];
    assert!(!whole && finding["object"] == "state.copy.redb" && finding["code"] == "store.database-damaged", "{found}");
    world.node.crash_worker().unwrap();
    let (found, whole) = check(&world.node);
    assert!(whole && found["findings"].as_array().unwrap().is_empty(), "the next worker made it again: {found}");
    assert_eq!(world.run(0, ALL).unwrap(), right);
}

#[test]
#[ignore = "takes some minutes; make soak"]
fn every_damage_of_the_table_is_named_and_mended_and_the_rest_works() {
    if can_be_set(&[]) {
        let mut world = World::new();
        all_cases().iter().for_each(|case| world.check(case));
    }
}
