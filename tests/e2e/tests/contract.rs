//! The remote contract as a real containerd 2.x plays it: garbage collection, pulls at once, pulls that end half-way, and
//! namespaces. What can be said without containerd is in `crates/snapshots/tests/service`.

#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use millstream_e2e::containerd::{Containerd, MILLSTREAM, Version};
use millstream_e2e::daemons::{Node, NodeOptions};
use millstream_e2e::image::{Image, shell, small};
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::need::Need;
use millstream_e2e::process::{Process, eventually, output};
use millstream_e2e::registry::Login;
use millstream_e2e::spoil::Spoiling;
use millstream_e2e::stage::{Pushed, Stage, await_decision, can_be_set, layers_of};
use millstream_wire::containerd::services::snapshots::v1::Kind;
use millstream_wire::millstream::v1::decision::Outcome;

const DEADLINE: Duration = Duration::from_secs(60);

/// What the node's snapshots are, beside their names: as garbage collection sees them.
fn count(node: &Node, kind: Kind) -> usize {
    node.snapshots().unwrap().iter().filter(|info| info.kind() == kind).count()
}

/// Runs garbage collection and waits for its end.
fn collect_garbage(containerd: &Containerd) {
    containerd.ctr("gc", &["leases", "create", "--id", "sweep"]).unwrap();
    containerd.ctr("gc", &["leases", "delete", "--sync", "sweep"]).unwrap();
}

/// The chain ID of the whole image: what its containers stand on, and what its snapshots are called.
fn top(node: &Node) -> String {
    let all = node.snapshots().unwrap();
    let is_parent = |name: &str| all.iter().any(|info| info.parent == name && info.kind() == Kind::Committed);
    let top = all.iter().find(|info| info.kind() == Kind::Committed && !is_parent(&info.name)).unwrap();
    top.labels["containerd.io/snapshot.ref"].clone()
}

fn hello(stage: &Stage, containerd: &Containerd, namespace: &str, image: &Pushed) -> String {
    let command = &["/bin/cat", "/data/hello"];
    containerd.ctr_run(&stage.work, namespace, &image.reference, "hello", command).unwrap()
}

#[test]
fn garbage_collection_takes_what_nothing_refers_to_and_nothing_else() {
    if !can_be_set(&[Need::Containerd2]) {
        return;
    }
    let stage = Stage::set().unwrap();
    let image = stage.publish("small", &small().unwrap()).unwrap();
    let layers = image.layers().len();
    let node = stage.node_on_demand().unwrap();
    let containerd = stage.containerd(Version::V2, &node, true).unwrap();
    let ctr = |arguments: &[&str]| containerd.ctr("one", arguments).unwrap();
    containerd.ctr_pull("one", &image.reference).unwrap();
    await_decision(&node, &image, Outcome::Lazy, "").unwrap();
    collect_garbage(&containerd);
    assert_eq!((count(&node, Kind::Committed), count(&node, Kind::Active)), (layers, 0), "kept by the image");

    let top = top(&node);
    ctr(&["containers", "create", "--snapshotter", MILLSTREAM, &image.reference, "keeper"]);
    ctr(&["images", "rm", "--sync", &image.reference]);
    assert_eq!((count(&node, Kind::Committed), count(&node, Kind::Active)), (layers, 1), "kept by a container");

    ctr(&["snapshots", "--snapshotter", MILLSTREAM, "label", &top, "containerd.io/gc.root=test"]);
    ctr(&["containers", "rm", "keeper"]);
    collect_garbage(&containerd);
    assert_eq!((count(&node, Kind::Committed), count(&node, Kind::Active)), (layers, 0), "kept by a label");

    ctr(&["snapshots", "--snapshotter", MILLSTREAM, "label", &top, "containerd.io/gc.root="]);
    collect_garbage(&containerd);
    assert_eq!(node.snapshots().unwrap(), [], "kept by nothing");
    let gone = || layers_of(&node, &image).ok()?.is_empty().then_some(());
    eventually("the end of all layers", DEADLINE, gone).unwrap();

    containerd.ctr_pull("one", &image.reference).unwrap();
    assert_eq!(hello(&stage, &containerd, "one", &image), "hello from the middle layer\n");
}

#[test]
fn namespaces_that_pull_at_once_share_the_snapshots() {
    if !can_be_set(&[Need::Containerd2]) {
        return;
    }
    const NAMESPACES: [&str; 4] = ["one", "two", "three", "four"];
    let stage = Stage::set().unwrap();
    let image = stage.publish("small", &small().unwrap()).unwrap();
    let node = stage.node_on_demand().unwrap();
    let containerd = stage.containerd(Version::V2, &node, true).unwrap();
    std::thread::scope(|scope| {
        let pulls = NAMESPACES.map(|namespace| scope.spawn(|| containerd.ctr_pull(namespace, &image.reference)));
        for pull in pulls {
            pull.join().unwrap().unwrap();
        }
    });
    assert_eq!(node.snapshots().unwrap().len(), image.layers().len());
    let (last, others) = NAMESPACES.split_last().unwrap();
    for namespace in others {
        containerd.ctr(namespace, &["images", "rm", "--sync", &image.reference]).unwrap();
        assert_eq!(node.snapshots().unwrap().len(), image.layers().len(), "the other namespaces have it still");
    }
    assert_eq!(hello(&stage, &containerd, last, &image), "hello from the middle layer\n");
    containerd.ctr(last, &["images", "rm", "--sync", &image.reference]).unwrap();
    assert_eq!(node.snapshots().unwrap(), []);
}

