//! No archive makes Millstream show what containerd would not: the hostile-tar table, with real containerds as the judges.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../../../crates/toc/tests/hostile/mod.rs"]
mod table;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use millstream_e2e::containerd::{Containerd, Version};
use millstream_e2e::cri::Cri;
use millstream_e2e::daemons::Node;
use millstream_e2e::image::{Blob, Image};
use millstream_e2e::layer::{Entry, Packing};
use millstream_e2e::need::Need;
use millstream_e2e::stage::{Pushed, Stage, can_be_set};
use millstream_e2e::tree::{Contents, Tree};
use millstream_e2e::view::View;
use millstream_wire::millstream::v1::decision::Outcome;
use sha2::{Digest as _, Sha256};
use table::{Canary, Expect, Media, Place, Row, make};

/// One image that is made of a row.
struct Case {
    name: String,
    expect: Expect,
    image: Pushed,
}

/// What one containerd made of an image, or its reason not to.
type Made = Result<Unpacked, String>;

struct Unpacked {
    tree: Tree,
    contents: Contents,
}

fn blob(bytes: &[u8], media: Media, tar: &[u8]) -> Blob {
    let suffix = match media {
        Media::Plain => "",
        Media::Gzip => "+gzip",
    };
    Blob {
        bytes: bytes.to_vec(),
        media_type: format!("application/vnd.oci.image.layer.v1.tar{suffix}"),
        diff_id: Sha256::digest(tar).iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}

/// The images of a row: by itself, and over a layer with names for it to change.
fn images_of(row: &Row) -> Vec<(String, Expect, Image)> {
    let base = table::base();
    let layer = || blob(&row.blob, row.media, &row.tar);
    let mut images = Vec::new();
    if row.place != Place::Alone {
        let image = Image::new().blob(blob(&base, Media::Plain, &base)).blob(layer());
        images.push((format!("{}, over a layer", row.name), row.over_base.unwrap_or(row.expect), image));
    }
    if row.place != Place::OverBase {
        images.push((row.name.clone(), row.expect, Image::new().blob(layer())));
    }
    images
}

/// Imports every image, a few at a time; gives what each import said if it failed.
fn import_all(stage: &Stage, cases: &[Case]) -> Vec<Option<String>> {
    let import = |case: &Case| stage.import(&case.image).err().map(|error| format!("{error:#}"));
    std::thread::scope(|scope| {
        let parts: Vec<_> = cases.chunks(cases.len().div_ceil(4).max(1)).collect();
        let threads: Vec<_> =
            parts.iter().map(|part| scope.spawn(|| part.iter().map(import).collect::<Vec<_>>())).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

/// Pulls every image and reads what comes of it.
fn unpack_all(containerd: &Containerd, cri: &Cri, mounts: &Path, cases: &[Case]) -> Vec<Made> {
    let unpack = |(number, case): (usize, &Case)| {
        cri.pull(&case.image.reference, None)?;
        let view = View::mount(containerd, "k8s.io", &case.image.info, &mounts.join(number.to_string()))?;
        let tree = Tree::read(view.root())?;
        let contents = Contents::read(view.root(), &tree, 7)?;
        Ok(Unpacked { tree, contents })
    };
    let text = |error: anyhow::Error| format!("{error:#}");
    cases.iter().enumerate().map(|case| unpack(case).map_err(text)).collect()
}

/// How two trees differ, but for the time of directories that no layer describes: containerd gives them that of unpacking, which
/// is after `start`.
fn differences(start: i64, expected: &Unpacked, found: &Unpacked) -> Vec<String> {
    let made_now = |line: &String| {
        let time = line.split_once(": mtime is ").and_then(|(_, times)| times.split_once(", should be "));
        time.is_some_and(|(_, time)| time.split('.').next().and_then(|seconds| seconds.parse().ok()) >= Some(start))
    };
    let tree = expected.tree.differences(&found.tree);
    let contents = expected.contents.differences(&found.contents);
    tree.lines().iter().chain(contents.lines()).filter(|line| !made_now(line)).cloned().collect()
}

/// What is wrong with what was made of a case, if anything.
fn judge(start: i64, case: &Case, outcome: Option<Outcome>, ours: &Made, oracles: [&Made; 2]) -> Vec<String> {
    let mut wrong = Vec::new();
    let lazy = outcome == Some(Outcome::Lazy);
    if lazy != (case.expect == Expect::Lazy) {
        wrong.push(format!("should be {:?}, was {outcome:?}", case.expect));
    }
    for (version, oracle) in ["1.6", "2"].iter().zip(oracles) {
        match (ours, oracle) {
            (Ok(found), Ok(expected)) => {
                if matches!(case.expect, Expect::Refused(_)) {
                    wrong.push(format!("containerd {version} takes it"));
                }
                let lines = differences(start, expected, found);
                wrong.extend(lines.iter().map(|line| format!("not as containerd {version}: {line}")));
            }
            (Ok(_), Err(error)) => wrong.push(format!("containerd {version} refuses it: {error}")),
            (Err(error), Ok(_)) => wrong.push(format!("only we refuse it, not containerd {version}: {error}")),
            (Err(_), Err(_)) => {}
        }
    }
    wrong
}

fn outcome(node: &Node, image: &Pushed) -> Option<Outcome> {
    let answer = node.explain(&image.reference).unwrap();
    answer.decisions.first().map(millstream_wire::millstream::v1::Decision::outcome)
}

/// Mode, owner, time with nanoseconds, number of names, content.
type State = (u32, u32, i64, i64, u64, Vec<u8>);

/// Everything that can be seen of a directory and the files in it.
fn state_of(dir: &Path) -> BTreeMap<PathBuf, State> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let see = |path: PathBuf| {
        let meta = path.symlink_metadata().unwrap();
        let content = if meta.is_file() { std::fs::read(&path).unwrap() } else { Vec::new() };
        (path, (meta.mode(), meta.uid(), meta.mtime(), meta.mtime_nsec(), meta.nlink(), content))
    };
    entries.chain([dir.to_owned()]).map(see).collect()
}

#[test]
fn hostile_archives_show_what_containerd_shows_or_nothing() {
    if !can_be_set(&[Need::Containerd2]) {
        return;
    }
    let start = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap();
    let stage = Stage::set().unwrap();
    let canaries = stage.work.dir("canaries").unwrap();
    std::fs::write(canaries.join("canary"), "as it was").unwrap();
    let before = state_of(&canaries);
    let rows = table::rows(&Canary { dir: canaries.to_str().unwrap(), name: "canary" });
    let only = std::env::var("MILLSTREAM_HOSTILE_ROW").unwrap_or_default();
    let (mut names, mut images) = (Vec::new(), Vec::new());
    for (name, expect, image) in rows.iter().filter(|row| row.name.contains(&only)).flat_map(images_of) {
        names.push((name, expect));
        images.push(image);
    }
    let clock = Instant::now();
    let lap = |what: &str| println!("{what} after {:.1} s", clock.elapsed().as_secs_f64());
    let pushed = stage.push_many("hostile", &images).unwrap();
    let cases: Vec<Case> =
        names.into_iter().zip(pushed).map(|((name, expect), image)| Case { name, expect, image }).collect();
    lap("pushed");
    let imports = import_all(&stage, &cases);
    lap("imported");

    let node = stage.node_on_demand().unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let (one, two) = (stage.oracle_of(Version::V1).unwrap(), stage.oracle_of(Version::V2).unwrap());
    let unpack = |containerd: &Containerd, name: &str| {
        let cri = stage.cri(containerd).unwrap();
        let made = unpack_all(containerd, &cri, &stage.work.dir(name).unwrap(), &cases);
        lap(name);
        made
    };
    let (ours, one, two) = std::thread::scope(|scope| {
        let one = scope.spawn(|| unpack(&one, "true-1"));
        let two = scope.spawn(|| unpack(&two, "true-2"));
        (unpack(&containerd, "ours"), one.join().unwrap(), two.join().unwrap())
    });
    let mut wrong = Vec::new();
    for (number, case) in cases.iter().enumerate() {
        let outcome = outcome(&node, &case.image);
        let lines = judge(start, case, outcome, &ours[number], [&one[number], &two[number]]);
        if lines.is_empty() {
            continue;
        }
        let import = imports[number].as_deref().unwrap_or("fine");
        wrong.push(format!("{}: {} (import: {import})", case.name, lines.join("; ")));
    }
    lap("judged");
    assert_eq!(state_of(&canaries), before, "the canary");
    assert!(wrong.is_empty(), "{} of {} images:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

/// Layers that are small to send and cost much to read, with what the import must say of each.
fn bombs() -> Vec<(Vec<u8>, Media, &'static str)> {
    let head = |member: make::Member, size: &[u8]| member.put(make::SIZE, size).bytes()[..512].to_vec();
    // 8 GiB of zeros; nobody comes to their end.
    let first = gzip(&head(make::file("zeros", b""), b"77777777777\0"));
    let zeros = [first, gzip(&vec![0; 4 << 20]).repeat(128)].concat();
    let many = (0..30_000).map(|number| make::file(format!("f{number}"), b""));
    let many = many.fold(make::Archive::new(), make::Archive::with).end();
    let record = head(make::member(b'x', "gibibyte", b""), b"10000000000\0");
    let hole = [("major", "1"), ("minor", "0"), ("name", "hole"), ("realsize", "1099511627776")];
    let hole = hole.iter().fold(make::file("GNUSparseFile.0/x", &make::padded(b"0\n")), |member, (key, value)| {
        member.pax(format!("GNU.sparse.{key}"), value)
    });
    let hole = make::Archive::new().with(hole).end();
    let deep = make::Archive::new().with(make::file("d/".repeat(1900) + "f", b"")).end();
    vec![
        (zeros, Media::Gzip, "hint: the server's import.budget.ratio"),
        (gzip(&many), Media::Gzip, "hint: the server's import.budget.entries"),
        (record, Media::Plain, "extended header is too long"),
        (hole, Media::Plain, "hint: the server's import.budget.file_size"),
        (deep, Media::Plain, "directories above a file"),
    ]
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn bombs_are_declined_and_the_server_goes_on_serving() {
    const MOST_MEMORY: u64 = 512 << 20;
    const MOST_TIME: Duration = Duration::from_secs(60);
    if !can_be_set(&[]) {
        return;
    }
    let mut stage = Stage::set().unwrap();
    stage.limit_entries(10_000).unwrap();
    let bombs = bombs();
    let image = |(bytes, media, _): &(Vec<u8>, Media, &str)| Image::new().blob(blob(bytes, *media, b"never looked at"));
    let pushed = stage.push_many("bombs", &bombs.iter().map(image).collect::<Vec<_>>()).unwrap();
    let honest: Vec<Image> =
        (0..10).map(|number| Image::new().layer(vec![Entry::file("f", format!("{number}"))], Packing::Gzip)).collect();
    let honest = stage.push_many("honest", &honest).unwrap();
    let started = Instant::now();
    let (said, others) = std::thread::scope(|scope| {
        let said = scope.spawn(|| pushed.iter().map(|image| stage.import(image).unwrap()).collect::<Vec<_>>());
        let others: Vec<Duration> = honest
            .iter()
            .map(|image| {
                let started = Instant::now();
                stage.import(image).unwrap();
                started.elapsed()
            })
            .collect();
        (said.join().unwrap(), others)
    });
    assert!(started.elapsed() < MOST_TIME, "{:?}", started.elapsed());
    for ((_, _, expected), said) in bombs.iter().zip(&said) {
        assert!(said.contains(expected), "{expected}: {said}");
    }
    assert!(others.iter().all(|took| *took < MOST_TIME / 6), "{others:?}");
    let peak = stage.server().unwrap().peak_memory().unwrap();
    assert!(peak < MOST_MEMORY, "{} MiB", peak >> 20);
}
