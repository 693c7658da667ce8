//! What the client makes of TLS: whom it trusts, what it shows, and where it refuses to go on in the clear.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

mod server;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::TryStreamExt;
use millstream_oci::{Digest, ImageRef};
use millstream_registry::{Credential, Registry, RegistryOptions, Repository, Secret};
use millstream_source::{BlobSource, ErrorKind, SourceError};
use millstream_toc::BlobRange;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use server::{Reply, Server};
use tempfile::TempDir;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

const CONTENT: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyz";
/// `ann:secret`
const ANN: &str = "Basic YW5uOnNlY3JldA==";

/// A certificate authority.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate and its key, as PEM.
struct Identity {
    certificate: String,
    key: String,
}

impl Authority {
    fn new() -> Self {
        // Only the first test of a process succeeds in this; all are content.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    fn sign(&self, change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        Identity { certificate, key: key.serialize_pem() }
    }

    /// A server of `localhost` that this authority vouches for.
    fn server(&self) -> ServerConfig {
        self.sign(|_| ()).server()
    }
}

impl Identity {
    fn parts(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let certificate = CertificateDer::from_pem_slice(self.certificate.as_bytes()).unwrap();
        (vec![certificate], PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap())
    }

    fn server(&self) -> ServerConfig {
        let (certificates, key) = self.parts();
        ServerConfig::builder().with_no_client_auth().with_single_cert(certificates, key).unwrap()
    }
}

/// A directory of hosts whose `r.example` is `server`, with `more` in its `hosts.toml`, and `files` beside that.
fn hosts(server: &Server, more: &str, files: &[(&str, &str)]) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("r.example");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("hosts.toml"), format!("server = \"{}\"\n{more}", server.tls_url(""))).unwrap();
    for (name, text) in files {
        std::fs::write(dir.join(name), text).unwrap();
    }
    root
}

fn repository(hosts: &Path, credential: Credential) -> Repository {
    let options = RegistryOptions {
        hosts_dir: Some(hosts.to_owned()),
        connect_timeout: Duration::from_secs(5),
        first_byte_timeout: Duration::from_secs(5),
        hosts_recheck: Duration::ZERO,
        ..RegistryOptions::default()
    };
    let image = ImageRef::parse("r.example/team/app:1").unwrap();
    Registry::new(options).unwrap().repository(&image, credential)
}

fn ann() -> Credential {
    Credential::Basic { username: "ann".to_owned(), password: Secret::new("secret") }
}

async fn read(repository: &Repository) -> Result<Vec<u8>, SourceError> {
    let pieces: Vec<_> = repository.read(&Digest::of(CONTENT), BlobRange::new(3, 7)).await?.try_collect().await?;
    Ok(pieces.concat())
}

#[tokio::test]
async fn the_configured_authority_is_trusted_and_no_other() {
    let (ours, other) = (Authority::new(), Authority::new());
    let server = Server::start_tls(ours.server(), |seen| Reply::part(seen, CONTENT)).await;
    let ca = "ca = \"ca.pem\"";
    for (more, file) in [("", ""), (ca, other.pem.as_str())] {
        let hosts = hosts(&server, more, &[("ca.pem", file)]);
        let error = read(&repository(hosts.path(), ann())).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
        assert!(error.message.contains("certificate"), "{error}");
    }
    assert!(server.seen().is_empty(), "nothing is told to a server that nobody vouches for");

    let hosts = hosts(&server, ca, &[("ca.pem", &ours.pem)]);
    assert_eq!(read(&repository(hosts.path(), Credential::Anonymous)).await.unwrap(), b"3456");
}

#[tokio::test]
async fn a_certificate_of_another_host_or_time_is_refused() {
    let ours = Authority::new();
    let elsewhere = ours.sign(|params| {
        params.subject_alt_names =
            CertificateParams::new(vec!["elsewhere.example".to_owned()]).unwrap().subject_alt_names;
    });
    let expired = ours.sign(|params| {
        params.not_before = rcgen::date_time_ymd(2019, 1, 1);
        params.not_after = rcgen::date_time_ymd(2020, 1, 1);
    });
    for identity in [elsewhere, expired] {
        let server = Server::start_tls(identity.server(), |seen| Reply::part(seen, CONTENT)).await;
        let trusting = hosts(&server, "ca = \"ca.pem\"", &[("ca.pem", &ours.pem)]);
        let error = read(&repository(trusting.path(), ann())).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
        assert!(server.seen().is_empty());
        let careless = hosts(&server, "skip_verify = true", &[]);
        assert_eq!(read(&repository(careless.path(), Credential::Anonymous)).await.unwrap(), b"3456");
    }
}

#[tokio::test]
async fn a_renewed_authority_needs_no_restart() {
    let (ours, other) = (Authority::new(), Authority::new());
    let server = Server::start_tls(ours.server(), |seen| Reply::part(seen, CONTENT)).await;
    let hosts = hosts(&server, "ca = \"ca.pem\"", &[("ca.pem", &other.pem)]);
    let repository = repository(hosts.path(), Credential::Anonymous);
    read(&repository).await.unwrap_err();
    // Of another length, whatever the clock of the file system shows.
    std::fs::write(hosts.path().join("r.example/ca.pem"), format!("{}\n\n", ours.pem)).unwrap();
    assert_eq!(read(&repository).await.unwrap(), b"3456");
}

