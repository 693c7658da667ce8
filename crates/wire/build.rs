//! Generates Rust from the files of `proto/`; needs no protoc.

use std::env;
use std::error::Error;

const PROTO: &str = "../../proto";
const OURS: [&str; 5] = [
    "containerd/services/introspection/v1/introspection.proto",
    "containerd/services/snapshots/v1/snapshots.proto",
    "containerd/services/version/v1/version.proto",
    "millstream/v1/images.proto",
    "millstream/v1/node.proto",
];
const CRI: &str = "cri/runtime/v1/api.proto";
/// Messages with secrets: `src/redact.rs` has their `Debug`.
const SECRET: [&str; 3] = [".millstream.v1.Basic", ".millstream.v1.Credential", ".runtime.v1.AuthConfig"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={PROTO}");
    let files = protox::compile(OURS, [PROTO])?;
    tonic_prost_build::configure().include_file("wire.rs").skip_debug(SECRET).compile_fds(files)?;
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
