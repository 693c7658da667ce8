//! Debian's `docker-registry` on an address of ours, with or without TLS and a login.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::Value;

use crate::daemons::listens;
use crate::image::manifest_of;
use crate::link::Link;
use crate::need::program;
use crate::process::{Process, output};
use crate::workdir::Workdir;

const READY: Duration = Duration::from_secs(15);

/// User name and password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// The name.
    pub user: String,
    /// The password.
    pub password: String,
}

/// A server certificate with the authority that signed it, as PEM files.
#[derive(Debug, Clone)]
pub struct Tls {
    /// Certificate of the authority: what a client must trust.
    pub ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

impl Tls {
    /// Makes an authority and a certificate for these names and addresses, in `dir`.
    ///
    /// # Errors
    ///
    /// If a name is not acceptable or a file cannot be written.
    pub fn generate(dir: &Path, names: &[&str]) -> Result<Self> {
        let mut ca_params = CertificateParams::new(Vec::<String>::new())?;
        ca_params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_key = KeyPair::generate()?;
        let ca_cert = ca_params.self_signed(&ca_key)?;
        let issuer = Issuer::new(ca_params, ca_key);
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let key = KeyPair::generate()?;
        let cert = CertificateParams::new(names)?.signed_by(&key, &issuer)?;
        std::fs::create_dir_all(dir)?;
        let tls = Self { ca: dir.join("ca.crt"), cert: dir.join("server.crt"), key: dir.join("server.key") };
        std::fs::write(&tls.ca, ca_cert.pem())?;
        std::fs::write(&tls.cert, cert.pem())?;
        std::fs::write(&tls.key, key.serialize_pem())?;
        Ok(tls)
    }

    /// The server's certificate and key, as PEM files.
    pub fn server(&self) -> (&Path, &Path) {
        (&self.cert, &self.key)
    }
}

/// What kind of registry to start.
#[derive(Debug, Clone)]
pub struct RegistryOptions {
    /// Where it listens. Port 0 is not possible: the program does not say what it got.
    pub address: SocketAddr,
    /// TLS; absent: plain HTTP.
    pub tls: Option<Tls>,
    /// Absent: everybody may read and write.
    pub login: Option<Login>,
}

impl RegistryOptions {
    /// Plain HTTP, no login, on a free port of the loopback interface.
    ///
    /// # Errors
    ///
    /// If no port is free.
    pub fn loopback() -> Result<Self> {
        Ok(Self { address: free_address()?, tls: None, login: None })
    }
}

/// An address of the loopback interface that was free a moment ago.
///
/// # Errors
///
/// If no port is free.
pub fn free_address() -> Result<SocketAddr> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").context("looking for a free port")?;
    Ok(listener.local_addr()?)
}

/// A running registry. Its storage is in the workdir and survives [`Registry::stop`].
#[derive(Debug)]
pub struct Registry {
    options: RegistryOptions,
    /// Where its content is.
    storage: PathBuf,
    /// What clients call, where it is not the address itself (a proxy in between).
    public: SocketAddr,
    process: Process,
}

