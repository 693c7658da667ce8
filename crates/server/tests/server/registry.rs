//! A real registry on loopback, plain HTTP to push with, and a gate that asks for a password.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use millstream_oci::Digest;

const PROGRAM: &str = "/usr/bin/docker-registry";

/// A running registry; ends when dropped.
pub struct Registry {
    process: Child,
    pub port: u16,
    _directory: tempfile::TempDir,
}

impl Registry {
    #[expect(clippy::disallowed_methods, reason = "another process starts: there is no event to wait for")]
    /// Starts one; `None` (said aloud) where the program is missing.
    pub fn start() -> Option<Self> {
        if !Path::new(PROGRAM).exists() {
            assert!(std::env::var_os("MILLSTREAM_REQUIRE_ALL").is_none(), "{PROGRAM} is missing");
            // Past the capture of the test runner, so that it is seen and counted.
            writeln!(std::io::stderr(), "skipped: {PROGRAM} is missing").ok();
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let settings = directory.path().join("settings.yml");
        let data = directory.path().join("data");
        std::fs::write(
            &settings,
            format!(
                "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n",
                data.display()
            ),
        )
        .unwrap();
        let process = Command::new(PROGRAM)
            .arg("serve")
            .arg(&settings)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let registry = Self { process, port, _directory: directory };
        let deadline = Instant::now() + Duration::from_secs(30);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "the registry does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(registry)
    }

    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Pushes a blob in one piece.
    pub fn push_blob(&self, repository: &str, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        let (status, head) = self.request("POST", &format!("/v2/{repository}/blobs/uploads/"), &[], b"");
        assert_eq!(status, 202, "{head}");
        let location = header(&head, "location").unwrap();
        let path = location.split_once("://").map_or(location, |(_, rest)| &rest[rest.find('/').unwrap()..]);
        let join = if path.contains('?') { '&' } else { '?' };
        let (status, head) = self.request(
            "PUT",
            &format!("{path}{join}digest={digest}"),
            &[("Content-Type", "application/octet-stream")],
            bytes,
        );
        assert_eq!(status, 201, "{head}");
        digest
    }

    /// Pushes a manifest or an index under a tag or digest.
    pub fn push_manifest(&self, repository: &str, reference: &str, media_type: &str, text: &str) -> Digest {
        let path = format!("/v2/{repository}/manifests/{reference}");
        let (status, head) = self.request("PUT", &path, &[("Content-Type", media_type)], text.as_bytes());
        assert_eq!(status, 201, "{head}");
        Digest::of(text.as_bytes())
    }

    fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> (u16, String) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n", self.host());
        for (name, value) in headers {
            write!(head, "{name}: {value}\r\n").unwrap();
        }
        write!(head, "Content-Length: {}\r\n\r\n", body.len()).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        (status, answer)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn header<'a>(answer: &'a str, name: &str) -> Option<&'a str> {
    let lines = answer.lines().take_while(|line| !line.is_empty());
    lines.filter_map(|line| line.split_once(": ")).find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, v)| v)
}

/// Stands before a registry and lets in who shows one `Authorization` header. Ends with the process.
pub struct Gate {
    pub port: u16,
    /// Requests that were let in.
    pub admitted: Arc<AtomicU32>,
    /// Requests that were not.
    pub refused: Arc<AtomicU32>,
}

impl Gate {
    /// Lets in who shows exactly this header; `None`: everybody.
    pub fn start(registry: u16, authorization: Option<&'static str>) -> Self {
        Self::start_lying(registry, authorization, None)
    }

    /// The same, and spoils the bodies of answers about paths that contain `lie`.
    pub fn start_lying(registry: u16, authorization: Option<&'static str>, lie: Option<String>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (admitted, refused) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let gate = Self { port, admitted: Arc::clone(&admitted), refused: Arc::clone(&refused) };
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (admitted, refused, lie) = (Arc::clone(&admitted), Arc::clone(&refused), lie.clone());
                std::thread::spawn(move || {
                    let _ = pass(client?, registry, authorization, lie.as_deref(), &admitted, &refused);
                    std::io::Result::Ok(())
                });
            }
        });
        gate
    }

    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

/// One request, then the connection ends.
fn pass(
    mut client: TcpStream,
    registry: u16,
    authorization: Option<&str>,
    lie: Option<&str>,
    admitted: &AtomicU32,
    refused: &AtomicU32,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    if authorization.is_some_and(|wanted| header(&head, "authorization") != Some(wanted)) {
        refused.fetch_add(1, Ordering::Relaxed);
        let answer = "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"gate\"\r\n";
        return client.write_all(format!("{answer}Content-Length: 0\r\nConnection: close\r\n\r\n").as_bytes());
    }
    admitted.fetch_add(1, Ordering::Relaxed);
    let mut server = TcpStream::connect(("127.0.0.1", registry))?;
    let path = head.split(' ').nth(1).unwrap_or_default();
    let lies = lie.is_some_and(|lie| path.contains(lie));
    let lines = head.trim_end().lines().filter(|line| !line.to_ascii_lowercase().starts_with("connection:"));
    let head: String = lines.flat_map(|line| [line, "\r\n"]).collect();
    server.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    if lies {
        let body = answer.windows(4).position(|end| end == b"\r\n\r\n").map_or(answer.len(), |at| at + 4);
        answer[body..].iter_mut().for_each(|byte| *byte ^= 0x55);
    }
    client.write_all(&answer)
}
