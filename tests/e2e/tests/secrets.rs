//! Credentials, tokens and signed addresses are planted; they work, also when they expire, and are found nowhere but where they
//! belong.

#![allow(clippy::unwrap_used, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use millstream_e2e::containerd::Version;
use millstream_e2e::cri::ContainerSpec;
use millstream_e2e::daemons::{Node, NodeOptions, metrics_page};
use millstream_e2e::image::{Image, shell};
use millstream_e2e::layer::{Entry, Packing, noise};
use millstream_e2e::need::product;
use millstream_e2e::process::{eventually, let_pass, output};
use millstream_e2e::registry::{Login, free_address};
use millstream_e2e::spoil::{Guard, Seen, Spoiler, Spoiling};
use millstream_e2e::stage::{CLI, Pushed, Stage, await_decision, can_be_set};
use millstream_wire::millstream::v1::decision::Outcome;

/// Life of tokens and of signed addresses.
const LIFE: Duration = Duration::from_secs(1);
const READ: Duration = Duration::from_secs(3);
const SIZE: usize = 200 << 10;
const USER: &str = "canary-user";
const PASSWORD: &str = "canary-password-3f1c";
const TOKEN: &str = "canary-token-77aa";
const SIGNATURE: &str = "canary-signature-9e02";
/// `USER:PASSWORD` as a header has it.
const BASIC: &str = "Y2FuYXJ5LXVzZXI6Y2FuYXJ5LXBhc3N3b3JkLTNmMWM=";
/// Layers with one file each.
const LAYERS: u32 = 4;

fn image() -> Image {
    let base = Image::new().layer(shell().unwrap(), Packing::Gzip);
    (0..LAYERS).fold(base, |image, layer| {
        image.layer(vec![Entry::file(format!("f{layer}"), noise(layer + 1, SIZE))], Packing::Gzip)
    })
}

fn authorized(seen: &[Seen]) -> usize {
    seen.iter().filter(|seen| seen.header("authorization").is_some()).count()
}

#[test]
fn secrets_are_renewed_in_time_and_found_nowhere() {
    if !can_be_set(&[]) {
        return;
    }
    let mut stage = Stage::with_spoiler().unwrap();
    let image = stage.push("secret", &image()).unwrap();
    let login = Login { user: USER.to_owned(), password: PASSWORD.to_owned() };
    stage.guard(Guard { login: login.clone(), life: LIFE, mark: TOKEN.to_owned() }).unwrap();
    let storage = Spoiler::start(stage.registry().unwrap().address()).unwrap();
    let signed = Spoiling::Signed { to: storage.address(), life: LIFE, mark: SIGNATURE.to_owned() };
    stage.spoiler().unwrap().set(signed.clone());
    stage.import(&image).unwrap();

    let docker_config = docker_config(&stage, &image);
    let metrics = free_address().unwrap();
    let options = NodeOptions {
        docker_config: Some(docker_config),
        hydration: false,
        read_deadline: READ,
        metrics: Some(metrics),
        ..stage.node_options()
    };
    let node = Node::start(&stage.work, &options).unwrap();
    let containerd = stage.containerd(Version::V1, &node, false).unwrap();
    let mut cri = stage.cri(&containerd).unwrap();
    let pod = {
        // The pods' own image is pulled without a login.
        let spoiler = stage.spoiler().unwrap();
        spoiler.guard(None);
        let pod = cri.run_pod("pod").unwrap();
        stage.guard(Guard { login: login.clone(), life: LIFE, mark: TOKEN.to_owned() }).unwrap();
        pod
    };
    cri.pull(&image.reference, Some(&login)).unwrap();
    await_decision(&node, &image, Outcome::Lazy, "").unwrap();
    let spec =
        ContainerSpec { image: &image.reference, command: &["/bin/sleep", "100000"], ..ContainerSpec::default() };
    let container = cri.create(&pod, "reader", &spec).unwrap();
    cri.start(&container).unwrap();
    let root = containerd.rootfs("k8s.io", &container.id);
    let read = |file: u32| std::fs::read(root.join(format!("f{file}")));
    let right = |file: u32| noise(file + 1, SIZE);
    let spoiler = stage.spoiler().unwrap();
    let tokens = || spoiler.seen().iter().filter(|seen| seen.path.starts_with("/token")).count();

    // Every token and every address has expired before the next read.
    for file in 0..2 {
        let before = tokens();
        let_pass(LIFE * 2);
        assert_eq!(read(file).unwrap(), right(file));
        assert!(tokens() > before, "no new token");
    }

    // A redirect to who would like to have a password, by the name of another host, and by another port.
    let capture = Spoiler::start(stage.registry().unwrap().address()).unwrap();
    capture.guard(Some(Guard { login: login.clone(), life: LIFE, mark: "other".to_owned() }));
    for (file, host) in [(2, "localhost"), (3, "127.0.0.1")] {
        spoiler.set(Spoiling::Redirect(format!("http://{host}:{}{{path}}", capture.address().port())));
        let error = read(file).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    }
    let texts = told(&node, metrics, &image);
    spoiler.set(signed);
    for file in 2..LAYERS {
        assert_eq!(eventually("a read", READ * 5, || read(file).ok()).unwrap(), right(file));
    }

    assert!(authorized(&spoiler.seen()) > 0 && !capture.seen().is_empty() && storage.seen().len() > 2);
    assert_eq!(authorized(&storage.seen()), 0, "the storage got credentials");
    assert_eq!(authorized(&capture.seen()), 0, "a stranger got credentials");
    assert!(storage.seen().iter().any(|seen| seen.path.contains(SIGNATURE)));
    node_stops(node);
    for (place, text) in texts {
        assert_eq!(secret_in(text.as_bytes()), None, "in {place}: {text}");
    }
    for dir in ["node", "server"] {
        search(&stage.work.path().join(dir));
    }
    for log in ["millstreamd", "millstream-server"] {
        search(&stage.work.log(log));
    }
}

fn node_stops(mut node: Node) {
    node.stop().unwrap();
}

/// A docker `config.json` with the login, outside of what is searched.
fn docker_config(stage: &Stage, image: &Pushed) -> PathBuf {
    let host = image.reference.split('/').next().unwrap();
    let file = stage.work.path().join("docker-config.json");
    let text = serde_json::json!({ "auths": { host: { "username": USER, "password": PASSWORD } } });
    std::fs::write(&file, text.to_string()).unwrap();
    file
}

/// What the node tells whoever asks.
fn told(node: &Node, metrics: std::net::SocketAddr, image: &Pushed) -> Vec<(&'static str, String)> {
    let cli = |arguments: &[&str]| {
        let mut command = Command::new(product(CLI).unwrap());
        output(command.args(arguments).arg("--socket").arg(node.socket())).unwrap()
    };
    vec![
        ("metrics", metrics_page(metrics).unwrap()),
        ("status", cli(&["status"])),
        ("explain", cli(&["explain", &image.reference])),
        ("snapshots", format!("{:?}", node.snapshots().unwrap())),
    ]
}

fn secret_in(bytes: &[u8]) -> Option<&'static str> {
    let secrets = [PASSWORD, TOKEN, SIGNATURE, BASIC];
    secrets.into_iter().find(|secret| bytes.windows(secret.len()).any(|window| window == secret.as_bytes()))
}

/// Fails if a secret is in a file at `path` or below it.
fn search(path: &Path) {
    if path.is_dir() {
        for entry in std::fs::read_dir(path).unwrap() {
            search(&entry.unwrap().path());
        }
    } else if path.is_file() {
        assert_eq!(secret_in(&std::fs::read(path).unwrap()), None, "in {}", path.display());
    }
}
