//! What the store promises, on real files and a real database.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod fixture;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use fixture::{Place, bytes_of, chunks, fill, read, toc};
use millstream_chunkstore::{Faults, LayerState, Step, Store, StoreError, StoreOptions, ViewKey};
use millstream_toc::DataRange;

const ENOSPC: i32 = 28;

#[test]
fn an_admitted_layer_is_empty_and_takes_chunks() {
    let place = Place::new();
    let store = place.open();
    let layer = store.admit(&toc(1)).unwrap();
    assert_eq!((layer.number(), layer.state(), layer.bytes_present()), (1, LayerState::Lazy, 0));
    assert_eq!(layer.bytes_total(), 90_000);
    let all = chunks(layer.toc());
    let whole = DataRange::new(0, layer.toc().data_size());
    assert_eq!(layer.missing(whole).unwrap(), all);
    layer.write(all[2], &bytes_of(all[2])).unwrap();
    assert!(layer.has(all[2].ix) && !layer.has(all[1].ix));
    assert_eq!(layer.missing(all[2].data).unwrap(), []);
    assert_eq!(layer.missing(whole).unwrap().len(), all.len() - 1);
    assert_eq!(read(&layer, all[2]), bytes_of(all[2]));
    assert_eq!(layer.bytes_present(), all[2].data.len());
    assert_eq!(layer.disk_size(), layer.toc().data_size() + toc(1).len() as u64);
}

#[test]
fn what_does_not_fit_is_refused() {
    let place = Place::new();
    let layer = place.open().admit(&toc(1)).unwrap();
    let chunk = chunks(layer.toc())[0];
    assert!(matches!(layer.write(chunk, b"short"), Err(StoreError::OutOfRange { .. })));
    let mut elsewhere = chunk;
    elsewhere.data = DataRange::with_len(chunk.data.start + 1, chunk.data.len());
    assert!(matches!(layer.write(elsewhere, &bytes_of(chunk)), Err(StoreError::OutOfRange { .. })));
    let mut none = chunk;
    none.ix = u32::MAX;
    assert!(layer.write(none, &bytes_of(chunk)).is_err());
    let end = layer.toc().data_size();
    assert!(matches!(layer.read(DataRange::new(end, end + 1), &mut [0]), Err(StoreError::OutOfRange { .. })));
    assert!(matches!(layer.read(DataRange::new(0, 2), &mut [0]), Err(StoreError::OutOfRange { .. })));
    drop(layer);
    assert!(matches!(place.open().admit(b"no TOC"), Err(StoreError::Toc(_))));
}

#[test]
fn admission_is_idempotent_and_numbers_are_never_used_twice() {
    let place = Place::new();
    let (first, second);
    {
        let store = place.open();
        let layer = store.admit(&toc(1)).unwrap();
        assert!(std::sync::Arc::ptr_eq(&layer, &store.admit(&toc(1)).unwrap()));
        first = layer.digest();
        second = store.admit(&toc(2)).unwrap().digest();
        assert_eq!(store.layer_by_number(2).unwrap().digest(), second);
        store.remove(&second).unwrap();
        assert!(store.layer(&second).is_none() && store.layer_by_number(2).is_none());
    }
    let store = place.open();
    assert_eq!(store.layers().iter().map(|l| (l.digest(), l.number())).collect::<Vec<_>>(), [(first, 1)]);
    assert_eq!(store.admit(&toc(2)).unwrap().number(), 3);
}

#[test]
fn the_layers_of_an_image_are_taken_in_together() {
    let place = Place::new();
    let tocs = [toc(2), toc(1), toc(2), toc(3)];
    {
        let store = place.open();
        let first = store.admit(&toc(1)).unwrap();
        for (step, left) in [(Step::WriteTemporary, 1), (Step::SyncDirectory, 1), (Step::Commit, 1)] {
            place.faults.fail(step, ENOSPC);
            assert!(matches!(store.admit_all(&tocs), Err(StoreError::NoSpace { .. })), "{step:?}");
            place.faults.heal();
            assert_eq!(store.layers().len(), left, "{step:?}");
        }
        store.admit_all(&tocs).unwrap();
        store.admit_all(&tocs).unwrap();
        assert!(Arc::ptr_eq(&first, &store.admit(&toc(1)).unwrap()));
        first.quarantine("the TOC lies").unwrap();
        store.admit_all(&tocs).unwrap();
        assert!(matches!(store.admit_all(&[toc(4), b"no TOC".to_vec()]), Err(StoreError::Toc(_))));
    }
    let store = place.open();
    let number = |seed| store.admit(&toc(seed)).unwrap().number();
    assert_eq!((number(2), number(3), store.layers().len()), (2, 3, 3));
}

