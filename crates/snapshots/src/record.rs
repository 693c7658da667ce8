//! What is stored about one snapshot.

use std::collections::BTreeMap;

use millstream_oci::Digest;
use serde::{Deserialize, Serialize};

use crate::Error;

/// State of a snapshot, with containerd's meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Writable, known by its key.
    Active,
    /// Read-only, known by its key.
    View,
    /// Never changes again, known by its name; can be a parent.
    Committed,
}

impl Kind {
    /// The word that filters use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::View => "view",
            Self::Committed => "committed",
        }
    }
}

/// Where the files of a snapshot are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// In a directory of its own.
    Local,
    /// In a layer that [`crate::LazyImages`] shows.
    Lazy(Digest),
}

/// Disk space.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Allocated bytes.
    pub bytes: u64,
    /// Files and directories, hard links counted once.
    pub inodes: u64,
}

/// A snapshot as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Number of the snapshot: names its directory, never used twice.
    pub(crate) id: u64,
    pub(crate) kind: Kind,
    /// Name of the snapshot below; empty for none.
    pub(crate) parent: String,
    pub(crate) labels: BTreeMap<String, String>,
    /// Nanoseconds since 1970.
    pub(crate) created: u64,
    /// Nanoseconds since 1970.
    pub(crate) updated: u64,
    pub(crate) backing: Backing,
    /// Known for committed local snapshots, some time after the commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Usage>,
    /// Namespaces, beside the one that its name begins with, that have proven that they may read it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) namespaces: Vec<String>,
}

/// What the outside may know of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Key (active, view) or name (committed).
    pub name: String,
    /// Name of the snapshot below; empty for none.
    pub parent: String,
    /// Its state.
    pub kind: Kind,
    /// Labels; never with an empty value.
    pub labels: BTreeMap<String, String>,
    /// Nanoseconds since 1970.
    pub created: u64,
    /// Nanoseconds since 1970.
    pub updated: u64,
    /// Where its files are.
    pub backing: Backing,
}

/// First byte of every stored record. Others are refused, so that an older program never misreads a newer record.
const VERSION: u8 = 1;

impl Record {
    /// The stored form: a version byte, then JSON, which can grow fields and which a person can read in an emergency.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![VERSION];
        serde_json::to_writer(&mut bytes, self).map_err(Error::Encode)?;
        Ok(bytes)
    }

    /// Reads the stored form of the snapshot `name`.
    pub(crate) fn decode(name: &str, bytes: &[u8]) -> Result<Self, Error> {
        let damaged = |what: String| Error::Damaged { name: name.to_owned(), what };
        match bytes.split_first() {
            Some((&VERSION, json)) => {
                serde_json::from_slice(json).map_err(|error| damaged(format!("its record cannot be read: {error}")))
            }
            Some((version, _)) => Err(damaged(format!("its record has the unknown version {version}"))),
            None => Err(damaged("its record is empty".to_owned())),
        }
    }

    /// What the outside may know.
    pub(crate) fn info(&self, name: &str) -> Info {
        Info {
            name: name.to_owned(),
            parent: self.parent.clone(),
            kind: self.kind,
            labels: self.labels.clone(),
            created: self.created,
            updated: self.updated,
            backing: self.backing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            id: 7,
            kind: Kind::Committed,
            parent: "below".into(),
            labels: BTreeMap::from([("a".into(), "b".into())]),
            created: 1,
            updated: 2,
            backing: Backing::Lazy(Digest::of(b"x")),
            usage: None,
            namespaces: vec!["k8s.io".into()],
        }
    }

    #[test]
    fn round_trip() {
        let bytes = record().encode().unwrap();
        assert_eq!(Record::decode("n", &bytes).unwrap(), record());
    }

    #[test]
    fn records_of_version_1_stay_readable() {
        let old = b"\x01{\"id\":3,\"kind\":\"active\",\"parent\":\"\",\"labels\":{},\"created\":5,\"updated\":5,\"backing\":\"local\"}";
        let record = Record::decode("n", old).unwrap();
        assert_eq!((record.id, record.kind, record.backing, record.usage), (3, Kind::Active, Backing::Local, None));
    }

    #[test]
    fn unreadable_records_are_named() {
        for bytes in [&b""[..], b"\x02{}", b"\x01{"] {
            let error = Record::decode("n", bytes).unwrap_err();
            assert!(matches!(&error, Error::Damaged { name, .. } if name == "n"), "{error}");
        }
    }
}
