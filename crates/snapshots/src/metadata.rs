//! Snapshots in the database. Every change is one transaction; what is committed survives a power cut.

use std::collections::{BTreeMap, HashSet};
use std::ops::Bound;
use std::sync::Arc;

use millstream_oci::Digest;
use redb::{Database, MultimapTableDefinition, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};

use crate::error::database;
use crate::filter::{Fields, Filters};
use crate::mounts::MAX_LAYERS;
use crate::record::Record;
use crate::{Backing, Error, Info, Kind, LabelUpdate, Usage};

/// The label by which containerd asks for a layer, and by which it looks for it afterwards.
pub(crate) const TARGET_LABEL: &str = "containerd.io/snapshot.ref";

/// Key or name to [`Record`].
const RECORDS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots.records");
/// Number of a snapshot to the number of snapshots built on it; absent for none.
const CHILDREN: TableDefinition<'_, u64, u64> = TableDefinition::new("snapshots.children");
/// Digest of a layer to the number of snapshots that show it; absent for none.
const LAYERS: TableDefinition<'_, &str, u64> = TableDefinition::new("snapshots.layers");
/// Wanted chain ID and parent name to the names of committed snapshots with that label and parent.
const TARGETS: MultimapTableDefinition<'_, (&str, &str), &str> = MultimapTableDefinition::new("snapshots.targets");
/// One row: the next number.
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("snapshots.numbers");
const NEXT: &str = "next";

/// A snapshot to be made.
#[derive(Debug)]
pub(crate) struct New {
    pub(crate) key: String,
    pub(crate) kind: Kind,
    /// Name and number of the snapshot below, as they were when the request came in.
    pub(crate) parent: Option<(String, u64)>,
    pub(crate) labels: BTreeMap<String, String>,
    /// Nanoseconds since 1970.
    pub(crate) now: u64,
}

/// What became of a removed snapshot.
#[derive(Debug)]
pub(crate) struct Removed {
    pub(crate) record: Record,
    /// The layer that no snapshot shows any more.
    pub(crate) unused: Option<Digest>,
}

/// The tables of this crate in a database that others use too.
#[derive(Debug, Clone)]
pub(crate) struct Metadata {
    db: Arc<Database>,
}

impl Metadata {
    /// Makes the tables where they are missing. Numbers begin above `numbers_above` where none was given out yet.
    pub(crate) fn open(db: Arc<Database>, numbers_above: u64) -> Result<Self, Error> {
        let metadata = Self { db };
        metadata.write(|tx| {
            tx.open_table(RECORDS).map_err(database)?;
            tx.open_table(CHILDREN).map_err(database)?;
            tx.open_table(LAYERS).map_err(database)?;
            tx.open_multimap_table(TARGETS).map_err(database)?;
            let mut numbers = tx.open_table(NUMBERS).map_err(database)?;
            if numbers_above > 0 && numbers.get(NEXT).map_err(database)?.is_none() {
                numbers.insert(NEXT, numbers_above.saturating_add(1)).map_err(database)?;
            }
            Ok(())
        })?;
        Ok(metadata)
    }

    /// Runs `change` in a write transaction: all of it happens, or nothing when it fails.
    fn write<T>(&self, change: impl FnOnce(&WriteTransaction) -> Result<T, Error>) -> Result<T, Error> {
        let tx = self.db.begin_write().map_err(database)?;
        let result = change(&tx)?;
        tx.commit().map_err(database)?;
        Ok(result)
    }

    fn records(&self) -> Result<redb::ReadOnlyTable<&'static str, &'static [u8]>, Error> {
        self.db.begin_read().map_err(database)?.open_table(RECORDS).map_err(database)
    }

    /// The record of `name`.
    pub(crate) fn get(&self, name: &str) -> Result<Record, Error> {
        read(&self.records()?, name)?.ok_or_else(|| Error::NotFound(name.to_owned()))
    }

    /// `name` and everything below it, top first.
    pub(crate) fn chain(&self, name: &str) -> Result<Vec<(String, Record)>, Error> {
        let records = self.records()?;
        let mut chain = Vec::new();
        let mut next = name.to_owned();
        while !next.is_empty() {
            if chain.len() == MAX_LAYERS {
                return Err(Error::TooDeep(name.to_owned()));
            }
            let record = read(&records, &next)?.ok_or_else(|| Error::NotFound(next.clone()))?;
            let below = record.parent.clone();
            chain.push((next, record));
            next = below;
        }
        Ok(chain)
    }

