//! Much at once: pulls, containers, open files, removals while containers read, and clients that go away. Everything that
//! it costs is given back.

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use millstream_e2e::containerd::{Containerd, Version};
use millstream_e2e::cri::{ContainerSpec, Cri, connect};
use millstream_e2e::daemons::{Node, NodeOptions};
use millstream_e2e::gauges::{Gauged, Process};
use millstream_e2e::image::{Image, sha256, shell, small};
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::need::Need;
use millstream_e2e::process::{eventually, let_pass};
use millstream_e2e::registry::free_address;
use millstream_e2e::scenario::ensure_lazy;
use millstream_e2e::spoil::Spoiling;
use millstream_e2e::stage::{Pushed, Stage, await_verified, can_be_set, layers_of};
use millstream_e2e::view::{Snapshots, View, chain_ids};
use millstream_wire::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use millstream_wire::containerd::services::snapshots::v1::{
    Info, Kind, ListSnapshotsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
};
use millstream_wire::millstream::v1::node_client::NodeClient;
use millstream_wire::millstream::v1::{IndexImageRequest, PrefetchRequest};
use rustix::fs::{Advice, fadvise};
use tonic::transport::Channel;

const DEADLINE: Duration = Duration::from_secs(60);
/// Namespace of CRI.
const K8S: &str = "k8s.io";

/// A stage with a node that shows its metrics and a containerd 2.x.
fn set(stage: &Stage, hydration: bool) -> (Node, Containerd) {
    let options = NodeOptions { hydration, metrics: Some(free_address().unwrap()), ..stage.node_options() };
    let node = Node::start(&stage.work, &options).unwrap();
    let containerd = stage.containerd(Version::V2, &node, true).unwrap();
    (node, containerd)
}

/// Does once what the test does many times, so that what is made once for good is there: connections, pools, the pause image.
fn warm_up(stage: &Stage, node: &Node, cri: &mut Cri) {
    let image = stage.publish("warm", &small().unwrap()).unwrap();
    cri.pull(&image.reference, None).unwrap();
    let pod = cri.run_pod("warm").unwrap();
    let spec = ContainerSpec { image: &image.reference, ..ContainerSpec::default() };
    cri.run(&pod, "warm", &spec, DEADLINE).unwrap();
    cri.remove_pods().unwrap();
    cri.remove_image(&image.reference).unwrap();
    let own = &image.layers()[1];
    let gone = || (!node.status().ok()?.layers.iter().any(|layer| &layer.layer == own)).then_some(());
    eventually("the end of the warm-up", DEADLINE, gone).unwrap();
}

/// Runs garbage collection and waits for its end.
fn collect_garbage(containerd: &Containerd) {
    containerd.ctr("gc", &["leases", "create", "--id", "sweep"]).unwrap();
    containerd.ctr("gc", &["leases", "delete", "--sync", "sweep"]).unwrap();
}

/// Waits until the registry has written down that nobody reads any more, then gives the bytes of each layer that it has sent.
fn sent(stage: &Stage, image: &Pushed) -> Vec<u64> {
    let requests = stage.layer_requests(image).unwrap();
    let of = |digest: &str| requests.iter().filter(|one| one.path.ends_with(digest)).map(|one| one.bytes).sum();
    image.info.layers.iter().map(|layer| of(&layer.digest)).collect()
}

/// Whether each byte of each layer came once. A decision reads a chunk of a layer to see that it may, and two requests for
/// neighbouring spans share a byte.
fn assert_sent_once(stage: &Stage, image: &Pushed) {
    for (layer, bytes) in image.info.layers.iter().zip(sent(stage, image)) {
        let more = layer.size / 50 + 2048;
        assert!(bytes <= layer.size + more, "{bytes} bytes of layer {} of {} bytes", layer.digest, layer.size);
    }
}

/// An image of sixteen layers, of which all but the shell are its own.
fn sixteen_layers(number: u32) -> Image {
    let layer = |position: u32| {
        let bytes = noise(number * 100 + position, 8 << 10 << (position % 4));
        vec![Entry::directory("data"), Entry::file(format!("data/{position}"), bytes)]
    };
    (1..16).fold(Image::new().layer(shell().unwrap(), Packing::Gzip), |image, position| {
        image.layer(layer(position), Packing::Gzip)
    })
}

