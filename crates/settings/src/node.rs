//! The settings of `millstreamd`; the sample is `config/millstreamd.toml`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{LogSettings, MetricsSettings, Schema, SettingsError, amount};

/// Everything that can be set.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Directory of all state, made with mode 0700. Must not be on overlayfs.
    pub root: PathBuf,
    /// Unix socket for containerd and for the command line, made with mode 0600.
    pub socket: PathBuf,
    /// Longest time that one image-level decision may take while containerd waits: 1 ms to 30 s.
    #[serde(with = "amount::duration")]
    pub decision_deadline: Duration,
    /// Where TOCs come from.
    pub server: ServerSettings,
    /// How registries are reached.
    pub registry: RegistrySettings,
    /// How content is fetched.
    pub fetch: FetchSettings,
    /// How much of the disk the content of lazy layers may take.
    pub store: StoreSettings,
    /// The containerd that this node serves.
    pub containerd: ContainerdSettings,
    /// What is logged.
    pub log: LogSettings,
    /// Where metrics and probes are shown.
    pub metrics: MetricsSettings,
}

/// `[server]`: the remote file system service.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerSettings {
    /// `"https://HOST:PORT"`; `"http://"` only for a loopback address. Empty: the embedded server.
    pub address: String,
    /// PEM file with the certificates that may have signed the server's. Needed for `https`.
    pub ca: Option<PathBuf>,
    /// PEM file with this node's certificate, for servers that ask for one; together with `key`.
    pub cert: Option<PathBuf>,
    /// PEM file with its key.
    pub key: Option<PathBuf>,
    /// Without `address`: whether this node makes TOCs by itself, from what ordinary pulls leave in containerd.
    pub embedded: bool,
    /// Bytes of TOCs and windows that it keeps; beyond that, what was used least recently goes.
    #[serde(with = "amount::size")]
    pub embedded_limit: u64,
    /// How long the embedded server leaves an image alone after it was pulled, before it makes its TOCs: 0 s to 1 h.
    #[serde(with = "amount::duration")]
    pub index_after: Duration,
}

/// `[registry]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistrySettings {
    /// containerd's directory of `HOST/hosts.toml` files: mirrors, certificates, plain HTTP.
    pub hosts_dir: PathBuf,
    /// A docker `config.json` with credentials; absent: anonymous.
    pub docker_config: Option<PathBuf>,
}

/// `[fetch]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct FetchSettings {
    /// Whether images are made wholly local in the background.
    pub hydration: bool,
    /// Whether content that other images on this node hold is taken over instead of being fetched.
    pub sharing: bool,
    /// Whether it is recorded what starts of images read, and brought ahead of the next start.
    pub profiles: bool,
    /// Of so many pulls with a profile, at least 1, the start of one is recorded. With the others the pages that come are read into the
    /// kernel's page cache ahead of the program, which leaves nothing to record.
    pub record_one_in: u32,
    /// Requests to registries and server under way at once, at least 2; one is kept for readers that wait.
    pub connections: usize,
    /// How long a read may wait for its bytes before it fails with EIO.
    #[serde(with = "amount::duration")]
    pub read_deadline: Duration,
}

/// `[store]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreSettings {
    /// Bytes that the content of lazy layers may take; 0: as many as the file system has but for `reserve`.
    #[serde(with = "amount::size")]
    pub quota: u64,
    /// Percent of what content may take: beyond, content is given up, and no layer begins to be made wholly local. 2 to 100.
    pub high_water: u8,
    /// Percent down to which content is given up then; 1 to less than `high_water`.
    pub low_water: u8,
    /// Bytes of the file system that content leaves free; of a small one a tenth at most.
    #[serde(with = "amount::size")]
    pub reserve: u64,
    /// Whether that goes for wholly local layers of containers, too, which then need the network again.
    pub evict_used: bool,
    /// Longest time between writing and syncing content: so much of it is fetched again after a power cut. At least 10 ms.
    #[serde(with = "amount::duration")]
    pub sync_interval: Duration,
}

/// `[containerd]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ContainerdSettings {
    /// Its unix socket: asked which image a client means that does not name it, and for what ordinary pulls have left. Empty:
    /// not asked.
    pub address: PathBuf,
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
            store: StoreSettings::default(),
            containerd: ContainerdSettings::default(),
            log: LogSettings::default(),
            metrics: MetricsSettings::default(),
        }
    }
}

impl Default for RegistrySettings {
    fn default() -> Self {
        Self { hosts_dir: "/etc/containerd/certs.d".into(), docker_config: None }
    }
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            address: String::new(),
            ca: None,
            cert: None,
            key: None,
            embedded: true,
            embedded_limit: 1 << 30,
            index_after: Duration::from_secs(10),
        }
    }
}

impl Default for FetchSettings {
    fn default() -> Self {
        Self {
            hydration: true,
            sharing: true,
            profiles: true,
            record_one_in: 8,
            connections: 8,
            read_deadline: Duration::from_secs(60),
        }
    }
}

impl Default for StoreSettings {
    fn default() -> Self {
        Self {
            quota: 0,
            high_water: 90,
            low_water: 80,
            reserve: 256 << 20,
            evict_used: false,
            sync_interval: Duration::from_secs(5),
        }
    }
}

impl Default for ContainerdSettings {
    fn default() -> Self {
        Self { address: "/run/containerd/containerd.sock".into() }
    }
}

/// containerd holds a lock while a decision is made.
const MAX_DECISION: Duration = Duration::from_secs(30);

impl Schema for Settings {
    const SAMPLE: &'static str = include_str!("../../../config/millstreamd.toml");

    fn complete() -> Self {
        Self::default()
    }

