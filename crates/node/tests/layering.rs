//! The drawing in `crates/README.md`, held to what cargo says: which crate may use which, and who may do what.

#![allow(clippy::unwrap_used, reason = "a test that panics has found something")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Rows of the drawing, from below; arrows point to a lower row.
const ROWS: [(&str, &[&str]); 6] = [
    ("pure", &["inflate", "oci", "toc", "profile"]),
    ("contract", &["source"]),
    ("world", &["sys", "registry", "chunkstore", "wire", "containerd", "settings", "metrics"]),
    ("mechanism", &["layerfs", "fuse", "prefetch", "snapshots"]),
    ("edge", &["node", "server", "cli"]),
    ("tests", &["e2e"]),
];

/// The arrows within a row; the drawing shows each of them.
const WITHIN_A_ROW: [(&str, &str); 8] = [
    ("toc", "inflate"),
    ("toc", "oci"),
    ("profile", "oci"),
    ("profile", "toc"),
    ("chunkstore", "sys"),
    ("containerd", "wire"),
    ("fuse", "layerfs"),
    ("node", "server"),
];

/// Every arrow between crates of this workspace, without what only their tests use.
const ARROWS: [(&str, &[&str]); 20] = [
    ("inflate", &[]),
    ("metrics", &[]),
    ("oci", &[]),
    ("settings", &[]),
    ("toc", &["inflate", "oci"]),
    ("profile", &["oci", "toc"]),
    ("source", &["oci", "profile", "toc"]),
    ("sys", &[]),
    ("registry", &["oci", "source", "toc"]),
    ("chunkstore", &["oci", "sys", "toc"]),
    ("wire", &[]),
    ("containerd", &["oci", "wire"]),
    ("layerfs", &["toc"]),
    ("fuse", &["layerfs", "source", "sys", "toc"]),
    ("prefetch", &["chunkstore", "oci", "profile", "source", "toc"]),
    ("snapshots", &["oci", "source", "wire"]),
    (
        "node",
        &[
            "chunkstore",
            "containerd",
            "fuse",
            "layerfs",
            "metrics",
            "oci",
            "prefetch",
            "profile",
            "registry",
            "server",
            "settings",
            "snapshots",
            "source",
            "sys",
            "toc",
            "wire",
        ],
    ),
    ("server", &["metrics", "oci", "profile", "registry", "settings", "source", "toc", "wire"]),
    ("cli", &["containerd", "oci", "registry", "settings", "source", "toc", "wire"]),
    ("e2e", &["sys", "wire"]),
];

/// Crates of others that stand for a runtime, a network or a clock.
const OUTSIDE_WORLD: [&str; 6] = ["tokio", "tonic", "reqwest", "hyper-util", "futures", "redb"];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

/// Crates of this workspace with what each needs to be built, tests left out. Ours without the prefix `millstream-`.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(workspace())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let short = |name: &Value| name.as_str().unwrap().trim_start_matches("millstream-").to_owned();
    packages
        .iter()
        .map(|package| {
            let all = package["dependencies"].as_array().unwrap();
            // An ordinary dependency has no kind; those of tests and build scripts have one.
            let normal = all.iter().filter(|dependency| dependency["kind"].is_null());
            (short(&package["name"]), normal.map(|dependency| short(&dependency["name"])).collect())
        })
        .collect()
}

fn row(name: &str) -> usize {
    ROWS.iter().position(|(_, crates)| crates.contains(&name)).unwrap_or_else(|| panic!("{name} is not in the drawing"))
}

#[test]
fn crates_depend_on_each_other_as_drawn() {
    let all = dependencies();
    let found: BTreeMap<&str, BTreeSet<&str>> = all
        .iter()
        .map(|(name, uses)| {
            let ours = uses.iter().map(String::as_str).filter(|used| all.contains_key(*used));
            (name.as_str(), ours.collect())
        })
        .collect();
    let drawn: BTreeMap<&str, BTreeSet<&str>> =
        ARROWS.iter().map(|(name, uses)| (*name, uses.iter().copied().collect())).collect();
    assert_eq!(found, drawn, "left: Cargo.toml, right: the table; crates/README.md must say the same");
}

#[test]
fn arrows_point_downward() {
    for (name, uses) in ARROWS {
        for used in uses {
            let downward = row(used) < row(name);
            assert!(downward || WITHIN_A_ROW.contains(&(name, used)), "{name} ({}) uses {used}", ROWS[row(name)].0);
        }
    }
}

#[test]
fn only_registry_knows_http_and_pure_crates_know_no_world() {
    for (name, uses) in dependencies() {
        let may = name == "registry" || row(&name) >= row("node");
        for http in ["reqwest", "oci-client"] {
            assert!(may || !uses.contains(http), "{name} depends on {http}");
        }
        if ROWS[0].1.contains(&name.as_str()) || name == "layerfs" {
            for world in OUTSIDE_WORLD {
                assert!(!uses.contains(world), "{name} depends on {world}");
            }
        }
    }
}

#[test]
fn settings_are_known_to_binaries_only() {
    for (name, uses) in ARROWS {
        assert!(row(name) >= row("node") || !uses.contains(&"settings"), "{name} uses settings");
    }
}

/// Files of Rust below `dir`.
fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn only_sys_and_inflate_hold_unsafe_code() {
    let mut with = BTreeSet::new();
    for (_, crates) in ROWS.iter().filter(|(row, _)| *row != "tests") {
        for name in *crates {
            let mut files = Vec::new();
            sources(&workspace().join("crates").join(name).join("src"), &mut files);
            assert!(!files.is_empty(), "{name} has no sources");
            for file in files {
                let text = std::fs::read_to_string(&file).unwrap();
                let code = text.lines().map(str::trim_start).filter(|line| !line.starts_with("//"));
                let marks = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"];
                if code.into_iter().any(|line| marks.iter().any(|mark| line.contains(mark))) {
                    with.insert(*name);
                }
            }
        }
    }
    assert_eq!(with, BTreeSet::from(["inflate", "sys"]));
}
