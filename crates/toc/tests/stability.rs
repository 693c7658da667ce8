//! The canonical bytes of fixed archives never change: nodes and servers of different ages must agree on them.
#![allow(clippy::unwrap_used, reason = "tests")]

mod archive;

use archive::{CAPABILITY, archive as tar_of, build_plain, device, dir, file, hard_link, sparse, symlink};

#[test]
fn digests_of_fixtures() {
    let empty = build_plain(&tar_of(&[])).unwrap();
    let one = build_plain(&tar_of(&[file("a", b"hello\n")])).unwrap();
    let every_kind = build_plain(&tar_of(&[
        dir("bin").mode(0o750).owner(1, 2),
        file("bin/tool", &[7; 20_000]).mode(0o4755).xattr("security.capability", CAPABILITY),
        hard_link("bin/alias", "bin/tool"),
        symlink("sh", "bin/tool"),
        device("dev/null", b'3', (1, 3)),
        file("gone/.wh.file", b""),
        file("fresh/.wh..wh..opq", b""),
        sparse("sparse", 100_000, &[(40_000, b"middle")]),
    ]))
    .unwrap();
    let digests = [empty, one, every_kind].map(|toc| toc.digest().hex());
    assert_eq!(digests, EXPECTED, "see FORMAT.md: a change of these needs a new version of the format");
}

const EXPECTED: [&str; 3] = [
    "27c088e01f3e6beb98f367c8c7bf9a416ba8ac4826db286df10949e442f8c02d",
    "fcc36ed508d63d3ef92956a8a3fe0b45659ded090e75d8f92cbc2f35fd9cb3e5",
    "47af6ff5192c079f87bfa906341ac7894b31350b4df2e38505e61f06d0f69099",
];
