//! Power cuts between any two steps, and files that were damaged while nobody looked.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod fixture;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use fixture::{Place, bytes_of, chunks, fill, noise, read, toc};
use millstream_chunkstore::{Layer, LayerState, Step};
use millstream_oci::Digest;
use millstream_toc::DataRange;
use millstream_toc::read::Chunk;

const CRASH: i32 = 5;
const STEPS: [Step; 5] = [Step::SyncData, Step::WriteTemporary, Step::Rename, Step::SyncDirectory, Step::Commit];

#[test]
fn a_crash_during_admission_leaves_nothing_or_a_whole_layer() {
    for step in STEPS {
        let place = Place::new();
        {
            let store = place.open();
            place.faults.fail(step, CRASH);
            let admitted = store.admit(&toc(1));
            assert_eq!(admitted.is_err(), step != Step::SyncData, "{step:?}");
        }
        place.faults.heal();
        let store = place.open();
        assert_eq!(store.damaged(), [], "{step:?}");
        let left = fs::read_dir(place.root().join("layers")).unwrap().count();
        assert_eq!(left, store.layers().len(), "{step:?}");
        let layer = store.admit(&toc(1)).unwrap();
        fill(&layer);
        layer.set_verified().unwrap();
    }
}

#[test]
fn a_crash_during_sync_never_makes_unsynced_chunks_present() {
    for step in STEPS {
        let place = Place::new();
        let digest = {
            let store = place.open();
            let layer = store.admit(&toc(1)).unwrap();
            let all = chunks(layer.toc());
            layer.write(all[0], &bytes_of(all[0])).unwrap();
            layer.sync().unwrap();
            layer.write(all[1], &bytes_of(all[1])).unwrap();
            place.faults.fail(step, CRASH);
            assert_eq!(layer.sync().is_err(), step != Step::Commit, "{step:?}");
            layer.digest()
        };
        place.faults.heal();
        let store = place.open();
        let layer = store.layer(&digest).unwrap();
        let all = chunks(layer.toc());
        assert!(layer.has(all[0].ix), "{step:?}");
        // The rename itself may have reached the disk or not; before it the old version counts.
        let renamed = matches!(step, Step::SyncDirectory | Step::Commit);
        assert_eq!(layer.has(all[1].ix), renamed, "{step:?}");
        assert!(!place.file(&digest, "present.tmp").exists(), "{step:?}");
    }
}

#[test]
fn a_failed_sync_is_tried_again() {
    let place = Place::new();
    let digest = {
        let store = place.open();
        let layer = store.admit(&toc(1)).unwrap();
        fill(&layer);
        place.faults.fail(Step::Rename, CRASH);
        layer.sync().unwrap_err();
        place.faults.heal();
        layer.sync().unwrap();
        layer.digest()
    };
    assert!(place.open().layer(&digest).unwrap().has(0));
}

#[test]
fn what_a_failed_sync_may_have_lost_is_missing_again() {
    const ENOSPC: i32 = 28;
    let place = Place::new();
    let store = place.open();
    let layer = store.admit(&toc(1)).unwrap();
    let all = chunks(layer.toc());
    layer.write(all[0], &bytes_of(all[0])).unwrap();
    layer.sync().unwrap();
    fill(&layer);
    place.faults.fail(Step::SyncData, ENOSPC);
    layer.sync().unwrap_err();
    assert!(layer.has(all[0].ix), "it was on the disk before");
    assert_eq!(layer.bytes_present(), all[0].data.len());
    assert_eq!(layer.missing(DataRange::new(0, layer.toc().data_size())).unwrap(), all[1..]);
    fill(&layer);
    layer.set_verified().unwrap_err();
    assert_eq!((layer.state(), layer.bytes_present()), (LayerState::Lazy, all[0].data.len()));
    place.faults.heal();
    fill(&layer);
    layer.set_verified().unwrap();
    assert_eq!(layer.bytes_present(), layer.bytes_total());
}

#[test]
fn a_crash_between_sync_and_state_keeps_the_chunks() {
    let place = Place::new();
    let digest = {
        let store = place.open();
        let layer = store.admit(&toc(1)).unwrap();
        fill(&layer);
        layer.sync().unwrap();
        place.faults.fail(Step::Commit, CRASH);
        layer.set_verified().unwrap_err();
        assert_eq!(layer.state(), LayerState::Lazy);
        layer.digest()
    };
    place.faults.heal();
    let layer = place.open().layer(&digest).unwrap();
    assert_eq!((layer.state(), layer.bytes_present()), (LayerState::Lazy, layer.bytes_total()));
}

