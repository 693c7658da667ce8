#![doc = include_str!("../README.md")]
#![cfg_attr(test, allow(clippy::duplicate_mod, reason = "`schedules` has the same files with other locks"))]

mod around;
mod attached;
mod background;
mod counters;
mod deliver;
mod edges;
mod ensure;
mod extract;
mod fetcher;
mod flight;
mod gate;
mod hedge;
mod hydrate;
mod landing;
mod lanes;
mod lru;
mod options;
mod pace;
mod part;
pub mod parts;
pub mod plan;
pub mod queue;
mod rebuild;
mod replay;
#[cfg(test)]
mod schedules;
mod share;
mod skeleton;
mod sync;
mod windows;

pub use attached::ImageSources;
pub use counters::{Counters, Queues};
pub use fetcher::{FetchEvents, Fetcher};
pub use hydrate::{HydrationState, Progress};
pub use options::{FetchOptions, Jitter, RandomJitter};
pub use replay::{AskedProfile, ChooseSink, PageSink};
