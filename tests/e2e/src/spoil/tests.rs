#![allow(clippy::unwrap_used)]
use std::io::{BufReader, Read as _, Write as _};
use std::time::Instant;

use super::*;

const BLOB: &str = "/v2/app/blobs/sha256:00";

/// A registry of one blob that honours one kind of range.
fn registry() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let asked = http::head(&mut BufReader::new(client.try_clone().unwrap())).unwrap();
            let (status, body) = match http::range(&asked) {
                Some((3, 5)) => ("206 Partial Content", "345"),
                Some((3, 4)) => ("206 Partial Content", "34"),
                _ => ("200 OK", "0123456789"),
            };
            write!(client, "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        }
    });
    address
}

/// Head and body; what came before a connection broke.
fn answer(address: SocketAddr, path: &str, headers: &str) -> (String, Vec<u8>) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nRange: bytes=3-5\r\n{headers}\r\n").unwrap();
    let mut bytes = Vec::new();
    let end = stream.read_to_end(&mut bytes);
    let at = bytes.windows(4).position(|window| window == b"\r\n\r\n").map_or(bytes.len(), |at| at + 4);
    let body = bytes.split_off(at);
    let ended = end.map_or_else(|error| format!("{:?}\r\n", error.kind()), |_| String::new());
    (String::from_utf8(bytes).unwrap() + &ended, body)
}

fn ask(address: SocketAddr, path: &str) -> String {
    let (head, body) = answer(address, path, "");
    format!("{} {}", head.split(' ').nth(1).unwrap_or("-"), String::from_utf8_lossy(&body))
}

#[test]
fn blobs_are_spoiled_and_nothing_else() {
    let spoiler = Spoiler::start(registry()).unwrap();
    assert_eq!(ask(spoiler.address(), BLOB), "206 345");
    spoiler.set(Spoiling::NoRange);
    assert_eq!(ask(spoiler.address(), BLOB), "200 0123456789");
    assert_eq!(ask(spoiler.address(), "/v2/app/manifests/1"), "206 345");
    spoiler.set(Spoiling::OtherRange);
    assert_eq!(ask(spoiler.address(), BLOB), "206 34");
    for (spoiling, expected) in [
        (Spoiling::ForgedRange, "206 453"),
        (Spoiling::Short(1), "206 34"),
        (Spoiling::Long(1), "206 345\0"),
        (Spoiling::Cut(1), "206 3"),
        (Spoiling::Stall(2), "206 34"),
        (Spoiling::Status(404), "404 spoiled"),
        (Spoiling::Mute, "- "),
    ] {
        spoiler.set(spoiling);
        assert_eq!(ask(spoiler.address(), BLOB), expected);
    }
    spoiler.set(Spoiling::Slow(40));
    let started = Instant::now();
    assert_eq!(ask(spoiler.address(), BLOB), "206 345");
    assert!(started.elapsed() >= Duration::from_millis(50));
}

#[test]
fn one_bit_is_wrong_and_the_seed_says_which() {
    let bytes = |seed| {
        let spoiler = Spoiler::seeded(registry(), seed).unwrap();
        spoiler.set(Spoiling::WrongByte);
        (0..8).map(|_| answer(spoiler.address(), BLOB, "").1).collect::<Vec<_>>()
    };
    let all = bytes(7);
    for body in &all {
        let wrong: u32 = body.iter().zip(b"345").map(|(one, other)| (one ^ other).count_ones()).sum();
        assert_eq!(wrong, 1, "{body:?}");
    }
    assert_eq!(all, bytes(7));
    assert_ne!(all, bytes(8));
}

#[test]
fn a_burst_ends_and_other_clients_are_spared() {
    let spoiler = Spoiler::start(registry()).unwrap();
    spoiler.set_first("", Some(2), Spoiling::Status(503));
    let asked: Vec<String> = (0..3).map(|_| ask(spoiler.address(), BLOB)).collect();
    assert_eq!(asked, ["503 spoiled", "503 spoiled", "206 345"]);
    spoiler.set_for(OURS, Spoiling::Status(500));
    assert_eq!(ask(spoiler.address(), BLOB), "206 345");
    assert!(answer(spoiler.address(), BLOB, "User-Agent: millstream/1\r\n").0.contains(" 500 "));
    assert_eq!(spoiler.spoiled(), 1);
    let seen = spoiler.seen();
    assert_eq!((seen.len(), seen[4].header("user-agent")), (5, Some("millstream/1")));
}

#[test]
fn resets_are_resets() {
    let spoiler = Spoiler::start(registry()).unwrap();
    spoiler.set(Spoiling::Reset(1));
    let (head, _) = answer(spoiler.address(), BLOB, "");
    assert!(head.ends_with("ConnectionReset\r\n"), "{head}");
}

#[test]
fn signed_addresses_and_tokens_expire() {
    let (spoiler, storage) = (Spoiler::start(registry()).unwrap(), Spoiler::start(registry()).unwrap());
    let life = Duration::from_millis(300);
    spoiler.set(Spoiling::Signed { to: storage.address(), life, mark: "sig".into() });
    let (head, _) = answer(spoiler.address(), BLOB, "");
    let lines: Vec<String> = head.lines().map(str::to_owned).collect();
    let place = http::header(&lines, "location").unwrap().split_once("//").unwrap().1;
    let path = &place[place.find('/').unwrap()..];
    assert_eq!(ask(storage.address(), path), "206 345");
    crate::process::let_pass(life * 2);
    assert!(ask(storage.address(), path).starts_with("403 "));

    let login = Login { user: "ann".into(), password: "secret".into() };
    storage.guard(Some(Guard { login, life, mark: "tok".into() }));
    assert!(ask(storage.address(), BLOB).starts_with("401 "));
    let basic = "Authorization: Basic YW5uOnNlY3JldA==\r\n";
    let (_, body) = answer(storage.address(), "/token?x", basic);
    let body = String::from_utf8(body).unwrap();
    let bearer = format!("Authorization: Bearer {}\r\n", body.split('"').nth(3).unwrap());
    assert_eq!(answer(storage.address(), BLOB, &bearer).1, b"345");
    crate::process::let_pass(life * 2);
    assert!(answer(storage.address(), BLOB, &bearer).0.contains(" 401 "));
}
