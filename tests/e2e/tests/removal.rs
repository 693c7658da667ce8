//! What was removed is gone from the node; what lied is never believed.

#![allow(clippy::unwrap_used, missing_docs)]

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use millstream_e2e::containerd::Version;
use millstream_e2e::cri::ContainerSpec;
use millstream_e2e::daemons::{Node, NodeOptions, metrics_page, sample};
use millstream_e2e::image::{Image, shell};
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::process::eventually;
use millstream_e2e::registry::free_address;
use millstream_e2e::spoil::Spoiling;
use millstream_e2e::stage::{Stage, await_verified, can_be_set, layers_of};
use millstream_wire::millstream::v1::layer_status::State;
use sha2::{Digest as _, Sha256};

const DEADLINE: Duration = Duration::from_secs(60);

fn image_with(bytes: usize) -> Image {
    let large = vec![Entry::file("large", noise(1, bytes))];
    Image::new().layer(shell().unwrap(), Packing::Gzip).layer(large, Packing::Gzip)
}

/// Bytes that the files below a directory occupy, without other mounts.
fn occupied(root: &Path) -> u64 {
    fn below(at: &Path, device: u64) -> u64 {
        // What disappears meanwhile occupies nothing.
        let Ok(meta) = at.symlink_metadata() else { return 0 };
        if meta.dev() != device {
            return 0;
        }
        let list = if meta.is_dir() { std::fs::read_dir(at).ok() } else { None };
        let inside: u64 = list.into_iter().flatten().flatten().map(|entry| below(&entry.path(), device)).sum();
        inside + meta.blocks() * 512
    }
    below(root, root.metadata().unwrap().dev())
}

#[test]
fn layers_of_a_removed_image_are_deleted_unless_another_image_has_them() {
    if !can_be_set(&[]) {
        return;
    }
    const SIZE: usize = 16 << 20;
    let stage = Stage::set().unwrap();
    let image = stage.publish("app", &image_with(SIZE)).unwrap();
    let base = stage.publish("base", &Image::new().layer(shell().unwrap(), Packing::Gzip)).unwrap();
    assert_eq!(base.layers()[0], image.layers()[0]);
    let node = Node::start(&stage.work, &stage.node_options()).unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let cri = stage.cri(&containerd).unwrap();
    let empty = occupied(&node.root());
    cri.pull(&image.reference, None).unwrap();
    cri.pull(&base.reference, None).unwrap();
    await_verified(&node, &image).unwrap();
    let full = occupied(&node.root());
    assert!(full >= empty + SIZE as u64, "{empty} bytes before, {full} after");

    cri.remove_image(&image.reference).unwrap();
    eventually("the end of the image's own layer", DEADLINE, || {
        let left = layers_of(&node, &image).ok()?;
        (left.len() == 1 && left[0].layer == base.layers()[0]).then_some(())
    })
    .unwrap();
    await_verified(&node, &base).unwrap();
    let freed = || full - occupied(&node.root()) >= SIZE as u64;
    eventually("free disk space", DEADLINE, || freed().then_some(())).unwrap();

    cri.remove_image(&base.reference).unwrap();
    eventually("the end of all layers", DEADLINE, || node.status().ok()?.layers.is_empty().then_some(())).unwrap();
    // A database does not shrink by itself.
    let slack = 4 << 20;
    eventually("an empty store", DEADLINE, || (occupied(&node.root()) < empty + slack).then_some(())).unwrap();

    // And everything from the beginning.
    cri.pull(&image.reference, None).unwrap();
    await_verified(&node, &image).unwrap();
}

#[test]
fn hydration_ends_with_the_image() {
    if !can_be_set(&[]) {
        return;
    }
    let stage = Stage::with_spoiler().unwrap();
    let image = stage.publish("app", &image_with(32 << 20)).unwrap();
    let node = Node::start(&stage.work, &stage.node_options()).unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let cri = stage.cri(&containerd).unwrap();
    // A mebibyte in a second for each connection.
    stage.spoiler().unwrap().set(Spoiling::Slow(1 << 20));
    cri.pull(&image.reference, None).unwrap();
    let hydrated = || node.status().map(|status| status.transfer.unwrap_or_default().hydrate_bytes).unwrap_or(0);
    eventually("hydration", DEADLINE, || (hydrated() > 2 << 20).then_some(())).unwrap();
    cri.remove_image(&image.reference).unwrap();
    eventually("the end of all layers", DEADLINE, || node.status().ok()?.layers.is_empty().then_some(())).unwrap();
    // What comes now would come at a mebibyte in a second: two seconds without a byte are the end.
    let (mut last, mut since) = (hydrated(), Instant::now());
    eventually("the end of hydration", DEADLINE, || {
        let now = hydrated();
        if now != last {
            (last, since) = (now, Instant::now());
        }
        (since.elapsed() > Duration::from_secs(2)).then_some(())
    })
    .unwrap();
    assert!(last < image.bytes(), "{last} bytes of {} came all the same", image.bytes());
}

