//! Settings of both daemons: any text is read or refused with a reason, and what was read can be used.
#![no_main]
#![allow(dead_code, reason = "only the readers of these files are of interest here")]

use libfuzzer_sys::fuzz_target;
use millstream_fuzz::{choice, plant};

#[path = "../../../crates/node/src/settings.rs"]
mod node;
#[path = "../../../crates/server/src/settings.rs"]
mod server;

const NODE: &str = include_str!("../../../config/millstreamd.toml");
const SERVER: &str = include_str!("../../../config/millstream-server.toml");

/// The sample with its commented keys brought to life, so that every key is in the corpus.
fn alive(sample: &str) -> String {
    let key = |line: &str| line.strip_prefix("# ").filter(|rest| rest.contains(" = ")).map(str::to_owned);
    sample.lines().map(|line| key(line).unwrap_or_else(|| line.to_owned()) + "\n").collect()
}

fn seeds() -> Vec<Vec<u8>> {
    let texts = [(0, NODE.to_owned()), (1, SERVER.to_owned()), (0, alive(NODE)), (1, alive(SERVER))];
    texts.into_iter().map(|(kind, text)| [vec![kind], text.into_bytes()].concat()).collect()
}

fuzz_target!(init: plant(seeds()), |data: &[u8]| {
    let (kind, bytes) = choice(data);
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let refused = if kind % 2 == 0 {
        node::Settings::parse(text).err()
    } else {
        match server::Settings::parse(text) {
            Ok(settings) => {
                let _ = (settings.listen_options(), settings.registry_options(), settings.service_options());
                None
            }
            Err(error) => Some(error),
        }
    };
    assert!(refused.is_none_or(|error| !format!("{error:#}").is_empty()));
});
