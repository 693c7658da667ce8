//! Whatever is wrong, a pull ends as it would without Millstream, hardly later, and the node says why.

#![allow(clippy::unwrap_used, missing_docs)]

use std::net::TcpListener;
use std::time::Duration;

use millstream_e2e::containerd::Version;
use millstream_e2e::cri::{ContainerSpec, Cri, Pod};
use millstream_e2e::daemons::{Node, NodeOptions};
use millstream_e2e::image::{Image, shell, small};
use millstream_e2e::layer::{Entry, Packing};
use millstream_e2e::need::Need;
use millstream_e2e::process::eventually;
use millstream_e2e::registry::Login;
use millstream_e2e::spoil::Spoiling;
use millstream_e2e::stage::{Pushed, Stage, await_decision, await_verified, can_be_set, layers_of};
use millstream_wire::millstream::v1::decision::Outcome;

const DEADLINE: Duration = Duration::from_secs(30);
/// What a decision may cost: its deadline of one second, and some time to start a busy machine's threads.
const DELAY: Duration = Duration::from_millis(1500);

/// Pulls by CRI and asserts that every layer came whole, that the container runs, and what the node says of it. Returns how
/// long the pull took.
fn assert_ordinary(stage: &mut Stage, node: &Node, image: &Pushed, code: &str) -> Duration {
    let containerd = stage.containerd(Version::V1, node, false).unwrap();
    let mut cri = stage.cri(&containerd).unwrap();
    let pod = cri.run_pod("pod").unwrap();
    stage.count_from_now().unwrap();
    let took = cri.pull(&image.reference, None).unwrap();
    await_decision(node, image, Outcome::Deferred, code).unwrap();
    assert_eq!(stage.fetched_whole(image).unwrap(), (0..image.layers().len()).collect::<Vec<_>>());
    assert!(layers_of(node, image).unwrap().is_empty());
    assert_eq!(hello(&cri, &pod, image, "ordinary"), "hello from the middle layer\n");
    took
}

fn hello(cri: &Cri, pod: &Pod, image: &Pushed, name: &str) -> String {
    let spec = ContainerSpec { image: &image.reference, ..ContainerSpec::default() };
    cri.run(pod, name, &spec, DEADLINE).unwrap()
}

/// How long the same pull takes on overlayfs, in the same workdir.
fn ordinary_time(stage: &Stage, image: &Pushed) -> Duration {
    let oracle = stage.oracle().unwrap();
    stage.cri(&oracle).unwrap().pull(&image.reference, None).unwrap()
}

#[test]
fn a_server_that_is_down_delays_nothing() {
    if !can_be_set(&[]) {
        return;
    }
    let mut stage = Stage::set().unwrap();
    let image = stage.publish("small", &small().unwrap()).unwrap();
    let ordinary = ordinary_time(&stage, &image);
    stage.stop_server().unwrap();
    let node = stage.node_on_demand().unwrap();
    let took = assert_ordinary(&mut stage, &node, &image, "server.unreachable");
    assert!(took < ordinary + DELAY, "{took:?}, on overlayfs {ordinary:?}");
}

#[test]
fn a_server_that_never_answers_delays_the_pull_by_one_deadline() {
    if !can_be_set(&[]) {
        return;
    }
    let mut stage = Stage::set().unwrap();
    let image = stage.publish("small", &small().unwrap()).unwrap();
    let ordinary = ordinary_time(&stage, &image);
    // The kernel accepts for it, and nobody reads.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = format!("http://{}", mute.local_addr().unwrap());
    let node = Node::start(&stage.work, &NodeOptions { server, hydration: false, ..stage.node_options() }).unwrap();
    let took = assert_ordinary(&mut stage, &node, &image, "server.slow");
    assert!(took < ordinary + DELAY, "{took:?}, on overlayfs {ordinary:?}");
}

