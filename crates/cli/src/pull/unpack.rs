//! Layers: offered to the snapshotter, bottom first; what it does not take is fetched and unpacked.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow, bail, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use millstream_containerd::{ContainerdError, Mount, Namespace, Prepared, SnapshotKind, Snapshots};
use millstream_oci::Digest;
use millstream_registry::Repository;
use tokio::sync::mpsc;

use super::image::{Layer, Resolved, source_label};
use super::progress::Progress;
use super::transfer::Transfer;

/// Layers that are fetched at once; the same as with containerd.
const AT_ONCE: usize = 3;
/// How often a layer is offered when it is declared to be there and then is not: it was removed in between.
const OFFERS: u32 = 3;
/// What containerd takes of a label, key and value together, in bytes.
const MAX_LABEL: usize = 4096;

/// What became of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// containerd had it.
    Present,
    /// The snapshotter shows it without its having been fetched.
    Lazy,
    /// It was fetched and unpacked.
    Unpacked,
}

impl State {
    /// For people and scripts.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::Lazy => "lazy",
            Self::Unpacked => "unpacked",
        }
    }
}

/// What a layer needs when it was offered.
enum Offered {
    Nothing(State),
    Unpacking { key: String, mounts: Vec<Mount> },
}

/// Has every layer as a committed snapshot in the end.
pub(crate) async fn layers(
    resolved: &Resolved,
    snapshotter: &str,
    space: &Namespace,
    repository: Repository,
    progress: &Progress,
) -> anyhow::Result<Vec<State>> {
    let snapshots = space.snapshots(snapshotter);
    let mut states = Vec::new();
    // As far as the snapshotter takes them, nothing is fetched.
    let first = loop {
        let number = states.len();
        if number == resolved.layers.len() {
            return Ok(states);
        }
        match offer(resolved, number, &snapshots).await? {
            Offered::Nothing(state) => {
                progress.state(number, state.name());
                states.push(state);
            }
            unpacking => break unpacking,
        }
    };
    let from = states.len();
    let transfer = Transfer::new(repository, space.clone());
    // Room for all: who fetches must not stand still while a layer is unpacked, or the registry hangs up.
    let (fetched, wait) = mpsc::channel(resolved.layers.len());
    let fetching = async {
        let wanted = wanted_from(resolved, from, &snapshots).await?;
        let mut transfers = stream::iter(wanted.into_iter().map(|number| fetch(resolved, number, &transfer, progress)))
            .buffered(AT_ONCE);
        while let Some(number) = transfers.try_next().await? {
            // Nobody waits any more when unpacking failed, which says why.
            let _ = fetched.send(number).await;
        }
        drop(fetched);
        anyhow::Ok(())
    };
    let unpacking = unpack_from(resolved, from, first, &snapshots, space, wait, progress);
    let (_, rest) = futures::try_join!(fetching, unpacking)?;
    states.extend(rest);
    Ok(states)
}

/// The layers from `from` on that have to be fetched. A snapshotter may still take one of them when it is offered; but most of
/// the time it takes none above the first that it did not, and one that waits for its turn is fetched late.
async fn wanted_from(resolved: &Resolved, from: usize, snapshots: &Snapshots) -> anyhow::Result<Vec<usize>> {
    let mut wanted = Vec::new();
    for (number, layer) in resolved.layers.iter().enumerate().skip(from) {
        if number == from || !is_committed(snapshots, layer).await? {
            wanted.push(number);
        }
    }
    Ok(wanted)
}

async fn fetch(resolved: &Resolved, number: usize, transfer: &Transfer, progress: &Progress) -> anyhow::Result<usize> {
    let layer = &resolved.layers[number];
    let digest = &layer.descriptor.digest;
    let labels = source_label(resolved, transfer.space(), digest).await?;
    progress.state(number, "fetching");
    let got = transfer.fetch(&layer.descriptor, &labels, &|at| progress.at(number, at)).await;
    got.with_context(|| format!("fetching layer {digest}"))?;
    progress.state(number, "fetched");
    Ok(number)
}

/// Unpacks the layers from `from` on, each as soon as `fetched` has named it.
async fn unpack_from(
    resolved: &Resolved,
    from: usize,
    first: Offered,
    snapshots: &Snapshots,
    space: &Namespace,
    mut fetched: mpsc::Receiver<usize>,
    progress: &Progress,
) -> anyhow::Result<Vec<State>> {
    let mut states = Vec::new();
    let mut first = Some(first);
    let mut newest = None;
    for number in from..resolved.layers.len() {
        let offered = match first.take() {
            Some(offered) => offered,
            None => offer(resolved, number, snapshots).await?,
        };
        let (key, mounts) = match offered {
            Offered::Unpacking { key, mounts } => (key, mounts),
            Offered::Nothing(state) => {
                progress.state(number, state.name());
                states.push(state);
                continue;
            }
        };
        // They come in order; one that was not needed after all is passed over.
        while newest.is_none_or(|newest| newest < number) {
            newest = Some(fetched.recv().await.context("a layer was removed while the image was being pulled")?);
        }
        progress.state(number, "unpacking");
        let unpacked = unpack(resolved, number, &key, &mounts, snapshots, space).await;
        if unpacked.is_err() {
            // Else it waits for the lease to end.
            let _ = snapshots.remove(&key).await;
        }
        unpacked?;
        progress.state(number, State::Unpacked.name());
        states.push(State::Unpacked);
    }
    Ok(states)
}

