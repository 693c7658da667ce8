//! What demo and bench measure on: a line, and on its far side the registry and millstream-server.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::daemons::{NodeOptions, Server, ServerOptions};
use crate::image::manifest_of;
use crate::link::{FAR, Link, LinkOptions};
use crate::need::product;
use crate::process::output;
use crate::registry::{Registry, RegistryOptions, Tls, free_address};
use crate::stage::CLI;
use crate::sweep::unmount_below;
use crate::workdir::Workdir;

/// Where the far side offers the registry.
pub const REGISTRY_PORT: u16 = 5000;
/// Where it offers millstream-server.
pub const SERVER_PORT: u16 = 7900;

/// An image of a layout, and what the registry calls it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offered {
    /// The OCI layout.
    pub layout: PathBuf,
    /// Its tag there; empty: the one image index that the layout has.
    pub tag: String,
    /// `repository:tag` in the registry.
    pub name: String,
}

impl Offered {
    /// The image with this tag of a layout, as `name`.
    pub fn new(layout: &Path, tag: &str, name: &str) -> Self {
        Self { layout: layout.to_owned(), tag: tag.to_owned(), name: name.to_owned() }
    }
}

/// Everything that stays up. Fields end in their order: processes before the link, the link before the directory.
#[derive(Debug)]
pub struct Rig {
    server: Option<Server>,
    server_options: ServerOptions,
    /// The registry.
    pub registry: Registry,
    /// The line.
    pub link: Link,
    server_address: String,
    ca: PathBuf,
    /// Directory in the manner of `certs.d` that knows the registry.
    pub certs_d: PathBuf,
    /// The directory of all state.
    pub work: Workdir,
}

impl Rig {
    /// Pushes the images and puts registry and server behind the line. With `storage` the registry keeps what it has there, and
    /// what is there already is not pushed again.
    ///
    /// # Errors
    ///
    /// If a program does not start, or an image cannot be pushed.
    pub fn set(line: LinkOptions, images: &[Offered], storage: Option<&Path>) -> Result<Self> {
        let work = Workdir::new()?;
        // Pushed before there is a link: its storage stays where it is.
        let inner = free_address()?;
        let options = RegistryOptions { address: inner, tls: None, login: None };
        let registry = match storage {
            Some(storage) => Registry::start_stored(&work, options.clone(), storage)?,
            None => Registry::start(&work, options.clone())?,
        };
        for image in images {
            if !registry.has(&image.name, &manifest_of(&image.layout, &image.tag)?) {
                if image.tag.is_empty() {
                    registry.place_index(&image.layout, &image.name)?;
                } else {
                    registry.push(&image.layout, &image.tag, &image.name)?;
                }
            }
        }
        registry.stop()?;

        let mut link = Link::up(&work, line)?;
        let public = link.expose(REGISTRY_PORT, inner)?;
        let registry = match storage {
            Some(storage) => Registry::start_stored_behind(&work, options, public, &link, storage)?,
            None => Registry::start_behind(&work, options, public, &link)?,
        };
        let certs_d = work.dir("certs.d")?;
        registry.write_hosts(&certs_d)?;
        let tls = Tls::generate(&work.dir("tls")?, &[&FAR.to_string()])?;
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, SERVER_PORT));
        let server_options = ServerOptions {
            address: listen,
            tls: Some(tls.clone()),
            certs_d: certs_d.clone(),
            import_on_demand: false,
            max_entries: None,
            packed_content: true,
        };
        let address = link.expose(SERVER_PORT, listen)?;
        let server_address = format!("https://{address}");
        let mut rig = Self { server: None, server_options, registry, link, server_address, ca: tls.ca, certs_d, work };
        rig.start_server()?;
        Ok(rig)
    }

    /// Starts the server, on the state that it has; one that runs is left alone.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn start_server(&mut self) -> Result<()> {
        if self.server.is_none() {
            self.server = Some(Server::start(&self.work, &self.server_options, Some(&self.link))?);
        }
        Ok(())
    }

    /// The server's process, if it runs.
    #[must_use]
    pub fn server_process(&self) -> Option<u32> {
        self.server.as_ref().map(Server::id)
    }

    /// Ends the server.
    ///
    /// # Errors
    ///
    /// If its end cannot be awaited.
    pub fn stop_server(&mut self) -> Result<()> {
        self.server.take().map_or(Ok(()), Server::stop)
    }

    /// Has the server import an image and says how long that took.
    ///
    /// # Errors
    ///
    /// If it cannot, or only in part.
    pub fn import(&self, image: &str) -> Result<Duration> {
        let started = Instant::now();
        let program = product(CLI).context("millstream is not built")?;
        let mut command = Command::new(program);
        command.args(["import", image, "--server", &self.server_address, "--ca"]).arg(&self.ca);
        let text = output(&mut command)?;
        ensure!(!text.contains("cannot be streamed"), "the import of {image} left layers out:\n{text}");
        Ok(started.elapsed())
    }

    /// Settings of a millstreamd that knows the server.
    pub fn node(&self, hydration: bool) -> NodeOptions {
        let mut options = NodeOptions::new(&self.server_address, &self.certs_d);
        options.ca = Some(self.ca.clone());
        options.hydration = hydration;
        options
    }

    /// Removes these directories of the workdir, with what ended daemons left mounted there.
    ///
    /// # Errors
    ///
    /// If it refuses.
    pub fn wipe(&self, directories: &[&str]) -> Result<()> {
        for dir in directories {
            let dir = self.work.path().join(dir);
            unmount_below(&dir)?;
            match std::fs::remove_dir_all(dir) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Has the kernel forget what it has of files.
///
/// # Errors
///
/// If it refuses.
pub fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("dropping caches")
}
