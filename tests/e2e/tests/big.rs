//! Images of many layers, of many files, of many bytes.

#![allow(clippy::unwrap_used, missing_docs)]

use std::io::Read as _;
use std::time::{Duration, Instant};

use millstream_e2e::containerd::Version;
use millstream_e2e::cri::ContainerSpec;
use millstream_e2e::image::{Image, shell};
use millstream_e2e::layer::{Content, Entry, Kind, Noise, Packing, noise};
use millstream_e2e::scenario::{ensure_lazy, lazy_by_cri_of};
use millstream_e2e::stage::{Stage, await_verified_within, can_be_set};
use sha2::{Digest as _, Sha256};

const MIB: u64 = 1 << 20;
/// What millstreamd and millstream-server may take, each, whatever the image.
const MEMORY: u64 = 512 * MIB;

/// The small image's data, so that the same scenario fits, and more layers.
fn with_hello(more: impl IntoIterator<Item = Vec<Entry>>) -> Image {
    let data = vec![Entry::directory("data"), Entry::file("data/hello", "hello from the middle layer\n")];
    let image = Image::new().layer(shell().unwrap(), Packing::Gzip).layer(data, Packing::Gzip);
    let image = more.into_iter().fold(image, |image, layer| image.layer(layer, Packing::Gzip));
    image.command(&["/bin/cat", "/data/hello"])
}

/// It is lazy, becomes local, and reads the same without anybody, in bounded memory.
fn assert_sound(image: &Image) {
    let mut stage = Stage::set().unwrap();
    let image = stage.publish("big", image).unwrap();
    let server = stage.server().unwrap().peak_memory().unwrap();
    let node = stage.node_on_demand().unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    lazy_by_cri_of(&mut stage, &node, &containerd, &image).unwrap();
    let node = node.peak_memory().unwrap();
    println!("memory: server {} MiB after the import, node {} MiB", server / MIB, node / MIB);
    assert!(server < MEMORY && node < MEMORY, "server {server}, node {node}");
}

/// The label that lists an image's layers ends after 56 of them; overlayfs has limits of its own.
#[test]
fn an_image_of_sixty_layers() {
    if can_be_set(&[]) {
        let layer = |number: u32| {
            let name = format!("layers/{number}");
            let same = Entry::file("layers/last", number.to_string());
            vec![Entry::directory("layers"), Entry::file(name, noise(number, 1000)), same]
        };
        assert_sound(&with_hello((0..60).map(layer)));
    }
}

#[test]
fn an_image_of_thirty_thousand_small_files() {
    if can_be_set(&[]) {
        let mut files = vec![Entry::directory("files")];
        for directory in 0..300 {
            files.push(Entry::directory(format!("files/{directory}")));
            files.extend((0..100).map(|file| {
                let number = directory * 100 + file;
                let size = 100 + usize::try_from(number % 4000).unwrap();
                Entry::file(format!("files/{directory}/{file}"), noise(number, size))
            }));
        }
        assert_sound(&with_hello([files]));
    }
}

/// Its files that do not compress: path, seed, bytes.
const LARGE: [(&str, u32, u64); 4] =
    [("large/one", 1, 1536 * MIB), ("large/two", 2, 1536 * MIB), ("more/three", 3, 2048 * MIB), ("more/four", 4, 7)];

/// What is asserted here is asserted of every size: some bytes are there long before all, and memory does not grow with them.
#[test]
#[ignore = "make big"]
fn an_image_of_five_gigabytes() {
    if !can_be_set(&[]) {
        return;
    }
    let said = |what: &str, since: Instant| println!("{what}: {:.1} s", since.elapsed().as_secs_f64());
    let mut stage = Stage::set().unwrap();
    let started = Instant::now();
    let mut image = with_hello([]);
    for directory in ["large", "more"] {
        let mut layer = vec![Entry::directory(directory)];
        let files = LARGE.iter().filter(|(path, ..)| path.starts_with(directory));
        layer.extend(files.map(|(path, seed, size)| Entry::new(path, Kind::File(Content::Noise(*seed, *size)))));
        image = image.layer(layer, Packing::GzipFast);
    }
    let image = stage.push("five", &image).unwrap();
    assert!(image.bytes() > 5_000_000_000);
    said("making and pushing it", started);

    let started = Instant::now();
    stage.import(&image).unwrap();
    let server = stage.server().unwrap().peak_memory().unwrap();
    said("import", started);

    let node = stage.node_on_demand().unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let mut cri = stage.cri(&containerd).unwrap();
    let pod = cri.run_pod("pod").unwrap();
    stage.count_from_now().unwrap();
    let started = Instant::now();
    cri.pull(&image.reference, None).unwrap();
    said("pull", started);
    let run = |name: &str, script: &str, seconds: u64| {
        let command = &["/bin/sh", "-c", script];
        let spec = ContainerSpec { image: &image.reference, command, ..ContainerSpec::default() };
        cri.run(&pod, name, &spec, Duration::from_secs(seconds)).unwrap()
    };
    let page = "dd if=/large/two bs=4096 skip=300000 count=1 2>/dev/null | sha256sum";
    let started = Instant::now();
    let lazily = run("page", page, 30);
    said("a page from the middle", started);
    let (_, seed, size) = LARGE[1];
    assert_eq!(lazily, format!("{}  -\n", sha256_of(seed, size, 300_000 * 4096..300_001 * 4096)));
    ensure_lazy(&stage, &node, &image).unwrap();

    let started = Instant::now();
    node.set_hydration(true).unwrap();
    await_verified_within(&node, &image, Duration::from_secs(900)).unwrap();
    said("verified", started);
    let node_memory = node.peak_memory().unwrap();
    println!("memory: server {} MiB after the import, node {} MiB", server / MIB, node_memory / MIB);
    assert!(server < MEMORY && node_memory < MEMORY, "server {server}, node {node_memory}");
    stage.go_dark().unwrap();
    let all = run("all", "sha256sum /large/one /large/two /more/three /more/four", 300);
    let expected = LARGE.map(|(path, seed, size)| format!("{}  /{path}\n", sha256_of(seed, size, 0..size)));
    assert_eq!(all, expected.concat());
}

/// Of this part of so many bytes of noise.
fn sha256_of(seed: u32, bytes: u64, part: std::ops::Range<u64>) -> String {
    let mut noise = Noise::new(seed, bytes);
    std::io::copy(&mut noise.by_ref().take(part.start), &mut std::io::sink()).unwrap();
    let mut rest = noise.take(part.end - part.start);
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let read = rest.read(&mut buffer).unwrap();
        if read == 0 {
            return hex::encode(hasher.finalize());
        }
        hasher.update(&buffer[..read]);
    }
}
