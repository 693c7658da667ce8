#![doc = include_str!("../README.md")]

pub mod adapter;
pub mod errno;
pub mod session;

pub use adapter::{Adapter, Content, ContentError};
pub use session::{Connection, Invalidator, Session};
