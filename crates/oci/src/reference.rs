//! Image references: the names people type.

use std::fmt;
use std::str::FromStr;

use oci_spec::distribution::Reference;

use crate::{DigestError, ManifestDigest};

/// Why a text is no image reference.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// It does not follow the grammar of references.
    #[error("{text:?} is not an image reference: {reason}")]
    Grammar {
        /// What was given, shortened to 300 characters.
        text: String,
        /// The parser's reason.
        reason: String,
    },
    /// Its digest is of a kind that is not supported.
    #[error("image reference {text:?}")]
    Digest {
        /// What was given, shortened to 300 characters.
        text: String,
        /// What is wrong with the digest.
        source: DigestError,
    },
}

/// What a reference asks for within its repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TagOrDigest {
    /// A tag; it may move.
    Tag(String),
    /// Exactly this manifest or index.
    Digest(ManifestDigest),
}

impl fmt::Display for TagOrDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => fmt::Display::fmt(digest, f),
        }
    }
}

/// A reference to an image in its full form: `nginx` becomes `docker.io/library/nginx:latest`, as with Docker and
/// containerd's clients.
///
/// Has a tag, a digest or both; where it has both, the digest decides. [`fmt::Display`] gives the full form.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ImageRef {
    /// Parsed and completed; its digest, if any, is a [`ManifestDigest`].
    reference: Reference,
    digest: Option<ManifestDigest>,
}

impl ImageRef {
    /// Reads a reference, short or full.
    ///
    /// # Errors
    ///
    /// [`ReferenceError`] when `text` breaks the grammar (upper-case repository, more than 255 characters, a literal
    /// IPv6 registry, …) or names a digest other than sha256.
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        let shortened = || text.chars().take(300).collect::<String>();
        let reference = Reference::try_from(text)
            .map_err(|error| ReferenceError::Grammar { text: shortened(), reason: error.to_string() })?;
        // The parser completes without looking again: it takes `Host/app` for a repository of docker.io, where no name has
        // upper case.
        if Reference::try_from(reference.whole()).ok().as_ref() != Some(&reference) {
            let reason = format!("it would be {}, which is none", reference.whole());
            return Err(ReferenceError::Grammar { text: shortened(), reason });
        }
        let digest = reference
            .digest()
            .map(str::parse)
            .transpose()
            .map_err(|source| ReferenceError::Digest { text: shortened(), source })?;
        Ok(Self { reference, digest })
    }

    /// The registry as the reference names it, with its port: `docker.io`, `localhost:5000`. Not always the host to
    /// connect to.
    #[must_use]
    pub fn registry(&self) -> &str {
        self.reference.registry()
    }

    /// The repository within the registry: `library/nginx`.
    #[must_use]
    pub fn repository(&self) -> &str {
        self.reference.repository()
    }

    /// `registry/repository`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry(), self.repository())
    }

    /// The tag, if it has one.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.reference.tag()
    }

    /// The digest, if it has one.
    #[must_use]
    pub fn digest(&self) -> Option<ManifestDigest> {
        self.digest
    }

    /// What to ask the repository for: the digest, else the tag.
    #[must_use]
    pub fn tag_or_digest(&self) -> TagOrDigest {
        match (self.digest, self.tag()) {
            (Some(digest), _) => TagOrDigest::Digest(digest),
            // The parser completes a reference that has neither with `latest`.
            (None, tag) => TagOrDigest::Tag(tag.unwrap_or("latest").to_owned()),
        }
    }

    /// The same repository at exactly `digest`, without a tag.
    #[must_use]
    pub fn with_digest(&self, digest: ManifestDigest) -> Self {
        Self { reference: self.reference.clone_with_digest(digest.to_string()), digest: Some(digest) }
    }
}

impl FromStr for ImageRef {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        Self::parse(text)
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.reference, f)
    }
}

impl fmt::Debug for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.reference, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn short_names_are_completed() {
        for (text, full, name) in [
            ("nginx", "docker.io/library/nginx:latest", "docker.io/library/nginx"),
            ("nginx:1.27", "docker.io/library/nginx:1.27", "docker.io/library/nginx"),
            ("index.docker.io/nginx", "docker.io/library/nginx:latest", "docker.io/library/nginx"),
            ("team/app", "docker.io/team/app:latest", "docker.io/team/app"),
            ("localhost/app", "localhost/app:latest", "localhost/app"),
            ("127.0.0.1:5000/a/b:t", "127.0.0.1:5000/a/b:t", "127.0.0.1:5000/a/b"),
        ] {
            let image = ImageRef::parse(text).unwrap();
            assert_eq!(image.to_string(), full);
            assert_eq!(image.name(), name);
            assert_eq!(ImageRef::parse(full).unwrap(), image);
        }
    }

    #[test]
    fn digest_decides_over_tag() {
        let image = ImageRef::parse(&format!("ghcr.io/a/b:t@{DIGEST}")).unwrap();
        assert_eq!(image.tag(), Some("t"));
        assert_eq!(image.tag_or_digest(), TagOrDigest::Digest(DIGEST.parse().unwrap()));
        let pinned = ImageRef::parse("ghcr.io/a/b:t").unwrap().with_digest(DIGEST.parse().unwrap());
        assert_eq!(pinned.to_string(), format!("ghcr.io/a/b@{DIGEST}"));
        assert_eq!(pinned.digest(), Some(DIGEST.parse().unwrap()));
    }

    #[test]
    fn bad_references_are_refused() {
        let hex128 = "a".repeat(128);
        for text in ["", "Nginx", ":tag", "a//b", "a:b:c", "a@sha256:12", "https://a/b", "a b", &"a".repeat(300)] {
            assert!(ImageRef::parse(text).is_err(), "{text}");
        }
        let error = ImageRef::parse(&format!("a@sha512:{hex128}")).unwrap_err();
        assert!(matches!(error, ReferenceError::Digest { source: DigestError::Algorithm(_), .. }), "{error:?}");
    }

    #[test]
    fn what_is_completed_is_a_reference_or_refused() {
        // To Docker `Host` is a registry here, to the parser a part of a repository of docker.io.
        for text in ["Host/app", "LAYERS/vnd.oci.image.la:1"] {
            let error = ImageRef::parse(text).unwrap_err();
            assert!(matches!(error, ReferenceError::Grammar { .. }), "{error:?}");
        }
        assert_eq!(ImageRef::parse("Host:80/app").unwrap().registry(), "Host:80");
    }

    proptest! {
        #[test]
        fn full_form_is_a_fixed_point(text in "[a-z0-9.]{1,8}(:[0-9]{1,4})?(/[a-z0-9]{1,6}){0,3}(:[a-zA-Z0-9_.-]{1,8})?") {
            if let Ok(image) = ImageRef::parse(&text) {
                prop_assert_eq!(ImageRef::parse(&image.to_string()).unwrap(), image);
            }
        }
    }
}
