//! One fetch of one group of spans, shared by everyone who waits for a chunk of it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use millstream_chunkstore::Layer;
use millstream_source::{ErrorKind, Priority, Retry, SourceError, names};
use millstream_toc::DataRange;
use millstream_toc::format::{ChunkIx, SpanIx};
use millstream_toc::read::Chunk;
use millstream_toc::span::Edge;
use tokio::time::Instant;

use crate::attached::{Attached, ImageSources, Source};
use crate::deliver::{ChunkSink, store_failed, toc_failed};
use crate::edges::Edges;
use crate::extract::Attempt;
use crate::fetcher::Shared;
use crate::gate::Urgency;
use crate::landing::{Landing, Progress, aborted};
use crate::plan::{Group, Way};

/// A fetch under way whose chunks go to the store.
#[derive(Debug)]
pub(crate) struct Flight {
    layer: Arc<Layer>,
    edges: Arc<Edges>,
    brings: Brings,
    pub(crate) urgency: Urgency,
    progress: Progress,
}

/// What a fetch brings when it succeeds.
#[derive(Debug)]
enum Brings {
    /// Everything in these spans.
    Spans(Range<SpanIx>),
    /// These chunks, ascending.
    Chunks(Vec<Chunk>),
}

impl AsRef<Progress> for Flight {
    fn as_ref(&self) -> &Progress {
        &self.progress
    }
}

impl Flight {
    pub(crate) fn new(layer: Arc<Layer>, edges: Arc<Edges>, group: &Group, priority: Priority) -> Self {
        let brings = match &group.way {
            Way::Spans { spans, .. } => Brings::Spans(spans.clone()),
            Way::Content => Brings::Chunks(group.chunks.clone()),
        };
        let urgency = Urgency::new(priority, layer.number());
        Self { layer, edges, brings, urgency, progress: Progress::default() }
    }

    /// Whether it will bring what lies in `spans`.
    pub(crate) fn covers(&self, spans: &Range<SpanIx>) -> bool {
        matches!(&self.brings, Brings::Spans(own) if own.start <= spans.start && spans.end <= own.end)
    }

    /// Whether it will bring `chunk`, which needs a closed span.
    pub(crate) fn brings(&self, chunk: &Chunk) -> bool {
        matches!(&self.brings, Brings::Chunks(own) if own.binary_search(chunk).is_ok())
    }

    /// Waits until no chunk of `range` is missing (`true`) or the fetch has ended.
    async fn wait(&self, range: DataRange) -> Result<bool, SourceError> {
        self.progress.wait(|| Ok(self.layer.missing(range).map_err(store_failed)?.is_empty())).await
    }
}

/// Waits until no chunk of `range` is missing or all of `flights` have ended. All at once: the two halves of a chunk may come
/// with two of them, and the one that comes last stores it.
///
/// # Errors
/// That of the first one that fails.
pub(crate) async fn wait(flights: &[Arc<Flight>], range: DataRange) -> Result<(), SourceError> {
    let mut waits: FuturesUnordered<_> = flights.iter().map(|flight| flight.wait(range)).collect();
    while let Some(complete) = waits.next().await {
        if complete? {
            break;
        }
    }
    Ok(())
}

impl ChunkSink for Flight {
    fn wants(&self, chunk: ChunkIx) -> bool {
        !self.layer.has(chunk)
    }

    fn put(&self, chunk: Chunk, bytes: &[u8]) -> Result<(), SourceError> {
        self.layer.write(chunk, bytes).map_err(store_failed)?;
        self.progress.stored();
        Ok(())
    }

    fn edge(&self, edge: Edge) -> Result<(), SourceError> {
        let chunk = edge.chunk;
        if !self.wants(chunk.ix) {
            return Ok(());
        }
        let joined = self.edges.offer(&self.layer.digest(), edge, |whole| {
            if self.layer.toc().verify_chunk(chunk.ix, whole).map_err(toc_failed)? {
                return self.put(chunk, whole);
            }
            // Either half may be wrong. Whoever wants the chunk fetches it anew, all from one source, which shows which.
            tracing::warn!(
                { names::LAYER } = %self.layer.digest(), chunk = chunk.ix, "two halves do not make a chunk: both dropped",
            );
            Ok(())
        });
        joined.unwrap_or(Ok(()))
    }
}

