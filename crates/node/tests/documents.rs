//! What the documents promise, as far as a program can check it: links lead somewhere, and every code has its entry.

#![allow(clippy::unwrap_used, reason = "a test that panics has found something")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

/// Files below `dir` with this extension; build results and hidden directories left out.
fn files(dir: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            files(&path, extension, found);
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
}

/// Targets of the links `[text](target)` of a Markdown text, code blocks left out.
fn links(text: &str) -> Vec<&str> {
    let mut in_code = false;
    let mut targets = Vec::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code || line.starts_with("    ") {
            continue;
        }
        targets.extend(line.split("](").skip(1).filter_map(|rest| rest.split(')').next()));
    }
    targets
}

/// The heading as the anchor that Markdown viewers make of it.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    let kept = kept.chars().filter(|char| char.is_alphanumeric() || matches!(char, ' ' | '-' | '_'));
    kept.map(|char| if char == ' ' { '-' } else { char }).collect()
}

#[test]
fn relative_links_lead_somewhere() {
    let mut documents = Vec::new();
    files(&workspace(), "md", &mut documents);
    let mut checked = 0;
    for document in documents {
        let text = std::fs::read_to_string(&document).unwrap();
        for link in links(&text).into_iter().filter(|link| !link.contains("://")) {
            let (path, wanted) = link.split_once('#').map_or((link, None), |(path, anchor)| (path, Some(anchor)));
            // Links of rustdoc to items, in the README files that it includes.
            if path.contains("::") {
                continue;
            }
            let target = if path.is_empty() { document.clone() } else { document.parent().unwrap().join(path) };
            assert!(target.exists(), "{}: {link} leads nowhere", document.display());
            if let Some(wanted) = wanted {
                let text = std::fs::read_to_string(&target).unwrap();
                let headings = text.lines().filter(|line| line.starts_with('#'));
                let found = headings.map(|line| anchor(line.trim_start_matches('#'))).any(|found| found == wanted);
                assert!(found, "{}: {link} names no heading", document.display());
            }
            checked += 1;
        }
    }
    assert!(checked > 10, "only {checked} links were found: is the search broken?");
}

/// Tests that a document names as `path::function`.
fn named_tests(text: &str) -> BTreeSet<(&str, &str)> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter_map(|quoted| quoted.split_once(".rs::")).collect()
}

#[test]
fn tests_that_documents_name_exist() {
    for (document, at_least) in [("THREATS.md", 30), ("FAULTS.md", 30)] {
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(document)).unwrap();
        let tests = named_tests(&text);
        assert!(tests.len() >= at_least, "{document} names {} tests only: is the search broken?", tests.len());
        for (file, function) in tests {
            let source = workspace().join(format!("{file}.rs"));
            let source =
                std::fs::read_to_string(&source).unwrap_or_else(|error| panic!("{document}: {file}.rs: {error}"));
            let found = source.contains(&format!("fn {function}("));
            assert!(found, "{document}: {file}.rs has no {function}");
        }
    }
}

/// Where stable codes are written, beside the sources of this crate.
const WITH_CODES: [&str; 6] = [
    "crates/chunkstore/src/space.rs",
    "crates/snapshots/src/outcome.rs",
    "crates/snapshots/src/snapshots.rs",
    "crates/source/src/error.rs",
    "crates/fuse/src/adapter.rs",
    "crates/server/src/error.rs",
];
/// What stands before the dot of a code.
const FAMILIES: [&str; 10] =
    ["image", "labels", "layer", "layerfs", "node", "registry", "server", "source", "store", "view"];

/// String literals of the form `family.words-with-hyphens`.
fn codes(source: &str) -> BTreeSet<&str> {
    // Tests may use codes that do not exist.
    let product = source.split("#[cfg(test)]").next().unwrap_or_default();
    let is_code = |text: &&str| {
        text.split_once('.').is_some_and(|(family, rest)| {
            let word = |char: char| char.is_ascii_lowercase() || char == '-';
            FAMILIES.contains(&family) && !rest.is_empty() && rest.chars().all(word)
        })
    };
    product.split('"').filter(is_code).collect()
}

#[test]
fn every_code_has_its_entry_in_troubleshooting() {
    let mut sources = Vec::new();
    files(&workspace().join("crates/node/src"), "rs", &mut sources);
    sources.extend(WITH_CODES.map(|file| workspace().join(file)));
    let guide = std::fs::read_to_string(workspace().join("crates/node/TROUBLESHOOTING.md")).unwrap();
    let mut checked = BTreeSet::new();
    for source in sources {
        let text = std::fs::read_to_string(&source).unwrap();
        for code in codes(&text) {
            assert!(guide.contains(&format!("`{code}`")), "{code} of {} has no entry", source.display());
            checked.insert(code.to_owned());
        }
    }
    assert!(checked.len() > 40, "only {} codes were found: is the search broken?", checked.len());
}
