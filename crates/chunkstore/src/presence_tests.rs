//! Tests of `presence`, beside it because `schedules` has that file a second time.

use millstream_oci::Digest;
use proptest::prelude::*;

use crate::presence::{Presence, decode, encode};

proptest! {
    #[test]
    fn what_was_set_survives_and_nothing_else(
        chunks in 0u32..300, marks in proptest::collection::vec(0u32..300, 0..40), flip in any::<proptest::sample::Index>(),
    ) {
        let toc = Digest::of(b"toc");
        let presence = Presence::empty(chunks);
        for mark in marks.iter().filter(|m| **m < chunks) {
            presence.set(*mark);
        }
        let bytes = encode(&presence.snapshot(), chunks, &toc);
        let again = Presence::from_words(decode(&bytes, chunks, &toc).unwrap());
        for ix in 0..310 {
            prop_assert_eq!(again.has(ix), ix < chunks && marks.contains(&ix));
        }
        prop_assert!(decode(&bytes, chunks + 1, &toc).is_none());
        prop_assert!(decode(&bytes, chunks, &Digest::of(b"another")).is_none());
        prop_assert!(decode(&bytes[..flip.index(bytes.len())], chunks, &toc).is_none());
        let mut wrong = bytes.clone();
        wrong[flip.index(bytes.len())] ^= 1;
        prop_assert!(decode(&wrong, chunks, &toc).is_none());
    }
}

#[test]
fn bits_behind_the_last_chunk_are_refused() {
    let toc = Digest::of(b"toc");
    assert!(decode(&encode(&[0b1000], 3, &toc), 3, &toc).is_none());
    assert!(decode(&encode(&[0b0100], 3, &toc), 3, &toc).is_some());
}

#[test]
fn what_is_not_kept_is_taken_back() {
    let presence = Presence::empty(130);
    presence.set(3);
    let kept = presence.snapshot();
    presence.set(64);
    presence.set(129);
    assert_eq!(presence.keep(&kept), [64, 129]);
    assert_eq!([3, 64, 129].map(|ix| presence.has(ix)), [true, false, false]);
}

#[test]
fn setting_twice_is_new_once() {
    let presence = Presence::empty(65);
    assert!(presence.set(64));
    assert!(!presence.set(64));
    assert!(!presence.set(1000));
}