/// Runs a flight to its end, also when nobody waits for it any more. It is on the list already.
pub(crate) async fn fly(shared: Arc<Shared>, attached: Arc<Attached>, flight: Arc<Flight>, group: Group) {
    let landing = Landing::new(attached.all_flights(), flight.clone());
    let sink: Arc<dyn ChunkSink> = flight.clone();
    let attempt =
        Attempt { shared: &shared, layer: &attached.layer, group: &group, urgency: &flight.urgency, sink: &sink };
    let deadline = shared.options.read_deadline;
    let bounded = tokio::time::timeout(deadline, fetch(&attached, attempt));
    let outcome = match attached.cancel.run_until_cancelled(bounded).await {
        None => Err(aborted()),
        Some(Ok(outcome)) => outcome,
        Some(Err(_)) => {
            Err(SourceError::new(ErrorKind::TimedOut, format!("no source gave the bytes within {deadline:?}")))
        }
    };
    if let Err(error) = &outcome
        && !attached.cancel.is_cancelled()
    {
        // Readers report their own failures, with what they wanted.
        tracing::debug!(
            { names::LAYER } = %attached.layer.digest(), { names::CODE } = error.kind.code(), %error,
            way = ?group.way, "fetch failed",
        );
    }
    landing.end(outcome);
}

/// Which half of a source was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Half {
    Blob,
    Content,
}

/// Asks all sources in order, compressed bytes first (but where spans are closed), round after round, until one gives the
/// group, none is left, or the next round would come after the reader's deadline.
pub(crate) async fn fetch(attached: &Attached, attempt: Attempt<'_>) -> Result<(), SourceError> {
    let options = &attempt.shared.options;
    let mut given_up: Vec<(u64, Half)> = Vec::new();
    let mut last = SourceError::new(ErrorKind::Unavailable, "the layer has no source for these bytes");
    // What each of them said last: each has its own reason, and a person may be able to remove one of them.
    let mut causes: BTreeMap<(u64, Half), String> = BTreeMap::new();
    let deadline = Instant::now() + options.read_deadline;
    for round in 1..=options.rounds.max(1) {
        let mut retry = None;
        for (source, half) in candidates(attached, &attempt.group.way) {
            if given_up.contains(&(source.id, half)) {
                continue;
            }
            let result = match (half, &source.image, &attempt.group.way) {
                (Half::Blob, image, Way::Spans { spans, blob }) => attempt.try_blob(image, spans, *blob).await,
                (Half::Content, ImageSources { content: Some(content), .. }, _) => {
                    attempt.try_content(&**content).await
                }
                _ => continue,
            };
            let Err(error) = result else { return Ok(()) };
            // Our own disk is full or broken, or our own queue is: no other source changes that.
            if error.kind == ErrorKind::Local {
                return Err(error);
            }
            judge(attempt, &source, &error);
            match error.retry {
                _ if error.kind == ErrorKind::DigestMismatch => given_up.push((source.id, half)),
                Retry::Never => given_up.push((source.id, half)),
                rule => retry = Some(sooner(retry, rule)),
            }
            causes.insert((source.id, half), error.message.clone());
            last = error;
        }
        match retry {
            Some(rule) if round < options.rounds => {
                let next = Instant::now() + options.pause(round, rule);
                // Nobody would wait for what comes then; why it failed so far says more than that time was up.
                if next >= deadline {
                    break;
                }
                tokio::time::sleep_until(next).await;
            }
            _ => break,
        }
    }
    if causes.len() > 1 {
        last.message = causes.into_values().collect::<Vec<_>>().join("; ");
    }
    Err(last)
}

fn candidates(attached: &Attached, way: &Way) -> Vec<(Arc<Source>, Half)> {
    let sources = attached.sources();
    let content =
        sources.iter().filter(|source| source.image.content.is_some()).map(|source| (source.clone(), Half::Content));
    let blobs = if matches!(way, Way::Spans { .. }) { &sources[..] } else { &[] };
    let mut all: Vec<_> = blobs.iter().map(|source| (source.clone(), Half::Blob)).collect();
    all.extend(content);
    all
}

fn judge(attempt: Attempt<'_>, source: &Source, error: &SourceError) {
    let layer = attempt.layer.digest();
    attempt.shared.tally.failed(error.kind);
    if error.kind == ErrorKind::DigestMismatch {
        source.blame();
        attempt.shared.tally.mismatch();
        tracing::error!({ names::LAYER } = %layer, { names::CODE } = error.kind.code(), %error, "source gave wrong bytes");
    } else {
        tracing::debug!({ names::LAYER } = %layer, { names::CODE } = error.kind.code(), %error, "source failed");
    }
}

/// The rule that allows the earlier retry.
fn sooner(one: Option<Retry>, other: Retry) -> Retry {
    match (one, other) {
        (Some(Retry::After(one)), Retry::After(other)) => Retry::After(one.min(other)),
        (None, rule) => rule,
        _ => Retry::Soon,
    }
}
