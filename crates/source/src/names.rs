//! Names of log fields, fixed here so that one thing is logged under one name everywhere. A test (`node/tests/log_fields.rs`)
//! compares every call with [`FIELDS`].

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

/// Every name, with what stands under it.
pub const FIELDS: [(&str, &str); 49] = [
    // what it is about
    (IMAGE, "image reference as the client gave it"),
    ("manifest", "digest of a manifest"),
    (LAYER, "digest of a layer's blob"),
    ("chain_id", "chain ID of a layer within an image"),
    (SNAPSHOT, "snapshot key (active) or name (committed)"),
    ("number", "number of a snapshot's directory"),
    ("view", "number of a merged view"),
    ("node", "node id of a file in the mount"),
    (PATH, "path of a file in its layer"),
    (OFFSET, "offset in bytes"),
    (SIZE, "size in bytes"),
    ("chunk", "index of a chunk in its layer"),
    ("spans", "range of spans of a layer"),
    ("way", "how something is fetched: as compressed bytes or as content"),
    ("first_span", "first of a range of spans"),
    ("end_span", "end of a range of spans"),
    // how it went
    (CODE, "stable error code"),
    ("reason", "why, for a person"),
    ("error", "what failed, with its causes"),
    ("outcome", "what was decided: lazy, local, deferred, failed"),
    ("expected", "what should have been there"),
    ("found", "what was there"),
    ("available", "whether there is such a feature"),
    ("feature", "feature of the kernel"),
    ("abi", "version of the FUSE interface"),
    ("enabled", "state of a switch"),
    ("dry_run", "whether nothing was changed"),
    ("operation", "request of the kernel"),
    ("priority", "urgency of a fetch"),
    // how much
    ("bytes", "number of bytes"),
    ("chunks", "number of chunks"),
    ("layers", "number of layers"),
    ("views", "number of merged views"),
    ("ineligible", "number of layers that cannot be streamed"),
    ("failures", "number of failures in a row"),
    ("requests", "number of requests so far"),
    ("left", "number of what could not be done"),
    ("limit", "limit of a resource"),
    ("pause", "time until the next attempt"),
    // where
    ("address", "address and port of a listener or a peer"),
    ("tls", "whether a listener has TLS"),
    ("root", "root directory of a daemon"),
    ("socket", "Unix socket"),
    ("store", "location of the server's state"),
    ("file", "path on this machine"),
    // processes
    ("pid", "process"),
    ("signal", "signal that ended a process"),
    ("exit_code", "exit code of a process"),
    ("out_of_memory", "whether the kernel killed a process for want of memory"),
];
