//! `LayerFs` over TOCs against the reference model over plainly unpacked trees.

mod archive;
mod damage;
mod examples;
mod model;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use millstream_toc::format::Kind;
use millstream_toc::{BuildOptions, BuildSink, Compression, DataRange, Toc, build};
use proptest::prelude::*;

use self::archive::{Member, archive};
use self::model::{Inode, Merged, Name, OPAQUE, Tree, What, overlay};
use crate::{
    Attr, Below, BelowEntry, Contradiction, DirectoryAttributes, FsError, LayerFs, MAX_NUMBER, NodeId, View, ViewLayer,
    build_view, contradiction,
};

/// Number of the view under test.
const VIEW: u32 = 7;

/// Data files of the layers of a run, by layer number.
type DataFiles = BTreeMap<u32, Vec<u8>>;

/// Writes chunks where a store would.
#[derive(Default)]
struct DataFile(Vec<u8>);

impl BuildSink for DataFile {
    fn chunk(&mut self, _: u32, data: DataRange, _: &[u8; 16], bytes: &[u8]) -> io::Result<()> {
        let (start, end) = (data.start as usize, data.end as usize);
        self.0.resize(self.0.len().max(end), 0);
        self.0[start..end].copy_from_slice(bytes);
        Ok(())
    }
}

fn toc(tar: &[u8]) -> Option<(Arc<Toc>, Vec<u8>)> {
    let mut data = DataFile::default();
    let built = build(tar, &BuildOptions::new(Compression::Plain), &mut data).ok()?;
    let toc = Toc::open(built.toc).unwrap();
    toc.check().unwrap();
    Some((Arc::new(toc), data.0))
}

/// A stack of layers, applied in turn, of which those from `split` on are shown by one view.
struct Stack {
    /// Bottom first.
    trees: Vec<Tree>,
    split: usize,
    run: Vec<ViewLayer>,
    data: DataFiles,
}

impl Stack {
    /// Layers that containerd or the TOC builder refuses are left out.
    fn new(layers: &[Vec<Member>], split: usize) -> Self {
        let mut stack = Self { trees: Vec::new(), split: 0, run: Vec::new(), data: DataFiles::new() };
        let mut numbers: BTreeMap<Vec<u8>, u32> = BTreeMap::new();
        for (i, members) in layers.iter().enumerate() {
            let tar = archive(members);
            let parents: Vec<&Tree> = stack.trees.iter().rev().collect();
            let Ok(tree) = Tree::apply(&tar, &parents) else { continue };
            if i >= split {
                let Some((toc, data)) = toc(&tar) else { continue };
                let next = numbers.len() as u32 + 1;
                let number = *numbers.entry(tar).or_insert(next);
                stack.run.push(ViewLayer { number, toc });
                stack.data.insert(number, data);
            } else {
                stack.split += 1;
            }
            stack.trees.push(tree);
        }
        stack
    }

    fn below(&self) -> Option<Local<'_>> {
        let trees: Vec<&Tree> = self.trees[..self.split].iter().rev().collect();
        (!trees.is_empty()).then(|| Local { merged: overlay(&trees), trees })
    }

    fn view_bytes(&self) -> Vec<u8> {
        let below = self.below();
        build_view(&self.run, below.as_ref().map(|below| below as &dyn Below)).unwrap()
    }

    /// A new process: everything comes from the bytes.
    fn mount(&self) -> LayerFs {
        let fs = LayerFs::new();
        fs.add(View::open(VIEW, self.view_bytes(), self.run.clone()).unwrap());
        fs
    }
}

/// Local layers below a run, top first.
struct Local<'a> {
    trees: Vec<&'a Tree>,
    merged: Merged,
}

fn below_entry(inode: &Inode) -> BelowEntry {
    match inode.what {
        What::Directory(_) => BelowEntry::Directory(DirectoryAttributes {
            mode: inode.mode,
            uid: inode.uid,
            gid: inode.gid,
            mtime: (inode.mtime, 0),
            xattrs: inode.xattrs.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
        }),
        _ => BelowEntry::Other,
    }
}

