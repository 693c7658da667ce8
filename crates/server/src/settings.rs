//! The settings of `millstream-server`: one TOML file, every key documented here and in `config/millstream-server.toml`.
//! Unknown keys are refused.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use millstream_registry::RegistryOptions;
use millstream_server::{
    AccessOptions, ContentOptions, ImportOptions, LimitOptions, ListenOptions, ServiceOptions, TlsFiles,
};
use serde::{Deserialize, Deserializer, de};

/// Everything that can be set.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Settings {
    /// Address and port. Without `[tls]` only a loopback address is accepted.
    pub(crate) listen: SocketAddr,
    /// Where all state is: a directory, or a URL (only `file://` so far).
    pub(crate) store: String,
    /// Certificate and key; absent: plaintext.
    pub(crate) tls: Option<TlsSettings>,
    /// Which registries, and how they are reached.
    pub(crate) registry: RegistrySettings,
    /// How long registries' answers count.
    pub(crate) access: AccessSettings,
    /// Bounds of concurrent requests.
    pub(crate) limits: LimitSettings,
    /// Imports.
    pub(crate) import: ImportSettings,
    /// Memory for what was read lately.
    pub(crate) cache: CacheSettings,
    /// What is logged.
    pub(crate) log: LogSettings,
}

/// `[tls]`: PEM files.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TlsSettings {
    /// The server's certificate and its chain.
    pub(crate) cert: PathBuf,
    /// The certificate's private key.
    pub(crate) key: PathBuf,
    /// Authority whose certificates clients must show; absent: clients need none.
    #[serde(default)]
    pub(crate) client_ca: Option<PathBuf>,
}

/// `[registry]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RegistrySettings {
    /// Directory of `HOST/hosts.toml` files as containerd has it: mirrors, certificates, plain HTTP. Absent: every registry
    /// at its own address.
    pub(crate) hosts_dir: Option<PathBuf>,
    /// Registries that callers may name, such as `"docker.io"`; empty: any that this machine reaches.
    pub(crate) allowed: Vec<String>,
}

/// `[access]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct AccessSettings {
    /// How long an allowed caller need not be checked again.
    #[serde(deserialize_with = "duration")]
    pub(crate) remember_allowed: Duration,
    /// How long a refused caller is refused without asking the registry.
    #[serde(deserialize_with = "duration")]
    pub(crate) remember_refused: Duration,
    /// How many answers are remembered, at least 1.
    pub(crate) max_answers: u64,
}

/// `[limits]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct LimitSettings {
    /// Requests at a time, 1 to 400; more are refused.
    pub(crate) requests: usize,
    /// The same, from one address.
    pub(crate) requests_per_peer: usize,
}

/// `[import]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ImportSettings {
    /// Whether the first question for an image starts its import.
    pub(crate) on_demand: bool,
    /// Images at a time; more are refused.
    pub(crate) images: usize,
    /// Layers that are decompressed at a time; 0: one for each processor.
    pub(crate) builders: usize,
    /// Longest time of one import.
    #[serde(deserialize_with = "duration")]
    pub(crate) deadline: Duration,
    /// Directory for files that live as long as one layer's import.
    pub(crate) scratch: PathBuf,
}

/// `[cache]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct CacheSettings {
    /// Bytes of memory for TOCs.
    #[serde(deserialize_with = "size")]
    pub(crate) tocs: u64,
    /// Bytes of memory for verified file content.
    #[serde(deserialize_with = "size")]
    pub(crate) chunks: u64,
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct LogSettings {
    /// A `tracing` filter: `"info"`, `"debug"`, `"info,millstream_server=debug"`.
    pub(crate) level: String,
    /// `"text"` or `"json"`.
    pub(crate) format: LogFormat,
}

/// Shape of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
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
            cache: CacheSettings::default(),
            log: LogSettings::default(),
        }
    }
}

impl Default for AccessSettings {
    fn default() -> Self {
        let AccessOptions { remember_allowed, remember_refused, max_answers } = AccessOptions::default();
        Self { remember_allowed, remember_refused, max_answers }
    }
}

impl Default for LimitSettings {
    fn default() -> Self {
        let LimitOptions { requests, requests_per_peer } = LimitOptions::default();
        Self { requests, requests_per_peer }
    }
}

impl Default for ImportSettings {
    fn default() -> Self {
        let ImportOptions { images, deadline, .. } = ImportOptions::default();
        Self { on_demand: false, images, builders: 0, deadline, scratch: "/var/tmp".into() }
    }
}

impl Default for CacheSettings {
    fn default() -> Self {
        let ContentOptions { toc_cache, chunk_cache, .. } = ContentOptions::default();
        Self { tocs: toc_cache, chunks: chunk_cache }
    }
}

impl Default for LogSettings {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::Text }
    }
}

/// Every request may hold a thread of the runtime's pool of 512 for blocking work; imports need some, too.
const MAX_REQUESTS: usize = 400;
/// Each image that is imported holds up to this many layers' blocking threads.
const MAX_IMPORTS: usize = 16;
/// Connections to one registry beside those of imports.
const CONNECTIONS_BESIDE_IMPORTS: usize = 32;
/// What a person revokes must stop working soon.
const MAX_REMEMBER: Duration = Duration::from_secs(600);

