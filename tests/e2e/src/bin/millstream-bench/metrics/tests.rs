#![allow(clippy::unwrap_used)]
use std::collections::BTreeMap;

use super::*;
use crate::rows::{Key, Origin};

struct Table(Vec<Row>);

impl Table {
    fn add(&mut self, image: &str, link: Link, cell: (&str, &str, &str), round: u32, values: Values) {
        let (peer, settings, job) = cell;
        let key = Key {
            image: image.to_owned(),
            link: link.name().to_owned(),
            peer: peer.to_owned(),
            settings: settings.to_owned(),
            job: job.to_owned(),
            round,
        };
        let origin = Origin { commit: "c".to_owned(), machine: "m".to_owned() };
        self.0.push(Row { key, values, manifest: String::new(), origin, time: 0 });
    }
}

fn ready_after(seconds: f64) -> Values {
    Values { ready_s: Some(seconds), floor_s: Some(1.0), ..Values::default() }
}

const TUNED: (&str, &str, &str) = ("overlayfs, containerd 2.2.9", "tuned", "start");
const STARGZ: (&str, &str, &str) = ("stargz 0.19.1", "optimized", "start");
const OURS: (&str, &str, &str) = ("millstream", "profile", "start");

#[test]
fn the_best_peer_is_another_for_each_image() {
    let mut table = Table(Vec::new());
    for round in 0..5 {
        // The second round was slow for everybody.
        let slow = if round == 1 { 3.0 } else { 1.0 };
        for (cell, wiki, node) in [(TUNED, 10.0, 4.0), (STARGZ, 5.0, 8.0), (OURS, 2.5, 3.0)] {
            table.add("wiki", Link::Slow, cell, round, ready_after(wiki * slow));
            table.add("node", Link::Slow, cell, round, ready_after(node * slow));
        }
    }
    let found = Figures::of(&table.0).json();
    // 2.5 / 5 and 3 / 4.
    assert!((found["M1"]["ratio_best_peer"].as_f64().unwrap() - (0.5_f64 * 0.75).sqrt()).abs() < 1e-9, "{found}");
    assert_eq!(found["M1"]["worst_image_ratio"], 0.75);
    assert!((found["M1"]["ratio_floor"].as_f64().unwrap() - (2.5_f64 * 3.0).sqrt()).abs() < 1e-9, "{found}");
    assert_eq!(found["M1"]["images"]["wiki"]["pairs"], 5);
    for missing in ["M2", "M3", "M4", "M5", "M6", "M7", "M8", "M9"] {
        assert!(found[missing].is_null(), "{missing} was not measured: {found}");
    }
}

#[test]
fn what_was_measured_in_one_round_only_is_no_pair() {
    let mut table = Table(Vec::new());
    table.add("wiki", Link::Slow, TUNED, 0, ready_after(10.0));
    table.add("wiki", Link::Slow, OURS, 1, ready_after(5.0));
    assert!(Figures::of(&table.0).json()["M1"].is_null());
}

#[test]
fn round_trips_are_the_time_that_a_longer_line_adds() {
    let cell = ("millstream", "indexed, no hydration", "pull");
    let mut table = Table(Vec::new());
    for round in 0..5 {
        let pulled = |pull_s| Values { pull_s, containerd_requests: Some(3), ..Values::default() };
        table.add("layers", Link::Fast, cell, round, pulled(0.55));
        table.add("layers-flat", Link::Fast, cell, round, pulled(0.5));
        // Five round trips of 200 ms more.
        table.add("layers", Link::Long, cell, round, pulled(1.55));
    }
    let found = Figures::of(&table.0).json();
    assert!((found["M3"]["round_trips"].as_f64().unwrap() - 1.0).abs() < 1e-9, "{found}");
    assert!((found["M3"]["layers_ratio"].as_f64().unwrap() - 1.1).abs() < 1e-9, "{found}");
}

#[test]
fn speeds_are_compared_and_the_worst_one_counts() {
    let mut table = Table(Vec::new());
    let read = |cold: f64, warm: f64| Values {
        more: BTreeMap::from([
            ("read_cold_s".to_owned(), cold),
            ("read_warm_s".to_owned(), warm),
            ("walk_cold_s".to_owned(), 1.0),
            ("walk_warm_s".to_owned(), warm),
        ]),
        ..Values::default()
    };
    table.add("node", Link::Fast, TUNED, 0, ready_after(1.0));
    table.add("node", Link::Fast, ("overlayfs, containerd 2.2.9", "tuned", "files"), 0, read(6.0, 1.0));
    table.add("node", Link::Fast, ("millstream", "profile", "files"), 0, read(2.0, 1.25));
    let found = Figures::of(&table.0).json();
    assert_eq!(found["M7"]["read_ratio"], 0.8);
    assert_eq!(found["M7"]["metadata_ratio"], 0.8);
    assert_eq!(found["M7"]["small_files_cold_ratio"], 3.0);
}

#[test]
fn more_runs_are_wanted_only_where_a_ratio_is_near_a_target() {
    let profile = Subject::Millstream {
        version: millstream_e2e::containerd::Version::V2,
        known: Known::Profile,
        hydration: true,
    };
    let tuned = Subject::Overlayfs { version: millstream_e2e::containerd::Version::V2, tuned: true };
    let cells = [(profile, Job::Local), (tuned, Job::Start)];
    let near_at = |ours: f64| {
        let mut table = Table(Vec::new());
        for round in 0..5 {
            table.add("wiki", Link::Slow, (&tuned.peer(), "tuned", "start"), round, ready_after(10.0));
            table.add("wiki", Link::Slow, OURS, round, ready_after(ours));
        }
        near(&table.0, "wiki", Link::Slow, &cells).len()
    };
    assert_eq!(near_at(2.0), 0);
    assert_eq!(near_at(8.5), 2);
    assert_eq!(near_at(10.5), 2);
    assert_eq!(near_at(15.0), 0);
}
