//! What the kernel has to offer.

use std::fs;

use super::check::{Check, Verdict};

/// From here on, requests that nobody answered when a worker died are sent again to the next one.
const RESEND: (u32, u32) = (6, 9);

pub(super) fn checks() -> Vec<Check> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    vec![device(), version(&release), filesystem("fuse", &known), filesystem("overlay", &known)]
}

fn device() -> Check {
    let path = "/dev/fuse";
    match fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Check::new("FUSE device", path, Verdict::Ok, "can be opened"),
        Err(error) => Check::new("FUSE device", path, Verdict::Failed, error.to_string())
            .hint("`modprobe fuse`, and look as root; in a container, pass the device in"),
    }
}

fn version(release: &str) -> Check {
    let check = |verdict, found: String| Check::new("kernel", "uname", verdict, found);
    match parse(release) {
        Some(version) if version >= RESEND => {
            check(Verdict::Ok, format!("{release}: reads go on after a crash of the worker"))
        }
        Some(_) => check(Verdict::Warning, format!("{release}: reads that wait while a worker crashes hang for ever"))
            .hint("6.9 and newer send them again to the next worker"),
        None => check(Verdict::Warning, format!("{release:?} is no version that is understood")),
    }
}

/// `"6.9.3-arch"` is (6, 9).
fn parse(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|char: char| !char.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn filesystem(name: &'static str, known: &str) -> Check {
    let looked_at = "/proc/filesystems";
    let label = if name == "fuse" { "file system fuse" } else { "file system overlay" };
    if known.lines().any(|line| line.split_whitespace().next_back() == Some(name)) {
        return Check::new(label, looked_at, Verdict::Ok, "known to the kernel");
    }
    // A module is loaded with the first mount, so its absence is no proof.
    Check::new(label, looked_at, Verdict::Warning, "not loaded").hint(format!("`modprobe {name}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_as_numbers() {
        for (release, verdict) in [
            ("6.18.44-fc", Verdict::Ok),
            ("6.9.0", Verdict::Ok),
            ("7.0-rc1", Verdict::Ok),
            ("6.8.12-gke", Verdict::Warning),
            ("5.10.0", Verdict::Warning),
            ("unknown", Verdict::Warning),
        ] {
            assert_eq!(version(release).verdict, verdict, "{release}");
        }
    }

    #[test]
    fn a_file_system_is_a_whole_word() {
        let known = "nodev\tsysfs\nnodev\tfusectl\n\text4\nnodev\toverlay\n";
        assert_eq!(filesystem("fuse", known).verdict, Verdict::Warning);
        assert_eq!(filesystem("overlay", known).verdict, Verdict::Ok);
    }
}
