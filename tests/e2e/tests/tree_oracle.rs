//! What a container sees through Millstream is what it sees through containerd's own overlayfs: names, modes, owners, times,
//! attributes, links, devices, and every byte, read in three ways.

#![allow(clippy::unwrap_used, missing_docs)]

use millstream_e2e::containerd::{Containerd, Version};
use millstream_e2e::cri::{ContainerSpec, Cri, Pod};
use millstream_e2e::daemons::Node;
use millstream_e2e::debian;
use millstream_e2e::image::{Image, shell};
use millstream_e2e::layer::{Entry, Kind, Packing, noise};
use millstream_e2e::need::Need;
use millstream_e2e::stage::{Pushed, Stage, await_decision, await_verified, can_be_set, layers_of};
use millstream_e2e::tree::{Contents, Tree};
use millstream_e2e::web;
use millstream_wire::millstream::v1::decision::Outcome;

/// Differences that are meant: path, what differs, why.
const MEANT: &[(&str, &str, &str)] = &[
    ("/", "mtime", "the root is made when the image is unpacked, or mounted"),
    ("/implied", "mtime", "containerd gives a directory that no layer describes the time of unpacking"),
    ("/implied/by", "mtime", "the same"),
    ("/implied/by/a", "mtime", "the same"),
    ("/implied/by/a/file", "mtime", "the same"),
    ("/change/kept/deep", "mtime", "the same; the layer only removes something in it"),
    ("/change/opaque", "mtime", "the same"),
];
/// Name of the demo image.
const DEMO: &str = "web";
/// The same for the demo image only.
const MEANT_OF_DEMO: &[(&str, &str, &str)] = &[
    ("/etc/hosts", "should not be", "runc makes a place to mount the pod's file on where the image has none"),
    ("/etc", "mtime", "the same"),
];
// Not compared by the tree oracle at all: blocks and sizes of directories, which are those of the disk below, and the
// number of links of directories, which overlayfs gives as 1 where layers are merged.

/// A stage with a node without background downloads, and containerd on it beside containerd on overlayfs.
struct Comparison {
    cri: Cri,
    pod: Pod,
    oracle: Containerd,
    containerd: Containerd,
    node: Node,
    stage: Stage,
}

impl Comparison {
    fn set() -> Self {
        Self::on(Stage::set().unwrap())
    }

    fn on(stage: Stage) -> Self {
        let node = stage.node_on_demand().unwrap();
        let containerd = stage.containerd(Version::V1, &node, false).unwrap();
        let oracle = stage.oracle().unwrap();
        let mut cri = stage.cri(&containerd).unwrap();
        let pod = cri.run_pod("pod").unwrap();
        Self { cri, pod, oracle, containerd, node, stage }
    }

    /// Starts a container of a pulled image that runs `sleep`, and compares its root with the oracle's.
    fn assert_equal(&self, image: &Pushed, name: &str) {
        let spec =
            ContainerSpec { image: &image.reference, command: &["/bin/sleep", "1000"], ..ContainerSpec::default() };
        let container = self.cri.create(&self.pod, name, &spec).unwrap();
        self.cri.start(&container).unwrap();
        let ours = self.containerd.rootfs("k8s.io", &container.id);

        let true_root = self.stage.work.dir(&format!("true-{name}")).unwrap();
        self.oracle.ctr_pull("default", &image.reference).unwrap();
        self.oracle.ctr("default", &["image", "mount", &image.reference, &true_root.display().to_string()]).unwrap();

        let (expected, found) = (Tree::read(&true_root).unwrap(), Tree::read(&ours).unwrap());
        assert!(expected.records().len() > 20);
        let differences = expected.differences(&found);
        let unexpected: Vec<&String> = differences.lines().iter().filter(|line| !is_meant(name, line)).collect();
        assert!(unexpected.is_empty(), "{name}: {unexpected:#?}");
        // A large prime, so that no file is read in order by chance.
        let expected = Contents::read(&true_root, &expected, 1).unwrap();
        let found = Contents::read(&ours, &found, 2_147_483_647).unwrap();
        let differences = expected.differences(&found);
        let unexpected: Vec<&String> = differences.lines().iter().filter(|line| !is_meant(name, line)).collect();
        assert!(unexpected.is_empty(), "{name}: {unexpected:#?}");
        self.cri.remove(&container).unwrap();
    }
}

fn is_meant(image: &str, line: &str) -> bool {
    let of_image = if image == DEMO { MEANT_OF_DEMO } else { &[] };
    MEANT.iter().chain(of_image).any(|(path, what, _)| line.starts_with(&format!("{path}: {what} ")))
}

