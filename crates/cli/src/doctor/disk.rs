//! The root directory of millstreamd, its mount, and the files that its settings name.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use indicatif::HumanBytes;
use millstream_settings::node::Settings;

use super::check::{Check, Verdict};

/// `f_type` of overlayfs, as `statfs(2)` gives it.
const OVERLAYFS: i64 = 0x794c_7630;
/// Below this share of free space or inodes, the node is about to run out of it.
const SCARCE_PERCENT: u64 = 10;

pub(super) fn checks(settings: &Settings) -> Vec<Check> {
    let mut checks = vec![mode("root", &settings.root, 0o700), filesystem(&settings.root)];
    checks.extend(room(&settings.root));
    checks.push(mounts(&settings.root));
    checks.push(mode("socket", &settings.socket, 0o600));
    checks.push(hosts_dir(&settings.registry.hosts_dir));
    checks.extend(settings.registry.docker_config.as_deref().map(|path| mode("docker config", path, 0o600)));
    checks
}

/// Nobody but root may look in.
fn mode(name: &'static str, path: &Path, wanted: u32) -> Check {
    let check = |verdict, found: String| Check::new(name, path.display(), verdict, found);
    match fs::metadata(path) {
        Ok(metadata) => {
            let mode = metadata.permissions().mode() & 0o7777;
            if mode & 0o077 == 0 {
                return check(Verdict::Ok, format!("mode {mode:04o}"));
            }
            check(Verdict::Warning, format!("mode {mode:04o} lets others in"))
                .hint(format!("`chmod {wanted:04o} {}`", path.display()))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => check(Verdict::Warning, "not there".to_owned())
            .hint(match name {
                "docker config" => "registries are asked without credentials; fix registry.docker_config",
                _ => "millstreamd makes it when it starts",
            }),
        Err(error) => check(Verdict::Failed, error.to_string()).hint("are you root?"),
    }
}

/// The nearest directory above that exists: where `path` will be made.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

fn filesystem(root: &Path) -> Check {
    let check = |verdict, found: String| Check::new("file system of root", existing(root).display(), verdict, found);
    match rustix::fs::statfs(existing(root)) {
        Ok(found) if found.f_type == OVERLAYFS => check(Verdict::Failed, "overlayfs".to_owned())
            .hint("the kernel allows a stack of two only: set root to a directory of a disk, in a container mount one"),
        Ok(found) => check(Verdict::Ok, format!("type {:#x}, not overlayfs", found.f_type)),
        Err(error) => check(Verdict::Failed, error.to_string()),
    }
}

fn room(root: &Path) -> Vec<Check> {
    let place = existing(root);
    let check = |name, verdict, found: String| Check::new(name, place.display(), verdict, found);
    let disk = match rustix::fs::statvfs(place) {
        Ok(disk) => disk,
        Err(error) => return vec![check("free space", Verdict::Failed, error.to_string())],
    };
    let scarce = |free: u64, all: u64| {
        if all > 0 && free.saturating_mul(100) / all < SCARCE_PERCENT { Verdict::Warning } else { Verdict::Ok }
    };
    let bytes = HumanBytes(disk.f_bavail.saturating_mul(disk.f_frsize));
    let all = HumanBytes(disk.f_blocks.saturating_mul(disk.f_frsize));
    let mut space = check("free space", scarce(disk.f_bavail, disk.f_blocks), format!("{bytes} of {all}"));
    if space.verdict != Verdict::Ok {
        space = space.hint("remove images; `millstream gc` gives back what none uses");
    }
    // A file system that makes inodes as needed has 0 of them.
    let found =
        if disk.f_files == 0 { "no limit".to_owned() } else { format!("{} of {}", disk.f_favail, disk.f_files) };
    vec![space, check("free inodes", scarce(disk.f_favail, disk.f_files), found)]
}

/// A mount that nobody serves lets everything that touches it fail or hang.
fn mounts(root: &Path) -> Check {
    let point = root.join("m");
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let count = mounted(&table, &point);
    let check = |verdict, found: String| Check::new("mount", point.display(), verdict, found);
    let unmount = format!(
        "stop millstreamd, then `umount --lazy {}`; what runs from it has to be created again",
        point.display()
    );
    match (count, fs::metadata(&point)) {
        (0, _) => check(Verdict::Warning, "nothing is mounted".to_owned()).hint("millstreamd mounts it when it starts"),
        (_, Err(error)) => check(Verdict::Failed, format!("mounted, but nobody answers: {error}")).hint(unmount),
        (1, Ok(_)) => check(Verdict::Ok, "mounted, and answers".to_owned()),
        (count, Ok(_)) => check(Verdict::Warning, format!("mounted {count} times, one over the other")).hint(unmount),
    }
}

/// How many FUSE file systems are mounted at `point`.
fn mounted(table: &str, point: &Path) -> usize {
    let is_ours = |line: &&str| {
        let Some((mount, filesystem)) = line.split_once(" - ") else { return false };
        let place = mount.split(' ').nth(4).map(|place| place.replace("\\040", " "));
        place.is_some_and(|place| Path::new(&place) == point) && filesystem.starts_with("fuse")
    };
    table.lines().filter(is_ours).count()
}

fn hosts_dir(path: &Path) -> Check {
    let check = |verdict, found: String| Check::new("registry.hosts_dir", path.display(), verdict, found);
    match fs::read_dir(path) {
        Ok(entries) => check(Verdict::Ok, format!("{} hosts", entries.count())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            check(Verdict::Ok, "not there: every registry is asked at its own address".to_owned())
        }
        Err(error) => check(Verdict::Failed, error.to_string()).hint("are you root?"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_fuse_mounts_at_the_place_count() {
        let table = "\
36 25 0:31 / /var/lib/millstream/m ro,nosuid - fuse.millstream millstream ro\n\
37 25 0:32 / /var/lib/millstream/m ro,nosuid - fuse millstream ro\n\
38 25 0:33 / /var/lib/millstream/m2 ro - fuse millstream ro\n\
39 25 0:34 / /var/lib/millstream/m rw - ext4 /dev/sda rw\n";
        assert_eq!(mounted(table, Path::new("/var/lib/millstream/m")), 2);
        assert_eq!(mounted("", Path::new("/m")), 0);
    }

    #[test]
    fn others_are_kept_out() {
        let dir = tempfile::tempdir().unwrap();
        for (bits, verdict) in [(0o700, Verdict::Ok), (0o750, Verdict::Warning), (0o701, Verdict::Warning)] {
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(bits)).unwrap();
            assert_eq!(mode("root", dir.path(), 0o700).verdict, verdict, "{bits:o}");
        }
        assert_eq!(mode("root", &dir.path().join("none"), 0o700).verdict, Verdict::Warning);
    }
}
