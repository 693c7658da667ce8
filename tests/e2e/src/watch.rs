//! What a proxy sees of HTTP/1.1 that passes through it: requests, by whom, and how many at once for each blob.
//!
//! Other protocols (TLS) are recognized by their first byte and left alone.

use std::collections::BTreeMap;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

/// Bytes of a head, at most. What has a longer one is watched no further.
const HEAD: usize = 64 * 1024;
/// Blobs that are told apart, at most; the requests for others are counted all the same.
const BLOBS: usize = 4096;

/// What went to and from one blob.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// Requests for its content.
    pub requests: u64,
    /// Bytes of the bodies of the answers.
    pub bytes: u64,
    /// Most requests under way at once since somebody asked last.
    pub peak: u64,
    /// Requests under way now.
    pub active: u64,
}

/// What was seen since the proxy started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requests {
    /// All of them.
    pub total: u64,
    /// By the program that the client says it is, without its version.
    pub agents: BTreeMap<String, u64>,
    /// By digest.
    pub blobs: BTreeMap<String, Blob>,
}

/// Counts for all connections of a proxy.
#[derive(Debug, Default)]
pub struct Watch(Mutex<Requests>);

impl Watch {
    /// What was seen so far. The peaks begin anew.
    pub fn read(&self) -> Requests {
        self.with(|seen| {
            let told = seen.clone();
            for blob in seen.blobs.values_mut() {
                blob.peak = blob.active;
            }
            told
        })
    }

    fn with<T>(&self, act: impl FnOnce(&mut Requests) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    fn begin(&self, request: &Head) {
        self.with(|seen| {
            seen.total += 1;
            *seen.agents.entry(request.agent.clone()).or_default() += 1;
            let Some(digest) = &request.blob else { return };
            if seen.blobs.len() < BLOBS || seen.blobs.contains_key(digest) {
                let blob = seen.blobs.entry(digest.clone()).or_default();
                blob.requests += 1;
                blob.active += 1;
                blob.peak = blob.peak.max(blob.active);
            }
        });
    }

    fn blob(&self, digest: Option<&String>, act: impl FnOnce(&mut Blob)) {
        let Some(digest) = digest else { return };
        self.with(|seen| seen.blobs.get_mut(digest).map(act));
    }
}

/// A request's head, as far as it is counted.
#[derive(Debug)]
struct Head {
    agent: String,
    /// Of a request for the content of a blob.
    blob: Option<String>,
}

impl Head {
    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let mut words = lines.next()?.split(' ');
        let (method, path) = (words.next()?, words.next()?);
        let agent = lines.filter_map(|line| line.split_once(':'));
        let agent = agent.filter(|(name, _)| name.eq_ignore_ascii_case("user-agent")).map(|(_, value)| value.trim());
        let agent = agent.map(|agent| agent.split(['/', ' ']).next().unwrap_or_default().to_owned()).next();
        let blob =
            path.rsplit_once("/blobs/").map(|(_, digest)| digest.split('?').next().unwrap_or_default().to_owned());
        Some(Self { agent: agent.unwrap_or_default(), blob: blob.filter(|_| method == "GET") })
    }
}

/// Where the talk on a connection has got to.
#[derive(Debug)]
enum Turn {
    /// The client speaks; what it has said of a head.
    Request(Vec<u8>),
    /// The server speaks; what it has said of a head.
    Answer(Vec<u8>),
    /// The body of an answer; bytes that are missing, if it says how long it is.
    Body(Option<u64>),
    /// Not HTTP/1.1.
    Opaque,
}

/// One connection.
#[derive(Debug)]
pub struct Conversation<'w> {
    watch: &'w Watch,
    turn: Turn,
    blob: Option<String>,
}

impl<'w> Conversation<'w> {
    /// A connection on which nothing was said yet.
    pub fn new(watch: &'w Watch) -> Self {
        Self { watch, turn: Turn::Request(Vec::new()), blob: None }
    }

