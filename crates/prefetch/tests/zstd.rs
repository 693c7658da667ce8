//! zstd layers: by spans where frames are short, as plain content where they are not, and proven as a whole in both cases.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod fixture;

use std::sync::atomic::Ordering;

use fixture::{Double, World, closed, eventually, framed, options};
use millstream_chunkstore::{LayerState, StoreOptions};
use millstream_prefetch::{FetchOptions, plan};
use millstream_source::{ErrorKind, Priority};
use millstream_toc::{DataRange, Toc};

const DEMAND: Priority = Priority::Demand;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_frames_are_read_by_spans_without_windows() {
    let image = framed(1);
    let world = World::simple(&image);
    let source = Double::new(&image);
    world.attach(source.sources());
    let big = world.file(1);
    let range = DataRange::with_len(big.start + (3 << 20), 100_000);
    world.fetcher.ensure(&image.digest, range, DEMAND).await.unwrap();
    let bytes: u64 = source.requests().iter().map(|range| range.len()).sum();
    assert!(bytes < image.blob.len() as u64 / 2, "{bytes}");
    for file in 0..3 {
        world.fetcher.ensure(&image.digest, world.file(file), DEMAND).await.unwrap();
    }
    assert_eq!(source.window_requests.load(Ordering::SeqCst), 0);
    assert_eq!(world.layer.bytes_present(), world.layer.bytes_total());
    world.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closed_spans_are_read_as_content_and_open_ones_from_the_blob() {
    let image = closed(1);
    let world = World::simple(&image);
    let source = Double::new(&image);
    world.attach(source.with_content());
    let big = world.file(1);
    let range = DataRange::with_len(big.start + (9 << 20) + 1000, 10);
    world.fetcher.ensure(&image.digest, range, DEMAND).await.unwrap();
    assert!(source.requests().is_empty(), "the blob is of no use");
    assert_eq!(source.content_requests.load(Ordering::SeqCst), 1);
    let fetched = world.fetcher.counters().content_bytes;
    assert!((plan::CLOSED_BLOCK..plan::CLOSED_BLOCK + (64 << 10)).contains(&fetched), "{fetched} with its block");
    world.check();

    // The first file lies in an open span and the closed one.
    world.fetcher.ensure(&image.digest, world.file(0), DEMAND).await.unwrap();
    let toc = Toc::open(image.toc.clone()).unwrap();
    let asked = source.requests();
    assert_eq!(asked.iter().map(|range| range.start).collect::<Vec<_>>(), [0], "{asked:?}");
    assert!(asked[0].end <= toc.span(1).unwrap().blob.start);
    for file in 0..3 {
        world.fetcher.ensure(&image.digest, world.file(file), DEMAND).await.unwrap();
    }
    assert_eq!(world.layer.bytes_present(), world.layer.bytes_total());
    world.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_readers_of_a_closed_span_are_one_fetch_and_neighbours_have_their_own() {
    let image = closed(1);
    let world = World::simple(&image);
    let source = Double::new(&image);
    source.open.send_replace(false);
    world.attach(source.with_content());
    let start = (world.file(1).start + (4 << 20)).next_multiple_of(plan::CLOSED_BLOCK);
    let read = |at: u64| {
        let (fetcher, digest) = (world.fetcher.clone(), image.digest);
        tokio::spawn(async move { fetcher.ensure(&digest, DataRange::with_len(at, 5000), DEMAND).await })
    };
    let readers: Vec<_> = (0..8).map(|n| read(start + 100_000 + n * 10_000)).collect();
    eventually("the request", || source.content_requests.load(Ordering::SeqCst) == 1).await;
    let other = read(start + plan::CLOSED_BLOCK + 100_000);
    eventually("the other request", || source.content_requests.load(Ordering::SeqCst) == 2).await;
    source.open.send_replace(true);
    for reader in readers.into_iter().chain([other]) {
        reader.await.unwrap().unwrap();
    }
    assert_eq!(source.content_requests.load(Ordering::SeqCst), 2);
    world.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_span_without_a_source_of_content_is_an_error_that_comes_at_once() {
    let image = closed(1);
    let world = World::simple(&image);
    let source = Double::new(&image);
    world.attach(source.sources());
    let range = DataRange::with_len(world.file(1).start + (5 << 20), 1);
    let error = world.fetcher.ensure(&image.digest, range, DEMAND).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(source.requests().is_empty());
    // Not so when the layer has come as a whole.
    world.fetcher.hydrate(&image.digest);
    eventually("verification", || world.layer.state() == LayerState::Verified).await;
    world.fetcher.ensure(&image.digest, range, DEMAND).await.unwrap();
    world.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closed_spans_are_served_when_the_disk_keeps_nothing() {
    let image = closed(1);
    let world = World::simple(&image);
    let source = Double::new(&image);
    world.attach(source.with_content());
    // Across the border of the open span and the closed one.
    let file = world.file(0);
    let got = world.fetcher.fetch_unstored(&image.digest, file).await.unwrap();
    assert!(got == image.data[file.start as usize..file.end as usize]);
    assert_eq!(world.layer.bytes_present(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_kinds_are_proven_and_only_with_the_right_toc() {
    for image in [framed(5), closed(5)] {
        let world = World::simple(&image);
        world.attach(Double::new(&image).sources());
        world.fetcher.hydrate(&image.digest);
        eventually("the event", || !world.told().is_empty()).await;
        assert_eq!(world.told(), ["verified"]);
        world.check();

        // A span that begins elsewhere: byte 8 of the record is its place in the tar. Strings are last, spans before them.
        let toc = Toc::open(image.toc.clone()).unwrap();
        let strings = toc.header().counts[8].get() as usize;
        let last_span = image.toc.len() - strings - 40;
        let mut lie = image.toc.clone();
        lie[last_span + 8] ^= 1;
        let store = StoreOptions { sync_interval: std::time::Duration::ZERO, ..StoreOptions::default() };
        let world = World::new(&image, &lie, FetchOptions { ..options() }, store);
        world.attach(Double::new(&image).sources());
        world.fetcher.hydrate(&image.digest);
        eventually("the event", || !world.told().is_empty()).await;
        assert!(world.told()[0].starts_with("quarantined: the TOC made from the blob differs"), "{:?}", world.told());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_blob_is_the_sources_fault() {
    let image = framed(6);
    let world = World::simple(&image);
    let (good, bad) = (Double::new(&image), Double::new(&image));
    bad.corrupt.store(true, Ordering::SeqCst);
    world.attach(good.sources());
    world.attach(bad.sources());
    world.fetcher.ensure(&image.digest, world.file(0), DEMAND).await.unwrap();
    assert_eq!(world.fetcher.counters().digest_mismatches, 1);
    world.check();
    world.fetcher.hydrate(&image.digest);
    eventually("verification", || world.layer.state() == LayerState::Verified).await;
}
