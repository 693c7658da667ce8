//! What the local layers under a lazy run hold, answered from their directories.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use millstream_layerfs::{Below, BelowEntry, DirectoryAttributes};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Longest list of attribute names and longest value that Linux allows, in bytes.
const XATTR_MAX: usize = 64 * 1024;
const OPAQUE: &str = "trusted.overlay.opaque";

/// Lower directories of an overlay mount, top first. Blocking.
#[derive(Debug)]
pub struct LowerDirs(pub Vec<PathBuf>);

/// What one lower directory says about one path.
enum Found {
    Nothing,
    Whiteout,
    Directory(fs::Metadata),
    Other,
}

fn look(path: &Path) -> io::Result<Found> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok(Found::Directory(metadata)),
        Ok(metadata) if metadata.file_type().is_char_device() && metadata.rdev() == 0 => Ok(Found::Whiteout),
        Ok(_) => Ok(Found::Other),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(Found::Nothing)
        }
        Err(error) => Err(error),
    }
}

fn is_opaque(path: &Path) -> io::Result<bool> {
    Ok(xattr(path, OsStr::new(OPAQUE))?.is_some_and(|value| value == b"y"))
}

impl Below for LowerDirs {
    fn lookup(&self, path: &[&[u8]]) -> io::Result<Option<BelowEntry>> {
        let mut visible: Vec<PathBuf> = self.0.clone();
        let mut attributes = None;
        for component in path {
            let mut deeper = Vec::new();
            attributes = None;
            for dir in visible {
                let candidate = dir.join(OsStr::from_bytes(component));
                match look(&candidate)? {
                    Found::Nothing => continue,
                    Found::Directory(metadata) => {
                        if attributes.is_none() {
                            attributes = Some(BelowEntry::Directory(directory_attributes(&candidate, &metadata)?));
                        }
                        let last = is_opaque(&candidate)?;
                        deeper.push(candidate);
                        if !last {
                            continue;
                        }
                    }
                    Found::Other if deeper.is_empty() => attributes = Some(BelowEntry::Other),
                    // Hides what is deeper down, and shows nothing itself.
                    Found::Whiteout | Found::Other => {}
                }
                break;
            }
            visible = deeper;
            if attributes.is_none() {
                return Ok(None);
            }
        }
        Ok(attributes)
    }

    fn attributes_for_implied(&self, path: &[&[u8]]) -> io::Result<Option<BelowEntry>> {
        let path: PathBuf = path.iter().map(|component| OsStr::from_bytes(component)).collect();
        for root in &self.0 {
            let root = fs::File::open(root)?;
            let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
            match rustix::fs::openat2(&root, &path, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
                Ok(found) => {
                    let found = fs::File::from(found);
                    let metadata = found.metadata()?;
                    // Through the descriptor, so that links on the way are not followed out of this root again.
                    let path = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&found)));
                    return directory_attributes(&path.join("."), &metadata).map(BelowEntry::Directory).map(Some);
                }
                Err(Errno::NOENT) => {}
                Err(Errno::NOTDIR | Errno::LOOP) => return Ok(Some(BelowEntry::Other)),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }
}

fn directory_attributes(path: &Path, metadata: &fs::Metadata) -> io::Result<DirectoryAttributes> {
    let mut xattrs = Vec::new();
    for name in xattr_names(path)? {
        if name.starts_with(b"trusted.") {
            continue;
        }
        if let Some(value) = xattr(path, OsStr::from_bytes(&name))? {
            xattrs.push((name, value));
        }
    }
    xattrs.sort();
    Ok(DirectoryAttributes {
        mode: u16::try_from(metadata.mode() & 0o7777).unwrap_or_default(),
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: (metadata.mtime(), u32::try_from(metadata.mtime_nsec()).unwrap_or_default()),
        xattrs,
    })
}