    /// The client sent this. Says whether a request begins with it.
    pub fn client(&mut self, bytes: &[u8]) -> bool {
        if matches!(self.turn, Turn::Answer(_) | Turn::Body(_)) {
            // Not pipelined: the answer before was whole, whatever it said of its length.
            self.end();
        }
        let Turn::Request(head) = &mut self.turn else { return false };
        let begins = head.is_empty();
        head.extend_from_slice(bytes);
        if !head.first().is_some_and(u8::is_ascii_uppercase) || head.len() > HEAD {
            self.turn = Turn::Opaque;
            return false;
        }
        if let Some(text) = whole(head) {
            match Head::parse(&text) {
                Some(request) => {
                    self.watch.begin(&request);
                    self.blob = request.blob;
                    self.turn = Turn::Answer(Vec::new());
                }
                None => self.turn = Turn::Opaque,
            }
        }
        begins
    }

    /// The server sent this.
    pub fn server(&mut self, bytes: &[u8]) {
        let body = match &mut self.turn {
            Turn::Answer(head) => {
                head.extend_from_slice(bytes);
                let Some(text) = whole(head) else { return };
                let body = (head.len() - text.len()) as u64;
                self.turn = Turn::Body(length(&text));
                body
            }
            Turn::Body(_) => bytes.len() as u64,
            Turn::Request(_) | Turn::Opaque => return,
        };
        self.watch.blob(self.blob.as_ref(), |blob| blob.bytes += body);
        if let Turn::Body(Some(missing)) = &mut self.turn {
            *missing = missing.saturating_sub(body);
            if *missing == 0 {
                self.end();
            }
        }
    }

    fn end(&mut self) {
        self.watch.blob(self.blob.take().as_ref(), |blob| blob.active = blob.active.saturating_sub(1));
        self.turn = Turn::Request(Vec::new());
    }
}

impl Drop for Conversation<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

/// The head at the beginning of these bytes, with the empty line at its end, once it is whole.
fn whole(bytes: &[u8]) -> Option<String> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    Some(String::from_utf8_lossy(&bytes[..end]).into_owned()).filter(|text| text.len() == end)
}

/// Bytes of the body that this head announces; none: it does not say.
fn length(head: &str) -> Option<u64> {
    let mut headers = head.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = headers.find(|(name, _)| name.eq_ignore_ascii_case("content-length"))?;
    value.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASK: &[u8] = b"GET /v2/a/blobs/sha256:c2?x=1 HTTP/1.1\r\nUser-Agent: containerd/2.2.9 x\r\n\r\n";

    #[test]
    fn requests_for_a_blob_are_counted_with_those_under_way_at_once() {
        let watch = Watch::default();
        let (mut one, mut two) = (Conversation::new(&watch), Conversation::new(&watch));
        assert!(one.client(&ASK[..10]), "a request begins");
        assert!(!one.client(&ASK[10..]), "and goes on");
        assert!(two.client(ASK));
        one.server(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\n");
        one.server(b"\r\nab");
        assert_eq!(watch.read().blobs["sha256:c2"], Blob { requests: 2, bytes: 2, peak: 2, active: 2 });
        one.server(b"cd");
        assert_eq!(watch.read().blobs["sha256:c2"], Blob { requests: 2, bytes: 4, peak: 2, active: 1 });
        assert_eq!(watch.read().blobs["sha256:c2"].peak, 1, "since the question before");
        assert!(one.client(ASK), "the same connection asks again");
        drop(one);
        drop(two);
        let seen = watch.read();
        assert_eq!(seen.blobs["sha256:c2"], Blob { requests: 3, bytes: 4, peak: 2, active: 0 });
        assert_eq!((seen.total, seen.agents["containerd"]), (3, 3));
    }

    #[test]
    fn an_answer_without_a_body_ends_with_the_next_request_and_tls_is_left_alone() {
        let watch = Watch::default();
        let mut plain = Conversation::new(&watch);
        plain.client(b"HEAD /v2/a/manifests/1 HTTP/1.1\r\n\r\n");
        plain.server(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n");
        assert!(plain.client(ASK));
        let mut opaque = Conversation::new(&watch);
        assert!(!opaque.client(b"\x16\x03\x01GET / HTTP/1.1\r\n\r\n"));
        opaque.server(b"\x16");
        assert_eq!(watch.read().total, 2);
    }
}
