//! Listening: TLS, or plaintext on the loopback interface only.

use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use millstream_wire::millstream::v1::images_server::ImagesServer;
use tokio::sync::oneshot;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};

use crate::ImagesService;

/// Requests are small: credentials, digests, and the names of known layers.
const MAX_REQUEST: usize = 1 << 20;
/// Time for a TLS hand-shake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Silence after which a connection is tried, and the time for its answer.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));
/// Time from the first byte of a request to the beginning of its answer.
const REQUEST: Duration = Duration::from_secs(120);
/// Time that requests under way have once the server shuts down.
const GRACE: Duration = Duration::from_secs(20);

/// Where and how to listen.
#[derive(Debug, Clone)]
pub struct ListenOptions {
    /// Address and port; port 0 lets the system choose.
    pub address: SocketAddr,
    /// Absent: plaintext, on loopback only.
    pub tls: Option<TlsFiles>,
}

/// PEM files.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The server's certificate and the chain that leads to it.
    pub cert: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// Authority whose certificates clients must show; absent: clients need none.
    pub client_ca: Option<PathBuf>,
}

/// Why the server does not listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Credentials and file content would cross a network in the clear.
    #[error(
        "refusing to listen on {address} without TLS: callers' registry credentials would cross the network in the clear; \
         hint: set tls.cert and tls.key, or listen on 127.0.0.1"
    )]
    Plaintext {
        /// The configured address.
        address: SocketAddr,
    },
    /// A PEM file cannot be read.
    #[error("cannot read {path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The address cannot be used.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The configured address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// Certificate and key do not work, or serving failed.
    #[error("serving failed")]
    Transport(#[from] tonic::transport::Error),
}

impl ListenOptions {
    /// Whether this way to listen is safe.
    ///
    /// # Errors
    ///
    /// [`ListenError::Plaintext`] for an address other than loopback without TLS.
    pub fn check(&self) -> Result<(), ListenError> {
        if self.tls.is_none() && !self.address.ip().is_loopback() {
            return Err(ListenError::Plaintext { address: self.address });
        }
        Ok(())
    }
}

/// A bound address with its TLS identity.
#[derive(Debug)]
pub struct Listener {
    incoming: TcpIncoming,
    tls: Option<ServerTlsConfig>,
    address: SocketAddr,
}

impl Listener {
    /// Reads the PEM files and binds the address. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`ListenError`].
    pub fn bind(options: &ListenOptions) -> Result<Self, ListenError> {
        options.check()?;
        let tls = options.tls.as_ref().map(tls_config).transpose()?;
        let bind_error = |source| ListenError::Bind { address: options.address, source };
        let incoming = TcpIncoming::bind(options.address).map_err(bind_error)?.with_nodelay(Some(true));
        let address = incoming.local_addr().map_err(bind_error)?;
        Ok(Self { incoming, tls, address })
    }

    /// The address that is listened on.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` ends, then lets requests under way finish within 20 s.
    ///
    /// # Errors
    ///
    /// [`ListenError::Transport`].
    pub async fn serve(
        self,
        service: ImagesService,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), ListenError> {
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<ImagesServer<ImagesService>>().await;
        let mut server = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE.0))
            .http2_keepalive_timeout(Some(KEEPALIVE.1))
            .timeout(REQUEST);
        if let Some(tls) = self.tls {
            server = server.tls_config(tls)?;
        }
        let images = ImagesServer::new(service).max_decoding_message_size(MAX_REQUEST);
        let (stop, stopped) = oneshot::channel::<()>();
        let serving =
            server.add_service(health_service).add_service(images).serve_with_incoming_shutdown(self.incoming, async {
                // Sent or dropped: either way it is over.
                let _ = stopped.await;
            });
        tokio::pin!(serving);
        tokio::select! {
            ended = &mut serving => return ended.map_err(Into::into),
            () = shutdown => (),
        }
        health.set_not_serving::<ImagesServer<ImagesService>>().await;
        drop(stop);
        match tokio::time::timeout(GRACE, serving).await {
            Ok(ended) => ended.map_err(Into::into),
            Err(_) => {
                tracing::warn!("requests were still under way at shutdown");
                Ok(())
            }
        }
    }
}

fn tls_config(files: &TlsFiles) -> Result<ServerTlsConfig, ListenError> {
    let identity = Identity::from_pem(read(&files.cert)?, read(&files.key)?);
    let config = ServerTlsConfig::new().identity(identity).timeout(HANDSHAKE);
    match &files.client_ca {
        Some(path) => Ok(config.client_ca_root(Certificate::from_pem(read(path)?))),
        None => Ok(config),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, ListenError> {
    std::fs::read(path).map_err(|source| ListenError::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plaintext_only_on_loopback() {
        for (address, fine) in
            [("127.0.0.1:0", true), ("[::1]:0", true), ("0.0.0.0:0", false), ("[::]:0", false), ("10.1.2.3:0", false)]
        {
            let options = ListenOptions { address: address.parse().unwrap(), tls: None };
            assert_eq!(options.check().is_ok(), fine, "{address}");
        }
        let options = ListenOptions { address: "0.0.0.0:7900".parse().unwrap(), tls: None };
        let text = Listener::bind(&options).unwrap_err().to_string();
        assert!(text.contains("0.0.0.0:7900") && text.contains("hint: set tls.cert and tls.key"), "{text}");
    }
}
