//! What most tests of the product stand on: a registry, millstream-server, and nodes that use both.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use millstream_wire::millstream::v1::LayerStatus;
use millstream_wire::millstream::v1::decision::Outcome;
use millstream_wire::millstream::v1::layer_status::State;
use serde_json::Value;

use crate::containerd::{Containerd, ContainerdOptions, Snapshotter, Version};
use crate::cri::Cri;
use crate::daemons::{NODE, Node, NodeOptions, SERVER, Server, ServerOptions};
use crate::image::{Image, ImageInfo, pause};
use crate::need::{self, CONTAINERS, Need, product};
use crate::process::eventually;
use crate::registry::{Login, Registry, RegistryOptions, Request, free_address};
use crate::spoil::{Guard, Spoiler};
use crate::workdir::Workdir;

/// The command line.
pub const CLI: &str = "millstream";
/// How long what happens in the background may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether everything is there that a test of the product needs, and `more` besides; see [`need::met`].
#[must_use]
pub fn can_be_set(more: &[Need]) -> bool {
    need::met(CONTAINERS) && need::met(&[NODE, SERVER, CLI].map(Need::Product)) && need::met(more)
}

/// A workdir with a registry that holds `pause:1`, and a server that has imported nothing yet.
#[derive(Debug)]
pub struct Stage {
    server: Option<Server>,
    server_options: ServerOptions,
    spoiler: Option<Spoiler>,
    registry: Option<Registry>,
    /// How to start the registry again, on what it has stored.
    registry_options: RegistryOptions,
    requests_before: Vec<Request>,
    login: Option<Login>,
    certs_d: PathBuf,
    layout: PathBuf,
    /// Where everything lives; the last to go.
    pub work: Workdir,
}

/// Whom a [`Spoiler`] stands before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    Nobody,
    Nodes,
    All,
}

/// An image in the registry.
#[derive(Debug, Clone)]
pub struct Pushed {
    /// What clients call it.
    pub reference: String,
    /// Its digests.
    pub info: ImageInfo,
}

impl Pushed {
    /// Digests of its layers with `sha256:`, bottom first.
    pub fn layers(&self) -> Vec<String> {
        self.info.layers.iter().map(|layer| format!("sha256:{}", layer.digest)).collect()
    }

    /// Bytes of all its layers in the registry; of layers that occur twice once.
    pub fn bytes(&self) -> u64 {
        let mut layers: Vec<_> = self.info.layers.iter().map(|layer| (&layer.digest, layer.size)).collect();
        layers.sort_unstable();
        layers.dedup();
        layers.iter().map(|(_, size)| size).sum()
    }
}

impl Stage {
    /// An open registry.
    ///
    /// # Errors
    ///
    /// If a program does not start.
    pub fn set() -> Result<Self> {
        Self::raise(None, Before::Nobody, true)
    }

    /// A server that keeps no packed content.
    ///
    /// # Errors
    ///
    /// If a program does not start.
    pub fn without_packed_content() -> Result<Self> {
        Self::raise(None, Before::Nobody, false)
    }

    /// A registry that wants a login.
    ///
    /// # Errors
    ///
    /// If a program does not start.
    pub fn with_login(login: &Login) -> Result<Self> {
        Self::raise(Some(login.clone()), Before::Nobody, true)
    }

    /// A registry behind a [`Spoiler`].
    ///
    /// # Errors
    ///
    /// If a program does not start.
    pub fn with_spoiler() -> Result<Self> {
        Self::raise(None, Before::All, true)
    }

    /// The same, but the server reaches the registry without it: what is spoiled for nodes alone.
    ///
    /// # Errors
    ///
    /// If a program does not start.
    pub fn with_spoiled_nodes() -> Result<Self> {
        Self::raise(None, Before::Nodes, true)
    }

