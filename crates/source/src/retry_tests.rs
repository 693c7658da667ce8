use std::collections::VecDeque;
use std::sync::Mutex;

use futures::TryStreamExt;
use tokio::time::Instant;

use super::*;

/// What the next request of a [`Script`] meets.
enum Step {
    /// The request fails.
    Refuse(SourceError),
    /// The body gives this many bytes, then the error (or just ends).
    Cut(usize, Option<SourceError>),
    /// The whole range and this many bytes too many.
    Excess(usize),
    /// The whole range.
    Serve,
}

/// A source that serves byte `n` of any blob as `n % 251`, with scripted failures. It records what it was asked for.
struct Script {
    steps: Mutex<VecDeque<Step>>,
    asked: Mutex<Vec<BlobRange>>,
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Script")
    }
}

impl Script {
    fn new(steps: impl IntoIterator<Item = Step>) -> Arc<Self> {
        Arc::new(Self { steps: Mutex::new(steps.into_iter().collect()), asked: Mutex::default() })
    }
}

fn content(start: u64, len: usize) -> Bytes {
    (start..).take(len).map(|n| u8::try_from(n % 251).unwrap()).collect()
}

#[async_trait]
impl BlobSource for Script {
    async fn read(&self, _: &Digest, range: BlobRange) -> Result<ByteStream, SourceError> {
        self.asked.lock().unwrap().push(range);
        let len = usize::try_from(range.len()).unwrap();
        let pieces = match self.steps.lock().unwrap().pop_front().unwrap_or(Step::Serve) {
            Step::Refuse(error) => return Err(error),
            Step::Cut(at, error) => std::iter::once(Ok(content(range.start, at))).chain(error.map(Err)).collect(),
            Step::Excess(more) => vec![Ok(content(range.start, len + more))],
            Step::Serve => {
                vec![Ok(content(range.start, len / 2)), Ok(content(range.start + len as u64 / 2, len - len / 2))]
            }
        };
        Ok(stream::iter(pieces).boxed())
    }
}

fn unavailable() -> SourceError {
    SourceError::new(ErrorKind::Unavailable, "no answer")
}

async fn read(script: &Arc<Script>, range: BlobRange) -> Result<Vec<u8>, SourceError> {
    let options = RetryOptions { attempts: 4, ..RetryOptions::default() };
    let source = RetryingBlobSource::new(Arc::clone(script) as _, options, Arc::new(|| 1.0));
    let pieces: Vec<Bytes> = source.read(&Digest::of(b"blob"), range).await?.try_collect().await?;
    Ok(pieces.concat())
}

const RANGE: BlobRange = BlobRange { start: 1000, end: 1100 };

#[tokio::test(start_paused = true)]
async fn passing_refusals_are_repeated_with_doubling_pauses() {
    let script = Script::new([Step::Refuse(unavailable()), Step::Refuse(unavailable()), Step::Refuse(unavailable())]);
    let began = Instant::now();
    assert_eq!(read(&script, RANGE).await.unwrap(), content(1000, 100));
    assert_eq!(began.elapsed().as_millis(), 100 + 200 + 400);
    assert_eq!(script.asked.lock().unwrap().len(), 4);
}

#[tokio::test(start_paused = true)]
async fn attempts_are_bounded() {
    let script = Script::new((0..9).map(|_| Step::Refuse(unavailable())));
    assert_eq!(read(&script, RANGE).await.unwrap_err().kind, ErrorKind::Unavailable);
    assert_eq!(script.asked.lock().unwrap().len(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_broken_stream_goes_on_where_it_broke() {
    let script = Script::new([Step::Cut(30, Some(unavailable())), Step::Cut(20, None), Step::Serve]);
    assert_eq!(read(&script, RANGE).await.unwrap(), content(1000, 100));
    let asked: Vec<u64> = script.asked.lock().unwrap().iter().map(|range| range.start).collect();
    assert_eq!(asked, [1000, 1030, 1050]);
    assert!(script.asked.lock().unwrap().iter().all(|range| range.end == RANGE.end));
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_keeps_breaking_ends_with_its_error() {
    let script = Script::new((0..9).map(|_| Step::Cut(1, Some(unavailable()))));
    assert_eq!(read(&script, RANGE).await.unwrap_err().kind, ErrorKind::Unavailable);
    assert_eq!(script.asked.lock().unwrap().len(), 4);
}

#[tokio::test(start_paused = true)]
async fn lasting_errors_are_passed_on_at_once() {
    for kind in [ErrorKind::DigestMismatch, ErrorKind::NotFound, ErrorKind::Denied, ErrorKind::NoRange] {
        for step in [Step::Refuse(SourceError::new(kind, "no")), Step::Cut(3, Some(SourceError::new(kind, "no")))] {
            let script = Script::new([step]);
            assert_eq!(read(&script, RANGE).await.unwrap_err().kind, kind);
            assert_eq!(script.asked.lock().unwrap().len(), 1);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_wait_the_source_asks_for_is_kept_within_bounds() {
    let wait = |seconds| Step::Refuse(unavailable().with_retry(Retry::After(Duration::from_secs(seconds))));
    let script = Script::new([wait(7)]);
    let began = Instant::now();
    assert!(read(&script, RANGE).await.is_ok());
    assert_eq!(began.elapsed(), Duration::from_secs(7));

    let script = Script::new([wait(3600)]);
    let began = Instant::now();
    assert_eq!(read(&script, RANGE).await.unwrap_err().retry, Retry::After(Duration::from_secs(3600)));
    assert_eq!(began.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn more_than_asked_for_is_an_error() {
    let script = Script::new([Step::Excess(1)]);
    assert_eq!(read(&script, RANGE).await.unwrap_err().kind, ErrorKind::Malformed);
}
