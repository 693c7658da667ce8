//! The gRPC service: who asks for what, and what they get.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures::{StreamExt, TryStreamExt};
use millstream_oci::{Digest, Document, ImageRef, ManifestDigest, Platform, parse_document, select_platform};
use millstream_registry::{Registry, Repository};
use millstream_source::{BlobSource, ErrorKind, ImageSource, SourceError, names};
use millstream_toc::format::Kind;
use millstream_toc::{DataRange, Toc};
use millstream_wire::millstream::v1::{self, get_image_response::Part, images_server::Images};
use tonic::{Code, Request, Response, Status};
use tracing::{Instrument, Span, info_span};

use crate::ServeError;
use crate::access::{Access, AccessKey, AccessOptions, Fingerprint};
use crate::answer::{Answer, Reply, failure, stream};
use crate::content::{Content, ContentOptions, toc_error};
use crate::convert::{credential, layer_message, platform, progress_message};
use crate::describe::no_platform;
use crate::import::{ImportOptions, Importer, Progress};
use crate::limits::{LimitOptions, Limits, Permit};
use crate::metrics::{Method, ServerMetrics};
use crate::outline::Outline;
use crate::profiles::{ProfileOptions, Profiles};
use crate::store::{ImageLayer, ImageRecord, LayerRecord, Pieces, Store, StoreError};
use crate::tables::Tables;

mod startup;

/// Records of an image that are looked up at once: each is a round trip, where the object store is not on this disk.
const LOOK_UPS: usize = 16;
/// Tables that are open for one caller: the next one is there when one was sent, and each may be an open file.
const OPEN: usize = 2;
/// Bytes of a packed TOC in one message; gRPC clients take 4 MiB by default.
const TOC_PIECE: usize = 1 << 20;
/// Bytes of content in one message.
const CONTENT_PIECE: usize = 1 << 20;
/// Bytes of content that one request holds in memory.
const CONTENT_AT_ONCE: u64 = 4 << 20;
/// Time for reading that much, whatever the registry does meanwhile.
const READ_DEADLINE: Duration = Duration::from_secs(300);
/// Bytes that one request may ask for.
const MAX_READ: u64 = 16 << 20;
/// Spans that one request may ask for.
const MAX_SPANS: u32 = 4096;
/// Windows in one message: at most 32 KiB each, and hardly more when they do not compress.
const WINDOWS_PIECE: u32 = 64;
/// How often the progress of an import is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);

/// What can be set.
#[derive(Debug, Clone, Default)]
pub struct ServiceOptions {
    /// How long answers of registries count.
    pub access: AccessOptions,
    /// Bounds of concurrent requests.
    pub limits: LimitOptions,
    /// Bounds of imports.
    pub import: ImportOptions,
    /// Memory for what was read lately.
    pub content: ContentOptions,
    /// What startup profiles may cost.
    pub profile: ProfileOptions,
    /// Whether `GetImage` of an image that is not imported starts its import.
    pub import_on_demand: bool,
    /// Registries that callers may name; empty: any.
    pub allowed_registries: Vec<String>,
    /// Whether every caller is this process itself, and uses no answer about an image before it has proven at the registry that
    /// it may read it: then the service does not ask the registry once more. It also notes when layers are used, for
    /// [`Store::shrink`], and puts no pages of startup profiles together: there is no wire to spare.
    pub embedded: bool,
}

/// The answer of an import; see [`Images::import`].
pub type ImportStream = Reply<v1::ImportProgress>;

/// The `Images` service. Cheap to clone; serves in-process callers as well as a [`crate::Listener`].
#[derive(Clone)]
pub struct ImagesService {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    registry: Registry,
    metrics: ServerMetrics,
    access: Access,
    limits: Limits,
    content: Arc<Content>,
    importer: Arc<Importer>,
    profiles: Arc<Profiles>,
    tables: Tables,
    import_on_demand: bool,
    allowed_registries: Vec<String>,
    embedded: bool,
    /// Imports under way that nobody asked for by `Import`; as many as there are import permits at most.
    on_demand: Mutex<HashSet<(String, ManifestDigest)>>,
}