    /// Lazy layers below active snapshots and views.
    pub(crate) fn held(&self) -> Result<HashSet<Digest>, Error> {
        let records = self.records()?;
        let mut held = HashSet::new();
        let mut seen: HashSet<String> = HashSet::new();
        for entry in records.iter().map_err(database)? {
            let (name, value) = entry.map_err(database)?;
            // What cannot be read is shown as damaged elsewhere; nothing is known of its layers.
            let Ok(record) = Record::decode(name.value(), value.value()) else { continue };
            if record.kind == Kind::Committed {
                continue;
            }
            let mut next = record.parent;
            while !next.is_empty() && seen.insert(next.clone()) {
                let Ok(Some(record)) = read(&records, &next) else { break };
                if let Backing::Lazy(layer) = record.backing {
                    held.insert(layer);
                }
                next = record.parent;
            }
        }
        Ok(held)
    }

    /// Makes an active snapshot or a view. `prepare` is called with its number before anything is recorded; when it
    /// fails, nothing is.
    pub(crate) fn create(&self, new: New, prepare: impl FnOnce(u64) -> Result<(), Error>) -> Result<Record, Error> {
        self.write(|tx| {
            let record = Record {
                id: next_number(tx)?,
                kind: new.kind,
                parent: new.parent.as_ref().map(|(name, _)| name.clone()).unwrap_or_default(),
                labels: without_empty(new.labels),
                created: new.now,
                updated: new.now,
                backing: Backing::Local,
                usage: None,
                namespaces: Vec::new(),
            };
            insert(tx, &new.key, &record, new.parent.map(|(_, id)| id))?;
            prepare(record.id)?;
            Ok(record)
        })
    }

    /// Makes a committed snapshot of a lazy layer, under a name of our own. `layer` is what shows it.
    pub(crate) fn create_lazy(&self, new: New, namespace: &str, target: &str, layer: Digest) -> Result<String, Error> {
        self.write(|tx| {
            let id = next_number(tx)?;
            // Never the form <namespace>/<sequence>/<key> that containerd's own names have.
            let name = format!("{namespace}/lazy-{id}/{target}");
            let record = Record {
                id,
                kind: Kind::Committed,
                parent: new.parent.as_ref().map(|(name, _)| name.clone()).unwrap_or_default(),
                labels: without_empty(new.labels),
                created: new.now,
                updated: new.now,
                backing: Backing::Lazy(layer),
                usage: None,
                namespaces: Vec::new(),
            };
            insert(tx, &name, &record, new.parent.map(|(_, id)| id))?;
            Ok(name)
        })
    }

    /// Committed snapshots that containerd's search for `target` over `parent` finds.
    pub(crate) fn find(&self, target: &str, parent: &str) -> Result<Vec<(String, Record)>, Error> {
        let tx = self.db.begin_read().map_err(database)?;
        let targets = tx.open_multimap_table(TARGETS).map_err(database)?;
        let records = tx.open_table(RECORDS).map_err(database)?;
        let mut found = Vec::new();
        for name in targets.get((target, parent)).map_err(database)? {
            let name = name.map_err(database)?.value().to_owned();
            if let Some(record) = read(&records, &name)? {
                found.push((name, record));
            }
        }
        Ok(found)
    }

    /// Notes that `namespace` has proven that it may read the lazy snapshot `name`. False when that is gone.
    pub(crate) fn admit(&self, name: &str, namespace: &str) -> Result<bool, Error> {
        self.write(|tx| {
            let mut records = tx.open_table(RECORDS).map_err(database)?;
            let Some(mut record) = read(&records, name)? else { return Ok(false) };
            if !record.namespaces.iter().any(|known| known == namespace) {
                record.namespaces.push(namespace.to_owned());
                let bytes = record.encode()?;
                records.insert(name, bytes.as_slice()).map_err(database)?;
            }
            Ok(true)
        })
    }

    /// Turns the active snapshot `key` into the committed snapshot `name`, with new labels. `parent` is empty or the
    /// parent that it has.
    pub(crate) fn commit(
        &self,
        key: &str,
        name: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
        now: u64,
    ) -> Result<Record, Error> {
        self.write(|tx| {
            let mut records = tx.open_table(RECORDS).map_err(database)?;
            if records.get(name).map_err(database)?.is_some() {
                return Err(Error::AlreadyExists(name.to_owned()));
            }
            let old = read(&records, key)?.ok_or_else(|| Error::NotFound(key.to_owned()))?;
            if old.kind != Kind::Active {
                return Err(Error::NotActive(key.to_owned()));
            }
            if !parent.is_empty() && parent != old.parent {
                return Err(Error::Invalid(format!(
                    "cannot commit snapshot {key:?} on parent {parent:?}: it was prepared on {:?}",
                    old.parent
                )));
            }
            let labels = without_empty(labels);
            let record = Record { kind: Kind::Committed, labels, created: now, updated: now, ..old };
            let bytes = record.encode()?;
            records.remove(key).map_err(database)?;
            records.insert(name, bytes.as_slice()).map_err(database)?;
            index(tx, name, None, Some(&record))?;
            Ok(record)
        })
    }

