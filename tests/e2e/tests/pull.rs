//! `millstream pull`: what `ctr` of 1.x cannot do, with containerd 1.6 and 2.x.

#![allow(clippy::unwrap_used, missing_docs)]

use std::process::{Command, Output};
use std::time::Duration;

use millstream_e2e::containerd::{Containerd, Version};
use millstream_e2e::daemons::Node;
use millstream_e2e::image::{Image, shell, small};
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::need::{Need, product};
use millstream_e2e::process::{Process, eventually};
use millstream_e2e::spoil::Spoiling;
use millstream_e2e::stage::{CLI, Pushed, Stage, await_decision, can_be_set, layers_of};
use millstream_wire::millstream::v1::decision::Outcome;
use millstream_wire::millstream::v1::layer_status::State;
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(60);
const READ_ALL: [&str; 3] = ["/bin/sh", "-c", "find / -xdev -type f | sort | xargs cat | sha256sum"];

fn command(stage: &Stage, node: &Node, containerd: &Containerd, image: &str, more: &[&str]) -> Command {
    let mut command = Command::new(product(CLI).unwrap());
    // The login of whoever runs the tests is not theirs.
    command.env("DOCKER_CONFIG", stage.work.path());
    command.arg("--socket").arg(node.socket()).args(["--output", "json", "pull", image]);
    command.arg("--containerd").arg(containerd.socket());
    command.arg("--hosts-dir").arg(stage.node_options().certs_d).args(more);
    command
}

fn run(stage: &Stage, node: &Node, containerd: &Containerd, image: &Pushed, more: &[&str]) -> Value {
    let output = command(stage, node, containerd, &image.reference, more).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["image"], image.reference);
    assert_eq!(document["manifest_digest"], image.info.manifest);
    let digests: Vec<&str> =
        document["layers"].as_array().unwrap().iter().map(|layer| layer["digest"].as_str().unwrap()).collect();
    assert_eq!(digests, image.layers());
    document
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn states(document: &Value) -> Vec<&str> {
    document["layers"].as_array().unwrap().iter().map(|layer| layer["state"].as_str().unwrap()).collect()
}

fn lines(containerd: &Containerd, arguments: &[&str]) -> Vec<String> {
    containerd.ctr("default", arguments).unwrap().lines().map(str::to_owned).collect()
}

fn pulls_lazily(version: Version) {
    let mut stage = Stage::set().unwrap();
    let image = stage.publish("small", &small().unwrap()).unwrap();
    let node = stage.node_on_demand().unwrap();
    let containerd = stage.containerd(version, &node, true).unwrap();
    stage.count_from_now().unwrap();
    let first = run(&stage, &node, &containerd, &image, &[]);
    assert_eq!(states(&first), ["lazy"; 3]);
    await_decision(&node, &image, Outcome::Lazy, "").unwrap();
    assert!(stage.fetched_whole(&image).unwrap().is_empty());
    assert!(layers_of(&node, &image).unwrap().iter().all(|layer| layer.state() == State::Lazy));
    let hello = ["/bin/cat", "/data/hello"];
    let said = containerd.ctr_run(&stage.work, "default", &image.reference, "lazy", &hello).unwrap();
    assert_eq!(said, "hello from the middle layer\n");

    // Again: nothing is left to be done, and nobody but the registry's tag is asked.
    stage.count_from_now().unwrap();
    let second = run(&stage, &node, &containerd, &image, &[]);
    assert_eq!(states(&second), ["present"; 3]);
    assert!(stage.layer_requests(&image).unwrap().is_empty());
    assert!(second["seconds"].as_f64().unwrap() < 2.0, "{second}");
    assert!(lines(&containerd, &["leases", "ls", "-q"]).is_empty());

    // Waiting for the rest, which then needs nobody.
    node.set_hydration(true).unwrap();
    run(&stage, &node, &containerd, &image, &["--wait"]);
    assert!(layers_of(&node, &image).unwrap().iter().all(|layer| layer.state() == State::Verified));
    let oracle = stage.oracle().unwrap();
    oracle.ctr_pull("default", &image.reference).unwrap();
    let expected = oracle.ctr_run(&stage.work, "default", &image.reference, "oracle", &READ_ALL).unwrap();
    stage.go_dark().unwrap();
    let dark = containerd.ctr_run(&stage.work, "default", &image.reference, "dark", &READ_ALL).unwrap();
    assert_eq!(dark, expected);

    // The image is containerd's like any other: what it kept goes with it.
    containerd.ctr("default", &["image", "rm", "--sync", &image.reference]).unwrap();
    eventually("removal of the layers", DEADLINE, || node.status().unwrap().layers.is_empty().then_some(())).unwrap();
    assert!(lines(&containerd, &["content", "ls", "-q"]).is_empty());
}

