//! What the client makes of everything that a registry may do wrong, over real connections.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

mod server;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::TryStreamExt;
use millstream_oci::{Digest, ImageRef, ManifestDigest};
use millstream_registry::{Credential, Registry, RegistryOptions, Repository, Secret, TagOrDigest};
use millstream_source::{BlobSource, ErrorKind, Retry, SourceError};
use millstream_toc::BlobRange;
use server::{Reply, Seen, Server};

const CONTENT: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyz";

fn options() -> RegistryOptions {
    RegistryOptions {
        connect_timeout: Duration::from_millis(200),
        first_byte_timeout: Duration::from_millis(200),
        idle_timeout: Duration::from_millis(200),
        hosts_recheck: Duration::ZERO,
        ..RegistryOptions::default()
    }
}

fn registry(options: RegistryOptions) -> Registry {
    // Only the first test of a process succeeds in this; all are content.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Registry::new(options).unwrap()
}

fn repository(server: &Server, credential: Credential) -> Repository {
    let image = ImageRef::parse(&format!("{}/team/app:1", server.authority())).unwrap();
    registry(options()).repository(&image, credential)
}

fn ann() -> Credential {
    Credential::Basic { username: "ann".to_owned(), password: Secret::new("secret") }
}

/// `ann:secret`
const ANN: &str = "Basic YW5uOnNlY3JldA==";

async fn read(repository: &Repository, start: u64, end: u64) -> Result<Vec<u8>, SourceError> {
    let pieces: Vec<_> = repository.read(&Digest::of(CONTENT), BlobRange::new(start, end)).await?.try_collect().await?;
    Ok(pieces.concat())
}

fn targets(server: &Server) -> Vec<String> {
    server.seen().into_iter().map(|seen| seen.target).collect()
}

#[tokio::test]
async fn an_anonymous_probe_is_one_request() {
    let server = Server::start(|seen| Reply::part(seen, CONTENT)).await;
    repository(&server, Credential::Anonymous).probe(&Digest::of(CONTENT)).await.unwrap();
    let seen = server.seen();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].header("range"), Some("bytes=0-0"));
    assert_eq!(seen[0].target, format!("/v2/team/app/blobs/{}", Digest::of(CONTENT)));
    assert_eq!(seen[0].header("authorization"), None);
}

#[tokio::test]
async fn ranges_give_exactly_their_bytes() {
    let server = Server::start(|seen| Reply::part(seen, CONTENT)).await;
    let repository = repository(&server, Credential::Anonymous);
    for (start, end) in [(0, 1), (10, 36), (35, 36), (7, 7)] {
        let expected = &CONTENT[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()];
        assert_eq!(read(&repository, start, end).await.unwrap(), expected);
    }
    assert_eq!(server.seen().len(), 3, "an empty range asks nobody");
}