#[test]
fn ten_images_of_sixteen_layers_and_sixty_four_pulls_of_one_leave_nothing() {
    if !can_be_set(&[Need::Containerd2]) {
        return;
    }
    let mut stage = Stage::set().unwrap();
    let images: Vec<Image> = (0..10).map(sixteen_layers).collect();
    let images = stage.push_many("ten", &images).unwrap();
    let large = |seed| vec![Entry::file(format!("large{seed}"), noise(seed, 6 << 20))];
    let one = Image::new()
        .layer(shell().unwrap(), Packing::Gzip)
        .layer(large(1), Packing::Gzip)
        .layer(large(2), Packing::Zstd)
        .layer(large(3), Packing::Plain);
    let one = stage.publish("one", &one).unwrap();
    let import = |image: &Pushed| stage.import(image).map(drop);
    for some in images.chunks(5) {
        std::thread::scope(|scope| {
            let imports: Vec<_> = some.iter().map(|image| scope.spawn(|| import(image))).collect();
            imports.into_iter().for_each(|import| import.join().unwrap().unwrap());
        });
    }
    let (node, containerd) = set(&stage, true);
    let mut cri = stage.cri(&containerd).unwrap();
    warm_up(&stage, &node, &mut cri);
    let below = stage.work.path().to_owned();
    let namespaces: Vec<String> = (0..32).map(|number| format!("n{number}")).collect();
    let mut all: Vec<&str> = namespaces.iter().map(String::as_str).collect();
    all.push(K8S);
    let gauged = Gauged { node: &node, containerd: &containerd, below: &below, namespaces: &all };
    let before = gauged.now().unwrap();
    println!("before: {:?} {} tasks", before.worker, before.tasks);

    ten_images(&mut stage, &node, &containerd, &images);
    let after = gauged.await_given_back(&before).unwrap();
    println!("after ten images: {:?} {} tasks", after.worker, after.tasks);

    stage.count_from_now().unwrap();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let (stage, containerd, reference) = (&stage, &containerd, &one.reference);
        let by_cri = || stage.cri(containerd)?.pull(reference, None).map(drop);
        let mut pulls: Vec<_> = (0..32).map(|_| scope.spawn(by_cri)).collect();
        pulls.extend(namespaces.iter().map(|namespace| scope.spawn(|| containerd.ctr_pull(namespace, reference))));
        pulls.into_iter().for_each(|pull| pull.join().unwrap().unwrap());
    });
    println!("64 pulls of one image: {:?}", begun.elapsed());
    await_verified(&node, &one).unwrap();
    assert_sent_once(&stage, &one);
    let wanted: Vec<u64> = one.info.layers.iter().map(|layer| layer.size).collect();
    println!("of layers of {wanted:?} bytes the registry sent {:?}", sent(&stage, &one));
    for namespace in &namespaces {
        containerd.ctr(namespace, &["images", "rm", &one.reference]).unwrap();
    }
    cri.remove_image(&one.reference).unwrap();
    collect_garbage(&containerd);
    let after = gauged.await_given_back(&before).unwrap();
    println!("after 64 pulls: {:?} {} tasks", after.worker, after.tasks);
}

/// Pulls all images at once, looks at every file of theirs, and removes them.
fn ten_images(stage: &mut Stage, node: &Node, containerd: &Containerd, images: &[Pushed]) {
    stage.count_from_now().unwrap();
    node.set_hydration(false).unwrap();
    let begun = Instant::now();
    let pull = |image: &Pushed| stage.cri(containerd)?.pull(&image.reference, None);
    std::thread::scope(|scope| {
        let pull = &pull;
        let pulls: Vec<_> = images.iter().map(|image| scope.spawn(move || pull(image))).collect();
        for pull in pulls {
            pull.join().unwrap().unwrap();
        }
    });
    println!("10 pulls of 16 layers: {:?}", begun.elapsed());
    for image in images {
        ensure_lazy(stage, node, image).unwrap();
    }
    node.set_hydration(true).unwrap();
    let begun = Instant::now();
    for image in images {
        await_verified(node, image).unwrap();
        assert_sent_once(stage, image);
    }
    println!("all layers verified after {:?}", begun.elapsed());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let snapshots = runtime.block_on(Snapshots::connect(containerd, K8S)).unwrap();
    for (number, image) in (0..).zip(images) {
        let key = format!("ten-{number}");
        let mounts = runtime.block_on(snapshots.prepare(&key, &image.info)).unwrap();
        let view = View::of(&mounts, &stage.work.dir(&key).unwrap()).unwrap();
        for position in 1..16 {
            let found = std::fs::read(view.root().join(format!("data/{position}"))).unwrap();
            assert_eq!(found, noise(number * 100 + position, 8 << 10 << (position % 4)));
        }
        drop(view);
        runtime.block_on(snapshots.remove(&key)).unwrap();
    }
    let cri = stage.cri(containerd).unwrap();
    for image in images {
        cri.remove_image(&image.reference).unwrap();
    }
    collect_garbage(containerd);
}