impl Below for Local<'_> {
    fn lookup(&self, path: &[&[u8]]) -> io::Result<Option<BelowEntry>> {
        let mut at = &self.merged;
        for name in path {
            let Some(child) = at.children.get(*name) else { return Ok(None) };
            at = child;
        }
        Ok(Some(below_entry(&at.inode)))
    }

    fn attributes_for_implied(&self, path: &[&[u8]]) -> io::Result<Option<BelowEntry>> {
        let path: Vec<Name> = path.iter().map(|name| name.to_vec()).collect();
        for tree in &self.trees {
            if let Some(found) = tree.parent_source(&path).unwrap() {
                return Ok(Some(below_entry(found)));
            }
        }
        Ok(None)
    }
}

fn view_root(fs: &LayerFs) -> NodeId {
    fs.lookup(NodeId::ROOT, VIEW.to_string().as_bytes()).unwrap().id
}

type Listing = Vec<(Name, NodeId, Kind, u64)>;

/// Lists a directory in pages of `page` names, and checks "." and "..".
fn list(fs: &LayerFs, dir: NodeId, parent: NodeId, page: usize) -> Listing {
    let (mut names, mut offset) = (Listing::new(), 0);
    loop {
        let mut taken = 0;
        fs.read_dir(dir, offset, &mut |entry| {
            if taken == page {
                return true;
            }
            taken += 1;
            offset = entry.offset_of_next;
            names.push((entry.name.to_vec(), entry.id, entry.kind, entry.offset_of_next));
            false
        })
        .unwrap();
        if taken == 0 {
            break;
        }
    }
    let dots: Vec<_> = names.drain(..2).collect();
    assert_eq!(dots, [(b".".to_vec(), dir, Kind::Directory, 1), (b"..".to_vec(), parent, Kind::Directory, 2)]);
    names
}

fn xattrs(fs: &LayerFs, id: NodeId) -> BTreeMap<Name, Vec<u8>> {
    let names = fs.xattr_names(id).unwrap();
    let names = names.split(|b| *b == 0).filter(|name| !name.is_empty());
    names.map(|name| (name.to_vec(), fs.xattr(id, name).unwrap().unwrap())).collect()
}

fn content(fs: &LayerFs, data: &DataFiles, id: NodeId) -> Vec<u8> {
    let file = fs.file(id).unwrap();
    data[&file.layer][file.data.start as usize..file.data.end as usize].to_vec()
}

fn text(path: &[Name]) -> String {
    path.iter().map(|name| format!("/{}", String::from_utf8_lossy(name))).collect()
}

/// Reads the whole view through the file system interface, whiteouts and opaque marks included.
fn read_back(fs: &LayerFs, data: &DataFiles, page: usize) -> Tree {
    let mut tree = Tree::new();
    let mut seen = BTreeMap::new();
    read_back_dir(fs, data, (view_root(fs), NodeId::ROOT), page, &mut Vec::new(), &mut tree, &mut seen);
    let root = view_root(fs);
    let (attr, xattrs) = (fs.attr(root).unwrap(), xattrs(fs, root));
    describe(&mut tree.inodes[0], &attr, xattrs);
    tree
}

fn describe(inode: &mut Inode, attr: &Attr, xattrs: BTreeMap<Name, Vec<u8>>) {
    assert_eq!(attr.kind, inode.what.kind());
    assert_eq!(attr.mtime.1, 0);
    (inode.mode, inode.uid, inode.gid) = (attr.perm, attr.uid, attr.gid);
    (inode.mtime, inode.nlink, inode.xattrs) = (attr.mtime.0, attr.nlink, xattrs);
}

fn read_back_dir(
    fs: &LayerFs,
    data: &DataFiles,
    (dir, parent): (NodeId, NodeId),
    page: usize,
    path: &mut Vec<Name>,
    tree: &mut Tree,
    seen: &mut BTreeMap<NodeId, usize>,
) {
    let names = list(fs, dir, parent, page);
    assert!(names.is_sorted_by(|a, b| a.0 < b.0), "{names:?}");
    for (name, id, kind, _) in names {
        let entry = fs.lookup(dir, &name).unwrap();
        assert_eq!((entry.id, entry.attr.kind, fs.attr(id).unwrap()), (id, kind, entry.attr));
        path.push(name);
        if let Some(known) = seen.get(&id) {
            assert_ne!(kind, Kind::Directory);
            tree.insert(path, *known);
            path.pop();
            continue;
        }
        let (size, blocks) = (entry.attr.size, entry.attr.blocks);
        let what = match kind {
            Kind::Directory => What::Directory(BTreeMap::new()),
            Kind::Regular => What::File(content(fs, data, id)),
            Kind::Symlink => What::Symlink(fs.read_link(id).unwrap()),
            Kind::CharDevice => What::Char(entry.attr.rdev.0, entry.attr.rdev.1),
            Kind::Fifo => What::Fifo,
            Kind::BlockDevice => panic!("no archive has one"),
        };
        assert_eq!((size, blocks), size_and_blocks(&what), "{}", text(path));
        let inode = tree.create(path, what);
        describe(&mut tree.inodes[inode], &entry.attr, xattrs(fs, id));
        seen.insert(id, inode);
        if kind == Kind::Directory {
            read_back_dir(fs, data, (id, dir), page, path, tree, seen);
        } else {
            assert!(matches!(fs.lookup(id, b"a"), Err(FsError::NotADirectory)));
        }
        path.pop();
    }
}

