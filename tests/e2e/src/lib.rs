//! Harness of the end-to-end tests, of the demo and of the bench.
#![doc = include_str!("../README.md")]

pub mod answer;
pub mod busy;
pub mod caller;
pub mod containerd;
pub mod course;
pub mod cri;
pub mod daemons;
pub mod deaths;
pub mod debian;
pub mod delay;
pub mod disk;
pub mod gauges;
pub mod image;
pub mod installation;
pub mod layer;
pub mod liar;
pub mod link;
pub mod machine;
pub mod memory;
pub mod names;
pub mod need;
mod pack;
pub mod process;
pub mod readers;
pub mod recipe;
pub mod registry;
pub mod rig;
pub mod scenario;
pub mod spoil;
pub mod stage;
mod sweep;
pub mod tree;
pub mod view;
pub mod watch;
pub mod web;
pub mod workdir;
