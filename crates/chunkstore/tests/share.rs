//! Content of one layer becomes that of another, and never anything else.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod fixture;

use std::collections::HashMap;
use std::sync::Arc;

use fixture::{Place, chunks, noise, read, tar};
use millstream_chunkstore::{Layer, Step, Store, StoreError};
use millstream_toc::{BuildOptions, BuildSink, Compression, DataRange, build};
use proptest::prelude::*;

const ALL: DataRange = DataRange::new(0, u64::MAX);

/// A layer's TOC with the bytes of its chunks.
struct Made {
    toc: Vec<u8>,
    chunks: HashMap<u32, Vec<u8>>,
}

impl BuildSink for Made {
    fn chunk(&mut self, chunk: u32, _: DataRange, _: &[u8; 16], bytes: &[u8]) -> std::io::Result<()> {
        self.chunks.insert(chunk, bytes.to_vec());
        Ok(())
    }
}

fn made_of(tar: &[u8]) -> Made {
    let mut made = Made { toc: Vec::new(), chunks: HashMap::new() };
    made.toc = build(tar, &BuildOptions::new(Compression::Plain), &mut made).unwrap().toc;
    made
}

fn made(files: &[(&str, Vec<u8>)]) -> Made {
    made_of(&tar(files))
}

impl Made {
    fn admit(&self, store: &Store) -> Arc<Layer> {
        store.admit(&self.toc).unwrap()
    }

    fn write(&self, layer: &Layer, wanted: impl Fn(u32) -> bool) {
        for chunk in chunks(layer.toc()).into_iter().filter(|chunk| wanted(chunk.ix)) {
            if let Some(bytes) = self.chunks.get(&chunk.ix) {
                layer.write(chunk, bytes).unwrap();
            }
        }
    }

    fn filled(&self, store: &Store) -> Arc<Layer> {
        let layer = self.admit(store);
        self.write(&layer, |_| true);
        layer
    }

    /// Every chunk that is present has its own bytes; says how many there are.
    fn check(&self, layer: &Layer) -> usize {
        let present: Vec<_> = chunks(layer.toc()).into_iter().filter(|chunk| layer.has(chunk.ix)).collect();
        for chunk in &present {
            let zeros = vec![0; chunk.data.len() as usize];
            assert!(read(layer, *chunk) == *self.chunks.get(&chunk.ix).unwrap_or(&zeros), "chunk {}", chunk.ix);
        }
        present.len()
    }
}

#[test]
fn a_rebuilt_layer_takes_all_but_the_changed_file() {
    let place = Place::new();
    let store = place.open();
    let files = |changed: u32| {
        [("a", noise(1, 100_000)), ("b", noise(changed, 50_000)), ("c", noise(3, 9_000_000)), ("d", noise(4, 10))]
    };
    let (old, new) = (made(&files(2)), made(&files(20)));
    let source = old.filled(&store);
    source.set_verified().unwrap();
    let layer = new.admit(&store);
    let shares = store.shares(&layer).unwrap();
    assert!(!shares.is_empty());
    assert_eq!(shares.copy(ALL).unwrap(), 100_000 + 9_000_000 + 10);
    assert_eq!(layer.bytes_total() - layer.bytes_present(), 50_000);
    new.check(&layer);
    assert_eq!(shares.copy(ALL).unwrap(), 0, "nothing comes over twice");
    assert!(store.shares(&layer).unwrap().is_empty());
    new.write(&layer, |_| true);
    layer.set_verified().unwrap();
    drop((layer, source, shares, store));
    let store = place.open();
    new.check(&store.layer(&old_digest(&new)).unwrap());
}

fn old_digest(made: &Made) -> millstream_oci::Digest {
    millstream_toc::Toc::open(made.toc.clone()).unwrap().blob_digest()
}

