//! Content that another layer holds is not fetched.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod fixture;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fixture::{Double, Image, World, eventually, made_of, noise, options, tar};
use millstream_chunkstore::{Layer, LayerState, StoreOptions};
use millstream_prefetch::FetchOptions;
use millstream_source::{ErrorKind, Priority};
use millstream_toc::{Compression, DataRange};
use proptest::prelude::*;

const DEMAND: Priority = Priority::Demand;
const ALL: DataRange = DataRange::new(0, u64::MAX);

const NAMES: [&str; 9] = ["0", "1", "2", "3", "4", "5", "6", "7", "8"];

/// Ten files of 600 KiB each, of which the last one depends on `changed`.
fn build(changed: u32) -> Arc<Image> {
    let files = (0..10).map(|n| {
        if n == 9 { ("changed", noise(changed, 600 << 10)) } else { (NAMES[n as usize], noise(n, 600 << 10)) }
    });
    made_of(fixture::gzip(&tar(&files.collect::<Vec<_>>())), Compression::Gzip)
}

fn store() -> StoreOptions {
    StoreOptions { sync_interval: Duration::ZERO, ..StoreOptions::default() }
}

/// A store in which another build is local.
fn world(new: &Arc<Image>, options: FetchOptions) -> (World, Arc<Layer>) {
    let world = World::new(new, &new.toc, options, store());
    let before = fill_from_another_build(&world);
    (world, before)
}

fn fill_from_another_build(world: &World) -> Arc<Layer> {
    let old = OLD.get_or_init(|| build(1000));
    let before = world.store.admit(&old.toc).unwrap();
    for chunk in before.toc().chunks_in(ALL).unwrap() {
        before.write(chunk, &old.data[chunk.data.start as usize..chunk.data.end as usize]).unwrap();
    }
    before.set_verified().unwrap();
    before
}

static OLD: std::sync::OnceLock<Arc<Image>> = std::sync::OnceLock::new();

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

/// A world with another build, and a source with this skeleton; hydrated until something is told.
async fn hydrated(new: &Arc<Image>, toc: &[u8], skeleton: Result<Vec<u8>, ErrorKind>) -> (World, Arc<Double>) {
    let world = World::new(new, toc, options(), store());
    fill_from_another_build(&world);
    let source = Double::new(new);
    *source.skeleton.lock().unwrap() = skeleton;
    world.attach(source.with_content());
    world.fetcher.hydrate(&new.digest);
    eventually("the end", || world.told().iter().any(|told| !told.starts_with("failed"))).await;
    (world, source)
}

fn fetched(source: &Double) -> u64 {
    source.requests().iter().map(|range| range.len()).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_of_which_little_is_missing_is_proven_by_its_skeleton() {
    let new = build(2000);
    let (world, source) = hydrated(&new, &new.toc, Ok(new.skeleton.clone())).await;
    assert_eq!((world.told(), world.layer.state()), (vec!["verified".to_owned()], LayerState::Verified));
    // One file of ten, and the rest of the spans that it lies in.
    assert!(fetched(&source) < new.blob.len() as u64 / 3, "{} of {}", fetched(&source), new.blob.len());
    assert_eq!(world.fetcher.counters().hydrate_bytes, fetched(&source));
    world.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_of_which_much_is_missing_is_proven_by_its_blob() {
    let new = build(2000);
    let world = World::new(&new, &new.toc, options(), store());
    let source = Double::new(&new);
    *source.skeleton.lock().unwrap() = Ok(new.skeleton.clone());
    world.attach(source.with_content());
    world.fetcher.hydrate(&new.digest);
    eventually("the end", || world.told() == ["verified"]).await;
    assert_eq!((fetched(&source), source.skeleton_requests.load(Ordering::SeqCst)), (new.blob.len() as u64, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_skeleton_costs_the_blob_and_no_layer() {
    let (new, other) = (build(2000), fixture::image(1));
    let wrong = [other.skeleton.clone(), b"no zstd".to_vec(), zstd::bulk::compress(&[0; 100], 3).unwrap(), Vec::new()];
    for skeleton in wrong {
        let (world, source) = hydrated(&new, &new.toc, Ok(skeleton)).await;
        assert_eq!(world.told(), ["verified"]);
        assert!(fetched(&source) >= new.blob.len() as u64);
        assert_eq!(source.skeleton_requests.load(Ordering::SeqCst), 1);
        world.check();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_skeleton_or_no_server_is_no_obstacle() {
    let new = build(2000);
    for (kind, asked) in [(ErrorKind::NotFound, 1), (ErrorKind::Unavailable, 3)] {
        let (world, source) = hydrated(&new, &new.toc, Err(kind)).await;
        assert_eq!(world.told().last().unwrap(), "verified");
        assert_eq!(source.skeleton_requests.load(Ordering::SeqCst), asked);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_toc_that_lies_about_a_name_is_found_out_with_or_without_the_skeleton() {
    let new = build(2000);
    let mut toc = new.toc.clone();
    // The strings are the last table: this changes the last name.
    *toc.last_mut().unwrap() ^= 1;
    for skeleton in [Ok(new.skeleton.clone()), Err(ErrorKind::NotFound)] {
        let (world, _) = hydrated(&new, &toc, skeleton).await;
        assert!(world.told()[0].starts_with("quarantined"), "{:?}", world.told());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_rotted_on_the_disk_is_found_and_mended() {
    let new = build(2000);
    let world = World::new(&new, &new.toc, options(), store());
    let source = Double::new(&new);
    *source.skeleton.lock().unwrap() = Ok(new.skeleton.clone());
    world.attach(source.with_content());
    for file in 0..9 {
        world.fetcher.ensure(&new.digest, world.file(file), DEMAND).await.unwrap();
    }
    use std::os::unix::fs::FileExt;
    world.layer.data_file().write_all_at(b"rot", world.file(4).start + 1000).unwrap();
    world.fetcher.hydrate(&new.digest);
    eventually("the end", || world.told() == ["verified"]).await;
    assert_eq!(source.skeleton_requests.load(Ordering::SeqCst), 1);
    world.check();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever a server gives for a skeleton, the layer is verified in the end and right.
    #[test]
    fn no_skeleton_harms_a_layer(at in any::<proptest::sample::Index>(), byte in 1u8.., cut in any::<bool>()) {
        let new = SHARED.get_or_init(|| build(2000));
        let mut skeleton = new.skeleton.clone();
        let at = at.index(skeleton.len());
        if cut { skeleton.truncate(at) } else { skeleton[at] ^= byte }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let (world, _) = hydrated(new, &new.toc, Ok(skeleton)).await;
            assert_eq!(world.told(), ["verified"]);
            world.check();
        });
    }
}

static SHARED: std::sync::OnceLock<Arc<Image>> = std::sync::OnceLock::new();
