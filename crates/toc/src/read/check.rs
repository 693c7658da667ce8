//! The whole-file check: what no single access can see.

use super::data::{MAX_WINDOW, tar_range};
use super::{MAX_NAME, MAX_PATH, Table, Toc, damaged};
use crate::build::Compression;
use crate::format::{
    CHUNK_SIZE, ContentRecord, DATA_ALIGN, DirentRecord, FormatError, InodeIx, InodeRecord, Kind, NONE, SHORT_DIGEST,
    XattrSetRecord,
};

/// Largest value of an extended attribute, in bytes (Linux' `XATTR_SIZE_MAX`).
const MAX_XATTR_VALUE: usize = 64 * 1024;
/// Largest major number of a device (12 bits) and largest minor number (20 bits).
const MAX_DEVICE: (u32, u32) = (0xfff, 0xf_ffff);

/// See [`Toc::check`].
pub(super) fn check(toc: &Toc) -> Result<(), FormatError> {
    spans(toc)?;
    contents(toc)?;
    for ix in 0..toc.chunk_count() {
        toc.chunk_digest(ix)?;
    }
    xattrs(toc)?;
    for ix in 0..toc.inode_count() {
        inode(toc, ix)?;
    }
    tree(toc)
}

/// `Err` with `what` unless `held`.
const fn rule(held: bool, what: &'static str) -> Result<(), FormatError> {
    if held { Ok(()) } else { Err(damaged(what)) }
}

fn spans(toc: &Toc) -> Result<(), FormatError> {
    let records = toc.spans()?;
    let plain = toc.compression()? == Compression::Plain;
    rule(!plain || toc.blob_size() == toc.tar_size(), "plain blob is not its tar")?;
    rule(records.is_empty() == (toc.tar_size() == 0), "spans do not cover the tar")?;
    let mut blob_before = None;
    for (ix, record) in (0..toc.span_count()).zip(records) {
        let span = toc.span(ix)?;
        if ix == 0 {
            rule(span.blob.start == 0 && span.tar.start == 0, "first span does not start at 0")?;
        }
        rule(blob_before < Some(span.blob.start), "spans are not ascending")?;
        blob_before = Some(span.blob.start);
        rule(!plain || span.blob.start == span.tar.start, "plain span is not at its own place")?;
        rule(record.reserved.get() == 0, "reserved field of a span is not zero")?;
        let no_digest = span.window_digest == [0; SHORT_DIGEST];
        rule(span.window_len <= MAX_WINDOW && (span.window_len == 0) == no_digest, "window and its digest disagree")?;
    }
    Ok(())
}

fn contents(toc: &Toc) -> Result<(), FormatError> {
    let (mut data_end, mut tar_end, mut chunks, mut extents) = (0, 0, 0, 0);
    for ix in 0..toc.content_count() {
        let record = toc.content(ix)?;
        let size = record.size.get();
        rule(record.data_off.get() >= data_end, "contents overlap or are not ascending")?;
        data_end = record.data_off.get().saturating_add(size);
        rule(u64::from(record.first_chunk.get()) == chunks, "chunks do not follow each other")?;
        chunks += size.div_ceil(CHUNK_SIZE);
        rule(record.tar_off.get() >= tar_end, "contents are not in the order of the tar")?;
        tar_end = if record.first_extent.get() == NONE {
            record.tar_off.get().saturating_add(size)
        } else {
            rule(record.first_extent.get() == extents, "extents do not follow each other")?;
            extents = extents.saturating_add(record.extents.get());
            extents_of(toc, &record)?
        };
    }
    rule(chunks == u64::from(toc.chunk_count()), "chunks of no content")?;
    rule(extents == toc.count(Table::Extents), "extents of no content")?;
    rule(
        data_end.checked_next_multiple_of(DATA_ALIGN) == Some(toc.data_size()),
        "data does not end with its last content",
    )
}

/// Checks the extents of a sparse content; gives where the last one ends in the tar.
fn extents_of(toc: &Toc, content: &ContentRecord) -> Result<u64, FormatError> {
    let extents = toc.extents(content)?.unwrap_or_default();
    let (mut file_end, mut tar_end) = (0, content.tar_off.get());
    if let Some(first) = extents.first() {
        rule(first.tar_off.get() == tar_end, "first extent is not where its content starts")?;
    }
    for extent in extents {
        let (file, tar) = (extent.file_off.get(), tar_range(extent));
        rule(extent.len.get() > 0, "extent is empty")?;
        rule(file >= file_end && tar.start >= tar_end, "extents overlap or are not ascending")?;
        file_end = file.saturating_add(extent.len.get());
        tar_end = tar.end;
        rule(file_end <= content.size.get(), "extent ends after its file")?;
    }
    rule(tar_end <= toc.tar_size(), "extent outside of the tar")?;
    Ok(tar_end)
}

