//! Builds the TOC of a layer file and says how large it is and how fast that went, beside the floor: inflating and hashing.
//!
//!     cargo run --release -p millstream-toc --example build_toc -- layer.tar.gz
//!
//! A name that ends in `.tar` is read as a plain tar, everything else as gzip.

use std::error::Error;
use std::fs::File;
use std::io::{self, Read};
use std::time::{Duration, Instant};

use millstream_inflate::{Inflater, Stop};
use millstream_toc::{BuildOptions, BuildSink, Compression, Toc, build, pack};
use sha2::{Digest as _, Sha256};

/// Counts what a server would keep.
#[derive(Default)]
struct Count {
    windows: usize,
    content: u64,
}

impl BuildSink for Count {
    fn window(&mut self, _span: u32, raw: &[u8]) -> io::Result<()> {
        self.windows += raw.len();
        Ok(())
    }

    fn chunk(
        &mut self,
        _chunk: u32,
        _data: millstream_toc::DataRange,
        _digest: &[u8; 16],
        bytes: &[u8],
    ) -> io::Result<()> {
        self.content += bytes.len() as u64;
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("usage: build_toc LAYER")?;
    let compression = if path.ends_with(".tar") { Compression::Plain } else { Compression::Gzip };
    // Twice each, the better one counts; the first round also warms the page cache.
    let mut floor = Duration::MAX;
    let mut best = Duration::MAX;
    let mut sink = Count::default();
    let mut built = None;
    for _ in 0..2 {
        let start = Instant::now();
        hash_only(File::open(&path)?, compression)?;
        floor = floor.min(start.elapsed());
        sink = Count::default();
        let start = Instant::now();
        built = Some(build(File::open(&path)?, &BuildOptions::new(compression), &mut sink)?);
        best = best.min(start.elapsed());
    }
    let canonical = built.ok_or("nothing was built")?.toc;
    let start = Instant::now();
    let packed = pack(&canonical);
    let packing = start.elapsed();
    let toc = Toc::open(canonical.clone())?;
    toc.check()?;
    println!("blob       {} bytes, {}", toc.blob_size(), toc.blob_digest());
    println!("tar        {} bytes, {}", toc.tar_size(), toc.diff_id());
    println!("inodes     {}, files with content {}", toc.inode_count(), toc.content_count());
    println!("chunks     {}, spans {}", toc.chunk_count(), toc.span_count());
    println!("content    {} bytes, windows {} bytes", sink.content, sink.windows);
    println!("TOC        {} bytes, packed {} bytes in {packing:.2?}", canonical.len(), packed.len());
    println!("TOC        sha256 {}", toc.digest());
    println!(
        "floor      {floor:.2?} (inflate, SHA-256 of blob and tar), {:.0} MB/s of tar",
        rate(toc.tar_size(), floor)
    );
    println!(
        "build      {best:.2?}, {:.0} MB/s of tar, {:.2} times the floor",
        rate(toc.tar_size(), best),
        best.as_secs_f64() / floor.as_secs_f64()
    );
    Ok(())
}

#[allow(clippy::cast_precision_loss, reason = "for people")]
fn rate(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / 1e6 / time.as_secs_f64()
}

/// What cannot be avoided: both digests, and the decompression between them.
fn hash_only(mut blob: File, compression: Compression) -> Result<(), Box<dyn Error>> {
    let (mut blob_hash, mut tar_hash) = (Sha256::new(), Sha256::new());
    let mut input = vec![0; 128 << 10];
    let mut output = vec![0; 256 << 10];
    let mut inflater = Inflater::gzip()?;
    let mut ended = false;
    loop {
        let read = blob.read(&mut input)?;
        if read == 0 {
            break;
        }
        blob_hash.update(&input[..read]);
        if compression == Compression::Plain {
            continue;
        }
        let mut at = 0;
        loop {
            if ended && at < read {
                inflater.restart_gzip()?;
            }
            let progress = inflater.step(&input[at..read], &mut output, Stop::Never)?;
            ended = progress.stream_end;
            at += progress.consumed;
            tar_hash.update(&output[..progress.produced]);
            if progress.consumed == 0 && progress.produced == 0 {
                break;
            }
        }
    }
    std::hint::black_box((blob_hash.finalize(), tar_hash.finalize()));
    Ok(())
}