/// A caller whose right to read was checked, and what it reads.
struct Caller {
    /// Pinned to the digest that was asked for.
    image: ImageRef,
    digest: ManifestDigest,
    repository: Arc<Repository>,
    platform: Platform,
}

impl std::fmt::Debug for ImagesService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImagesService").field("store", &self.inner.store).finish_non_exhaustive()
    }
}

impl ImagesService {
    /// A service upon `store` that reads images through `registry`.
    #[must_use]
    pub fn new(store: Store, registry: Registry, options: ServiceOptions) -> Self {
        let metrics = ServerMetrics::default();
        let content = Arc::new(Content::new(store.clone(), options.content, metrics.clone()));
        let limits = Limits::new(options.limits);
        let profiles = Arc::new(Profiles::new(
            store.clone(),
            Arc::clone(&content),
            metrics.clone(),
            limits.clone(),
            options.import.scratch.clone(),
            &options.profile,
            !options.embedded,
        ));
        let importer = Arc::new(Importer::new(store.clone(), Arc::clone(&content), options.import, metrics.clone()));
        let inner = Inner {
            metrics,
            store,
            registry,
            access: Access::new(options.access),
            limits,
            content,
            importer,
            profiles,
            tables: Tables::default(),
            import_on_demand: options.import_on_demand,
            allowed_registries: options.allowed_registries,
            embedded: options.embedded,
            on_demand: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// As [`Images::import`], for a caller in this process that has the image elsewhere than in a registry: what `image` names
    /// in `source`, for linux on this machine's architecture. Nothing is asked of the network but by `source`.
    ///
    /// # Errors
    ///
    /// When too many imports are under way. All else that fails ends the stream.
    pub fn import_from(&self, source: Arc<dyn ImageSource>, image: &ImageRef) -> Result<ImportStream, ServeError> {
        let permit = self.inner.limits.admit(None)?;
        let span = info_span!("import", { names::IMAGE } = %image);
        let entered = span.enter();
        let started = Arc::clone(&self.inner).start_import(permit, source, image.clone(), platform(None))?;
        drop(entered);
        Ok(started.into_inner())
    }

    /// Learns which layers of `image` (by digest) can be served although it was never imported, because other images have
    /// them; afterwards it is known in part. `source` gives manifest and configuration, `proof` shows that the caller's
    /// repository really has these layers: a chunk of each is read there.
    ///
    /// # Errors
    ///
    /// When `source` does not have the documents, or `proof` a layer.
    pub async fn outline(
        &self,
        source: &dyn ImageSource,
        proof: &dyn BlobSource,
        image: &ImageRef,
    ) -> Result<Outline, ServeError> {
        self.inner.importer.outline(source, proof, image, &platform(None)).await
    }

    /// What is counted.
    #[must_use]
    pub fn metrics(&self) -> &ServerMetrics {
        &self.inner.metrics
    }

    /// Whether the store can be read.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn ready(&self) -> Result<(), StoreError> {
        self.inner.store.probe().await
    }

    /// Counts and traces the work that one request is.
    async fn answer<T>(
        &self,
        method: Method,
        span: Span,
        work: impl Future<Output = Result<T, ServeError>>,
    ) -> Result<T, Status> {
        let watch = self.inner.metrics.begin(method);
        let answer = work.instrument(span.clone()).await.map_err(|error| refused(&span, error));
        watch.end(answer.as_ref().err().map_or(Code::Ok, Status::code));
        answer
    }
}

#[tonic::async_trait]
impl Images for ImagesService {
    type ImportStream = Reply<v1::ImportProgress>;
    type GetImageStream = Reply<v1::GetImageResponse>;
    type GetWindowsStream = Reply<v1::GetWindowsResponse>;
    type GetSkeletonStream = Reply<v1::GetSkeletonResponse>;
    type ReadFileStream = Reply<v1::ReadFileResponse>;
    type ReadDataStream = Reply<v1::ReadFileResponse>;
    type GetProfileStream = Reply<v1::GetProfileResponse>;

