//! What is wrong with a settings file.

use std::path::PathBuf;

/// Why settings are refused. The text is for a person and says where to look and what to write.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// The file cannot be read.
    #[error("reading settings {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Something is wrong in a file.
    #[error("in settings {path}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What is wrong in it.
        source: Box<SettingsError>,
    },
    /// Not TOML, or a value of the wrong type. The text shows line and column.
    #[error(transparent)]
    Toml(#[from] toml::de::Error),
    /// A key that does not exist.
    #[error("unknown key `{key}` in line {line}{}", did_you_mean(nearest.as_ref()))]
    UnknownKey {
        /// With its tables: `fetch.conections`.
        key: String,
        /// Counted from 1.
        line: usize,
        /// The key that was probably meant.
        nearest: Option<String>,
    },
    /// A value that cannot work.
    #[error("{key}{}: {reason}", in_line(*line))]
    Value {
        /// The key, with its tables; of several that contradict each other, the first.
        key: &'static str,
        /// Counted from 1; absent when the value is a default.
        line: Option<usize>,
        /// Why it cannot work, and what can.
        reason: String,
    },
}

impl SettingsError {
    /// A value that cannot work; the line is filled in by [`crate::parse`].
    #[must_use]
    pub(crate) fn value(key: &'static str, reason: impl Into<String>) -> Self {
        Self::Value { key, line: None, reason: reason.into() }
    }
}

fn did_you_mean(nearest: Option<&String>) -> String {
    nearest.map_or_else(String::new, |nearest| format!("; did you mean `{nearest}`?"))
}

fn in_line(line: Option<usize>) -> String {
    line.map_or_else(String::new, |line| format!(" in line {line}"))
}