#[test]
fn only_what_was_synced_is_present_after_a_restart() {
    let place = Place::new();
    let digest = {
        let store = place.open();
        let layer = store.admit(&toc(1)).unwrap();
        let all = chunks(layer.toc());
        layer.write(all[0], &bytes_of(all[0])).unwrap();
        layer.sync().unwrap();
        layer.write(all[1], &bytes_of(all[1])).unwrap();
        layer.digest()
    };
    let store = place.open();
    let layer = store.layer(&digest).unwrap();
    let all = chunks(layer.toc());
    assert!(layer.has(all[0].ix) && !layer.has(all[1].ix));
    assert_eq!(layer.bytes_present(), all[0].data.len());
    assert_eq!(read(&layer, all[0]), bytes_of(all[0]));
}

#[test]
fn the_thread_syncs_what_nobody_syncs() {
    let place = Place::new();
    let db = std::sync::Arc::new(redb::Database::create(place.dir.path().join("db")).unwrap());
    let options = millstream_chunkstore::StoreOptions {
        sync_interval: std::time::Duration::from_millis(5),
        ..Default::default()
    };
    let store = millstream_chunkstore::Store::open(&place.root(), db, options).unwrap();
    let layer = store.admit(&toc(1)).unwrap();
    fill(&layer);
    let present = place.file(&layer.digest(), "present");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !present.exists() {
        assert!(std::time::Instant::now() < deadline, "nothing was synced");
        std::thread::park_timeout(std::time::Duration::from_millis(5));
    }
}

#[test]
fn verified_needs_every_chunk_and_lasts() {
    let place = Place::new();
    let digest = {
        let store = place.open();
        let layer = store.admit(&toc(1)).unwrap();
        let missing = chunks(layer.toc()).len() as u32;
        assert!(matches!(layer.set_verified(), Err(StoreError::Incomplete { missing: m, .. }) if m == missing));
        fill(&layer);
        layer.sync().unwrap();
        assert!(place.file(&layer.digest(), "present").exists());
        layer.set_verified().unwrap();
        assert!(!place.file(&layer.digest(), "present").exists());
        layer.digest()
    };
    let layer = place.open().layer(&digest).unwrap();
    assert_eq!(layer.state(), LayerState::Verified);
    assert_eq!(layer.bytes_present(), layer.bytes_total());
    for chunk in chunks(layer.toc()) {
        assert_eq!(read(&layer, chunk), bytes_of(chunk));
    }
}

#[test]
fn a_quarantined_layer_gives_nothing_until_it_is_removed() {
    let place = Place::new();
    let digest = {
        let layer = place.open().admit(&toc(1)).unwrap();
        fill(&layer);
        layer.quarantine("the TOC lies").unwrap();
        layer.digest()
    };
    let store = place.open();
    let layer = store.layer(&digest).unwrap();
    let chunk = chunks(layer.toc())[0];
    assert!(matches!(
        layer.read(chunk.data, &mut vec![0; chunk.data.len() as usize]),
        Err(StoreError::Quarantined { .. })
    ));
    assert!(matches!(layer.write(chunk, &bytes_of(chunk)), Err(StoreError::Quarantined { .. })));
    assert!(matches!(layer.set_verified(), Err(StoreError::Quarantined { .. })));
    assert!(matches!(store.admit(&toc(1)), Err(StoreError::Quarantined { reason, .. }) if reason == "the TOC lies"));
    store.remove(&digest).unwrap();
    assert_eq!(store.admit(&toc(1)).unwrap().number(), 2);
}

#[test]
fn removal_frees_the_names_and_open_handles_go_on() {
    let place = Place::new();
    let store = place.open();
    let layer = store.admit(&toc(1)).unwrap();
    fill(&layer);
    store.remove(&layer.digest()).unwrap();
    assert!(!place.file(&layer.digest(), "").exists());
    let all = chunks(layer.toc());
    assert_eq!(read(&layer, all[0]), bytes_of(all[0]));
    let again = store.admit(&toc(1)).unwrap();
    layer.write(all[1], &bytes_of(all[1])).unwrap();
    layer.sync().unwrap();
    assert!(layer.set_verified().is_err());
    layer.quarantine("late").unwrap();
    assert_eq!((again.state(), again.bytes_present()), (LayerState::Lazy, 0));
    assert!(!place.file(&again.digest(), "present").exists());
}

/// A disk whose sync takes as long as a test wants: it says that it began, then waits.
#[derive(Debug)]
struct SlowSync {
    began: SyncSender<()>,
    go_on: Mutex<Receiver<()>>,
}

impl Faults for SlowSync {
    fn before(&self, step: Step, _: &Path) -> std::io::Result<()> {
        if step == Step::SyncData {
            self.began.send(()).unwrap();
            self.go_on.lock().unwrap().recv().unwrap();
        }
        Ok(())
    }
}

