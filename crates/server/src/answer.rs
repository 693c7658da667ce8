//! Answers that are streamed: made by a task of their own, taken by the caller at its own pace, within a bound.

use std::future::Future;
use std::time::Duration;

use millstream_source::names;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Response, Status};
use tracing::{Instrument, Span};

use crate::ServeError;
use crate::limits::Permit;

/// The stream type of every answer.
pub(crate) type Reply<T> = ReceiverStream<Result<T, Status>>;

/// Messages that wait for the caller.
const QUEUE: usize = 4;
/// A caller that takes no message for this long is given up, so that it does not hold a place for ever.
const PATIENCE: Duration = Duration::from_secs(60);

/// The sending end of an answer.
pub(crate) struct Answer<T>(mpsc::Sender<Result<T, Status>>);

impl<T> Answer<T> {
    /// Sends one message, or finds that the caller went away or sleeps.
    pub(crate) async fn send(&self, message: T) -> Result<(), ServeError> {
        self.0.send_timeout(Ok(message), PATIENCE).await.map_err(|_| ServeError::Gone)
    }

    /// Waits until the connection has taken all that was sent.
    pub(crate) async fn taken(&self) -> Result<(), ServeError> {
        let all = tokio::time::timeout(PATIENCE, self.0.reserve_many(QUEUE)).await;
        all.ok().and_then(Result::ok).map(drop).ok_or(ServeError::Gone)
    }
}

/// Runs `work` in a task; `permit` lives as long as it does. The task ends when the caller goes away.
pub(crate) fn stream<T, F, W>(permit: Permit, work: W) -> Response<Reply<T>>
where
    T: Send + 'static,
    W: FnOnce(Answer<T>) -> F,
    F: Future<Output = Result<(), ServeError>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(QUEUE);
    let work = work(Answer(sender.clone()));
    let task = async move {
        let _permit = permit;
        let result = tokio::select! {
            result = work => result,
            () = sender.closed() => Err(ServeError::Gone),
        };
        if let Err(error) = result {
            // Nobody is left to hear of a failure to tell of the failure.
            let _ = sender.send_timeout(Err(failure(error)), PATIENCE).await;
        }
    };
    tokio::spawn(task.instrument(Span::current()));
    Response::new(ReceiverStream::new(receiver))
}

/// Notes a failed request in the log and turns it into what the caller sees.
pub(crate) fn failure(error: ServeError) -> Status {
    match error.code() {
        Code::Internal | Code::DataLoss | Code::Unavailable | Code::DeadlineExceeded => {
            tracing::warn!({ names::CODE } = error.name(), %error, "request failed");
        }
        _ => tracing::info!({ names::CODE } = error.name(), %error, "request refused"),
    }
    error.into()
}