#[test]
fn containerd_1_pulls_lazily() {
    if can_be_set(&[]) {
        pulls_lazily(Version::V1);
    }
}

#[test]
fn containerd_2_pulls_lazily() {
    if can_be_set(&[Need::Containerd2]) {
        pulls_lazily(Version::V2);
    }
}

fn on_a_base(name: &str) -> Image {
    let own = vec![Entry::directory("data"), Entry::file("data/name", name)];
    Image::new().layer(shell().unwrap(), Packing::Gzip).layer(own, Packing::Gzip)
}

fn fetches_and_unpacks_what_is_not_lazy(version: Version) {
    // Without ranges nothing is lazy, and a blob can only be fetched whole.
    let mut stage = Stage::with_spoiler().unwrap();
    stage.spoiler().unwrap().set(Spoiling::NoRange);
    let image = stage.push("small", &small().unwrap()).unwrap();
    let node = stage.node_on_demand().unwrap();
    let containerd = stage.containerd(version, &node, true).unwrap();
    stage.count_from_now().unwrap();
    let document = run(&stage, &node, &containerd, &image, &["--wait"]);
    assert_eq!(states(&document), ["unpacked"; 3]);
    assert_eq!(stage.fetched_whole(&image).unwrap(), [0, 1, 2]);
    let hello = ["/bin/cat", "/data/hello"];
    let said = containerd.ctr_run(&stage.work, "default", &image.reference, "run", &hello).unwrap();
    assert_eq!(said, "hello from the middle layer\n");
    let check = containerd.ctr("default", &["image", "check", "--snapshotter", "millstream"]).unwrap();
    assert!(check.contains("complete (4/4)"), "{check}");
    let archive = stage.work.path().join("archive.tar");
    containerd.ctr("default", &["image", "export", &archive.display().to_string(), &image.reference]).unwrap();

    // A base that is there, another snapshotter, another namespace.
    stage.spoiler().unwrap().set(Spoiling::None);
    let lazy = stage.publish("lazy", &on_a_base("lazy")).unwrap();
    let plain = stage.push("plain", &on_a_base("plain")).unwrap();
    assert_eq!(states(&run(&stage, &node, &containerd, &lazy, &[])), ["present", "lazy"]);
    assert_eq!(states(&run(&stage, &node, &containerd, &plain, &[])), ["present", "unpacked"]);
    let name = ["/bin/cat", "/data/name"];
    assert_eq!(containerd.ctr_run(&stage.work, "default", &plain.reference, "plain", &name).unwrap(), "plain");
    assert_eq!(containerd.ctr_run(&stage.work, "default", &lazy.reference, "named", &name).unwrap(), "lazy");
    let elsewhere = ["--namespace", "elsewhere", "--snapshotter", "overlayfs"];
    assert_eq!(states(&run(&stage, &node, &containerd, &lazy, &elsewhere)), ["unpacked"; 2]);
    assert!(containerd.ctr("elsewhere", &["image", "ls", "-q"]).unwrap().contains(&lazy.reference));
}

#[test]
fn containerd_1_fetches_and_unpacks_what_is_not_lazy() {
    if can_be_set(&[]) {
        fetches_and_unpacks_what_is_not_lazy(Version::V1);
    }
}

#[test]
fn containerd_2_fetches_and_unpacks_what_is_not_lazy() {
    if can_be_set(&[Need::Containerd2]) {
        fetches_and_unpacks_what_is_not_lazy(Version::V2);
    }
}

/// Kills a pull in the middle of its large layer. Gives what of it containerd had by then.
fn interrupt(stage: &Stage, node: &Node, containerd: &Containerd, image: &Pushed) {
    let command = command(stage, node, containerd, &image.reference, &[]);
    let pull = Process::spawn(CLI, command, &stage.work.log("pull")).unwrap();
    eventually("a part of the layer", DEADLINE, || {
        let active = containerd.ctr("default", &["content", "active"]).ok()?;
        let line = active.lines().find(|line| line.contains(&image.layers()[1]))?.to_owned();
        // Sizes are written as "4.2MB" or "4.0 MiB".
        line.contains('M').then_some(())
    })
    .unwrap();
    pull.crash().unwrap();
}

