//! The settings of `millstreamd`: one TOML file, every key documented here and in `config/millstreamd.toml`. Unknown keys are
//! refused.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Deserializer};

/// Everything that can be set.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Directory of all state, made with mode 0700. Must not be on overlayfs.
    pub root: PathBuf,
    /// Unix socket for containerd and for the command line, made with mode 0600.
    pub socket: PathBuf,
    /// Longest time that one image-level decision may take while containerd waits, e.g. `"1s"`.
    #[serde(deserialize_with = "duration")]
    pub decision_deadline: Duration,
    /// Where TOCs come from.
    pub server: ServerSettings,
    /// How registries are reached.
    pub registry: RegistrySettings,
    /// How content is fetched.
    pub fetch: FetchSettings,
    /// The containerd that this node serves.
    pub containerd: ContainerdSettings,
    /// What is logged.
    pub log: LogSettings,
}

/// `[server]`: the remote file system service.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerSettings {
    /// `"https://HOST:PORT"`; `"http://"` only for a loopback address. Empty: no server, every image is pulled as always.
    pub address: String,
    /// PEM file with the certificates that may have signed the server's. Needed for `https`.
    pub ca: Option<PathBuf>,
    /// PEM file with this node's certificate, for servers that ask for one; together with `key`.
    pub cert: Option<PathBuf>,
    /// PEM file with its key.
    pub key: Option<PathBuf>,
    /// Without `address`: whether this node indexes images by itself, from what ordinary pulls leave in containerd.
    pub embedded: bool,
    /// Bytes of the tables that it keeps, beyond which what was used least recently goes.
    pub embedded_limit: u64,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self { address: String::new(), ca: None, cert: None, key: None, embedded: true, embedded_limit: 1 << 30 }
    }
}

/// `[registry]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistrySettings {
    /// containerd's directory of `HOST/hosts.toml` files: mirrors, certificates, plain HTTP.
    pub hosts_dir: PathBuf,
    /// A docker `config.json` with credentials; absent: anonymous.
    pub docker_config: Option<PathBuf>,
}

/// `[fetch]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FetchSettings {
    /// Whether images are made wholly local in the background.
    pub hydration: bool,
    /// Requests to registries and server under way at once, at least 2; one is kept for readers that wait.
    pub connections: usize,
    /// How long a read may wait for its bytes before it fails with EIO.
    #[serde(deserialize_with = "duration")]
    pub read_deadline: Duration,
}

/// `[containerd]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ContainerdSettings {
    /// Its unix socket: asked which image a client means that does not name it. Empty: not asked.
    pub address: PathBuf,
}

/// `[log]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogSettings {
    /// A `tracing` filter: `"info"`, `"debug"`, `"info,millstream_prefetch=debug"`.
    pub level: String,
    /// `"text"` or `"json"`.
    pub format: LogFormat,
}

/// Shape of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            root: "/var/lib/millstream".into(),
            socket: "/run/millstream/millstream.sock".into(),
            decision_deadline: Duration::from_secs(1),
            server: ServerSettings::default(),
            registry: RegistrySettings::default(),
            fetch: FetchSettings::default(),
            containerd: ContainerdSettings::default(),
            log: LogSettings::default(),
        }
    }
}

impl Default for RegistrySettings {
    fn default() -> Self {
        Self { hosts_dir: "/etc/containerd/certs.d".into(), docker_config: None }
    }
}

impl Default for FetchSettings {
    fn default() -> Self {
        Self { hydration: true, connections: 8, read_deadline: Duration::from_secs(60) }
    }
}

impl Default for ContainerdSettings {
    fn default() -> Self {
        Self { address: "/run/containerd/containerd.sock".into() }
    }
}

impl Default for LogSettings {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text }
    }
}

impl Settings {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// When it cannot be read, is not TOML, has an unknown key, or a value that cannot work; the text says what to do.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading settings {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("in settings {}", path.display()))
    }

    /// Parses and checks the text of a settings file.
    ///
    /// # Errors
    /// As [`Settings::read`].
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let settings: Self = toml::from_str(text)?;
        settings.check()?;
        Ok(settings)
    }

    fn check(&self) -> anyhow::Result<()> {
        if !self.root.is_absolute() || !self.socket.is_absolute() {
            bail!("root and socket must be absolute paths");
        }
        if self.fetch.connections < 2 {
            bail!(
                "fetch.connections is {}, but one connection is kept for readers: set at least 2",
                self.fetch.connections
            );
        }
        if self.decision_deadline.is_zero() || self.decision_deadline > Duration::from_secs(30) {
            bail!("decision_deadline must be between \"1ms\" and \"30s\": containerd holds a lock meanwhile");
        }
        self.server.check()
    }
}

impl ServerSettings {
    fn check(&self) -> anyhow::Result<()> {
        if self.cert.is_some() != self.key.is_some() {
            bail!("server.cert and server.key belong together: set both or none");
        }
        if self.address.is_empty() || self.address.starts_with("https://") {
            return Ok(());
        }
        let Some(rest) = self.address.strip_prefix("http://") else {
            bail!("server.address {:?} must begin with https:// (or http:// for a loopback address)", self.address);
        };
        let host = rest.rsplit_once(':').map_or(rest, |(host, _)| host).trim_matches(['[', ']']);
        let loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        if !loopback {
            bail!(
                "server.address {:?} is plain HTTP to another machine: whoever is on the way could change what containers \
                 run; hint: give millstream-server a certificate, use https:// and set server.ca",
                self.address
            );
        }
        Ok(())
    }
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sample_in_config_is_the_default() {
        let text = include_str!("../../../config/millstreamd.toml");
        assert_eq!(format!("{:?}", Settings::parse(text).unwrap()), format!("{:?}", Settings::default()));
    }

    #[test]
    fn what_cannot_work_is_refused_with_a_way_out() {
        for (text, expected) in [
            ("rot = \"/x\"", "unknown field `rot`"),
            ("[fetch]\nconnections = 1", "set at least 2"),
            ("decision_deadline = \"2min\"", "containerd holds a lock"),
            ("root = \"relative\"", "absolute"),
            ("[server]\naddress = \"http://10.0.0.1:7443\"", "server.ca"),
            ("[server]\naddress = \"server:7443\"", "https://"),
            ("[server]\ncert = \"/c.pem\"", "set both or none"),
            ("decision_deadline = \"soon\"", "expected number"),
        ] {
            let error = format!("{:#}", Settings::parse(text).unwrap_err());
            assert!(error.contains(expected), "{text}: {error}");
        }
        for address in ["http://127.0.0.1:7443", "http://[::1]:7443", "http://localhost:1", "https://server:7443"] {
            Settings::parse(&format!("[server]\naddress = {address:?}")).unwrap();
        }
    }
}
