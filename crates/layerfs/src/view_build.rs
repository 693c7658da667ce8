//! Merges the layers of a run into one tree, directory by directory, the top layer first.

use std::rc::Rc;

use millstream_toc::FormatError;
use millstream_toc::format::{InodeIx, Kind};
use zerocopy::IntoBytes;

use crate::attr::shows_xattr;
use crate::below::{Below, BelowEntry, DirectoryAttributes};
use crate::implied::{Inheritance, Owner, Seen};
use crate::node_id::MAX_NUMBER;
use crate::view::ViewLayer;
use crate::view_format::{
    AttributeRecord, DirectoryRecord, ENTRY_DIRECTORY, ENTRY_INODE, ENTRY_WHITEOUT, EntryRecord, FLAG_OPAQUE, Header,
    MAGIC, NO_LAYER, NONE, VERSION, ViewError, XattrHead,
};

/// Most layers that one view can merge; overlayfs itself takes 500.
pub const MAX_LAYERS: usize = 4096;
/// Directories and entries of a view must be below this to fit into node ids.
const MAX_RECORDS: u64 = 1 << 31;

/// Merges `layers` (bottom first, at least one) into the bytes of a view, as if containerd had applied each of them in turn
/// and overlayfs had stacked them. `below` is what is under the run in the same stack; with `None`, the run is the bottom.
///
/// The same input gives the same bytes. Time is proportional to the entries of all layers.
///
/// # Errors
///
/// When a TOC is damaged, `below` fails, or the run exceeds what a view can hold ([`ViewError::Limit`]).
pub fn build_view(layers: &[ViewLayer], below: Option<&dyn Below>) -> Result<Vec<u8>, ViewError> {
    if layers.is_empty() || layers.len() > MAX_LAYERS {
        return Err(ViewError::Limit { what: "number of layers in the run" });
    }
    if layers.iter().any(|layer| layer.number == 0 || layer.number > MAX_NUMBER) {
        return Err(ViewError::Limit { what: "number of a layer out of range" });
    }
    let mut builder = Builder::new(layers, below);
    let mut waiting = vec![builder.root()?];
    let mut path: Vec<&[u8]> = Vec::new();
    while let Some(directory) = waiting.pop() {
        path.truncate(directory.depth.saturating_sub(1));
        path.extend(directory.name);
        let first_child = waiting.len();
        builder.fill(&directory, &mut path, &mut waiting)?;
        waiting[first_child..].reverse();
    }
    builder.finish()
}

/// A directory of one layer.
#[derive(Debug, Clone, Copy)]
struct Source {
    layer: u16,
    inode: InodeIx,
}

/// A directory of the view whose entries are still to be merged.
struct Waiting<'a> {
    index: u32,
    depth: usize,
    /// `None` for the root.
    name: Option<&'a [u8]>,
    /// The directories that overlayfs would merge, top first; never empty.
    sources: Vec<Source>,
    /// What each layer has at the parent's path, for [`Inheritance`]; not moved on to this path yet.
    parents: Rc<Vec<Seen<'a>>>,
    /// What is below the run shows through: it has a directory here, and nothing in the run hides it.
    open_below: bool,
}

/// One name in one of the sources.
#[derive(Clone, Copy)]
struct Named<'a> {
    name: &'a [u8],
    source: Source,
    position: u32,
    /// Position of `source` among the sources: 0 is the topmost.
    rank: usize,
    found: Found,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Whiteout,
    Directory { inode: InodeIx, opaque: bool },
    File { inode: InodeIx },
}

struct Builder<'a> {
    layers: &'a [ViewLayer],
    below: Option<&'a dyn Below>,
    inheritance: Inheritance<'a>,
    directories: Vec<DirectoryRecord>,
    entries: Vec<EntryRecord>,
    attributes: Vec<AttributeRecord>,
    text: Vec<u8>,
    /// More directories than the layers have together mean a TOC that is no tree.
    max_directories: u64,
    /// The same for names.
    max_entries: u64,
}

impl<'a> Builder<'a> {
    fn new(layers: &'a [ViewLayer], below: Option<&'a dyn Below>) -> Self {
        Self {
            layers,
            below,
            inheritance: Inheritance::new(layers, below),
            directories: Vec::new(),
            entries: Vec::new(),
            attributes: Vec::new(),
            text: Vec::new(),
            max_directories: layers
                .iter()
                .map(|layer| u64::from(layer.toc.inode_count()))
                .sum::<u64>()
                .min(MAX_RECORDS),
            max_entries: layers
                .iter()
                .map(|layer| u64::from(layer.toc.header().counts[1].get()))
                .sum::<u64>()
                .min(MAX_RECORDS),
        }
    }

