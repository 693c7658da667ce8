//! The real binary: alone, and with a real millstreamd where one can run.
#![allow(clippy::unwrap_used, reason = "a test that panics has found something")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How the help of every command reads, one after the other. After a change, look at the difference, then run the test with
/// MILLSTREAM_BLESS=1 to accept it.
const HELP: &str = "tests/help.txt";

fn millstream(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
    command.args(arguments);
    // The help shows their values.
    for (name, _) in
        std::env::vars().filter(|(name, _)| name.starts_with("MILLSTREAM_") || name.starts_with("CONTAINERD_"))
    {
        command.env_remove(name);
    }
    command.output().unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// What a command that succeeds prints as JSON.
fn json(arguments: &[&str]) -> Value {
    let output = millstream(&[arguments, &["--output", "json"]].concat());
    assert_eq!(code(&output), 0, "{arguments:?}: {}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_help_reads_as_a_person_agreed() {
    let commands: [&[&str]; 16] = [
        &[],
        &["status"],
        &["explain"],
        &["pull"],
        &["prefetch"],
        &["gc"],
        &["doctor"],
        &["import"],
        &["streaming"],
        &["hydration"],
        &["config"],
        &["config", "default"],
        &["config", "check"],
        &["config", "explain"],
        &["completions"],
        &["man"],
    ];
    let mut all = String::new();
    for command in commands {
        let output = millstream(&[command, &["--help"]].concat());
        assert_eq!(code(&output), 0, "{command:?}");
        all.push_str(&format!("$ millstream {} --help\n{}\n", command.join(" "), stdout(&output)));
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(HELP);
    if std::env::var_os("MILLSTREAM_BLESS").is_some() {
        std::fs::write(&path, &all).unwrap();
    }
    let agreed = std::fs::read_to_string(&path).unwrap();
    let differs = all.lines().zip(agreed.lines()).enumerate().find(|(_, (now, then))| now != then);
    assert!(all == agreed, "{HELP}: {differs:?}; if the help is right as it is now, run this with MILLSTREAM_BLESS=1");
}

#[test]
fn every_failure_says_what_was_tried_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let bad = dir.path().join("millstreamd.toml");
    std::fs::write(&bad, "[fetch]\nconections = 3\n").unwrap();
    let bad = bad.to_str().unwrap();
    let cases: [(&[&str], i32, &[&str]); 9] = [
        (&["status", "--socket", "/nowhere/s"], 3, &["cannot reach millstreamd at /nowhere/s", "hint: is it running"]),
        (&["gc", "--socket", "/nowhere/s"], 3, &["cannot reach millstreamd at /nowhere/s"]),
        (&["prefetch", "app", "--socket", "/nowhere/s"], 3, &["cannot reach millstreamd at /nowhere/s"]),
        (
            &["import", "app:1", "--server", "http://127.0.0.1:1"],
            3,
            &["cannot reach millstream-server at http://127.0.0.1:1", "hint: "],
        ),
        (
            &["import", "app:1", "--server", "https://127.0.0.1:1"],
            1,
            &["the authority for https://127.0.0.1:1 is missing", "--ca"],
        ),
        (&["import", "app:1", "--server", "http://10.0.0.1:1"], 1, &["must begin with https://"]),
        (
            &["config", "check", bad],
            1,
            &[bad, "unknown key `fetch.conections` in line 2; did you mean `fetch.connections`?"],
        ),
        (&["config", "explain", "nothing"], 1, &["there is no key `nothing`", "hint: "]),
        (&["prefetch", "app", "--timeout", "soon"], 2, &["--timeout"]),
    ];
    for (arguments, expected, texts) in cases {
        let output = millstream(arguments);
        assert_eq!(code(&output), expected, "{arguments:?}: {}", stderr(&output));
        for text in texts {
            assert!(stderr(&output).contains(text), "{arguments:?}: {}", stderr(&output));
        }
        assert!(stdout(&output).is_empty(), "{arguments:?}");
    }
}

#[test]
fn settings_are_printed_checked_and_explained() {
    let dir = tempfile::tempdir().unwrap();
    for (of, program) in [("node", "millstreamd"), ("server", "millstream-server")] {
        // Under a name that does not tell whose they are.
        let file = dir.path().join(format!("{of}.toml"));
        std::fs::write(&file, millstream(&["config", "default", of]).stdout).unwrap();
        let checked = json(&["config", "check", file.to_str().unwrap()]);
        assert_eq!(checked["program"], program);
        assert_eq!(checked["settings"], json(&["config", "default", of]));
    }
    let text = stdout(&millstream(&["config", "explain", "fetch.connections"]));
    assert!(
        text.starts_with("fetch.connections  (millstreamd.toml; whole number; default: 8)\n    Requests"),
        "{text}"
    );
    let all = json(&["config", "explain"]);
    assert!(all.as_array().unwrap().len() > 25, "{all}");
    let tls = json(&["config", "explain", "tls", "--for", "server"]);
    assert_eq!(tls.as_array().unwrap().len(), 3, "{tls}");
    assert!(stdout(&millstream(&["config", "default", "containerd-v3"])).contains("version = 3"));
}

#[test]
fn completions_and_manual_come_from_the_same_definition() {
    for (program, word) in
        [("millstream", "prefetch"), ("millstreamd", "check-config"), ("millstream-server", "config")]
    {
        for shell in ["bash", "zsh", "fish"] {
            let script = stdout(&millstream(&["completions", shell, program]));
            assert!(script.contains(word) && script.contains(program), "{program} {shell}");
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let written = json(&["man", dir.path().to_str().unwrap()]);
    assert!(written["written"].as_array().unwrap().len() > 12, "{written}");
    for (page, text) in [
        ("millstream.1", "Exit codes"),
        ("millstream-prefetch.1", "wholly local"),
        ("millstream-config-explain.1", "key"),
        ("millstreamd.8", "check\\-config"),
        ("millstream-server.8", "TOML"),
    ] {
        let page = std::fs::read_to_string(dir.path().join(page)).unwrap();
        assert!(page.contains(text), "{page}");
    }
    assert!(!dir.path().join("millstreamd-worker.8").exists(), "what is hidden has no page");
}

#[test]
fn the_doctor_finds_what_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let settings = dir.path().join("settings.toml");
    let root = dir.path().join("root");
    std::fs::write(&settings, format!("root = {root:?}\nsocket = \"/nowhere/s\"\n[server]\nembedded = false\n"))
        .unwrap();
    let arguments = [
        ["--config", settings.to_str().unwrap()],
        ["--containerd-config", "/nowhere/config.toml"],
        ["--containerd-socket", "/nowhere/containerd.sock"],
        ["--output", "json"],
    ];
    let output = millstream(&[&["doctor"], arguments.concat().as_slice()].concat());
    assert_eq!(code(&output), 1, "{}", stderr(&output));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["ok"], false);
    let verdict = |name: &str| {
        let checks = found["checks"].as_array().unwrap();
        checks.iter().find(|check| check["check"] == name).unwrap_or_else(|| panic!("{name} in {found}"))["verdict"]
            .clone()
    };
    for (name, expected) in [
        ("settings", "ok"),
        ("root", "warning"),
        ("millstreamd", "failed"),
        ("millstream-server", "warning"),
        ("containerd", "failed"),
        ("containerd's configuration", "failed"),
    ] {
        assert_eq!(verdict(name), expected, "{name}");
    }
    for check in found["checks"].as_array().unwrap() {
        assert!(check["verdict"] == "ok" || check["hint"].is_string() || check["check"] == "kernel", "{check}");
    }
}

/// A running millstreamd, or why there is none.
struct Daemon {
    process: Child,
    dir: tempfile::TempDir,
    metrics: SocketAddr,
}

impl Daemon {
    fn start() -> Result<Self, &'static str> {
        let program = PathBuf::from(env!("CARGO_BIN_EXE_millstream")).with_file_name("millstreamd");
        if !program.exists() {
            return Err("millstreamd is not built");
        }
        if !Path::new("/dev/fuse").exists() || !rustix::process::geteuid().is_root() {
            return Err("needs root and /dev/fuse");
        }
        let dir = tempfile::tempdir().unwrap();
        let (root, settings) = (dir.path().join("root"), dir.path().join("settings.toml"));
        // Free a moment ago; who takes it meanwhile makes the test fail, not lie.
        let metrics = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let text = format!("root = {root:?}\nsocket = {:?}\n[metrics]\nlisten = \"{metrics}\"\n", dir.path().join("s"));
        std::fs::write(&settings, text).unwrap();
        let process = Command::new(program).arg("--config").arg(settings).stderr(Stdio::null()).spawn().unwrap();
        let daemon = Self { process, dir, metrics };
        let deadline = Instant::now() + Duration::from_secs(60);
        while code(&daemon.ask(&["status"])) != 0 {
            assert!(Instant::now() < deadline, "millstreamd does not answer");
        }
        Ok(daemon)
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        millstream(&[arguments, &["--socket", self.dir.path().join("s").to_str().unwrap()]].concat())
    }

    fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.metrics).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.ask(&[arguments, &["--output", "json"]].concat());
        assert_eq!(code(&output), 0, "{arguments:?}: {}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).ok();
        self.process.wait().ok();
    }
}

