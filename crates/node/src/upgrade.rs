//! `millstreamd upgrade`: asks the supervisor for another program or other settings, and learns what became of it.
//!
//! The caller sends `>` and the path of a program (or none: what is now at the path of the program that runs) and closes its
//! half of the connection; the answer is `+` or `-` and a text for a person.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use millstream_settings::node::Settings;
use tracing::warn;

/// Bytes of a request or an answer.
const MAX_TEXT: u64 = 16 * 1024;
/// How long the supervisor, which does nothing else meanwhile, waits for a caller.
const CALLER: Duration = Duration::from_secs(1);
/// How long a caller waits for the supervisor: longer than all that the supervisor may wait for.
const SUPERVISOR: Duration = Duration::from_secs(3600);

/// Where the supervisor can be asked: beside the socket for containerd.
#[must_use]
pub fn socket(settings: &Settings) -> PathBuf {
    settings.socket.with_extension("control")
}

/// Asks the `millstreamd` of these settings to go over to the program at `binary`, else to the one at its own path, and to the
/// settings in its file. Returns what it says.
///
/// # Errors
/// When it does not run, or goes on as it was; the text says why.
pub fn ask(settings: &Settings, binary: Option<&Path>) -> anyhow::Result<String> {
    let mut request = vec![b'>'];
    if let Some(binary) = binary {
        let binary = fs::canonicalize(binary).with_context(|| format!("looking for {}", binary.display()))?;
        request.extend(binary.as_os_str().as_bytes());
    }
    let path = socket(settings);
    let mut stream = UnixStream::connect(&path).with_context(|| {
        format!("asking millstreamd at {}; hint: it has to run, and --config has to name its settings", path.display())
    })?;
    stream.set_read_timeout(Some(SUPERVISOR))?;
    stream.write_all(&request)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.take(MAX_TEXT).read_to_string(&mut answer).context("waiting for millstreamd")?;
    match answer.split_at_checked(1) {
        Some(("+", text)) => Ok(text.to_owned()),
        Some(("-", text)) => bail!("{text}"),
        _ => bail!("millstreamd ended meanwhile"),
    }
}

/// The supervisor's end.
#[derive(Debug)]
pub struct Requests {
    listener: UnixListener,
    path: PathBuf,
}

impl Requests {
    /// Listens at [`socket`], in place of one that a predecessor left.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn listen(settings: &Settings) -> anyhow::Result<Self> {
        let path = socket(settings);
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).with_context(|| format!("listening at {}", path.display()))?;
        fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }

    /// The next request, if there is one.
    pub fn next(&self) -> Option<Request> {
        let (stream, _) = self.listener.accept().ok()?;
        let read = || -> io::Result<Request> {
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(CALLER))?;
            stream.set_write_timeout(Some(CALLER))?;
            let mut text = Vec::new();
            (&stream).take(MAX_TEXT).read_to_end(&mut text)?;
            // Whoever connects and goes away has asked for nothing.
            let path = text.strip_prefix(b">").ok_or(io::ErrorKind::InvalidData)?;
            let program = (!path.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(path)));
            Ok(Request { stream: stream.try_clone()?, program })
        };
        read().inspect_err(|error| warn!(%error, "a request to the supervisor was not understood")).ok()
    }
}

impl AsFd for Requests {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Somebody asks for an upgrade.
#[derive(Debug)]
pub struct Request {
    stream: UnixStream,
    /// The program to go over to; `None`: what is at the path of the present one.
    pub program: Option<PathBuf>,
}

impl Request {
    /// Says what became of it.
    pub fn answer(mut self, result: &anyhow::Result<String>) {
        let text = match result {
            Ok(text) => format!("+{text}"),
            Err(error) => format!("-{error:#}"),
        };
        // The caller may be gone; what was done is in the log.
        let _ = self.stream.write_all(text.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_connects_and_goes_away_asks_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { socket: dir.path().join("m.sock"), ..Settings::default() };
        let requests = Requests::listen(&settings).unwrap();
        assert_eq!(fs::metadata(socket(&settings)).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(requests.next().is_none());
        drop(UnixStream::connect(socket(&settings)).unwrap());
        assert!(requests.next().is_none());
        let caller = std::thread::spawn({
            let settings = settings.clone();
            move || [ask(&settings, None), ask(&settings, Some(Path::new("/bin/sh")))]
        });
        for (asks_for_one, said) in [(false, Ok("done".into())), (true, Err(anyhow::anyhow!("not this one")))] {
            let request = loop {
                if let Some(request) = requests.next() {
                    break request;
                }
                std::thread::yield_now();
            };
            assert_eq!(request.program.is_some(), asks_for_one);
            request.answer(&said);
        }
        let [first, second] = caller.join().unwrap();
        assert_eq!(first.unwrap(), "done");
        assert_eq!(second.unwrap_err().to_string(), "not this one");
    }
}
