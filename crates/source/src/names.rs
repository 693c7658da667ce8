//! Names of log fields, fixed here so that one thing is logged under one name everywhere.

/// Image reference as the client gave it.
pub const IMAGE: &str = "image";
/// Digest of a layer's blob.
pub const LAYER: &str = "layer";
/// Path of a file in its layer.
pub const PATH: &str = "path";
/// Offset in bytes.
pub const OFFSET: &str = "offset";
/// Size in bytes.
pub const SIZE: &str = "size";
/// Stable error code.
pub const CODE: &str = "code";
/// Snapshot key (active) or name (committed).
pub const SNAPSHOT: &str = "snapshot";
