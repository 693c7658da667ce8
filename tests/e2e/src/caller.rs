//! What containerd asks of a snapshotter, without a containerd: for tests that need many pulls, or know better than
//! containerd what was answered.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use millstream_wire::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use millstream_wire::containerd::services::snapshots::v1::{
    CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
};
use millstream_wire::containerd::types::Mount;
use sha2::{Digest as _, Sha256};
use tonic::transport::Channel;

use crate::cri::connect;
use crate::stage::Pushed;

/// The label by which a layer is offered to be skipped.
const TARGET: &str = "containerd.io/snapshot.ref";
/// Bound of one call.
const CALL: Duration = Duration::from_secs(30);

/// A client of the snapshots service on a socket.
#[derive(Debug)]
pub struct Caller {
    runtime: tokio::runtime::Runtime,
    channel: Channel,
    namespace: &'static str,
}

impl Caller {
    /// Connects.
    ///
    /// # Errors
    ///
    /// If nobody answers.
    pub fn connect(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let channel = runtime.block_on(connect(socket))?;
        Ok(Self { runtime, channel, namespace: "k8s.io" })
    }

    /// Asks for every layer of an image as a pull does. Gives the name of the topmost snapshot, if all layers are lazy.
    ///
    /// # Errors
    ///
    /// If a call fails, or a layer is to be unpacked.
    pub fn pull(&self, image: &Pushed) -> Result<String> {
        let mut below = String::new();
        let mut chain = String::new();
        for (layer, digest) in image.info.layers.iter().zip(image.layers()) {
            let diff_id = format!("sha256:{}", layer.diff_id);
            chain = match chain.is_empty() {
                true => diff_id,
                false => format!("sha256:{}", hex::encode(Sha256::digest(format!("{chain} {diff_id}")))),
            };
            let labels = HashMap::from([
                (TARGET.to_owned(), chain.clone()),
                ("containerd.io/snapshot/cri.image-ref".to_owned(), image.reference.clone()),
                ("containerd.io/snapshot/cri.manifest-digest".to_owned(), image.info.manifest.clone()),
                ("containerd.io/snapshot/cri.layer-digest".to_owned(), digest),
            ]);
            let key = format!("{}/1/extract {chain}", self.namespace);
            match self.prepare(&key, &below, labels) {
                Err(error) if already_exists(&error) => {}
                Err(error) => return Err(error),
                Ok(_) => {
                    self.remove(&key)?;
                    bail!("a layer of {} is not lazy", image.reference);
                }
            }
            let found = self
                .list()?
                .into_iter()
                .find(|info| info.parent == below && info.labels.get(TARGET).is_some_and(|target| *target == chain));
            below = found.with_context(|| format!("{chain} is said to be there and is not"))?.name;
        }
        Ok(below)
    }

    /// Makes an active snapshot.
    ///
    /// # Errors
    ///
    /// Those of the snapshotter.
    pub fn prepare(&self, key: &str, parent: &str, labels: HashMap<String, String>) -> Result<Vec<Mount>> {
        let request = PrepareSnapshotRequest { key: key.into(), parent: parent.into(), labels, ..Default::default() };
        let answer = self.call(request, async |mut client, request| client.prepare(request).await)?;
        Ok(answer.mounts)
    }

    /// Commits an active snapshot.
    ///
    /// # Errors
    ///
    /// Those of the snapshotter.
    pub fn commit(&self, key: &str, name: &str) -> Result<()> {
        let request = CommitSnapshotRequest { key: key.into(), name: name.into(), ..Default::default() };
        self.call(request, async |mut client, request| client.commit(request).await).map(drop)
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    ///
    /// Those of the snapshotter.
    pub fn remove(&self, key: &str) -> Result<()> {
        let request = RemoveSnapshotRequest { key: key.into(), ..Default::default() };
        self.call(request, async |mut client, request| client.remove(request).await).map(drop)
    }

    /// The mounts of an active snapshot.
    ///
    /// # Errors
    ///
    /// Those of the snapshotter.
    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        let request = MountsRequest { key: key.into(), ..Default::default() };
        Ok(self.call(request, async |mut client, request| client.mounts(request).await)?.mounts)
    }

    /// All snapshots.
    ///
    /// # Errors
    ///
    /// If it does not answer.
    pub fn list(&self) -> Result<Vec<Info>> {
        self.call(ListSnapshotsRequest::default(), async |mut client, request| {
            let mut list = client.list(request).await?.into_inner();
            let mut found = Vec::new();
            while let Some(part) = list.message().await? {
                found.extend(part.info);
            }
            Ok(tonic::Response::new(found))
        })
    }

    fn call<Q, A>(
        &self,
        request: Q,
        ask: impl AsyncFnOnce(SnapshotsClient<Channel>, tonic::Request<Q>) -> Result<tonic::Response<A>, tonic::Status>,
    ) -> Result<A> {
        let mut request = tonic::Request::new(request);
        request.metadata_mut().insert("containerd-namespace", self.namespace.parse()?);
        let client = SnapshotsClient::new(self.channel.clone());
        self.runtime.block_on(async {
            let answer = tokio::time::timeout(CALL, ask(client, request)).await;
            Ok(answer.context("no answer from the snapshotter")??.into_inner())
        })
    }
}

/// Whether this is the answer by which a layer need not be unpacked.
fn already_exists(error: &anyhow::Error) -> bool {
    error.downcast_ref::<tonic::Status>().is_some_and(|status| status.code() == tonic::Code::AlreadyExists)
}

/// The one lower directory of a container's mounts, where all its layers are lazy.
///
/// # Errors
///
/// If there are others.
pub fn lower(mounts: &[Mount]) -> Result<PathBuf> {
    let [mount] = mounts else { bail!("not one mount: {mounts:?}") };
    let lower = mount.options.iter().find_map(|option| option.strip_prefix("lowerdir="));
    let lower = lower.with_context(|| format!("no lower directory: {mount:?}"))?;
    ensure!(!lower.contains(':'), "several lower directories: {lower}");
    Ok(lower.into())
}
