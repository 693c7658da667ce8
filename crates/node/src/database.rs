//! The database of the node: opened whatever became of it since the last time.
//!
//! containerd keeps a list of our snapshots of its own and never asks again: a node that forgets them cannot start another
//! container of those images until somebody removes and pulls them. So every commit goes to two files, byte for byte
//! ([`mirror`]), and every page of the first is checked against its checksum before it is used. If it does not stand the test
//! it is put aside, never deleted, and the second takes its place. Only when both are lost is there anything to lose.

mod mirror;
mod whole;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use redb::{Builder, Database, DatabaseError, ReadableDatabase, StorageError, TableDefinition, TableError};
use rustix::io::Errno;
use tracing::{info, warn};

use self::mirror::Mirror;
pub use self::whole::check;

/// The file that is read.
pub const FILE: &str = "state.redb";
/// The second file.
const COPY: &str = "state.copy.redb";
/// One row: the format of what the tables hold.
const FORMAT_TABLE: TableDefinition<'_, &str, u32> = TableDefinition::new("node_format");
const FORMAT_KEY: &str = "format";
/// Format that this program writes, and the latest that it reads.
const FORMAT: u32 = 1;
/// How a file of redb begins, and where it says its own format.
const MAGIC: [u8; 9] = *b"redb\x1a\x0a\xa9\x0d\x0a";
const REDB_FORMAT_AT: u64 = 64;
/// The latest format of redb that this program reads.
const REDB_FORMAT: u8 = 3;
/// Formats beyond this are no formats but damage.
const REDB_FORMAT_PLAUSIBLE: u8 = 15;

/// What had to be done to have a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// It was whole, or this is a new root.
    Whole,
    /// The first file was lost; nothing else was.
    FromCopy {
        /// What was wrong with it, and where it is now.
        what: String,
    },
    /// Both files were lost. What is here of layers and snapshots belongs to nobody any more.
    Lost {
        /// What was wrong, and where everything is now.
        what: String,
    },
}

/// Opens the database below `root`, or begins one.
///
/// # Errors
/// When it is in use, in the format of a newer program, or the disk cannot be used. Damage is no error.
pub fn open(root: &Path) -> anyhow::Result<(Database, Found)> {
    let (file, copy) = (root.join(FILE), root.join(COPY));
    refuse_newer(&file)?;
    let found = match examine(&file)? {
        Examined::Whole => Found::Whole,
        Examined::Absent if !is_used(root)? && !copy.exists() => Found::Whole,
        Examined::Absent => restore(root, "it was gone or empty".to_owned(), None)?,
        Examined::Damaged(why) => {
            let aside = put_aside(&file)?;
            restore(root, why, Some(aside))?
        }
    };
    if is_empty(&file) {
        drop(Database::create(&file).context("beginning the database")?);
    }
    duplicate(&file, &copy);
    let db = Builder::new().create_with_backend(Mirror::open(&file, &copy)?).context("opening the database")?;
    check_format(&db)?;
    Ok((db, found))
}

fn is_empty(file: &Path) -> bool {
    fs::metadata(file).map_or(true, |found| found.len() == 0)
}

/// Refuses what a newer program wrote: put aside, it would be lost to that one.
fn refuse_newer(file: &Path) -> anyhow::Result<()> {
    let Ok(open) = File::open(file) else { return Ok(()) };
    let mut magic = [0; MAGIC.len()];
    let mut format = [0; 1];
    if open.read_exact_at(&mut magic, 0).and_then(|()| open.read_exact_at(&mut format, REDB_FORMAT_AT)).is_err() {
        return Ok(());
    }
    if magic == MAGIC && (REDB_FORMAT + 1..=REDB_FORMAT_PLAUSIBLE).contains(&format[0]) {
        bail!(
            "{} has the format {} of a newer program, and this one reads up to {REDB_FORMAT}; hint: start the newer \
             millstreamd again",
            file.display(),
            format[0]
        );
    }
    Ok(())
}

/// The same for what our tables hold; marks a database that has no mark yet.
fn check_format(db: &Database) -> anyhow::Result<()> {
    let read = db.begin_read()?;
    let format = match read.open_table(FORMAT_TABLE) {
        Ok(table) => table.get(FORMAT_KEY)?.map(|format| format.value()),
        Err(TableError::TableDoesNotExist(_)) => None,
        Err(error) => return Err(error).context("reading the format of the database"),
    };
    match format {
        Some(format) if format > FORMAT => bail!(
            "the database has the format {format} of a newer program, and this one reads up to {FORMAT}; hint: start the newer \
             millstreamd again"
        ),
        Some(_) => Ok(()),
        None => {
            let write = db.begin_write()?;
            write.open_table(FORMAT_TABLE)?.insert(FORMAT_KEY, FORMAT)?;
            Ok(write.commit()?)
        }
    }
}

enum Examined {
    Whole,
    /// Or empty, as a crash leaves one that was just begun.
    Absent,
    /// And why it cannot be used.
    Damaged(String),
}

/// Reads a whole database and compares every page with its checksum; mends what a crash may leave.
///
/// # Errors
/// What is no damage: it is in use, or the disk refuses.
fn examine(file: &Path) -> anyhow::Result<Examined> {
    match fs::symlink_metadata(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Examined::Absent),
        Err(error) => return Err(error).with_context(|| format!("looking at {}", file.display())),
        Ok(found) if !found.is_file() => return Ok(Examined::Damaged("it is no regular file".to_owned())),
        Ok(found) if found.len() == 0 => return Ok(Examined::Absent),
        Ok(_) => {}
    }
    let damage = damage_of(|| Builder::new().set_check_integrity_on_open(true).open(file));
    let damage = damage.with_context(|| format!("opening the database {}", file.display()))?;
    Ok(damage.map_or(Examined::Whole, Examined::Damaged))
}