    async fn import(&self, request: Request<v1::ImportRequest>) -> Result<Response<Self::ImportStream>, Status> {
        let peer = peer(&request);
        let request = request.into_inner();
        let span = info_span!("import", { names::IMAGE } = %shown(&request.image));
        self.answer(Method::Import, span, Inner::import(Arc::clone(&self.inner), peer, request)).await
    }

    async fn get_image(&self, request: Request<v1::GetImageRequest>) -> Result<Response<Self::GetImageStream>, Status> {
        let peer = peer(&request);
        let request = request.into_inner();
        let span = info_span!("get_image", { names::IMAGE } = image_field(request.scope.as_ref()));
        self.answer(Method::GetImage, span, Inner::get_image(Arc::clone(&self.inner), peer, request)).await
    }

    async fn get_windows(
        &self,
        request: Request<v1::GetWindowsRequest>,
    ) -> Result<Response<Self::GetWindowsStream>, Status> {
        let peer = peer(&request);
        let request = request.into_inner();
        let span = info_span!(
            "get_windows",
            { names::IMAGE } = image_field(request.scope.as_ref()),
            { names::LAYER } = %shown(&request.layer),
            first_span = request.first_span,
            end_span = request.end_span,
        );
        self.answer(Method::GetWindows, span, Inner::get_windows(Arc::clone(&self.inner), peer, request)).await
    }

    async fn get_skeleton(
        &self,
        request: Request<v1::GetSkeletonRequest>,
    ) -> Result<Response<Self::GetSkeletonStream>, Status> {
        let peer = peer(&request);
        let request = request.into_inner();
        let span = info_span!(
            "get_skeleton",
            { names::IMAGE } = image_field(request.scope.as_ref()),
            { names::LAYER } = %shown(&request.layer),
        );
        self.answer(Method::GetSkeleton, span, Inner::get_skeleton(Arc::clone(&self.inner), peer, request)).await
    }

    async fn read_file(&self, request: Request<v1::ReadFileRequest>) -> Result<Response<Self::ReadFileStream>, Status> {
        let peer = peer(&request);
        let request = request.into_inner();
        let span = info_span!(
            "read_file",
            { names::IMAGE } = image_field(request.scope.as_ref()),
            { names::LAYER } = %shown(&request.layer),
            { names::PATH } = %shown(&String::from_utf8_lossy(&request.path)),
            { names::OFFSET } = request.offset,
            { names::SIZE } = request.size,
        );
        self.answer(Method::ReadFile, span, Inner::read_file(Arc::clone(&self.inner), peer, request)).await
    }

    async fn read_data(&self, request: Request<v1::ReadDataRequest>) -> Result<Response<Self::ReadDataStream>, Status> {
        let peer = peer(&request);
        let request = request.into_inner();
        let span = info_span!(
            "read_data",
            { names::IMAGE } = image_field(request.scope.as_ref()),
            { names::LAYER } = %shown(&request.layer),
            { names::OFFSET } = request.offset,
            { names::SIZE } = request.size,
        );
        self.answer(Method::ReadData, span, Inner::read_data(Arc::clone(&self.inner), peer, request)).await
    }

    async fn get_profile(
        &self,
        request: Request<v1::GetProfileRequest>,
    ) -> Result<Response<Self::GetProfileStream>, Status> {
        let peer = peer(&request);
        let request = request.into_inner();
        let span = info_span!("get_profile", { names::IMAGE } = image_field(request.scope.as_ref()));
        self.answer(Method::GetProfile, span, Inner::get_profile(Arc::clone(&self.inner), peer, request)).await
    }

