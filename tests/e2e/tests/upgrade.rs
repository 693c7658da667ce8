//! Workers are exchanged for those of another program while containers read; what cannot work is refused or taken back.

#![allow(clippy::unwrap_used, missing_docs)]

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use millstream_e2e::busy::Busy;
use millstream_e2e::daemons::NODE;
use millstream_e2e::need::product;
use millstream_e2e::process::eventually;
use millstream_e2e::stage::can_be_set;
use rustix::process::{Pid, Signal, kill_process};

const DEADLINE: Duration = Duration::from_secs(60);

fn upgrade(busy: &Busy, program: Option<&Path>) -> Output {
    let mut command = Command::new(product(NODE).unwrap());
    command.arg("--config").arg(busy.node.config()).arg("upgrade");
    if let Some(program) = program {
        command.arg("--binary").arg(program);
    }
    command.output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// What the worker runs.
fn program_of(worker: Pid) -> PathBuf {
    std::fs::read_link(format!("/proc/{}/exe", worker.as_raw_nonzero())).unwrap()
}

/// A program that is no `millstreamd`.
fn script(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// One turn: what is asked for fails, says why, and the worker stays who it was.
fn refused(busy: &Busy, program: Option<&Path>, expected: &str) {
    let (before, worker) = (busy.done().unwrap(), busy.worker().unwrap());
    let said = upgrade(busy, program);
    assert!(!said.status.success() && text(&said).contains(expected), "{}", text(&said));
    assert_eq!(busy.worker().unwrap(), worker, "{}", text(&said));
    busy.await_progress(&before).unwrap();
}

fn accepted(busy: &Busy, program: Option<&Path>, expected: &Path) {
    let (before, worker) = (busy.done().unwrap(), busy.worker().unwrap());
    let said = upgrade(busy, program);
    assert!(said.status.success(), "{}", text(&said));
    println!("{}", text(&said).trim());
    let now = busy.worker().unwrap();
    assert_ne!(now, worker);
    assert_eq!(program_of(now), expected);
    busy.await_progress(&before).unwrap();
}

fn exchange(duration: Duration) {
    let busy = Busy::start(1).unwrap();
    let dir = busy.stage.work.dir("programs").unwrap();
    let own = product(NODE).unwrap().canonicalize().unwrap();
    let other = dir.join("millstreamd-other");
    std::fs::copy(&own, &other).unwrap();
    let fails = script(&dir, "fails", "exit 3");
    let hangs = script(&dir, "hangs", "exec sleep 1000");
    // Says that it is ready, and ends when it is to take over: then the old worker is gone already.
    let lies = script(&dir, "lies", "printf '{\"ready\":\"9\"}' >&5\ndd bs=200000 count=2 <&5 >/dev/null 2>&1\nexit 4");
    let settings = std::fs::read_to_string(busy.node.config()).unwrap();

    refused(&busy, Some(&hangs), "does not get ready within");
    let begun = Instant::now();
    let mut turns = 0;
    while turns == 0 || begun.elapsed() < duration {
        // Up, down, and up again in place: the file at the program's own path is another one now.
        accepted(&busy, Some(&other), &other);
        let replaced = dir.join("new");
        std::fs::copy(&own, &replaced).unwrap();
        std::fs::rename(&replaced, &other).unwrap();
        accepted(&busy, None, &other);

        refused(&busy, Some(&fails), "ended (exit status: 3)");
        refused(&busy, Some(&dir.join("absent")), "absent");

        // A reload with settings that cannot work changes nothing, and neither does a death afterwards.
        std::fs::write(busy.node.config(), settings.replace("[fetch]", "[fetsch]")).unwrap();
        reload_by_signal(&busy);
        std::fs::write(busy.node.config(), settings.replace("root = ", "root = \"/elsewhere\" # ")).unwrap();
        refused_by_socket(&busy, "root is ");
        let worker = busy.worker().unwrap();
        let before = failed_upgrades(&busy);
        let (_, gone) = busy.kill(worker, Signal::KILL).unwrap();
        // Asked for while there is no worker, a reload waits for the next one.
        hang_up(&busy);
        busy.await_read(gone).unwrap();
        eventually("the reload", DEADLINE, || (failed_upgrades(&busy) > before).then_some(())).unwrap();
        std::fs::write(busy.node.config(), &settings).unwrap();

        // One that fails when it is too late to refuse: back to what was.
        let worker = busy.worker().unwrap();
        let said = upgrade(&busy, Some(&lies));
        assert!(!said.status.success() && text(&said).contains("went back"), "{}", text(&said));
        // The answer comes before the old program serves again.
        let before = busy.done().unwrap();
        busy.await_progress(&before).unwrap();
        let now = busy.worker().unwrap();
        assert!(now != worker && program_of(now) == other);

        // State that a newer program has written is left to that.
        let format = busy.node.root().join("format");
        let written = std::fs::read_to_string(&format).unwrap();
        std::fs::write(&format, "99\n").unwrap();
        refused(&busy, Some(&own), "written by a newer millstreamd");
        std::fs::write(&format, written).unwrap();

        accepted(&busy, Some(&own), &own);
        turns += 1;
    }
    let report = busy.end().unwrap();
    println!("{turns} turns; {report:#?}");
}

/// As `millstreamd upgrade` asks, which would not read settings that cannot work.
fn refused_by_socket(busy: &Busy, expected: &str) {
    use std::io::{Read as _, Write as _};
    let worker = busy.worker().unwrap();
    let mut stream = std::os::unix::net::UnixStream::connect(busy.node.socket().with_extension("control")).unwrap();
    stream.write_all(b">").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with('-') && answer.contains(expected), "{answer}");
    assert_eq!(busy.worker().unwrap(), worker);
}

/// SIGHUP, as `systemctl reload` without a command of ours would send it; the settings are broken, so nothing changes.
fn reload_by_signal(busy: &Busy) {
    let worker = busy.worker().unwrap();
    let before = failed_upgrades(busy);
    hang_up(busy);
    eventually("the reload", DEADLINE, || (failed_upgrades(busy) > before).then_some(())).unwrap();
    assert_eq!(busy.worker().unwrap(), worker);
}

fn hang_up(busy: &Busy) {
    kill_process(Pid::from_raw(busy.node.supervisor().unwrap()).unwrap(), Signal::HUP).unwrap();
}

fn failed_upgrades(busy: &Busy) -> usize {
    std::fs::read_to_string(busy.node.log()).unwrap_or_default().matches("no upgrade").count()
}

#[test]
fn programs_and_settings_are_exchanged_and_taken_back_under_readers() {
    if can_be_set(&[]) {
        exchange(Duration::ZERO);
    }
}

#[test]
#[ignore = "five minutes; make soak"]
fn soak_programs_and_settings_are_exchanged_and_taken_back_under_readers() {
    if can_be_set(&[]) {
        exchange(Duration::from_secs(300));
    }
}