/// Files of the image that the containers read over and over.
const FILES: u32 = 48;
/// Small files of it, to be held open all at once.
const MANY: u32 = 20_000;
/// Containers that run.
const RUNNING: usize = 50;
/// Snapshots that are prepared, as for containers.
const PREPARED: usize = 300;

/// Reads everything again and again; each time it says so, and each time something was wrong or failed, too.
const READER: &str = "until [ -e /tmp/stop ]; do
    if sha256sum -c -s /data/sums; then echo right; else echo WRONG; fi
    sleep 0.5
done";

fn file(number: u32) -> Vec<u8> {
    noise(1000 + number, 32 << 10)
}

fn sum(bytes: &[u8]) -> String {
    sha256(bytes).trim_start_matches("sha256:").to_owned()
}

/// A shell, files with their sums, and very many small files.
fn image_to_read() -> Image {
    let mut data = vec![Entry::directory("data")];
    data.extend((0..FILES).map(|number| Entry::file(format!("data/{number}"), file(number))));
    let sums: String = (0..FILES).map(|number| format!("{}  /data/{number}\n", sum(&file(number)))).collect();
    data.push(Entry::file("data/sums", sums));
    let mut many = vec![Entry::directory("many")];
    many.extend((0..MANY).map(|number| Entry::file(format!("many/{number}"), format!("file {number}\n"))));
    Image::new()
        .layer(shell().unwrap(), Packing::Gzip)
        .layer(data, Packing::Gzip)
        .layer(many, Packing::Gzip)
        .command(&["/bin/sh", "-c", READER])
}

#[test]
fn three_hundred_prepared_and_fifty_running_containers_outlive_the_image_and_leave_nothing() {
    if !can_be_set(&[Need::Containerd2]) {
        return;
    }
    let stage = Stage::set().unwrap();
    let image = stage.publish("app", &image_to_read()).unwrap();
    let (node, containerd) = set(&stage, false);
    let mut cri = stage.cri(&containerd).unwrap();
    warm_up(&stage, &node, &mut cri);
    let gauged = Gauged { node: &node, containerd: &containerd, below: stage.work.path(), namespaces: &[K8S, "gc"] };
    let before = gauged.now().unwrap();
    println!("before: {:?} {} tasks", before.worker, before.tasks);
    // CRI has a name of its own for an image beside that which was pulled.
    let names = || containerd.ctr(K8S, &["images", "ls", "-q"]).unwrap();
    let others = names();
    cri.pull(&image.reference, None).unwrap();
    ensure_lazy(&stage, &node, &image).unwrap();

    let runtime = tokio::runtime::Runtime::new().unwrap();
    let snapshots = runtime.block_on(Snapshots::connect(&containerd, K8S)).unwrap();
    let views = prepare(&runtime, &snapshots, &stage, &image);

    let begun = Instant::now();
    let mut containers = Vec::new();
    for pod in 0..5 {
        let pod = cri.run_pod(&format!("pod{pod}")).unwrap();
        for number in 0..RUNNING / 5 {
            let spec = ContainerSpec { image: &image.reference, ..ContainerSpec::default() };
            let container = cri.create(&pod, &number.to_string(), &spec).unwrap();
            cri.start(&container).unwrap();
            containers.push(container);
        }
    }
    println!("{RUNNING} containers run after {:?}", begun.elapsed());
    let rounds =
        || -> Vec<usize> { containers.iter().map(|one| cri.output(one).unwrap_or_default().lines().count()).collect() };
    let await_rounds = |more: usize| {
        let wanted: Vec<usize> = rounds().into_iter().map(|done| done + more).collect();
        let done = || rounds().iter().zip(&wanted).all(|(done, wanted)| done >= wanted).then_some(());
        eventually("every container to read everything", DEADLINE, done).unwrap();
    };
    await_rounds(1);

    hold_open(&node, &containerd.rootfs(K8S, &containers[0].id));

    // The image goes, and garbage is collected, while containers read what is not in the page cache any more.
    for name in names().lines().filter(|name| !others.lines().any(|other| other == *name)) {
        containerd.ctr(K8S, &["images", "rm", "--sync", name]).unwrap();
    }
    for _ in 0..8 {
        forget_pages(&node.root().join("m"));
        collect_garbage(&containerd);
    }
    await_rounds(2);
    assert_eq!(layers_of(&node, &image).unwrap().len(), image.layers().len(), "kept by containers");

    for container in &containers {
        std::fs::write(containerd.rootfs(K8S, &container.id).join("tmp/stop"), "").unwrap();
    }
    for container in &containers {
        let ended = cri.wait(container, DEADLINE).unwrap();
        assert!(ended.output.lines().all(|line| line == "right"), "{}", ended.output);
    }
    cri.remove_pods().unwrap();
    drop(views);
    let begun = Instant::now();
    runtime.block_on(async {
        for number in 0..PREPARED {
            snapshots.remove(&format!("prepared-{number}")).await.unwrap();
        }
    });
    println!("{PREPARED} snapshots removed in {:?}", begun.elapsed());
    collect_garbage(&containerd);
    let after = gauged.await_given_back(&before).unwrap();
    println!("after: {:?} {} tasks", after.worker, after.tasks);
}