/// One row per fault: what the server does, what the caller sees.
#[tokio::test]
async fn faults_have_their_kinds() {
    type Fault = fn(&Seen) -> Reply;
    let rows: [(&str, Fault, ErrorKind, Retry); 18] = [
        ("403", |_| Reply::new(403), ErrorKind::Denied, Retry::Never),
        ("404", |_| Reply::new(404), ErrorKind::NotFound, Retry::Never),
        ("401 unchallenged", |_| Reply::new(401), ErrorKind::Unauthorized, Retry::Never),
        ("416", |_| Reply::new(416), ErrorKind::Malformed, Retry::Never),
        (
            "429",
            |_| Reply::new(429).header("retry-after", "3"),
            ErrorKind::Exhausted,
            Retry::After(Duration::from_secs(3)),
        ),
        (
            "503",
            |_| Reply::new(503).header("retry-after", "9"),
            ErrorKind::Unavailable,
            Retry::After(Duration::from_secs(9)),
        ),
        ("500", |_| Reply::new(500), ErrorKind::Unavailable, Retry::Soon),
        ("ranges ignored", |_| Reply::new(200).body(CONTENT), ErrorKind::NoRange, Retry::Never),
        ("cut body", |seen| Reply::part(seen, CONTENT).cut(3), ErrorKind::Unavailable, Retry::Soon),
        ("stalled body", |seen| Reply::part(seen, CONTENT).stall(3), ErrorKind::TimedOut, Retry::Soon),
        (
            "other range",
            |_| Reply::new(206).header("content-range", "bytes 0-9/36").body(&CONTENT[..10]),
            ErrorKind::Malformed,
            Retry::Soon,
        ),
        ("no range named", |_| Reply::new(206).body(&CONTENT[10..20]), ErrorKind::Malformed, Retry::Soon),
        (
            "shorter than announced",
            |_| Reply::new(206).header("content-range", "bytes 10-19/36").body(&CONTENT[10..15]),
            ErrorKind::Unavailable,
            Retry::Soon,
        ),
        (
            "longer than announced",
            |_| Reply::new(206).header("content-range", "bytes 10-19/36").body(&CONTENT[10..25]),
            ErrorKind::Malformed,
            Retry::Soon,
        ),
        (
            "longer, without a length",
            |_| Reply::new(206).header("content-range", "bytes 10-19/36").body(&CONTENT[10..25]).without_length(),
            ErrorKind::Malformed,
            Retry::Soon,
        ),
        (
            "shorter, without a length",
            |_| Reply::new(206).header("content-range", "bytes 10-19/36").body(&CONTENT[10..15]).without_length(),
            ErrorKind::Unavailable,
            Retry::Soon,
        ),
        (
            "compressed",
            |seen| Reply::part(seen, CONTENT).header("content-encoding", "gzip"),
            ErrorKind::Malformed,
            Retry::Never,
        ),
        (
            "redirects in a circle",
            |seen| Reply::new(307).header("location", seen.target.clone()),
            ErrorKind::Malformed,
            Retry::Never,
        ),
    ];
    for (name, fault, kind, retry) in rows {
        let server = Server::start(fault).await;
        let error = read(&repository(&server, Credential::Anonymous), 10, 20).await.unwrap_err();
        assert_eq!((error.kind, error.retry), (kind, retry), "{name}: {error}");
    }
}

#[tokio::test]
async fn a_body_that_dribbles_has_its_bound() {
    let server = Server::start(|_| Reply::new(500).body(vec![b' '; 50_000]).dribble(Duration::from_millis(100))).await;
    let repository = repository(&server, Credential::Anonymous);
    let asked = read(&repository, 0, 3);
    let error = tokio::time::timeout(Duration::from_secs(30), asked).await.expect("an hour and a half").unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable);
}

#[tokio::test]
async fn nobody_there_is_unavailable() {
    let server = Server::start(|_| Reply::new(500)).await;
    let repository = repository(&server, Credential::Anonymous);
    drop(server);
    tokio::task::yield_now().await;
    assert_eq!(read(&repository, 0, 1).await.unwrap_err().kind, ErrorKind::Unavailable);
}

#[tokio::test]
async fn basic_is_sent_when_asked_for_and_remembered() {
    let server = Server::start(|seen| match seen.header("authorization") {
        Some(ANN) => Reply::part(seen, CONTENT),
        _ => Reply::new(401).header("www-authenticate", "Basic realm=\"r\""),
    })
    .await;
    let repository = repository(&server, ann());
    assert_eq!(read(&repository, 0, 3).await.unwrap(), b"012");
    assert_eq!(read(&repository, 3, 6).await.unwrap(), b"345");
    assert_eq!(server.seen().len(), 3, "one challenge for two reads");
    let error = read(&self::repository(&server, Credential::Anonymous), 0, 3).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unauthorized);
}

#[tokio::test]
async fn refused_passwords_are_tried_once() {
    let server = Server::start(|_| Reply::new(401).header("www-authenticate", "Basic realm=\"r\"")).await;
    let error = read(&repository(&server, ann()), 0, 3).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unauthorized);
    assert_eq!(server.seen().len(), 2);
    assert!(!error.message.contains("secret"), "{error}");
}

