//! Workers that are killed at any moment, under readers who must not notice.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::process::Signal;

use crate::busy::{Busy, Report};
use crate::process::let_pass;
use crate::readers::Random;

/// A life in which every reader has to get on.
const LONG: Duration = Duration::from_millis(700);
/// Longest life of a worker after its first read.
const LIFE: Duration = Duration::from_millis(2000);
/// Longest life of a worker that is killed while it takes over: somewhat more than that takes.
const TAKES_OVER: Duration = Duration::from_millis(600);

/// What was seen.
#[derive(Debug)]
pub struct Deaths {
    /// How many there were.
    pub deaths: usize,
    /// From a signal to the next read that needed a worker: median, 95th percentile and longest.
    pub pauses: [Duration; 3],
    /// What the readers did meanwhile.
    pub report: Report,
}

impl Deaths {
    fn new(busy: Busy, deaths: usize, mut pauses: Vec<Duration>) -> Result<Self> {
        let report = busy.end()?;
        pauses.sort_unstable();
        let pauses = [50, 95, 100].map(|percent| pauses[(pauses.len() * percent / 100).min(pauses.len() - 1)]);
        Ok(Self { deaths, pauses, report })
    }
}

impl fmt::Display for Deaths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [median, tail, longest] = self.pauses;
        writeln!(f, "{} deaths; pause: median {median:.3?}, 95 % {tail:.3?}, longest {longest:.3?}", self.deaths)?;
        for (name, checks, longest) in &self.report.readers {
            writeln!(f, "  {name}: {checks} checks, the longest {longest:.3?}")?;
        }
        write!(f, "  container: {} pieces of 1 MiB", self.report.pieces)
    }
}

/// Numbers of `MILLSTREAM_SEED`, else of the clock; the seed is printed.
///
/// # Errors
///
/// If the variable is no number.
pub fn seeded() -> Result<Random> {
    let given = std::env::var("MILLSTREAM_SEED").ok().map(|seed| seed.parse()).transpose()?;
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let seed = given.unwrap_or_else(now);
    println!("MILLSTREAM_SEED={seed}");
    Ok(Random::new(seed))
}

fn up_to(random: &mut Random, longest: Duration) -> Duration {
    Duration::from_micros(random.below(usize::try_from(longest.as_micros()).unwrap_or(usize::MAX)) as u64)
}

/// Kills at a random moment after the first read of each worker, for this long.
///
/// # Errors
///
/// If a reader saw an error or a wrong byte, or does not get on.
pub fn at_work(duration: Duration) -> Result<Deaths> {
    let mut random = seeded()?;
    let busy = Busy::start(random.below(1 << 30) as u64)?;
    let begun = Instant::now();
    let mut pauses = Vec::new();
    while begun.elapsed() < duration {
        let (life, before, worker) = (up_to(&mut random, LIFE), busy.done()?, busy.worker()?);
        let_pass(life);
        if life >= LONG {
            busy.await_progress(&before)?;
        }
        let (sent, gone) = busy.kill(worker, Signal::KILL)?;
        pauses.push(busy.await_read(gone)? - sent);
    }
    let before = busy.done()?;
    busy.await_progress(&before)?;
    Deaths::new(busy, pauses.len(), pauses)
}

/// Kills some workers in a row while they take over, some by SIGABRT, and then lets one work, for this long.
///
/// # Errors
///
/// As [`at_work`].
pub fn while_taking_over(duration: Duration) -> Result<Deaths> {
    let mut random = seeded()?;
    let busy = Busy::start(random.below(1 << 30) as u64)?;
    let begun = Instant::now();
    let (mut deaths, mut pauses) = (0, Vec::new());
    while begun.elapsed() < duration {
        let (first, mut gone) = busy.kill(busy.worker()?, Signal::KILL)?;
        deaths += 1;
        for turn in 0..1 + random.below(3) {
            let worker = busy.worker()?;
            let_pass(up_to(&mut random, TAKES_OVER));
            // What was in flight at two aborts running is taken for their cause; so never two.
            let signal = if turn == 0 && random.below(2) == 0 { Signal::ABORT } else { Signal::KILL };
            (_, gone) = busy.kill(worker, signal)?;
            deaths += 1;
        }
        pauses.push(busy.await_read(gone)? - first);
        let before = busy.done()?;
        busy.await_progress(&before)?;
        // So that the supervisor does not hold the next one back for this one's sake.
        let_pass(LONG * 2);
    }
    Deaths::new(busy, deaths, pauses)
}
