//! Digests: the names of everything that a registry stores, one type for each kind of thing that is named.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

/// Algorithm prefix of every digest we accept.
const PREFIX: &str = "sha256:";

/// Why a text is no digest that we can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// There is no `algorithm:` in front.
    #[error("digest {0:?} has no algorithm, expected \"sha256:\" and 64 hexadecimal digits")]
    NoAlgorithm(String),
    /// A well-formed digest of another algorithm.
    #[error("digest algorithm {0:?} is not supported, only sha256 is")]
    Algorithm(String),
    /// What follows `sha256:` is not 64 lower-case hexadecimal digits.
    #[error("digest {0:?} is not \"sha256:\" followed by 64 lower-case hexadecimal digits")]
    Encoding(String),
}

/// A SHA-256 digest, written `sha256:<64 lower-case hexadecimal digits>`.
///
/// Other algorithms are refused when parsed: images that use them are not served lazily.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The digest whose raw value is `bytes`.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The raw value.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The value as 64 lower-case hexadecimal digits, without the algorithm.
    #[must_use]
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let Some(encoded) = text.strip_prefix(PREFIX) else {
            return Err(match text.split_once(':') {
                Some((algorithm, _)) => DigestError::Algorithm(shortened(algorithm)),
                None => DigestError::NoAlgorithm(shortened(text)),
            });
        };
        let bad = || DigestError::Encoding(shortened(text));
        if encoded.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(bad());
        }
        let mut bytes = [0; 32];
        hex::decode_to_slice(encoded, &mut bytes).map_err(|_| bad())?;
        Ok(Self(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// At most the first 100 characters, so that a hostile document cannot fill a log.
fn shortened(text: &str) -> String {
    text.chars().take(100).collect()
}

macro_rules! named_digest {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Digest);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = DigestError;

            fn from_str(text: &str) -> Result<Self, DigestError> {
                text.parse().map(Self)
            }
        }
    };
}

named_digest! {
    /// Digest of a layer's uncompressed tar.
    DiffId
}
named_digest! {
    /// Identity of a stack of layers: what containerd names its committed snapshots after.
    ChainId
}
named_digest! {
    /// Digest of an image manifest or an image index.
    ManifestDigest
}

/// The chain IDs of the stack `diff_ids` (base first): entry `n` names layers `0..=n` applied in turn.
///
/// The chain ID of one layer is its diff ID; that of a longer stack is the digest of the text
/// `<chain ID of all but the top> <diff ID of the top>`.
#[must_use]
pub fn chain_ids(diff_ids: &[DiffId]) -> Vec<ChainId> {
    let mut chain = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let next = match chain.last() {
            None => ChainId(diff_id.0),
            Some(parent) => ChainId(Digest::of(format!("{parent} {diff_id}").as_bytes())),
        };
        chain.push(next);
    }
    chain
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn digest_of_nothing_is_the_published_one() {
        assert_eq!(
            Digest::of(b"").to_string(),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }

    #[test]
    fn refusals_name_the_reason() {
        let hex64 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let parse = |text: &str| text.parse::<Digest>();
        assert_eq!(parse(hex64), Err(DigestError::NoAlgorithm(hex64.into())));
        assert_eq!(parse(&format!("sha512:{hex64}{hex64}")), Err(DigestError::Algorithm("sha512".into())));
        assert_eq!(parse(&format!("SHA256:{hex64}")), Err(DigestError::Algorithm("SHA256".into())));
        for bad in ["sha256:", "sha256:e3", &format!("sha256:{hex64}0"), &format!("sha256:{}", hex64.to_uppercase())] {
            assert_eq!(parse(bad), Err(DigestError::Encoding((*bad).to_owned())), "{bad}");
        }
        assert!(parse(&format!("sha256:{}é", &hex64[..62])).is_err());
    }

    #[test]
    fn error_text_of_a_huge_digest_is_bounded() {
        let error = "x".repeat(1 << 20).parse::<Digest>().unwrap_err();
        assert!(error.to_string().len() < 300);
    }

    fn diff_id(hex64: &str) -> DiffId {
        format!("sha256:{hex64}").parse().unwrap()
    }

    /// Vectors computed outside this program: `printf 'sha256:A sha256:B' | sha256sum`.
    #[test]
    fn chain_ids_of_known_stacks() {
        let a = diff_id(&"a".repeat(64));
        let b = diff_id(&"b".repeat(64));
        let c = diff_id(&"c".repeat(64));
        let chain: Vec<String> = chain_ids(&[a, b, c]).iter().map(ToString::to_string).collect();
        assert_eq!(
            chain,
            [
                "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
                "sha256:ccd722928bd92476ba1745586fed6e45a102504185ad88cd89e01ff116fd146c",
                "sha256:c1377126441fb2f5ec2c21ae2a60255331d639e830f0ee1b40a36e52d4c40588",
            ]
        );
        assert!(chain_ids(&[]).is_empty());
    }

    proptest! {
        #[test]
        fn text_and_json_round_trip(bytes: [u8; 32]) {
            let digest = Digest::from_bytes(bytes);
            prop_assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
            let json = serde_json::to_string(&ManifestDigest(digest)).unwrap();
            prop_assert_eq!(&json, &format!("\"{digest}\""));
            prop_assert_eq!(serde_json::from_str::<ManifestDigest>(&json).unwrap().0, digest);
        }

        #[test]
        fn any_text_parses_or_is_refused(text in ".{0,120}") {
            if let Ok(digest) = text.parse::<Digest>() {
                prop_assert_eq!(digest.to_string(), text);
            }
        }
    }
}
