//! Who may send the next request. No I/O, no clock: time is what the caller says it is.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use millstream_source::Priority;

use crate::lanes::Lanes;

/// Bounds of a [`Scheduler`].
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests that run at once; the last free slot is only given to [`Priority::Demand`]. At least 2.
    pub slots: usize,
    /// How many of them may be [`Priority::Hydrate`].
    pub hydrate_slots: usize,
    /// No hydration request starts until this long after the last demand that was served: what is under way, the next reader
    /// must wait behind, and a program that starts reads one thing after the other.
    pub settle: Duration,
    /// Requests that may wait, in the order of [`Priority`].
    pub waiting: [usize; 3],
    /// While demand is active or has not settled, one hydration request starts in this time.
    pub starvation: Duration,
}

/// A request that waits or runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket {
    number: u64,
    layer: u32,
}

impl Ticket {
    /// Number of the layer that it is for.
    pub(crate) const fn layer(self) -> u32 {
        self.layer
    }
}

/// A bounded queue for each priority over a bounded number of slots. Within a priority layers have their turns, so that one that
/// asks for much does not keep another one waiting.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    next: u64,
    waiting: [Lanes; 3],
    running: HashMap<Ticket, Priority>,
    /// Those that run of which nothing comes: they hold their slots and nobody else up.
    silent: HashSet<Ticket>,
    /// Streams outside of the slots that readers are about to need.
    foreground: usize,
    last_hydrate: Duration,
    /// Since when hydration waits at all.
    hydrate_waits: Option<Duration>,
    /// A reader was served since the last look at the clock.
    demand_served: bool,
    /// When the last demand will have settled.
    settled: Duration,
}

/// Place of a priority in arrays.
pub(crate) const fn class(priority: Priority) -> usize {
    match priority {
        Priority::Demand => 0,
        Priority::Prefetch => 1,
        Priority::Hydrate => 2,
    }
}

