//! Builds the TOC of a layer that is made on the fly, as long as one likes, and says how much memory that took at most.
//!
//!     cargo run --release -p millstream-toc --example long_layer -- 5 zstd
//!
//! Arguments: GiB of tar; `plain`, `gzip` or `zstd` (one frame). The compressor runs in the same process; what it takes is
//! measured first and told beside the peak.

use std::error::Error;
use std::io::{self, Read};

use millstream_toc::{BuildOptions, Compression, Toc, build, pack};

/// Bytes of one file of the tar.
const FILE: u64 = 1 << 20;

/// A tar of files of 1 MiB that compress by about a half, without end until `files` of them were read.
struct Tar {
    files: u64,
    /// What of the current file was read, header included; at its end the next one begins.
    at: u64,
    header: [u8; 512],
    body: Vec<u8>,
    ended: u64,
}

impl Tar {
    fn new(files: u64) -> Self {
        let mut state = 1u64;
        let body = (0..FILE)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                state.to_be_bytes()[0] & 0xf
            })
            .collect();
        Self { files, at: 512 + FILE, header: [0; 512], body, ended: 0 }
    }

    fn next_file(&mut self) {
        self.files -= 1;
        self.at = 0;
        // Unlike every other one.
        self.body[..8].copy_from_slice(&self.files.to_le_bytes());
        self.header = [0; 512];
        let name = format!("files/{:03}/{:08}", self.files % 1000, self.files);
        let mut put = |at: usize, bytes: &[u8]| self.header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, name.as_bytes());
        put(100, b"0000644\x000000000\x000000000\x00");
        put(124, format!("{FILE:011o}\0").as_bytes());
        put(136, b"00000000000\0        0");
        put(257, b"ustar\x0000");
        let sum: u32 = self.header.iter().map(|byte| u32::from(*byte)).sum();
        self.header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

impl Read for Tar {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.at == 512 + FILE && self.files > 0 {
            self.next_file();
        }
        let at = usize::try_from(self.at).map_err(io::Error::other)?;
        let rest = if at < 512 { &self.header[at..] } else { &self.body[at - 512..] };
        if rest.is_empty() {
            // Two blocks of zeros end the archive.
            let left = usize::try_from(1024 - self.ended).map_err(io::Error::other)?;
            let len = left.min(out.len());
            out[..len].fill(0);
            self.ended += len as u64;
            return Ok(len);
        }
        let len = rest.len().min(out.len());
        out[..len].copy_from_slice(&rest[..len]);
        self.at += len as u64;
        Ok(len)
    }
}

fn blob(compression: Compression, files: u64) -> io::Result<Box<dyn Read>> {
    Ok(match compression {
        Compression::Plain => Box::new(Tar::new(files)),
        Compression::Gzip => Box::new(flate2::read::GzEncoder::new(Tar::new(files), flate2::Compression::fast())),
        Compression::Zstd => Box::new(zstd::stream::read::Encoder::new(Tar::new(files), 1)?),
    })
}

/// Most memory that was resident so far.
fn peak() -> io::Result<String> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    Ok(line.unwrap_or("unknown").trim().to_owned())
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let gibibytes: u64 = arguments.next().ok_or("usage: long_layer GIB plain|gzip|zstd")?.parse()?;
    let compression = match arguments.next().as_deref() {
        Some("gzip") => Compression::Gzip,
        Some("zstd") => Compression::Zstd,
        _ => Compression::Plain,
    };
    io::copy(&mut blob(compression, 64)?, &mut io::sink())?;
    println!("peak while compressing only: {}", peak()?);
    let built = build(blob(compression, gibibytes << 10)?, &BuildOptions::new(compression), &mut ())?;
    println!("peak while building:         {}", peak()?);
    let packed = pack(&built.toc).len();
    let toc = Toc::open(built.toc)?;
    println!(
        "tar {} bytes, blob {} bytes, {} files, {} spans{}, TOC {} bytes, packed {packed}",
        toc.tar_size(),
        toc.blob_size(),
        toc.content_count(),
        toc.span_count(),
        if toc.has_closed_spans()? { " (closed)" } else { "" },
        toc.as_bytes().len(),
    );
    Ok(())
}
