//! Clients beyond those of every run: releases of containerd that `tests/tools/install.sh clients` builds, and nerdctl where the
//! machine has it. `make clients` runs them; the README's table of clients is made of what they show.

#![allow(clippy::unwrap_used, missing_docs)]

use std::process::Command;
use std::time::Duration;

use millstream_e2e::containerd::{Containerd, Version};
use millstream_e2e::cri::ContainerSpec;
use millstream_e2e::daemons::Node;
use millstream_e2e::image::{Image, shell, small};
use millstream_e2e::layer::{Entry, Packing};
use millstream_e2e::need::{CONTAINERDS, Need, program};
use millstream_e2e::process::output;
use millstream_e2e::scenario::{ctr_pull, ctr_run, ensure_ordinary, lazy_by, lazy_by_cri, lazy_by_cri_of};
use millstream_e2e::stage::{Pushed, Stage, can_be_set};

const LAST_1: &str = CONTAINERDS[0];
const FIRST_2: &str = CONTAINERDS[1];
const NEWEST: &str = CONTAINERDS[2];

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
    let node = Node::start(&stage.work, &stage.asking_options(version)).unwrap();
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
    if can_be_set(&[Need::Containerd(FIRST_2)]) {
        lazy_by(Version::Release(FIRST_2), ctr_pull, ctr_run).unwrap();
    }
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

/// What the kernel makes of mode 0644: version 2, then tag, rights and id of owner, group and others.
const MINIMAL_ACL: &[u8] =
    b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x04\0\x04\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";

/// A stage with a containerd that unpacks several layers at a time, where it may.
fn with_parallel_unpacking(version: Version, image: &Image, imported: bool) -> (Stage, Pushed, Node, Containerd) {
    let stage = Stage::set().unwrap();
    let image = if imported { stage.publish("small", image) } else { stage.push("small", image) }.unwrap();
    let node = stage.node_on_demand().unwrap();
    let options = stage.containerd_options(version, node.snapshotter(), true).unwrap();
    let table = "[plugins.\"io.containerd.transfer.v1.local\"]";
    let containerd = Containerd::start_set(&stage.work, options, table, "  max_concurrent_unpacks = 4").unwrap();
    (stage, image, node, containerd)
}

/// Without the capability `rebase` containerd has to unpack in order all the same.
fn parallel_unpacking_changes_nothing(version: Version, need: Need) {
    if !can_be_set(&[need]) {
        return;
    }
    let (mut stage, image, node, containerd) = with_parallel_unpacking(version, &small().unwrap(), true);
    lazy_by_cri_of(&mut stage, &node, &containerd, &image).unwrap();
    drop((containerd, node, stage));

    let (mut stage, image, node, containerd) = with_parallel_unpacking(version, &small().unwrap(), false);
    assert_eq!(says(&mut stage, &containerd, &image), "hello from the middle layer\n");
    ensure_ordinary(&stage, &node, &image).unwrap();
    drop((containerd, node, stage));

    // Lazy below, unpacked above: a layer with an access control list cannot be lazy.
    let unlazy = Entry::file("data/acl", "from the third\n").xattr("system.posix_acl_access", MINIMAL_ACL);
    let data = vec![Entry::directory("data"), Entry::file("data/hello", "hello from below\n")];
    let image = Image::new()
        .layer(shell().unwrap(), Packing::Gzip)
        .layer(data, Packing::Gzip)
        .layer(vec![unlazy], Packing::Gzip)
        .layer(vec![Entry::file("data/top", "and from the top\n")], Packing::Gzip)
        .command(&["/bin/cat", "/data/hello", "/data/acl", "/data/top"]);
    let (mut stage, image, _node, containerd) = with_parallel_unpacking(version, &image, true);
    assert_eq!(says(&mut stage, &containerd, &image), "hello from below\nfrom the third\nand from the top\n");
    assert_eq!(stage.fetched_whole(&image).unwrap(), [2, 3]);
}

/// Pulls by CRI and returns what the image says by default.
fn says(stage: &mut Stage, containerd: &Containerd, image: &Pushed) -> String {
    let mut cri = stage.cri(containerd).unwrap();
    stage.count_from_now().unwrap();
    cri.pull(&image.reference, None).unwrap();
    let pod = cri.run_pod("pod").unwrap();
    let spec = ContainerSpec { image: &image.reference, ..ContainerSpec::default() };
    cri.run(&pod, "says", &spec, Duration::from_secs(30)).unwrap()
}

#[test]
#[ignore = "make clients"]
fn containerd_2_2_unpacking_in_parallel() {
    parallel_unpacking_changes_nothing(Version::V2, Need::Containerd2);
}

#[test]
#[ignore = "make clients"]
fn containerd_2_4_unpacking_in_parallel() {
    parallel_unpacking_changes_nothing(Version::Release(NEWEST), Need::Containerd(NEWEST));
}

const NERDCTL: Need = Need::Program("nerdctl");

/// nerdctl against this containerd, with all its state in the workdir.
fn nerdctl(stage: &Stage, containerd: &Containerd, arguments: &[&str]) -> anyhow::Result<String> {
    let dir = stage.work.dir("nerdctl")?;
    let mut command = Command::new(program("nerdctl").unwrap());
    command.arg("--address").arg(containerd.socket()).args(["--namespace", "default"]);
    command.args(["--snapshotter", containerd.snapshotter(), "--cgroup-manager", "cgroupfs"]);
    command.arg("--hosts-dir").arg(stage.certs_d()).arg("--data-root").arg(dir.join("data"));
    command.arg("--cni-path").arg(dir.join("cni")).arg("--cni-netconfpath").arg(dir.join("net.d"));
    output(command.args(arguments))
}

fn nerdctl_pull(stage: &Stage, containerd: &Containerd, image: &Pushed) -> anyhow::Result<()> {
    nerdctl(stage, containerd, &["pull", &image.reference]).map(drop)
}

fn nerdctl_run(
    stage: &Stage,
    containerd: &Containerd,
    image: &Pushed,
    name: &str,
    command: &[&str],
) -> anyhow::Result<String> {
    let group = stage.work.cgroup();
    let mut arguments = vec!["run", "--rm", "--net", "host", "--pull", "never", "--cgroup-parent", &group];
    arguments.extend(["--name", name, &image.reference]);
    arguments.extend_from_slice(command);
    nerdctl(stage, containerd, &arguments)
}

#[test]
#[ignore = "make clients"]
fn nerdctl_with_containerd_2_2() {
    if can_be_set(&[Need::Containerd2, NERDCTL]) {
        lazy_by(Version::V2, nerdctl_pull, nerdctl_run).unwrap();
    }
}

#[test]
#[ignore = "make clients"]
fn nerdctl_with_containerd_2_4() {
    if can_be_set(&[Need::Containerd(NEWEST), NERDCTL]) {
        lazy_by(Version::Release(NEWEST), nerdctl_pull, nerdctl_run).unwrap();
    }
}

#[test]
#[ignore = "make clients"]
fn nerdctl_with_containerd_1_7() {
    if can_be_set(&[Need::Containerd(LAST_1), NERDCTL]) {
        lazy_by(Version::Release(LAST_1), nerdctl_pull, nerdctl_run).unwrap();
    }
}
