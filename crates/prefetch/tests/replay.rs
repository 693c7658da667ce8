//! What starts of an image read comes ahead of its readers.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod fixture;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use fixture::{Double, Image, World, eventually, image, options};
use futures::{StreamExt, stream};
use millstream_chunkstore::StoreOptions;
use millstream_oci::Digest;
use millstream_prefetch::AskedProfile;
use millstream_profile::{Profile, ProfileLayer, Recording, pieces, proof};
use millstream_source::{ErrorKind, Priority, ProfileSource, ServedProfile, SourceError};
use millstream_toc::{DataRange, Toc};
use tokio::sync::watch;

const PAGE: u64 = 4096;

/// A server that has a profile of one layer.
#[derive(Debug)]
struct Server {
    plan: Profile,
    /// The stream, if it has pages.
    packed: Option<Vec<u8>>,
    /// Pieces flow up to this many.
    open: watch::Sender<usize>,
    local: Mutex<Option<Vec<Digest>>>,
}

impl Server {
    fn new(image: &Image, runs: &[u32], pages: bool) -> Arc<Self> {
        let toc = Toc::open(image.toc.clone()).unwrap();
        let layer = ProfileLayer { digest: image.digest, toc: toc.digest() };
        let plan = Profile::from_numbers(vec![layer], runs).unwrap();
        let mut proofs = Vec::new();
        for (chunk, mask) in plan.runs.iter().flat_map(|run| pieces(run, &toc).unwrap()) {
            let bytes = &image.data[chunk.data.start as usize..chunk.data.end as usize];
            proof::prove(bytes, mask, &mut proofs);
        }
        let packed = pages.then(|| zstd::bulk::compress(&proofs, 3).unwrap());
        Arc::new(Self { plan, packed, open: watch::Sender::new(usize::MAX), local: Mutex::default() })
    }
}

#[async_trait]
impl ProfileSource for Server {
    async fn profile(&self, pages: bool, local: &[Digest]) -> Result<ServedProfile, SourceError> {
        *self.local.lock().unwrap() = Some(local.to_vec());
        let packed = self.packed.clone().filter(|_| pages).map(|packed| {
            let pieces: Vec<Bytes> = packed.chunks(4096).map(Bytes::copy_from_slice).collect();
            let open = self.open.subscribe();
            stream::iter(pieces.into_iter().enumerate())
                .then(move |(number, piece)| {
                    let mut open = open.clone();
                    async move {
                        let _ = open.wait_for(|open| number < *open).await;
                        Ok(piece)
                    }
                })
                .boxed()
        });
        Ok(ServedProfile { plan: self.plan.clone(), recordings: 1, packed })
    }

    async fn record(&self, _: &Recording) -> Result<(), SourceError> {
        Err(SourceError::new(ErrorKind::NotFound, "not here"))
    }
}

fn ask(server: &Arc<Server>) -> AskedProfile {
    let server = server.clone();
    AskedProfile { local: Vec::new(), answer: Box::pin(async move { server.profile(true, &[]).await }), sink: None }
}

struct Rig {
    world: World,
    registry: Arc<Double>,
    /// First page of the large file.
    big: u64,
}

fn rig() -> Rig {
    let image = image(1);
    let world = World::simple(&image);
    let registry = Double::new(&image);
    world.attach(registry.sources());
    let big = world.file(1).start / PAGE;
    Rig { world, registry, big }
}

impl Rig {
    fn replay(&self, server: &Arc<Server>) {
        self.world.fetcher.replay("image".to_owned(), &[self.world.image.digest], ask(server));
    }

    /// `pages` pages from page `first` of the large file on.
    fn pages(&self, first: u64, pages: u64) -> DataRange {
        DataRange::with_len((self.big + first) * PAGE, pages * PAGE)
    }

    fn runs(&self, runs: &[(u64, u64)]) -> Vec<u32> {
        runs.iter().flat_map(|(first, pages)| [0, (self.big + first) as u32, *pages as u32]).collect()
    }

