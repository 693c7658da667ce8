//! The tree that containerd would make of the members, with overlayfs' whiteouts, in a directory that was empty before.
//!
//! The order of the steps follows what containerd does, because for odd archives the order decides the result: where the
//! name leads, which parents are made, whether it is a whiteout, what is removed, what is made, which attributes it gets.
//!
//! containerd has two sets of rules. Above other layers a whiteout is made a device and an opaque mark an attribute; in the lowest
//! layer both remove, there and then, what they name. Where that makes a difference the layer is not eligible.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::rc::Rc;

use super::Budget;
use super::error::{BuildError, Ineligible, counted, text};
use super::path::{clean, components, split};
use crate::format::{ContentIx, FLAG_IMPLIED, FLAG_LATE, FLAG_OPAQUE, Kind, NONE};
use crate::read::{MAX_NAME, MAX_PATH};
use crate::tar::{Member, MemberKind};

const WHITEOUT_PREFIX: &[u8] = b".wh.";
const WHITEOUT_OPAQUE: &[u8] = b".wh..wh..opq";
/// Linux keeps 12 bits of a major and 20 bits of a minor number.
const DEVICE_MASK: (u32, u32) = (0xfff, 0xf_ffff);
/// Latest time that containerd sets, in seconds and nanoseconds: 2^63 - 1 nanoseconds.
const LATEST: (i64, u32) = (9_223_372_036, 854_775_807);
/// Bytes of a path from the root of the layer that containerd can surely make: to the kernel it has the path of a directory of
/// containerd before it, and 4095 bytes are the most together.
const MAX_UNPACKED_PATH: usize = 3584;
/// Bytes of a symbolic link's text that every file system takes; XFS has the least.
const MAX_LINK_TEXT: usize = 1023;
/// Bytes of all extended attributes of one file, with 16 for each, that every file system takes: ext4 has one block for them.
const MAX_XATTR_BYTES: usize = 3072;
/// Mode of directories that no member describes.
const IMPLIED_MODE: u16 = 0o755;
/// Mode of symbolic links on Linux.
const SYMLINK_MODE: u16 = 0o777;

/// Mark of a directory in whose tree a directory was made that no member had described; never written.
const FLAG_IMPLIED_BELOW: u8 = 0x80;
/// Mark of a directory that may have given another group to what was made in it before; never written.
const FLAG_GROUP_CHANGED: u8 = 0x40;
/// Bit of a directory's mode by which what is made in it has its group.
const SET_GROUP_ID: u16 = 0o2000;

/// Index of a node. The root is 0.
pub(super) type NodeIx = u32;
pub(super) const ROOT: NodeIx = 0;

/// Extended attributes, sorted by name.
pub(super) type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slot {
    /// It was removed again.
    Absent,
    Whiteout,
    Node(NodeIx),
}

/// A file of any kind.
#[derive(Debug, Clone, Copy)]
pub(super) struct Node {
    pub(super) kind: Kind,
    pub(super) flags: u8,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: (i64, u32),
    /// Index in [`Tree::xattrs`] or [`NONE`].
    pub(super) xattrs: u32,
    /// Directory: its newest entry or [`NONE`]. Symlink: text. Device: major. Regular: content or [`NONE`].
    pub(super) a: u32,
    /// Symlink: length of the text. Device: minor.
    pub(super) b: u32,
}

/// One name in one directory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) parent: NodeIx,
    name_off: u32,
    name_len: u8,
    pub(super) slot: Slot,
    /// Next (older) entry of the same directory or [`NONE`].
    pub(super) sibling: u32,
    /// Next entry with the same hash or [`NONE`].
    chain: u32,
}

/// Where a member goes: everything in its way is gone, and its parents exist.
#[derive(Debug)]
pub(super) struct Place {
    parent: NodeIx,
    name: Vec<u8>,
    /// A directory that stays and only gets new attributes.
    existing: Option<NodeIx>,
}

/// The directory of a member.
#[derive(Debug, Clone, Copy)]
struct Parent {
    node: NodeIx,
    /// Bytes of its path, links followed.
    length: usize,
}

