//! The scheduler on a line of known width, in time that is only counted: nobody starves, nobody pushes in, nothing that stands still
//! or lies holds up the rest.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::time::Duration;

use millstream_prefetch::parts;
use millstream_prefetch::queue::{Limits, Scheduler, Ticket};
use millstream_source::Priority::{self, Demand, Hydrate, Prefetch};

const STEP: Duration = Duration::from_millis(1);
const ROUND_TRIP: Duration = Duration::from_millis(20);
/// Bytes in a step: 100 Mbit/s.
const LINE: f64 = 12_500.0;
const PART: u64 = 512 * 1024;
const SPAN: f64 = 300.0 * 1024.0;

#[derive(Debug, Clone, Copy)]
struct Request {
    priority: Priority,
    layer: u32,
    submitted: Duration,
    granted: Option<Duration>,
    bytes: f64,
    left: f64,
}

/// What became of a request.
#[derive(Debug, Clone, Copy)]
struct Done {
    priority: Priority,
    layer: u32,
    bytes: f64,
    took: Duration,
}

struct Line {
    scheduler: Scheduler,
    now: Duration,
    requests: HashMap<Ticket, Request>,
    done: Vec<Done>,
    /// How much of each layer hydration has asked for.
    hydrated: HashMap<u32, Box<dyn Iterator<Item = u64>>>,
}

impl Line {
    fn new() -> Self {
        let limits = Limits {
            slots: 8,
            hydrate_slots: 6,
            settle: Duration::from_millis(300),
            waiting: [4096, 256, 512],
            starvation: Duration::from_secs(1),
        };
        // A node that has been up for a while.
        let now = Duration::from_secs(1000);
        Self {
            scheduler: Scheduler::new(limits),
            now,
            requests: HashMap::new(),
            done: Vec::new(),
            hydrated: HashMap::new(),
        }
    }

    fn submit(&mut self, priority: Priority, layer: u32, bytes: f64) -> Option<Ticket> {
        let ticket = self.scheduler.submit(priority, layer)?;
        let request = Request { priority, layer, submitted: self.now, granted: None, bytes, left: bytes };
        self.requests.insert(ticket, request);
        Some(ticket)
    }

    /// One step: grants, and everything whose answer has begun has an equal share of the line.
    fn step(&mut self) {
        while let Some(ticket) = self.scheduler.grant(self.now) {
            self.requests.get_mut(&ticket).unwrap().granted = Some(self.now);
        }
        self.now += STEP;
        let flows = |request: &Request| {
            request.left.is_finite() && request.granted.is_some_and(|granted| self.now >= granted + ROUND_TRIP)
        };
        let flowing: Vec<Ticket> = self.requests.iter().filter(|(_, r)| flows(r)).map(|(ticket, _)| *ticket).collect();
        let share = LINE / flowing.len().max(1) as f64;
        for ticket in flowing {
            let request = self.requests.get_mut(&ticket).unwrap();
            request.left -= share;
            if request.left <= 0.0 {
                let Request { priority, layer, bytes, .. } = *request;
                self.done.push(Done { priority, layer, bytes, took: self.now - request.submitted });
                self.requests.remove(&ticket);
                self.scheduler.finish(ticket, true);
            }
        }
    }

    fn waits_for(&self, ticket: Ticket) -> bool {
        self.requests.contains_key(&ticket)
    }

    fn count(&self, priority: Priority) -> usize {
        self.done.iter().filter(|done| done.priority == priority).count()
    }

    /// Keeps so many parts of each layer wanted, as hydration does.
    fn hydrate(&mut self, layer: u32) {
        let wanted = |request: &&Request| request.priority == Hydrate && request.layer == layer;
        while self.requests.values().filter(wanted).count() < 8 {
            let endless = || Box::new(parts::of_blob(u64::MAX, || PART).map(|part| part.len()));
            let part = self.hydrated.entry(layer).or_insert_with(|| endless()).next().unwrap();
            self.submit(Hydrate, layer, part as f64).unwrap();
        }
    }

    /// Bytes that hydration has got.
    fn hydrated(&self) -> f64 {
        self.done.iter().filter(|done| done.priority == Hydrate).map(|done| done.bytes).sum()
    }

