//! From a range that somebody wants to fetches under way: what is missing, who brings it already, what to ask for.

use std::sync::Arc;

use millstream_chunkstore::{Layer, LayerState};
use millstream_source::{ErrorKind, Priority, SourceError, names};
use millstream_toc::format::FormatError;
use millstream_toc::read::Chunk;
use millstream_toc::{DataRange, Toc};

use crate::attached::Attached;
use crate::deliver::{store_failed, toc_failed};
use crate::edges::Half;
use crate::fetcher::Shared;
use crate::flight::{self, Flight};
use crate::plan::{self, Bounds, Group, Need, Way};

/// How often a read looks again for what is missing before it gives up. More than twice is only needed when a fetch that
/// was joined brought other chunks than hoped, or half of one.
const ROUNDS: u32 = 4;

/// How to fetch a chunk that lies across the border of two spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Halves {
    /// With two fetches if need be; with none for a half that is there.
    Joined,
    /// With one fetch, whose source then answers for it.
    Together,
}

impl Shared {
    /// Brings every chunk of `range` into the store: from other layers where they hold it, else from the sources.
    pub(crate) async fn ensure(
        self: &Arc<Self>,
        attached: &Arc<Attached>,
        range: DataRange,
        priority: Priority,
    ) -> Result<(), SourceError> {
        if missing(&attached.layer, range)?.is_empty() {
            return Ok(());
        }
        if priority == Priority::Demand {
            self.await_replay(attached, range).await?;
        }
        self.share_range(attached, range).await;
        for round in 0..ROUNDS {
            let missing = missing(&attached.layer, range)?;
            if missing.is_empty() {
                return Ok(());
            }
            // A half that was counted on may have been dropped, or may be wrong.
            let halves = if round == 0 { Halves::Joined } else { Halves::Together };
            flight::wait(&self.join(attached, &missing, priority, halves)?, range).await?;
        }
        if missing(&attached.layer, range)?.is_empty() {
            return Ok(());
        }
        Err(SourceError::new(
            ErrorKind::Local,
            format!("fetched chunks of {} do not stay in the store", attached.layer.digest()),
        ))
    }

    /// Fetches under way that bring `chunks`, after starting those that are not.
    pub(crate) fn join(
        self: &Arc<Self>,
        attached: &Arc<Attached>,
        chunks: &[Chunk],
        priority: Priority,
        halves: Halves,
    ) -> Result<Vec<Arc<Flight>>, SourceError> {
        let toc = attached.layer.toc();
        let mut flights = attached.flights();
        let mut joined: Vec<Arc<Flight>> = Vec::new();
        let mut rest = Vec::new();
        let missing = plan::divide(toc, chunks).map_err(toc_failed)?;
        for chunk in &missing.open {
            for need in self.needs(attached, *chunk, halves).map_err(toc_failed)? {
                match flights.iter().find(|flight| flight.covers(&need.spans)) {
                    None => rest.push(need),
                    Some(flight) if joined.iter().any(|other| Arc::ptr_eq(other, flight)) => {}
                    Some(flight) => joined.push(flight.clone()),
                }
            }
        }
        let mut closed = missing.closed;
        closed.retain(|chunk| match flights.iter().find(|flight| flight.brings(chunk)) {
            None => !attached.layer.has(chunk.ix),
            Some(flight) => {
                if !joined.iter().any(|other| Arc::ptr_eq(other, flight)) {
                    joined.push(flight.clone());
                }
                false
            }
        });
        for flight in &joined {
            flight.urgency.raise(&self.gate, priority);
        }
        let mut groups = plan::plan(toc, &rest, self.bounds(priority)).map_err(toc_failed)?;
        if priority == Priority::Demand {
            for group in &mut groups {
                self.read_on(attached, group).map_err(toc_failed)?;
            }
        }
        let wanted =
            |chunk: &Chunk| !attached.layer.has(chunk.ix) && !flights.iter().any(|flight| flight.brings(chunk));
        groups.extend(plan::blocks(toc, &closed, wanted).map_err(toc_failed)?);
        for group in groups {
            let flight = self.start(attached, group, priority);
            flights.push(flight.clone());
            joined.push(flight);
        }
        Ok(joined)
    }

