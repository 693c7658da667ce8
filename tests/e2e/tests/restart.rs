//! The daemon may end or die at any time, with everything else down: what was lazy or local stays what it was.

#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use millstream_e2e::containerd::{Containerd, MILLSTREAM, Version};
use millstream_e2e::cri::{ContainerSpec, Cri, Pod};
use millstream_e2e::daemons::Node;
use millstream_e2e::image::{Image, shell};
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::process::eventually;
use millstream_e2e::stage::{Pushed, Stage, await_verified, can_be_set, layers_of};
use millstream_e2e::tree::{Contents, Tree};
use millstream_wire::millstream::v1::layer_status::State;
use sha2::{Digest as _, Sha256};

const DEADLINE: Duration = Duration::from_secs(60);
const SIZE: usize = 24 << 20;

fn image() -> Image {
    let files = vec![
        Entry::directory("data"),
        Entry::file("data/large", noise(1, SIZE)),
        Entry::file("data/hello", "hello\n").mtime(1_600_000_000, 5).xattr("user.a", "b"),
        Entry::hard_link("data/again", "data/hello").mtime(1_600_000_000, 5),
    ];
    let above = vec![Entry::directory("data"), Entry::whiteout("data/again"), Entry::file("data/top", "top")];
    Image::new().layer(shell().unwrap(), Packing::Gzip).layer(files, Packing::Gzip).layer(above, Packing::Gzip)
}

fn large_sum() -> String {
    hex::encode(Sha256::digest(noise(1, SIZE)))
}

/// What a new container's root shows, with all content.
fn look(containerd: &Containerd, cri: &Cri, pod: &Pod, image: &Pushed, name: &str) -> (Tree, Contents) {
    let command = &["/bin/sleep", "1000"];
    let spec = ContainerSpec { image: &image.reference, command, ..ContainerSpec::default() };
    let container = cri.create(pod, name, &spec).unwrap();
    cri.start(&container).unwrap();
    let root = containerd.rootfs("k8s.io", &container.id);
    let tree = Tree::read(&root).unwrap();
    let contents = Contents::read(&root, &tree, 1).unwrap();
    cri.remove(&container).unwrap();
    (tree, contents)
}

fn snapshots(containerd: &Containerd) -> Option<Vec<String>> {
    let list = containerd.ctr("k8s.io", &["snapshots", "--snapshotter", MILLSTREAM, "list"]).ok()?;
    let mut names: Vec<String> = list.lines().skip(1).map(str::to_owned).collect();
    // Those of containers come and go.
    names.retain(|line| line.split_whitespace().last() == Some("Committed"));
    names.sort();
    Some(names)
}

fn survives(restart: impl FnOnce(&mut Node)) {
    let mut stage = Stage::set().unwrap();
    let image = stage.publish("app", &image()).unwrap();
    let mut node = Node::start(&stage.work, &stage.node_options()).unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let mut cri = stage.cri(&containerd).unwrap();
    cri.pull(&image.reference, None).unwrap();
    await_verified(&node, &image).unwrap();
    let pod = cri.run_pod("before").unwrap();
    let (tree, contents) = look(&containerd, &cri, &pod, &image, "before");
    let known = snapshots(&containerd).unwrap();
    assert!(known.len() >= image.layers().len(), "{known:?}");
    // Its own container stands on the mount that is about to go.
    cri.remove_pods().unwrap();
    stage.go_dark().unwrap();

    restart(&mut node);
    assert!(layers_of(&node, &image).unwrap().iter().all(|layer| layer.state() == State::Verified));
    // containerd waits some seconds before it connects again.
    let again = eventually("the list of snapshots", DEADLINE, || snapshots(&containerd)).unwrap();
    assert_eq!(again, known);
    let pod = cri.run_pod("after").unwrap();
    let (tree_again, contents_again) = look(&containerd, &cri, &pod, &image, "after");
    let differences = tree.differences(&tree_again);
    // The root of a container is made with it.
    let unexpected: Vec<_> = differences.lines().iter().filter(|line| !line.starts_with("/: mtime")).collect();
    assert!(unexpected.is_empty(), "{unexpected:#?}");
    assert_eq!(contents.differences(&contents_again).to_string(), "");
}

#[test]
fn a_stopped_daemon_comes_back_with_registry_and_server_down() {
    if can_be_set(&[]) {
        survives(|node| {
            node.stop().unwrap();
            node.launch().unwrap();
        });
    }
}

#[test]
fn a_daemon_that_died_with_its_worker_comes_back_with_registry_and_server_down() {
    if can_be_set(&[]) {
        survives(|node| {
            let workers = node.workers();
            assert_eq!(workers.len(), 1);
            node.crash().unwrap();
            for pid in workers.into_iter().filter_map(rustix::process::Pid::from_raw) {
                // It may have ended by itself when its supervisor did.
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
            }
            node.launch().unwrap();
        });
    }
}

/// Containers that read, before and after a worker died, bytes that are here or are not.
fn reads_go_on(hydrated: bool) {
    let stage = Stage::set().unwrap();
    let image = stage.publish("app", &image()).unwrap();
    let node = stage.node_on_demand().unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let mut cri = stage.cri(&containerd).unwrap();
    cri.pull(&image.reference, None).unwrap();
    if hydrated {
        node.set_hydration(true).unwrap();
        await_verified(&node, &image).unwrap();
    }
    let pod = cri.run_pod("pod").unwrap();
    // Reads of 4 KiB past the page cache, so that each of them needs a worker; it ends when the file `stop` appears.
    let script = "until [ -e /tmp/stop ]; do
        dd if=/data/large bs=4096 iflag=direct 2>/tmp/error | sha256sum || exit 1
        [ -s /data/top ] && ls -l /data >/dev/null || exit 2
    done";
    let command = &["/bin/sh", "-c", script];
    let spec = ContainerSpec { image: &image.reference, command, ..ContainerSpec::default() };
    let container = cri.create(&pod, "reader", &spec).unwrap();
    cri.start(&container).unwrap();
    let rounds = || cri.output(&container).unwrap_or_default().lines().count();
    for _ in 0..3 {
        let before = rounds();
        node.crash_worker().unwrap();
        eventually("another round of reads", DEADLINE, || (rounds() > before + 1).then_some(())).unwrap();
    }
    let root = containerd.rootfs("k8s.io", &container.id);
    std::fs::write(root.join("tmp/stop"), "").unwrap();
    let ended = cri.wait(&container, DEADLINE).unwrap();
    assert_eq!(ended.exit_code, 0, "{}", ended.output);
    let expected = format!("{}  -", large_sum());
    assert!(ended.output.lines().all(|line| line == expected), "{}", ended.output);
}

#[test]
fn cold_reads_go_on_when_the_worker_dies() {
    if can_be_set(&[]) {
        reads_go_on(false);
    }
}

#[test]
fn reads_of_local_bytes_go_on_when_the_worker_dies() {
    if can_be_set(&[]) {
        reads_go_on(true);
    }
}
