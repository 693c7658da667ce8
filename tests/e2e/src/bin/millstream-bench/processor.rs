//! Processor time: what daemons used, and what no daemon can do without.

use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use flate2::read::MultiGzDecoder;
use millstream_e2e::image::ImageInfo;
use sha2::{Digest as _, Sha256};

/// Units of the kernel's times in a second: the same on every architecture that has containers.
const TICKS: f64 = 100.0;
/// Bytes of one read.
const PIECE: usize = 256 << 10;

/// Seconds of processor time that these processes have used, with those of their ended children. Ended ones have none.
pub(crate) fn used(processes: &[u32]) -> f64 {
    processes.iter().filter_map(|process| ticks(*process)).sum::<u64>() as f64 / TICKS
}

fn ticks(process: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name is in parentheses and may hold anything. After it: state, then ten fields, then the four times.
    let fields = stat.get(stat.rfind(')')? + 1..)?.split_whitespace().skip(11);
    fields.take(4).map(|field| field.parse::<u64>().ok()).sum()
}

/// Seconds to inflate an image and to hash what came and what comes out: the least that making it local and proving it costs.
pub(crate) fn least(layout: &Path, image: &ImageInfo) -> Result<f64> {
    let own = [std::process::id()];
    let before = used(&own);
    for layer in &image.layers {
        let file = layout.join("blobs/sha256").join(&layer.digest);
        let blob = std::fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
        let (mut whole, mut inflated) = (Sha256::new(), Sha256::new());
        whole.update(&blob);
        let mut tar = MultiGzDecoder::new(blob.as_slice());
        let mut piece = vec![0; PIECE];
        loop {
            let length = tar.read(&mut piece).with_context(|| format!("inflating {}", file.display()))?;
            if length == 0 {
                break;
            }
            inflated.update(&piece[..length]);
        }
        // Used, so that they are computed.
        std::hint::black_box((whole.finalize(), inflated.finalize()));
    }
    Ok(used(&own) - before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_shows_in_the_time_of_this_process() {
        let own = [std::process::id()];
        let before = used(&own);
        let mut digest = Sha256::new();
        let started = std::time::Instant::now();
        while used(&own) - before < 0.05 {
            digest.update([0; 4096]);
            assert!(started.elapsed().as_secs() < 30, "nothing was counted");
        }
        std::hint::black_box(digest.finalize());
    }
}
