//! From a blob in a registry to TOC and windows in the store.

use std::fs::File;
use std::io;
use std::path::Path;

use millstream_oci::{Compression, DiffId, Digest, LayerMedia};
use millstream_source::ImageSource;
use millstream_toc::build::{self, Bound, BuildError, BuildOptions, BuildSink, Built, Ineligible, build};
use millstream_toc::format::{SpanIx, VERSION};
use millstream_toc::pack::pack;
use millstream_toc::{BlobRange, Toc};
use sha2::{Digest as _, Sha256};

use crate::ServeError;
use crate::blob::{ChannelReader, channel, pump};
use crate::content::blocking;
use crate::skeleton::SkeletonWriter;
use crate::store::{ImageLayer, LayerRecord, Store};
use crate::windows::{WindowFile, WindowWriter};

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
            LayerMedia::Tar(Compression::Zstd) => Err("zstd layers are not supported".to_owned()),
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

/// How a layer is built.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Build<'a> {
    /// Directory for a file that lives as long as that.
    pub(crate) scratch: &'a Path,
    pub(crate) options: BuildOptions,
    /// Whether at the lowest priority.
    pub(crate) idle: bool,
}

/// Reads the blob once, makes its TOC and stores all there is. `progress` is told the length of every piece that was read.
pub(crate) async fn import_layer(
    store: &Store,
    source: &dyn ImageSource,
    wanted: &WantedLayer,
    how: Build<'_>,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Outcome, ServeError> {
    let Build { scratch, options, idle } = how;
    let sink = LayerSink::new(scratch).map_err(crate::store::StoreError::from)?;
    let (sender, reader) = channel();
    let build = move || build_layer(reader, &options, sink);
    let built = async { if idle { at_low_priority(build).await } else { blocking(build).await } };
    let range = BlobRange::new(0, wanted.size);
    let (pumped, built) = tokio::join!(pump(source, &wanted.digest, range, sender, progress), built);
    // A transfer that failed looks to the build like a blob that ends early: the cause comes first.
    pumped?;
    let layer = match built? {
        Ok(layer) => layer,
        Err(BuildError::Ineligible { reason }) => return Ok(Outcome::Ineligible(with_hint(&reason))),
        Err(BuildError::Invalid { what }) => return not_valid(source, wanted, what).await,
        Err(error @ (BuildError::Read(_) | BuildError::Sink(_))) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            return Err(ServeError::Internal { what: format!("layer {}: {error}: {cause}", wanted.digest) });
        }
    };
    store_layer(store, wanted, layer).await?;
    Ok(Outcome::Ready)
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

/// What comes of a blob that is no layer: if it is the very blob that the manifest names, containerd is left to say so too; else
/// the registry gave something else, which another import may not meet.
async fn not_valid(source: &dyn ImageSource, wanted: &WantedLayer, what: String) -> Result<Outcome, ServeError> {
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
        return Ok(Outcome::Ineligible(format!("not a valid layer: {what}")));
    }
    let what = format!("layer {}: the registry's bytes have digest {found}: {what}", wanted.digest);
    Err(ServeError::Mismatch { what })
}

/// A finished layer before it is stored.
struct NewLayer {
    blob: Digest,
    record: LayerRecord,
    packed: Vec<u8>,
    windows: WindowFile,
    /// `None` where it is so large that nobody would use it.
    skeleton: Option<File>,
}

fn build_layer(mut reader: ChannelReader, options: &BuildOptions, mut sink: LayerSink) -> Result<NewLayer, BuildError> {
    let Built { toc, .. } = build(&mut reader, options, &mut sink)?;
    let packed = pack(&toc);
    let toc = Toc::open(toc).map_err(|error| BuildError::Sink(io::Error::other(error)))?;
    let windows = sink.windows.finish(toc.span_count()).map_err(BuildError::Sink)?;
    let (skeleton, size) = sink.skeleton.finish().map_err(BuildError::Sink)?;
    let skeleton = (size <= toc.blob_size() / SKELETON_PART).then_some(skeleton);
    let record = LayerRecord {
        format: VERSION,
        toc: toc.digest(),
        diff_id: toc.diff_id(),
        size: toc.blob_size(),
        spans: toc.span_count(),
    };
    Ok(NewLayer { blob: toc.blob_digest(), record, packed, windows, skeleton })
}

/// Stores a layer after all that the image says of it was found true.
async fn store_layer(store: &Store, wanted: &WantedLayer, layer: NewLayer) -> Result<(), ServeError> {
    if layer.blob != wanted.digest {
        let what = format!("layer {}: the bytes that came have digest {}", wanted.digest, layer.blob);
        return Err(ServeError::Mismatch { what });
    }
    wanted.compare(layer.record.diff_id, layer.record.size)?;
    store.put_toc(&wanted.digest, layer.packed).await?;
    store.put_windows(&wanted.digest, layer.windows).await?;
    if let Some(skeleton) = layer.skeleton {
        store.put_skeleton(&wanted.digest, skeleton).await?;
    }
    store.put_layer(&wanted.digest, &layer.record).await?;
    Ok(())
}

/// What is kept of a layer besides its TOC.
struct LayerSink {
    windows: WindowWriter,
    skeleton: SkeletonWriter,
}

impl LayerSink {
    fn new(scratch: &Path) -> io::Result<Self> {
        Ok(Self { windows: WindowWriter::new(scratch)?, skeleton: SkeletonWriter::new(scratch)? })
    }
}

impl BuildSink for LayerSink {
    fn window(&mut self, span: SpanIx, raw: &[u8]) -> io::Result<()> {
        self.windows.append(span, raw)
    }

    fn skeleton(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.skeleton.append(bytes)
    }
}
