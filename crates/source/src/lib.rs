#![doc = include_str!("../README.md")]

pub mod error;
pub mod names;
pub mod retry;
pub mod traits;

pub use error::{ErrorKind, Retry, SourceError};
pub use retry::{Jitter, RetryOptions, RetryingBlobSource};
pub use traits::{
    BlobSource, ByteStream, ContentSource, Fetched, ImageSource, Priority, ProfileSource, ServedProfile, Skeleton,
    WindowSource,
};
