//! Connections to the daemons and to containerd, with errors that say what to do.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use hyper_util::rt::TokioIo;
use millstream_settings::node::Settings;
use millstream_wire::millstream::v1::images_client::ImagesClient;
use millstream_wire::millstream::v1::node_client::NodeClient;
use tokio::net::UnixStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Uri};
use tonic::{Response, Status};

use crate::exit::{Exit, Failure};

/// For an answer that needs no work.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// For an answer that needs the disk.
pub(crate) const LONG: Duration = Duration::from_secs(600);

/// millstreamd on this node.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    socket: PathBuf,
}

impl Node {
    /// At `socket`, or where millstreamd listens by default.
    pub(crate) fn at(socket: Option<&Path>) -> Self {
        Self { socket: socket.map_or_else(|| Settings::default().socket, Path::to_owned) }
    }

    /// For messages.
    pub(crate) fn name(&self) -> String {
        format!("millstreamd at {}", self.socket.display())
    }

    /// # Errors
    /// [`Exit::Unreachable`] when nobody listens.
    pub(crate) async fn connect(&self) -> Result<NodeClient<Channel>, Failure> {
        let channel = unix(&self.socket).await.map_err(|cause| {
            let message = format!("cannot reach {}: {cause}; hint: is it running, and are you root?", self.name());
            Failure::new(Exit::Unreachable, message)
        })?;
        Ok(NodeClient::new(channel))
    }
}

/// A channel over a Unix socket; the error is what the system said.
pub(crate) async fn unix(socket: &Path) -> Result<Channel, String> {
    let path = PathBuf::from(socket);
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The address is never used: the connector knows the socket.
    let channel =
        Endpoint::from_static("http://localhost").connect_timeout(PATIENCE).connect_with_connector(connector).await;
    channel.map_err(|error| std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string))
}

/// The answer of a daemon, within `patience`. The socket of millstreamd takes connections even while its worker is down.
///
/// # Errors
/// What the daemon refused, in its own words; [`Exit::Unreachable`] when it does not answer.
pub(crate) async fn within<T>(
    patience: Duration,
    name: &str,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(patience, answer).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => Err(Failure::new(
            Exit::Unreachable,
            format!(
                "{name} does not answer within {}; hint: look into its log, it may be starting",
                humantime::format_duration(patience)
            ),
        )),
    }
}

/// millstream-server; `identity` is a certificate and its key.
///
/// # Errors
/// When the address or the certificate is of no use, or nobody answers.
pub(crate) async fn server(
    address: &str,
    ca: Option<&Path>,
    identity: Option<(&Path, &Path)>,
) -> anyhow::Result<ImagesClient<Channel>> {
    let mut endpoint =
        Endpoint::from_shared(address.to_owned()).with_context(|| format!("server address {address:?}"))?;
    endpoint = endpoint.connect_timeout(PATIENCE);
    let host = endpoint.uri().host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    match endpoint.uri().scheme_str() {
        Some("https") => {
            let Some(ca) = ca else {
                bail!(
                    "the authority for {address} is missing; hint: name the PEM file of the authority that signed the \
                     server's certificate, with --ca or MILLSTREAM_CA"
                );
            };
            let read = |path: &Path| std::fs::read(path).with_context(|| format!("reading {}", path.display()));
            let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?));
            if let Some((cert, key)) = identity {
                tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
            }
            endpoint = endpoint.tls_config(tls)?;
        }
        Some("http") if host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback()) => {}
        _ => bail!("server address {address:?} must begin with https:// (http:// only for a loopback address)"),
    }
    let channel = endpoint.connect().await.map_err(|error| {
        let causes = causes(&error);
        let hint = if causes.to_lowercase().contains("certificate") {
            "is the name in the address one of the certificate's, and --ca the authority that signed it?"
        } else {
            "is it running there, and is the port open?"
        };
        Failure::new(Exit::Unreachable, format!("cannot reach millstream-server at {address}: {causes}; hint: {hint}"))
    })?;
    Ok(ImagesClient::new(channel))
}

/// An error with what led to it.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}
