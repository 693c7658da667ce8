//! Hosts made ready to be asked: their settings of the moment and a client with the right TLS.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use millstream_source::{ErrorKind, SourceError};
use reqwest::{Client, redirect};
use tokio::time::Instant;

use crate::egress::Names;
use crate::hosts::{self, HostConfig, Hosts, Stamp, TlsConfig};
use crate::options::{MAX_CACHED, RegistryOptions};

/// A host and the client to ask it with.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) config: HostConfig,
    pub(crate) client: Client,
}

/// Endpoints in the order to ask them.
pub(crate) type EndpointList = Arc<[Arc<Endpoint>]>;

/// The endpoints of every registry in use; follows changes of the files.
#[derive(Debug)]
pub(crate) struct Endpoints {
    names: Names,
    registries: Mutex<HashMap<String, Known>>,
    clients: Mutex<HashMap<ClientKey, Client>>,
}

#[derive(Debug, Clone)]
struct Known {
    endpoints: EndpointList,
    stamp: Stamp,
    checked: Instant,
}

/// Everything a client is made from: two hosts that agree in it share connections. The stamp makes renewed certificates
/// count.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct ClientKey {
    tls: TlsConfig,
    files: Stamp,
    connect_timeout: Option<Duration>,
    loopback: bool,
    plain: bool,
}

impl Endpoints {
    /// None yet; their clients will resolve names with `names`.
    pub(crate) fn new(names: Names) -> Self {
        Self { names, registries: Mutex::default(), clients: Mutex::default() }
    }

    /// The endpoints of `registry` now, in the order to ask them.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Local`] when the files that describe them, or certificates they name, cannot be read.
    pub(crate) async fn of(
        self: &Arc<Self>,
        registry: &str,
        options: &Arc<RegistryOptions>,
    ) -> Result<EndpointList, SourceError> {
        let known = self.registries().get(registry).cloned();
        if let Some(known) = &known
            && known.checked.elapsed() < options.hosts_recheck
        {
            return Ok(Arc::clone(&known.endpoints));
        }
        let (this, options, name) = (Arc::clone(self), Arc::clone(options), registry.to_owned());
        let checked = Instant::now();
        let task = tokio::task::spawn_blocking(move || this.load(&name, known, &options));
        let (endpoints, stamp) = task.await.map_err(|error| local(format!("reading of hosts.toml: {error}")))??;
        let mut registries = self.registries();
        if registries.len() >= MAX_CACHED && !registries.contains_key(registry) {
            registries.clear();
        }
        registries.insert(registry.to_owned(), Known { endpoints: Arc::clone(&endpoints), stamp, checked });
        Ok(endpoints)
    }

    fn load(
        &self,
        registry: &str,
        known: Option<Known>,
        options: &RegistryOptions,
    ) -> Result<(EndpointList, Stamp), SourceError> {
        if let Some(known) = known
            && hosts::stamp(known.stamp.iter().map(|(path, _)| path.clone())) == known.stamp
        {
            return Ok((known.endpoints, known.stamp));
        }
        let Hosts { hosts, stamp } = hosts::load(options.hosts_dir.as_deref(), registry).map_err(local)?;
        let mut endpoints = Vec::new();
        for config in hosts.into_iter().filter(|host| !is_ignored(host, options)) {
            if let (true, Some(host)) = (config.named, config.base.host_str()) {
                self.names.configure(host);
            }
            let client = self.client(&config, options)?;
            endpoints.push(Arc::new(Endpoint { config, client }));
        }
        Ok((endpoints.into(), stamp))
    }

    fn client(&self, config: &HostConfig, options: &RegistryOptions) -> Result<Client, SourceError> {
        let tls = &config.tls;
        let files = tls.client.iter().flat_map(|(cert, key)| std::iter::once(cert).chain(key)).chain(&tls.ca);
        let key = ClientKey {
            tls: tls.clone(),
            files: hosts::stamp(files.cloned()),
            connect_timeout: config.connect_timeout,
            loopback: config.base.host_str().is_some_and(hosts::is_loopback),
            plain: config.base.scheme() == "http",
        };
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&key) {
            return Ok(client.clone());
        }
        let client = build(&key, options, &self.names)?;
        if clients.len() >= MAX_CACHED {
            clients.clear();
        }
        clients.insert(key, client.clone());
        Ok(client)
    }

    fn registries(&self) -> std::sync::MutexGuard<'_, HashMap<String, Known>> {
        self.registries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_ignored(host: &HostConfig, options: &RegistryOptions) -> bool {
    let name = host.base.host_str().unwrap_or_default();
    let authority = format!("{name}:{}", host.base.port_or_known_default().unwrap_or_default());
    options.ignored_hosts.contains(&authority)
}

fn build(key: &ClientKey, options: &RegistryOptions, names: &Names) -> Result<Client, SourceError> {
    let failed = |error: reqwest::Error| local(format!("cannot set up TLS: {error}"));
    // The kernel counts in seconds.
    let probe = (options.idle_timeout / 3).max(Duration::from_secs(1));
    let builder = || {
        let builder = Client::builder()
            // One connection for each request under way: a slow body never holds up a reader's request.
            .http1_only()
            .redirect(redirect::Policy::none())
            .referer(false)
            .no_gzip()
            .no_brotli()
            .no_zstd()
            .no_deflate()
            .dns_resolver(names.clone())
            .user_agent(&options.user_agent)
            .connect_timeout(key.connect_timeout.unwrap_or(options.connect_timeout))
            .pool_max_idle_per_host(options.max_connections_per_host)
            // The other end of a connection may be gone without a word: one that is kept for the next request is looked after,
            // and none of them is believed in for longer than a silent body.
            .tcp_keepalive(probe)
            .tcp_keepalive_interval(probe)
            .tcp_user_timeout(options.idle_timeout);
        if key.loopback { builder.no_proxy() } else { builder }
    };
    let mut full = builder().tls_danger_accept_invalid_certs(key.tls.skip_verify);
    for path in &key.tls.ca {
        let certificates = reqwest::Certificate::from_pem_bundle(&read(path)?)
            .map_err(|error| local(format!("{} holds no certificates: {error}", path.display())))?;
        full = full.tls_certs_merge(certificates);
    }
    if let [(cert, key_file), rest @ ..] = key.tls.client.as_slice() {
        if !rest.is_empty() {
            tracing::warn!(path = %cert.display(), "only the first of several client certificates is used");
        }
        let mut pem = read(cert)?;
        if let Some(key_file) = key_file {
            pem.push(b'\n');
            pem.extend(read(key_file)?);
        }
        let identity = reqwest::Identity::from_pem(&pem)
            .map_err(|error| local(format!("{} is no client certificate with its key: {error}", cert.display())))?;
        full = full.identity(identity);
    }
    match full.build() {
        Ok(client) => Ok(client),
        // A machine without any trusted certificates can still use a registry that speaks plain HTTP.
        Err(_) if key.plain => builder().tls_certs_only([]).build().map_err(failed),
        Err(error) => Err(failed(error)),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, SourceError> {
    std::fs::read(path).map_err(|error| local(format!("cannot read {}: {error}", path.display())))
}

fn local(message: String) -> SourceError {
    SourceError::new(ErrorKind::Local, message)
}
