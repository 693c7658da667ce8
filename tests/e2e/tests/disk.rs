//! A node's disk is full, shared, read-only or broken: what is read is right all the same, and it is said what is wrong.

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::time::Duration;

use millstream_e2e::caller::{Caller, lower};
use millstream_e2e::daemons::{Node, NodeOptions};
use millstream_e2e::disk::{DISK, Disk, FileSystem};
use millstream_e2e::image::Image;
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::process::eventually;
use millstream_e2e::registry::free_address;
use millstream_e2e::stage::{Pushed, Stage, await_decision, await_verified, can_be_set, layers_of};
use millstream_wire::millstream::v1::Store;
use millstream_wire::millstream::v1::decision::Outcome;
use millstream_wire::millstream::v1::layer_status::State;

const DEADLINE: Duration = Duration::from_secs(30);
const SIZE: usize = 4 << 20;

fn image(number: u32) -> Image {
    let files = vec![Entry::directory("data"), Entry::file("data/file", noise(number + 1, SIZE))];
    Image::new().layer(files, Packing::Gzip)
}

fn assert_right(root: &Path, number: u32) {
    assert!(std::fs::read(root.join("data/file")).unwrap() == noise(number + 1, SIZE), "wrong bytes of {number}");
}

/// Pulls, and keeps a container that is called like the image's number. Gives the directory of its layers.
fn contain(caller: &Caller, image: &Pushed, number: u32) -> std::path::PathBuf {
    let top = caller.pull(image).unwrap();
    caller.prepare(&number.to_string(), &top, HashMap::new()).unwrap();
    lower(&caller.mounts(&number.to_string()).unwrap()).unwrap()
}

fn store(node: &Node) -> Store {
    node.status().unwrap().store.unwrap()
}

fn metric(address: std::net::SocketAddr, name: &str) -> u64 {
    let mut connection = TcpStream::connect(address).unwrap();
    write!(connection, "GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
    let mut page = String::new();
    connection.read_to_string(&mut page).unwrap();
    let line = page.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name} in {page}"));
    line.trim().parse().unwrap()
}

/// A stage, images, and settings of a node with metrics and these lines of `[store]`.
fn set(images: u32, lines: &str) -> (Stage, Vec<Pushed>, NodeOptions, std::net::SocketAddr) {
    let stage = Stage::set().unwrap();
    let pushed = (0..images).map(|number| stage.publish(&format!("app{number}"), &image(number)).unwrap()).collect();
    let address = free_address().unwrap();
    let more = format!("[store]\n{lines}\n[metrics]\nlisten = \"{address}\"\n");
    let options = NodeOptions { hydration: false, more, ..stage.node_options() };
    (stage, pushed, options, address)
}

fn state(node: &Node, image: &Pushed) -> State {
    layers_of(node, image).unwrap()[0].state()
}

#[test]
fn a_quota_gives_up_what_was_not_used_for_longest_and_never_what_containers_need() {
    if !can_be_set(&[]) {
        return;
    }
    let (mut stage, images, options, address) = set(4, "quota = \"13MiB\"\nhigh_water = 99\nlow_water = 70");
    let node = Node::start(&stage.work, &NodeOptions { hydration: true, ..options }).unwrap();
    let caller = Caller::connect(&node.socket()).unwrap();
    let container = contain(&caller, &images[0], 0);
    await_verified(&node, &images[0]).unwrap();
    for image in &images[1..3] {
        caller.pull(image).unwrap();
        await_verified(&node, image).unwrap();
    }
    assert_eq!((store(&node).evicted_bytes, store(&node).trouble.as_str()), (0, ""));
    let last = contain(&caller, &images[3], 3);
    await_verified(&node, &images[3]).unwrap();
    assert_eq!(
        [0, 1, 2].map(|number: usize| state(&node, &images[number])),
        [State::Verified, State::Lazy, State::Verified]
    );
    let now = store(&node);
    assert!(now.used_bytes <= 13 << 20 && now.evicted_bytes > 0 && now.quota_bytes == 13 << 20, "{now:?}");
    assert_eq!(metric(address, "millstream_store_evicted_bytes_total"), now.evicted_bytes);
    assert_eq!(metric(address, "millstream_store_used_bytes"), now.used_bytes);
    // The first is read again, whole, and the size that containerd is told of is the same all the time.
    let again = contain(&caller, &images[1], 1);
    assert_right(&again, 1);
    // Containers of what stays need nobody.
    stage.go_dark().unwrap();
    assert_right(&container, 0);
    assert_right(&last, 3);
    assert!(store(&node).used_bytes <= 13 << 20);
}

#[test]
fn a_full_disk_serves_without_storing_until_there_is_room() {
    if !can_be_set(DISK) {
        return;
    }
    let (stage, images, options, address) = set(2, "reserve = \"1MiB\"");
    let root = stage.work.path().join("node/root");
    let disk = Disk::make(&stage.work, "disk", FileSystem::Ext4, 64 << 20, &root).unwrap();
    let mut node = Node::start(&stage.work, &options).unwrap();
    let caller = Caller::connect(&node.socket()).unwrap();
    let container = contain(&caller, &images[0], 0);
    let filler = disk.fill(0).unwrap();
    assert_right(&container, 0);
    assert_eq!(store(&node).trouble, "store.full");
    assert!(metric(address, "millstream_reads_total{result=\"unstored\"}") > 0);
    assert_eq!(metric(address, "millstream_reads_total{result=\"failed\"}"), 0);
    assert!(metric(address, "millstream_store_refused_total{code=\"store.full\"}") > 0);
    // Nothing new is begun, for a reason; whether the client can unpack it on such a disk is another matter.
    caller.pull(&images[1]).unwrap_err();
    std::fs::remove_file(filler).unwrap();
    eventually("the next lazy pull", DEADLINE, || caller.pull(&images[1]).ok()).unwrap();
    await_decision(&node, &images[1], Outcome::Lazy, "").unwrap();
    eventually("content that is stored", DEADLINE, || {
        // The kernel keeps what it was given; a new mount of it does not.
        drop_caches();
        assert_right(&container, 0);
        let now = store(&node);
        (now.trouble.is_empty() && now.used_bytes >= SIZE as u64).then_some(())
    })
    .unwrap();
    node.stop().unwrap();
}