    fn is_here(&self, range: DataRange) -> bool {
        let mut out = vec![0; range.len() as usize];
        if !self.world.layer.read(range, &mut out).unwrap().is_empty() {
            return false;
        }
        assert!(out == self.world.image.data[range.start as usize..range.end as usize], "wrong bytes in {range}");
        true
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_come_without_the_registry_and_nothing_else_comes() {
    let rig = rig();
    let server = Server::new(&rig.world.image, &rig.runs(&[(100, 3), (8, 8), (1500, 36)]), true);
    rig.replay(&server);
    for (first, pages) in [(100, 3), (8, 8), (1500, 36)] {
        eventually("the pages are here", || rig.is_here(rig.pages(first, pages))).await;
    }
    assert!(!rig.is_here(rig.pages(103, 1)) && !rig.is_here(rig.pages(99, 1)) && !rig.is_here(rig.pages(7, 1)));
    assert_eq!(rig.registry.requests(), []);
    let counters = rig.world.fetcher.counters();
    assert_eq!((counters.profile_bytes, counters.demand_bytes), (server.packed.as_ref().unwrap().len() as u64, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_waits_for_a_page_that_is_about_to_come_and_fetches_what_does_not_come() {
    let rig = rig();
    let server = Server::new(&rig.world.image, &rig.runs(&[(0, 200), (600, 1)]), true);
    server.open.send_replace(0);
    rig.replay(&server);
    let (fetcher, layer) = (rig.world.fetcher.clone(), rig.world.image.digest);
    let wanted = rig.pages(600, 1);
    eventually("the plan is known", || fetcher.queues().replays == 1).await;
    let reader = tokio::spawn(async move { fetcher.ensure(&layer, wanted, Priority::Demand).await });
    // Whether it waits already makes no difference to the outcome.
    server.open.send_replace(usize::MAX);
    reader.await.unwrap().unwrap();
    assert!(rig.is_here(wanted));
    assert_eq!(rig.registry.requests(), [], "it came with the stream");
    let elsewhere = rig.pages(1000, 1);
    rig.world.fetcher.ensure(&layer, elsewhere, Priority::Demand).await.unwrap();
    assert!(rig.is_here(elsewhere));
    assert_eq!(rig.registry.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_stands_still_keeps_no_reader_for_long() {
    let rig = rig();
    let server = Server::new(&rig.world.image, &rig.runs(&[(0, 200)]), true);
    server.open.send_replace(0);
    rig.replay(&server);
    eventually("the plan is known", || rig.world.fetcher.queues().replays == 1).await;
    let begun = std::time::Instant::now();
    rig.world.fetcher.ensure(&rig.world.image.digest, rig.pages(3, 1), Priority::Demand).await.unwrap();
    let patience = options().replay_patience;
    assert!(begun.elapsed() >= patience && begun.elapsed() < patience * 10, "{:?}", begun.elapsed());
    assert!(rig.is_here(rig.pages(3, 1)));
    // What comes later does no harm.
    server.open.send_replace(usize::MAX);
    eventually("the rest is here", || rig.is_here(rig.pages(0, 200))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_pages_the_plan_is_fetched_in_its_order() {
    let rig = rig();
    let server = Server::new(&rig.world.image, &rig.runs(&[(1200, 4), (20, 4)]), false);
    rig.replay(&server);
    eventually("the pages are here", || rig.is_here(rig.pages(20, 4)) && rig.is_here(rig.pages(1200, 4))).await;
    let requests = rig.registry.requests();
    assert!(requests.len() == 2 && requests[0].start > requests[1].start, "{requests:?}");
    let counters = rig.world.fetcher.counters();
    assert!(counters.prefetch_bytes > 0 && counters.profile_bytes == 0 && counters.demand_bytes == 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_that_are_not_those_of_the_layer_are_not_stored() {
    let rig = rig();
    let mut server = Server::new(&rig.world.image, &rig.runs(&[(0, 4), (100, 4)]), true);
    let good = zstd::bulk::decompress(server.packed.as_ref().unwrap(), 1 << 20).unwrap();
    // The first piece is right, the second one is not.
    let second = proof::proof_len(32768, 0b1111);
    let mut bad = good;
    bad[second + 5000] ^= 1;
    Arc::get_mut(&mut server).unwrap().packed = Some(zstd::bulk::compress(&bad, 3).unwrap());
    rig.replay(&server);
    eventually("it is noticed", || rig.world.fetcher.counters().digest_mismatches == 1).await;
    assert!(rig.is_here(rig.pages(0, 4)) && !rig.is_here(rig.pages(100, 1)));
    rig.world.fetcher.ensure(&rig.world.image.digest, rig.pages(100, 4), Priority::Demand).await.unwrap();
    assert!(rig.is_here(rig.pages(100, 4)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_profile_by_another_table_or_beyond_the_layer_is_left_alone() {
    let rig = rig();
    for (spoil, what) in [(0, "another table"), (1, "beyond the layer")] {
        let mut server = Server::new(&rig.world.image, &rig.runs(&[(0, 4)]), true);
        let plan = &mut Arc::get_mut(&mut server).unwrap().plan;
        if spoil == 0 {
            plan.layers[0].toc = Digest::of(b"another");
        } else {
            plan.runs[0].first = u32::MAX - 10;
        }
        rig.replay(&server);
        eventually("the server was asked", || server.local.lock().unwrap().is_some()).await;
        rig.world.fetcher.ensure(&rig.world.image.digest, rig.pages(0, 4), Priority::Demand).await.unwrap();
        assert!(rig.is_here(rig.pages(0, 4)), "{what}");
        assert!(!rig.registry.requests().is_empty(), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hydration_makes_way_for_a_replay() {
    let image = image(1);
    let world = World::new(&image, &image.toc, options(), StoreOptions::default());
    let registry = Double::new(&image);
    world.attach(registry.sources());
    let big = world.file(1).start / PAGE;
    let server = Server::new(&image, &[0, big as u32, 400], true);
    server.open.send_replace(1);
    world.fetcher.replay("image".to_owned(), &[image.digest], ask(&server));
    eventually("the server was asked", || server.local.lock().unwrap().is_some()).await;
    let begun = std::time::Instant::now();
    world.fetcher.hydrate(&image.digest);
    tokio::time::sleep(Duration::from_millis(800)).await;
    let parts = registry.requests().len() as u128;
    // One at once, since none had been for long, then one a second.
    assert!(parts <= 1 + begun.elapsed().as_millis() / 1000, "{parts}");
    server.open.send_replace(usize::MAX);
    eventually("all is here", || world.told().contains(&"verified".to_owned())).await;
    assert!(registry.sent.load(Ordering::SeqCst) >= image.blob.len() as u64);
    world.check();
}
