#![doc = include_str!("../README.md")]

mod access;
mod answer;
mod blob;
mod bounded;
mod content;
mod convert;
mod describe;
mod error;
mod import;
mod layer;
mod limits;
pub mod listen;
mod metrics;
mod outline;
mod service;
mod shrink;
mod skeleton;
pub mod store;
pub mod windows;

pub use access::AccessOptions;
pub use content::ContentOptions;
pub use error::ServeError;
pub use import::ImportOptions;
pub use limits::LimitOptions;
pub use listen::{ListenError, ListenOptions, Listener, TlsFiles};
pub use metrics::ServerMetrics;
pub use outline::Outline;
pub use service::{ImagesService, ImportStream, ServiceOptions};
pub use shrink::Shrunk;
pub use store::{Store, StoreError};
