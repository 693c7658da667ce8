//! How a layer's blob is packed, as its media type says.

use std::fmt;

/// How a layer's tar is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip, possibly of several members.
    Gzip,
    /// zstd, possibly of several frames.
    Zstd,
}

/// The kinds of layers that a manifest may list.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LayerMedia {
    /// A tar of changes: the only kind that can be served lazily.
    Tar(Compression),
    /// A layer that registries need not hold (Docker's foreign, OCI's non-distributable layers).
    Foreign,
    /// A layer that only the holder of a key can read.
    Encrypted,
    /// Something else: its media type.
    Unknown(String),
}

impl LayerMedia {
    /// The kind that `media_type` names.
    #[must_use]
    pub fn from_media_type(media_type: &str) -> Self {
        match media_type {
            "application/vnd.oci.image.layer.v1.tar" | "application/vnd.docker.image.rootfs.diff.tar" => {
                Self::Tar(Compression::None)
            }
            "application/vnd.oci.image.layer.v1.tar+gzip" | "application/vnd.docker.image.rootfs.diff.tar.gzip" => {
                Self::Tar(Compression::Gzip)
            }
            "application/vnd.oci.image.layer.v1.tar+zstd" | "application/vnd.docker.image.rootfs.diff.tar.zstd" => {
                Self::Tar(Compression::Zstd)
            }
            encrypted if encrypted.ends_with("+encrypted") => Self::Encrypted,
            foreign
                if foreign.starts_with("application/vnd.oci.image.layer.nondistributable.v1.tar")
                    || foreign.starts_with("application/vnd.docker.image.rootfs.foreign.diff.tar") =>
            {
                Self::Foreign
            }
            other => Self::Unknown(other.to_owned()),
        }
    }
}

impl fmt::Display for LayerMedia {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tar(Compression::None) => f.write_str("tar"),
            Self::Tar(Compression::Gzip) => f.write_str("tar+gzip"),
            Self::Tar(Compression::Zstd) => f.write_str("tar+zstd"),
            Self::Foreign => f.write_str("foreign layer"),
            Self::Encrypted => f.write_str("encrypted layer"),
            Self::Unknown(media_type) => f.write_str(media_type),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_media_type() {
        use Compression::{Gzip, None, Zstd};
        for (media_type, expected) in [
            ("application/vnd.oci.image.layer.v1.tar", LayerMedia::Tar(None)),
            ("application/vnd.oci.image.layer.v1.tar+gzip", LayerMedia::Tar(Gzip)),
            ("application/vnd.oci.image.layer.v1.tar+zstd", LayerMedia::Tar(Zstd)),
            ("application/vnd.docker.image.rootfs.diff.tar", LayerMedia::Tar(None)),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", LayerMedia::Tar(Gzip)),
            ("application/vnd.docker.image.rootfs.diff.tar.zstd", LayerMedia::Tar(Zstd)),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar", LayerMedia::Foreign),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", LayerMedia::Foreign),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar", LayerMedia::Foreign),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", LayerMedia::Foreign),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", LayerMedia::Foreign),
            ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", LayerMedia::Encrypted),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+encrypted", LayerMedia::Encrypted),
            ("application/vnd.in-toto+json", LayerMedia::Unknown("application/vnd.in-toto+json".into())),
            ("", LayerMedia::Unknown(String::new())),
        ] {
            assert_eq!(LayerMedia::from_media_type(media_type), expected, "{media_type}");
        }
    }
}