#[tokio::test]
async fn client_certificates_are_shown() {
    let ours = Authority::new();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ours.pem.as_bytes()).unwrap()).unwrap();
    let (certificates, key) = ours.sign(|_| ()).parts();
    let tls = ServerConfig::builder()
        .with_client_cert_verifier(WebPkiClientVerifier::builder(Arc::new(roots)).build().unwrap())
        .with_single_cert(certificates, key)
        .unwrap();
    let server = Server::start_tls(tls, |seen| Reply::part(seen, CONTENT)).await;
    let client = ours.sign(|_| ());
    let files = [("ca.pem", ours.pem.as_str()), ("client.pem", &client.certificate), ("client.key", &client.key)];
    let without = hosts(&server, "ca = \"ca.pem\"", &files);
    read(&repository(without.path(), Credential::Anonymous)).await.unwrap_err();
    assert!(server.seen().is_empty());
    let with = hosts(&server, "ca = \"ca.pem\"\nclient = [[\"client.pem\", \"client.key\"]]", &files);
    assert_eq!(read(&repository(with.path(), Credential::Anonymous)).await.unwrap(), b"3456");
}

/// A registry over TLS that takes `t1`, which the token server at the address in the cell gives out.
async fn token_registry(ours: &Authority) -> (Server, Arc<Mutex<String>>) {
    let realm = Arc::new(Mutex::new(String::new()));
    let named = Arc::clone(&realm);
    let server = Server::start_tls(ours.server(), move |seen| match seen.header("authorization") {
        Some("Bearer t1") => Reply::part(seen, CONTENT),
        _ => {
            let challenge = format!("Bearer realm=\"{}\",service=\"reg\"", named.lock().unwrap());
            Reply::new(401).header("www-authenticate", challenge)
        }
    })
    .await;
    (server, realm)
}

#[tokio::test]
async fn a_token_server_is_asked_over_tls_only() {
    let ours = Authority::new();
    let (server, realm) = token_registry(&ours).await;
    let hosts = hosts(&server, "ca = \"ca.pem\"", &[("ca.pem", &ours.pem)]);

    let plain = Server::start(|_| Reply::new(200).body("{\"token\":\"t1\"}")).await;
    for address in [plain.url("/token"), format!("https://ann:secret@{}/token", plain.authority())] {
        *realm.lock().unwrap() = address;
        let error = read(&repository(hosts.path(), ann())).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unauthorized, "{error}");
        assert!(!error.message.contains("secret"), "{error}");
    }
    assert!(plain.seen().is_empty(), "a password must not travel in the clear");

    let tokens = Server::start_tls(ours.server(), |_| Reply::new(200).body("{\"token\":\"t1\"}")).await;
    *realm.lock().unwrap() = tokens.tls_url("/token");
    assert_eq!(read(&repository(hosts.path(), ann())).await.unwrap(), b"3456");
    assert_eq!(tokens.seen()[0].header("authorization"), Some(ANN));
    assert!(server.seen().iter().all(|seen| seen.header("authorization") != Some(ANN)));
}

#[tokio::test]
async fn a_token_server_cannot_send_the_password_on() {
    let ours = Authority::new();
    let (server, realm) = token_registry(&ours).await;
    let hosts = hosts(&server, "ca = \"ca.pem\"", &[("ca.pem", &ours.pem)]);
    let capture = Server::start_tls(ours.server(), |_| Reply::new(200).body("{\"token\":\"t1\"}")).await;
    let target = capture.tls_url("/stolen");
    let tokens = Server::start_tls(ours.server(), move |_| Reply::new(307).header("location", target.clone())).await;
    *realm.lock().unwrap() = tokens.tls_url("/token");
    assert_eq!(read(&repository(hosts.path(), ann())).await.unwrap(), b"3456");
    assert_eq!(capture.seen().len(), 1);
    assert_eq!(capture.seen()[0].header("authorization"), None);
}

#[tokio::test]
async fn a_redirect_from_https_to_http_is_refused() {
    let ours = Authority::new();
    let plain = Server::start(|seen| Reply::part(seen, CONTENT)).await;
    let target = plain.url("/blob?X-Signature=planted");
    let server = Server::start_tls(ours.server(), move |seen| match seen.header("authorization") {
        Some(ANN) => Reply::new(307).header("location", target.clone()),
        _ => Reply::new(401).header("www-authenticate", "Basic realm=\"r\""),
    })
    .await;
    let hosts = hosts(&server, "ca = \"ca.pem\"", &[("ca.pem", &ours.pem)]);
    let error = read(&repository(hosts.path(), ann())).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Malformed, "{error}");
    assert!(error.message.contains("plain http") && !error.message.contains("planted"), "{error}");
    assert!(plain.seen().is_empty());
}

#[tokio::test]
async fn a_redirect_to_another_tls_server_gets_neither_credentials_nor_headers() {
    let ours = Authority::new();
    let storage = Server::start_tls(ours.server(), |seen| Reply::part(seen, CONTENT)).await;
    let target = storage.tls_url("/signed");
    let server = Server::start_tls(ours.server(), move |seen| match seen.header("authorization") {
        Some(ANN) => Reply::new(307).header("location", target.clone()),
        _ => Reply::new(401).header("www-authenticate", "Basic realm=\"r\""),
    })
    .await;
    let more = "ca = \"ca.pem\"\n[header]\nx-team = \"blue\"";
    let hosts = hosts(&server, more, &[("ca.pem", &ours.pem)]);
    assert_eq!(read(&repository(hosts.path(), ann())).await.unwrap(), b"3456");
    assert!(server.seen().iter().all(|seen| seen.header("x-team") == Some("blue")));
    assert_eq!(storage.seen().len(), 1);
    assert!(
        storage.seen().iter().all(|seen| { seen.header("authorization").is_none() && seen.header("x-team").is_none() })
    );
}
