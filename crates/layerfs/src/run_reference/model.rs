//! The reference: layers unpacked into trees in memory by the rules of containerd's `applyNaive` (with the overlay
//! snapshotter's whiteout conversion), and trees stacked by the rules of overlayfs. Knows nothing of TOCs and views.

use std::collections::BTreeMap;

use millstream_toc::format::Kind;

pub(super) type Name = Vec<u8>;

pub(super) const OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// containerd would fail to apply the layer.
#[derive(Debug)]
pub(super) struct Refused;

/// One directory of a snapshot; inode 0 is its root.
#[derive(Debug, Clone)]
pub(super) struct Tree {
    pub(super) inodes: Vec<Inode>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Inode {
    pub(super) what: What,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: i64,
    pub(super) nlink: u32,
    pub(super) xattrs: BTreeMap<Name, Vec<u8>>,
    /// Made by `mkparent`; its attributes are copies.
    implied: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum What {
    Directory(BTreeMap<Name, usize>),
    File(Vec<u8>),
    Symlink(Vec<u8>),
    Char(u32, u32),
    Fifo,
}

impl What {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Directory(_) => Kind::Directory,
            Self::File(_) => Kind::Regular,
            Self::Symlink(_) => Kind::Symlink,
            Self::Char(..) => Kind::CharDevice,
            Self::Fifo => Kind::Fifo,
        }
    }
}

impl Inode {
    pub(super) fn new(what: What) -> Self {
        Self { what, mode: 0o755, uid: 0, gid: 0, mtime: 0, nlink: 0, xattrs: BTreeMap::new(), implied: false }
    }

    fn children(&self) -> Option<&BTreeMap<Name, usize>> {
        if let What::Directory(children) = &self.what { Some(children) } else { None }
    }
}

impl Tree {
    pub(super) fn new() -> Self {
        Self { inodes: vec![Inode::new(What::Directory(BTreeMap::new()))] }
    }

    pub(super) fn insert(&mut self, path: &[Name], inode: usize) {
        let (name, parent) = path.split_last().unwrap();
        let parent = self.lstat(parent).unwrap().unwrap();
        let What::Directory(children) = &mut self.inodes[parent].what else { panic!("insert into {path:?}") };
        children.insert(name.clone(), inode);
    }

    pub(super) fn create(&mut self, path: &[Name], what: What) -> usize {
        self.inodes.push(Inode::new(what));
        self.insert(path, self.inodes.len() - 1);
        self.inodes.len() - 1
    }

    fn remove(&mut self, path: &[Name]) {
        let (name, parent) = path.split_last().unwrap();
        let parent = self.lstat(parent).unwrap().unwrap();
        if let What::Directory(children) = &mut self.inodes[parent].what {
            children.remove(name);
        }
    }

