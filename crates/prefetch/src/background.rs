//! Work that gives way to whatever else wants a processor.
//!
//! Two measures, because one is not enough. A priority weighs only within one cgroup (or session, with `autogroup`), and
//! containers are in others. So the thread also looks how long it had to wait for a processor, and rests in proportion. That
//! is better than `/proc/pressure/cpu`, which is about the whole machine and counts our own waiting as pressure. How long it rests
//! depends, while the work is young, on whether any processor is idle: then nobody lacks one.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

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
/// The same while the work is young: the container that it is for starts, and has the processors almost for itself.
const REST_AT_START: u32 = 64;
/// Work is young for as long, which is longer than most containers take to start. Bounded, so that it comes to its end in reasonable
/// time on a machine that is never idle.
const START: Duration = Duration::from_secs(10);
/// Over how much time it is looked how long the thread waited: over less, any hiccup would look like a machine that is busy.
const LOOK: Duration = Duration::from_millis(100);
/// Of the time of all processors: where more was idle, nobody lacks one. Threads that wait for each other now and then, and for
/// what brings the bytes, are no reason for long rests.
const IDLE_ENOUGH: f64 = 0.1;
/// No rest is longer, so that the work goes on soon after the others are done.
const LONGEST_REST: Duration = Duration::from_secs(1);

/// Rests of a thread that others leave no processor to. Where the kernel does not say (no `CONFIG_SCHED_INFO`), there are none.
#[derive(Debug)]
pub(crate) struct Courtesy {
    statistics: Option<File>,
    /// `/proc/stat`.
    processors: Option<File>,
    begun: Instant,
    /// When the statistics were read last.
    looked: Instant,
    before: Times,
    idle: Ticks,
}

/// Since the thread started: how long it ran, and how long it could have run but waited for a processor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Times {
    ran: Duration,
    waited: Duration,
}

/// Of all processors since the machine started, in units of the kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Ticks {
    idle: u64,
    all: u64,
}

impl Courtesy {
    /// For the calling thread, which alone may use it.
    pub(crate) fn of_this_thread() -> Self {
        let statistics = File::open("/proc/thread-self/schedstat").ok();
        let processors = File::open("/proc/stat").ok();
        let (now, before, idle) = (Instant::now(), Times::default(), Ticks::default());
        let mut courtesy = Self { statistics, processors, begun: now, looked: now, before, idle };
        courtesy.begin();
        courtesy
    }

    /// Sleeps if the thread had to wait for others lately. To be called often.
    #[expect(clippy::disallowed_methods, reason = "no event could end a rest earlier; it is bounded")]
    pub(crate) fn rest(&mut self) {
        // A thread cannot have run and waited for longer than time went by.
        if self.looked.elapsed() < LOOK {
            return;
        }
        self.looked = Instant::now();
        let Some(now) = self.times() else { return };
        let (ran, waited) = (now.ran.saturating_sub(self.before.ran), now.waited.saturating_sub(self.before.waited));
        if ran + waited < LOOK {
            return;
        }
        let idle = self.ticks().map_or(0.0, |ticks| ticks.idle_since(self.idle));
        let rest = rest(ran, waited, self.begun.elapsed() < START && idle < IDLE_ENOUGH);
        if !rest.is_zero() {
            std::thread::sleep(rest);
        }
        // What others do while this thread rests says nothing of what they lack while it does not.
        self.begin();
    }

    fn begin(&mut self) {
        self.looked = Instant::now();
        self.before = self.times().unwrap_or(self.before);
        self.idle = self.ticks().unwrap_or(self.idle);
    }

    fn ticks(&self) -> Option<Ticks> {
        let mut buffer = [0; 256];
        let len = self.processors.as_ref()?.read_at(&mut buffer, 0).ok()?;
        Ticks::parse(buffer.get(..len)?)
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

impl Ticks {
    /// Of the first line: the name, then user, nice, system, idle, waiting for a disk, and others.
    fn parse(text: &[u8]) -> Option<Self> {
        let line = std::str::from_utf8(text).ok()?.lines().next()?;
        let numbers: Vec<u64> = line.split_ascii_whitespace().skip(1).map_while(|number| number.parse().ok()).collect();
        let [_, _, _, idle, disk, ..] = numbers[..] else { return None };
        // What guests used is in the first two already.
        Some(Self { idle: idle + disk, all: numbers.iter().take(8).sum() })
    }

    /// Which part of the time since was idle.
    fn idle_since(self, before: Self) -> f64 {
        let (idle, all) = (self.idle.saturating_sub(before.idle), self.all.saturating_sub(before.all));
        if all == 0 { 0.0 } else { idle as f64 / all as f64 }
    }
}

/// Half as long as it ran is what a thread may wait because of our own other threads. Against one competitor of equal weight it
/// waits as long as it runs, and goes on with a sixth of that processor; at first with one part in 34.
fn rest(ran: Duration, waited: Duration, start: bool) -> Duration {
    let times = if start { REST_AT_START } else { REST };
    (waited.saturating_sub(ran / 2) * times).min(LONGEST_REST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_grow_with_waiting_and_have_a_bound() {
        let ms = Duration::from_millis;
        for start in [true, false] {
            assert_eq!(rest(ms(10), ms(0), start), ms(0));
            assert_eq!(rest(ms(10), ms(5), start), ms(0));
            assert_eq!(rest(ms(1), ms(168), start), LONGEST_REST);
        }
        assert_eq!(rest(ms(10), ms(10), true), ms(320));
        assert_eq!(rest(ms(10), ms(10), false), ms(40));
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
            let until = Instant::now() + Duration::from_millis(50);
            while Instant::now() < until {}
            assert!(courtesy.times().unwrap().ran > before.ran);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn the_kernel_says_how_long_processors_were_idle() {
        let text = b"cpu  10 20 30 400 50 1 2 3 999 999\ncpu0 1 2 3 4 5 6 7 8 9 10\n";
        let ticks = Ticks::parse(text).unwrap();
        assert_eq!(ticks, Ticks { idle: 450, all: 516 });
        let later = Ticks { idle: 460, all: 536 };
        assert!((later.idle_since(ticks) - 0.5).abs() < 1e-9 && ticks.idle_since(ticks) == 0.0);
        assert_eq!(Ticks::parse(b"cpu 1 2 3"), None);
        assert!(Courtesy::of_this_thread().ticks().is_some());
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
