//! One machine without a server: what was pulled the ordinary way is indexed here, and streams from the next pull on.

#![allow(clippy::unwrap_used, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use millstream_e2e::containerd::{Containerd, Version};
use millstream_e2e::cri::{ContainerSpec, Cri, Pod};
use millstream_e2e::daemons::{Node, NodeOptions};
use millstream_e2e::image::{Image, shell};
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::need::{Need, product};
use millstream_e2e::process::{eventually, let_pass, output};
use millstream_e2e::registry::Login;
use millstream_e2e::stage::{CLI, Pushed, Stage, await_decision, await_verified, can_be_set, layers_of};
use millstream_wire::millstream::v1::decision::Outcome;
use millstream_wire::millstream::v1::layer_status::State;

const DEADLINE: Duration = Duration::from_secs(60);
/// Bytes that a probe and a proof may cost beside what a pull fetches whole.
const ASKING: u64 = 64;

/// A shell and a layer of its own, which says who it is.
fn image(name: &str) -> Image {
    let own = vec![Entry::directory("data"), Entry::file("data/name", name)];
    Image::new().layer(shell().unwrap(), Packing::Gzip).layer(own, Packing::Gzip).command(&["/bin/cat", "/data/name"])
}

/// A stage whose server is down, and settings of a node that knows of none.
fn alone(mut stage: Stage, version: Version) -> (Stage, NodeOptions) {
    stage.stop_server().unwrap();
    let options = NodeOptions { server: String::new(), ..stage.asking_options(version) };
    (stage, options)
}

fn run(cri: &Cri, pod: &Pod, name: &str, image: &Pushed) -> String {
    let spec = ContainerSpec { image: &image.reference, ..ContainerSpec::default() };
    let container = cri.create(pod, name, &spec).unwrap();
    cri.start(&container).unwrap();
    let output = cri.wait(&container, DEADLINE).unwrap().output;
    // A container keeps the layers of its image, and the next pull would find them.
    cri.remove(&container).unwrap();
    output
}

/// Removes an image, and waits until containerd has collected all that was its alone.
fn remove(containerd: &Containerd, cri: &Cri, node: &Node, image: &Pushed) {
    cri.remove_image(&image.reference).unwrap();
    let top = image.layers().pop().unwrap();
    eventually("the end of the image's content", DEADLINE, || {
        let blobs = containerd.ctr("k8s.io", &["content", "ls", "-q"]).ok()?;
        (!blobs.contains(&image.info.manifest) && !blobs.contains(&top)).then_some(())
    })
    .unwrap();
    eventually("the end of its lazy layers", DEADLINE, || {
        let layers = layers_of(node, image).ok()?;
        (!layers.iter().any(|layer| layer.layer == top)).then_some(())
    })
    .unwrap();
}

/// Waits until the image is indexed, and looks whether the node had said before that it would be.
fn await_indexed(node: &Node, image: &Pushed) {
    await_decision(node, image, Outcome::Deferred, "index.done").unwrap();
    let decisions = node.explain(&image.reference).unwrap().decisions;
    let first = decisions.iter().find(|decision| decision.code == "server.not-imported").unwrap();
    assert!(first.reason.contains("from this node's own copy"), "{}", first.reason);
}

fn assert_wholly_lazy(stage: &Stage, node: &Node, image: &Pushed) {
    await_decision(node, image, Outcome::Lazy, "").unwrap();
    let requests = stage.layer_requests(image).unwrap();
    assert!(requests.iter().all(|request| request.status == 206), "{requests:?}");
    let layers = layers_of(node, image).unwrap();
    assert_eq!(layers.len(), image.layers().len());
    assert!(layers.iter().all(|layer| layer.state() == State::Lazy), "{layers:?}");
}

