//! The program that workers run, and what it is told: what an upgrade replaces, and what a roll-back returns to.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use anyhow::{Context, bail};
use rustix::fs::{Mode, OFlags};

use crate::line::MAX_SETTINGS;

/// A program file, held open: it can be started after its path was given to another one.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    file: OwnedFd,
}

/// A program with settings.
#[derive(Debug, Clone)]
pub struct Version {
    /// What workers run.
    pub program: Rc<Program>,
    /// Text of the settings that they are told.
    pub settings: Rc<str>,
}

impl Program {
    /// The program of this process, whatever is at its path by now.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn own() -> anyhow::Result<Self> {
        let path = std::env::current_exe().context("looking for our own program")?;
        Ok(Self { file: open(Path::new("/proc/self/exe"))?, path })
    }

    /// What is at `path` now.
    ///
    /// # Errors
    /// When nothing is.
    pub fn at(path: &Path) -> anyhow::Result<Self> {
        Ok(Self { file: open(path)?, path: path.to_owned() })
    }

    /// Where it was found.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A command that starts it in a child of this process.
    #[must_use]
    pub fn command(&self) -> Command {
        // The child has other descriptors at these numbers by the time it becomes the program; ours stay.
        let mut command = Command::new(format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()));
        command.arg0("millstreamd").env_remove("NOTIFY_SOCKET");
        command
    }
}

fn open(path: &Path) -> anyhow::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("opening the program {}", path.display()))
}

/// The text of the settings file; empty without one.
///
/// # Errors
/// When it cannot be read, or is longer than [`MAX_SETTINGS`].
pub fn read_settings(config: Option<&Path>) -> anyhow::Result<String> {
    let Some(path) = config else { return Ok(String::new()) };
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MAX_SETTINGS + 1).read_to_string(&mut text));
    read.with_context(|| format!("reading settings {}", path.display()))?;
    if text.len() as u64 > MAX_SETTINGS {
        bail!("settings {} are longer than {MAX_SETTINGS} bytes", path.display());
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_started_after_its_file_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("echo");
        std::fs::copy("/bin/echo", &path).unwrap();
        let program = Program::at(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let output = program.command().arg("still here").output().unwrap();
        assert_eq!(output.stdout, b"still here\n");
    }

    #[test]
    fn settings_have_a_longest_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("settings");
        std::fs::write(&path, " ".repeat(usize::try_from(MAX_SETTINGS).unwrap())).unwrap();
        read_settings(Some(&path)).unwrap();
        std::fs::write(&path, " ".repeat(usize::try_from(MAX_SETTINGS).unwrap() + 1)).unwrap();
        assert!(read_settings(Some(&path)).is_err());
        assert_eq!(read_settings(None).unwrap(), "");
    }
}
