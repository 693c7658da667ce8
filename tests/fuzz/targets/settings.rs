//! Settings of both daemons: any text is read or refused with a reason, and what was read is written so that it is read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use millstream_fuzz::{choice, plant};
use millstream_settings::{Schema, node, parse, server};

/// The sample, and the same with its commented keys brought to life.
fn samples<T: Schema>() -> [String; 2] {
    let key = |line: &str| line.strip_prefix("# ").filter(|rest| rest.contains(" = ")).map(str::to_owned);
    let alive = |line: &str| key(line).unwrap_or_else(|| line.to_owned()) + "\n";
    [T::SAMPLE.to_owned(), T::SAMPLE.lines().map(alive).collect()]
}

fn seeds() -> Vec<Vec<u8>> {
    let texts = samples::<node::Settings>().map(|text| (0, text)).into_iter();
    let texts = texts.chain(samples::<server::Settings>().map(|text| (1, text)));
    texts.map(|(kind, text)| [vec![kind], text.into_bytes()].concat()).collect()
}

fn read<T: Schema + PartialEq + std::fmt::Debug>(text: &str) {
    match parse::<T>(text) {
        Ok(settings) => {
            let written = toml::to_string(&settings).expect("what was read can be written");
            assert_eq!(parse::<T>(&written).expect("what was written can be read"), settings);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fuzz_target!(init: plant(seeds()), |data: &[u8]| {
    let (kind, bytes) = choice(data);
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if kind.is_multiple_of(2) { read::<node::Settings>(text) } else { read::<server::Settings>(text) }
});
