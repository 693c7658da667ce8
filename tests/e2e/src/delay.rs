//! A TCP proxy that makes the other side seem far away.
//!
//! Every byte arrives `one_way` after it was sent, in both directions, as through a pipe of that length without a
//! limit of its own: the bandwidth is the link's matter ([`crate::link`]). What a client sends first is held back one
//! more round trip, the time that the TCP handshake would have taken. TCP's slow start over the long way is not
//! imitated, so results are a little better than on a real line, for every program alike.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::watch::{Conversation, Requests, Watch};

/// Bytes of one read.
const PIECE: usize = 64 * 1024;
/// Pieces under way in one direction of one connection: 16 MiB, many times what such a link holds.
const PIECES: usize = 256;

/// What went through since the start. Unit of the byte counts: bytes of TCP payload.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Connections that clients opened.
    pub connections: u64,
    /// How often a client spoke first or after the server had: requests, as long as they are not pipelined.
    pub turns: u64,
    /// Bytes from clients.
    pub sent: u64,
    /// Bytes to clients.
    pub received: u64,
}

/// A share of the requests that the proxy lets wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stall {
    /// One request in so many, by their order.
    pub every: u64,
    /// How much longer it travels.
    pub time: Duration,
}

/// What a proxy tells.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    counts: Counts,
    requests: Requests,
}

#[derive(Debug, Default)]
struct Counters {
    connections: AtomicU64,
    turns: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    /// Requests that were considered for a stall.
    considered: AtomicU64,
    watch: Watch,
}

impl Counters {
    fn read(&self) -> Counts {
        Counts {
            connections: self.connections.load(Ordering::Relaxed),
            turns: self.turns.load(Ordering::Relaxed),
            sent: self.sent.load(Ordering::Relaxed),
            received: self.received.load(Ordering::Relaxed),
        }
    }

    /// How much longer the request that begins now travels.
    fn held_back(&self, stall: Option<Stall>) -> Duration {
        let Some(stall) = stall else { return Duration::ZERO };
        let number = self.considered.fetch_add(1, Ordering::Relaxed) + 1;
        if number.is_multiple_of(stall.every.max(1)) { stall.time } else { Duration::ZERO }
    }
}

/// Serves `listen` until the process ends, passing connections on to `target`. Whoever connects to the unix socket
/// `stats` is told the [`Counts`] and [`Requests`] as JSON.
///
/// # Errors
///
/// If one of the two places cannot be listened on, or accepting fails.
pub async fn serve(
    listen: SocketAddr,
    target: SocketAddr,
    one_way: Duration,
    stall: Option<Stall>,
    stats: &Path,
) -> Result<()> {
    let counters = Arc::new(Counters::default());
    let listener = TcpListener::bind(listen).await.with_context(|| format!("listening on {listen}"))?;
    let stats = UnixListener::bind(stats).with_context(|| format!("listening on {}", stats.display()))?;
    loop {
        tokio::select! {
            client = listener.accept() => {
                let (client, _) = client.context("accepting a connection")?;
                let counters = Arc::clone(&counters);
                // A connection that breaks is what its two ends must cope with, not this loop.
                tokio::spawn(async move { carry(client, target, one_way, stall, &counters).await.ok() });
            }
            asker = stats.accept() => {
                let (mut asker, _) = asker.context("accepting a question")?;
                let told = Told { counts: counters.read(), requests: counters.watch.read() };
                asker.write_all(&serde_json::to_vec(&told)?).await.ok();
            }
        }
    }
}

/// Asks a proxy for its counts.
///
/// # Errors
///
/// If it does not answer.
pub fn counts(stats: &Path) -> Result<Counts> {
    Ok(told(stats)?.counts)
}

/// Asks a proxy for the requests that it has seen.
///
/// # Errors
///
/// If it does not answer.
pub fn requests(stats: &Path) -> Result<Requests> {
    Ok(told(stats)?.requests)
}

fn told(stats: &Path) -> Result<Told> {
    let mut asker = std::os::unix::net::UnixStream::connect(stats)
        .with_context(|| format!("asking the proxy at {}", stats.display()))?;
    asker.set_read_timeout(Some(Duration::from_secs(5)))?;
    asker.flush()?;
    Ok(serde_json::from_reader(asker)?)
}

