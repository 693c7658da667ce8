//! From a chain of snapshots to the mounts that containerd makes.

use std::path::{Path, PathBuf};

use millstream_oci::Digest;

use crate::{Backing, Kind};

/// Most snapshots in one chain. The kernel's overlay takes 500 lower directories; containerd's images have at most 127
/// layers in practice.
pub const MAX_LAYERS: usize = 500;

/// A mount as containerd's clients make it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `bind` or `overlay`.
    pub kind: &'static str,
    /// What to mount.
    pub source: String,
    /// Options in the form of fstab.
    pub options: Vec<String>,
}

/// Paths that mount options cannot express.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} cannot be used in mount options: it has a colon, comma, backslash or is not UTF-8", .0.display())]
pub struct MountError(pub PathBuf);

/// Part of a chain that becomes one lower directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Run {
    /// One snapshot with a directory of its own: its number.
    Local(u64),
    /// Consecutive lazy layers, bottom first.
    Lazy(Vec<Digest>),
}

/// Groups a chain (bottom first: number and backing of each snapshot) into runs, bottom first.
#[must_use]
pub fn runs(chain: &[(u64, Backing)]) -> Vec<Run> {
    let mut runs = Vec::new();
    for &(id, backing) in chain {
        match (backing, runs.last_mut()) {
            (Backing::Local, _) => runs.push(Run::Local(id)),
            (Backing::Lazy(layer), Some(Run::Lazy(layers))) => layers.push(layer),
            (Backing::Lazy(layer), _) => runs.push(Run::Lazy(vec![layer])),
        }
    }
    runs
}

/// A path in the form that overlay options take.
///
/// # Errors
/// When the kernel or containerd would split it.
pub fn option_path(path: &Path) -> Result<&str, MountError> {
    match path.to_str() {
        Some(text) if !text.contains([':', ',', '\\']) => Ok(text),
        _ => Err(MountError(path.to_owned())),
    }
}

/// The mounts of an active snapshot or view.
///
/// `fs` and `work` are its own directories, `lowers` what is below it, top first. Only what must not change is mounted
/// read-only: containerd 2.4 takes a read-only active mount for a layer that is unpacked already.
///
/// # Errors
/// When a path cannot be expressed.
pub fn mounts(kind: Kind, fs: &Path, work: &Path, lowers: &[PathBuf]) -> Result<Vec<Mount>, MountError> {
    let mount = match (kind, lowers) {
        (Kind::Active, []) => bind(fs, "rw")?,
        (Kind::View | Kind::Committed, []) => bind(fs, "ro")?,
        (Kind::View | Kind::Committed, [only]) => bind(only, "ro")?,
        (Kind::Active, _) => {
            let own = [format!("workdir={}", option_path(work)?), format!("upperdir={}", option_path(fs)?)];
            overlay(own.into(), lowers)?
        }
        (Kind::View | Kind::Committed, _) => overlay(Vec::new(), lowers)?,
    };
    Ok(vec![mount])
}

fn bind(source: &Path, mode: &str) -> Result<Mount, MountError> {
    let source = option_path(source)?.to_owned();
    Ok(Mount { kind: "bind", source, options: vec!["rbind".into(), mode.into()] })
}

/// `xino=on` gives one inode number space over lower directories of several file systems. `index=off` because lower
/// directories are shared between mounts, whatever the kernel's default.
fn overlay(mut options: Vec<String>, lowers: &[PathBuf]) -> Result<Mount, MountError> {
    let lowers = lowers.iter().map(|lower| option_path(lower)).collect::<Result<Vec<_>, _>>()?;
    options.push(format!("lowerdir={}", lowers.join(":")));
    options.extend(["xino=on".into(), "index=off".into()]);
    Ok(Mount { kind: "overlay", source: "overlay".into(), options })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lazy(name: &str) -> Backing {
        Backing::Lazy(Digest::of(name.as_bytes()))
    }

    #[test]
    fn any_alternation_of_runs() {
        let (a, b, c) = (Digest::of(b"a"), Digest::of(b"b"), Digest::of(b"c"));
        let chain = [(1, lazy("a")), (2, lazy("b")), (3, Backing::Local), (4, Backing::Local), (5, lazy("c"))];
        let expected = vec![Run::Lazy(vec![a, b]), Run::Local(3), Run::Local(4), Run::Lazy(vec![c])];
        assert_eq!(runs(&chain), expected);
        assert_eq!(runs(&[]), vec![]);
    }

    fn case(kind: Kind, lowers: &[&str]) -> (String, String, String) {
        let lowers: Vec<PathBuf> = lowers.iter().map(PathBuf::from).collect();
        let mut mounts = mounts(kind, Path::new("/r/s/9/fs"), Path::new("/r/s/9/work"), &lowers).unwrap();
        assert_eq!(mounts.len(), 1);
        let mount = mounts.remove(0);
        (mount.kind.to_owned(), mount.source, mount.options.join(","))
    }

    #[test]
    fn the_table_of_mounts() {
        let bind = |source: &str, mode: &str| ("bind".to_owned(), source.to_owned(), format!("rbind,{mode}"));
        let overlay = |options: &str| ("overlay".to_owned(), "overlay".to_owned(), options.to_owned());
        assert_eq!(case(Kind::Active, &[]), bind("/r/s/9/fs", "rw"));
        assert_eq!(case(Kind::View, &[]), bind("/r/s/9/fs", "ro"));
        assert_eq!(case(Kind::View, &["/m/1"]), bind("/m/1", "ro"));
        assert_eq!(case(Kind::View, &["/r/s/2/fs", "/m/1"]), overlay("lowerdir=/r/s/2/fs:/m/1,xino=on,index=off"));
        assert_eq!(
            case(Kind::Active, &["/m/1"]),
            overlay("workdir=/r/s/9/work,upperdir=/r/s/9/fs,lowerdir=/m/1,xino=on,index=off")
        );
    }

    #[test]
    fn paths_that_would_be_split_are_refused() {
        for bad in ["/a:b", "/a,b", "/a\\b"] {
            let result = mounts(Kind::View, Path::new("/f"), Path::new("/w"), &[PathBuf::from(bad)]);
            assert_eq!(result, Err(MountError(PathBuf::from(bad))));
        }
    }
}
