//! What containerd would unpack: each case is a small archive and what must come of it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod archive;

use archive::{
    CAPABILITY, Entry, archive as tar_of, build_entries, build_gzip, build_plain, device, dir, entry, file, gzip,
    hard_link, sparse, symlink,
};
use millstream_toc::build::{Budget, BuildOptions, build};
use millstream_toc::format::Kind;
use millstream_toc::{BuildError, Ineligible, Toc};

#[test]
fn one_directory_named_again_and_again_has_its_budget() {
    let options = |max_entries| BuildOptions {
        budget: Budget { max_entries, ..Budget::default() },
        ..BuildOptions::new(millstream_toc::Compression::Plain)
    };
    let tar = tar_of(&vec![dir("d/"); 8]);
    build(&tar[..], &options(8), &mut ()).unwrap();
    let refused = build(&tar[..], &options(7), &mut ());
    assert!(matches!(refused, Err(BuildError::Ineligible { reason: Ineligible::Budget { .. } })), "{refused:?}");
}

/// The tree, one line per name: path, kind, mode, owner, mark of implied and opaque directories; whiteouts as `w`.
fn listing(toc: &Toc) -> Vec<String> {
    let mut lines = Vec::new();
    let mut pending = vec![(String::new(), 0)];
    while let Some((path, ix)) = pending.pop() {
        let inode = toc.inode(ix).unwrap();
        if inode.is_opaque() {
            lines.push(format!("{path}/ opaque"));
        }
        for child in toc.children(&inode).unwrap() {
            let child = child.unwrap();
            let path = format!("{path}/{}", String::from_utf8_lossy(child.name));
            let Some(ix) = child.inode else {
                lines.push(format!("{path} whiteout"));
                continue;
            };
            let inode = toc.inode(ix).unwrap();
            let detail = match inode.kind() {
                Kind::Directory if inode.is_implied() => "implied".into(),
                Kind::Directory => format!("dir {:o}", inode.mode()),
                Kind::Regular => format!("file {}", toc.size(&inode).unwrap()),
                Kind::Symlink => format!("-> {}", String::from_utf8_lossy(toc.symlink_target(&inode).unwrap())),
                Kind::CharDevice => format!("char {:?}", inode.rdev()),
                Kind::BlockDevice => format!("block {:?}", inode.rdev()),
                Kind::Fifo => "fifo".into(),
            };
            lines.push(format!("{path} {detail}"));
            if inode.is_dir() {
                pending.push((path, ix));
            }
        }
    }
    lines.sort();
    lines
}

#[track_caller]
fn gives(entries: &[Entry], expected: &[&str]) {
    assert_eq!(listing(&build_entries(entries).unwrap()), expected);
}

