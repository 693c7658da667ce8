//! What a caller proves itself with.

use std::fmt;

use millstream_oci::Digest;

/// A text that no log may show: its `Debug` is `***`, it has no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text. Every use is a place to look at twice.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Credentials for a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// None.
    Anonymous,
    /// User name and password, shown to the registry or to the token server that it names.
    Basic {
        /// User name.
        username: String,
        /// Password or personal token.
        password: Secret,
    },
    /// A token made by the registry's token server, shown to the registry as it is.
    Bearer(Secret),
}

impl Credential {
    /// Tells credentials apart in a cache's key without being one.
    pub(crate) fn fingerprint(&self) -> Digest {
        let parts: [&str; 3] = match self {
            Self::Anonymous => ["anonymous", "", ""],
            Self::Basic { username, password } => ["basic", username, password.expose()],
            Self::Bearer(token) => ["bearer", token.expose(), ""],
        };
        let mut text = Vec::new();
        for part in parts {
            // Lengths first, so that no two credentials give one text.
            text.extend_from_slice(&(part.len() as u64).to_le_bytes());
            text.extend_from_slice(part.as_bytes());
        }
        Digest::of(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(username: &str, password: &str) -> Credential {
        Credential::Basic { username: username.to_owned(), password: Secret::new(password) }
    }

    #[test]
    fn debug_hides_the_secret() {
        let shown = format!("{:?} {:?}", basic("ann", "hunter2"), Credential::Bearer(Secret::new("hunter2")));
        assert!(!shown.contains("hunter2"), "{shown}");
        assert!(shown.contains("ann"), "{shown}");
    }

    #[test]
    fn fingerprints_differ_wherever_credentials_do() {
        let all = [
            Credential::Anonymous,
            basic("a", "b"),
            basic("ab", ""),
            basic("", "ab"),
            Credential::Bearer(Secret::new("a")),
            Credential::Bearer(Secret::new("")),
        ];
        for (n, left) in all.iter().enumerate() {
            for right in &all[n + 1..] {
                assert_ne!(left.fingerprint(), right.fingerprint(), "{left:?} {right:?}");
            }
        }
    }
}
