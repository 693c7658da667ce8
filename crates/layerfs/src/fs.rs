//! The file system that the mount shows: its root lists the views, and each view is a merged tree.

use std::collections::BTreeMap;
use std::sync::Arc;

use millstream_toc::format::Kind;
use millstream_toc::read::{Inode, MAX_NAME};
use millstream_toc::{DataRange, FormatError, Toc};

use super::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use crate::attr::{Attr, shows_xattr};
use crate::node_id::{Decoded, NodeId};
use crate::view::{Attributes, Target, View, shows_opaque};
use crate::view_format::{DirectoryRecord, NONE, ViewError};

/// The attribute by which overlayfs knows that a directory hides what is below it, and its value.
const OPAQUE: (&[u8], &[u8]) = (b"trusted.overlay.opaque", b"y");
/// Where the entries begin among the offsets of a listing: "." has 0 and ".." has 1.
const FIRST_ENTRY: u64 = 2;

/// Why a request cannot be answered.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The directory has no such name.
    #[error("no such name")]
    NotFound,
    /// The name is longer than a file system allows (255 bytes).
    #[error("name too long")]
    NameTooLong,
    /// The node is not a directory.
    #[error("not a directory")]
    NotADirectory,
    /// The node is a directory and has no content.
    #[error("is a directory")]
    IsADirectory,
    /// The node is not of the kind that the request is for (content of a device, text of a regular file).
    #[error("request does not fit the kind of the node")]
    WrongKind,
    /// The id belongs to no node of the views that are there, or not any more.
    #[error("stale node id")]
    Stale,
    /// A layer's TOC cannot be read.
    #[error("damaged TOC of layer {layer}")]
    DamagedLayer {
        /// Number of the layer.
        layer: u32,
        /// What is wrong with it.
        #[source]
        source: FormatError,
    },
    /// A view cannot be read.
    #[error("damaged view {view}")]
    DamagedView {
        /// Number of the view.
        view: u32,
        /// What is wrong with it.
        #[source]
        source: ViewError,
    },
}

/// A node that was looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Its id.
    pub id: NodeId,
    /// Its attributes.
    pub attr: Attr,
}

/// A name in a listing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// Where a listing goes on after this name; valid for ever and in every process, as a view never changes.
    pub offset_of_next: u64,
    /// The node.
    pub id: NodeId,
    /// Its file type.
    pub kind: Kind,
    /// The name, raw bytes.
    pub name: &'a [u8],
}

/// Where the content of a regular file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct File {
    /// Number of the layer that has it.
    pub layer: u32,
    /// Its whole content in that layer's data file; empty for an empty file.
    pub data: DataRange,
}

/// A set of views under one root, all answered from memory. Cheap to ask from many threads at once.
#[derive(Debug, Default)]
pub struct LayerFs {
    state: RwLock<State>,
}

#[derive(Debug, Default)]
struct State {
    views: BTreeMap<u32, Arc<View>>,
    /// The layers of all views, so that a file is answered without knowing the view it was found in.
    layers: BTreeMap<u32, SharedLayer>,
}

#[derive(Debug)]
struct SharedLayer {
    toc: Arc<Toc>,
    /// How many times views have it (a run may have it twice).
    uses: usize,
}

/// A node of which the tables have been found.
enum Node {
    Root,
    File(LayerInode),
    Directory(Arc<View>, u32),
    Whiteout,
}

/// An inode that some view has.
struct LayerInode {
    layer: u32,
    toc: Arc<Toc>,
    inode: u32,
}

impl LayerInode {
    fn read(&self) -> Result<Inode<'_>, FsError> {
        self.toc.inode(self.inode).map_err(|source| self.damaged(source))
    }

    const fn damaged(&self, source: FormatError) -> FsError {
        FsError::DamagedLayer { layer: self.layer, source }
    }
}

impl LayerFs {
    /// A file system without views.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Shows `view` under its number, in place of one that has the same number.
    pub fn add(&self, view: View) {
        let mut state = self.write();
        for layer in view.layers() {
            let shared = SharedLayer { toc: Arc::clone(&layer.toc), uses: 0 };
            state.layers.entry(layer.number).or_insert(shared).uses += 1;
        }
        if let Some(old) = state.views.insert(view.number(), Arc::new(view)) {
            state.release(&old);
        }
    }