/// Prepares and mounts snapshots as for containers, all at once, and looks into each.
fn prepare(runtime: &tokio::runtime::Runtime, snapshots: &Snapshots, stage: &Stage, image: &Pushed) -> Vec<View> {
    let begun = Instant::now();
    let prepared = runtime.block_on(async {
        let one = |number: usize| {
            let (snapshots, info) = (snapshots.clone(), image.info.clone());
            tokio::spawn(async move {
                let mounts = snapshots.prepare(&format!("prepared-{number}"), &info).await.unwrap();
                (mounts, begun.elapsed())
            })
        };
        let tasks: Vec<_> = (0..PREPARED).map(one).collect();
        let mut prepared = Vec::new();
        for task in tasks {
            prepared.push(task.await.unwrap());
        }
        prepared
    });
    let mut times: Vec<Duration> = prepared.iter().map(|(_, took)| *took).collect();
    times.sort_unstable();
    println!("{PREPARED} prepared: the first after {:?}, the last after {:?}", times[0], times[PREPARED - 1]);
    let begun = Instant::now();
    let mounted = (0..).zip(&prepared).map(|(number, (mounts, _))| {
        let view = View::of(mounts, &stage.work.dir(&format!("mounted/{number}")).unwrap()).unwrap();
        let of = number % FILES;
        assert_eq!(std::fs::read(view.root().join(format!("data/{of}"))).unwrap(), file(of));
        view
    });
    let views = mounted.collect();
    println!("mounted and read in {:?}", begun.elapsed());
    views
}

/// Opens files of its arguments FROM to TO below ROOT, says so, and when told compares what is in them and says that.
const HOLDER: &str = r#"
    my ($root, $from, $to) = @ARGV;
    my @open = map { open(my $file, "<", "$root/many/$_") or die "$_: $!"; $file } $from .. $to - 1;
    $| = 1;
    print "open\n";
    <STDIN>;
    for my $number ($from .. $to - 1) {
        my $text = readline($open[$number - $from]);
        $text eq "file $number\n" or die "$number: $text";
    }
    print "read\n";
"#;

/// Opens many files at once, in several processes: the node must not need a descriptor for each, and all can be read.
fn hold_open(node: &Node, rootfs: &Path) {
    const HOLDERS: u32 = 4;
    let worker = node.workers()[0];
    let before = Process::of(worker).unwrap();
    let begun = Instant::now();
    let hold = |holder: u32| {
        let range = [holder, holder + 1].map(|part| (MANY / HOLDERS * part).to_string());
        let mut command = Command::new("perl");
        command.args(["-e", HOLDER]).arg(rootfs).args(range).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.spawn().unwrap()
    };
    let mut holders: Vec<Child> = (0..HOLDERS).map(hold).collect();
    let mut said: Vec<_> = holders.iter_mut().map(|one| BufReader::new(one.stdout.take().unwrap()).lines()).collect();
    for one in &mut said {
        assert_eq!(one.next().unwrap().unwrap(), "open");
    }
    println!("{MANY} files opened in {:?}", begun.elapsed());
    let during = Process::of(worker).unwrap();
    let (now, then) = (during.descriptor_count(), before.descriptor_count());
    assert!(now <= then + 64, "{now} descriptors, were {then}");
    for one in &mut holders {
        drop(one.stdin.take());
    }
    for one in &mut said {
        assert_eq!(one.next().unwrap().unwrap(), "read");
    }
    for mut one in holders {
        assert!(one.wait().unwrap().success());
    }
    println!("{MANY} files opened and read in {:?}", begun.elapsed());
}

