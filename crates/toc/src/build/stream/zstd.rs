//! zstd: a checkpoint before each frame, also before one to be skipped.

use std::io::Read;

use sha2::Digest as _;

use super::{Codec, TarStream, record};
use crate::build::error::{BuildError, Ineligible};
use crate::format::START_FRAME;
use crate::frames::FrameError;

impl<R: Read> TarStream<'_, R> {
    /// Makes more output; 0 at the end of the tar.
    pub(super) fn fill_zstd(&mut self) -> Result<usize, BuildError> {
        loop {
            if self.input_at == self.input_end && !self.blob_ended {
                self.refill()?;
            }
            let ended = self.input_at == self.input_end;
            let (blob_at, due) = (self.blob_at(), self.checkpoint_due());
            let Codec::Zstd(frames) = &mut self.codec else { return Ok(0) };
            if frames.between() {
                if ended {
                    return Ok(0);
                }
                self.frame_at = blob_at;
                if due {
                    self.set_pending(record(blob_at, self.tar_made, 0, START_FRAME), Vec::new());
                }
            }
            let (consumed, produced) = self.unpack_frame()?;
            if produced > 0 {
                return Ok(produced);
            }
            if ended && consumed == 0 {
                return Err(self.cut());
            }
        }
    }

    /// One step of the decompressor; says how much it took and gave.
    fn unpack_frame(&mut self) -> Result<(usize, usize), BuildError> {
        let Codec::Zstd(frames) = &mut self.codec else { return Ok((0, 0)) };
        let input = &self.input[self.input_at..self.input_end];
        let output = &mut self.output[self.output_end..];
        let progress = match frames.step(input, output) {
            Ok(progress) => progress,
            Err(FrameError::Magic) => return Err(self.no_frame()),
            Err(other) => return Err(failed(other)),
        };
        self.input_at += progress.consumed;
        self.tar_hash.update(&output[..progress.produced]);
        self.made(progress.produced)?;
        Ok((progress.consumed, progress.produced))
    }

    /// The blob ended, and not between two frames.
    fn cut(&self) -> BuildError {
        match &self.codec {
            Codec::Zstd(frames) if frames.in_magic() => self.no_frame(),
            _ => BuildError::invalid("zstd frame ends in the middle"),
        }
    }

    /// Something else than a frame is where one should be.
    fn no_frame(&self) -> BuildError {
        let offset = self.frame_at;
        let reason = if offset == 0 {
            Ineligible::NotCompressed { compression: "zstd" }
        } else {
            Ineligible::TrailingBytes { unit: "zstd frame", offset }
        };
        reason.into()
    }
}

pub(super) fn failed(error: FrameError) -> BuildError {
    match error {
        FrameError::Dictionary { .. } | FrameError::Window { .. } => Ineligible::Frame { what: error }.into(),
        FrameError::Magic | FrameError::Corrupt { .. } => BuildError::Invalid { what: error.to_string() },
    }
}
