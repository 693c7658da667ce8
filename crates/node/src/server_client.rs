//! The node's side of the remote file system service.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use async_trait::async_trait;
use bytes::Bytes;
use millstream_oci::{DiffId, Digest, ManifestDigest};
use millstream_profile::{Profile, ProfileLayer, Recording};
use millstream_registry::Credential;
use millstream_server::ImagesService;
use millstream_settings::node::ServerSettings;
use millstream_source::{ContentSource, ErrorKind, ProfileSource, ServedProfile, Skeleton, SourceError, WindowSource};
use millstream_toc::DataRange;
use millstream_wire::millstream::v1 as wire;
use millstream_wire::millstream::v1::get_image_response::Part;
use millstream_wire::millstream::v1::get_profile_response::Part as ProfilePart;
use millstream_wire::millstream::v1::images_client::ImagesClient;
use millstream_wire::millstream::v1::images_server::ImagesServer;
use tokio_stream::StreamExt;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status};
use tower::ServiceExt;
use tower::util::BoxCloneSyncService;

/// Bytes of one message; the server sends TOCs and content in pieces well below.
const MAX_MESSAGE: usize = 32 * 1024 * 1024;
/// Bytes of a TOC on the wire and in canonical form.
const MAX_TOC: u64 = 256 * 1024 * 1024;
/// Bytes of a window: the history of deflate.
const MAX_WINDOW: usize = 32 * 1024;
/// How long one request for windows or content may take; the reader behind it has a deadline of its own.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection is given this long, however short readers' patience is: a first packet that is lost is sent again after a second.
const SHORTEST_CONNECT: Duration = Duration::from_secs(2);
/// The server is asked for a sign of life no sooner than this, and given no less to answer: it may be busy.
const SHORTEST_SILENCE: Duration = Duration::from_secs(2);

/// What the server says of an image.
#[derive(Debug, Clone)]
pub struct ServedImage {
    /// Digest of the platform's manifest.
    pub manifest: ManifestDigest,
    /// Bottom first.
    pub layers: Vec<ServedLayer>,
}

/// What the server says of a layer.
#[derive(Debug, Clone)]
pub struct ServedLayer {
    /// Digest of the blob.
    pub digest: Digest,
    /// Diff ID.
    pub diff_id: DiffId,
    /// SHA-256 of the canonical TOC, or why the layer cannot be streamed.
    pub toc: Result<Digest, String>,
    /// Whether it cannot be streamed only because its import is not complete.
    pub pending: bool,
    /// The canonical TOC, unless it was declared as known in the request.
    pub bytes: Option<Vec<u8>>,
}

/// What carries requests: a connection, or the service itself.
type Transport = BoxCloneSyncService<http::Request<Body>, http::Response<Body>, Status>;

/// A server: `millstream-server`, by a connection that is made when it is first used and again after it broke, or the service in
/// this process, which is called directly.
#[derive(Clone)]
pub struct Server {
    client: ImagesClient<Transport>,
    metadata_bytes: Arc<AtomicU64>,
    embedded: bool,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").finish_non_exhaustive()
    }
}