/// Takes what was read of the image out of the page cache.
fn forget_pages(mount: &Path) {
    for view in std::fs::read_dir(mount).into_iter().flatten().flatten() {
        for file in std::fs::read_dir(view.path().join("data")).into_iter().flatten().flatten() {
            let file = File::open(file.path()).unwrap();
            fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        }
    }
    let_pass(Duration::from_millis(200));
}

/// Calls that are given up: of each kind so many.
const GIVEN_UP: u64 = 100;

/// Makes a call many times and goes away each time, somewhat later than the time before: at the beginning, in the middle, after
/// the end.
async fn give_up<T>(mut call: impl AsyncFnMut(u64) -> T) {
    for number in 0..GIVEN_UP {
        let patience = Duration::from_micros(number * number * 4);
        drop(tokio::time::timeout(patience, call(number)).await);
    }
}

/// What containerd sends to the node for the bottom layer of an image.
fn prepare_bottom(image: &Pushed, number: u64) -> tonic::Request<PrepareSnapshotRequest> {
    let layer = image.layers()[0].clone();
    let labels = [
        ("containerd.io/snapshot.ref", chain_ids(&image.info)[0].clone()),
        ("containerd.io/snapshot/cri.image-ref", image.reference.clone()),
        ("containerd.io/snapshot/cri.manifest-digest", image.info.manifest.clone()),
        ("containerd.io/snapshot/cri.layer-digest", layer),
    ];
    let mut request = tonic::Request::new(PrepareSnapshotRequest {
        snapshotter: "millstream".to_owned(),
        key: format!("gone/{number}/extract"),
        parent: String::new(),
        labels: labels.map(|(key, value)| (key.to_owned(), value)).into(),
    });
    request.metadata_mut().insert("containerd-namespace", "gone".parse().unwrap());
    request
}

/// Removes what calls that were given up have made all the same, as containerd's garbage collection would: children first.
async fn remove_snapshots(of: &str, channel: &Channel) {
    let mut client = SnapshotsClient::new(channel.clone());
    let mut list = client.list(ListSnapshotsRequest::default()).await.unwrap().into_inner();
    let mut left = Vec::new();
    while let Some(part) = list.message().await.unwrap() {
        left.extend(part.info.into_iter().filter(|info| info.name.starts_with(of)));
    }
    left.sort_by_key(|info| info.kind() == Kind::Committed);
    for info in left {
        let request = RemoveSnapshotRequest { snapshotter: String::new(), key: info.name };
        client.remove(request).await.unwrap();
    }
}