    /// Takes the view `number` away, if it is there. Its directories are stale from now on; so are the files of layers that
    /// no other view has.
    pub fn remove(&self, number: u32) {
        let mut state = self.write();
        if let Some(old) = state.views.remove(&number) {
            state.release(&old);
        }
    }

    /// The numbers of all views, ascending.
    #[must_use]
    pub fn views(&self) -> Vec<u32> {
        self.read().views.keys().copied().collect()
    }

    /// The node that directory `parent` names `name`.
    ///
    /// # Errors
    ///
    /// [`FsError::NotFound`], [`FsError::NameTooLong`], [`FsError::NotADirectory`], [`FsError::Stale`], or damage.
    pub fn lookup(&self, parent: NodeId, name: &[u8]) -> Result<Entry, FsError> {
        let id = match self.node(parent)? {
            Node::Root => self.view_named(name)?,
            Node::Directory(view, index) => {
                let directory = record(&view, index)?;
                let entry = view.find(&directory, name).map_err(|source| damaged(&view, source))?;
                match entry {
                    Some(entry) => entry_id(&view, entry.index, entry.target)?,
                    None if name.len() > MAX_NAME => return Err(FsError::NameTooLong),
                    None => return Err(FsError::NotFound),
                }
            }
            Node::File(_) | Node::Whiteout => return Err(FsError::NotADirectory),
        };
        Ok(Entry { id, attr: self.attr(id)? })
    }

    /// The attributes of a node.
    ///
    /// # Errors
    ///
    /// [`FsError::Stale`] or damage.
    pub fn attr(&self, id: NodeId) -> Result<Attr, FsError> {
        match self.node(id)? {
            Node::Root => Ok(Attr::plain_directory(id, 2_u32.saturating_add(self.view_count()))),
            Node::Whiteout => Ok(Attr::whiteout(id)),
            Node::File(file) => Attr::of_inode(id, &file.toc, &file.read()?).map_err(|source| file.damaged(source)),
            Node::Directory(view, index) => {
                let directory = record(&view, index)?;
                let nlink = directory.nlink.get();
                match view.attributes(&directory).map_err(|source| damaged(&view, source))? {
                    Attributes::Inode(_, inode) => Ok(Attr::of_directory(id, &inode, nlink)),
                    Attributes::Record(record) => Ok(Attr::of_record(id, &record, nlink)),
                }
            }
        }
    }