    async fn put_recording(
        &self,
        request: Request<v1::PutRecordingRequest>,
    ) -> Result<Response<v1::PutRecordingResponse>, Status> {
        let peer = peer(&request);
        let request = request.into_inner();
        let span = info_span!("put_recording", { names::IMAGE } = image_field(request.scope.as_ref()));
        self.answer(Method::PutRecording, span, Inner::put_recording(Arc::clone(&self.inner), peer, request)).await
    }
}

impl Inner {
    async fn import(
        self: Arc<Self>,
        peer: Option<IpAddr>,
        request: v1::ImportRequest,
    ) -> Result<Response<Reply<v1::ImportProgress>>, ServeError> {
        let permit = self.limits.admit(peer)?;
        let image = ImageRef::parse(&request.image).map_err(|error| ServeError::Invalid { what: error.to_string() })?;
        self.check_registry(&image, peer)?;
        let repository = Arc::new(self.registry.repository(&image, credential(request.credential)));
        self.start_import(permit, repository, image, platform(request.platform))
    }

    fn start_import(
        self: Arc<Self>,
        permit: Permit,
        source: Arc<dyn ImageSource>,
        image: ImageRef,
        platform: Platform,
    ) -> Result<Response<Reply<v1::ImportProgress>>, ServeError> {
        let import = self.importer.admit()?;
        let progress = Arc::new(Progress::default());
        // A task of its own: it goes on when the caller leaves, and the next caller finds it done.
        let (importer, told) = (Arc::clone(&self.importer), Arc::clone(&progress));
        let work = async move { importer.import(import, &source, &image, &platform, &told).await };
        let mut work = tokio::spawn(work.instrument(Span::current()));
        Ok(stream(permit, async move |answer: Answer<v1::ImportProgress>| {
            let mut tick = tokio::time::interval(PROGRESS_EVERY);
            let imported = loop {
                tokio::select! {
                    done = &mut work => break done,
                    _ = tick.tick() => answer.send(progress_message(&progress, None)).await?,
                }
            };
            let imported = imported.map_err(|error| ServeError::Internal { what: error.to_string() })??;
            tracing::info!(manifest = %imported.manifest, ineligible = imported.ineligible.len(), "image imported");
            answer.send(progress_message(&progress, Some(imported))).await
        }))
    }

    async fn get_image(
        self: Arc<Self>,
        peer: Option<IpAddr>,
        request: v1::GetImageRequest,
    ) -> Result<Response<Reply<v1::GetImageResponse>>, ServeError> {
        let permit = self.limits.admit(peer)?;
        let under_way = manifest_of(request.scope.as_ref()).map(|manifest| self.tables.begin(peer, manifest));
        let caller = self.authorise(peer, request.scope).await?;
        let image = match self.image(&caller).await {
            Err(error @ ServeError::NotImported { .. }) => {
                self.import_on_demand(caller);
                return Err(error);
            }
            other => other?,
        };
        let known: HashSet<String> = request.known_layers.into_iter().collect();
        let mut layers = Vec::with_capacity(image.layers.len());
        let mut to_send: Vec<Digest> = Vec::new();
        let records: Vec<_> = image.layers.iter().map(|layer| self.layer_record(&caller, layer)).collect();
        let records: Vec<_> = futures::stream::iter(records).buffered(LOOK_UPS).collect().await;
        for (layer, record) in image.layers.iter().zip(records) {
            layers.push(match record {
                Ok(record) => layer_message(layer, Ok(record.toc)),
                Err(ServeError::NotEligible { reason, .. }) => layer_message(layer, Err(reason)),
                Err(error @ ServeError::NotImported { .. }) if layer.pending => {
                    layer_message(layer, Err(error.to_string()))
                }
                Err(error) => return Err(error),
            });
            let is_known = known.contains(&layer.digest.to_string());
            if layer.is_ready() && !is_known && !to_send.contains(&layer.digest) {
                to_send.push(layer.digest);
            }
        }
        if self.embedded {
            self.store.used(&image, SystemTime::now()).await?;
        }
        if layers.iter().all(|layer| layer.toc_digest.is_empty()) {
            let reason = layers.into_iter().map(|layer| layer.ineligible).next();
            let reason = reason.unwrap_or_else(|| "it has no layers".to_owned());
            return Err(ServeError::NotEligible { what: caller.image.to_string(), reason });
        }
        let head = v1::Image { manifest_digest: image.manifest.to_string(), layers };
        Ok(stream(permit, async move |answer: Answer<v1::GetImageResponse>| {
            let _under_way = under_way;
            answer.send(v1::GetImageResponse { part: Some(Part::Image(head)) }).await?;
            let open = async |layer: Digest| Ok::<_, StoreError>((layer, self.store.toc(&layer).await?));
            let mut opened = futures::stream::iter(to_send).map(open).buffered(OPEN);
            while let Some((layer, toc)) = opened.try_next().await? {
                let toc = toc.ok_or_else(|| ServeError::NotImported { image: layer.to_string() })?;
                send_toc(&layer, toc, &answer).await?;
            }
            // Whether or not they are taken, all were sent.
            let _ = answer.taken().await;
            Ok(())
        }))
    }

