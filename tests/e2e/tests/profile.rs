//! What the start of an image read on one node comes ahead of its readers on the next one.

#![allow(clippy::unwrap_used, missing_docs)]

use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use millstream_e2e::containerd::{Containerd, ContainerdOptions, Version};
use millstream_e2e::cri::{ContainerSpec, Cri};
use millstream_e2e::daemons::Node;
use millstream_e2e::image::{Image, shell};
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::process::eventually;
use millstream_e2e::stage::{Pushed, Stage, await_decision, await_verified, can_be_set};
use millstream_wire::millstream::v1 as wire;
use millstream_wire::millstream::v1::decision::Outcome;
use millstream_wire::millstream::v1::get_profile_response::Part;
use millstream_wire::millstream::v1::images_client::ImagesClient;
use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest as _, Sha256};

const DEADLINE: Duration = Duration::from_secs(60);
/// A start is over five seconds after it read something new for the last time; then the server makes a pack.
const LEARNED: Duration = Duration::from_secs(60);
const BIG: usize = 24 << 20;
/// Pages of the large file that a start reads, from its end to its beginning, and small files.
const PAGES: [usize; 5] = [5000, 4000, 2500, 1000, 3];
const SMALL: [u32; 3] = [290, 17, 150];

fn big() -> Vec<u8> {
    noise(7, BIG)
}

fn small(n: u32) -> Vec<u8> {
    noise(1000 + n, 3000)
}

fn image(version: u32) -> Image {
    let mut app = vec![Entry::directory("app"), Entry::file("app/big", big())];
    app.extend((0..300).map(|n| Entry::file(format!("app/{n:03}"), small(n))));
    app.push(Entry::file("app/version", version.to_string().into_bytes()));
    Image::new().layer(shell().unwrap(), Packing::Gzip).layer(app, Packing::Gzip)
}

/// What the application does first.
fn command() -> String {
    let pages = PAGES.map(|page| format!("dd if=/app/big bs=4096 skip={page} count=1 2>/dev/null;")).concat();
    let small = SMALL.map(|n| format!("cat /app/{n:03};")).concat();
    format!("{{ {pages} {small} }} | sha256sum")
}

fn expected() -> String {
    let mut hash = Sha256::new();
    let big = big();
    for page in PAGES {
        hash.update(&big[page * 4096..(page + 1) * 4096]);
    }
    for n in SMALL {
        hash.update(small(n));
    }
    format!("{}  -\n", hex::encode(hash.finalize()))
}

/// A node and a containerd that have seen nothing yet.
struct Fresh {
    node: Node,
    containerd: Containerd,
    cri: Cri,
}

fn fresh(stage: &Stage, hydration: bool) -> Fresh {
    // The output of a container goes to a file that another one of the same name would go on with.
    for dir in ["node", "pods", &ContainerdOptions::dir_name(Version::V1)] {
        let _ = std::fs::remove_dir_all(stage.work.path().join(dir));
    }
    let mut options = stage.node_options();
    options.hydration = hydration;
    let node = Node::start(&stage.work, &options).unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let cri = stage.cri(&containerd).unwrap();
    Fresh { node, containerd, cri }
}

impl Fresh {
    /// Pulls and starts; compressed bytes of the image's layers that the registry gave.
    fn start(&mut self, stage: &mut Stage, image: &Pushed) -> u64 {
        stage.count_from_now().unwrap();
        self.cri.pull(&image.reference, None).unwrap();
        await_decision(&self.node, image, Outcome::Lazy, "").unwrap();
        let pod = self.cri.run_pod("pod").unwrap();
        let command = command();
        let command = &["/bin/sh", "-c", command.as_str()];
        let spec = ContainerSpec { image: &image.reference, command, ..ContainerSpec::default() };
        assert_eq!(self.cri.run(&pod, "app", &spec, DEADLINE).unwrap(), expected());
        stage.layer_requests(image).unwrap().iter().map(|request| request.bytes).sum()
    }

    fn profile_bytes(&self) -> u64 {
        self.node.status().unwrap().transfer.unwrap().profile_bytes
    }

    /// With all that it has.
    fn end(mut self) {
        self.cri.remove_pods().unwrap();
        drop(self.cri);
        drop(self.containerd);
        self.node.stop().unwrap();
    }
}

fn scope(image: &Pushed) -> wire::Scope {
    let (repository, _) = image.reference.rsplit_once(':').unwrap();
    let manifest_digest = image.info.manifest.clone();
    wire::Scope { repository: repository.to_owned(), manifest_digest, credential: None, platform: None }
}

/// The plan that the server gives for an image, and the bytes of its pages.
fn profile(stage: &Stage, image: &Pushed) -> Option<(wire::ProfilePlan, usize)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let request = wire::GetProfileRequest { scope: Some(scope(image)), pages: true, local_layers: Vec::new() };
    runtime.block_on(async {
        let mut client = ImagesClient::connect(stage.server_address()).await.ok()?;
        let mut stream = client.get_profile(request).await.ok()?.into_inner();
        let Some(Part::Plan(plan)) = stream.message().await.ok()??.part else { return None };
        let mut bytes = 0;
        while let Some(message) = stream.message().await.ok()? {
            let Some(Part::Packed(packed)) = message.part else { return None };
            bytes += packed.len();
        }
        Some((plan, bytes))
    })
}

