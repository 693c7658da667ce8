//! The [`Scheduler`] with tasks that wait in it. Tests run this file under a scheduler that tries orders out (`schedules`);
//! `super::sync` is where its locks and its time come from.

use std::collections::HashMap;
use std::time::Duration;

use millstream_source::{ErrorKind, Priority, SourceError};
use tokio::sync::oneshot;

use super::sync::{Instant, Mutex, MutexGuard, PoisonError, timeout, timeout_at, watch};
use crate::queue::{Limits, Scheduler, Ticket};

/// Hands out the right to send a request.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    demand: watch::Sender<bool>,
    epoch: Instant,
    starvation: Duration,
}

#[derive(Debug)]
struct State {
    scheduler: Scheduler,
    /// Tasks that wait; as many as tickets wait in the scheduler.
    wakers: HashMap<Ticket, oneshot::Sender<()>>,
}

/// The urgency of one piece of work, which may grow while it waits or runs.
#[derive(Debug)]
pub(crate) struct Urgency {
    /// Number of the layer that it is for.
    layer: u32,
    state: Mutex<(Priority, Option<Ticket>)>,
}

impl Urgency {
    /// Of work for the layer of this number.
    pub(crate) fn new(priority: Priority, layer: u32) -> Self {
        Self { layer, state: Mutex::new((priority, None)) }
    }

    fn lock(&self) -> MutexGuard<'_, (Priority, Option<Ticket>)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn priority(&self) -> Priority {
        self.lock().0
    }

    /// Makes the work at least as urgent as `priority`.
    pub(crate) fn raise(&self, gate: &Gate, priority: Priority) {
        let mut urgency = self.lock();
        if priority < urgency.0 {
            urgency.0 = priority;
            if let Some(ticket) = urgency.1 {
                gate.change(|scheduler| scheduler.raise(ticket, priority));
            }
        }
    }
}

/// A place in the queue, later a slot; given back on drop.
#[derive(Debug)]
pub(crate) struct Permit<'g> {
    gate: &'g Gate,
    ticket: Ticket,
    served: bool,
}

impl Permit<'_> {
    /// Gives the slot back after what was wanted has come.
    pub(crate) fn served(mut self) {
        self.served = true;
    }

    /// What `work` gives, which is what the source sends next. If that takes longer than `patience`, others need not wait for
    /// this request meanwhile.
    pub(crate) async fn hear<T>(&self, patience: Duration, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        if let Ok(heard) = timeout(patience, &mut work).await {
            return heard;
        }
        self.gate.change(|scheduler| scheduler.set_silent(self.ticket, true));
        let heard = work.await;
        self.gate.change(|scheduler| scheduler.set_silent(self.ticket, false));
        heard
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.gate.state().wakers.remove(&self.ticket);
        self.gate.change(|scheduler| scheduler.finish(self.ticket, self.served));
    }
}

/// Something that comes by itself and that readers are about to need; over when it is dropped.
#[derive(Debug)]
pub(crate) struct Foreground<'g>(&'g Gate);

impl Drop for Foreground<'_> {
    fn drop(&mut self) {
        self.0.change(Scheduler::end_foreground);
    }
}

impl Gate {
    /// Must be called within a tokio runtime.
    pub(crate) fn new(limits: Limits) -> Self {
        let state = State { scheduler: Scheduler::new(limits), wakers: HashMap::new() };
        Self {
            state: Mutex::new(state),
            demand: watch::Sender::new(false),
            epoch: Instant::now(),
            starvation: limits.starvation,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the scheduler and wakes whoever may run now.
    fn change<T>(&self, change: impl FnOnce(&mut Scheduler) -> T) -> T {
        let mut state = self.state();
        let value = change(&mut state.scheduler);
        let now = self.epoch.elapsed();
        while let Some(ticket) = state.scheduler.grant(now) {
            if let Some(waker) = state.wakers.remove(&ticket) {
                // A task that is gone gives its ticket back by dropping its permit.
                let _ = waker.send(());
            }
        }
        let active = state.scheduler.demand_active();
        // With the queue locked: told afterwards, it could be told after a later change, and stay wrong.
        self.demand.send_if_modified(|before| std::mem::replace(before, active) != active);
        value
    }

    fn enqueue(&self, priority: Priority, layer: u32) -> Option<(Permit<'_>, oneshot::Receiver<()>)> {
        let (waker, granted) = oneshot::channel();
        let ticket = {
            let mut state = self.state();
            let ticket = state.scheduler.submit(priority, layer)?;
            state.wakers.insert(ticket, waker);
            ticket
        };
        let permit = Permit { gate: self, ticket, served: false };
        self.change(|_| ());
        Some((permit, granted))
    }

    /// Waits for a slot, as urgently as `urgency` says now and later.
    ///
    /// # Errors
    /// [`ErrorKind::Local`] when too many wait already.
    pub(crate) async fn acquire(&self, urgency: &Urgency) -> Result<Permit<'_>, SourceError> {
        let (permit, mut granted) = {
            let layer = urgency.layer;
            let mut urgency = urgency.lock();
            let Some((permit, granted)) = self.enqueue(urgency.0, layer) else {
                return Err(SourceError::new(ErrorKind::Local, "too many fetches are waiting"));
            };
            urgency.1 = Some(permit.ticket);
            (permit, granted)
        };
        loop {
            // Only time makes a hydration overdue or demand settle, so those that wait look after the queue.
            let now = Instant::now();
            let due = self.state().scheduler.next_due(now.saturating_duration_since(self.epoch));
            let look = due.map_or(now + self.starvation, |due| self.epoch + due);
            match timeout_at(look, &mut granted).await {
                Ok(_) => return Ok(permit),
                Err(_) => self.change(|_| ()),
            }
        }
    }

    /// A slot, if one can be had without waiting.
    pub(crate) fn acquire_now(&self, priority: Priority, layer: u32) -> Option<Permit<'_>> {
        let (permit, mut granted) = self.enqueue(priority, layer)?;
        granted.try_recv().ok().map(|()| permit)
    }

    /// Waits until no reader's request waits, or runs with something coming of it, but no longer than `bound`; gives the time that is left of it.
    pub(crate) async fn yield_to_demand(&self, bound: Duration) -> Duration {
        if bound.is_zero() || !*self.demand.borrow() {
            return bound;
        }
        let begin = Instant::now();
        let mut demand = self.demand.subscribe();
        // The sender lives as long as `self`, so this ends by the change or by the time.
        let _ = timeout(bound, demand.wait_for(|active| !active)).await;
        bound.saturating_sub(begin.elapsed())
    }

    /// Hydration makes way until the guard is dropped.
    pub(crate) fn foreground(&self) -> Foreground<'_> {
        self.change(Scheduler::begin_foreground);
        Foreground(self)
    }

    pub(crate) fn running(&self) -> usize {
        self.state().scheduler.running()
    }

    pub(crate) fn waiting(&self) -> [usize; 3] {
        self.state().scheduler.waiting()
    }
}