#[test]
fn a_range_brings_its_own_chunks_only() {
    let place = Place::new();
    let store = place.open();
    let (old, new) = (made(&[("x", noise(1, 300_000))]), made(&[("y", noise(9, 40)), ("x", noise(1, 300_000))]));
    old.filled(&store);
    let layer = new.admit(&store);
    let shares = store.shares(&layer).unwrap();
    let start = layer.toc().content(1).unwrap().data_off.get();
    assert!(!shares.has(DataRange::new(0, 40)) && shares.has(DataRange::new(start, start + 1)));
    assert_eq!(shares.copy(DataRange::new(start + 32768, start + 32769)).unwrap(), 32768);
    assert_eq!(new.check(&layer), 1);
    let pieces: Vec<_> = shares.pieces(1).collect();
    assert_eq!(pieces, [DataRange::with_len(start, 300_000)]);
}

#[test]
fn what_was_not_verified_is_never_shared() {
    // A TOC that claims the content of another image, whose bytes nobody can show.
    let place = Place::new();
    let store = place.open();
    let victim = made(&[("secret", noise(1, 100_000)), ("own", noise(2, 10))]);
    let forged = made(&[("claimed", noise(1, 100_000))]);
    forged.admit(&store);
    let layer = victim.admit(&store);
    assert!(store.shares(&layer).unwrap().is_empty());
    assert_eq!(victim.check(&layer), 0);
}

#[test]
fn a_quarantined_layer_gives_and_takes_nothing() {
    let place = Place::new();
    let store = place.open();
    let (old, new) = (made(&[("x", noise(1, 50_000))]), made(&[("y", noise(1, 50_000))]));
    let (source, layer) = (old.filled(&store), new.admit(&store));
    let before = store.shares(&layer).unwrap();
    source.quarantine("lies").unwrap();
    assert!(store.shares(&layer).unwrap().is_empty());
    assert!(before.copy(ALL).is_err());
    assert_eq!(new.check(&layer), 0);
    layer.quarantine("lies as well").unwrap();
    assert!(matches!(store.shares(&layer), Err(StoreError::Quarantined { .. })));
}

#[test]
fn a_source_that_is_removed_meanwhile_is_still_read() {
    let place = Place::new();
    let store = place.open();
    let (old, new) = (made(&[("x", noise(1, 200_000))]), made(&[("y", noise(1, 200_000))]));
    let (source, layer) = (old.filled(&store), new.admit(&store));
    let shares = store.shares(&layer).unwrap();
    store.remove(&source.digest()).unwrap();
    assert_eq!(shares.copy(DataRange::new(0, 100)).unwrap(), 32768);
    drop(source);
    assert_eq!(shares.copy(ALL).unwrap(), 200_000 - 32768);
    new.check(&layer);
    assert!(store.shares(&layer).unwrap().is_empty());
}

#[test]
fn a_target_that_is_removed_meanwhile_takes_nothing() {
    let place = Place::new();
    let store = place.open();
    let (old, new) = (made(&[("x", noise(1, 200_000))]), made(&[("y", noise(1, 200_000))]));
    old.filled(&store);
    let layer = new.admit(&store);
    let shares = store.shares(&layer).unwrap();
    store.remove(&layer.digest()).unwrap();
    assert_eq!(shares.copy(ALL).unwrap(), 0);
    let again = new.admit(&store);
    assert_eq!(new.check(&again), 0);
}

#[test]
fn a_full_disk_stops_it_without_harm() {
    let place = Place::new();
    let store = place.open();
    let (old, new) = (made(&[("x", noise(1, 200_000))]), made(&[("y", noise(1, 200_000))]));
    old.filled(&store).sync().unwrap();
    let layer = new.admit(&store);
    let shares = store.shares(&layer).unwrap();
    shares.copy(DataRange::new(0, 1)).unwrap();
    place.faults.fail(Step::WriteData, 28);
    assert!(matches!(shares.copy(ALL), Err(StoreError::NoSpace { .. })));
    assert_eq!(new.check(&layer), 1);
    place.faults.heal();
    assert_eq!(shares.copy(ALL).unwrap(), 200_000 - 32768);
    new.check(&layer);
}

