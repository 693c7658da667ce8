//! Content is given up: first it is forgotten, then it is gone.
//!
//! Why no reader ever sees the zeros of a hole, and no crash leaves one that counts as content:
//!
//! - A reader holds [`Layer::content`] shared from its look at the presence map until its bytes are copied. The eviction takes it
//!   alone when it takes the marks away. So each reader either has its bytes by then, or finds the chunks missing; holes are
//!   made after that.
//! - A writer holds it shared as well, while it writes and marks, and writes nothing while `evicting` is set under it. So
//!   nothing comes back to a place between the taking of the mark and the making of the hole.
//! - On the disk, the presence file without the chunks comes first, then, for a layer that was verified, the record that
//!   it is lazy again, each of them synced; then the holes. A crash between any two of these leaves chunks that are there and do
//!   not count, never the other way round.
//!
//! `schedules` runs this file and that of the layer under a scheduler that tries orders out.

use std::ops::Range;

use millstream_toc::format::{ChunkIx, DATA_ALIGN};
use millstream_toc::read::Chunk;
use rustix::fs::FallocateFlags;

use super::super::sync::PoisonError;
use super::super::sync::atomic::Ordering;
use super::{Layer, LayerState, Step, StoreError, durable, presence, stored_len};

/// Chunks that are given up in one go, and where they lie.
#[derive(Debug, Default)]
struct Victims {
    chunks: Vec<Chunk>,
    /// Bytes in whole blocks.
    bytes: u64,
}

impl Victims {
    /// Ranges of the data file that hold the chunks and nothing else, as few as possible.
    fn holes(&self) -> Vec<Range<u64>> {
        let mut holes: Vec<Range<u64>> = Vec::new();
        for chunk in &self.chunks {
            // Behind the end of a file there is nothing up to the alignment.
            let hole = chunk.data.start..chunk.data.end.next_multiple_of(DATA_ALIGN);
            match holes.last_mut() {
                Some(last) if last.end == hole.start => last.end = hole.end,
                _ => holes.push(hole),
            }
        }
        holes
    }
}

impl Layer {
    /// Gives up content until `wanted` bytes of disk space are free or nothing is left, and gives the bytes that are free now.
    /// A verified layer is lazy afterwards. One eviction at a time, as [`Store::evict`](crate::Store::evict) sees to.
    ///
    /// # Errors
    /// Those of disk and database; then nothing is given up, or it is and its space is not free yet.
    pub(crate) fn evict(&self, wanted: u64) -> Result<u64, StoreError> {
        let mut durable = self.persist.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_trusted()?;
        let victims = self.victims(wanted)?;
        if victims.chunks.is_empty() || self.removed.load(Ordering::Acquire) {
            return Ok(0);
        }
        {
            let mut evicting = self.content.write().unwrap_or_else(PoisonError::into_inner);
            *evicting = true;
            for chunk in &victims.chunks {
                self.presence.clear(chunk.ix);
                // Of one that came whole while its pages came as well.
                self.partial.forget(chunk.ix);
            }
        }
        let result = self.forget(&victims, &mut durable);
        match &result {
            Ok(()) => self.count(&victims),
            // Nothing was written there since, and no hole was made: they are what they were.
            Err(_) => victims.chunks.iter().for_each(|chunk| _ = self.presence.set(chunk.ix)),
        }
        let result = result.and_then(|()| self.punch(&victims));
        *self.content.write().unwrap_or_else(PoisonError::into_inner) = false;
        result.map(|()| victims.bytes)
    }

    /// What is present, from the beginning; never what lies in a hole of a sparse file, which nobody could bring back.
    fn victims(&self, wanted: u64) -> Result<Victims, StoreError> {
        let mut victims = Victims::default();
        for ix in 0..self.toc.chunk_count() {
            if victims.bytes >= wanted {
                break;
            }
            if !self.presence.has(ix) || self.toc.is_hole(ix)? {
                continue;
            }
            let chunk = self.toc.chunk(ix)?;
            victims.bytes += stored_len(&chunk);
            victims.chunks.push(chunk);
        }
        self.check_map()?;
        Ok(victims)
    }

    /// Makes the disk forget that the chunks are there. `durable` is what it knows.
    fn forget(&self, victims: &Victims, durable: &mut Vec<u64>) -> Result<(), StoreError> {
        let verified = self.state() == LayerState::Verified;
        // All of a verified layer was synced. Of another one, only what was may be named.
        let mut words = if verified { self.presence.snapshot() } else { durable.clone() };
        victims.chunks.iter().for_each(|chunk| presence::unset(&mut words, chunk.ix));
        let file = self.dir.join("present");
        let bytes = presence::encode(&words, self.toc.chunk_count(), &self.toc_digest);
        match durable::replace(&*self.faults, &file, &bytes) {
            // A disk without room for the new record has room for none: then nothing is said to be present, until the next
            // sync finds room.
            Err(StoreError::NoSpace { .. }) if !verified => {
                durable::remove_file(&file)?;
                durable::sync_dir(&*self.faults, &self.dir)?;
                self.dirty.store(true, Ordering::Release);
            }
            result => result?,
        }
        *durable = words;
        if verified { self.change_state(LayerState::Lazy) } else { Ok(()) }
    }

    fn count(&self, victims: &Victims) {
        let bytes: u64 = victims.chunks.iter().map(|chunk| chunk.data.len()).sum();
        self.bytes_present.fetch_sub(bytes, Ordering::Relaxed);
        self.stored.fetch_sub(victims.bytes, Ordering::Relaxed);
        self.space.give_back(victims.bytes);
        self.space.note_evicted(victims.bytes);
    }

    fn punch(&self, victims: &Victims) -> Result<(), StoreError> {
        let failed = |e| StoreError::io("make a hole in", &self.data_path, e);
        for hole in victims.holes() {
            self.faults.before(Step::Punch, &self.data_path).map_err(failed)?;
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.data, flags, hole.start, hole.end - hole.start)
                .map_err(|error| failed(error.into()))?;
        }
        Ok(())
    }

    /// Frees what the data file holds of chunks that do not count as present: bytes that were never synced before a crash, or
    /// that one kept from becoming a hole.
    pub(super) fn free_what_is_missing(&self) -> Result<(), StoreError> {
        let mut missing = Victims::default();
        for ix in (0..self.toc.chunk_count()).filter(|ix: &ChunkIx| !self.presence.has(*ix)) {
            missing.chunks.push(self.toc.chunk(ix)?);
        }
        self.check_map()?;
        self.punch(&missing)
    }
}