impl Registry {
    /// Starts it in the network of the caller and waits until it accepts connections.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn start(work: &Workdir, options: RegistryOptions) -> Result<Self> {
        let public = options.address;
        Self::launch(work, options, public, None, None)
    }

    /// The same with its storage elsewhere, where it outlives the workdir.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn start_stored(work: &Workdir, options: RegistryOptions, storage: &Path) -> Result<Self> {
        let public = options.address;
        Self::launch(work, options, public, None, Some(storage))
    }

    /// Starts it on the far side of a link; clients reach it at `public`, through the link's delay proxy.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn start_behind(work: &Workdir, options: RegistryOptions, public: SocketAddr, link: &Link) -> Result<Self> {
        Self::launch(work, options, public, Some(link), None)
    }

    /// The same with its storage elsewhere.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn start_stored_behind(
        work: &Workdir,
        options: RegistryOptions,
        public: SocketAddr,
        link: &Link,
        storage: &Path,
    ) -> Result<Self> {
        Self::launch(work, options, public, Some(link), Some(storage))
    }

    fn launch(
        work: &Workdir,
        options: RegistryOptions,
        public: SocketAddr,
        link: Option<&Link>,
        storage: Option<&Path>,
    ) -> Result<Self> {
        let name = format!("registry-{}", options.address.port());
        let dir = work.dir(&name)?;
        let storage = storage.map_or_else(|| dir.join("data"), Path::to_owned);
        let config = dir.join("config.yml");
        std::fs::write(&config, config_text(&dir, &storage, &options)?)?;
        let program = program("docker-registry").context("docker-registry is not installed")?;
        let mut command = link.map_or_else(|| Command::new(&program), |link| link.command(&program));
        command.arg("serve").arg(&config);
        let mut process = Process::spawn(&name, command, &work.log(&name))?;
        if link.is_some() {
            // Its port is in the other network.
            let (id, port) = (process.id(), options.address.port());
            process.wait_ready(READY, || listens(id, port))?;
        } else {
            process.wait_ready(READY, || TcpStream::connect(options.address).is_ok())?;
        }
        Ok(Self { options, storage, public, process })
    }

    /// `host:port`, the first part of the references of its images.
    pub fn host(&self) -> String {
        self.public.to_string()
    }

    /// The address that clients call.
    pub fn address(&self) -> SocketAddr {
        self.public
    }

    /// Its authority's certificate, if it speaks TLS.
    pub fn ca(&self) -> Option<&Path> {
        self.options.tls.as_ref().map(|tls| tls.ca.as_path())
    }

    /// The whole reference of an image of this registry.
    pub fn reference(&self, name_and_tag: &str) -> String {
        format!("{}/{name_and_tag}", self.host())
    }

    /// Copies the image with this tag of an OCI layout to `repository:tag`, byte for byte. An image, not an image index.
    ///
    /// # Errors
    ///
    /// If the layout has no such image, or `skopeo` fails.
    pub fn push(&self, layout: &Path, tag: &str, name_and_tag: &str) -> Result<()> {
        let mut command = Command::new("skopeo");
        command.args(["--insecure-policy", "copy", "--quiet", "--preserve-digests"]);
        command.arg("--dest-tls-verify=false");
        if let Some(login) = &self.options.login {
            command.arg(format!("--dest-creds={}:{}", login.user, login.password));
        }
        let source = tempfile::tempdir_in(layout)?;
        plain_directory(layout, tag, source.path())?;
        command.arg(format!("dir:{}", source.path().display()));
        command.arg(format!("docker://{}", self.reference(name_and_tag)));
        output(&mut command).map(drop)
    }

    /// Puts the one image index of an OCI layout, and all that it names, into the storage as `repository:tag`. No program is asked:
    /// skopeo takes an index of what it does not know for another kind.
    ///
    /// # Errors
    ///
    /// If a file cannot be read or written.
    pub fn place_index(&self, layout: &Path, name_and_tag: &str) -> Result<()> {
        let (name, tag) = name_and_tag.rsplit_once(':').context("a name without a tag")?;
        let index = manifest_of(layout, "")?;
        let file = layout.join("blobs/sha256").join(index.trim_start_matches("sha256:"));
        let content: Value = serde_json::from_slice(&std::fs::read(&file)?)?;
        let named = content["manifests"].as_array().into_iter().flatten().filter_map(|one| one["digest"].as_str());
        let manifests: Vec<&str> = named.chain([index.as_str()]).collect();
        self.place(layout, name, &manifests)?;
        let repository = self.storage.join("docker/registry/v2/repositories").join(name);
        let tagged = repository.join("_manifests/tags").join(tag).join("current");
        std::fs::create_dir_all(&tagged)?;
        Ok(std::fs::write(tagged.join("link"), &index)?)
    }

    /// Whether this name has this manifest.
    pub fn has(&self, name_and_tag: &str, manifest: &str) -> bool {
        let Some((name, tag)) = name_and_tag.rsplit_once(':') else { return false };
        let repositories = self.storage.join("docker/registry/v2/repositories");
        let link = repositories.join(name).join("_manifests/tags").join(tag).join("current/link");
        std::fs::read_to_string(link).is_ok_and(|digest| digest.trim() == manifest)
    }

    /// Puts all blobs of an OCI layout into a repository, and the manifests among them by their digests. It writes into the
    /// registry's storage: of many images a push costs seconds.
    ///
    /// # Errors
    ///
    /// If a file cannot be written.
    pub fn place(&self, layout: &Path, repository: &str, manifests: &[&str]) -> Result<()> {
        let storage = self.storage.join("docker/registry/v2");
        let repository = storage.join("repositories").join(repository);
        let link = |at: PathBuf, hex: &str| -> Result<()> {
            std::fs::create_dir_all(&at)?;
            Ok(std::fs::write(at.join("link"), format!("sha256:{hex}"))?)
        };
        for entry in std::fs::read_dir(layout.join("blobs/sha256"))? {
            let entry = entry?;
            let name = entry.file_name();
            let hex = name.to_str().context("name of a blob")?;
            let blob = storage.join("blobs/sha256").join(&hex[..2]).join(hex);
            std::fs::create_dir_all(&blob)?;
            if !blob.join("data").exists() {
                std::fs::copy(entry.path(), blob.join("data"))?;
            }
            link(repository.join("_layers/sha256").join(hex), hex)?;
        }
        for hex in manifests.iter().filter_map(|digest| digest.strip_prefix("sha256:")) {
            link(repository.join("_manifests/revisions/sha256").join(hex), hex)?;
        }
        Ok(())
    }

    /// Deletes a manifest or a blob of a repository, as its owner may at any time.
    ///
    /// # Errors
    ///
    /// If the registry refuses.
    pub fn delete(&self, repository: &str, kind: &str, digest: &str) -> Result<()> {
        let mut stream = TcpStream::connect(self.public)?;
        stream.set_read_timeout(Some(READY))?;
        let path = format!("/v2/{repository}/{kind}/{digest}");
        write!(stream, "DELETE {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.public)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 202"), "deleting {path}: {answer}");
        Ok(())
    }

    /// Writes the `hosts.toml` of this registry into a certs.d directory, as containerd and millstreamd read it.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn write_hosts(&self, certs_d: &Path) -> Result<()> {
        let scheme = if self.options.tls.is_some() { "https" } else { "http" };
        let url = format!("{scheme}://{}", self.host());
        let mut text = format!("server = {url:?}\n\n[host.{url:?}]\n  capabilities = [\"pull\", \"resolve\"]\n");
        if let Some(ca) = self.ca() {
            writeln!(text, "  ca = {:?}", ca.display().to_string())?;
        }
        let dir = certs_d.join(self.host());
        std::fs::create_dir_all(&dir)?;
        std::fs::write(dir.join("hosts.toml"), text).with_context(|| format!("writing {}", dir.display()))
    }

    /// The requests that it has answered, oldest first: method, path and status.
    ///
    /// # Errors
    ///
    /// If its log cannot be read.
    pub fn requests(&self) -> Result<Vec<Request>> {
        let log = std::fs::read_to_string(self.process.log()).context("reading the registry's log")?;
        Ok(log.lines().filter_map(parse_request).collect())
    }

    /// Ends it.
    ///
    /// # Errors
    ///
    /// If its end cannot be awaited.
    pub fn stop(self) -> Result<()> {
        self.process.stop().map(drop)
    }
}