/// A registry that takes only the latest of the tokens that its own token server gave out.
async fn token_registry() -> (Server, Arc<AtomicUsize>) {
    let current = Arc::new(AtomicUsize::new(0));
    let latest = Arc::clone(&current);
    let server = Server::start(move |seen| {
        if seen.target.starts_with("/token") {
            let number = latest.fetch_add(1, Ordering::SeqCst) + 1;
            return Reply::new(200).body(format!(r#"{{"token":"t{number}","access_token":"x","expires_in":300}}"#));
        }
        let expected = format!("Bearer t{}", latest.load(Ordering::SeqCst));
        if seen.header("authorization") == Some(&expected) {
            return Reply::part(seen, CONTENT);
        }
        let challenge = format!("Bearer realm=\"http://{}/token\",service=\"reg\"", seen.header("host").unwrap());
        Reply::new(401).header("www-authenticate", challenge)
    })
    .await;
    (server, current)
}

#[tokio::test]
async fn a_token_is_fetched_once_and_renewed_when_refused() {
    let (server, current) = token_registry().await;
    let repository = repository(&server, ann());
    assert_eq!(read(&repository, 0, 3).await.unwrap(), b"012");
    assert_eq!(read(&repository, 3, 6).await.unwrap(), b"345");
    assert_eq!(current.load(Ordering::SeqCst), 1);
    let asked: Vec<Seen> = server.seen().into_iter().filter(|seen| seen.target.starts_with("/token")).collect();
    assert_eq!(asked[0].target, "/token?service=reg&scope=repository%3Ateam%2Fapp%3Apull");
    assert_eq!(asked[0].header("authorization"), Some(ANN));
    // The registry forgets the token.
    current.store(7, Ordering::SeqCst);
    assert_eq!(read(&repository, 0, 3).await.unwrap(), b"012");
    assert_eq!(current.load(Ordering::SeqCst), 8);
}

#[tokio::test]
async fn many_challenged_readers_fetch_one_token() {
    let (server, current) = token_registry().await;
    let repository = repository(&server, Credential::Anonymous);
    let reads = futures::future::join_all((0..6).map(|_| read(&repository, 0, 3))).await;
    assert!(reads.into_iter().all(|read| read.unwrap() == b"012"));
    assert_eq!(current.load(Ordering::SeqCst), 1);
    let token = server.seen().into_iter().find(|seen| seen.target.starts_with("/token")).unwrap();
    assert_eq!(token.header("authorization"), None);
}

#[tokio::test]
async fn tokens_belong_to_one_credential() {
    let (server, current) = token_registry().await;
    let image = ImageRef::parse(&format!("{}/team/app", server.authority())).unwrap();
    let registry = registry(options());
    read(&registry.repository(&image, ann()), 0, 1).await.unwrap();
    // The same credential shares its token across repositories' objects, another one does not.
    read(&registry.repository(&image, ann()), 0, 1).await.unwrap();
    assert_eq!(current.load(Ordering::SeqCst), 1);
    read(&registry.repository(&image, Credential::Anonymous), 0, 1).await.unwrap();
    assert_eq!(current.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_redirect_to_another_port_gets_no_credentials() {
    let storage = Server::start(|seen| Reply::part(seen, CONTENT)).await;
    let target = storage.url("/signed?X-Signature=planted");
    let server = Server::start(move |seen| match seen.header("authorization") {
        Some(ANN) => Reply::new(307).header("location", target.clone()).body("moved"),
        _ => Reply::new(401).header("www-authenticate", "Basic realm=\"r\""),
    })
    .await;
    let repository = repository(&server, ann());
    assert_eq!(read(&repository, 5, 9).await.unwrap(), b"5678");
    assert_eq!(read(&repository, 9, 10).await.unwrap(), b"9");
    assert_eq!(storage.seen().len(), 2);
    assert!(storage.seen().iter().all(|seen| seen.header("authorization").is_none()));
    assert_eq!(server.seen().len(), 2, "the second read goes straight to the storage");
}

#[tokio::test]
async fn a_401_behind_a_redirect_is_no_challenge() {
    let challenge = |_: &Seen| Reply::new(401).header("www-authenticate", "Basic realm=\"gimme\"");
    let storage = Server::start(challenge).await;
    let target = storage.url("/blob?X-Signature=planted");
    let server = Server::start(move |_| Reply::new(307).header("location", target.clone())).await;
    let error = read(&repository(&server, ann()), 0, 3).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
    assert!(!error.message.contains("planted"), "{error}");
    assert!(storage.seen().iter().all(|seen| seen.header("authorization").is_none()));
    assert!(server.seen().iter().all(|seen| seen.header("authorization").is_none()));
}

#[tokio::test]
async fn an_expired_redirect_is_resolved_again() {
    let valid = Arc::new(Mutex::new("one"));
    let (at_storage, at_registry) = (Arc::clone(&valid), Arc::clone(&valid));
    let storage = Server::start(move |seen| {
        let fresh = seen.target == format!("/{}", at_storage.lock().unwrap());
        if fresh { Reply::part(seen, CONTENT) } else { Reply::new(403) }
    })
    .await;
    let base = storage.url("");
    let server =
        Server::start(move |_| Reply::new(302).header("location", format!("{base}/{}", at_registry.lock().unwrap())))
            .await;
    let repository = repository(&server, Credential::Anonymous);
    assert_eq!(read(&repository, 0, 2).await.unwrap(), b"01");
    *valid.lock().unwrap() = "two";
    assert_eq!(read(&repository, 2, 4).await.unwrap(), b"23");
    assert_eq!(targets(&storage), ["/one", "/one", "/two"]);
    repository.probe(&Digest::of(CONTENT)).await.unwrap();
    assert_eq!(server.seen().len(), 3, "a probe always asks the registry");
}

#[tokio::test]
async fn documents_and_blobs_are_verified() {
    let server = Server::start(|seen| match seen.target.as_str() {
        "/v2/team/app/manifests/1" => Reply::new(200).header("content-type", "text/x").body("manifest"),
        target if target.ends_with(&Digest::of(b"manifest").to_string()) => Reply::new(200).body("manifest"),
        _ => Reply::new(200).body("forged"),
    })
    .await;
    let repository = repository(&server, Credential::Anonymous);
    let fetched = repository.document(TagOrDigest::Tag("1".into())).await.unwrap();
    assert_eq!(fetched.digest, ManifestDigest(Digest::of(b"manifest")));
    assert_eq!(fetched.content_type.as_deref(), Some("text/x"));
    repository.document(TagOrDigest::Digest(fetched.digest)).await.unwrap();
    let other = ManifestDigest(Digest::of(b"other"));
    let error = repository.document(TagOrDigest::Digest(other)).await.unwrap_err();
    assert_eq!((error.kind, error.retry), (ErrorKind::DigestMismatch, Retry::Never));
    assert_eq!(&repository.blob(&Digest::of(b"manifest"), 8).await.unwrap()[..], b"manifest");
    assert_eq!(repository.blob(&Digest::of(b"manifest"), 7).await.unwrap_err().kind, ErrorKind::Malformed);
    assert_eq!(repository.blob(&other.0, 100).await.unwrap_err().kind, ErrorKind::DigestMismatch);
}

#[tokio::test]
async fn a_host_that_knows_no_head_is_asked_with_get() {
    for status in [405, 501] {
        let server = Server::start(move |seen| Reply::new(if seen.method == "HEAD" { status } else { 200 })).await;
        let manifest = ManifestDigest(Digest::of(b"m"));
        repository(&server, Credential::Anonymous).check_access(&manifest).await.unwrap();
        let methods: Vec<String> = server.seen().into_iter().map(|seen| seen.method).collect();
        assert_eq!(methods, ["HEAD", "GET"], "{status}");
    }
}

#[tokio::test]
async fn a_pause_that_is_asked_for_is_kept_by_all_and_the_next_host_serves_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let busy = Server::start(|_| Reply::new(429).header("retry-after", "60")).await;
    let origin = Server::start(|seen| Reply::part(seen, CONTENT)).await;
    let options = RegistryOptions { hosts_dir: Some(dir.path().to_owned()), ..options() };
    let registry = registry(options);
    let image = ImageRef::parse("r.example/team/app").unwrap();
    write_hosts(dir.path(), "r.example", &format!("server = \"{}\"", busy.url("")));
    for _ in 0..3 {
        let error = read(&registry.repository(&image, Credential::Anonymous), 0, 2).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Exhausted, "{error}");
        assert!(matches!(error.retry, Retry::After(wait) if wait > Duration::from_secs(50)), "{error:?}");
    }
    assert_eq!(busy.seen().len(), 1, "it has said when it wants to be asked again");
    let text = format!("server = \"{}\"\n[host.\"{}\"]\n", origin.url(""), busy.url(""));
    write_hosts(dir.path(), "r.example", &text);
    assert_eq!(read(&registry.repository(&image, Credential::Anonymous), 0, 2).await.unwrap(), b"01");
    // What one caller has used up is no other's concern.
    assert_eq!(read(&registry.repository(&image, ann()), 0, 2).await.unwrap(), b"01");
    assert_eq!(busy.seen().len(), 2);
}

#[tokio::test]
async fn check_access_is_one_head() {
    let server = Server::start(|_| Reply::new(200)).await;
    let manifest = ManifestDigest(Digest::of(b"m"));
    repository(&server, Credential::Anonymous).check_access(&manifest).await.unwrap();
    let seen = server.seen();
    assert_eq!((seen.len(), seen[0].method.as_str()), (1, "HEAD"));
    assert_eq!(seen[0].target, format!("/v2/team/app/manifests/{manifest}"));
}

fn write_hosts(dir: &Path, registry: &str, text: &str) {
    let dir = dir.join(registry);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("hosts.toml"), text).unwrap();
}

#[tokio::test]
async fn mirrors_are_asked_first_and_changes_need_no_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mirror = Server::start(|seen| Reply::part(seen, CONTENT)).await;
    let origin = Server::start(|seen| Reply::part(seen, CONTENT)).await;
    let origin_url = origin.url("");
    write_hosts(
        dir.path(),
        "r.example",
        &format!(
            "server = \"{origin_url}\"\n[host.\"{}\"]\n[host.\"{}\".header]\nx-team = \"blue\"",
            mirror.url(""),
            mirror.url("")
        ),
    );
    let options = RegistryOptions { hosts_dir: Some(dir.path().to_owned()), ..options() };
    let image = ImageRef::parse("r.example/team/app").unwrap();
    let repository = registry(options).repository(&image, Credential::Anonymous);
    read(&repository, 0, 1).await.unwrap();
    assert_eq!(targets(&mirror), [format!("/v2/team/app/blobs/{}?ns=r.example", Digest::of(CONTENT))]);
    assert_eq!(mirror.seen()[0].header("x-team"), Some("blue"));
    assert!(origin.seen().is_empty());

    write_hosts(dir.path(), "r.example", &format!("server = \"{origin_url}\""));
    read(&repository, 0, 1).await.unwrap();
    assert_eq!((mirror.seen().len(), origin.seen().len()), (1, 1));
}

