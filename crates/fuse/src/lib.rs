#![doc = include_str!("../README.md")]

pub mod adapter;
pub mod errno;
pub mod journal;
mod orphans;
mod replay;
pub mod session;
pub mod taken;

pub use adapter::{Adapter, Content, ContentError};
pub use journal::{Journal, Operation};
pub use session::{Connection, Invalidator, Session};
