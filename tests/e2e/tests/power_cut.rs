//! The disk below a node is cut off without a sync, at random moments: what was said to be there is there afterwards, and no
//! wrong byte is ever served.
//!
//! The node's root is a file system of its own, ext4 or XFS, behind a loop device. `MILLSTREAM_SEED` repeats a run.

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use millstream_e2e::caller::{Caller, lower};
use millstream_e2e::daemons::{Node, NodeOptions};
use millstream_e2e::disk::{DISK, Disk, FileSystem};
use millstream_e2e::image::Image;
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::process::{eventually, let_pass};
use millstream_e2e::stage::{Pushed, Stage, await_verified, can_be_set, layers_of};
use millstream_wire::containerd::services::snapshots::v1::Kind;
use millstream_wire::millstream::v1::LayerStatus;
use millstream_wire::millstream::v1::layer_status::State;

/// XFS takes no less than 300 MiB.
const DISK_SIZE: u64 = 400 << 20;
const IMAGES: usize = 4;
/// Files of the two layers of an image, and their size.
const FILES: [(usize, usize); 2] = [(3, 1_500_001), (40, 50_001)];

/// Marsaglia's xorshift: the same moments for the same seed.
struct Random(u64);

impl Random {
    fn seeded() -> Self {
        let now = || u64::from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos());
        let seed = std::env::var("MILLSTREAM_SEED").map_or_else(|_| now(), |seed| seed.parse().unwrap());
        println!("MILLSTREAM_SEED={seed}");
        Self(seed << 1 | 1)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    fn pick<'a, T>(&mut self, from: &'a BTreeSet<T>) -> Option<&'a T> {
        let len = u64::try_from(from.len()).unwrap();
        if len == 0 { None } else { from.iter().nth(usize::try_from(self.below(len)).unwrap()) }
    }
}

fn content(image: usize, layer: usize, file: usize) -> Vec<u8> {
    let seed = u32::try_from((image * 10 + layer) * 1000 + file + 1).unwrap();
    noise(seed, FILES[layer].1)
}

fn image(number: usize) -> Image {
    let mut image = Image::new();
    for (layer, (files, _)) in FILES.iter().enumerate() {
        let mut entries = vec![Entry::directory(format!("l{layer}"))];
        entries.extend((0..*files).map(|file| Entry::file(format!("l{layer}/{file}"), content(number, layer, file))));
        image = image.layer(entries, Packing::Gzip);
    }
    image
}

/// Reads every file of an image in `root`.
fn assert_right(root: &Path, number: usize) {
    for (layer, (files, _)) in FILES.iter().enumerate() {
        for file in 0..*files {
            let found = std::fs::read(root.join(format!("l{layer}/{file}"))).unwrap();
            assert!(found == content(number, layer, file), "wrong bytes in l{layer}/{file} of image {number}");
        }
    }
}

/// A node on a disk that can be cut off, and images for it.
struct Bench {
    node: Node,
    disk: Disk,
    images: Vec<Pushed>,
    random: Random,
    stage: Stage,
}

impl Bench {
    /// The node downloads nothing in the background until it is told to.
    fn set(kind: FileSystem) -> Self {
        Self::set_with(kind, "")
    }

    /// With further lines of `[store]`.
    fn set_with(kind: FileSystem, store: &str) -> Self {
        let stage = Stage::set().unwrap();
        let images = (0..IMAGES).map(|number| stage.publish(&format!("app{number}"), &image(number)).unwrap());
        let images = images.collect();
        let root = stage.work.path().join("node/root");
        let disk = Disk::make(&stage.work, "disk", kind, DISK_SIZE, &root).unwrap();
        let more = format!("[store]\nsync_interval = \"20ms\"\n{store}");
        let options = NodeOptions { hydration: false, more, ..stage.node_options() };
        let node = Node::start(&stage.work, &options).unwrap();
        Self { node, disk, images, random: Random::seeded(), stage }
    }

    fn caller(&self) -> Caller {
        Caller::connect(&self.node.socket()).unwrap()
    }

    /// A moment within `span`.
    fn moment(&mut self, span: Duration) -> Duration {
        Duration::from_micros(self.random.below(u64::try_from(span.as_micros()).unwrap().max(1)))
    }

    /// The power fails and comes back; the daemon is started again.
    fn cut(&mut self) {
        self.disk.cut().unwrap();
        self.come_back();
    }

    fn come_back(&mut self) {
        self.node.crash_wholly().unwrap();
        self.disk.power_off().unwrap();
        self.disk.power_on().unwrap();
        self.node.launch().unwrap();
    }

