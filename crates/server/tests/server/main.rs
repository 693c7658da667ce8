//! The server over gRPC, against a real registry.

#![allow(clippy::unwrap_used, clippy::expect_used, unreachable_pub)]

mod image;
mod packed;
mod profile;
mod registry;

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use image::{Layer, Tar, noise, push, push_index};
use millstream_oci::Digest;
use millstream_registry::RegistryOptions;
use millstream_server::{ImagesService, LimitOptions, ListenOptions, Listener, ServiceOptions, Store, TlsFiles};
use millstream_toc::build::{BuildOptions, BuildSink, Compression, build};
use millstream_toc::{Toc, pack};
use millstream_wire::millstream::v1::{
    self, Basic, Credential, GetImageRequest, GetSkeletonRequest, GetWindowsRequest, ImportRequest, ReadDataRequest,
    ReadFileRequest, Scope, credential::Kind, get_image_response::Part, images_client::ImagesClient,
};
use registry::{Gate, Registry};
use tokio::sync::oneshot;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Status, Streaming};

/// `ada:secret`
const ADA: &str = "Basic YWRhOnNlY3JldA==";

/// A running server; ends when dropped.
struct Server {
    client: ImagesClient<Channel>,
    _stop: oneshot::Sender<()>,
}

impl Server {
    fn service(state: &Path, options: ServiceOptions) -> ImagesService {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let registry = millstream_registry::Registry::new(RegistryOptions::default()).unwrap();
        ImagesService::new(Store::open(state.to_str().unwrap()).unwrap(), registry, options)
    }

    async fn start(state: &Path, options: ServiceOptions) -> Self {
        let listen = ListenOptions { address: "127.0.0.1:0".parse().unwrap(), tls: None };
        let listener = Listener::bind(&listen).unwrap();
        let address = listener.address();
        let (stop, stopped) = oneshot::channel::<()>();
        let service = Self::service(state, options);
        tokio::spawn(async move { listener.serve(service, async { drop(stopped.await) }).await.unwrap() });
        let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        Self { client: ImagesClient::new(channel), _stop: stop }
    }

    async fn import(&self, image: &str, credential: Option<Credential>) -> Result<v1::ImportProgress, Status> {
        let request = ImportRequest { image: image.to_owned(), credential, platform: amd64() };
        let progress = collect(self.client.clone().import(request).await?.into_inner()).await?;
        let last = progress.last().unwrap().clone();
        assert!(last.done.is_some());
        assert_eq!((last.bytes_done, last.layers_done), (last.bytes_total, last.layers_total));
        Ok(last)
    }

    /// The image, and its TOCs (unpacked) by layer.
    async fn image(&self, scope: &Scope, known: &[Digest]) -> Result<(v1::Image, HashMap<String, Vec<u8>>), Status> {
        let known_layers = known.iter().map(ToString::to_string).collect();
        let request = GetImageRequest { scope: Some(scope.clone()), known_layers };
        let mut parts = collect(self.client.clone().get_image(request).await?.into_inner()).await?.into_iter();
        let Some(Part::Image(image)) = parts.next().unwrap().part else { panic!("the image comes first") };
        let (mut tocs, mut packed) = (HashMap::new(), Vec::new());
        for part in parts {
            let Some(Part::Toc(toc)) = part.part else { panic!("TOCs follow") };
            packed.extend_from_slice(&toc.packed);
            if toc.last {
                let canonical = pack::unpack(&std::mem::take(&mut packed), 1 << 30).unwrap();
                assert!(tocs.insert(toc.layer, canonical).is_none(), "each TOC once");
            }
        }
        Ok((image, tocs))
    }

    async fn file(&self, scope: &Scope, layer: Digest, path: &str, offset: u64, size: u64) -> Result<Vec<u8>, Status> {
        let (scope, layer) = (Some(scope.clone()), layer.to_string());
        let request = ReadFileRequest { scope, layer, path: path.into(), offset, size };
        let parts = collect(self.client.clone().read_file(request).await?.into_inner()).await?;
        Ok(parts.into_iter().flat_map(|part| part.data).collect())
    }
}

async fn collect<T>(mut stream: Streaming<T>) -> Result<Vec<T>, Status> {
    let mut all = Vec::new();
    while let Some(message) = stream.message().await? {
        all.push(message);
    }
    Ok(all)
}

fn amd64() -> Option<v1::Platform> {
    Some(v1::Platform { os: "linux".into(), architecture: "amd64".into(), variant: String::new() })
}

