//! From a blob in a registry to TOC, windows and, where spans are closed, packed content in the store.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use millstream_oci::{Compression, DiffId, Digest, LayerMedia};
use millstream_source::{ImageSource, names};
use millstream_toc::build::{
    self, Bound, Budget, BuildError, BuildOptions, BuildSink, Built, ClosedSpans, Ineligible, build,
};
use millstream_toc::format::{ChunkIx, SHORT_DIGEST, SpanIx, VERSION};
use millstream_toc::pack::pack;
use millstream_toc::{BlobRange, DataRange, Toc};
use sha2::{Digest as _, Sha256};

use crate::ServeError;
use crate::blob::{ChannelReader, channel, pump};
use crate::content::blocking;
use crate::items::{ItemFile, ItemWriter};
use crate::packed::Packer;
use crate::pieces::PieceReader;
use crate::skeleton::SkeletonWriter;
use crate::store::{ImageLayer, LayerRecord, Store};

/// Windows are short: more effort buys little.
const WINDOW_LEVEL: i32 = 3;
/// A skeleton with more than one byte for so many bytes of the blob is not kept: nodes then read the blob.
const SKELETON_PART: u64 = 2;

/// A layer as an image describes it.
#[derive(Debug, Clone)]
pub(crate) struct WantedLayer {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) media: LayerMedia,
    pub(crate) diff_id: DiffId,
}

impl WantedLayer {
    /// How its TOC is made, or why none can be: known from the media type alone.
    pub(crate) fn compression(&self) -> Result<build::Compression, String> {
        match &self.media {
            LayerMedia::Tar(Compression::None) => Ok(build::Compression::Plain),
            LayerMedia::Tar(Compression::Gzip) => Ok(build::Compression::Gzip),
            LayerMedia::Tar(Compression::Zstd) => Ok(build::Compression::Zstd),
            LayerMedia::Foreign => Err("foreign layers are not in the registry".to_owned()),
            LayerMedia::Encrypted => Err("encrypted layers can be read by their key's holder only".to_owned()),
            LayerMedia::Unknown(media) => Err(format!("media type {media:?} is not known")),
        }
    }

    /// As it is kept with its image.
    pub(crate) fn into_record(self, ineligible: Option<String>, pending: bool) -> ImageLayer {
        let Self { digest, size, media, diff_id } = self;
        ImageLayer { digest, size, diff_id, media: media.to_string(), ineligible, pending }
    }

    /// Compares what was found with what the image says.
    pub(crate) fn compare(&self, diff_id: DiffId, size: u64) -> Result<(), ServeError> {
        if (diff_id, size) == (self.diff_id, self.size) {
            return Ok(());
        }
        let what = format!(
            "layer {}: the image says {} bytes and diff ID {}, the blob has {size} and {diff_id}",
            self.digest, self.size, self.diff_id
        );
        Err(ServeError::Mismatch { what })
    }
}

/// What came of a layer.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It can be streamed; TOC and windows are stored.
    Ready,
    /// It cannot, for this reason.
    Ineligible(String),
}

/// What an import may use.
#[derive(Debug, Clone)]
pub(crate) struct Means {
    /// Directory for files that live as long as one layer's import.
    pub(crate) scratch: PathBuf,
    /// What one layer may cost.
    pub(crate) budget: Budget,
    /// Bytes of content of one layer that are kept packed; zero: none is.
    pub(crate) packed_max: u64,
    /// Whether layers are built at the lowest priority.
    pub(crate) idle: bool,
}

/// Whether content is packed while a blob is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    /// It is not expected to be needed.
    No,
    /// Until a second span shows that the layer can probably be entered: zstd layers mostly have one frame only.
    FirstSpan,
    /// It is known to be needed.
    All,
}

