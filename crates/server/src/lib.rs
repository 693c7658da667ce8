#![doc = include_str!("../README.md")]

mod access;
mod answer;
mod blob;
mod bounded;
mod content;
mod convert;
mod error;
mod import;
mod items;
mod layer;
mod limits;
pub mod listen;
mod metrics;
mod packed;
mod pieces;
mod service;
mod skeleton;
pub mod store;
pub use access::AccessOptions;
pub use content::ContentOptions;
pub use error::ServeError;
pub use import::ImportOptions;
pub use limits::LimitOptions;
pub use listen::{ListenError, ListenOptions, Listener, TlsFiles};
pub use metrics::ServerMetrics;
pub use service::{ImagesService, ServiceOptions};
pub use store::{Store, StoreError};