/// Makes the image available to skopeo as a plain directory: of an OCI layout it reads no manifest of Docker's kind.
fn plain_directory(layout: &Path, tag: &str, to: &Path) -> Result<()> {
    let read = |path: &Path| -> Result<Value> {
        let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        Ok(serde_json::from_slice(&bytes)?)
    };
    let blob = |digest: &Value| -> Result<PathBuf> {
        let hex = digest.as_str().and_then(|digest| digest.strip_prefix("sha256:")).context("a digest is missing")?;
        Ok(layout.join("blobs/sha256").join(hex))
    };
    let index = read(&layout.join("index.json"))?;
    let found = index["manifests"]
        .as_array()
        .and_then(|all| all.iter().find(|one| one["annotations"]["org.opencontainers.image.ref.name"] == tag))
        .with_context(|| format!("{} has no image {tag}", layout.display()))?;
    let manifest = blob(&found["digest"])?;
    let content = read(&manifest)?;
    std::fs::write(to.join("version"), "Directory Transport Version: 1.1\n")?;
    std::fs::hard_link(&manifest, to.join("manifest.json"))?;
    let layers = content["layers"].as_array().context("a manifest without layers")?;
    for descriptor in layers.iter().chain([&content["config"]]) {
        let file = blob(&descriptor["digest"])?;
        let name = to.join(file.file_name().unwrap_or_default());
        // One layer may occur more than once.
        if !name.exists() {
            std::fs::hard_link(&file, name).with_context(|| format!("linking {}", file.display()))?;
        }
    }
    Ok(())
}