#[test]
fn a_real_daemon_answers_every_command() {
    let daemon = match Daemon::start() {
        Ok(daemon) => daemon,
        Err(reason) => {
            println!("skipped: {reason}");
            assert!(std::env::var_os("MILLSTREAM_REQUIRE_ALL").is_none(), "a required tier was skipped: {reason}");
            return;
        }
    };
    assert_eq!(daemon.json(&["status"])["version"], env!("CARGO_PKG_VERSION"));
    assert!(stdout(&daemon.ask(&["status"])).contains("no lazy layers on this node"));
    assert_eq!(daemon.json(&["streaming", "off"])["streaming"], false);
    assert_eq!(daemon.json(&["hydration", "off"])["hydration"], false);
    let status = daemon.json(&["status"]);
    assert_eq!((&status["streaming"], &status["hydration"]), (&Value::Bool(false), &Value::Bool(false)));
    assert_eq!(stdout(&daemon.ask(&["streaming", "on"])), "streaming of new images: on\n");
    assert_eq!(daemon.json(&["gc"])["layers"], Value::Array(Vec::new()));
    assert!(stdout(&daemon.ask(&["gc", "--dry-run"])).starts_with("nothing to give back"));
    assert!(stdout(&daemon.ask(&["explain", "app:1"])).contains("nothing was decided about it on this node"));
    let none = daemon.ask(&["prefetch", "app:1", "--wait"]);
    assert_eq!(code(&none), 4);
    let text = stderr(&none);
    assert!(text.contains("fetching app:1") && text.contains("hint: `millstream explain app:1`"), "{text}");
    let metrics = daemon.get("/metrics");
    assert!(metrics.contains("\nmillstream_worker_restarts_total 0\n"), "{metrics}");
    assert!(metrics.contains("\nmillstream_streaming_enabled 1\n"), "{metrics}");
    for probe in ["/healthz", "/readyz"] {
        let answer = daemon.get(probe);
        assert!(answer.starts_with("HTTP/1.1 200"), "{probe}: {answer}");
    }
    let settings = daemon.dir.path().join("settings.toml");
    let doctor = daemon.ask(&["doctor", "--config", settings.to_str().unwrap()]);
    let text = stdout(&doctor);
    for line in [
        "ok       FUSE device",
        "ok       root: mode 0700",
        "ok       socket: mode 0600",
        "ok       mount: mounted, and answers",
        "ok       millstreamd: answers",
    ] {
        assert!(text.contains(line), "{line:?} in\n{text}");
    }
}