#[test]
fn an_image_that_is_not_imported_comes_the_ordinary_way() {
    if !can_be_set(&[]) {
        return;
    }
    let mut stage = Stage::set().unwrap();
    let image = stage.push("small", &small().unwrap()).unwrap();
    let ordinary = ordinary_time(&stage, &image);
    let node = stage.node_on_demand().unwrap();
    let took = assert_ordinary(&mut stage, &node, &image, "server.not-imported");
    assert!(took < ordinary + DELAY, "{took:?}, on overlayfs {ordinary:?}");
}

#[test]
fn an_image_with_a_bottom_layer_that_cannot_be_lazy_comes_the_ordinary_way() {
    if !can_be_set(&[]) {
        return;
    }
    let mut stage = Stage::without_packed_content().unwrap();
    let data = vec![Entry::directory("data"), Entry::file("data/hello", "hello from the middle layer\n")];
    let mut base = shell().unwrap();
    // One frame of more than 16 MiB cannot be entered.
    base.push(Entry::file("zeros", vec![0; 20 << 20]));
    let image =
        Image::new().layer(base, Packing::Zstd).layer(data, Packing::Gzip).command(&["/bin/cat", "/data/hello"]);
    let image = stage.publish("zstd", &image).unwrap();
    let node = stage.node_on_demand().unwrap();
    assert_ordinary(&mut stage, &node, &image, "image.not-eligible");
}

#[test]
fn a_registry_without_ranges_gives_whole_layers() {
    if !can_be_set(&[]) {
        return;
    }
    let mut stage = Stage::with_spoiler().unwrap();
    let image = stage.publish("small", &small().unwrap()).unwrap();
    stage.spoiler().unwrap().set(Spoiling::NoRange);
    let node = stage.node_on_demand().unwrap();
    assert_ordinary(&mut stage, &node, &image, "registry.no-range");
}

fn login() -> Login {
    Login { user: "user".to_owned(), password: "right".to_owned() }
}

/// A docker `config.json` with this login.
fn docker_config(stage: &Stage, image: &Pushed, login: &Login) -> std::path::PathBuf {
    let host = image.reference.split('/').next().unwrap();
    let file = stage.work.path().join("docker-config.json");
    let text = serde_json::json!({ "auths": { host: { "username": login.user, "password": login.password } } });
    std::fs::write(&file, text.to_string()).unwrap();
    file
}

/// The small image and another one of the same layers in another order, which has no chain ID in common with it.
fn two_of_the_same_layers() -> (Image, Image) {
    let data = || vec![Entry::directory("data"), Entry::file("data/hello", "hello from the middle layer\n")];
    let one = Image::new().layer(shell().unwrap(), Packing::Gzip).layer(data(), Packing::Gzip);
    let other = Image::new().layer(data(), Packing::Gzip).layer(shell().unwrap(), Packing::Gzip);
    (one.command(&["/bin/cat", "/data/hello"]), other.command(&["/bin/cat", "/data/hello"]))
}

#[test]
fn a_node_without_a_right_to_read_gives_nothing_although_it_has_every_layer() {
    if !can_be_set(&[]) {
        return;
    }
    let mut stage = Stage::with_login(&login()).unwrap();
    let (one, other) = two_of_the_same_layers();
    let (one, other) = (stage.publish("one", &one).unwrap(), stage.publish("other", &other).unwrap());
    let config = docker_config(&stage, &one, &login());
    let options = NodeOptions { docker_config: Some(config.clone()), ..stage.node_options() };
    let node = Node::start(&stage.work, &options).unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let cri = stage.cri(&containerd).unwrap();

    // Who may read streams.
    stage.count_from_now().unwrap();
    cri.pull(&one.reference, Some(&login())).unwrap();
    await_decision(&node, &one, Outcome::Lazy, "").unwrap();
    assert!(stage.fetched_whole(&one).unwrap().is_empty());
    await_verified(&node, &one).unwrap();

    // From now on the node has no credential.
    std::fs::write(&config, "{}").unwrap();
    let wrong = Login { password: "wrong".to_owned(), ..login() };
    let oracle = stage.oracle().unwrap();
    let truth = stage.cri(&oracle).unwrap();
    for bad in [None, Some(&wrong)] {
        let refused = cri.pull(&other.reference, bad).unwrap_err();
        let expected = truth.pull(&other.reference, bad).unwrap_err();
        assert_eq!(format!("{refused:#}"), format!("{expected:#}"));
    }
    assert!(node.explain(&other.reference).unwrap().decisions.is_empty());
    stage.count_from_now().unwrap();
    cri.pull(&other.reference, Some(&login())).unwrap();
    await_decision(&node, &other, Outcome::Deferred, "registry.unauthorized").unwrap();
    assert_eq!(stage.fetched_whole(&other).unwrap(), [0, 1]);
}

