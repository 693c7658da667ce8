//! Every bound of this crate in one place.

use std::fmt::Debug;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use millstream_source::Retry;
use millstream_toc::Budget;

/// Spreads retries of many nodes.
pub trait Jitter: Debug + Send + Sync {
    /// A duration between half of `full` and `full`.
    fn spread(&self, full: Duration) -> Duration;
}

/// Jitter from the randomness that the standard library seeds its maps with.
#[derive(Debug, Default)]
pub struct RandomJitter(RandomState);

impl Jitter for RandomJitter {
    fn spread(&self, full: Duration) -> Duration {
        // A fresh state gives a fresh number each time; its quality is plenty for this.
        let random = RandomState::new().hash_one(self.0.hash_one(0u8)) % 1000;
        let part = u32::try_from(random).unwrap_or(0);
        full / 2 + full / 2 * part / 1000
    }
}

/// Bounds and habits of a [`Fetcher`](crate::Fetcher).
#[derive(Debug, Clone)]
pub struct FetchOptions {
    /// A read ends with an error after this long.
    pub read_deadline: Duration,
    /// A source that gives no byte for this long, or hardly any, is given up for this attempt. Several of it should fit into
    /// `read_deadline`, or the next source is never asked.
    pub idle_timeout: Duration,
    /// How often a fetch for a reader goes round all its sources: enough to fill `read_deadline` with pauses.
    pub rounds: u32,
    /// How often hydration asks each source for one part before it rests as a whole.
    pub attempts: u32,
    /// Pause before the second round; doubles from round to round.
    pub backoff_first: Duration,
    /// The pause does not grow beyond this.
    pub backoff_max: Duration,
    /// Pause before a hydration that failed is tried again; doubles, up to `hydrate_backoff_max`.
    pub hydrate_backoff_first: Duration,
    /// See `hydrate_backoff_first`.
    pub hydrate_backoff_max: Duration,
    /// Largest number of spans in one request for a reader.
    pub demand_spans: u32,
    /// Largest number of spans in one request with no reader waiting.
    pub prefetch_spans: u32,
    /// Two pieces of the blob with no more than this many compressed bytes between them become one request.
    pub gap: u64,
    /// A reader's request goes on over up to this many further spans, if at least `near_fetched` of the `near` spans on
    /// either side were fetched before. Zero switches it off.
    pub read_on: u32,
    /// See `read_on`.
    pub near: u32,
    /// See `read_on`.
    pub near_fetched: usize,
    /// Requests at once, at least 2; one of them is kept for readers.
    pub slots: usize,
    /// How many of them hydration may use.
    pub hydrate_slots: usize,
    /// After a reader's last request, hydration starts nothing for this long: a program that starts reads one thing after
    /// the other.
    pub settle: Duration,
    /// Readers' requests that may wait for a slot.
    pub demand_queue: usize,
    /// Other requests that may wait for a slot; what does not fit is not fetched ahead.
    pub prefetch_queue: usize,
    /// Hydration moves on after waiting this long for readers.
    pub starvation: Duration,
    /// After a read, a file up to this size is fetched whole. Zero switches it off.
    pub small_file: u64,
    /// When a file is read in order, this much of it is fetched ahead. Zero switches it off.
    pub read_ahead: u64,
    /// Windows asked for at once.
    pub window_batch: u32,
    /// Bytes of windows that are kept in memory.
    pub window_cache: usize,
    /// Bytes of half chunks that are kept until the other half comes.
    pub edge_cache: usize,
    /// A reader waits for a page that a replay will bring if that comes within this time, and for no longer while the replay
    /// stands still.
    pub replay_patience: Duration,
    /// Replays at once; others wait for their turn.
    pub replays: usize,
    /// Whether content that other layers of the store hold is taken over instead of being fetched.
    pub share: bool,
    /// How long a reader waits until it is known what other layers hold.
    pub share_patience: Duration,
    /// Layers hydrated at once.
    pub hydrations: usize,
    /// How long one hydration request should take: what is under way cannot be taken back when a reader comes, and each request
    /// costs a round trip and work in the registry. Requests have as many bytes as came in that time lately, within the bounds below.
    pub part_time: Duration,
    /// Compressed bytes of the largest hydration request while the line is slow or not known.
    pub part_size: u64,
    /// The same on a fast line.
    pub part_size_fast: u64,
    /// Parts of one layer that may be under way, wait or be there before the one that comes first in order. Several times as many
    /// as run at once, since connections do not share a line evenly: what has to wait for a slow one would begin all at once
    /// when that is through.
    pub parts_in_flight: usize,
    /// Compressed bytes that they may have together. With two of the largest parts it bounds the memory of a hydration.
    pub part_bytes_in_flight: u64,
    /// Sources kept for one layer; the oldest go first.
    pub sources: usize,
    /// Limits of the TOC builder.
    pub budget: Budget,
    /// Randomness for pauses.
    pub jitter: Arc<dyn Jitter>,
}

impl Default for FetchOptions {
    fn default() -> Self {
        Self {
            read_deadline: Duration::from_secs(60),
            idle_timeout: Duration::from_secs(15),
            rounds: 20,
            attempts: 5,
            backoff_first: Duration::from_millis(100),
            backoff_max: Duration::from_secs(5),
            hydrate_backoff_first: Duration::from_secs(2),
            hydrate_backoff_max: Duration::from_secs(300),
            demand_spans: 4,
            prefetch_spans: 16,
            gap: 128 * 1024,
            read_on: 3,
            near: 8,
            near_fetched: 2,
            slots: 8,
            hydrate_slots: 6,
            settle: Duration::from_millis(300),
            demand_queue: 4096,
            prefetch_queue: 256,
            starvation: Duration::from_secs(1),
            small_file: 4 * 1024 * 1024,
            read_ahead: 8 * 1024 * 1024,
            window_batch: 4,
            window_cache: 8 * 1024 * 1024,
            edge_cache: 4 * 1024 * 1024,
            replay_patience: Duration::from_millis(500),
            replays: 4,
            share: true,
            share_patience: Duration::from_millis(200),
            hydrations: 1,
            part_time: Duration::from_millis(250),
            part_size: 512 * 1024,
            part_size_fast: 4 * 1024 * 1024,
            parts_in_flight: 16,
            part_bytes_in_flight: 12 * 1024 * 1024,
            sources: 4,
            budget: Budget::default(),
            jitter: Arc::new(RandomJitter::default()),
        }
    }
}

impl FetchOptions {
    /// Pause after failure number `failures` (from 1) of a request, with what the source asked for.
    pub(crate) fn pause(&self, failures: u32, retry: Retry) -> Duration {
        let pause = self.jitter.spread(doubled(self.backoff_first, failures, self.backoff_max));
        match retry {
            // Not all at the very moment that the source named.
            Retry::After(asked) => pause + asked.min(self.read_deadline),
            Retry::Soon | Retry::Never => pause,
        }
    }

    /// Pause after failure number `failures` (from 1) of a whole hydration.
    pub(crate) fn hydration_pause(&self, failures: u32) -> Duration {
        self.jitter.spread(doubled(self.hydrate_backoff_first, failures, self.hydrate_backoff_max))
    }
}

fn doubled(first: Duration, failures: u32, max: Duration) -> Duration {
    first.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(max)
}
