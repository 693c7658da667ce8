//! containerd's own suite for snapshotters passes on our socket: as containerd's proxy calls it, and through the metadata
//! layer of a real containerd.

#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;
use std::process::{Command, Stdio};

use millstream_e2e::containerd::{Containerd, ContainerdOptions, MILLSTREAM, Snapshotter, Version};
use millstream_e2e::daemons::{NODE, Node, NodeOptions};
use millstream_e2e::need::{self, Need, conformance_suite};
use millstream_e2e::workdir::Workdir;

/// Tests of the suite in the version that `tests/conformance/go.mod` names: all of them, none skipped.
const TESTS: usize = 21;

/// Runs the suite on a socket.
fn run_suite(work: &Workdir, socket: &Path, more: &[&str]) {
    let temporary = work.dir("suite").unwrap();
    let mut command = Command::new(conformance_suite());
    command.args(["-test.v", "-test.timeout=5m", "-socket"]).arg(socket).args(["-snapshotter", MILLSTREAM]).args(more);
    command.env("TMPDIR", &temporary).current_dir(&temporary).stdin(Stdio::null());
    let result = command.output().unwrap();
    let text = String::from_utf8_lossy(&result.stdout).into_owned() + &String::from_utf8_lossy(&result.stderr);
    std::fs::write(work.log("conformance"), &text).unwrap();
    let ended = |how: &str| {
        let lines = text.lines().map(str::trim);
        lines.filter(|line| line.starts_with(&format!("--- {how}: TestSuite/"))).map(str::to_owned).collect::<Vec<_>>()
    };
    assert!(result.status.success(), "{:#?}\n{}", ended("FAIL"), tail(&text));
    assert_eq!(ended("SKIP"), Vec::<String>::new());
    assert_eq!(ended("PASS").len(), TESTS, "{:#?}", ended("PASS"));
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

fn node(work: &Workdir) -> Node {
    Node::start(work, &NodeOptions::new("", &work.dir("certs.d").unwrap())).unwrap()
}

#[test]
fn containerds_suite_passes_on_our_socket() {
    if !need::met(&[Need::Root, Need::Product(NODE), Need::Conformance]) {
        return;
    }
    let work = Workdir::new().unwrap();
    let node = node(&work);
    run_suite(&work, &node.socket(), &[]);
}

#[test]
fn containerds_suite_passes_through_containerd() {
    if !need::met(&[Need::Root, Need::Product(NODE), Need::Conformance, Need::Containerd2]) {
        return;
    }
    let work = Workdir::new().unwrap();
    let node = node(&work);
    let containerd = containerd(&work, node.snapshotter());
    run_suite(&work, &containerd.socket(), &["-containerd"]);
}

fn containerd(work: &Workdir, snapshotter: Snapshotter) -> Containerd {
    let options = ContainerdOptions {
        version: Version::V2,
        snapshotter,
        pause_image: "localhost/none:1".to_owned(),
        certs_d: work.dir("certs.d").unwrap(),
        transfer: false,
        labels: true,
    };
    Containerd::start(work, options).unwrap()
}
