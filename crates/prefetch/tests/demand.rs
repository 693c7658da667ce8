//! Reads: shared, verified, bounded.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod fixture;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use fixture::{Double, World, eventually, image, options};
use millstream_chunkstore::StoreOptions;
use millstream_prefetch::{FetchOptions, plan};
use millstream_source::{ErrorKind, Priority};
use millstream_toc::DataRange;
use proptest::prelude::*;

const DEMAND: Priority = Priority::Demand;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_readers_of_a_cold_range_are_one_fetch() {
    let image = image(1);
    let world = World::simple(&image);
    let source = Double::new(&image);
    source.open.send_replace(false);
    world.attach(source.sources());
    let range = DataRange::with_len(world.file(1).start + (2 << 20), 100_000);
    let readers: Vec<_> = (0..8)
        .map(|_| {
            let (fetcher, digest) = (world.fetcher.clone(), image.digest);
            tokio::spawn(async move { fetcher.ensure(&digest, range, DEMAND).await })
        })
        .collect();
    eventually("the request", || !source.requests().is_empty()).await;
    source.open.send_replace(true);
    for reader in readers {
        reader.await.unwrap().unwrap();
    }
    eventually("the end of the fetch", || world.fetcher.counters().active == 0).await;
    let requests = source.requests();
    assert_eq!(requests.len(), 1);
    let counters = world.fetcher.counters();
    assert_eq!((counters.demand_bytes, counters.requests), (requests[0].len(), 1));
    assert!(requests[0].len() < image.blob.len() as u64 / 2);
    assert_eq!(source.window_requests.load(Ordering::SeqCst), 1);
    world.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_answer_is_asked_for_once_more_and_few_are() {
    let image = image(1);
    let world = World::simple(&image);
    let source = Double::new(&image);
    world.attach(source.sources());
    let range = DataRange::with_len(world.file(1).start + (2 << 20), 10_000);
    // Not stored: each is a request.
    let read = async || {
        let begun = Instant::now();
        world.fetcher.fetch_unstored(&image.digest, range).await.unwrap();
        begun.elapsed()
    };
    let later = Duration::from_secs(5);
    *source.late.lock().unwrap() = Some((100, later));
    for _ in 0..120 {
        assert!(read().await < later);
    }
    assert_eq!((world.fetcher.counters().hedged, source.requests().len()), (1, 121));
    eventually("the end of the late request", || world.fetcher.counters().active == 0).await;
    // When all are late, asking twice would only make them later.
    *source.late.lock().unwrap() = Some((1, Duration::from_millis(40)));
    for _ in 0..100 {
        read().await;
    }
    let hedged = world.fetcher.counters().hedged;
    assert!(hedged <= source.requests().len() as u64 / 50, "{hedged}");
    assert_eq!(world.fetcher.counters().requests, source.requests().len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_range_of_any_file_is_served() {
    let image = image(1);
    let world = World::simple(&image);
    let source = Double::new(&image);
    world.attach(source.sources());
    for file in [2, 0, 1] {
        world.fetcher.ensure(&image.digest, world.file(file), DEMAND).await.unwrap();
        assert_eq!(world.layer.missing(world.file(file)).unwrap(), []);
    }
    world.check();
    let before = source.requests().len();
    world.fetcher.ensure(&image.digest, world.file(1), DEMAND).await.unwrap();
    assert_eq!(source.requests().len(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn corrupt_bytes_never_reach_the_store_and_the_next_source_is_used() {
    let image = image(2);
    let world = World::simple(&image);
    let (good, bad) = (Double::new(&image), Double::new(&image));
    bad.corrupt.store(true, Ordering::SeqCst);
    world.attach(good.sources());
    world.attach(bad.sources());
    world.fetcher.ensure(&image.digest, world.file(0), DEMAND).await.unwrap();
    assert_eq!((bad.requests().len(), good.requests().len()), (1, 1));
    assert_eq!(world.fetcher.counters().digest_mismatches, 1);
    world.fetcher.ensure(&image.digest, world.file(1), DEMAND).await.unwrap();
    assert_eq!(bad.requests().len(), 1, "a source that gave wrong bytes is asked last");
    world.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_is_wrong_is_asked_once_and_content_comes_to_help() {
    let image = image(2);
    let world = World::simple(&image);
    let source = Double::new(&image);
    source.corrupt.store(true, Ordering::SeqCst);
    world.attach(source.sources());
    let error = world.fetcher.ensure(&image.digest, world.file(0), DEMAND).await.unwrap_err();
    assert_eq!((error.kind, source.requests().len()), (ErrorKind::DigestMismatch, 1));
    world.attach(source.with_content());
    world.fetcher.ensure(&image.digest, world.file(0), DEMAND).await.unwrap();
    assert_eq!(source.content_requests.load(Ordering::SeqCst), 1);
    assert_eq!(world.fetcher.counters().content_bytes, world.file(0).len());
    world.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_bodies_are_asked_for_again() {
    let image = image(3);
    let world = World::simple(&image);
    let source = Double::new(&image);
    source.fail.store(2, Ordering::SeqCst);
    world.attach(source.sources());
    world.fetcher.ensure(&image.digest, world.file(0), DEMAND).await.unwrap();
    assert_eq!(source.requests().len(), 3);
    source.cut.store(1000, Ordering::SeqCst);
    let error = world.fetcher.ensure(&image.digest, world.file(2), DEMAND).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert_eq!(source.requests().len(), 3 + options().rounds as usize);
    assert_eq!(world.fetcher.counters().digest_mismatches, 0);
}

#[tokio::test(start_paused = true)]
async fn a_stalled_source_ends_in_an_error_at_the_deadline() {
    let image = image(3);
    let limits = FetchOptions { idle_timeout: Duration::from_secs(600), ..options() };
    let world = World::new(
        &image,
        &image.toc,
        limits,
        StoreOptions { sync_interval: Duration::ZERO, ..StoreOptions::default() },
    );
    world.attach(ImageSourcesThatHang::sources(&image));
    let begin = tokio::time::Instant::now();
    let error = world.fetcher.ensure(&image.digest, world.file(0), DEMAND).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::TimedOut);
    assert_eq!(begin.elapsed().as_secs(), 60);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(world.fetcher.counters().active, 0);
}

/// Never answers.
#[derive(Debug)]
struct ImageSourcesThatHang;

impl ImageSourcesThatHang {
    fn sources(image: &std::sync::Arc<fixture::Image>) -> millstream_prefetch::ImageSources {
        let double = Double::new(image);
        millstream_prefetch::ImageSources { blob: std::sync::Arc::new(Self), ..double.sources() }
    }
}

#[async_trait::async_trait]
impl millstream_source::BlobSource for ImageSourcesThatHang {
    async fn read(
        &self,
        _: &millstream_oci::Digest,
        _: millstream_toc::BlobRange,
    ) -> Result<millstream_source::ByteStream, millstream_source::SourceError> {
        std::future::pending().await
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_source_makes_room_for_the_next_one() {
    let image = image(3);
    let world = World::simple(&image);
    let good = Double::new(&image);
    world.attach(good.sources());
    world.attach(ImageSourcesThatHang::sources(&image));
    let begin = tokio::time::Instant::now();
    world.fetcher.ensure(&image.digest, world.file(0), DEMAND).await.unwrap();
    assert!(begin.elapsed() >= options().idle_timeout && begin.elapsed() < options().read_deadline);
    world.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_go_on_when_their_chunks_are_there_and_a_reader_that_leaves_harms_nobody() {
    let image = image(4);
    let world = World::simple(&image);
    let source = Double::new(&image);
    *source.pace.lock().unwrap() = Duration::from_millis(20);
    world.attach(source.sources());
    let big = world.file(1);
    let first = DataRange::with_len(big.start, 100);
    let (fetcher, digest) = (world.fetcher.clone(), image.digest);
    let leaving =
        tokio::spawn(async move { fetcher.ensure(&digest, DataRange::with_len(big.start, 3 << 20), DEMAND).await });
    eventually("the request", || !source.requests().is_empty()).await;
    let (fetcher, digest) = (world.fetcher.clone(), image.digest);
    world.fetcher.ensure(&image.digest, first, DEMAND).await.unwrap();
    assert!(source.sent.load(Ordering::SeqCst) < source.requests()[0].len(), "woken before the end of the body");
    leaving.abort();
    fetcher.ensure(&digest, DataRange::with_len(big.start, 3 << 20), DEMAND).await.unwrap();
    assert_eq!(source.requests().len(), 1);
    world.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn detaching_ends_reads_at_once() {
    let image = image(4);
    let world = World::simple(&image);
    let source = Double::new(&image);
    source.open.send_replace(false);
    world.attach(source.sources());
    let (fetcher, digest, file) = (world.fetcher.clone(), image.digest, world.file(0));
    let reader = tokio::spawn(async move { fetcher.ensure(&digest, file, DEMAND).await });
    eventually("the request", || world.fetcher.counters().active == 1).await;
    world.fetcher.detach(&image.digest);
    assert_eq!(reader.await.unwrap().unwrap_err().kind, ErrorKind::Unavailable);
    eventually("the slot is given back", || world.fetcher.counters().active == 0).await;
    let error = world.fetcher.ensure(&image.digest, world.file(0), DEMAND).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_synced_is_not_fetched_again_after_a_restart() {
    let image = image(5);
    let source = Double::new(&image);
    let world = World::simple(&image);
    world.attach(source.sources());
    let range = DataRange::with_len(world.file(1).start, 1 << 20);
    world.fetcher.ensure(&image.digest, range, DEMAND).await.unwrap();
    eventually("the end of the fetch", || world.fetcher.counters().active == 0).await;
    world.layer.sync().unwrap();
    let present = world.layer.bytes_present();
    let World { dir, store, layer, fetcher, .. } = world;
    drop((store, layer, fetcher));
    eventually("the end of everything", || redb::Database::open(dir.path().join("db")).is_ok()).await;
    let store = fixture::open_store(dir.path(), StoreOptions::default());
    let layer = store.layer(&image.digest).unwrap();
    assert_eq!(layer.bytes_present(), present);
    let fetcher = millstream_prefetch::Fetcher::new(
        store.clone(),
        options(),
        std::sync::Arc::new(fixture::Told::default()),
        tokio::runtime::Handle::current(),
    );
    fetcher.attach(layer.clone(), source.sources());
    let before = source.requests().len();
    fetcher.ensure(&image.digest, range, DEMAND).await.unwrap();
    assert_eq!(source.requests().len(), before);
    fetcher.hydrate(&image.digest);
    eventually("hydration", || layer.state() == millstream_chunkstore::LayerState::Verified).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_files_come_whole_and_files_read_in_order_come_ahead() {
    let image = image(6);
    let limits = FetchOptions { small_file: 4 << 20, read_ahead: 3 << 20, demand_spans: 1, ..options() };
    let world = World::new(&image, &image.toc, limits, StoreOptions::default());
    let source = Double::new(&image);
    world.attach(source.sources());
    let big = world.file(1);
    for part in 0..2u64 {
        let read = DataRange::with_len(big.start + part * 4096, 4096);
        world.fetcher.ensure(&image.digest, read, DEMAND).await.unwrap();
    }
    let ahead = DataRange::with_len(big.start, 3 << 20);
    eventually("reading ahead", || world.layer.missing(ahead).unwrap().is_empty()).await;
    assert!(!world.layer.missing(big).unwrap().is_empty());
    assert!(world.fetcher.counters().prefetch_bytes > 0);
    world.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_said_and_the_bytes_can_be_had_without_it() {
    #[derive(Debug)]
    struct Full;
    impl millstream_chunkstore::Faults for Full {
        fn before(&self, step: millstream_chunkstore::Step, _: &std::path::Path) -> std::io::Result<()> {
            if step == millstream_chunkstore::Step::WriteData {
                Err(std::io::Error::from_raw_os_error(28))
            } else {
                Ok(())
            }
        }
    }
    let image = image(7);
    let store = StoreOptions { faults: std::sync::Arc::new(Full), ..StoreOptions::default() };
    let world = World::new(&image, &image.toc, options(), store);
    let source = Double::new(&image);
    world.attach(source.sources());
    let range = DataRange::with_len(world.file(1).start + 1_000_001, 200_000);
    let error = world.fetcher.ensure(&image.digest, range, DEMAND).await.unwrap_err();
    assert_eq!((error.kind, source.requests().len()), (ErrorKind::Local, 1));
    let bytes = world.fetcher.fetch_unstored(&image.digest, range).await.unwrap();
    assert!(bytes == image.data[range.start as usize..range.end as usize]);
    assert_eq!(world.layer.bytes_present(), 0);
}

/// Spans that were requested, each as often as it was.
fn spans_of_requests(world: &World, source: &Double) -> Vec<u32> {
    let toc = world.layer.toc();
    let mut spans = Vec::new();
    for request in source.requests() {
        let inside = |ix: &u32| {
            let blob = toc.span(*ix).unwrap().blob;
            request.start <= blob.start && blob.end <= request.end
        };
        spans.extend((0..toc.span_count()).filter(inside));
    }
    spans.sort_unstable();
    spans
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn no_span_is_fetched_twice_in_whatever_order(
        order in Just((0..60u64).collect::<Vec<_>>()).prop_shuffle(),
        demand_spans in 1u32..4,
        at_once in 1usize..9,
    ) {
        static IMAGES: std::sync::LazyLock<[std::sync::Arc<fixture::Image>; 2]> =
            std::sync::LazyLock::new(|| [image(1), fixture::plain(1)]);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        for image in &*IMAGES {
            runtime.block_on(async {
                let limits = FetchOptions { demand_spans, ..options() };
                let world = World::new(image, &image.toc, limits, StoreOptions::default());
                let source = Double::new(image);
                world.attach(source.sources());
                let size = world.layer.toc().data_size();
                let step = size.div_ceil(order.len() as u64);
                for some in order.chunks(at_once) {
                    let reads = some.iter().map(|part| {
                        let range = DataRange::new(part * step, size.min((part + 1) * step));
                        world.fetcher.ensure(&image.digest, range, DEMAND)
                    });
                    futures::future::try_join_all(reads).await.unwrap();
                }
                assert_eq!(world.layer.missing(DataRange::new(0, size)).unwrap(), []);
                let all: Vec<u32> = (0..world.layer.toc().span_count()).collect();
                assert_eq!(spans_of_requests(&world, &source), all);
                world.check();
            });
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn halves_of_which_one_is_wrong_are_fetched_anew_and_the_right_source_is_blamed() {
    let image = fixture::plain(1);
    let world = World::simple(&image);
    let (good, bad) = (Double::new(&image), Double::new(&image));
    // Its byte 2000 of the second span lies in a chunk that begins in the first.
    bad.corrupt.store(true, Ordering::SeqCst);
    let toc = world.layer.toc().clone();
    let all = toc.chunks_in(world.file(1)).unwrap();
    let across = all.iter().find(|chunk| plan::spans_of(&toc, **chunk).unwrap() == Some(0..2)).unwrap();
    let end_of_fetch = || eventually("the end of the fetch", || world.fetcher.counters().active == 0);
    world.attach(good.sources());
    world.fetcher.ensure(&image.digest, world.file(0), DEMAND).await.unwrap();
    end_of_fetch().await;
    world.attach(bad.sources());
    world.fetcher.ensure(&image.digest, DataRange::with_len(across.data.end, 100), DEMAND).await.unwrap();
    end_of_fetch().await;
    assert_eq!((good.requests().len(), bad.requests().len()), (1, 1));
    assert_eq!(world.fetcher.counters().digest_mismatches, 0, "nobody knows which half is wrong");
    assert!(!world.layer.has(across.ix));
    world.fetcher.ensure(&image.digest, across.data, DEMAND).await.unwrap();
    assert_eq!(world.fetcher.counters().digest_mismatches, 1);
    world.fetcher.ensure(&image.digest, world.file(2), DEMAND).await.unwrap();
    assert_eq!((good.requests().len(), bad.requests().len()), (3, 2), "the good source is asked first now");
    world.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_go_on_where_others_were_nearby() {
    let image = fixture::plain(2);
    let limits = FetchOptions { demand_spans: 1, read_on: 2, near: 6, near_fetched: 2, ..options() };
    let world = World::new(&image, &image.toc, limits, StoreOptions::default());
    let source = Double::new(&image);
    world.attach(source.sources());
    assert!(world.layer.toc().span_count() >= 6);
    for (span, fetched) in [(0, vec![0]), (5, vec![0, 5]), (2, vec![0, 2, 3, 4, 5]), (1, vec![0, 1, 2, 3, 4, 5])] {
        let at = DataRange::with_len(world.file(1).start + (span << 20) + (256 << 10), 100);
        world.fetcher.ensure(&image.digest, at, DEMAND).await.unwrap();
        eventually("the end of the fetch", || world.fetcher.counters().active == 0).await;
        assert_eq!(spans_of_requests(&world, &source), fetched);
    }
    world.check();
}

#[test]
fn groups_hold_every_chunk_whole_and_respect_their_bounds() {
    let image = image(8);
    let toc = millstream_toc::Toc::open(image.toc.clone()).unwrap();
    assert!(toc.span_count() >= 5);
    let all = toc.chunks_in(DataRange::new(0, toc.data_size())).unwrap();
    for spans in 1..4 {
        for step in [1, 2, 30, 100] {
            let some: Vec<_> = all.iter().step_by(step).copied().collect();
            let groups = plan::plan(&toc, &plan::whole(&toc, &some).unwrap(), plan::Bounds { spans, gap: 0 }).unwrap();
            assert_eq!(groups.iter().flat_map(|group| group.chunks.clone()).collect::<Vec<_>>(), some);
            for group in groups {
                let plan::Way::Spans { spans: together, .. } = &group.way else { panic!("{group:?}") };
                assert!(together.len() <= spans.max(2) as usize);
                for chunk in &group.chunks {
                    let needs = plan::spans_of(&toc, *chunk).unwrap().unwrap();
                    assert!(together.start <= needs.start && needs.end <= together.end);
                }
            }
        }
    }
}
