//! Content that is given up: nobody reads the holes, their space is free, and a quota keeps more from coming.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod fixture;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use fixture::{Place, bytes_of, chunks, fill, noise, read, tar, toc};
use millstream_chunkstore::{Faults, Layer, LayerState, Refusal, Step, Store, StoreError, StoreOptions};
use millstream_toc::{BuildOptions, Compression, DataRange, build};

fn on_disk(layer: &Layer) -> u64 {
    layer.data_file().metadata().unwrap().blocks() * 512
}

#[test]
fn what_is_given_up_takes_no_space_and_can_come_back() {
    let place = Place::new();
    let store = place.open();
    let layer = store.admit(&toc(1)).unwrap();
    fill(&layer);
    layer.set_verified().unwrap();
    let all = chunks(layer.toc());
    assert_eq!(store.space().used(), 94_208, "whole blocks");
    assert_eq!(store.evict(&layer, 40_000).unwrap(), 65_536, "two chunks");
    assert_eq!((layer.state(), layer.bytes_synced()), (LayerState::Lazy, layer.bytes_present()));
    assert_eq!(layer.missing(DataRange::new(0, layer.toc().data_size())).unwrap(), all[..2]);
    assert_eq!((store.space().used(), store.space().evicted()), (28_672, 65_536));
    assert!(on_disk(&layer) <= 28_672, "{}", on_disk(&layer));
    assert_eq!(read(&layer, all[3]), bytes_of(all[3]));
    assert!(matches!(layer.set_verified(), Err(StoreError::Incomplete { missing: 2, .. })));
    fill(&layer);
    layer.set_verified().unwrap();
    assert_eq!(read(&layer, all[0]), bytes_of(all[0]));
    assert_eq!(store.evict(&layer, u64::MAX).unwrap(), 94_208);
    assert_eq!((store.evict(&layer, 1).unwrap(), layer.bytes_present()), (0, 0));
    let digest = layer.digest();
    drop(layer);
    store.remove(&digest).unwrap();
    assert_eq!(store.space().used(), 0);
}

#[test]
fn a_quota_refuses_and_says_so() {
    let place = Place::new();
    let store = place.open();
    store.space().set_limits(70_000, 50_000);
    let layer = store.admit(&toc(1)).unwrap();
    let all = chunks(layer.toc());
    layer.write(all[0], &bytes_of(all[0])).unwrap();
    layer.write(all[1], &bytes_of(all[1])).unwrap();
    assert_eq!(store.space().trouble(), None);
    let long_ago = SystemTime::UNIX_EPOCH;
    assert!(!store.space().claim(1, SystemTime::now()) && !store.space().claim(2, long_ago), "beyond the second limit");
    assert_eq!(store.space().take_claim().map(|claim| claim.bytes), Some(1), "that of the layer used last");
    assert_eq!(store.space().take_claim(), None);
    assert!(matches!(layer.write(all[3], &bytes_of(all[3])), Err(StoreError::NoSpace { .. })));
    assert_eq!(store.space().trouble(), Some(Refusal::Full));
    assert_eq!(store.space().refused()[0], (Refusal::Full, 1));
    layer.rewrite(all[0], &bytes_of(all[0])).unwrap();
    assert_eq!(store.evict(&layer, 1).unwrap(), 32_768);
    layer.write(all[3], &bytes_of(all[3])).unwrap();
    assert_eq!((store.space().trouble(), store.space().used() <= 70_000), (None, true));
}

#[test]
fn a_crash_at_any_step_of_an_eviction_leaves_no_hole_that_counts() {
    for verified in [false, true] {
        for step in [Step::WriteTemporary, Step::Rename, Step::SyncDirectory, Step::Commit, Step::Punch] {
            let place = Place::new();
            let digest = {
                let store = place.open();
                let layer = store.admit(&toc(1)).unwrap();
                fill(&layer);
                layer.sync().unwrap();
                if verified {
                    layer.set_verified().unwrap();
                }
                place.faults.fail(step, 5);
                let evicted = store.evict(&layer, 40_000);
                assert_eq!(evicted.is_ok(), step == Step::Commit && !verified, "{step:?}");
                layer.digest()
            };
            place.faults.heal();
            let layer = place.open().layer(&digest).unwrap();
            let all = chunks(layer.toc());
            for chunk in all.iter().filter(|chunk| layer.has(chunk.ix)) {
                assert_eq!(read(&layer, *chunk), bytes_of(*chunk), "{step:?}, verified: {verified}");
            }
            assert!(all[2..].iter().all(|chunk| layer.has(chunk.ix)), "{step:?}: what stays is not lost");
            assert!(on_disk(&layer) <= layer.bytes_stored(), "{step:?}: what does not count takes no space");
        }
    }
}

#[test]
fn what_lies_in_a_hole_of_a_sparse_file_is_never_given_up() {
    // PAX sparse 1.0: a map of one piece at 40000, then the piece.
    let map = "1\n40000\n100\n";
    let mut content = map.as_bytes().to_vec();
    content.resize(512, 0);
    content.extend(noise(3, 100));
    let records =
        ["GNU.sparse.major=1\n", "GNU.sparse.minor=0\n", "GNU.sparse.name=s\n", "GNU.sparse.realsize=200000\n"];
    let pax: String = records.iter().map(|record| format!("{} {record}", record.len() + 3)).collect();
    let mut bytes = tar(&[("x", pax.into_bytes()), ("s", content)]);
    bytes[156] = b'x';
    let sum = |header: &[u8]| -> u32 {
        header.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) }).sum()
    };
    let first = format!("{:06o}\0 ", sum(&bytes[..512]));
    bytes[148..156].copy_from_slice(first.as_bytes());
    let place = Place::new();
    let store = place.open();
    let layer = store.admit(&build(&bytes[..], &BuildOptions::new(Compression::Plain), &mut ()).unwrap().toc).unwrap();
    let missing = layer.missing(DataRange::new(0, layer.toc().data_size())).unwrap();
    assert_eq!((layer.bytes_total(), missing.len()), (200_000, 1));
    fill(&layer);
    store.evict(&layer, u64::MAX).unwrap();
    assert_eq!(layer.missing(DataRange::new(0, layer.toc().data_size())).unwrap(), missing);
}