fn streams_from_the_second_pull_on(version: Version) {
    let (mut stage, options) = alone(Stage::set().unwrap(), version);
    let (a, b) = (stage.push("a", &image("a")).unwrap(), stage.push("b", &image("b")).unwrap());
    assert_eq!(a.layers()[0], b.layers()[0], "they share their base");
    let node = Node::start(&stage.work, &options).unwrap();
    let containerd = stage.containerd(version, &node, false).unwrap();
    let mut cri = stage.cri(&containerd).unwrap();
    let pod = cri.run_pod("pod").unwrap();

    stage.count_from_now().unwrap();
    cri.pull(&a.reference, None).unwrap();
    await_indexed(&node, &a);
    assert_eq!(stage.fetched_whole(&a).unwrap(), [0, 1], "an ordinary pull");
    let fetched: u64 = stage.layer_requests(&a).unwrap().iter().map(|request| request.bytes).sum();
    assert!(fetched <= a.bytes() + ASKING, "{fetched} bytes for {}: nothing is downloaded to be indexed", a.bytes());
    assert_eq!(run(&cri, &pod, "ordinary", &a), "a");
    remove(&containerd, &cri, &node, &a);

    // Of another image only what it shares is known.
    stage.count_from_now().unwrap();
    cri.pull(&b.reference, None).unwrap();
    assert_eq!(stage.fetched_whole(&b).unwrap(), [1]);
    let base = layers_of(&node, &b).unwrap();
    assert_eq!(base.iter().map(|layer| &layer.layer).collect::<Vec<_>>(), [&b.layers()[0]]);
    assert_eq!(base[0].state(), State::Lazy);
    await_indexed(&node, &b);
    assert_eq!(run(&cri, &pod, "partly", &b), "b");
    remove(&containerd, &cri, &node, &b);

    for image in [&a, &b] {
        stage.count_from_now().unwrap();
        cri.pull(&image.reference, None).unwrap();
        assert_wholly_lazy(&stage, &node, image);
    }
    assert_eq!(run(&cri, &pod, "lazy", &a), "a");
    node.set_hydration(true).unwrap();
    await_verified(&node, &a).unwrap();
    await_verified(&node, &b).unwrap();
    stage.go_dark().unwrap();
    assert_eq!(run(&cri, &pod, "dark-a", &a), "a");
    assert_eq!(run(&cri, &pod, "dark-b", &b), "b");
}

#[test]
fn containerd_1_alone_streams_from_the_second_pull_on() {
    if can_be_set(&[]) {
        streams_from_the_second_pull_on(Version::V1);
    }
}

#[test]
fn containerd_2_alone_streams_from_the_second_pull_on() {
    if can_be_set(&[Need::Containerd2]) {
        streams_from_the_second_pull_on(Version::V2);
    }
}

#[test]
fn indexing_survives_the_death_of_the_worker() {
    if !can_be_set(&[]) {
        return;
    }
    const SIZE: usize = 96 << 20;
    let (mut stage, options) = alone(Stage::set().unwrap(), Version::V1);
    let large = vec![Entry::file("large", noise(1, SIZE))];
    let large = Image::new().layer(shell().unwrap(), Packing::Gzip).layer(large, Packing::Gzip);
    let large = stage.push("large", &large).unwrap();
    let node = Node::start(&stage.work, &options).unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let cri = stage.cri(&containerd).unwrap();
    stage.count_from_now().unwrap();
    cri.pull(&large.reference, None).unwrap();
    node.crash_worker().unwrap();
    let code = |node: &Node| node.explain(&large.reference).unwrap().decisions[0].code.clone();
    assert_eq!(code(&node), "server.not-imported", "it died too late to show anything");
    await_indexed(&node, &large);
    let fetched: u64 = stage.layer_requests(&large).unwrap().iter().map(|request| request.bytes).sum();
    assert!(fetched <= large.bytes() + ASKING, "{fetched} bytes for {}", large.bytes());
    remove(&containerd, &cri, &node, &large);
    stage.count_from_now().unwrap();
    cri.pull(&large.reference, None).unwrap();
    assert_wholly_lazy(&stage, &node, &large);
    // What a worker of before had answered as lazy is read with windows that only the embedded server has.
    node.set_hydration(true).unwrap();
    await_verified(&node, &large).unwrap();
}

#[test]
fn an_image_is_left_alone_while_its_container_starts() {
    const AFTER: Duration = Duration::from_secs(4);
    if !can_be_set(&[]) {
        return;
    }
    let (mut stage, options) = alone(Stage::set().unwrap(), Version::V1);
    let image = stage.push("app", &image("app")).unwrap();
    let node = Node::start(&stage.work, &NodeOptions { index_after: AFTER, ..options }).unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let cri = stage.cri(&containerd).unwrap();
    stage.count_from_now().unwrap();
    cri.pull(&image.reference, None).unwrap();
    let pulled = Instant::now();
    await_indexed(&node, &image);
    // Its last layer was unpacked a little before the pull ended.
    assert!(pulled.elapsed() > AFTER / 2, "{:?}", pulled.elapsed());
}