#[tokio::test]
async fn the_next_host_serves_what_the_first_cannot() {
    let dir = tempfile::tempdir().unwrap();
    for status in [401, 403, 404, 500] {
        let mirror = Server::start(move |_| Reply::new(status)).await;
        let origin = Server::start(|seen| Reply::part(seen, CONTENT)).await;
        let text = format!("server = \"{}\"\n[host.\"{}\"]\n", origin.url(""), mirror.url(""));
        write_hosts(dir.path(), "r.example", &text);
        let options = RegistryOptions { hosts_dir: Some(dir.path().to_owned()), ..options() };
        let image = ImageRef::parse("r.example/team/app").unwrap();
        let repository = registry(options).repository(&image, Credential::Anonymous);
        assert_eq!(read(&repository, 0, 2).await.unwrap(), b"01");
        assert_eq!(read(&repository, 0, 2).await.unwrap(), b"01");
        assert_eq!(mirror.seen().len(), 1, "{status}: where the blob was found is asked first");
    }
}

#[tokio::test]
async fn our_own_mirror_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Server::start(|_| Reply::new(500)).await;
    let origin = Server::start(|seen| Reply::part(seen, CONTENT)).await;
    let text = format!("server = \"{}\"\n[host.\"{}\"]\n", origin.url(""), ours.url(""));
    write_hosts(dir.path(), "_default", &text);
    let options =
        RegistryOptions { hosts_dir: Some(dir.path().to_owned()), ignored_hosts: vec![ours.authority()], ..options() };
    let image = ImageRef::parse("r.example/team/app").unwrap();
    read(&registry(options).repository(&image, Credential::Anonymous), 0, 2).await.unwrap();
    assert!(ours.seen().is_empty());
}

#[tokio::test]
async fn bodies_under_way_are_bounded() {
    let server = Server::start(|seen| Reply::part(seen, CONTENT)).await;
    let options =
        RegistryOptions { max_connections_per_host: 1, queue_timeout: Duration::from_millis(50), ..options() };
    let image = ImageRef::parse(&format!("{}/team/app", server.authority())).unwrap();
    let repository = registry(options).repository(&image, Credential::Anonymous);
    let held = repository.read(&Digest::of(CONTENT), BlobRange::new(0, 9)).await.unwrap();
    assert_eq!(read(&repository, 0, 1).await.unwrap_err().kind, ErrorKind::TimedOut);
    drop(held);
    read(&repository, 0, 1).await.unwrap();
}
