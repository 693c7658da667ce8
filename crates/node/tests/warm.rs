//! The process that reads ahead of programs.

#![allow(clippy::unwrap_used)]

use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, mkfifoat};

/// Whether it runs; one that only waits for its parent to look does not.
fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with('Z')))
}

#[expect(clippy::disallowed_methods, reason = "another process sends no event; the wait has a bound")]
fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn child(parent: u32) -> Option<String> {
    let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    children.split_whitespace().next().map(str::to_owned)
}

fn name(pid: &str) -> String {
    std::fs::read_to_string(Path::new("/proc").join(pid).join("comm")).unwrap_or_default()
}

#[test]
fn it_ends_with_whoever_started_it() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    mkfifoat(CWD, &pipe, Mode::RUSR | Mode::WUSR).unwrap();
    // Held open: its input does not end.
    let _input = OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
    let start = r#""$0" warm "$1" < "$2" & wait"#;
    let mut parent = Command::new("sh")
        .args(["-c", start, env!("CARGO_BIN_EXE_millstreamd")])
        .args([dir.path(), &pipe])
        .spawn()
        .unwrap();
    let reader = eventually("the process", || child(parent.id()).filter(|pid| name(pid) == "millstream-warm\n"));
    assert!(runs(&reader));
    parent.kill().unwrap();
    parent.wait().unwrap();
    eventually("the end of the process", || (!runs(&reader)).then_some(()));
}
