#![doc = include_str!("../README.md")]

use std::ffi::{c_int, c_uint};

use libz_rs_sys as z;

/// Most bytes of earlier output that deflate can refer to, hence the size of a full window.
pub const WINDOW_SIZE: usize = 32 * 1024;

const RAW_WINDOW_BITS: c_int = -15;
const GZIP_WINDOW_BITS: c_int = 15 + 16;

/// Bit of `z_stream::data_type`: the block that was read last is the last of its stream.
const LAST_BLOCK: c_int = 64;
/// Bit of `z_stream::data_type`: the stream stands between two blocks (or before the first).
const AT_BOUNDARY: c_int = 128;
/// Bits of `z_stream::data_type` that count input bits taken but not yet used.
const UNUSED_BITS: c_int = 63;

/// Why a stream cannot be read on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InflateError {
    /// The compressed bytes are not valid, or a gzip checksum or length does not fit.
    #[error("compressed data is not valid")]
    Corrupt,
    /// There was no memory for the decompressor.
    #[error("no memory for a decompressor")]
    Memory,
    /// A checkpoint has more than 7 bits or a window of more than [`WINDOW_SIZE`] bytes.
    #[error("checkpoint is not valid")]
    Checkpoint,
    /// The decompressor is in a state that it should not reach; the stream was used after an error.
    #[error("decompressor cannot be used any more")]
    Broken,
}

/// Where [`Inflater::step`] stops, apart from the end of a buffer and of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Nowhere else.
    Never,
    /// After each deflate block.
    BlockBoundary,
}

/// What one [`Inflater::step`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of input taken.
    pub consumed: usize,
    /// Bytes of output written.
    pub produced: usize,
    /// The stream stands right before a deflate block, so that a checkpoint can be made here. Only with
    /// [`Stop::BlockBoundary`]; never after the last block of a stream.
    pub at_block_boundary: bool,
    /// At a boundary: how many of the input bits taken so far belong to the next block (0 to 63). They are the upper bits
    /// of the bytes taken last: the next block starts `bits.div_ceil(8)` bytes before the position reached, and of its
    /// first byte `bits % 8` bits (8 if that is 0 and `bits` is not) belong to it. Zero elsewhere.
    pub bits: u8,
    /// The stream is complete; in gzip mode its checksum and length were right. The input after `consumed` is not part of it.
    pub stream_end: bool,
}

/// A decompressor of one stream.
pub struct Inflater {
    // On the heap, so that its address stays as the C interface expects it.
    stream: Box<z::z_stream>,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    Ended,
    Failed,
}

// SAFETY: the raw pointers of the stream lead to its own allocations only, which no thread shares: buffer pointers of the
// caller are cleared at the end of every step, and no method gives out a pointer.
#[expect(unsafe_code, reason = "see above")]
unsafe impl Send for Inflater {}

impl std::fmt::Debug for Inflater {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inflater").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Inflater {
    /// Starts before the header of a gzip member; header and trailer are checked.
    ///
    /// # Errors
    /// [`InflateError::Memory`].
    pub fn gzip() -> Result<Self, InflateError> {
        Self::with_window_bits(GZIP_WINDOW_BITS)
    }

    /// Goes on in the middle of a deflate stream, at a block boundary. `bits` (0 to 7) is how many upper bits of the byte
    /// `first` belong to the next block; with 0 bits `first` is ignored. `window` is the output right before the
    /// boundary: [`WINDOW_SIZE`] bytes, or all there was if that is less. No gzip trailer is expected at the end.
    ///
    /// # Errors
    /// [`InflateError::Checkpoint`] if an argument is out of range; [`InflateError::Memory`].
    #[expect(unsafe_code, reason = "C interface")]
    pub fn resume(bits: u8, first: u8, window: &[u8]) -> Result<Self, InflateError> {
        let length = c_uint::try_from(window.len()).map_err(|_| InflateError::Checkpoint)?;
        if bits > 7 || window.len() > WINDOW_SIZE {
            return Err(InflateError::Checkpoint);
        }
        let mut inflater = Self::with_window_bits(RAW_WINDOW_BITS)?;
        if bits > 0 {
            let value = c_int::from(first >> (8 - bits));
            // SAFETY: the stream was initialised by `with_window_bits`.
            check(unsafe { z::inflatePrime(&raw mut *inflater.stream, c_int::from(bits), value) })?;
        }
        if length > 0 {
            // SAFETY: the stream is initialised, and `window` is valid for `length` bytes; zlib copies them.
            check(unsafe { z::inflateSetDictionary(&raw mut *inflater.stream, window.as_ptr(), length) })?;
        }
        Ok(inflater)
    }