    fn check(&self) -> Result<(), SettingsError> {
        for (key, path) in [("root", &self.root), ("socket", &self.socket)] {
            if !path.is_absolute() {
                return Err(SettingsError::value(key, format!("{path:?} must be an absolute path")));
            }
        }
        let connections = self.fetch.connections;
        if connections < 2 {
            let reason = format!("is {connections}, but one connection is kept for readers: set at least 2");
            return Err(SettingsError::value("fetch.connections", reason));
        }
        if self.fetch.record_one_in == 0 {
            let reason = "is 0: set 1 to have every start recorded, more to have fewer";
            return Err(SettingsError::value("fetch.record_one_in", reason));
        }
        if self.decision_deadline.is_zero() || self.decision_deadline > MAX_DECISION {
            let reason = "must be between \"1ms\" and \"30s\": containerd holds a lock meanwhile";
            return Err(SettingsError::value("decision_deadline", reason));
        }
        self.store.check()?;
        self.server.check()
    }
}

/// An image that is pulled again sooner than it is indexed is never lazy.
const MAX_INDEX_AFTER: Duration = Duration::from_secs(3600);

/// Syncing more often than that would only wear the disk out.
const MIN_SYNC: Duration = Duration::from_millis(10);

impl StoreSettings {
    fn check(&self) -> Result<(), SettingsError> {
        let refuse = |key: &'static str, reason: String| Err(SettingsError::value(key, reason));
        let (high, low) = (self.high_water, self.low_water);
        if high > 100 {
            return refuse("store.high_water", format!("is {high}, but it is a percentage"));
        }
        if low == 0 || low >= high {
            return refuse(
                "store.low_water",
                format!("is {low}: must be at least 1 and below store.high_water ({high})"),
            );
        }
        if self.sync_interval < MIN_SYNC {
            return refuse("store.sync_interval", "must be at least \"10ms\"".to_owned());
        }
        Ok(())
    }
}

impl ServerSettings {
    fn check(&self) -> Result<(), SettingsError> {
        if self.index_after > MAX_INDEX_AFTER {
            return Err(SettingsError::value("server.index_after", "must be at most \"1h\""));
        }
        if self.cert.is_some() != self.key.is_some() {
            let key = if self.cert.is_some() { "server.cert" } else { "server.key" };
            return Err(SettingsError::value(key, "server.cert and server.key belong together: set both or none"));
        }
        let refuse = |reason: String| Err(SettingsError::value("server.address", reason));
        if self.address.starts_with("https://") && self.ca.is_none() {
            return refuse(format!(
                "{:?} needs server.ca: the PEM file of the authority that signed the server's certificate",
                self.address
            ));
        }
        if self.address.is_empty() || self.address.starts_with("https://") {
            return Ok(());
        }
        let Some(rest) = self.address.strip_prefix("http://") else {
            return refuse(format!("{:?} must begin with https:// (or http:// for a loopback address)", self.address));
        };
        let host = rest.rsplit_once(':').map_or(rest, |(host, _)| host).trim_matches(['[', ']']);
        let loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        if !loopback {
            return refuse(format!(
                "{:?} is plain HTTP to another machine: whoever is on the way could change what containers run; hint: give \
                 millstream-server a certificate, use https:// and set server.ca",
                self.address
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse;

    #[test]
    fn what_cannot_work_is_refused_with_a_way_out() {
        for (text, expected) in [
            ("rot = \"/x\"", "unknown key `rot` in line 1; did you mean `root`?"),
            (
                "[fetch]\n\nconections = 1",
                "unknown key `fetch.conections` in line 3; did you mean `fetch.connections`?",
            ),
            ("connections = 1", "did you mean `fetch.connections`?"),
            ("[fetsch]\nhydration = true", "unknown key `fetsch` in line 1; did you mean `fetch`?"),
            ("zebra = 1", "unknown key `zebra` in line 1"),
            ("[log.level]\nx = 1", "line 1, column 1"),
            ("root = ", "line 1, column 8"),
            ("[fetch]\nconnections = 1", "fetch.connections in line 2: is 1, but one connection is kept"),
            ("[fetch]\nrecord_one_in = 0", "fetch.record_one_in in line 2: is 0: set 1"),
            ("decision_deadline = \"2min\"", "containerd holds a lock"),
            ("[server]\nindex_after = \"2h\"", "at most"),
            ("root = \"relative\"", "absolute"),
            ("[server]\naddress = \"http://10.0.0.1:7443\"", "server.ca"),
            ("[server]\naddress = \"server:7443\"", "https://"),
            ("[store]\nhigh_water = 101", "store.high_water in line 2: is 101, but it is a percentage"),
            ("[store]\nhigh_water = 80", "store.low_water: is 80: must be at least 1 and below"),
            ("[store]\nsync_interval = \"0s\"", "at least \"10ms\""),
            ("[server]\naddress = \"https://server:7443\"", "needs server.ca"),
            ("[server]\ncert = \"/c.pem\"", "server.cert in line 2: server.cert and server.key belong together"),
            ("decision_deadline = \"soon\"", "is not a duration such as \"30s\""),
            ("decision_deadline = 5", "line 1, column 21"),
        ] {
            let error = parse::<Settings>(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        for address in ["http://127.0.0.1:7443", "http://[::1]:7443", "http://localhost:1"] {
            parse::<Settings>(&format!("[server]\naddress = {address:?}")).unwrap();
        }
    }

    #[test]
    fn a_name_that_nothing_resembles_gets_no_suggestion() {
        let error = parse::<Settings>("zebra = 1").unwrap_err().to_string();
        assert!(!error.contains("did you mean"), "{error}");
    }
}