fn xattrs(toc: &Toc) -> Result<(), FormatError> {
    // Sets follow each other without overlap; else a small file could ask for a quadratic number of comparisons.
    let mut next = 0;
    for (ix, set) in (0..).zip(toc.table::<XattrSetRecord>(Table::XattrSets)?) {
        rule(set.first.get() == next, "sets of attributes do not follow each other")?;
        next = next.saturating_add(set.count.get());
        let mut before: &[u8] = &[];
        for record in toc.xattr_records(ix)? {
            let (name, value) = toc.xattr_text(record)?;
            rule(name.len() <= MAX_NAME && !name.contains(&0), "illegal name of an attribute")?;
            rule(value.len() <= MAX_XATTR_VALUE, "value of an attribute is too long")?;
            rule(before < name, "attributes are not sorted")?;
            before = name;
        }
    }
    rule(next == toc.count(Table::Xattrs), "attributes of no set")
}

/// The rules of one inode that need no other inode.
fn inode(toc: &Toc, ix: InodeIx) -> Result<(), FormatError> {
    let inode = toc.inode(ix)?;
    let record = &inode.record;
    let (a, b) = (record.a.get(), record.b.get());
    rule(inode.uid() != NONE && inode.gid() != NONE, "owner or group is the reserved id")?;
    rule(record.flags == 0 || inode.is_dir() && record.flags & !0b111 == 0, "unknown flag")?;
    rule(!(inode.is_implied() && inode.is_late()), "implied directory that is described")?;
    rule(!inode.has_xattrs() || record.xattrs.get() < toc.count(Table::XattrSets), "set of attributes out of range")?;
    match inode.kind() {
        Kind::Directory => toc.children(&inode).map(drop),
        Kind::Regular => {
            rule(b == 0, "unused field of a file is not zero")?;
            inode.content().map_or(Ok(()), |content| toc.content(content).map(drop))
        }
        Kind::Symlink => {
            let target = toc.symlink_target(&inode)?;
            rule(target.len() < MAX_PATH && !target.contains(&0), "illegal text of a symbolic link")
        }
        Kind::CharDevice | Kind::BlockDevice => {
            rule(a <= MAX_DEVICE.0 && b <= MAX_DEVICE.1, "device number out of range")?;
            // To overlayfs a character device 0/0 is a whiteout; those are entries without inode here.
            rule(inode.kind() != Kind::CharDevice || (a, b) != (0, 0), "device that poses as a whiteout")
        }
        Kind::Fifo => rule(a == 0 && b == 0, "unused field of a fifo is not zero"),
    }
}

/// What a walk from the root has seen.
struct Walk {
    /// Entries that refer to each inode.
    links: Vec<u32>,
    /// One bit for each directory entry: it belongs to a directory already.
    taken: Vec<u64>,
    /// Directories that are still to be read. Each is put here once, so that the walk ends.
    pending: Vec<InodeIx>,
}

/// Every inode but the root has an entry, directories exactly one, and link counts are true.
fn tree(toc: &Toc) -> Result<(), FormatError> {
    rule(toc.inode(0)?.is_dir(), "the root is not a directory")?;
    let entries = toc.table::<DirentRecord>(Table::Dirents)?;
    for record in entries {
        rule(record.reserved.get() == 0, "reserved field of an entry is not zero")?;
    }
    let mut walk = Walk {
        links: vec![0; toc.inode_count() as usize],
        taken: vec![0; entries.len().div_ceil(64)],
        pending: vec![0],
    };
    let mut seen = 0;
    while let Some(dir) = walk.pending.pop() {
        seen += directory(toc, dir, &mut walk)?;
    }
    rule(seen == entries.len(), "entries of no directory")?;
    for (record, links) in toc.table::<InodeRecord>(Table::Inodes)?.iter().zip(&walk.links).skip(1) {
        rule(*links > 0, "inode without a name")?;
        let is_dir = record.kind == Kind::Directory as u8;
        rule(is_dir || record.nlink.get() == *links, "wrong number of links")?;
    }
    Ok(())
}

/// Checks the entries of one directory and notes them in `walk`; gives their number.
fn directory(toc: &Toc, dir: InodeIx, walk: &mut Walk) -> Result<usize, FormatError> {
    let inode = toc.inode(dir)?;
    let children = toc.children(&inode)?;
    let count = children.len();
    let mut before: &[u8] = &[];
    let mut subdirectories = 0;
    for (position, entry) in (inode.record.a.get() as usize..).zip(children) {
        let entry = entry?;
        rule(legal_name(entry.name), "illegal name")?;
        rule(before < entry.name, "names are not sorted")?;
        before = entry.name;
        let bit = 1 << (position % 64);
        let word = walk.taken.get_mut(position / 64).ok_or(damaged("entries out of range"))?;
        rule(*word & bit == 0, "directories share entries")?;
        *word |= bit;
        let Some(child) = entry.inode else { continue };
        let links = walk.links.get_mut(child as usize).ok_or(damaged("entry refers to no inode"))?;
        *links += 1;
        if toc.inode(child)?.is_dir() {
            rule(*links == 1, "directory with two names")?;
            subdirectories += 1;
            walk.pending.push(child);
        }
    }
    rule(u64::from(inode.nlink()) == 2 + subdirectories, "wrong number of links of a directory")?;
    Ok(count)
}

fn legal_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..") && name.len() <= MAX_NAME && !name.iter().any(|byte| matches!(byte, b'/' | 0))
}
