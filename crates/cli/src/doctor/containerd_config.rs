//! What containerd's configuration must say, by its version. The table of clients in the README is the specification; the files
//! that `millstream config default containerd-v2` and `containerd-v3` print pass.

use std::path::Path;

use millstream_settings::node::Settings;
use toml::{Table, Value};

use super::check::Verdict;

/// Major and minor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(u32, u32);

/// From here on CRI pulls through the transfer service.
const TRANSFER: Version = Version(2, 1);

impl Version {
    /// `"v2.2.9"`, `"1.6.20~ds1"`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.trim_start_matches('v').split(|char: char| !char.is_ascii_digit()).map(str::parse);
        Some(Self(numbers.next()?.ok()?, numbers.next()?.ok()?))
    }
}

/// One thing that was found.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) verdict: Verdict,
    pub(super) text: String,
    /// Empty: nothing to do.
    pub(super) hint: String,
}

/// What was found, and the name under which containerd knows millstreamd.
#[derive(Debug)]
pub(super) struct Examined {
    pub(super) name: Option<String>,
    pub(super) findings: Vec<Finding>,
}

/// Where a version of the file has what.
struct Places {
    /// CRI's settings of images.
    images: &'static [&'static str],
    /// CRI's settings of registries.
    registry: &'static [&'static str],
    sample: &'static str,
}

const V2: Places = Places {
    images: &["plugins", "io.containerd.grpc.v1.cri", "containerd"],
    registry: &["plugins", "io.containerd.grpc.v1.cri", "registry"],
    sample: "`millstream config default containerd-v2`",
};
const V3: Places = Places {
    images: &["plugins", "io.containerd.cri.v1.images"],
    registry: &["plugins", "io.containerd.cri.v1.images", "registry"],
    sample: "`millstream config default containerd-v3`",
};
const TRANSFER_SERVICE: [&str; 2] = ["plugins", "io.containerd.transfer.v1.local"];

/// Looks at everything that decides whether images can be lazy. An unknown version counts as what its file's version is for.
pub(super) fn examine(config: &Table, version: Option<Version>, settings: &Settings) -> Examined {
    let file = config.get("version").and_then(Value::as_integer).unwrap_or(1);
    let places = if file >= 3 { &V3 } else { &V2 };
    let version = version.unwrap_or(if file >= 3 { TRANSFER } else { Version(1, 6) });
    let mut findings = Vec::new();
    if file < 2 {
        let text = "it is of version 1, which names plug-ins otherwise";
        findings.push(warning(text.to_owned(), "begin it with `version = 2`".to_owned()));
    }
    let Some((name, entry)) = proxy(config, &settings.socket) else {
        let text = format!("no snapshotter of [proxy_plugins] has the address {}", settings.socket.display());
        findings.push(failed(text, format!("merge what {} prints, and restart containerd", places.sample)));
        return Examined { name: None, findings };
    };
    findings.push(ok(format!("[proxy_plugins.{name}] leads to millstreamd")));
    findings.extend(capabilities(&name, entry));
    findings.push(snapshotter(config, places, &name));
    findings.push(labels(config, places, version, &name, entry));
    if version >= TRANSFER {
        findings.push(unpack(config, &name));
    }
    findings.push(hosts(config, places, settings));
    Examined { name: Some(name), findings }
}

fn ok(text: String) -> Finding {
    Finding { verdict: Verdict::Ok, text, hint: String::new() }
}

fn warning(text: String, hint: String) -> Finding {
    Finding { verdict: Verdict::Warning, text, hint }
}

fn failed(text: String, hint: String) -> Finding {
    Finding { verdict: Verdict::Failed, text, hint }
}

fn at<'t>(config: &'t Table, path: &[&str]) -> Option<&'t Table> {
    path.iter().try_fold(config, |table, name| table.get(*name)?.as_table())
}

fn text<'t>(table: Option<&'t Table>, key: &str) -> Option<&'t str> {
    table?.get(key)?.as_str()
}

/// The entry whose address is our socket.
fn proxy<'t>(config: &'t Table, socket: &Path) -> Option<(String, &'t Table)> {
    at(config, &["proxy_plugins"])?.iter().find_map(|(name, entry)| {
        let entry = entry.as_table()?;
        let is_ours = text(Some(entry), "type") == Some("snapshot")
            && text(Some(entry), "address").is_some_and(|address| Path::new(address) == socket);
        is_ours.then(|| (name.clone(), entry))
    })
}