impl Server {
    /// `None` where no server is configured. A connection whose other end gives no sign of life is given up after `idle_timeout`
    /// (after some seconds where that is shorter), also one that nobody uses, and made again when it is wanted.
    ///
    /// # Errors
    /// When a certificate cannot be read or the address makes no sense. That the server is down is no error.
    pub fn new(settings: &ServerSettings, idle_timeout: Duration) -> anyhow::Result<Option<Self>> {
        if settings.address.is_empty() {
            return Ok(None);
        }
        let mut endpoint = Endpoint::from_shared(settings.address.clone())
            .with_context(|| format!("server.address {:?}", settings.address))?
            .connect_timeout((idle_timeout / 4).max(SHORTEST_CONNECT))
            .http2_keep_alive_interval((idle_timeout / 2).max(SHORTEST_SILENCE))
            .keep_alive_timeout((idle_timeout / 2).max(SHORTEST_SILENCE))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(Some(8 * 1024 * 1024))
            .initial_connection_window_size(Some(16 * 1024 * 1024));
        if settings.address.starts_with("https://") {
            let Some(ca) = &settings.ca else {
                bail!(
                    "server.ca is not set; hint: name the PEM file of the authority that signed the server's certificate"
                );
            };
            let pem = std::fs::read(ca).with_context(|| format!("reading server.ca {}", ca.display()))?;
            let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem));
            if let (Some(cert), Some(key)) = (&settings.cert, &settings.key) {
                let read = |path: &Path| std::fs::read(path).with_context(|| format!("reading {}", path.display()));
                tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
            }
            endpoint = endpoint.tls_config(tls)?;
        }
        let channel = endpoint.connect_lazy().map_err(|error| Status::from_error(error.into()));
        Ok(Some(Self::over(BoxCloneSyncService::new(channel), false)))
    }

    /// The service in this process. Requests and answers are the same messages; only there is no wire between.
    #[must_use]
    pub fn embedded(service: ImagesService) -> Self {
        let service = ServiceExt::<http::Request<Body>>::map_err(ImagesServer::new(service), |never| match never {});
        Self::over(BoxCloneSyncService::new(service), true)
    }

    fn over(transport: Transport, embedded: bool) -> Self {
        let client = ImagesClient::new(transport).max_decoding_message_size(MAX_MESSAGE);
        Self { client, metadata_bytes: Arc::default(), embedded }
    }

    fn count(&self, bytes: u64) {
        if !self.embedded {
            self.metadata_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Bytes of TOCs, windows and skeletons as they came over the wire; those of the service in this process do not.
    #[must_use]
    pub fn metadata_bytes(&self) -> u64 {
        self.metadata_bytes.load(Ordering::Relaxed)
    }

    /// Connects in the background, so that the first pull does not pay for the handshake.
    pub fn warm_up(&self) {
        if self.embedded {
            return;
        }
        let mut client = self.client.clone();
        tokio::spawn(async move {
            // Any request opens the connection; the empty scope is refused without work.
            let _ = client.get_image(wire::GetImageRequest::default()).await;
        });
    }

    /// Eligibility and TOCs of an image in one request; those of `known` layers are not sent again.
    ///
    /// # Errors
    /// What the server refuses, or an answer that contradicts itself.
    pub async fn image(&self, scope: &ImageScope, known: Vec<Digest>) -> Result<ServedImage, SourceError> {
        let request = wire::GetImageRequest {
            scope: Some(scope.to_wire()),
            known_layers: known.iter().map(ToString::to_string).collect(),
        };
        let mut stream = self
            .client
            .clone()
            .get_image(request)
            .await
            .map_err(|status| failed("asking for the image", &status))?
            .into_inner();
        let mut image = None;
        let mut packed: HashMap<Digest, Vec<u8>> = HashMap::new();
        let mut total = 0;
        while let Some(message) = stream.message().await.map_err(|status| failed("receiving TOCs", &status))? {
            match message.part {
                Some(Part::Image(described)) => image = Some(described),
                Some(Part::Toc(part)) => {
                    total += part.packed.len() as u64;
                    if total > MAX_TOC {
                        return Err(malformed("TOCs of the image exceed 256 MiB"));
                    }
                    packed.entry(parse(&part.layer)?).or_default().extend_from_slice(&part.packed);
                }
                None => {}
            }
        }
        self.count(total);
        let image = image.ok_or_else(|| malformed("no description of the image"))?;
        let served = unpack(image, packed).await?;
        if served.manifest != scope.manifest {
            return Err(malformed(&format!("asked for {}, told about {}", scope.manifest, served.manifest)));
        }
        Ok(served)
    }
}

/// Unpacks on a blocking thread: a large TOC takes tens of milliseconds.
async fn unpack(image: wire::Image, mut packed: HashMap<Digest, Vec<u8>>) -> Result<ServedImage, SourceError> {
    tokio::task::spawn_blocking(move || {
        let mut layers = Vec::with_capacity(image.layers.len());
        for layer in image.layers {
            let digest: Digest = parse(&layer.digest)?;
            let toc = if layer.ineligible.is_empty() { Ok(parse(&layer.toc_digest)?) } else { Err(layer.ineligible) };
            let bytes = match packed.get(&digest) {
                None => None,
                Some(bytes) => Some(unpack_toc(bytes, toc.as_ref().ok())?),
            };
            let (diff_id, pending) = (parse(&layer.diff_id)?, layer.pending);
            layers.push(ServedLayer { digest, diff_id, toc, pending, bytes });
        }
        packed.clear();
        Ok(ServedImage { manifest: parse(&image.manifest_digest)?, layers })
    })
    .await
    .map_err(|error| SourceError::new(ErrorKind::Local, format!("unpacking TOCs: {error}")))?
}

fn unpack_toc(packed: &[u8], digest: Option<&Digest>) -> Result<Vec<u8>, SourceError> {
    let bytes = millstream_toc::pack::unpack(packed, MAX_TOC).map_err(|error| malformed(&format!("TOC: {error}")))?;
    if digest != Some(&Digest::of(&bytes)) {
        return Err(SourceError::new(ErrorKind::DigestMismatch, "a TOC differs from the digest that the server named"));
    }
    Ok(bytes)
}

/// An image and the right to read it, as every request to the server carries them.
#[derive(Debug, Clone)]
pub struct ImageScope {
    /// Registry and repository.
    pub repository: String,
    /// Manifest (or image index) digest.
    pub manifest: ManifestDigest,
    /// The caller's credential.
    pub credential: Credential,
}

impl ImageScope {
    fn to_wire(&self) -> wire::Scope {
        let kind = match &self.credential {
            Credential::Anonymous => None,
            Credential::Basic { username, password } => Some(wire::credential::Kind::Basic(wire::Basic {
                username: username.clone(),
                password: password.expose().to_owned(),
            })),
            Credential::Bearer(token) => Some(wire::credential::Kind::Bearer(token.expose().to_owned())),
        };
        wire::Scope {
            repository: self.repository.clone(),
            manifest_digest: self.manifest.to_string(),
            credential: kind.map(|kind| wire::Credential { kind: Some(kind) }),
            platform: None,
        }
    }
}

/// Windows and content of one image from the server.
#[derive(Debug)]
pub struct ServerSource {
    /// The connection.
    pub server: Server,
    /// The image.
    pub scope: ImageScope,
}

#[async_trait]
impl WindowSource for ServerSource {
    async fn windows(&self, layer: &Digest, spans: Range<u32>) -> Result<Vec<Bytes>, SourceError> {
        let wanted = spans.len();
        let request = wire::GetWindowsRequest {
            scope: Some(self.scope.to_wire()),
            layer: layer.to_string(),
            first_span: spans.start,
            end_span: spans.end,
        };
        let receive = async {
            let mut windows = Vec::with_capacity(wanted);
            let mut received = 0;
            let answer = self.server.client.clone().get_windows(request).await;
            let mut stream = answer.map_err(|status| failed("asking for windows", &status))?.into_inner();
            while let Some(message) = stream.message().await.map_err(|status| failed("receiving windows", &status))? {
                // An answer without end would fill the memory before its time is up.
                if windows.len() + message.windows.len() > wanted {
                    return Err(malformed("more windows than were asked for"));
                }
                for packed in message.windows {
                    received += packed.len() as u64;
                    windows.push(unpack_window(&packed)?);
                }
            }
            self.server.count(received);
            Ok(windows)
        };
        let windows: Vec<Bytes> = bounded("windows", receive).await?;
        if windows.len() != wanted {
            return Err(malformed(&format!("{} windows instead of {wanted}", windows.len())));
        }
        Ok(windows)
    }
}

fn unpack_window(packed: &[u8]) -> Result<Bytes, SourceError> {
    if packed.is_empty() {
        return Ok(Bytes::new());
    }
    let raw = zstd::bulk::decompress(packed, MAX_WINDOW).map_err(|error| malformed(&format!("window: {error}")))?;
    Ok(raw.into())
}

#[async_trait]
impl ContentSource for ServerSource {
    async fn skeleton(&self, layer: &Digest) -> Result<Skeleton, SourceError> {
        let request = wire::GetSkeletonRequest { scope: Some(self.scope.to_wire()), layer: layer.to_string() };
        let refused = |status: Status| match status.code() {
            // A server from before there were any.
            Code::Unimplemented => SourceError::new(ErrorKind::NotFound, "server: it has no skeletons"),
            _ => failed("asking for the skeleton", &status),
        };
        let mut stream = self.server.client.clone().get_skeleton(request).await.map_err(refused)?.into_inner();
        let head = stream.message().await.map_err(refused)?.ok_or_else(|| malformed("no size of the skeleton"))?;
        let counter = Arc::clone(&self.server.metadata_bytes);
        let packed = stream.map(move |message| {
            let piece = message.map_err(|status| failed("receiving the skeleton", &status))?.packed;
            counter.fetch_add(piece.len() as u64, Ordering::Relaxed);
            Ok(Bytes::from(piece))
        });
        Ok(Skeleton { size: head.size, packed: Box::pin(packed) })
    }

    async fn content(&self, layer: &Digest, range: DataRange) -> Result<Bytes, SourceError> {
        let request = wire::ReadDataRequest {
            scope: Some(self.scope.to_wire()),
            layer: layer.to_string(),
            offset: range.start,
            size: range.len(),
        };
        let receive = async {
            let mut data = Vec::new();
            let answer = self.server.client.clone().read_data(request).await;
            let mut stream = answer.map_err(|status| failed("asking for content", &status))?.into_inner();
            while let Some(message) = stream.message().await.map_err(|status| failed("receiving content", &status))? {
                if data.len() as u64 + message.data.len() as u64 > range.len() {
                    return Err(malformed("more content than was asked for"));
                }
                data.extend_from_slice(&message.data);
            }
            Ok(data)
        };
        let data = bounded("content", receive).await?;
        if data.len() as u64 != range.len() {
            return Err(malformed(&format!("{} bytes of content instead of {}", data.len(), range.len())));
        }
        Ok(data.into())
    }
}

#[async_trait]
impl ProfileSource for ServerSource {
    async fn profile(&self, pages: bool, local: &[Digest]) -> Result<ServedProfile, SourceError> {
        let request = wire::GetProfileRequest {
            scope: Some(self.scope.to_wire()),
            pages,
            local_layers: local.iter().map(ToString::to_string).collect(),
        };
        let refused = |status: Status| match status.code() {
            // A server from before there were any.
            Code::Unimplemented => SourceError::new(ErrorKind::NotFound, "server: it has no startup profiles"),
            _ => failed("asking for the startup profile", &status),
        };
        let asked = async {
            let mut stream = self.server.client.clone().get_profile(request).await.map_err(refused)?.into_inner();
            let head = stream.message().await.map_err(refused)?;
            Ok((head.and_then(|message| message.part), stream))
        };
        let (Some(ProfilePart::Plan(plan)), stream) = bounded("the startup profile", asked).await? else {
            return Err(malformed("a startup profile without a plan"));
        };
        let layers = plan.layers.iter().map(profile_layer).collect::<Result<_, _>>()?;
        let recordings = plan.recordings;
        let packed = plan.pages.then(|| {
            let pieces = stream.map(|message| {
                let part = message.map_err(|status| failed("receiving a startup profile", &status))?.part;
                match part {
                    Some(ProfilePart::Packed(piece)) => Ok(Bytes::from(piece)),
                    Some(ProfilePart::Plan(_)) | None => Err(malformed("a startup profile with something else in it")),
                }
            });
            Box::pin(pieces) as millstream_source::ByteStream
        });
        let plan = Profile::from_numbers(layers, &plan.runs).map_err(|error| malformed(&error.to_string()))?;
        Ok(ServedProfile { plan, recordings, packed })
    }

    async fn record(&self, recording: &Recording) -> Result<(), SourceError> {
        let layers = recording.read.layers.iter().zip(&recording.fresh).map(|(layer, fresh)| wire::RecordedLayer {
            layer: Some(wire::ProfileLayer { digest: layer.digest.to_string(), toc_digest: layer.toc.to_string() }),
            fresh: *fresh,
        });
        let request = wire::PutRecordingRequest {
            scope: Some(self.scope.to_wire()),
            layers: layers.collect(),
            runs: recording.read.numbers(),
        };
        let told = async {
            let answer = self.server.client.clone().put_recording(request).await;
            answer.map(drop).map_err(|status| failed("telling what a start read", &status))
        };
        bounded("a recording", told).await
    }
}

fn profile_layer(layer: &wire::ProfileLayer) -> Result<ProfileLayer, SourceError> {
    Ok(ProfileLayer { digest: parse(&layer.digest)?, toc: parse(&layer.toc_digest)? })
}

async fn bounded<T>(what: &str, work: impl Future<Output = Result<T, SourceError>>) -> Result<T, SourceError> {
    tokio::time::timeout(REQUEST_TIMEOUT, work).await.unwrap_or_else(|_| {
        let seconds = REQUEST_TIMEOUT.as_secs();
        Err(SourceError::new(ErrorKind::TimedOut, format!("server: {what} took longer than {seconds} s")))
    })
}

fn parse<T: std::str::FromStr<Err = E>, E: fmt::Display>(text: &str) -> Result<T, SourceError> {
    text.parse().map_err(|error: E| malformed(&format!("{text:?}: {error}")))
}

fn malformed(what: &str) -> SourceError {
    SourceError::new(ErrorKind::Malformed, format!("answer of the server: {what}"))
}

/// What the server refused, in our terms; `what` was being done.
pub(crate) fn failed(what: &str, status: &Status) -> SourceError {
    let message = if status.message().is_empty() { status.code().description() } else { status.message() };
    SourceError::new(kind_of(status.code()), format!("server: {what}: {message}"))
}

/// The one table from gRPC status to our kinds.
const fn kind_of(code: Code) -> ErrorKind {
    match code {
        Code::FailedPrecondition => ErrorKind::NotImported,
        Code::InvalidArgument | Code::OutOfRange => ErrorKind::NotEligible,
        Code::NotFound => ErrorKind::NotFound,
        Code::PermissionDenied => ErrorKind::Denied,
        Code::Unauthenticated => ErrorKind::Unauthorized,
        Code::ResourceExhausted => ErrorKind::Exhausted,
        Code::DeadlineExceeded => ErrorKind::TimedOut,
        Code::DataLoss | Code::AlreadyExists => ErrorKind::Malformed,
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::Aborted
        | Code::Unimplemented
        | Code::Internal
        | Code::Unavailable => ErrorKind::Unavailable,
    }
}
