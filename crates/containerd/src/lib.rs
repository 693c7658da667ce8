#![doc = include_str!("../README.md")]

mod content;
mod error;
mod images;
mod ingest;
mod leases;
mod options;
mod snapshots;

use std::path::Path;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use millstream_wire::containerd::services::namespaces::v1::ListNamespacesRequest;
use millstream_wire::containerd::services::namespaces::v1::namespaces_client::NamespacesClient;
use millstream_wire::containerd::services::version::v1::version_client::VersionClient;
use tokio::net::UnixStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Response, Status};

pub use content::{BlobInfo, BlobStream};
pub use error::ContainerdError;
pub use images::{BlobDescriptor, Image};
pub use ingest::Ingest;
pub use millstream_wire::containerd::types::Mount;
pub use options::ContainerdOptions;
pub use snapshots::{Prepared, SnapshotKind, Snapshots};

/// Metadata key that names the namespace of a call.
const NAMESPACE: &str = "containerd-namespace";
/// Metadata key that names the lease for what a call makes.
const LEASE: &str = "containerd-lease";
/// The longest name of a namespace, as in containerd.
const MAX_NAME: usize = 76;

/// One containerd. Connects when it is first asked, and again when it was restarted. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Containerd {
    channel: Channel,
    options: Arc<ContainerdOptions>,
}

impl Containerd {
    /// Connects to nothing yet. Needs a tokio runtime.
    #[must_use]
    pub fn new(options: ContainerdOptions) -> Self {
        let options = Arc::new(options);
        let path = options.address.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address is never used: the connector knows the socket.
        let channel = Endpoint::from_static("http://containerd").connect_with_connector_lazy(connector);
        Self { channel, options }
    }

    /// Its socket.
    #[must_use]
    pub fn address(&self) -> &Path {
        &self.options.address
    }

    /// Its version as it says it: `v2.2.9`, `1.6.20~ds1`.
    ///
    /// # Errors
    /// Those of every call.
    pub async fn version(&self) -> Result<String, ContainerdError> {
        let mut client = VersionClient::new(self.channel.clone()).max_decoding_message_size(self.options.max_message);
        let answer = self.short("asking for the version", Request::new(()), |request| client.version(request)).await?;
        Ok(answer.version)
    }

    /// Names of all namespaces.
    ///
    /// # Errors
    /// Those of every call.
    pub async fn namespaces(&self) -> Result<Vec<String>, ContainerdError> {
        let mut client =
            NamespacesClient::new(self.channel.clone()).max_decoding_message_size(self.options.max_message);
        let request = Request::new(ListNamespacesRequest::default());
        let answer = self.short("listing namespaces", request, |request| client.list(request)).await?;
        Ok(answer.namespaces.into_iter().map(|namespace| namespace.name).collect())
    }

    /// What `name` holds; it need not exist yet.
    ///
    /// # Errors
    /// [`ContainerdError::Name`] when containerd could not have such a namespace.
    pub fn namespace(&self, name: &str) -> Result<Namespace, ContainerdError> {
        let fits = !name.is_empty()
            && name.len() <= MAX_NAME
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
        let value = if fits { name.parse().ok() } else { None };
        let value = value.ok_or_else(|| ContainerdError::Name(name.chars().take(MAX_NAME).collect()))?;
        Ok(Namespace { containerd: self.clone(), name: value, lease: None })
    }

    /// One question and its answer, which is never long in coming.
    async fn short<Q, A, F>(
        &self,
        action: &str,
        mut request: Request<Q>,
        ask: impl FnOnce(Request<Q>) -> F,
    ) -> Result<A, ContainerdError>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let limit = self.options.call_limit;
        // containerd need not go on either.
        request.set_timeout(limit);
        match tokio::time::timeout(limit, ask(request)).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(ContainerdError::refused(action, self.address(), &status)),
            Err(_) => Err(ContainerdError::TimedOut { action: action.to_owned(), limit }),
        }
    }
}

/// What one namespace of containerd holds. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Namespace {
    containerd: Containerd,
    name: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl Namespace {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.name.to_str().unwrap_or_default()
    }

    /// The containerd that has it.
    #[must_use]
    pub fn containerd(&self) -> &Containerd {
        &self.containerd
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert(NAMESPACE, self.name.clone());
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert(LEASE, lease.clone());
        }
        request
    }

    fn channel(&self) -> Channel {
        self.containerd.channel.clone()
    }

    fn options(&self) -> &ContainerdOptions {
        &self.containerd.options
    }

    async fn short<Q, A, F>(
        &self,
        action: &str,
        message: Q,
        ask: impl FnOnce(Request<Q>) -> F,
    ) -> Result<A, ContainerdError>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        self.containerd.short(action, self.request(message), ask).await
    }
}

/// Labels as containerd wants them, from pairs.
fn label_paths<'a>(keys: impl Iterator<Item = &'a String>) -> Vec<String> {
    keys.map(|key| format!("labels.{key}")).collect()
}
