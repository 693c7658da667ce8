//! What all jobs share: the link, and on its far side the registry and millstream-server.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use millstream_e2e::daemons::{NodeOptions, Server, ServerOptions};
use millstream_e2e::link::{FAR, Link, LinkOptions};
use millstream_e2e::need::product;
use millstream_e2e::process::output;
use millstream_e2e::registry::{Registry, RegistryOptions, Tls, free_address};
use millstream_e2e::web;
use millstream_e2e::workdir::Workdir;

use crate::say;

const REGISTRY_PORT: u16 = 5000;
const SERVER_PORT: u16 = 7900;

/// Everything that stays up during the demo. Fields end in their order: processes before the link, the link before the
/// directory.
pub(crate) struct Stage {
    _server: Server,
    pub(crate) registry: Registry,
    pub(crate) link: Link,
    server_address: String,
    ca: PathBuf,
    pub(crate) certs_d: PathBuf,
    pub(crate) image: String,
    pub(crate) work: Workdir,
}

impl Stage {
    pub(crate) fn set(layout: &Path) -> Result<Self> {
        let work = Workdir::new()?;
        say("pushing the image to a registry");
        // Pushed before there is a link: its storage stays where it is.
        let inner = free_address()?;
        let options = RegistryOptions { address: inner, tls: None, login: None };
        let registry = Registry::start(&work, options.clone())?;
        registry.push(layout, web::TAG, "demo/web:1")?;
        registry.push(layout, "pause", "demo/pause:1")?;
        registry.stop()?;

        say("putting registry and millstream-server behind a link of 200 Mbit/s with a round trip of 20 ms");
        let mut link = Link::up(&work, LinkOptions::default())?;
        let public = link.expose(REGISTRY_PORT, inner)?;
        let registry = Registry::start_behind(&work, options, public, &link)?;
        let certs_d = work.dir("certs.d")?;
        registry.write_hosts(&certs_d)?;
        let tls = Tls::generate(&work.dir("tls")?, &[&FAR.to_string()])?;
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, SERVER_PORT));
        let options = ServerOptions {
            address: listen,
            tls: Some(tls.clone()),
            certs_d: certs_d.clone(),
            import_on_demand: false,
            max_entries: None,
            packed_content: true,
        };
        let server = Server::start(&work, &options, Some(&link))?;
        let address = link.expose(SERVER_PORT, listen)?;
        Ok(Self {
            image: registry.reference("demo/web:1"),
            _server: server,
            registry,
            link,
            server_address: format!("https://{address}"),
            ca: tls.ca,
            certs_d,
            work,
        })
    }

    /// Has the server import the image and says how long that took.
    pub(crate) fn import(&self) -> Result<Duration> {
        say("importing the image on the server (makes the tables of contents, once for all nodes)");
        let started = Instant::now();
        let program = product("millstream").context("millstream is not built")?;
        let mut command = Command::new(program);
        command.args(["import", &self.image, "--server", &self.server_address, "--ca"]).arg(&self.ca);
        let text = output(&mut command)?;
        ensure!(!text.contains("cannot be streamed"), "the import left layers out:\n{text}");
        Ok(started.elapsed())
    }

    /// Settings of millstreamd.
    pub(crate) fn node(&self, hydration: bool) -> NodeOptions {
        let mut options = NodeOptions::new(&self.server_address, &self.certs_d);
        options.ca = Some(self.ca.clone());
        options.hydration = hydration;
        options
    }
}
