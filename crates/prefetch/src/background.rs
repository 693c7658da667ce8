//! Work that gives way to whatever else wants a processor.
//!
//! Two measures, because one is not enough. A priority weighs only within one cgroup (or session, with `autogroup`), and
//! containers are in others. So the thread also looks how long it had to wait for a processor, and rests in proportion. That
//! is better than `/proc/pressure/cpu`, which is about the whole machine and counts our own waiting as pressure.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

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

/// A rest is this many times as long as the waiting that was more than is usual.
const REST: u32 = 8;
/// No rest is longer, so that the work comes to its end on a machine that is never idle.
const LONGEST_REST: Duration = Duration::from_millis(500);

/// Rests of a thread that others leave no processor to. Where the kernel does not say (no `CONFIG_SCHED_INFO`), there are none.
#[derive(Debug)]
pub(crate) struct Courtesy {
    statistics: Option<File>,
    before: Times,
}

/// Since the thread started: how long it ran, and how long it could have run but waited for a processor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Times {
    ran: Duration,
    waited: Duration,
}

impl Courtesy {
    /// For the calling thread, which alone may use it.
    pub(crate) fn of_this_thread() -> Self {
        let mut courtesy =
            Self { statistics: File::open("/proc/thread-self/schedstat").ok(), before: Times::default() };
        courtesy.before = courtesy.times().unwrap_or_default();
        courtesy
    }

    /// Sleeps if the thread had to wait for others since the last call.
    #[expect(clippy::disallowed_methods, reason = "no event could end a rest earlier; it is bounded")]
    pub(crate) fn rest(&mut self) {
        let Some(now) = self.times() else { return };
        let rest = rest(now.ran.saturating_sub(self.before.ran), now.waited.saturating_sub(self.before.waited));
        self.before = now;
        if !rest.is_zero() {
            std::thread::sleep(rest);
        }
    }

    fn times(&self) -> Option<Times> {
        let mut buffer = [0; 64];
        let len = self.statistics.as_ref()?.read_at(&mut buffer, 0).ok()?;
        Times::parse(buffer.get(..len)?)
    }
}

impl Times {
    /// Of the first two numbers, in nanoseconds; the third counts time slices.
    fn parse(line: &[u8]) -> Option<Self> {
        let mut numbers = std::str::from_utf8(line).ok()?.split_ascii_whitespace().map(str::parse);
        let mut next = || Some(Duration::from_nanos(numbers.next()?.ok()?));
        Some(Self { ran: next()?, waited: next()? })
    }
}

/// Half as long as it ran is what a thread may wait because of our own other threads. Against one competitor of equal weight it
/// waits as long as it runs, and goes on with a sixth of that processor.
fn rest(ran: Duration, waited: Duration) -> Duration {
    (waited.saturating_sub(ran / 2) * REST).min(LONGEST_REST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_grow_with_waiting_and_have_a_bound() {
        let ms = Duration::from_millis;
        assert_eq!(rest(ms(10), ms(0)), ms(0));
        assert_eq!(rest(ms(10), ms(5)), ms(0));
        assert_eq!(rest(ms(10), ms(10)), ms(40));
        assert_eq!(rest(ms(1), ms(68)), LONGEST_REST);
    }

    #[test]
    fn the_kernel_says_how_long_a_thread_ran() {
        assert_eq!(
            Times::parse(b"1500 20 3\n"),
            Some(Times { ran: Duration::from_nanos(1500), waited: Duration::from_nanos(20) })
        );
        assert_eq!(Times::parse(b"1500"), None);
        assert_eq!(Times::parse(b"x 1 2"), None);
        std::thread::spawn(|| {
            let courtesy = Courtesy::of_this_thread();
            let Some(before) = courtesy.times() else { panic!("no /proc/thread-self/schedstat") };
            let until = std::time::Instant::now() + Duration::from_millis(50);
            while std::time::Instant::now() < until {}
            assert!(courtesy.times().unwrap().ran > before.ran);
        })
        .join()
        .unwrap();
    }

    #[tokio::test]
    async fn it_is_low_there_and_nowhere_else() {
        let priority = || rustix::process::getpriority_process(None).unwrap();
        let before = priority();
        assert_eq!(at_low_priority(priority).await.unwrap(), NICEST);
        assert_eq!(priority(), before);
        assert_eq!(at_low_priority(|| panic!("on purpose")).await.unwrap_err().kind, ErrorKind::Local);
    }
}
