//! What a table of metrics in a document must say: one row for each exported metric.

use std::collections::BTreeMap;

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

/// Name (of the samples, without `_bucket`, `_sum` and `_count`) to kind and help of every metric that `registry` exports now.
#[must_use]
pub fn exported(registry: &Registry) -> BTreeMap<String, (String, String)> {
    let mut page = String::new();
    if encode(&mut page, registry).is_err() {
        return BTreeMap::new();
    }
    let mut found: BTreeMap<String, (String, String)> = BTreeMap::new();
    for line in page.lines() {
        let mut words = line.splitn(4, ' ');
        if let (Some("#"), Some(what), Some(name), Some(text)) =
            (words.next(), words.next(), words.next(), words.next())
        {
            let entry = found.entry(name.to_owned()).or_default();
            match what {
                "TYPE" => text.clone_into(&mut entry.0),
                "HELP" => text.clone_into(&mut entry.1),
                _ => {}
            }
        }
    }
    // The samples of a counter have this ending, and its description has not.
    let sample = |(name, described): (String, (String, String))| match described.0.as_str() {
        "counter" => (format!("{name}_total"), described),
        _ => (name, described),
    };
    found.into_iter().map(sample).collect()
}

/// The same of the rows `` | `name` | kind | labels | help | `` of a Markdown text.
#[must_use]
pub fn documented(text: &str) -> BTreeMap<String, (String, String)> {
    let row = |line: &str| {
        let cells: Vec<&str> = line.trim().trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, _labels, help] = cells.as_slice() else { return None };
        let name = name.strip_prefix('`')?.strip_suffix('`')?;
        Some((name.to_owned(), ((*kind).to_owned(), (*help).to_owned())))
    };
    text.lines().filter_map(row).collect()
}
