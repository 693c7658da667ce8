//! A request that is being worked on whenever the worker dies is not worked on a third time, and the rest goes on.

#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;
use std::time::{Duration, Instant};

use millstream_e2e::containerd::Version;
use millstream_e2e::cri::ContainerSpec;
use millstream_e2e::daemons::Node;
use millstream_e2e::image::{Image, shell};
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::process::{eventually, let_pass};
use millstream_e2e::spoil::Spoiling;
use millstream_e2e::stage::{Stage, can_be_set, layers_of};
use millstream_wire::millstream::v1::layer_status::State;

const DEADLINE: Duration = Duration::from_secs(60);
/// Somewhat more than a request must have been worked on for a SIGKILL to count against it.
const WHILE: Duration = Duration::from_millis(3500);
const SIZE: usize = 4 << 20;

/// A worker dies by SIGKILL after it has worked on what is in flight for a while.
fn die(node: &Node, well: &Path) {
    // It serves: other files can be read.
    assert_eq!(std::fs::read(well).unwrap(), b"well");
    let_pass(WHILE);
    node.crash_worker().unwrap();
}

#[test]
fn a_request_in_flight_at_two_deaths_gets_eio_and_its_layer_is_set_aside() {
    if !can_be_set(&[]) {
        return;
    }
    let stage = Stage::with_spoiler().unwrap();
    let data = |name: &str, content| vec![Entry::directory("data"), Entry::file(format!("data/{name}"), content)];
    let image = Image::new()
        .layer(shell().unwrap(), Packing::Gzip)
        .layer(data("well", b"well".to_vec()), Packing::Gzip)
        .layer(data("poison", noise(1, SIZE)), Packing::Gzip);
    let image = stage.publish("app", &image).unwrap();
    let node = stage.node_on_demand().unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let mut cri = stage.cri(&containerd).unwrap();
    cri.pull(&image.reference, None).unwrap();
    let pod = cri.run_pod("pod").unwrap();
    let command = &["/bin/sleep", "1000"];
    let spec = ContainerSpec { image: &image.reference, command, ..ContainerSpec::default() };
    let container = cri.create(&pod, "container", &spec).unwrap();
    cri.start(&container).unwrap();
    let data = containerd.rootfs("k8s.io", &container.id).join("data");
    assert_eq!(std::fs::read(data.join("well")).unwrap(), b"well");

    // From now on a byte comes now and then: whoever reads what is not here waits.
    stage.spoiler().unwrap().set(Spoiling::Slow(1));
    let poison = data.join("poison");
    let reader = std::thread::spawn(move || std::fs::read(poison));
    let_pass(WHILE);
    assert!(!reader.is_finished());
    die(&node, &data.join("well"));
    assert!(!reader.is_finished(), "one death is a pause");
    die(&node, &data.join("well"));
    let answer = eventually("an answer", DEADLINE / 6, || reader.is_finished().then_some(()));
    answer.unwrap();
    assert_eq!(reader.join().unwrap().unwrap_err().raw_os_error(), Some(5), "EIO");

    // The layer is named; others are served, and the worker lives.
    let top = image.layers().last().cloned().unwrap();
    let layers = layers_of(&node, &image).unwrap();
    for layer in &layers {
        assert_eq!(layer.state() == State::Quarantined, layer.layer == top, "{layers:#?}");
    }
    let reason = &layers.iter().find(|layer| layer.layer == top).unwrap().reason;
    assert!(reason.contains("two workers in a row died") && reason.contains("data/poison"), "{reason}");
    assert_eq!(std::fs::read(data.join("well")).unwrap(), b"well");
    let begun = Instant::now();
    assert_eq!(std::fs::read(data.join("poison")).unwrap_err().raw_os_error(), Some(5));
    assert!(begun.elapsed() < DEADLINE / 6, "set aside is an answer at once");

    // Removed and pulled again it is served again.
    stage.spoiler().unwrap().set(Spoiling::None);
    cri.remove_pods().unwrap();
    cri.remove_image(&image.reference).unwrap();
    eventually("the removal", DEADLINE, || layers_of(&node, &image).unwrap().is_empty().then_some(())).unwrap();
    cri.pull(&image.reference, None).unwrap();
    let pod = cri.run_pod("again").unwrap();
    let sum = cri.run(&pod, "again", &ContainerSpec { command: &["/bin/sha256sum", "/data/poison"], ..spec }, DEADLINE);
    let expected = hex::encode(<sha2::Sha256 as sha2::Digest>::digest(noise(1, SIZE)));
    assert!(sum.unwrap().starts_with(&expected));
}
