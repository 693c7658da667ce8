//! One profile out of what several starts of an image read.

use std::collections::HashMap;

use crate::run::{MAX_PAGES, MAX_RUNS, PageRun, Profile, ProfileLayer};

/// What one start read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recording {
    /// The pages, in order of first touch.
    pub read: Profile,
    /// For each layer of it: whether nobody had read from that layer on this node before. Of others the kernel's page cache may
    /// have answered, so that a page that is missing says nothing.
    pub fresh: Vec<bool>,
}

/// What was found of one page.
#[derive(Debug, Default)]
struct Seen {
    /// Its place in each recording that has it, counted in pages: each is a vote.
    places: Vec<u32>,
    /// The last of these recordings, counted from 1: a page that one of them names twice counts once, where it came first.
    last: usize,
}

/// The pages of `layers` that at least half of those starts read that would show it, in the order of their median places,
/// as far as `most` pages (and [`MAX_PAGES`]). Pages of layers that `layers` does not name, with this very table, are left out.
///
/// A start that read too much cannot add to the profile once there are three, and one that read too little cannot take away.
#[must_use]
pub fn merge(layers: &[ProfileLayer], recordings: &[Recording], most: u64) -> Profile {
    let mut places: HashMap<ProfileLayer, u32> = HashMap::new();
    for (ix, layer) in (0..).zip(layers) {
        places.entry(*layer).or_insert(ix);
    }
    let mut voters = vec![0_usize; layers.len()];
    let mut seen: HashMap<(u32, u32), Seen> = HashMap::new();
    for (number, recording) in (1..).zip(recordings) {
        let map: Vec<Option<u32>> = recording.read.layers.iter().map(|layer| places.get(layer).copied()).collect();
        for (layer, fresh) in map.iter().zip(&recording.fresh) {
            if let (Some(layer), true) = (layer, fresh) {
                voters[*layer as usize] += 1;
            }
        }
        let mut place = 0_u32;
        for run in &recording.read.runs {
            let layer = map.get(run.layer as usize).copied().flatten();
            for page in 0..run.pages {
                place = place.saturating_add(1);
                if let Some(layer) = layer {
                    let seen = seen.entry((layer, run.first.saturating_add(page))).or_default();
                    if seen.last != number {
                        seen.last = number;
                        seen.places.push(place);
                    }
                }
            }
        }
    }
    let mut pages: Vec<(u32, (u32, u32))> = Vec::new();
    for (page, mut seen) in seen {
        if seen.places.len() * 2 >= voters[page.0 as usize] {
            seen.places.sort_unstable();
            pages.push((seen.places[(seen.places.len() - 1) / 2], page));
        }
    }
    pages.sort_unstable();
    pages.truncate(usize::try_from(most.min(MAX_PAGES)).unwrap_or(usize::MAX));
    Profile { layers: layers.to_vec(), runs: runs(pages.into_iter().map(|(_, page)| page)) }
}

/// Joins neighbours that follow each other.
pub(crate) fn runs(pages: impl Iterator<Item = (u32, u32)>) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    for (layer, page) in pages {
        if let Some(run) = runs.last_mut()
            && run.layer == layer
            && run.end() == u64::from(page)
        {
            run.pages += 1;
        } else if runs.len() == MAX_RUNS {
            break;
        } else {
            runs.push(PageRun { layer, first: page, pages: 1 });
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use millstream_oci::Digest;

    fn layer(name: &str) -> ProfileLayer {
        ProfileLayer { digest: Digest::of(name.as_bytes()), toc: Digest::of(b"toc") }
    }

    fn recording(layers: &[ProfileLayer], fresh: &[bool], numbers: &[u32]) -> Recording {
        Recording { read: Profile::from_numbers(layers.to_vec(), numbers).unwrap(), fresh: fresh.to_vec() }
    }

    fn merged(layers: &[ProfileLayer], recordings: &[Recording]) -> Vec<u32> {
        merge(layers, recordings, 1000).numbers()
    }

    #[test]
    fn one_recording_is_the_profile() {
        let layers = [layer("a"), layer("b")];
        let numbers = [1, 7, 2, 0, 3, 1, 1, 9, 1];
        assert_eq!(merged(&layers, &[recording(&layers, &[true, true], &numbers)]), numbers);
    }

    #[test]
    fn of_three_one_that_read_too_much_and_one_that_read_too_little_change_nothing() {
        let layers = [layer("a")];
        let usual = recording(&layers, &[true], &[0, 50, 4, 0, 10, 4]);
        let all = recording(&layers, &[true], &[0, 0, 900]);
        let nothing = recording(&layers, &[true], &[0, 50, 1]);
        assert_eq!(merged(&layers, &[usual.clone(), all, usual.clone()]), [0, 50, 4, 0, 10, 4]);
        assert_eq!(merged(&layers, &[usual.clone(), nothing, usual]), [0, 50, 4, 0, 10, 4]);
    }

    #[test]
    fn a_recording_has_one_vote_however_often_it_names_a_page() {
        let layers = [layer("a")];
        let usual = recording(&layers, &[true], &[0, 5, 1]);
        let loud = recording(&layers, &[true], &[0, 9, 1, 0, 9, 1, 0, 8, 2]);
        assert_eq!(merged(&layers, &[usual.clone(), loud, usual]), [0, 5, 1]);
    }

    #[test]
    fn a_layer_that_was_read_before_adds_but_does_not_vote_against() {
        let (layers, warm) = ([layer("a")], [false]);
        let first = recording(&layers, &[true], &[0, 5, 2]);
        let again = recording(&layers, &warm, &[0, 8, 1]);
        assert_eq!(merged(&layers, &[first, again.clone(), again]), [0, 5, 1, 0, 8, 1, 0, 6, 1]);
    }

    #[test]
    fn other_layers_and_other_tables_are_left_out() {
        let (a, b) = (layer("a"), layer("b"));
        let other = ProfileLayer { toc: Digest::of(b"other"), ..a };
        let read = recording(&[other, b], &[true, true], &[0, 1, 1, 1, 2, 1]);
        assert_eq!(merged(&[a, b], &[read]), [1, 2, 1]);
    }

    #[test]
    fn size_is_bounded() {
        let layers = [layer("a")];
        let read = recording(&layers, &[true], &[0, 0, 100, 0, 500, 5]);
        assert_eq!(merge(&layers, &[read], 30).numbers(), [0, 0, 30]);
    }
}