    /// Lets a program read one thing after the other for so long, while `beside` does something at every step; the times that it
    /// waited.
    fn program(&mut self, layer: u32, length: Duration, mut beside: impl FnMut(&mut Self)) -> Vec<Duration> {
        let (end, mut reading) = (self.now + length, None);
        while self.now < end {
            beside(self);
            if reading.is_none_or(|ticket| !self.waits_for(ticket)) {
                reading = self.submit(Demand, layer, SPAN);
            }
            self.step();
        }
        self.done.iter().filter(|d| d.priority == Demand && d.layer == layer).map(|d| d.took).collect()
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn alone() -> Duration {
    median(Line::new().program(1, Duration::from_secs(10), |_| ()))
}

#[test]
fn a_program_hardly_notices_hydration_and_hydration_is_not_starved() {
    let mut line = Line::new();
    let length = Duration::from_secs(30);
    let waits = line.program(1, length, |line| line.hydrate(2));
    assert!(median(waits.clone()) <= alone().mul_f64(1.05), "{:?} and {:?}", median(waits), alone());
    let parts = line.count(Hydrate);
    assert!((29..=31).contains(&parts), "{parts} parts in thirty seconds");
}

#[test]
fn hydration_has_the_whole_line_when_nobody_reads() {
    let mut line = Line::new();
    let begun = line.now;
    while line.now < begun + Duration::from_secs(10) {
        line.hydrate(1);
        line.step();
    }
    // One round trip at the beginning, and what is under way at the end.
    let share = line.hydrated() / (LINE * 10_000.0);
    assert!(share > 0.97, "{share} of the line");
}

#[test]
fn one_image_that_asks_for_everything_does_not_keep_another_one_waiting() {
    let mut line = Line::new();
    // A thousand reads at once, and beside them a program that reads one thing after the other.
    for _ in 0..1000 {
        line.submit(Demand, 1, SPAN).unwrap();
    }
    let waits = line.program(2, Duration::from_secs(10), |_| ());
    // Each of its reads waits for at most as many others as there are slots, all of which share the line.
    let bound = ROUND_TRIP * 2 + Duration::from_secs_f64(9.0 * SPAN / LINE / 1000.0);
    assert!(waits.iter().max().unwrap() <= &bound, "{:?}, {bound:?} allowed", waits.iter().max());
    assert!(waits.len() > 30, "{} reads", waits.len());
}

#[test]
fn images_that_ask_for_the_same_are_done_together() {
    let mut line = Line::new();
    for layer in 1..=10 {
        for _ in 0..40 {
            line.submit(Demand, layer, SPAN).unwrap();
        }
    }
    let begun = line.now;
    let mut ends = HashMap::new();
    while ends.len() < 10 {
        line.step();
        for layer in 1..=10 {
            if !line.requests.values().any(|request| request.layer == layer) {
                ends.entry(layer).or_insert(line.now - begun);
            }
        }
    }
    let (first, last) = (ends.values().min().unwrap(), ends.values().max().unwrap());
    assert!(last.as_secs_f64() <= first.as_secs_f64() * 1.05, "{first:?} to {last:?}");
}

#[test]
fn a_connection_that_stands_still_costs_its_slot_and_nothing_else() {
    let mut line = Line::new();
    for _ in 0..2 {
        line.submit(Demand, 9, f64::INFINITY).unwrap();
    }
    line.step();
    let stalled: Vec<Ticket> = line.requests.keys().copied().collect();
    // What the gate says of them after a while.
    stalled.iter().for_each(|ticket| line.scheduler.set_silent(*ticket, true));
    let waits = line.program(1, Duration::from_secs(10), |_| ());
    assert!(median(waits) <= alone().mul_f64(1.05));
    let (begun, before) = (line.now, line.hydrated());
    while line.now < begun + Duration::from_secs(5) {
        line.hydrate(2);
        line.step();
    }
    let share = (line.hydrated() - before) / (LINE * 5000.0);
    assert!(share > 0.9, "{share} of the line");
}

#[test]
fn a_profile_that_lies_delays_no_reader_and_ends() {
    let mut line = Line::new();
    // As much as may wait, for nothing.
    while line.submit(Prefetch, 1, PART as f64).is_some() {}
    let useless = line.requests.len();
    assert_eq!(useless, 256);
    let begun = line.now;
    let waits = line.program(1, Duration::from_secs(20), |line| line.hydrate(2));
    // Beside seven others at worst; what is under way cannot be taken back.
    let bound = ROUND_TRIP * 2 + Duration::from_secs_f64((7.0 * PART as f64 + SPAN) / LINE / 1000.0);
    assert!(waits.iter().max().unwrap() <= &bound, "{:?}, {bound:?} allowed", waits.iter().max());
    while line.count(Prefetch) < useless {
        line.step();
    }
    assert!(line.now - begun < Duration::from_secs(40), "{:?}", line.now - begun);
}

#[test]
fn a_stream_of_pages_without_an_end_leaves_hydration_its_part_a_second() {
    let mut line = Line::new();
    line.scheduler.begin_foreground();
    let end = line.now + Duration::from_secs(20);
    while line.now < end {
        line.hydrate(1);
        line.step();
    }
    let parts = line.count(Hydrate);
    assert!((19..=21).contains(&parts), "{parts} parts in twenty seconds");
    line.scheduler.end_foreground();
    let (end, before) = (line.now + Duration::from_secs(5), line.hydrated());
    while line.now < end {
        line.hydrate(1);
        line.step();
    }
    let share = (line.hydrated() - before) / (LINE * 5000.0);
    assert!(share > 0.9, "{share} of the line");
}
