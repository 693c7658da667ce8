//! Processes, signals, the mount and time as the supervisor's loop has them. Tests run it with others in their place.

use std::io;

use rustix::process::{Pid, Signal, kill_process};

pub(crate) use std::process::Child;
pub(crate) use std::time::Instant;

pub(crate) use millstream_sys::process::spawn_with;
pub(crate) use millstream_sys::signals::Signals;

pub(crate) use crate::oom::kills as oom_kills;
pub(crate) use crate::supervisor::Mounting;

/// Asks a process that was not waited for yet to end.
pub(crate) fn terminate(child: &Child) -> io::Result<()> {
    Ok(kill_process(Pid::from_child(child), Signal::TERM)?)
}