async fn is_committed(snapshots: &Snapshots, layer: &Layer) -> Result<bool, ContainerdError> {
    match snapshots.stat(&layer.chain.to_string()).await {
        Ok(kind) => Ok(kind == SnapshotKind::Committed),
        Err(ContainerdError::NotFound { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

fn parent(resolved: &Resolved, number: usize) -> String {
    let below = number.checked_sub(1).and_then(|below| resolved.layers.get(below));
    below.map(|layer| layer.chain.to_string()).unwrap_or_default()
}

/// Asks for a snapshot to unpack a layer into, and says what the layer is: a snapshotter may have no need of that.
async fn offer(resolved: &Resolved, number: usize, snapshots: &Snapshots) -> anyhow::Result<Offered> {
    let layer = &resolved.layers[number];
    let (parent, labels) = (parent(resolved, number), labels(resolved, number));
    for _ in 0..OFFERS {
        let before = is_committed(snapshots, layer).await.map_err(|error| match error {
            ContainerdError::Refused { .. } => anyhow!(
                "{error}; hint: containerd has to know the snapshotter by this name; config/containerd-*.toml have Millstream's"
            ),
            error => error.into(),
        })?;
        let key = format!("extract-{} {}", unique(), layer.chain);
        // Also where it was there before: this puts it under our lease.
        match snapshots.prepare(&key, &parent, &labels).await? {
            Prepared::Active(mounts) => return Ok(Offered::Unpacking { key, mounts }),
            Prepared::Present if before => return Ok(Offered::Nothing(State::Present)),
            Prepared::Present if is_committed(snapshots, layer).await? => {
                return Ok(Offered::Nothing(State::Lazy));
            }
            Prepared::Present => {}
        }
    }
    bail!("snapshot {} is declared to be there, and is not; hint: try again", layer.chain)
}

/// What stands before the names of the labels of CRI.
const CRI: &str = "containerd.io/snapshot/cri.";

/// What CRI tells a snapshotter about a layer.
fn labels(resolved: &Resolved, number: usize) -> BTreeMap<String, String> {
    let layer = &resolved.layers[number];
    [
        ("containerd.io/snapshot.ref".to_owned(), layer.chain.to_string()),
        (format!("{CRI}image-ref"), resolved.name.clone()),
        (format!("{CRI}manifest-digest"), resolved.manifest.to_string()),
        (format!("{CRI}layer-digest"), layer.descriptor.digest.to_string()),
        list(resolved.layers[number..].iter().map(|layer| layer.descriptor.digest)),
    ]
    .into()
}

/// The label with a layer and those above it, as many as fit.
fn list(layers: impl Iterator<Item = Digest>) -> (String, String) {
    let key = format!("{CRI}image-layers");
    let mut list = String::new();
    for digest in layers {
        let item = digest.to_string();
        if key.len() + list.len() + 1 + item.len() > MAX_LABEL {
            break;
        }
        if !list.is_empty() {
            list.push(',');
        }
        list.push_str(&item);
    }
    (key, list)
}

/// A word that no other pull of this machine has used.
fn unique() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    format!("{now}-{}", std::process::id())
}

async fn unpack(
    resolved: &Resolved,
    number: usize,
    key: &str,
    mounts: &[Mount],
    snapshots: &Snapshots,
    space: &Namespace,
) -> anyhow::Result<()> {
    let layer = &resolved.layers[number];
    let applied = space.apply(&layer.descriptor, mounts).await?;
    ensure!(
        applied == layer.diff_id,
        "layer {} unpacks to {applied}, but the image's configuration says {}; hint: the image is damaged, push it again",
        layer.descriptor.digest,
        layer.diff_id
    );
    match snapshots.commit(key, &layer.chain.to_string(), &labels(resolved, number)).await {
        // Another client was faster.
        Err(ContainerdError::AlreadyExists { .. }) => Ok(snapshots.remove(key).await?),
        committed => Ok(committed?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_layers_is_cut_where_containerd_would_refuse_it() {
        let digests = |count: u8| (0..count).map(|n| Digest::of(&[n]));
        let (key, all) = list(digests(50));
        assert_eq!(all, digests(50).map(|digest| digest.to_string()).collect::<Vec<_>>().join(","));
        let (_, cut) = list(digests(100));
        assert!(key.len() + cut.len() <= MAX_LABEL && cut.starts_with(&all), "{}", cut.len());
        assert!(cut.split(',').all(|digest| digest.parse::<Digest>().is_ok()));
    }
}
