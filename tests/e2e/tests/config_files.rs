//! The files of `config/` do what they say, byte for byte, at the places that they name.

#![allow(clippy::unwrap_used, missing_docs)]

use millstream_e2e::containerd::{Containerd, ContainerdOptions, Version};
use millstream_e2e::daemons::Node;
use millstream_e2e::image::{pause, small};
use millstream_e2e::installation::Installation;
use millstream_e2e::need::{CONTAINERDS, Need};
use millstream_e2e::scenario::lazy_by_cri_of;
use millstream_e2e::stage::{Stage, can_be_set};

const V2: &str = include_str!("../../../config/containerd-v2.toml");
const V3: &str = include_str!("../../../config/containerd-v3.toml");
const NODE: &str = include_str!("../../../config/millstreamd.toml");
/// The two lines of `millstreamd.toml` that an installation has to change, or that this test does.
const NO_SERVER: &str = "\naddress = \"\"\n";
const HYDRATION: &str = "\nhydration = true\n";

/// Installs the files, pulls by CRI, runs.
fn an_installation_by_the_book_is_lazy(version: Version, drop_in: &str) {
    let mut stage = Stage::set().unwrap();
    let image = stage.publish("small", &small().unwrap()).unwrap();
    let installation = Installation::new(&stage.work).unwrap();
    installation.put("/etc/containerd/conf.d/millstream.toml", drop_in).unwrap();
    // The image of the pods' own container comes from where a mirror would have it: nothing else needs to be set.
    let pause_image = Containerd::default_pause(version).unwrap();
    let (host, rest) = pause_image.split_once('/').unwrap();
    let (name, tag) = rest.split_once(':').unwrap();
    stage.push_as("pause", &pause().unwrap(), &format!("{name}:{tag}")).unwrap();
    let url = format!("http://{}", stage.registry().unwrap().address());
    for host in [host, &stage.registry().unwrap().host()] {
        let text = format!("server = {url:?}\n\n[host.{url:?}]\n  capabilities = [\"pull\", \"resolve\"]\n");
        installation.put(&format!("/etc/containerd/certs.d/{host}/hosts.toml"), &text).unwrap();
    }
    assert!(NODE.contains(NO_SERVER) && NODE.contains(HYDRATION));
    let settings = NODE.replacen(NO_SERVER, &format!("\naddress = {:?}\n", stage.server_address()), 1);
    let settings = settings.replacen(HYDRATION, "\nhydration = false\n", 1);
    let node = Node::start_in(&stage.work, &installation, &settings).unwrap();
    let certs_d = "/etc/containerd/certs.d".into();
    let snapshotter = node.snapshotter();
    let options = ContainerdOptions { version, snapshotter, pause_image, certs_d, transfer: true, labels: true };
    let containerd = Containerd::start_in(&stage.work, &installation, options).unwrap();
    lazy_by_cri_of(&mut stage, &node, &containerd, &image).unwrap();
}

#[test]
fn the_stanza_for_containerd_1_is_all_that_it_needs() {
    if can_be_set(&[]) {
        an_installation_by_the_book_is_lazy(Version::V1, V2);
    }
}

#[test]
fn the_stanza_for_containerd_2_is_all_that_it_needs() {
    if can_be_set(&[Need::Containerd2]) {
        an_installation_by_the_book_is_lazy(Version::V2, V3);
    }
}

#[test]
#[ignore = "make clients"]
fn the_stanza_for_containerd_1_is_all_that_1_7_needs() {
    if can_be_set(&[Need::Containerd(CONTAINERDS[0])]) {
        an_installation_by_the_book_is_lazy(Version::Release(CONTAINERDS[0]), V2);
    }
}

#[test]
#[ignore = "make clients"]
fn the_stanza_for_containerd_2_is_all_that_2_4_needs() {
    if can_be_set(&[Need::Containerd(CONTAINERDS[2])]) {
        an_installation_by_the_book_is_lazy(Version::Release(CONTAINERDS[2]), V3);
    }
}
