//! Repositories: what can be asked of a registry with one credential.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream};
use millstream_oci::{DOCUMENT_MEDIA_TYPES, Digest, ImageRef, MAX_DOCUMENT_SIZE, ManifestDigest, TagOrDigest};
use millstream_source::{BlobSource, ByteStream, ErrorKind, Fetched, ImageSource, Retry, SourceError};
use millstream_toc::BlobRange;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Method, StatusCode, Url};

use crate::auth::{Asker, TokenKey, Tokens};
use crate::credential::Credential;
use crate::egress::Names;
use crate::endpoint::{Endpoint, Endpoints};
use crate::failure::{Failures, shown};
use crate::options::{MAX_CACHED, RegistryOptions};
use crate::rest::Rests;
use crate::transport::{Answer, Request, Transport, is_stale};

/// Everything about registries that the program has one of: connections, tokens, hosts. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Registry {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    options: Arc<RegistryOptions>,
    endpoints: Arc<Endpoints>,
    transport: Transport,
    tokens: Tokens,
    rests: Rests,
}

impl Registry {
    /// Connects to nothing yet.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Local`] when the process has no TLS provider (`rustls::crypto::CryptoProvider`) installed.
    pub fn new(options: RegistryOptions) -> Result<Self, SourceError> {
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            return Err(SourceError::new(ErrorKind::Local, "no TLS provider is installed in this process"));
        }
        let options = Arc::new(options);
        // Most of the time for a connection is left for the connection.
        let names = Names::new(options.egress.clone(), options.connect_timeout / 2);
        let transport = Transport::new(Arc::clone(&options), names.clone());
        let endpoints = Arc::new(Endpoints::new(names));
        let shared = Shared { options, endpoints, transport, tokens: Tokens::default(), rests: Rests::default() };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The repository of `image` as `credential` may see it. Connects to nothing yet.
    #[must_use]
    pub fn repository(&self, image: &ImageRef, credential: Credential) -> Repository {
        let fingerprint = credential.fingerprint();
        Repository {
            shared: Arc::clone(&self.shared),
            registry: image.registry().to_owned(),
            name: image.repository().to_owned(),
            credential,
            fingerprint,
            routes: Mutex::default(),
        }
    }
}

/// One repository, reached with one credential at the hosts that are configured for its registry.
///
/// Hosts are asked in their order until one succeeds. All errors are [`SourceError`]s; their texts hold no credentials
/// and no query of any URL. A host that keeps failing, or that asked for a pause, is left alone for a while, and its last
/// failure stands for it. Nothing here is tried twice but a request that was challenged and a redirect that had expired: see [`millstream_source::RetryingBlobSource`].
#[derive(Debug)]
pub struct Repository {
    shared: Arc<Shared>,
    registry: String,
    name: String,
    credential: Credential,
    fingerprint: Digest,
    /// Where blobs were found. Belongs to this credential: an address may be signed for it.
    routes: Mutex<HashMap<Digest, Route>>,
}

/// Where a blob was found.
#[derive(Debug, Clone)]
struct Route {
    endpoint: Arc<Endpoint>,
    /// Address at another origin that the endpoint had redirected to.
    target: Option<Url>,
}