/// Two layers with all chunks synced, the first one verified if asked for; the second one must never notice anything.
fn two_layers(verified: bool) -> (Place, Digest, Digest) {
    let place = Place::new();
    let store = place.open();
    let (one, two) = (store.admit(&toc(1)).unwrap(), store.admit(&toc(2)).unwrap());
    for layer in [&one, &two] {
        fill(layer);
        layer.sync().unwrap();
    }
    if verified {
        one.set_verified().unwrap();
    }
    let digests = (one.digest(), two.digest());
    drop((one, two, store));
    (place, digests.0, digests.1)
}

#[test]
fn a_damaged_toc_harms_its_layer_only_until_it_is_admitted_again() {
    for verified in [false, true] {
        for damage in 0..4 {
            let (place, one, two) = two_layers(verified);
            let path = place.file(&one, "toc");
            let mut bytes = fs::read(&path).unwrap();
            match damage {
                0 => fs::remove_file(&path).unwrap(),
                1 => fs::write(&path, b"").unwrap(),
                2 => fs::write(&path, &bytes[..bytes.len() - 1]).unwrap(),
                _ => {
                    let last = bytes.len() - 1;
                    bytes[last] ^= 1;
                    fs::write(&path, &bytes).unwrap();
                }
            }
            let store = place.open();
            assert_eq!(store.damaged().iter().map(|(digest, _)| *digest).collect::<Vec<_>>(), [one]);
            assert!(store.layer(&one).is_none());
            assert_eq!(store.layer(&two).unwrap().bytes_present(), 90_000);
            let layer = store.admit(&toc(1)).unwrap();
            assert_eq!(store.damaged(), []);
            assert_eq!((layer.number(), layer.bytes_present()), (1, 90_000));
            assert_eq!(layer.state() == LayerState::Verified, verified);
            let chunk = chunks(layer.toc())[3];
            assert_eq!(read(&layer, chunk), bytes_of(chunk));
        }
    }
}

#[test]
fn a_damaged_presence_file_means_nothing_is_present() {
    for damage in 0..3 {
        let (place, one, two) = two_layers(false);
        let path = place.file(&one, "present");
        let mut bytes = fs::read(&path).unwrap();
        match damage {
            0 => fs::remove_file(&path).unwrap(),
            1 => fs::write(&path, &bytes[..20]).unwrap(),
            _ => {
                bytes[44] ^= 1;
                fs::write(&path, &bytes).unwrap();
            }
        }
        let store = place.open();
        assert_eq!(store.damaged(), []);
        assert_eq!(store.layer(&one).unwrap().bytes_present(), 0);
        assert_eq!(store.layer(&two).unwrap().bytes_present(), 90_000);
    }
}

#[test]
fn a_lost_data_file_empties_its_layer_which_says_so() {
    let harms: [fn(&Path); 4] = [
        |file| fs::File::options().write(true).open(file).unwrap().set_len(5000).unwrap(),
        |file| fs::remove_file(file).unwrap(),
        |file| {
            fs::remove_file(file).unwrap();
            fs::create_dir_all(file.join("deep")).unwrap();
        },
        |file| {
            fs::remove_file(file).unwrap();
            std::os::unix::fs::symlink(file, file).unwrap();
        },
    ];
    for (harm, verified) in harms.into_iter().flat_map(|harm| [(harm, false), (harm, true)]) {
        let (place, one, two) = two_layers(verified);
        harm(&place.file(&one, "data"));
        let store = place.open();
        assert!(store.damaged().is_empty());
        // Its names are there without anybody's help.
        let layer = store.layer(&one).unwrap();
        assert_eq!((layer.number(), layer.state(), layer.bytes_present()), (1, LayerState::Lazy, 0));
        assert!(layer.lost().is_some());
        fill(&layer);
        layer.set_verified().unwrap();
        let other = store.layer(&two).unwrap();
        assert_eq!((other.bytes_present(), other.lost()), (90_000, None));
        drop((layer, other, store));
        assert_eq!(place.open().layer(&one).unwrap().lost(), None);
    }
}

