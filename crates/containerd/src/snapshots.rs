//! Snapshots of one snapshotter, and unpacking into them.

use std::collections::BTreeMap;

use millstream_oci::{DiffId, Digest};
use millstream_wire::containerd::services::diff::v1 as diff;
use millstream_wire::containerd::services::diff::v1::diff_client::DiffClient;
use millstream_wire::containerd::services::snapshots::v1 as wire;
use millstream_wire::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use millstream_wire::containerd::types::Mount;
use tonic::transport::Channel;

use crate::{BlobDescriptor, ContainerdError, Namespace};

/// What [`Snapshots::prepare`] comes to.
#[derive(Debug, Clone, PartialEq)]
pub enum Prepared {
    /// The snapshot that the label `containerd.io/snapshot.ref` names is there: nothing has to be unpacked.
    Present,
    /// An active snapshot, to be mounted so.
    Active(Vec<Mount>),
}

/// What a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotKind {
    /// Can be written to.
    Active,
    /// A read-only view.
    View,
    /// Finished; others may stand on it.
    Committed,
}

/// The snapshots of one snapshotter in one namespace.
#[derive(Debug, Clone)]
pub struct Snapshots {
    namespace: Namespace,
    snapshotter: String,
}

impl Namespace {
    /// Snapshots of the snapshotter that containerd knows by this name.
    #[must_use]
    pub fn snapshots(&self, snapshotter: &str) -> Snapshots {
        Snapshots { namespace: self.clone(), snapshotter: snapshotter.to_owned() }
    }

    /// Unpacks a blob of the content store into what `mounts` show, and gives the digest of the uncompressed tar.
    ///
    /// # Errors
    /// Those of every call.
    pub async fn apply(&self, layer: &BlobDescriptor, mounts: &[Mount]) -> Result<DiffId, ContainerdError> {
        let action = format!("unpacking layer {}", layer.digest);
        let mut client = DiffClient::new(self.channel()).max_decoding_message_size(self.options().max_message);
        let mut request = self.request(diff::ApplyRequest { diff: Some(layer.to_wire()), mounts: mounts.to_vec() });
        let limit = self.options().apply_limit;
        request.set_timeout(limit);
        let answer = match tokio::time::timeout(limit, client.apply(request)).await {
            Ok(answer) => answer.map_err(|status| self.refused(&action, &status))?.into_inner(),
            Err(_) => return Err(ContainerdError::TimedOut { action, limit }),
        };
        let digest = answer.applied.and_then(|applied| applied.digest.parse::<Digest>().ok());
        let digest =
            digest.ok_or_else(|| ContainerdError::malformed(&action, "containerd answered without a digest"))?;
        Ok(DiffId(digest))
    }
}

impl Snapshots {
    fn client(&self) -> SnapshotsClient<Channel> {
        let max = self.namespace.options().max_message;
        SnapshotsClient::new(self.namespace.channel()).max_decoding_message_size(max)
    }

    /// Makes an active snapshot upon the committed one `parent` (empty: upon nothing). A remote snapshotter may find that the
    /// one in the label `containerd.io/snapshot.ref` is there already.
    ///
    /// # Errors
    /// Those of every call; [`ContainerdError::AlreadyExists`] when the labels have no such name.
    pub async fn prepare(
        &self,
        key: &str,
        parent: &str,
        labels: &BTreeMap<String, String>,
    ) -> Result<Prepared, ContainerdError> {
        let request = wire::PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: labels.clone().into_iter().collect(),
        };
        let mut client = self.client();
        let action = format!("preparing snapshot {key:?} of {}", self.snapshotter);
        match self.namespace.short(&action, request, |request| client.prepare(request)).await {
            Err(ContainerdError::AlreadyExists { .. }) if labels.contains_key("containerd.io/snapshot.ref") => {
                Ok(Prepared::Present)
            }
            prepared => Ok(Prepared::Active(prepared?.mounts)),
        }
    }

    /// What the snapshot is.
    ///
    /// # Errors
    /// [`ContainerdError::NotFound`]; those of every call.
    pub async fn stat(&self, name: &str) -> Result<SnapshotKind, ContainerdError> {
        let action = format!("looking for snapshot {name:?} of {}", self.snapshotter);
        let request = wire::StatSnapshotRequest { snapshotter: self.snapshotter.clone(), key: name.to_owned() };
        let mut client = self.client();
        let answer = self.namespace.short(&action, request, |request| client.stat(request)).await?;
        match answer.info.unwrap_or_default().kind() {
            wire::Kind::Active => Ok(SnapshotKind::Active),
            wire::Kind::View => Ok(SnapshotKind::View),
            wire::Kind::Committed => Ok(SnapshotKind::Committed),
            wire::Kind::Unknown => Err(ContainerdError::malformed(&action, "containerd does not say what it is")),
        }
    }

    /// Turns the active snapshot `key` into the committed one `name`.
    ///
    /// # Errors
    /// [`ContainerdError::AlreadyExists`] when that name is taken; those of every call.
    pub async fn commit(
        &self,
        key: &str,
        name: &str,
        labels: &BTreeMap<String, String>,
    ) -> Result<(), ContainerdError> {
        let request = wire::CommitSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels: labels.clone().into_iter().collect(),
            ..wire::CommitSnapshotRequest::default()
        };
        let mut client = self.client();
        let action = format!("committing snapshot {name:?} of {}", self.snapshotter);
        self.namespace.short(&action, request, |request| client.commit(request)).await
    }

    /// Mounts of the active snapshot or view `key`, again.
    ///
    /// # Errors
    /// [`ContainerdError::NotFound`]; those of every call.
    pub async fn mounts(&self, key: &str) -> Result<Vec<Mount>, ContainerdError> {
        let request = wire::MountsRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        let mut client = self.client();
        let action = format!("asking for the mounts of snapshot {key:?} of {}", self.snapshotter);
        Ok(self.namespace.short(&action, request, |request| client.mounts(request)).await?.mounts)
    }

    /// Removes a snapshot that has no children; one that is not there is no error.
    ///
    /// # Errors
    /// Those of every call.
    pub async fn remove(&self, name: &str) -> Result<(), ContainerdError> {
        let request = wire::RemoveSnapshotRequest { snapshotter: self.snapshotter.clone(), key: name.to_owned() };
        let mut client = self.client();
        let action = format!("removing snapshot {name:?} of {}", self.snapshotter);
        match self.namespace.short(&action, request, |request| client.remove(request)).await {
            Err(ContainerdError::NotFound { .. }) => Ok(()),
            removed => removed,
        }
    }
}