/// Tells the server of a start that read just what the plan has.
fn record(stage: &Stage, image: &Pushed, plan: &wire::ProfilePlan) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let layers = plan.layers.iter().cloned().map(|layer| wire::RecordedLayer { layer: Some(layer), fresh: true });
    let request =
        wire::PutRecordingRequest { scope: Some(scope(image)), layers: layers.collect(), runs: plan.runs.clone() };
    let taken = runtime.block_on(async {
        let mut client = ImagesClient::connect(stage.server_address()).await.unwrap();
        client.put_recording(request).await.unwrap().into_inner().taken
    });
    assert!(taken);
}

fn await_profile(stage: &Stage, image: &Pushed) -> (wire::ProfilePlan, usize) {
    eventually("a startup profile with its pages", LEARNED, || profile(stage, image).filter(|(plan, _)| plan.pages))
        .unwrap()
}

#[test]
fn the_next_node_has_what_a_start_reads_before_it_is_read() {
    if !can_be_set(&[]) {
        return;
    }
    let mut stage = Stage::set().unwrap();
    let image = stage.publish("app", &image(1)).unwrap();
    let mut first = fresh(&stage, false);
    let without = first.start(&mut stage, &image);
    assert_eq!(first.profile_bytes(), 0, "nothing is known of it yet");
    let (plan, bytes) = await_profile(&stage, &image);
    first.end();
    assert_eq!(plan.recordings, 1);

    let mut second = fresh(&stage, false);
    let with = second.start(&mut stage, &image);
    println!("from the registry: {without} bytes without a profile, {with} with it; {bytes} bytes of pages");
    assert_eq!(second.profile_bytes(), bytes as u64);
    // Nothing but the byte that proves the right to read.
    assert!(with < 1000 && without > 1 << 20, "{with} and {without} bytes");
    second.end();

    // The image becomes wholly local as ever.
    let mut third = fresh(&stage, true);
    third.start(&mut stage, &image);
    await_verified(&third.node, &image).unwrap();
    third.end();
}

/// What a stopped worker cannot give: only what the kernel has is read.
#[test]
fn pages_are_in_the_page_cache_before_the_program_is_there() {
    if !can_be_set(&[]) {
        return;
    }
    let mut stage = Stage::set().unwrap();
    let image = stage.publish("app", &image(1)).unwrap();
    let mut first = fresh(&stage, false);
    first.start(&mut stage, &image);
    let (plan, _) = await_profile(&stage, &image);
    first.end();
    // As if two more nodes had started it: what one of them read is not certain yet.
    for _ in 0..2 {
        record(&stage, &image, &plan);
    }

    let mut second = fresh(&stage, false);
    second.cri.pull(&image.reference, None).unwrap();
    let warm = "what starts of the image read is in the page cache";
    eventually("the pages in the page cache", DEADLINE, || {
        std::fs::read_to_string(second.node.log()).is_ok_and(|log| log.contains(warm)).then_some(())
    })
    .unwrap();
    let view = std::fs::read_dir(second.node.root().join("m")).unwrap().next().unwrap().unwrap().path();
    let view = std::fs::File::open(view).unwrap();
    let [worker] = second.node.workers()[..] else { panic!("one worker") };
    let worker = Pid::from_raw(worker).unwrap();
    kill_process(worker, Signal::STOP).unwrap();
    let (told, read) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // No look at its attributes: std asks for more of them than the kernel keeps.
        let read = |name: &str, at: usize, len: usize| {
            let flags = rustix::fs::OFlags::RDONLY;
            let file = std::fs::File::from(rustix::fs::openat(&view, name, flags, rustix::fs::Mode::empty()).unwrap());
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, at as u64).unwrap();
            bytes
        };
        let pages = PAGES.into_iter().flat_map(|page| read("app/big", page * 4096, 4096));
        let small = SMALL.into_iter().flat_map(|n| read(&format!("app/{n:03}"), 0, 3000));
        let bytes: Vec<u8> = pages.chain(small).collect();
        told.send(format!("{}  -\n", hex::encode(Sha256::digest(&bytes)))).unwrap();
    });
    let sum = read.recv_timeout(Duration::from_secs(10));
    kill_process(worker, Signal::CONT).unwrap();
    assert_eq!(sum.expect("a read that needs the worker"), expected());

    // And the image is as it is.
    second.start(&mut stage, &image);
    second.end();
}

#[test]
fn a_server_that_dies_in_the_middle_of_a_profile_costs_time_and_no_byte() {
    if !can_be_set(&[]) {
        return;
    }
    let mut stage = Stage::set().unwrap();
    let image = stage.publish("app", &image(1)).unwrap();
    let mut first = fresh(&stage, false);
    first.start(&mut stage, &image);
    await_profile(&stage, &image);
    first.end();
    let mut second = fresh(&stage, false);
    second.cri.pull(&image.reference, None).unwrap();
    stage.kill_server().unwrap();
    stage.start_server().unwrap();
    second.start(&mut stage, &image);
    second.end();
}
