//! What the fuzz targets share: seeds, archives made from code, and what must hold of every table of contents.

pub mod archive;
pub mod layer;
pub mod loopback;

use std::path::Path;

/// Directory that a target writes its seeds to before it starts.
pub const SEEDS: &str = "MILLSTREAM_FUZZ_SEEDS";

/// Writes the seeds of a target where [`SEEDS`] says, as files named by their position. Nothing happens without it.
///
/// # Panics
///
/// If a file cannot be written.
pub fn plant(seeds: impl IntoIterator<Item = Vec<u8>>) {
    let Some(directory) = std::env::var_os(SEEDS) else { return };
    let directory = Path::new(&directory);
    std::fs::create_dir_all(directory).expect("the directory for seeds");
    for (number, seed) in seeds.into_iter().enumerate() {
        std::fs::write(directory.join(format!("seed-{number}")), seed).expect("a seed");
    }
}

/// Splits off a first byte that chooses between things.
#[must_use]
pub fn choice(data: &[u8]) -> (u8, &[u8]) {
    data.split_first().map_or((0, data), |(first, rest)| (*first, rest))
}