#[test]
fn a_debian_base_image_is_equal_lazily_and_when_it_is_local() {
    if !can_be_set(&[Need::Program(debian::PROGRAM)]) {
        return;
    }
    let image = debian::image().unwrap();
    let set = Comparison::set();
    let image = set.stage.publish("debian", &image).unwrap();
    set.cri.pull(&image.reference, None).unwrap();
    await_decision(&set.node, &image, Outcome::Lazy, "").unwrap();
    set.assert_equal(&image, "lazy");
    set.node.set_hydration(true).unwrap();
    await_verified(&set.node, &image).unwrap();
    set.assert_equal(&image, "local");
}

#[test]
fn the_demo_image_is_equal_lazily() {
    if !can_be_set(&[Need::Program(web::PROGRAM)]) {
        return;
    }
    let layout = web::layout(&web::default_dir().unwrap()).unwrap();
    let set = Comparison::set();
    let image = set.stage.publish_layout("web", &layout, web::TAG, web::info(&layout).unwrap()).unwrap();
    set.cri.pull(&image.reference, None).unwrap();
    await_decision(&set.node, &image, Outcome::Lazy, "").unwrap();
    set.assert_equal(&image, DEMO);
}

/// What a layer may legally hold, apart from what needs layers below.
fn strange_files() -> Vec<Entry> {
    let long = "long-".repeat(30);
    let capability = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    vec![
        Entry::directory("odd").mode(0o2751).owner(7, 8).mtime(1_600_000_000, 123_456_789),
        Entry::file(b"odd/\xff\xfe bytes", "not UTF-8"),
        Entry::file(b"odd/new\nline and \ttab", "control characters"),
        Entry::file(b"odd/ blank at both ends ", "blanks"),
        Entry::file(format!("odd/{long}"), "long"),
        Entry::directory(format!("odd/{long}directory")),
        Entry::file(format!("odd/{long}directory/{long}file"), "longer than a header's fields"),
        Entry::symlink(format!("odd/{long}link"), format!("{}end", "up/../".repeat(60))),
        Entry::directory("kinds").mode(0o1777),
        Entry::new("kinds/null", Kind::Character(1, 3)).mode(0o666).owner(1, 2),
        Entry::new("kinds/loop", Kind::Block(7, 300)).mode(0o660),
        Entry::new("kinds/pipe", Kind::Fifo).mode(0o622),
        Entry::symlink("kinds/dangling", "../no/where"),
        Entry::symlink("kinds/absolute", "/bin/sh").owner(5, 6).mtime(1_500_000_000, 7),
        Entry::directory("modes"),
        Entry::file("modes/suid", "x").mode(0o4755),
        Entry::file("modes/sgid", "x").mode(0o2755),
        Entry::file("modes/sticky", "x").mode(0o1644),
        Entry::file("modes/none", "x").mode(0),
        Entry::file("modes/far", "x").owner(3_000_000, 4_000_000),
        Entry::file("modes/farther", "x").owner(65_536, 4_294_967_293),
        Entry::file("modes/nanoseconds", "x").mtime(1_500_000_000, 1),
        Entry::file("modes/future", "x").mtime(4_000_000_000, 999_999_999),
        Entry::file("modes/before-1970", "x").mtime(-1000, 500_000_000),
        Entry::file("modes/capable", "x").mode(0o755).xattr("security.capability", capability),
        Entry::file("modes/noted", "x").xattr("user.note", "v\0w\n=").xattr("user.empty", ""),
        Entry::directory("modes/noted-directory").xattr("user.directory", "yes"),
        Entry::directory("sizes"),
        Entry::file("sizes/0", ""),
        Entry::file("sizes/1", "1"),
        Entry::file("sizes/page", noise(2, 4096)),
        Entry::file("sizes/chunk", noise(3, 32 * 1024)),
        Entry::file("sizes/chunk-and-1", noise(4, 32 * 1024 + 1)),
        Entry::file("sizes/zeros", vec![0; 3_000_000]),
        Entry::file("sizes/large", noise(5, 5_000_011)),
        Entry::file("sizes/zeros-too", vec![0; 3_000_000]),
        Entry::sparse("sizes/sparse", 10_000_000, vec![(0, noise(6, 512)), (4_000_000, noise(7, 70_000))]),
        Entry::sparse("sizes/hole", 1_000_000, Vec::new()),
        Entry::directory("links"),
        Entry::file("links/a", "linked").mode(0o640).owner(9, 9).mtime(1_650_000_000, 0),
        Entry::hard_link("links/b", "links/a").mode(0o640).owner(9, 9).mtime(1_650_000_000, 0),
        Entry::hard_link("odd/c", "links/a").mode(0o4711).owner(3, 4).mtime(1_650_000_001, 5),
        Entry::symlink("links/soft", "a"),
        Entry::hard_link("links/soft-too", "links/soft"),
        Entry::directory("twice"),
        Entry::file("twice/file", "first").mode(0o600),
        Entry::file("twice/file", "the second counts"),
        Entry::file("twice/was-file", "x"),
        Entry::directory("twice/was-file"),
        Entry::file("twice/was-file/inside", "y"),
        Entry::directory("twice").mode(0o700).mtime(1_555_555_555, 0),
        Entry::directory("real"),
        Entry::symlink("to-real", "real"),
        Entry::file("to-real/through-a-link", "its parent is a link of this layer"),
        Entry::symlink("absolute-to-real", "/real"),
        Entry::file("absolute-to-real/too", "absolute"),
    ]
}

