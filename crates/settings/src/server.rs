//! The settings of `millstream-server`; the sample is `config/millstream-server.toml`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{LogSettings, MetricsSettings, Schema, SettingsError, amount};

/// Everything that can be set.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Address and port. Without `[tls]` only a loopback address is accepted.
    pub listen: SocketAddr,
    /// Where all state is: a directory, or a URL (only `file://` so far).
    pub store: String,
    /// Certificate and key; absent: plaintext.
    pub tls: Option<TlsSettings>,
    /// Which registries, and how they are reached.
    pub registry: RegistrySettings,
    /// How long registries' answers count.
    pub access: AccessSettings,
    /// Bounds of concurrent requests.
    pub limits: LimitSettings,
    /// Imports.
    pub import: ImportSettings,
    /// Startup profiles.
    pub profile: ProfileSettings,
    /// Memory for what was read lately.
    pub cache: CacheSettings,
    /// What is logged.
    pub log: LogSettings,
    /// Where metrics and probes are shown.
    pub metrics: MetricsSettings,
}

/// `[tls]`: PEM files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TlsSettings {
    /// The server's certificate and its chain.
    pub cert: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// Authority whose certificates clients must show; absent: clients need none.
    #[serde(default)]
    pub client_ca: Option<PathBuf>,
}

/// `[registry]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistrySettings {
    /// Directory of `HOST/hosts.toml` files as containerd has it: mirrors, certificates, plain HTTP. Absent: every registry
    /// at its own address.
    pub hosts_dir: Option<PathBuf>,
    /// Registries that callers may name, such as `"docker.io"`; empty: any that this machine reaches.
    pub allowed: Vec<String>,
    /// Hosts in private networks that may be asked: names or addresses without a port.
    pub private: Vec<String>,
}

/// `[access]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct AccessSettings {
    /// How long an allowed caller need not be checked again; at most 10 min.
    #[serde(with = "amount::duration")]
    pub remember_allowed: Duration,
    /// How long a refused caller is refused without asking the registry; at most 10 min.
    #[serde(with = "amount::duration")]
    pub remember_refused: Duration,
    /// How many answers are remembered, at least 1.
    pub max_answers: u64,
}

/// `[limits]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitSettings {
    /// Requests at a time, 1 to 400; more are refused.
    pub requests: usize,
    /// The same, from one address.
    pub requests_per_peer: usize,
}

/// `[import]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImportSettings {
    /// Whether the first question for an image starts its import.
    pub on_demand: bool,
    /// Images at a time, 1 to 16; more are refused.
    pub images: usize,
    /// Layers that are decompressed at a time; 0: one for each processor.
    pub builders: usize,
    /// Longest time of one import.
    #[serde(with = "amount::duration")]
    pub deadline: Duration,
    /// Directory for files that live as long as one layer's import.
    pub scratch: PathBuf,
    /// Bytes of file content up to which a layer that cannot be entered often enough is kept packed; `"0B"`: never.
    #[serde(with = "amount::size")]
    pub packed_max: u64,
    /// What one layer may cost.
    pub budget: BudgetSettings,
}

/// `[import.budget]`: what one layer may cost. One that costs more is not streamed: nodes pull it as always.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct BudgetSettings {
    /// Files of all kinds, and separately names, counting replaced ones and implied directories; at most 2,000,000, since nodes
    /// take no more.
    pub entries: u64,
    /// Bytes of the tar.
    #[serde(with = "amount::size")]
    pub tar_size: u64,
    /// Bytes of one file, holes included.
    #[serde(with = "amount::size")]
    pub file_size: u64,
    /// Bytes of tar for each byte of blob, beyond the first 64 MiB of tar.
    pub ratio: u64,
    /// Bytes of the table of contents, and of each of its parts while it is made; at most 256 MiB, since nodes take no more.
    #[serde(with = "amount::size")]
    pub toc_size: u64,
}

/// `[profile]`: what starts of an image read, as nodes tell.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProfileSettings {
    /// Bytes of pages of one image's profile, at most 1 GiB; `"0B"`: there are no profiles.
    #[serde(with = "amount::size")]
    pub max: u64,
}

/// `[cache]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheSettings {
    /// Bytes of memory for TOCs.
    #[serde(with = "amount::size")]
    pub tocs: u64,
    /// Bytes of memory for verified file content.
    #[serde(with = "amount::size")]
    pub chunks: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7900)),
            store: "/var/lib/millstream-server".to_owned(),
            tls: None,
            registry: RegistrySettings::default(),
            access: AccessSettings::default(),
            limits: LimitSettings::default(),
            import: ImportSettings::default(),
            profile: ProfileSettings::default(),
            cache: CacheSettings::default(),
            log: LogSettings::default(),
            metrics: MetricsSettings::default(),
        }
    }
}

impl Default for AccessSettings {
    fn default() -> Self {
        Self {
            remember_allowed: Duration::from_secs(120),
            remember_refused: Duration::from_secs(10),
            max_answers: 16_384,
        }
    }
}

impl Default for LimitSettings {
    fn default() -> Self {
        Self { requests: 256, requests_per_peer: 64 }
    }
}

impl Default for ImportSettings {
    fn default() -> Self {
        Self {
            on_demand: false,
            images: 8,
            builders: 0,
            deadline: Duration::from_secs(3600),
            scratch: "/var/tmp".into(),
            packed_max: 16 << 30,
            budget: BudgetSettings::default(),
        }
    }
}

impl Default for BudgetSettings {
    fn default() -> Self {
        Self { entries: MAX_ENTRIES, tar_size: 64 << 30, file_size: 64 << 30, ratio: 200, toc_size: MAX_TOC }
    }
}

