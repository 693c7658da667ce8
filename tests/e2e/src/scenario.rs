//! What a client has to be able to do with a lazy image, whichever client it is.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use millstream_wire::millstream::v1::decision::Outcome;
use millstream_wire::millstream::v1::layer_status::State;

use crate::containerd::{Containerd, Version};
use crate::cri::{ContainerSpec, Cri, Pod};
use crate::daemons::Node;
use crate::image::small;
use crate::stage::{Pushed, Stage, await_decision, await_verified, layers_of};

/// How long a container of these scenarios may take.
const DEADLINE: Duration = Duration::from_secs(30);
/// What the small image says by default.
const HELLO: &str = "hello from the middle layer\n";
/// A digest of all files that a container sees.
const READ_ALL: &[&str] = &["/bin/sh", "-c", "find / -xdev -type f | sort | xargs cat | sha256sum"];

/// What is true of every lazy pull, whoever pulled: no layer came whole, and the node says why.
///
/// # Errors
///
/// If it is not so.
pub fn ensure_lazy(stage: &Stage, node: &Node, image: &Pushed) -> Result<()> {
    await_decision(node, image, Outcome::Lazy, "")?;
    ensure_ranges_only(stage, image)?;
    let layers = layers_of(node, image)?;
    ensure!(layers.len() == image.layers().len(), "not every layer: {layers:?}");
    ensure!(layers.iter().all(|layer| layer.state() == State::Lazy), "not lazy: {layers:?}");
    Ok(())
}

/// What is true of every ordinary pull: every layer came whole, and the node has none.
///
/// # Errors
///
/// If it is not so.
pub fn ensure_ordinary(stage: &Stage, node: &Node, image: &Pushed) -> Result<()> {
    let whole = stage.fetched_whole(image)?;
    ensure!(whole.len() == image.layers().len(), "fetched whole: {whole:?}");
    let layers = layers_of(node, image)?;
    ensure!(layers.is_empty(), "the node has {layers:?}");
    Ok(())
}

fn ensure_ranges_only(stage: &Stage, image: &Pushed) -> Result<()> {
    let requests = stage.layer_requests(image)?;
    ensure!(requests.iter().all(|request| request.status == 206), "{requests:?}");
    Ok(())
}

/// CRI pulls the small image lazily and runs it; it becomes wholly local, and then it runs and reads the same without registry
/// and server.
///
/// # Errors
///
/// The first thing that is not so.
pub fn lazy_by_cri(version: Version, transfer: bool) -> Result<()> {
    let mut stage = Stage::set()?;
    let image = stage.publish("small", &small()?)?;
    let node = stage.node_on_demand()?;
    let containerd = stage.containerd(version, &node, transfer)?;
    lazy_by_cri_of(&mut stage, &node, &containerd, &image)
}

/// The same with a node and a containerd that run already.
///
/// # Errors
///
/// The first thing that is not so.
pub fn lazy_by_cri_of(stage: &mut Stage, node: &Node, containerd: &Containerd, image: &Pushed) -> Result<()> {
    let mut cri = stage.cri(containerd)?;
    stage.count_from_now()?;
    cri.pull(&image.reference, None)?;
    ensure_lazy(stage, node, image)?;
    let pod = cri.run_pod("pod")?;
    says_hello(&cri, &pod, image, "default")?;
    ensure_lazy(stage, node, image)?;
    let lazily = read_all(&cri, &pod, image, "all")?;

    node.set_hydration(true)?;
    await_verified(node, image)?;
    ensure_ranges_only(stage, image)?;
    stage.go_dark()?;
    says_hello(&cri, &pod, image, "dark")?;
    let in_the_dark = read_all(&cri, &pod, image, "all-in-the-dark")?;
    ensure!(in_the_dark == lazily, "lazily {lazily}, in the dark {in_the_dark}");
    Ok(())
}

fn says_hello(cri: &Cri, pod: &Pod, image: &Pushed, name: &str) -> Result<()> {
    let spec = ContainerSpec { image: &image.reference, ..ContainerSpec::default() };
    let said = cri.run(pod, name, &spec, DEADLINE)?;
    ensure!(said == HELLO, "{name} said {said:?}");
    Ok(())
}

/// A digest of all files that a container of the image sees.
///
/// # Errors
///
/// If the container does not end well.
pub fn read_all(cri: &Cri, pod: &Pod, image: &Pushed, name: &str) -> Result<String> {
    let spec = ContainerSpec { image: &image.reference, command: READ_ALL, ..ContainerSpec::default() };
    cri.run(pod, name, &spec, DEADLINE)
}

/// The same as [`lazy_by_cri`] with a client of the command line: `pull` pulls, `run` runs a command in a new container of this
/// name and returns what it wrote.
///
/// # Errors
///
/// The first thing that is not so.
pub fn lazy_by(
    version: Version,
    pull: impl Fn(&Stage, &Containerd, &Pushed) -> Result<()>,
    run: impl Fn(&Stage, &Containerd, &Pushed, &str, &[&str]) -> Result<String>,
) -> Result<()> {
    let mut stage = Stage::set()?;
    let image = stage.publish("small", &small()?)?;
    let node = Node::start(&stage.work, &stage.asking_options(version))?;
    let containerd = stage.containerd(version, &node, true)?;
    stage.count_from_now()?;
    pull(&stage, &containerd, &image)?;
    ensure_lazy(&stage, &node, &image)?;
    let said = run(&stage, &containerd, &image, "one", &["/bin/cat", "/data/hello"])?;
    ensure!(said == HELLO, "it said {said:?}");
    ensure_lazy(&stage, &node, &image)?;
    let lazily = run(&stage, &containerd, &image, "all", READ_ALL)?;

    node.set_hydration(true)?;
    await_verified(&node, &image)?;
    stage.go_dark()?;
    let in_the_dark = run(&stage, &containerd, &image, "dark", READ_ALL).context("in the dark")?;
    ensure!(in_the_dark == lazily, "lazily {lazily}, in the dark {in_the_dark}");
    Ok(())
}

/// Pulls with `ctr`, the way that needs no CRI.
///
/// # Errors
///
/// If the pull fails.
pub fn ctr_pull(_: &Stage, containerd: &Containerd, image: &Pushed) -> Result<()> {
    containerd.ctr_pull("default", &image.reference)
}

/// Runs with `ctr`.
///
/// # Errors
///
/// If the container does not end well.
pub fn ctr_run(stage: &Stage, containerd: &Containerd, image: &Pushed, name: &str, command: &[&str]) -> Result<String> {
    containerd.ctr_run(&stage.work, "default", &image.reference, name, command)
}
