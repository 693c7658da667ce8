//! Whole layers: proven, polite, persistent.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod fixture;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use fixture::{Double, World, eventually, image, options, plain};
use millstream_chunkstore::{LayerState, StoreOptions};
use millstream_prefetch::{FetchOptions, HydrationState};
use millstream_source::{ErrorKind, Priority};

fn store() -> StoreOptions {
    StoreOptions { sync_interval: Duration::ZERO, ..StoreOptions::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hydrated_layer_is_complete_proven_and_said_so() {
    let image = image(1);
    let world = World::simple(&image);
    let source = Double::new(&image);
    world.attach(source.sources());
    world.fetcher.hydrate(&image.digest);
    world.fetcher.hydrate(&image.digest);
    eventually("the event", || !world.told().is_empty()).await;
    assert_eq!(world.told(), ["verified"]);
    assert_eq!(world.layer.state(), LayerState::Verified);
    let progress = world.fetcher.progress(&image.digest).unwrap();
    assert_eq!((progress.state, progress.blob_bytes), (HydrationState::Verified, image.blob.len() as u64));
    assert_eq!(progress.bytes_present, progress.bytes_total);
    assert_eq!(world.fetcher.counters().hydrate_bytes, image.blob.len() as u64);
    let mut next = 0;
    let mut requests = source.requests();
    requests.sort();
    for range in requests {
        assert!(range.start == next && range.len() <= options().part_size_fast);
        next = range.end;
    }
    world.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_under_way_have_no_more_bytes_together_than_they_may() {
    let image = image(1);
    let limits =
        FetchOptions { part_size: 16 * 1024, part_size_fast: 16 * 1024, part_bytes_in_flight: 40 * 1024, ..options() };
    let world = World::new(&image, &image.toc, limits, store());
    let source = Double::new(&image);
    source.open.send_replace(false);
    world.attach(source.sources());
    world.fetcher.hydrate(&image.digest);
    // Of 8, 14 and 10 KiB; there are slots for three more, and the next one has 16.
    eventually("three parts", || source.requests().len() == 3).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(source.requests().iter().map(|range| range.len()).sum::<u64>(), 32 * 1024);
    source.open.send_replace(true);
    eventually("verification", || world.layer.state() == LayerState::Verified).await;
    world.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_connections_go_on_where_they_broke() {
    let image = image(1);
    let world = World::simple(&image);
    let source = Double::new(&image);
    source.cut.store(200_000, Ordering::SeqCst);
    source.fail.store(2, Ordering::SeqCst);
    world.attach(source.sources());
    world.fetcher.hydrate(&image.digest);
    eventually("the event", || !world.told().is_empty()).await;
    assert_eq!(world.told(), ["verified"]);
    assert_eq!(world.fetcher.counters().hydrate_bytes, image.blob.len() as u64, "no byte came twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_toc_of_another_blob_is_quarantined() {
    let (image, other) = (plain(10), plain(20));
    // The tables of `other`, which has the same sizes, under the blob digest of `image` (byte 16 of the header).
    let mut toc = other.toc.clone();
    toc[16..48].copy_from_slice(image.digest.as_bytes());
    let world = World::new(&image, &toc, options(), store());
    let source = Double::new(&image);
    world.attach(source.sources());
    world.fetcher.hydrate(&image.digest);
    eventually("the event", || !world.told().is_empty()).await;
    assert!(world.told()[0].starts_with("quarantined: the tar has diff ID"), "{:?}", world.told());
    assert!(matches!(world.layer.state(), LayerState::Quarantined { .. }));
    assert_eq!(world.layer.bytes_present(), 0, "nothing that does not match was stored");
    let error = world.fetcher.ensure(&image.digest, world.file(0), Priority::Demand).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Local);
    assert_eq!(world.fetcher.progress(&image.digest).unwrap().state, HydrationState::Quarantined);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_toc_that_lies_about_a_mode_is_quarantined() {
    let image = image(10);
    let parsed = millstream_toc::Toc::open(image.toc.clone()).unwrap();
    let honest = parsed.inode(1).unwrap().mode();
    // Inodes follow the header; kind and flags are the first two bytes of a record, then the mode.
    let header = size_of::<millstream_toc::format::Header>();
    let mode = header + size_of::<millstream_toc::format::InodeRecord>() + 2;
    let mut toc = image.toc.clone();
    assert_eq!(toc[mode..mode + 2], honest.to_le_bytes());
    toc[mode..mode + 2].copy_from_slice(&0o4755u16.to_le_bytes());
    let world = World::new(&image, &toc, options(), store());
    world.attach(Double::new(&image).sources());
    world.fetcher.hydrate(&image.digest);
    eventually("the event", || !world.told().is_empty()).await;
    assert!(world.told()[0].starts_with("quarantined: the TOC made from the blob differs"), "{:?}", world.told());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_bytes_are_the_sources_fault_and_another_one_is_used() {
    let image = image(11);
    let world = World::simple(&image);
    let (good, bad) = (Double::new(&image), Double::new(&image));
    bad.corrupt.store(true, Ordering::SeqCst);
    world.attach(good.sources());
    world.attach(bad.sources());
    world.fetcher.hydrate(&image.digest);
    eventually("verification", || world.told().contains(&"verified".to_owned())).await;
    assert_eq!(world.told(), ["failed: source.digest-mismatch", "verified"]);
    assert_eq!(world.fetcher.counters().digest_mismatches, 1);
    world.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_is_served_while_hydration_is_under_way_and_hydration_waits_for_it() {
    let image = image(12);
    let limits = FetchOptions { starvation: Duration::from_secs(60), ..options() };
    let world = World::new(&image, &image.toc, limits, store());
    let (slow, quick) = (Double::new(&image), Double::new(&image));
    *slow.pace.lock().unwrap() = Duration::from_millis(25);
    world.attach(slow.sources());
    world.fetcher.hydrate(&image.digest);
    eventually("hydration", || slow.sent.load(Ordering::SeqCst) > 0).await;
    quick.open.send_replace(false);
    world.attach(quick.sources());
    let (fetcher, digest, file) = (world.fetcher.clone(), image.digest, world.file(2));
    let reader = tokio::spawn(async move { fetcher.ensure(&digest, file, Priority::Demand).await });
    eventually("the reader's request", || !quick.requests().is_empty()).await;
    // Pieces that were under way come to their end, then nothing moves until the reader is served.
    tokio::time::sleep(Duration::from_millis(120)).await;
    let held = world.fetcher.counters().hydrate_bytes;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(world.fetcher.counters().hydrate_bytes, held);
    let begin = Instant::now();
    quick.open.send_replace(true);
    reader.await.unwrap().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(5));
    eventually("hydration goes on", || world.fetcher.counters().hydrate_bytes > held).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_who_waits_forever_does_not_stop_hydration() {
    let image = image(12);
    let limits = FetchOptions { starvation: Duration::from_millis(50), ..options() };
    let world = World::new(&image, &image.toc, limits, store());
    let (stuck, good) = (Double::new(&image), Double::new(&image));
    stuck.open.send_replace(false);
    world.attach(stuck.sources());
    let (fetcher, digest, file) = (world.fetcher.clone(), image.digest, world.file(0));
    let reader = tokio::spawn(async move { fetcher.ensure(&digest, file, Priority::Demand).await });
    eventually("the reader's request", || !stuck.requests().is_empty()).await;
    world.attach(good.sources());
    world.fetcher.hydrate(&image.digest);
    eventually("verification", || world.layer.state() == LayerState::Verified).await;
    reader.abort();
}

/// A layer that a reader wants, and another one that is hydrated meanwhile.
fn beside(limits: FetchOptions) -> (World, std::sync::Arc<Double>, std::sync::Arc<millstream_chunkstore::Layer>) {
    let (wanted, other) = (image(17), image(18));
    let world = World::new(&wanted, &wanted.toc, limits, store());
    let second = world.store.admit(&other.toc).unwrap();
    world.fetcher.attach(second.clone(), Double::new(&other).sources());
    let source = Double::new(&wanted);
    world.attach(source.sources());
    world.fetcher.set_hydration(false);
    world.fetcher.hydrate(&second.digest());
    (world, source, second)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_of_a_dead_source_does_not_slow_other_layers_down() {
    // At one part in this time it would take minutes.
    let starvation = Duration::from_millis(500);
    let small = 16 * 1024;
    let (world, dead, second) =
        beside(FetchOptions { starvation, part_size: small, part_size_fast: small, ..options() });
    dead.open.send_replace(false);
    let (fetcher, digest, file) = (world.fetcher.clone(), world.image.digest, world.file(0));
    let reader = tokio::spawn(async move { fetcher.ensure(&digest, file, Priority::Demand).await });
    eventually("the reader's request", || !dead.requests().is_empty()).await;
    world.fetcher.set_hydration(true);
    eventually("verification", || second.state() == LayerState::Verified).await;
    assert!(!reader.is_finished());
    reader.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_who_tries_a_lying_source_again_and_again_does_not_slow_other_layers_down() {
    // Whoever has to settle would not have in the time of this test.
    let long = Duration::from_secs(60);
    let (world, liar, second) = beside(FetchOptions { settle: long, starvation: long, ..options() });
    liar.corrupt.store(true, Ordering::SeqCst);
    let (fetcher, digest, file) = (world.fetcher.clone(), world.image.digest, world.file(0));
    let reader = tokio::spawn(async move {
        loop {
            fetcher.ensure(&digest, file, Priority::Demand).await.unwrap_err();
        }
    });
    eventually("the reader's requests", || liar.requests().len() > 3).await;
    world.fetcher.set_hydration(true);
    eventually("verification", || second.state() == LayerState::Verified).await;
    assert!(!reader.is_finished(), "nothing was read");
    reader.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn holding_back_pauses_what_is_under_way_and_nothing_is_lost() {
    let image = image(13);
    let world = World::simple(&image);
    let source = Double::new(&image);
    *source.pace.lock().unwrap() = Duration::from_millis(5);
    world.attach(source.sources());
    world.fetcher.hydrate(&image.digest);
    eventually("hydration", || world.fetcher.counters().hydrate_bytes > 100_000).await;
    world.fetcher.set_hydration(false);
    eventually("no request is under way", || world.fetcher.counters().active == 0).await;
    let held = world.fetcher.counters().hydrate_bytes;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(world.fetcher.counters().hydrate_bytes, held);
    assert!(world.told().is_empty());
    world.fetcher.ensure(&image.digest, world.file(2), Priority::Demand).await.unwrap();
    world.fetcher.set_hydration(true);
    eventually("verification", || world.told() == ["verified"]).await;
    assert_eq!(world.fetcher.counters().hydrate_bytes, image.blob.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn detaching_ends_hydration_and_the_next_layer_has_its_turn() {
    let (one, two) = (image(14), image(15));
    let world = World::simple(&one);
    let second = world.store.admit(&two.toc).unwrap();
    let (stuck, good) = (Double::new(&one), Double::new(&two));
    stuck.open.send_replace(false);
    world.attach(stuck.sources());
    world.fetcher.attach(second.clone(), good.sources());
    world.fetcher.hydrate(&one.digest);
    world.fetcher.hydrate(&two.digest);
    eventually("hydration", || !stuck.requests().is_empty()).await;
    assert_eq!(world.fetcher.progress(&two.digest).unwrap().state, HydrationState::Queued);
    assert!(good.requests().is_empty());
    world.fetcher.detach(&one.digest);
    eventually("the turn of the second", || second.state() == LayerState::Verified).await;
    assert_eq!(world.layer.state(), LayerState::Lazy);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_is_wanted_first_overtakes_and_is_not_held_back() {
    let (one, two) = (image(14), image(15));
    let world = World::simple(&one);
    let second = world.store.admit(&two.toc).unwrap();
    let (held, good) = (Double::new(&one), Double::new(&two));
    world.attach(held.sources());
    world.fetcher.attach(second.clone(), good.sources());
    world.fetcher.set_hydration(false);
    world.fetcher.hydrate(&one.digest);
    world.fetcher.hydrate(&two.digest);
    eventually("the turn of the first", || {
        world.fetcher.progress(&one.digest).unwrap().state == HydrationState::Running
    })
    .await;
    assert_eq!(world.fetcher.queues().layers, 1);
    world.fetcher.hydrate_first(&two.digest);
    eventually("the second", || second.state() == LayerState::Verified).await;
    assert!(held.requests().is_empty() && world.layer.state() == LayerState::Lazy);
    // One that is under way and held back goes on.
    world.fetcher.hydrate_first(&one.digest);
    eventually("the first", || world.layer.state() == LayerState::Verified).await;
    assert_eq!(world.fetcher.queues(), millstream_prefetch::Queues::default());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_hydration_is_visible_and_tried_again() {
    let image = image(16);
    let world = World::simple(&image);
    let source = Double::new(&image);
    source.fail.store(10_000, Ordering::SeqCst);
    world.attach(source.sources());
    world.fetcher.hydrate(&image.digest);
    eventually("a failure", || world.told().len() >= 2).await;
    assert!(world.told().iter().all(|told| told == "failed: source.unavailable"));
    assert_eq!(world.fetcher.progress(&image.digest).unwrap().last_error.as_deref(), Some("down"));
    source.fail.store(0, Ordering::SeqCst);
    eventually("verification", || world.layer.state() == LayerState::Verified).await;
}
