#![doc = include_str!("../README.md")]

pub mod below;
pub mod catalog;
pub mod content;
pub mod control;
pub mod counted;
pub mod garbage;
pub mod images;
pub mod labels;
pub mod make_local;
pub mod metrics;
pub mod origin;
pub mod page;
pub mod server_client;
pub mod supervisor;
pub mod views;
pub mod worker;
