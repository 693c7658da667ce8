//! containerd's configuration as containerd itself reads it: the main file, and over it, key by key, the files that it imports.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

/// Files that are read at most.
const MAX_FILES: usize = 64;

/// What all files say together, and which they are.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    pub(super) config: Table,
    pub(super) files: Vec<PathBuf>,
}

impl Loaded {
    /// Reads `main` and what it imports.
    ///
    /// # Errors
    /// Which file cannot be read, or is not TOML.
    pub(super) fn read(main: &Path) -> Result<Self, String> {
        let mut loaded = Self::default();
        let mut seen = HashSet::new();
        let mut waiting = vec![main.to_owned()];
        while let Some(path) = waiting.pop() {
            if !seen.insert(path.clone()) || seen.len() > MAX_FILES {
                continue;
            }
            let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            let table: Table = text.parse().map_err(|error| format!("{} is not TOML: {error}", path.display()))?;
            let imports = table.get("imports").and_then(Value::as_array).into_iter().flatten();
            for pattern in imports.filter_map(Value::as_str) {
                waiting.extend(matching(&path, pattern));
            }
            merge(&mut loaded.config, table);
            loaded.files.push(path);
        }
        Ok(loaded)
    }

    /// For messages.
    pub(super) fn names(&self) -> String {
        let names: Vec<String> = self.files.iter().map(|path| path.display().to_string()).collect();
        names.join(", ")
    }
}

/// Files that a pattern of `imports` names, the last first. A relative one starts at the file that imports; of wildcards, `*` in
/// the last component is understood, which is what people write.
fn matching(importing: &Path, pattern: &str) -> Vec<PathBuf> {
    let pattern = importing.parent().unwrap_or(Path::new("/")).join(pattern);
    let name = pattern.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let Some((begin, end)) = name.split_once('*') else { return vec![pattern] };
    let entries = pattern.parent().and_then(|dir| fs::read_dir(dir).ok()).into_iter().flatten().flatten();
    let matches = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.len() >= begin.len() + end.len() && name.starts_with(begin) && name.ends_with(end)
    };
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(matches).collect();
    found.sort_unstable_by(|one, other| other.cmp(one));
    found
}

/// Lays `from` over `to`: tables key by key, anything else replaces.
fn merge(to: &mut Table, from: Table) {
    for (key, value) in from {
        match (to.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => merge(below, above),
            (_, value) => drop(to.insert(key, value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imported_files_lie_over_the_main_one_key_by_key() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        fs::create_dir(dir.path().join("conf.d")).unwrap();
        write(
            "config.toml",
            "version = 3\nimports = [\"conf.d/*.toml\", \"config.toml\"]\n[a.b]\nkept = 1\nreplaced = 1\n",
        );
        write("conf.d/10-one.toml", "version = 3\n[a.b]\nreplaced = 2\n");
        write("conf.d/20-two.toml", "[a.b]\nreplaced = 3\nadded = 1\n");
        write("conf.d/other.conf", "not TOML");
        let loaded = Loaded::read(&dir.path().join("config.toml")).unwrap();
        let expected: Table = "kept = 1\nreplaced = 3\nadded = 1\n".parse().unwrap();
        assert_eq!(loaded.config["a"]["b"].as_table().unwrap(), &expected);
        assert_eq!(loaded.files.len(), 3, "{}", loaded.names());
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("config.toml");
        fs::write(&main, "imports = [\"/nowhere/else.toml\"]").unwrap();
        assert!(Loaded::read(&main).unwrap_err().contains("/nowhere/else.toml"));
        fs::write(&main, "version = ").unwrap();
        assert!(Loaded::read(&main).unwrap_err().contains("is not TOML"));
    }
}
