//! What the command line asks of this node.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use millstream_chunkstore::{Layer, LayerState, Refusal};
use millstream_oci::{Digest, ImageRef};
use millstream_source::{ErrorKind, SourceError, names};
use millstream_wire::millstream::v1 as wire;
use millstream_wire::millstream::v1::node_server::Node;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};
use tracing::info;

use crate::catalog::Decision;
use crate::check::Checker;
use crate::damage::Damage;
use crate::garbage::Garbage;
use crate::images::NodeImages;
use crate::make_local::MakeLocal;

/// Progress messages that wait for a slow reader.
const MAX_PROGRESS: usize = 4;

/// The `Node` service.
#[derive(Debug)]
pub struct Control {
    images: Arc<NodeImages>,
    garbage: Garbage,
    checker: Checker,
    hydration: AtomicBool,
    quota: u64,
}

impl Control {
    /// `hydration` is how the fetcher was configured, `quota` what the store may take (bytes; 0: no quota).
    #[must_use]
    pub fn new(images: Arc<NodeImages>, garbage: Garbage, checker: Checker, hydration: bool, quota: u64) -> Self {
        Self { images, garbage, checker, hydration: AtomicBool::new(hydration), quota }
    }

    fn layer_status(&self, layer: &Layer, images: Vec<String>) -> wire::LayerStatus {
        let digest = layer.digest();
        let (state, reason) = match layer.state() {
            LayerState::Lazy => {
                let progress = self.images.fetcher.progress(&digest);
                (wire::layer_status::State::Lazy, progress.and_then(|progress| progress.last_error).unwrap_or_default())
            }
            LayerState::Verified => (wire::layer_status::State::Verified, String::new()),
            LayerState::Quarantined { reason } => (wire::layer_status::State::Quarantined, reason),
        };
        wire::LayerStatus {
            layer: digest.to_string(),
            state: state.into(),
            bytes_total: layer.bytes_total(),
            bytes_present: layer.bytes_present(),
            bytes_synced: layer.bytes_synced(),
            images,
            reason,
        }
    }
}

#[tonic::async_trait]
impl Node for Control {
    type IndexImageStream = crate::embedded::Indexing;

    async fn status(&self, _request: Request<wire::StatusRequest>) -> Result<Response<wire::StatusResponse>, Status> {
        let mut images: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
        // A database that failed is named by `trouble`; it hides no layer.
        let database = self.images.catalog.images();
        let failing = database.as_ref().err().map(|_| Refusal::Failing);
        let space = self.images.store.space();
        for (_, record) in database.unwrap_or_default() {
            for layer in &record.layers {
                let names = images.entry(layer.digest).or_default();
                if !names.contains(&record.image) {
                    names.push(record.image.clone());
                }
            }
        }
        let layers = self.images.store.layers();
        let mut layers: Vec<wire::LayerStatus> = layers
            .iter()
            .map(|layer| self.layer_status(layer, images.remove(&layer.digest()).unwrap_or_default()))
            .collect();
        layers.extend(self.images.store.damaged().into_iter().map(|(digest, reason)| wire::LayerStatus {
            layer: digest.to_string(),
            reason: format!("damaged: {reason}; hint: remove the image and pull it again"),
            ..wire::LayerStatus::default()
        }));
        let counters = self.images.fetcher.counters();
        Ok(Response::new(wire::StatusResponse {
            streaming_enabled: self.images.catalog.streaming().unwrap_or(false),
            store: Some(wire::Store {
                used_bytes: space.used(),
                limit_bytes: space.used().saturating_add(space.free()),
                quota_bytes: self.quota,
                evicted_bytes: space.evicted(),
                trouble: space.trouble().or(failing).map_or("", Refusal::code).to_owned(),
            }),
            hydration_enabled: self.hydration.load(Ordering::Relaxed),
            layers,
            transfer: Some(wire::Transfer {
                demand_bytes: counters.demand_bytes + counters.prefetch_bytes + counters.content_bytes,
                hydrate_bytes: counters.hydrate_bytes,
                metadata_bytes: self.images.origins.server.as_ref().map_or(0, |server| server.metadata_bytes()),
                requests: counters.requests,
                shared_bytes: counters.shared_bytes,
                profile_bytes: counters.profile_bytes,
            }),
            version: env!("CARGO_PKG_VERSION").into(),
            damages: self.images.damages.all().into_iter().map(damage_to_wire).collect(),
        }))
    }

    async fn explain(&self, request: Request<wire::ExplainRequest>) -> Result<Response<wire::ExplainResponse>, Status> {
        let wanted = request.into_inner().image;
        // People type the short form, containerd passes the long one.
        let mut decisions = self.images.catalog.decisions(&wanted).map_err(internal)?;
        if decisions.is_empty()
            && let Ok(reference) = wanted.parse::<millstream_oci::ImageRef>()
        {
            decisions = self.images.catalog.decisions(&reference.to_string()).map_err(internal)?;
            if decisions.is_empty()
                && let Some(lookup) = &self.images.lookup
            {
                // Pulled without a name; containerd knows by now what the name stands for.
                for manifest in lookup.manifests(&reference).await {
                    decisions.extend(self.images.catalog.decisions(&manifest.to_string()).map_err(internal)?);
                }
            }
        }
        if decisions.is_empty() {
            // A client that passes no labels does not say which image it pulls: perhaps it was this one.
            let unnamed = self.images.catalog.decisions("").map_err(internal)?;
            decisions = unnamed.into_iter().filter(|decision| decision.image.is_empty()).take(1).collect();
        }
        Ok(Response::new(wire::ExplainResponse { decisions: decisions.into_iter().map(to_wire).collect() }))
    }