    /// Removes a snapshot that nothing is built on.
    pub(crate) fn remove(&self, name: &str) -> Result<Removed, Error> {
        self.write(|tx| {
            let mut records = tx.open_table(RECORDS).map_err(database)?;
            let record = read(&records, name)?.ok_or_else(|| Error::NotFound(name.to_owned()))?;
            let mut children = tx.open_table(CHILDREN).map_err(database)?;
            let count = children.get(record.id).map_err(database)?.map_or(0, |count| count.value());
            if count > 0 {
                return Err(Error::HasChildren(name.to_owned(), count));
            }
            records.remove(name).map_err(database)?;
            if let Some(parent) = read(&records, &record.parent)? {
                lower(&mut children, parent.id)?;
            }
            index(tx, name, Some(&record), None)?;
            let unused = match record.backing {
                Backing::Local => None,
                Backing::Lazy(layer) => {
                    let mut layers = tx.open_table(LAYERS).map_err(database)?;
                    (lower(&mut layers, layer.to_string().as_str())? == 0).then_some(layer)
                }
            };
            Ok(Removed { record, unused })
        })
    }

    /// Changes labels; nothing else of a snapshot can be changed.
    pub(crate) fn update(&self, name: &str, update: LabelUpdate, now: u64) -> Result<Record, Error> {
        self.write(|tx| {
            let mut records = tx.open_table(RECORDS).map_err(database)?;
            let old = read(&records, name)?.ok_or_else(|| Error::NotFound(name.to_owned()))?;
            let labels = match update {
                LabelUpdate::Replace(labels) => labels,
                LabelUpdate::Set(changes) => {
                    let mut labels = old.labels.clone();
                    labels.extend(changes);
                    labels
                }
            };
            let record = Record { labels: without_empty(labels), updated: now, ..old.clone() };
            let bytes = record.encode()?;
            records.insert(name, bytes.as_slice()).map_err(database)?;
            index(tx, name, Some(&old), Some(&record))?;
            Ok(record)
        })
    }

    /// Stores the usage of a committed snapshot. Nothing happens when `name` is another snapshot by now.
    pub(crate) fn set_usage(&self, name: &str, id: u64, usage: Usage) -> Result<(), Error> {
        self.write(|tx| {
            let mut records = tx.open_table(RECORDS).map_err(database)?;
            if let Some(mut record) = read(&records, name)?.filter(|record| record.id == id) {
                record.usage = Some(usage);
                let bytes = record.encode()?;
                records.insert(name, bytes.as_slice()).map_err(database)?;
            }
            Ok(())
        })
    }

    /// The first `limit` snapshots after `after` (all for none), by key or name, that match. Records that cannot be
    /// read are left out: [`Metadata::numbers`] reports them.
    pub(crate) fn list(&self, after: Option<&str>, limit: usize, filters: &Filters) -> Result<Vec<Info>, Error> {
        let records = self.records()?;
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut batch = Vec::new();
        for row in records.range::<&str>((start, Bound::Unbounded)).map_err(database)? {
            let (name, bytes) = row.map_err(database)?;
            let Ok(record) = Record::decode(name.value(), bytes.value()) else { continue };
            let info = record.info(name.value());
            if filters.matches(&info) {
                batch.push(info);
                if batch.len() == limit {
                    break;
                }
            }
        }
        Ok(batch)
    }