    async fn get_windows(
        self: Arc<Self>,
        peer: Option<IpAddr>,
        request: v1::GetWindowsRequest,
    ) -> Result<Response<Reply<v1::GetWindowsResponse>>, ServeError> {
        let permit = self.limits.admit(peer)?;
        let caller = self.authorise(peer, request.scope).await?;
        let (layer, record) = self.layer(&caller, &request.layer).await?;
        let (first, end) = (request.first_span, request.end_span);
        if first >= end || end > record.spans || end - first > MAX_SPANS {
            let what = format!(
                "spans [{first}, {end}): layer {layer} has {}, one request may ask for 1 to {MAX_SPANS}",
                record.spans
            );
            return Err(ServeError::Invalid { what });
        }
        Ok(stream(permit, async move |answer: Answer<v1::GetWindowsResponse>| {
            let mut at = first;
            while at < end {
                let next = end.min(at.saturating_add(WINDOWS_PIECE));
                let windows = self.store.windows(&layer, record.spans, at, next).await?;
                let windows = windows.into_iter().map(Into::into).collect();
                answer.send(v1::GetWindowsResponse { windows }).await?;
                at = next;
            }
            Ok(())
        }))
    }

    async fn get_skeleton(
        self: Arc<Self>,
        peer: Option<IpAddr>,
        request: v1::GetSkeletonRequest,
    ) -> Result<Response<Reply<v1::GetSkeletonResponse>>, ServeError> {
        let permit = self.limits.admit(peer)?;
        let caller = self.authorise(peer, request.scope).await?;
        let (layer, _) = self.layer(&caller, &request.layer).await?;
        let found = self.store.skeleton(&layer).await?;
        let (size, mut pieces) =
            found.ok_or_else(|| ServeError::NotFound { what: format!("layer {layer} has no skeleton here") })?;
        Ok(stream(permit, async move |answer: Answer<v1::GetSkeletonResponse>| {
            answer.send(v1::GetSkeletonResponse { size, packed: Vec::new() }).await?;
            while let Some(piece) = pieces.try_next().await? {
                for part in piece.chunks(CONTENT_PIECE) {
                    answer.send(v1::GetSkeletonResponse { size: 0, packed: part.to_vec() }).await?;
                }
            }
            Ok(())
        }))
    }

    async fn read_file(
        self: Arc<Self>,
        peer: Option<IpAddr>,
        request: v1::ReadFileRequest,
    ) -> Result<Response<Reply<v1::ReadFileResponse>>, ServeError> {
        let permit = self.limits.admit(peer)?;
        check_size(request.size)?;
        let caller = self.authorise(peer, request.scope).await?;
        let (layer, _) = self.layer(&caller, &request.layer).await?;
        let toc = self.content.toc(&layer).await?;
        let file = file_data(&toc, &request.path)?;
        let start = file.start.saturating_add(request.offset).min(file.end);
        let range = DataRange::new(start, start.saturating_add(request.size).min(file.end));
        Ok(self.send_content(permit, caller.repository, toc, range))
    }