#[test]
fn clients_that_go_away_in_the_middle_of_calls_leave_nothing() {
    if !can_be_set(&[Need::Containerd2]) {
        return;
    }
    let stage = Stage::with_spoiler().unwrap();
    let large = |seed| vec![Entry::file(format!("large{seed}"), noise(seed, 2 << 20))];
    let image = Image::new().layer(shell().unwrap(), Packing::Gzip).layer(large(1), Packing::Gzip);
    let other = stage.publish("other", &image.clone().layer(large(2), Packing::Gzip)).unwrap();
    let image = stage.publish("image", &image.layer(large(3), Packing::Gzip)).unwrap();
    let (node, containerd) = set(&stage, true);
    let mut cri = stage.cri(&containerd).unwrap();
    warm_up(&stage, &node, &mut cri);
    let gauged = Gauged { node: &node, containerd: &containerd, below: stage.work.path(), namespaces: &[K8S, "gc"] };
    let before = gauged.now().unwrap();
    println!("before: {:?} {} tasks", before.worker, before.tasks);

    stage.spoiler().unwrap().set(Spoiling::Slow(64 << 10));
    cri.pull(&image.reference, None).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    // The name of a snapshot is the node's own; containerd keeps it.
    let parent = name_of(&node, chain_ids(&image.info).last().unwrap());
    let begun = Instant::now();
    runtime.block_on(async {
        let channel = connect(&node.socket()).await.unwrap();
        let snapshots = SnapshotsClient::new(channel.clone());
        give_up(async |number| snapshots.clone().prepare(prepare_bottom(&other, number)).await).await;
        give_up(async |number| {
            let mut request = tonic::Request::new(PrepareSnapshotRequest {
                snapshotter: "millstream".to_owned(),
                key: format!("gone/{number}/active"),
                parent: parent.clone(),
                labels: HashMap::new(),
            });
            request.metadata_mut().insert("containerd-namespace", "gone".parse().unwrap());
            snapshots.clone().prepare(request).await
        })
        .await;
        let client = NodeClient::new(channel.clone());
        give_up(async |_| {
            let request = PrefetchRequest { image: image.reference.clone(), wait: true };
            let mut stream = client.clone().prefetch(request).await.unwrap().into_inner();
            while stream.message().await.unwrap().is_some() {}
        })
        .await;
        remove_snapshots("gone/", &channel).await;
    });
    println!("{} calls given up in {:?}", 3 * GIVEN_UP, begun.elapsed());
    cri.remove_image(&image.reference).unwrap();
    collect_garbage(&containerd);
    // Of the image that was only decided about; its plan counts as wanted for a minute.
    eventually("the end of all layers", 2 * DEADLINE, || {
        node.give_back().unwrap();
        let left = [&image, &other].map(|image| image.layers().pop().unwrap());
        (!node.status().ok()?.layers.iter().any(|layer| left.contains(&layer.layer))).then_some(())
    })
    .unwrap();
    let after = gauged.await_given_back(&before).unwrap();
    println!("after: {:?} {} tasks", after.worker, after.tasks);
    stage.spoiler().unwrap().set(Spoiling::None);
    cri.pull(&image.reference, None).unwrap();
    await_verified(&node, &image).unwrap();
}

/// What the node calls the snapshot of this chain.
fn name_of(node: &Node, chain: &str) -> String {
    let all = node.snapshots().unwrap();
    let of = |info: &&Info| info.labels.get("containerd.io/snapshot.ref").is_some_and(|target| target == chain);
    all.iter().find(of).unwrap().name.clone()
}

#[test]
fn clients_that_go_away_while_an_image_is_indexed_leave_nothing() {
    if !can_be_set(&[Need::Containerd2]) {
        return;
    }
    let mut stage = Stage::set().unwrap();
    stage.stop_server().unwrap();
    let large = vec![Entry::file("large", noise(1, 8 << 20))];
    let image = Image::new().layer(shell().unwrap(), Packing::Gzip).layer(large, Packing::Gzip);
    let image = stage.push("image", &image).unwrap();
    let metrics = Some(free_address().unwrap());
    let options = NodeOptions { server: String::new(), metrics, ..stage.asking_options(Version::V2) };
    let node = Node::start(&stage.work, &options).unwrap();
    let containerd = stage.containerd(Version::V2, &node, false).unwrap();
    // Unpacked by containerd's own snapshotter: the node hears of it by the call only.
    let pull = ["image", "pull", "--hosts-dir", &stage.certs_d().display().to_string(), &image.reference];
    containerd.ctr("default", &pull).unwrap();
    let warm = stage.push("warm", &small().unwrap()).unwrap();
    let pull = ["image", "pull", "--hosts-dir", &stage.certs_d().display().to_string(), &warm.reference];
    containerd.ctr("default", &pull).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let index = |of: &str| IndexImageRequest { image: of.to_owned(), namespace: "default".to_owned() };
    let client = runtime.block_on(async { NodeClient::new(connect(&node.socket()).await.unwrap()) });
    let whole = async |request: IndexImageRequest| {
        let mut stream = client.clone().index_image(request).await?.into_inner();
        while stream.message().await?.is_some() {}
        Ok::<_, tonic::Status>(())
    };
    runtime.block_on(whole(index(&warm.reference))).unwrap();
    let gauged = Gauged { node: &node, containerd: &containerd, below: stage.work.path(), namespaces: &["default"] };
    let before = gauged.now().unwrap();
    println!("before: {:?} {} tasks", before.worker, before.tasks);
    let begun = Instant::now();
    runtime.block_on(give_up(async |_| whole(index(&image.reference)).await));
    println!("{GIVEN_UP} calls given up in {:?}", begun.elapsed());
    let after = gauged.await_given_back(&before).unwrap();
    println!("after: {:?} {} tasks", after.worker, after.tasks);
    runtime.block_on(whole(index(&image.reference))).unwrap();
}