fn capabilities(name: &str, entry: &Table) -> Option<Finding> {
    let all = entry.get("capabilities").and_then(Value::as_array)?;
    let wrong: Vec<&str> =
        all.iter().filter_map(Value::as_str).filter(|one| ["rebase", "remap-ids"].contains(one)).collect();
    (!wrong.is_empty()).then(|| {
        failed(
            format!("[proxy_plugins.{name}] promises {}, which millstreamd does not do", wrong.join(" and ")),
            "take them out of `capabilities`".to_owned(),
        )
    })
}

/// Whether CRI uses it, for all containers or for those of some runtime.
fn snapshotter(config: &Table, places: &Places, name: &str) -> Finding {
    let images = at(config, places.images);
    if text(images, "snapshotter") == Some(name) {
        return ok(format!("CRI uses the snapshotter {name}"));
    }
    let by_runtime = |tables: Option<&Table>| {
        let mut entries = tables.into_iter().flat_map(Table::values).filter_map(Value::as_table);
        entries.any(|entry| text(Some(entry), "snapshotter") == Some(name))
    };
    let runtimes = [
        &V2.images.iter().chain(&["runtimes"]).copied().collect::<Vec<_>>()[..],
        &["plugins", "io.containerd.cri.v1.runtime", "containerd", "runtimes"],
        &["plugins", "io.containerd.cri.v1.images", "runtime_platforms"],
    ];
    if runtimes.iter().any(|path| by_runtime(at(config, path))) {
        return ok(format!("CRI uses the snapshotter {name} for some runtimes"));
    }
    let other = text(images, "snapshotter").unwrap_or("overlayfs");
    failed(
        format!("CRI uses the snapshotter {other}"),
        format!("set snapshotter = \"{name}\" in [{}]", header(places.images)),
    )
}

fn header(path: &[&str]) -> String {
    let quoted: Vec<String> =
        path.iter().map(|name| if name.contains('.') { format!("{name:?}") } else { (*name).to_owned() }).collect();
    quoted.join(".")
}

/// What follows where containerd does not say which image a layer is of.
const LOOKED_UP: &str = "millstreamd has to look for it in containerd's content store, without containerd.address every image is pulled as always";

/// Whether containerd says which image a layer is of.
fn labels(config: &Table, places: &Places, version: Version, name: &str, entry: &Table) -> Finding {
    let images = at(config, places.images);
    // The default on Linux keeps them back.
    let passed =
        images.and_then(|images| images.get("disable_snapshot_annotations")).and_then(Value::as_bool) == Some(false);
    if passed {
        return ok("CRI says which image a layer is of (disable_snapshot_annotations = false)".to_owned());
    }
    let place = header(places.images);
    if version < TRANSFER {
        return warning(
            format!("CRI does not say which image a layer is of: {LOOKED_UP}"),
            format!("set disable_snapshot_annotations = false in [{place}]"),
        );
    }
    let exports = entry.get("exports").and_then(Value::as_table);
    if text(exports, "enable_remote_snapshot_annotations") == Some("true") {
        return ok(
            "the transfer service says which image a layer is of (enable_remote_snapshot_annotations)".to_owned()
        );
    }
    warning(
        format!("the transfer service does not say which image a layer is of: {LOOKED_UP}"),
        format!("set enable_remote_snapshot_annotations = \"true\" in [proxy_plugins.{name}.exports]"),
    )
}

/// Whether the transfer service unpacks for it; without an entry it refuses the pull.
fn unpack(config: &Table, name: &str) -> Finding {
    let entries =
        at(config, &TRANSFER_SERVICE).and_then(|transfer| transfer.get("unpack_config")).and_then(Value::as_array);
    let snapshotters: Vec<&str> =
        entries.into_iter().flatten().filter_map(|entry| text(entry.as_table(), "snapshotter")).collect();
    let place = header(&TRANSFER_SERVICE);
    if !snapshotters.contains(&name) {
        return failed(
            format!(
                "the transfer service has no unpack_config for {name}: pulls end with \"no unpack platforms defined\""
            ),
            format!("add an entry [[{place}.unpack_config]] with snapshotter = \"{name}\""),
        );
    }
    if !snapshotters.contains(&"overlayfs") {
        return warning(
            "unpack_config has no entry for overlayfs: one entry replaces the default, so `ctr` without --snapshotter fails"
                .to_owned(),
            format!("add an entry [[{place}.unpack_config]] with snapshotter = \"overlayfs\""),
        );
    }
    ok(format!("the transfer service unpacks for {name}"))
}