fn goes_on_after_a_kill(version: Version) {
    let mut stage = Stage::with_spoiler().unwrap();
    let large = vec![Entry::file("large", noise(7, 12 << 20))];
    let image = Image::new().layer(shell().unwrap(), Packing::Gzip).layer(large, Packing::Gzip);
    let image = stage.push("large", &image).unwrap();
    let node = stage.node_on_demand().unwrap();
    let containerd = stage.containerd(version, &node, true).unwrap();
    stage.spoiler().unwrap().set(Spoiling::Slow(4 << 20));
    interrupt(&stage, &node, &containerd, &image);
    assert!(lines(&containerd, &["image", "ls", "-q"]).is_empty());
    let left = lines(&containerd, &["leases", "ls", "-q"]);
    assert_eq!(left.len(), 1);

    stage.spoiler().unwrap().set(Spoiling::None);
    stage.count_from_now().unwrap();
    let document = run(&stage, &node, &containerd, &image, &[]);
    assert_eq!(states(&document)[1], "unpacked", "{document}");
    let requests = stage.layer_requests(&image).unwrap();
    let again = requests.iter().filter(|request| request.path.ends_with(&image.layers()[1]) && request.status == 206);
    let again: u64 = again.map(|request| request.bytes).sum();
    let size = image.info.layers[1].size;
    assert!(0 < again && again < size, "{again} of {size} bytes were fetched again: {requests:?}");
    let size = containerd.ctr_run(&stage.work, "default", &image.reference, "run", &["/bin/wc", "-c", "/large"]);
    assert!(size.unwrap().starts_with(&(12 << 20).to_string()));

    // What the killed one left behind is collected with its lease; the image is not.
    containerd.ctr("default", &["leases", "rm", "--sync", &left[0]]).unwrap();
    let snapshots = containerd.ctr("default", &["snapshots", "--snapshotter", "millstream", "ls"]).unwrap();
    assert!(!snapshots.contains("extract-"), "{snapshots}");
    assert_eq!(snapshots.matches("Committed").count(), 2, "{snapshots}");
    assert!(lines(&containerd, &["content", "active"]).iter().all(|line| !line.contains("layer-")));
    assert!(containerd.ctr("default", &["image", "check", "--snapshotter", "millstream"]).unwrap().contains("(3/3)"));
}

#[test]
fn containerd_1_goes_on_after_a_kill() {
    if can_be_set(&[]) {
        goes_on_after_a_kill(Version::V1);
    }
}

#[test]
fn containerd_2_goes_on_after_a_kill() {
    if can_be_set(&[Need::Containerd2]) {
        goes_on_after_a_kill(Version::V2);
    }
}

#[test]
fn what_cannot_be_pulled_is_told_with_the_reason() {
    if !can_be_set(&[]) {
        return;
    }
    let stage = Stage::with_spoiler().unwrap();
    let image = stage.push("small", &small().unwrap()).unwrap();
    let node = stage.node_on_demand().unwrap();
    let containerd = stage.containerd(Version::V1, &node, true).unwrap();
    let missing = image.reference.replace("small", "nosuch");
    let refused = |image: &str, more: &[&str], code: i32| {
        let output = command(&stage, &node, &containerd, image, more).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{image} {more:?}: {}", text(&output));
        text(&output)
    };
    let said = refused(&missing, &[], 4);
    assert!(said.contains("nosuch") && said.contains("404"), "{said}");
    let said = refused(&image.reference, &["--snapshotter", "nosuch"], 1);
    assert!(said.contains("nosuch") && said.contains("hint: containerd has to know"), "{said}");
    let said = refused(&image.reference, &["--platform", "plan9/mips"], 4);
    assert!(said.contains("plan9/mips"), "{said}");
    let said = refused("UPPER", &[], 1);
    assert!(said.contains("UPPER"), "{said}");
    let nobody = ["pull", &image.reference, "--containerd", "/nonexistent.sock"];
    let output = Command::new(product(CLI).unwrap()).args(nobody).output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output).contains("/nonexistent.sock: No such file"), "{}", text(&output));

    // Wrong bytes never become a layer.
    stage.spoiler().unwrap().set(Spoiling::WrongByte);
    let said = refused(&image.reference, &[], 1);
    assert!(said.contains("digest"), "{said}");
    assert!(lines(&containerd, &["image", "ls", "-q"]).is_empty());
    stage.spoiler().unwrap().set(Spoiling::None);
    run(&stage, &node, &containerd, &image, &[]);
}
