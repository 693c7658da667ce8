//! The supervisor's loop over workers that die, refuse and hang at any step: the very file, with processes, signals, the mount and
//! time in place of the real ones. What is said goes over real sockets, by the code of [`crate::line`].

mod outside {
    pub(crate) use super::world::{Child, Instant, Mounting, Signals, oom_kills, spawn_with, terminate};
}
#[allow(dead_code, unreachable_pub)]
#[path = "../workers.rs"]
mod workers;
mod world;

use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};

use millstream_settings::node::Settings;
use rustix::process::Signal;
use shuttle::rand::{Rng as _, thread_rng};
use shuttle::thread;

use self::workers::{Kept, Workers};
use self::world::{Mounting, OLD, Signals, VERSIONS, World};
use crate::program::{Program, Version};

/// Settings that an upgrade finds, by the place of their text among [`VERSIONS`].
fn config(version: usize) -> std::path::PathBuf {
    thread_local! {
        static FILES: tempfile::TempDir = {
            let directory = tempfile::tempdir().unwrap();
            for (number, text) in VERSIONS.iter().enumerate() {
                std::fs::write(directory.path().join(number.to_string()), text).unwrap();
            }
            directory
        };
    }
    FILES.with(|files| files.path().join(version.to_string()))
}

/// Runs a supervisor while `happens` does things to it, then looks whether a worker serves, and stops it.
fn supervise(version: usize, happens: fn(&World)) -> &'static str {
    let world = World::new();
    let supervisor = thread::spawn(move || {
        let settings = Settings::default();
        let (signals, config) = (Signals, config(version));
        // Only the upgrade's socket is missing: requests come as signals.
        let listener = std::os::unix::net::UnixListener::from(
            rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None).unwrap(),
        );
        let current = Version { program: Rc::new(Program::at(Path::new("/")).unwrap()), settings: OLD.into() };
        let kept =
            Kept { signals: &signals, listener: &listener, requests: None, settings: &settings, config: Some(&config) };
        Workers::new(kept, Mounting::new(Path::new("/m")).unwrap(), current).run().unwrap();
    });
    happens(&world);
    let served = world.await_service();
    world.signal(Signal::TERM);
    supervisor.join().unwrap();
    world.assert_over();
    served
}

fn pauses() {
    for _ in 0..thread_rng().gen_range(0..12) {
        thread::yield_now();
    }
}

/// One worker has the store at a time, the kernel is answered once, each worker is told that answer, and whatever dies, one
/// serves in the end. Seen to fail with: an answer that is given to the kernel and not kept; one that is kept although there is
/// another connection.
#[test]
fn whenever_workers_die_the_next_one_serves() {
    super::explore_some(super::schedules() / 2, || {
        let served = supervise(0, |world| {
            for _ in 0..thread_rng().gen_range(1..4) {
                pauses();
                match thread_rng().gen_range(0..5) {
                    0 => world.abort_connection(),
                    1 => world.kill(Signal::ABORT),
                    _ => world.kill(Signal::KILL),
                }
            }
        });
        assert_eq!(served, OLD);
    });
}

/// A version that is of no use never stays, whatever dies beside it; one that works may. Seen to fail with: an old worker that is
/// not stopped, or not waited for, before the next one may open the store; a next one that failed late and is left alive.
#[test]
fn an_upgrade_that_is_refused_leaves_the_old_worker() {
    static TAKEN: AtomicUsize = AtomicUsize::new(0);
    static KEPT: AtomicUsize = AtomicUsize::new(0);
    super::explore_some(super::schedules() / 2, || {
        let version = thread_rng().gen_range(0..VERSIONS.len());
        let served = supervise(version, |world| {
            pauses();
            if thread_rng().gen_bool(0.5) {
                world.await_service();
            }
            world.signal(Signal::HUP);
            for _ in 0..thread_rng().gen_range(0..3) {
                pauses();
                world.kill(Signal::KILL);
            }
        });
        if served == OLD {
            KEPT.fetch_add(1, Ordering::Relaxed);
        } else {
            assert_eq!((version, served), (0, VERSIONS[0]), "a version that is of no use serves");
            TAKEN.fetch_add(1, Ordering::Relaxed);
        }
    });
    assert!(TAKEN.load(Ordering::Relaxed) > 0 && KEPT.load(Ordering::Relaxed) > 0, "nothing was tried out");
}
