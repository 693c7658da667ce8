//! `millstream pull`: what a lazy pull asks of a client of containerd, for users of clients that do not do it.
//!
//! `ctr image pull` of containerd 1.x fetches every layer before it unpacks the first, and tells the snapshotter nothing. This
//! does what CRI does: manifest and configuration first, then each layer is offered to the snapshotter, with its names; what
//! it does not take is fetched and unpacked.

mod image;
mod progress;
mod transfer;
mod unpack;
mod wait;

use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use millstream_containerd::{Containerd, ContainerdOptions, Namespace};
use millstream_oci::ImageRef;
use millstream_registry::{Credential, Registry, RegistryOptions, Secret, docker_config_credential};
use serde_json::json;

use self::image::Resolved;
use self::progress::Progress;
use self::unpack::State;
use crate::arguments::{Output, PullArguments};
use crate::connect::Node;

/// How long containerd keeps what a killed pull left behind; the same as with its own clients.
const LEASE: Duration = Duration::from_secs(24 * 3600);
/// How long containerd may take for an answer: the longest deadline of a decision, twice.
const CALL: Duration = Duration::from_secs(60);

/// Pulls, and gives the text to print.
pub(crate) async fn run(arguments: &PullArguments, node: &Node, output: Output) -> anyhow::Result<String> {
    let began = Instant::now();
    let image: ImageRef = arguments.image.parse()?;
    let registry =
        Registry::new(RegistryOptions { hosts_dir: Some(arguments.hosts_dir.clone()), ..RegistryOptions::default() })?;
    let repository = registry.repository(&image, credential(arguments, &image).await?);
    let options = ContainerdOptions { call_limit: CALL, ..ContainerdOptions::new(&arguments.containerd) };
    let containerd = Containerd::new(options);
    let space = containerd.namespace(&arguments.namespace)?;
    // Before anything is fetched: who is not root learns it at once.
    containerd.version().await?;
    let resolved = image::resolve(&repository, &image, arguments.platform.as_ref()).await;
    let resolved = resolved.with_context(|| format!("resolving {image}"))?;

    let progress = Progress::new(&resolved);
    let space = space.leased(LEASE).await?;
    let done = tokio::select! {
        done = into_containerd(&resolved, &arguments.snapshotter, &space, repository, &progress) => done,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    // Also after a failure: what was begun is garbage.
    let released = space.release().await;
    progress.finish();
    let states = done.with_context(|| format!("pulling {image}"))?;
    released?;
    let seconds = began.elapsed().as_secs_f64();
    if arguments.wait {
        wait::until_local(node, &resolved).await.with_context(|| format!("waiting for the content of {image}"))?;
    }
    result(&resolved, &states, seconds, began.elapsed().as_secs_f64(), output)
}

/// Documents, layers, then the name: whoever finds the image finds all of it.
async fn into_containerd(
    resolved: &Resolved,
    snapshotter: &str,
    space: &Namespace,
    repository: millstream_registry::Repository,
    progress: &Progress,
) -> anyhow::Result<Vec<State>> {
    image::write(resolved, space).await?;
    let states = unpack::layers(resolved, snapshotter, space, repository, progress).await?;
    image::keep_snapshots(resolved, snapshotter, space).await?;
    image::record(resolved, space).await?;
    Ok(states)
}

async fn credential(arguments: &PullArguments, image: &ImageRef) -> anyhow::Result<Credential> {
    if let Some(username) = &arguments.username {
        let mut password = String::new();
        std::io::stdin().read_to_string(&mut password).context("reading the password from standard input")?;
        let password = Secret::new(password.trim_end_matches(['\r', '\n']));
        return Ok(Credential::Basic { username: username.clone(), password });
    }
    let path = match (&arguments.docker_config, std::env::var_os("DOCKER_CONFIG"), std::env::home_dir()) {
        (Some(path), ..) => {
            if !path.exists() {
                bail!("--docker-config {}: there is no such file", path.display());
            }
            path.clone()
        }
        (None, Some(dir), _) => Path::new(&dir).join("config.json"),
        (None, None, Some(home)) => home.join(".docker/config.json"),
        (None, None, None) => return Ok(Credential::Anonymous),
    };
    let image = image.clone();
    // A helper may take seconds.
    Ok(tokio::task::spawn_blocking(move || docker_config_credential(&path, &image)).await??)
}

fn result(resolved: &Resolved, states: &[State], pulled: f64, total: f64, output: Output) -> anyhow::Result<String> {
    if output == Output::Json {
        let layers: Vec<_> = resolved
            .layers
            .iter()
            .zip(states)
            .map(|(layer, state)| {
                json!({ "digest": layer.descriptor.digest.to_string(), "size": layer.descriptor.size, "state": state.name() })
            })
            .collect();
        let document = json!({
            "image": resolved.name,
            "manifest_digest": resolved.manifest.to_string(),
            "layers": layers,
            "seconds": pulled,
            "seconds_total": total,
        });
        return Ok(serde_json::to_string_pretty(&document)? + "\n");
    }
    let count = |wanted: State| states.iter().filter(|state| **state == wanted).count();
    let (lazy, unpacked, present) = (count(State::Lazy), count(State::Unpacked), count(State::Present));
    let mut text = format!(
        "{} is pulled in {pulled:.2} s: {} layers, {lazy} lazy, {unpacked} unpacked, {present} there before\n",
        resolved.name,
        states.len()
    );
    if unpacked > 0 {
        text.push_str("  why not all of it is lazy: millstream explain ");
        text.push_str(&resolved.name);
        text.push('\n');
    }
    Ok(text)
}