#[test]
fn a_lying_registry_is_neither_read_nor_believed_and_is_forgiven() {
    if !can_be_set(&[]) {
        return;
    }
    // While a reader waits, a part of half a mebibyte may take a second.
    const SIZE: usize = 3 << 20;
    let stage = Stage::with_spoiler().unwrap();
    let image = stage.publish("app", &image_with(SIZE)).unwrap();
    let node = stage.node_on_demand().unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let mut cri = stage.cri(&containerd).unwrap();
    cri.pull(&image.reference, None).unwrap();
    let pod = cri.run_pod("pod").unwrap();
    let script = "until [ -e /tmp/stop ]; do
        sha256sum /large 2>/dev/null || echo failed
    done";
    // The shell itself must be here before.
    let command = &["/bin/sh", "-c", "sha256sum /bin/busybox"];
    let warm = ContainerSpec { image: &image.reference, command, ..ContainerSpec::default() };
    cri.run(&pod, "warm", &warm, DEADLINE).unwrap();

    stage.spoiler().unwrap().set(Spoiling::ForgedRange);
    let before = node.status().unwrap().transfer.unwrap().hydrate_bytes;
    node.set_hydration(true).unwrap();
    let command = &["/bin/sh", "-c", script];
    let spec = ContainerSpec { image: &image.reference, command, ..ContainerSpec::default() };
    let container = cri.create(&pod, "reader", &spec).unwrap();
    cri.start(&container).unwrap();
    // What was judged wrong is fetched again after a while.
    eventually("a second hydration", DEADLINE, || {
        let transfer = node.status().ok()?.transfer?;
        (transfer.hydrate_bytes >= before + 2 * image.info.layers[1].size).then_some(())
    })
    .unwrap();
    // The other layer was read before: it may be proven by what is here.
    let layers = layers_of(&node, &image).unwrap();
    let large = layers.iter().find(|layer| layer.layer == image.layers()[1]).unwrap();
    assert_eq!(large.state(), State::Lazy, "{layers:?}");

    stage.spoiler().unwrap().set(Spoiling::None);
    await_verified(&node, &image).unwrap();
    let right = format!("{}  /large", hex::encode(Sha256::digest(noise(1, SIZE))));
    let output = || cri.output(&container).unwrap_or_default();
    eventually("a right read", DEADLINE, || output().lines().any(|line| line == right).then_some(())).unwrap();
    std::fs::write(containerd.rootfs("k8s.io", &container.id).join("tmp/stop"), "").unwrap();
    let ended = cri.wait(&container, DEADLINE).unwrap();
    assert!(ended.output.lines().all(|line| line == right || line == "failed"), "{}", ended.output);
}

#[test]
fn what_is_deleted_at_the_registry_is_served_where_it_is_and_the_rest_says_why() {
    if !can_be_set(&[]) {
        return;
    }
    const SMALL: usize = 200 << 10;
    // More than may lie between two places to enter at: the server keeps it.
    const LARGE: usize = 18 << 20;
    let stage = Stage::set().unwrap();
    let file = |name: &str, seed, bytes| vec![Entry::file(name, noise(seed, bytes))];
    let content = Image::new()
        .layer(shell().unwrap(), Packing::Gzip)
        .layer(file("local", 1, SMALL), Packing::Gzip)
        .layer(file("gone", 2, SMALL), Packing::Gzip)
        .layer(file("kept", 3, LARGE), Packing::Zstd);
    let image = stage.publish("app", &content).unwrap();
    let metrics = free_address().unwrap();
    let (read_deadline, metrics) = (Duration::from_secs(3), Some(metrics));
    let options = NodeOptions { hydration: false, read_deadline, metrics, ..stage.node_options() };
    let node = Node::start(&stage.work, &options).unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let mut cri = stage.cri(&containerd).unwrap();
    cri.pull(&image.reference, None).unwrap();
    let pod = cri.run_pod("pod").unwrap();
    let spec =
        ContainerSpec { image: &image.reference, command: &["/bin/sleep", "100000"], ..ContainerSpec::default() };
    let container = cri.create(&pod, "reader", &spec).unwrap();
    cri.start(&container).unwrap();
    let root = containerd.rootfs("k8s.io", &container.id);
    let read = |name: &str| std::fs::read(root.join(name));
    let sample = |name: &str| sample(&metrics_page(metrics.unwrap()).unwrap(), name);
    assert!(read("local").unwrap() == noise(1, SMALL));

    let registry = stage.registry().unwrap();
    registry.delete("app", "manifests", &image.info.manifest).unwrap();
    for layer in image.layers() {
        registry.delete("app", "blobs", &layer).unwrap();
    }
    // What the node has and what the server keeps.
    assert!(read("local").unwrap() == noise(1, SMALL));
    assert!(read("kept").unwrap() == noise(3, LARGE));
    let (counted, failed) =
        ("millstream_fetch_failures_total{code=\"source.not-found\"}", "millstream_reads_total{result=\"failed\"}");
    let before = (sample(counted), sample(failed));
    let begun = Instant::now();
    let error = read("gone").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    // Nobody waits for what is not there.
    assert!(begun.elapsed() < read_deadline, "{:?}", begun.elapsed());
    assert!(sample(counted) > before.0 && sample(failed) > before.1);
    let log = String::from_utf8_lossy(&std::fs::read(node.log()).unwrap()).into_owned();
    let line = log.lines().find(|line| line.contains("a read failed with EIO")).unwrap();
    for part in ["source.not-found", "gone", "answered 404", &image.layers()[2]] {
        assert!(line.contains(part), "{line}");
    }

    // The way out: whoever has the image pushes it again.
    stage.push("app", &content).unwrap();
    assert!(eventually("the file", DEADLINE, || read("gone").ok()).unwrap() == noise(2, SMALL));
}
