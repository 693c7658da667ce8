//! From where a directory that its layer only implies takes its attributes.
//!
//! When containerd must create a parent directory that the archive does not describe, it looks for the same path in each
//! lower layer's directory by itself, from the top one down, follows symbolic links inside of that layer, and copies from
//! the first thing it finds if that is a directory. So opaque marks do not count here, whiteouts do, and a link in a lower
//! layer leads to the directory it names. Where a *parent* of the path is a whiteout or a file in the layer that is looked
//! at, containerd fails to apply the layer: [`contradiction`] finds that before an image is taken, and in a view that is
//! built all the same nobody describes the directory.

use std::rc::Rc;

use millstream_toc::format::{InodeIx, Kind};
use millstream_toc::{FormatError, Toc};

use crate::below::{Below, BelowEntry, DirectoryAttributes};
use crate::view::ViewLayer;
use crate::view_format::ViewError;

/// Symbolic links that may be followed on one path; containerd's limit.
const MAX_LINKS: u32 = 255;
/// Names that may be looked up for links while one view is built. An honest image needs a few thousand.
const MAX_STEPS: u32 = 1 << 24;

/// Path without links, from the root of a layer on.
type Path<'a> = Vec<&'a [u8]>;

/// What one layer has at the path of a directory of the view.
#[derive(Debug, Clone)]
pub(crate) struct Seen<'a> {
    /// Position of the layer.
    pub(crate) layer: u16,
    at: At<'a>,
}

#[derive(Debug, Clone)]
enum At<'a> {
    Directory {
        inode: InodeIx,
        /// Where it really is, if a link led to it.
        moved: Option<Rc<Path<'a>>>,
    },
    /// A whiteout, or a file.
    Other,
    /// A parent of the path is one of those, or links lead round in circles: there is no way to look.
    Blocked,
}

/// Whose attributes a directory has.
pub(crate) enum Owner {
    /// An inode of the layer at this position.
    Inode(u16, InodeIx),
    /// Something outside of the run.
    Foreign(DirectoryAttributes),
}

/// A directory that a layer implies and containerd could not make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contradiction {
    /// Position of the layer, 0 being the bottom one.
    pub layer: usize,
    /// Its path in the layer, without a leading slash.
    pub path: Vec<u8>,
}

/// The first directory, from the bottom up, for which containerd would look behind a file or a whiteout of a lower layer: it
/// fails then, with "not a directory". `layers` is the whole image, or its lower part, bottom first.
///
/// # Errors
/// A table is damaged, or there are too many links to follow.
pub fn contradiction(layers: &[ViewLayer]) -> Result<Option<Contradiction>, ViewError> {
    let mut look = Inheritance::new(layers, None);
    for (layer, position) in layers.iter().zip(0..).skip(1) {
        let mut todo = vec![(0, Path::new())];
        while let Some((directory, path)) = todo.pop() {
            let failed = |source| ViewError::Layer { layer: layer.number, source };
            let directory = layer.toc.inode(directory).map_err(failed)?;
            let made = directory.is_implied() || directory.is_late();
            if made && !path.is_empty() && look.is_blocked(position, &path)? {
                return Ok(Some(Contradiction { layer: position.into(), path: path.join(&b'/') }));
            }
            for child in layer.toc.children(&directory).map_err(failed)? {
                let child = child.map_err(failed)?;
                let Some(inode) = child.inode else { continue };
                if layer.toc.inode(inode).map_err(failed)?.is_dir() {
                    todo.push((inode, [path.as_slice(), &[child.name]].concat()));
                }
            }
        }
    }
    Ok(None)
}

/// What a search through lower layers ends with.
enum Found<'a> {
    Owner(Owner),
    /// Nothing to copy from: `maker` made the directory, at the path that it has there.
    Nothing {
        maker: u16,
        path: Path<'a>,
    },
}

/// Looks into the layers one by one.
pub(crate) struct Inheritance<'a> {
    layers: &'a [ViewLayer],
    below: Option<&'a dyn Below>,
    steps: u32,
}

impl<'a> Inheritance<'a> {
    pub(crate) const fn new(layers: &'a [ViewLayer], below: Option<&'a dyn Below>) -> Self {
        Self { layers, below, steps: 0 }
    }