#[test]
fn a_lost_table_keeps_what_is_here_of_the_content() {
    let harms: [fn(&Path); 4] = [
        |file| fs::remove_file(file).unwrap(),
        |file| fs::write(file, "no table").unwrap(),
        |file| {
            fs::remove_file(file).unwrap();
            fs::create_dir(file).unwrap();
        },
        |file| {
            fs::remove_file(file).unwrap();
            std::os::unix::fs::symlink(file, file).unwrap();
        },
    ];
    for (harm, verified) in harms.into_iter().flat_map(|harm| [(harm, false), (harm, true)]) {
        let (place, one, _) = two_layers(verified);
        harm(&place.file(&one, "toc"));
        let store = place.open();
        assert!(store.is_damaged(&one));
        store.admit_all(&[toc(1)]).unwrap();
        let layer = store.layer(&one).unwrap();
        assert_eq!((layer.number(), layer.bytes_present(), layer.lost()), (1, 90_000, None));
        assert_eq!(layer.state() == LayerState::Verified, verified);
    }
}

/// Bytes of a chunk as the tar of `toc(1)` has them.
fn content_of(layer: &Layer, chunk: Chunk) -> Vec<u8> {
    let ix = layer.toc().content_of_chunk(chunk.ix).unwrap();
    let record = layer.toc().content(ix).unwrap();
    let whole = if record.size.get() == 70_000 { noise(1, 70_000) } else { noise(1001, 20_000) };
    let start = (chunk.data.start - record.data_off.get()) as usize;
    whole[start..][..chunk.data.len() as usize].to_vec()
}

#[test]
fn wrong_bytes_are_found_and_taken_out_for_good() {
    for verified in [false, true] {
        let (place, one, _) = two_layers(verified);
        let store = place.open();
        let layer = store.layer(&one).unwrap();
        // The content that the digests are of.
        for chunk in chunks(layer.toc()) {
            layer.rewrite(chunk, &content_of(&layer, chunk)).unwrap();
        }
        assert_eq!(layer.check_chunks(|_| true).unwrap(), []);
        let file = fs::File::options().read(true).write(true).open(place.file(&one, "data")).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 40_000).unwrap();
        file.write_all_at(&[byte[0] ^ 1], 40_000).unwrap();
        let mut checked = 0;
        let wrong = layer.check_chunks(|bytes| {
            checked += bytes;
            true
        });
        let wrong = wrong.unwrap();
        assert_eq!((checked, wrong.len()), (90_000, 1));
        let [ix] = wrong[0].chunks[..] else { panic!("{wrong:?}") };
        let chunk = layer.toc().chunk(ix).unwrap();
        assert!(chunk.data.start <= 40_000 && 40_000 < chunk.data.end);
        layer.drop_chunks(&[ix]).unwrap();
        let is_out = |layer: &Layer| {
            assert_eq!(layer.state(), LayerState::Lazy);
            assert_eq!(layer.missing(chunk.data).unwrap(), [chunk]);
            assert_eq!(layer.bytes_present(), 90_000 - chunk.data.len());
        };
        is_out(&layer);
        drop((layer, store));
        let store = place.open();
        is_out(&store.layer(&one).unwrap());
        let layer = store.layer(&one).unwrap();
        layer.write(chunk, &content_of(&layer, chunk)).unwrap();
        layer.set_verified().unwrap();
        assert_eq!(layer.check_chunks(|_| true).unwrap(), []);
    }
}

#[test]
fn a_presence_file_that_is_damaged_under_a_running_store_is_written_anew() {
    let (place, one, _) = two_layers(false);
    let store = place.open();
    let layer = store.layer(&one).unwrap();
    assert!(layer.check_presence().unwrap() && layer.check_toc().unwrap());
    fs::write(place.file(&one, "present"), "damaged").unwrap();
    assert!(!layer.check_presence().unwrap());
    drop((layer, store));
    assert_eq!(place.open().layer(&one).unwrap().bytes_present(), 90_000);
}

#[test]
fn a_file_that_shrinks_under_a_running_store_is_an_error_not_a_wrong_answer() {
    let (place, one, _) = two_layers(false);
    let store = place.open();
    let layer = store.layer(&one).unwrap();
    let chunk = *chunks(layer.toc()).last().unwrap();
    fs::File::options().write(true).open(place.file(&one, "data")).unwrap().set_len(5000).unwrap();
    assert!(layer.read(chunk.data, &mut vec![0; chunk.data.len() as usize]).is_err());
    fs::File::options().write(true).open(place.file(&one, "toc")).unwrap().set_len(0).unwrap();
    assert!(layer.missing(chunk.data).is_err());
}
