//! Random layers over very few names, so that they collide all the time.

use proptest::prelude::*;

/// One member of an archive.
#[derive(Debug, Clone)]
pub(super) struct Member {
    pub(super) path: String,
    pub(super) what: MemberKind,
    pub(super) mode: u32,
    pub(super) uid: u64,
    pub(super) mtime: u64,
    pub(super) xattr: Option<(&'static str, &'static str)>,
}

#[derive(Debug, Clone)]
pub(super) enum MemberKind {
    Directory,
    File(Vec<u8>),
    Symlink(String),
    HardLink(String),
    Whiteout,
    Opaque,
    Device(u32, u32),
    Fifo,
}

impl Member {
    pub(super) fn new(path: &str, what: MemberKind) -> Self {
        Self { path: path.into(), what, mode: 0o644, uid: 0, mtime: 0, xattr: None }
    }

    pub(super) fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }
}

/// Whether a member may take the place of a directory that an earlier one had made, by a name below it or by an opaque mark
/// in it: a link counts, since it may lead to one.
pub(super) fn replaces(members: &[Member]) -> bool {
    let below = |path: &str, above: &str| path.strip_prefix(above).is_some_and(|rest| rest.starts_with('/'));
    let within = |earlier: &Member, path: &str| {
        below(&earlier.path, path) || (earlier.path == path && matches!(earlier.what, MemberKind::Opaque))
    };
    let taken = |(at, member): (usize, &Member)| match &member.what {
        MemberKind::Directory | MemberKind::Opaque => false,
        MemberKind::Symlink(_) => true,
        _ => members[..at].iter().any(|earlier| within(earlier, &member.path)),
    };
    members.iter().enumerate().any(taken)
}

/// The archive of some members, in their order.
pub(super) fn archive(members: &[Member]) -> Vec<u8> {
    use tar::EntryType;
    let mut builder = tar::Builder::new(Vec::new());
    for member in members {
        if let Some((name, value)) = member.xattr {
            let key = format!("SCHILY.xattr.{name}");
            builder.append_pax_extensions([(key.as_str(), value.as_bytes())]).unwrap();
        }
        let mut header = tar::Header::new_ustar();
        let (mut path, mut content) = (member.path.clone(), &b""[..]);
        let (parent, base) = path.rsplit_once('/').map_or(("", path.as_str()), |(parent, base)| (parent, base));
        let beside = |name: &str| format!("{parent}{}{name}", if parent.is_empty() { "" } else { "/" });
        let kind = match &member.what {
            MemberKind::Directory => EntryType::Directory,
            MemberKind::File(bytes) => {
                content = bytes;
                EntryType::Regular
            }
            MemberKind::Symlink(target) => {
                header.set_link_name_literal(target).unwrap();
                EntryType::Symlink
            }
            MemberKind::HardLink(target) => {
                header.set_link_name_literal(target).unwrap();
                EntryType::Link
            }
            MemberKind::Whiteout => {
                path = beside(&format!(".wh.{base}"));
                EntryType::Regular
            }
            MemberKind::Opaque => {
                path = if path.is_empty() { ".wh..wh..opq".into() } else { format!("{path}/.wh..wh..opq") };
                EntryType::Regular
            }
            MemberKind::Device(major, minor) => {
                header.set_device_major(*major).unwrap();
                header.set_device_minor(*minor).unwrap();
                EntryType::Char
            }
            MemberKind::Fifo => EntryType::Fifo,
        };
        header.set_entry_type(kind);
        header.set_path(&path).unwrap();
        header.set_mode(member.mode);
        header.set_uid(member.uid);
        header.set_gid(member.uid + 10);
        header.set_mtime(member.mtime);
        header.set_size(content.len() as u64);
        header.set_cksum();
        builder.append(&header, content).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Paths of one to three components out of three names.
pub(super) fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4).prop_map(|names| names.join("/"))
}

fn kind() -> impl Strategy<Value = MemberKind> {
    let content = prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..4),
        1 => (1_usize..40_000).prop_map(|len| (0..len).map(|i| (i % 251) as u8).collect()),
    ];
    prop_oneof![
        4 => Just(MemberKind::Directory),
        5 => content.prop_map(MemberKind::File),
        1 => path().prop_map(MemberKind::Symlink),
        1 => path().prop_map(|path| MemberKind::Symlink(format!("/{path}"))),
        1 => path().prop_map(MemberKind::HardLink),
        4 => Just(MemberKind::Whiteout),
        2 => Just(MemberKind::Opaque),
        1 => (1_u32..3, 0_u32..3).prop_map(|(major, minor)| MemberKind::Device(major, minor)),
        1 => Just(MemberKind::Fifo),
    ]
}

fn member() -> impl Strategy<Value = Member> {
    let xattrs = [("user.x", "1"), ("user.y", "2"), ("security.z", "3"), ("trusted.overlay.opaque", "y")];
    let mode = prop::sample::select(vec![0o755, 0o700, 0o1777, 0o4750, 0o640]);
    let xattr = prop::option::weighted(0.2, prop::sample::select(xattrs.to_vec()));
    (path(), kind(), mode, 0_u64..3, 1_u64..9, xattr).prop_map(|(path, what, mode, uid, mtime, xattr)| {
        let path = if matches!(what, MemberKind::Opaque) && uid == 0 && mtime == 1 { String::new() } else { path };
        Member { path, what, mode, uid, mtime, xattr }
    })
}

/// A layer; empty ones occur.
pub(super) fn layer() -> impl Strategy<Value = Vec<Member>> {
    prop::collection::vec(member(), 0..9)
}