/// The tree so far. About 100 bytes per file.
pub(super) struct Tree<'b> {
    pub(super) budget: &'b Budget,
    pub(super) nodes: Vec<Node>,
    pub(super) entries: Vec<Entry>,
    /// Distinct sets of extended attributes.
    pub(super) xattrs: Vec<Rc<Xattrs>>,
    pub(super) xattr_bytes: u64,
    known_xattrs: HashMap<Rc<Xattrs>, u32>,
    /// First entry for a hash of (parent, name). The hash is keyed, so that nobody can prepare collisions.
    index: HashMap<u64, u32>,
    hasher: RandomState,
    /// Names and texts of symbolic links.
    texts: Vec<u8>,
    /// Members that are directories: cleaned name and time, in order; see [`Tree::finish`].
    directories: Vec<(u32, u32, (i64, u32))>,
    /// Parent of the last member, so that a run of files in one directory costs one walk.
    last_parent: Option<(Vec<u8>, Parent)>,
    /// Names looked up while resolving symbolic links.
    pub(super) link_work: u64,
}

impl<'b> Tree<'b> {
    pub(super) fn new(budget: &'b Budget) -> Self {
        Self {
            budget,
            nodes: vec![implied_directory()],
            entries: Vec::new(),
            xattrs: Vec::new(),
            xattr_bytes: 0,
            known_xattrs: HashMap::new(),
            index: HashMap::new(),
            hasher: RandomState::new(),
            texts: Vec::new(),
            directories: Vec::new(),
            last_parent: None,
            link_work: 0,
        }
    }

