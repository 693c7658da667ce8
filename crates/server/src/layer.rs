//! From a blob in a registry to TOC and windows in the store.

use std::io;
use std::path::Path;

use millstream_oci::{Compression, DiffId, Digest, LayerMedia};
use millstream_source::ImageSource;
use millstream_toc::build::{self, Budget, BuildError, BuildOptions, BuildSink, Built, build};
use millstream_toc::format::{SpanIx, VERSION};
use millstream_toc::pack::pack;
use millstream_toc::{BlobRange, Toc};

use crate::ServeError;
use crate::blob::{ChannelReader, channel, pump};
use crate::content::blocking;
use crate::store::{ImageLayer, LayerRecord, Store};
use crate::windows::{WindowFile, WindowWriter};

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
    pub(crate) compression: build::Compression,
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
    let Build { scratch, compression, idle } = how;
    let writer = WindowWriter::new(scratch).map_err(crate::store::StoreError::from)?;
    let (sender, reader) = channel();
    let build = move || build_layer(reader, compression, writer);
    let built = async { if idle { at_low_priority(build).await } else { blocking(build).await } };
    let range = BlobRange::new(0, wanted.size);
    let (pumped, built) = tokio::join!(pump(source, &wanted.digest, range, sender, progress), built);
    // A transfer that failed looks to the build like a blob that ends early: the cause comes first.
    pumped?;
    let layer = match built? {
        Ok(layer) => layer,
        Err(BuildError::Ineligible { reason }) => return Ok(Outcome::Ineligible(reason.to_string())),
        Err(BuildError::Invalid { what }) => {
            return Err(ServeError::Mismatch { what: format!("layer {}: {what}", wanted.digest) });
        }
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

/// A finished layer before it is stored.
struct NewLayer {
    blob: Digest,
    record: LayerRecord,
    packed: Vec<u8>,
    windows: WindowFile,
}

fn build_layer(
    mut reader: ChannelReader,
    compression: build::Compression,
    writer: WindowWriter,
) -> Result<NewLayer, BuildError> {
    let mut sink = WindowSink(writer);
    let options = BuildOptions { compression, budget: Budget::default() };
    let Built { toc, .. } = build(&mut reader, &options, &mut sink)?;
    let packed = pack(&toc);
    let toc = Toc::open(toc).map_err(|error| BuildError::Sink(io::Error::other(error)))?;
    let windows = sink.0.finish(toc.span_count()).map_err(BuildError::Sink)?;
    let record = LayerRecord {
        format: VERSION,
        toc: toc.digest(),
        diff_id: toc.diff_id(),
        size: toc.blob_size(),
        spans: toc.span_count(),
    };
    Ok(NewLayer { blob: toc.blob_digest(), record, packed, windows })
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
    store.put_layer(&wanted.digest, &layer.record).await?;
    Ok(())
}

struct WindowSink(WindowWriter);

impl BuildSink for WindowSink {
    fn window(&mut self, span: SpanIx, raw: &[u8]) -> io::Result<()> {
        self.0.append(span, raw)
    }
}
