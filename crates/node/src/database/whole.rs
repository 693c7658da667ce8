//! Both files of a database that is in use, every page of them: `millstream check`.
//!
//! What is looked at is a copy in memory, made while nobody can commit: the library mends what it opens, and nothing is changed
//! here.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::Context;
use redb::backends::InMemoryBackend;
use redb::{Builder, Database, StorageBackend};

use super::{COPY, FILE, damage_of};

/// The files of `db`, which is open below `root`, that are damaged or gone: by name, with what is wrong. Blocks; nothing can be
/// committed while the files are read, which is soon done.
///
/// # Errors
/// Those of the database; damage is none.
pub fn check(root: &Path, db: &Database) -> anyhow::Result<Vec<(&'static str, String)>> {
    let [file, copy] = {
        // Whoever may write has the files to himself; this one writes nothing.
        let _alone = db.begin_write().context("waiting for the database")?;
        [FILE, COPY].map(|name| fs::read(root.join(name)))
    };
    let same = matches!((&file, &copy), (Ok(file), Ok(copy)) if file == copy);
    let first = look(file)?;
    let second = if same { first.clone() } else { look(copy)? };
    // A page that nobody needs now, perhaps; but it was never written so.
    let differs = !same && first.is_none() && second.is_none();
    let second = second.or_else(|| differs.then(|| format!("it is not equal to {FILE}")));
    Ok([(FILE, first), (COPY, second)].into_iter().filter_map(|(name, what)| Some((name, what?))).collect())
}

/// What is wrong with a database of these bytes.
fn look(file: io::Result<Vec<u8>>) -> anyhow::Result<Option<String>> {
    let bytes = match file {
        Ok(bytes) if bytes.is_empty() => return Ok(Some("it is empty".to_owned())),
        Ok(bytes) => bytes,
        Err(error) => return Ok(Some(format!("it cannot be read: {error}"))),
    };
    let memory = InMemoryBackend::new();
    memory.set_len(bytes.len() as u64).and_then(|()| memory.write(0, &bytes)).context("copying the database")?;
    drop(bytes);
    let open = || Builder::new().set_check_integrity_on_open(true).create_with_backend(memory);
    damage_of(open).context("looking at the database")
}
