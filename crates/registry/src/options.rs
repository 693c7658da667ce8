//! What can be set about registries, and the limits that cannot.

use std::path::PathBuf;
use std::time::Duration;

use crate::egress::Egress;

/// Settings of a [`crate::Registry`].
#[derive(Debug, Clone)]
pub struct RegistryOptions {
    /// Directory of `HOST/hosts.toml` files (containerd's `config_path`); none: every registry at its own address.
    pub hosts_dir: Option<PathBuf>,
    /// How long a change in `hosts_dir` may go unnoticed.
    pub hosts_recheck: Duration,
    /// Hosts (`host:port`) to leave out wherever `hosts_dir` names them: our own mirror, which would ask us again.
    pub ignored_hosts: Vec<String>,
    /// Time for name, connection and TLS hand-shake together.
    pub connect_timeout: Duration,
    /// Time from sending a request to the head of its answer.
    pub first_byte_timeout: Duration,
    /// Time without a byte of a body; and without a sign of life of a connection, whether it is in use or not.
    pub idle_timeout: Duration,
    /// Time to wait for one of the connections of a host to become free.
    pub queue_timeout: Duration,
    /// Requests and bodies under way at one host (scheme, name and port); at least 1.
    pub max_connections_per_host: usize,
    /// `User-Agent` of every request.
    pub user_agent: String,
    /// Where connections may lead.
    pub egress: Egress,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            hosts_dir: None,
            hosts_recheck: Duration::from_secs(1),
            ignored_hosts: Vec::new(),
            connect_timeout: Duration::from_secs(5),
            first_byte_timeout: Duration::from_secs(15),
            idle_timeout: Duration::from_secs(15),
            queue_timeout: Duration::from_secs(30),
            max_connections_per_host: 8,
            user_agent: concat!("millstream/", env!("CARGO_PKG_VERSION")).to_owned(),
            egress: Egress::Anywhere,
        }
    }
}

/// Redirects that are followed for one request.
pub(crate) const MAX_REDIRECTS: usize = 5;

/// The largest answer of a token server, in bytes.
pub(crate) const MAX_TOKEN_ANSWER: u64 = 1 << 20;

/// The most that is read of the text of a failure, in bytes; also of bodies read only to keep a connection alive.
pub(crate) const MAX_DRAIN: u64 = 64 << 10;

/// Bytes a second that a body which is read as a whole must come with, on average and at its greatest length: pauses below the
/// idle time-out must not add up without end.
pub(crate) const MIN_RATE: u64 = 16 << 10;

/// The longest `Retry-After` that is believed.
pub(crate) const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// Entries of each cache (hosts, clients, tokens, connections) of a registry, and of routes of a repository.
pub(crate) const MAX_CACHED: usize = 1024;