fn xattr_names(path: &Path) -> io::Result<Vec<Vec<u8>>> {
    let mut buffer = vec![0; XATTR_MAX];
    match rustix::fs::llistxattr(path, &mut buffer) {
        Ok(len) => {
            let names = buffer.get(..len).unwrap_or_default().split(|byte| *byte == 0);
            Ok(names.filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect())
        }
        Err(Errno::NOTSUP) => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

fn xattr(path: &Path, name: &OsStr) -> io::Result<Option<Vec<u8>>> {
    let mut buffer = vec![0; XATTR_MAX];
    match rustix::fs::lgetxattr(path, name, &mut buffer) {
        Ok(len) => {
            buffer.truncate(len);
            Ok(Some(buffer))
        }
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn kind(entry: Option<BelowEntry>) -> &'static str {
        match entry {
            None => "nothing",
            Some(BelowEntry::Directory(_)) => "directory",
            Some(BelowEntry::Other) => "other",
        }
    }

    #[test]
    fn answers_as_overlayfs_would_show_it() {
        let root = tempfile::tempdir().unwrap();
        let (top, bottom) = (root.path().join("top"), root.path().join("bottom"));
        for dir in ["top/d", "top/opaque", "bottom/d/e", "bottom/opaque/old", "bottom/gone/x", "bottom/f/x"] {
            fs::create_dir_all(root.path().join(dir)).unwrap();
        }
        fs::write(top.join("f"), b"").unwrap();
        fs::write(bottom.join("d/file"), b"").unwrap();
        fs::set_permissions(top.join("d"), fs::Permissions::from_mode(0o1751)).unwrap();
        let below = LowerDirs(vec![top.clone(), bottom]);
        if !rustix::process::geteuid().is_root() {
            // Past the capture of the test runner, so that it is seen and counted.
            std::io::Write::write_all(&mut std::io::stderr(), b"skipped: whiteouts and opaque marks need root\n").ok();
            assert!(std::env::var_os("MILLSTREAM_REQUIRE_ALL").is_none(), "a required tier was skipped");
            return;
        }
        rustix::fs::mknodat(rustix::fs::CWD, top.join("gone"), rustix::fs::FileType::CharacterDevice, 0.into(), 0)
            .unwrap();
        rustix::fs::lsetxattr(top.join("opaque"), OPAQUE, b"y", rustix::fs::XattrFlags::empty()).unwrap();
        for (path, expected) in [
            ("d", "directory"),
            ("d/e", "directory"),
            ("d/file", "other"),
            ("d/none", "nothing"),
            ("f", "other"),
            ("f/x", "nothing"),
            ("gone", "nothing"),
            ("gone/x", "nothing"),
            ("opaque", "directory"),
            ("opaque/old", "nothing"),
        ] {
            let components: Vec<&[u8]> = path.split('/').map(str::as_bytes).collect();
            assert_eq!(kind(below.lookup(&components).unwrap()), expected, "{path}");
        }
        let Some(BelowEntry::Directory(attributes)) = below.lookup(&[b"d"]).unwrap() else { panic!("a directory") };
        assert_eq!(attributes.mode, 0o1751);
        // What containerd copies attributes from: whatever a lower directory has there by itself, links followed.
        std::os::unix::fs::symlink("/d", top.join("link")).unwrap();
        rustix::fs::lsetxattr(top.join("d"), "user.note", b"x", rustix::fs::XattrFlags::empty()).unwrap();
        let implied = |path: &str| {
            let components: Vec<&[u8]> = path.split('/').map(str::as_bytes).collect();
            below.attributes_for_implied(&components).unwrap()
        };
        let Some(BelowEntry::Directory(attributes)) = implied("link") else { panic!("a directory") };
        assert_eq!((attributes.mode, attributes.xattrs), (0o1751, vec![(b"user.note".to_vec(), b"x".to_vec())]));
        for (path, expected) in [("opaque/old", "directory"), ("gone", "other"), ("f", "other"), ("none", "nothing")] {
            assert_eq!(kind(implied(path)), expected, "{path}");
        }
    }
}
