//! Settings of both daemons: any text is read or refused with a reason.
#![no_main]

use libfuzzer_sys::fuzz_target;
use millstream_fuzz::{choice, plant};
use millstream_settings::{Schema, node, parse, server};

/// The sample with its commented keys brought to life, so that every key is in the corpus.
fn alive(sample: &str) -> String {
    let key = |line: &str| line.strip_prefix("# ").filter(|rest| rest.contains(" = ")).map(str::to_owned);
    sample.lines().map(|line| key(line).unwrap_or_else(|| line.to_owned()) + "\n").collect()
}

fn seeds() -> Vec<Vec<u8>> {
    let (node, server) = (node::Settings::SAMPLE, server::Settings::SAMPLE);
    let texts = [(0, node.to_owned()), (1, server.to_owned()), (0, alive(node)), (1, alive(server))];
    texts.into_iter().map(|(kind, text)| [vec![kind], text.into_bytes()].concat()).collect()
}

fuzz_target!(init: plant(seeds()), |data: &[u8]| {
    let (kind, bytes) = choice(data);
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let refused =
        if kind % 2 == 0 { parse::<node::Settings>(text).err() } else { parse::<server::Settings>(text).err() };
    assert!(refused.is_none_or(|error| !error.to_string().is_empty()));
});