/// What is wrong with a database, if anything is; `open` checks all of it.
fn damage_of(open: impl FnOnce() -> Result<Database, DatabaseError>) -> Result<Option<String>, DatabaseError> {
    // Garbage that no checksum covers may be more than the library expects.
    match catch_unwind(AssertUnwindSafe(|| open()?.close())) {
        Ok(Ok(())) => Ok(None),
        Ok(Err(error)) if is_damage(&error) => Ok(Some(error.to_string())),
        Ok(Err(error)) => Err(error),
        Err(_) => Ok(Some("the library could not make sense of it".to_owned())),
    }
}

fn is_damage(error: &DatabaseError) -> bool {
    match error {
        DatabaseError::Storage(StorageError::Corrupted(_)) | DatabaseError::UpgradeRequired(_) => true,
        DatabaseError::Storage(StorageError::Io(error)) => {
            // The last one: beyond the end of what is in memory.
            let kinds = [io::ErrorKind::UnexpectedEof, io::ErrorKind::InvalidData, io::ErrorKind::InvalidInput];
            kinds.contains(&error.kind()) || error.raw_os_error() == Some(Errno::IO.raw_os_error())
        }
        _ => false,
    }
}

/// Whether somebody kept state below `root` before.
fn is_used(root: &Path) -> anyhow::Result<bool> {
    for dir in ["layers", "s"] {
        match fs::read_dir(root.join(dir)) {
            Ok(mut entries) => {
                if entries.next().is_some() {
                    return Ok(true);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("listing {dir}")),
        }
    }
    Ok(false)
}

/// Puts the copy in the place of the lost file; where that is lost too, moves away what nobody knows any more.
fn restore(root: &Path, why: String, aside: Option<PathBuf>) -> anyhow::Result<Found> {
    let (file, copy) = (root.join(FILE), root.join(COPY));
    let kept = aside.map_or_else(String::new, |aside| format!("; it is kept as {}", aside.display()));
    let copy_is = match examine(&copy)? {
        Examined::Whole => {
            replace(&copy, &file).context("restoring the database from its copy")?;
            let what = format!("{}: {why}{kept}", file.display());
            return Ok(Found::FromCopy { what });
        }
        Examined::Absent => "gone, too".to_owned(),
        Examined::Damaged(why) => format!("damaged, too: {why}; it is kept as {}", put_aside(&copy)?.display()),
    };
    let mut what = format!("{}: {why}{kept}. Its copy is {copy_is}", file.display());
    // Containers may have written there.
    let snapshots = root.join("s");
    if snapshots.exists() {
        what = format!("{what}. Directories of snapshots are kept as {}", put_aside(&snapshots)?.display());
    }
    Ok(Found::Lost { what })
}

/// Renames `path` to a free name with the time.
fn put_aside(path: &Path) -> anyhow::Result<PathBuf> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".damaged-{now}"));
    let mut aside = PathBuf::from(name.clone());
    let mut number = 1;
    while aside.symlink_metadata().is_ok() {
        let mut next = name.clone();
        next.push(format!("-{number}"));
        (aside, number) = (PathBuf::from(next), number + 1);
    }
    fs::rename(path, &aside).with_context(|| format!("putting {} aside", path.display()))?;
    Ok(aside)
}

/// Makes the copy equal to the file. One that cannot be made must not be left as it was: what is restored from it later would
/// be old.
fn duplicate(file: &Path, copy: &Path) {
    match is_equal(file, copy) {
        Ok(true) => return,
        Ok(false) => {}
        Err(error) => warn!(%error, file = %copy.display(), "the copy of the database cannot be read; making it again"),
    }
    if copy.symlink_metadata().is_ok_and(|found| !found.is_file())
        && let Err(error) = put_aside(copy)
    {
        warn!(error = format!("{error:#}"), "something stands where the copy of the database should be");
    }
    match replace(file, copy) {
        Ok(()) => info!(file = %copy.display(), "the copy of the database is made anew"),
        Err(error) => {
            let _ = fs::remove_file(copy);
            warn!(%error, file = %copy.display(), "the database has no copy now");
        }
    }
}

fn is_equal(one: &Path, other: &Path) -> io::Result<bool> {
    let other = match File::open(other) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        other => other?,
    };
    let one = File::open(one)?;
    if one.metadata()?.len() != other.metadata()?.len() {
        return Ok(false);
    }
    let (mut one, mut other) = (io::BufReader::with_capacity(PIECE, one), io::BufReader::with_capacity(PIECE, other));
    let (mut left, mut right) = (vec![0; PIECE], vec![0; PIECE]);
    loop {
        let len = one.read(&mut left)?;
        if len == 0 {
            return Ok(true);
        }
        let right = right.get_mut(..len).unwrap_or_default();
        other.read_exact(right)?;
        if left.get(..len) != Some(&*right) {
            return Ok(false);
        }
    }
}

/// Bytes that are compared at a time.
const PIECE: usize = 1 << 16;

/// Copies a file over another, which is either wholly replaced or not at all.
fn replace(from: &Path, to: &Path) -> io::Result<()> {
    let mut temporary = to.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let mut out = File::options().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    io::copy(&mut File::open(from)?, &mut out)?;
    out.sync_all()?;
    fs::rename(&temporary, to)?;
    to.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

#[cfg(test)]
mod tests;
