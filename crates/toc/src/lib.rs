#![doc = include_str!("../README.md")]

pub mod build;
pub mod format;
mod frames;
pub mod pack;
pub mod range;
pub mod read;
mod skeleton;
pub mod span;
pub mod tar;

pub use build::{
    Bound, Budget, BuildError, BuildOptions, BuildSink, Built, ClosedSpans, Compression, Ineligible, build,
};
pub use format::{CHUNK_SIZE, DATA_ALIGN, FormatError};
pub use frames::FrameError;
pub use pack::{pack, unpack};
pub use range::{BlobRange, DataRange, FileRange, TarRange};
pub use read::{Chunk, Span, Toc};
pub use skeleton::Reassembled;
pub use span::{Edge, SpanError, SpanExtractor};
