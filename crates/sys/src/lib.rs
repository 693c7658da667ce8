#![doc = include_str!("../README.md")]

pub mod fuse_device;
pub mod heap;
pub mod lent;
pub mod map;
pub mod process;
pub mod shared;
pub mod signals;
