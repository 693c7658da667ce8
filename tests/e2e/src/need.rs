//! What a test needs of the machine, and what happens when it is missing.
//!
//! A missing program is not a passed test. It is said aloud (`skipped: <need>`), and it is a failure where the
//! environment variable [`REQUIRE_ALL`] is `1`, as in CI.

use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Set to `1`: a missing need fails the test instead of skipping it.
pub const REQUIRE_ALL: &str = "MILLSTREAM_REQUIRE_ALL";

/// The version of containerd 2.x that `tests/tools/install.sh` builds.
pub const CONTAINERD_2: &str = "2.2.9";
/// The other releases of containerd, which `tests/tools/install.sh clients` builds: the last of 1.7, of the first line of
/// 2.x, which has no labels in its transfer service, and the newest.
pub const CONTAINERDS: [&str; 3] = ["1.7.35", "2.0.14", "2.4.2"];

/// One thing outside of this repository that a test cannot do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The right to mount, to make network namespaces and to start containers.
    Root,
    /// A program of this name on the search path.
    Program(&'static str),
    /// containerd 2.x with its `ctr` and shim, as `tests/tools/install.sh` builds it.
    Containerd2,
    /// One of [`CONTAINERDS`], as `tests/tools/install.sh clients` builds it.
    Containerd(&'static str),
    /// containerd's own suite for snapshotters, as `tests/tools/install.sh` builds it.
    Conformance,
    /// A base system with the kernel of Debian 12, as `tests/tools/install.sh soak` makes it.
    Machine,
    /// Control groups that limit memory, of version 1 or delegated ones of version 2.
    MemoryGroups,
    /// A program of this project, built in the same profile as the test.
    Product(&'static str),
}

impl Need {
    /// Whether it is there.
    pub fn is_met(self) -> bool {
        match self {
            Self::Root => rustix::process::geteuid().is_root(),
            Self::Program(name) => program(name).is_some(),
            Self::Containerd2 => Self::Containerd(CONTAINERD_2).is_met(),
            Self::Containerd(release) => containerd_dir(release).join("containerd").is_file(),
            Self::Conformance => conformance_suite().is_file(),
            Self::Machine => machine_dir().join("vmlinuz").is_file(),
            Self::MemoryGroups => crate::memory::hierarchy().is_some(),
            Self::Product(name) => product(name).is_some(),
        }
    }

    fn name(self) -> String {
        match self {
            Self::Root => "root privileges".to_owned(),
            Self::Program(name) => format!("program {name}"),
            Self::Containerd2 => format!("containerd {CONTAINERD_2} (tests/tools/install.sh)"),
            Self::Containerd(release) => format!("containerd {release} (tests/tools/install.sh clients)"),
            Self::Conformance => "containerd's suite for snapshotters (tests/tools/install.sh)".to_owned(),
            Self::Machine => "a machine with the kernel of Debian 12 (tests/tools/install.sh soak)".to_owned(),
            Self::MemoryGroups => "control groups that limit memory".to_owned(),
            Self::Product(name) => format!("{name} (cargo build --bin {name})"),
        }
    }
}

/// Whether every need is met. Otherwise says which is not; the caller returns early.
///
/// # Panics
///
/// If a need is missing and [`REQUIRE_ALL`] is `1`.
#[must_use]
pub fn met(needs: &[Need]) -> bool {
    let Some(missing) = needs.iter().find(|need| !need.is_met()) else {
        return true;
    };
    let required = std::env::var(REQUIRE_ALL).is_ok_and(|value| value == "1");
    assert!(!required, "{REQUIRE_ALL}=1 and missing: {}", missing.name());
    // Written directly, past the capture of the test runner, so that a skipped test can be seen and counted.
    writeln!(std::io::stderr(), "skipped: {}", missing.name()).ok();
    false
}

/// The programs that every test with a container needs.
pub const CONTAINERS: &[Need] = &[
    Need::Root,
    Need::Program("containerd"),
    Need::Program("runc"),
    Need::Program("docker-registry"),
    Need::Program("skopeo"),
    Need::Program("busybox"),
];

/// The place of a program: first on the search path, then where administration programs lie.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// `target/<profile>` of the build that this process belongs to.
pub fn profile_dir() -> Option<PathBuf> {
    let exe = std::env::current_exe().ok()?;
    let dir = exe.parent()?;
    // Test binaries lie in `deps`, others directly in the profile's directory.
    let dir = if dir.ends_with("deps") { dir.parent()? } else { dir };
    Some(dir.to_owned())
}

/// A program of this project: `MILLSTREAM_BIN_DIR` if set, else the profile of this process.
pub fn product(name: &str) -> Option<PathBuf> {
    let dir = std::env::var_os("MILLSTREAM_BIN_DIR").map(PathBuf::from).or_else(profile_dir)?;
    Some(dir.join(name)).filter(|file| file.is_file())
}

/// Where `tests/tools/install.sh` puts the programs of this release of containerd.
pub fn containerd_dir(release: &str) -> PathBuf {
    tools().join(format!("containerd-{release}/bin"))
}

/// A program that `tests/tools/install.sh bench` makes of `tests/bench/peers`.
pub fn bench_tool(name: &str) -> Option<PathBuf> {
    Some(tools().join("bench").join(name)).filter(|file| file.is_file())
}

/// The program that `tests/tools/install.sh` makes of `tests/conformance`.
pub fn conformance_suite() -> PathBuf {
    tools().join("conformance.test")
}

/// Where `tests/tools/install.sh soak` puts root, kernel and initial file system of [`crate::machine`].
pub fn machine_dir() -> PathBuf {
    tools().join("machine")
}

fn tools() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    std::env::var_os("MILLSTREAM_TOOLS").map_or_else(|| root.join("target/tools"), PathBuf::from)
}