#[test]
fn the_last_use_is_remembered() {
    let place = Place::new();
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(4_000_000_000);
    let digest = {
        let layer = place.open().admit(&toc(1)).unwrap();
        layer.note_use(then);
        layer.note_use(SystemTime::UNIX_EPOCH);
        layer.record_use().unwrap();
        layer.digest()
    };
    assert_eq!(place.open().layer(&digest).unwrap().last_use(), then);
}

/// A disk that stops before one step until a test lets it go on.
#[derive(Debug)]
struct Stops {
    at: Step,
    reached: SyncSender<()>,
    go_on: Mutex<Receiver<()>>,
}

impl Faults for Stops {
    fn before(&self, step: Step, _: &Path) -> std::io::Result<()> {
        if step == self.at && self.reached.send(()).is_ok() {
            // Nobody holds it back any more when the test has ended.
            let _ = self.go_on.lock().unwrap().recv();
        }
        Ok(())
    }
}

/// Stops one thread in the middle of `act` and has another one evict everything meanwhile: whether that waited.
fn eviction_waits(at: Step, prepare: impl Fn(&Layer), act: impl Fn(&Layer) + Sync) -> bool {
    let place = Place::new();
    let (reached, stops) = sync_channel(0);
    let (let_go, go_on) = sync_channel(0);
    let digest = {
        let store = place.open();
        let layer = store.admit(&toc(1)).unwrap();
        prepare(&layer);
        layer.sync().unwrap();
        layer.digest()
    };
    let db = Arc::new(redb::Database::create(place.dir.path().join("db")).unwrap());
    let faults = Arc::new(Stops { at, reached, go_on: Mutex::new(go_on) });
    let store = Store::open(
        &place.root(),
        db,
        StoreOptions { sync_interval: Duration::ZERO, faults, ..StoreOptions::default() },
    )
    .unwrap();
    let layer = store.layer(&digest).unwrap();
    thread::scope(|scope| {
        let acting = scope.spawn(|| act(&layer));
        stops.recv().unwrap();
        let eviction = scope.spawn(|| store.evict(&layer, u64::MAX).unwrap());
        let end = Instant::now() + Duration::from_millis(300);
        while Instant::now() < end && !eviction.is_finished() {
            thread::park_timeout(Duration::from_millis(1));
        }
        let waited = !eviction.is_finished();
        drop(stops);
        drop(let_go);
        acting.join().unwrap();
        eviction.join().unwrap();
        waited
    })
}

#[test]
fn an_eviction_waits_for_who_reads_and_for_who_writes() {
    let reads = |layer: &Layer| {
        let chunk = chunks(layer.toc())[0];
        let mut out = vec![0; chunk.data.len() as usize];
        assert!(layer.read(chunk.data, &mut out).unwrap().is_empty());
        assert!(out == bytes_of(chunk), "the hole was read");
    };
    assert!(eviction_waits(Step::ReadData, fill, reads));
    let first = |layer: &Layer| {
        let chunk = chunks(layer.toc())[0];
        layer.write(chunk, &bytes_of(chunk)).unwrap();
    };
    let writes = |layer: &Layer| {
        let chunk = chunks(layer.toc())[1];
        layer.write(chunk, &bytes_of(chunk)).unwrap();
    };
    assert!(eviction_waits(Step::WriteData, first, writes));
}

/// Readers, writers, a syncing thread and an evicting one, all at once: whoever is told that nothing is missing has the right
/// bytes.
#[test]
fn no_reader_sees_a_hole() {
    let place = Place::new();
    let store = place.open();
    let (layer, other) = (store.admit(&toc(1)).unwrap(), store.admit(&toc(1)).unwrap());
    let all = chunks(layer.toc());
    let expected: Vec<Vec<u8>> = all.iter().map(|chunk| bytes_of(*chunk)).collect();
    let (stop, hits) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for (chunk, expected) in all.iter().zip(&expected) {
                        let mut out = vec![0; expected.len()];
                        if layer.read(chunk.data, &mut out).unwrap().is_empty() {
                            hits.fetch_add(1, Ordering::Relaxed);
                            assert!(out == *expected, "chunk {} reads as something else", chunk.ix);
                        }
                    }
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for (chunk, expected) in all.iter().zip(&expected) {
                        match other.write(*chunk, expected) {
                            Ok(()) | Err(StoreError::NoSpace { .. }) => {}
                            Err(error) => panic!("{error}"),
                        }
                    }
                }
            });
        }
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                layer.sync().unwrap()
            }
        });
        let end = Instant::now() + Duration::from_secs(2);
        let mut evictions = 0u64;
        while Instant::now() < end {
            evictions += u64::from(store.evict(&layer, 50_000).unwrap() > 0);
        }
        stop.store(true, Ordering::Relaxed);
        assert!(evictions > 10, "{evictions}");
    });
    assert!(hits.load(Ordering::Relaxed) > 100);
    let used: u64 =
        all.iter().filter(|chunk| layer.has(chunk.ix)).map(|chunk| chunk.data.len().next_multiple_of(4096)).sum();
    assert_eq!(store.space().used(), used, "the account is right in the end");
}