    /// Reads an image through a container's snapshot that is there only for that.
    fn look(&self, caller: &Caller, number: usize, top: &str) {
        caller.prepare("look", top, HashMap::new()).unwrap();
        assert_right(&lower(&caller.mounts("look").unwrap()).unwrap(), number);
        caller.remove("look").unwrap();
    }
}

/// Digests of the layers that are wholly local and proven.
fn verified(bench: &Bench) -> BTreeSet<String> {
    let layers = bench.node.status().unwrap().layers;
    layers.into_iter().filter(|layer| layer.state() == State::Verified).map(|layer| layer.layer).collect()
}

fn cut_in_hydration(kind: FileSystem, rounds: usize) {
    let mut bench = Bench::set(kind);
    let mut tops: BTreeMap<usize, String> = BTreeMap::new();
    let mut span = Duration::from_secs(1);
    let (mut halfway, mut kept) = (0, 0);
    for round in 0..rounds {
        let number = round % IMAGES;
        let caller = bench.caller();
        if let Some(top) = tops.remove(&number) {
            give_back(&bench, &caller, number, &top);
        }
        let top = caller.pull(&bench.images[number]).unwrap();
        bench.node.set_hydration(true).unwrap();
        let begun = Instant::now();
        if round == 0 {
            await_verified(&bench.node, &bench.images[number]).unwrap();
            span = begun.elapsed();
        } else {
            let moment = bench.moment(span);
            let_pass(moment);
        }
        let before = bench.node.status().unwrap().layers;
        let whole = |layer: &LayerStatus| layer.state() == State::Verified;
        halfway += usize::from(!before.iter().all(whole));
        bench.cut();
        // Nothing is downloaded in the background now: what is here was so before.
        let after = bench.node.status().unwrap();
        for layer in &before {
            let now = after.layers.iter().find(|now| now.layer == layer.layer).unwrap();
            assert!(now.state() == State::Verified || !whole(layer), "before: {layer:?}, now: {now:?}");
            assert!(now.bytes_present >= layer.bytes_synced, "before: {layer:?}, now: {now:?}");
            kept += if whole(layer) { 0 } else { layer.bytes_synced };
        }
        assert_eq!(after.transfer.unwrap().requests, 0, "something was fetched already");
        let caller = bench.caller();
        tops.insert(number, top);
        for (number, top) in &tops {
            bench.look(&caller, *number, top);
        }
    }
    println!("{rounds} cuts on {}, {halfway} of them half-way, {kept} bytes of these layers kept", kind.name());
    assert!(halfway * 4 >= rounds, "the moments are not those of hydration: {halfway} of {rounds}");
    bench.node.set_hydration(true).unwrap();
    for number in tops.keys() {
        await_verified(&bench.node, &bench.images[*number]).unwrap();
    }
    // All is local now, and nobody else has it.
    bench.stage.go_dark().unwrap();
    bench.cut();
    let caller = bench.caller();
    for (number, top) in &tops {
        bench.look(&caller, *number, top);
    }
}

/// The layers whose directory changed since, of those in `before`; or that cannot be looked at any more.
fn changed(bench: &Bench, before: &BTreeMap<String, Option<SystemTime>>) -> BTreeSet<String> {
    let changed = before.iter().filter(|(layer, then)| touched(bench, layer).is_none_or(|now| Some(now) != **then));
    changed.map(|(layer, _)| layer.clone()).collect()
}

/// When a name in the directory of a layer last changed. For one that is verified, that is an eviction.
fn touched(bench: &Bench, layer: &str) -> Option<SystemTime> {
    let directory = bench.disk.path().join("layers").join(layer.trim_start_matches("sha256:"));
    directory.metadata().ok()?.modified().ok()
}