    fn raise(login: Option<Login>, before: Before, packed_content: bool) -> Result<Self> {
        let work = Workdir::new()?;
        let options = RegistryOptions { login: login.clone(), ..RegistryOptions::loopback()? };
        let registry_options = options.clone();
        let registry = Registry::start(&work, options)?;
        let certs_d = work.dir("certs.d")?;
        registry.write_hosts(&certs_d)?;
        let spoiler = (before != Before::Nobody).then(|| Spoiler::start(registry.address())).transpose()?;
        if let Some(spoiler) = &spoiler {
            let dir = certs_d.join(spoiler.address().to_string());
            std::fs::create_dir_all(&dir)?;
            // Once only: a fault of one request must not be made good by the same host under another heading.
            std::fs::write(dir.join("hosts.toml"), format!("server = \"http://{}\"\n", spoiler.address()))?;
        }
        let mut of_server = certs_d.clone();
        if let (Some(spoiler), Before::Nodes) = (&spoiler, before) {
            of_server = work.dir("certs.d-of-server")?;
            let dir = of_server.join(spoiler.address().to_string());
            std::fs::create_dir_all(&dir)?;
            std::fs::write(dir.join("hosts.toml"), format!("server = \"http://{}\"\n", registry.address()))?;
        }
        let server_options = ServerOptions {
            address: free_address()?,
            tls: None,
            certs_d: of_server,
            import_on_demand: false,
            max_entries: None,
            packed_content,
        };
        let server = Some(Server::start(&work, &server_options, None)?);
        let layout = work.dir("layout")?;
        let registry = Some(registry);
        let requests_before = Vec::new();
        let stage = Self {
            server,
            server_options,
            spoiler,
            registry,
            registry_options,
            requests_before,
            login,
            certs_d,
            layout,
            work,
        };
        stage.push("pause", &pause()?)?;
        Ok(stage)
    }

    /// The registry.
    ///
    /// # Errors
    ///
    /// If it was stopped.
    pub fn registry(&self) -> Result<&Registry> {
        self.registry.as_ref().context("the registry is down")
    }

    /// The proxy before the registry.
    ///
    /// # Errors
    ///
    /// If this stage has none.
    pub fn spoiler(&self) -> Result<&Spoiler> {
        self.spoiler.as_ref().context("nothing stands before the registry")
    }

    /// What clients call the registry.
    fn host(&self) -> Result<SocketAddr> {
        match &self.spoiler {
            Some(spoiler) => Ok(spoiler.address()),
            None => Ok(self.registry()?.address()),
        }
    }

    /// Puts an image into the registry, as `name:1`.
    ///
    /// # Errors
    ///
    /// If it cannot be written or pushed.
    pub fn push(&self, name: &str, image: &Image) -> Result<Pushed> {
        self.push_as(name, image, &format!("{name}:1"))
    }

    /// Puts an image into the registry under this repository and tag; `name` is what the layout has it under.
    ///
    /// # Errors
    ///
    /// If it cannot be written or pushed.
    pub fn push_as(&self, name: &str, image: &Image, name_and_tag: &str) -> Result<Pushed> {
        let info = image.write(&self.layout, name)?;
        self.registry()?.push(&self.layout, name, name_and_tag)?;
        Ok(Pushed { reference: format!("{}/{name_and_tag}", self.host()?), info })
    }

    /// Puts many images into the repository `name`, where each is known by its digest.
    ///
    /// # Errors
    ///
    /// If one cannot be written.
    pub fn push_many(&self, name: &str, images: &[Image]) -> Result<Vec<Pushed>> {
        let layout = self.work.dir(&format!("layout-{name}"))?;
        let infos: Vec<ImageInfo> = images.iter().map(|image| image.write(&layout, "latest")).collect::<Result<_>>()?;
        let manifests: Vec<&str> = infos.iter().map(|info| info.manifest.as_str()).collect();
        self.registry()?.place(&layout, name, &manifests)?;
        let host = self.host()?;
        let pushed =
            infos.into_iter().map(|info| Pushed { reference: format!("{host}/{name}@{}", info.manifest), info });
        Ok(pushed.collect())
    }

