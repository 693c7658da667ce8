//! What the supervisor's loop has around it: a kernel that sends INIT once, and workers that do what
//! [`worker::run`](crate::worker::run) does up to the point where it serves.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::time::Duration;

use millstream_fuse::Journal;
use millstream_sys::fuse_device::{Mounted, message_pair};
use rustix::event::PollFlags;
use rustix::process::Signal;
use shuttle::rand::{Rng as _, thread_rng};
use shuttle::sync::Mutex;
use shuttle::thread;

use super::workers::has_event;
use crate::line::{Line, Report, Start};

/// Settings of the version that served first.
pub(super) const OLD: &str = "";
/// Settings of others: the first one works.
pub(super) const VERSIONS: [&str; 6] =
    ["works", "refuses", "is never ready", "refuses the store", "dies with the store", "never serves"];
/// What [`Signals`] looks for at most while time stands still.
const LOOKS: u32 = 8;

/// All of it. Whatever a process does is one step, after which it may be dead.
#[derive(Debug)]
pub(super) struct World(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    now: Duration,
    signals: VecDeque<i32>,
    processes: BTreeMap<u32, Process>,
    /// Who has the store open.
    store: Option<u32>,
    /// Who serves, and with which settings.
    serves: Option<(u32, &'static str)>,
    /// The kernel's ends of the connections.
    kernel: Vec<Connection>,
}

#[derive(Debug)]
struct Connection {
    /// None: it was aborted.
    end: Option<OwnedFd>,
    answer: Option<Vec<u8>>,
}

#[derive(Debug)]
struct Process {
    /// None: it lives.
    status: Option<ExitStatus>,
    /// It was asked to end.
    asked: bool,
    /// Gone with it.
    line: Option<Line>,
    device: Option<OwnedFd>,
}

thread_local! {
    static WORLD: RefCell<Option<Arc<World>>> = const { RefCell::new(None) };
}

fn world() -> Arc<World> {
    WORLD.with(|world| world.borrow().clone()).unwrap()
}

impl State {
    /// Looks at what the kernel was answered.
    fn hear_answers(&mut self) {
        for connection in &mut self.kernel {
            let Some(end) = &connection.end else { continue };
            while has_event(end.as_fd(), PollFlags::IN).unwrap() {
                let mut answer = vec![0; 64];
                let len = rustix::io::read(end, &mut answer).unwrap();
                if len == 0 {
                    break;
                }
                answer.truncate(len);
                assert_eq!(connection.answer, None, "the kernel is answered twice");
                connection.answer = Some(answer);
            }
        }
    }

    fn end(&mut self, id: u32, status: ExitStatus) {
        let Some(process) = self.processes.get_mut(&id).filter(|process| process.status.is_none()) else { return };
        (process.status, process.line, process.device) = (Some(status), None, None);
        self.store.take_if(|owner| *owner == id);
        self.serves.take_if(|(owner, _)| *owner == id);
    }
}

fn killed(signal: Signal) -> ExitStatus {
    ExitStatus::from_raw(signal.as_raw())
}

fn exited(code: i32) -> ExitStatus {
    ExitStatus::from_raw(code << 8)
}

impl World {
    pub(super) fn new() -> Arc<Self> {
        let world = Arc::new(Self(Mutex::default()));
        WORLD.with(|current| *current.borrow_mut() = Some(world.clone()));
        world
    }

    fn state(&self) -> shuttle::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(super) fn signal(&self, signal: Signal) {
        self.state().signals.push_back(signal.as_raw());
    }

    /// Kills one of the workers, if there is one.
    pub(super) fn kill(&self, signal: Signal) {
        let mut state = self.state();
        let live = state.processes.iter().filter(|(_, process)| process.status.is_none());
        let live: Vec<u32> = live.map(|(id, _)| *id).collect();
        if !live.is_empty() {
            let chosen = live[thread_rng().gen_range(0..live.len())];
            state.end(chosen, killed(signal));
        }
    }

    pub(super) fn abort_connection(&self) {
        let mut state = self.state();
        state.hear_answers();
        if let Some(connection) = state.kernel.last_mut() {
            connection.end = None;
        }
    }

    /// Waits until somebody serves the connection that is there, and gives its settings.
    pub(super) fn await_service(&self) -> &'static str {
        loop {
            let mut state = self.state();
            state.hear_answers();
            let answered = state.kernel.last().is_some_and(|last| last.end.is_some() && last.answer.is_some());
            if let Some((_, settings)) = state.serves.filter(|_| answered) {
                return settings;
            }
            drop(state);
            thread::yield_now();
        }
    }

    /// Nobody is left when the supervisor has ended.
    pub(super) fn assert_over(&self) {
        let mut state = self.state();
        state.hear_answers();
        let live = state.processes.values().filter(|process| process.status.is_none()).count();
        assert_eq!((live, state.store), (0, None), "workers outlive their supervisor");
    }

    /// One step of a process, unless it is dead: no more of it happens then.
    fn step<T>(&self, id: u32, step: impl FnOnce(&mut State) -> T) -> Option<T> {
        let mut state = self.state();
        let process = state.processes.get(&id)?;
        if process.asked && process.status.is_none() {
            state.end(id, exited(0));
        }
        if state.processes.get(&id)?.status.is_some() { None } else { Some(step(&mut state)) }
    }

    fn report(&self, id: u32, report: &Report) -> Option<()> {
        // To a supervisor that does not listen any more it cannot be said.
        self.step(id, |state| drop(state.processes[&id].line.as_ref().unwrap().report(report)))
    }

    /// Waits for what the supervisor says next.
    fn hear<T>(&self, id: u32, hear: impl Fn(&Line) -> anyhow::Result<T>) -> Option<T> {
        loop {
            let heard = self.step(id, |state| {
                let line = state.processes[&id].line.as_ref().unwrap();
                has_event(line.as_fd(), PollFlags::IN).unwrap().then(|| hear(line))
            })?;
            match heard {
                Some(Ok(heard)) => return Some(heard),
                // The supervisor is gone.
                Some(Err(_)) => self.step(id, |state| state.end(id, exited(1)))?,
                None => thread::yield_now(),
            }
        }
    }

    /// The life of a worker, until it is dead.
    fn live(&self, id: u32) -> Option<()> {
        let start: Start = self.hear(id, Line::await_start)?;
        let settings = VERSIONS.into_iter().find(|settings| *settings == start.settings).unwrap_or(OLD);
        let number = usize::from(start.init[0]);
        match settings {
            "refuses" => self.refuse(id)?,
            "is never ready" => self.hang(id)?,
            _ => self.report(id, &Report::Ready(String::new()))?,
        }
        self.hear(id, Line::await_go)?;
        self.step(id, |state| {
            assert_eq!(state.store, None, "two workers have the store open");
            state.store = Some(id);
        })?;
        match settings {
            "refuses the store" => self.refuse(id)?,
            "dies with the store" => self.step(id, |state| state.end(id, killed(Signal::ABORT)))?,
            "never serves" => self.hang(id)?,
            _ => {}
        }
        let known = self.step(id, |state| {
            state.hear_answers();
            state.kernel[number].answer.clone()
        })?;
        assert_eq!(start.answer, known, "what the worker is told, and what the kernel was answered");
        if start.answer.is_none() {
            self.report(id, &Report::Answer(format!("{id} answers INIT {number}").into_bytes()))?;
        }
        self.step(id, |state| state.serves = Some((id, settings)))?;
        self.report(id, &Report::Serves)?;
        loop {
            self.step(id, |state| {
                let device = state.processes[&id].device.as_ref().unwrap();
                if has_event(device.as_fd(), PollFlags::empty()).unwrap() {
                    state.end(id, exited(1));
                }
            })?;
            thread::yield_now();
        }
    }

    fn refuse(&self, id: u32) -> Option<()> {
        self.report(id, &Report::Refused("it does not work".to_owned()))?;
        self.step(id, |state| state.end(id, exited(1)))
    }

    fn hang(&self, id: u32) -> Option<()> {
        loop {
            self.step(id, |_| ())?;
            thread::yield_now();
        }
    }
}