fn login() -> Login {
    Login { user: "ada".to_owned(), password: "secret".to_owned() }
}

/// A docker configuration with this login for the image's registry.
fn docker_config(stage: &Stage, image: &Pushed, login: &Login) -> PathBuf {
    let host = image.reference.split('/').next().unwrap();
    let auth = json(&login.user, &login.password);
    let file = stage.work.path().join("config.json");
    std::fs::write(&file, format!("{{\"auths\":{{\"{host}\":{auth}}}}}")).unwrap();
    file
}

fn json(user: &str, password: &str) -> String {
    format!("{{\"username\":\"{user}\",\"password\":\"{password}\"}}")
}

#[test]
fn a_private_image_that_is_indexed_is_lazy_for_those_who_may_read_it() {
    if !can_be_set(&[]) {
        return;
    }
    let (mut stage, options) = alone(Stage::with_login(&login()).unwrap(), Version::V1);
    let image = stage.push("private", &image("private")).unwrap();
    let config = docker_config(&stage, &image, &login());
    let node = Node::start(&stage.work, &NodeOptions { docker_config: Some(config), ..options }).unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let cri = stage.cri(&containerd).unwrap();
    cri.pull(&image.reference, Some(&login())).unwrap();
    await_indexed(&node, &image);
    remove(&containerd, &cri, &node, &image);

    // Pulls that begin within two seconds share one decision.
    let_pass(Duration::from_secs(3));
    docker_config(&stage, &image, &Login { password: "wrong".to_owned(), ..login() });
    stage.count_from_now().unwrap();
    cri.pull(&image.reference, Some(&login())).unwrap();
    await_decision(&node, &image, Outcome::Deferred, "registry.unauthorized").unwrap();
    assert!(layers_of(&node, &image).unwrap().is_empty());
    assert_eq!(stage.fetched_whole(&image).unwrap(), [0, 1]);
    remove(&containerd, &cri, &node, &image);

    let_pass(Duration::from_secs(3));
    docker_config(&stage, &image, &login());
    stage.count_from_now().unwrap();
    cri.pull(&image.reference, Some(&login())).unwrap();
    assert_wholly_lazy(&stage, &node, &image);
}

fn import(node: &Node, arguments: &[&str]) -> anyhow::Result<String> {
    let program: PathBuf = product(CLI).unwrap();
    let socket: &Path = &node.socket();
    let mut command = Command::new(program);
    command.env_remove("MILLSTREAM_SERVER").arg("--socket").arg(socket).arg("import").args(arguments);
    output(&mut command)
}

#[test]
fn an_image_of_another_snapshotter_is_indexed_on_request() {
    if !can_be_set(&[]) {
        return;
    }
    let (mut stage, options) = alone(Stage::set().unwrap(), Version::V1);
    let image = stage.push("app", &image("app")).unwrap();
    let node = Node::start(&stage.work, &options).unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let cri = stage.cri(&containerd).unwrap();
    let error = import(&node, &[&image.reference]).unwrap_err().to_string();
    assert!(error.contains("is not in containerd's content store"), "{error}");

    let certs_d = stage.work.path().join("certs.d").display().to_string();
    let arguments = ["image", "pull", "--hosts-dir", &certs_d, "--snapshotter", "overlayfs", &image.reference];
    containerd.ctr("default", &arguments).unwrap();
    stage.count_from_now().unwrap();
    let error = import(&node, &[&image.reference, "--namespace", "k8s.io"]).unwrap_err().to_string();
    assert!(error.contains("is not in containerd's content store"), "{error}");
    let done = import(&node, &[&image.reference]).unwrap();
    assert!(done.contains("is imported"), "{done}");
    assert_eq!(stage.layer_requests(&image).unwrap().len(), 0, "nothing is asked of the registry");
    cri.pull(&image.reference, None).unwrap();
    assert_wholly_lazy(&stage, &node, &image);
    // What is lazy has left no layers to index, and nothing is downloaded in their place.
    containerd.ctr("default", &["image", "rm", "--sync", &image.reference]).unwrap();
}
