#![doc = include_str!("../README.md")]
#![cfg_attr(test, allow(clippy::duplicate_mod, reason = "`schedules` has the same files with other locks"))]

mod admission;
pub mod below;
pub mod catalog;
pub mod check;
pub mod content;
pub mod content_store;
pub mod control;
pub mod counted;
pub mod damage;
pub mod database;
pub mod embedded;
pub mod format;
pub mod garbage;
pub mod images;
pub mod index;
pub mod labels;
pub mod line;
pub mod lookup;
pub mod lost_mounts;
pub mod make_local;
mod memory;
pub mod metrics;
pub mod mount_keeper;
mod oom;
pub mod origin;
mod outside;
pub mod page;
pub mod program;
pub mod quota;
pub mod readahead;
pub mod recorder;
pub mod repair;
#[cfg(test)]
mod schedules;
pub mod server_client;
pub mod service;
pub mod supervisor;
mod sync;
pub mod upgrade;
pub mod views;
pub mod warm;
pub mod worker;
pub mod workers;
