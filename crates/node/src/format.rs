//! The version of what is on the disk, so that a program does not take the state of a newer one for its own.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, bail};
use tracing::warn;

/// Version of the state below `root`. To be raised by a change that the program before it would read wrongly; what only adds
/// to the state, and is passed over by an older program, does not need it.
pub const FORMAT: u32 = 1;
/// Where it is written.
const FILE: &str = "format";

/// Whether this program can work with the state below `root`.
///
/// # Errors
/// When a newer program has written it, or it cannot be read.
pub fn check(root: &Path) -> anyhow::Result<()> {
    let path = root.join(FILE);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        // Of a program that did not write it yet, or nothing is there.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
    };
    // Damage keeps nobody from starting: the database says its format as well.
    let Ok(found) = text.trim().parse::<u32>() else {
        warn!(file = %path.display(), "no number: the format of the state is written again");
        return Ok(());
    };
    if found > FORMAT {
        bail!(
            "the state in {} has format {found}, written by a newer millstreamd; this one ({}) knows formats up to {FORMAT}; \
             hint: use that version or a newer one, or give this one another root",
            root.display(),
            env!("CARGO_PKG_VERSION")
        );
    }
    Ok(())
}

/// Writes it down, once the state has this format.
///
/// # Errors
/// Those of the disk.
pub fn note(root: &Path) -> anyhow::Result<()> {
    let (path, new) = (root.join(FILE), root.join("format.new"));
    let text = format!("{FORMAT}\n");
    if fs::read_to_string(&path).is_ok_and(|found| found == text) {
        return Ok(());
    }
    let write = || -> io::Result<()> {
        let mut file = fs::File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        fs::File::open(root)?.sync_all()
    };
    write().with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_of_a_newer_program_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        check(root.path()).unwrap();
        note(root.path()).unwrap();
        note(root.path()).unwrap();
        check(root.path()).unwrap();
        fs::write(root.path().join(FILE), format!("{}\n", FORMAT + 1)).unwrap();
        assert!(check(root.path()).unwrap_err().to_string().contains("newer millstreamd"));
        fs::write(root.path().join(FILE), "").unwrap();
        check(root.path()).unwrap();
        note(root.path()).unwrap();
        assert_eq!(fs::read_to_string(root.path().join(FILE)).unwrap(), "1\n");
    }
}