/// Reads the blob, makes its TOC and stores all there is. `progress` is told the length of every piece that was read. A layer
/// of which it is seen too late that its content must be packed is read a second time.
pub(crate) async fn import_layer(
    store: &Store,
    means: &Means,
    source: &dyn ImageSource,
    wanted: &WantedLayer,
    compression: build::Compression,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Outcome, ServeError> {
    let first = if compression == build::Compression::Zstd { Packing::FirstSpan } else { Packing::No };
    let layer = match read_layer(means, source, wanted, compression, first, progress).await? {
        Ok(layer) if layer.closed && layer.packed.is_none() => {
            tracing::info!({ names::LAYER } = %wanted.digest, "reading a layer once more to pack its content");
            read_layer(means, source, wanted, compression, Packing::All, &|_| ()).await?
        }
        other => other,
    };
    match layer {
        Ok(layer) => store_layer(store, wanted, layer).await.map(|()| Outcome::Ready),
        Err(reason) => Ok(Outcome::Ineligible(reason)),
    }
}

/// One pass over the blob; the inner error says why the layer cannot be streamed.
async fn read_layer(
    means: &Means,
    source: &dyn ImageSource,
    wanted: &WantedLayer,
    compression: build::Compression,
    packing: Packing,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Result<NewLayer, String>, ServeError> {
    let sink = Sink::new(means, packing).map_err(crate::store::StoreError::from)?;
    let closed_spans = if means.packed_max > 0 { ClosedSpans::Keep } else { ClosedSpans::Decline };
    let options = BuildOptions { compression, budget: means.budget, closed_spans };
    let (sender, reader) = channel();
    let build = move || build_layer(reader, &options, sink);
    let built = async { if means.idle { at_low_priority(build).await } else { blocking(build).await } };
    let range = BlobRange::new(0, wanted.size);
    let (pumped, built) = tokio::join!(pump(source, &wanted.digest, range, sender, progress), built);
    // A transfer that failed looks to the build like a blob that ends early: the cause comes first.
    pumped?;
    match built? {
        Ok(layer) => Ok(Ok(layer)),
        Err(NotBuilt::TooMuch) => {
            Ok(Err(format!("more than {} bytes of content to pack (import.packed_max)", means.packed_max)))
        }
        Err(NotBuilt::Build(BuildError::Ineligible { reason: reason @ Ineligible::SpanTooLong { .. } })) => {
            Ok(Err(format!("{reason}, and the server packs no content (import.packed_max)")))
        }
        Err(NotBuilt::Build(BuildError::Ineligible { reason })) => Ok(Err(with_hint(&reason))),
        Err(NotBuilt::Build(BuildError::Invalid { what })) => not_valid(source, wanted, what).await.map(Err),
        Err(NotBuilt::Build(error @ (BuildError::Read(_) | BuildError::Sink(_)))) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            Err(ServeError::Internal { what: format!("layer {}: {error}: {cause}", wanted.digest) })
        }
    }
}

/// Why a pass gave no layer.
enum NotBuilt {
    Build(BuildError),
    /// The content is more than may be packed.
    TooMuch,
}

/// Runs `work` on a thread of its own, which gives way to whatever else wants a processor. Of its own, because only a
/// privileged process could raise the priority of a pooled thread again.
async fn at_low_priority<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ServeError> {
    const NICEST: i32 = 19;
    let (sender, done) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("import".to_owned()).spawn(move || {
        // On Linux this is the priority of the calling thread. It stays as it is where that is refused.
        let _ = rustix::process::setpriority_process(None, NICEST);
        let _ = sender.send(work());
    });
    let failed = |what: String| ServeError::Internal { what: format!("import thread: {what}") };
    thread.map_err(|error| failed(error.to_string()))?;
    done.await.map_err(|_| failed("it panicked".to_owned()))
}

/// The reason, with the key of the settings that would have to be another.
fn with_hint(reason: &Ineligible) -> String {
    let key = match reason.bound() {
        None => return reason.to_string(),
        Some(Bound::Entries) => "entries",
        Some(Bound::TarSize) => "tar_size",
        Some(Bound::FileSize) => "file_size",
        Some(Bound::Ratio) => "ratio",
        Some(Bound::TocBytes) => "toc_size",
    };
    format!("{reason}; hint: the server's import.budget.{key}")
}

/// Why a blob that is no layer cannot be streamed: if it is the very blob that the manifest names, containerd is left to say so too; else
/// the registry gave something else, which another import may not meet.
async fn not_valid(source: &dyn ImageSource, wanted: &WantedLayer, what: String) -> Result<String, ServeError> {
    let (sender, mut reader) = channel();
    let hashed = blocking(move || {
        let mut hash = Sha256::new();
        while let Some(piece) = reader.next() {
            hash.update(&piece);
        }
        Digest::from_bytes(hash.finalize().into())
    });
    let range = BlobRange::new(0, wanted.size);
    let (pumped, hashed) = tokio::join!(pump(source, &wanted.digest, range, sender, &|_| ()), hashed);
    pumped?;
    let found = hashed?;
    if found == wanted.digest {
        return Ok(format!("not a valid layer: {what}"));
    }
    let what = format!("layer {}: the registry's bytes have digest {found}: {what}", wanted.digest);
    Err(ServeError::Mismatch { what })
}

/// A finished layer before it is stored.
struct NewLayer {
    blob: Digest,
    record: LayerRecord,
    toc: Vec<u8>,
    windows: ItemFile,
    /// Whether it has closed spans.
    closed: bool,
    /// Its content, and the digests of its blob's pieces.
    packed: Option<(ItemFile, Vec<u8>)>,
    /// `None` where it is so large that nobody would use it.
    skeleton: Option<File>,
}

fn build_layer(reader: ChannelReader, options: &BuildOptions, mut sink: Sink) -> Result<NewLayer, NotBuilt> {
    let mut reader = PieceReader::new(reader);
    let built = build(&mut reader, options, &mut sink);
    if sink.too_much {
        return Err(NotBuilt::TooMuch);
    }
    let Built { toc, .. } = built.map_err(NotBuilt::Build)?;
    finish(toc, sink, reader.finish()).map_err(|error| NotBuilt::Build(BuildError::Sink(error)))
}

fn finish(toc: Vec<u8>, sink: Sink, pieces: Vec<u8>) -> io::Result<NewLayer> {
    let packed_toc = pack(&toc);
    let toc = Toc::open(toc).map_err(io::Error::other)?;
    let closed = toc.has_closed_spans().map_err(io::Error::other)?;
    let packed = sink.packer.filter(|_| closed).map(|packer| packer.finish(toc.data_size())).transpose()?;
    let packed = packed.map(|packed| (packed, pieces));
    let record = LayerRecord {
        format: VERSION,
        toc: toc.digest(),
        diff_id: toc.diff_id(),
        size: toc.blob_size(),
        spans: toc.span_count(),
    };
    let windows = sink.windows.finish(toc.span_count())?;
    let (skeleton, size) = sink.skeleton.finish()?;
    let skeleton = (size <= toc.blob_size() / SKELETON_PART).then_some(skeleton);
    Ok(NewLayer { blob: toc.blob_digest(), record, toc: packed_toc, windows, closed, packed, skeleton })
}

/// Stores a layer after all that the image says of it was found true.
async fn store_layer(store: &Store, wanted: &WantedLayer, layer: NewLayer) -> Result<(), ServeError> {
    if layer.blob != wanted.digest {
        let what = format!("layer {}: the bytes that came have digest {}", wanted.digest, layer.blob);
        return Err(ServeError::Mismatch { what });
    }
    wanted.compare(layer.record.diff_id, layer.record.size)?;
    store.put_toc(&wanted.digest, layer.toc).await?;
    store.put_windows(&wanted.digest, layer.windows).await?;
    if let Some(skeleton) = layer.skeleton {
        store.put_skeleton(&wanted.digest, skeleton).await?;
    }
    if let Some((packed, pieces)) = layer.packed {
        store.put_packed(&wanted.digest, packed).await?;
        store.put_pieces(&wanted.digest, pieces).await?;
    }
    store.put_layer(&wanted.digest, &layer.record).await?;
    Ok(())
}

/// Keeps what passes by during a build.
struct Sink {
    windows: ItemWriter,
    skeleton: SkeletonWriter,
    packing: Packing,
    packer: Option<Packer>,
    /// The packer refused more content.
    too_much: bool,
}

impl Sink {
    fn new(means: &Means, packing: Packing) -> io::Result<Self> {
        let packs = packing != Packing::No && means.packed_max > 0;
        let packer = if packs { Some(Packer::new(&means.scratch, means.packed_max)?) } else { None };
        let windows = ItemWriter::new(&means.scratch, WINDOW_LEVEL)?;
        Ok(Self { windows, skeleton: SkeletonWriter::new(&means.scratch)?, packing, packer, too_much: false })
    }
}

impl BuildSink for Sink {
    fn window(&mut self, span: SpanIx, raw: &[u8]) -> io::Result<()> {
        if span > 0 && self.packing == Packing::FirstSpan {
            self.packer = None;
        }
        self.windows.append(span, raw)
    }

    fn skeleton(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.skeleton.append(bytes)
    }

    fn chunk(&mut self, _: ChunkIx, data: DataRange, _: &[u8; SHORT_DIGEST], bytes: &[u8]) -> io::Result<()> {
        let Some(packer) = &mut self.packer else { return Ok(()) };
        if packer.add(data, bytes)? {
            return Ok(());
        }
        if self.packing == Packing::FirstSpan {
            // It may not be needed after all.
            self.packer = None;
            return Ok(());
        }
        self.too_much = true;
        Err(io::ErrorKind::FileTooLarge.into())
    }
}