    async fn read_data(
        self: Arc<Self>,
        peer: Option<IpAddr>,
        request: v1::ReadDataRequest,
    ) -> Result<Response<Reply<v1::ReadFileResponse>>, ServeError> {
        let permit = self.limits.admit(peer)?;
        check_size(request.size)?;
        let caller = self.authorise(peer, request.scope).await?;
        let (layer, _) = self.layer(&caller, &request.layer).await?;
        let toc = self.content.toc(&layer).await?;
        let end = toc.data_size();
        let start = request.offset.min(end);
        let range = DataRange::new(start, start.saturating_add(request.size).min(end));
        Ok(self.send_content(permit, caller.repository, toc, range))
    }

    fn send_content(
        self: Arc<Self>,
        permit: Permit,
        repository: Arc<Repository>,
        toc: Arc<Toc>,
        range: DataRange,
    ) -> Response<Reply<v1::ReadFileResponse>> {
        stream(permit, async move |answer: Answer<v1::ReadFileResponse>| {
            let mut at = range.start;
            while at < range.end {
                let part = DataRange::new(at, range.end.min(at + CONTENT_AT_ONCE));
                let read = self.content.read(&toc, &*repository, part);
                let timed_out = |_| ServeError::TimedOut { what: "reading from the registry" };
                let bytes = tokio::time::timeout(READ_DEADLINE, read).await.map_err(timed_out)??;
                for piece in bytes.chunks(CONTENT_PIECE) {
                    answer.send(v1::ReadFileResponse { data: piece.to_vec() }).await?;
                }
                at = part.end;
            }
            Ok(())
        })
    }

    /// Checks the caller's right to read at the registry, with its own credential.
    async fn authorise(&self, peer: Option<IpAddr>, scope: Option<v1::Scope>) -> Result<Caller, ServeError> {
        let invalid = |what: String| ServeError::Invalid { what };
        let scope = scope.ok_or_else(|| invalid("the request has no scope".to_owned()))?;
        let digest: ManifestDigest = scope
            .manifest_digest
            .parse()
            .map_err(|error| invalid(format!("manifest digest {:?}: {error}", scope.manifest_digest)))?;
        let image = ImageRef::parse(&scope.repository).map_err(|error| invalid(error.to_string()))?.with_digest(digest);
        self.check_registry(&image, peer)?;
        let credential = credential(scope.credential);
        let key = AccessKey { repository: image.name(), manifest: digest, credential: Fingerprint::of(&credential) };
        let repository = Arc::new(self.registry.repository(&image, credential));
        if !self.embedded {
            self.access.check(key, repository.check_access(&digest)).await?;
        }
        Ok(Caller { image, digest, repository, platform: platform(scope.platform) })
    }

    fn check_registry(&self, image: &ImageRef, peer: Option<IpAddr>) -> Result<(), ServeError> {
        if may_name(&self.allowed_registries, image.registry(), peer) {
            return Ok(());
        }
        let message = format!("this server does not serve images of registry {}", image.registry());
        Err(SourceError::new(ErrorKind::Denied, message).into())
    }

    /// The record of the caller's image, by way of an image index if the digest is of one.
    async fn image(&self, caller: &Caller) -> Result<ImageRecord, ServeError> {
        let name = caller.image.name();
        if let Some(record) = self.store.image(caller.digest, &name).await? {
            return Ok(record);
        }
        let not_imported = || ServeError::NotImported { image: caller.image.to_string() };
        let bytes = self.store.index(caller.digest).await?.ok_or_else(not_imported)?;
        let what = || format!("index {}", caller.digest);
        let document = parse_document(None, &bytes).map_err(|source| ServeError::Document { what: what(), source })?;
        let Document::Index(entries) = document else {
            return Err(ServeError::Internal { what: format!("stored {} is a manifest", what()) });
        };
        let entry = select_platform(&entries, &caller.platform)
            .ok_or_else(|| no_platform(&caller.image.to_string(), &caller.platform))?;
        self.store.image(entry.digest, &name).await?.ok_or_else(not_imported)
    }

