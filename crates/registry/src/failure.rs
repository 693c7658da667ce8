//! From what HTTP says to what [`SourceError`] says, without what nobody may read.

use std::error::Error as _;
use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use millstream_source::{ErrorKind, Retry, SourceError};
use oci_client::errors::OciEnvelope;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{StatusCode, Url};

use crate::egress::Inside;
use crate::options::MAX_RETRY_AFTER;

/// `url` for a person: without query, fragment and user information, any of which may hold a secret.
pub(crate) fn shown(url: &Url) -> String {
    let mut text = format!("{}://{}", url.scheme(), url.host_str().unwrap_or_default());
    if let Some(port) = url.port() {
        let _ = write!(text, ":{port}");
    }
    text.push_str(url.path());
    text
}

/// A request that got no answer, or a body that broke off; or one that was not sent, since its name leads where it must not.
pub(crate) fn broken(url: &Url, error: reqwest::Error) -> SourceError {
    let mut kind = if error.is_timeout() {
        ErrorKind::TimedOut
    } else if error.is_builder() {
        ErrorKind::Local
    } else {
        ErrorKind::Unavailable
    };
    let error = error.without_url();
    let mut message = format!("{}: {error}", shown(url));
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(message, ": {error}");
        if error.is::<Inside>() {
            kind = ErrorKind::Denied;
        }
        cause = error.source();
    }
    SourceError::new(kind, message)
}

/// An answer whose status is no success. `body` is the beginning of its text.
pub(crate) fn refused(url: &Url, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> SourceError {
    let mut message = format!("{} answered {}", shown(url), status.as_u16());
    // Only the text that the distribution specification defines: anything else is a web page.
    if let Ok(envelope) = serde_json::from_slice::<OciEnvelope>(body)
        && let Some(first) = envelope.errors.first()
    {
        let text: String = first.message.chars().filter(|c| !c.is_control()).take(200).collect();
        let _ = write!(message, " ({:?}: {text})", first.code);
    }
    let error = SourceError::new(kind_of(status), message);
    let asked = matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
        .then(|| retry_after(headers, SystemTime::now()))
        .flatten();
    match (asked, status) {
        (Some(wait), _) => error.with_retry(Retry::After(wait)),
        // The same request will not be understood next time.
        (None, status) if error.kind == ErrorKind::Malformed && status.is_client_error() => {
            error.with_retry(Retry::Never)
        }
        (None, _) => error,
    }
}

fn kind_of(status: StatusCode) -> ErrorKind {
    match status {
        StatusCode::UNAUTHORIZED => ErrorKind::Unauthorized,
        StatusCode::FORBIDDEN => ErrorKind::Denied,
        StatusCode::NOT_FOUND | StatusCode::GONE => ErrorKind::NotFound,
        StatusCode::TOO_MANY_REQUESTS => ErrorKind::Exhausted,
        StatusCode::REQUEST_TIMEOUT => ErrorKind::TimedOut,
        status if status.is_server_error() => ErrorKind::Unavailable,
        _ => ErrorKind::Malformed,
    }
}

/// The pause that an answer asks for: seconds or a date, at most [`MAX_RETRY_AFTER`].
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default(),
    };
    Some(wait.min(MAX_RETRY_AFTER))
}

/// What several hosts answered to one request, when none of them succeeded.
#[derive(Default)]
pub(crate) struct Failures {
    chosen: Option<SourceError>,
    others: usize,
}

impl Failures {
    /// Adds one host's failure. Kept is the last that passes, else the last: one host in trouble must not make the whole
    /// look refused for good, and the registry itself, asked last, knows better than its mirrors.
    pub(crate) fn add(&mut self, error: SourceError) {
        if let Some(chosen) = &self.chosen {
            self.others += 1;
            if chosen.retry != Retry::Never && error.retry == Retry::Never {
                return;
            }
        }
        self.chosen = Some(error);
    }

    /// The failure of the whole.
    pub(crate) fn into_error(self, registry: &str) -> SourceError {
        match self.chosen {
            Some(mut error) => {
                if self.others > 0 {
                    let _ = write!(error.message, " (and {} more configured hosts failed)", self.others);
                }
                error
            }
            None => SourceError::new(
                ErrorKind::NotFound,
                format!("no host is configured to pull from {registry}; hint: see its hosts.toml"),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(retry_after: &str) -> HeaderMap {
        HeaderMap::from_iter([(RETRY_AFTER, retry_after.parse().unwrap())])
    }

    #[test]
    fn urls_are_shown_without_secrets() {
        let url = Url::parse("https://user:pass@cdn.example:8443/a/b?X-Sig=secret#frag").unwrap();
        assert_eq!(shown(&url), "https://cdn.example:8443/a/b");
    }

    #[test]
    fn statuses_have_kinds_and_retries() {
        let url = Url::parse("https://r.example/v2/a/blobs/b").unwrap();
        for (status, kind, retry) in [
            (401, ErrorKind::Unauthorized, Retry::Never),
            (403, ErrorKind::Denied, Retry::Never),
            (404, ErrorKind::NotFound, Retry::Never),
            (416, ErrorKind::Malformed, Retry::Never),
            (429, ErrorKind::Exhausted, Retry::After(Duration::from_secs(7))),
            (500, ErrorKind::Unavailable, Retry::Soon),
            (503, ErrorKind::Unavailable, Retry::After(Duration::from_secs(7))),
        ] {
            let error = refused(&url, StatusCode::from_u16(status).unwrap(), &headers("7"), b"");
            assert_eq!((error.kind, error.retry), (kind, retry), "{status}");
        }
    }

    #[test]
    fn the_registrys_own_words_are_kept() {
        let url = Url::parse("https://r.example/x").unwrap();
        let body = br#"{"errors":[{"code":"DENIED","message":"requested access\n is denied"}]}"#;
        let error = refused(&url, StatusCode::FORBIDDEN, &HeaderMap::new(), body);
        assert_eq!(error.message, "https://r.example/x answered 403 (Denied: requested access is denied)");
        let page = refused(&url, StatusCode::BAD_GATEWAY, &HeaderMap::new(), b"<html>secret</html>");
        assert_eq!(page.message, "https://r.example/x answered 502");
    }

    #[test]
    fn retry_after_reads_seconds_and_dates_and_is_bounded() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        for (text, seconds) in [
            ("12", Some(12)),
            (" 0 ", Some(0)),
            ("Sun, 06 Nov 1994 08:49:57 GMT", Some(20)),
            ("Sun, 06 Nov 1994 08:49:00 GMT", Some(0)),
            ("99999999", Some(3600)),
            ("soon", None),
            ("-1", None),
        ] {
            assert_eq!(retry_after(&headers(text), now), seconds.map(Duration::from_secs), "{text}");
        }
    }

    #[test]
    fn a_passing_failure_outweighs_a_lasting_one() {
        let mut failures = Failures::default();
        failures.add(SourceError::new(ErrorKind::NotFound, "mirror"));
        failures.add(SourceError::new(ErrorKind::Unavailable, "other mirror"));
        failures.add(SourceError::new(ErrorKind::Denied, "origin"));
        let error = failures.into_error("r");
        assert_eq!(error.kind, ErrorKind::Unavailable);
        assert_eq!(error.message, "other mirror (and 2 more configured hosts failed)");
        let mut failures = Failures::default();
        failures.add(SourceError::new(ErrorKind::NotFound, "mirror"));
        failures.add(SourceError::new(ErrorKind::Denied, "origin"));
        assert_eq!(failures.into_error("r").kind, ErrorKind::Denied, "the registry itself knows best");
    }
}
