#![doc = include_str!("../README.md")]

pub mod below;
pub mod catalog;
pub mod content;
pub mod content_store;
pub mod control;
pub mod embedded;
pub mod images;
pub mod index;
pub mod labels;
pub mod lookup;
pub mod origin;
pub mod server_client;
pub mod supervisor;
pub mod views;
pub mod worker;