#[test]
fn what_the_source_may_lose_is_not_taken() {
    let place = Place::new();
    let store = place.open();
    let (old, new) = (made(&[("x", noise(1, 200_000))]), made(&[("y", noise(1, 200_000))]));
    let source = old.admit(&store);
    old.write(&source, |ix| ix < 2);
    source.sync().unwrap();
    old.write(&source, |_| true);
    // The disk lost pages of it; only the next sync finds out which ones do not count any more.
    place.faults.fail(Step::SyncData, 28);
    let layer = new.admit(&store);
    store.shares(&layer).unwrap().copy(ALL).unwrap();
    assert_eq!(new.check(&layer), 2);
}

#[test]
fn a_crash_after_copying_leaves_only_what_was_synced() {
    let place = Place::new();
    let store = place.open();
    let (old, new) = (made(&[("x", noise(1, 200_000))]), made(&[("y", noise(1, 200_000))]));
    old.filled(&store).set_verified().unwrap();
    let layer = new.admit(&store);
    let shares = store.shares(&layer).unwrap();
    shares.copy(DataRange::new(0, 1)).unwrap();
    layer.sync().unwrap();
    shares.copy(ALL).unwrap();
    drop((layer, shares, store));
    let store = place.open();
    let layer = new.admit(&store);
    assert_eq!(new.check(&layer), 1);
    assert_eq!(store.shares(&layer).unwrap().copy(ALL).unwrap(), 200_000 - 32768);
}

#[test]
fn damaged_keys_hide_and_harm_nothing() {
    let place = Place::new();
    let store = place.open();
    let files = [("x", noise(1, 50_000)), ("y", noise(2, 70_000)), ("z", noise(3, 10))];
    let (old, new) = (made(&files), made(&[&files[..], &[("w", noise(4, 5))]].concat()));
    let (source, layer) = (old.filled(&store), new.admit(&store));
    store.shares(&layer).unwrap();
    let file = place.file(&source.digest(), "keys");
    let good = std::fs::read(&file).unwrap();
    for flip in 0..good.len() {
        let mut bad = good.clone();
        bad[flip] ^= 0xff;
        std::fs::write(&file, bad).unwrap();
        store.shares(&layer).unwrap();
    }
    std::fs::write(&file, vec![0; good.len()]).unwrap();
    assert!(store.shares(&layer).unwrap().is_empty());
    std::fs::write(&file, &good[1..]).unwrap();
    assert_eq!(store.shares(&layer).unwrap().copy(ALL).unwrap(), 120_010);
    assert_eq!(std::fs::read(&file).unwrap(), good, "made anew");
    new.check(&layer);
}

