#![doc = include_str!("../README.md")]

pub mod amount;
pub mod arguments;
pub mod error;
pub mod log;
pub mod metrics;
pub mod node;
pub mod reference;
mod schema;
pub mod server;

pub use error::SettingsError;
pub use log::{LogFormat, LogSettings};
pub use metrics::MetricsSettings;
pub use schema::{Schema, parse, read};
