//! The canonical bytes of a finished tree.

use zerocopy::IntoBytes;

use super::Compression;
use super::content::Contents;
use super::error::{BuildError, counted};
use super::stream::Ended;
use super::tree::{Node, NodeIx, ROOT, Slot, Tree};
use crate::format::{
    DirentRecord, FLAG_IMPLIED, FLAG_LATE, FLAG_OPAQUE, Header, InodeRecord, Kind, MAGIC, NONE, VERSION, XattrRecord,
    XattrSetRecord,
};

/// Flags that a TOC has; the tree has more for itself.
const FLAGS: u8 = FLAG_IMPLIED | FLAG_OPAQUE | FLAG_LATE;

/// The parts that are laid out here; contents, chunks, extents and spans are ready as they are.
#[derive(Default)]
struct Tables {
    inodes: Vec<InodeRecord>,
    dirents: Vec<DirentRecord>,
    sets: Vec<XattrSetRecord>,
    xattrs: Vec<XattrRecord>,
    strings: Vec<u8>,
}

/// Nodes in the order of their inode numbers.
struct Numbering {
    order: Vec<NodeIx>,
    /// Inode of each node or [`NONE`] for what has no name any more.
    inodes: Vec<u32>,
    /// Names of each node; for directories subdirectories.
    links: Vec<u32>,
    /// Directories, by inode: first entry and number of entries.
    ranges: Vec<(u32, u32)>,
}

/// Writes the TOC.
pub(super) fn write(
    tree: &Tree<'_>,
    contents: &Contents<'_>,
    ended: &Ended,
    compression: Compression,
) -> Result<Vec<u8>, BuildError> {
    let mut tables = Tables::default();
    let numbering = number(tree, &mut tables)?;
    inodes(tree, &numbering, &mut tables)?;
    let counts = [
        tables.inodes.len(),
        tables.dirents.len(),
        contents.records.len(),
        contents.chunks.len(),
        contents.extents.len(),
        tables.sets.len(),
        tables.xattrs.len(),
        ended.spans.len(),
        tables.strings.len(),
    ];
    let mut header = Header {
        magic: MAGIC,
        version: VERSION.into(),
        compression: compression.code().into(),
        blob_digest: ended.blob_digest,
        diff_id: ended.diff_id,
        blob_size: ended.blob_size.into(),
        tar_size: ended.tar_size.into(),
        data_size: contents.data_size.into(),
        counts: [0.into(); 9],
        reserved: 0.into(),
    };
    for (field, count) in header.counts.iter_mut().zip(counts) {
        *field = index(count)?.into();
    }
    let parts: [&[u8]; 10] = [
        header.as_bytes(),
        tables.inodes.as_bytes(),
        tables.dirents.as_bytes(),
        contents.records.as_bytes(),
        contents.chunks.as_bytes(),
        contents.extents.as_bytes(),
        tables.sets.as_bytes(),
        tables.xattrs.as_bytes(),
        ended.spans.as_bytes(),
        &tables.strings,
    ];
    let limit = tree.budget.max_toc_bytes;
    if parts.iter().map(|part| part.len() as u64).sum::<u64>() > limit {
        return Err(BuildError::over(counted::TOC_BYTES, limit));
    }
    Ok(parts.concat())
}

/// Numbers the nodes breadth-first, names sorted by their bytes, and writes the entries in that order.
fn number(tree: &Tree<'_>, tables: &mut Tables) -> Result<Numbering, BuildError> {
    let mut numbering = Numbering {
        order: vec![ROOT],
        inodes: vec![NONE; tree.nodes.len()],
        links: vec![0; tree.nodes.len()],
        ranges: Vec::new(),
    };
    numbering.inodes[ROOT as usize] = 0;
    let mut children = Vec::new();
    let mut at = 0;
    while let Some(&node) = numbering.order.get(at) {
        at += 1;
        let first = index(tables.dirents.len())?;
        if !tree.is_directory(node) {
            numbering.ranges.push((0, 0));
            continue;
        }
        children.clear();
        let mut entry = tree.nodes[node as usize].a;
        while entry != NONE {
            let record = &tree.entries[entry as usize];
            if record.slot != Slot::Absent {
                children.push((tree.name(record), record.slot));
            }
            entry = record.sibling;
        }
        children.sort_unstable_by_key(|(name, _)| *name);
        for (name, slot) in &children {
            let inode = match slot {
                Slot::Node(child) => numbering.link(tree, node, *child)?,
                Slot::Whiteout | Slot::Absent => NONE,
            };
            let name_off = tables.add_string(name)?;
            tables.dirents.push(DirentRecord {
                name_off: name_off.into(),
                name_len: u16::try_from(name.len()).map_err(|_| BuildError::over("bytes of a name", 255))?.into(),
                reserved: 0.into(),
                inode: inode.into(),
            });
        }
        numbering.ranges.push((first, index(children.len())?));
    }
    Ok(numbering)
}