#[track_caller]
fn refused(entries: &[Entry], part: &str) {
    match build_entries(entries) {
        Err(BuildError::Invalid { what }) => assert!(what.contains(part), "{what}"),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn ineligible(entries: &[Entry]) -> Ineligible {
    match build_entries(entries) {
        Err(BuildError::Ineligible { reason }) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn names_are_cleaned_and_never_leave_the_root() {
    gives(
        &[
            dir("./"),
            file("./a", b"1"),
            file("/b", b"1"),
            file("../../c", b"1"),
            file("x/../d", b"1"),
            dir(".."),
            dir("/"),
        ],
        &["/a file 1", "/b file 1", "/c file 1", "/d file 1"],
    );
}

#[test]
fn root_attributes_never_come_from_the_layer() {
    let toc = build_entries(&[dir("./").mode(0o700).owner(7, 7), file("a", b"")]).unwrap();
    let root = toc.inode(0).unwrap();
    assert!(root.is_implied());
    assert_eq!((root.mode(), root.uid(), root.gid()), (0o755, 0, 0));
}

#[test]
fn missing_parents_are_implied() {
    gives(&[file("a/b/c", b"1")], &["/a implied", "/a/b implied", "/a/b/c file 1"]);
    gives(&[file("a/b", b"1"), dir("a").mode(0o700)], &["/a dir 700", "/a/b file 1"]);
}

#[test]
fn parents_that_are_links_lead_inside_the_layer() {
    gives(&[dir("d"), symlink("l", "d"), file("l/f", b"1")], &["/d dir 755", "/d/f file 1", "/l -> d"]);
    gives(&[symlink("l", "../../../e"), file("l/f", b"1")], &["/e implied", "/e/f file 1", "/l -> ../../../e"]);
    gives(
        &[symlink("a", "/b"), symlink("b", "c/d"), file("a/f", b"1")],
        &["/a -> /b", "/b -> c/d", "/c implied", "/c/d implied", "/c/d/f file 1"],
    );
    gives(&[symlink("l", "/"), file("l/f", b"1")], &["/f file 1", "/l -> /"]);
}

#[test]
fn impossible_parents_are_refused() {
    refused(&[symlink("a", "b"), symlink("b", "a"), file("a/f", b"1")], "too many symbolic links");
    refused(&[symlink("a", "a/a"), file("a/f", b"1")], "symbolic links");
    refused(&[file("a", b"1"), file("a/b", b"1")], "not a directory");
    refused(&[file("a", b"1"), file("a/b/c", b"1")], "not a directory");
    refused(&[file("f", b""), symlink("l", "f"), file("l/x", b"1")], "not a directory");
    assert!(matches!(ineligible(&[file(".wh.a", b""), file("a/b", b"1")]), Ineligible::PositionMatters { .. }));
}

#[test]
fn later_members_replace_earlier_ones() {
    gives(&[file("a", b"1"), file("a", b"22")], &["/a file 2"]);
    gives(&[dir("a"), file("a/b", b"1"), file("a", b"22"), dir("c")], &["/a file 2", "/c dir 755"]);
}

#[test]
fn directory_over_directory_keeps_the_children() {
    gives(&[dir("a"), file("a/b", b"1"), dir("a").mode(0o700)], &["/a dir 700", "/a/b file 1"]);
}

#[test]
fn directory_time_is_set_again_where_the_name_leads_at_the_end() {
    let toc = build_entries(&[dir("b").mtime(5), dir("a").mtime(9), symlink("a", "b")]).unwrap();
    let b = toc.lookup_path(b"b").unwrap().unwrap();
    assert_eq!(toc.inode(b).unwrap().mtime(), (9, 0));
    refused(&[dir("a"), symlink("a", "nowhere")], "removed by a later member");
    refused(&[dir("a/b"), file("a", b"1")], "not a directory");
}

#[test]
fn whiteouts() {
    gives(&[file(".wh.a", b""), file("d/.wh.b", b"")], &["/a whiteout", "/d implied", "/d/b whiteout"]);
    gives(&[file(".wh.a", b""), dir("a")], &["/a dir 755"]);
    gives(&[file(".wh..wh.a", b"")], &["/.wh.a whiteout"]);
    for twice in [[file("a", b""), file(".wh.a", b"")], [file(".wh.a", b""), file(".wh.a", b"")]] {
        assert!(matches!(ineligible(&twice), Ineligible::PositionMatters { .. }));
    }
    for name in [".wh.", "d/.wh..", "d/.wh..."] {
        refused(&[file(name, b"")], "whiteout of no name");
    }
}

#[test]
fn opaque_directories() {
    gives(&[file("d/.wh..wh..opq", b""), file("d/f", b"1")], &["/d implied", "/d/ opaque", "/d/f file 1"]);
    gives(&[file(".wh..wh..opq", b"")], &["/ opaque"]);
    gives(&[file("d/.wh..wh..opq", b""), file("d", b"1"), dir("d")], &["/d dir 755"]);
}

#[test]
fn devices() {
    gives(
        &[device("c", b'3', (1, 3)), device("b", b'4', (0, 0)), device("w", b'3', (0, 0)), entry(b'6', "p")],
        &["/b block (0, 0)", "/c char (1, 3)", "/p fifo", "/w whiteout"],
    );
}

#[test]
fn hard_links_share_the_inode_and_the_last_member_wins() {
    let toc = build_entries(&[
        file("a", b"text").mode(0o600).xattr("user.x", b"1").xattr("security.capability", CAPABILITY),
        hard_link("d/b", "a").mode(0o4755).owner(5, 100_000),
    ])
    .unwrap();
    let a = toc.lookup_path(b"a").unwrap().unwrap();
    assert_eq!(toc.lookup_path(b"d/b").unwrap(), Some(a));
    let inode = toc.inode(a).unwrap();
    assert_eq!((inode.nlink(), inode.mode(), inode.uid(), inode.gid()), (2, 0o4755, 5, 100_000));
    assert_eq!(toc.xattr(&inode, b"user.x").unwrap(), Some(&b"1"[..]));
    // The link's chown takes the capabilities, as on a real file system.
    assert_eq!(toc.xattr(&inode, b"security.capability").unwrap(), None);
}

#[test]
fn hard_link_targets() {
    gives(&[symlink("s", "x"), hard_link("h", "s")], &["/h -> x", "/s -> x"]);
    gives(
        &[dir("d"), file("d/f", b"1"), symlink("l", "/d"), hard_link("h", "l/f")],
        &["/d dir 755", "/d/f file 1", "/h file 1", "/l -> /d"],
    );
    refused(&[dir("d"), hard_link("h", "d")], "hard link to a directory");
    refused(&[hard_link("h", "..")], "hard link to a directory");
    assert!(matches!(ineligible(&[hard_link("h", "below")]), Ineligible::HardLinkBelow { .. }));
    // The link itself is removed before its target is looked for.
    assert!(matches!(ineligible(&[file("h", b"1"), hard_link("h", "h")]), Ineligible::HardLinkBelow { .. }));
    gives(&[file("a", b"1"), hard_link("b", "a"), file("a", b"22")], &["/a file 2", "/b file 1"]);
}

#[test]
fn attributes() {
    let toc = build_entries(&[
        file("a", b"").mode(0o107_777).pax("mtime", b"-5.5"),
        file("b", b"").pax("mtime", b"1700000000.123456789").owner(4_000_000_000, 65_536),
        symlink("s", "x").mode(0o600).xattr("user.no", b"1").xattr("security.selinux", b"label"),
        file("c", b"").pax("mtime", b"9223372037"),
    ])
    .unwrap();
    let inode = |path: &[u8]| toc.inode(toc.lookup_path(path).unwrap().unwrap()).unwrap();
    assert_eq!((inode(b"a").mode(), inode(b"a").mtime()), (0o7777, (0, 0)));
    assert_eq!(inode(b"b").mtime(), (1_700_000_000, 123_456_789));
    assert_eq!((inode(b"b").uid(), inode(b"b").gid()), (4_000_000_000, 65_536));
    assert_eq!(inode(b"s").mode(), 0o777);
    assert_eq!(toc.xattr(&inode(b"s"), b"user.no").unwrap(), None);
    assert_eq!(toc.xattr(&inode(b"s"), b"security.selinux").unwrap(), Some(&b"label"[..]));
    assert_eq!(inode(b"c").mtime(), (0, 0));
}

#[test]
fn extended_attributes_that_containerd_leaves_out() {
    let toc = build_entries(&[file("a", b"")
        .xattr("trusted.overlay.opaque", b"y")
        .xattr("unknown.x", b"1")
        .xattr("system.other", b"1")
        .xattr("user.kept", b"\0\xff")])
    .unwrap();
    let inode = toc.inode(1).unwrap();
    let names: Vec<_> = toc.xattrs(&inode).unwrap().map(|xattr| xattr.unwrap().0.to_vec()).collect();
    assert_eq!(names, [b"user.kept"]);
    assert!(matches!(
        ineligible(&[file("a", b"").xattr("system.posix_acl_access", b"x")]),
        Ineligible::AccessControlList { .. }
    ));
    let long = format!("user.{}", "n".repeat(251));
    assert!(matches!(ineligible(&[file("a", b"").xattr(&long, b"")]), Ineligible::Xattr { .. }));
    assert!(matches!(ineligible(&[file("a", b"").xattr("user.a", &vec![b'v'; 65_537])]), Ineligible::Xattr { .. }));
}

#[test]
fn directory_keeps_attributes_that_its_second_member_does_not_name() {
    let toc =
        build_entries(&[dir("d").xattr("user.a", b"1").xattr("user.b", b"1"), dir("d").xattr("user.b", b"2")]).unwrap();
    let d = toc.inode(1).unwrap();
    assert_eq!(toc.xattr(&d, b"user.a").unwrap(), Some(&b"1"[..]));
    assert_eq!(toc.xattr(&d, b"user.b").unwrap(), Some(&b"2"[..]));
}

#[test]
fn impossible_names_and_links_are_refused() {
    refused(&[file(&"n".repeat(256), b"")], "name that Linux does not take");
    refused(&[file(&format!("{}/f", "n".repeat(256)), b"")], "name that Linux does not take");
    refused(&[symlink("s", "")], "impossible target");
    gives(&[file(&"n".repeat(255), b"")], &[format!("/{} file 0", "n".repeat(255)).as_str()]);
}

#[test]
fn limits_make_a_layer_ineligible() {
    let deep = vec!["d"; 1500].join("/");
    assert!(matches!(ineligible(&[file(&deep, b"")]), Ineligible::Budget { .. }));
    let huge = sparse("s", 65 << 30, &[(0, b"x")]);
    assert!(matches!(ineligible(&[huge]), Ineligible::Budget { .. }));
    assert!(build_entries(&[file("a", b"").owner(u32::MAX, 0)]).is_err());
    // 65 MiB of zeros shrink a thousandfold, and are allowed; 200 MiB are not.
    let zeros = |mebibytes: usize| gzip(&tar_of(&[file("z", &vec![0; mebibytes << 20])]), 9);
    build_gzip(&zeros(65)).unwrap();
    assert!(matches!(build_gzip(&zeros(200)), Err(BuildError::Ineligible { reason: Ineligible::Budget { .. } })));
}

#[test]
fn links_that_multiply_end_soon() {
    // Each link leads twice through the next one.
    let mut entries: Vec<Entry> =
        (0..64).map(|i| symlink(&format!("l{i}"), &format!("l{}/../l{}/x", i + 1, i + 1))).collect();
    entries.extend((0..200).map(|i| file(&format!("l0/{i}/f"), b"")));
    let _ = build_entries(&entries);
}

#[test]
fn global_header_changes_nothing_but_its_name() {
    let mut global = entry(b'g', "pax_global_header");
    global.data = b"17 comment=hello\n".to_vec();
    gives(&[global, file("a", b"1")], &["/a file 1"]);
}

#[test]
fn empty_layers() {
    // containerd takes a blob without bytes for an empty tar, whatever its media type.
    assert_eq!(build_gzip(b"").unwrap().inode_count(), 1);
    for tar in [Vec::new(), vec![0; 1024], vec![0; 10_240]] {
        let toc = build_plain(&tar).unwrap();
        assert_eq!((toc.inode_count(), toc.content_count(), toc.data_size()), (1, 0, 0));
        assert_eq!(toc.tar_size(), tar.len() as u64);
        let toc = build_gzip(&gzip(&tar, 6)).unwrap();
        assert_eq!(toc.inode_count(), 1);
    }
}

#[test]
fn what_follows_the_end_of_the_archive_counts() {
    let mut tar = tar_of(&[file("a", b"1")]);
    tar.extend_from_slice(&[7; 100_000]);
    let toc = build_plain(&tar).unwrap();
    assert_eq!(toc.tar_size(), tar.len() as u64);
    assert_eq!(toc.diff_id().0, millstream_oci::Digest::of(&tar));
    let blob = gzip(&tar, 6);
    let toc = build_gzip(&blob).unwrap();
    assert_eq!(toc.diff_id().0, millstream_oci::Digest::of(&tar));
    assert_eq!(toc.blob_digest(), millstream_oci::Digest::of(&blob));
}

#[test]
fn what_follows_the_last_gzip_member_is_not_ours_to_judge() {
    let blob = gzip(&tar_of(&[file("a", b"1")]), 6);
    for tail in [&[0; 8][..], b"garbage", &[0x1f], &[0x1f, 0x8b, 9]] {
        let tailed = [&blob, tail].concat();
        assert!(matches!(
            build_gzip(&tailed),
            Err(BuildError::Ineligible { reason: Ineligible::TrailingBytes { offset, .. } }) if offset == blob.len() as u64
        ));
    }
    for blob in [&b"\x1f\x8b"[..], b"\x28\xb5\x2f\xfd", &tar_of(&[file("a", b"1")])] {
        assert!(matches!(build_gzip(blob), Err(BuildError::Ineligible { reason: Ineligible::NotCompressed { .. } })));
    }
}