fn cut_in_eviction(kind: FileSystem, rounds: usize) {
    // One image fits below the low water mark, two do not fit at all.
    let mut bench = Bench::set_with(kind, "quota = \"12MiB\"\nhigh_water = 80\nlow_water = 60\n");
    let mut tops: BTreeMap<usize, String> = BTreeMap::new();
    let mut halfway = 0;
    for round in 0..rounds {
        // One is made local, then another one wants its place.
        let numbers = [round % IMAGES, (round + 1) % IMAGES];
        let caller = bench.caller();
        bench.node.set_hydration(true).unwrap();
        let mut before = BTreeMap::new();
        for number in numbers {
            let top = tops.entry(number).or_insert_with(|| caller.pull(&bench.images[number]).unwrap());
            // A container begins, and has ended.
            caller.prepare("use", top, HashMap::new()).unwrap();
            caller.remove("use").unwrap();
            if number == numbers[0] {
                await_verified(&bench.node, &bench.images[number]).unwrap();
                before = verified(&bench).into_iter().map(|layer| (layer.clone(), touched(&bench, &layer))).collect();
            }
        }
        eventually("an eviction", Duration::from_secs(20), || (!changed(&bench, &before).is_empty()).then_some(()))
            .unwrap();
        let moment = bench.moment(Duration::from_millis(25));
        let_pass(moment);
        bench.disk.cut().unwrap();
        let changed = changed(&bench, &before);
        bench.come_back();
        let after = verified(&bench);
        halfway += usize::from(changed.iter().any(|layer| after.contains(layer)) || changed.len() < before.len());
        for layer in before.keys().filter(|layer| !changed.contains(*layer)) {
            assert!(after.contains(layer), "{layer} was not given up and is not whole");
        }
        let caller = bench.caller();
        for number in numbers {
            bench.look(&caller, number, &tops[&number]);
        }
        assert_eq!(bench.node.status().unwrap().store.unwrap().quota_bytes, 12 << 20);
    }
    println!("{rounds} cuts on {}, {halfway} of them with evictions under way or to come", kind.name());
    assert!(halfway > 0, "the moments are not those of evictions");
}

/// Removes an image's snapshots and waits until its layers are gone.
fn give_back(bench: &Bench, caller: &Caller, number: usize, top: &str) {
    let mut name = top.to_owned();
    while !name.is_empty() {
        let below = caller.list().unwrap().into_iter().find(|info| info.name == name).unwrap().parent;
        caller.remove(&name).unwrap();
        name = below;
    }
    let gone = || layers_of(&bench.node, &bench.images[number]).ok()?.is_empty().then_some(());
    eventually("the end of the layers", Duration::from_secs(20), gone).unwrap();
}

/// What the snapshotter has acknowledged.
#[derive(Debug, Default, Clone)]
struct Told {
    active: BTreeSet<String>,
    committed: BTreeSet<String>,
    /// Parents, of all there ever were.
    parents: BTreeMap<String, String>,
    tops: BTreeMap<String, usize>,
    /// What was asked last and not answered: a name that may be there or not.
    open: BTreeSet<String>,
    next: usize,
}

impl Told {
    fn has_children(&self, name: &str) -> bool {
        let there = self.active.iter().chain(&self.committed);
        there.into_iter().any(|other| self.parents.get(other).is_some_and(|parent| parent == name))
    }

    /// One random call; `None` when it was not answered well. An answer that comes once the disk is being cut off is none: nobody
    /// hears of anything after a power cut, and ext4 says that it has synced what it has not while it is being shut down.
    fn step(&mut self, caller: &Caller, random: &mut Random, images: &[Pushed], cut: &AtomicBool) -> Option<()> {
        let before = (self.active.clone(), self.committed.clone(), self.tops.clone());
        self.call(caller, random, images)?;
        if cut.load(Ordering::SeqCst) {
            // What it was about stays open.
            (self.active, self.committed, self.tops) = before;
            return None;
        }
        self.open.clear();
        Some(())
    }

    fn call(&mut self, caller: &Caller, random: &mut Random, images: &[Pushed]) -> Option<()> {
        self.next += 1;
        let new = format!("k{}", self.next);
        match random.below(10) {
            0..5 => {
                let parent = random.pick(&self.committed).cloned().filter(|_| self.next.is_multiple_of(2));
                let parent = parent.unwrap_or_default();
                self.open = [new.clone()].into();
                caller.prepare(&new, &parent, HashMap::new()).ok()?;
                self.parents.insert(new.clone(), parent);
                self.active.insert(new);
            }
            5..8 => {
                let Some(key) = random.pick(&self.active).cloned() else { return Some(()) };
                self.open = [new.clone(), key.clone()].into();
                caller.commit(&key, &new).ok()?;
                self.active.remove(&key);
                let parent = self.parents.get(&key).cloned().unwrap_or_default();
                self.parents.insert(new.clone(), parent);
                self.committed.insert(new);
            }
            8 => {
                let leaf = random.pick(&self.committed).filter(|name| !self.has_children(name)).cloned();
                let Some(leaf) = leaf.filter(|name| !self.tops.contains_key(name)) else { return Some(()) };
                self.open = [leaf.clone()].into();
                caller.remove(&leaf).ok()?;
                self.committed.remove(&leaf);
            }
            _ => {
                let number = usize::try_from(random.below(images.len() as u64)).unwrap();
                let top = caller.pull(&images[number]).ok()?;
                self.tops.insert(top.clone(), number);
                self.committed.insert(top);
            }
        }
        Some(())
    }
}

