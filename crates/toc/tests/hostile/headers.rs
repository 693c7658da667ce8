//! Numbers, extended headers, types and ends: where readers of tar have disagreed.

use super::Expect::{Declined, Lazy, Refused};
use super::Row;
use super::make::{
    Archive, GID, MAGIC, MAJOR, MODE, MTIME, PREFIX, SIZE, SUM, UID, device, dir, extension, fifo, file, member,
    padded, raw_row, record, row, symlink,
};

/// `value` in base 256 (two's complement), as wide as the field.
fn base_256(value: i64, width: usize) -> Vec<u8> {
    let mut bytes = vec![if value < 0 { 0xff } else { 0 }; width];
    let at = width.saturating_sub(8);
    bytes[at..].copy_from_slice(&value.to_be_bytes()[8 - (width - at)..]);
    bytes[0] |= 0x80;
    bytes
}

pub fn numbers() -> Vec<Row> {
    let owner = Declined("owner or group out of range");
    let octal = Refused("not octal");
    let uid = |field: &[u8]| file("g", b"1").put(UID, field);
    let mut signed = file("n\u{e9}\u{e8}", b"1").bytes();
    signed[SUM].fill(b' ');
    let sum: i32 = signed[..512].iter().map(|byte| i32::from(byte.cast_signed())).sum();
    signed[SUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut wrong = file("g", b"1").bytes();
    wrong[0] = b'h';
    vec![
        row(
            "owner in base 256",
            Lazy,
            &[uid(&base_256(3_000_000, 8)), file("i", b"1").put(GID, &base_256(0xffff_fffe, 8))],
        ),
        row("owner -1", owner, &[uid(&base_256(-1, 8))]),
        row("owner 2^32-1", owner, &[uid(&base_256(0xffff_ffff, 8))]),
        row("owner 2^32 wraps to root", owner, &[uid(&base_256(1 << 32, 8)).mode(0o4755)]),
        row("group -2", owner, &[file("g", b"1").put(GID, &base_256(-2, 8))]),
        row("owner of 62 bits", owner, &[uid(b"\xbf\xff\xff\xff\xff\xff\xff\xff")]),
        row("owner 2^32-2 in PAX", Lazy, &[file("g", b"1").pax("uid", "4294967294").pax("gid", "4294967294")]),
        row("owner 2^32-1 in PAX", owner, &[file("g", b"1").pax("uid", "4294967295")]),
        row("owner 2^32 in PAX", owner, &[file("g", b"1").pax("gid", "4294967296")]),
        row("owner negative in PAX", owner, &[file("g", b"1").pax("uid", "-1")]),
        row("owner not a number in PAX", Refused("malformed number"), &[file("g", b"1").pax("uid", "0x10")]),
        row(
            "owner beyond 64 bits in PAX",
            Refused("malformed number"),
            &[file("g", b"1").pax("uid", "99999999999999999999")],
        ),
        row(
            "octal with blanks and NULs",
            Lazy,
            &[uid(b"  17 \0"), file("i", b"1").put(UID, b"\x0017\0"), file("j", b"1").put(UID, b"")],
        ),
        row("octal with junk behind NUL", Lazy, &[uid(b"12\0junk")]),
        row("octal with an 8", octal, &[uid(b"0000008\0")]),
        row("octal with a sign", octal, &[uid(b"-0000001")]),
        row("octal with blanks inside", octal, &[uid(b"1 2    \0")]),
        row("size in base 256", Lazy, &[file("g", b"12345").put(SIZE, &base_256(5, 12))]),
        row("size negative", Refused("negative size"), &[file("g", b"").put(SIZE, &base_256(-1, 12))]),
        row("size of 2^63", Refused("too large"), &[file("g", b"").put(SIZE, b"\x80\0\0\0\x80\0\0\0\0\0\0\0")]),
        row("size of more than there is", Refused("ends early"), &[file("g", b"").put(SIZE, b"00000010000\0")]),
        row(
            "size of what has no content",
            Lazy,
            &[
                dir("q").put(SIZE, b"00000001000\0"),
                symlink("l", "x").put(SIZE, b"00000001000\0"),
                fifo("r").put(SIZE, &base_256(-5, 12)),
            ],
        ),
        row(
            "time in base 256",
            Lazy,
            &[file("g", b"1").put(MTIME, &base_256(5_000_000_000, 12)), file("i", b"1").put(MTIME, &base_256(-1, 12))],
        ),
        row(
            "time beyond all clocks",
            Lazy,
            &[file("g", b"1").put(MTIME, &base_256(i64::MAX, 12)), dir("q").put(MTIME, &base_256(i64::MIN, 12))],
        ),
        row(
            "times in PAX",
            Lazy,
            &[
                file("g", b"1").pax("mtime", "1700000000.123456789"),
                file("i", b"1").pax("mtime", "-1.5"),
                file("j", b"1").pax("mtime", "9223372036.854775807"),
                file("k", b"1").pax("mtime", "9223372036.854775808"),
                file("l", b"1").pax("mtime", "1.").pax("atime", "3000000000"),
            ],
        ),
        row("time not a number in PAX", Refused("malformed time"), &[file("g", b"1").pax("mtime", "1.2.3")]),
        row("time with an exponent in PAX", Refused("malformed number"), &[file("g", b"1").pax("atime", "1e3")]),
        row(
            "mode with bits of other things",
            Lazy,
            &[file("g", b"1").put(MODE, b"0177777\0"), dir("q").put(MODE, b"0107755\0")],
        ),
        row("mode in base 256", Lazy, &[file("g", b"1").put(MODE, &base_256(0o4755, 8))]),
        row("mode negative", Lazy, &[file("g", b"1").put(MODE, &base_256(-1, 8))]),
        row(
            "device numbers as large as can be",
            Lazy,
            &[device(b'3', "q", 4095, 0).put(super::make::MINOR, b"3777777\0")],
        ),
        row("device number too large", Declined("device number"), &[device(b'3', "q", 4096, 0)]),
        row(
            "device number negative",
            Declined("device number"),
            &[device(b'4', "q", 1, 0).put(MAJOR, &base_256(-1, 8))],
        ),
        row("device number of a file is not looked at", Lazy, &[file("g", b"1").put(MAJOR, b"7777777\0")]),
        row("device number of a file is malformed", octal, &[file("g", b"1").put(MAJOR, b"9\0")]),
        raw_row("checksum of signed bytes", Lazy, Archive::new().raw(signed).end()),
        raw_row("checksum wrong", Refused("checksum"), Archive::new().raw(wrong).end()),
        row("prefix", Lazy, &[file("g", b"1").put(PREFIX, b"pre/fix"), file("g", b"1").put(PREFIX, b"/../..")]),
        row("prefix in V7, where there is none", Lazy, &[file("g", b"1").put(MAGIC, b"").put(PREFIX, b"pre")]),
        row("prefix in GNU, where it is a time", Lazy, &[file("g", b"1").gnu().put(PREFIX, b"00000000012")]),
        row("prefix in GNU, as an old writer had it", Lazy, &[file("g", b"1").gnu().put(PREFIX, b"pre/fix")]),
        row("STAR", Lazy, &[file("g", b"1").put(PREFIX, b"pre").put(508..512, b"tar\0")]),
        row("magic that is none", Lazy, &[file("g", b"1").put(MAGIC, b"USTAR\x0000")]),
    ]
}

pub fn extended() -> Vec<Row> {
    let hidden = Archive::new().with(file("hidden", b"evil").mode(0o4777)).end();
    let x = |content: &[u8]| extension(b'x', content);
    let long = |typeflag, name: &str| extension(typeflag, format!("{name}\0").as_bytes());
    let archive = |parts: &[Vec<u8>]| parts.iter().fold(Archive::new(), Archive::raw).end();
    let g = || file("g", b"1").bytes();
    let mut rows = vec![
        raw_row(
            "CVE-2025-62518: PAX size over a header of 0",
            Lazy,
            archive(&[
                x(&record(b"size", hidden.len().to_string().as_bytes())),
                file("outer", b"").bytes(),
                hidden.clone(),
                g(),
            ]),
        ),
        raw_row(
            "CVE-2025-62518 backwards: PAX size 0",
            Lazy,
            archive(&[
                x(&record(b"size", b"0")),
                file("outer", &hidden).bytes()[..512].to_vec(),
                file("inner", b"1").bytes(),
            ]),
        ),
        raw_row("PAX size negative", Refused("negative size"), archive(&[x(&record(b"size", b"-1")), g()])),
        raw_row(
            "PAX size of what has no content",
            Lazy,
            archive(&[x(&record(b"size", b"1024")), dir("q").bytes(), g()]),
        ),
        raw_row(
            "PAX path against GNU long name",
            Lazy,
            archive(&[
                long(b'L', "gnu-name"),
                x(&record(b"path", b"pax-name")),
                g(),
                x(&record(b"path", b"pax")),
                long(b'L', "gnu"),
                g(),
            ]),
        ),
        raw_row("GNU long name with NUL inside", Lazy, archive(&[extension(b'L', b"name\0junk\0"), g()])),
        raw_row("GNU long name that is empty", Lazy, archive(&[extension(b'L', b"\0"), g()])),
        raw_row("GNU long name that climbs", Lazy, archive(&[long(b'L', &format!("{}etc/x", "../".repeat(60))), g()])),
        raw_row(
            "GNU long link against PAX link",
            Lazy,
            archive(&[long(b'K', "gnu"), x(&record(b"linkpath", b"pax")), symlink("l", "header").bytes()]),
        ),
        raw_row(
            "two PAX headers in a row",
            Lazy,
            archive(&[x(&record(b"path", b"first")), x(&record(b"uid", b"7")), g()]),
        ),
        raw_row("a PAX header at the end", Lazy, archive(&[g(), x(&record(b"path", b"nobody"))])),
        raw_row(
            "the PAX header is for one member",
            Lazy,
            archive(&[x(&record(b"path", b"one")), g(), file("i", b"2").bytes()]),
        ),
        raw_row("global header", Lazy, archive(&[extension(b'g', &record(b"comment", b"x")), g()])),
        raw_row(
            "global header with attributes for all",
            Lazy,
            archive(&[
                extension(b'g', &[record(b"uid", b"7"), record(b"mtime", b"1"), record(b"size", b"0")].concat()),
                g(),
            ]),
        ),
        raw_row(
            "global header with a path removes what is there",
            Lazy,
            archive(&[
                g(),
                file("q/r", b"1").bytes(),
                extension(b'g', &record(b"path", b"q")),
                extension(b'g', &record(b"path", b"s/t")),
            ]),
        ),
        raw_row(
            "global header between announcement and member",
            Lazy,
            archive(&[x(&record(b"path", b"announced")), extension(b'g', &record(b"comment", b"x")), g()]),
        ),
        raw_row(
            "global header of a whiteout's name",
            Lazy,
            archive(&[member(b'g', ".wh.a", &record(b"comment", b"x")).bytes()]),
        ),
        raw_row(
            "PAX keys twice",
            Lazy,
            archive(&[x(&[record(b"path", b"one"), record(b"path", b"two")].concat()), g()]),
        ),
        raw_row(
            "PAX keys twice, the last one empty",
            Lazy,
            archive(&[x(&[record(b"path", b"one"), record(b"path", b"")].concat()), g()]),
        ),
        raw_row(
            "PAX values that are empty",
            Lazy,
            archive(&[x(&[record(b"uid", b""), record(b"size", b""), record(b"mtime", b"")].concat()), g()]),
        ),
        raw_row(
            "PAX keys in other case, and unknown",
            Lazy,
            archive(&[
                x(&[record(b"PATH", b"x"), record(b"hdrcharset", b"BINARY"), record(b"VENDOR.key", b"\0")].concat()),
                g(),
            ]),
        ),
        raw_row("PAX path that climbs", Lazy, archive(&[x(&record(b"path", b"../../../../etc/x")), g()])),
        raw_row(
            "PAX path of a directory by its slash",
            Lazy,
            archive(&[x(&record(b"path", b"q/")), member(0, "g", b"").bytes()]),
        ),
        raw_row("PAX header without records", Lazy, archive(&[x(b""), g()])),
        raw_row(
            "PAX record of 2 MiB",
            Declined("extended header is too long"),
            archive(&[x(&record(b"comment", &vec![b'x'; 2 << 20])), g()]),
        ),
    ];
    for (name, content) in [
        ("length too long", &b"10 path=p"[..]),
        ("length too short", b"8 path=p\n"),
        ("length negative", b"-9 path=p\n"),
        ("length with a blank", b" 10 path=p\n"),
        ("length without end", b"99999999999999999999 a=b\n"),
        ("no key", b"5 =b\n"),
        ("no equals sign", b"5 ab\n"),
        ("no newline", b"8 path=pp"),
        ("NUL in the key", b"8 a\0=bc\n"),
        ("NUL in the path", b"13 path=a\0bc\n"),
        ("NUL in the owner's name", b"12 uname=\0b\n"),
        ("NULs behind", b"10 path=p\n\0"),
    ] {
        let archive = archive(&[x(content), g()]);
        rows.push(raw_row(&format!("PAX record: {name}"), Refused("malformed PAX record"), archive));
    }
    rows
}

pub fn types_and_sparse() -> Vec<Row> {
    let unknown = Refused("type of member that containerd does not apply");
    let sparse = |records: &[(&str, &str)], data: &[u8]| {
        records.iter().fold(file("GNUSparseFile.0/g", data), |member, (key, value)| {
            member.pax(format!("GNU.sparse.{key}"), value)
        })
    };
    let one = [("major", "1"), ("minor", "0"), ("name", "g"), ("realsize", "100000")];
    let map = |text: &str, data: &[u8]| [padded(text.as_bytes()), data.to_vec()].concat();
    let old = {
        let mut head = member(b'S', "g", b"abc").gnu();
        head = head.put(386..398, b"00000000012\0").put(398..410, b"00000000003\0").put(483..495, b"00000000100\0");
        head
    };
    let mut rows: Vec<Row> = [b'7', b'D', b'M', b'N', b'V', b'Z', b'A', 1, 0xff]
        .into_iter()
        .map(|flag| row(&format!("type flag {}", flag.escape_ascii()), unknown, &[member(flag, "g", b"")]))
        .collect();
    rows.extend([
        row(
            "old V7 archive",
            Lazy,
            &[
                member(0, "g", b"1").put(MAGIC, b""),
                member(0, "q/", b"").put(MAGIC, b""),
                symlink("l", "g").put(MAGIC, b""),
            ],
        ),
        row("old GNU sparse file", Refused("old GNU sparse file"), &[old]),
        row(
            "sparse 0.0",
            Lazy,
            &[sparse(
                &[
                    ("size", "1000"),
                    ("numblocks", "2"),
                    ("offset", "10"),
                    ("numbytes", "3"),
                    ("offset", "500"),
                    ("numbytes", "2"),
                ],
                b"abcde",
            )],
        ),
        row(
            "sparse 0.1",
            Lazy,
            &[sparse(
                &[
                    ("major", "0"),
                    ("minor", "1"),
                    ("name", "i"),
                    ("realsize", "1000"),
                    ("numblocks", "1"),
                    ("map", "900,3"),
                ],
                b"abc",
            )],
        ),
        row("sparse 1.0", Lazy, &[sparse(&one, &map("2\n5\n3\n99998\n2\n", b"abcde"))]),
        row(
            "sparse with a name that climbs",
            Lazy,
            &[sparse(
                &[("major", "1"), ("minor", "0"), ("name", "../../x"), ("realsize", "5")],
                &map("1\n0\n3\n", b"abc"),
            )],
        ),
        row(
            "sparse with NUL in its name",
            Refused("NUL in a name"),
            &[sparse(
                &[("major", "1"), ("minor", "0"), ("name", "a\0b"), ("realsize", "5")],
                &map("1\n0\n3\n", b"abc"),
            )],
        ),
        row("sparse map out of order", Refused("sparse map"), &[sparse(&one, &map("2\n50\n3\n10\n2\n", b"abcde"))]),
        row("sparse map that overlaps", Refused("sparse map"), &[sparse(&one, &map("2\n0\n3\n2\n2\n", b"abcde"))]),
        row("sparse map beyond the file", Refused("sparse map"), &[sparse(&one, &map("1\n99999\n3\n", b"abc"))]),
        row("sparse map of less than is stored", Refused("sparse map"), &[sparse(&one, &map("1\n0\n2\n", b"abc"))]),
        row("sparse map of more than is stored", Refused("sparse map"), &[sparse(&one, &map("1\n0\n4\n", b"abc"))]),
        row("sparse map with a negative number", Refused("negative"), &[sparse(&one, &map("1\n-5\n3\n", b"abc"))]),
        row("sparse map without end", Refused("sparse map"), &[sparse(&one, b"9\n0\n")]),
        row("sparse map of 2^62 entries", Refused("sparse map"), &[sparse(&one, b"4611686018427387904\n")]),
        row(
            "sparse map of a directory",
            Refused("no content"),
            &[dir("q").pax("GNU.sparse.major", "1").pax("GNU.sparse.minor", "0")],
        ),
        row("sparse of one hole", Lazy, &[sparse(&one, &map("0\n", b""))]),
        row(
            "sparse of a version that is none",
            Lazy,
            &[sparse(&[("major", "2"), ("minor", "0"), ("name", "i")], b"abc")],
        ),
    ]);
    rows
}

pub fn ends() -> Vec<Row> {
    let two = || Archive::new().with(file("g", b"content")).with(file("i", b"more"));
    let cut = |at: usize| two().cut()[..at].to_vec();
    vec![
        // It could be lazy, but of a blob without bytes no registry can prove that it gives ranges.
        raw_row("no bytes at all", Lazy, Vec::new()).over_base(Declined("")),
        raw_row("an archive without members", Lazy, Archive::new().end()),
        raw_row("no end marker", Lazy, two().cut()),
        raw_row("half an end marker", Lazy, two().raw([0; 512]).cut()),
        raw_row(
            "half an end marker, then more",
            Refused("data after a block of zeros"),
            two().raw([0; 512]).with(file("j", b"")).end(),
        ),
        raw_row("garbage after the end", Lazy, two().raw([0; 1024]).raw([7; 5000]).cut()),
        raw_row("an archive after the end", Lazy, two().raw([0; 1024]).with(file("hidden", b"evil")).end()),
        raw_row("cut in a header", Refused("ends early"), cut(1024 + 100)),
        raw_row("cut in a content", Refused("ends early"), cut(512 + 3)),
        raw_row("cut in the padding", Lazy, cut(1024 + 512 + 10)),
        raw_row("cut after a header", Refused("ends early"), cut(512)),
        raw_row(
            "cut in an extended header",
            Refused("ends early"),
            extension(b'x', &record(b"path", b"p"))[..515].to_vec(),
        ),
        raw_row("cut in the end marker", Refused("ends early"), two().raw([0; 700]).cut()),
        raw_row("one byte", Refused("ends early"), vec![0]),
        raw_row("not an archive", Refused("not octal"), [b"This is no archive. ".repeat(100), vec![0; 48]].concat()),
    ]
}
