//! Generates Rust from the files of `proto/`; needs no protoc.

use std::env;
use std::error::Error;

const PROTO: &str = "../../proto";
const OURS: [&str; 10] = [
    "containerd/services/content/v1/content.proto",
    "containerd/services/diff/v1/diff.proto",
    "containerd/services/images/v1/images.proto",
    "containerd/services/introspection/v1/introspection.proto",
    "containerd/services/leases/v1/leases.proto",
    "containerd/services/namespaces/v1/namespace.proto",
    "containerd/services/snapshots/v1/snapshots.proto",
    "containerd/services/version/v1/version.proto",
    "millstream/v1/images.proto",
    "millstream/v1/node.proto",
];
/// Messages with the bytes of blobs, which are handed on and not copied.
const BYTES: &str = ".containerd.services.content.v1";
const CRI: &str = "cri/runtime/v1/api.proto";
/// Messages with secrets: `src/redact.rs` has their `Debug`.
const SECRET: [&str; 3] = [".millstream.v1.Basic", ".millstream.v1.Credential", ".runtime.v1.AuthConfig"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={PROTO}");
    let files = protox::compile(OURS, [PROTO])?;
    tonic_prost_build::configure().bytes(BYTES).include_file("wire.rs").skip_debug(SECRET).compile_fds(files)?;
    if env::var_os("CARGO_FEATURE_CRI").is_some() {
        let files = protox::compile([CRI], [PROTO])?;
        tonic_prost_build::configure()
            .build_server(false)
            .include_file("cri.rs")
            .skip_debug(SECRET)
            .compile_fds(files)?;
    }
    Ok(())
}
