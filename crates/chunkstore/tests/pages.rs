//! Pages of chunks that are not whole: readable as far as they go, until a restart.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod fixture;

use fixture::{Place, bytes_of, chunks, read, toc};
use millstream_chunkstore::{Layer, Step, StoreError};
use millstream_toc::DataRange;
use millstream_toc::read::Chunk;

const PAGE: u64 = 4096;

/// Puts pages `first..end` of the chunk.
fn put(layer: &Layer, chunk: Chunk, first: u64, end: u64) -> Result<(), StoreError> {
    let bytes = bytes_of(chunk);
    let (start, end) = (first * PAGE, (end * PAGE).min(chunk.data.len()));
    layer.write_pages(chunk, &[(start, &bytes[start as usize..end as usize])])
}

/// What a reader of pages `first..end` of the chunk gets, if it gets something.
fn get(layer: &Layer, chunk: Chunk, first: u64, end: u64) -> Option<Vec<u8>> {
    let start = chunk.data.start + first * PAGE;
    let range = DataRange::new(start, (start + (end - first) * PAGE).min(chunk.data.end));
    let mut bytes = vec![0; range.len() as usize];
    layer.read(range, &mut bytes).unwrap().is_empty().then_some(bytes)
}

#[test]
fn pages_are_read_where_they_are_and_missing_elsewhere() {
    let place = Place::new();
    let store = place.open();
    let layer = store.admit(&toc(1)).unwrap();
    let chunk = chunks(layer.toc())[0];
    put(&layer, chunk, 2, 4).unwrap();
    assert_eq!(get(&layer, chunk, 2, 4).unwrap(), bytes_of(chunk)[8192..16384]);
    assert_eq!(get(&layer, chunk, 3, 4).unwrap(), bytes_of(chunk)[12288..16384]);
    assert_eq!((get(&layer, chunk, 1, 3), get(&layer, chunk, 3, 5)), (None, None));
    assert!(!layer.has(chunk.ix), "not to those who want the whole of it");
    assert_eq!(layer.bytes_present(), 0);
}

#[test]
fn with_its_last_page_a_chunk_is_present_and_stays() {
    let place = Place::new();
    let digest = {
        let store = place.open();
        let layer = store.admit(&toc(1)).unwrap();
        let all = chunks(layer.toc());
        put(&layer, all[0], 0, 7).unwrap();
        put(&layer, all[0], 7, 8).unwrap();
        assert!(layer.has(all[0].ix));
        assert_eq!(layer.bytes_present(), all[0].data.len());
        put(&layer, all[1], 0, 3).unwrap();
        // The last one of a file is shorter than a page.
        let last = all[2];
        put(&layer, last, 0, last.data.len().div_ceil(PAGE)).unwrap();
        assert!(layer.has(last.ix));
        layer.sync().unwrap();
        layer.digest()
    };
    let store = place.open();
    let layer = store.layer(&digest).unwrap();
    let all = chunks(layer.toc());
    assert_eq!(read(&layer, all[0]), bytes_of(all[0]));
    assert_eq!(get(&layer, all[1], 0, 3), None, "what was not whole is missing after a restart");
}

#[test]
fn what_is_no_page_of_the_chunk_is_refused() {
    let place = Place::new();
    let store = place.open();
    let layer = store.admit(&toc(1)).unwrap();
    let chunk = chunks(layer.toc())[0];
    for (start, len) in [(1, 4096), (0, 4095), (32768, 4096), (28672, 8192), (0, 0)] {
        let bytes = vec![0; len];
        let refused = layer.write_pages(chunk, &[(start, &bytes)]).unwrap_err();
        assert!(matches!(refused, StoreError::OutOfRange { .. }), "{start} {len}: {refused}");
    }
    let elsewhere = Chunk { ix: chunk.ix + 1, ..chunk };
    assert!(matches!(put(&layer, elsewhere, 0, 1), Err(StoreError::OutOfRange { .. })));
}

#[test]
fn pages_do_not_outlive_an_eviction_or_a_failed_sync() {
    let place = Place::new();
    let store = place.open();
    let layer = store.admit(&toc(1)).unwrap();
    let all = chunks(layer.toc());
    put(&layer, all[0], 0, 7).unwrap();
    put(&layer, all[0], 7, 8).unwrap();
    put(&layer, all[1], 0, 3).unwrap();
    assert_eq!(store.evict(&layer, u64::MAX).unwrap(), 32768, "what is present");
    assert_eq!(get(&layer, all[0], 0, 7), None, "the hole is not read");
    assert_eq!(get(&layer, all[1], 0, 3).unwrap(), bytes_of(all[1])[..3 * 4096], "no hole was made here");
    layer.write(all[2], &bytes_of(all[2])).unwrap();
    place.faults.fail(Step::SyncData, 5);
    layer.sync().unwrap_err();
    place.faults.heal();
    assert_eq!(get(&layer, all[1], 0, 3), None, "the kernel may have lost it");
}
