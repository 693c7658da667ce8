#![doc = include_str!("../README.md")]

mod admission;
pub mod below;
pub mod catalog;
pub mod content;
pub mod content_store;
pub mod control;
pub mod counted;
pub mod embedded;
pub mod garbage;
pub mod images;
pub mod index;
pub mod labels;
pub mod lookup;
pub mod make_local;
pub mod metrics;
pub mod origin;
pub mod page;
#[cfg(test)]
mod schedules;
pub mod server_client;
pub mod supervisor;
mod sync;
pub mod views;
pub mod worker;