impl Settings {
    /// Reads and checks a file.
    ///
    /// # Errors
    ///
    /// When it cannot be read, is not TOML, has an unknown key or a value that cannot work; the text says what to do.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading settings {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("in settings {}", path.display()))
    }

    /// Parses and checks the text of a settings file.
    ///
    /// # Errors
    ///
    /// As [`Settings::read`].
    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let settings: Self = toml::from_str(text)?;
        settings.check()?;
        Ok(settings)
    }

    fn check(&self) -> anyhow::Result<()> {
        self.listen_options().check()?;
        let LimitSettings { requests, requests_per_peer } = self.limits;
        if !(1..=MAX_REQUESTS).contains(&requests) || !(1..=requests).contains(&requests_per_peer) {
            bail!("limits: set requests to 1 to {MAX_REQUESTS}, and requests_per_peer to 1 to requests");
        }
        if !(1..=MAX_IMPORTS).contains(&self.import.images) {
            bail!("import.images is {}: set 1 to {MAX_IMPORTS}", self.import.images);
        }
        if self.import.deadline.is_zero() {
            bail!("import.deadline is zero: no import could finish");
        }
        let AccessSettings { remember_allowed, remember_refused, max_answers } = self.access;
        if remember_allowed.max(remember_refused) > MAX_REMEMBER || max_answers == 0 {
            bail!("access: the registry decides who may read; remember its answers for 10m at most, and at least one");
        }
        Ok(())
    }

    /// Where and how to listen.
    pub(crate) fn listen_options(&self) -> ListenOptions {
        let tls = self.tls.clone().map(|TlsSettings { cert, key, client_ca }| TlsFiles { cert, key, client_ca });
        ListenOptions { address: self.listen, tls }
    }

    /// How registries are reached.
    pub(crate) fn registry_options(&self) -> RegistryOptions {
        // A transfer for an import holds its connection for as long as a builder needs: callers' questions must not wait for it.
        let max_connections_per_host =
            self.service_options().import.builders.saturating_add(CONNECTIONS_BESIDE_IMPORTS);
        let hosts_dir = self.registry.hosts_dir.clone();
        RegistryOptions { hosts_dir, max_connections_per_host, ..RegistryOptions::default() }
    }

    /// What the service may use.
    pub(crate) fn service_options(&self) -> ServiceOptions {
        let AccessSettings { remember_allowed, remember_refused, max_answers } = self.access;
        let LimitSettings { requests, requests_per_peer } = self.limits;
        let mut import = ImportOptions {
            images: self.import.images,
            deadline: self.import.deadline,
            scratch: self.import.scratch.clone(),
            ..ImportOptions::default()
        };
        if self.import.builders > 0 {
            import.builders = self.import.builders;
        }
        ServiceOptions {
            access: AccessOptions { remember_allowed, remember_refused, max_answers },
            limits: LimitOptions { requests, requests_per_peer },
            import,
            content: ContentOptions {
                toc_cache: self.cache.tocs,
                chunk_cache: self.cache.chunks,
                ..ContentOptions::default()
            },
            import_on_demand: self.import.on_demand,
            allowed_registries: self.registry.allowed.clone(),
            embedded: false,
        }
    }
}

/// `"90s"`, `"2m"`, `"1h 30m"`.
fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    let refuse = |error| de::Error::custom(format!("{text:?} is not a duration such as \"30s\": {error}"));
    humantime::parse_duration(&text).map_err(refuse)
}

/// `"64MiB"`: a whole number with the unit B, KiB, MiB or GiB.
fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_size(&text).ok_or_else(|| de::Error::custom(format!("{text:?} is not a size such as \"64MiB\"")))
}

fn parse_size(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim_start() {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sample_shows_the_defaults() {
        let sample = include_str!("../../../config/millstream-server.toml");
        assert_eq!(Settings::parse(sample).unwrap(), Settings::default());
        // What is commented out is right, too.
        let all: String = sample
            .lines()
            .map(|line| {
                line.strip_prefix("# ").filter(|rest| rest.starts_with('[') || rest.contains(" = ")).unwrap_or(line)
            })
            .flat_map(|line| [line, "\n"])
            .collect();
        let all = Settings::parse(&all).unwrap();
        assert!(all.tls.is_some_and(|tls| tls.client_ca.is_some()));
        assert!(all.registry.hosts_dir.is_some());
    }

    #[test]
    fn what_cannot_work_is_refused() {
        for (text, expected) in [
            ("listenn = \"127.0.0.1:1\"", "listenn"),
            ("[limits]\nrequest = 1", "request"),
            ("[tls]\ncert = \"a\"", "key"),
            ("listen = \"0.0.0.0:7900\"", "hint: set tls.cert and tls.key"),
            ("[limits]\nrequests = 0", "limits"),
            ("[limits]\nrequests = 4\nrequests_per_peer = 5", "limits"),
            ("[import]\nimages = 0", "import.images"),
            ("[import]\ndeadline = \"10\"", "duration"),
            ("[access]\nremember_allowed = \"1d\"", "access"),
            ("[cache]\ntocs = \"64MB\"", "size"),
            ("[cache]\nchunks = \"99999999999GiB\"", "size"),
        ] {
            let error = format!("{:#}", Settings::parse(text).unwrap_err());
            assert!(error.contains(expected), "{text}: {error}");
        }
        let fine = "listen = \"0.0.0.0:7900\"\n[tls]\ncert = \"a\"\nkey = \"b\"";
        assert!(Settings::parse(fine).is_ok());
    }

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("0B", Some(0)), ("3 KiB", Some(3072)), ("2GiB", Some(2 << 30)), ("5", None), ("MiB", None)]
        {
            assert_eq!(parse_size(text), bytes, "{text}");
        }
    }
}
