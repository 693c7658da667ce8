//! The harness proves itself with containerd's own overlayfs before anything of ours is measured with it.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use millstream_e2e::containerd::{Containerd, ContainerdOptions, Snapshotter, Version};
use millstream_e2e::cri::{ContainerSpec, Cri};
use millstream_e2e::image::{self, Image, ImageInfo, MediaTypes};
use millstream_e2e::layer::{Entry, Packing, entries_of, noise};
use millstream_e2e::link::{Link, LinkOptions, PROGRAM};
use millstream_e2e::need::{self, CONTAINERS, Need};
use millstream_e2e::process::eventually;
use millstream_e2e::registry::{Login, Registry, RegistryOptions, Tls};
use millstream_e2e::tree::{Contents, Kind, Tree};
use millstream_e2e::workdir::Workdir;

const DEADLINE: Duration = Duration::from_secs(30);

/// A workdir with a registry that holds `pause:1` and `small:1`.
struct Stage {
    certs_d: PathBuf,
    small: ImageInfo,
    registry: Registry,
    work: Workdir,
}

impl Stage {
    fn set(options: RegistryOptions) -> Self {
        let work = Workdir::new().unwrap();
        let registry = Registry::start(&work, options).unwrap();
        let layout = work.dir("layout").unwrap();
        let small = image::small().unwrap().write(&layout, "small").unwrap();
        image::pause().unwrap().write(&layout, "pause").unwrap();
        registry.push(&layout, "small", "small:1").unwrap();
        registry.push(&layout, "pause", "pause:1").unwrap();
        let certs_d = work.dir("certs.d").unwrap();
        registry.write_hosts(&certs_d).unwrap();
        Self { certs_d, small, registry, work }
    }

    fn containerd(&self, version: Version) -> Containerd {
        let options = ContainerdOptions {
            version,
            snapshotter: Snapshotter::Overlayfs,
            pause_image: self.registry.reference("pause:1"),
            certs_d: self.certs_d.clone(),
            transfer: false,
            labels: true,
        };
        Containerd::start(&self.work, options).unwrap()
    }
}

fn cri_runs_the_small_image(version: Version) {
    let stage = Stage::set(RegistryOptions::loopback().unwrap());
    let containerd = stage.containerd(version);
    let mut cri = Cri::connect(&stage.work, &containerd.socket()).unwrap();
    let image = stage.registry.reference("small:1");
    cri.pull(&image, None).unwrap();
    assert!(cri.has_image(&image).unwrap());
    let pod = cri.run_pod("pod").unwrap();
    let default = ContainerSpec { image: &image, ..ContainerSpec::default() };
    assert_eq!(cri.run(&pod, "default", &default, DEADLINE).unwrap(), "hello from the middle layer\n");
    let listing = ContainerSpec {
        image: &image,
        command: &["/bin/sh", "-c"],
        args: &["ls /data; echo $GREETING; exit 3"],
        env: &[("GREETING", "good day")],
    };
    let container = cri.create(&pod, "listing", &listing).unwrap();
    cri.start(&container).unwrap();
    let ended = cri.wait(&container, DEADLINE).unwrap();
    assert_eq!(ended.output, "hello\nhello-again\nlink\ntop\ngood day\n");
    assert_eq!(ended.exit_code, 3);
    cri.remove(&container).unwrap();
    cri.remove_pods().unwrap();
    cri.remove_image(&image).unwrap();
    assert!(!cri.has_image(&image).unwrap());
}

#[test]
fn containerd_1_runs_an_image_from_code_by_cri() {
    if need::met(CONTAINERS) {
        cri_runs_the_small_image(Version::V1);
    }
}

#[test]
fn containerd_2_runs_an_image_from_code_by_cri() {
    if need::met(CONTAINERS) && need::met(&[Need::Containerd2]) {
        cri_runs_the_small_image(Version::V2);
    }
}

#[test]
fn containerd_2_runs_an_image_from_code_by_ctr() {
    if !need::met(CONTAINERS) || !need::met(&[Need::Containerd2]) {
        return;
    }
    let stage = Stage::set(RegistryOptions::loopback().unwrap());
    let containerd = stage.containerd(Version::V2);
    let image = stage.registry.reference("small:1");
    containerd.ctr_pull("default", &image).unwrap();
    let output = containerd.ctr_run(&stage.work, "default", &image, "one", &["/bin/cat", "/data/hello"]).unwrap();
    assert_eq!(output, "hello from the middle layer\n");
}