    async fn set_streaming(
        &self,
        request: Request<wire::SetStreamingRequest>,
    ) -> Result<Response<wire::SetStreamingResponse>, Status> {
        let enabled = request.into_inner().enabled;
        self.images.catalog.set_streaming(enabled).map_err(internal)?;
        info!(enabled, "streaming of new images switched");
        Ok(Response::new(wire::SetStreamingResponse {}))
    }

    async fn set_hydration(
        &self,
        request: Request<wire::SetHydrationRequest>,
    ) -> Result<Response<wire::SetHydrationResponse>, Status> {
        let enabled = request.into_inner().enabled;
        self.hydration.store(enabled, Ordering::Relaxed);
        self.images.fetcher.set_hydration(enabled);
        info!(enabled, "hydration switched");
        Ok(Response::new(wire::SetHydrationResponse {}))
    }

    type PrefetchStream = ReceiverStream<Result<wire::PrefetchProgress, Status>>;

    async fn prefetch(
        &self,
        request: Request<wire::PrefetchRequest>,
    ) -> Result<Response<Self::PrefetchStream>, Status> {
        let wire::PrefetchRequest { image, wait } = request.into_inner();
        let work = MakeLocal::start(Arc::clone(&self.images), &image)?;
        info!({ names::IMAGE } = image, "image is fetched before others");
        let mut progress = work.progress()?;
        let (sender, messages) = mpsc::channel(MAX_PROGRESS);
        // Ends with the image, or with the caller.
        tokio::spawn(async move {
            while sender.send(Ok(progress.clone())).await.is_ok() {
                if !wait || progress.layers_verified == progress.layers_total {
                    return;
                }
                let next = tokio::select! {
                    () = sender.closed() => return,
                    next = work.changed(&progress) => next,
                };
                match next {
                    Ok(next) => progress = next,
                    Err(status) => return sender.send(Err(status)).await.unwrap_or(()),
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(messages)))
    }

    type CheckStream = ReceiverStream<Result<wire::CheckProgress, Status>>;

    async fn check(&self, _request: Request<wire::CheckRequest>) -> Result<Response<Self::CheckStream>, Status> {
        Ok(Response::new(ReceiverStream::new(self.checker.start()?)))
    }

    async fn gc(&self, request: Request<wire::GcRequest>) -> Result<Response<wire::GcResponse>, Status> {
        let dry_run = request.into_inner().dry_run;
        let layers = self.garbage.give_back_now(dry_run).await.map_err(internal)?;
        info!(layers = layers.len(), dry_run, "unused layers looked for");
        let layers =
            layers.into_iter().map(|(layer, bytes)| wire::GarbageLayer { layer: layer.to_string(), bytes }).collect();
        Ok(Response::new(wire::GcResponse { layers }))
    }

    async fn index_image(
        &self,
        request: Request<wire::IndexImageRequest>,
    ) -> Result<Response<Self::IndexImageStream>, Status> {
        let wire::IndexImageRequest { image, namespace } = request.into_inner();
        let embedded = self.images.origins.embedded.as_ref().ok_or_else(|| {
            Status::failed_precondition(
                "this node has no embedded server; hint: millstream import IMAGE --server ADDRESS",
            )
        })?;
        let image: ImageRef = image.parse().map_err(|error| Status::invalid_argument(format!("{image:?}: {error}")))?;
        let namespace = Some(namespace.as_str()).filter(|namespace| !namespace.is_empty());
        embedded.import(&image, namespace).await.map(Response::new).map_err(refused)
    }
}

/// A failed request to containerd, for the command line.
fn refused(error: SourceError) -> Status {
    let code = match error.kind {
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::Exhausted => Code::ResourceExhausted,
        _ => Code::Unavailable,
    };
    Status::new(code, error.message)
}

pub(crate) fn damage_to_wire(damage: Damage) -> wire::Damage {
    wire::Damage { code: damage.code.to_owned(), object: damage.object, reason: damage.what }
}

fn to_wire(decision: Decision) -> wire::Decision {
    let outcome = match decision.outcome.as_str() {
        "lazy" => wire::decision::Outcome::Lazy,
        "local" => wire::decision::Outcome::Local,
        "deferred" => wire::decision::Outcome::Deferred,
        "failed" => wire::decision::Outcome::Failed,
        _ => wire::decision::Outcome::Unknown,
    };
    wire::Decision {
        image: decision.image,
        manifest_digest: decision.manifest,
        outcome: outcome.into(),
        code: decision.code,
        reason: decision.reason,
        decided_at: decision.decided_at,
    }
}

fn internal(error: anyhow::Error) -> Status {
    Status::internal(format!("{error:#}"))
}
