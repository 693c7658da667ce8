#![doc = include_str!("../README.md")]
// prost and tonic decide how the generated code looks; its comments are those of the proto files.
#![allow(missing_docs, unreachable_pub, clippy::all, clippy::cast_possible_truncation)]

mod redact;

include!(concat!(env!("OUT_DIR"), "/wire.rs"));

/// Client of a part of Kubernetes' container runtime interface.
#[cfg(feature = "cri")]
pub mod cri {
    include!(concat!(env!("OUT_DIR"), "/cri.rs"));
}
