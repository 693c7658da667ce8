//! What can be set, and the limits of every call.

use std::path::PathBuf;
use std::time::Duration;

/// Settings of a [`crate::Containerd`].
#[derive(Debug, Clone)]
pub struct ContainerdOptions {
    /// Its unix socket.
    pub address: PathBuf,
    /// Time for a question that needs no long work, connecting included.
    pub call_limit: Duration,
    /// Time without a message of a stream.
    pub idle_limit: Duration,
    /// Time for unpacking one layer.
    pub apply_limit: Duration,
    /// The largest message that is taken, in bytes. containerd's own limit is 16 MiB.
    pub max_message: usize,
}

impl ContainerdOptions {
    /// The usual limits.
    #[must_use]
    pub fn new(address: impl Into<PathBuf>) -> Self {
        Self {
            address: address.into(),
            call_limit: Duration::from_secs(10),
            idle_limit: Duration::from_secs(30),
            apply_limit: Duration::from_secs(3600),
            max_message: 16 << 20,
        }
    }
}
