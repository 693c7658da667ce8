//! What the tar reader must share with Go's `archive/tar`. The archives are made here, byte by byte;
//! that reader, run on the same bytes, agreed with every expectation here, but for limits and where a test says otherwise.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation, reason = "tests")]

use std::ops::Range;

use millstream_toc::tar::{Extent, Member, MemberKind, TarError, TarLimits, TarReader};
use proptest::prelude::*;

const NAME: Range<usize> = 0..100;
const UID: Range<usize> = 108..116;
const SIZE: Range<usize> = 124..136;
const SUM: Range<usize> = 148..156;
const MAGIC: Range<usize> = 257..265;
const MAJOR: Range<usize> = 329..337;
const PREFIX: usize = 345;

/// A header block under construction.
#[derive(Clone)]
struct Head([u8; 512]);

impl Head {
    fn new(name: &str, typeflag: u8, size: usize) -> Self {
        Self([0; 512])
            .put(NAME, name.as_bytes())
            .put(100..108, b"0000644\0")
            .put(UID, b"0000001\0")
            .put(116..124, b"0000002\0")
            .put(SIZE, format!("{size:011o}\0").as_bytes())
            .put(136..148, b"00000000012\0")
            .put(156..157, &[typeflag])
            .put(MAGIC, b"ustar\x0000")
    }

