//! Platforms, and which entry of an image index containerd takes for a machine.

use std::fmt;

use crate::IndexEntry;

/// Operating system and processor, in the words of Go (`linux`, `amd64`), as image documents use them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Platform {
    /// `linux`, `windows`, …
    pub os: String,
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// Version of the instruction set: `v7` of arm, `v3` of amd64; absent where it is the usual one.
    pub variant: Option<String>,
}

impl Platform {
    /// The platform this program was built for.
    #[must_use]
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "x86" => "386",
            "aarch64" => "arm64",
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            "powerpc64" => "ppc64",
            "loongarch64" => "loong64",
            other => other,
        };
        Self { os: std::env::consts::OS.to_owned(), architecture: architecture.to_owned(), variant: None }
    }

    /// The same platform in one spelling: `x86_64` is `amd64`, the usual variant of an architecture is left out (arm's
    /// `v7`, which is written, excepted).
    #[must_use]
    pub fn normalized(&self) -> Self {
        let mut os = self.os.to_lowercase();
        if os.is_empty() {
            os = std::env::consts::OS.to_owned();
        } else if os == "macos" {
            os = "darwin".to_owned();
        }
        let given = self.variant.as_deref().unwrap_or_default().to_lowercase();
        let (architecture, variant) = match (self.architecture.to_lowercase().as_str(), given.as_str()) {
            ("i386", _) => ("386".to_owned(), String::new()),
            ("x86_64" | "x86-64" | "amd64", variant) => {
                ("amd64".to_owned(), if variant == "v1" { String::new() } else { variant.to_owned() })
            }
            ("aarch64" | "arm64", variant) => {
                let variant = match variant {
                    "8" | "v8" | "v8.0" => "",
                    "9" | "9.0" | "v9.0" => "v9",
                    other => other,
                };
                ("arm64".to_owned(), variant.to_owned())
            }
            ("armhf", _) => ("arm".to_owned(), "v7".to_owned()),
            ("armel", _) => ("arm".to_owned(), "v6".to_owned()),
            ("arm", "" | "7") => ("arm".to_owned(), "v7".to_owned()),
            ("arm", variant @ ("5" | "6" | "8")) => ("arm".to_owned(), format!("v{variant}")),
            (architecture, variant) => (architecture.to_owned(), variant.to_owned()),
        };
        Self { os, architecture, variant: (!variant.is_empty()).then_some(variant) }
    }

    /// What a machine of this platform can run, best first.
    fn runnable(&self) -> Vec<Self> {
        let host = self.normalized();
        let with = |architecture: &str, variant: Option<String>| {
            Self { os: host.os.clone(), architecture: architecture.to_owned(), variant }.normalized()
        };
        let version = host.variant.as_deref().and_then(|variant| variant.trim_start_matches('v').parse::<u8>().ok());
        let mut list = Vec::new();
        match host.architecture.as_str() {
            "amd64" => {
                list.push(host.clone());
                list.extend((1..version.unwrap_or(1)).rev().map(|n| with("amd64", Some(format!("v{n}")))));
                list.push(with("386", None));
            }
            "arm" => {
                list.push(host.clone());
                list.extend((5..version.unwrap_or(5)).rev().map(|n| with("arm", Some(format!("v{n}")))));
            }
            "arm64" => {
                list.extend(arm64_versions(host.variant.as_deref()).map(|variant| with("arm64", Some(variant))));
                list.extend((5..=8).rev().map(|n| with("arm", Some(format!("v{n}")))));
            }
            _ => list.push(host.clone()),
        }
        list
    }
}

