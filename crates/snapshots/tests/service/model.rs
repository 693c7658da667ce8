//! Random calls, compared with a map of snapshots and the rules of the contract.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use millstream_oci::Digest;
use millstream_snapshots::filter::Filters;
use millstream_snapshots::{Error, Info, Kind, LabelUpdate, LazyImages, Options, Prepared, Snapshots};
use proptest::prelude::*;

use crate::harness::Images;
use crate::remote::{REF, target};

const NAMESPACE: &str = "k8s.io";
/// Names that calls choose from, beside those of lazy snapshots that have come about.
const NAMES: usize = 5;
/// Targets: the first two are lazy and shown by one layer, the third is lazy, the last is not.
const TARGETS: usize = 4;

type Labels = BTreeMap<String, String>;

/// A call. Numbers choose a name or target, whatever there is at that moment.
#[derive(Debug, Clone)]
enum Call {
    Prepare { key: usize, parent: Option<usize>, target: Option<usize> },
    View { key: usize, parent: Option<usize> },
    Commit { key: usize, name: usize, target: Option<usize> },
    Remove { name: usize },
    Replace { name: usize, target: Option<usize> },
    Set { name: usize, target: Option<usize> },
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let name = || 0..NAMES + 4;
    let parent = || prop::option::weighted(0.6, 0..NAMES + 4);
    let target = || prop::option::weighted(0.6, 0..TARGETS);
    let call = prop_oneof![
        4 => (name(), parent(), target()).prop_map(|(key, parent, target)| Call::Prepare { key, parent, target }),
        1 => (name(), parent()).prop_map(|(key, parent)| Call::View { key, parent }),
        3 => (name(), name(), target()).prop_map(|(key, name, target)| Call::Commit { key, name, target }),
        2 => name().prop_map(|name| Call::Remove { name }),
        1 => (name(), target()).prop_map(|(name, target)| Call::Replace { name, target }),
        1 => (name(), target()).prop_map(|(name, target)| Call::Set { name, target }),
    ];
    prop::collection::vec(call, 1..60)
}

/// One snapshot of the model.
#[derive(Debug, Clone, PartialEq)]
struct Entry {
    kind: Kind,
    parent: String,
    labels: Labels,
    layer: Option<Digest>,
}

/// What a call came to, as far as it is foretold.
#[derive(Debug, PartialEq)]
enum Outcome {
    Done,
    NotFound,
    Exists,
    HasChildren,
    NotActive,
    ParentNotCommitted,
}

fn outcome<T>(result: Result<T, Error>) -> Outcome {
    match result {
        Ok(_) => Outcome::Done,
        Err(Error::NotFound(_)) => Outcome::NotFound,
        Err(Error::AlreadyExists(_)) => Outcome::Exists,
        Err(Error::HasChildren(..)) => Outcome::HasChildren,
        Err(Error::NotActive(_)) => Outcome::NotActive,
        Err(Error::ParentNotCommitted(_)) => Outcome::ParentNotCommitted,
        Err(other) => panic!("{other}"),
    }
}

#[derive(Default)]
struct Model(BTreeMap<String, Entry>);

impl Model {
    /// Names to choose from: fixed ones, then those of lazy snapshots.
    fn name(&self, number: usize) -> String {
        let lazy: Vec<&String> = self.0.keys().filter(|name| name.contains("/lazy-")).collect();
        match number.checked_sub(NAMES).filter(|_| !lazy.is_empty()) {
            Some(beyond) => lazy[beyond % lazy.len()].clone(),
            None => format!("{NAMESPACE}/{}/name", number % NAMES),
        }
    }

    fn parent(&self, number: Option<usize>) -> String {
        number.map(|number| self.name(number)).unwrap_or_default()
    }

    /// What keeps a snapshot from being made.
    fn obstacle(&self, key: &str, parent: &str) -> Option<Outcome> {
        if self.0.contains_key(key) {
            return Some(Outcome::Exists);
        }
        match self.0.get(parent) {
            _ if parent.is_empty() => None,
            None => Some(Outcome::NotFound),
            Some(entry) if entry.kind != Kind::Committed => Some(Outcome::ParentNotCommitted),
            Some(_) => None,
        }
    }

    /// Committed snapshots that stand for a target over a parent.
    fn standing(&self, labels: &Labels, parent: &str) -> Vec<String> {
        let stands = |entry: &Entry| {
            entry.kind == Kind::Committed && entry.parent == parent && entry.labels.get(REF) == labels.get(REF)
        };
        self.0.iter().filter(|(_, entry)| stands(entry)).map(|(name, _)| name.clone()).collect()
    }

    fn has_children(&self, name: &str) -> bool {
        self.0.values().any(|entry| entry.parent == name)
    }

    fn layers(&self) -> BTreeSet<Digest> {
        self.0.values().filter_map(|entry| entry.layer).collect()
    }
}

fn layer_of(number: usize) -> Option<Digest> {
    match number {
        0 | 1 => Some(Digest::of(target("0").as_bytes())),
        2 => Some(Digest::of(target("2").as_bytes())),
        _ => None,
    }
}

fn labels(number: Option<usize>) -> Labels {
    number.map(|number| (REF.to_owned(), target(&number.to_string()))).into_iter().collect()
}

