//! The tree oracle: what a program can see of a directory tree, as records that can be compared.
//!
//! The tree that containerd's own overlayfs makes of an image is the truth; ours must give equal records. Not compared
//! is what two file systems may rightly differ in: inode and device numbers as such, sizes and link counts of
//! directories, times of access and of status change, the exact number of blocks.

mod content;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use rustix::fs::{lgetxattr, llistxattr};
use rustix::io::Errno;

pub use content::{Contents, Hashes};

/// Differences that a report names before it only counts them.
const NAMED: usize = 40;
/// Space for names and for a value of extended attributes: the kernel's own limits.
const XATTR_LIMIT: usize = 64 * 1024;

/// What a directory entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Directory.
    Directory,
    /// Regular file.
    File,
    /// Symbolic link.
    Symlink,
    /// Character device.
    Character,
    /// Block device.
    Block,
    /// Named pipe.
    Fifo,
    /// Socket or something unknown.
    Other,
}

impl Kind {
    /// By the mode that `stat(2)` gives.
    pub fn of(mode: u32) -> Self {
        match mode & 0o170_000 {
            0o040_000 => Self::Directory,
            0o100_000 => Self::File,
            0o120_000 => Self::Symlink,
            0o020_000 => Self::Character,
            0o060_000 => Self::Block,
            0o010_000 => Self::Fifo,
            _ => Self::Other,
        }
    }
}

/// What can be seen of one entry without reading a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What it is.
    pub kind: Kind,
    /// Permission bits with set-user-id and the like.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change: seconds since 1970 and nanoseconds.
    pub mtime: (i64, i64),
    /// Bytes; 0 for directories.
    pub size: u64,
    /// Number of names; 0 for directories.
    pub links: u64,
    /// Major and minor number of a device; 0 for everything else.
    pub device: (u32, u32),
    /// Text of a symbolic link.
    pub target: Vec<u8>,
    /// All extended attributes that the caller may see, `security.capability` included.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first name, in byte order, within the tree of the inode that this entry names; its own if there is no other.
    pub first_name: Vec<u8>,
    /// Whether `stat(2)` says that it occupies no block at all.
    pub blockless: bool,
}

/// The records of a tree by path, without a leading slash; the root is the empty path.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tree {
    records: BTreeMap<Vec<u8>, Record>,
}

impl Tree {
    /// Reads what is below `root`, and `root` itself. Other mounts below it are seen as what they are to `stat(2)`, so
    /// give a root without any.
    ///
    /// # Errors
    ///
    /// If anything cannot be read, with its path.
    pub fn read(root: &Path) -> Result<Self> {
        let mut walk = Walk { records: BTreeMap::new(), inodes: HashMap::new() };
        walk.visit(root, &mut Vec::new())?;
        let Walk { mut records, inodes } = walk;
        for names in inodes.values() {
            let Some(first) = names.iter().min() else { continue };
            for name in names {
                if let Some(record) = records.get_mut(name) {
                    record.first_name.clone_from(first);
                }
            }
        }
        Ok(Self { records })
    }

    /// The records by path.
    pub fn records(&self) -> &BTreeMap<Vec<u8>, Record> {
        &self.records
    }

    /// The paths of all regular files, one for each inode.
    pub fn files(&self) -> impl Iterator<Item = (&[u8], &Record)> {
        let files =
            self.records.iter().filter(|(path, record)| record.kind == Kind::File && record.first_name == **path);
        files.map(|(path, record)| (path.as_slice(), record))
    }

    /// What `other` shows differently. Blocks are compared only by [`Contents`], which knows what a file holds.
    pub fn differences(&self, other: &Self) -> Differences {
        let mut lines = Vec::new();
        for (path, record) in &self.records {
            match other.records.get(path) {
                None => lines.push(format!("{}: missing", name(path))),
                Some(found) => compare(path, record, found, &mut lines),
            }
        }
        for path in other.records.keys().filter(|path| !self.records.contains_key(*path)) {
            lines.push(format!("{}: should not be there", name(path)));
        }
        Differences { lines }
    }
}

/// A readable list of differences; `Display` gives one a line.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Differences {
    lines: Vec<String>,
}

impl Differences {
    pub(crate) fn from_lines(lines: Vec<String>) -> Self {
        Self { lines }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// One line for each.
    pub fn lines(&self) -> &[String] {
        &self.lines
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.lines.len()
    }
}

impl fmt::Display for Differences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in self.lines.iter().take(NAMED) {
            writeln!(f, "{line}")?;
        }
        if self.lines.len() > NAMED {
            writeln!(f, "... and {} more", self.lines.len() - NAMED)?;
        }
        Ok(())
    }
}

struct Walk {
    records: BTreeMap<Vec<u8>, Record>,
    inodes: HashMap<(u64, u64), Vec<Vec<u8>>>,
}

