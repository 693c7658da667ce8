//! The mount under running containers goes: with both processes, by an abort of the connection, or taken away by somebody.

#![allow(clippy::unwrap_used, missing_docs)]

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use millstream_e2e::containerd::{Containerd, Version};
use millstream_e2e::cri::{Container, ContainerSpec, Cri, Pod};
use millstream_e2e::daemons::Node;
use millstream_e2e::image::small;
use millstream_e2e::process::{eventually, output};
use millstream_e2e::stage::{Pushed, Stage, await_verified, can_be_set};

const DEADLINE: Duration = Duration::from_secs(60);
const LOST: &str = "store.mounts-lost";

struct World {
    stage: Stage,
    image: Pushed,
    node: Node,
    containerd: Containerd,
    cri: Cri,
    pod: Pod,
    running: Container,
}

impl World {
    /// A verified image, a container of it that runs, and everything else down.
    fn new() -> Self {
        let mut stage = Stage::set().unwrap();
        let image = stage.publish("small", &small().unwrap()).unwrap();
        let node = Node::start(&stage.work, &stage.node_options()).unwrap();
        let containerd = stage.containerd(Version::V1, &node, false).unwrap();
        let mut cri = stage.cri(&containerd).unwrap();
        cri.pull(&image.reference, None).unwrap();
        await_verified(&node, &image).unwrap();
        let pod = cri.run_pod("pod").unwrap();
        let command = &["/bin/sleep", "1000"];
        let spec = ContainerSpec { image: &image.reference, command, ..ContainerSpec::default() };
        let running = cri.create(&pod, "running", &spec).unwrap();
        cri.start(&running).unwrap();
        stage.go_dark().unwrap();
        Self { stage, image, node, containerd, cri, pod, running }
    }

    /// A new container works.
    fn runs(&self, name: &str) {
        let spec = ContainerSpec { image: &self.image.reference, ..ContainerSpec::default() };
        let mut attempt = 0;
        // containerd waits some seconds before it connects again.
        let said = eventually("a new container", DEADLINE, || {
            attempt += 1;
            self.cri.run(&self.pod, &format!("{name}-{attempt}"), &spec, DEADLINE).ok()
        });
        assert_eq!(said.unwrap(), "hello from the middle layer\n");
    }

    fn root_of_running(&self) -> std::path::PathBuf {
        self.containerd.rootfs("k8s.io", &self.running.id)
    }

    fn lost(&self) -> Vec<String> {
        let damages = self.node.status().unwrap().damages.into_iter();
        damages.filter(|damage| damage.code == LOST).map(|damage| damage.object).collect()
    }

    /// The container that ran is named, until it is gone.
    fn is_named_until_it_is_removed(&mut self) {
        let root = self.root_of_running();
        let name = eventually("the name of what was lost", DEADLINE, || {
            let lost = self.lost();
            lost.iter().any(|place| Path::new(place) == root).then_some(lost)
        });
        assert_eq!(name.unwrap().len(), 1);
        let log = std::fs::read_to_string(self.node.log()).unwrap();
        assert!(log.lines().any(|line| line.contains("damage found") && line.contains(LOST)));
        // A later worker knows it, too, and does not take the new container's mount for lost.
        self.node.crash_worker().unwrap();
        assert_eq!(self.lost(), [root.display().to_string()]);
        self.cri.remove(&self.running).unwrap();
        eventually("the end of what was lost", DEADLINE, || self.lost().is_empty().then_some(())).unwrap();
    }
}

#[test]
fn containers_that_lost_their_mount_with_both_processes_are_named() {
    if !can_be_set(&[]) {
        return;
    }
    let mut world = World::new();
    let workers = world.node.workers();
    world.node.crash().unwrap();
    for pid in workers.into_iter().filter_map(rustix::process::Pid::from_raw) {
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
    }
    world.node.launch().unwrap();
    world.runs("after");
    world.is_named_until_it_is_removed();
}

#[test]
fn after_an_abort_of_the_connection_there_is_a_new_mount() {
    if !can_be_set(&[]) {
        return;
    }
    let mut world = World::new();
    let device = std::fs::metadata(world.node.root().join("m")).unwrap().dev();
    let number = rustix::fs::minor(device);
    // Mounted anew, because a machine need not have it in its usual place.
    let control = world.stage.work.dir("fusectl").unwrap();
    output(Command::new("mount").args(["-t", "fusectl", "fusectl"]).arg(&control)).unwrap();
    let aborted = std::fs::write(control.join(number.to_string()).join("abort"), "1");
    output(Command::new("umount").arg(&control)).unwrap();
    aborted.unwrap();
    world.runs("after");
    world.is_named_until_it_is_removed();
    let again = std::fs::metadata(world.node.root().join("m")).unwrap().dev();
    assert_ne!(device, again);
}

#[test]
fn a_mount_that_is_taken_away_comes_back_and_containers_do_not_notice() {
    if !can_be_set(&[]) {
        return;
    }
    let world = World::new();
    let mount = world.node.root().join("m");
    output(Command::new("umount").arg("-l").arg(&mount)).unwrap();
    world.runs("after");
    let hello = std::fs::read_to_string(world.root_of_running().join("data/hello")).unwrap();
    assert_eq!(hello, "hello from the middle layer\n");
    // Not only what was cached.
    std::fs::write("/proc/sys/vm/drop_caches", "3").ok();
    assert!(std::fs::read(world.root_of_running().join("bin/busybox")).unwrap().len() > 100_000);
    assert_eq!(world.lost(), Vec::<String>::new());
    drop(world.stage);
}

#[test]
fn after_a_reboot_without_network_hydrated_images_start() {
    if !can_be_set(&[]) {
        return;
    }
    let mut world = World::new();
    // What a reboot ends: processes, mounts, and what was below /run.
    world.cri.remove(&world.running).unwrap();
    world.cri.remove_pods().unwrap();
    let workers = world.node.workers();
    world.node.crash().unwrap();
    for pid in workers.into_iter().filter_map(rustix::process::Pid::from_raw) {
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
    }
    output(Command::new("umount").arg("-l").arg(world.node.root().join("m"))).unwrap();
    std::fs::remove_file(world.node.socket()).unwrap();
    world.node.launch().unwrap();
    world.containerd.restart().unwrap();
    world.cri = world.stage.cri(&world.containerd).unwrap();
    world.pod = world.cri.run_pod("again").unwrap();
    world.runs("after");
    assert!(world.node.status().unwrap().damages.is_empty());
}
