#![doc = include_str!("../README.md")]

mod background;
mod disk;
mod error;
pub mod filter;
mod images;
mod metadata;
pub mod mounts;
pub mod outcome;
mod record;
mod releases;
#[cfg(test)]
mod releases_tests;
mod service;
mod snapshots;
mod status;
mod sync;

pub use error::Error;
pub use images::{LazyImages, Parent, PrepareRequest, ViewFailure};
pub use mounts::Mount;
pub use outcome::{ImageDecision, ImageInputs, PrepareOutcome, Reason};
pub use record::{Backing, Info, Kind, Usage};
pub use service::SnapshotService;
pub use snapshots::{Damage, LabelUpdate, Options, Prepared, Snapshots};