    /// The layer `digest` of the caller's image.
    async fn layer(&self, caller: &Caller, digest: &str) -> Result<(Digest, LayerRecord), ServeError> {
        let digest: Digest =
            digest.parse().map_err(|error| ServeError::Invalid { what: format!("layer {digest:?}: {error}") })?;
        let image = self.image(caller).await?;
        let layer = image
            .layers
            .iter()
            .find(|layer| layer.digest == digest)
            .ok_or_else(|| ServeError::NotFound { what: format!("{} has no layer {digest}", caller.image) })?;
        Ok((digest, self.layer_record(caller, layer).await?))
    }

    async fn layer_record(&self, caller: &Caller, layer: &ImageLayer) -> Result<LayerRecord, ServeError> {
        if let Some(reason) = &layer.ineligible {
            let what = format!("layer {}", layer.digest);
            return Err(ServeError::NotEligible { what, reason: reason.clone() });
        }
        let record = if layer.pending { None } else { self.store.layer(&layer.digest).await? };
        record.ok_or_else(|| ServeError::NotImported { image: caller.image.to_string() })
    }

    /// Starts the import of the caller's image, unless it is under way, or too many are.
    fn import_on_demand(self: Arc<Self>, caller: Caller) {
        if !self.import_on_demand {
            return;
        }
        let key = (caller.image.name(), caller.digest);
        let Ok(permit) = self.importer.admit() else { return };
        if !self.on_demand.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone()) {
            return;
        }
        let work = async move {
            let running = OnDemand { inner: &self, key };
            let progress = Arc::default();
            let Caller { image, repository, platform, .. } = caller;
            let source: Arc<dyn ImageSource> = repository;
            match self.importer.import(permit, &source, &image, &platform, &progress).await {
                Ok(done) => tracing::info!(manifest = %done.manifest, "image imported on demand"),
                Err(error) => drop(failure(error)),
            }
            drop(running);
        };
        tokio::spawn(work.instrument(Span::current()));
    }
}

/// An import on demand that is under way, however it ends.
struct OnDemand<'a> {
    inner: &'a Inner,
    key: (String, ManifestDigest),
}

