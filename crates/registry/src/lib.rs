#![doc = include_str!("../README.md")]

mod auth;
mod credential;
mod docker_config;
mod egress;
mod endpoint;
mod failure;
#[cfg(fuzzing)]
pub mod fuzzing;
mod hosts;
mod inward;
mod options;
mod repository;
mod rest;
mod transport;

pub use credential::{Credential, Secret};
pub use docker_config::docker_config_credential;
pub use egress::Egress;
pub use hosts::registries_at;
pub use millstream_oci::TagOrDigest;
pub use millstream_source::Fetched;
pub use options::RegistryOptions;
pub use repository::{Registry, Repository};