    /// What each layer has at the root, top first.
    pub(crate) fn root(&self) -> Vec<Seen<'a>> {
        (0..self.layers.len())
            .rev()
            .filter_map(|layer| Some(Seen { layer: layer.try_into().ok()?, at: root() }))
            .collect()
    }

    /// What each layer has at `path`, if `parents` is what each has at the directory of `path`; layers that have nothing are
    /// left out.
    pub(crate) fn descend(&mut self, parents: &[Seen<'a>], path: &[&'a [u8]]) -> Result<Vec<Seen<'a>>, ViewError> {
        let Some((name, directory)) = path.split_last() else { return Ok(Vec::new()) };
        let mut seen = Vec::new();
        for parent in parents {
            let at = match &parent.at {
                At::Other | At::Blocked => Some(At::Blocked),
                At::Directory { inode, moved } => {
                    let real = moved.as_ref().map_or(directory, |path| path.as_slice());
                    self.step(parent.layer, *inode, moved.is_some(), real, name)?
                }
            };
            seen.extend(at.map(|at| Seen { layer: parent.layer, at }));
        }
        Ok(seen)
    }

    /// Whose attributes the directory at `path` has if the layer at position `layer` implies it; `seen` is what each layer has
    /// at `path`.
    pub(crate) fn owner(&mut self, layer: u16, path: &[&'a [u8]], seen: &[Seen<'a>]) -> Result<Owner, ViewError> {
        // The lowest layer that implies it without finding it further down is the one that made it.
        let mut maker = layer;
        for lower in seen.iter().filter(|lower| lower.layer < layer) {
            match &lower.at {
                At::Other | At::Blocked => return self.fresh_in(maker, path),
                At::Directory { inode, .. } if !self.is_implied(lower.layer, *inode)? => {
                    return Ok(Owner::Inode(lower.layer, *inode));
                }
                // Implied there too: it has what that layer found further down, at its own path.
                At::Directory { moved: None, .. } => maker = lower.layer,
                At::Directory { moved: Some(real), .. } => {
                    let (layer, path) = (lower.layer, real.to_vec());
                    return match self.owner_from_root(layer, path)? {
                        Found::Owner(owner) => Ok(owner),
                        Found::Nothing { maker, path } => self.fresh_in(maker, &path),
                    };
                }
            }
        }
        match self.owner_below(path)? {
            Some(owner) => Ok(owner),
            None => self.fresh_in(maker, path),
        }
    }

    /// As [`Inheritance::owner`], for a path that is not the one being merged.
    fn owner_from_root(&mut self, layer: u16, mut path: Path<'a>) -> Result<Found<'a>, ViewError> {
        let mut maker = layer;
        for lower in (0..layer).rev() {
            let components = path.iter().rev().copied().collect();
            match self.walk(lower, Vec::new(), components)? {
                None => {}
                Some(At::Other | At::Blocked) => return Ok(Found::Nothing { maker, path }),
                Some(At::Directory { inode, moved }) => {
                    if !self.is_implied(lower, inode)? {
                        return Ok(Found::Owner(Owner::Inode(lower, inode)));
                    }
                    maker = lower;
                    path = moved.map_or(path, |real| real.to_vec());
                }
            }
        }
        Ok(self.owner_below(&path)?.map_or(Found::Nothing { maker, path }, Found::Owner))
    }

    /// Whether the search of the layer at position `layer` for what it should copy to `path` meets something that it cannot
    /// look behind.
    fn is_blocked(&mut self, layer: u16, path: &[&'a [u8]]) -> Result<bool, ViewError> {
        for lower in (0..layer).rev() {
            match self.walk(lower, Vec::new(), path.iter().rev().copied().collect())? {
                None => {}
                Some(at) => return Ok(matches!(at, At::Blocked)),
            }
        }
        Ok(false)
    }

    /// What is below the run; `None` where that gives no attributes.
    fn owner_below(&self, path: &[&[u8]]) -> Result<Option<Owner>, ViewError> {
        let found = match self.below {
            Some(below) if !path.is_empty() => below.attributes_for_implied(path).map_err(ViewError::Below)?,
            _ => None,
        };
        Ok(match found {
            Some(BelowEntry::Directory(attributes)) => Some(Owner::Foreign(attributes)),
            Some(BelowEntry::Other) | None => None,
        })
    }

    /// Attributes of a directory that is new in `layer`, where all directories of `path` are real: the group is that of its parent
    /// if that is a set-group-ID directory, which the kernel sees to. (containerd sets the mode itself, so that bit ends there.)
    fn fresh_in(&mut self, layer: u16, path: &[&'a [u8]]) -> Result<Owner, ViewError> {
        const SET_GROUP_ID: u16 = 0o2000;
        let Some((_, parent)) = path.split_last().filter(|(_, parent)| !parent.is_empty()) else { return Ok(fresh()) };
        let toc = self.toc(layer)?;
        let mut at = 0;
        for name in parent {
            let found = toc.lookup(at, name).map_err(|source| self.in_layer(layer, source))?;
            let Some(inode) = found.and_then(|entry| entry.inode) else { return Ok(fresh()) };
            at = inode;
        }
        let owner = if self.is_implied(layer, at)? {
            match self.owner_from_root(layer, parent.to_vec())? {
                Found::Owner(owner) => owner,
                Found::Nothing { .. } => return Ok(fresh()),
            }
        } else {
            Owner::Inode(layer, at)
        };
        let (mode, gid) = match owner {
            Owner::Foreign(attributes) => (attributes.mode, attributes.gid),
            Owner::Inode(layer, inode) => {
                let inode = self.toc(layer)?.inode(inode).map_err(|source| self.in_layer(layer, source))?;
                (inode.mode(), inode.gid())
            }
        };
        let gid = if mode & SET_GROUP_ID == 0 { 0 } else { gid };
        Ok(Owner::Foreign(DirectoryAttributes { gid, ..DirectoryAttributes::fresh() }))
    }

    /// What `layer` has for `name` in its directory `inode`, whose path is `real`.
    fn step(
        &mut self,
        layer: u16,
        inode: InodeIx,
        moved: bool,
        real: &[&'a [u8]],
        name: &&'a [u8],
    ) -> Result<Option<At<'a>>, ViewError> {
        let toc = self.toc(layer)?;
        let at_layer = |source| self.in_layer(layer, source);
        let Some(entry) = toc.lookup(inode, name).map_err(at_layer)? else { return Ok(None) };
        let Some(found) = entry.inode else { return Ok(Some(At::Other)) };
        match toc.inode(found).map_err(at_layer)?.kind() {
            Kind::Directory => {
                let moved = moved.then(|| Rc::new([real, &[*name]].concat()));
                Ok(Some(At::Directory { inode: found, moved }))
            }
            Kind::Symlink => self.walk(layer, real.to_vec(), vec![*name]),
            _ => Ok(Some(At::Other)),
        }
    }

    /// Follows `todo` (last component first) from the directory at the real path `from` on, inside of `layer`.
    fn walk(&mut self, layer: u16, from: Path<'a>, mut todo: Path<'a>) -> Result<Option<At<'a>>, ViewError> {
        let toc = self.toc(layer)?;
        todo.extend(from.into_iter().rev());
        let (mut path, mut inodes) = (Path::new(), vec![0]);
        let mut links = 0;
        while let Some(name) = todo.pop() {
            self.steps += 1;
            if self.steps > MAX_STEPS {
                return Err(ViewError::Limit { what: "symbolic links in the way of implied directories are too many" });
            }
            match name {
                b"" | b"." => continue,
                b".." => {
                    path.pop();
                    inodes.truncate(path.len() + 1);
                    continue;
                }
                _ => {}
            }
            let directory = inodes.last().copied().unwrap_or(0);
            let at_layer = |source| self.in_layer(layer, source);
            let Some(entry) = toc.lookup(directory, name).map_err(at_layer)? else { return Ok(None) };
            let is_last = todo.iter().all(|name| matches!(*name, b"" | b"."));
            let end = if is_last { At::Other } else { At::Blocked };
            let Some(found) = entry.inode else { return Ok(Some(end)) };
            let inode = toc.inode(found).map_err(at_layer)?;
            match inode.kind() {
                Kind::Directory => {
                    path.push(entry.name);
                    inodes.push(found);
                }
                Kind::Symlink if links < MAX_LINKS => {
                    links += 1;
                    let target = toc.symlink_target(&inode).map_err(at_layer)?;
                    if target.starts_with(b"/") {
                        path.clear();
                        inodes.truncate(1);
                    }
                    todo.extend(target.split(|byte| *byte == b'/').rev());
                }
                Kind::Symlink => return Ok(Some(At::Blocked)),
                _ => return Ok(Some(end)),
            }
        }
        let inode = inodes.last().copied().unwrap_or(0);
        Ok(Some(At::Directory { inode, moved: Some(Rc::new(path)) }))
    }

    fn is_implied(&self, layer: u16, inode: InodeIx) -> Result<bool, ViewError> {
        // No archive describes the root, to which a link may lead.
        let inode = self.toc(layer)?.inode(inode).map_err(|source| self.in_layer(layer, source))?;
        Ok(inode.is_implied())
    }

    fn toc(&self, layer: u16) -> Result<&'a Toc, ViewError> {
        let layer = self.layers.get(usize::from(layer)).ok_or(ViewError::Limit { what: "layer out of range" })?;
        Ok(&layer.toc)
    }

    fn in_layer(&self, layer: u16, source: FormatError) -> ViewError {
        ViewError::Layer { layer: self.layers.get(usize::from(layer)).map_or(0, |layer| layer.number), source }
    }
}

const fn root<'a>() -> At<'a> {
    At::Directory { inode: 0, moved: None }
}

const fn fresh() -> Owner {
    Owner::Foreign(DirectoryAttributes::fresh())
}
