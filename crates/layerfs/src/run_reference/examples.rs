//! Single rules, each by an example that a reader can follow.

use super::archive::MemberKind;
use super::*;

fn directory(path: &str, mode: u32) -> Member {
    Member::new(path, MemberKind::Directory).mode(mode)
}

fn file(path: &str) -> Member {
    Member::new(path, MemberKind::File(path.into()))
}

fn whiteout(path: &str) -> Member {
    Member::new(path, MemberKind::Whiteout)
}

fn opaque(path: &str) -> Member {
    Member::new(path, MemberKind::Opaque)
}

fn symlink(path: &str, target: &str) -> Member {
    Member::new(path, MemberKind::Symlink(target.into()))
}

/// Mounts a stack that must be taken as it is, and checks it against the reference.
fn mounted(layers: &[Vec<Member>], split: usize) -> LayerFs {
    let stack = Stack::new(layers, split);
    assert_eq!((stack.trees.len(), stack.split), (layers.len(), split), "a layer was refused");
    check(&stack, 100);
    stack.mount()
}

fn find(fs: &LayerFs, path: &str) -> Option<Attr> {
    let mut attr = fs.attr(view_root(fs)).unwrap();
    for name in path.split('/') {
        match fs.lookup(attr.id, name.as_bytes()) {
            Ok(entry) => attr = entry.attr,
            Err(FsError::NotFound) => return None,
            Err(error) => panic!("{path}: {error}"),
        }
    }
    Some(attr)
}

fn mode(fs: &LayerFs, path: &str) -> Option<u16> {
    find(fs, path).map(|attr| attr.perm)
}

fn is_opaque(fs: &LayerFs, path: &str) -> bool {
    fs.xattr(find(fs, path).unwrap().id, OPAQUE).unwrap().is_some()
}

#[test]
fn implied_directory_takes_the_attributes_of_the_one_below() {
    let fs = mounted(&[vec![directory("a", 0o1700)], vec![], vec![file("a/b")], vec![file("a/c")]], 0);
    assert_eq!(mode(&fs, "a"), Some(0o1700));
    assert_eq!(find(&fs, "a").unwrap().nlink, 1, "merged from three layers");
    assert!(find(&fs, "a/b").is_some() && find(&fs, "a/c").is_some());
}

#[test]
fn implied_directory_over_a_whiteout_or_a_file_is_fresh() {
    let fs = mounted(&[vec![directory("a", 0o700), file("a/x")], vec![whiteout("a")], vec![file("a/b")]], 0);
    assert_eq!((mode(&fs, "a"), mode(&fs, "a/x")), (Some(0o755), None));
    let fs = mounted(&[vec![directory("a", 0o700), file("a/x")], vec![file("a")], vec![file("a/b")]], 0);
    assert_eq!((mode(&fs, "a"), mode(&fs, "a/x")), (Some(0o755), None));
}

#[test]
fn a_directory_behind_a_file_or_a_whiteout_of_a_lower_layer_is_a_contradiction() {
    let found = |layers: &[Vec<Member>]| {
        let layer = |members: &Vec<Member>| ViewLayer { number: 1, toc: toc(&archive(members)).unwrap().0 };
        contradiction(&layers.iter().map(layer).collect::<Vec<_>>()).unwrap()
    };
    let blocked = |layer| Some(Contradiction { layer, path: b"a/b".to_vec() });
    let behind = || vec![file("a/b/c")];
    assert_eq!(found(&[vec![file("a")], behind()]), blocked(1));
    assert_eq!(found(&[vec![directory("a", 0o755)], vec![whiteout("a")], vec![file("x")], behind()]), blocked(3));
    assert_eq!(found(&[vec![symlink("a", "f"), file("f")], behind()]), blocked(1));
    // The first layer that has something at the path itself ends the search, and a directory that is described begins none.
    assert_eq!(found(&[vec![file("a")], vec![directory("a", 0o755), directory("a/b", 0o755)], behind()]), None);
    assert_eq!(found(&[vec![file("a")], vec![directory("a", 0o755), directory("a/b", 0o755), file("a/b/c")]]), None);
    assert_eq!(found(&[vec![file("a")], vec![file("a/b")]]), None);
    assert_eq!(found(&[vec![symlink("a", "nowhere")], behind()]), None);
}

#[test]
fn implied_directory_takes_attributes_through_an_opaque_mark() {
    let layers =
        [vec![directory("a", 0o711), directory("a/b", 0o700), file("a/b/x")], vec![opaque("a")], vec![file("a/b/c")]];
    let fs = mounted(&layers, 0);
    assert_eq!((mode(&fs, "a"), mode(&fs, "a/b"), mode(&fs, "a/b/x")), (Some(0o711), Some(0o700), None));
}