/// What is asked of a repository.
enum Ask<'a> {
    Document(&'a TagOrDigest),
    /// Only whether it could be read.
    Access(&'a ManifestDigest),
    Blob(&'a Digest),
    Range(&'a Digest, BlobRange),
}

impl Ask<'_> {
    fn path(&self) -> String {
        match self {
            Self::Document(reference) => format!("manifests/{reference}"),
            Self::Access(digest) => format!("manifests/{digest}"),
            Self::Blob(digest) | Self::Range(digest, _) => format!("blobs/{digest}"),
        }
    }

    fn method(&self) -> Method {
        if matches!(self, Self::Access(_)) { Method::HEAD } else { Method::GET }
    }

    fn may_be_asked(&self, endpoint: &Endpoint) -> bool {
        let resolves = !matches!(self, Self::Document(TagOrDigest::Tag(_)));
        endpoint.config.pull && (resolves || endpoint.config.resolve)
    }

    fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        match self {
            Self::Document(_) | Self::Access(_) => {
                for media_type in DOCUMENT_MEDIA_TYPES {
                    headers.append(ACCEPT, HeaderValue::from_static(media_type));
                }
            }
            Self::Blob(_) => {}
            Self::Range(_, range) => {
                let text = format!("bytes={}-{}", range.start, range.end.saturating_sub(1));
                // Digits always make a header.
                headers.extend(HeaderValue::try_from(text).ok().map(|value| (RANGE, value)));
            }
        }
        headers
    }

    /// Whether `answer` is what was asked for.
    async fn accept(&self, answer: Answer) -> Result<Answer, SourceError> {
        let answer = answer.require_success().await?;
        answer.require_identity()?;
        if let Self::Range(_, range) = self {
            require_range(&answer, *range)?;
        }
        Ok(answer)
    }
}

impl Repository {
    /// Reads the manifest or index that `reference` names, of at most [`MAX_DOCUMENT_SIZE`] bytes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DigestMismatch`] when it was asked for by digest and the bytes have another one.
    pub async fn document(&self, reference: TagOrDigest) -> Result<Fetched, SourceError> {
        let (answer, _) = self.ask(&Ask::Document(&reference)).await?;
        let url = answer.url.clone();
        let content_type = answer.response.headers().get(CONTENT_TYPE);
        let content_type = content_type.and_then(|value| value.to_str().ok()).map(str::to_owned);
        let bytes = answer.collect(MAX_DOCUMENT_SIZE as u64).await?;
        let digest = ManifestDigest(Digest::of(&bytes));
        match reference {
            TagOrDigest::Digest(asked) if asked != digest => Err(mismatch(&url, digest.0, asked.0)),
            _ => Ok(Fetched { bytes, content_type, digest }),
        }
    }

    /// Reads a whole blob of at most `max` bytes, such as an image configuration, and verifies it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Malformed`] when it is larger, [`ErrorKind::DigestMismatch`] when it is not what it should be.
    pub async fn blob(&self, digest: &Digest, max: u64) -> Result<Bytes, SourceError> {
        let (answer, _) = self.ask(&Ask::Blob(digest)).await?;
        let url = answer.url.clone();
        let bytes = answer.collect(max).await?;
        let found = Digest::of(&bytes);
        if found == *digest { Ok(bytes) } else { Err(mismatch(&url, found, *digest)) }
    }

    /// Bytes of a whole blob of exactly `size` bytes, for registries that serve no ranges. Not verified; not resumed.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Malformed`] when it has another size.
    pub async fn read_whole(&self, digest: &Digest, size: u64) -> Result<ByteStream, SourceError> {
        let (answer, _) = self.ask(&Ask::Blob(digest)).await?;
        answer.exactly(size)
    }

    /// Asks whether this caller may read `manifest`, without reading it: one request (`HEAD`), more only where a
    /// challenge has to be met.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unauthorized`], [`ErrorKind::Denied`] or [`ErrorKind::NotFound`] when the registry says no.
    pub async fn check_access(&self, manifest: &ManifestDigest) -> Result<(), SourceError> {
        self.ask(&Ask::Access(manifest)).await.map(drop)
    }

    /// Asks for the first byte of `blob`: proves that this caller may read it and that ranges work, here and now. One
    /// request, more only where a challenge has to be met or a redirect followed; nothing remembered is relied upon but
    /// the token.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NoRange`] when ranges are not served, else as with any request.
    pub async fn probe(&self, blob: &Digest) -> Result<(), SourceError> {
        let range = BlobRange::new(0, 1);
        let (answer, endpoint) = self.ask(&Ask::Range(blob, range)).await?;
        self.remember(blob, endpoint, &answer);
        let mut body = answer.exactly(range.len())?;
        while let Some(piece) = body.next().await {
            piece?;
        }
        Ok(())
    }

    /// Asks the configured hosts, that of the blob's route first, until one gives what is asked for.
    async fn ask(&self, ask: &Ask<'_>) -> Result<(Answer, Arc<Endpoint>), SourceError> {
        let endpoints = self.shared.endpoints.of(&self.registry, &self.shared.options).await?;
        let preferred = match ask {
            Ask::Range(blob, _) => self.route(blob).map(|route| route.endpoint),
            _ => None,
        };
        let is_preferred =
            |endpoint: &&Arc<Endpoint>| preferred.as_ref().is_some_and(|known| Arc::ptr_eq(known, endpoint));
        let (first, rest): (Vec<_>, Vec<_>) = endpoints.iter().partition(is_preferred);
        let mut failures = Failures::default();
        for endpoint in first.into_iter().chain(rest).filter(|endpoint| ask.may_be_asked(endpoint)) {
            let result = self.ask_rested(endpoint, ask).await;
            match result {
                Ok(answer) => return Ok((answer, Arc::clone(endpoint))),
                Err(error) => failures.add(error),
            }
        }
        Err(failures.into_error(&self.registry))
    }

    /// Asks a host unless it is to be left alone, and remembers how that went.
    async fn ask_rested(&self, endpoint: &Endpoint, ask: &Ask<'_>) -> Result<Answer, SourceError> {
        let key = self.key(endpoint);
        self.shared.rests.check(&key)?;
        let result = match self.ask_endpoint(endpoint, ask).await {
            Ok(answer) => ask.accept(answer).await,
            Err(error) => Err(error),
        };
        self.shared.rests.note(&key, result.as_ref().err());
        result
    }

    /// One request to one host; a second one where it does not know the method `HEAD`.
    async fn ask_endpoint(&self, endpoint: &Endpoint, ask: &Ask<'_>) -> Result<Answer, SourceError> {
        let answer = self.exchange(endpoint, ask, ask.method()).await?;
        let unknown = matches!(answer.status(), StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED);
        if ask.method() == Method::HEAD && unknown {
            answer.drain().await;
            return self.exchange(endpoint, ask, Method::GET).await;
        }
        Ok(answer)
    }

    /// One request to one host, repeated once when it is challenged.
    async fn exchange(&self, endpoint: &Endpoint, ask: &Ask<'_>, method: Method) -> Result<Answer, SourceError> {
        let Shared { transport, tokens, .. } = &*self.shared;
        let key = self.key(endpoint);
        let asker = Asker { transport, endpoint, repository: &self.name, credential: &self.credential };
        let used = tokens.current(&key, asker).await?;
        let answer =
            transport.send(&endpoint.client, self.request(endpoint, ask, method.clone(), used.clone())).await?;
        // Only the registry itself may challenge: what a redirect led to gets no credentials.
        if answer.status() != StatusCode::UNAUTHORIZED || answer.foreign {
            return Ok(answer);
        }
        let headers = answer.response.headers().clone();
        answer.drain().await;
        let fresh = tokens.challenged(&key, asker, used.as_ref(), &headers).await?;
        transport.send(&endpoint.client, self.request(endpoint, ask, method, Some(fresh))).await
    }

    fn key(&self, endpoint: &Endpoint) -> TokenKey {
        TokenKey {
            host: endpoint.config.base.origin().ascii_serialization(),
            repository: self.name.clone(),
            credential: self.fingerprint,
        }
    }

    fn request(
        &self,
        endpoint: &Endpoint,
        ask: &Ask<'_>,
        method: Method,
        authorization: Option<HeaderValue>,
    ) -> Request {
        let config = &endpoint.config;
        let mut url = config.base.clone();
        url.set_path(&format!("{}/{}/{}", config.base.path().trim_end_matches('/'), self.name, ask.path()));
        if config.mirror {
            url.query_pairs_mut().append_pair("ns", &self.registry);
        }
        let mut private = config.headers.clone();
        if let Some(authorization) = authorization {
            private.insert(AUTHORIZATION, authorization);
        }
        Request { method, url, headers: ask.headers(), private }
    }

    /// Reads from where the blob was found last, if that was behind a redirect and still answers.
    async fn at_target(&self, blob: &Digest, range: BlobRange) -> Result<Option<Answer>, SourceError> {
        let Some(Route { endpoint, target: Some(url) }) = self.route(blob) else {
            return Ok(None);
        };
        let ask = Ask::Range(blob, range);
        let request = Request { method: Method::GET, url, headers: ask.headers(), private: HeaderMap::new() };
        let result = match self.shared.transport.send(&endpoint.client, request).await {
            Ok(answer) if is_stale(answer.status()) => {
                answer.drain().await;
                Ok(None)
            }
            Ok(answer) => ask.accept(answer).await.map(Some),
            Err(error) => Err(error),
        };
        if !matches!(result, Ok(Some(_))) {
            // Whatever went wrong, the next request asks the registry for an address.
            self.routes().remove(blob);
        }
        result
    }

    fn remember(&self, blob: &Digest, endpoint: Arc<Endpoint>, answer: &Answer) {
        let target = answer.foreign.then(|| answer.url.clone());
        let mut routes = self.routes();
        if routes.len() >= MAX_CACHED && !routes.contains_key(blob) {
            routes.clear();
        }
        routes.insert(*blob, Route { endpoint, target });
    }

    fn route(&self, blob: &Digest) -> Option<Route> {
        self.routes().get(blob).cloned()
    }

    fn routes(&self) -> std::sync::MutexGuard<'_, HashMap<Digest, Route>> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl BlobSource for Repository {
    async fn read(&self, blob: &Digest, range: BlobRange) -> Result<ByteStream, SourceError> {
        if range.is_empty() {
            return Ok(stream::empty().boxed());
        }
        if let Some(answer) = self.at_target(blob, range).await? {
            return answer.exactly(range.len());
        }
        let (answer, endpoint) = self.ask(&Ask::Range(blob, range)).await?;
        self.remember(blob, endpoint, &answer);
        answer.exactly(range.len())
    }
}

#[async_trait]
impl ImageSource for Repository {
    async fn document(&self, reference: TagOrDigest) -> Result<Fetched, SourceError> {
        Self::document(self, reference).await
    }

    async fn whole_blob(&self, digest: &Digest, max: u64) -> Result<Bytes, SourceError> {
        self.blob(digest, max).await
    }
}

/// Fails unless `answer` holds exactly `range`.
fn require_range(answer: &Answer, range: BlobRange) -> Result<(), SourceError> {
    if answer.status() != StatusCode::PARTIAL_CONTENT {
        let message = format!("{} answered {} to a request for a range", shown(&answer.url), answer.status().as_u16());
        return Err(SourceError::new(ErrorKind::NoRange, message));
    }
    let given = answer.response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
    if given.and_then(content_range) == Some(range) {
        return Ok(());
    }
    let given: String = given.unwrap_or("no range").chars().take(80).collect();
    let message = format!("{} answered {given:?} to a request for bytes {range}", shown(&answer.url));
    Err(SourceError::new(ErrorKind::Malformed, message))
}

/// Reads `bytes first-last/size`, where the size may be `*`.
fn content_range(text: &str) -> Option<BlobRange> {
    let (unit, rest) = text.trim().split_once(' ')?;
    let (range, size) = rest.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let end = last.checked_add(1)?;
    let fits = match size.trim() {
        "*" => true,
        size => size.parse::<u64>().is_ok_and(|size| end <= size),
    };
    (unit.eq_ignore_ascii_case("bytes") && first <= last && fits).then_some(BlobRange { start: first, end })
}

fn mismatch(url: &Url, found: Digest, asked: Digest) -> SourceError {
    let message = format!("{} gave bytes with digest {found} instead of {asked}", shown(url));
    SourceError::new(ErrorKind::DigestMismatch, message).with_retry(Retry::Never)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_strictly() {
        for (text, expected) in [
            ("bytes 0-0/10", Some((0, 1))),
            ("Bytes 5-9/10", Some((5, 10))),
            ("bytes 5-9/*", Some((5, 10))),
            ("bytes 5-10/10", None),
            ("bytes 9-5/10", None),
            ("bytes */10", None),
            ("items 0-0/10", None),
            ("bytes 0-18446744073709551615/*", None),
            ("bytes -5-9/10", None),
            ("", None),
        ] {
            assert_eq!(content_range(text), expected.map(|(start, end)| BlobRange { start, end }), "{text}");
        }
    }
}
