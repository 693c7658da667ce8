//! Extended attributes: those by which overlayfs would be steered, and those that the kernel takes in a certain form only.

use super::Expect::{Declined, Lazy};
use super::Row;
use super::make::{Member, device, dir, fifo, file, row, symlink};

const OVERLAY: [&str; 9] =
    ["opaque", "redirect", "metacopy", "origin", "impure", "nlink", "upper", "whiteout", "protattr"];

pub fn rows() -> Vec<Row> {
    let own = |namespace: &str| -> Vec<Member> {
        let mut members = vec![dir("full"), file("f", b""), dir("d")];
        for (member, value) in members.iter_mut().zip([&b"y"[..], b"/d/f", b"x"]) {
            for name in OVERLAY {
                *member = member.clone().xattr(&format!("{namespace}.overlay.{name}"), value);
            }
        }
        members
    };
    let capability = |value: &[u8]| file("g", b"1").mode(0o755).xattr("security.capability", value);
    let words = |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|word| word.to_le_bytes()).collect() };
    let v2 = words(&[0x0200_0001, 32, 0, 0, 0]);
    let v3 = |root| words(&[0x0300_0001, 32, 0, 0, 0, root]);
    let odd = Declined("extended attribute");
    let mut rows = vec![
        row("all trusted.overlay attributes", Lazy, &own("trusted")),
        row("all user.overlay attributes", Lazy, &own("user")),
        row("file capabilities", Lazy, &[capability(&v2), file("i", b"1").xattr("security.capability", &v3(0))]),
        row("file capabilities of another root", Lazy, &[capability(&v3(100_000))]),
        row("file capabilities, too short", odd, &[capability(&v2[..19])]),
        row("file capabilities, too long", odd, &[capability(&[&v2[..], b"x"].concat())]),
        row("file capabilities of a version that is none", odd, &[capability(&[0xff; 20])]),
        row("file capabilities, empty", odd, &[capability(b"")]),
        row("attribute of no name", odd, &[file("g", b"1").xattr("", b"1")]),
        row("attribute of no name in its namespace", odd, &[file("g", b"1").xattr("user.", b"1")]),
        row(
            "attribute of a namespace that is none",
            Lazy,
            &[file("g", b"1").xattr("other.x", b"1").xattr("user", b"2").xattr("system.x", b"3")],
        ),
        row(
            "attribute with a name of 255 bytes",
            Lazy,
            &[file("g", b"1").xattr(&format!("user.{}", "n".repeat(250)), b"1")],
        ),
        row(
            "attribute with a name of 256 bytes",
            odd,
            &[file("g", b"1").xattr(&format!("user.{}", "n".repeat(251)), b"1")],
        ),
        row(
            "attribute with a long name in no namespace",
            odd,
            &[file("g", b"1").xattr(&format!("other.{}", "n".repeat(251)), b"1")],
        ),
        row(
            "trusted attribute with a long name",
            Lazy,
            &[file("g", b"1").xattr(&format!("trusted.{}", "n".repeat(251)), b"1")],
        ),
        row("attribute of 65537 bytes in no namespace", odd, &[file("g", b"1").xattr("other.x", &[1; 65_537])]),
        row("attribute of 60000 bytes", odd, &[file("g", b"1").xattr("user.x", &[1; 60_000])]),
        row(
            "attributes of 5000 bytes together",
            odd,
            &[file("g", b"1").xattr("user.x", &[1; 2500]).xattr("user.y", &[1; 2500])],
        ),
        row("attribute of 1500 bytes", Lazy, &[file("g", b"1").xattr("user.x", &[1; 1500])]),
        row(
            "attributes that are empty or binary",
            Lazy,
            &[file("g", b"1").xattr("user.x", b"").xattr("user.y", b"\0=\n\xff"), dir("d").xattr("user.z", b"")],
        ),
        row("attribute twice", Lazy, &[file("g", b"1").xattr("user.x", b"1").xattr("user.x", b"2")]),
        row(
            "user attributes where there can be none",
            Lazy,
            &[
                symlink("l", "f").xattr("user.x", b"1").xattr("security.x", b"1"),
                fifo("q").xattr("user.x", b"1").xattr("security.x", b"1"),
                device(b'3', "r", 1, 3).xattr("user.x", b"1").xattr("security.x", b"1"),
            ],
        ),
        row(
            "attributes of other archivers",
            Lazy,
            &[file("g", b"1").pax("LIBARCHIVE.xattr.user.x", "MQ==").pax("RHT.security.selinux", "x")],
        ),
        row("attributes of a mark", Lazy, &[dir("full"), file("full/.wh..wh..opq", b"").xattr("user.x", b"1")]),
    ];
    for (name, value) in [
        (
            "system.posix_acl_access",
            &b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x04\0\x04\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff"[..],
        ),
        ("system.posix_acl_default", b"junk"),
    ] {
        rows.push(row(name, Declined("access control list"), &[dir("q").xattr(name, value)]));
    }
    for name in ["security.ima", "security.evm"] {
        rows.push(row(name, odd, &[file("g", b"1").xattr(name, b"\x03junk")]));
    }
    rows
}
