//! One request, its redirects, and the bytes of its answer. Everything that waits here has a bound.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, stream};
use millstream_source::{ByteStream, ErrorKind, Retry, SourceError};
use reqwest::header::{ACCEPT_ENCODING, CONTENT_ENCODING, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Client, Method, Response, StatusCode, Url};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::egress::Names;
use crate::failure::{broken, refused, shown};
use crate::inward;
use crate::options::{MAX_CACHED, MAX_DRAIN, MAX_REDIRECTS, MIN_RATE, RegistryOptions};

/// Places for requests under way, counted for each origin.
#[derive(Debug)]
pub(crate) struct Transport {
    options: Arc<RegistryOptions>,
    names: Names,
    places: Mutex<HashMap<String, Arc<Semaphore>>>,
}

/// What is asked.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: Method,
    pub(crate) url: Url,
    /// For every host that a redirect leads to.
    pub(crate) headers: HeaderMap,
    /// For the first host only: `Authorization` and what `hosts.toml` adds.
    pub(crate) private: HeaderMap,
}

/// An answer whose body has not been read. Holds a place at its host until dropped.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) response: Response,
    /// Where it came from in the end.
    pub(crate) url: Url,
    /// Whether it came from another origin than was asked.
    pub(crate) foreign: bool,
    idle: Duration,
    _place: OwnedSemaphorePermit,
}

impl Transport {
    pub(crate) fn new(options: Arc<RegistryOptions>, names: Names) -> Self {
        Self { options, names, places: Mutex::default() }
    }

    /// Sends `request` and follows its redirects. Private headers are dropped for good on the first step to another
    /// scheme, host or port; a step from HTTPS to HTTP is refused.
    pub(crate) async fn send(&self, client: &Client, request: Request) -> Result<Answer, SourceError> {
        let Request { method, mut url, headers, private } = request;
        let mut foreign = false;
        for _ in 0..=MAX_REDIRECTS {
            self.names.check(&url)?;
            let place = self.place(&url).await?;
            let mut message = client.request(method.clone(), url.clone()).headers(headers.clone());
            message = message.header(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
            if !foreign {
                message = message.headers(private.clone());
            }
            let bound = self.options.connect_timeout + self.options.first_byte_timeout;
            let response = match tokio::time::timeout(bound, message.send()).await {
                Ok(Ok(response)) => response,
                Ok(Err(error)) => return Err(broken(&url, error)),
                Err(_) => return Err(timed_out(&url, "no answer", bound)),
            };
            let answer = Answer { response, url, foreign, idle: self.options.idle_timeout, _place: place };
            let status = answer.response.status();
            if !(status.is_redirection() && answer.response.headers().contains_key(LOCATION)) {
                return Ok(answer);
            }
            let next = location(&answer)?;
            foreign |= next.origin() != answer.url.origin();
            answer.drain().await;
            url = next;
        }
        let message = format!("{}: more than {MAX_REDIRECTS} redirects", shown(&url));
        Err(SourceError::new(ErrorKind::Malformed, message).with_retry(Retry::Never))
    }

    /// Waits for a place at the origin of `url`.
    async fn place(&self, url: &Url) -> Result<OwnedSemaphorePermit, SourceError> {
        let places = {
            let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
            if places.len() >= MAX_CACHED {
                // Those in use are held by their permits as well.
                places.retain(|_, semaphore| Arc::strong_count(semaphore) > 1);
            }
            let make = || Arc::new(Semaphore::new(self.options.max_connections_per_host.max(1)));
            Arc::clone(places.entry(url.origin().ascii_serialization()).or_insert_with(make))
        };
        let bound = self.options.queue_timeout;
        match tokio::time::timeout(bound, places.acquire_owned()).await {
            Ok(Ok(place)) => Ok(place),
            // The semaphore is never closed.
            Ok(Err(_)) => Err(SourceError::new(ErrorKind::Local, "connections are closed")),
            Err(_) => Err(timed_out(url, "no free connection", bound)),
        }
    }
}

impl Answer {
    pub(crate) fn status(&self) -> StatusCode {
        self.response.status()
    }

    /// Fails unless the status is a success.
    pub(crate) async fn require_success(self) -> Result<Self, SourceError> {
        if self.status().is_success() { Ok(self) } else { Err(self.into_failure().await) }
    }

    /// The error that an answer without success stands for.
    ///
    /// Where the registry has already said yes and sent us elsewhere, a refusal there says nothing about the caller's
    /// rights: it is an expired address, which asking again renews.
    pub(crate) async fn into_failure(self) -> SourceError {
        let (url, status, foreign) = (self.url.clone(), self.status(), self.foreign);
        let headers = self.response.headers().clone();
        let body = self.collect(MAX_DRAIN).await.unwrap_or_default();
        let mut error = refused(&url, status, &headers, &body);
        if foreign && is_stale(status) {
            error.kind = ErrorKind::Unavailable;
            error.retry = Retry::Soon;
            error.message.push_str(", where the registry had redirected to");
        }
        error
    }