/// Every arm64 version that a machine of version `variant` (normalised) runs, newest first; v9.n includes v8.(n + 5).
/// Nothing for a version that does not exist, as with containerd.
fn arm64_versions(variant: Option<&str>) -> impl Iterator<Item = String> {
    let version = variant.unwrap_or("v8").trim_start_matches('v');
    let (major, minor) = version.split_once('.').unwrap_or((version, "0"));
    let newest: &[(u8, u8)] = match (major, minor.parse::<u8>()) {
        ("8", Ok(minor @ 0..=9)) => &[(8, minor)],
        ("9", Ok(minor @ 0..=7)) => &[(9, minor), (8, (minor + 5).min(9))],
        _ => &[],
    };
    let names = newest.iter().flat_map(|&(major, minor)| {
        (0..=minor).rev().map(move |n| if n == 0 { format!("v{major}") } else { format!("v{major}.{n}") })
    });
    names.collect::<Vec<_>>().into_iter()
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

/// The entry that containerd takes on a machine of platform `wanted`: the one for the best platform that the machine
/// runs, the first in the index where several are equal; else the first entry that names no platform.
#[must_use]
pub fn select_platform<'a>(entries: &'a [IndexEntry], wanted: &Platform) -> Option<&'a IndexEntry> {
    let runnable = wanted.runnable();
    let rank = |entry: &IndexEntry| match &entry.platform {
        // Behind everything that names a platform.
        None => Some(runnable.len()),
        Some(platform) => {
            let platform = platform.normalized();
            runnable.iter().position(|candidate| *candidate == platform)
        }
    };
    entries.iter().filter_map(|entry| Some((rank(entry)?, entry))).min_by_key(|(rank, _)| *rank).map(|(_, entry)| entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Digest, ManifestDigest};

    fn platform(text: &str) -> Platform {
        let mut parts = text.split('/');
        let mut next = || parts.next().map(str::to_owned);
        Platform { os: next().unwrap_or_default(), architecture: next().unwrap_or_default(), variant: next() }
    }

    fn choose(wanted: &str, offered: &[&str]) -> Option<usize> {
        let entries: Vec<IndexEntry> = offered
            .iter()
            .enumerate()
            .map(|(number, text)| IndexEntry {
                digest: ManifestDigest(Digest::of(&number.to_le_bytes())),
                size: 1,
                platform: (!text.is_empty()).then(|| platform(text)),
            })
            .collect();
        let chosen = select_platform(&entries, &platform(wanted))?;
        entries.iter().position(|entry| entry.digest == chosen.digest)
    }

    #[test]
    fn choice_is_containerds() {
        for (wanted, offered, expected) in [
            ("linux/amd64", &["linux/arm64", "linux/amd64"][..], Some(1)),
            ("linux/amd64", &["linux/386", "linux/amd64"], Some(1)),
            ("linux/amd64", &["linux/386", "linux/arm64"], Some(0)),
            ("linux/amd64", &["linux/amd64/v3"], None),
            ("linux/amd64/v3", &["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"], Some(1)),
            ("linux/x86_64", &["linux/amd64/v1"], Some(0)),
            ("linux/amd64", &["linux/amd64", "linux/amd64"], Some(0)),
            ("linux/amd64", &["unknown/unknown", "windows/amd64"], None),
            ("linux/amd64", &["", "linux/amd64"], Some(1)),
            ("linux/amd64", &["windows/amd64", "", ""], Some(1)),
            ("linux/arm64", &["linux/arm/v7", "linux/arm64/v8"], Some(1)),
            ("linux/arm64", &["linux/arm/v6", "linux/arm/v7"], Some(1)),
            ("linux/arm64", &["linux/arm64/v9"], None),
            ("linux/arm64/v9.1", &["linux/arm64/v8.7", "linux/arm64/v8.6", "linux/arm64/v9"], Some(2)),
            ("linux/arm64/v9.1", &["linux/arm64/v8.7", "linux/arm64/v8.6"], Some(1)),
            ("linux/arm", &["linux/arm/v8", "linux/arm/v5", "linux/arm/v6"], Some(2)),
            ("linux/s390x", &["linux/amd64", "linux/s390x"], Some(1)),
            ("linux/amd64", &[], None),
        ] {
            assert_eq!(choose(wanted, offered), expected, "{wanted} from {offered:?}");
        }
    }

    #[test]
    fn host_is_its_own_first_choice() {
        let host = Platform::host().to_string();
        assert_eq!(choose(&host, &["plan9/mips", &host]), Some(1));
    }
}
