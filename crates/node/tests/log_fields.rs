//! One thing is logged under one name: the fields of every call of `tracing` are in `millstream_source::names`.

#![allow(clippy::unwrap_used, reason = "a test that panics has found something")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use millstream_source::names::FIELDS;

const MACROS: [&str; 10] = [
    "trace!(",
    "debug!(",
    "info!(",
    "warn!(",
    "error!(",
    "trace_span!(",
    "debug_span!(",
    "info_span!(",
    "warn_span!(",
    "error_span!(",
];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The arguments of a call whose opening parenthesis `text` stands behind, separated at commas that are not within anything.
fn arguments(text: &str) -> Vec<String> {
    let (mut depth, mut in_text, mut escaped) = (0, false, false);
    let mut all = vec![String::new()];
    for char in text.chars() {
        match char {
            _ if escaped => escaped = false,
            '\\' if in_text => escaped = true,
            '"' => in_text = !in_text,
            _ if in_text => {}
            ')' if depth == 0 => return all,
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            ',' if depth == 0 => {
                all.push(String::new());
                continue;
            }
            _ => {}
        }
        all.last_mut().unwrap().push(char);
    }
    all
}

/// The name of a field, unless the argument is something else. A constant gives its own name in lower case, which is how the
/// constants of `names` are made.
fn field(argument: &str) -> Option<String> {
    let argument = argument.trim().trim_start_matches(['%', '?']);
    let (name, has_value) = argument.split_once(" = ").map_or((argument, false), |(name, _)| (name, true));
    if let Some(constant) = name.strip_prefix('{').and_then(|name| name.strip_suffix('}')) {
        return constant.trim().rsplit("::").next().map(str::to_lowercase);
    }
    let is_name =
        |name: &str| !name.is_empty() && name.chars().all(|char| char.is_ascii_lowercase() || "_".contains(char));
    (has_value || is_name(name)).then(|| name.to_owned())
}

#[test]
fn every_field_has_its_name_from_the_list() {
    let known: BTreeSet<&str> = FIELDS.iter().map(|(name, _)| *name).collect();
    assert_eq!(known.len(), FIELDS.len(), "a name stands twice in the list");
    let mut files = Vec::new();
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()).unwrap() {
        let sources_dir = entry.unwrap().path().join("src");
        if sources_dir.is_dir() {
            sources(&sources_dir, &mut files);
        }
    }
    let (mut calls, mut used) = (0, BTreeSet::new());
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let product = text.split("#[cfg(test)]").next().unwrap();
        for name in MACROS {
            for (at, _) in product.match_indices(name) {
                // Neither the end of another name nor in a comment.
                let line = product[..at].rsplit('\n').next().unwrap();
                if line.ends_with(|char: char| char.is_alphanumeric() || char == '_') || line.contains("//") {
                    continue;
                }
                calls += 1;
                let mut arguments = arguments(&product[at + name.len()..]);
                if name.contains("span") {
                    // Its first argument is the span's own name.
                    arguments.remove(0);
                }
                for field in
                    arguments.iter().take_while(|one| !one.trim().starts_with('"')).filter_map(|one| field(one))
                {
                    assert!(
                        known.contains(field.as_str()),
                        "{}: {line}… logs {field}, which is not in names.rs",
                        file.display()
                    );
                    used.insert(field);
                }
            }
        }
    }
    assert!(calls > 80, "only {calls} calls were found: is the search broken?");
    // Of what others add meanwhile, at least the usual is used.
    assert!(used.len() > 30, "only {} names are used: {used:?}", used.len());
}

#[test]
fn the_search_reads_calls_as_the_compiler_does() {
    let call =
        r#"{ names::LAYER } = %layer, size = f(1, 2), ?priority, error = format!("{a}, {b}"), "text, {c}", more"#;
    let arguments = arguments(&format!("{call}) and more"));
    let fields: Vec<String> =
        arguments.iter().take_while(|one| !one.trim().starts_with('"')).filter_map(|one| field(one)).collect();
    assert_eq!(fields, ["layer", "size", "priority", "error"]);
}