    /// Calls `use_them` with every snapshot whose files are in a directory of its own (number to name), and with those
    /// whose record cannot be read. While it runs, no snapshot comes or goes.
    pub(crate) fn numbers<T>(
        &self,
        use_them: impl FnOnce(BTreeMap<u64, String>, Vec<(String, Error)>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.write(|tx| {
            let records = tx.open_table(RECORDS).map_err(database)?;
            let (mut numbers, mut unreadable) = (BTreeMap::new(), Vec::new());
            for row in records.iter().map_err(database)? {
                let (name, bytes) = row.map_err(database)?;
                match Record::decode(name.value(), bytes.value()) {
                    Ok(Record { id, backing: Backing::Local, .. }) => {
                        numbers.insert(id, name.value().to_owned());
                    }
                    Ok(Record { backing: Backing::Lazy(_), .. }) => {}
                    Err(error) => unreadable.push((name.value().to_owned(), error)),
                }
            }
            use_them(numbers, unreadable)
        })
    }

    /// Layers that snapshots show.
    pub(crate) fn layers(&self) -> Result<HashSet<Digest>, Error> {
        let tx = self.db.begin_read().map_err(database)?;
        let layers = tx.open_table(LAYERS).map_err(database)?;
        let mut used = HashSet::new();
        for row in layers.iter().map_err(database)? {
            let text = row.map_err(database)?.0.value().to_owned();
            let parsed = text.parse().map_err(|_| Error::Invalid(format!("{text:?} in the database is no digest")));
            used.insert(parsed?);
        }
        Ok(used)
    }

    /// Whether a snapshot shows `layer`.
    pub(crate) fn uses(&self, layer: &Digest) -> Result<bool, Error> {
        let tx = self.db.begin_read().map_err(database)?;
        let layers = tx.open_table(LAYERS).map_err(database)?;
        Ok(layers.get(layer.to_string().as_str()).map_err(database)?.is_some())
    }
}

/// The record of `name` in an open table.
fn read(records: &impl ReadableTable<&'static str, &'static [u8]>, name: &str) -> Result<Option<Record>, Error> {
    match records.get(name).map_err(database)? {
        Some(bytes) => Record::decode(name, bytes.value()).map(Some),
        None => Ok(None),
    }
}

/// A number that no snapshot ever had. (One that was drawn by a transaction that failed is drawn again.)
fn next_number(tx: &WriteTransaction) -> Result<u64, Error> {
    let mut numbers = tx.open_table(NUMBERS).map_err(database)?;
    let next = numbers.get(NEXT).map_err(database)?.map_or(1, |next| next.value());
    numbers.insert(NEXT, next + 1).map_err(database)?;
    Ok(next)
}

/// Records a new snapshot and counts it at its parent, which must still be the one with the number `parent`.
fn insert(tx: &WriteTransaction, name: &str, record: &Record, parent: Option<u64>) -> Result<(), Error> {
    let mut records = tx.open_table(RECORDS).map_err(database)?;
    if records.get(name).map_err(database)?.is_some() {
        return Err(Error::AlreadyExists(name.to_owned()));
    }
    if let Some(id) = parent {
        let below = read(&records, &record.parent)?.filter(|below| below.id == id);
        let below = below.ok_or_else(|| Error::NotFound(record.parent.clone()))?;
        if below.kind != Kind::Committed {
            return Err(Error::ParentNotCommitted(record.parent.clone()));
        }
        raise(&mut tx.open_table(CHILDREN).map_err(database)?, id)?;
    }
    if let Backing::Lazy(layer) = record.backing {
        raise(&mut tx.open_table(LAYERS).map_err(database)?, layer.to_string().as_str())?;
    }
    let bytes = record.encode()?;
    records.insert(name, bytes.as_slice()).map_err(database)?;
    index(tx, name, None, Some(record))
}

/// Keeps [`TARGETS`] in step with a record that changes from `old` to `new`.
fn index(tx: &WriteTransaction, name: &str, old: Option<&Record>, new: Option<&Record>) -> Result<(), Error> {
    fn entry(record: &Record) -> Option<(&str, &str)> {
        let target = record.labels.get(TARGET_LABEL).filter(|_| record.kind == Kind::Committed)?;
        Some((target, &record.parent))
    }
    let (old, new) = (old.and_then(entry), new.and_then(entry));
    if old == new {
        return Ok(());
    }
    let mut targets = tx.open_multimap_table(TARGETS).map_err(database)?;
    if let Some(entry) = old {
        targets.remove(entry, name).map_err(database)?;
    }
    if let Some(entry) = new {
        targets.insert(entry, name).map_err(database)?;
    }
    Ok(())
}

/// Adds one to a counter.
fn raise<'k, K>(counters: &mut redb::Table<'_, K, u64>, key: K::SelfType<'k>) -> Result<(), Error>
where
    K: redb::Key + 'static,
    K::SelfType<'k>: Copy,
{
    let count = counters.get(key).map_err(database)?.map_or(0, |count| count.value());
    counters.insert(key, count + 1).map_err(database)?;
    Ok(())
}

/// Takes one from a counter and gives what is left; a counter at zero is not stored.
fn lower<'k, K>(counters: &mut redb::Table<'_, K, u64>, key: K::SelfType<'k>) -> Result<u64, Error>
where
    K: redb::Key + 'static,
    K::SelfType<'k>: Copy,
{
    let left = counters.get(key).map_err(database)?.map_or(0, |count| count.value().saturating_sub(1));
    if left == 0 {
        counters.remove(key).map_err(database)?;
    } else {
        counters.insert(key, left).map_err(database)?;
    }
    Ok(left)
}

/// For containerd, a label with an empty value is no label.
fn without_empty(mut labels: BTreeMap<String, String>) -> BTreeMap<String, String> {
    labels.retain(|_, value| !value.is_empty());
    labels
}

impl Fields for Info {
    fn field(&self, path: &[String]) -> Option<&str> {
        let (first, rest) = path.split_first()?;
        match first.as_str() {
            "kind" => Some(self.kind.as_str()),
            "name" => Some(&self.name),
            "parent" => Some(&self.parent),
            "labels" => self.labels.get(&rest.join(".")).map(String::as_str),
            _ => None,
        }
    }
}