fn size_and_blocks(what: &What) -> (u64, u64) {
    match what {
        What::Directory(_) => (4096, 8),
        What::File(content) => (content.len() as u64, content.len().div_ceil(4096) as u64 * 8),
        What::Symlink(text) => (text.len() as u64, 0),
        What::Char(..) | What::Fifo => (0, 0),
    }
}

/// That two merged trees are the same: names, attributes, contents, and which names are one file.
fn assert_same(found: &Merged, expected: &Merged) {
    let mut identities = BTreeMap::new();
    assert_same_at(found, expected, &mut Vec::new(), &mut identities);
}

type Identities = BTreeMap<(usize, usize), (usize, usize)>;

fn assert_same_at(found: &Merged, expected: &Merged, path: &mut Vec<Name>, identities: &mut Identities) {
    let names = |merged: &Merged| merged.children.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(expected), "names in {}", text(path));
    let shown = |merged: &Merged| {
        let Inode { what, mode, uid, gid, mtime, nlink, xattrs, .. } = merged.inode.clone();
        let what = if matches!(what, What::Directory(_)) { What::Directory(BTreeMap::new()) } else { what };
        (what, mode, uid, gid, mtime, nlink, xattrs)
    };
    assert_eq!(shown(found), shown(expected), "attributes of {}", text(path));
    if !matches!(found.inode.what, What::Directory(_)) {
        let known = *identities.entry(expected.identity).or_insert(found.identity);
        assert_eq!(known, found.identity, "{} is one file with another name", text(path));
    }
    for (name, child) in &found.children {
        path.push(name.clone());
        assert_same_at(child, &expected.children[name], path, identities);
        path.pop();
    }
}

/// That the view shows no more marks than needed: each one hides something that is below.
fn assert_no_idle_marks(tree: &Tree, at: usize, below: Option<&Merged>, path: &mut Vec<Name>) {
    let inode = &tree.inodes[at];
    let What::Directory(children) = &inode.what else {
        let idle = inode.what == What::Char(0, 0) && below.is_none();
        assert!(!idle, "{} is a whiteout over nothing", text(path));
        return;
    };
    let below = below.filter(|below| matches!(below.inode.what, What::Directory(_)));
    let opaque = inode.xattrs.contains_key(OPAQUE);
    assert!(!opaque || below.is_some(), "{} is opaque over nothing", text(path));
    for (name, child) in children {
        path.push(name.clone());
        assert_no_idle_marks(tree, *child, below.filter(|_| !opaque).and_then(|below| below.children.get(name)), path);
        path.pop();
    }
}

/// Everything the reference says about a stack.
fn check(stack: &Stack, page: usize) {
    if stack.run.is_empty() {
        return;
    }
    let all: Vec<&Tree> = stack.trees.iter().rev().collect();
    let expected = overlay(&all);
    let fs = stack.mount();
    let tree = read_back(&fs, &stack.data, page);
    let below = stack.below();
    assert_no_idle_marks(&tree, 0, below.as_ref().map(|below| &below.merged), &mut Vec::new());
    match &below {
        Some(below) => {
            let over: Vec<&Tree> = [&tree].into_iter().chain(below.trees.iter().copied()).collect();
            assert_same(&overlay(&over), &expected);
        }
        None => assert_same(&overlay(&[&tree]), &expected),
    }
}

