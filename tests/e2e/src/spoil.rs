//! An HTTP proxy before a registry that spoils its answers, as a bad network, an overloaded or a lying registry would.
//!
//! It speaks as much HTTP/1.1 as registries need: requests without a body, one on each connection. It runs in threads of
//! the test itself. What it spoils can be changed at any time ([`Spoiling`]), for one kind of client alone if need be; it
//! remembers what it was asked. It can also want tokens as registries do ([`Guard`]), and be the storage server that another
//! one sends its clients to ([`Spoiling::Signed`]).

mod carry;
mod fault;
mod http;

use std::collections::{HashMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::net::{self, AddressFamily, SocketType};
use sha2::{Digest as _, Sha256};

pub use fault::Spoiling;

use crate::registry::{Login, free_address};

/// Requests that are remembered; the oldest are forgotten first.
const REMEMBERED: usize = 20_000;
/// What `User-Agent`s of this project begin with.
pub const OURS: &str = "millstream/";

/// What a client asked.
#[derive(Debug, Clone)]
pub struct Seen {
    /// `GET`, `HEAD`, ...
    pub method: String,
    /// With the query.
    pub path: String,
    /// All headers, as `Name: value`.
    pub headers: Vec<String>,
}

impl Seen {
    /// The first header of that name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        http::header(&self.headers, name)
    }
}

/// A login that is asked for, and how long its tokens live.
#[derive(Debug, Clone)]
pub struct Guard {
    /// Who may have tokens.
    pub login: Login,
    /// Life of a token. What clients are told is five minutes: a registry may forget.
    pub life: Duration,
    /// What every token begins with, to be found again wherever it should not be.
    pub mark: String,
}

/// Answers by path that the proxy gives itself: type and body.
type Documents = HashMap<String, (String, Vec<u8>)>;

/// What all connections share.
#[derive(Debug, Default)]
struct State {
    spoiling: Spoiling,
    /// Spoiled are requests of clients whose `User-Agent` begins so.
    only: String,
    /// How many of them; none: all.
    first: Option<u32>,
    /// Not only those for blobs, but those for manifests as well.
    manifests: bool,
    /// Requests that were to be spoiled since the spoiling was set.
    spoiled: u32,
    guard: Option<Guard>,
    documents: Documents,
    seen: VecDeque<Seen>,
    /// Of a generator of numbers, so that a run can be repeated.
    random: u64,
}

impl State {
    /// The next number of the seed (xorshift).
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

/// A running proxy; it ends when it is dropped.
#[derive(Debug)]
pub struct Spoiler {
    address: SocketAddr,
    shared: Arc<Shared>,
    listener: TcpListener,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    address: SocketAddr,
    target: SocketAddr,
    state: Mutex<State>,
    ended: AtomicBool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }
}

impl Spoiler {
    /// Starts it before `target`, spoiling nothing.
    ///
    /// # Errors
    ///
    /// If no port is free.
    pub fn start(target: SocketAddr) -> Result<Self> {
        Self::seeded(target, 1)
    }

    /// The same with a seed for all that is drawn; not 0.
    ///
    /// # Errors
    ///
    /// If no port is free.
    pub fn seeded(target: SocketAddr, seed: u64) -> Result<Self> {
        Self::listen(free_address()?, target, seed)
    }

    /// The same at a certain address.
    ///
    /// # Errors
    ///
    /// If it is taken.
    pub fn listen(address: SocketAddr, target: SocketAddr, seed: u64) -> Result<Self> {
        let listener = TcpListener::bind(address).with_context(|| format!("listening on {address}"))?;
        let state = Mutex::new(State { random: seed.max(1), ..State::default() });
        let shared = Arc::new(Shared { address, target, state, ended: AtomicBool::new(false) });
        let thread = std::thread::spawn({
            let (shared, listener) = (Arc::clone(&shared), listener.try_clone()?);
            move || serve(&listener, &shared)
        });
        Ok(Self { address, shared, listener, thread: Some(thread) })
    }

    /// From now on answers for `document` of `repository`, by this tag and by its digest, whatever the registry would say; no
    /// registry would take in what tests need. Returns the digest.
    pub fn publish(&self, repository: &str, tag: &str, content_type: &str, document: &[u8]) -> String {
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(document)));
        let mut state = self.shared.state();
        for reference in [tag, &digest] {
            let path = format!("/v2/{repository}/manifests/{reference}");
            state.documents.insert(path, (content_type.to_owned(), document.to_vec()));
        }
        digest
    }

    /// What clients call instead of the registry.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From the next request on, for everybody.
    pub fn set(&self, spoiling: Spoiling) {
        self.set_for("", spoiling);
    }

    /// From the next request on, for clients whose `User-Agent` begins with `agent`; the others are served well.
    pub fn set_for(&self, agent: &str, spoiling: Spoiling) {
        self.set_first(agent, None, spoiling);
    }

    /// The same for as many requests as `first` says, if it does; those after them are served well.
    pub fn set_first(&self, agent: &str, first: Option<u32>, spoiling: Spoiling) {
        let mut state = self.shared.state();
        (state.spoiling, state.first, state.spoiled) = (spoiling, first, 0);
        agent.clone_into(&mut state.only);
    }

    /// Whether answers about manifests are spoiled as those about blobs are.
    pub fn spoil_manifests(&self, too: bool) {
        self.shared.state().manifests = too;
    }

    /// Requests that were to be spoiled since the last [`Spoiler::set`].
    pub fn spoiled(&self) -> u32 {
        self.shared.state().spoiled
    }

    /// Wants a token from now on, or does not any more.
    pub fn guard(&self, guard: Option<Guard>) {
        self.shared.state().guard = guard;
    }

    /// Requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.state().seen.iter().cloned().collect()
    }

    /// Forgets the requests so far.
    pub fn forget(&self) {
        self.shared.state().seen.clear();
    }
}

impl Drop for Spoiler {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        // Wakes the thread, also in another network, where no visitor could.
        net::shutdown(&self.listener, net::Shutdown::Both).ok();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// An address whose machine is there and drops what it gets: nobody accepts, and the queue of those who wait is full.
#[derive(Debug)]
pub struct BlackHole {
    /// The address.
    pub address: SocketAddr,
    _listener: OwnedFd,
    _waiting: Vec<TcpStream>,
}

impl BlackHole {
    /// Opens one.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn open() -> Result<Self> {
        Self::at((Ipv4Addr::LOCALHOST, 0).into())
    }

    /// The same at a certain address.
    ///
    /// # Errors
    ///
    /// If it is taken.
    pub fn at(address: SocketAddr) -> Result<Self> {
        const FULL: Duration = Duration::from_millis(200);
        let listener = net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
        net::bind(&listener, &address)?;
        net::listen(&listener, 0)?;
        let address: SocketAddr = net::getsockname(&listener)?.try_into().context("address of a socket")?;
        let mut waiting = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, FULL) {
            waiting.push(stream);
        }
        Ok(Self { address, _listener: listener, _waiting: waiting })
    }
}

fn serve(listener: &TcpListener, shared: &Arc<Shared>) {
    for client in listener.incoming() {
        if shared.ended() {
            return;
        }
        let Ok(client) = client else { continue };
        let shared = Arc::clone(shared);
        // A connection that breaks is what its two ends must cope with.
        std::thread::spawn(move || carry::carry(client, &shared).ok());
    }
}

#[cfg(test)]
mod tests;