/// Whether containerd and millstreamd ask the same hosts.
fn hosts(config: &Table, places: &Places, settings: &Settings) -> Finding {
    let ours = &settings.registry.hosts_dir;
    match text(at(config, places.registry), "config_path") {
        Some(theirs) if theirs.split(':').any(|theirs| Path::new(theirs) == ours) => {
            ok(format!("mirrors of {} hold for both", ours.display()))
        }
        theirs => warning(
            format!("CRI takes mirrors from {:?}, millstreamd from {}", theirs.unwrap_or(""), ours.display()),
            format!("set config_path = {ours:?} in [{}], or registry.hosts_dir to the other", header(places.registry)),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE_V2: &str = include_str!("../../../../config/containerd-v2.toml");
    const SAMPLE_V3: &str = include_str!("../../../../config/containerd-v3.toml");

    fn worst(config: &str, version: Version) -> (Verdict, String) {
        let examined = examine(&config.parse().unwrap(), Some(version), &Settings::default());
        let order = |verdict: Verdict| {
            [Verdict::Ok, Verdict::Warning, Verdict::Failed].iter().position(|other| *other == verdict)
        };
        let worst = examined.findings.into_iter().max_by_key(|finding| order(finding.verdict)).unwrap();
        (worst.verdict, worst.text)
    }

    #[test]
    fn the_samples_pass() {
        for (config, version) in [
            (SAMPLE_V2, Version(1, 6)),
            (SAMPLE_V2, Version(1, 7)),
            (SAMPLE_V3, Version(2, 1)),
            (SAMPLE_V3, Version(2, 2)),
        ] {
            assert_eq!(worst(config, version).0, Verdict::Ok, "{version:?}: {:?}", worst(config, version));
        }
    }

    #[test]
    fn each_line_of_the_samples_that_matters_is_missed() {
        for (config, version, take_out, verdict) in [
            (SAMPLE_V2, Version(1, 6), "disable_snapshot_annotations = false", Verdict::Warning),
            (SAMPLE_V2, Version(1, 6), "snapshotter = \"millstream\"", Verdict::Failed),
            (SAMPLE_V2, Version(1, 6), "address = \"/run/millstream/millstream.sock\"", Verdict::Failed),
            (SAMPLE_V2, Version(1, 6), "config_path = \"/etc/containerd/certs.d\"", Verdict::Warning),
            (SAMPLE_V3, Version(2, 1), "enable_remote_snapshot_annotations = \"true\"", Verdict::Warning),
            (SAMPLE_V3, Version(2, 1), "snapshotter = \"overlayfs\"", Verdict::Warning),
        ] {
            let at = config.lines().position(|line| line.trim() == take_out).unwrap();
            let rest = config.lines().enumerate().filter(|(number, _)| *number != at);
            let config: String = rest.flat_map(|(_, line)| [line, "\n"]).collect();
            assert_eq!(worst(&config, version).0, verdict, "without {take_out}: {:?}", worst(&config, version));
        }
    }

    #[test]
    fn what_an_older_containerd_needs_a_newer_one_may_do_without() {
        // With the labels switched on, CRI of 2.x pulls by itself; the exports are then not needed.
        let config = SAMPLE_V3
            .replace("# disable_snapshot_annotations", "disable_snapshot_annotations")
            .replace("enable_remote_snapshot_annotations = \"true\"", "");
        assert_eq!(worst(&config, Version(2, 2)).0, Verdict::Ok);
        assert_eq!(worst(SAMPLE_V3, Version(2, 0)).0, Verdict::Warning, "2.0 has no transfer for CRI");
    }

    #[test]
    fn promises_that_are_not_kept_are_found() {
        let config = SAMPLE_V2.replace("type = \"snapshot\"", "type = \"snapshot\"\ncapabilities = [\"remap-ids\"]");
        assert!(worst(&config, Version(1, 7)).1.contains("promises remap-ids"));
    }

    #[test]
    fn versions() {
        for (text, version) in
            [("v2.2.9", Some(Version(2, 2))), ("1.6.20~ds1", Some(Version(1, 6))), ("", None), ("devel", None)]
        {
            assert_eq!(Version::parse(text), version, "{text}");
        }
    }
}