    /// Makes this a new [`Inflater::gzip`], whatever it was before, without allocating again.
    ///
    /// # Errors
    /// [`InflateError::Broken`] if the library refuses.
    #[expect(unsafe_code, reason = "C interface")]
    pub fn restart_gzip(&mut self) -> Result<(), InflateError> {
        // SAFETY: the stream was initialised by `with_window_bits`.
        check(unsafe { z::inflateReset2(&raw mut *self.stream, GZIP_WINDOW_BITS) })?;
        self.state = State::Running;
        Ok(())
    }

    #[expect(unsafe_code, reason = "C interface")]
    fn with_window_bits(window_bits: c_int) -> Result<Self, InflateError> {
        let mut stream = Box::new(z::z_stream::default());
        let size = c_int::try_from(size_of::<z::z_stream>()).map_err(|_| InflateError::Broken)?;
        // SAFETY: the stream is valid, and its default asks for the library's own allocator.
        check(unsafe { z::inflateInit2_(&raw mut *stream, window_bits, z::zlibVersion(), size) })?;
        Ok(Self { stream, state: State::Running })
    }

    /// Decompresses from `input` to `output` until one of them is used up, the stream ends, or `stop` says so. A step
    /// that can do nothing (no input, no room) reports zeros, which is not an error; after the end of the stream every
    /// step reports `stream_end` and takes nothing.
    ///
    /// # Errors
    /// [`InflateError::Corrupt`] if the data is not valid; what was written to `output` is then undefined, and every
    /// further step fails with [`InflateError::Broken`].
    #[expect(unsafe_code, reason = "C interface")]
    pub fn step(&mut self, input: &[u8], output: &mut [u8], stop: Stop) -> Result<Progress, InflateError> {
        match self.state {
            State::Running => {}
            State::Failed => return Err(InflateError::Broken),
            State::Ended => {
                return Ok(Progress { consumed: 0, produced: 0, at_block_boundary: false, bits: 0, stream_end: true });
            }
        }
        // More than 4 GiB in one step: the rest is left to the next one.
        let avail_in = c_uint::try_from(input.len()).unwrap_or(c_uint::MAX);
        let avail_out = c_uint::try_from(output.len()).unwrap_or(c_uint::MAX);
        let flush = match stop {
            Stop::Never => z::Z_NO_FLUSH,
            Stop::BlockBoundary => z::Z_BLOCK,
        };
        let stream = &mut *self.stream;
        stream.next_in = input.as_ptr();
        stream.avail_in = avail_in;
        stream.next_out = output.as_mut_ptr();
        stream.avail_out = avail_out;
        // SAFETY: the stream is initialised; both buffers are valid for the lengths given, and borrowed until the end of
        // this call.
        let code = unsafe { z::inflate(&raw mut *stream, flush) };
        let consumed = (avail_in - stream.avail_in) as usize;
        let produced = (avail_out - stream.avail_out) as usize;
        stream.next_in = std::ptr::null();
        stream.avail_in = 0;
        stream.next_out = std::ptr::null_mut();
        stream.avail_out = 0;
        let stream_end = code == z::Z_STREAM_END;
        let type_of_stop = stream.data_type;
        if stream_end {
            self.state = State::Ended;
        } else if code != z::Z_BUF_ERROR
            && let Err(error) = check(code)
        {
            self.state = State::Failed;
            return Err(error);
        }
        let at_block_boundary = stop == Stop::BlockBoundary
            && !stream_end
            && code == z::Z_OK
            && type_of_stop & AT_BOUNDARY != 0
            && type_of_stop & LAST_BLOCK == 0;
        let bits = if at_block_boundary { u8::try_from(type_of_stop & UNUSED_BITS).unwrap_or(0) } else { 0 };
        Ok(Progress { consumed, produced, at_block_boundary, bits, stream_end })
    }
}

impl Drop for Inflater {
    #[expect(unsafe_code, reason = "C interface")]
    fn drop(&mut self) {
        // SAFETY: the stream was initialised by `with_window_bits` and is not used afterwards. The result says only
        // whether the stream was valid.
        let _ = unsafe { z::inflateEnd(&raw mut *self.stream) };
    }
}

fn check(code: c_int) -> Result<(), InflateError> {
    match code {
        z::Z_OK => Ok(()),
        z::Z_DATA_ERROR | z::Z_NEED_DICT => Err(InflateError::Corrupt),
        z::Z_MEM_ERROR => Err(InflateError::Memory),
        _ => Err(InflateError::Broken),
    }
}

#[cfg(test)]
mod tests;