async fn carry(
    client: TcpStream,
    target: SocketAddr,
    one_way: Duration,
    stall: Option<Stall>,
    counters: &Counters,
) -> Result<()> {
    counters.connections.fetch_add(1, Ordering::Relaxed);
    let opened = Instant::now() + one_way * 2;
    let server = TcpStream::connect(target).await.with_context(|| format!("connecting to {target}"))?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let clients_turn = AtomicBool::new(true);
    let conversation = Mutex::new(Conversation::new(&counters.watch));
    let talk = || conversation.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let there = pipe(from_client, to_server, opened, one_way, |bytes| {
        counters.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if clients_turn.swap(false, Ordering::Relaxed) {
            counters.turns.fetch_add(1, Ordering::Relaxed);
        }
        if talk().client(bytes) { counters.held_back(stall) } else { Duration::ZERO }
    });
    let back = pipe(from_server, to_client, Instant::now(), one_way, |bytes| {
        counters.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        clients_turn.store(true, Ordering::Relaxed);
        talk().server(bytes);
        Duration::ZERO
    });
    // Either direction may end long before the other; an error in one ends both, as a reset would.
    tokio::try_join!(there, back).map(drop)
}

/// One direction: what is read at a moment, or before `opened`, is written `one_way` later, and what `note` says after that.
async fn pipe(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    opened: Instant,
    one_way: Duration,
    note: impl Fn(&[u8]) -> Duration,
) -> Result<()> {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Vec<u8>)>(PIECES);
    let read = async move {
        loop {
            let mut piece = Vec::with_capacity(PIECE);
            let length = from.read_buf(&mut piece).await?;
            let mut arrival = Instant::now().max(opened) + one_way;
            // An empty piece is the end of the direction; it travels as long as the rest.
            let last = length == 0;
            if !last {
                arrival += note(&piece);
            }
            if sender.send((arrival, piece)).await.is_err() || last {
                return Ok::<_, anyhow::Error>(());
            }
        }
    };
    let write = async move {
        while let Some((arrival, piece)) = receiver.recv().await {
            tokio::time::sleep_until(arrival).await;
            if piece.is_empty() {
                break;
            }
            to.write_all(&piece).await?;
        }
        Ok(to.shutdown().await?)
    };
    tokio::try_join!(read, write).map(drop)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_request_takes_two_round_trips_with_the_handshake_and_the_next_takes_one() {
        let one_way = Duration::from_millis(20);
        let dir = tempfile::tempdir().unwrap();
        let stats = dir.path().join("stats");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (first, second) = runtime.block_on(async {
            let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let target = server.local_addr().unwrap();
            tokio::spawn(async move {
                let (mut stream, _) = server.accept().await.unwrap();
                let mut byte = [0];
                while stream.read_exact(&mut byte).await.is_ok() {
                    stream.write_all(&[byte[0]; 1000]).await.unwrap();
                }
            });
            let listen = crate::registry::free_address().unwrap();
            let at = stats.clone();
            tokio::spawn(async move { serve(listen, target, one_way, None, &at).await });
            let started = Instant::now();
            // The proxy may have accepted before this task hears that it is connected, so the first request's time
            // begins with the attempt.
            let (mut client, mut asked) = loop {
                let attempt = Instant::now();
                match TcpStream::connect(listen).await {
                    Ok(client) => break (client, attempt),
                    Err(error) => assert!(started.elapsed() < Duration::from_secs(5), "{error}"),
                }
            };
            let mut times = Vec::new();
            for _ in 0..2 {
                let mut answer = [0; 1000];
                client.write_all(b"x").await.unwrap();
                client.read_exact(&mut answer).await.unwrap();
                times.push(asked.elapsed());
                asked = Instant::now();
            }
            (times[0], times[1])
        });
        // Lower bounds only: a loaded machine may be late, never early.
        assert!(first >= one_way * 4, "{first:?}");
        assert!(second >= one_way * 2, "{second:?}");
        assert_eq!(counts(&stats).unwrap(), Counts { connections: 1, turns: 2, sent: 2, received: 2000 });
    }
}