impl Numbering {
    /// Notes one more name of `child` in `parent`; gives its inode.
    fn link(&mut self, tree: &Tree<'_>, parent: NodeIx, child: NodeIx) -> Result<u32, BuildError> {
        if self.inodes[child as usize] == NONE {
            self.inodes[child as usize] = index(self.order.len())?;
            self.order.push(child);
        }
        let counted = if tree.is_directory(child) { parent } else { child };
        self.links[counted as usize] += 1;
        Ok(self.inodes[child as usize])
    }
}

/// Writes the inodes, and the texts and attributes they refer to, in their order.
fn inodes(tree: &Tree<'_>, numbering: &Numbering, tables: &mut Tables) -> Result<(), BuildError> {
    let mut sets = vec![NONE; tree.xattrs.len()];
    for (ix, range) in numbering.order.iter().zip(&numbering.ranges) {
        let node = &tree.nodes[*ix as usize];
        let links = numbering.links[*ix as usize];
        let (a, b) = match node.kind {
            Kind::Directory => *range,
            Kind::Symlink => (tables.add_string(tree.text(node.a, node.b))?, node.b),
            Kind::Regular | Kind::CharDevice | Kind::BlockDevice => (node.a, node.b),
            Kind::Fifo => (0, 0),
        };
        let xattrs = xattr_set(tree, node, &mut sets, tables)?;
        tables.inodes.push(InodeRecord {
            kind: node.kind as u8,
            flags: node.flags & FLAGS,
            mode: node.mode.into(),
            uid: node.uid.into(),
            gid: node.gid.into(),
            mtime_nsec: node.mtime.1.into(),
            mtime_sec: node.mtime.0.into(),
            nlink: if node.kind == Kind::Directory { links.saturating_add(2) } else { links }.into(),
            xattrs: xattrs.into(),
            a: a.into(),
            b: b.into(),
        });
    }
    Ok(())
}

/// The set of attributes of `node`, written when it is used first.
fn xattr_set(tree: &Tree<'_>, node: &Node, sets: &mut [u32], tables: &mut Tables) -> Result<u32, BuildError> {
    let Some(known) = sets.get_mut(node.xattrs as usize) else { return Ok(NONE) };
    if *known != NONE {
        return Ok(*known);
    }
    let set = &tree.xattrs[node.xattrs as usize];
    *known = index(tables.sets.len())?;
    tables.sets.push(XattrSetRecord { first: index(tables.xattrs.len())?.into(), count: index(set.len())?.into() });
    for (name, value) in set.iter() {
        let record = XattrRecord {
            name_off: tables.add_string(name)?.into(),
            name_len: index(name.len())?.into(),
            value_off: tables.add_string(value)?.into(),
            value_len: index(value.len())?.into(),
        };
        tables.xattrs.push(record);
    }
    Ok(*known)
}

impl Tables {
    fn add_string(&mut self, text: &[u8]) -> Result<u32, BuildError> {
        let offset = index(self.strings.len())?;
        self.strings.extend_from_slice(text);
        Ok(offset)
    }
}

/// A position that must be smaller than [`NONE`].
fn index(position: usize) -> Result<u32, BuildError> {
    u32::try_from(position)
        .ok()
        .filter(|ix| *ix != NONE)
        .ok_or_else(|| BuildError::over("records of one kind", NONE.into()))
}