#[test]
fn implied_directory_takes_attributes_from_where_a_lower_link_leads() {
    let base = vec![directory("usr", 0o755), directory("usr/bin", 0o1711), symlink("bin", "usr/bin")];
    let fs = mounted(&[base.clone(), vec![file("bin/tool")]], 0);
    assert_eq!((mode(&fs, "bin"), mode(&fs, "usr/bin/tool")), (Some(0o1711), None));
    // The directory behind the link is implied itself, in its layer: it has what is below that one.
    let fs = mounted(&[base, vec![symlink("sbin", "/usr/bin"), file("usr/bin/sh")], vec![file("sbin/x/y")]], 0);
    assert_eq!((mode(&fs, "sbin"), mode(&fs, "sbin/x")), (Some(0o1711), Some(0o755)));
}

#[test]
fn opaque_mark_of_a_root_is_ignored_as_overlayfs_does() {
    let fs = mounted(&[vec![file("a")], vec![opaque(""), file("b")]], 0);
    assert!(find(&fs, "a").is_some() && find(&fs, "b").is_some());
}

#[test]
fn root_is_nobodys() {
    let fs = mounted(&[vec![directory("./", 0o700), file("a")]], 0);
    let attr = fs.attr(view_root(&fs)).unwrap();
    assert_eq!((attr.perm, attr.uid, attr.gid, attr.mtime, attr.nlink), (0o755, 0, 0, (0, 0), 2));
}

#[test]
fn run_over_nothing_shows_no_marks() {
    let layers =
        [vec![directory("a", 0o755), file("a/x")], vec![whiteout("a"), whiteout("z")], vec![opaque("a"), file("a/y")]];
    let fs = mounted(&layers, 0);
    assert_eq!(list(&fs, view_root(&fs), NodeId::ROOT, 100).len(), 1);
    assert!(!is_opaque(&fs, "a"));
}

#[test]
fn run_over_local_layers_shows_only_marks_that_hide_something() {
    let local = vec![directory("a", 0o755), file("a/x"), directory("d", 0o755), file("d/x"), file("f"), file("g")];
    let run = [
        vec![whiteout("a"), whiteout("z"), whiteout("f"), opaque("d"), opaque("new"), directory("g", 0o755)],
        vec![directory("a", 0o700), file("a/y")],
    ];
    let fs = mounted(&[local, run[0].clone(), run[1].clone()], 1);
    assert!(is_opaque(&fs, "a"), "removed and made again in the run: overlayfs would merge it with the local one");
    assert!(is_opaque(&fs, "d"));
    assert!(!is_opaque(&fs, "new") && !is_opaque(&fs, "g"));
    assert_eq!(find(&fs, "z"), None);
    let mark = find(&fs, "f").unwrap();
    assert_eq!((mark.kind, mark.perm, mark.rdev, mark.uid, mark.gid), (Kind::CharDevice, 0, (0, 0), 0, 0));
    assert_eq!(fs.attr(mark.id).unwrap(), mark);
    assert_eq!(fs.xattr_names(mark.id).unwrap(), b"");
    assert!(matches!(fs.file(mark.id), Err(FsError::WrongKind)));
}

#[test]
fn implied_directory_takes_attributes_from_local_layers() {
    let mut local = directory("a", 0o1750);
    local.xattr = Some(("user.x", "1"));
    let fs = mounted(&[vec![local, file("a/x")], vec![file("a/b")], vec![file("a/c")]], 1);
    let attr = find(&fs, "a").unwrap();
    assert_eq!((attr.perm, attr.gid, fs.xattr_names(attr.id).unwrap()), (0o1750, 10, b"user.x\0".to_vec()));
}

#[test]
fn failure_to_look_below_is_no_view() {
    struct Broken;
    impl Below for Broken {
        fn lookup(&self, _: &[&[u8]]) -> io::Result<Option<BelowEntry>> {
            Err(io::Error::other("gone"))
        }
    }
    let stack = Stack::new(&[vec![file("a/b")]], 0);
    assert!(matches!(build_view(&stack.run, Some(&Broken)), Err(crate::ViewError::Below(_))));
}

#[test]
fn files_are_answered_as_long_as_any_view_has_their_layer() {
    let stack = Stack::new(&[vec![file("a")], vec![file("d/b")]], 0);
    let bottom = stack.run[..1].to_vec();
    let fs = stack.mount();
    let other = build_view(&bottom, None).unwrap();
    fs.add(View::open(9, other.clone(), bottom.clone()).unwrap());
    fs.add(View::open(9, other, bottom).unwrap());
    let (a, b, d) = (find(&fs, "a").unwrap().id, find(&fs, "d/b").unwrap().id, find(&fs, "d").unwrap().id);
    assert_eq!(fs.views(), [VIEW, 9]);
    fs.remove(VIEW);
    assert_eq!(fs.file(a).unwrap().layer, 1);
    for id in [b, d] {
        assert!(matches!(fs.attr(id), Err(FsError::Stale)));
        assert!(matches!(fs.xattr(id, b"user.x"), Err(FsError::Stale)));
    }
    fs.remove(9);
    assert!(matches!(fs.attr(a), Err(FsError::Stale)));
    assert_eq!(fs.attr(NodeId::ROOT).unwrap().nlink, 2);
}

