//! Content that another layer holds is not fetched.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod fixture;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fixture::{Double, Image, World, eventually, made_of, noise, options, tar};
use millstream_chunkstore::{Layer, StoreOptions};
use millstream_prefetch::FetchOptions;
use millstream_source::Priority;
use millstream_toc::{Compression, DataRange};

const DEMAND: Priority = Priority::Demand;
const ALL: DataRange = DataRange::new(0, u64::MAX);

/// Ten files of 600 KiB each, of which the last one depends on `changed`.
fn build(changed: u32) -> Arc<Image> {
    let files =
        (0..10).map(|n| if n == 9 { ("changed", noise(changed, 600 << 10)) } else { ("same", noise(n, 600 << 10)) });
    made_of(fixture::gzip(&tar(&files.collect::<Vec<_>>())), Compression::Gzip)
}

fn store() -> StoreOptions {
    StoreOptions { sync_interval: Duration::ZERO, ..StoreOptions::default() }
}

/// A store in which another build is local.
fn world(new: &Arc<Image>, options: FetchOptions) -> (World, Arc<Layer>) {
    let world = World::new(new, &new.toc, options, store());
    let old = build(1000);
    let before = world.store.admit(&old.toc).unwrap();
    for chunk in before.toc().chunks_in(ALL).unwrap() {
        before.write(chunk, &old.data[chunk.data.start as usize..chunk.data.end as usize]).unwrap();
    }
    before.set_verified().unwrap();
    (world, before)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_layer_holds_is_there_without_a_request() {
    let new = build(2000);
    let (world, _old) = world(&new, options());
    let source = Double::new(&new);
    world.attach(source.sources());
    for file in 0..9 {
        world.fetcher.ensure(&new.digest, world.file(file), DEMAND).await.unwrap();
    }
    assert_eq!(source.requests(), []);
    eventually("the rest", || world.fetcher.counters().shared_bytes == 9 * (600 << 10)).await;
    world.fetcher.ensure(&new.digest, world.file(9), DEMAND).await.unwrap();
    let fetched: u64 = source.requests().iter().map(|range| range.len()).sum();
    assert!(fetched > 0 && fetched < new.blob.len() as u64 / 3, "{fetched} of {}", new.blob.len());
    world.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_is_removed_meanwhile_changes_nothing_but_the_way() {
    let new = build(2000);
    let (world, old) = world(&new, options());
    let source = Double::new(&new);
    world.attach(source.sources());
    world.store.remove(&old.digest()).unwrap();
    drop(old);
    for file in 0..10 {
        world.fetcher.ensure(&new.digest, world.file(file), DEMAND).await.unwrap();
    }
    world.check();
    assert_eq!(world.layer.bytes_present(), world.layer.bytes_total());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn switched_off_everything_is_fetched() {
    let new = build(2000);
    let (world, _old) = world(&new, FetchOptions { share: false, ..options() });
    let source = Double::new(&new);
    world.attach(source.sources());
    world.fetcher.ensure(&new.digest, world.file(0), DEMAND).await.unwrap();
    assert_eq!((source.requests().len(), world.fetcher.counters().shared_bytes), (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_came_meanwhile_is_used_by_the_next_one() {
    let (one, two) = (build(1001), build(1002));
    let world = World::new(&one, &one.toc, options(), store());
    let second = world.store.admit(&two.toc).unwrap();
    let (first_source, source) = (Double::new(&one), Double::new(&two));
    world.attach(first_source.sources());
    world.fetcher.attach(second.clone(), source.sources());
    world.fetcher.hydrate(&one.digest);
    world.fetcher.hydrate(&two.digest);
    eventually("both", || world.told().len() == 2).await;
    assert_eq!(world.told(), ["verified", "verified"]);
    assert_eq!(world.fetcher.counters().shared_bytes, 9 * (600 << 10));
    assert_eq!(source.content_requests.load(Ordering::SeqCst), 0);
}
