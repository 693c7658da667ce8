//! An image that was built anew with one changed file costs little more than that file.

#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use millstream_e2e::containerd::Version;
use millstream_e2e::cri::{ContainerSpec, Cri, Pod};
use millstream_e2e::daemons::Node;
use millstream_e2e::image::{Image, shell};
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::stage::{Pushed, Stage, await_decision, await_verified, can_be_set, layers_of};
use millstream_wire::millstream::v1::decision::Outcome;
use millstream_wire::millstream::v1::layer_status::State;
use sha2::{Digest as _, Sha256};

const DEADLINE: Duration = Duration::from_secs(60);
const FILES: u32 = 400;
/// Digests of all files of the application, in the order of their names.
const READ_ALL: &str = "cd /app && sha256sum *";

/// File `n` of the application: 16 MB in all, which do not compress.
fn content(n: u32, version: u32) -> Vec<u8> {
    // The one file that changes is in the middle.
    let seed = if n == FILES / 2 { 1000 + version } else { n };
    noise(seed, 1000 + (n as usize % 80) * 1000)
}

/// A system and an application, whose layer is built anew for each version.
fn image(version: u32) -> Image {
    let mut app = vec![Entry::directory("app")];
    app.extend((0..FILES).map(|n| {
        let mtime = if n == FILES / 2 { 1_704_067_200 + i64::from(version) } else { 1_704_067_200 };
        Entry::file(format!("app/{n:04}"), content(n, version)).mtime(mtime, 0)
    }));
    Image::new()
        .layer(shell().unwrap(), Packing::Gzip)
        .layer(vec![Entry::file("system", noise(5000, 2 << 20))], Packing::Gzip)
        .layer(app, Packing::Gzip)
}

fn expected(version: u32) -> String {
    (0..FILES).map(|n| format!("{}  {n:04}\n", hex::encode(Sha256::digest(content(n, version))))).collect()
}

fn read_all(cri: &Cri, pod: &Pod, image: &Pushed, name: &str) -> String {
    let command = &["/bin/sh", "-c", READ_ALL];
    let spec = ContainerSpec { image: &image.reference, command, ..ContainerSpec::default() };
    cri.run(pod, name, &spec, DEADLINE).unwrap()
}

/// Bytes from the registry for layers of this image, and of tables, windows and skeletons from the server.
fn received(stage: &Stage, node: &Node, image: &Pushed) -> (u64, u64) {
    let layers = stage.layer_requests(image).unwrap().iter().map(|request| request.bytes).sum();
    (layers, node.status().unwrap().transfer.unwrap().metadata_bytes)
}

fn shared(node: &Node) -> u64 {
    node.status().unwrap().transfer.unwrap().shared_bytes
}

#[test]
fn a_rebuilt_image_fetches_little_more_than_the_file_that_changed() {
    if !can_be_set(&[]) {
        return;
    }
    let mut stage = Stage::set().unwrap();
    let [one, two] = [1, 2].map(|version| stage.publish(&format!("app{version}"), &image(version)).unwrap());
    assert_eq!(one.layers()[..2], two.layers()[..2]);
    assert_ne!(one.layers()[2], two.layers()[2]);
    let node = Node::start(&stage.work, &stage.node_options()).unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let mut cri = stage.cri(&containerd).unwrap();
    cri.pull(&one.reference, None).unwrap();
    await_verified(&node, &one).unwrap();
    let before = shared(&node);

    // Read by a container, with no background download: nothing but the changed file comes from the registry.
    node.set_hydration(false).unwrap();
    stage.count_from_now().unwrap();
    let (_, tables) = received(&stage, &node, &two);
    cri.pull(&two.reference, None).unwrap();
    await_decision(&node, &two, Outcome::Lazy, "").unwrap();
    let pod = cri.run_pod("pod").unwrap();
    assert_eq!(read_all(&cri, &pod, &two, "lazy"), expected(2));
    let app: u64 = (0..FILES).map(|n| content(n, 2).len() as u64).sum();
    let changed = content(FILES / 2, 2).len() as u64;
    assert_eq!(shared(&node) - before, app - changed, "all but the changed file came from the other image");
    assert!(layers_of(&node, &two).unwrap().iter().any(|layer| layer.state() == State::Lazy));

    // Proven afterwards, and not by downloading the layer.
    node.set_hydration(true).unwrap();
    await_verified(&node, &two).unwrap();
    let (layers, tables_now) = received(&stage, &node, &two);
    let blob = two.info.layers[2].size;
    println!(
        "layer of {blob} bytes with {changed} changed: {layers} bytes of it from the registry, {} from the server",
        tables_now - tables
    );
    // The file, and the rest of the one or two spans that it lies in.
    assert!(layers > changed && layers < (2 << 20) + (100 << 10), "{layers} bytes of a blob of {blob}");
    // Table and skeleton, and windows, which come a few at a time.
    assert!(tables_now - tables < 256 << 10, "{} bytes of tables", tables_now - tables);

    // What came from the other image stays when that one goes.
    cri.remove_image(&one.reference).unwrap();
    stage.go_dark().unwrap();
    assert_eq!(read_all(&cri, &pod, &two, "dark"), expected(2));
}
