//! The service over a unix socket, with real mounts: what containerd's own suite for snapshotters checks, the remote
//! contract, and what a crash leaves behind.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod contract;
mod harness;
mod model;
mod recovery;
mod remote;
mod suite;