async fn play(call: Call, snapshots: &Snapshots, model: &mut Model) {
    match call {
        Call::Prepare { key, parent, target } => prepare(snapshots, model, key, parent, target).await,
        Call::View { key, parent } => {
            let (key, parent) = (model.name(key), model.parent(parent));
            let found = outcome(snapshots.view(&key, &parent, Labels::new()).await);
            assert_eq!(found, model.obstacle(&key, &parent).unwrap_or(Outcome::Done));
            if found == Outcome::Done {
                model.0.insert(key, Entry { kind: Kind::View, parent, labels: Labels::new(), layer: None });
            }
        }
        Call::Commit { key, name, target } => {
            let (key, name, labels) = (model.name(key), model.name(name), labels(target));
            let found = outcome(snapshots.commit(&key, &name, "", labels.clone()).await);
            let expected = match model.0.get(&key) {
                _ if model.0.contains_key(&name) => Outcome::Exists,
                None => Outcome::NotFound,
                Some(entry) if entry.kind != Kind::Active => Outcome::NotActive,
                Some(_) => Outcome::Done,
            };
            assert_eq!(found, expected);
            if found == Outcome::Done {
                let old = model.0.remove(&key).unwrap();
                model.0.insert(name, Entry { kind: Kind::Committed, labels, ..old });
            }
        }
        Call::Remove { name } => {
            let name = model.name(name);
            let found = outcome(snapshots.remove(&name).await);
            let expected = match model.0.get(&name) {
                None => Outcome::NotFound,
                Some(_) if model.has_children(&name) => Outcome::HasChildren,
                Some(_) => Outcome::Done,
            };
            assert_eq!(found, expected);
            if found == Outcome::Done {
                model.0.remove(&name);
            }
        }
        Call::Replace { name, target } => update(snapshots, model, name, LabelUpdate::Replace(labels(target))).await,
        Call::Set { name, target } => {
            // No target: an empty value, which takes the label away.
            let mut changes = labels(target);
            changes.entry(REF.to_owned()).or_default();
            update(snapshots, model, name, LabelUpdate::Set(changes)).await;
        }
    }
}

async fn prepare(snapshots: &Snapshots, model: &mut Model, key: usize, parent: Option<usize>, target: Option<usize>) {
    let (key, parent, labels) = (model.name(key), model.parent(parent), labels(target));
    let prepared = snapshots.prepare(NAMESPACE, &key, &parent, labels.clone()).await;
    if let Some(expected) = model.obstacle(&key, &parent) {
        assert_eq!(outcome(prepared), expected);
        return;
    }
    let standing = if target.is_some() { model.standing(&labels, &parent) } else { Vec::new() };
    let layer = target.and_then(layer_of);
    match prepared.unwrap() {
        Prepared::Skipped(name) if !standing.is_empty() => assert!(standing.contains(&name), "{name} of {standing:?}"),
        Prepared::Skipped(name) => {
            assert!(layer.is_some(), "{target:?} cannot be lazy");
            let entry = Entry { kind: Kind::Committed, parent, labels, layer };
            assert!(model.0.insert(name, entry).is_none());
        }
        Prepared::Mounts(_) => {
            assert!(standing.is_empty() && layer.is_none(), "{target:?} need not be unpacked");
            model.0.insert(key, Entry { kind: Kind::Active, parent, labels, layer: None });
        }
    }
}

async fn update(snapshots: &Snapshots, model: &mut Model, name: usize, update: LabelUpdate) {
    let name = model.name(name);
    let found = snapshots.update(&name, update.clone()).await;
    let Some(entry) = model.0.get_mut(&name) else {
        assert_eq!(outcome(found), Outcome::NotFound);
        return;
    };
    match update {
        LabelUpdate::Replace(labels) => entry.labels = labels,
        LabelUpdate::Set(changes) => entry.labels.extend(changes),
    }
    entry.labels.retain(|_, value| !value.is_empty());
    assert_eq!(found.unwrap().labels, entry.labels);
}

/// All that can be seen is what the model says.
async fn compare(snapshots: &Snapshots, model: &Model) {
    let all: Vec<Info> = snapshots.list(Arc::new(Filters::default()), None, usize::MAX).await.unwrap();
    let seen: BTreeMap<String, (Kind, String, Labels)> =
        all.into_iter().map(|info| (info.name, (info.kind, info.parent, info.labels))).collect();
    let expected = model.0.iter();
    let expected = expected.map(|(name, at)| (name.clone(), (at.kind, at.parent.clone(), at.labels.clone())));
    assert_eq!(seen, expected.collect());
    assert_eq!(snapshots.layers().unwrap().into_iter().collect::<BTreeSet<_>>(), model.layers());
    for (name, entry) in model.0.iter().filter(|(_, entry)| entry.kind != Kind::Committed) {
        let mounts = snapshots.mounts(name).await;
        assert!(mounts.is_ok(), "{name} {entry:?}: {mounts:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_calls_do_what_the_contract_says(calls in calls()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let temp = tempfile::tempdir().unwrap();
            let db = redb::Database::builder().create_with_backend(redb::backends::InMemoryBackend::new()).unwrap();
            let images = Arc::new(Images::in_directory(temp.path().join("v")));
            for number in (0..TARGETS).filter(|number| *number != 1) {
                if layer_of(number).is_some() {
                    images.lazy(&target(&number.to_string()), |_| {});
                }
            }
            images.answer(&target("1"), millstream_snapshots::PrepareOutcome::Lazy { layer: layer_of(1).unwrap() });
            let lazy: Arc<dyn LazyImages> = images.clone();
            let snapshots = Snapshots::open(&temp.path().join("root"), Arc::new(db), lazy, Options::default()).unwrap();
            let mut model = Model::default();
            for call in calls {
                play(call, &snapshots, &mut model).await;
            }
            compare(&snapshots, &model).await;
        });
    }
}
