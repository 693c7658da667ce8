//! `[metrics]`, the same for both daemons.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// `[metrics]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct MetricsSettings {
    /// Address and port of `/metrics`, `/healthz` and `/readyz`, plain HTTP; absent: not shown.
    pub listen: Option<SocketAddr>,
}