    /// Does all that comes before a member's content is read. `None` when nothing is to be made: the member is the root
    /// itself, a whiteout or a global header.
    pub(super) fn place(&mut self, member: &Member) -> Result<Option<Place>, BuildError> {
        let name = clean(&member.name);
        let (directory, base) = split(&name);
        if matches!(base, b"" | b"." | b"..") {
            // Only the root and what climbs above it end like this after cleaning.
            return Ok(None);
        }
        let Parent { node: parent, length } = self.parent(directory, &name)?;
        if base == WHITEOUT_OPAQUE {
            if self.nodes[parent as usize].flags & FLAG_IMPLIED_BELOW != 0 {
                // In the lowest layer a mark removes what no member has described so far.
                return Err(BuildError::position_matters(
                    &name,
                    "opaque mark over directories that no member describes",
                ));
            }
            self.nodes[parent as usize].flags |= FLAG_OPAQUE;
            return Ok(None);
        }
        if length + base.len() > MAX_UNPACKED_PATH {
            return Err(BuildError::over("bytes of a path", MAX_UNPACKED_PATH as u64));
        }
        // Of a whiteout only the name it hides comes into being.
        let hidden = base.strip_prefix(WHITEOUT_PREFIX);
        check_name(hidden.unwrap_or(base), &name)?;
        if let Some(hidden) = hidden {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(BuildError::member(&name, "whiteout of no name"));
            }
            if self.lookup(parent, hidden) != Slot::Absent {
                return Err(BuildError::position_matters(&name, "whiteout of a name that the layer has"));
            }
            self.set(parent, hidden, Slot::Whiteout)?;
            return Ok(None);
        }
        let existing = match self.lookup(parent, base) {
            Slot::Absent => None,
            Slot::Node(node) if member.kind == MemberKind::Directory && self.is_directory(node) => Some(node),
            _ => {
                self.last_parent = None;
                self.set(parent, base, Slot::Absent)?;
                None
            }
        };
        if member.kind == MemberKind::GlobalHeader {
            return Ok(None);
        }
        Ok(Some(Place { parent, name: base.to_vec(), existing }))
    }

    /// Makes what the member describes. `content` is that of a regular file.
    pub(super) fn create(
        &mut self,
        place: Place,
        member: &Member,
        content: Option<ContentIx>,
    ) -> Result<(), BuildError> {
        let node = match member.kind {
            MemberKind::HardLink => self.link_target(member)?,
            MemberKind::Directory if place.existing.is_some() => place.existing.unwrap_or(ROOT),
            _ => match self.new_node(member, content)? {
                Some(node) => node,
                // To overlayfs a character device 0:0 is a whiteout, wherever it comes from.
                None => return self.set(place.parent, &place.name, Slot::Whiteout),
            },
        };
        match place.existing {
            None => self.set(place.parent, &place.name, Slot::Node(node))?,
            Some(existing) => self.describe_again(existing, member.mode),
        }
        self.set_attributes(node, member)?;
        if member.kind == MemberKind::Directory {
            // One directory may be named again and again, which makes neither a file nor a name.
            if self.directories.len() as u64 >= self.budget.max_entries {
                return Err(BuildError::over(counted::DIRECTORIES, self.budget.max_entries));
            }
            let name = clean(&member.name);
            let text = self.store_text(&name)?;
            self.directories.push((text, len_u32(&name), bound_time(member.mtime)));
        }
        Ok(())
    }

    /// What containerd does after the last member: it sets the times of all directories again, in order, by their names as
    /// they lead now. A name may lead elsewhere than it did before, or nowhere, which it refuses.
    pub(super) fn finish(&mut self) -> Result<(), BuildError> {
        for at in 0..self.directories.len() {
            let (text, len, mtime) = self.directories[at];
            let name = self.text(text, len).to_vec();
            let slot = match self.walk(&name)? {
                Some(node) => Slot::Node(node),
                None => {
                    let path = self.resolve(&name)?;
                    self.stat(&path)?
                }
            };
            match slot {
                Slot::Node(node) => self.nodes[node as usize].mtime = mtime,
                Slot::Whiteout => {}
                Slot::Absent => return Err(BuildError::member(&name, "directory was removed by a later member")),
            }
        }
        self.check_groups()
    }

    /// Notes that a directory which is there gets another description, with this mode.
    fn describe_again(&mut self, node: NodeIx, mode: u16) {
        let node = &mut self.nodes[node as usize];
        if node.flags & FLAG_IMPLIED != 0 {
            node.flags = node.flags & !FLAG_IMPLIED | FLAG_LATE;
        } else if (node.mode | mode) & SET_GROUP_ID != 0 {
            node.flags |= FLAG_GROUP_CHANGED;
        }
    }

    /// What is made in a set-group-ID directory has its group. Of a directory that nobody describes, and that was made while its
    /// parent had not yet the attributes it ends with, the group cannot be told.
    fn check_groups(&self) -> Result<(), BuildError> {
        let changed = |entry: &&Entry| self.nodes[entry.parent as usize].flags & (FLAG_LATE | FLAG_GROUP_CHANGED) != 0;
        let implied = |entry: &Entry| match entry.slot {
            Slot::Node(node) => self.nodes[node as usize].flags & FLAG_IMPLIED != 0,
            Slot::Absent | Slot::Whiteout => false,
        };
        match self.entries.iter().filter(changed).find(|entry| implied(entry)) {
            Some(entry) => Err(Ineligible::Group { name: text(self.name(entry)) }.into()),
            None => Ok(()),
        }
    }

    fn new_node(&mut self, member: &Member, content: Option<ContentIx>) -> Result<Option<NodeIx>, BuildError> {
        let (kind, a, b) = match member.kind {
            MemberKind::Directory => (Kind::Directory, NONE, 0),
            MemberKind::Regular => (Kind::Regular, content.unwrap_or(NONE), 0),
            MemberKind::Symlink => {
                if member.link.is_empty() || member.link.len() >= MAX_PATH || member.link.contains(&0) {
                    return Err(BuildError::member(&member.name, "symbolic link with an impossible target"));
                }
                if member.link.len() > MAX_LINK_TEXT {
                    return Err(BuildError::over("bytes of a symbolic link's text", MAX_LINK_TEXT as u64));
                }
                (Kind::Symlink, self.store_text(&member.link)?, len_u32(&member.link))
            }
            MemberKind::CharDevice | MemberKind::BlockDevice => {
                let rdev = (member.rdev.0 & DEVICE_MASK.0, member.rdev.1 & DEVICE_MASK.1);
                match member.kind {
                    MemberKind::CharDevice if rdev == (0, 0) => return Ok(None),
                    MemberKind::CharDevice => (Kind::CharDevice, rdev.0, rdev.1),
                    _ => (Kind::BlockDevice, rdev.0, rdev.1),
                }
            }
            MemberKind::Fifo => (Kind::Fifo, 0, 0),
            MemberKind::HardLink | MemberKind::GlobalHeader | MemberKind::Unknown => {
                return Err(BuildError::member(&member.name, "type of member that containerd does not apply"));
            }
        };
        let mode = if kind == Kind::Symlink { SYMLINK_MODE } else { 0 };
        self.add_node(Node { kind, flags: 0, mode, a, b, ..implied_directory() }).map(Some)
    }

    fn add_node(&mut self, node: Node) -> Result<NodeIx, BuildError> {
        if self.nodes.len() as u64 >= self.budget.max_entries {
            return Err(BuildError::over(counted::FILES, self.budget.max_entries));
        }
        let ix = u32::try_from(self.nodes.len()).map_err(|_| BuildError::over("files", u32::MAX.into()))?;
        self.nodes.push(node);
        Ok(ix)
    }

    /// `chown`, `setxattr`, `chmod` and `utimes`, in containerd's order, on the inode: for a hard link it is shared, so that
    /// the last member wins.
    fn set_attributes(&mut self, ix: NodeIx, member: &Member) -> Result<(), BuildError> {
        if member.uid == u32::MAX || member.gid == u32::MAX {
            return Err(Ineligible::Owner { path: text(&member.name) }.into());
        }
        let node = self.nodes[ix as usize];
        let xattrs = self.merged_xattrs(&node, member)?;
        let node = &mut self.nodes[ix as usize];
        node.uid = member.uid;
        node.gid = member.gid;
        node.xattrs = xattrs;
        if node.kind != Kind::Symlink {
            node.mode = member.mode & 0o7777;
        }
        node.mtime = bound_time(member.mtime);
        Ok(())
    }

    /// The attributes of `node` after those of `member` were set on top of them.
    fn merged_xattrs(&mut self, node: &Node, member: &Member) -> Result<u32, BuildError> {
        let before: &[(Vec<u8>, Vec<u8>)] = self.xattrs.get(node.xattrs as usize).map_or(&[], |set| set);
        // `chown` takes the capabilities of everything but directories.
        let loses_capability =
            node.kind != Kind::Directory && before.iter().any(|(name, _)| name == b"security.capability");
        if member.xattrs.is_empty() && !loses_capability {
            return Ok(node.xattrs);
        }
        let mut merged: Xattrs =
            before.iter().filter(|(name, _)| !(loses_capability && name == b"security.capability")).cloned().collect();
        for (name, value) in &member.xattrs {
            if !takes_xattr(node.kind, name, value, &member.name)? {
                continue;
            }
            match merged.binary_search_by(|(known, _)| known.cmp(name)) {
                Ok(at) => merged[at].1.clone_from(value),
                Err(at) => merged.insert(at, (name.clone(), value.clone())),
            }
        }
        if merged.iter().map(|(name, value)| name.len() + value.len() + 16).sum::<usize>() > MAX_XATTR_BYTES {
            return Err(Ineligible::Xattr { path: text(&member.name) }.into());
        }
        self.intern(merged)
    }

    fn intern(&mut self, set: Xattrs) -> Result<u32, BuildError> {
        if set.is_empty() {
            return Ok(NONE);
        }
        if let Some(known) = self.known_xattrs.get(&set) {
            return Ok(*known);
        }
        let ix =
            u32::try_from(self.xattrs.len()).map_err(|_| BuildError::over("sets of attributes", u32::MAX.into()))?;
        self.xattr_bytes += set.iter().map(|(name, value)| (name.len() + value.len() + 16) as u64).sum::<u64>();
        if self.xattr_bytes > self.budget.max_toc_bytes {
            return Err(BuildError::over(counted::TOC_BYTES, self.budget.max_toc_bytes));
        }
        let set = Rc::new(set);
        self.xattrs.push(Rc::clone(&set));
        self.known_xattrs.insert(set, ix);
        Ok(ix)
    }

    fn link_target(&mut self, member: &Member) -> Result<NodeIx, BuildError> {
        let (directory, base) = split(&member.link);
        let slot = if base == b".." {
            Slot::Node(ROOT)
        } else {
            let mut path = self.resolve(directory)?;
            if !matches!(base, b"" | b".") {
                check_name(base, &member.link)?;
                path.push(b'/');
                path.extend_from_slice(base);
            }
            self.stat(&path)?
        };
        match slot {
            Slot::Absent => {
                Err(Ineligible::HardLinkBelow { path: text(&member.name), target: text(&member.link) }.into())
            }
            Slot::Whiteout => Err(BuildError::position_matters(&member.name, "hard link to a whiteout")),
            Slot::Node(node) if self.is_directory(node) => {
                Err(BuildError::member(&member.name, "hard link to a directory"))
            }
            Slot::Node(node) => Ok(node),
        }
    }

    /// The directory that the parent part of a cleaned name leads to; what is missing of it is made.
    fn parent(&mut self, directory: &[u8], name: &[u8]) -> Result<Parent, BuildError> {
        if let Some((path, parent)) = &self.last_parent
            && path == directory
        {
            return Ok(*parent);
        }
        let parent = match self.make_directories(directory, name)? {
            Some(node) => Parent { node, length: directory.len() },
            None => {
                let resolved = self.resolve(directory)?;
                let node = self.make_directories(&resolved, name)?.ok_or_else(|| {
                    BuildError::member(name, "symbolic links of its parents change while they are followed")
                })?;
                Parent { node, length: resolved.len() }
            }
        };
        self.last_parent = Some((directory.to_vec(), parent));
        Ok(parent)
    }

    /// Walks down and makes what is missing. `None` at a symbolic link; nothing was made then.
    fn make_directories(&mut self, path: &[u8], name: &[u8]) -> Result<Option<NodeIx>, BuildError> {
        let (mut node, mut implied) = (ROOT, false);
        let mut depth = 0;
        for component in components(path).filter(|component| *component != b"..") {
            check_name(component, name)?;
            depth += 1;
            if depth >= self.budget.max_depth {
                return Err(BuildError::over("directories above a file", self.budget.max_depth));
            }
            node = match self.lookup(node, component) {
                Slot::Node(next) if self.is_directory(next) => next,
                Slot::Node(next) if self.nodes[next as usize].kind == Kind::Symlink => return Ok(None),
                Slot::Node(_) => return Err(BuildError::member(name, "a parent is not a directory")),
                Slot::Whiteout => return Err(BuildError::position_matters(name, "a parent is a whiteout")),
                Slot::Absent => {
                    let next = self.add_node(implied_directory())?;
                    self.set(node, component, Slot::Node(next))?;
                    implied = true;
                    next
                }
            };
        }
        if implied {
            self.note_implied(path);
        }
        Ok(Some(node))
    }

    /// Marks all directories above the one at `path`, to which the way leads through directories only.
    fn note_implied(&mut self, path: &[u8]) {
        let mut node = ROOT;
        for component in components(path).filter(|component| *component != b"..") {
            self.nodes[node as usize].flags |= FLAG_IMPLIED_BELOW;
            let Slot::Node(next) = self.lookup(node, component) else { return };
            node = next;
        }
    }

    /// The directory at a cleaned name, if the way leads through directories only.
    fn walk(&self, name: &[u8]) -> Result<Option<NodeIx>, BuildError> {
        let mut node = ROOT;
        for component in components(name).filter(|component| *component != b"..") {
            match self.lookup(node, component) {
                Slot::Node(next) if self.is_directory(next) => node = next,
                _ => return Ok(None),
            }
        }
        Ok(Some(node))
    }

    pub(super) fn is_directory(&self, node: NodeIx) -> bool {
        self.nodes[node as usize].kind == Kind::Directory
    }

    pub(super) fn text(&self, offset: u32, length: u32) -> &[u8] {
        &self.texts[offset as usize..][..length as usize]
    }

    pub(super) fn name(&self, entry: &Entry) -> &[u8] {
        self.text(entry.name_off, entry.name_len.into())
    }

    fn store_text(&mut self, text: &[u8]) -> Result<u32, BuildError> {
        let limit = self.budget.max_toc_bytes.min(u32::MAX.into());
        if (self.texts.len() + text.len()) as u64 > limit {
            return Err(BuildError::over(counted::NAME_BYTES, limit));
        }
        let offset = u32::try_from(self.texts.len()).map_err(|_| BuildError::over(counted::NAME_BYTES, limit))?;
        self.texts.extend_from_slice(text);
        Ok(offset)
    }

    pub(super) fn lookup(&self, parent: NodeIx, name: &[u8]) -> Slot {
        self.find(parent, name).map_or(Slot::Absent, |at| self.entries[at as usize].slot)
    }

    fn find(&self, parent: NodeIx, name: &[u8]) -> Option<u32> {
        let mut at = *self.index.get(&self.hasher.hash_one((parent, name)))?;
        while at != NONE {
            let entry = &self.entries[at as usize];
            if entry.parent == parent && self.name(entry) == name {
                return Some(at);
            }
            at = entry.chain;
        }
        None
    }

    /// Gives a name its meaning, whatever it meant before.
    fn set(&mut self, parent: NodeIx, name: &[u8], slot: Slot) -> Result<(), BuildError> {
        if let Some(at) = self.find(parent, name) {
            self.entries[at as usize].slot = slot;
            return Ok(());
        }
        if self.entries.len() as u64 >= self.budget.max_entries {
            return Err(BuildError::over(counted::NAMES, self.budget.max_entries));
        }
        let at = u32::try_from(self.entries.len()).map_err(|_| BuildError::over("names", u32::MAX.into()))?;
        let name_len = u8::try_from(name.len()).map_err(|_| BuildError::member(name, "name is too long"))?;
        let name_off = self.store_text(name)?;
        let chain = self.index.insert(self.hasher.hash_one((parent, name)), at).unwrap_or(NONE);
        let sibling = std::mem::replace(&mut self.nodes[parent as usize].a, at);
        self.entries.push(Entry { parent, name_off, name_len, slot, sibling, chain });
        Ok(())
    }
}

