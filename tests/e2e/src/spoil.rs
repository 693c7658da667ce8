//! An HTTP proxy before a registry that spoils its answers, as a bad network or a lying registry would.
//!
//! It speaks as much HTTP/1.1 as registries need: requests without a body, one on each connection. It runs in threads of
//! the test itself.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

use crate::registry::free_address;

/// Longest wait for one read or write of a connection.
const PATIENCE: Duration = Duration::from_secs(120);
/// Bytes of a head, at most.
const HEAD: u64 = 64 * 1024;
/// How often a slowed answer goes on, in a second.
const BEATS: u32 = 20;

/// What becomes of answers about blobs. Everything else passes as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Spoiling {
    /// Nothing.
    #[default]
    None,
    /// The wish for a range is not passed on, so the whole blob is answered.
    NoRange,
    /// In every answer one byte in the middle is wrong.
    WrongByte,
    /// So many bytes in a second for each answer.
    Slow(u32),
}

/// Answers by path that the proxy gives itself: type and body.
type Documents = HashMap<String, (String, Vec<u8>)>;

/// A running proxy; it ends when it is dropped.
#[derive(Debug)]
pub struct Spoiler {
    address: SocketAddr,
    spoiling: Arc<Mutex<Spoiling>>,
    documents: Arc<Mutex<Documents>>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Spoiler {
    /// Starts it before `target`, spoiling nothing.
    ///
    /// # Errors
    ///
    /// If no port is free.
    pub fn start(target: SocketAddr) -> Result<Self> {
        let address = free_address()?;
        let listener = TcpListener::bind(address).with_context(|| format!("listening on {address}"))?;
        let (spoiling, ended) = (Arc::new(Mutex::default()), Arc::new(AtomicBool::new(false)));
        let documents = Arc::new(Mutex::default());
        let thread = std::thread::spawn({
            let (spoiling, documents, ended) = (Arc::clone(&spoiling), Arc::clone(&documents), Arc::clone(&ended));
            move || serve(&listener, target, &spoiling, &documents, &ended)
        });
        Ok(Self { address, spoiling, documents, ended, thread: Some(thread) })
    }

    /// From now on answers for `document` of `repository`, by this tag and by its digest, whatever the registry would say; no
    /// registry would take in what tests need. Returns the digest.
    pub fn publish(&self, repository: &str, tag: &str, content_type: &str, document: &[u8]) -> String {
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(document)));
        let mut documents = self.documents.lock().unwrap_or_else(PoisonError::into_inner);
        for reference in [tag, &digest] {
            let path = format!("/v2/{repository}/manifests/{reference}");
            documents.insert(path, (content_type.to_owned(), document.to_vec()));
        }
        digest
    }

    /// What clients call instead of the registry.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From the next request on.
    pub fn set(&self, spoiling: Spoiling) {
        *self.spoiling.lock().unwrap_or_else(PoisonError::into_inner) = spoiling;
    }
}

impl Drop for Spoiler {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // A last visitor, so that the thread looks.
        TcpStream::connect(self.address).ok();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn serve(
    listener: &TcpListener,
    target: SocketAddr,
    spoiling: &Mutex<Spoiling>,
    documents: &Arc<Mutex<Documents>>,
    ended: &Arc<AtomicBool>,
) {
    for client in listener.incoming().flatten() {
        if ended.load(Ordering::Relaxed) {
            return;
        }
        let spoiling = *spoiling.lock().unwrap_or_else(PoisonError::into_inner);
        let (documents, ended) = (Arc::clone(documents), Arc::clone(ended));
        // A connection that breaks is what its two ends must cope with.
        std::thread::spawn(move || carry(client, target, spoiling, &documents, &ended).ok());
    }
}

fn carry(
    mut client: TcpStream,
    target: SocketAddr,
    spoiling: Spoiling,
    documents: &Mutex<Documents>,
    ended: &AtomicBool,
) -> Result<()> {
    let mut server = TcpStream::connect(target).with_context(|| format!("connecting to {target}"))?;
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
    }
    let request = head(&mut BufReader::new(client.try_clone()?))?;
    let mut words = request.first().map(|line| line.split(' ')).into_iter().flatten();
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let document = documents.lock().unwrap_or_else(PoisonError::into_inner).get(path).cloned();
    if let Some((content_type, body)) = document {
        let digest = hex::encode(Sha256::digest(&body));
        let head = [
            "HTTP/1.1 200 OK".to_owned(),
            format!("Content-Type: {content_type}"),
            format!("Content-Length: {}", body.len()),
            format!("Docker-Content-Digest: sha256:{digest}"),
        ];
        send_head(&mut client, head.iter())?;
        if method != "HEAD" {
            client.write_all(&body)?;
        }
        return Ok(());
    }
    let blob = request.first().is_some_and(|line| line.contains("/blobs/sha256:"));
    let spoiling = if blob { spoiling } else { Spoiling::None };
    let asked = request.iter().filter(|line| spoiling != Spoiling::NoRange || !is_header(line, "range"));
    send_head(&mut server, asked)?;

