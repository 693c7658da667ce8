//! Clients beyond those of every run: releases of containerd that `tests/tools/install.sh clients` builds, and nerdctl where the
//! machine has it. `make clients` runs them; the README's table of clients is made of what they show.

#![allow(clippy::unwrap_used, missing_docs)]

use millstream_e2e::containerd::Version;
use millstream_e2e::image::small;
use millstream_e2e::need::Need;
use millstream_e2e::scenario::{ctr_pull, ctr_run, ensure_ordinary, lazy_by, lazy_by_cri};
use millstream_e2e::stage::{Stage, can_be_set};

const LAST_1: &str = "1.7.35";
const FIRST_2: &str = "2.0.14";
const NEWEST: &str = "2.4.2";

fn lazily_by_cri(release: &'static str, transfer: bool) {
    if can_be_set(&[Need::Containerd(release)]) {
        lazy_by_cri(Version::Release(release), transfer).unwrap();
    }
}

/// A pull with `ctr` and these arguments besides is as without Millstream.
fn ordinarily_by_ctr(version: Version, need: Need, arguments: &[&str]) {
    if !can_be_set(&[need]) {
        return;
    }
    let mut stage = Stage::set().unwrap();
    let image = stage.publish("small", &small().unwrap()).unwrap();
    let node = stage.node_on_demand().unwrap();
    let containerd = stage.containerd(version, &node, true).unwrap();
    stage.count_from_now().unwrap();
    containerd.ctr_pull_with("default", &image.reference, arguments).unwrap();
    ensure_ordinary(&stage, &node, &image).unwrap();
    let said = containerd.ctr_run(&stage.work, "default", &image.reference, "one", &["/bin/cat", "/data/hello"]);
    assert_eq!(said.unwrap(), "hello from the middle layer\n");
}

#[test]
#[ignore = "make clients"]
fn containerd_1_7_by_cri() {
    lazily_by_cri(LAST_1, false);
}

#[test]
#[ignore = "make clients"]
fn containerd_1_7_by_ctr() {
    ordinarily_by_ctr(Version::Release(LAST_1), Need::Containerd(LAST_1), &[]);
}

#[test]
#[ignore = "make clients"]
fn containerd_2_0_by_cri() {
    lazily_by_cri(FIRST_2, false);
}

#[test]
#[ignore = "make clients"]
fn containerd_2_0_by_ctr() {
    ordinarily_by_ctr(Version::Release(FIRST_2), Need::Containerd(FIRST_2), &[]);
}

#[test]
#[ignore = "make clients"]
fn containerd_2_2_by_ctr_without_the_transfer_service() {
    ordinarily_by_ctr(Version::V2, Need::Containerd2, &["--local"]);
}

#[test]
#[ignore = "make clients"]
fn containerd_2_4_by_cri() {
    lazily_by_cri(NEWEST, false);
}

#[test]
#[ignore = "make clients"]
fn containerd_2_4_by_cri_through_the_transfer_service() {
    lazily_by_cri(NEWEST, true);
}

#[test]
#[ignore = "make clients"]
fn containerd_2_4_by_ctr() {
    if can_be_set(&[Need::Containerd(NEWEST)]) {
        lazy_by(Version::Release(NEWEST), ctr_pull, ctr_run).unwrap();
    }
}

#[test]
#[ignore = "make clients"]
fn containerd_2_4_by_ctr_without_the_transfer_service() {
    ordinarily_by_ctr(Version::Release(NEWEST), Need::Containerd(NEWEST), &["--local"]);
}