const fn implied_directory() -> Node {
    Node {
        kind: Kind::Directory,
        flags: FLAG_IMPLIED,
        mode: IMPLIED_MODE,
        uid: 0,
        gid: 0,
        mtime: (0, 0),
        xattrs: NONE,
        a: NONE,
        b: 0,
    }
}

/// A component that Linux takes as a name. `path` is for the message.
pub(super) fn check_name(component: &[u8], path: &[u8]) -> Result<(), BuildError> {
    if component.len() > MAX_NAME || component.contains(&0) {
        return Err(BuildError::member(path, "name that Linux does not take"));
    }
    Ok(())
}

/// containerd's bounds: what is before 1970 or beyond 2^63 nanoseconds becomes 1970.
const fn bound_time(time: (i64, u32)) -> (i64, u32) {
    let (seconds, nanoseconds) = time;
    if seconds < 0 || seconds > LATEST.0 || (seconds == LATEST.0 && nanoseconds > LATEST.1) { (0, 0) } else { time }
}

/// Whether the attribute would be set. What the kernel has no handler for, and `trusted.*`, containerd leaves out.
fn takes_xattr(kind: Kind, name: &[u8], value: &[u8], path: &[u8]) -> Result<bool, BuildError> {
    const MAX_VALUE: usize = 64 * 1024;
    // containerd looks at this by itself, before anything else does.
    if name.starts_with(b"trusted.") {
        return Ok(false);
    }
    let odd = || Err(Ineligible::Xattr { path: text(path) }.into());
    // The kernel looks at lengths before it looks for a handler.
    if name.is_empty() || name.len() > MAX_NAME || name.contains(&0) || value.len() > MAX_VALUE {
        return odd();
    }
    let file_or_directory = matches!(kind, Kind::Regular | Kind::Directory);
    let namespace = name.iter().position(|byte| *byte == b'.').map_or(name, |dot| &name[..=dot]);
    match namespace {
        b"user." if !file_or_directory => return Ok(false),
        b"user." | b"security." => {}
        b"system." if matches!(&name[7..], b"posix_acl_access" | b"posix_acl_default") && kind != Kind::Symlink => {
            return Err(Ineligible::AccessControlList { path: text(path) }.into());
        }
        _ => return Ok(false),
    }
    if name.len() == namespace.len() || is_judged_by_the_kernel(name, value) {
        return odd();
    }
    Ok(true)
}

/// Whether a kernel may refuse the attribute for its value: capabilities of a form that is none, and what the integrity
/// subsystems, where there are any, want to have made themselves.
fn is_judged_by_the_kernel(name: &[u8], value: &[u8]) -> bool {
    const REVISION_2: (u32, usize) = (0x0200_0000, 20);
    const REVISION_3: (u32, usize) = (0x0300_0000, 24);
    const EFFECTIVE: u32 = 1;
    match name {
        b"security.capability" => {
            let revision = value.first_chunk().map(|word| u32::from_le_bytes(*word) & !EFFECTIVE);
            ![REVISION_2, REVISION_3].contains(&(revision.unwrap_or_default(), value.len()))
        }
        b"security.ima" | b"security.evm" => true,
        _ => false,
    }
}

fn len_u32(text: &[u8]) -> u32 {
    u32::try_from(text.len()).unwrap_or(u32::MAX)
}
