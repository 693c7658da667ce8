#![doc = include_str!("../README.md")]

pub mod documents;

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Connections at a time; more wait to be accepted.
const MAX_CONNECTIONS: usize = 16;
/// Longest life of a connection, which serves one request.
const CONNECTION: Duration = Duration::from_secs(20);
/// Time for a request's head.
const HEAD: Duration = Duration::from_secs(5);
/// Time for the answer to "are you ready?".
const READY: Duration = Duration::from_secs(5);
/// Pause after a failure to accept, for instance because no file can be opened.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// Bytes of a request's head.
const MAX_HEAD: usize = 16 * 1024;

const OPEN_METRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// Whether the daemon can do its work; if not, why.
pub type Readiness = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

/// What is shown.
pub struct Page {
    /// Asked at each scrape.
    pub registry: Registry,
    /// Asked by `/readyz`; bounded to 5 s.
    pub ready: Box<dyn Fn() -> Readiness + Send + Sync>,
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Page").field("registry", &self.registry).finish_non_exhaustive()
    }
}

/// Why the page cannot be shown.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot listen for metrics on {address}: {source}; hint: set metrics.listen to another address, or leave it out"
)]
pub struct BindError {
    address: SocketAddr,
    source: std::io::Error,
}

/// Takes the address. Needs a tokio runtime.
///
/// # Errors
/// When the address is not free, or not this machine's.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError { address, source })
}

/// Shows the page until the future is dropped.
pub async fn serve(listener: TcpListener, page: Page) {
    let page = Arc::new(page);
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection for metrics");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let page = Arc::clone(&page);
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(Arc::clone(&page), request));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .max_buf_size(MAX_HEAD)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            match timeout(CONNECTION, connection).await {
                Ok(Ok(())) => {}
                // Whoever asked went away, or was too slow: nothing to do about it.
                Ok(Err(error)) => tracing::debug!(%error, "a connection for metrics broke"),
                Err(_) => tracing::debug!("a connection for metrics took too long"),
            }
            drop(permit);
        });
    }
}

async fn answer(page: Arc<Page>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.method() != Method::GET {
        return Ok(text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n"));
    }
    Ok(match request.uri().path() {
        "/metrics" => metrics(&page.registry),
        "/healthz" => text(StatusCode::OK, "alive\n"),
        "/readyz" => match timeout(READY, (page.ready)()).await {
            Ok(Ok(())) => text(StatusCode::OK, "ready\n"),
            Ok(Err(reason)) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
            Err(_) => text(StatusCode::SERVICE_UNAVAILABLE, format!("no answer within {} s\n", READY.as_secs())),
        },
        _ => text(StatusCode::NOT_FOUND, "there are /metrics, /healthz and /readyz\n"),
    })
}

fn metrics(registry: &Registry) -> Response<Full<Bytes>> {
    let mut page = String::new();
    match encode(&mut page, registry) {
        Ok(()) => response(StatusCode::OK, OPEN_METRICS, page),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    response(status, TEXT, body)
}

fn response(status: StatusCode, kind: HeaderValue, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use prometheus_client::metrics::counter::Counter;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    async fn start(ready: &'static AtomicBool) -> SocketAddr {
        let mut registry = Registry::with_prefix("millstream");
        let counter = Counter::<u64>::default();
        registry.register("tests", "Tests that ran.", counter.clone());
        counter.inc();
        let is_ready = move || -> Readiness {
            Box::pin(async move {
                if ready.load(Ordering::SeqCst) { Ok(()) } else { Err("the store is closed".to_owned()) }
            })
        };
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, Page { registry, ready: Box::new(is_ready) }));
        address
    }

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn metrics_and_probes_are_shown() {
        static READY: AtomicBool = AtomicBool::new(false);
        let address = start(&READY).await;
        let metrics = get(address, "/metrics").await;
        assert!(metrics.starts_with("HTTP/1.1 200") && metrics.contains("openmetrics-text"), "{metrics}");
        assert!(metrics.contains("\nmillstream_tests_total 1\n") && metrics.ends_with("# EOF\n"), "{metrics}");
        assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        let not_ready = get(address, "/readyz").await;
        assert!(not_ready.starts_with("HTTP/1.1 503") && not_ready.contains("the store is closed"), "{not_ready}");
        READY.store(true, Ordering::SeqCst);
        assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        assert!(get(address, "/").await.starts_with("HTTP/1.1 404"));
    }

    #[tokio::test]
    async fn those_who_say_nothing_do_not_keep_others_out() {
        static READY: AtomicBool = AtomicBool::new(true);
        let address = start(&READY).await;
        let mut silent = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        // Their time for a request's head is up before ours is.
        let answer = timeout(CONNECTION, get(address, "/healthz")).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        drop(silent);
    }

    #[tokio::test]
    async fn an_address_in_use_is_told_with_the_key() {
        let taken = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let error = bind(taken.local_addr().unwrap()).await.unwrap_err().to_string();
        assert!(error.contains("metrics.listen"), "{error}");
    }
}
