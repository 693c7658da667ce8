//! The calls about startup profiles.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use millstream_oci::Digest;
use millstream_profile::run::MAX_LAYERS;
use millstream_profile::{PageRun, Profile, ProfileLayer, Recording};
use millstream_wire::millstream::v1;
use tonic::Response;

use super::{Caller, Inner, LOOK_UPS};
use crate::ServeError;
use crate::answer::{Answer, Reply, stream};
use crate::metrics::{ProfileAnswer, RecordingResult};
use crate::profiles::{Found, ImageKey, Line, Wanted, plan_message};
use crate::store::{ImageRecord, StoreError};

impl Inner {
    pub(super) async fn get_profile(
        self: Arc<Self>,
        peer: Option<IpAddr>,
        request: v1::GetProfileRequest,
    ) -> Result<Response<Reply<v1::GetProfileResponse>>, ServeError> {
        let permit = self.limits.admit(peer)?;
        let local = local_layers(&request.local_layers)?;
        let caller = self.authorise(peer, request.scope).await?;
        let unknown = || ServeError::NotFound { what: format!("nothing is known of what {} reads", caller.image) };
        let image = match self.image(&caller).await {
            Err(ServeError::NotImported { .. }) => return Err(unknown()),
            other => other?,
        };
        let found = if self.profiles.are_kept() {
            let wanted = self.wanted(&caller, &image).await?;
            self.profiles.find(&wanted, request.pages).await?
        } else {
            None
        };
        let Some(Found { kept, pack }) = found else {
            self.metrics.profile(ProfileAnswer::None);
            return Err(unknown());
        };
        self.metrics.profile(if pack.is_some() { ProfileAnswer::Pages } else { ProfileAnswer::Plan });
        let (key, behind) = (ImageKey::of(&image), self.tables.behind(peer, caller.digest));
        Ok(stream(permit, async move |answer: Answer<v1::GetProfileResponse>| {
            answer.send(plan_message(&kept, pack.is_some())).await?;
            match pack {
                Some(pack) => self.profiles.send(&key, pack, &local, Line { answer, behind }).await,
                None => Ok(()),
            }
        }))
    }

    pub(super) async fn put_recording(
        self: Arc<Self>,
        peer: Option<IpAddr>,
        request: v1::PutRecordingRequest,
    ) -> Result<Response<v1::PutRecordingResponse>, ServeError> {
        let _permit = self.limits.admit(peer)?;
        let v1::PutRecordingRequest { scope, layers, runs } = request;
        let caller = self.authorise(peer, scope).await?;
        let image = self.image(&caller).await?;
        let taken = if self.profiles.are_kept() {
            let wanted = self.wanted(&caller, &image).await?;
            let checked = match recording_of(layers, &runs, &wanted.layers) {
                Ok(recording) => self.check_fits(&recording.read).await.map(|()| recording),
                Err(what) => Err(ServeError::Invalid { what }),
            };
            let refused = |error: &ServeError| {
                if matches!(error, ServeError::Invalid { .. }) {
                    self.metrics.recording(RecordingResult::Refused);
                }
            };
            let recording = checked.inspect_err(refused)?;
            self.profiles.take(wanted, recording).await?
        } else {
            false
        };
        self.metrics.recording(if taken { RecordingResult::Taken } else { RecordingResult::TurnedAway });
        Ok(Response::new(v1::PutRecordingResponse { taken }))
    }

    async fn wanted(&self, caller: &Caller, image: &ImageRecord) -> Result<Wanted, ServeError> {
        let mut digests: Vec<Digest> = Vec::new();
        for layer in image.layers.iter().filter(|layer| layer.is_ready()) {
            if !digests.contains(&layer.digest) {
                digests.push(layer.digest);
            }
        }
        let look_up = async |digest| {
            let record = self.store.layer(&digest).await?;
            Ok::<_, StoreError>(record.map(|record| ProfileLayer { digest, toc: record.toc }))
        };
        let layers: Vec<_> = futures::stream::iter(digests).map(look_up).buffered(LOOK_UPS).try_collect().await?;
        let layers = layers.into_iter().flatten().collect();
        let (key, platform) = (ImageKey::of(image), caller.platform.clone());
        Ok(Wanted { key, platform, layers, source: Arc::clone(&caller.repository) as _ })
    }

    /// Refuses pages that the layers do not have. One table at a time is in use.
    async fn check_fits(&self, read: &Profile) -> Result<(), ServeError> {
        let mut runs: Vec<Vec<PageRun>> = vec![Vec::new(); read.layers.len()];
        for run in &read.runs {
            runs[run.layer as usize].push(PageRun { layer: 0, ..*run });
        }
        for (layer, runs) in read.layers.iter().zip(runs).filter(|(_, runs)| !runs.is_empty()) {
            let toc = self.content.toc(&layer.digest).await?;
            if !(Profile { layers: vec![*layer], runs }).fits(&[Some(&toc)]) {
                let what = format!("a recording with pages that layer {} does not have", layer.digest);
                return Err(ServeError::Invalid { what });
            }
        }
        Ok(())
    }
}

fn local_layers(layers: &[String]) -> Result<Vec<Digest>, ServeError> {
    if layers.len() > MAX_LAYERS {
        let what = format!("{} local layers, more than {MAX_LAYERS}", layers.len());
        return Err(ServeError::Invalid { what });
    }
    layers.iter().map(|layer| digest(layer)).collect::<Result<_, _>>().map_err(|what| ServeError::Invalid { what })
}

/// The recording that a request has, of `served` layers only; else what is wrong with it.
fn recording_of(layers: Vec<v1::RecordedLayer>, runs: &[u32], served: &[ProfileLayer]) -> Result<Recording, String> {
    let (mut read, mut fresh, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
    if layers.len() > MAX_LAYERS {
        return Err(format!("a recording of {} layers, more than {MAX_LAYERS}", layers.len()));
    }
    for recorded in layers {
        let named = recorded.layer.ok_or("a recording of a layer without a name")?;
        let layer = ProfileLayer { digest: digest(&named.digest)?, toc: digest(&named.toc_digest)? };
        let known = served.iter().find(|known| known.digest == layer.digest);
        let known = known.ok_or_else(|| format!("layer {} is none that the image streams", layer.digest))?;
        if known.toc != layer.toc {
            return Err(format!("layer {} is counted by another table than the one that is served", layer.digest));
        }
        if !seen.insert(layer.digest) {
            return Err(format!("layer {} is there twice", layer.digest));
        }
        read.push(layer);
        fresh.push(recorded.fresh);
    }
    let read = Profile::from_numbers(read, runs).map_err(|error| error.to_string())?;
    Ok(Recording { read, fresh })
}

fn digest(text: &str) -> Result<Digest, String> {
    text.parse().map_err(|error| format!("digest {:?}: {error}", super::shown(text)))
}
