//! Where an image's bytes come from: its registry and, for windows and content, the server.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use millstream_oci::{Digest, ImageRef, ManifestDigest};
use millstream_prefetch::ImageSources;
use millstream_registry::{Credential, Registry, Repository, docker_config_credential};
use millstream_source::{BlobSource, ErrorKind, ProfileSource, SourceError, WindowSource};

use crate::counted::{counted, counted_profiles};
use crate::embedded::{Embedded, pending_reason};
use crate::metrics::NodeMetrics;
use crate::server_client::{ImageScope, ServedImage, Server, ServerSource};

/// The outside world of this node.
#[derive(Debug, Clone)]
pub struct Origins {
    /// All registries.
    pub registry: Registry,
    /// The server, if there is one.
    pub server: Option<Server>,
    /// What stands behind it if it is in this process.
    pub embedded: Option<Embedded>,
    /// A docker `config.json` with credentials.
    pub docker_config: Option<PathBuf>,
    /// Whether what starts of images read is recorded and brought ahead.
    pub profiles: bool,
    /// Of so many starts for which something is brought, one is recorded; with the others it is read ahead.
    pub record_one_in: u32,
    /// Counts requests for content.
    pub metrics: NodeMetrics,
}

/// The origin of one image.
#[derive(Debug, Clone)]
pub struct Origin {
    /// Reference as the client gave it.
    pub image: String,
    /// Its repository, with the credential of this node.
    pub repository: Arc<Repository>,
    /// The image as the server is asked for it.
    pub scope: ImageScope,
    server: Option<Server>,
    embedded: Option<Embedded>,
    profiles: bool,
    metrics: NodeMetrics,
}

impl Origins {
    /// The origin of an image. Blocks while a credential helper runs (bounded by it, seconds).
    ///
    /// # Errors
    /// When the file with credentials cannot be read.
    pub fn of(&self, image: &ImageRef, manifest: ManifestDigest) -> Result<Origin, SourceError> {
        let credential = match &self.docker_config {
            Some(path) => docker_config_credential(path, image)?,
            None => Credential::Anonymous,
        };
        Ok(Origin {
            image: image.to_string(),
            repository: Arc::new(self.registry.repository(image, credential.clone())),
            scope: ImageScope { repository: image.name(), manifest, credential },
            server: self.server.clone(),
            embedded: self.embedded.clone(),
            profiles: self.profiles,
            metrics: self.metrics.clone(),
        })
    }
}

impl Origin {
    /// The server.
    ///
    /// # Errors
    /// When none is configured.
    pub fn server(&self) -> Result<&Server, SourceError> {
        self.server.as_ref().ok_or_else(|| {
            SourceError::new(
                ErrorKind::Unavailable,
                "no server is configured; hint: set server.address or server.embedded in millstreamd.toml",
            )
        })
    }

    /// Eligibility and TOCs of the image, without those of layers that are `known`. What the embedded server was never told of
    /// it learns here, as far as it can.
    ///
    /// # Errors
    /// As [`Server::image`].
    pub async fn image(&self, known: Vec<Digest>) -> Result<ServedImage, SourceError> {
        let server = self.server()?;
        let Some(embedded) = &self.embedded else { return server.image(&self.scope, known).await };
        let first = server.image(&self.scope, known.clone()).await;
        let mut served = match first {
            Ok(served) if !served.layers.iter().any(|layer| layer.pending) => return Ok(served),
            Ok(served) => match embedded.prepare(self).await {
                Ok(()) => server.image(&self.scope, known).await?,
                Err(_) => served,
            },
            Err(error) if error.kind == ErrorKind::NotImported => {
                embedded.prepare(self).await?;
                server.image(&self.scope, known).await?
            }
            Err(error) => return Err(error),
        };
        for layer in served.layers.iter_mut().filter(|layer| layer.pending) {
            layer.toc = Err(pending_reason());
        }
        Ok(served)
    }

    /// Sources for the fetcher.
    #[must_use]
    pub fn sources(&self) -> ImageSources {
        let Some(server) = self.server.clone() else {
            let sources = ImageSources { blob: self.blob(), windows: Arc::new(NoServer), content: None };
            return counted(sources, &self.metrics);
        };
        let source = Arc::new(ServerSource { server, scope: self.scope.clone() });
        let windows = Arc::clone(&source) as Arc<dyn WindowSource>;
        counted(ImageSources { blob: self.blob(), windows, content: Some(source) }, &self.metrics)
    }

    /// Startup profiles, where there is a server and they are wanted.
    #[must_use]
    pub fn profiles(&self) -> Option<Arc<dyn ProfileSource>> {
        let server = self.server.clone().filter(|_| self.profiles)?;
        let source = ServerSource { server, scope: self.scope.clone() };
        Some(counted_profiles(Arc::new(source), &self.metrics))
    }

    fn blob(&self) -> Arc<dyn BlobSource> {
        Arc::clone(&self.repository) as Arc<dyn BlobSource>
    }
}

/// Stands where a server was configured once: layers that are not complete can only be read from places without a window.
#[derive(Debug)]
struct NoServer;

#[async_trait]
impl WindowSource for NoServer {
    async fn windows(&self, layer: &Digest, _spans: Range<u32>) -> Result<Vec<Bytes>, SourceError> {
        Err(SourceError::new(
            ErrorKind::Unavailable,
            format!("no server is configured that has windows of layer {layer}"),
        ))
    }
}
