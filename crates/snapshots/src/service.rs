//! containerd's snapshot service over gRPC.

use std::collections::BTreeMap;
use std::sync::Arc;

use millstream_wire::containerd::services::snapshots::v1 as api;
use millstream_wire::containerd::types;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::filter::Filters;
use crate::{Error, Info, Kind, LabelUpdate, Mount, Prepared, Snapshots};

/// Snapshots per message of a list.
const BATCH: usize = 100;
/// Longest key or name in bytes.
const MAX_KEY: usize = 4096;
/// Longest label, name and value together, in bytes: containerd's own bound.
const MAX_LABEL: usize = 4096;
/// Most labels of one snapshot.
const MAX_LABELS: usize = 1024;

/// Serves [`Snapshots`] to containerd. Keeps nothing about connections: containerd may reconnect at any time.
#[derive(Debug, Clone)]
pub struct SnapshotService(Snapshots);

impl SnapshotService {
    /// A service for these snapshots.
    #[must_use]
    pub const fn new(snapshots: Snapshots) -> Self {
        Self(snapshots)
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl api::snapshots_server::Snapshots for SnapshotService {
    #[tracing::instrument(skip_all, fields(snapshot = request.get_ref().key))]
    async fn prepare(&self, request: Request<api::PrepareSnapshotRequest>) -> Answer<api::PrepareSnapshotResponse> {
        let namespace = namespace(&request);
        let api::PrepareSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        check_key(&key)?;
        let labels = checked_labels(labels)?;
        match self.0.prepare(&namespace, &key, &parent, labels).await? {
            Prepared::Mounts(mounts) => Ok(Response::new(api::PrepareSnapshotResponse { mounts: wire_mounts(mounts) })),
            Prepared::Skipped(name) => Err(Error::AlreadyExists(name).into()),
        }
    }

    #[tracing::instrument(skip_all, fields(snapshot = request.get_ref().key))]
    async fn view(&self, request: Request<api::ViewSnapshotRequest>) -> Answer<api::ViewSnapshotResponse> {
        let api::ViewSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        check_key(&key)?;
        let mounts = self.0.view(&key, &parent, checked_labels(labels)?).await?;
        Ok(Response::new(api::ViewSnapshotResponse { mounts: wire_mounts(mounts) }))
    }

    #[tracing::instrument(skip_all, fields(snapshot = request.get_ref().key))]
    async fn mounts(&self, request: Request<api::MountsRequest>) -> Answer<api::MountsResponse> {
        let mounts = self.0.mounts(&request.into_inner().key).await?;
        Ok(Response::new(api::MountsResponse { mounts: wire_mounts(mounts) }))
    }

    #[tracing::instrument(skip_all, fields(snapshot = request.get_ref().name))]
    async fn commit(&self, request: Request<api::CommitSnapshotRequest>) -> Answer<()> {
        let api::CommitSnapshotRequest { name, key, labels, parent, .. } = request.into_inner();
        check_key(&name)?;
        self.0.commit(&key, &name, &parent, checked_labels(labels)?).await?;
        Ok(Response::new(()))
    }

    #[tracing::instrument(skip_all, fields(snapshot = request.get_ref().key))]
    async fn remove(&self, request: Request<api::RemoveSnapshotRequest>) -> Answer<()> {
        self.0.remove(&request.into_inner().key).await?;
        Ok(Response::new(()))
    }

    #[tracing::instrument(skip_all, fields(snapshot = request.get_ref().key))]
    async fn stat(&self, request: Request<api::StatSnapshotRequest>) -> Answer<api::StatSnapshotResponse> {
        let info = self.0.stat(&request.into_inner().key).await?;
        Ok(Response::new(api::StatSnapshotResponse { info: Some(wire_info(info)) }))
    }

    #[tracing::instrument(skip_all)]
    async fn update(&self, request: Request<api::UpdateSnapshotRequest>) -> Answer<api::UpdateSnapshotResponse> {
        let api::UpdateSnapshotRequest { info, update_mask, .. } = request.into_inner();
        let info = info.ok_or_else(|| Error::Invalid("an update needs the snapshot's info".into()))?;
        let paths = update_mask.map(|mask| mask.paths).unwrap_or_default();
        let update = label_update(&info.name, checked_labels(info.labels)?, &paths)?;
        let info = self.0.update(&info.name, update).await?;
        Ok(Response::new(api::UpdateSnapshotResponse { info: Some(wire_info(info)) }))
    }

    type ListStream = ReceiverStream<Result<api::ListSnapshotsResponse, Status>>;

    #[tracing::instrument(skip_all)]
    async fn list(&self, request: Request<api::ListSnapshotsRequest>) -> Answer<Self::ListStream> {
        let filters = Filters::parse(&request.into_inner().filters).map_err(Error::from)?;
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(send_list(self.0.clone(), Arc::new(filters), sender));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    #[tracing::instrument(skip_all, fields(snapshot = request.get_ref().key))]
    async fn usage(&self, request: Request<api::UsageRequest>) -> Answer<api::UsageResponse> {
        let usage = self.0.usage(&request.into_inner().key).await?;
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        Ok(Response::new(api::UsageResponse { size: signed(usage.bytes), inodes: signed(usage.inodes) }))
    }

    #[tracing::instrument(skip_all)]
    async fn cleanup(&self, _: Request<api::CleanupRequest>) -> Answer<()> {
        self.0.cleanup().await?;
        Ok(Response::new(()))
    }
}

/// Sends a list in batches, each read on its own: a client may ask for other things, or stop reading, half-way.
async fn send_list(
    snapshots: Snapshots,
    filters: Arc<Filters>,
    sender: mpsc::Sender<Result<api::ListSnapshotsResponse, Status>>,
) {
    let mut after = None;
    loop {
        let batch = match snapshots.list(Arc::clone(&filters), after, BATCH).await {
            Ok(batch) => batch,
            Err(error) => {
                // Who does not listen any more needs no error.
                let _ = sender.send(Err(error.into())).await;
                return;
            }
        };
        let last = batch.len() < BATCH;
        after = batch.last().map(|info| info.name.clone());
        let info: Vec<_> = batch.into_iter().map(wire_info).collect();
        if !info.is_empty() && sender.send(Ok(api::ListSnapshotsResponse { info })).await.is_err() {
            return;
        }
        if last {
            return;
        }
    }
}

/// The namespace of the client: from the call, else from the key `<namespace>/<sequence>/<key>` that containerd's
/// metadata layer makes, else containerd's default.
fn namespace(request: &Request<api::PrepareSnapshotRequest>) -> String {
    let header = request.metadata().get("containerd-namespace").and_then(|value| value.to_str().ok());
    let from_key = || {
        let (namespace, rest) = request.get_ref().key.split_once('/')?;
        let (sequence, _) = rest.split_once('/')?;
        let numeric = !sequence.is_empty() && sequence.bytes().all(|byte| byte.is_ascii_digit());
        numeric.then_some(namespace)
    };
    header.or_else(from_key).filter(|namespace| !namespace.is_empty()).unwrap_or("default").to_owned()
}

fn check_key(key: &str) -> Result<(), Error> {
    if key.is_empty() || key.len() > MAX_KEY {
        return Err(Error::Invalid(format!("a key or name must have 1 to {MAX_KEY} bytes, this has {}", key.len())));
    }
    Ok(())
}

fn checked_labels(labels: impl IntoIterator<Item = (String, String)>) -> Result<BTreeMap<String, String>, Error> {
    let labels: BTreeMap<_, _> = labels.into_iter().collect();
    if labels.len() > MAX_LABELS {
        return Err(Error::Invalid(format!("more than {MAX_LABELS} labels")));
    }
    match labels.iter().find(|(name, value)| name.len() + value.len() > MAX_LABEL) {
        Some((name, _)) => {
            let start: String = name.chars().take(80).collect();
            Err(Error::Invalid(format!("the label {start:?} and its value have more than {MAX_LABEL} bytes")))
        }
        None => Ok(labels),
    }
}

/// What an update changes: no path means everything that can change, which is the labels.
fn label_update(name: &str, labels: BTreeMap<String, String>, paths: &[String]) -> Result<LabelUpdate, Error> {
    let mut changes = BTreeMap::new();
    let mut all = paths.is_empty();
    for path in paths {
        match path.strip_prefix("labels.") {
            Some(label) => {
                changes.insert(label.to_owned(), labels.get(label).cloned().unwrap_or_default());
            }
            None if path == "labels" => all = true,
            None => return Err(Error::Invalid(format!("cannot update {path:?} of snapshot {name:?}"))),
        }
    }
    Ok(if all { LabelUpdate::Replace(labels) } else { LabelUpdate::Set(changes) })
}

fn wire_mounts(mounts: Vec<Mount>) -> Vec<types::Mount> {
    let wire = |mount: Mount| types::Mount {
        r#type: mount.kind.to_owned(),
        source: mount.source,
        target: String::new(),
        options: mount.options,
    };
    mounts.into_iter().map(wire).collect()
}

fn wire_info(info: Info) -> api::Info {
    let kind = match info.kind {
        Kind::Active => api::Kind::Active,
        Kind::View => api::Kind::View,
        Kind::Committed => api::Kind::Committed,
    };
    api::Info {
        name: info.name,
        parent: info.parent,
        kind: kind.into(),
        created_at: Some(timestamp(info.created)),
        updated_at: Some(timestamp(info.updated)),
        labels: info.labels.into_iter().collect(),
    }
}

fn timestamp(nanoseconds: u64) -> prost_types::Timestamp {
    const SECOND: u64 = 1_000_000_000;
    prost_types::Timestamp {
        seconds: i64::try_from(nanoseconds / SECOND).unwrap_or(i64::MAX),
        nanos: i32::try_from(nanoseconds % SECOND).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_the_namespace_comes_from() {
        let request = |key: &str, header: Option<&'static str>| {
            let message = api::PrepareSnapshotRequest { key: key.into(), ..Default::default() };
            let mut request = Request::new(message);
            if let Some(header) = header {
                request.metadata_mut().insert("containerd-namespace", header.parse().unwrap());
            }
            namespace(&request)
        };
        assert_eq!(request("k8s.io/12/extract-1 sha256:a", None), "k8s.io");
        assert_eq!(request("k8s.io/12/extract-1 sha256:a", Some("moby")), "moby");
        for odd in ["extract", "a/b/c", "/12/x", "a//x"] {
            assert_eq!(request(odd, None), "default", "{odd}");
        }
    }

    #[test]
    fn what_an_update_changes() {
        let labels = BTreeMap::from([("a.b".to_owned(), "1".to_owned())]);
        let update = |paths: &[&str]| {
            let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
            label_update("n", labels.clone(), &paths)
        };
        let set = BTreeMap::from([("a.b".to_owned(), "1".to_owned()), ("c".to_owned(), String::new())]);
        assert_eq!(update(&[]).unwrap(), LabelUpdate::Replace(labels.clone()));
        assert_eq!(update(&["labels"]).unwrap(), LabelUpdate::Replace(labels.clone()));
        assert_eq!(update(&["labels.a.b", "labels.c"]).unwrap(), LabelUpdate::Set(set));
        for immutable in ["parent", "name", "kind", "created_at"] {
            assert!(matches!(update(&["labels", immutable]), Err(Error::Invalid(_))), "{immutable}");
        }
    }
}
