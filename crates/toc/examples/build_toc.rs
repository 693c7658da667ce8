//! Builds the TOC of a layer file and says how large it is and how fast that went, beside the floor: inflating and hashing.
//!
//!     cargo run --release -p millstream-toc --example build_toc -- layer.tar.gz
//!
//! A name that ends in `.tar` is read as a plain tar, one in `.zst` as zstd, everything else as gzip. Times are those of the
//! processor, so that other work on the machine counts little. A second argument names a file to write the TOC to.

use std::error::Error;
use std::fs::File;
use std::io::{self, Read};
use std::time::Duration;

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
    let path = std::env::args().nth(1).ok_or("usage: build_toc LAYER [TOC]")?;
    let compression = match path.rsplit('.').next() {
        Some("tar") => Compression::Plain,
        Some("zst") => Compression::Zstd,
        _ => Compression::Gzip,
    };
    // Twice each, the better one counts; the first round also warms the page cache.
    let mut floor = Duration::MAX;
    let mut best = Duration::MAX;
    let mut sink = Count::default();
    let mut built = None;
    for _ in 0..2 {
        let start = used()?;
        hash_only(File::open(&path)?, compression)?;
        floor = floor.min(used()?.saturating_sub(start));
        sink = Count::default();
        let start = used()?;
        built = Some(build(File::open(&path)?, &BuildOptions::new(compression), &mut sink)?);
        best = best.min(used()?.saturating_sub(start));
    }
    let canonical = built.ok_or("nothing was built")?.toc;
    let start = used()?;
    let packed = pack(&canonical);
    let packing = used()?.saturating_sub(start);
    if let Some(out) = std::env::args_os().nth(2) {
        std::fs::write(out, &canonical)?;
    }
    let toc = Toc::open(canonical.clone())?;
    toc.check()?;
    println!("blob       {} bytes, {}", toc.blob_size(), toc.blob_digest());
    println!("tar        {} bytes, {}", toc.tar_size(), toc.diff_id());
    println!("inodes     {}, files with content {}", toc.inode_count(), toc.content_count());
    println!("chunks     {}, spans {}", toc.chunk_count(), toc.span_count());
    println!("content    {} bytes, windows {} bytes", sink.content, sink.windows);
    println!("TOC        {} bytes, packed {} bytes in {packing:.2?}", canonical.len(), packed.len());
    println!("TOC        {} bytes packed for 100,000 inodes", packed.len() * 100_000 / toc.inode_count() as usize);
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

/// Processor time of this thread so far.
fn used() -> Result<Duration, Box<dyn Error>> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    Ok(Duration::from_nanos(text.split(' ').next().ok_or("no time in schedstat")?.parse()?))
}

/// What cannot be avoided: both digests, and the decompression between them.
fn hash_only(mut blob: File, compression: Compression) -> Result<(), Box<dyn Error>> {
    if compression == Compression::Zstd {
        return hash_zstd(blob);
    }
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

fn hash_zstd(blob: File) -> Result<(), Box<dyn Error>> {
    /// Hashes what is read.
    struct Hashed(File, Sha256);
    impl Read for Hashed {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let read = self.0.read(out)?;
            self.1.update(&out[..read]);
            Ok(read)
        }
    }
    let input = io::BufReader::with_capacity(128 << 10, Hashed(blob, Sha256::new()));
    let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
    let mut output = vec![0; 256 << 10];
    let mut tar_hash = Sha256::new();
    loop {
        let read = decoder.read(&mut output)?;
        if read == 0 {
            break;
        }
        tar_hash.update(&output[..read]);
    }
    std::hint::black_box((decoder.finish().into_inner().1.finalize(), tar_hash.finalize()));
    Ok(())
}