    /// The manifest of an image that [`Stage::push_many`] put into `repository`.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn manifest(&self, repository: &str, image: &Pushed) -> Result<Value> {
        let blobs = self.work.dir(&format!("layout-{repository}"))?.join("blobs/sha256");
        Ok(serde_json::from_slice(&std::fs::read(blobs.join(image.info.manifest.trim_start_matches("sha256:")))?)?)
    }

    /// Puts an image that a layout has under `tag` into the registry, as `name:1`, and imports it.
    ///
    /// # Errors
    ///
    /// If either fails.
    pub fn publish_layout(&self, name: &str, layout: &Path, tag: &str, info: ImageInfo) -> Result<Pushed> {
        self.registry()?.push(layout, tag, &format!("{name}:1"))?;
        let pushed = Pushed { reference: format!("{}/{name}:1", self.host()?), info };
        self.import(&pushed)?;
        Ok(pushed)
    }

    /// Has the server import an image, by the command line, and returns what that printed.
    ///
    /// # Errors
    ///
    /// If the import fails.
    pub fn import(&self, image: &Pushed) -> Result<String> {
        let mut command = Command::new(product(CLI).context("millstream is not built")?);
        command.args(["import", &image.reference, "--server", &self.server_address()]);
        if let Some(login) = &self.login {
            command.args(["--username", &login.user, "--password-stdin"]);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("starting millstream")?;
        if let (Some(mut stdin), Some(login)) = (child.stdin.take(), &self.login) {
            stdin.write_all(login.password.as_bytes())?;
        }
        let result = child.wait_with_output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        ensure!(result.status.success(), "importing {}: {}", image.reference, text(&result.stderr));
        Ok(text(&result.stdout) + &text(&result.stderr))
    }

    /// Pushes and imports.
    ///
    /// # Errors
    ///
    /// If either fails.
    pub fn publish(&self, name: &str, image: &Image) -> Result<Pushed> {
        let pushed = self.push(name, image)?;
        self.import(&pushed)?;
        Ok(pushed)
    }

    /// Where the server is, or was.
    pub fn server_address(&self) -> String {
        format!("http://{}", self.server_options.address)
    }

    /// The spoiler wants tokens from now on, and imports have the login.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn guard(&mut self, guard: Guard) -> Result<()> {
        self.login = Some(guard.login.clone());
        self.spoiler()?.guard(Some(guard));
        Ok(())
    }

    /// Directory in the manner of `certs.d` that knows the registry.
    pub fn certs_d(&self) -> &Path {
        &self.certs_d
    }

    /// Settings of a node that knows registry and server.
    pub fn node_options(&self) -> NodeOptions {
        NodeOptions::new(&self.server_address(), &self.certs_d)
    }

    /// A node without background downloads.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn node_on_demand(&self) -> Result<Node> {
        Node::start(&self.work, &NodeOptions { hydration: false, ..self.node_options() })
    }

    /// A containerd with this snapshotter. CRI of 2.x pulls through the transfer service if `transfer` is set.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn containerd(&self, version: Version, node: &Node, transfer: bool) -> Result<Containerd> {
        Containerd::start(&self.work, self.containerd_options(version, node.snapshotter(), transfer)?)
    }

    /// The same, but clients do not say what they pull, and the node may ask this containerd: it need not run yet.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn unlabelled(&self, version: Version, node: &Node) -> Result<Containerd> {
        let options = self.containerd_options(version, node.snapshotter(), true)?;
        Containerd::start(&self.work, ContainerdOptions { labels: false, ..options })
    }

    /// Settings of a node that may ask the containerd of this version, without background downloads.
    pub fn asking_options(&self, version: Version) -> NodeOptions {
        let socket = self.work.path().join(ContainerdOptions::dir_name(version)).join("c.sock");
        NodeOptions { containerd: Some(socket), hydration: false, ..self.node_options() }
    }

    /// Debian's containerd on its own overlayfs beside the other: what is true.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn oracle(&self) -> Result<Containerd> {
        self.oracle_of(Version::V1)
    }

    /// The same of another version; one of each major one may stand beside the other.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn oracle_of(&self, version: Version) -> Result<Containerd> {
        let options = self.containerd_options(version, Snapshotter::Overlayfs, false)?;
        Containerd::start_as(&self.work, &format!("oracle{}", version.major()), options)
    }

    /// How [`Stage::containerd`] sets one up.
    ///
    /// # Errors
    ///
    /// If the registry was stopped.
    pub fn containerd_options(
        &self,
        version: Version,
        snapshotter: Snapshotter,
        transfer: bool,
    ) -> Result<ContainerdOptions> {
        let pause_image = format!("{}/pause:1", self.host()?);
        Ok(ContainerdOptions {
            version,
            snapshotter,
            pause_image,
            certs_d: self.certs_d.clone(),
            transfer,
            labels: true,
        })
    }

    /// CRI of this containerd.
    ///
    /// # Errors
    ///
    /// If it does not answer.
    pub fn cri(&self, containerd: &Containerd) -> Result<Cri> {
        Cri::connect(&self.work, &containerd.socket())
    }

    /// The server.
    ///
    /// # Errors
    ///
    /// If it was stopped.
    pub fn server(&self) -> Result<&Server> {
        self.server.as_ref().context("the server is down")
    }

    /// Starts the server anew, on the same state, with at most so many files in a layer.
    ///
    /// # Errors
    ///
    /// If it does not end or does not start.
    pub fn limit_entries(&mut self, entries: u64) -> Result<()> {
        self.stop_server()?;
        self.server_options.max_entries = Some(entries);
        self.start_server()
    }

    /// Kills the server.
    ///
    /// # Errors
    ///
    /// If it does not end.
    pub fn kill_server(&mut self) -> Result<()> {
        self.server.take().map_or(Ok(()), Server::crash)
    }

    /// Starts the server again, on the same state.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn start_server(&mut self) -> Result<()> {
        self.server = Some(Server::start(&self.work, &self.server_options, None)?);
        Ok(())
    }

    /// Stops the server.
    ///
    /// # Errors
    ///
    /// If its end cannot be awaited.
    pub fn stop_server(&mut self) -> Result<()> {
        self.server.take().map_or(Ok(()), Server::stop)
    }

    /// Stops server and registry: all that a node can ask.
    ///
    /// # Errors
    ///
    /// If an end cannot be awaited.
    pub fn go_dark(&mut self) -> Result<()> {
        self.stop_server()?;
        self.spoiler = None;
        self.registry.take().map_or(Ok(()), Registry::stop)
    }

    /// Starts server and registry again, where they were, on what they have stored. A spoiler stays away.
    ///
    /// # Errors
    ///
    /// If one does not start.
    pub fn come_back(&mut self) -> Result<()> {
        if self.registry.is_none() {
            self.registry = Some(Registry::start(&self.work, self.registry_options.clone())?);
        }
        if self.server.is_none() {
            self.server = Some(Server::start(&self.work, &self.server_options, None)?);
        }
        Ok(())
    }

    /// Requests that the registry answers from now on are what [`Stage::layer_requests`] counts.
    ///
    /// # Errors
    ///
    /// If its log cannot be read.
    pub fn count_from_now(&mut self) -> Result<()> {
        self.requests_before = self.registry()?.requests()?;
        Ok(())
    }

    /// The requests for content of layers of this image since [`Stage::count_from_now`].
    ///
    /// # Errors
    ///
    /// If the registry's log cannot be read.
    pub fn layer_requests(&self, image: &Pushed) -> Result<Vec<Request>> {
        let mut requests = self.registry()?.requests()?.split_off(self.requests_before.len());
        let blobs: Vec<String> = image.layers().iter().map(|digest| format!("/blobs/{digest}")).collect();
        requests.retain(|request| request.method == "GET" && blobs.iter().any(|blob| request.path.ends_with(blob)));
        Ok(requests)
    }

    /// The layers of this image that somebody fetched whole since [`Stage::count_from_now`], as positions from the bottom.
    ///
    /// # Errors
    ///
    /// If the registry's log cannot be read.
    pub fn fetched_whole(&self, image: &Pushed) -> Result<Vec<usize>> {
        let requests = self.layer_requests(image)?;
        let whole = |digest: &String| {
            requests.iter().any(|request| request.status == 200 && request.path.ends_with(digest.as_str()))
        };
        Ok((0..).zip(&image.layers()).filter(|(_, digest)| whole(digest)).map(|(position, _)| position).collect())
    }
}