impl Walk {
    fn visit(&mut self, at: &Path, path: &mut Vec<u8>) -> Result<()> {
        let meta = match at.symlink_metadata() {
            // overlayfs lists whiteouts of directories that it need not merge, and denies that they are there: `c?????????`.
            Err(error) if error.kind() == ErrorKind::NotFound && !path.is_empty() => return Ok(()),
            meta => meta.with_context(|| format!("stat of {}", at.display()))?,
        };
        let kind = Kind::of(meta.mode());
        let directory = kind == Kind::Directory;
        let device = matches!(kind, Kind::Character | Kind::Block);
        let record = Record {
            kind,
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            size: if directory { 0 } else { meta.size() },
            links: if directory { 0 } else { meta.nlink() },
            device: if device { (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev())) } else { (0, 0) },
            target: match kind {
                Kind::Symlink => std::fs::read_link(at)
                    .with_context(|| format!("link text of {}", at.display()))?
                    .into_os_string()
                    .into_vec(),
                _ => Vec::new(),
            },
            xattrs: xattrs(at)?,
            first_name: path.clone(),
            blockless: meta.blocks() == 0,
        };
        self.records.insert(path.clone(), record);
        if !directory {
            self.inodes.entry((meta.dev(), meta.ino())).or_default().push(path.clone());
            return Ok(());
        }
        let list = std::fs::read_dir(at).with_context(|| format!("listing {}", at.display()))?;
        for entry in list {
            let entry = entry.with_context(|| format!("listing {}", at.display()))?;
            let length = path.len();
            if length > 0 {
                path.push(b'/');
            }
            path.extend_from_slice(entry.file_name().as_bytes());
            self.visit(&entry.path(), path)?;
            path.truncate(length);
        }
        Ok(())
    }
}

/// All extended attributes of a file itself, not of what it links to; none where the file system has none.
///
/// # Errors
///
/// If they cannot be read.
pub fn xattrs(at: &Path) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut names = vec![0; XATTR_LIMIT];
    let length = match llistxattr(at, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => return Ok(BTreeMap::new()),
        Err(error) => return Err(error).with_context(|| format!("attributes of {}", at.display())),
    };
    let mut found = BTreeMap::new();
    let mut value = vec![0; if length == 0 { 0 } else { XATTR_LIMIT }];
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let length = lgetxattr(at, name, &mut value[..])
            .with_context(|| format!("attribute {} of {}", String::from_utf8_lossy(name), at.display()))?;
        found.insert(name.to_vec(), value[..length].to_vec());
    }
    Ok(found)
}

pub(crate) fn name(path: &[u8]) -> String {
    format!("/{}", path.escape_ascii())
}

fn compare(path: &[u8], expected: &Record, found: &Record, lines: &mut Vec<String>) {
    let mut differ = |what: &str, expected: String, found: String| {
        if expected != found {
            lines.push(format!("{}: {what} is {found}, should be {expected}", name(path)));
        }
    };
    differ("type", format!("{:?}", expected.kind), format!("{:?}", found.kind));
    differ("mode", format!("{:04o}", expected.mode), format!("{:04o}", found.mode));
    differ("owner", format!("{}:{}", expected.uid, expected.gid), format!("{}:{}", found.uid, found.gid));
    differ(
        "mtime",
        format!("{}.{:09}", expected.mtime.0, expected.mtime.1),
        format!("{}.{:09}", found.mtime.0, found.mtime.1),
    );
    differ("size", expected.size.to_string(), found.size.to_string());
    differ("number of links", expected.links.to_string(), found.links.to_string());
    differ("device", format!("{:?}", expected.device), format!("{:?}", found.device));
    differ("link text", expected.target.escape_ascii().to_string(), found.target.escape_ascii().to_string());
    differ("first hard link", name(&expected.first_name), name(&found.first_name));
    differ("attributes", attributes(&expected.xattrs), attributes(&found.xattrs));
}

fn attributes(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> String {
    let text: Vec<String> =
        xattrs.iter().map(|(name, value)| format!("{}={}", name.escape_ascii(), hex::encode(value))).collect();
    if text.is_empty() { "none".to_owned() } else { text.join(" ") }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn sample() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), "a").unwrap();
        std::fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        std::os::unix::fs::symlink("../a", dir.path().join("d/l")).unwrap();
        dir
    }

    #[test]
    fn a_tree_equals_itself_and_every_change_is_seen() {
        let dir = sample();
        let before = Tree::read(dir.path()).unwrap();
        assert_eq!(before.differences(&Tree::read(dir.path()).unwrap()).to_string(), "");
        assert_eq!(before.records()[b"b".as_slice()].first_name, b"a");
        std::fs::write(dir.path().join("d/new"), "").unwrap();
        let changed = before.differences(&Tree::read(dir.path()).unwrap()).to_string();
        assert!(changed.contains("/d/new: should not be there") && changed.contains("/d: mtime"), "{changed}");
    }

    #[test]
    fn two_files_are_not_one_file_with_two_names() {
        let dir = sample();
        let before = Tree::read(dir.path()).unwrap();
        let mtime = std::fs::metadata(dir.path().join("a")).unwrap().modified().unwrap();
        std::fs::remove_file(dir.path().join("b")).unwrap();
        std::fs::write(dir.path().join("b"), "a").unwrap();
        std::fs::File::options().write(true).open(dir.path().join("b")).unwrap().set_modified(mtime).unwrap();
        let changed = before.differences(&Tree::read(dir.path()).unwrap()).to_string();
        assert!(changed.contains("/b: first hard link is /b, should be /a"), "{changed}");
        assert!(changed.contains("/a: number of links is 1, should be 2"), "{changed}");
    }
}