impl Scheduler {
    /// Nothing waits, nothing runs.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        let limits = Limits { slots: limits.slots.max(2), hydrate_slots: limits.hydrate_slots.max(1), ..limits };
        Self {
            limits,
            next: 0,
            waiting: Default::default(),
            running: HashMap::new(),
            silent: HashSet::new(),
            foreground: 0,
            last_hydrate: Duration::ZERO,
            hydrate_waits: None,
            demand_served: false,
            settled: Duration::ZERO,
        }
    }

    /// Queues a request for the layer of this number; `None` when the queue of its priority is full.
    pub fn submit(&mut self, priority: Priority, layer: u32) -> Option<Ticket> {
        let queue = &mut self.waiting[class(priority)];
        if queue.len() >= self.limits.waiting[class(priority)] {
            return None;
        }
        let ticket = Ticket { number: self.next, layer };
        self.next += 1;
        queue.push(ticket);
        Some(ticket)
    }

    /// Makes a request at least as urgent as `priority`, wherever it is. The bound of the queue does not hold it back:
    /// it was counted in another one.
    pub fn raise(&mut self, ticket: Ticket, priority: Priority) {
        if let Some(running) = self.running.get_mut(&ticket) {
            *running = priority.min(*running);
            return;
        }
        for lower in class(priority) + 1..self.waiting.len() {
            if self.waiting[lower].remove(ticket) {
                self.waiting[class(priority)].push(ticket);
                return;
            }
        }
    }

    /// Notes that nothing comes of a request that runs (`true`), or that something comes again. A reader's request that waits
    /// for a dead source does not use the line, so it holds no hydration up.
    pub fn set_silent(&mut self, ticket: Ticket, silent: bool) {
        if silent && self.running.contains_key(&ticket) {
            self.silent.insert(ticket);
        } else {
            self.silent.remove(&ticket);
        }
    }

    /// Forgets a request, whether it waited or ran, and notes whether it brought what was wanted. A reader who got nothing
    /// reads on nowhere: that it failed is no reason to wait for what he wants next.
    pub fn finish(&mut self, ticket: Ticket, served: bool) {
        self.silent.remove(&ticket);
        let ended = self.running.remove(&ticket);
        self.demand_served |= served && ended == Some(Priority::Demand);
        if ended.is_none() {
            for queue in &mut self.waiting {
                queue.remove(ticket);
            }
        }
    }

    /// The next request that may run at time `now`, which then runs. Call until it gives `None`.
    pub fn grant(&mut self, now: Duration) -> Option<Ticket> {
        if std::mem::take(&mut self.demand_served) {
            self.settled = now.saturating_add(self.limits.settle);
        }
        if self.waiting[class(Priority::Hydrate)].is_empty() {
            self.hydrate_waits = None;
        } else {
            self.hydrate_waits.get_or_insert(now);
        }
        let free = self.limits.slots.saturating_sub(self.running.len());
        // The last free slot may go to an overdue hydration only while demand has others: one is always kept for demand.
        let demand_elsewhere = self.count(Priority::Demand) > 0;
        let overdue = self.hydrate_overdue(now) && (free > 1 || (self.demand_waits() && demand_elsewhere));
        let order: &[Priority] = if free == 0 {
            &[]
        } else if overdue {
            &[Priority::Hydrate, Priority::Demand, Priority::Prefetch]
        } else if free == 1 {
            &[Priority::Demand]
        } else if self.demand_active() || now < self.settled {
            &[Priority::Demand, Priority::Prefetch]
        } else {
            &[Priority::Prefetch, Priority::Hydrate]
        };
        order.iter().find_map(|priority| self.start(*priority, now))
    }

    fn start(&mut self, priority: Priority, now: Duration) -> Option<Ticket> {
        if priority == Priority::Hydrate {
            if self.count(Priority::Hydrate) >= self.limits.hydrate_slots {
                return None;
            }
            let ticket = self.waiting[class(priority)].pop()?;
            self.last_hydrate = now;
            self.running.insert(ticket, priority);
            return Some(ticket);
        }
        let ticket = self.waiting[class(priority)].pop()?;
        self.running.insert(ticket, priority);
        Some(ticket)
    }

    fn count(&self, priority: Priority) -> usize {
        self.running.values().filter(|running| **running == priority).count()
    }

    fn hydrate_overdue(&self, now: Duration) -> bool {
        self.hydrate_due().is_some_and(|due| now >= due) && self.count(Priority::Hydrate) == 0
    }

    /// When hydration that demand keeps waiting starts its next request all the same. One that has only begun to wait is not due
    /// yet: a start is what it most often begins with.
    fn hydrate_due(&self) -> Option<Duration> {
        Some(self.last_hydrate.max(self.hydrate_waits?).saturating_add(self.limits.starvation))
    }

    /// Whether a reader's request waits for a slot, or runs and something comes of it, or what readers are about to need comes by
    /// itself.
    #[must_use]
    pub fn demand_active(&self) -> bool {
        let comes =
            |(ticket, priority): (&Ticket, &Priority)| *priority == Priority::Demand && !self.silent.contains(ticket);
        self.demand_waits() || self.foreground > 0 || self.running.iter().any(comes)
    }

    /// One more stream that needs no slot, and that hydration makes way for as for readers.
    pub fn begin_foreground(&mut self) {
        self.foreground += 1;
    }

    /// One of them has ended: what it brought is about to be read.
    pub fn end_foreground(&mut self) {
        self.demand_served = true;
        self.foreground = self.foreground.saturating_sub(1);
    }

    fn demand_waits(&self) -> bool {
        !self.waiting[class(Priority::Demand)].is_empty()
    }

    /// When after `now` to call [`Scheduler::grant`] even though nothing changed: a hydration that waits for demand becomes
    /// overdue, or demand has settled.
    #[must_use]
    pub fn next_due(&self, now: Duration) -> Option<Duration> {
        let overdue = self.hydrate_due()?;
        [overdue, self.settled].into_iter().filter(|due| *due > now).min()
    }

    /// Number of requests that wait, in the order of [`Priority`].
    #[must_use]
    pub fn waiting(&self) -> [usize; 3] {
        self.waiting.each_ref().map(Lanes::len)
    }

    /// Number of requests that run.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use Priority::{Demand, Hydrate, Prefetch};
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn scheduler(slots: usize) -> Scheduler {
        Scheduler::new(Limits { slots, hydrate_slots: 2, settle: SECOND / 4, waiting: [64, 3, 64], starvation: SECOND })
    }

    fn drain(scheduler: &mut Scheduler, now: Duration) -> Vec<Ticket> {
        std::iter::from_fn(|| scheduler.grant(now)).collect()
    }

    #[test]
    fn the_urgent_overtake_and_equals_keep_their_order() {
        let mut s = scheduler(8);
        let tickets: Vec<_> =
            [Hydrate, Prefetch, Demand, Prefetch, Demand].into_iter().map(|p| s.submit(p, 0).unwrap()).collect();
        let granted = drain(&mut s, Duration::ZERO);
        assert_eq!(granted, [2, 4, 1, 3].map(|i: usize| tickets[i]));
    }

    #[test]
    fn one_slot_is_kept_for_demand() {
        let mut s = scheduler(3);
        for _ in 0..3 {
            s.submit(Prefetch, 0).unwrap();
        }
        assert_eq!(drain(&mut s, Duration::ZERO).len(), 2);
        let demand = s.submit(Demand, 0).unwrap();
        assert_eq!(drain(&mut s, Duration::ZERO), [demand]);
    }

    #[test]
    fn hydration_waits_for_demand_but_not_forever() {
        let mut s = scheduler(4);
        let first = s.submit(Hydrate, 0).unwrap();
        assert_eq!(drain(&mut s, 10 * SECOND), [first]);
        s.finish(first, true);
        let demand = s.submit(Demand, 0).unwrap();
        let second = s.submit(Hydrate, 0).unwrap();
        assert_eq!(drain(&mut s, 10 * SECOND), [demand]);
        assert_eq!(s.next_due(10 * SECOND + SECOND / 2), Some(11 * SECOND));
        assert_eq!(drain(&mut s, 11 * SECOND), [second]);
    }

    #[test]
    fn hydration_waits_until_demand_has_settled() {
        let mut s = scheduler(4);
        let demand = s.submit(Demand, 0).unwrap();
        let first = s.submit(Hydrate, 0).unwrap();
        assert_eq!(drain(&mut s, 9 * SECOND), [demand], "it has only begun to wait");
        assert_eq!(drain(&mut s, 10 * SECOND), [first], "overdue");
        let (second, third) = (s.submit(Hydrate, 0).unwrap(), s.submit(Hydrate, 0).unwrap());
        s.finish(demand, true);
        s.finish(first, true);
        let settled = 10 * SECOND + SECOND / 4;
        assert_eq!(drain(&mut s, 10 * SECOND), []);
        assert_eq!(s.next_due(10 * SECOND), Some(settled));
        assert_eq!(drain(&mut s, settled - Duration::from_millis(1)), []);
        assert_eq!(drain(&mut s, settled), [second, third]);
        assert_eq!(s.next_due(settled), None);
    }

    #[test]
    fn a_reader_who_gets_nothing_holds_nothing_up() {
        let mut s = scheduler(4);
        let now = 10 * SECOND;
        // One whose source says nothing, for as long as it says nothing.
        let demand = s.submit(Demand, 0).unwrap();
        let overdue = s.submit(Hydrate, 0).unwrap();
        assert_eq!(drain(&mut s, now - SECOND), [demand]);
        assert_eq!(drain(&mut s, now), [overdue]);
        let second = s.submit(Hydrate, 0).unwrap();
        assert_eq!(drain(&mut s, now), []);
        s.set_silent(demand, true);
        assert!(!s.demand_active());
        assert_eq!(drain(&mut s, now), [second]);
        s.finish(second, true);
        s.set_silent(demand, false);
        let third = s.submit(Hydrate, 0).unwrap();
        assert_eq!(drain(&mut s, now), []);
        // One who fails, and who is there again at once.
        s.finish(demand, false);
        assert_eq!(drain(&mut s, now), [third], "nothing has to settle");
        s.finish(third, true);
        let again = s.submit(Demand, 0).unwrap();
        assert_eq!(drain(&mut s, now), [again]);
        let fourth = s.submit(Hydrate, 0).unwrap();
        s.finish(again, false);
        assert_eq!(drain(&mut s, now), [fourth]);
    }

    #[test]
    fn hydration_is_not_starved_by_a_full_house() {
        let mut s = scheduler(2);
        s.submit(Hydrate, 0).unwrap();
        let mut running: VecDeque<_> = (0..2).map(|_| s.submit(Demand, 0).unwrap()).collect();
        assert_eq!(running, drain(&mut s, Duration::ZERO));
        s.submit(Demand, 0).unwrap();
        s.finish(running.pop_front().unwrap(), true);
        assert!(s.grant(SECOND).is_some());
        assert_eq!(s.count(Hydrate), 1);
    }

    #[test]
    fn layers_have_their_turns() {
        let mut s = scheduler(8);
        let many: Vec<_> = (0..5).map(|_| s.submit(Demand, 1).unwrap()).collect();
        let few: Vec<_> = (0..2).map(|_| s.submit(Demand, 2).unwrap()).collect();
        let late = s.submit(Hydrate, 3).unwrap();
        s.raise(late, Demand);
        s.finish(many[1], false);
        let order = [many[0], few[0], late, many[2], few[1], many[3], many[4]];
        assert_eq!(drain(&mut s, Duration::ZERO), order);
    }

    #[test]
    fn a_full_queue_refuses() {
        let mut s = scheduler(2);
        for _ in 0..3 {
            s.submit(Prefetch, 0).unwrap();
        }
        assert!(s.submit(Prefetch, 0).is_none());
        assert!(s.submit(Demand, 0).is_some());
    }

    #[test]
    fn raising_moves_a_waiting_request_and_marks_a_running_one() {
        let mut s = scheduler(2);
        let running = s.submit(Prefetch, 0).unwrap();
        let waiting = s.submit(Prefetch, 0).unwrap();
        assert_eq!(drain(&mut s, Duration::ZERO), [running]);
        s.raise(waiting, Demand);
        assert_eq!(drain(&mut s, Duration::ZERO), [waiting]);
        s.raise(running, Demand);
        s.finish(waiting, true);
        assert!(s.demand_active());
        s.raise(running, Hydrate);
        assert!(s.demand_active());
        s.finish(running, true);
        assert!(!s.demand_active());
    }

    proptest! {
        #[test]
        fn bounds_hold_and_everything_gets_its_turn(operations in proptest::collection::vec((0u8..5, any::<proptest::sample::Index>()), 1..120)) {
            let mut s = scheduler(4);
            let (mut live, mut running) = (Vec::new(), Vec::new());
            let mut now = Duration::ZERO;
            for (operation, pick) in operations {
                match operation {
                    0..3 => live.extend(s.submit([Demand, Prefetch, Hydrate][operation as usize], u32::from(operation))),
                    3 if !live.is_empty() => {
                        let ticket = live.swap_remove(pick.index(live.len()));
                        running.retain(|other| *other != ticket);
                        s.finish(ticket, true);
                    }
                    _ => now += SECOND / 4,
                }
                running.extend(drain(&mut s, now));
                prop_assert_eq!(running.len(), s.running());
                prop_assert!(s.running() <= 4 && s.count(Hydrate) <= 2);
                prop_assert!(s.count(Demand) > 0 || s.running() < 4);
                prop_assert!(s.waiting[0].is_empty() || s.running() == 4);
            }
            // When those that run come to their end, every one that waits runs some time.
            for _ in 0..live.len() {
                now += SECOND;
                running.extend(drain(&mut s, now));
                let Some(ticket) = running.pop() else { break };
                s.finish(ticket, true);
            }
            prop_assert!(s.waiting.iter().all(Lanes::is_empty));
        }
    }
}