/// Waits until the node's latest decision about the image is this one; `code` is empty for lazy and local.
///
/// # Errors
///
/// If it is not within a minute; the error says what it is instead.
pub fn await_decision(node: &Node, image: &Pushed, outcome: Outcome, code: &str) -> Result<()> {
    let mut seen = Vec::new();
    let found = eventually("the decision", PATIENCE / 6, || {
        seen = node.explain(&image.reference).map(|answer| answer.decisions).unwrap_or_default();
        seen.first().filter(|latest| latest.outcome() == outcome && latest.code == code).map(drop)
    });
    found.with_context(|| format!("{outcome:?} {code}, found {seen:?}"))
}

/// What the node says of the layers of this image that it has.
///
/// # Errors
///
/// If it does not answer.
pub fn layers_of(node: &Node, image: &Pushed) -> Result<Vec<LayerStatus>> {
    let layers = node.status()?.layers;
    Ok(layers.into_iter().filter(|layer| image.layers().contains(&layer.layer)).collect())
}

/// Waits until every layer of the image is wholly local and verified.
///
/// # Errors
///
/// If they are not within a minute; the error says what they are instead.
pub fn await_verified(node: &Node, image: &Pushed) -> Result<()> {
    await_verified_within(node, image, PATIENCE)
}

/// The same with another deadline.
///
/// # Errors
///
/// If they are not within it; the error says what they are instead.
pub fn await_verified_within(node: &Node, image: &Pushed, deadline: Duration) -> Result<()> {
    let mut wanted = image.layers();
    wanted.sort_unstable();
    wanted.dedup();
    let mut seen = Vec::new();
    let found = eventually("every layer to be verified", deadline, || {
        seen = layers_of(node, image).unwrap_or_default();
        (seen.len() == wanted.len() && seen.iter().all(|layer| layer.state() == State::Verified)).then_some(())
    });
    found.with_context(|| format!("found {seen:?}"))
}
