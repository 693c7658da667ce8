//! Random writes, syncs, evictions and crashes against a model of three sets.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod fixture;

use std::collections::BTreeSet;

use fixture::{Place, bytes_of, chunks, read, toc};
use millstream_chunkstore::{LayerState, Step};
use millstream_toc::DataRange;
use millstream_toc::read::Chunk;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Operation {
    Write(prop::sample::Index),
    Sync,
    FailedSync(Step),
    /// Only possible when every chunk is there.
    Verify,
    Fill,
    /// So many bytes; with a step that fails, and how.
    Evict(u64, Option<(Step, i32)>),
    Crash,
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        5 => any::<prop::sample::Index>().prop_map(Operation::Write),
        2 => Just(Operation::Sync),
        1 => prop_oneof![Just(Step::SyncData), Just(Step::WriteTemporary), Just(Step::Rename)].prop_map(Operation::FailedSync),
        1 => Just(Operation::Verify),
        1 => Just(Operation::Fill),
        3 => (1u64..100_000, proptest::option::of(failure())).prop_map(|(bytes, fails)| Operation::Evict(bytes, fails)),
        1 => Just(Operation::Crash),
    ]
}

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

fn failure() -> impl Strategy<Value = (Step, i32)> {
    let step = prop_oneof![Just(Step::WriteTemporary), Just(Step::Rename), Just(Step::Commit), Just(Step::Punch)];
    (step, prop_oneof![Just(EIO), Just(ENOSPC)])
}

/// What an eviction takes: from the beginning, until it is enough.
fn victims(all: &[Chunk], present: &BTreeSet<u32>, wanted: u64) -> BTreeSet<u32> {
    let (mut bytes, mut taken) = (0, BTreeSet::new());
    for chunk in all.iter().filter(|chunk| present.contains(&chunk.ix)) {
        if bytes >= wanted {
            break;
        }
        bytes += blocks(chunk);
        taken.insert(chunk.ix);
    }
    taken
}

fn blocks(chunk: &Chunk) -> u64 {
    chunk.data.len().next_multiple_of(4096)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_store_agrees_with_the_model(operations in proptest::collection::vec(operation(), 1..30)) {
        let toc = toc(1);
        let place = Place::new();
        let mut store = place.open();
        let mut layer = store.admit(&toc).unwrap();
        let digest = layer.digest();
        let all = chunks(layer.toc());
        // What can be read, whose bytes are on the disk, and what the disk knows of it.
        let (mut present, mut stored, mut synced) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let (mut dirty, mut verified) = (false, false);
        for operation in operations {
            match operation {
                Operation::Write(pick) => {
                    let chunk = all[pick.index(all.len())];
                    layer.write(chunk, &bytes_of(chunk)).unwrap();
                    dirty |= present.insert(chunk.ix);
                }
                Operation::Sync => {
                    layer.sync().unwrap();
                    (stored, synced, dirty) = (present.clone(), present.clone(), false);
                }
                Operation::FailedSync(step) => {
                    place.faults.fail(step, 5);
                    prop_assert_eq!(layer.sync().is_ok(), !dirty);
                    place.faults.heal();
                    match step {
                        _ if !dirty => {}
                        Step::SyncData => present = stored.clone(),
                        _ => stored = present.clone(),
                    }
                }
                Operation::Fill => for chunk in &all {
                    layer.write(*chunk, &bytes_of(*chunk)).unwrap();
                    dirty |= present.insert(chunk.ix);
                }
                Operation::Verify => {
                    let whole = present.len() == all.len();
                    prop_assert_eq!(layer.set_verified().is_ok(), whole);
                    if whole {
                        (stored, synced, dirty, verified) = (present.clone(), present.clone(), false, true);
                    }
                }
                Operation::Evict(bytes, fails) => {
                    let victims = victims(&all, &present, bytes);
                    if let Some((step, errno)) = fails {
                        place.faults.fail(step, errno);
                    }
                    let result = store.evict(&layer, bytes);
                    place.faults.heal();
                    // The record cannot be written: a full disk may still forget all of a layer that is not verified.
                    let forgets = match fails {
                        _ if victims.is_empty() => false,
                        Some((Step::WriteTemporary | Step::Rename, ENOSPC)) => !verified,
                        Some((Step::WriteTemporary | Step::Rename, _)) => false,
                        Some((Step::Commit, _)) => !verified,
                        _ => true,
                    };
                    let said = matches!(fails, Some((Step::Punch, _))) || !forgets;
                    prop_assert_eq!(result.is_err(), said && !victims.is_empty(), "{:?}", result);
                    if forgets {
                        present = &present - &victims;
                        stored = &stored - &victims;
                        let full = matches!(fails, Some((Step::WriteTemporary | Step::Rename, _)));
                        synced = if full { BTreeSet::new() } else { stored.clone() };
                        (dirty, verified) = (dirty || full, false);
                    }
                }
                Operation::Crash => {
                    drop((layer, store));
                    store = place.open();
                    layer = store.layer(&digest).unwrap();
                    (present, stored, dirty) = (synced.clone(), synced.clone(), false);
                }
            }
            prop_assert_eq!(layer.state() == LayerState::Verified, verified);
            let used: u64 = all.iter().filter(|chunk| present.contains(&chunk.ix)).map(blocks).sum();
            prop_assert_eq!((store.space().used(), layer.bytes_stored()), (used, used));
            let missing = layer.missing(DataRange::new(0, layer.toc().data_size())).unwrap();
            for chunk in &all {
                prop_assert_eq!(layer.has(chunk.ix), present.contains(&chunk.ix));
                prop_assert_eq!(missing.contains(chunk), !present.contains(&chunk.ix));
                if present.contains(&chunk.ix) {
                    prop_assert_eq!(read(&layer, *chunk), bytes_of(*chunk));
                }
            }
            prop_assert_eq!(layer.bytes_present(), all.iter().filter(|c| present.contains(&c.ix)).map(|c| c.data.len()).sum::<u64>());
        }
    }
}