#[test]
fn a_removal_that_waits_for_a_sync_holds_up_no_other_layer() {
    let place = Place::new();
    let db = Arc::new(redb::Database::create(place.dir.path().join("db")).unwrap());
    let (began, has_begun) = sync_channel(0);
    let (let_go, go_on) = sync_channel(0);
    let faults = Arc::new(SlowSync { began, go_on: Mutex::new(go_on) });
    let options = StoreOptions { sync_interval: Duration::ZERO, faults, ..StoreOptions::default() };
    let store = Store::open(&place.root(), db, options).unwrap();
    let (slow, other) = (store.admit(&toc(1)).unwrap(), store.admit(&toc(2)).unwrap());
    fill(&slow);
    thread::scope(|scope| {
        scope.spawn(|| slow.sync().unwrap());
        has_begun.recv().unwrap();
        let removal = scope.spawn(|| store.remove(&slow.digest()).unwrap());
        let deadline = Instant::now() + Duration::from_secs(10);
        let (found, answers) = sync_channel(1);
        let (store, number, digest) = (&store, other.number(), slow.digest());
        scope.spawn(move || {
            // Until the removal has taken the layer out of the tables, which it does before it waits.
            while store.layer(&digest).is_some() {
                thread::park_timeout(Duration::from_millis(1));
            }
            found.send(store.layer_by_number(number).is_some()).unwrap();
        });
        let answer = answers.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        assert!(!removal.is_finished());
        let_go.send(()).unwrap();
        assert_eq!(answer, Ok(true), "the other layer could not be looked up while a sync was under way");
    });
}

#[test]
fn a_full_disk_changes_nothing() {
    let place = Place::new();
    let store = place.open();
    let layer = store.admit(&toc(1)).unwrap();
    let chunk = chunks(layer.toc())[0];
    place.faults.fail(Step::WriteData, ENOSPC);
    assert!(matches!(layer.write(chunk, &bytes_of(chunk)), Err(StoreError::NoSpace { .. })));
    assert!(!layer.has(chunk.ix));
    place.faults.fail(Step::WriteTemporary, ENOSPC);
    layer.write(chunk, &bytes_of(chunk)).unwrap();
    assert!(matches!(layer.sync(), Err(StoreError::NoSpace { .. })));
    assert_eq!(read(&layer, chunk), bytes_of(chunk));
    assert!(matches!(store.admit(&toc(2)), Err(StoreError::NoSpace { .. })));
    place.faults.heal();
    layer.sync().unwrap();
    assert_eq!(store.admit(&toc(2)).unwrap().number(), 2);
}

#[test]
fn nobody_else_may_look() {
    let place = Place::new();
    let layer = place.open().admit(&toc(1)).unwrap();
    fill(&layer);
    layer.sync().unwrap();
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&place.root()), 0o700);
    for name in ["toc", "data", "present"] {
        assert_eq!(mode(&place.file(&layer.digest(), name)), 0o600, "{name}");
    }
}

#[test]
fn views_keep_their_numbers() {
    let place = Place::new();
    let key = |layers: &[u32]| ViewKey { layers: layers.to_vec(), below: b"base".to_vec() };
    {
        let store = place.open();
        let one = store.allocate_view(&key(&[1, 2])).unwrap();
        let two = store.allocate_view(&key(&[2, 1])).unwrap();
        assert_eq!((one.number, one.existing, two.number, two.existing), (1, false, 2, false));
        assert!(matches!(store.open_view(1), Err(StoreError::Unknown { .. })));
        assert!(matches!(store.write_view(3, b"x"), Err(StoreError::Unknown { .. })));
        store.write_view(1, b"first").unwrap();
        let open = store.open_view(1).unwrap();
        store.write_view(1, b"another").unwrap();
        assert_eq!(open.as_ref(), b"first");
        store.remove_view(2).unwrap();
    }
    fs::write(place.root().join("views/2"), b"rubbish").unwrap();
    let store = place.open();
    assert!(!place.root().join("views/2").exists());
    assert!(store.allocate_view(&key(&[1, 2])).unwrap().existing);
    assert_eq!(store.open_view(1).unwrap().as_ref(), b"another");
    assert_eq!(store.allocate_view(&key(&[2, 1])).unwrap().number, 3);
    assert_eq!(store.views().unwrap(), [(1, key(&[1, 2])), (3, key(&[2, 1]))]);
    fs::write(place.root().join("views/1"), b"anothes").unwrap();
    assert!(matches!(store.open_view(1), Err(StoreError::Damaged { .. })));
    fs::remove_file(place.root().join("views/1")).unwrap();
    assert!(matches!(store.open_view(1), Err(StoreError::Damaged { .. })));
}
