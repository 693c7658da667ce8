//! What programs do in a container has the same results on Millstream as on containerd's own overlayfs.

#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use millstream_e2e::containerd::{Containerd, Version};
use millstream_e2e::cri::ContainerSpec;
use millstream_e2e::daemons::Node;
use millstream_e2e::debian;
use millstream_e2e::need::Need;
use millstream_e2e::stage::{Pushed, Stage, await_decision, await_verified, can_be_set};
use millstream_wire::millstream::v1::decision::Outcome;

const DEADLINE: Duration = Duration::from_secs(120);
const SCRIPT: &str = include_str!("behaviour.sh");

fn run(stage: &Stage, containerd: &Containerd, image: &Pushed, pod: &str) -> String {
    let mut cri = stage.cri(containerd).unwrap();
    cri.pull(&image.reference, None).unwrap();
    let pod = cri.run_pod(pod).unwrap();
    let command = &["/bin/bash", "-c", SCRIPT];
    let spec = ContainerSpec { image: &image.reference, command, env: &[("LC_ALL", "C")], ..ContainerSpec::default() };
    cri.run(&pod, "script", &spec, DEADLINE).unwrap()
}

fn assert_same(expected: &str, found: &str) {
    let mut heading = "";
    for (number, (expected, found)) in expected.lines().zip(found.lines()).enumerate() {
        if expected.starts_with("== ") {
            heading = expected;
        }
        assert_eq!(expected, found, "line {number} of the output, under {heading:?}");
    }
    assert_eq!(expected.lines().count(), found.lines().count());
}

#[test]
fn programs_do_on_millstream_what_they_do_on_overlayfs() {
    if !can_be_set(&[Need::Program(debian::PROGRAM)]) {
        return;
    }
    let image = debian::image().unwrap();
    let stage = Stage::set().unwrap();
    let image = stage.publish("debian", &image).unwrap();
    let expected = run(&stage, &stage.oracle().unwrap(), &image, "true");
    // The script itself works: its own headings and some of what must come out.
    for line in [
        "== removing, and making again",
        "42",
        "replaced",
        "only root may read this",
        "du of a directory sees its files",
    ] {
        assert!(expected.lines().any(|found| found == line), "{line:?} is missing in:\n{expected}");
    }

    let node = Node::start(&stage.work, &stage.node_options()).unwrap();
    node.set_hydration(false).unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    assert_same(&expected, &run(&stage, &containerd, &image, "lazy"));
    await_decision(&node, &image, Outcome::Lazy, "").unwrap();
    node.set_hydration(true).unwrap();
    await_verified(&node, &image).unwrap();
    assert_same(&expected, &run(&stage, &containerd, &image, "local"));
}