fn scope(repository: &str, manifest: Digest) -> Scope {
    let (repository, manifest_digest) = (repository.to_owned(), manifest.to_string());
    Scope { repository, manifest_digest, credential: None, platform: amd64() }
}

fn basic(username: &str, password: &str) -> Credential {
    Credential { kind: Some(Kind::Basic(Basic { username: username.into(), password: password.into() })) }
}

fn code<T: std::fmt::Debug>(result: Result<T, Status>) -> Code {
    result.unwrap_err().code()
}

/// Small files, one of several spans, a link and a whiteout.
fn sample_layers() -> Vec<Layer> {
    let base = Tar::default()
        .directory("etc/")
        .file("etc/motd", b"welcome")
        .file("etc/empty", b"")
        .file("etc/gone", b"soon")
        .symlink("etc/link", "motd")
        .file("big", &noise(1, 5_000_000))
        .file("tail", &noise(2, 20_000));
    let top = Tar::default().directory("etc/").file("etc/.wh.gone", b"").file("etc/motd", &noise(3, 100_000));
    vec![Layer::gzip(&base.finish()), Layer::gzip(&top.finish())]
}

fn rebuilt(layer: &Layer) -> Vec<u8> {
    rebuilt_as(layer, Compression::Gzip)
}

fn rebuilt_as(layer: &Layer, compression: Compression) -> Vec<u8> {
    build(&layer.blob[..], &BuildOptions::new(compression), &mut ()).unwrap().toc
}

#[tokio::test(flavor = "multi_thread")]
async fn imported_images_read_back() {
    let Some(registry) = Registry::start() else { return };
    let state = tempfile::tempdir().unwrap();
    let layers = sample_layers();
    let manifest = push(&registry, "team/app", "v1", &layers);
    let name = format!("{}/team/app", registry.host());
    let scope = scope(&name, manifest);

    let server = Server::start(state.path(), ServiceOptions::default()).await;
    assert_eq!(code(server.image(&scope, &[]).await), Code::FailedPrecondition);
    let done = server.import(&format!("{name}:v1"), None).await.unwrap().done.unwrap();
    assert_eq!(done.manifest_digest, manifest.to_string());
    assert!(done.ineligible.is_empty());

    let (image, tocs) = server.image(&scope, &[]).await.unwrap();
    assert_eq!(image.manifest_digest, manifest.to_string());
    assert_eq!(image.layers.len(), layers.len());
    for (listed, layer) in image.layers.iter().zip(&layers) {
        let toc = &tocs[&layer.digest().to_string()];
        assert_eq!(*toc, rebuilt(layer), "a TOC depends on the blob only");
        assert_eq!(listed.digest, layer.digest().to_string());
        assert_eq!(listed.size, layer.blob.len() as u64);
        assert_eq!(listed.diff_id, layer.diff_id.to_string());
        assert_eq!(listed.toc_digest, Digest::of(toc).to_string());
    }
    let (_, tocs) = server.image(&scope, &[layers[0].digest()]).await.unwrap();
    assert!(tocs.keys().eq([&layers[1].digest().to_string()]), "known layers are not sent");

    windows_verify(&server, &scope, &layers[0]).await;
    skeletons_are_whole(&server, &scope, &layers).await;
    files_read_back(&server, &scope, &layers).await;

    drop(server);
    let server = Server::start(state.path(), ServiceOptions::default()).await;
    assert_eq!(server.image(&scope, &[]).await.unwrap().0, image, "state survives a restart");
    assert_eq!(server.file(&scope, layers[0].digest(), "etc/motd", 0, 100).await.unwrap(), b"welcome");
}

async fn windows_verify(server: &Server, scope: &Scope, layer: &Layer) {
    let toc = Toc::open(rebuilt(layer)).unwrap();
    assert!(toc.span_count() > 2, "the sample is too small to test windows");
    let request = |first_span, end_span| GetWindowsRequest {
        scope: Some(scope.clone()),
        layer: layer.digest().to_string(),
        first_span,
        end_span,
    };
    for first in 0..toc.span_count() {
        let windows = server.client.clone().get_windows(request(first, toc.span_count())).await.unwrap().into_inner();
        let windows: Vec<Vec<u8>> = collect(windows).await.unwrap().into_iter().flat_map(|part| part.windows).collect();
        assert_eq!(windows.len(), (toc.span_count() - first) as usize);
        for (span, window) in (first..).zip(windows) {
            let raw = if window.is_empty() { vec![] } else { zstd::bulk::decompress(&window, 32 * 1024).unwrap() };
            assert!(toc.verify_window(span, &raw), "span {span}");
        }
    }
    for (first, end) in [(0, 0), (1, 0), (0, toc.span_count() + 1), (0, u32::MAX)] {
        assert_eq!(code(server.client.clone().get_windows(request(first, end)).await), Code::InvalidArgument);
    }
}