impl Default for ProfileSettings {
    fn default() -> Self {
        Self { max: 256 << 20 }
    }
}

impl Default for CacheSettings {
    fn default() -> Self {
        Self { tocs: 128 << 20, chunks: 128 << 20 }
    }
}

/// Every request may hold a thread of the runtime's pool of 512 for blocking work; imports need some, too.
const MAX_REQUESTS: usize = 400;
/// Each image that is imported holds up to this many layers' blocking threads.
const MAX_IMPORTS: usize = 16;
/// What nodes read at most.
const MAX_ENTRIES: u64 = 2_000_000;
/// The same, bytes of a table of contents.
const MAX_TOC: u64 = 256 << 20;
/// What nodes take in at most as one profile.
const MAX_PROFILE: u64 = 1 << 30;
/// What a person revokes must stop working soon.
const MAX_REMEMBER: Duration = Duration::from_secs(600);

impl Schema for Settings {
    const SAMPLE: &'static str = include_str!("../../../config/millstream-server.toml");

    fn complete() -> Self {
        Self { tls: Some(TlsSettings::default()), ..Self::default() }
    }

    fn check(&self) -> Result<(), SettingsError> {
        if self.tls.is_none() && !self.listen.ip().is_loopback() {
            let reason = format!(
                "{} without TLS would let callers' registry credentials cross the network in the clear; hint: set tls.cert \
                 and tls.key, or listen on 127.0.0.1",
                self.listen
            );
            return Err(SettingsError::value("listen", reason));
        }
        let LimitSettings { requests, requests_per_peer } = self.limits;
        if !(1..=MAX_REQUESTS).contains(&requests) {
            let reason = format!("is {requests}: set 1 to {MAX_REQUESTS}");
            return Err(SettingsError::value("limits.requests", reason));
        }
        if !(1..=requests).contains(&requests_per_peer) {
            let reason = format!("is {requests_per_peer}: set 1 to limits.requests, which is {requests}");
            return Err(SettingsError::value("limits.requests_per_peer", reason));
        }
        if !(1..=MAX_IMPORTS).contains(&self.import.images) {
            let reason = format!("is {}: set 1 to {MAX_IMPORTS}", self.import.images);
            return Err(SettingsError::value("import.images", reason));
        }
        if self.import.deadline.is_zero() {
            return Err(SettingsError::value("import.deadline", "is zero: no import could finish"));
        }
        self.import.budget.check()?;
        if self.profile.max > MAX_PROFILE {
            return Err(SettingsError::value("profile.max", "nodes take at most \"1GiB\""));
        }
        let AccessSettings { remember_allowed, remember_refused, max_answers } = self.access;
        for (key, time) in
            [("access.remember_allowed", remember_allowed), ("access.remember_refused", remember_refused)]
        {
            if time > MAX_REMEMBER {
                return Err(SettingsError::value(key, "the registry decides who may read: set at most \"10m\""));
            }
        }
        if max_answers == 0 {
            return Err(SettingsError::value("access.max_answers", "is 0: set at least 1"));
        }
        Ok(())
    }
}

impl BudgetSettings {
    fn check(&self) -> Result<(), SettingsError> {
        for (key, value, most) in [
            ("import.budget.entries", self.entries, MAX_ENTRIES),
            ("import.budget.tar_size", self.tar_size, u64::MAX),
            ("import.budget.file_size", self.file_size, u64::MAX),
            ("import.budget.ratio", self.ratio, u64::MAX),
            ("import.budget.toc_size", self.toc_size, MAX_TOC),
        ] {
            if value == 0 {
                return Err(SettingsError::value(key, "is 0: no layer could be streamed"));
            }
            if value > most {
                return Err(SettingsError::value(key, format!("nodes take at most {most}")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse;

    #[test]
    fn what_cannot_work_is_refused() {
        for (text, expected) in [
            ("listenn = \"127.0.0.1:1\"", "unknown key `listenn` in line 1; did you mean `listen`?"),
            ("[limits]\nrequest = 1", "did you mean `limits.requests`?"),
            ("[tls]\ncert = \"a\"", "key"),
            ("[tls]\ncert = \"a\"\nkey = \"b\"\nclient = \"c\"", "unknown key `tls.client` in line 4"),
            ("listen = \"0.0.0.0:7900\"", "hint: set tls.cert and tls.key"),
            ("[limits]\nrequests = 0", "limits.requests in line 2: is 0: set 1 to 400"),
            ("[limits]\nrequests = 4\nrequests_per_peer = 5", "limits.requests_per_peer in line 3"),
            ("[limits]\nrequests = 4", "limits.requests_per_peer: is 64"),
            ("[import]\nimages = 0", "import.images"),
            ("[import]\ndeadline = \"10\"", "duration"),
            ("[import]\npacked_max = \"16GB\"", "size"),
            ("[import.budget]\nentries = 3000000", "import.budget.entries in line 2: nodes take at most 2000000"),
            ("[import.budget]\nratio = 0", "import.budget.ratio in line 2: is 0"),
            ("[import.budget]\ntar_size = 5", "size"),
            ("[profile]\nmax = \"2GiB\"", "profile.max in line 2: nodes take at most \"1GiB\""),
            ("[access]\nremember_allowed = \"1d\"", "access.remember_allowed"),
            ("[cache]\ntocs = \"64MB\"", "size"),
            ("[cache]\nchunks = \"99999999999GiB\"", "size"),
        ] {
            let error = parse::<Settings>(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let fine = "listen = \"0.0.0.0:7900\"\n[tls]\ncert = \"a\"\nkey = \"b\"";
        assert!(parse::<Settings>(fine).is_ok());
    }
}
