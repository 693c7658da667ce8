//! Random writes, syncs and crashes against a model of two sets.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod fixture;

use std::collections::BTreeSet;

use fixture::{Place, bytes_of, chunks, read, toc};
use millstream_chunkstore::Step;
use millstream_toc::DataRange;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Operation {
    Write(prop::sample::Index),
    Sync,
    FailedSync(Step),
    Crash,
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        5 => any::<prop::sample::Index>().prop_map(Operation::Write),
        2 => Just(Operation::Sync),
        1 => prop_oneof![Just(Step::SyncData), Just(Step::WriteTemporary), Just(Step::Rename)].prop_map(Operation::FailedSync),
        1 => Just(Operation::Crash),
    ]
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
        let mut dirty = false;
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
                Operation::Crash => {
                    drop((layer, store));
                    store = place.open();
                    layer = store.layer(&digest).unwrap();
                    (present, stored, dirty) = (synced.clone(), synced.clone(), false);
                }
            }
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