/// A PAX 1.0 sparse file of 5 chunks of which chunk 1 and a part of chunk 3 are stored, `shift` bytes later.
fn sparse(shift: usize) -> Vec<u8> {
    let parts = [(32768 + shift, 32768), (100_000 + shift, 500)];
    let mut map = format!("{}\n", parts.len());
    parts.iter().for_each(|(at, len)| map += &format!("{at}\n{len}\n"));
    let mut stored = map.into_bytes();
    stored.resize(512, 0);
    stored.extend(noise(5, 32768 + 500));
    let record = |text: String| format!("{} {text}\n", text.len() + 4);
    let pax = ["GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=holes", "GNU.sparse.realsize=150000"]
        .map(|text| record(text.to_owned()))
        .concat();
    let mut all = tar(&[("pax", pax.into_bytes())]);
    all[156] = b'x';
    all[148..156].copy_from_slice(b"        ");
    let sum: u32 = all[..512].iter().map(|byte| u32::from(*byte)).sum();
    all[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    all.truncate(all.len() - 1024);
    all.extend(tar(&[("holes", stored)]));
    all
}

#[test]
fn sparse_files_are_shared_with_their_holes_and_with_plain_ones() {
    let place = Place::new();
    let store = place.open();
    let old = made_of(&sparse(0));
    let source = old.filled(&store);
    assert_eq!(source.bytes_present(), 150_000);
    let mut bytes = vec![0; 150_000];
    source.read(DataRange::new(0, 150_000), &mut bytes).unwrap();
    assert!(bytes[..32768].iter().all(|byte| *byte == 0) && bytes[32768..65536] == noise(5, 32768 + 500)[..32768]);
    let plain = made(&[("whole", bytes.clone())]);
    let layer = plain.admit(&store);
    assert_eq!(store.shares(&layer).unwrap().copy(ALL).unwrap(), 150_000);
    assert_eq!(plain.check(&layer), 5);
    // Back into a layer with holes: of what it misses nothing is a hole.
    store.remove(&source.digest()).unwrap();
    let again = old.admit(&store);
    let missing = again.bytes_total() - again.bytes_present();
    assert_eq!(store.shares(&again).unwrap().copy(ALL).unwrap(), missing);
    old.check(&again);
    let other = made_of(&sparse(1));
    assert!(store.shares(&other.admit(&store)).unwrap().is_empty());
}

#[test]
fn sources_that_come_and_go_do_no_harm() {
    let place = Place::new();
    let store = Arc::new(place.open());
    let files: Vec<(String, Vec<u8>)> = (0..40).map(|n| (format!("f{n}"), noise(n, 40_000))).collect();
    let all: Vec<(&str, Vec<u8>)> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect();
    let old = made(&all);
    let new = made(&[&all[..], &[("more", noise(99, 10))]].concat());
    let layer = new.admit(&store);
    std::thread::scope(|scope| {
        let coming_and_going = scope.spawn(|| {
            for _ in 0..30 {
                let source = old.filled(&store);
                store.remove(&source.digest()).unwrap();
            }
        });
        let writer = scope.spawn(|| new.write(&layer, |ix| ix % 3 == 0));
        while !coming_and_going.is_finished() {
            for piece in store.shares(&layer).unwrap().pieces(100_000).collect::<Vec<_>>() {
                store.shares(&layer).unwrap().copy(piece).unwrap();
            }
            new.check(&layer);
        }
        writer.join().unwrap();
    });
    old.filled(&store);
    store.shares(&layer).unwrap().copy(ALL).unwrap();
    assert_eq!(layer.bytes_total() - layer.bytes_present(), if layer.has(80) { 0 } else { 10 });
    new.check(&layer);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Layers of files from a small stock, of which each holds some chunks: what comes over is right, and nothing that
    /// another layer wholly holds is missing afterwards.
    #[test]
    fn any_layers_share_what_they_can(
        layers in proptest::collection::vec((proptest::collection::vec(0u32..8, 1..6), 0u32..4), 2..5),
    ) {
        let place = Place::new();
        let store = place.open();
        let size = |seed: u32| [1, 4096, 32768, 32769, 70_000, 100_000, 5000, 65536][seed as usize];
        let mut made_all = Vec::new();
        for (number, (seeds, every)) in layers.iter().enumerate() {
            let names: Vec<String> = seeds.iter().enumerate().map(|(at, seed)| format!("{number}-{at}-{seed}")).collect();
            let files: Vec<_> = names.iter().zip(seeds).map(|(name, seed)| (name.as_str(), noise(*seed, size(*seed)))).collect();
            let made = made(&files);
            let layer = made.admit(&store);
            // Every chunk, every second one, every third one, none.
            made.write(&layer, |ix| *every < 3 && ix % (every + 1) == 0);
            made_all.push((made, layer));
        }
        let (new, layer) = made_all.pop().unwrap();
        let shares = store.shares(&layer).unwrap();
        let before = layer.bytes_present();
        let mut brought = 0;
        for piece in shares.pieces(50_000) {
            brought += shares.copy(piece).unwrap();
        }
        prop_assert_eq!(layer.bytes_present(), before + brought);
        new.check(&layer);
        let whole: Vec<u32> = layers[..layers.len() - 1].iter().filter(|(_, every)| *every == 0).flat_map(|(seeds, _)| seeds.clone()).collect();
        for (ix, seed) in layers[layers.len() - 1].0.iter().enumerate() {
            let content = layer.toc().content(ix as u32).unwrap();
            if whole.contains(seed) {
                let data = DataRange::with_len(content.data_off.get(), content.size.get());
                prop_assert!(layer.missing(data).unwrap().is_empty());
            }
        }
    }
}

/// A file system of its own that shares blocks between files; gone when it is dropped.
struct Xfs(tempfile::TempDir);

impl Xfs {
    /// `None`, and a line that says so, where this machine cannot have one.
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let (image, point) = (dir.path().join("image"), dir.path().join("mounted"));
        std::fs::File::create(&image).unwrap().set_len(512 << 20).unwrap();
        std::fs::create_dir(&point).unwrap();
        let run = |program: &str, arguments: &[&std::ffi::OsStr]| {
            let output = std::process::Command::new(program).args(arguments).output();
            output.is_ok_and(|output| output.status.success())
        };
        let made = run("mkfs.xfs", &["-q".as_ref(), image.as_ref()])
            && run("mount", &["-o".as_ref(), "loop".as_ref(), image.as_ref(), point.as_ref()]);
        if !made {
            assert!(std::env::var_os("MILLSTREAM_REQUIRE_ALL").is_none(), "mkfs.xfs and a loop mount are required");
            println!("skipped: needs mkfs.xfs and the right to mount");
        }
        made.then_some(Self(dir))
    }

    fn point(&self) -> std::path::PathBuf {
        self.0.path().join("mounted")
    }

    fn used(&self) -> u64 {
        let disk = rustix::fs::statvfs(self.point()).unwrap();
        (disk.f_blocks - disk.f_bfree) * disk.f_frsize
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.point()).status();
    }
}

