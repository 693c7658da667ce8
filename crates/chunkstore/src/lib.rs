#![doc = include_str!("../README.md")]

mod check;
mod content_keys;
mod durable;
mod error;
mod index;
mod layer;
mod presence;
mod share;
mod space;
mod store;
mod views;

pub use check::WrongContent;
pub use durable::{Faults, NoFaults, Step};
pub use error::StoreError;
pub use index::{MAX_NUMBER, ViewKey, ViewSlot};
pub use layer::{Layer, LayerState};
pub use share::Shares;
pub use space::{Claim, Refusal, Space};
pub use store::{Store, StoreOptions};
pub use views::ViewBytes;
