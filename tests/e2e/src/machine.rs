//! A machine of its own for a test, with the kernel of Debian 12 (6.1): the test's own program runs in it once more.
//!
//! Its root is the base system that `tests/tools/install.sh soak` makes, with containerd, runc and a registry; what a run writes
//! to it is thrown away. The programs under test are on a second disk. It has no network.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use millstream_sys::fuse_device;

use crate::daemons::{NODE, SERVER};
use crate::need::{machine_dir, product, program};
use crate::process::{Process, output};
use crate::stage::CLI;
use crate::workdir::Workdir;

/// What runs it.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// Set for programs that run in a machine.
const INSIDE: &str = "MILLSTREAM_MACHINE";
/// What the machine says last, before the exit status of the test.
const ENDED: &str = "the test in the machine has ended with ";
/// Bytes of the second disk; what is not used takes no room.
const DISK: u64 = 16 << 30;
/// Memory, in mebibytes.
const MEMORY: &str = "3072";
/// `FUSE_INIT_EXT` in linux/fuse.h: there are further flags.
const INIT_EXT: u32 = 1 << 30;
/// `FUSE_HAS_RESEND` among them.
const HAS_RESEND: u32 = 1 << 7;

/// The machine's first program, which the base system starts. Everything that the test says goes to the second serial line.
const SCRIPT: &str = r#"#!/bin/sh
exec >/dev/ttyS1 2>&1
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t tmpfs run /run
mount -t cgroup2 cgroup /sys/fs/cgroup
modprobe -a fuse overlay loop
ip link set lo up
mkdir /machine/tests
cd /machine
status=0
MILLSTREAM_MACHINE=1 MILLSTREAM_REQUIRE_ALL=1 MILLSTREAM_BIN_DIR=/machine MILLSTREAM_E2E_DIR=/machine/tests \
    RUST_BACKTRACE=1 ./test --exact "$(cat name)" --ignored --nocapture || status=$?
[ $status = 0 ] || tail -n 50 /machine/tests/failed/*/*.log
echo "the test in the machine has ended with $status"
sync
busybox poweroff -f
"#;

/// Whether this process runs in a machine.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Starts a machine that runs the test `name` of the calling program, and returns what that printed.
///
/// # Errors
///
/// If the machine cannot be made, does not end within `deadline`, or the test fails in it; with the end of what it said.
pub fn run(name: &str, deadline: Duration) -> Result<String> {
    let workdir = Workdir::new()?;
    let disk = programs(&workdir, name)?;
    let (console, said) = (workdir.log("console"), workdir.log("said"));
    let base = machine_dir();
    let mut command = Command::new(program(PROGRAM).context("no qemu")?);
    // KVM is not asked for: some machines have it and cannot run this kernel with it.
    command.args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", MEMORY]);
    command.args(["-nodefaults", "-display", "none", "-no-reboot"]);
    command.arg("-kernel").arg(base.join("vmlinuz")).arg("-initrd").arg(base.join("initrd.img"));
    command.args(["-append", "console=ttyS0 root=/dev/vda rw init=/sbin/millstream-machine panic=-1"]);
    command.arg("-drive").arg(format!("if=virtio,format=raw,snapshot=on,file={}", base.join("root.ext4").display()));
    command.arg("-drive").arg(format!("if=virtio,format=raw,cache=unsafe,file={}", disk.display()));
    for line in [&console, &said] {
        command.arg("-serial").arg(format!("file:{}", line.display()));
    }
    // What is written to the root goes there.
    command.env("TMPDIR", workdir.path());
    let mut machine = Process::spawn("qemu", command, &workdir.log("qemu"))?;
    let ended = machine.wait(deadline)?;
    let text = String::from_utf8_lossy(&std::fs::read(&said).unwrap_or_default()).replace('\r', "");
    let said = || format!("it said:\n{text}\nand its kernel:\n{}", crate::process::tail(&console, 20));
    let status = ended.with_context(|| format!("the machine does not end within {deadline:?}; {}", said()))?;
    ensure!(status.success(), "qemu ended with {status}:\n{}", machine.log_tail());
    let well = text.lines().last() == Some(&format!("{ENDED}0"));
    ensure!(well, "the test in the machine failed; {}", said());
    Ok(text)
}

/// A file system with the programs under test, this one, and the script that starts it.
fn programs(workdir: &Workdir, name: &str) -> Result<PathBuf> {
    let dir = workdir.dir("programs")?;
    for name in [NODE, SERVER, CLI] {
        let program = product(name).with_context(|| format!("{name} is not built"))?;
        std::fs::copy(&program, dir.join(name)).with_context(|| format!("copying {}", program.display()))?;
    }
    std::fs::copy(std::env::current_exe()?, dir.join("test")).context("copying the test")?;
    std::fs::write(dir.join("name"), name)?;
    std::fs::write(dir.join("run"), SCRIPT)?;
    std::fs::set_permissions(dir.join("run"), std::fs::Permissions::from_mode(0o755))?;
    let disk = workdir.path().join("programs.ext4");
    std::fs::File::create(&disk)?.set_len(DISK)?;
    output(Command::new(program("mkfs.ext4").context("no mkfs.ext4")?).args(["-q", "-F", "-d"]).arg(&dir).arg(&disk))?;
    Ok(disk)
}

/// Release of the kernel that this process runs on.
pub fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Whether this kernel says that it sends requests again when it is asked to; `directory` is empty, and is so afterwards.
///
/// # Errors
///
/// If nothing can be mounted.
pub fn sends_again(directory: &Path) -> Result<bool> {
    let mounted = fuse_device::mount("millstream-test", directory, 1 << 20)?;
    fuse_device::unmount(directory)?;
    // struct fuse_in_header (40 bytes), then major, minor, max_readahead, flags, flags2 of struct fuse_init_in.
    let word = |at: usize| mounted.init.get(at..at + 4).and_then(|word| word.try_into().ok()).map(u32::from_le_bytes);
    let flags = word(52).context("an INIT request without flags")?;
    Ok(flags & INIT_EXT != 0 && word(56).unwrap_or_default() & HAS_RESEND != 0)
}
