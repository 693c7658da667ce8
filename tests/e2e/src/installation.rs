//! An installation by the book: files at the places that `config/` names, in a mount namespace of their own.
//!
//! Programs that are started in it find directories of the run at `/run`, `/var/lib` and, over the machine's own files, at
//! `/etc`. The rest of the machine is as it is, and the machine itself sees nothing of it. It has no process of its own; a
//! mount of the namespace keeps it until the workdir is swept.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::need;
use crate::process::output;
use crate::workdir::Workdir;

/// What happens inside, before anything is started there; `$1` is the installation's directory.
const FURNISH: &str = r#"set -e
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$1/etc,workdir=$1/etc.work" /etc
mount --bind "$1/run" /run
mount --bind "$1/var/lib" /var/lib"#;

/// Stands before runc. A machine may forbid that a process be spared when memory is short, as CRI wants it for pods; the setting
/// that says so to CRI would be in a table that the files under test fill.
const RUNC: &str = r#"#!/bin/sh
before=
for word; do
    [ "$before" != --bundle ] || sed -i 's/"oomScoreAdj":-[0-9]*/"oomScoreAdj":0/' "$word/config.json"
    before=$word
done
exec "$MILLSTREAM_E2E_RUNC" "$@"
"#;

/// A furnished namespace.
#[derive(Debug, Clone)]
pub struct Installation {
    dir: PathBuf,
}

impl Installation {
    /// Makes one; one in a workdir.
    ///
    /// # Errors
    ///
    /// If the kernel or a program refuses.
    pub fn new(work: &Workdir) -> Result<Self> {
        let this = Self { dir: work.dir("installation")? };
        for name in ["etc", "etc.work", "run", "var/lib", "namespace"] {
            let dir = this.dir.join(name);
            std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        }
        let runc = this.dir.join("bin/runc");
        std::fs::create_dir_all(this.dir.join("bin"))?;
        std::fs::write(&runc, RUNC)?;
        std::fs::set_permissions(&runc, PermissionsExt::from_mode(0o755))?;
        // The kernel lets a namespace be mounted only where mounts are not passed on.
        let (file, dir) = (this.namespace(), this.dir.join("namespace"));
        output(Command::new("mount").arg("--bind").args([&dir, &dir]))?;
        output(Command::new("mount").arg("--make-private").arg(&dir))?;
        File::create(&file)?;
        let mut unshare = Command::new("unshare");
        unshare.arg(format!("--mount={}", file.display()));
        output(unshare.args(["sh", "-c", FURNISH, "furnish"]).arg(&this.dir))?;
        Ok(this)
    }

    fn namespace(&self) -> PathBuf {
        self.dir.join("namespace/mount")
    }

    /// A command that will run inside.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount={}", self.namespace().display())).arg("--").arg(program);
        command.envs(need::program("runc").map(|runc| ("MILLSTREAM_E2E_RUNC", runc)));
        command
    }

    /// Directory of programs that stand before the machine's own on the search path.
    pub fn programs(&self) -> PathBuf {
        self.dir.join("bin")
    }

    /// What programs inside see at `path`, which is below `/etc`, `/run` or `/var/lib`. Below `/etc` write only before anybody
    /// inside has looked: it is the upper directory of an overlay.
    pub fn at(&self, path: &str) -> PathBuf {
        self.dir.join(path.trim_start_matches('/'))
    }

    /// Puts a file at `path`, for programs inside.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn put(&self, path: &str, content: &str) -> Result<()> {
        let file = self.at(path);
        if let Some(dir) = file.parent() {
            std::fs::create_dir_all(dir)?;
        }
        std::fs::write(&file, content).with_context(|| format!("writing {}", file.display()))
    }
}