/// The bytes of a tar that are no content, as a build of one's own sees them.
#[derive(Default)]
struct Skeleton(Vec<u8>);

impl BuildSink for Skeleton {
    fn skeleton(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}

async fn skeletons_are_whole(server: &Server, scope: &Scope, layers: &[Layer]) {
    let request = |layer: Digest| GetSkeletonRequest { scope: Some(scope.clone()), layer: layer.to_string() };
    for layer in layers {
        let parts = server.client.clone().get_skeleton(request(layer.digest())).await.unwrap().into_inner();
        let parts = collect(parts).await.unwrap();
        let packed: Vec<u8> = parts.iter().flat_map(|part| part.packed.clone()).collect();
        assert!(parts[0].packed.is_empty() && parts[0].size == packed.len() as u64);
        let mut expected = Skeleton::default();
        build(&layer.blob[..], &BuildOptions::new(Compression::Gzip), &mut expected).unwrap();
        assert!(zstd::stream::decode_all(&packed[..]).unwrap() == expected.0);
        assert!(packed.len() < layer.blob.len() / 20);
    }
    assert_eq!(code(server.client.clone().get_skeleton(request(Digest::of(b"x"))).await), Code::NotFound);
}

async fn files_read_back(server: &Server, scope: &Scope, layers: &[Layer]) {
    let (base, top) = (layers[0].digest(), layers[1].digest());
    let big = noise(1, 5_000_000);
    let all = 16 << 20;
    assert!(server.file(scope, base, "big", 0, all).await.unwrap() == big);
    for (offset, size) in
        [(0, 1), (4_999_999, 10), (16_383, 2), (3_000_000, 1_500_000), (5_000_000, 5), (u64::MAX, all)]
    {
        let start = usize::try_from(offset).unwrap().min(big.len());
        let end = big.len().min(start + usize::try_from(size).unwrap());
        assert!(server.file(scope, base, "big", offset, size).await.unwrap() == big[start..end], "{offset} {size}");
    }
    assert_eq!(server.file(scope, base, "/etc/motd", 0, 100).await.unwrap(), b"welcome");
    assert!(server.file(scope, top, "etc/motd", 0, all).await.unwrap() == noise(3, 100_000));
    assert!(server.file(scope, base, "etc/empty", 0, all).await.unwrap().is_empty());
    for (layer, path, size, expected) in [
        (base, "etc/none", 1, Code::NotFound),
        (top, "etc/gone", 1, Code::NotFound),
        (base, "etc/link", 1, Code::InvalidArgument),
        (base, "etc", 1, Code::InvalidArgument),
        (base, "big", all + 1, Code::InvalidArgument),
        (Digest::of(b"x"), "big", 1, Code::NotFound),
    ] {
        assert_eq!(code(server.file(scope, layer, path, 0, size).await), expected, "{path}");
    }
    let toc = Toc::open(rebuilt(&layers[0])).unwrap();
    let inode = toc.inode(toc.lookup_path(b"tail").unwrap().unwrap()).unwrap();
    let place = toc.file_data(&inode).unwrap();
    let request =
        ReadDataRequest { scope: Some(scope.clone()), layer: base.to_string(), offset: place.start, size: all };
    let data = collect(server.client.clone().read_data(request).await.unwrap().into_inner()).await.unwrap();
    let data: Vec<u8> = data.into_iter().flat_map(|part| part.data).collect();
    assert_eq!(data.len() as u64, toc.data_size() - place.start);
    let expected = noise(2, 20_000);
    assert!(data.starts_with(&expected) && data[expected.len()..].iter().all(|byte| *byte == 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registry_decides_who_reads() {
    let Some(registry) = Registry::start() else { return };
    let gate = Gate::start(registry.port, Some(ADA));
    let state = tempfile::tempdir().unwrap();
    let layers = sample_layers();
    let manifest = push(&registry, "team/secret", "v1", &layers);
    let server = Server::start(state.path(), ServiceOptions::default()).await;
    let name = format!("{}/team/secret", gate.host());
    assert_eq!(code(server.import(&format!("{name}:v1"), Some(basic("ada", "wrong"))).await), Code::PermissionDenied);
    server.import(&format!("{name}:v1"), Some(basic("ada", "secret"))).await.unwrap();

    let mut scope = scope(&name, manifest);
    scope.credential = Some(basic("ada", "secret"));
    server.image(&scope, &[]).await.unwrap();
    server.file(&scope, layers[0].digest(), "etc/motd", 0, 10).await.unwrap();
    let asked = gate.admitted.load(Ordering::Relaxed);
    server.image(&scope, &[]).await.unwrap();
    assert_eq!(gate.admitted.load(Ordering::Relaxed), asked, "the answer is remembered");

    for wrong in [Some(basic("ada", "wrong")), Some(basic("eve", "secret")), None] {
        scope.credential = wrong;
        assert_eq!(code(server.image(&scope, &[]).await), Code::PermissionDenied);
        let asked = gate.refused.load(Ordering::Relaxed);
        assert_eq!(code(server.file(&scope, layers[0].digest(), "etc/motd", 0, 10).await), Code::PermissionDenied);
        assert_eq!(gate.refused.load(Ordering::Relaxed), asked, "the refusal is remembered, too");
    }
    // The same image in a place where it was not imported.
    let open = self::scope(&format!("{}/team/secret", registry.host()), manifest);
    assert_eq!(code(server.image(&open, &[]).await), Code::FailedPrecondition);
    let absent = self::scope(&format!("{}/team/other", registry.host()), manifest);
    assert_eq!(code(server.image(&absent, &[]).await), Code::NotFound);
}

/// A digest is no secret: who names the blob of another but cannot show its bytes gets nothing that was made of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_known_toc_needs_proof_of_the_blob() {
    let Some(registry) = Registry::start() else { return };
    let state = tempfile::tempdir().unwrap();
    let layers = sample_layers();
    let manifest = push(&registry, "team/app", "v1", &layers);
    let liar = Gate::start_lying(registry.port, None, Some(layers[0].digest().to_string()));
    let server = Server::start(state.path(), ServiceOptions::default()).await;
    server.import(&format!("{}/team/app:v1", registry.host()), None).await.unwrap();

    let name = format!("{}/team/app", liar.host());
    assert_eq!(code(server.import(&format!("{name}:v1"), None).await), Code::DataLoss);
    assert_eq!(code(server.image(&scope(&name, manifest), &[]).await), Code::FailedPrecondition);
    let fair = scope(&format!("{}/team/app", registry.host()), manifest);
    server.image(&fair, &[]).await.unwrap();

    // Nor does the refusal tell what the blob is like.
    let mut forged = sample_layers();
    forged[0].diff_id = Digest::of(b"a guess");
    push(&registry, "team/app", "forged", &forged);
    let refused = server.import(&format!("{name}:forged"), None).await.unwrap_err();
    assert_eq!(refused.code(), Code::DataLoss);
    assert!(!refused.message().contains(&layers[0].diff_id.to_string()), "{refused}");

    // And an honest second repository is served from the TOCs that are there.
    let twin = Gate::start(registry.port, None);
    let name = format!("{}/team/app", twin.host());
    server.import(&format!("{name}:v1"), None).await.unwrap();
    server.image(&scope(&name, manifest), &[]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_cannot_stream_say_why() {
    let Some(registry) = Registry::start() else { return };
    let state = tempfile::tempdir().unwrap();
    let server = Server::start(state.path(), ServiceOptions::default()).await;
    let name = format!("{}/team/mixed", registry.host());
    // containerd would look for the compression in the bytes; here its media type is wrong.
    let mistaken = || Layer { media_type: image::ZSTD, ..Layer::gzip(&Tar::default().file("z", b"gzip").finish()) };
    let mut layers = sample_layers();
    layers.push(mistaken());
    let zstd = layers[2].digest();
    let mixed = push(&registry, "team/mixed", "mixed", &layers);
    let done = server.import(&format!("{name}:mixed"), None).await.unwrap().done.unwrap();
    assert_eq!(done.ineligible.len(), 1);
    assert_eq!(done.ineligible[0].layer, zstd.to_string());
    let (image, tocs) = server.image(&scope(&name, mixed), &[]).await.unwrap();
    assert!(image.layers[2].ineligible.contains("zstd") && image.layers[2].toc_digest.is_empty());
    assert_eq!(tocs.len(), 2);
    let error = server.file(&scope(&name, mixed), zstd, "z", 0, 1).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("zstd"), "{error}");

    let only = push(&registry, "team/mixed", "only", &[mistaken()]);
    server.import(&format!("{name}:only"), None).await.unwrap();
    let error = server.image(&scope(&name, only), &[]).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("zstd"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_contradicts_itself_is_not_imported() {
    let Some(registry) = Registry::start() else { return };
    let state = tempfile::tempdir().unwrap();
    let server = Server::start(state.path(), ServiceOptions::default()).await;
    let mut layers = sample_layers();
    layers[1].diff_id = Digest::of(b"something else");
    let manifest = push(&registry, "team/wrong", "v1", &layers);
    let name = format!("{}/team/wrong", registry.host());
    assert_eq!(code(server.import(&format!("{name}:v1"), None).await), Code::DataLoss);
    assert_eq!(code(server.image(&scope(&name, manifest), &[]).await), Code::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_leads_to_its_platforms_image() {
    let Some(registry) = Registry::start() else { return };
    let state = tempfile::tempdir().unwrap();
    let options = ServiceOptions { import_on_demand: true, ..ServiceOptions::default() };
    let server = Server::start(state.path(), options).await;
    let manifest = push(&registry, "team/multi", "single", &sample_layers());
    let index = push_index(&registry, "team/multi", "v1", manifest, 1000);
    let scope = scope(&format!("{}/team/multi", registry.host()), index);
    // Nobody imports it: the first question does.
    assert_eq!(code(server.image(&scope, &[]).await), Code::FailedPrecondition);
    let deadline = Instant::now() + Duration::from_secs(30);
    let image = loop {
        match server.image(&scope, &[]).await {
            Ok((image, _)) => break image,
            Err(status) => assert_eq!(status.code(), Code::FailedPrecondition, "{status}"),
        }
        assert!(Instant::now() < deadline, "the import on demand does not happen");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(image.manifest_digest, manifest.to_string());
    let other = Scope { platform: Some(v1::Platform { architecture: "s390x".into(), ..amd64().unwrap() }), ..scope };
    assert_eq!(code(server.image(&other, &[]).await), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_above_the_limit_are_refused() {
    let Some(registry) = Registry::start() else { return };
    let state = tempfile::tempdir().unwrap();
    let layers: Vec<Layer> = (0..40).map(|n| Layer::gzip(&Tar::default().file("f", &noise(n, 100)).finish())).collect();
    let manifest = push(&registry, "team/many", "v1", &layers);
    let scope = scope(&format!("{}/team/many", registry.host()), manifest);
    let limits = LimitOptions { requests: 2, requests_per_peer: 1 };
    let options = ServiceOptions { limits, ..ServiceOptions::default() };
    let server = Server::start(state.path(), options.clone()).await;
    server.import(&format!("{}/team/many:v1", registry.host()), None).await.unwrap();

    // In process there is no transport that takes messages before anybody reads them.
    let service = Server::service(state.path(), options);
    let request = || tonic::Request::new(GetImageRequest { scope: Some(scope.clone()), known_layers: vec![] });
    use millstream_wire::millstream::v1::images_server::Images;
    let first = service.get_image(request()).await.unwrap();
    let _second = service.get_image(request()).await.unwrap();
    assert_eq!(service.get_image(request()).await.err().unwrap().code(), Code::ResourceExhausted);
    drop(first);
    let deadline = Instant::now() + Duration::from_secs(10);
    while service.get_image(request()).await.is_err() {
        assert!(Instant::now() < deadline, "the place of a caller that left is not given back");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_and_health() {
    let state = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let (cert, key) = (state.path().join("cert.pem"), state.path().join("key.pem"));
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let tls = Some(TlsFiles { cert, key, client_ca: None });
    let listener = Listener::bind(&ListenOptions { address: "127.0.0.1:0".parse().unwrap(), tls }).unwrap();
    let port = listener.address().port();
    let (stop, stopped) = oneshot::channel::<()>();
    let service = Server::service(&state.path().join("store"), ServiceOptions::default());
    let serving = tokio::spawn(listener.serve(service, async { drop(stopped.await) }));

    let roots = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(made.cert.pem()));
    let endpoint = Endpoint::from_shared(format!("https://localhost:{port}")).unwrap().tls_config(roots).unwrap();
    let channel = endpoint.connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let request = tonic_health::pb::HealthCheckRequest { service: "millstream.v1.Images".to_owned() };
    let answer = health.check(request).await.unwrap().into_inner();
    assert_eq!(answer.status(), tonic_health::pb::health_check_response::ServingStatus::Serving);
    let empty = ImagesClient::new(channel).get_image(GetImageRequest::default()).await;
    assert_eq!(code(empty), Code::InvalidArgument);
    drop(health);
    drop(stop);
    tokio::time::timeout(Duration::from_secs(25), serving).await.expect("it ends when told").unwrap().unwrap();
}