fn cut_in_commit(kind: FileSystem, rounds: usize) {
    let mut bench = Bench::set(kind);
    let mut told = Told::default();
    let mut calls = 0;
    for _ in 0..rounds {
        let moment = bench.moment(Duration::from_millis(400));
        let (caller, images) = (bench.caller(), bench.images.clone());
        let mut random = Random(bench.random.below(u64::MAX) | 1);
        let before = told.next;
        let cut = AtomicBool::new(false);
        told = thread::scope(|scope| {
            let calling = scope.spawn(|| {
                let mut told = told;
                let limit = told.next + 2000;
                while told.next < limit && told.step(&caller, &mut random, &images, &cut).is_some() {}
                told
            });
            let_pass(moment);
            cut.store(true, Ordering::SeqCst);
            bench.disk.cut().unwrap();
            // Calls that wait for the disk end with the daemon.
            bench.node.crash_wholly().unwrap();
            calling.join().unwrap()
        });
        calls += told.next - before;
        bench.come_back();
        told = check(&bench, told);
    }
    println!("{rounds} cuts on {}, {calls} calls", kind.name());
    let caller = bench.caller();
    for (top, number) in &told.tops {
        bench.look(&caller, *number, top);
    }
}

/// Compares what is there with what was told; gives what goes on from here.
fn check(bench: &Bench, mut told: Told) -> Told {
    let caller = bench.caller();
    let list = caller.list().unwrap();
    let found = |kind: Kind| -> BTreeSet<String> {
        list.iter().filter(|info| info.kind() == kind).map(|info| info.name.clone()).collect()
    };
    let lazy = |name: &String| name.contains("/lazy-");
    let (active, committed) = (found(Kind::Active), found(Kind::Committed));
    for name in told.active.iter().chain(&told.committed) {
        let there = active.contains(name) || committed.contains(name);
        assert!(there || told.open.contains(name), "{name} was acknowledged and is gone");
    }
    for name in active.iter().chain(&committed).filter(|name| !lazy(name)) {
        let known = told.active.contains(name) || told.committed.contains(name);
        assert!(known || told.open.contains(name), "{name} is there and was never acknowledged, or removed");
    }
    for info in &list {
        told.parents.insert(info.name.clone(), info.parent.clone());
    }
    for key in &active {
        let mounts = caller.mounts(key).unwrap_or_else(|error| panic!("the mounts of {key}: {error:#}"));
        for directory in mounts[0].options.iter().filter_map(|option| option.split_once("dir=")) {
            for path in directory.1.split(':') {
                assert!(Path::new(path).is_dir(), "{path} of {key} is gone");
            }
        }
        assert!(mounts[0].r#type == "overlay" || Path::new(&mounts[0].source).is_dir(), "{key} has no directory");
    }
    let committed: BTreeSet<String> =
        committed.into_iter().filter(|name| !lazy(name) || told.tops.contains_key(name)).collect();
    for name in &committed {
        caller.prepare("probe", name, HashMap::new()).unwrap_or_else(|error| panic!("on {name}: {error:#}"));
        caller.remove("probe").unwrap();
    }
    Told { active, committed, open: BTreeSet::new(), ..told }
}

const FEW: usize = 10;
const MANY: usize = 100;

fn run(kind: FileSystem, rounds: usize, test: fn(FileSystem, usize)) {
    if can_be_set(DISK) {
        test(kind, rounds);
    }
}

#[test]
fn hydration_on_ext4() {
    run(FileSystem::Ext4, FEW, cut_in_hydration);
}

#[test]
fn hydration_on_xfs() {
    run(FileSystem::Xfs, FEW, cut_in_hydration);
}

#[test]
fn commits_on_ext4() {
    run(FileSystem::Ext4, FEW, cut_in_commit);
}

#[test]
fn commits_on_xfs() {
    run(FileSystem::Xfs, FEW, cut_in_commit);
}

#[test]
fn evictions_on_ext4() {
    run(FileSystem::Ext4, FEW, cut_in_eviction);
}

#[test]
fn evictions_on_xfs() {
    run(FileSystem::Xfs, FEW, cut_in_eviction);
}

#[test]
#[ignore = "some minutes; make soak"]
fn hundred_cuts_of_each_kind() {
    for kind in [FileSystem::Ext4, FileSystem::Xfs] {
        for test in [cut_in_hydration, cut_in_commit, cut_in_eviction] {
            run(kind, MANY, test);
        }
    }
}
