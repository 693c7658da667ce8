//! A profile for an image that nobody recorded, from the image of its repository that was recorded last.

use std::sync::Arc;
use std::time::Duration;

use millstream_oci::ManifestDigest;
use millstream_profile::{Profile, ProfileLayer, carry_over};
use millstream_toc::Toc;
use tokio::time::timeout;

use super::kept::{ImageKey, KeptProfile, unless_damaged};
use super::{Profiles, Wanted};
use crate::ServeError;
use crate::content::blocking;

/// Longest time of carrying one over, with the wait for others.
const DEADLINE: Duration = Duration::from_secs(30);

impl Profiles {
    /// Carries a profile over and keeps it. `None` where there is nothing to carry, and where it takes too long.
    pub(super) async fn inherit(&self, wanted: &Wanted) -> Result<Option<KeptProfile>, ServeError> {
        timeout(DEADLINE, self.carry(wanted)).await.unwrap_or_else(|_| {
            tracing::info!(manifest = %wanted.key.manifest, "carrying a startup profile over took too long");
            Ok(None)
        })
    }

    async fn carry(&self, wanted: &Wanted) -> Result<Option<KeptProfile>, ServeError> {
        let _one = self.carrying.lock().await;
        // Whoever waited may find it done.
        let known = unless_damaged(self.store.profile(&wanted.key).await)?.filter(|kept| wanted.has_layers_of(kept));
        if let Some(kept) = known.clone().and_then(|kept| self.usable(wanted, kept)) {
            return Ok(Some(kept));
        }
        let Some((from, old)) = self.relation(wanted).await? else { return Ok(None) };
        // Recorded as reading nothing, or nothing of that image is in this one.
        if known.is_some_and(|kept| kept.recordings > 0 || kept.from == Some(from)) {
            return Ok(None);
        }
        let carried = self.carried(&old, &wanted.layers).await?.cut(self.most);
        let kept = KeptProfile::new(&carried, 0, Some(from));
        self.store.put_profile(&wanted.key, &kept).await?;
        Ok(self.usable(wanted, kept))
    }

    /// The image of the repository that was recorded last, if it is another one, with its profile.
    async fn relation(&self, wanted: &Wanted) -> Result<Option<(ManifestDigest, Profile)>, ServeError> {
        let Wanted { key, platform, .. } = wanted;
        let latest = unless_damaged(self.store.latest_profile(&key.repository, platform).await)?;
        let latest = latest.filter(|latest| latest.manifest != key.manifest && latest.repository == key.repository);
        let Some(latest) = latest else { return Ok(None) };
        let other = ImageKey { manifest: latest.manifest, repository: latest.repository };
        let profile = unless_damaged(self.store.profile(&other).await)?.and_then(|kept| kept.profile());
        Ok(profile.filter(|profile| !profile.runs.is_empty()).map(|profile| (other.manifest, profile)))
    }

    async fn carried(&self, old: &Profile, layers: &[ProfileLayer]) -> Result<Profile, ServeError> {
        let mut old_tocs = Vec::with_capacity(old.layers.len());
        for (ix, layer) in (0..).zip(&old.layers) {
            let moves = !layers.contains(layer) && old.runs.iter().any(|run| run.layer == ix);
            old_tocs.push(if moves { self.toc_of(layer).await } else { None });
        }
        // Without files that moved, nobody looks into the tables of the new image.
        let looks = old_tocs.iter().any(Option::is_some);
        let mut tocs = Vec::with_capacity(layers.len());
        for layer in layers {
            tocs.push(if looks { self.toc_of(layer).await } else { None });
        }
        let (old, layers) = (old.clone(), layers.to_vec());
        let carried = blocking(move || {
            let (old_tocs, tocs) = (tables(&old_tocs), tables(&tocs));
            carry_over(&old, &old_tocs, &layers, &tocs)
        });
        Ok(carried.await?.unwrap_or_else(|error| {
            tracing::warn!(%error, "a startup profile cannot be carried over");
            Profile::default()
        }))
    }

    /// The table that a profile counts by, if it is there and there is memory for it; else its files are not found again.
    async fn toc_of(&self, layer: &ProfileLayer) -> Option<Arc<Toc>> {
        let record = self.store.layer(&layer.digest).await.ok().flatten()?;
        if record.toc != layer.toc {
            return None;
        }
        self.content.toc(&layer.digest).await.ok()
    }
}

fn tables(tocs: &[Option<Arc<Toc>>]) -> Vec<Option<&Toc>> {
    tocs.iter().map(Option::as_deref).collect()
}