fn layers() -> impl Strategy<Value = Vec<Vec<Member>>> {
    let layers = prop::collection::vec(archive::layer(), 1..6);
    // The same layer again, somewhere above.
    (layers, prop::option::weighted(0.3, any::<prop::sample::Index>())).prop_map(|(mut layers, again)| {
        if let Some(again) = again {
            layers.push(again.get(&layers).clone());
        }
        layers
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1500) })]

    #[test]
    fn a_view_over_nothing_is_what_overlayfs_shows(layers in layers(), page in 1_usize..5) {
        check(&Stack::new(&layers, 0), page);
    }

    #[test]
    fn a_layer_that_containerd_refuses_over_others_is_found(layers in layers()) {
        let mut stack = Stack::new(&layers[..layers.len() - 1], 0);
        let tar = archive(&layers[layers.len() - 1]);
        let (Ok(_), Some((toc, _))) = (Tree::apply(&tar, &[]), toc(&tar)) else { return Ok(()) };
        // What an archive made and took away again is not in its table.
        prop_assume!(!archive::replaces(&layers[layers.len() - 1]));
        stack.run.push(ViewLayer { number: MAX_NUMBER, toc });
        let refused = Tree::apply(&tar, &stack.trees.iter().rev().collect::<Vec<_>>()).is_err();
        let found = contradiction(&stack.run).unwrap();
        prop_assert_eq!(found.as_ref().map(|found| found.layer), refused.then_some(stack.trees.len()), "{:?}", found);
    }

    #[test]
    fn a_view_over_local_layers_gives_the_same_stack(layers in layers(), split in 1_usize..4, page in 1_usize..5) {
        check(&Stack::new(&layers, split), page);
    }

    #[test]
    fn random_operations_agree_with_the_reference(
        layers in layers(),
        operations in prop::collection::vec((archive::path(), 0_u64..8), 0..20),
    ) {
        let stack = Stack::new(&layers, 0);
        prop_assume!(!stack.run.is_empty());
        let expected = overlay(&stack.trees.iter().rev().collect::<Vec<_>>());
        let (fs, later) = (stack.mount(), stack.mount());
        for (path, offset) in operations {
            random_operation((&fs, &later), &stack.data, &expected, &path, offset);
        }
    }
}

/// Looks `path` up, and asks the process that comes later (`fs.1`) about what was found by the first one.
fn random_operation(fs: (&LayerFs, &LayerFs), data: &DataFiles, expected: &Merged, path: &str, offset: u64) {
    let (mut node, mut expected) = (view_root(fs.0), Some(expected));
    for name in path.split('/') {
        let is_dir = expected.is_some_and(|merged| matches!(merged.inode.what, What::Directory(_)));
        expected = expected.and_then(|merged| merged.children.get(name.as_bytes()));
        match (fs.0.lookup(node, name.as_bytes()), expected) {
            (Ok(entry), Some(_)) => node = entry.id,
            (Err(FsError::NotFound), None) if is_dir => return,
            (Err(FsError::NotADirectory), None) if !is_dir => return,
            (found, _) => panic!("{path}: {found:?} where {expected:?} was expected"),
        }
    }
    let (later, Some(expected)) = (fs.1, expected) else { return };
    let attr = later.attr(node).unwrap();
    assert_eq!((attr.perm, attr.nlink, attr.uid), (expected.inode.mode, expected.inode.nlink, expected.inode.uid));
    assert_eq!(xattrs(later, node), expected.inode.xattrs);
    assert_eq!(later.xattr(node, b"user.none").unwrap(), None);
    match &expected.inode.what {
        What::Directory(_) => {
            let mut names = Vec::new();
            later
                .read_dir(node, offset, &mut |entry| {
                    names.push(entry.name.to_vec());
                    false
                })
                .unwrap();
            let all = [b".".to_vec(), b"..".to_vec()].into_iter().chain(expected.children.keys().cloned());
            assert_eq!(names, all.skip(offset as usize).collect::<Vec<_>>(), "{path} from {offset}");
            assert!(matches!(later.file(node), Err(FsError::IsADirectory)));
        }
        What::File(bytes) => assert_eq!(&content(later, data, node), bytes),
        What::Symlink(target) => assert_eq!(&later.read_link(node).unwrap(), target),
        What::Char(..) | What::Fifo => assert!(matches!(later.file(node), Err(FsError::WrongKind))),
    }
}
