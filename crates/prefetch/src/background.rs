//! Work that gives way to whatever else wants a processor.

use millstream_source::{ErrorKind, SourceError};
use tokio::sync::oneshot;

/// The lowest priority short of running only on an idle machine, which could hold a lock for ever.
const NICEST: i32 = 19;

/// Runs `work`, which may block, at low priority. On a thread of its own, because a priority once lowered stays so: a pooled
/// thread would serve readers with it later. Callers see to it that there are few of them at a time. Dropping the future does
/// not end the work.
///
/// # Errors
/// [`ErrorKind::Local`] when the thread cannot be started or panics.
pub(crate) async fn at_low_priority<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, SourceError> {
    let failed = |what: String| SourceError::new(ErrorKind::Local, format!("hydration thread: {what}"));
    let (sender, done) = oneshot::channel();
    let run = move || {
        // On Linux this is the priority of the calling thread alone. Where it is refused, everything works all the same.
        let _ = rustix::process::setpriority_process(None, NICEST);
        // Whoever waited may be gone.
        let _ = sender.send(work());
    };
    std::thread::Builder::new().name("hydrate".to_owned()).spawn(run).map_err(|error| failed(error.to_string()))?;
    done.await.map_err(|_| failed("it panicked".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_low_there_and_nowhere_else() {
        let priority = || rustix::process::getpriority_process(None).unwrap();
        let before = priority();
        assert_eq!(at_low_priority(priority).await.unwrap(), NICEST);
        assert_eq!(priority(), before);
        assert_eq!(at_low_priority(|| panic!("on purpose")).await.unwrap_err().kind, ErrorKind::Local);
    }
}