    /// What to fetch for a chunk that was missing: nothing if it came meanwhile. Called with the list of flights locked:
    /// one that is not on it any more has delivered everything.
    fn needs(&self, attached: &Attached, chunk: Chunk, halves: Halves) -> Result<Vec<Need>, FormatError> {
        let toc = attached.layer.toc();
        let Some(spans) = plan::spans_of(toc, chunk)? else { return Ok(Vec::new()) };
        let together = halves == Halves::Together || !plan::has_halves(toc, chunk, &spans)?;
        let half = if together { None } else { self.edges.half(&attached.layer.digest(), chunk.ix) };
        if attached.layer.has(chunk.ix) {
            return Ok(Vec::new());
        }
        if together {
            return Ok(vec![Need { chunk, spans }]);
        }
        let missing = match half {
            None => spans,
            Some(Half::Head) => spans.start + 1..spans.end,
            Some(Half::Tail) => spans.start..spans.start + 1,
        };
        Ok(missing.map(|span| Need { chunk, spans: span..span + 1 }).collect())
    }

    /// Lets a reader's request go on over the next spans where others nearby were read. They cost no round trip, and
    /// nothing of them comes before what the reader waits for.
    fn read_on(&self, attached: &Attached, group: &mut Group) -> Result<(), FormatError> {
        let options = &self.options;
        let toc = attached.layer.toc();
        let Way::Spans { spans, blob } = &mut group.way else { return Ok(()) };
        let end = attached.fetched().read_on(spans, options.near, options.near_fetched, options.read_on);
        for next in spans.end..end.min(toc.span_count()) {
            let span = toc.span(next)?;
            if span.is_closed() || span.blob.start < attached.hydration.blob_bytes() {
                break;
            }
            spans.end = next + 1;
            blob.end = span.blob.end;
        }
        Ok(())
    }

    fn start(self: &Arc<Self>, attached: &Arc<Attached>, group: Group, priority: Priority) -> Arc<Flight> {
        if let Way::Spans { spans, .. } = &group.way {
            attached.fetched().note(spans);
        }
        tracing::debug!(
            { names::LAYER } = %attached.layer.digest(), way = ?group.way, chunks = group.chunks.len(), ?priority,
            "fetching",
        );
        let flight = Arc::new(Flight::new(attached.layer.clone(), self.edges.clone(), &group, priority));
        let task = flight::fly(self.clone(), attached.clone(), flight.clone(), group);
        self.runtime.spawn(task);
        flight
    }

    /// Groups that bring just these chunks, for one who keeps nothing.
    pub(crate) fn unstored_groups(&self, toc: &Toc, missing: &[Chunk]) -> Result<Vec<Group>, FormatError> {
        let missing = plan::divide(toc, missing)?;
        let mut groups = plan::plan(toc, &plan::whole(toc, &missing.open)?, self.bounds(Priority::Demand))?;
        if !missing.closed.is_empty() {
            groups.push(Group { way: Way::Content, chunks: missing.closed });
        }
        Ok(groups)
    }

    pub(crate) fn bounds(&self, priority: Priority) -> Bounds {
        let options = &self.options;
        let spans = match priority {
            // Small for hydration too: what is under way cannot be taken back when a reader comes.
            Priority::Demand | Priority::Hydrate => options.demand_spans,
            Priority::Prefetch => options.prefetch_spans,
        };
        Bounds { spans, gap: options.gap }
    }
}

/// The chunks of `range` that are not in the store.
pub(crate) fn missing(layer: &Layer, range: DataRange) -> Result<Vec<Chunk>, SourceError> {
    if let LayerState::Quarantined { reason } = layer.state() {
        return Err(SourceError::new(ErrorKind::Local, format!("layer {} is quarantined: {reason}", layer.digest())));
    }
    layer.missing(range).map_err(store_failed)
}