#[test]
fn root_of_the_mount_lists_views_and_goes_on_where_it_was() {
    let stack = Stack::new(&[vec![file("a")]], 0);
    let add = |fs: &LayerFs, number| fs.add(View::open(number, stack.view_bytes(), stack.run.clone()).unwrap());
    let fs = LayerFs::new();
    for number in [3, 10, 20] {
        add(&fs, number);
    }
    let names = |listing: &Listing| -> Vec<String> {
        listing.iter().map(|entry| String::from_utf8(entry.0.clone()).unwrap()).collect()
    };
    let listing = list(&fs, NodeId::ROOT, NodeId::ROOT, 1);
    assert_eq!(names(&listing), ["3", "10", "20"]);
    let after_three = listing[0].3;
    fs.remove(3);
    fs.remove(10);
    add(&fs, 4);
    let mut rest = Vec::new();
    fs.read_dir(NodeId::ROOT, after_three, &mut |entry| {
        rest.push(entry.name.to_vec());
        false
    })
    .unwrap();
    assert_eq!(rest, [b"4".to_vec(), b"20".to_vec()]);
    for name in ["3", "04", "+4", "4 ", "", "-1", "99999999999", "a"] {
        assert!(matches!(fs.lookup(NodeId::ROOT, name.as_bytes()), Err(FsError::NotFound)), "{name}");
    }
}

#[test]
fn ids_that_nothing_has_are_stale() {
    let fs = mounted(&[vec![file("d/a")]], 0);
    let inode = |number| NodeId::file(1, number).unwrap();
    let strange = [
        NodeId::from_raw(0),
        NodeId::from_raw(u64::MAX),
        inode(0),
        inode(3),
        inode(u32::MAX),
        NodeId::file(2, 1).unwrap(),
        NodeId::directory(VIEW, 2).unwrap(),
        NodeId::directory(VIEW + 1, 0).unwrap(),
        NodeId::whiteout(VIEW, 0).unwrap(),
        NodeId::whiteout(VIEW, 77).unwrap(),
    ];
    for id in strange {
        assert!(matches!(fs.attr(id), Err(FsError::Stale)), "{id}");
        assert!(matches!(fs.lookup(id, b"a"), Err(FsError::Stale)), "{id}");
        assert!(matches!(fs.read_dir(id, 0, &mut |_| false), Err(FsError::Stale)), "{id}");
    }
}

#[test]
fn names_longer_than_a_file_system_takes_are_named_so() {
    let fs = mounted(&[vec![file("a")]], 0);
    assert!(matches!(fs.lookup(view_root(&fs), &[b'x'; 255]), Err(FsError::NotFound)));
    assert!(matches!(fs.lookup(view_root(&fs), &[b'x'; 256]), Err(FsError::NameTooLong)));
}

#[test]
fn a_hundred_thousand_entries_take_less_than_two_mebibytes() {
    let members: Vec<Member> = (0..1000)
        .flat_map(|d| (0..100).map(move |f| Member::new(&format!("{d}/{f}"), MemberKind::File(Vec::new()))))
        .collect();
    let stack = Stack::new(&[members, vec![file("500/more")]], 0);
    let bytes = stack.view_bytes();
    assert!(bytes.len() < 2 << 20, "{}", bytes.len());
    assert_eq!(bytes, stack.view_bytes(), "not deterministic");
    let fs = stack.mount();
    assert!(find(&fs, "999/99").is_some());
    assert_eq!(list(&fs, view_root(&fs), NodeId::ROOT, 7).len(), 1000);
}

#[test]
fn runs_outside_of_the_limits_are_refused() {
    let limited = |layers: &[ViewLayer]| matches!(build_view(layers, None), Err(crate::ViewError::Limit { .. }));
    let layer = Stack::new(&[vec![file("a")]], 0).run[0].clone();
    assert!(limited(&[]));
    assert!(limited(&[ViewLayer { number: 0, ..layer.clone() }]));
    assert!(limited(&[ViewLayer { number: crate::MAX_NUMBER + 1, ..layer.clone() }]));
    assert!(limited(&vec![layer.clone(); crate::MAX_LAYERS + 1]));
    assert!(!limited(&vec![layer; crate::MAX_LAYERS]));
}
