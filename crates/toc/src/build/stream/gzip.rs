//! gzip: a checkpoint before each member and at the ends of deflate blocks.

use std::io::{self, Read};

use millstream_inflate::{InflateError, Inflater, Progress, Stop, WINDOW_SIZE};
use sha2::Digest as _;

use super::{Codec, TarStream, record, short_digest};
use crate::build::error::{BuildError, Ineligible};
use crate::format::{SPAN_SIZE, START_DEFLATE, START_MEMBER};

/// First bytes by which containerd tells gzip.
const MAGIC: [u8; 3] = [0x1f, 0x8b, 8];

/// A sequence of gzip members.
pub(super) struct Members {
    inflater: Inflater,
    /// Output of the member under way; `None` before a member, or at the end of the blob.
    produced: Option<u64>,
}

impl Members {
    pub(super) fn new() -> Result<Self, BuildError> {
        Ok(Self { inflater: Inflater::gzip().map_err(failed)?, produced: None })
    }
}

impl<R: Read> TarStream<'_, R> {
    /// Makes more output; 0 at the end of the tar.
    pub(super) fn fill_gzip(&mut self) -> Result<usize, BuildError> {
        loop {
            if self.input_at == self.input_end && !self.blob_ended {
                self.refill()?;
            }
            let Codec::Gzip(members) = &mut self.codec else { return Ok(0) };
            if members.produced.is_none() {
                if self.input_at == self.input_end {
                    return Ok(0);
                }
                self.start_member()?;
            }
            let produced = self.inflate()?;
            if produced > 0 {
                return Ok(produced);
            }
        }
    }

    /// One step of the decompressor; says how much it gave.
    fn inflate(&mut self) -> Result<usize, BuildError> {
        // Stopping at every block costs time, so it is done only where a checkpoint is due. "Due" begins one byte early:
        // a boundary right at SPAN_SIZE must not be passed unseen, or the result would depend on the size of reads.
        let before_due = (self.span_start + SPAN_SIZE - 1).saturating_sub(self.tar_made);
        let room = self.output.len() - self.output_end;
        let (room, stop) = match usize::try_from(before_due) {
            Ok(0) => (room, Stop::BlockBoundary),
            Ok(before_due) => (room.min(before_due), Stop::Never),
            Err(_) => (room, Stop::Never),
        };
        let Codec::Gzip(members) = &mut self.codec else { return Ok(0) };
        let input = &self.input[self.input_at..self.input_end];
        let starved = input.is_empty() && !self.blob_ended;
        let output = &mut self.output[self.output_end..self.output_end + room];
        let progress = members.inflater.step(input, output, stop).map_err(failed)?;
        let member = members.produced.unwrap_or(0) + progress.produced as u64;
        members.produced = if progress.stream_end { None } else { Some(member) };
        self.input_at += progress.consumed;
        self.tar_hash.update(&output[..progress.produced]);
        self.made(progress.produced)?;
        if progress.at_block_boundary && self.checkpoint_due() {
            self.checkpoint_in_member(member, &progress);
        }
        let idle = progress.consumed == 0 && progress.produced == 0;
        if idle && !progress.stream_end && !progress.at_block_boundary && !starved {
            return Err(BuildError::invalid("gzip stream ends in the middle"));
        }
        Ok(progress.produced)
    }

    /// A checkpoint between two blocks of a member that has given `member` bytes.
    fn checkpoint_in_member(&mut self, member: u64, progress: &Progress) {
        let window = usize::try_from(member).map_or(WINDOW_SIZE, |made| made.min(WINDOW_SIZE));
        let blob_off = self.blob_at() - u64::from(progress.bits).div_ceil(8);
        let window = self.output[self.output_end - window..self.output_end].to_vec();
        let mut record = record(blob_off, self.tar_made, progress.bits % 8, START_DEFLATE);
        // A window is at most 32 KiB.
        record.window_len = u32::try_from(window.len()).unwrap_or(0).into();
        if !window.is_empty() {
            record.window_digest = short_digest(&window);
        }
        self.set_pending(record, window);
    }

    fn start_member(&mut self) -> Result<(), BuildError> {
        // The magic may be split between reads.
        while self.input_end - self.input_at < MAGIC.len() && !self.blob_ended {
            self.input.copy_within(self.input_at..self.input_end, 0);
            self.input_end -= self.input_at;
            self.input_at = 0;
            self.refill()?;
        }
        if !self.input[self.input_at..self.input_end].starts_with(&MAGIC) {
            let offset = self.blob_at();
            return Err(if offset == 0 {
                Ineligible::NotCompressed { compression: "gzip" }
            } else {
                Ineligible::TrailingBytes { unit: "gzip member", offset }
            }
            .into());
        }
        let Codec::Gzip(members) = &mut self.codec else { return Ok(()) };
        members.inflater.restart_gzip().map_err(failed)?;
        members.produced = Some(0);
        if self.checkpoint_due() {
            self.set_pending(record(self.blob_at(), self.tar_made, 0, START_MEMBER), Vec::new());
        }
        Ok(())
    }
}

fn failed(error: InflateError) -> BuildError {
    match error {
        InflateError::Memory => BuildError::Read(io::ErrorKind::OutOfMemory.into()),
        InflateError::Corrupt | InflateError::Checkpoint | InflateError::Broken => {
            BuildError::Invalid { what: format!("gzip: {error}") }
        }
    }
}