#[test]
fn a_pull_that_ends_half_way_is_repeated_and_leaves_nothing() {
    if !can_be_set(&[Need::Containerd2]) {
        return;
    }
    // The bottom layer is lazy. The next has an access control list (one that says what the mode says), so containerd
    // unpacks it.
    let permission = |tag: u8, bits: u8| [tag, 0, bits, 0, 0xff, 0xff, 0xff, 0xff];
    let list = [&[2, 0, 0, 0][..], &permission(1, 6), &permission(4, 4), &permission(0x20, 4)].concat();
    let changed = vec![
        Entry::directory("data"),
        Entry::file("data/hello", "hello from the middle layer\n").xattr("system.posix_acl_access", list),
        Entry::file("data/large", noise(1, 8 << 20)),
    ];
    let image = Image::new().layer(shell().unwrap(), Packing::Gzip).layer(changed, Packing::Gzip);
    let stage = Stage::with_spoiler().unwrap();
    let image = stage.publish("mixed", &image).unwrap();
    let node = stage.node_on_demand().unwrap();
    let containerd = stage.containerd(Version::V2, &node, true).unwrap();
    stage.spoiler().unwrap().set(Spoiling::Slow(64 << 10));
    let command = containerd.ctr_pull_command("one", &image.reference, None, &[]).unwrap();
    let pull = Process::spawn("ctr", command, &stage.work.log("ctr")).unwrap();
    let unpacking = || (count(&node, Kind::Active) == 1).then_some(());
    eventually("the second layer to be unpacked", DEADLINE, unpacking).unwrap();
    assert_eq!(count(&node, Kind::Committed), 1);
    pull.crash().unwrap();

    stage.spoiler().unwrap().set(Spoiling::None);
    containerd.ctr_pull("one", &image.reference).unwrap();
    assert_eq!(hello(&stage, &containerd, "one", &image), "hello from the middle layer\n");
    // The key of the first try is held by the lease of that pull, until it expires.
    let leases = containerd.ctr("one", &["leases", "ls", "-q"]).unwrap();
    for lease in leases.split_whitespace() {
        containerd.ctr("one", &["leases", "delete", "--sync", lease]).unwrap();
    }
    collect_garbage(&containerd);
    assert_eq!((count(&node, Kind::Committed), count(&node, Kind::Active)), (2, 0));
}

#[test]
fn a_namespace_whose_caller_nobody_can_vouch_for_pulls_the_ordinary_way() {
    if !can_be_set(&[Need::Containerd2]) {
        return;
    }
    let login = Login { user: "user".to_owned(), password: "right".to_owned() };
    let mut stage = Stage::with_login(&login).unwrap();
    let image = stage.publish("small", &small().unwrap()).unwrap();
    let config = stage.work.path().join("docker-config.json");
    let host = image.reference.split('/').next().unwrap();
    let auths = serde_json::json!({ "auths": { host: { "username": login.user, "password": login.password } } });
    std::fs::write(&config, auths.to_string()).unwrap();
    let options = NodeOptions { docker_config: Some(config.clone()), hydration: false, ..stage.node_options() };
    let node = Node::start(&stage.work, &options).unwrap();
    let containerd = stage.containerd(Version::V2, &node, true).unwrap();
    output(&mut containerd.ctr_pull_command("one", &image.reference, Some(&login), &[]).unwrap()).unwrap();
    await_decision(&node, &image, Outcome::Lazy, "").unwrap();
    let shared = node.snapshots().unwrap().len();

    // The node has every layer, but cannot prove any more that it may show them. (A decision of a moment ago still serves
    // whoever pulls at the same time.)
    std::fs::write(&config, "{}").unwrap();
    stage.count_from_now().unwrap();
    output(&mut containerd.ctr_pull_command("two", &image.reference, None, &[]).unwrap()).unwrap_err();
    let mut pulls = 0;
    let namespace = eventually("a decision of its own", DEADLINE, || {
        pulls += 1;
        let namespace = format!("two-{pulls}");
        output(&mut containerd.ctr_pull_command(&namespace, &image.reference, Some(&login), &[]).unwrap()).unwrap();
        let decisions = node.explain(&image.reference).unwrap().decisions;
        (decisions[0].outcome() == Outcome::Deferred).then_some(namespace)
    })
    .unwrap();
    await_decision(&node, &image, Outcome::Deferred, "registry.unauthorized").unwrap();
    assert_eq!(stage.fetched_whole(&image).unwrap().len(), image.layers().len());
    assert_eq!(node.snapshots().unwrap().len(), shared + image.layers().len(), "snapshots of its own");
    assert_eq!(hello(&stage, &containerd, &namespace, &image), "hello from the middle layer\n");
}
