#![doc = include_str!("../README.md")]

pub mod carry;
pub mod merge;
pub mod piece;
pub mod proof;
pub mod run;

pub use carry::carry_over;
pub use merge::{Recording, merge};
pub use piece::pieces;
pub use proof::{Mask, ProofError};
pub use run::{PAGE_SIZE, PageRun, Profile, ProfileError, ProfileLayer};

#[cfg(test)]
mod samples;
