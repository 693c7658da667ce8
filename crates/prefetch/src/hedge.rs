//! When a reader's request is sent once more: a few out of many come late for no reason that the next one shares. No I/O, no
//! clock: durations are what the caller measured.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Answers whose times are kept.
const KEPT: usize = 128;
/// Fewer answers than this say nothing of what is late.
const ENOUGH: usize = 20;
/// Of a hundred answers so many came in time.
const IN_TIME: usize = 95;
/// What is sooner than this is not late, however quick the others were.
const SHORTEST: Duration = Duration::from_millis(20);
/// One request in so many may be sent twice: what makes all of them late must not make them more.
const ONE_IN: u32 = 50;
/// Second requests that may follow each other.
const BURST: u32 = 4;

/// How long first bytes took lately, and how many second requests may be sent.
#[derive(Debug, Default)]
pub(crate) struct Hedge(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Until the first byte of an answer, the oldest first.
    times: VecDeque<Duration>,
    /// Answers since the last one that earned a second request.
    answers: u32,
    earned: u32,
}

impl Hedge {
    /// Notes how long the first byte of an answer took.
    pub(crate) fn answered(&self, after: Duration) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.times.len() == KEPT {
            state.times.pop_front();
        }
        state.times.push_back(after);
        state.answers += 1;
        if state.answers == ONE_IN {
            state.answers = 0;
            state.earned = BURST.min(state.earned + 1);
        }
    }

    /// How long to wait for an answer before asking once more; `None` while that is not known.
    pub(crate) fn patience(&self) -> Option<Duration> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.times.len() < ENOUGH {
            return None;
        }
        let mut times: Vec<_> = state.times.iter().copied().collect();
        let at = times.len() * IN_TIME / 100;
        let (_, late, _) = times.select_nth_unstable(at);
        Some(SHORTEST.max(*late))
    }

    /// Whether one more request may be sent, which counts as sent.
    pub(crate) fn take(&self) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let earned = state.earned > 0;
        state.earned = state.earned.saturating_sub(1);
        earned
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn late_is_what_is_later_than_nearly_all() {
        let hedge = Hedge::default();
        for _ in 0..ENOUGH - 1 {
            hedge.answered(50 * MS);
        }
        assert_eq!(hedge.patience(), None);
        hedge.answered(900 * MS);
        assert_eq!(hedge.patience(), Some(900 * MS), "one in twenty is not yet few");
        for _ in 0..40 {
            hedge.answered(50 * MS);
        }
        assert_eq!(hedge.patience(), Some(50 * MS));
        for _ in 0..KEPT {
            hedge.answered(MS);
        }
        assert_eq!(hedge.patience(), Some(SHORTEST));
    }

    proptest! {
        #[test]
        fn second_requests_are_few(asks in proptest::collection::vec(any::<bool>(), 0..2000)) {
            let hedge = Hedge::default();
            let (mut answers, mut taken) = (0, 0);
            for ask in asks {
                if ask {
                    taken += u32::from(hedge.take());
                } else {
                    hedge.answered(MS);
                    answers += 1;
                }
                prop_assert!(taken <= answers / ONE_IN);
            }
        }
    }
}
