//! A small HTTP server that misbehaves on demand and remembers what it was asked, in the clear or over TLS.
#![allow(dead_code, reason = "each test program uses a part")]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

/// A request as it arrived.
#[derive(Debug, Clone)]
pub struct Seen {
    /// `GET` or `HEAD`.
    pub method: String,
    /// Path and query.
    pub target: String,
    headers: Vec<(String, String)>,
}

impl Seen {
    /// The first header of that name (lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The range asked for, as half-open.
    pub fn range(&self) -> Option<(usize, usize)> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse::<usize>().ok()? + 1))
    }
}

/// What to answer.
#[derive(Debug, Clone)]
pub struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Bytes of the body to send before closing the connection.
    cut: Option<usize>,
    /// Bytes of the body to send before falling silent.
    stall: Option<usize>,
    /// Pause before each single byte of the body.
    dribble: Option<Duration>,
    length: bool,
}

impl Reply {
    pub fn new(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new(), cut: None, stall: None, dribble: None, length: true }
    }

    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// Breaks off after so many bytes.
    pub fn cut(mut self, after: usize) -> Self {
        self.cut = Some(after);
        self
    }

    /// Falls silent after so many bytes.
    pub fn stall(mut self, after: usize) -> Self {
        self.stall = Some(after);
        self
    }

    /// Sends one byte at a time, with a pause before each.
    pub fn dribble(mut self, pause: Duration) -> Self {
        self.dribble = Some(pause);
        self
    }

    /// The body's end is the connection's; no `Content-Length`.
    pub fn without_length(mut self) -> Self {
        self.length = false;
        self
    }

    /// What a correct server says to a request for part of `content`.
    pub fn part(seen: &Seen, content: &[u8]) -> Self {
        match seen.range() {
            Some((start, end)) if start < content.len() => {
                let end = end.min(content.len());
                let range = format!("bytes {start}-{}/{}", end - 1, content.len());
                Self::new(206).header("content-range", range).body(&content[start..end])
            }
            Some(_) => Self::new(416),
            None => Self::new(200).body(content),
        }
    }
}

type Behaviour = dyn Fn(&Seen) -> Reply + Send + Sync;

/// Listens on a port of its own until dropped.
pub struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    task: JoinHandle<()>,
}

impl Server {
    pub async fn start(behaviour: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        Self::listen(None, Arc::new(behaviour)).await
    }

    /// The same over TLS.
    pub async fn start_tls(tls: ServerConfig, behaviour: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        Self::listen(Some(TlsAcceptor::from(Arc::new(tls))), Arc::new(behaviour)).await
    }

    async fn listen(tls: Option<TlsAcceptor>, behaviour: Arc<Behaviour>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (tls, behaviour, log) = (tls.clone(), Arc::clone(&behaviour), Arc::clone(&log));
                tokio::spawn(async move {
                    match tls {
                        None => serve(stream, behaviour, log).await,
                        Some(tls) => {
                            // A client that does not like the certificate goes away here.
                            let Ok(stream) = tls.accept(stream).await else { return };
                            serve(stream, behaviour, log).await;
                        }
                    }
                });
            }
        });
        Self { address, seen, task }
    }

    /// `127.0.0.1:port`.
    pub fn authority(&self) -> String {
        self.address.to_string()
    }

    /// `https://localhost:port` and `path`.
    pub fn tls_url(&self, path: &str) -> String {
        format!("https://localhost:{}{path}", self.address.port())
    }

    /// `http://127.0.0.1:port` and `path`.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Everything asked so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(mut stream: impl AsyncRead + AsyncWrite + Unpin, behaviour: Arc<Behaviour>, log: Arc<Mutex<Vec<Seen>>>) {
    let mut buffer = Vec::new();
    loop {
        let head = loop {
            if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                let rest = buffer.split_off(end + 4);
                break std::mem::replace(&mut buffer, rest);
            }
            let mut piece = [0; 4096];
            match stream.read(&mut piece).await {
                Ok(n) if n > 0 => buffer.extend_from_slice(&piece[..n]),
                _ => return,
            }
        };
        let seen = parse(&String::from_utf8(head).unwrap());
        log.lock().unwrap().push(seen.clone());
        let reply = behaviour(&seen);
        let mut text = format!("HTTP/1.1 {} X\r\n", reply.status);
        for (name, value) in &reply.headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        if reply.length {
            text.push_str(&format!("content-length: {}\r\n", reply.body.len()));
        }
        text.push_str("\r\n");
        let body = if seen.method == "HEAD" { &[][..] } else { &reply.body };
        let sent = reply.cut.or(reply.stall).unwrap_or(body.len()).min(body.len());
        if stream.write_all(text.as_bytes()).await.is_err() {
            return;
        }
        for piece in body[..sent].chunks(if reply.dribble.is_some() { 1 } else { usize::MAX }) {
            if let Some(pause) = reply.dribble {
                tokio::time::sleep(pause).await;
            }
            if stream.write_all(piece).await.is_err() {
                return;
            }
        }
        if reply.stall.is_some() {
            tokio::time::sleep(Duration::from_secs(60)).await;
        }
        if reply.cut.is_some() || !reply.length {
            return;
        }
    }
}

fn parse(head: &str) -> Seen {
    let mut lines = head.lines();
    let mut first = lines.next().unwrap().split(' ');
    let (method, target) = (first.next().unwrap().to_owned(), first.next().unwrap().to_owned());
    let headers = lines.filter_map(|line| line.split_once(':'));
    let headers = headers.map(|(name, value)| (name.to_lowercase(), value.trim().to_owned())).collect();
    Seen { method, target, headers }
}
