//! From text to checked settings.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use toml::de::{DeTable, DeValue};

use crate::SettingsError;

/// One settings file.
pub trait Schema: DeserializeOwned + Serialize + Default {
    /// The commented sample: every key with its meaning and default.
    const SAMPLE: &'static str;

    /// The defaults with every optional table present, so that all keys are seen. The values of such tables mean nothing.
    #[must_use]
    fn complete() -> Self;

    /// Whether these values can work, as far as can be told without looking at the machine.
    ///
    /// # Errors
    /// [`SettingsError::Value`] for the first that cannot.
    fn check(&self) -> Result<(), SettingsError>;
}

/// Reads and checks a file.
///
/// # Errors
/// When it cannot be read, is not TOML, has an unknown key, or a value that cannot work; the text says what to do.
pub fn read<T: Schema>(path: &Path) -> Result<T, SettingsError> {
    let text = std::fs::read_to_string(path).map_err(|source| SettingsError::Read { path: path.to_owned(), source })?;
    parse(&text).map_err(|error| SettingsError::File { path: path.to_owned(), source: Box::new(error) })
}

/// Parses and checks the text of a settings file.
///
/// # Errors
/// As [`read`].
pub fn parse<T: Schema>(text: &str) -> Result<T, SettingsError> {
    let document = DeTable::parse(text)?;
    let mut written = Vec::new();
    list(document.get_ref(), "", &mut written);
    let known = keys::<T>();
    let mut unknown: Vec<&(String, usize)> = written.iter().filter(|(key, _)| !is_known(key, &known)).collect();
    unknown.sort_by_key(|(_, offset)| *offset);
    if let Some((key, offset)) = unknown.first() {
        let nearest = nearest(key, &known).map(ToOwned::to_owned);
        return Err(SettingsError::UnknownKey { key: key.clone(), line: line(text, *offset), nearest });
    }
    let settings: T = toml::from_str(text)?;
    settings.check().map_err(|error| match error {
        SettingsError::Value { key, reason, .. } => {
            let found = written.iter().find(|(written, _)| written == key);
            SettingsError::Value { key, line: found.map(|(_, offset)| line(text, *offset)), reason }
        }
        other => other,
    })?;
    Ok(settings)
}

/// Every key that exists, with its tables (`fetch.connections`), and the tables themselves.
pub(crate) fn keys<T: Schema>() -> BTreeSet<String> {
    let mut keys = BTreeSet::new();
    // Plain data always has a JSON form; were it otherwise, the tests of the samples would find no key.
    collect(&serde_json::to_value(T::complete()).unwrap_or_default(), "", &mut keys);
    keys
}

fn collect(value: &Value, table: &str, keys: &mut BTreeSet<String>) {
    for (name, value) in value.as_object().into_iter().flatten() {
        let key = join(table, name);
        collect(value, &key, keys);
        keys.insert(key);
    }
}

fn join(table: &str, name: &str) -> String {
    if table.is_empty() { name.to_owned() } else { format!("{table}.{name}") }
}

/// All keys of a document, each with its offset in the text.
fn list(table: &DeTable<'_>, name: &str, written: &mut Vec<(String, usize)>) {
    for (key, value) in table {
        let full = join(name, key.get_ref());
        if let DeValue::Table(inner) = value.get_ref() {
            list(inner, &full, written);
        }
        written.push((full, key.span().start));
    }
}

/// Known, or below a key that is not a table: then its type is wrong, which the parser says better.
fn is_known(key: &str, known: &BTreeSet<String>) -> bool {
    let is_table =
        |name: &str| known.iter().any(|key| key.strip_prefix(name).is_some_and(|rest| rest.starts_with('.')));
    let inside_a_value =
        key.match_indices('.').map(|(dot, _)| &key[..dot]).any(|above| known.contains(above) && !is_table(above));
    known.contains(key) || inside_a_value
}

/// The key that was probably meant: the same name in another table, or a name that differs little.
fn nearest<'k>(key: &str, known: &'k BTreeSet<String>) -> Option<&'k str> {
    let name = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    if let Some(moved) = known.iter().find(|known| name(known) == name(key)) {
        return Some(moved);
    }
    let distance = |known: &str| strsim::damerau_levenshtein(key, known);
    let (found, distance) = known.iter().map(|known| (known, distance(known))).min_by_key(|(_, distance)| *distance)?;
    // A third of the letters wrong is no slip of the fingers.
    (distance * 3 <= key.chars().count()).then_some(found.as_str())
}

/// Counted from 1.
fn line(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}
