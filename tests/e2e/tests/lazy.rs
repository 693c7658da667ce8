//! An image is pulled without its layers and runs; afterwards it becomes wholly local and needs nobody any more.

#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use millstream_e2e::containerd::{Containerd, Version};
use millstream_e2e::cri::ContainerSpec;
use millstream_e2e::daemons::Node;
use millstream_e2e::image::{Image, shell};
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::need::Need;
use millstream_e2e::scenario::{ctr_pull, ctr_run, ensure_lazy, lazy_by, lazy_by_cri, read_all};
use millstream_e2e::stage::{Pushed, Stage, await_verified, can_be_set, layers_of};
use millstream_wire::millstream::v1::layer_status::State;

const DEADLINE: Duration = Duration::from_secs(30);

#[test]
fn containerd_1_by_cri_pulls_lazily_and_needs_nobody_when_hydrated() {
    if can_be_set(&[]) {
        lazy_by_cri(Version::V1, false).unwrap();
    }
}

#[test]
fn containerd_2_by_cri_pulls_lazily_and_needs_nobody_when_hydrated() {
    if can_be_set(&[Need::Containerd2]) {
        lazy_by_cri(Version::V2, false).unwrap();
    }
}

#[test]
fn containerd_2_by_cri_through_the_transfer_service_pulls_lazily_and_needs_nobody_when_hydrated() {
    if can_be_set(&[Need::Containerd2]) {
        lazy_by_cri(Version::V2, true).unwrap();
    }
}

#[test]
fn containerd_2_by_ctr_pulls_lazily_and_needs_nobody_when_hydrated() {
    if can_be_set(&[Need::Containerd2]) {
        lazy_by(Version::V2, ctr_pull, ctr_run).unwrap();
    }
}

/// A stage with one image of a shell and a file that does not compress, in a layer of its own.
fn stage_with_a_large_file(bytes: usize) -> (Stage, Pushed, Node, Containerd) {
    let stage = Stage::set().unwrap();
    let image = Image::new()
        .layer(shell().unwrap(), Packing::Gzip)
        .layer(vec![Entry::file("large", noise(1, bytes))], Packing::Gzip);
    let image = stage.publish("large", &image).unwrap();
    let node = stage.node_on_demand().unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    (stage, image, node, containerd)
}

#[test]
fn eight_readers_of_a_cold_file_cost_the_registry_one_transfer() {
    if !can_be_set(&[]) {
        return;
    }
    let (mut stage, image, _node, containerd) = stage_with_a_large_file(24 << 20);
    let mut cri = stage.cri(&containerd).unwrap();
    stage.count_from_now().unwrap();
    cri.pull(&image.reference, None).unwrap();
    let pod = cri.run_pod("pod").unwrap();
    let script = "for i in 1 2 3 4 5 6 7 8; do sha256sum /large & done; wait";
    let command = &["/bin/sh", "-c", script];
    let spec = ContainerSpec { image: &image.reference, command, ..ContainerSpec::default() };
    let sums = cri.run(&pod, "readers", &spec, DEADLINE).unwrap();
    let expected = sha256(&noise(1, 24 << 20));
    assert_eq!(sums.lines().collect::<Vec<_>>(), vec![format!("{expected}  /large"); 8]);

    let blob = &image.info.layers[1];
    let requests = stage.layer_requests(&image).unwrap();
    let received: u64 =
        requests.iter().filter(|request| request.path.ends_with(&blob.digest)).map(|request| request.bytes).sum();
    // One transfer, not eight; a little more because requests of neighbouring spans share a byte.
    assert!(received <= blob.size / 10 * 11, "{received} bytes of a blob of {}: {requests:?}", blob.size);
    assert!(received >= blob.size, "{received} bytes of a blob of {}", blob.size);
}