    /// ENOTDIR is an error to containerd, ENOENT is an answer.
    pub(super) fn lstat(&self, path: &[Name]) -> Result<Option<usize>, Refused> {
        let mut at = 0;
        for name in path {
            match self.inodes[at].children().ok_or(Refused)?.get(name) {
                Some(child) => at = *child,
                None => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// `fs.RootPath`: resolves links inside of the tree; what does not exist stays as it is.
    pub(super) fn root_path(&self, path: &[u8]) -> Result<Vec<Name>, Refused> {
        let mut todo: Vec<Name> = path.split(|b| *b == b'/').rev().map(<[u8]>::to_vec).collect();
        let (mut out, mut links) = (Vec::new(), 0);
        while let Some(name) = todo.pop() {
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    out.pop();
                    continue;
                }
                _ => out.push(name),
            }
            let Some(inode) = self.lstat(&out)? else { continue };
            if let What::Symlink(target) = &self.inodes[inode].what {
                links += 1;
                if links > 255 {
                    return Err(Refused);
                }
                out.pop();
                if target.starts_with(b"/") {
                    out.clear();
                }
                todo.extend(target.split(|b| *b == b'/').rev().map(<[u8]>::to_vec));
            }
        }
        Ok(out)
    }

    /// `mkparent`: `parents` are the lower directories, top first.
    fn make_parent(&mut self, path: &[Name], parents: &[&Self]) -> Result<(), Refused> {
        if let Some(inode) = self.lstat(path)? {
            return self.inodes[inode].children().map(|_| ()).ok_or(Refused);
        }
        if path.len() > 1 {
            self.make_parent(&path[..path.len() - 1], parents)?;
        }
        let made = self.create(path, What::Directory(BTreeMap::new()));
        self.inodes[made].implied = true;
        let above = &self.inodes[self.lstat(&path[..path.len() - 1])?.ok_or(Refused)?];
        if above.mode & 0o2000 != 0 {
            self.inodes[made].gid = above.gid;
        }
        for parent in parents {
            if let Some(source) = parent.parent_source(path)? {
                if source.children().is_none() {
                    break;
                }
                let xattrs = source.xattrs.iter().filter(|(name, _)| !name.starts_with(b"trusted."));
                let copy = Inode {
                    what: What::Directory(BTreeMap::new()),
                    xattrs: xattrs.map(|(name, value)| (name.clone(), value.clone())).collect(),
                    implied: true,
                    nlink: 0,
                    ..source.clone()
                };
                self.inodes[made] = copy;
                break;
            }
        }
        Ok(())
    }

    /// What a lower directory has where `mkparent` looks.
    pub(super) fn parent_source(&self, path: &[Name]) -> Result<Option<&Inode>, Refused> {
        let path = self.root_path(&path.join(&b'/'))?;
        Ok(self.lstat(&path)?.map(|inode| &self.inodes[inode]))
    }

    /// Unpacks an archive; `parents` are the snapshots below, top first.
    pub(super) fn apply(archive: &[u8], parents: &[&Self]) -> Result<Self, Refused> {
        let mut tree = Self::new();
        let mut directories = Vec::new();
        for entry in tar::Archive::new(archive).entries().unwrap() {
            let mut entry = entry.unwrap();
            if tree.apply_entry(&mut entry, parents)? {
                directories.push((entry.path_bytes().into_owned(), entry.header().mtime().unwrap()));
            }
        }
        for (name, mtime) in directories {
            let path = tree.root_path(&name)?;
            let inode = tree.lstat(&path)?.ok_or(Refused)?;
            // An implied directory can be met through a link that was a directory before; its time is not containerd's anyway.
            if !tree.inodes[inode].implied {
                tree.inodes[inode].mtime = mtime.try_into().unwrap();
            }
        }
        tree.count_links(0);
        Ok(tree)
    }

    /// Whether it was a directory, whose time is set again at the end.
    fn apply_entry(&mut self, entry: &mut tar::Entry<'_, &[u8]>, parents: &[&Self]) -> Result<bool, Refused> {
        let name = entry.path_bytes().into_owned();
        let name = name.strip_suffix(b"/").unwrap_or(&name);
        let split = name.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
        let (parent, base) = name.split_at(split);
        let parent = self.root_path(parent)?;
        if base.is_empty() || base == b"." {
            return Ok(false);
        }
        let path = [parent.as_slice(), &[base.to_vec()]].concat();
        if !parent.is_empty() {
            self.make_parent(&parent, parents)?;
        }
        let directory = self.lstat(&parent)?.unwrap();
        if base == b".wh..wh..opq" {
            self.inodes[directory].xattrs.insert(OPAQUE.to_vec(), b"y".to_vec());
            return Ok(false);
        }
        if let Some(hidden) = base.strip_prefix(b".wh.") {
            let path = [parent.as_slice(), &[hidden.to_vec()]].concat();
            if self.lstat(&path)?.is_some() {
                return Err(Refused);
            }
            self.create(&path, What::Char(0, 0));
            return Ok(false);
        }
        let kind = entry.header().entry_type();
        if let Some(old) = self.lstat(&path)?
            && !(kind.is_dir() && self.inodes[old].children().is_some())
        {
            self.remove(&path);
        }
        self.create_from(entry, &path)?;
        Ok(kind.is_dir())
    }

    fn create_from(&mut self, entry: &mut tar::Entry<'_, &[u8]>, path: &[Name]) -> Result<(), Refused> {
        use tar::EntryType;
        let inode = match entry.header().entry_type() {
            EntryType::Directory => match self.lstat(path)? {
                Some(inode) => inode,
                None => self.create(path, What::Directory(BTreeMap::new())),
            },
            EntryType::Regular => {
                let mut content = Vec::new();
                std::io::Read::read_to_end(entry, &mut content).unwrap();
                self.create(path, What::File(content))
            }
            EntryType::Symlink => self.create(path, What::Symlink(entry.link_name_bytes().unwrap().into_owned())),
            EntryType::Fifo => self.create(path, What::Fifo),
            EntryType::Char => {
                let header = entry.header();
                let (major, minor) = (header.device_major().unwrap(), header.device_minor().unwrap());
                self.create(path, What::Char(major.unwrap(), minor.unwrap()))
            }
            EntryType::Link => {
                let target = entry.link_name_bytes().unwrap().into_owned();
                let split = target.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
                let mut real = self.root_path(&target[..split])?;
                real.push(target[split..].to_vec());
                let inode =
                    self.lstat(&real)?.filter(|inode| self.inodes[*inode].children().is_none()).ok_or(Refused)?;
                self.insert(path, inode);
                inode
            }
            other => panic!("the tests make no {other:?}"),
        };
        self.describe(inode, entry);
        Ok(())
    }

    /// chown, setxattr, chmod, utimes: on whatever the name leads to now.
    fn describe(&mut self, inode: usize, entry: &mut tar::Entry<'_, &[u8]>) {
        let mut xattrs = Vec::new();
        for extension in entry.pax_extensions().unwrap().into_iter().flatten() {
            let extension = extension.unwrap();
            if let Some(name) = extension.key_bytes().strip_prefix(b"SCHILY.xattr.") {
                xattrs.push((name.to_vec(), extension.value_bytes().to_vec()));
            }
        }
        let (header, inode) = (entry.header(), &mut self.inodes[inode]);
        inode.uid = header.uid().unwrap().try_into().unwrap();
        inode.gid = header.gid().unwrap().try_into().unwrap();
        inode.mtime = header.mtime().unwrap().try_into().unwrap();
        inode.mode = if inode.what.kind() == Kind::Symlink { 0o777 } else { (header.mode().unwrap() & 0o7777) as u16 };
        inode.implied = false;
        let user = matches!(inode.what.kind(), Kind::Regular | Kind::Directory);
        inode.xattrs.extend(
            xattrs
                .into_iter()
                .filter(|(name, _)| !name.starts_with(b"trusted.") && (user || !name.starts_with(b"user."))),
        );
    }

    /// Counts names of files, and subdirectories of directories.
    fn count_links(&mut self, directory: usize) {
        let children: Vec<usize> =
            self.inodes[directory].children().into_iter().flat_map(BTreeMap::values).copied().collect();
        self.inodes[directory].nlink = 2;
        for child in children {
            if self.inodes[child].children().is_some() {
                self.inodes[directory].nlink += 1;
                self.count_links(child);
            } else {
                self.inodes[child].nlink += 1;
            }
        }
    }
}

/// What overlayfs shows at one path.
#[derive(Debug)]
pub(super) struct Merged {
    /// Attributes, without overlayfs' own; the children in it are those of the topmost tree only.
    pub(super) inode: Inode,
    pub(super) children: BTreeMap<Name, Merged>,
    /// Tree (counted from the top) and inode it comes from.
    pub(super) identity: (usize, usize),
}

/// Stacks trees, top first, as overlayfs does it with `lowerdir=`.
pub(super) fn overlay(trees: &[&Tree]) -> Merged {
    let mut root = merge(&trees.iter().enumerate().map(|(i, tree)| (i, *tree, 0)).collect::<Vec<_>>());
    // No layer has a say about the root.
    root.inode = Inode { nlink: root.inode.nlink, ..Inode::new(root.inode.what) };
    root
}

fn merge(stack: &[(usize, &Tree, usize)]) -> Merged {
    let (tree, top, at) = stack[0];
    let mut inode = top.inodes[at].clone();
    inode.xattrs.retain(|name, _| !name.starts_with(b"trusted.overlay."));
    if stack.len() > 1 {
        inode.nlink = 1;
    }
    let mut children = BTreeMap::new();
    for (_, tree, directory) in stack {
        for name in tree.inodes[*directory].children().into_iter().flat_map(BTreeMap::keys) {
            if !children.contains_key(name)
                && let Some(found) = lookup(stack, name)
            {
                children.insert(name.clone(), found);
            }
        }
    }
    Merged { inode, children, identity: (tree, at) }
}

fn lookup(stack: &[(usize, &Tree, usize)], name: &Name) -> Option<Merged> {
    let mut directories = Vec::new();
    for (i, tree, directory) in stack {
        let Some(found) = tree.inodes[*directory].children()?.get(name) else { continue };
        let inode = &tree.inodes[*found];
        match &inode.what {
            What::Directory(_) => directories.push((*i, *tree, *found)),
            What::Char(0, 0) => break,
            _ if directories.is_empty() => return Some(merge(&[(*i, *tree, *found)])),
            _ => break,
        }
        if inode.xattrs.contains_key(OPAQUE) {
            break;
        }
    }
    (!directories.is_empty()).then(|| merge(&directories))
}
