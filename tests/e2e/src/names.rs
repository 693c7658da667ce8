//! A name server of a test's own, and programs that ask it.
//!
//! It answers questions for IPv4 addresses over UDP, at port 53 of an address of its own, in a thread of the test itself. What it
//! answers can be changed at any time; it counts what it was asked. Everything else exists and has no such record.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::workdir::Workdir;

/// How often the thread looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(20);
/// Bytes of a question.
const QUESTION: usize = 512;
/// What comes before the question: number, flags, four counts.
const HEADER: usize = 12;
/// Type of the record that holds an IPv4 address.
const A: [u8; 2] = [0, 1];

/// What becomes of questions about a name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Answer {
    /// These addresses, for a second.
    Addresses(Vec<Ipv4Addr>),
    /// The first question gets the first of these addresses, and so on; the last one is for all that follow.
    InTurn(Vec<Ipv4Addr>),
    /// There is no such name.
    #[default]
    NoSuchName,
    /// None.
    Silence,
}

#[derive(Debug, Default)]
struct State {
    answers: HashMap<String, Answer>,
    /// Questions for addresses, by name.
    asked: HashMap<String, usize>,
}

/// A running name server; it ends when it is dropped.
#[derive(Debug)]
pub struct Names {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Names {
    /// Starts it at port 53 of an address, in the network of the caller. It knows no name.
    ///
    /// # Errors
    ///
    /// If the port is not free.
    pub fn start(address: Ipv4Addr) -> Result<Self> {
        let address = SocketAddr::from((address, 53));
        let socket = UdpSocket::bind(address).with_context(|| format!("listening on {address}"))?;
        socket.set_read_timeout(Some(LOOK))?;
        let (state, ended) = (Arc::<Mutex<State>>::default(), Arc::<AtomicBool>::default());
        let thread = std::thread::spawn({
            let (state, ended) = (Arc::clone(&state), Arc::clone(&ended));
            move || serve(&socket, &state, &ended)
        });
        Ok(Self { address, state, ended, thread: Some(thread) })
    }

    /// From the next question on.
    pub fn set(&self, name: &str, answer: Answer) {
        lock(&self.state).answers.insert(name.to_owned(), answer);
    }

    /// How often the addresses of `name` were asked for.
    #[must_use]
    pub fn asked(&self, name: &str) -> usize {
        lock(&self.state).asked.get(name).copied().unwrap_or_default()
    }

    /// A file that has programs ask this server; for [`asking`].
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn resolv_conf(&self, work: &Workdir) -> Result<PathBuf> {
        let file = work.path().join(format!("resolv-{}.conf", self.address.ip()));
        let text = format!("nameserver {}\noptions timeout:1 attempts:2\n", self.address.ip());
        std::fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
        Ok(file)
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// A command for a program that finds `resolv_conf` in the place of the machine's own, in a mount namespace that ends with it.
#[must_use]
pub fn asking(resolv_conf: &Path, program: &Path) -> Command {
    const MOUNT: &str = r#"mount --bind "$0" /etc/resolv.conf && exec "$@""#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", MOUNT]).arg(resolv_conf).arg(program);
    command
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(socket: &UdpSocket, state: &Mutex<State>, ended: &AtomicBool) {
    let mut buffer = [0; QUESTION];
    while !ended.load(Ordering::Relaxed) {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        if let Some(reply) = buffer.get(..length).and_then(|question| answer(question, &mut lock(state))) {
            socket.send_to(&reply, from).ok();
        }
    }
}

/// The answer to a question, if it gets one.
fn answer(question: &[u8], state: &mut State) -> Option<Vec<u8>> {
    let (name, end) = name_of(question)?;
    let kind = question.get(end..end + 2)?;
    let mut known = state.answers.get(&name).cloned().unwrap_or_default();
    let asked = state.asked.entry(name).or_default();
    if kind == A {
        *asked += 1;
    }
    if let Answer::InTurn(addresses) = known {
        let turn = addresses.get(asked.saturating_sub(1)).or(addresses.last()).copied();
        known = Answer::Addresses(turn.into_iter().collect());
    }
    let (status, addresses) = match known {
        Answer::Addresses(addresses) if kind == A => (0, addresses),
        Answer::NoSuchName => (3, Vec::new()),
        Answer::Silence => return None,
        _ => (0, Vec::new()),
    };
    let count = u8::try_from(addresses.len()).ok()?;
    let mut reply = question.get(..2)?.to_vec();
    // An answer, recursion wished and offered; one question, so many records.
    reply.extend([0x81, 0x80 | status, 0, 1, 0, count, 0, 0, 0, 0]);
    reply.extend_from_slice(question.get(HEADER..end + 4)?);
    for address in addresses {
        // The name of the question, an address of the Internet, for a second, in four bytes.
        reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
        reply.extend(address.octets());
    }
    Some(reply)
}

/// The name that is asked about, and where it ends.
fn name_of(question: &[u8]) -> Option<(String, usize)> {
    let mut labels: Vec<String> = Vec::new();
    let mut at = HEADER;
    loop {
        let length = usize::from(*question.get(at)?);
        at += 1;
        if length == 0 {
            return Some((labels.join("."), at));
        }
        let label = question.get(at..at + length)?;
        labels.push(String::from_utf8_lossy(label).to_ascii_lowercase());
        at += length;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn question(kind: u8) -> Vec<u8> {
        let mut question = vec![7, 8, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        question.extend(b"\x01R\x04test\x00");
        question.extend([0, kind, 0, 1]);
        question
    }

    #[test]
    fn names_have_the_addresses_that_were_set() {
        let mut state = State::default();
        let mut ask = |known: Answer, kind| {
            state.answers.insert("r.test".to_owned(), known);
            answer(&question(kind), &mut state)
        };
        let reply = ask(Answer::Addresses(vec![[1, 2, 3, 4].into(), [5, 6, 7, 8].into()]), 1).unwrap();
        assert_eq!(reply[..12], [7, 8, 0x81, 0x80, 0, 1, 0, 2, 0, 0, 0, 0]);
        assert_eq!((&reply[12..24], &reply[36..40]), (&question(1)[12..], &[1, 2, 3, 4][..]));
        assert!(reply.ends_with(&[5, 6, 7, 8]));
        let reply = ask(Answer::Addresses(vec![[1, 2, 3, 4].into()]), 28).unwrap();
        assert_eq!(reply[3..8], [0x80, 0, 1, 0, 0], "no other records");
        assert_eq!(ask(Answer::NoSuchName, 1).unwrap()[3], 0x83);
        assert_eq!(ask(Answer::Silence, 1), None);
        state.asked.clear();
        let known = Answer::InTurn(vec![[1, 1, 1, 1].into(), [2, 2, 2, 2].into()]);
        state.answers.insert("r.test".to_owned(), known);
        let last: Vec<u8> = (0..3).map(|_| *answer(&question(1), &mut state).unwrap().last().unwrap()).collect();
        assert_eq!((last, state.asked["r.test"]), (vec![1, 2, 2], 3));
    }

    #[test]
    fn nonsense_gets_no_answer() {
        for length in 0..question(1).len() {
            assert_eq!(answer(&question(1)[..length], &mut State::default()), None);
        }
    }
}
