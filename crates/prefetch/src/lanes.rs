//! A queue in which those who ask for much do not keep those waiting who ask for little.

use std::collections::{HashMap, VecDeque};

use crate::queue::Ticket;

/// Requests that wait: one queue for each layer, served in turn. The bound is the caller's.
#[derive(Debug, Default)]
pub(crate) struct Lanes {
    /// Layers with requests, the next one first.
    turns: VecDeque<u32>,
    lanes: HashMap<u32, VecDeque<Ticket>>,
    len: usize,
}

impl Lanes {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn push(&mut self, ticket: Ticket) {
        let lane = self.lanes.entry(ticket.layer()).or_default();
        if lane.is_empty() {
            self.turns.push_back(ticket.layer());
        }
        lane.push_back(ticket);
        self.len += 1;
    }

    /// The oldest request of the layer whose turn it is.
    pub(crate) fn pop(&mut self) -> Option<Ticket> {
        let layer = self.turns.pop_front()?;
        let lane = self.lanes.get_mut(&layer)?;
        let ticket = lane.pop_front()?;
        if lane.is_empty() {
            self.lanes.remove(&layer);
        } else {
            self.turns.push_back(layer);
        }
        self.len -= 1;
        Some(ticket)
    }

    /// Takes a request out; whether it was here.
    pub(crate) fn remove(&mut self, ticket: Ticket) -> bool {
        let Some(lane) = self.lanes.get_mut(&ticket.layer()) else { return false };
        let Some(at) = lane.iter().position(|waiting| *waiting == ticket) else { return false };
        lane.remove(at);
        if lane.is_empty() {
            self.lanes.remove(&ticket.layer());
            self.turns.retain(|layer| *layer != ticket.layer());
        }
        self.len -= 1;
        true
    }
}