#[test]
fn where_files_can_share_blocks_nothing_is_copied() {
    let Some(xfs) = Xfs::mount() else { return };
    let place = Place { dir: tempfile::tempdir_in(xfs.point()).unwrap(), faults: Arc::default() };
    let store = place.open();
    let files: Vec<(String, Vec<u8>)> = (0..100).map(|n| (format!("f{n}"), noise(n + 1, 400_000))).collect();
    let all: Vec<(&str, Vec<u8>)> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect();
    let (old, new) = (made(&all), made(&[&[("first", noise(777, 10))], &all[..]].concat()));
    old.filled(&store).set_verified().unwrap();
    let layer = new.admit(&store);
    let before = xfs.used();
    assert_eq!(store.shares(&layer).unwrap().copy(ALL).unwrap(), 40_000_000);
    layer.sync().unwrap();
    let grown = xfs.used().saturating_sub(before);
    assert!(grown < 4_000_000, "{grown} more bytes on the disk");
    assert_eq!(new.check(&layer), 100 * 13);
    drop((layer, store, place));
}

/// `cargo test --release -p millstream-chunkstore --test share -- --ignored --nocapture` says what a comparison costs.
#[test]
#[ignore = "a measurement"]
fn comparing_with_a_hundred_layers_of_ten_thousand_files() {
    let place = Place::new();
    let store = place.open();
    let files = |layer: u32| {
        let names: Vec<String> = (0..10_000).map(|n| format!("f{n}")).collect();
        let contents = (0..10_000u32).map(|n| (layer * 10_000 + n).to_le_bytes().repeat(5));
        let all: Vec<_> = names.iter().map(String::as_str).zip(contents).collect();
        made(&all)
    };
    for layer in 1..=100 {
        files(layer).filled(&store).set_verified().unwrap();
    }
    let new = made(&[&[("new", noise(1, 10))], &[("same", 500_000u32.to_le_bytes().repeat(5))][..]].concat());
    let (small, large) = (new.admit(&store), files(200).admit(&store));
    for what in ["making all keys", "again"] {
        for (name, layer) in [("2", &small), ("10,000", &large)] {
            let started = std::time::Instant::now();
            let shares = store.shares(layer).unwrap();
            println!("{what}: a layer of {name} files in {:.0?}, found: {}", started.elapsed(), !shares.is_empty());
        }
    }
    let shares = store.shares(&small).unwrap();
    assert_eq!(shares.copy(ALL).unwrap(), 20);
}