#[test]
fn switching_streaming_off_is_for_new_images_only_and_can_be_undone() {
    if !can_be_set(&[]) {
        return;
    }
    let mut stage = Stage::set().unwrap();
    let first = stage.publish("first", &small().unwrap()).unwrap();
    let other = |text: &str| {
        let data = vec![Entry::directory("data"), Entry::file("data/hello", text)];
        Image::new()
            .layer(data, Packing::Gzip)
            .layer(shell().unwrap(), Packing::Gzip)
            .command(&["/bin/cat", "/data/hello"])
    };
    let second = stage.publish("second", &other("second\n")).unwrap();
    let third = stage.publish("third", &other("third\n")).unwrap();
    let node = stage.node_on_demand().unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let mut cri = stage.cri(&containerd).unwrap();
    let pod = cri.run_pod("pod").unwrap();
    cri.pull(&first.reference, None).unwrap();
    await_decision(&node, &first, Outcome::Lazy, "").unwrap();

    node.set_streaming(false).unwrap();
    assert!(!node.status().unwrap().streaming_enabled);
    // Cold: nothing of it was read until now.
    assert_eq!(hello(&cri, &pod, &first, "first"), "hello from the middle layer\n");
    stage.count_from_now().unwrap();
    cri.pull(&second.reference, None).unwrap();
    await_decision(&node, &second, Outcome::Deferred, "node.streaming-off").unwrap();
    assert_eq!(stage.fetched_whole(&second).unwrap(), [0, 1]);
    assert_eq!(hello(&cri, &pod, &second, "second"), "second\n");

    node.set_streaming(true).unwrap();
    stage.count_from_now().unwrap();
    cri.pull(&third.reference, None).unwrap();
    await_decision(&node, &third, Outcome::Lazy, "").unwrap();
    assert!(stage.fetched_whole(&third).unwrap().is_empty());
    assert_eq!(hello(&cri, &pod, &third, "third"), "third\n");
}

#[test]
fn an_image_that_is_wholly_on_the_node_needs_no_server_for_another_namespace() {
    if !can_be_set(&[Need::Containerd2]) {
        return;
    }
    let mut stage = Stage::set().unwrap();
    let image = stage.publish("small", &small().unwrap()).unwrap();
    let node = Node::start(&stage.work, &stage.node_options()).unwrap();
    let containerd = stage.containerd(Version::V2, &node, true).unwrap();
    containerd.ctr_pull("one", &image.reference).unwrap();
    await_decision(&node, &image, Outcome::Lazy, "").unwrap();
    await_verified(&node, &image).unwrap();
    // Decisions are remembered for a while; a new worker has none.
    node.crash_worker().unwrap();
    stage.stop_server().unwrap();
    stage.count_from_now().unwrap();
    let again = || containerd.ctr_pull("other", &image.reference).ok();
    eventually("containerd to connect to the new worker", DEADLINE, again).unwrap();
    await_decision(&node, &image, Outcome::Local, "").unwrap();
    assert!(stage.fetched_whole(&image).unwrap().is_empty());
    let hello = containerd.ctr_run(&stage.work, "other", &image.reference, "one", &["/bin/cat", "/data/hello"]);
    assert_eq!(hello.unwrap(), "hello from the middle layer\n");
}
