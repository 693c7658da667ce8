//! Which hosts to ask for the images of a registry: `hosts.toml`, with the meaning that containerd gives it.
//!
//! Two differences are deliberate. A URL that says `http://` is taken at its word, where containerd tries HTTPS first
//! if TLS settings stand beside it. And a loopback registry on a port other than 443 is asked by plain HTTP only.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use toml::Spanned;

/// Name of the file in a host's directory.
const FILE: &str = "hosts.toml";

/// Directory for registries that have none of their own.
const DEFAULT: &str = "_default";

/// Largest `hosts.toml`, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// One host to ask.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct HostConfig {
    /// Where its API begins (`https://host/v2`), without a slash at the end.
    pub(crate) base: Url,
    /// Whether the registry is asked at a host of another name, which must be told by `?ns=`.
    pub(crate) mirror: bool,
    /// Whether it answers requests by tag.
    pub(crate) resolve: bool,
    /// Whether it gives manifests and blobs.
    pub(crate) pull: bool,
    /// Headers for requests to this host, and to no other.
    pub(crate) headers: HeaderMap,
    pub(crate) tls: TlsConfig,
    /// Time-out for connecting, if its own.
    pub(crate) connect_timeout: Option<Duration>,
    /// Whether somebody wrote down that this host is to be asked, instead of its name being made of the registry's.
    pub(crate) named: bool,
}

/// How to speak TLS with a host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct TlsConfig {
    /// Files of certificates to trust besides the system's.
    pub(crate) ca: Vec<PathBuf>,
    /// Files of client certificates, each with its key's file if that is another.
    pub(crate) client: Vec<(PathBuf, Option<PathBuf>)>,
    pub(crate) skip_verify: bool,
}

/// The hosts of a registry and the files that say so.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Hosts {
    /// In the order to ask them.
    pub(crate) hosts: Vec<HostConfig>,
    /// Files that decided, with their state then: when one changes, the hosts must be read again.
    pub(crate) stamp: Stamp,
}

/// State of files: time of change and size, or `None` for one that is not there.
pub(crate) type Stamp = Vec<(PathBuf, Option<(SystemTime, u64)>)>;

/// State of `paths` now.
pub(crate) fn stamp(paths: impl IntoIterator<Item = PathBuf>) -> Stamp {
    let state = |path: &Path| {
        let meta = std::fs::metadata(path).ok()?;
        Some((meta.modified().ok()?, meta.len()))
    };
    paths.into_iter().map(|path| (path.clone(), state(&path))).collect()
}

/// Reads which hosts to ask for images of `registry`. Does blocking I/O.
///
/// # Errors
///
/// A text for a person when the files cannot be read. A `hosts.toml` that cannot be *understood* is no error: as with
/// containerd, it is logged and the certificate files beside it are used.
pub(crate) fn load(dir: Option<&Path>, registry: &str) -> Result<Hosts, String> {
    let mut watched = Vec::new();
    let mut found = None;
    for candidate in dir.into_iter().flat_map(|dir| directories(dir, registry)) {
        let exists = candidate.is_dir();
        watched.push(candidate.clone());
        watched.push(candidate.join(FILE));
        if exists {
            found = Some(candidate);
            break;
        }
    }
    // Taken before reading: a change in between is then seen as one.
    let mut stamps = stamp(watched);
    let configs = match &found {
        None => vec![RawHost::default().resolve(None, Path::new(""))?],
        Some(found) => read_directory(found)?,
    };
    let mut hosts: Vec<HostConfig> = configs.into_iter().map(|host| host.finish(registry)).collect::<Result<_, _>>()?;
    // A directory of its own names it, too.
    let is_default = |dir: &PathBuf| dir.file_name().is_none_or(|name| name == DEFAULT);
    if found.as_ref().is_some_and(|dir| !is_default(dir)) {
        hosts.iter_mut().for_each(|host| host.named = true);
    }
    let secrets = hosts.iter().flat_map(|host| {
        let client = host.tls.client.iter().flat_map(|(cert, key)| std::iter::once(cert).chain(key));
        host.tls.ca.iter().chain(client).cloned()
    });
    stamps.extend(stamp(secrets.collect::<Vec<_>>()));
    Ok(Hosts { hosts, stamp: stamps })
}

/// Where settings for `registry` may be, best first: `host_port_`, `host:port`, `_default`.
fn directories(root: &Path, registry: &str) -> Vec<PathBuf> {
    let escaped = registry.rsplit_once(':').map(|(host, port)| format!("{host}_{port}_"));
    escaped.iter().map(String::as_str).chain([registry, DEFAULT]).map(|name| root.join(name)).collect()
}

/// Directory entries that are looked at, at most.
const MAX_ENTRIES: usize = 4096;