    /// Lists directory `dir` from `offset` on (0, or what [`DirEntry::offset_of_next`] said), "." and ".." included, until
    /// `each` answers that it is full. The name for which it said so is not taken as given: the caller goes on there.
    ///
    /// # Errors
    ///
    /// [`FsError::NotADirectory`], [`FsError::Stale`], or damage.
    pub fn read_dir(
        &self,
        dir: NodeId,
        offset: u64,
        each: &mut dyn FnMut(DirEntry<'_>) -> bool,
    ) -> Result<(), FsError> {
        let node = self.node(dir)?;
        let parent = match &node {
            Node::Root => NodeId::ROOT,
            Node::Directory(view, index) => parent(view, *index)?,
            Node::File(_) | Node::Whiteout => return Err(FsError::NotADirectory),
        };
        for (at, id, name) in [(0, dir, &b"."[..]), (1, parent, b"..")] {
            let entry = DirEntry { offset_of_next: at + 1, id, kind: Kind::Directory, name };
            if offset <= at && each(entry) {
                return Ok(());
            }
        }
        let first = offset.saturating_sub(FIRST_ENTRY);
        match node {
            Node::Directory(view, index) => read_view_dir(&view, index, first, each),
            _ => self.read_root(first, each),
        }
    }

    /// The text of a symbolic link, raw bytes.
    ///
    /// # Errors
    ///
    /// [`FsError::WrongKind`] for everything else, [`FsError::Stale`], or damage.
    pub fn read_link(&self, id: NodeId) -> Result<Vec<u8>, FsError> {
        let Node::File(file) = self.node(id)? else { return Err(FsError::WrongKind) };
        let inode = file.read()?;
        if inode.kind() != Kind::Symlink {
            return Err(FsError::WrongKind);
        }
        file.toc.symlink_target(&inode).map(<[u8]>::to_vec).map_err(|source| file.damaged(source))
    }

    /// The value of an extended attribute; `None` if the node does not have it.
    ///
    /// # Errors
    ///
    /// [`FsError::Stale`] or damage.
    pub fn xattr(&self, id: NodeId, name: &[u8]) -> Result<Option<Vec<u8>>, FsError> {
        let mut value = None;
        match self.node(id)? {
            Node::Root | Node::Whiteout => {}
            Node::File(file) => {
                let inode = file.read()?;
                if shows_xattr(inode.kind(), name) {
                    value = file.toc.xattr(&inode, name).map_err(|source| file.damaged(source))?.map(<[u8]>::to_vec);
                }
            }
            Node::Directory(view, index) => each_directory_xattr(&view, index, &mut |found, text| {
                if found == name {
                    value = Some(text.to_vec());
                }
            })?,
        }
        Ok(value)
    }

    /// The names of all extended attributes, each followed by a NUL byte.
    ///
    /// # Errors
    ///
    /// [`FsError::Stale`] or damage.
    pub fn xattr_names(&self, id: NodeId) -> Result<Vec<u8>, FsError> {
        let mut names = Vec::new();
        let mut add = |name: &[u8], _: &[u8]| {
            names.extend_from_slice(name);
            names.push(0);
        };
        match self.node(id)? {
            Node::Root | Node::Whiteout => {}
            Node::File(file) => {
                let inode = file.read()?;
                each_xattr(&file.toc, &inode, &mut add).map_err(|source| file.damaged(source))?;
            }
            Node::Directory(view, index) => each_directory_xattr(&view, index, &mut add)?,
        }
        Ok(names)
    }

    /// Where the content of a regular file is.
    ///
    /// # Errors
    ///
    /// [`FsError::IsADirectory`], [`FsError::WrongKind`] for links, devices and FIFOs, [`FsError::Stale`], or damage.
    pub fn file(&self, id: NodeId) -> Result<File, FsError> {
        match self.node(id)? {
            Node::Root | Node::Directory(..) => Err(FsError::IsADirectory),
            Node::Whiteout => Err(FsError::WrongKind),
            Node::File(file) => {
                let inode = file.read()?;
                if inode.kind() != Kind::Regular {
                    return Err(FsError::WrongKind);
                }
                let data = file.toc.file_data(&inode).map_err(|source| file.damaged(source))?;
                Ok(File { layer: file.layer, data })
            }
        }
    }

    fn node(&self, id: NodeId) -> Result<Node, FsError> {
        let state = self.read();
        let node = match id.decode().ok_or(FsError::Stale)? {
            Decoded::Root => return Ok(Node::Root),
            Decoded::File { layer, inode } => {
                let toc = Arc::clone(&state.layers.get(&layer).ok_or(FsError::Stale)?.toc);
                drop(state);
                return file_node(LayerInode { layer, toc, inode });
            }
            Decoded::Directory { view, directory } => {
                let view = state.views.get(&view).ok_or(FsError::Stale)?;
                view.has_directory(directory).then(|| Node::Directory(Arc::clone(view), directory))
            }
            Decoded::Whiteout { view, entry } => {
                let view = state.views.get(&view).ok_or(FsError::Stale)?;
                let there = view.is_whiteout(entry).map_err(|source| damaged(view, source))?;
                there.then_some(Node::Whiteout)
            }
        };
        node.ok_or(FsError::Stale)
    }

    /// The root of the view whose number is written as `name`, without leading zeros or sign.
    fn view_named(&self, name: &[u8]) -> Result<NodeId, FsError> {
        let number: u32 = std::str::from_utf8(name).ok().and_then(|name| name.parse().ok()).ok_or(FsError::NotFound)?;
        if number.to_string().as_bytes() != name || !self.read().views.contains_key(&number) {
            return Err(FsError::NotFound);
        }
        NodeId::directory(number, 0).ok_or(FsError::NotFound)
    }

    /// The offset of a view is its number, so that a listing goes on where it was although views come and go.
    fn read_root(&self, first: u64, each: &mut dyn FnMut(DirEntry<'_>) -> bool) -> Result<(), FsError> {
        let Ok(first) = u32::try_from(first) else { return Ok(()) };
        let numbers: Vec<u32> = self.read().views.range(first..).map(|(number, _)| *number).collect();
        for number in numbers {
            let id = NodeId::directory(number, 0).ok_or(FsError::Stale)?;
            let offset_of_next = u64::from(number) + 1 + FIRST_ENTRY;
            let name = number.to_string();
            if each(DirEntry { offset_of_next, id, kind: Kind::Directory, name: name.as_bytes() }) {
                break;
            }
        }
        Ok(())
    }

    fn view_count(&self) -> u32 {
        u32::try_from(self.read().views.len()).unwrap_or(u32::MAX)
    }

    // A thread that panicked while it held the lock left maps that are still whole.
    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Forgets that `view` uses its layers.
    fn release(&mut self, view: &View) {
        for layer in view.layers() {
            if let Some(shared) = self.layers.get_mut(&layer.number) {
                shared.uses = shared.uses.saturating_sub(1);
                if shared.uses == 0 {
                    self.layers.remove(&layer.number);
                }
            }
        }
    }
}

/// An inode that is a directory has no id of its own: directories belong to views.
fn file_node(file: LayerInode) -> Result<Node, FsError> {
    if file.inode >= file.toc.inode_count() || file.read()?.is_dir() {
        return Err(FsError::Stale);
    }
    Ok(Node::File(file))
}

fn damaged(view: &View, source: ViewError) -> FsError {
    match source {
        ViewError::Layer { layer, source } => FsError::DamagedLayer { layer, source },
        source => FsError::DamagedView { view: view.number(), source },
    }
}

fn record(view: &View, index: u32) -> Result<DirectoryRecord, FsError> {
    view.directory(index).map_err(|source| damaged(view, source))
}

fn parent(view: &View, index: u32) -> Result<NodeId, FsError> {
    match record(view, index)?.parent.get() {
        NONE => Ok(NodeId::ROOT),
        parent => NodeId::directory(view.number(), parent).ok_or(FsError::Stale),
    }
}

fn entry_id(view: &View, index: u32, target: Target<'_>) -> Result<NodeId, FsError> {
    let id = match target {
        Target::Inode(layer, inode) => NodeId::file(layer.number, inode),
        Target::Directory(directory) => NodeId::directory(view.number(), directory),
        Target::Whiteout => NodeId::whiteout(view.number(), index),
    };
    id.ok_or(FsError::Stale)
}

fn entry_kind(target: Target<'_>) -> Result<Kind, FsError> {
    match target {
        Target::Directory(_) => Ok(Kind::Directory),
        Target::Whiteout => Ok(Kind::CharDevice),
        Target::Inode(layer, inode) => {
            let inode = layer.toc.inode(inode);
            inode.map(|inode| inode.kind()).map_err(|source| FsError::DamagedLayer { layer: layer.number, source })
        }
    }
}

/// Lists the entries of a directory of a view from position `first` on.
fn read_view_dir(
    view: &View,
    index: u32,
    first: u64,
    each: &mut dyn FnMut(DirEntry<'_>) -> bool,
) -> Result<(), FsError> {
    let directory = record(view, index)?;
    for position in u32::try_from(first).unwrap_or(u32::MAX)..directory.count.get() {
        let Some(entry) = view.entry(&directory, position).map_err(|source| damaged(view, source))? else { break };
        let id = entry_id(view, entry.index, entry.target)?;
        let offset_of_next = u64::from(position) + 1 + FIRST_ENTRY;
        if each(DirEntry { offset_of_next, id, kind: entry_kind(entry.target)?, name: entry.name }) {
            break;
        }
    }
    Ok(())
}

/// Gives the attributes of an inode that are shown to `each`.
fn each_xattr(toc: &Toc, inode: &Inode<'_>, each: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), FormatError> {
    for xattr in toc.xattrs(inode)? {
        let (name, value) = xattr?;
        if shows_xattr(inode.kind(), name) {
            each(name, value);
        }
    }
    Ok(())
}

fn each_directory_xattr(view: &View, index: u32, each: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), FsError> {
    let directory = record(view, index)?;
    if shows_opaque(&directory) {
        each(OPAQUE.0, OPAQUE.1);
    }
    match view.attributes(&directory).map_err(|source| damaged(view, source))? {
        Attributes::Inode(layer, inode) => {
            each_xattr(&layer.toc, &inode, each).map_err(|source| FsError::DamagedLayer { layer: layer.number, source })
        }
        Attributes::Record(record) => view.record_xattrs(&record, each).map_err(|source| damaged(view, source)),
    }
}
