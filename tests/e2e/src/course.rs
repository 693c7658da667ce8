//! What a node holds, round by round, and whether it grows: the slow leak that no single round shows.

use anyhow::{Result, ensure};

use crate::gauges::{Gauges, Process};

/// Rounds that tell something.
const FEWEST: usize = 24;
/// The part of the rounds that comes first and does not count: pools, arenas and caches fill.
const WARM_UP: usize = 4;
/// What may be there by chance when least is there in one half, and not in the other: a connection, and its task.
const CHANCE: u64 = 1;
/// Bytes of memory that may be left of a round. Seen: less than 1 KiB.
const MEMORY: u64 = 4 << 10;

/// Gauges at the ends of rounds.
#[derive(Debug, Default)]
pub struct Course(Vec<Gauges>);

impl Course {
    /// One more round is over.
    pub fn push(&mut self, gauges: Gauges) {
        self.0.push(gauges);
    }

    /// Rounds so far.
    #[must_use]
    pub fn rounds(&self) -> usize {
        self.0.len()
    }

    /// Compares the second half of the rounds with the first one, without those that came first of all.
    ///
    /// What is counted goes up and down with connections and threads that wait a while for more work, so the least of each
    /// half is compared: a leak raises it. Of memory it is the median, since what an allocator has in hand goes both ways.
    ///
    /// # Errors
    ///
    /// If something grows; the error says what. If there were too few rounds to tell.
    pub fn ensure_level(&self) -> Result<()> {
        ensure!(self.0.len() >= FEWEST, "{} rounds tell nothing", self.0.len());
        let counted = self.0.get(self.0.len() / WARM_UP..).unwrap_or_default();
        let (first, second) = counted.split_at(counted.len() / 2);
        let mut found = Vec::new();
        for (what, of) in COUNTS {
            let [was, is] = [first, second].map(|half| half.iter().map(of).min().unwrap_or_default());
            println!("{what}: at least {was}, then {is}");
            if is > was + CHANCE {
                found.push(format!("{what}: at least {was}, then {is}"));
            }
        }
        // Between the middles of the two halves.
        let rounds = second.len() as u64;
        for (who, of) in PROCESSES {
            let [was, is] = [first, second].map(|half| median(half.iter().map(|gauges| of(gauges).memory).collect()));
            let line = format!("memory of the {who}: {} KiB, then {} KiB, {rounds} rounds later", was >> 10, is >> 10);
            println!("{line}");
            if is > was + MEMORY * rounds {
                found.push(line);
            }
        }
        ensure!(found.is_empty(), "it grows: {found:#?}");
        Ok(())
    }
}

/// Something that is counted.
type Count = (&'static str, fn(&Gauges) -> u64);

const COUNTS: [Count; 6] = [
    ("descriptors of the worker", |gauges| gauges.worker.descriptor_count() as u64),
    ("descriptors of the supervisor", |gauges| gauges.supervisor.descriptor_count() as u64),
    ("threads of the worker", |gauges| gauges.worker.threads as u64),
    ("threads of the supervisor", |gauges| gauges.supervisor.threads as u64),
    ("tasks", |gauges| gauges.tasks),
    ("mounts, snapshots, directories and leases", |gauges| gauges.things.len() as u64),
];

/// One of the processes of a node.
type Of = (&'static str, fn(&Gauges) -> &Process);

const PROCESSES: [Of; 2] = [("worker", |gauges| &gauges.worker), ("supervisor", |gauges| &gauges.supervisor)];

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Of a node that holds so much more than at first.
    fn gauges(sockets: usize, threads: usize, memory: u64, things: usize) -> Gauges {
        let descriptors = [("socket".to_owned(), 10 + sockets)].into();
        let worker = Process { descriptors, threads: 20 + threads, memory: (30 << 20) + memory };
        let supervisor = Process { descriptors: [].into(), threads: 1, memory: 1 << 20 };
        Gauges::of(worker, supervisor, 12, vec!["thing".to_owned(); things])
    }

    fn course(of: impl Fn(u64) -> Gauges) -> Course {
        Course((0..40).map(of).collect())
    }

    #[test]
    fn what_goes_up_and_down_is_level() {
        // Connections, threads of a pool, and what an allocator keeps; and a beginning in which it all fills.
        let jumps = |round: u64| {
            let jump = usize::try_from(round * 7 % 5).unwrap();
            gauges(jump, jump * 3, (round * 7 % 5) << 18, 3)
        };
        course(jumps).ensure_level().unwrap();
        course(|round| gauges(usize::try_from(round.min(9)).unwrap(), 0, round.min(9) << 20, 0))
            .ensure_level()
            .unwrap();
        assert!(Course((0..10).map(jumps).collect()).ensure_level().is_err(), "too few");
    }

    #[test]
    fn what_grows_a_little_each_round_is_found() {
        let growing: [fn(u64) -> Gauges; 4] = [
            |round| gauges(usize::try_from(round).unwrap(), 0, 0, 0),
            |round| gauges(0, usize::try_from(round).unwrap(), 0, 0),
            |round| gauges(0, 0, round * (6 << 10), 0),
            |round| gauges(0, 0, 0, usize::try_from(round).unwrap()),
        ];
        for of in growing {
            assert!(course(of).ensure_level().is_err());
        }
    }
}