#[test]
fn a_running_containers_root_can_be_read_from_outside_and_survives_a_restart_of_containerd() {
    if !need::met(CONTAINERS) {
        return;
    }
    let stage = Stage::set(RegistryOptions::loopback().unwrap());
    let mut containerd = stage.containerd(Version::V1);
    let image = stage.registry.reference("small:1");
    let mut cri = Cri::connect(&stage.work, &containerd.socket()).unwrap();
    cri.pull(&image, None).unwrap();
    let pod = cri.run_pod("pod").unwrap();
    let sleep = ContainerSpec { image: &image, command: &["/bin/sleep", "1000"], ..ContainerSpec::default() };
    let container = cri.create(&pod, "sleep", &sleep).unwrap();
    cri.start(&container).unwrap();
    let data = containerd.rootfs("k8s.io", &container.id).join("data");
    let before = Tree::read(&data).unwrap();
    containerd.restart().unwrap();
    let after = Tree::read(&data).unwrap();
    assert_eq!(before.differences(&after).to_string(), "");
    let again = &after.records()[b"hello-again".as_slice()];
    assert_eq!((again.links, again.first_name.as_slice()), (2, b"hello".as_slice()));
    assert_eq!(again.mtime, (1_704_067_201, 250_000_000));
    assert!(!after.records().contains_key(b"gone".as_slice()));
}

#[test]
fn a_panic_leaves_no_process_mount_or_directory_behind() {
    if !need::met(CONTAINERS) {
        return;
    }
    let (send, receive) = std::sync::mpsc::channel();
    let died = std::thread::spawn(move || {
        let stage = Stage::set(RegistryOptions::loopback().unwrap());
        let containerd = stage.containerd(Version::V1);
        let image = stage.registry.reference("small:1");
        let mut cri = Cri::connect(&stage.work, &containerd.socket()).unwrap();
        cri.pull(&image, None).unwrap();
        let pod = cri.run_pod("pod").unwrap();
        let sleep = ContainerSpec { image: &image, command: &["/bin/sleep", "1000"], ..ContainerSpec::default() };
        let container = cri.create(&pod, "sleep", &sleep).unwrap();
        cri.start(&container).unwrap();
        send.send((stage.work.path().to_owned(), stage.work.netns(), processes(&stage.work.netns()))).unwrap();
        // No order at all: as if the client had died with the test.
        std::mem::forget((cri, containerd));
        panic!("on purpose");
    })
    .join();
    assert!(died.is_err());
    let (path, group, processes_before) = receive.recv().unwrap();
    assert!(processes_before >= 2, "the pod's and the container's processes must have been seen to run");
    // Whoever inherited them may take a moment to reap them.
    eventually("the end of all processes", DEADLINE, || (processes(&group) == 0).then_some(())).unwrap();
    assert!(!path.exists());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&path.display().to_string()), "{mounts}");
}

/// Processes in control groups below this one.
fn processes(group: &str) -> usize {
    let proc = std::fs::read_dir("/proc").unwrap().flatten();
    proc.filter(|entry| {
        std::fs::read_to_string(entry.path().join("cgroup")).is_ok_and(|text| text.contains(&format!("/{group}/")))
    })
    .count()
}

#[test]
fn what_was_pushed_is_pulled_byte_for_byte_in_every_packing_and_media_type() {
    if !need::met(CONTAINERS) {
        return;
    }
    let work = Workdir::new().unwrap();
    let registry = Registry::start(&work, RegistryOptions::loopback().unwrap()).unwrap();
    let layout = work.dir("layout").unwrap();
    for (number, media_types) in [MediaTypes::Oci, MediaTypes::Docker].into_iter().enumerate() {
        let entries = || vec![Entry::directory("d"), Entry::file("d/f", vec![1; 100_000])];
        let image = Image::new()
            .media_types(media_types)
            .layer(entries(), Packing::Plain)
            .layer(entries(), Packing::Gzip)
            .layer(entries(), Packing::GzipMembers(4096));
        let tag = format!("t{number}");
        let info = image.write(&layout, &tag).unwrap();
        registry.push(&layout, &tag, &format!("packed:{tag}")).unwrap();
        let reference = format!("docker://{}", registry.reference(&format!("packed:{tag}")));
        let mut skopeo = std::process::Command::new("skopeo");
        skopeo.args(["inspect", "--raw", "--tls-verify=false", &reference]);
        let raw = millstream_e2e::process::output(&mut skopeo).unwrap();
        let blob = layout.join("blobs/sha256").join(info.manifest.trim_start_matches("sha256:"));
        assert_eq!(raw, std::fs::read_to_string(blob).unwrap());
    }
}