    /// The root merges all layers whatever their marks say: overlayfs does not look at the opaque mark of a layer's root.
    fn root(&mut self) -> Result<Waiting<'a>, ViewError> {
        let index = self.reserve(NONE)?;
        let mut sources = Vec::with_capacity(self.layers.len());
        for position in (0..self.layers.len()).rev() {
            let layer =
                u16::try_from(position).map_err(|_| ViewError::Limit { what: "number of layers in the run" })?;
            sources.push(Source { layer, inode: 0 });
        }
        Ok(Waiting { index, depth: 0, name: None, sources, parents: Rc::default(), open_below: self.below.is_some() })
    }

    /// Writes the record and the entries of `directory`, and adds its subdirectories to `waiting`.
    fn fill(
        &mut self,
        directory: &Waiting<'a>,
        path: &mut Vec<&'a [u8]>,
        waiting: &mut Vec<Waiting<'a>>,
    ) -> Result<(), ViewError> {
        let seen = Rc::new(match directory.name {
            None => self.inheritance.root(),
            Some(_) => self.inheritance.descend(&directory.parents, path)?,
        });
        let (layer, attributes) = self.attributes(directory, path, &seen)?;
        let first = index(self.entries.len())?;
        let first_child = waiting.len();
        for group in self.names(directory)?.chunk_by(|a, b| a.name == b.name) {
            path.push(group[0].name);
            if let Some(child) = self.name(directory, group, path, &seen)? {
                waiting.push(child);
            }
            path.pop();
        }
        // overlayfs does not count subdirectories of a directory that it merges.
        let links = if directory.sources.len() == 1 { 2 + index(waiting.len() - first_child)? } else { 1 };
        if let Some(record) = self.directories.get_mut(directory.index as usize) {
            record.first = first.into();
            record.count = (index(self.entries.len())? - first).into();
            record.nlink = links.into();
            record.attributes = attributes.into();
            record.layer = layer.into();
        }
        Ok(())
    }

    /// All names of all sources, sorted by name and within a name by layer, the top one first.
    fn names(&self, directory: &Waiting<'a>) -> Result<Vec<Named<'a>>, ViewError> {
        let mut names = Vec::new();
        for (rank, source) in directory.sources.iter().enumerate() {
            let layer = self.layer(source.layer)?;
            let toc = &*layer.toc;
            let inode = toc.inode(source.inode).map_err(|error| layer.error(error))?;
            let children = toc.children(&inode).map_err(|error| layer.error(error))?;
            names.reserve(children.len());
            for (position, child) in (0..).zip(children) {
                let child = child.map_err(|error| layer.error(error))?;
                let found = match child.inode {
                    None => Found::Whiteout,
                    Some(inode) => found(layer, inode)?,
                };
                names.push(Named { name: child.name, source: *source, position, rank, found });
            }
        }
        if directory.sources.len() > 1 {
            names.sort_unstable_by(|a, b| (a.name, a.rank).cmp(&(b.name, b.rank)));
        }
        Ok(names)
    }

    /// Merges one name: `group` is what the sources have for it, top first, not empty.
    fn name(
        &mut self,
        directory: &Waiting<'a>,
        group: &[Named<'a>],
        path: &[&'a [u8]],
        seen: &Rc<Vec<Seen<'a>>>,
    ) -> Result<Option<Waiting<'a>>, ViewError> {
        let top = group[0];
        match top.found {
            Found::File { inode } => self.entry(&top, ENTRY_INODE, inode).map(|()| None),
            Found::Whiteout => {
                if directory.open_below && self.look_below(path)?.is_some() {
                    self.entry(&top, ENTRY_WHITEOUT, NONE)?;
                }
                Ok(None)
            }
            Found::Directory { .. } => {
                let (sources, closed) = merged(group);
                let below = directory.open_below && matches!(self.look_below(path)?, Some(BelowEntry::Directory(_)));
                let child = self.reserve(directory.index)?;
                self.entry(&top, ENTRY_DIRECTORY, child)?;
                if let Some(record) = self.directories.get_mut(child as usize).filter(|_| below && closed) {
                    record.flags = FLAG_OPAQUE.into();
                }
                let (name, depth) = (Some(top.name), directory.depth + 1);
                let open_below = below && !closed;
                Ok(Some(Waiting { index: child, depth, name, sources, parents: Rc::clone(seen), open_below }))
            }
        }
    }

    /// Where the attributes of `directory` are, as its record says it.
    fn attributes(
        &mut self,
        directory: &Waiting<'a>,
        path: &[&'a [u8]],
        seen: &[Seen<'a>],
    ) -> Result<(u16, u32), ViewError> {
        let (Some(top), false) = (directory.sources.first(), path.is_empty()) else {
            return self.foreign(DirectoryAttributes::fresh());
        };
        let layer = self.layer(top.layer)?;
        let implied = layer.toc.inode(top.inode).map_err(|error| layer.error(error))?.is_implied();
        let owner =
            if implied { self.inheritance.owner(top.layer, path, seen)? } else { Owner::Inode(top.layer, top.inode) };
        match owner {
            Owner::Foreign(attributes) => self.foreign(attributes),
            Owner::Inode(layer, inode) => match self.late(layer, inode, path, seen)? {
                Some(attributes) => self.foreign(attributes),
                None => Ok((layer, inode)),
            },
        }
    }

    /// Attributes of a directory that its layer describes after something in it, if they are other than those of its inode: it was
    /// made as an implied one, with copies of the extended attributes below, and those stay.
    fn late(
        &mut self,
        mut layer: u16,
        mut inode: InodeIx,
        path: &[&'a [u8]],
        seen: &[Seen<'a>],
    ) -> Result<Option<DirectoryAttributes>, ViewError> {
        let own = self.described(layer, inode)?;
        let mut attributes = own.clone();
        while self.layer(layer)?.toc.inode(inode).map_err(|error| self.error(layer, error))?.is_late() {
            let (below, next) = match self.inheritance.owner(layer, path, seen)? {
                Owner::Foreign(below) => (below, None),
                Owner::Inode(layer, inode) => (self.described(layer, inode)?, Some((layer, inode))),
            };
            let known = |name: &[u8]| attributes.xattrs.iter().any(|(known, _)| known == name);
            let more: Vec<_> = below.xattrs.into_iter().filter(|(name, _)| !known(name)).collect();
            attributes.xattrs.extend(more);
            // Each turn leads to a lower layer.
            let Some(next) = next else { break };
            (layer, inode) = next;
        }
        Ok((attributes != own).then_some(attributes))
    }

    /// What a layer says of a directory.
    fn described(&self, layer: u16, inode: InodeIx) -> Result<DirectoryAttributes, ViewError> {
        let at_layer = |error| self.error(layer, error);
        let toc = &self.layer(layer)?.toc;
        let inode = toc.inode(inode).map_err(at_layer)?;
        let mut xattrs = Vec::new();
        for xattr in toc.xattrs(&inode).map_err(at_layer)? {
            let (name, value) = xattr.map_err(at_layer)?;
            xattrs.push((name.to_vec(), value.to_vec()));
        }
        let (mode, uid, gid, mtime) = (inode.mode(), inode.uid(), inode.gid(), inode.mtime());
        Ok(DirectoryAttributes { mode, uid, gid, mtime, xattrs })
    }

    fn error(&self, layer: u16, source: FormatError) -> ViewError {
        ViewError::Layer { layer: self.layer(layer).map_or(0, |layer| layer.number), source }
    }

    /// Writes down attributes that no inode of the run has.
    fn foreign(&mut self, mut attributes: DirectoryAttributes) -> Result<(u16, u32), ViewError> {
        let (mtime_sec, mtime_nsec) = attributes.mtime;
        let xattrs_off = index(self.text.len())?;
        attributes.xattrs.retain(|(name, _)| !name.is_empty() && shows_xattr(Kind::Directory, name));
        attributes.xattrs.sort_unstable();
        for (name, value) in &attributes.xattrs {
            let head = XattrHead { name_len: index(name.len())?.into(), value_len: index(value.len())?.into() };
            self.text.extend_from_slice(head.as_bytes());
            self.text.extend_from_slice(name);
            self.text.extend_from_slice(value);
        }
        let record = AttributeRecord {
            mode: (attributes.mode & 0o7777).into(),
            present: 1.into(),
            uid: attributes.uid.into(),
            gid: attributes.gid.into(),
            mtime_nsec: mtime_nsec.min(999_999_999).into(),
            mtime_sec: mtime_sec.into(),
            xattrs_off: xattrs_off.into(),
            xattrs_len: (index(self.text.len())? - xattrs_off).into(),
        };
        // Most such directories have plain attributes: the one record before is mostly the same.
        match self.attributes.last() {
            Some(last) if record.xattrs_len.get() == 0 && same_plain(last, &record) => {}
            _ => self.attributes.push(record),
        }
        Ok((NO_LAYER, index(self.attributes.len() - 1)?))
    }

    fn entry(&mut self, named: &Named<'_>, kind: u16, target: u32) -> Result<(), ViewError> {
        if self.entries.len() as u64 >= self.max_entries {
            return Err(ViewError::Limit { what: "more names than the layers have" });
        }
        self.entries.push(EntryRecord {
            layer: named.source.layer.into(),
            kind: kind.into(),
            directory: named.source.inode.into(),
            position: named.position.into(),
            target: target.into(),
        });
        Ok(())
    }

    /// A number for a new directory; [`Builder::fill`] writes the record.
    fn reserve(&mut self, parent: u32) -> Result<u32, ViewError> {
        if self.directories.len() as u64 >= self.max_directories {
            return Err(ViewError::Limit { what: "more directories than the layers have" });
        }
        let number = index(self.directories.len())?;
        self.directories.push(DirectoryRecord {
            parent: parent.into(),
            first: 0.into(),
            count: 0.into(),
            nlink: 0.into(),
            attributes: 0.into(),
            layer: NO_LAYER.into(),
            flags: 0.into(),
        });
        Ok(number)
    }

    fn look_below(&self, path: &[&[u8]]) -> Result<Option<BelowEntry>, ViewError> {
        self.below.map_or(Ok(None), |below| below.lookup(path).map_err(ViewError::Below))
    }

    fn layer(&self, position: u16) -> Result<&'a ViewLayer, ViewError> {
        self.layers.get(usize::from(position)).ok_or(ViewError::Limit { what: "layer out of range" })
    }

    fn finish(self) -> Result<Vec<u8>, ViewError> {
        let layers: Vec<_> = self.layers.iter().map(ViewLayer::record).collect();
        let counts = [layers.len(), self.directories.len(), self.entries.len(), self.attributes.len(), self.text.len()];
        let mut header = Header { magic: MAGIC, version: VERSION.into(), counts: [0.into(); 5] };
        for (field, count) in header.counts.iter_mut().zip(counts) {
            *field = index(count)?.into();
        }
        let tables = [
            header.as_bytes(),
            layers.as_bytes(),
            self.directories.as_bytes(),
            self.entries.as_bytes(),
            self.attributes.as_bytes(),
            &self.text,
        ];
        Ok(tables.concat())
    }
}

/// The directories that overlayfs merges for one name, and whether something ended them: an opaque mark, a whiteout, or
/// anything that is not a directory.
fn merged(group: &[Named<'_>]) -> (Vec<Source>, bool) {
    let mut sources = Vec::new();
    for named in group {
        let Found::Directory { inode, opaque } = named.found else { return (sources, true) };
        sources.push(Source { layer: named.source.layer, inode });
        if opaque {
            return (sources, true);
        }
    }
    (sources, false)
}

fn found(layer: &ViewLayer, inode: InodeIx) -> Result<Found, ViewError> {
    let record = layer.toc.inode(inode).map_err(|error| layer.error(error))?;
    Ok(match record.kind() {
        Kind::Directory => Found::Directory { inode, opaque: record.is_opaque() },
        // overlayfs takes such a device for a whiteout, whoever made it.
        Kind::CharDevice if record.rdev() == (0, 0) => Found::Whiteout,
        _ => Found::File { inode },
    })
}

fn same_plain(a: &AttributeRecord, b: &AttributeRecord) -> bool {
    let plain = |record: &AttributeRecord| {
        (record.mode, record.uid, record.gid, record.mtime_sec, record.mtime_nsec, record.xattrs_len)
    };
    plain(a) == plain(b)
}

fn index(count: usize) -> Result<u32, ViewError> {
    u32::try_from(count).ok().filter(|count| *count != NONE).ok_or(ViewError::Limit { what: "size of the tree" })
}