#[test]
fn a_small_part_of_a_large_layer_is_read_with_a_small_part_of_its_bytes() {
    if !can_be_set(&[]) {
        return;
    }
    let (mut stage, image, node, containerd) = stage_with_a_large_file(64 << 20);
    let mut cri = stage.cri(&containerd).unwrap();
    stage.count_from_now().unwrap();
    cri.pull(&image.reference, None).unwrap();
    let pod = cri.run_pod("pod").unwrap();
    let script = "dd if=/large bs=4096 skip=12000 count=1 2>/dev/null | sha256sum";
    let command = &["/bin/sh", "-c", script];
    let spec = ContainerSpec { image: &image.reference, command, ..ContainerSpec::default() };
    let sum = cri.run(&pod, "part", &spec, DEADLINE).unwrap();
    let expected = sha256(&noise(1, 64 << 20)[12_000 * 4096..][..4096]);
    assert_eq!(sum, format!("{expected}  -\n"));
    let blob = &image.info.layers[1];
    let requests = stage.layer_requests(&image).unwrap();
    let received: u64 =
        requests.iter().filter(|request| request.path.ends_with(&blob.digest)).map(|request| request.bytes).sum();
    assert!(received < blob.size / 4, "{received} bytes for one page: {requests:?}");
    assert!(layers_of(&node, &image).unwrap().iter().all(|layer| layer.state() == State::Lazy));
}

#[test]
fn zstd_layers_are_lazy_also_one_that_cannot_be_entered_and_need_nobody_when_hydrated() {
    if !can_be_set(&[]) {
        return;
    }
    let mut stage = Stage::set().unwrap();
    let image = Image::new()
        .layer(shell().unwrap(), Packing::Zstd)
        .layer(vec![Entry::file("frames", noise(1, 9 << 20))], Packing::ZstdFrames(1 << 19))
        .layer(vec![Entry::file("one-frame", noise(2, 24 << 20)), Entry::file("end", "the end\n")], Packing::Zstd);
    let image = stage.publish("zstd", &image).unwrap();
    let node = stage.node_on_demand().unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let mut cri = stage.cri(&containerd).unwrap();
    stage.count_from_now().unwrap();
    cri.pull(&image.reference, None).unwrap();
    ensure_lazy(&stage, &node, &image).unwrap();
    let pod = cri.run_pod("pod").unwrap();
    let run = |name: &str, script: &str| {
        let command = &["/bin/sh", "-c", script];
        let spec = ContainerSpec { image: &image.reference, command, ..ContainerSpec::default() };
        cri.run(&pod, name, &spec, DEADLINE).unwrap()
    };
    // A page in the middle, then the end: neither takes the blob that cannot be entered.
    let page = run("page", "dd if=/one-frame bs=4096 skip=3000 count=1 2>/dev/null | sha256sum; cat /end");
    assert_eq!(page, format!("{}  -\nthe end\n", sha256(&noise(2, 24 << 20)[3000 * 4096..][..4096])));
    let sums = run("sums", "sha256sum /frames /one-frame");
    let expected = [(noise(1, 9 << 20), "frames"), (noise(2, 24 << 20), "one-frame")];
    assert_eq!(sums, expected.map(|(bytes, name)| format!("{}  /{name}\n", sha256(&bytes))).concat());
    let closed = &image.info.layers[2].digest;
    // What the pull may have asked for to see that it can read the blob.
    let received: u64 = stage
        .layer_requests(&image)
        .unwrap()
        .iter()
        .filter(|request| request.path.ends_with(closed))
        .map(|request| request.bytes)
        .sum();
    assert!(received < 4096, "{received} bytes of a blob that cannot be entered");
    ensure_lazy(&stage, &node, &image).unwrap();
    let lazily = read_all(&cri, &pod, &image, "all").unwrap();

    node.set_hydration(true).unwrap();
    await_verified(&node, &image).unwrap();
    stage.go_dark().unwrap();
    assert_eq!(read_all(&cri, &pod, &image, "all-in-the-dark").unwrap(), lazily);
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    hex::encode(sha2::Sha256::digest(bytes))
}
