#![doc = include_str!("../README.md")]

pub mod digest;
pub mod document;
pub mod media;
pub mod platform;
pub mod reference;

pub use digest::{ChainId, DiffId, Digest, DigestError, ManifestDigest, chain_ids};
pub use document::{
    DOCUMENT_MEDIA_TYPES, Descriptor, Document, DocumentError, ImageConfig, IndexEntry, LayerDescriptor,
    MAX_DOCUMENT_SIZE, Manifest, parse_config, parse_document,
};
pub use media::{Compression, LayerMedia};
pub use platform::{Platform, select_platform};
pub use reference::{ImageRef, ReferenceError, TagOrDigest};
