//! Readers of foreign text that have no public name, for `tests/fuzz` alone.

use std::path::Path;

use millstream_oci::ImageRef;
use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};

use crate::{auth, docker_config, hosts};

/// Reads a `hosts.toml`.
pub fn hosts(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        for registry in ["docker.io", "registry.example.com:5000", "[::1]:80", "localhost"] {
            let _ = hosts::read(text, Path::new("/etc/certs.d/x"), registry);
        }
    }
}

/// Reads challenges, one in a line, and makes the address of the token server that they name.
///
/// # Panics
///
/// If a registry that is reached by HTTPS could send its callers' passwords elsewhere in clear, or to this machine.
pub fn challenge(bytes: &[u8]) {
    let values = bytes.split(|byte| *byte == b'\n').filter_map(|line| HeaderValue::from_bytes(line).ok());
    let headers: HeaderMap = values.map(|value| (WWW_AUTHENTICATE, value)).take(100).collect();
    let Ok(registry) = Url::parse("https://registry.example.com/v2") else { return };
    if let Some(Ok(url)) = auth::token_urls(&registry, &headers) {
        assert_eq!(url.scheme(), "https");
        assert!(url.username().is_empty() && url.password().is_none());
        assert!(!url.host_str().is_none_or(hosts::is_loopback), "{url}");
    }
}

/// Reads a docker `config.json`, without asking the helpers that it names.
pub fn docker_config(bytes: &[u8]) {
    for image in ["docker.io/library/nginx", "registry.example.com:5000/a", "x/y"] {
        if let Ok(image) = ImageRef::parse(image) {
            let _ = docker_config::stored(bytes, &image);
        }
    }
}
