//! A zstd blob as the sequence of frames that it is: decompressed one after the other, their borders seen.
//!
//! Headers are read here, so that what a frame asks for is judged before the decompressor gets a byte of it: a dictionary,
//! which nobody has, or more history than [`MAX_FRAME_WINDOW`]. Checksums and announced sizes are the decompressor's to check.

use zstd::stream::raw::{Decoder, Operation};

use crate::format::MAX_FRAME_WINDOW;

/// First bytes of a frame with content.
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Upper 28 bits of the first four bytes, little endian, of a frame to be skipped.
const SKIPPABLE: u32 = 0x184d_2a50;
/// Longest header: magic, descriptor, window, dictionary, content size.
const MAX_HEADER: usize = 4 + 1 + 1 + 4 + 8;

/// Why a blob cannot be read as zstd.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// What should be a frame begins with other bytes.
    #[error("no zstd frame begins here")]
    Magic,
    /// A dictionary is needed.
    #[error("zstd frame needs dictionary {id}")]
    Dictionary {
        /// Which one.
        id: u32,
    },
    /// The frame asks for more history than [`MAX_FRAME_WINDOW`].
    #[error("zstd frame needs a window of {size} bytes")]
    Window {
        /// Bytes it asks for.
        size: u64,
    },
    /// The compressed bytes are not valid, or a checksum or a size does not fit.
    #[error("zstd data is not valid: {what}")]
    Corrupt {
        /// What the decompressor says.
        what: String,
    },
}

/// What one [`Frames::step`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Bytes of input taken.
    pub(crate) consumed: usize,
    /// Bytes of output written.
    pub(crate) produced: usize,
}

enum State {
    /// In a header, or before one.
    Header,
    /// In a frame to be skipped; so many bytes are left of it.
    Skipped {
        left: u32,
    },
    /// In a frame with content.
    Content,
    Failed,
}

/// Decompresses a sequence of frames. Memory: the history that a frame asks for, touched as far as there is output.
pub(crate) struct Frames {
    decoder: Decoder<'static>,
    state: State,
    header: [u8; MAX_HEADER],
    header_len: usize,
}

impl Frames {
    /// Starts before a frame.
    pub(crate) fn new() -> Result<Self, FrameError> {
        let decoder = Decoder::new().map_err(|error| corrupt(&error))?;
        Ok(Self { decoder, state: State::Header, header: [0; MAX_HEADER], header_len: 0 })
    }

    /// Whether all frames that began have ended: decompression can start here, and the blob may end here.
    pub(crate) const fn between(&self) -> bool {
        matches!(self.state, State::Header) && self.header_len == 0
    }

    /// Whether the bytes after the last frame are too few to be the magic number of another.
    pub(crate) const fn in_magic(&self) -> bool {
        matches!(self.state, State::Header) && self.header_len < MAGIC.len()
    }

    /// Decompresses from `input` to `output` until one of them is used up, or up to the end of a header or frame at the
    /// latest. A step that can do nothing reports zeros.
    ///
    /// # Errors
    /// [`FrameError`]; every further step fails.
    pub(crate) fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Progress, FrameError> {
        match std::mem::replace(&mut self.state, State::Failed) {
            State::Failed => Err(FrameError::Corrupt { what: "used after an error".to_owned() }),
            State::Header => self.read_header(input),
            State::Skipped { left } => {
                let skipped = input.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                // At most `left`.
                let left = left - u32::try_from(skipped).unwrap_or(left);
                self.state = if left == 0 { self.next_frame() } else { State::Skipped { left } };
                Ok(Progress { consumed: skipped, produced: 0 })
            }
            State::Content => {
                let status = self.decoder.run_on_buffers(input, output).map_err(|error| corrupt(&error))?;
                self.state = if status.remaining == 0 { self.next_frame() } else { State::Content };
                Ok(Progress { consumed: status.bytes_read, produced: status.bytes_written })
            }
        }
    }

    const fn next_frame(&mut self) -> State {
        self.header_len = 0;
        State::Header
    }

    /// Takes bytes of the header; when it is whole, judges it.
    fn read_header(&mut self, input: &[u8]) -> Result<Progress, FrameError> {
        let mut consumed = 0;
        loop {
            let needed = header_size(&self.header[..self.header_len])?;
            if self.header_len == needed {
                self.state = self.begin()?;
                break;
            }
            let Some(byte) = input.get(consumed) else {
                self.state = State::Header;
                break;
            };
            self.header[self.header_len] = *byte;
            self.header_len += 1;
            consumed += 1;
        }
        Ok(Progress { consumed, produced: 0 })
    }

    /// What a frame with this header is.
    fn begin(&mut self) -> Result<State, FrameError> {
        let header = &self.header[..self.header_len];
        if !header.starts_with(&MAGIC) {
            let left = u32::try_from(number(&header[4..])).unwrap_or(u32::MAX);
            return Ok(if left == 0 { self.next_frame() } else { State::Skipped { left } });
        }
        let Described { dictionary, window } = described(header);
        if dictionary != 0 {
            return Err(FrameError::Dictionary { id: dictionary });
        }
        if window > MAX_FRAME_WINDOW {
            return Err(FrameError::Window { size: window });
        }
        let status = self.decoder.run_on_buffers(header, &mut []).map_err(|error| corrupt(&error))?;
        if status.bytes_read != header.len() {
            return Err(FrameError::Corrupt { what: "the header is not one".to_owned() });
        }
        Ok(State::Content)
    }
}

/// Bytes of the header that begins with `known`, as far as that is known: more than are known until it is whole.
fn header_size(known: &[u8]) -> Result<usize, FrameError> {
    let Some((magic, rest)) = known.split_at_checked(MAGIC.len()) else { return Ok(MAGIC.len()) };
    if number(magic) & !0xf == u64::from(SKIPPABLE) {
        return Ok(8);
    }
    if magic != MAGIC {
        return Err(FrameError::Magic);
    }
    Ok(rest.first().map_or(5, |descriptor| 5 + fields(*descriptor).iter().sum::<usize>()))
}

/// Bytes of window descriptor, dictionary and content size.
const fn fields(descriptor: u8) -> [usize; 3] {
    let single = descriptor & 0x20 != 0;
    let content = match descriptor >> 6 {
        0 => single as usize,
        1 => 2,
        2 => 4,
        _ => 8,
    };
    [!single as usize, [0, 1, 2, 4][(descriptor & 3) as usize], content]
}

/// What a frame asks for.
struct Described {
    /// 0: none.
    dictionary: u32,
    /// Bytes of history.
    window: u64,
}

/// Reads a whole header of a frame with content.
fn described(header: &[u8]) -> Described {
    let [window_len, dictionary_len, _] = fields(header[4]);
    let (window, rest) = header[5..].split_at(window_len);
    let (dictionary, content) = rest.split_at(dictionary_len);
    let window = match window.first() {
        Some(descriptor) => {
            let base = 1u64 << (10 + (descriptor >> 3));
            base + base / 8 * u64::from(descriptor & 7)
        }
        // The content is the history; in two bytes its size is counted from 256.
        None => number(content).saturating_add(if content.len() == 2 { 256 } else { 0 }),
    };
    Described { dictionary: u32::try_from(number(dictionary)).unwrap_or(u32::MAX), window }
}

/// Up to eight bytes, little endian.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

fn corrupt(error: &std::io::Error) -> FrameError {
    FrameError::Corrupt { what: error.to_string() }
}

#[cfg(test)]
#[path = "frames_tests.rs"]
mod tests;
