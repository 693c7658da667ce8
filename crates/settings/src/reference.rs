//! What each key means, read from the commented samples: they are the one place where it is written down.
//!
//! In a sample, the comment above a key explains it, and the keys that follow without a comment of their own. A key that is
//! absent by default is commented out, with an example as its value.

use crate::Schema;

/// One key of a settings file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// With its tables: `fetch.connections`.
    pub name: String,
    /// What may stand there.
    pub kind: Kind,
    /// The default as TOML, or, with [`Key::absent`], an example.
    pub value: String,
    /// Whether the key is absent by default.
    pub absent: bool,
    /// What it does.
    pub meaning: String,
}

/// What may stand as a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `true` or `false`.
    Boolean,
    /// A whole number.
    Number,
    /// `"30s"`.
    Duration,
    /// `"64MiB"`.
    Size,
    /// A file or directory.
    Path,
    /// Any other text.
    Text,
    /// `["a", "b"]`.
    List,
}

impl Kind {
    /// For people.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Boolean => "true or false",
            Self::Number => "whole number",
            Self::Duration => "duration",
            Self::Size => "size",
            Self::Path => "path",
            Self::Text => "text",
            Self::List => "list of texts",
        }
    }

    /// Told by a value: the samples have no other hint, and need none.
    fn of(value: &str) -> Self {
        let text = value.trim_matches('"');
        match value {
            "true" | "false" => Self::Boolean,
            _ if value.starts_with('[') => Self::List,
            _ if !value.starts_with('"') => Self::Number,
            _ if text.starts_with('/') => Self::Path,
            _ if crate::amount::size::parse(text).is_some() => Self::Size,
            _ if humantime::parse_duration(text).is_ok() => Self::Duration,
            _ => Self::Text,
        }
    }
}

/// Every key of `T`, in the order of its sample.
#[must_use]
pub fn keys<T: Schema>() -> Vec<Key> {
    let (mut keys, mut table, mut meaning, mut after_key) = (Vec::new(), String::new(), Vec::new(), false);
    for line in T::SAMPLE.lines() {
        match Line::of(line) {
            Line::Blank => meaning.clear(),
            Line::Comment(text) => {
                if after_key {
                    meaning.clear();
                }
                meaning.push(text);
            }
            Line::Table(name) => table = format!("{name}."),
            Line::Value { name, value, absent } => keys.push(Key {
                name: format!("{table}{name}"),
                kind: Kind::of(value),
                value: value.to_owned(),
                absent,
                meaning: meaning.join(" "),
            }),
        }
        after_key = matches!(Line::of(line), Line::Value { .. });
    }
    keys
}

enum Line<'s> {
    Blank,
    Comment(&'s str),
    Table(&'s str),
    Value { name: &'s str, value: &'s str, absent: bool },
}

impl<'s> Line<'s> {
    fn of(line: &'s str) -> Self {
        let commented = line.strip_prefix('#').map(str::trim_start);
        let content = commented.unwrap_or(line);
        if let Some(table) = content.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            return Self::Table(table);
        }
        let is_name = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c == '_');
        match (content.split_once(" = "), commented) {
            (Some((name, value)), _) if is_name(name) => Self::Value { name, value, absent: commented.is_some() },
            (_, Some(text)) => Self::Comment(text),
            _ => Self::Blank,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fmt::Debug;

    use super::*;
    use crate::schema;

    /// The sample with everything that is commented out put in.
    fn uncommented<T: Schema>() -> String {
        let line = |line: &str| match Line::of(line) {
            Line::Table(name) => format!("[{name}]\n"),
            Line::Value { name, value, .. } => format!("{name} = {value}\n"),
            Line::Blank | Line::Comment(_) => "\n".to_owned(),
        };
        T::SAMPLE.lines().map(line).collect()
    }

    fn sample_and_schema_agree<T: Schema + PartialEq + Debug>() {
        assert_eq!(
            crate::parse::<T>(T::SAMPLE).unwrap(),
            T::default(),
            "the sample shows other values than the defaults"
        );
        crate::parse::<T>(&uncommented::<T>()).unwrap();
        let documented: BTreeSet<String> = keys::<T>().into_iter().map(|key| key.name).collect();
        let all = schema::keys::<T>();
        let is_table = |key: &String| all.iter().any(|other| other.starts_with(&format!("{key}.")));
        let known: BTreeSet<String> = all.iter().filter(|key| !is_table(key)).cloned().collect();
        assert_eq!(documented, known, "left: the sample, right: the types");
        for key in keys::<T>() {
            assert!(key.meaning.len() > 10, "{} is not explained in the sample", key.name);
        }
    }

    #[test]
    fn samples_and_schemas_agree() {
        sample_and_schema_agree::<crate::node::Settings>();
        sample_and_schema_agree::<crate::server::Settings>();
    }

    #[test]
    fn a_key_is_explained_by_the_comment_above_it() {
        let keys = keys::<crate::server::Settings>();
        let key = |name: &str| keys.iter().find(|key| key.name == name).unwrap();
        let cert = key("tls.cert");
        assert!(
            cert.absent && cert.kind == Kind::Path && cert.meaning == "Certificate and key, as PEM files.",
            "{cert:?}"
        );
        let hosts = key("registry.hosts_dir");
        assert!(hosts.absent && hosts.meaning.starts_with("A directory of HOST/hosts.toml files"), "{hosts:?}");
        assert_eq!(key("limits.requests_per_peer").meaning, key("limits.requests").meaning);
        for (name, kind) in [
            ("listen", Kind::Text),
            ("store", Kind::Path),
            ("registry.allowed", Kind::List),
            ("registry.private", Kind::List),
            ("import.on_demand", Kind::Boolean),
            ("import.deadline", Kind::Duration),
            ("cache.tocs", Kind::Size),
            ("limits.requests", Kind::Number),
        ] {
            assert_eq!(key(name).kind, kind, "{name}");
        }
    }
}