/// A process of [`World`].
#[derive(Debug)]
pub(crate) struct Child(u32);

impl Child {
    pub(crate) fn id(&self) -> u32 {
        self.0
    }

    #[allow(clippy::unnecessary_wraps)]
    pub(crate) fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        Ok(world().state().processes[&self.0].status)
    }

    #[allow(clippy::unnecessary_wraps)]
    pub(crate) fn kill(&mut self) -> io::Result<()> {
        world().state().end(self.0, killed(Signal::KILL));
        Ok(())
    }

    pub(crate) fn wait(&mut self) -> io::Result<ExitStatus> {
        Ok(self.try_wait()?.unwrap())
    }
}

#[allow(clippy::unnecessary_wraps)]
pub(crate) fn terminate(child: &Child) -> io::Result<()> {
    world().state().processes.get_mut(&child.0).unwrap().asked = true;
    Ok(())
}

/// Nobody is killed for want of memory.
pub(crate) fn oom_kills() -> Option<u64> {
    None
}

pub(crate) fn spawn_with(_: Command, passed: &[BorrowedFd<'_>]) -> io::Result<Child> {
    let world = world();
    let id = {
        let mut state = world.state();
        let id = u32::try_from(state.processes.len() + 1).unwrap();
        let (line, device) = (passed[2].try_clone_to_owned()?, passed[0].try_clone_to_owned()?);
        let process = Process { status: None, asked: false, line: Some(Line::new(line)), device: Some(device) };
        state.processes.insert(id, process);
        id
    };
    thread::spawn(move || world.live(id));
    Ok(Child(id))
}

/// Signals that [`World::signal`] sends.
#[derive(Debug)]
pub(crate) struct Signals;

impl Signals {
    pub(crate) fn wait(&self, timeout: Duration) -> io::Result<Option<i32>> {
        self.wait_or(&[], timeout)
    }

    /// Whether anything happens before `timeout` is chance.
    pub(crate) fn wait_or(&self, others: &[BorrowedFd<'_>], timeout: Duration) -> io::Result<Option<i32>> {
        let world = world();
        for _ in 0..thread_rng().gen_range(1..=LOOKS) {
            if let Some(signal) = world.state().signals.pop_front() {
                return Ok(Some(signal));
            }
            for other in others {
                if has_event(*other, PollFlags::IN)? {
                    return Ok(None);
                }
            }
            thread::yield_now();
        }
        world.state().now += timeout;
        Ok(None)
    }
}

/// Time of [`World`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Instant(Duration);

impl Instant {
    pub(crate) fn now() -> Self {
        Self(world().state().now)
    }

    pub(crate) fn elapsed(&self) -> Duration {
        Self::now().saturating_duration_since(*self)
    }

    pub(crate) fn saturating_duration_since(&self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl std::ops::Add<Duration> for Instant {
    type Output = Self;

    fn add(self, more: Duration) -> Self {
        Self(self.0 + more)
    }
}

/// A connection to the kernel of [`World`].
#[derive(Debug)]
pub(crate) struct Mounting {
    pub(crate) mounted: Mounted,
    pub(crate) journal: Journal,
    pub(crate) shared: OwnedFd,
}

impl Mounting {
    pub(crate) fn new(_: &Path) -> anyhow::Result<Self> {
        let (device, end) = message_pair()?;
        let world = world();
        let mut state = world.state();
        let init = vec![u8::try_from(state.kernel.len())?];
        state.kernel.push(Connection { end: Some(end), answer: None });
        let (shared, journal) = Journal::create()?;
        Ok(Self { mounted: Mounted { device, init }, journal, shared })
    }
}
