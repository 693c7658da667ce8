//! The worker dies at any moment, also while the next one takes over: programs see a pause and nothing else.

#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use millstream_e2e::deaths::{at_work, while_taking_over};
use millstream_e2e::stage::can_be_set;

/// Longest median pause that is promised, on a machine that has the time.
const PROMISED: Duration = Duration::from_secs(1);
/// The same on one that others use as well: less than it would take to miss a worker.
const BUSY: Duration = Duration::from_secs(3);

fn deaths_at_work(duration: Duration, promised: Duration) {
    let deaths = at_work(duration).unwrap();
    println!("{deaths}");
    let [median, ..] = deaths.pauses;
    assert!(median <= promised, "the median pause is {median:?}");
}

fn deaths_while_taking_over(duration: Duration) {
    println!("{}", while_taking_over(duration).unwrap());
}

#[test]
fn reads_go_on_whenever_the_worker_dies() {
    if can_be_set(&[]) {
        deaths_at_work(Duration::from_secs(30), BUSY);
    }
}

#[test]
fn reads_go_on_when_workers_die_while_they_take_over() {
    if can_be_set(&[]) {
        deaths_while_taking_over(Duration::from_secs(20));
    }
}

#[test]
#[ignore = "ten minutes; make soak"]
fn soak_reads_go_on_whenever_the_worker_dies() {
    if can_be_set(&[]) {
        deaths_at_work(Duration::from_secs(300), PROMISED);
    }
}

#[test]
#[ignore = "ten minutes; make soak"]
fn soak_reads_go_on_when_workers_die_while_they_take_over() {
    if can_be_set(&[]) {
        deaths_while_taking_over(Duration::from_secs(300));
    }
}
