//! Connections to the daemons, with errors that say what to do.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use hyper_util::rt::TokioIo;
use millstream_wire::millstream::v1::images_client::ImagesClient;
use millstream_wire::millstream::v1::node_client::NodeClient;
use tokio::net::UnixStream;
use tonic::Status;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Uri};

const PATIENCE: Duration = Duration::from_secs(10);

/// millstreamd on this node.
///
/// # Errors
/// When nobody listens at `socket`.
pub(crate) async fn node(socket: &Path) -> anyhow::Result<NodeClient<Channel>> {
    let path = PathBuf::from(socket);
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The address is never used: the connector knows the socket.
    let channel =
        Endpoint::from_static("http://millstreamd").connect_timeout(PATIENCE).connect_with_connector(connector).await;
    let channel = channel.map_err(|error| {
        let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        anyhow!("cannot reach millstreamd at {}: {cause}; hint: is it running, and are you root?", socket.display())
    })?;
    Ok(NodeClient::new(channel))
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
                bail!("--ca is missing; hint: name the PEM file of the authority that signed the server's certificate");
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
    let channel = endpoint.connect().await.with_context(|| format!("cannot reach millstream-server at {address}"))?;
    Ok(ImagesClient::new(channel))
}

/// What a daemon refused, in its own words.
pub(crate) fn refused(status: Status) -> anyhow::Error {
    if status.message().is_empty() { anyhow!("{}", status.code()) } else { anyhow!("{}", status.message().to_owned()) }
}