    fn put(mut self, at: Range<usize>, bytes: &[u8]) -> Self {
        self.0[at.start..at.end].fill(0);
        self.0[at.start..at.start + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn gnu(self) -> Self {
        self.put(MAGIC, b"ustar  \0")
    }

    fn block(mut self) -> Vec<u8> {
        repair(&mut self.0);
        self.0.to_vec()
    }
}

/// Writes the right checksum into a header.
fn repair(block: &mut [u8]) {
    block[SUM].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[SUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn with_data(name: &str, typeflag: u8, data: &[u8]) -> Vec<u8> {
    [Head::new(name, typeflag, data.len()).block(), padded(data)].concat()
}

fn file(name: &str, data: &[u8]) -> Vec<u8> {
    with_data(name, b'0', data)
}

fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let body = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
    let mut len = body.len() + 1;
    while len != body.len() + len.to_string().len() {
        len = body.len() + len.to_string().len();
    }
    [len.to_string().as_bytes(), &body].concat()
}

fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    with_data("pax", b'x', &records.iter().flat_map(|(key, value)| record(key, value.as_bytes())).collect::<Vec<_>>())
}

/// The members with their stored bytes, and how it ended.
fn read_with(archive: &[u8], limits: TarLimits) -> (Vec<(Member, Vec<u8>)>, Option<TarError>) {
    let mut reader = TarReader::new(archive, limits);
    let mut members = Vec::new();
    loop {
        let member = match reader.next() {
            Ok(Some(member)) => member,
            Ok(None) => return (members, None),
            Err(error) => return (members, Some(error)),
        };
        let (mut data, mut buf) = (Vec::new(), [0; 300]);
        loop {
            match reader.read(&mut buf) {
                Ok(0) => break,
                Ok(n) => data.extend_from_slice(&buf[..n]),
                Err(error) => return (members, Some(error)),
            }
        }
        members.push((member, data));
    }
}

fn read(parts: &[Vec<u8>]) -> (Vec<(Member, Vec<u8>)>, Option<TarError>) {
    read_with(&parts.concat(), TarLimits::default())
}

/// The members of an archive that is in order.
fn all(parts: &[Vec<u8>]) -> Vec<(Member, Vec<u8>)> {
    let (members, error) = read(parts);
    assert!(error.is_none(), "{error:?}");
    members
}

fn only(parts: &[Vec<u8>]) -> Member {
    let mut members = all(parts);
    assert_eq!(members.len(), 1);
    members.remove(0).0
}

fn refused(parts: &[Vec<u8>]) {
    let (members, error) = read(parts);
    assert!(matches!(error, Some(TarError::Invalid { .. })), "{error:?} after {members:?}");
}

#[test]
fn a_plain_member_has_all_its_fields() {
    let archive = [file("dir/name", b"hello"), file("next", b""), vec![0; 1024], b"not read".to_vec()];
    let members = all(&archive);
    let (member, data) = &members[0];
    assert_eq!((member.name.as_slice(), member.kind, member.typeflag), (&b"dir/name"[..], MemberKind::Regular, b'0'));
    assert_eq!((member.mode, member.uid, member.gid, member.mtime), (0o644, 1, 2, (10, 0)));
    assert_eq!((member.size, member.stored, member.data_off, &member.extents), (5, 5, 512, &None));
    assert_eq!(data, b"hello");
    assert_eq!(members[1].0.data_off, 1536);

    let bytes = archive.concat();
    let mut reader = TarReader::new(&bytes[..], TarLimits::default());
    while reader.next().unwrap().is_some() {}
    assert_eq!(reader.position(), 1536 + 1024);
    assert_eq!(reader.into_inner(), b"not read");
}

#[test]
fn prefixes_depend_on_the_format() {
    let head = Head::new("name", b'0', 0).put(PREFIX..PREFIX + 10, b"pre/fix");
    assert_eq!(only(&[head.clone().block()]).name, b"pre/fix/name");
    assert_eq!(only(&[head.clone().put(MAGIC, b"").block()]).name, b"name", "V7 has no prefix");
    // STAR's prefix is shorter and followed by times, which must be numbers.
    let star = head.clone().put(508..512, b"tar\0");
    assert_eq!(only(&[star.clone().block()]).name, b"pre/fix/name");
    refused(&[star.put(476..488, b"x").block()]);
    // GNU has times there. Go before 1.8 wrote prefixes all the same.
    assert_eq!(only(&[head.gnu().block()]).name, b"pre/fix/name");
    let gnu = |field: &[u8]| only(&[Head::new("name", b'0', 0).gnu().put(PREFIX..PREFIX + 12, field).block()]).name;
    assert_eq!(gnu(b"00000000012"), b"name");
    assert_eq!(gnu(b"\xc3\xa9"), b"name", "reads as a number in base 256");
    assert_eq!(gnu(b"e\xc3\xa9"), b"name", "not ASCII, so not such a prefix");
}

#[test]
fn a_trailing_slash_makes_a_directory_of_untyped_members_only() {
    assert_eq!(only(&[Head::new("d/", 0, 512).block()]).kind, MemberKind::Directory);
    assert_eq!(only(&[Head::new("d/", b'0', 0).block()]).kind, MemberKind::Regular);
    let f = only(&[Head::new("f", 0, 0).block()]);
    assert_eq!((f.kind, f.typeflag), (MemberKind::Regular, b'0'));
    assert_eq!(only(&[pax(&[("path", "d/")]), Head::new("f", 0, 0).block()]).kind, MemberKind::Directory);
}

#[test]
fn numbers_are_octal_or_base_256() {
    let uid = |field: &[u8]| read(&[Head::new("f", b'0', 0).put(UID, field).block()]);
    for (field, expected) in [
        (&b"        "[..], 0),
        (b"", 0),
        (b"  17 \0", 0o17),
        (b"\x0017\0", 0o17),
        (b"12\0junk\0", 0o12),
        (b"77777777", 0o77_777_777),
        (b"\x80\0\0\0\xff\xff\xff\xfe", u32::MAX - 1),
    ] {
        let (members, error) = uid(field);
        assert!(error.is_none(), "{field:?}: {error:?}");
        assert_eq!(members[0].0.uid, expected, "{field:?}");
    }
    for field in [&b"8"[..], b"+7", b"-1", b"1 2", b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff"[..8].as_ref()] {
        assert!(uid(field).1.is_some(), "{field:?}");
    }
    for field in [&b"\x80\0\0\0\xff\xff\xff\xff"[..], b"\xff\xff\xff\xff\xff\xff\xff\xff", b"\x80\0\0\x01\0\0\0\0"] {
        assert!(matches!(uid(field).1, Some(TarError::Unusable { .. })), "{field:?}");
    }
    // More than 63 bits.
    refused(&[Head::new("f", b'0', 0).put(SIZE, b"\x80\0\0\0\x80\0\0\0\0\0\0\0").block()]);
}

#[test]
fn a_negative_size_is_refused_even_where_pax_gives_another() {
    let negative = Head::new("f", b'0', 0).put(SIZE, &[0xff; 12]).block();
    refused(&[pax(&[("size", "0")]), negative]);
    refused(&[pax(&[("size", "-1")]), file("f", b"")]);
    // Of what has no content the size means nothing.
    assert_eq!(only(&[Head::new("d", b'5', 0).put(SIZE, &[0xff; 12]).block()]).size, 0);
}

#[test]
fn checksums_may_be_of_signed_bytes_but_not_wrong() {
    let mut block = Head::new("n\u{e9}", b'0', 0).block();
    block[SUM].fill(b' ');
    let sum: i32 = block.iter().map(|byte| i32::from(byte.cast_signed())).sum();
    block[SUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert_eq!(only(&[block.clone()]).name, "n\u{e9}".as_bytes());
    block[0] += 1;
    refused(&[block]);
}

#[test]
fn the_end_is_where_the_model_sees_it() {
    let ended = |parts: &[Vec<u8>], count: usize| assert_eq!(all(parts).len(), count);
    ended(&[], 0);
    ended(&[vec![0; 512]], 0);
    ended(&[file("f", b"x"), vec![0; 1024], file("hidden", b"")], 1);
    // Missing padding ends an archive; a dangling extended header is forgotten.
    ended(&[Head::new("f", b'0', 3).block(), b"abc".to_vec()], 1);
    ended(&[file("f", b"x"), pax(&[("path", "p")])], 1);
    refused(&[vec![0; 512], file("f", b"")]);
    for cut in [1, 511, 513, 514] {
        let archive = file("f", b"abc");
        let (_, error) = read(&[archive[..cut].to_vec()]);
        assert!(matches!(error, Some(TarError::Truncated { .. })), "{cut}: {error:?}");
    }
    let (_, error) = read(&[vec![0; 700]]);
    assert!(matches!(error, Some(TarError::Truncated { offset: 700 })), "{error:?}");
}

#[test]
fn no_member_follows_an_error() {
    let archive = [vec![1; 512], file("f", b"")].concat();
    let mut reader = TarReader::new(&archive[..], TarLimits::default());
    assert!(matches!(reader.next(), Err(TarError::Invalid { offset: 0, .. })));
    assert!(matches!(reader.next(), Err(TarError::Failed)));
    assert!(matches!(reader.read(&mut [0; 8]), Err(TarError::Failed)));
}

/// A header that says 0 and PAX records that say otherwise hide an archive in the content of a file.
#[test]
fn cve_2025_62518_pax_size_counts() {
    let hidden = [file("hidden", b"evil"), vec![0; 1024]].concat();
    let archive = [
        pax(&[("size", &hidden.len().to_string())]),
        Head::new("outer", b'0', 0).block(),
        hidden.clone(),
        file("after", b""),
    ];
    let members = all(&archive);
    assert_eq!(members.iter().map(|(member, _)| member.name.as_slice()).collect::<Vec<_>>(), [&b"outer"[..], b"after"]);
    assert_eq!(members[0].1, hidden);
}

#[test]
fn malformed_pax_records_are_refused_not_skipped() {
    let text = |text: &[u8]| [with_data("pax", b'x', text), file("f", b"")];
    assert_eq!(only(&text(b"011 path=p\n")).name, b"p");
    for bad in [
        &b"10 path=p"[..],
        b"11 path=p\n",
        b"8 path=p\n",
        b"10 path=p\n\0",
        b"-9 path=p\n",
        b" 10 path=p\n",
        b"99999999999999999999 a=b\n",
        b"3 a",
        b"5 =b\n",
        b"5 ab\n",
        b"8 a\0=bc\n",
        b"13 path=a\0bc\n",
        b"12 uname=\0b\n",
        b"x",
    ] {
        refused(&text(bad));
    }
    for (key, value) in
        [("size", "1x"), ("uid", ""), ("mtime", "1.2.3"), ("atime", "x"), ("ctime", "1e3"), ("gid", " 1")]
    {
        if value.is_empty() {
            assert_eq!(only(&[pax(&[(key, value)]), file("f", b"")]).uid, 1, "empty means: not here");
        } else {
            refused(&[pax(&[(key, value)]), file("f", b"")]);
        }
    }
    // What is replaced is not looked at.
    assert_eq!(only(&[pax(&[("uid", "x"), ("uid", "7")]), file("f", b"")]).uid, 7);
    assert_eq!(only(&[pax(&[("uid", "x")]), pax(&[("gid", "7")]), file("f", b"")]).uid, 1);
}

#[test]
fn the_last_record_counts_even_if_empty() {
    assert_eq!(only(&[pax(&[("path", "a"), ("path", "b")]), file("f", b"")]).name, b"b");
    assert_eq!(only(&[pax(&[("path", "a"), ("path", "")]), file("f", b"")]).name, b"f");
}

#[test]
fn announcements_hold_for_one_member_and_not_past_a_global_header() {
    let global = with_data("g-name", b'g', &record("path", b"etc/global"));
    let members = all(&[
        pax(&[("path", "one")]),
        file("1", b""),
        file("2", b""),
        pax(&[("path", "three")]),
        global,
        file("3", b""),
    ]);
    let names: Vec<_> = members.iter().map(|(member, _)| (member.kind, member.name.as_slice())).collect();
    assert_eq!(
        names,
        [
            (MemberKind::Regular, &b"one"[..]),
            (MemberKind::Regular, b"2"),
            (MemberKind::GlobalHeader, b"etc/global"),
            (MemberKind::Regular, b"3"),
        ]
    );
}

#[test]
fn gnu_long_names_win_over_pax_and_end_at_nul() {
    let long = "long/".repeat(40);
    let parts = [
        pax(&[("path", "pax"), ("linkpath", "pax-link")]),
        with_data("././@LongLink", b'L', format!("{long}\0rest").as_bytes()),
        with_data("././@LongLink", b'K', b"target\0"),
        Head::new("short", b'2', 9).block(),
    ];
    let member = only(&parts);
    assert_eq!((member.name, member.link, member.kind), (long.into_bytes(), b"target".to_vec(), MemberKind::Symlink));
    assert_eq!(only(&[with_data("x", b'L', b"\0abc"), file("short", b"")]).name, b"short");
}

#[test]
fn times_keep_nanoseconds_on_either_side_of_1970() {
    for (text, expected) in [
        ("12", (12, 0)),
        ("12.", (12, 0)),
        ("12.5", (12, 500_000_000)),
        ("1.0000000019", (1, 1)),
        ("-1", (-1, 0)),
        ("-1.25", (-2, 750_000_000)),
        ("-0.5", (-1, 500_000_000)),
        ("+3.000000001", (3, 1)),
    ] {
        assert_eq!(only(&[pax(&[("mtime", text)]), file("f", b"")]).mtime, expected, "{text}");
    }
    for text in [".5", "-.5", "1.-5", "1.5 ", "9223372036854775808"] {
        refused(&[pax(&[("mtime", text)]), file("f", b"")]);
    }
    // The model wraps around here.
    let (_, error) = read(&[pax(&[("mtime", "-9223372036854775808.5")]), file("f", b"")]);
    assert!(matches!(error, Some(TarError::Unusable { .. })), "{error:?}");
}

#[test]
fn extended_attributes_are_sorted_and_may_be_empty() {
    let parts = [
        pax(&[
            ("SCHILY.xattr.user.b", "1"),
            ("SCHILY.xattr.user.a", ""),
            ("LIBARCHIVE.xattr.user.c", "x"),
            ("SCHILY.xattr.user.b", "2=3"),
        ]),
        file("f", b""),
    ];
    assert_eq!(only(&parts).xattrs, [(b"user.a".to_vec(), b"".to_vec()), (b"user.b".to_vec(), b"2=3".to_vec())]);
}

#[test]
fn devices_have_numbers_that_linux_can_hold() {
    let device = |major: &[u8]| read(&[Head::new("d", b'3', 0).put(MAJOR, major).put(337..345, b"3").block()]);
    assert_eq!(device(b"7777").0[0].0.rdev, (0xfff, 3));
    assert!(matches!(device(b"10000").1, Some(TarError::Unusable { .. })));
    assert!(matches!(device(&[0xff; 8]).1, Some(TarError::Unusable { .. })));
    // Nobody looks at them elsewhere, but they must be numbers; V7 does not have them.
    let file = Head::new("f", b'0', 0);
    assert_eq!(only(&[file.clone().put(MAJOR, b"10000").block()]).rdev, (0, 0));
    refused(&[file.clone().put(MAJOR, b"x").block()]);
    assert_eq!(only(&[file.put(MAJOR, b"x").put(MAGIC, b"").block()]).rdev, (0, 0));
}

#[test]
fn types_that_containerd_does_not_apply_are_told_apart() {
    for typeflag in *b"7DMNVZ" {
        let member = only(&[Head::new("f", typeflag, 0).block()]);
        assert_eq!((member.kind, member.typeflag), (MemberKind::Unknown, typeflag));
    }
}

/// An old GNU header for a map, and the blocks that go on with it.
fn old_gnu(entries: &[(u64, u64)], real_size: u64, stored: usize) -> Vec<u8> {
    let entry = |(offset, len): &(u64, u64)| format!("{offset:011o}\0{len:011o}\0").into_bytes();
    let (here, rest) = entries.split_at(entries.len().min(4));
    let blocks: Vec<Vec<u8>> = rest
        .chunks(21)
        .enumerate()
        .map(|(i, chunk)| {
            let mut block = padded(&chunk.iter().flat_map(entry).collect::<Vec<_>>());
            block[504] = u8::from((i + 1) * 21 < rest.len());
            block
        })
        .collect();
    let head = Head::new("sparse", b'S', stored)
        .gnu()
        .put(386..482, &here.iter().flat_map(entry).collect::<Vec<_>>())
        .put(482..483, &[u8::from(!blocks.is_empty())])
        .put(483..495, format!("{real_size:011o}\0").as_bytes());
    [head.block(), blocks.concat()].concat()
}

#[test]
fn all_four_sparse_forms_say_the_same() {
    let map = [(10, 5), (15, 0), (20, 512), (532, 3), (600, 0), (600, 1)];
    let data = [b"abcde".as_slice(), &[b'x'; 512], b"fghi"].concat();
    let list: Vec<String> = map.iter().map(|(offset, len)| format!("{offset},{len}")).collect();
    let numbers: Vec<(String, String)> =
        map.iter().map(|(offset, len)| (offset.to_string(), len.to_string())).collect();
    let mut form_0_0 = vec![("GNU.sparse.size", "1000"), ("GNU.sparse.numblocks", "6")];
    for (offset, len) in &numbers {
        form_0_0.extend([("GNU.sparse.offset", offset.as_str()), ("GNU.sparse.numbytes", len)]);
    }
    let list = list.join(",");
    let form_0_1 = [
        ("GNU.sparse.map", list.as_str()),
        ("GNU.sparse.realsize", "1000"),
        ("GNU.sparse.numblocks", "6"),
        ("GNU.sparse.name", "sparse"),
    ];
    let form_1_0 = [
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", "sparse"),
        ("GNU.sparse.realsize", "1000"),
    ];
    let lines: String = numbers.iter().map(|(offset, len)| format!("{offset}\n{len}\n")).collect();
    let with_map = [padded(format!("6\n{lines}").as_bytes()), data.clone()].concat();
    let forms = [
        [old_gnu(&map, 1000, data.len()), padded(&data)],
        [pax(&form_0_0), file("sparse", &data)],
        [pax(&form_0_1), file("stand-in", &data)],
        [pax(&form_1_0), file("stand-in", &with_map)],
    ];
    for (i, form) in forms.iter().enumerate() {
        let members = all(&[form[0].clone(), form[1].clone(), file("next", b"")]);
        let (member, stored) = &members[0];
        let at = member.data_off;
        assert_eq!(form.concat()[at as usize..][..data.len()], data, "form {i}");
        let extent = |file_off, from, len| Extent { file_off, tar_off: at + from, len };
        assert_eq!(member.extents, Some(vec![extent(10, 0, 5), extent(20, 5, 515), extent(600, 520, 1)]), "form {i}");
        assert_eq!((member.name.as_slice(), member.size, member.stored), (&b"sparse"[..], 1000, data.len() as u64));
        assert_eq!(stored, &data);
        assert_eq!(members[1].0.name, b"next");
    }
}

#[test]
fn sparse_maps_that_lie_are_refused() {
    let map =
        |map: &[(u64, u64)], size, stored: usize| read(&[old_gnu(map, size, stored), padded(&vec![b'x'; stored])]);
    assert!(map(&[(8_000_000_000, 4)], (1 << 33) - 1, 4).1.is_none());
    assert_eq!(map(&[(0, 4)], 4, 4).0[0].0.extents, None, "no hole");
    assert_eq!(map(&[], 9, 0).0[0].0.extents, Some(vec![]), "nothing but a hole");
    // An empty entry between does not make two extents touch.
    assert_eq!(map(&[(0, 1), (4, 0), (4, 1)], 5, 2).0[0].0.extents.as_ref().map(Vec::len), Some(2));
    for (entries, size, stored) in [
        (&[(0, 4)][..], 3, 4),
        (&[(5, 4), (0, 4)], 100, 8),
        (&[(0, 4), (3, 4)], 100, 8),
        (&[(0, 4)], 100, 5),
        (&[(0, 4)], 100, 3),
        (&[(9, 0), (3, 4)], 100, 4),
    ] {
        let (_, error) = map(entries, size, stored);
        assert!(matches!(error, Some(TarError::Invalid { .. })), "{entries:?}: {error:?}");
    }
    let records = [("GNU.sparse.map", "0,1"), ("GNU.sparse.numblocks", "1"), ("GNU.sparse.size", "5")];
    refused(&[pax(&records), Head::new("d", b'5', 0).block()]);
    refused(&[pax(&[("GNU.sparse.map", "0,1"), ("GNU.sparse.numblocks", "2")]), file("f", b"x")]);
    refused(&[pax(&[("GNU.sparse.offset", "0"), ("GNU.sparse.offset", "1")]), file("f", b"x")]);
    refused(&[pax(&[("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")]), file("f", b"3\n1\n")]);
    refused(&[Head::new("f", b'S', 0).block()]);
    // Versions nobody knows are plain files.
    assert_eq!(only(&[pax(&[("GNU.sparse.major", "2"), ("GNU.sparse.map", "?")]), file("f", b"x")]).size, 1);
}

#[test]
fn limits_hold() {
    let limits = TarLimits { max_pax_bytes: 4096, max_name: 50, max_extents: 2 };
    let limited = |parts: &[Vec<u8>]| {
        let (members, error) = read_with(&parts.concat(), limits);
        assert!(matches!(error, Some(TarError::Limit { .. })), "{error:?} after {members:?}");
    };
    limited(&[pax(&[("comment", &"x".repeat(5000))]), file("f", b"")]);
    // Refused before a byte of it is asked for.
    limited(&[Head::new("pax", b'x', 0).put(SIZE, b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff").block()]);
    limited(&[pax(&[("path", &"x".repeat(51))]), file("f", b"")]);
    limited(&[pax(&[("linkpath", &"x".repeat(51))]), file("f", b"")]);
    limited(&[old_gnu(&[(0, 1), (2, 1), (4, 1)], 9, 3), padded(b"xxx")]);
    let form_1_0 = pax(&[("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.size", "9")]);
    limited(&[form_1_0.clone(), file("f", &vec![b'1'; 9000])]);
    limited(&[form_1_0, file("f", &[b"99999\n".to_vec(), b"1\n".repeat(5000)].concat())]);
    let endless: Vec<u8> = [vec![0; 504], vec![1], vec![0; 7]].concat().repeat(20);
    limited(&[Head::new("s", b'S', 0).gnu().put(482..483, &[1]).block(), endless]);
}

#[test]
fn reading_in_small_pieces_changes_nothing() {
    /// Gives one byte at a time, and an interruption before each.
    struct Slow<'a>(&'a [u8], bool);
    impl std::io::Read for Slow<'_> {
        fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(std::io::ErrorKind::Interrupted.into());
            }
            let n = self.0.len().min(buf.len()).min(1);
            let (now, later) = self.0.split_at(n);
            buf[..n].copy_from_slice(now);
            self.0 = later;
            Ok(n)
        }
    }
    let archive = [pax(&[("path", "p")]), file("f", b"content"), file("g", b"x"), vec![0; 1024]].concat();
    let mut reader = TarReader::new(Slow(&archive, false), TarLimits::default());
    let first = reader.next().unwrap().unwrap();
    assert_eq!((first.name, first.data_off), (b"p".to_vec(), 1536));
    assert_eq!(reader.next().unwrap().unwrap().name, b"g");
    assert!(reader.next().unwrap().is_none());
}

/// Archives with one of everything, to be damaged.
fn sample() -> Vec<u8> {
    [
        file("plain", b"hello"),
        pax(&[("path", "p"), ("mtime", "-1.5"), ("SCHILY.xattr.user.a", "b"), ("size", "3")]),
        file("f", b"abc"),
        with_data("L", b'L', b"long name"),
        Head::new("d/", 0, 0).block(),
        old_gnu(&[(10, 5), (20, 1), (30, 1), (40, 1), (50, 1), (60, 1)], 100, 10),
        padded(b"0123456789"),
        pax(&[("GNU.sparse.map", "1,2"), ("GNU.sparse.numblocks", "1"), ("GNU.sparse.size", "9")]),
        file("s", b"xy"),
        pax(&[("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.size", "9")]),
        file("s", &[padded(b"1\n3\n2\n"), b"xy".to_vec()].concat()),
        vec![0; 1024],
    ]
    .concat()
}

/// What holds of every member of every archive.
fn sane(archive: &[u8]) {
    let (members, _) = read_with(archive, TarLimits::default());
    assert!(members.len() <= archive.len() / 512);
    for (member, data) in members {
        assert!(!member.name.contains(&0) && !member.link.contains(&0));
        assert!(
            member.mode <= 0o7777 && member.mtime.1 < 1_000_000_000 && member.uid != u32::MAX && member.gid != u32::MAX
        );
        assert_eq!(data.len() as u64, member.stored);
        let at = member.data_off as usize;
        assert_eq!(&archive[at..at + data.len()], data);
        let (mut file_end, mut tar_end) = (None, member.data_off);
        for extent in member.extents.as_deref().unwrap_or_default() {
            assert!(extent.len > 0 && file_end < Some(extent.file_off) && extent.tar_off == tar_end);
            file_end = Some(extent.file_off + extent.len);
            tar_end += extent.len;
        }
        assert!(file_end.unwrap_or(0) <= member.size);
        assert!(member.extents.is_none() || tar_end == member.data_off + member.stored);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        sane(&bytes);
    }

    #[test]
    fn damaged_archives_are_read_without_panic(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..6),
        keep in any::<prop::sample::Index>(),
        cut in prop::bool::weighted(0.2),
    ) {
        let mut archive = sample();
        for (at, byte, checksum) in changes {
            let at = at.index(archive.len());
            archive[at] = byte;
            if checksum {
                let block = at / 512 * 512;
                repair(&mut archive[block..block + 512]);
            }
        }
        if cut {
            let len = keep.index(archive.len());
            archive.truncate(len);
        }
        sane(&archive);
    }
}

#[test]
fn the_sample_is_in_order() {
    assert_eq!(all(&[sample()]).len(), 6);
}