/// One line of the access log, which the registry writes when the answer is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// `GET`, `HEAD`, ...
    pub method: String,
    /// With the query.
    pub path: String,
    /// HTTP status.
    pub status: u16,
    /// Bytes of the answer's body.
    pub bytes: u64,
}

/// Apache's log format, which the registry writes among its other lines.
fn parse_request(line: &str) -> Option<Request> {
    let (_, rest) = line.split_once("] \"")?;
    let (request, rest) = rest.split_once('"')?;
    let mut words = request.split(' ');
    let mut numbers = rest.split_whitespace();
    let status = numbers.next()?.parse().ok()?;
    let bytes = numbers.next()?.parse().ok()?;
    Some(Request { method: words.next()?.to_owned(), path: words.next()?.to_owned(), status, bytes })
}

fn config_text(dir: &Path, storage: &Path, options: &RegistryOptions) -> Result<String> {
    let mut text = format!(
        "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: {}\n",
        storage.display(),
        options.address
    );
    if let Some(tls) = &options.tls {
        let (cert, key) = tls.server();
        write!(text, "  tls:\n    certificate: {}\n    key: {}\n", cert.display(), key.display())?;
    }
    if let Some(login) = &options.login {
        let file = dir.join("htpasswd");
        std::fs::write(&file, format!("{}:{}\n", login.user, bcrypt(&login.password)?))?;
        write!(text, "auth:\n  htpasswd:\n    realm: test\n    path: {}\n", file.display())?;
    }
    Ok(text)
}

/// The registry takes bcrypt only; the C library can make it, and Perl, which Debian always has, can ask for it.
fn bcrypt(password: &str) -> Result<String> {
    const CHEAPEST_WITH_A_FIXED_SALT: &str = "$2y$04$abcdefghijklmnopqrstuu";
    let program = "print crypt($ARGV[0], $ARGV[1])";
    let hash = output(Command::new("perl").args(["-e", program, password, CHEAPEST_WITH_A_FIXED_SALT]))?;
    ensure!(hash.starts_with("$2y$"), "the C library makes no bcrypt");
    Ok(hash)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_line_of_the_access_log_is_understood() {
        let line =
            r#"127.0.0.1 - - [22/Nov/2026:05:59:01 +0000] "GET /v2/t/blobs/sha256:c2 HTTP/1.1" 206 715 "" "x/1""#;
        let request = parse_request(line).unwrap();
        let path = "/v2/t/blobs/sha256:c2".into();
        assert_eq!(request, Request { method: "GET".into(), path, status: 206, bytes: 715 });
        assert_eq!(parse_request("time=\"x\" level=info msg=\"listening on [::]\""), None);
    }
}