fn drop_caches() {
    std::fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
}

#[test]
fn too_little_room_for_tables_declines_new_images_with_a_reason() {
    if !can_be_set(DISK) {
        return;
    }
    let (stage, images, options, _) = set(1, "");
    let root = stage.work.path().join("node/root");
    let disk = Disk::make(&stage.work, "disk", FileSystem::Ext4, 200 << 20, &root).unwrap();
    let mut node = Node::start(&stage.work, &options).unwrap();
    let caller = Caller::connect(&node.socket()).unwrap();
    let filler = disk.fill(12 << 20).unwrap();
    caller.pull(&images[0]).unwrap_err();
    await_decision(&node, &images[0], Outcome::Deferred, "node.no-room").unwrap();
    std::fs::remove_file(filler).unwrap();
    contain(&caller, &images[0], 0);
    await_decision(&node, &images[0], Outcome::Lazy, "").unwrap();
    node.stop().unwrap();
}

/// What is here and what is not is served from elsewhere while the disk is broken, and from the disk when it is back.
fn breaks(kind: FileSystem, code: &str, break_it: fn(&Disk)) {
    let (mut stage, images, options, address) = set(2, "");
    let root = stage.work.path().join("node/root");
    let disk = Disk::make(&stage.work, "disk", kind, 400 << 20, &root).unwrap();
    let mut node = Node::start(&stage.work, &options).unwrap();
    let caller = Caller::connect(&node.socket()).unwrap();
    let here = contain(&caller, &images[0], 0);
    node.set_hydration(true).unwrap();
    await_verified(&node, &images[0]).unwrap();
    node.set_hydration(false).unwrap();
    let lazy = contain(&caller, &images[1], 1);
    break_it(&disk);
    drop_caches();
    assert_right(&here, 0);
    assert_right(&lazy, 1);
    eventually("the name of the trouble", DEADLINE, || (store(&node).trouble == code).then_some(())).unwrap();
    assert_eq!(metric(address, "millstream_reads_total{result=\"failed\"}"), 0);
    assert!(metric(address, &format!("millstream_store_refused_total{{code=\"{code}\"}}")) > 0);
    // The way out: the disk is repaired, the daemon started again.
    node.crash_wholly().unwrap();
    disk.power_off().unwrap();
    disk.power_on().unwrap();
    node.launch().unwrap();
    assert_eq!((state(&node, &images[0]), store(&node).trouble.as_str()), (State::Verified, ""));
    node.set_hydration(true).unwrap();
    await_verified(&node, &images[1]).unwrap();
    stage.go_dark().unwrap();
    assert_right(&here, 0);
    assert_right(&lazy, 1);
    node.stop().unwrap();
}

#[test]
fn a_disk_that_fails_is_done_without() {
    if can_be_set(DISK) {
        breaks(FileSystem::Xfs, "store.failing", |disk| disk.cut().unwrap());
    }
}

#[test]
fn a_disk_that_became_read_only_is_done_without() {
    if can_be_set(DISK) {
        breaks(FileSystem::Ext4, "store.read-only", |disk| disk.find_error().unwrap());
    }
}

/// Every file below `path` that others may enter, read or write, but for what images and containers put there.
fn open_to_others(path: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(path).unwrap() {
        let (path, metadata) = entry.map(|entry| (entry.path(), entry.metadata().unwrap())).unwrap();
        let (mode, kind) = (metadata.mode(), metadata.file_type());
        // The root directory of a container's own files has the mode that its image says.
        if kind.is_dir() && path.ends_with("fs") {
            continue;
        }
        if !kind.is_symlink() && mode & 0o077 != 0 {
            let what = if kind.is_socket() { "socket " } else { "" };
            found.push(format!("{what}{} {:o}", path.display(), mode & 0o7777));
        }
        if kind.is_dir() {
            open_to_others(&path, found);
        }
    }
}

#[test]
fn nobody_else_may_look_at_the_state_of_either_daemon() {
    if !can_be_set(&[]) {
        return;
    }
    let (stage, images, options, _) = set(2, "sync_interval = \"20ms\"");
    let mut node = Node::start(&stage.work, &options).unwrap();
    let caller = Caller::connect(&node.socket()).unwrap();
    assert_right(&contain(&caller, &images[0], 0), 0);
    let socket = node.socket().metadata().unwrap();
    assert!(socket.file_type().is_socket() && socket.mode() & 0o777 == 0o600, "{:o}", socket.mode());
    node.set_hydration(true).unwrap();
    // Comparing layers with each other makes files, too.
    assert_right(&contain(&caller, &images[1], 1), 1);
    await_verified(&node, &images[1]).unwrap();
    caller.prepare("ordinary", "", HashMap::new()).unwrap();
    caller.commit("ordinary", "committed").unwrap();
    node.stop().unwrap();
    let mut found = Vec::new();
    for root in [node.root(), stage.work.path().join("server/store")] {
        assert_eq!(root.metadata().unwrap().mode() & 0o777, 0o700, "{}", root.display());
        open_to_others(&root, &mut found);
    }
    assert!(found.is_empty(), "{found:#?}");
}