    /// Fails when the body is not the plain bytes.
    pub(crate) fn require_identity(&self) -> Result<(), SourceError> {
        match self.response.headers().get(CONTENT_ENCODING).map(HeaderValue::as_bytes) {
            None | Some(b"identity" | b"") => Ok(()),
            Some(_) => {
                let message = format!("{} answered with a content encoding, which was not asked for", shown(&self.url));
                Err(SourceError::new(ErrorKind::Malformed, message).with_retry(Retry::Never))
            }
        }
    }

    /// The whole body, if it is not longer than `max` bytes and does not come slower than [`MIN_RATE`].
    pub(crate) async fn collect(self, max: u64) -> Result<Bytes, SourceError> {
        let bound = self.idle + Duration::from_secs(max / MIN_RATE);
        let url = self.url.clone();
        let all = tokio::time::timeout(bound, self.collect_unbounded(max)).await;
        all.unwrap_or_else(|_| Err(timed_out(&url, "not the whole body", bound)))
    }

    async fn collect_unbounded(mut self, max: u64) -> Result<Bytes, SourceError> {
        let too_long = |url: &Url| {
            let message = format!("{} gave more than {max} bytes", shown(url));
            SourceError::new(ErrorKind::Malformed, message).with_retry(Retry::Never)
        };
        let mut body = BytesMut::new();
        if self.response.content_length().is_some_and(|length| length > max) {
            return Err(too_long(&self.url));
        }
        while let Some(piece) = self.piece().await? {
            if (body.len() + piece.len()) as u64 > max {
                return Err(too_long(&self.url));
            }
            body.extend_from_slice(&piece);
        }
        Ok(body.freeze())
    }

    /// Reads a short body to its end, so that the connection can be used again; gives up on any trouble.
    pub(crate) async fn drain(self) {
        let _ = self.collect(MAX_DRAIN).await;
    }

    /// The body as a stream of exactly `length` bytes.
    pub(crate) fn exactly(self, length: u64) -> Result<ByteStream, SourceError> {
        match self.response.content_length() {
            Some(announced) if announced > length => return Err(too_much(&self.url, length)),
            Some(announced) if announced < length => return Err(too_little(&self.url, length - announced)),
            _ => {}
        }
        let next = |(mut answer, left): (Self, u64)| async move {
            match answer.piece().await? {
                Some(piece) => match left.checked_sub(piece.len() as u64) {
                    Some(left) => Ok(Some((piece, (answer, left)))),
                    None => Err(too_much(&answer.url, left)),
                },
                None if left == 0 => Ok(None),
                None => Err(too_little(&answer.url, left)),
            }
        };
        Ok(stream::try_unfold((self, length), next).boxed())
    }

    /// The next piece of the body.
    async fn piece(&mut self) -> Result<Option<Bytes>, SourceError> {
        match tokio::time::timeout(self.idle, self.response.chunk()).await {
            Ok(piece) => piece.map_err(|error| broken(&self.url, error)),
            Err(_) => Err(timed_out(&self.url, "no byte", self.idle)),
        }
    }
}

/// Statuses with which a storage server says that an address it was given has expired.
pub(crate) fn is_stale(status: StatusCode) -> bool {
    matches!(status.as_u16(), 400 | 401 | 403 | 404 | 410)
}

fn location(answer: &Answer) -> Result<Url, SourceError> {
    let bad = |reason: &str| {
        let message = format!("{} redirects to {reason}", shown(&answer.url));
        SourceError::new(ErrorKind::Malformed, message).with_retry(Retry::Never)
    };
    let target = answer.response.headers().get(LOCATION).and_then(|target| target.to_str().ok());
    let target = target.ok_or_else(|| bad("an unreadable address"))?;
    let mut next = answer.url.join(target).map_err(|_| bad("an unreadable address"))?;
    match (answer.url.scheme(), next.scheme()) {
        (_, "https") | ("http", "http") => {}
        ("https", "http") => return Err(bad("plain http, which is not followed from https")),
        _ => return Err(bad("an address that is not http")),
    }
    if inward::redirects(&answer.url, &next) {
        return Err(bad("this machine or its link, where it is not itself"));
    }
    // The client would make credentials of it.
    let _ = (next.set_username(""), next.set_password(None));
    Ok(next)
}

fn timed_out(url: &Url, what: &str, bound: Duration) -> SourceError {
    SourceError::new(ErrorKind::TimedOut, format!("{}: {what} within {bound:?}", shown(url)))
}

fn too_little(url: &Url, missing: u64) -> SourceError {
    SourceError::new(ErrorKind::Unavailable, format!("{}: the body ends {missing} bytes early", shown(url)))
}

fn too_much(url: &Url, length: u64) -> SourceError {
    SourceError::new(ErrorKind::Malformed, format!("{}: the body is longer than the {length} bytes left", shown(url)))
}