/// Names of all sorts that the layers above hide or replace.
fn to_be_changed() -> Vec<Entry> {
    let mut entries = vec![Entry::directory("change").mode(0o711).owner(1, 1)];
    for name in ["file", "removed", "becomes-directory", "becomes-link"] {
        entries.push(Entry::file(format!("change/{name}"), format!("old {name}")));
    }
    for name in ["kept", "removed-directory", "opaque", "becomes-file", "again"] {
        entries.push(Entry::directory(format!("change/{name}")).mode(0o750).xattr("user.old", "1"));
        entries.push(Entry::file(format!("change/{name}/old"), format!("old in {name}")));
        entries.push(Entry::directory(format!("change/{name}/deep")));
        entries.push(Entry::file(format!("change/{name}/deep/old"), "deep"));
    }
    entries.push(Entry::directory("implied").mode(0o500).owner(42, 43));
    entries.push(Entry::directory("implied/by").mode(0o510).owner(44, 45));
    entries.push(Entry::file("implied/by/old", "old"));
    entries
}

/// What is done to them.
fn changes() -> Vec<Entry> {
    vec![
        Entry::directory("change").mode(0o755).owner(2, 2).mtime(1_700_000_000, 1),
        Entry::file("change/file", "new file").mode(0o600),
        Entry::whiteout("change/removed"),
        Entry::whiteout("change/removed-directory"),
        Entry::whiteout("change/never-was"),
        Entry::directory("change/opaque").mode(0o701).xattr("user.new", "2"),
        Entry::opaque("change/opaque"),
        Entry::file("change/opaque/new", "alone"),
        Entry::directory("change/becomes-directory"),
        Entry::file("change/becomes-directory/in", "in"),
        Entry::file("change/becomes-file", "now a file"),
        Entry::symlink("change/becomes-link", "kept"),
        Entry::directory("change/kept").mode(0o770),
        Entry::file("change/kept/new", "beside the old"),
        Entry::whiteout("change/kept/deep/old"),
        Entry::whiteout("change/again"),
        Entry::file("implied/by/a/file/deep-down", "only implied directories lead here"),
    ]
}

/// And once more, over what was done.
fn changes_of_changes() -> Vec<Entry> {
    vec![
        Entry::directory("change").mode(0o711).owner(3, 3).mtime(1_710_000_000, 2),
        Entry::directory("change/again"),
        Entry::file("change/again/new", "made again"),
        Entry::whiteout("change/opaque/new"),
        Entry::file("change/removed", "back again"),
        Entry::whiteout("change/becomes-directory"),
        Entry::whiteout("implied/by/old"),
    ]
}

#[test]
fn an_image_of_everything_that_is_legal_is_equal() {
    if !can_be_set(&[]) {
        return;
    }
    let set = Comparison::set();
    let image = Image::new()
        .layer(shell().unwrap(), Packing::Gzip)
        .layer(strange_files(), Packing::GzipMembers(300_001))
        .layer(Vec::new(), Packing::Gzip)
        .layer(to_be_changed(), Packing::Plain)
        .layer(changes(), Packing::Gzip)
        .layer(to_be_changed(), Packing::Plain)
        .layer(changes(), Packing::Gzip)
        .layer(changes_of_changes(), Packing::Gzip)
        .layer(Vec::new(), Packing::Gzip);
    let image = set.stage.publish("legal", &image).unwrap();
    set.cri.pull(&image.reference, None).unwrap();
    await_decision(&set.node, &image, Outcome::Lazy, "").unwrap();
    set.assert_equal(&image, "lazy");
    set.node.set_hydration(true).unwrap();
    await_verified(&set.node, &image).unwrap();
    set.assert_equal(&image, "local");
}

