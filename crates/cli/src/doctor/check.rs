//! One thing that was looked at.

use std::fmt::Display;

use serde_json::{Value, json};

/// What a check came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing to do.
    Ok,
    /// Something works less well than it could, or could not be looked at.
    Warning,
    /// Images cannot be lazy on this node.
    Failed,
}

impl Verdict {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
        }
    }
}

/// What was looked at, what was found, what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Check {
    name: &'static str,
    looked_at: String,
    pub(crate) verdict: Verdict,
    pub(crate) found: String,
    hint: Option<String>,
}

impl Check {
    pub(crate) fn new(name: &'static str, looked_at: impl Display, verdict: Verdict, found: impl Into<String>) -> Self {
        Self { name, looked_at: looked_at.to_string(), verdict, found: found.into(), hint: None }
    }

    /// What to do about it.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn text(&self) -> String {
        let hint = self.hint.as_ref().map_or_else(String::new, |hint| format!("           hint: {hint}\n"));
        format!("{:<8} {}: {} ({})\n{hint}", self.verdict.as_str(), self.name, self.found, self.looked_at)
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "check": self.name,
            "verdict": self.verdict.as_str(),
            "looked_at": self.looked_at,
            "found": self.found,
            "hint": self.hint,
        })
    }
}