#[test]
fn a_registry_with_tls_and_login_serves_only_who_knows_both() {
    if !need::met(CONTAINERS) {
        return;
    }
    let mut options = RegistryOptions::loopback().unwrap();
    let certificates = tempfile::tempdir().unwrap();
    options.tls = Some(Tls::generate(certificates.path(), &["127.0.0.1", "localhost"]).unwrap());
    let login = Login { user: "user".to_owned(), password: "secret word".to_owned() };
    options.login = Some(login.clone());
    let stage = Stage::set(options);
    let containerd = stage.containerd(Version::V1);
    let cri = Cri::connect(&stage.work, &containerd.socket()).unwrap();
    let image = stage.registry.reference("small:1");
    assert!(cri.pull(&image, None).is_err());
    cri.pull(&image, Some(&login)).unwrap();
    for layer in &stage.small.layers {
        let path = format!("/v2/small/blobs/sha256:{}", layer.digest);
        let served = |request: &&millstream_e2e::registry::Request| {
            request.method == "GET" && request.path == path && request.status == 200
        };
        assert_eq!(stage.registry.requests().unwrap().iter().filter(served).count(), 1, "{path}");
    }
}

#[test]
fn every_attribute_survives_the_way_through_layer_registry_and_overlayfs() {
    if !need::met(CONTAINERS) {
        return;
    }
    // cap_net_raw=ep, version 2 of the format.
    let capability = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let long = "n".repeat(120);
    let stage = Stage::set(RegistryOptions::loopback().unwrap());
    let entries = vec![
        Entry::directory("w").mode(0o1751).owner(7, 8).mtime(1_600_000_000, 123_456_789),
        Entry::file("w/suid", "x").mode(0o4755).xattr("user.note", "v\0w"),
        Entry::file("w/capable", "y").mode(0o755).xattr("security.capability", capability),
        Entry::file("w/far", "z").owner(3_000_000, 4_000_000).mtime(1_500_000_000, 1),
        Entry::file(format!("w/{long}"), "long"),
        Entry::symlink("w/dangling", format!("../{}", "t/".repeat(80))),
        Entry::hard_link("w/suid-again", "w/suid").mode(0o4755).xattr("user.note", "v\0w"),
        Entry::new("w/null", millstream_e2e::layer::Kind::Character(1, 3)).mode(0o666),
        Entry::new("w/pipe", millstream_e2e::layer::Kind::Fifo),
        Entry::file("w/empty", ""),
        Entry::file("w/big", (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>()),
    ];
    let layout = stage.work.dir("layout").unwrap();
    Image::new().layer(entries, Packing::GzipMembers(100_000)).write(&layout, "w").unwrap();
    stage.registry.push(&layout, "w", "w:1").unwrap();
    let containerd = stage.containerd(Version::V1);
    let image = stage.registry.reference("w:1");
    containerd.ctr_pull("default", &image).unwrap();
    let at = stage.work.dir("mounted").unwrap();
    containerd.ctr("default", &["image", "mount", &image, &at.display().to_string()]).unwrap();
    let first = Tree::read(&at).unwrap();
    let of = |path: &str| first.records()[path.as_bytes()].clone();
    assert_eq!((of("w").mode, of("w").uid, of("w").gid, of("w").mtime), (0o1751, 7, 8, (1_600_000_000, 123_456_789)));
    assert_eq!((of("w/suid").mode, of("w/suid").links), (0o4755, 2));
    assert_eq!(of("w/suid").xattrs[b"user.note".as_slice()], b"v\0w");
    assert_eq!(of("w/capable").xattrs[b"security.capability".as_slice()], capability);
    assert_eq!((of("w/far").uid, of("w/far").gid, of("w/far").mtime), (3_000_000, 4_000_000, (1_500_000_000, 1)));
    assert_eq!((of("w/null").kind, of("w/null").device, of("w/pipe").kind), (Kind::Character, (1, 3), Kind::Fifo));
    assert_eq!(of("w/dangling").target.len(), 163);
    let contents = Contents::read(&at, &first, 1).unwrap();
    assert_eq!(contents.files().len(), 6);

    // The mounted tree, packed again from what can be seen of it, must come out the same.
    Image::new().layer(entries_of(&at).unwrap(), Packing::Plain).write(&layout, "again").unwrap();
    stage.registry.push(&layout, "again", "again:1").unwrap();
    let image = stage.registry.reference("again:1");
    containerd.ctr_pull("default", &image).unwrap();
    let at = stage.work.dir("mounted-again").unwrap();
    containerd.ctr("default", &["image", "mount", &image, &at.display().to_string()]).unwrap();
    let second = Tree::read(&at).unwrap();
    let differences = first.differences(&second).to_string();
    // The root itself is in no layer.
    let differences: Vec<&str> = differences.lines().filter(|line| !line.starts_with("/: ")).collect();
    assert_eq!(differences, Vec::<&str>::new());
    assert_eq!(contents.differences(&Contents::read(&at, &second, 2).unwrap()).to_string(), "");
}

#[test]
fn the_line_is_as_slow_as_it_says_and_counts_what_passes() {
    if !need::met(CONTAINERS) || !need::met(&[Need::Program("ip"), Need::Program("tc"), Need::Product(PROGRAM)]) {
        return;
    }
    let work = Workdir::new().unwrap();
    let mut link = Link::up(&work, LinkOptions::default()).unwrap();
    let behind: SocketAddr = "127.0.0.1:5000".parse().unwrap();
    let public = link.expose(5000, behind).unwrap();
    let options = RegistryOptions { address: behind, tls: None, login: None };
    let registry = Registry::start_behind(&work, options, public, &link).unwrap();
    let layout = work.dir("layout").unwrap();
    let image = Image::new().layer(vec![Entry::file("noise", noise(1, 8 << 20))], Packing::Gzip);
    let blob = image.write(&layout, "noise").unwrap().layers[0].size;
    let (traffic, started) = (link.traffic().unwrap(), Instant::now());
    registry.push(&layout, "noise", "noise:1").unwrap();
    let took = started.elapsed();
    let at_least = Duration::from_secs_f64(blob as f64 * 8.0 / 200e6);
    assert!(took >= at_least, "{blob} bytes in {took:?}, faster than {at_least:?}");
    assert!(took < at_least * 10, "{blob} bytes in {took:?}");
    let counts = link.counts().unwrap();
    assert!(counts.sent >= blob && counts.turns >= 5, "{counts:?}");
    let sent = link.traffic().unwrap().sent_bytes - traffic.sent_bytes;
    assert!(sent >= counts.sent && sent < counts.sent * 11 / 10, "{sent} on the line, {counts:?}");
}

/// What a hard link's own entry says is applied to the inode that it names: the last entry wins, whatever its name.
fn a_hard_links_entry_changes_its_inode(version: Version) {
    let stage = Stage::set(RegistryOptions::loopback().unwrap());
    let entries = vec![
        Entry::file("a", "x").mode(0o644).owner(1, 2).mtime(1000, 5).xattr("user.a", "1").xattr("user.both", "a"),
        Entry::hard_link("b", "a").mode(0o4711).owner(3, 4).mtime(2000, 6).xattr("user.b", "2").xattr("user.both", "b"),
        Entry::directory("d"),
        Entry::file("d/a", "x").mode(0o644).owner(1, 2).mtime(1000, 5),
        Entry::hard_link("d/b", "d/a").mode(0o4711).owner(3, 4).mtime(2000, 6),
    ];
    let layout = stage.work.dir("layout").unwrap();
    Image::new().layer(entries, Packing::Gzip).write(&layout, "links").unwrap();
    stage.registry.push(&layout, "links", "links:1").unwrap();
    let containerd = stage.containerd(version);
    let image = stage.registry.reference("links:1");
    containerd.ctr_pull("default", &image).unwrap();
    let at = stage.work.dir("mounted").unwrap();
    containerd.ctr("default", &["image", "mount", &image, &at.display().to_string()]).unwrap();
    let tree = Tree::read(&at).unwrap();
    let record = |path: &str| tree.records()[path.as_bytes()].clone();
    for (path, xattrs) in [("a", 3), ("d/a", 0)] {
        let seen = record(path);
        assert_eq!((seen.mode, seen.uid, seen.gid, seen.mtime, seen.links), (0o4711, 3, 4, (2000, 6), 2), "{path}");
        assert_eq!(seen.xattrs.len(), xattrs, "{path}: {:?}", seen.xattrs);
    }
}

#[test]
fn containerd_1_applies_a_hard_links_own_owner_and_time_to_the_inode() {
    if need::met(CONTAINERS) {
        a_hard_links_entry_changes_its_inode(Version::V1);
    }
}

#[test]
fn containerd_2_applies_a_hard_links_own_owner_and_time_to_the_inode() {
    if need::met(CONTAINERS) && need::met(&[Need::Containerd2]) {
        a_hard_links_entry_changes_its_inode(Version::V2);
    }
}
