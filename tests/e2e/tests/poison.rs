//! A request that is being worked on whenever the worker dies is not worked on a third time, and the rest goes on.

#![allow(clippy::unwrap_used, missing_docs)]

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use millstream_e2e::containerd::{Containerd, Version};
use millstream_e2e::cri::{ContainerSpec, Cri};
use millstream_e2e::daemons::Node;
use millstream_e2e::image::{Image, shell};
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::memory::MemoryGroup;
use millstream_e2e::need::Need;
use millstream_e2e::process::{eventually, let_pass};
use millstream_e2e::spoil::Spoiling;
use millstream_e2e::stage::{Pushed, Stage, can_be_set, layers_of};
use millstream_wire::millstream::v1::layer_status::State;

const DEADLINE: Duration = Duration::from_secs(60);
/// Somewhat more than a request must have been worked on for a SIGKILL to count against it.
const WHILE: Duration = Duration::from_millis(3500);
const SIZE: usize = 4 << 20;
/// Memory that is left to a worker beyond what it uses.
const ROOM: u64 = 32 << 20;

/// A container with a file that is here and one that is not and does not come.
struct Scene {
    // Dropped in this order.
    cri: Cri,
    _containerd: Containerd,
    node: Node,
    image: Pushed,
    data: PathBuf,
    stage: Stage,
}

const COMMAND: &[&str] = &["/bin/sleep", "1000"];

impl Scene {
    fn set() -> Self {
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
        let spec = ContainerSpec { image: &image.reference, command: COMMAND, ..ContainerSpec::default() };
        let container = cri.create(&pod, "container", &spec).unwrap();
        cri.start(&container).unwrap();
        let data = containerd.rootfs("k8s.io", &container.id).join("data");
        assert_eq!(std::fs::read(data.join("well")).unwrap(), b"well");
        // Nor must what the container itself reads wait for the source.
        std::fs::read(data.with_file_name("bin").join("busybox")).unwrap();
        Self { cri, _containerd: containerd, node, image, data, stage }
    }

    /// From now on a byte comes now and then: whoever reads what is not here waits.
    fn poison(&self) -> JoinHandle<std::io::Result<Vec<u8>>> {
        self.stage.spoiler().unwrap().set(Spoiling::Slow(1));
        self.stage.spoiler().unwrap().forget();
        let poison = self.data.join("poison");
        let reader = std::thread::spawn(move || std::fs::read(poison));
        self.await_work();
        reader
    }

    fn top(&self) -> String {
        self.image.layers().last().cloned().unwrap()
    }

    /// Waits until the worker asks for the bytes of the layer for the sake of the reader.
    fn await_work(&self) {
        let (spoiler, top) = (self.stage.spoiler().unwrap(), self.top());
        let asked = || spoiler.seen().iter().any(|seen| seen.path.contains(&top)).then_some(());
        eventually("a request for the layer", DEADLINE, asked).unwrap();
    }

    /// The reader has its error, the layer is named, others are served, and the worker lives.
    fn assert_set_aside(&self, reader: JoinHandle<std::io::Result<Vec<u8>>>) {
        eventually("an answer", DEADLINE / 6, || reader.is_finished().then_some(())).unwrap();
        assert_eq!(reader.join().unwrap().unwrap_err().raw_os_error(), Some(5), "EIO");
        let top = self.top();
        let layers = layers_of(&self.node, &self.image).unwrap();
        for layer in &layers {
            assert_eq!(layer.state() == State::Quarantined, layer.layer == top, "{layers:#?}");
        }
        let reason = &layers.iter().find(|layer| layer.layer == top).unwrap().reason;
        assert!(reason.contains("two workers in a row died") && reason.contains("data/poison"), "{reason}");
        assert_eq!(std::fs::read(self.data.join("well")).unwrap(), b"well");
        let begun = Instant::now();
        assert_eq!(std::fs::read(self.data.join("poison")).unwrap_err().raw_os_error(), Some(5));
        assert!(begun.elapsed() < DEADLINE / 6, "set aside is an answer at once");
    }
}

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
    let mut scene = Scene::set();
    let reader = scene.poison();
    let well = scene.data.join("well");
    die(&scene.node, &well);
    assert!(!reader.is_finished(), "one death is a pause");
    die(&scene.node, &well);
    scene.assert_set_aside(reader);

    // Removed and pulled again it is served again.
    let Scene { cri, node, image, stage, .. } = &mut scene;
    stage.spoiler().unwrap().set(Spoiling::None);
    cri.remove_pods().unwrap();
    cri.remove_image(&image.reference).unwrap();
    eventually("the removal", DEADLINE, || layers_of(node, image).unwrap().is_empty().then_some(())).unwrap();
    cri.pull(&image.reference, None).unwrap();
    let pod = cri.run_pod("again").unwrap();
    let command = &["/bin/sha256sum", "/data/poison"];
    let spec = ContainerSpec { image: &image.reference, command, ..ContainerSpec::default() };
    let sum = cri.run(&pod, "again", &spec, DEADLINE);
    let expected = hex::encode(<sha2::Sha256 as sha2::Digest>::digest(noise(1, SIZE)));
    assert!(sum.unwrap().starts_with(&expected));
}

/// The kernel kills by the same signal as an operator does. What was in flight then is a suspect at once, and what an operator
/// kills just after it has begun is none. Seen to fail with a supervisor that does not look at the kernel's counter.
#[test]
fn a_request_that_was_in_flight_when_memory_ran_out_twice_gets_eio() {
    if !can_be_set(&[Need::MemoryGroups, Need::Program("perl")]) {
        return;
    }
    let scene = Scene::set();
    let node = &scene.node;
    let memory = MemoryGroup::new(&scene.stage.work).unwrap();
    memory.take_in(node.supervisor().unwrap()).unwrap();
    // The next one is in the group.
    node.crash_worker().unwrap();
    let reader = scene.poison();
    let mut since = Instant::now();
    for _ in 0..2 {
        scene.stage.spoiler().unwrap().forget();
        node.crash_worker().unwrap();
        println!("killed {:?} after the request was begun", since.elapsed());
        scene.await_work();
        since = Instant::now();
    }
    assert!(!reader.is_finished(), "somebody else killed them");
    memory.leave(ROOM).unwrap();
    for death in 0..2 {
        assert!(!reader.is_finished(), "{death} deaths for want of memory are a pause");
        let before = node.workers();
        scene.stage.spoiler().unwrap().forget();
        memory.exhaust(before[0]).unwrap();
        println!("out of memory {:?} after the request was begun", since.elapsed());
        eventually("another worker", DEADLINE, || {
            let now = node.workers();
            (!now.is_empty() && now != before && node.status().is_ok()).then_some(())
        })
        .unwrap();
        if death == 0 {
            scene.await_work();
            since = Instant::now();
        }
    }
    scene.assert_set_aside(reader);
}
