use millstream_oci::Digest;

use crate::releases::{REMEMBERED, Releases};

#[test]
fn only_later_releases_of_the_layer_count() {
    let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
    let releases = Releases::default();
    releases.lock().push(a);
    let mark = releases.mark();
    assert!(!releases.lock().released_since(mark, &a));
    releases.lock().push(b);
    assert!(!releases.lock().released_since(mark, &a));
    assert!(releases.lock().released_since(mark, &b));
}

#[test]
fn a_forgotten_past_counts_as_released() {
    let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
    let releases = Releases::default();
    let mark = releases.mark();
    for _ in 0..=REMEMBERED {
        releases.lock().push(b);
    }
    assert!(releases.lock().released_since(mark, &a));
}