/// The registries of this host, at whatever port, that have a directory of their own in `dir`; sorted. For who knows no more
/// of a registry than its host. Does blocking I/O; a directory that cannot be read has none.
#[must_use]
pub fn registries_at(dir: &Path, host: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let names = entries.take(MAX_ENTRIES).filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut found: Vec<String> = names.filter_map(|name| registry_of(&name, host)).collect();
    found.sort();
    found.dedup();
    found
}

/// What [`directories`] made a name of, if that is of this host.
fn registry_of(name: &str, host: &str) -> Option<String> {
    let rest = name.strip_prefix(host)?;
    let escaped = rest.strip_prefix('_').and_then(|rest| rest.strip_suffix('_'));
    match (rest, escaped.or_else(|| rest.strip_prefix(':'))) {
        ("", _) => Some(host.to_owned()),
        (_, Some(port)) => port.parse::<u16>().ok().map(|port| format!("{host}:{port}")),
        _ => None,
    }
}

fn read_directory(dir: &Path) -> Result<Vec<PartialHost>, String> {
    let path = dir.join(FILE);
    let text = match std::fs::metadata(&path) {
        Ok(meta) if meta.len() > MAX_FILE => return Err(format!("{} is larger than {MAX_FILE} bytes", path.display())),
        Ok(_) => std::fs::read_to_string(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
    };
    if text.is_empty() {
        return certificate_files(dir).map(|host| vec![host]);
    }
    match parse(&text, dir) {
        Ok(hosts) => Ok(hosts),
        Err(error) => {
            tracing::warn!(path = %path.display(), "ignoring hosts.toml, as containerd does: {error}");
            certificate_files(dir).map(|host| vec![host])
        }
    }
}

/// Docker's layout, for a directory without `hosts.toml`: `*.crt` to trust, `*.cert` with `*.key` to show.
fn certificate_files(dir: &Path) -> Result<PartialHost, String> {
    let failed = |error| format!("cannot read {}: {error}", dir.display());
    let mut host = RawHost::default().resolve(None, dir)?;
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        paths.push(entry.map_err(failed)?.path());
    }
    paths.sort();
    for path in paths.into_iter().filter(|path| !path.is_dir()) {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => host.tls.ca.push(path),
            Some("cert") => {
                let key = Some(path.with_extension("key")).filter(|key| key.exists());
                host.tls.client.push((path, key));
            }
            _ => {}
        }
    }
    Ok(host)
}

/// The hosts of a `hosts.toml`, in the order of the file, the `server` last.
fn parse(text: &str, dir: &Path) -> Result<Vec<PartialHost>, String> {
    let file: File = toml::from_str(text).map_err(|error| malformed(text, &error))?;
    let mut tables: Vec<(Spanned<String>, RawHost)> = file.host.into_iter().collect();
    tables.sort_by_key(|(url, _)| url.span().start);
    let mut hosts = Vec::new();
    for (url, raw) in tables {
        hosts.push(raw.resolve(Some(url.get_ref()).filter(|url| !url.is_empty()), dir)?);
    }
    let server = file.server.filter(|server| !server.is_empty());
    hosts.push(file.root.resolve(server.as_ref(), dir)?);
    Ok(hosts)
}

/// All that a text can lead to, for `crate::fuzzing`.
#[cfg(fuzzing)]
pub(crate) fn read(text: &str, dir: &Path, registry: &str) -> Result<Vec<HostConfig>, String> {
    parse(text, dir)?.into_iter().map(|host| host.finish(registry)).collect()
}

/// Where the file is wrong. Only that: the parser's own text quotes the line, which may hold a credential.
fn malformed(text: &str, error: &toml::de::Error) -> String {
    // A span from the start is that of the whole file: flattened fields have none of their own.
    let before = error.span().and_then(|span| text.get(..span.start));
    match before.filter(|before| !before.is_empty()) {
        Some(before) => format!("malformed at line {}", before.matches('\n').count() + 1),
        None => "malformed, or a key has a value of the wrong type".to_owned(),
    }
}

#[derive(Deserialize)]
struct File {
    server: Option<String>,
    #[serde(default)]
    host: BTreeMap<Spanned<String>, RawHost>,
    #[serde(flatten)]
    root: RawHost,
}