    let mut server = BufReader::new(server);
    let answer = head(&mut server)?;
    let mut body = Vec::new();
    server.read_to_end(&mut body)?;
    if spoiling == Spoiling::WrongByte {
        let middle = body.len() / 2;
        if let Some(byte) = body.get_mut(middle) {
            *byte ^= 0x55;
        }
    }
    send_head(&mut client, answer.iter())?;
    match spoiling {
        Spoiling::Slow(bytes) => send_slowly(&mut client, &body, bytes, ended),
        _ => Ok(client.write_all(&body)?),
    }
}

/// Request or status line and headers, without the empty line at the end.
fn head(stream: &mut BufReader<TcpStream>) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let mut limited = stream.take(HEAD);
    loop {
        let mut line = String::new();
        limited.read_line(&mut line).context("reading a head")?;
        let line = line.trim_end();
        if line.is_empty() {
            return Ok(lines);
        }
        lines.push(line.to_owned());
    }
}

fn is_header(line: &str, name: &str) -> bool {
    line.split_once(':').is_some_and(|(found, _)| found.eq_ignore_ascii_case(name))
}

fn send_head<'a>(to: &mut TcpStream, lines: impl Iterator<Item = &'a String>) -> Result<()> {
    let mut text = String::new();
    for line in lines.filter(|line| !is_header(line, "connection")) {
        text.push_str(line);
        text.push_str("\r\n");
    }
    text.push_str("Connection: close\r\n\r\n");
    Ok(to.write_all(text.as_bytes())?)
}

// The pause is the measure here, not a wait for something.
#[allow(clippy::disallowed_methods)]
fn send_slowly(client: &mut TcpStream, body: &[u8], bytes: u32, ended: &AtomicBool) -> Result<()> {
    let piece = usize::try_from((bytes / BEATS).max(1))?;
    for piece in body.chunks(piece) {
        if ended.load(Ordering::Relaxed) {
            break;
        }
        client.write_all(piece)?;
        std::thread::sleep(Duration::from_secs(1) / BEATS);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A registry of one blob that honours one kind of range.
    fn registry() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let mut client = client.unwrap();
                let asked = head(&mut BufReader::new(client.try_clone().unwrap())).unwrap();
                let part = asked.iter().any(|line| is_header(line, "range"));
                let (status, body) = if part { ("206 Partial Content", "345") } else { ("200 OK", "0123456789") };
                write!(client, "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
            }
        });
        address
    }

    fn ask(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nRange: bytes=3-5\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        format!("{} {body}", head.split(' ').nth(1).unwrap())
    }

    #[test]
    fn blobs_are_spoiled_and_nothing_else() {
        let spoiler = Spoiler::start(registry()).unwrap();
        let blob = "/v2/app/blobs/sha256:00";
        assert_eq!(ask(spoiler.address(), blob), "206 345");
        spoiler.set(Spoiling::NoRange);
        assert_eq!(ask(spoiler.address(), blob), "200 0123456789");
        assert_eq!(ask(spoiler.address(), "/v2/app/manifests/1"), "206 345");
        spoiler.set(Spoiling::WrongByte);
        assert_eq!(ask(spoiler.address(), blob), "206 3a5");
        spoiler.set(Spoiling::Slow(40));
        let started = std::time::Instant::now();
        assert_eq!(ask(spoiler.address(), blob), "206 345");
        assert!(started.elapsed() >= Duration::from_millis(90));
    }
}