impl Drop for OnDemand<'_> {
    fn drop(&mut self) {
        self.inner.on_demand.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

/// Whether a caller at `peer` (`None`: in this process) may name `registry`. Where nothing is `allowed` by name, everything is
/// but this machine's own loopback to callers on other machines: it is none of theirs, and what listens there may trust us.
fn may_name(allowed: &[String], registry: &str, peer: Option<IpAddr>) -> bool {
    if !allowed.is_empty() {
        return allowed.iter().any(|host| host == registry);
    }
    let name = registry.split(':').next().unwrap_or_default().to_ascii_lowercase();
    let is_here = match name.parse::<IpAddr>() {
        Ok(address) => address.is_loopback() || address.is_unspecified(),
        // `127.1` and `0x7f000001` are addresses to whoever connects: nobody means well who writes one like that.
        Err(_) => {
            let last = name.rsplit('.').next().unwrap_or_default();
            let is_number = last.starts_with("0x") || last.bytes().all(|byte| byte.is_ascii_digit());
            name == "localhost" || name.ends_with(".localhost") || is_number
        }
    };
    !is_here || peer.is_none_or(|peer| peer.to_canonical().is_loopback())
}

/// A caller's text for the log: escaped, so that it cannot pretend to be lines of its own, and of bounded length.
fn shown(text: &str) -> String {
    const SHOWN: usize = 300;
    let short = text.char_indices().nth(SHOWN).map_or(text, |(end, _)| &text[..end]);
    let mut shown: String = short.escape_debug().collect();
    if short.len() < text.len() {
        shown.push('…');
    }
    shown
}

fn refused(span: &Span, error: ServeError) -> Status {
    span.in_scope(|| failure(error))
}

/// Sends one TOC as it lies in the store.
async fn send_toc(layer: &Digest, mut pieces: Pieces, answer: &Answer<v1::GetImageResponse>) -> Result<(), ServeError> {
    let message = |packed: Vec<u8>, last| {
        let toc = v1::TocPart { layer: layer.to_string(), packed, last };
        v1::GetImageResponse { part: Some(Part::Toc(toc)) }
    };
    let mut waiting: Vec<u8> = Vec::new();
    while let Some(piece) = pieces.try_next().await? {
        for part in piece.chunks(TOC_PIECE) {
            if !waiting.is_empty() && waiting.len() + part.len() > TOC_PIECE {
                answer.send(message(std::mem::take(&mut waiting), false)).await?;
            }
            waiting.extend_from_slice(part);
        }
    }
    answer.send(message(waiting, true)).await
}

/// What a caller asks about, before it is known whether it may.
fn manifest_of(scope: Option<&v1::Scope>) -> Option<ManifestDigest> {
    scope?.manifest_digest.parse().ok()
}

fn peer<T>(request: &Request<T>) -> Option<IpAddr> {
    request.remote_addr().map(|address| address.ip())
}

fn image_field(scope: Option<&v1::Scope>) -> String {
    scope.map(|scope| format!("{}@{}", shown(&scope.repository), shown(&scope.manifest_digest))).unwrap_or_default()
}

fn check_size(size: u64) -> Result<(), ServeError> {
    if size <= MAX_READ {
        return Ok(());
    }
    Err(ServeError::Invalid { what: format!("{size} bytes are more than one request may ask for ({MAX_READ})") })
}

/// The content of the regular file at `path`.
fn file_data(toc: &Toc, path: &[u8]) -> Result<DataRange, ServeError> {
    let layer = toc.blob_digest();
    let shown = shown(&String::from_utf8_lossy(path));
    let inode = toc.lookup_path(path).map_err(toc_error(&layer))?;
    let inode = inode.ok_or_else(|| ServeError::NotFound { what: format!("layer {layer} has no file \"{shown}\"") })?;
    let inode = toc.inode(inode).map_err(toc_error(&layer))?;
    let kind = match inode.kind() {
        Kind::Regular => return toc.file_data(&inode).map_err(toc_error(&layer)),
        Kind::Directory => "a directory",
        Kind::Symlink => "a symbolic link (which is not followed)",
        Kind::CharDevice | Kind::BlockDevice => "a device",
        Kind::Fifo => "a named pipe",
    };
    Err(ServeError::Invalid { what: format!("\"{shown}\" in layer {layer} is {kind}, not a regular file") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_for_callers_on_this_machine() {
        let (near, mapped) = ([127, 0, 0, 1].into(), "::ffff:127.0.0.1".parse().unwrap());
        let far: IpAddr = [10, 0, 0, 7].into();
        for registry in [
            "localhost",
            "localhost:5000",
            "LocalHost:1",
            "a.localhost",
            "127.0.0.1:5000",
            "127.9.9.9",
            "127.1:80",
            "2130706433:80",
            "127.0.0.0x1",
            "0.0.0.0:80",
        ] {
            assert!(!may_name(&[], registry, Some(far)), "{registry}");
            for peer in [None, Some(near), Some(mapped)] {
                assert!(may_name(&[], registry, peer), "{registry} {peer:?}");
            }
            assert!(may_name(&[registry.to_owned()], registry, Some(far)), "named by whoever runs the server");
        }
        for registry in ["docker.io", "localhost.example:5000", "10.0.0.1:5000"] {
            assert!(may_name(&[], registry, Some(far)), "{registry}");
            assert!(!may_name(&["ghcr.io".to_owned()], registry, None), "{registry}");
        }
    }

    #[test]
    fn callers_texts_cannot_fill_or_forge_the_log() {
        assert_eq!(shown("a/b\n2026 INFO all is well\u{1b}[2J"), "a/b\\n2026 INFO all is well\\u{1b}[2J");
        let long = shown(&"ä".repeat(1 << 20));
        assert_eq!(long.chars().count(), 301);
    }
}