#[test]
fn an_image_of_zstd_layers_is_equal() {
    if !can_be_set(&[]) {
        return;
    }
    let set = Comparison::set();
    let mut long = vec![Entry::file("before", noise(20, 70_000)), Entry::file("long", noise(21, 19 << 20))];
    long.extend(to_be_changed());
    let image = Image::new()
        .layer(shell().unwrap(), Packing::Zstd)
        .layer(strange_files(), Packing::ZstdFrames(300_001))
        // One frame that cannot be entered.
        .layer(long, Packing::Zstd)
        .layer(changes(), Packing::ZstdFrames(1000))
        .layer(changes_of_changes(), Packing::Gzip);
    let image = set.stage.publish("zstd", &image).unwrap();
    set.cri.pull(&image.reference, None).unwrap();
    await_decision(&set.node, &image, Outcome::Lazy, "").unwrap();
    set.assert_equal(&image, "lazy");
    set.node.set_hydration(true).unwrap();
    await_verified(&set.node, &image).unwrap();
    set.assert_equal(&image, "local");
}

#[test]
fn lazy_layers_over_layers_that_were_unpacked_are_equal() {
    if !can_be_set(&[]) {
        return;
    }
    let set = Comparison::set();
    let base = || {
        Image::new()
            .layer(shell().unwrap(), Packing::Gzip)
            .layer(strange_files(), Packing::Gzip)
            .layer(to_be_changed(), Packing::Gzip)
    };
    let below = set.stage.publish("base", &base()).unwrap();
    set.node.set_streaming(false).unwrap();
    set.cri.pull(&below.reference, None).unwrap();
    await_decision(&set.node, &below, Outcome::Deferred, "node.streaming-off").unwrap();
    set.node.set_streaming(true).unwrap();
    let image = base()
        .layer(changes(), Packing::Gzip)
        .layer(changes_of_changes(), Packing::Gzip)
        .layer(vec![Entry::file("top", "top"), Entry::whiteout("odd"), Entry::opaque("links")], Packing::Gzip);
    let image = set.stage.publish("above", &image).unwrap();
    set.cri.pull(&image.reference, None).unwrap();
    await_decision(&set.node, &image, Outcome::Lazy, "").unwrap();
    assert_eq!(layers_of(&set.node, &image).unwrap().len(), image.layers().len());
    set.assert_equal(&image, "lazy-over-local");
    set.assert_equal(&below, "local");
}

#[test]
fn layers_that_must_be_unpacked_over_lazy_ones_are_equal() {
    if !can_be_set(&[]) {
        return;
    }
    let mut set = Comparison::on(Stage::without_packed_content().unwrap());
    let below = || {
        Image::new()
            .layer(shell().unwrap(), Packing::Gzip)
            .layer(strange_files(), Packing::Gzip)
            .layer(to_be_changed(), Packing::Gzip)
    };
    // A hard link to a file of a lower layer is legal for containerd, which copies nothing up for it: only the layer itself.
    let links =
        vec![Entry::directory("cross"), Entry::file("cross/a", "a"), Entry::hard_link("cross/to-lower", "links/a")];
    // One frame of more than 16 MiB cannot be entered.
    let mut long = changes();
    long.push(Entry::file("zeros", vec![0; 20 << 20]));
    for (name, above) in [
        ("zstd", below().layer(long, Packing::Zstd).layer(changes_of_changes(), Packing::Gzip)),
        ("link", below().layer(links, Packing::Gzip)),
    ] {
        let image = set.stage.push(name, &above).unwrap();
        let told = set.stage.import(&image).unwrap();
        assert!(told.contains("cannot be streamed"), "{told}");
        set.stage.count_from_now().unwrap();
        if let Err(error) = set.cri.pull(&image.reference, None) {
            // Then it must be what containerd says without Millstream.
            let truth = set.oracle.ctr_pull("default", &image.reference);
            assert!(truth.is_err(), "{name} can be pulled on overlayfs, but not here: {error:#}");
            continue;
        }
        await_decision(&set.node, &image, Outcome::Deferred, "image.not-eligible").unwrap();
        let unpacked: Vec<usize> = (3..image.layers().len()).collect();
        assert_eq!(set.stage.fetched_whole(&image).unwrap(), unpacked, "{name}");
        set.assert_equal(&image, name);
    }
}
