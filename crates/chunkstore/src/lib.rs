#![doc = include_str!("../README.md")]
#![cfg_attr(test, allow(clippy::duplicate_mod, reason = "`schedules` has the same files with other locks"))]

mod check;
mod content_keys;
mod durable;
mod error;
mod index;
mod layer;
mod presence;
#[cfg(test)]
mod presence_tests;
#[cfg(test)]
mod schedules;
mod share;
mod space;
mod store;
mod sync;
mod views;

pub use check::WrongContent;
pub use durable::{Faults, NoFaults, Step};
pub use error::StoreError;
pub use index::{LayerState, MAX_NUMBER, ViewKey, ViewSlot};
pub use layer::Layer;
pub use share::Shares;
pub use space::{Claim, Refusal, Space};
pub use store::{Store, StoreOptions};
pub use views::ViewBytes;