#[derive(Default, Deserialize)]
struct RawHost {
    #[serde(default)]
    capabilities: Vec<String>,
    ca: Option<OneOrMany<PathBuf>>,
    client: Option<OneOrMany<Pair>>,
    skip_verify: Option<bool>,
    #[serde(default)]
    header: BTreeMap<String, OneOrMany<String>>,
    #[serde(default)]
    override_path: bool,
    dial_timeout: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Pair {
    Both(PathBuf),
    CertAndKey([PathBuf; 2]),
}

/// A host whose address may still have to be derived from the registry's name.
struct PartialHost {
    base: Option<Url>,
    /// Name and port as they were written.
    authority: String,
    resolve: bool,
    pull: bool,
    headers: HeaderMap,
    tls: TlsConfig,
    connect_timeout: Option<Duration>,
}

impl RawHost {
    fn resolve(self, server: Option<&String>, dir: &Path) -> Result<PartialHost, String> {
        let (base, authority) = match server {
            Some(server) => {
                let (base, authority) = server_url(server, self.override_path)?;
                (Some(base), authority)
            }
            None => (None, String::new()),
        };
        let (mut resolve, mut pull) = (self.capabilities.is_empty(), self.capabilities.is_empty());
        for capability in &self.capabilities {
            match capability.to_lowercase().as_str() {
                "resolve" => resolve = true,
                "pull" => pull = true,
                "push" | "referrers" => {}
                other => return Err(format!("unknown capability {other:?}")),
            }
        }
        let client = self.client.map(OneOrMany::into_vec).unwrap_or_default().into_iter().map(|pair| match pair {
            Pair::Both(both) => (dir.join(both), None),
            Pair::CertAndKey([cert, key]) => (dir.join(cert), Some(dir.join(key))),
        });
        let ca = self.ca.map(OneOrMany::into_vec).unwrap_or_default();
        let tls = TlsConfig {
            ca: ca.into_iter().map(|path| dir.join(path)).collect(),
            client: client.collect(),
            skip_verify: self.skip_verify.unwrap_or(false),
        };
        let connect_timeout = self
            .dial_timeout
            .filter(|text| !text.is_empty())
            .map(|text| humantime::parse_duration(&text).map_err(|error| format!("dial_timeout {text:?}: {error}")))
            .transpose()?;
        Ok(PartialHost { base, authority, resolve, pull, headers: headers(self.header)?, tls, connect_timeout })
    }
}

fn headers(raw: BTreeMap<String, OneOrMany<String>>) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, values) in raw {
        let key: HeaderName = name.parse().map_err(|_| format!("header {name:?} is not a header name"))?;
        for value in values.into_vec() {
            // Its value may be a credential: never shown.
            let mut value: HeaderValue = value.parse().map_err(|_| format!("header {name:?} has an unusable value"))?;
            value.set_sensitive(true);
            headers.try_append(&key, value).map_err(|_| "there are too many headers".to_owned())?;
        }
    }
    Ok(headers)
}

/// The base URL of a `server` or `host` entry and the name it gives.
fn server_url(server: &str, override_path: bool) -> Result<(Url, String), String> {
    let full = if server.contains("://") { server.to_owned() } else { format!("https://{server}") };
    // What stands before an `@` may be a password.
    let shown = server.rsplit_once('@').map_or(server, |(_, host)| host);
    let mut url = Url::parse(&full).map_err(|error| format!("host {shown:?}: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(format!("host {shown:?} is not an http or https address"));
    }
    let rest = full.split_once("://").map_or("", |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let authority = authority.rsplit_once('@').map_or(authority, |(_, authority)| authority).to_owned();
    let _ = (url.set_username(""), url.set_password(None));
    url.set_query(None);
    url.set_fragment(None);
    let mut path = url.path().trim_end_matches('/').to_owned();
    if !override_path && !path.ends_with("/v2") {
        path.push_str("/v2");
    }
    url.set_path(&path);
    Ok((url, authority))
}

impl PartialHost {
    fn finish(self, registry: &str) -> Result<HostConfig, String> {
        let Self { base, authority, resolve, pull, headers, mut tls, connect_timeout } = self;
        let named = base.is_some();
        let (base, mirror, resolve, pull) = match base {
            Some(base) => {
                let mirror = authority != registry && !(registry == "docker.io" && authority == "registry-1.docker.io");
                (base, mirror, resolve, pull)
            }
            None => {
                let (url, skip_verify) = default_url(registry);
                tls.skip_verify |= skip_verify;
                let base = Url::parse(&url).map_err(|error| format!("registry {registry:?}: {error}"))?;
                // The registry itself can do everything, whatever the file says of it.
                (base, false, true, true)
            }
        };
        Ok(HostConfig { base, mirror, resolve, pull, headers, tls, connect_timeout, named })
    }
}

/// Where a registry is without a word about it, and whether its certificate goes unchecked there.
fn default_url(registry: &str) -> (String, bool) {
    if registry == "docker.io" {
        return ("https://registry-1.docker.io/v2".to_owned(), false);
    }
    let (name, port) = split_port(registry);
    if !is_loopback(name) {
        return (format!("https://{registry}/v2"), false);
    }
    match port {
        None | Some("443") => (format!("https://{registry}/v2"), true),
        Some(_) => (format!("http://{registry}/v2"), false),
    }
}

fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => (name, Some(port)),
        _ => (authority, None),
    }
}

/// Whether `name` is this machine for sure: `localhost` or a loopback address.
pub(crate) fn is_loopback(name: &str) -> bool {
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
#[path = "hosts_tests.rs"]
mod tests;
