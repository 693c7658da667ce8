//! Clients that do not tell the snapshotter which image they pull: the node finds out, and the image is lazy all the same.

#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use millstream_e2e::containerd::Version;
use millstream_e2e::cri::ContainerSpec;
use millstream_e2e::daemons::Node;
use millstream_e2e::image::{Image, shell, small};
use millstream_e2e::layer::{Entry, Packing};
use millstream_e2e::need::Need;
use millstream_e2e::stage::{Pushed, Stage, await_decision, await_verified, can_be_set, layers_of};
use millstream_wire::millstream::v1::decision::Outcome;
use millstream_wire::millstream::v1::layer_status::State;

const DEADLINE: Duration = Duration::from_secs(30);
const READ_ALL: &str = "find / -xdev -type f | sort | xargs cat | sha256sum";

fn assert_lazy(stage: &Stage, node: &Node, image: &Pushed) {
    // Asked by its name, although no client said it to the node.
    await_decision(node, image, Outcome::Lazy, "").unwrap();
    let named = node.explain(&image.reference).unwrap().decisions.remove(0);
    let repository = image.reference.rsplit_once(':').unwrap().0;
    assert_eq!(named.image, format!("{repository}@{}", named.manifest_digest));
    assert_eq!(named.manifest_digest, image.info.manifest);
    let requests = stage.layer_requests(image).unwrap();
    assert!(requests.iter().all(|request| request.status == 206), "{requests:?}");
    let layers = layers_of(node, image).unwrap();
    assert_eq!(layers.len(), image.layers().len());
    assert!(layers.iter().all(|layer| layer.state() == State::Lazy), "{layers:?}");
}

/// An image on a base that others have too.
fn on_a_base(name: &str) -> Image {
    let own = vec![Entry::directory("data"), Entry::file("data/name", name)];
    Image::new().layer(shell().unwrap(), Packing::Gzip).layer(own, Packing::Gzip)
}

#[test]
fn containerd_2_by_ctr_is_lazy_without_labels_and_needs_nobody_when_hydrated() {
    if !can_be_set(&[Need::Containerd2]) {
        return;
    }
    let mut stage = Stage::set().unwrap();
    let image = stage.publish("small", &small().unwrap()).unwrap();
    let node = Node::start(&stage.work, &stage.asking_options(Version::V2)).unwrap();
    let containerd = stage.unlabelled(Version::V2, &node).unwrap();
    stage.count_from_now().unwrap();
    containerd.ctr_pull("default", &image.reference).unwrap();
    assert_lazy(&stage, &node, &image);
    let oracle = stage.oracle().unwrap();
    oracle.ctr_pull("default", &image.reference).unwrap();
    let script = ["/bin/sh", "-c", READ_ALL];
    let expected = oracle.ctr_run(&stage.work, "default", &image.reference, "oracle", &script).unwrap();
    let lazily = containerd.ctr_run(&stage.work, "default", &image.reference, "lazy", &script).unwrap();
    assert_eq!(lazily, expected);

    node.set_hydration(true).unwrap();
    await_verified(&node, &image).unwrap();
    stage.go_dark().unwrap();
    let dark = containerd.ctr_run(&stage.work, "default", &image.reference, "dark", &script).unwrap();
    assert_eq!(dark, expected);
}

#[test]
fn containerd_1_by_cri_is_lazy_with_its_default_settings() {
    if !can_be_set(&[]) {
        return;
    }
    let mut stage = Stage::set().unwrap();
    let image = stage.publish("small", &small().unwrap()).unwrap();
    let node = Node::start(&stage.work, &stage.asking_options(Version::V1)).unwrap();
    let containerd = stage.unlabelled(Version::V1, &node).unwrap();
    let mut cri = stage.cri(&containerd).unwrap();
    stage.count_from_now().unwrap();
    cri.pull(&image.reference, None).unwrap();
    assert_lazy(&stage, &node, &image);
    let pod = cri.run_pod("pod").unwrap();
    let spec = ContainerSpec { image: &image.reference, ..ContainerSpec::default() };
    assert_eq!(cri.run(&pod, "default", &spec, DEADLINE).unwrap(), "hello from the middle layer\n");
}

#[test]
fn images_on_one_base_are_told_apart() {
    if !can_be_set(&[Need::Containerd2]) {
        return;
    }
    let mut stage = Stage::set().unwrap();
    let first = stage.publish("first", &on_a_base("first")).unwrap();
    let second = stage.publish("second", &on_a_base("second")).unwrap();
    let foreign = stage.push("foreign", &on_a_base("foreign")).unwrap();
    assert_eq!(first.layers()[0], second.layers()[0]);
    let node = Node::start(&stage.work, &stage.asking_options(Version::V2)).unwrap();
    let containerd = stage.unlabelled(Version::V2, &node).unwrap();
    let hosts = stage.node_options().certs_d.display().to_string();
    let run = |image: &Pushed, id: &str| {
        containerd.ctr_run(&stage.work, "default", &image.reference, id, &["/bin/cat", "/data/name"]).unwrap()
    };

    // The content store knows all three when the first of them is pulled with this snapshotter.
    for image in [&foreign, &second, &first] {
        let arguments = ["image", "pull", "--hosts-dir", &hosts, "--snapshotter", "overlayfs", &image.reference];
        containerd.ctr("default", &arguments).unwrap();
    }
    containerd.ctr_pull("default", &second.reference).unwrap();
    await_decision(&node, &second, Outcome::Lazy, "").unwrap();
    assert_eq!(run(&second, "second"), "second");
    containerd.ctr_pull("default", &first.reference).unwrap();
    await_decision(&node, &first, Outcome::Lazy, "").unwrap();
    assert_eq!(run(&first, "first"), "first");
    assert_eq!(layers_of(&node, &first).unwrap().len(), 2);

    // Nothing was imported for this one, but its base is that of others.
    let elsewhere = "elsewhere";
    for image in [&second, &foreign] {
        let arguments = ["image", "pull", "--hosts-dir", &hosts, "--snapshotter", "overlayfs", &image.reference];
        containerd.ctr(elsewhere, &arguments).unwrap();
    }
    containerd.ctr_pull(elsewhere, &foreign.reference).unwrap();
    await_decision(&node, &foreign, Outcome::Deferred, "server.not-imported").unwrap();
    let said =
        containerd.ctr_run(&stage.work, elsewhere, &foreign.reference, "foreign", &["/bin/cat", "/data/name"]).unwrap();
    assert_eq!(said, "foreign");
    let _ = &mut stage;
}

#[test]
fn a_node_that_may_not_ask_leaves_the_image_to_containerd() {
    if !can_be_set(&[Need::Containerd2]) {
        return;
    }
    let stage = Stage::set().unwrap();
    let image = stage.publish("small", &small().unwrap()).unwrap();
    let node = stage.node_on_demand().unwrap();
    let containerd = stage.unlabelled(Version::V2, &node).unwrap();
    containerd.ctr_pull("default", &image.reference).unwrap();
    await_decision(&node, &image, Outcome::Deferred, "labels.missing").unwrap();
    let run = containerd.ctr_run(&stage.work, "default", &image.reference, "run", &["/bin/cat", "/data/hello"]);
    assert_eq!(run.unwrap(), "hello from the middle layer\n");
}
