//! The worker dies at any moment, also while the next one takes over: programs see a pause and nothing else.

#![allow(clippy::unwrap_used, missing_docs)]

use std::time::{Duration, Instant};

use millstream_e2e::busy::Busy;
use millstream_e2e::process::let_pass;
use millstream_e2e::readers::Random;
use millstream_e2e::stage::can_be_set;
use rustix::process::Signal;

/// Longest median pause that is promised, on a machine that has the time.
const PROMISED: Duration = Duration::from_secs(1);
/// The same on one that others use as well: less than it would take to miss a worker.
const BUSY: Duration = Duration::from_secs(3);
/// A life in which every reader has to get on.
const LONG: Duration = Duration::from_millis(700);
/// Longest life of a worker after its first read.
const LIFE: Duration = Duration::from_millis(2000);
/// Longest life of a worker that is killed while it takes over: somewhat more than that takes.
const TAKES_OVER: Duration = Duration::from_millis(600);

/// Of `MILLSTREAM_SEED`, else of the clock.
fn seed() -> u64 {
    let given = std::env::var("MILLSTREAM_SEED").ok().map(|seed| seed.parse().unwrap());
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let seed = given.unwrap_or_else(now);
    println!("MILLSTREAM_SEED={seed}");
    seed
}

fn up_to(random: &mut Random, longest: Duration) -> Duration {
    Duration::from_micros(random.below(usize::try_from(longest.as_micros()).unwrap()) as u64)
}

/// Median, 95th percentile and longest.
fn tail(mut pauses: Vec<Duration>) -> [Duration; 3] {
    pauses.sort_unstable();
    [50, 95, 100].map(|percent| pauses[(pauses.len() * percent / 100).min(pauses.len() - 1)])
}

fn end(busy: Busy, deaths: usize, pauses: Vec<Duration>) -> [Duration; 3] {
    let report = busy.end().unwrap();
    let figures = tail(pauses);
    let [median, tail, longest] = figures;
    println!("{deaths} deaths; pause: median {median:.3?}, 95 % {tail:.3?}, longest {longest:.3?}");
    for (name, checks, longest) in report.readers {
        println!("  {name}: {checks} checks, the longest {longest:.3?}");
    }
    println!("  container: {} pieces of 1 MiB", report.pieces);
    figures
}

/// Kills at a random moment after the first read of each worker.
fn deaths_at_work(duration: Duration, promised: Duration) {
    let mut random = Random::new(seed());
    let busy = Busy::start(random.below(1 << 30) as u64).unwrap();
    let begun = Instant::now();
    let mut pauses = Vec::new();
    while begun.elapsed() < duration {
        let (life, before, worker) = (up_to(&mut random, LIFE), busy.done().unwrap(), busy.worker().unwrap());
        let_pass(life);
        if life >= LONG {
            busy.await_progress(&before).unwrap();
        }
        let (sent, gone) = busy.kill(worker, Signal::KILL).unwrap();
        pauses.push(busy.await_read(gone).unwrap() - sent);
    }
    let before = busy.done().unwrap();
    busy.await_progress(&before).unwrap();
    let [median, ..] = end(busy, pauses.len(), pauses);
    assert!(median <= promised, "the median pause is {median:?}");
}

/// Kills some workers in a row while they take over, some by SIGABRT, and then lets one work.
fn deaths_while_taking_over(duration: Duration) {
    let mut random = Random::new(seed());
    let busy = Busy::start(random.below(1 << 30) as u64).unwrap();
    let begun = Instant::now();
    let (mut deaths, mut pauses) = (0, Vec::new());
    while begun.elapsed() < duration {
        let (first, mut gone) = busy.kill(busy.worker().unwrap(), Signal::KILL).unwrap();
        deaths += 1;
        for turn in 0..1 + random.below(3) {
            let worker = busy.worker().unwrap();
            let_pass(up_to(&mut random, TAKES_OVER));
            // What was in flight at two aborts running is taken for their cause; so never two.
            let signal = if turn == 0 && random.below(2) == 0 { Signal::ABORT } else { Signal::KILL };
            (_, gone) = busy.kill(worker, signal).unwrap();
            deaths += 1;
        }
        pauses.push(busy.await_read(gone).unwrap() - first);
        let before = busy.done().unwrap();
        busy.await_progress(&before).unwrap();
        // So that the supervisor does not hold the next one back for this one's sake.
        let_pass(LONG * 2);
    }
    end(busy, deaths, pauses);
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
