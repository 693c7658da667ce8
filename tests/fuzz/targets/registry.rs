//! What is set about registries and what they ask for: `hosts.toml`, challenges, docker's `config.json`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use millstream_fuzz::{choice, plant};
use millstream_registry::fuzzing;

const SEEDS: [(u8, &str); 7] = [
    (
        0,
        "server = \"https://registry.example.com\"\n[host.\"http://127.0.0.1:5000\"]\ncapabilities = [\"pull\", \
         \"resolve\"]\nca = [\"/a.pem\"]\nclient = [[\"/c.pem\", \"/k.pem\"]]\nskip_verify = true\noverride_path = \
         true\ndial_timeout = \"2s\"\n[host.\"http://127.0.0.1:5000\".header]\nx-a = [\"1\", \"2\"]\n",
    ),
    (0, "ca = \"ca.crt\"\n[host.\"mirror:443/v2/proxy\"]\n"),
    (1, "Bearer realm=\"https://a.example.com/t\",service=\"r.io\",scope=\"repository:x:pull,push\""),
    (1, "Basic realm=\"x\", Bearer realm=\"y\"\nNegotiate"),
    (2, r#"{"auths":{"https://index.docker.io/v1/":{"auth":"YWRhOnNlY3JldA=="}}}"#),
    (2, r#"{"auths":{"registry.example.com":{"username":"ada","password":"secret"}},"credsStore":""}"#),
    (2, r#"{"auths":{"registry.example.com":{"identitytoken":"t"},"http://x/":{"registrytoken":"t"}}}"#),
];

fuzz_target!(
    init: plant(SEEDS.map(|(kind, text)| [&[kind], text.as_bytes()].concat())),
    |data: &[u8]| {
        let (kind, bytes) = choice(data);
        match kind % 3 {
            0 => fuzzing::hosts(bytes),
            1 => fuzzing::challenge(bytes),
            _ => fuzzing::docker_config(bytes),
        }
    }
);
