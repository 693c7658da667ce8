//! Reads a view in place. The bytes may be a memory map whose pages turn to zeros: every access checks what it uses.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use millstream_toc::read::{Dirent, Inode};
use millstream_toc::{FormatError, Toc};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::node_id::MAX_NUMBER;
use crate::view_format::{
    AttributeRecord, DirectoryRecord, ENTRY_DIRECTORY, ENTRY_INODE, ENTRY_WHITEOUT, EntryRecord, FLAG_OPAQUE, Header,
    LayerRecord, MAGIC, NO_LAYER, VERSION, ViewError, XattrHead, damaged,
};

/// A layer of a run.
#[derive(Debug, Clone)]
pub struct ViewLayer {
    /// The layer's persistent number, `1..=MAX_NUMBER`.
    pub number: u32,
    /// What is in it.
    pub toc: Arc<Toc>,
}

impl ViewLayer {
    /// How a view names this layer.
    pub(crate) fn record(&self) -> LayerRecord {
        LayerRecord {
            number: self.number.into(),
            inodes: self.toc.inode_count().into(),
            blob_digest: *self.toc.blob_digest().as_bytes(),
        }
    }

    /// Says that an error is this layer's.
    pub(crate) const fn error(&self, source: FormatError) -> ViewError {
        ViewError::Layer { layer: self.number, source }
    }
}

/// The tables in the order of the file and of [`Header::counts`].
#[derive(Clone, Copy)]
enum Table {
    Layers,
    Directories,
    Entries,
    Attributes,
    Text,
}

/// Bytes of one record of each table, in the order of [`Table`].
const RECORD_SIZES: [usize; 5] =
    [size_of::<LayerRecord>(), size_of::<DirectoryRecord>(), size_of::<EntryRecord>(), size_of::<AttributeRecord>(), 1];

/// The merged tree of one run of layers, as [`build_view`](crate::build_view) wrote it down.
pub struct View {
    number: u32,
    bytes: Box<dyn AsRef<[u8]> + Send + Sync>,
    layers: Vec<ViewLayer>,
    /// Where each table starts in `bytes`, and where the last one ends.
    starts: [usize; RECORD_SIZES.len() + 1],
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("View").field("number", &self.number).field("layers", &self.layers).finish_non_exhaustive()
    }
}

/// A name in a directory of a view.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ViewEntry<'a> {
    /// Index of the entry in the whole view.
    pub(crate) index: u32,
    pub(crate) name: &'a [u8],
    pub(crate) target: Target<'a>,
}

/// What a name stands for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target<'a> {
    /// An inode, not a directory, of a layer.
    Inode(&'a ViewLayer, u32),
    /// A directory of the view.
    Directory(u32),
    /// A whiteout that must be shown.
    Whiteout,
}

/// Where the attributes of a directory are.
pub(crate) enum Attributes<'a> {
    /// Those of a directory of a layer.
    Inode(&'a ViewLayer, Inode<'a>),
    /// The view's own record.
    Record(AttributeRecord),
}

impl View {
    /// Opens the bytes of the view with the persistent number `number` (`1..=MAX_NUMBER`), which were built from `layers`
    /// (bottom first). Costs the same for every size of the tree.
    ///
    /// # Errors
    ///
    /// When the bytes are no view of this version or of other layers: they must be built again. [`ViewError::Limit`] when the
    /// number does not fit.
    pub fn open(
        number: u32,
        bytes: impl AsRef<[u8]> + Send + Sync + 'static,
        layers: Vec<ViewLayer>,
    ) -> Result<Self, ViewError> {
        if number == 0 || number > MAX_NUMBER {
            return Err(ViewError::Limit { what: "number of the view out of range" });
        }
        let all = bytes.as_ref();
        let (header, _) = Header::read_from_prefix(all).map_err(|_| damaged("shorter than its header"))?;
        if header.magic != MAGIC {
            return Err(ViewError::Magic);
        }
        if header.version.get() != VERSION {
            return Err(ViewError::Version { found: header.version.get() });
        }
        let mut starts = [size_of::<Header>(); RECORD_SIZES.len() + 1];
        for (i, (count, size)) in header.counts.iter().zip(RECORD_SIZES).enumerate() {
            let table = (count.get() as usize).checked_mul(size);
            starts[i + 1] = table
                .and_then(|bytes| starts[i].checked_add(bytes))
                .ok_or(damaged("tables exceed the address space"))?;
        }
        if starts[RECORD_SIZES.len()] != all.len() {
            return Err(damaged("tables do not add up to the size of the file"));
        }
        let view = Self { number, bytes: Box::new(bytes), layers, starts };
        view.check_layers()?;
        Ok(view)
    }

    /// The view's persistent number.
    #[must_use]
    pub const fn number(&self) -> u32 {
        self.number
    }

    /// The run, bottom first.
    #[must_use]
    pub fn layers(&self) -> &[ViewLayer] {
        &self.layers
    }

    fn check_layers(&self) -> Result<(), ViewError> {
        let records: &[LayerRecord] = self.table(Table::Layers)?;
        if records.len() != self.layers.len() {
            return Err(ViewError::OtherLayers { what: "their number" });
        }
        for (record, layer) in records.iter().zip(&self.layers) {
            let given = layer.record();
            if record.number != given.number {
                return Err(ViewError::OtherLayers { what: "the number of a layer" });
            }
            if *record != given {
                return Err(ViewError::OtherLayers { what: "the TOC of a layer" });
            }
        }
        Ok(())
    }

    /// The directory at `index`.
    pub(crate) fn directory(&self, index: u32) -> Result<DirectoryRecord, ViewError> {
        let record: DirectoryRecord = self.record(Table::Directories, index)?;
        if record.nlink.get() == 0 || (index == 0) != (record.parent.get() == crate::view_format::NONE) {
            return Err(damaged("a directory's record makes no sense"));
        }
        Ok(record)
    }

    /// The entry at `position` of `directory`, or `None` after the last one.
    pub(crate) fn entry(&self, directory: &DirectoryRecord, position: u32) -> Result<Option<ViewEntry<'_>>, ViewError> {
        if position >= directory.count.get() {
            return Ok(None);
        }
        let index = directory.first.get().checked_add(position).ok_or(damaged("entries out of range"))?;
        let record: EntryRecord = self.record(Table::Entries, index)?;
        let layer = self.layer(record.layer.get())?;
        let child = child(layer, &record)?;
        let target = record.target.get();
        let target = match (record.kind.get(), child.inode) {
            (ENTRY_INODE, Some(inode)) if inode == target => Target::Inode(layer, inode),
            (ENTRY_DIRECTORY, Some(_)) if target != 0 => Target::Directory(target),
            (ENTRY_WHITEOUT, _) => Target::Whiteout,
            _ => return Err(damaged("an entry's record makes no sense")),
        };
        Ok(Some(ViewEntry { index, name: child.name, target }))
    }

    /// The entry `name` of `directory`.
    pub(crate) fn find(&self, directory: &DirectoryRecord, name: &[u8]) -> Result<Option<ViewEntry<'_>>, ViewError> {
        let (mut low, mut high) = (0, directory.count.get());
        while low < high {
            let middle = low + (high - low) / 2;
            let Some(entry) = self.entry(directory, middle)? else { return Ok(None) };
            match entry.name.cmp(name) {
                Ordering::Equal => return Ok(Some(entry)),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    /// Whether the entry at `index` of the whole view is a whiteout.
    pub(crate) fn is_whiteout(&self, index: u32) -> Result<bool, ViewError> {
        let entries: &[EntryRecord] = self.table(Table::Entries)?;
        Ok(entries.get(index as usize).is_some_and(|record| record.kind.get() == ENTRY_WHITEOUT))
    }

    /// Whether there is a directory `index`.
    pub(crate) fn has_directory(&self, index: u32) -> bool {
        self.table::<DirectoryRecord>(Table::Directories).is_ok_and(|records| (index as usize) < records.len())
    }

    /// The attributes of `directory`.
    pub(crate) fn attributes(&self, directory: &DirectoryRecord) -> Result<Attributes<'_>, ViewError> {
        let index = directory.attributes.get();
        if directory.layer.get() != NO_LAYER {
            let layer = self.layer(directory.layer.get())?;
            let inode = layer.toc.inode(index).map_err(|source| layer.error(source))?;
            if !inode.is_dir() {
                return Err(damaged("a directory has the attributes of something else"));
            }
            return Ok(Attributes::Inode(layer, inode));
        }
        let record: AttributeRecord = self.record(Table::Attributes, index)?;
        if record.present.get() != 1 || record.mode.get() > 0o7777 || record.mtime_nsec.get() >= 1_000_000_000 {
            return Err(damaged("attributes make no sense"));
        }
        Ok(Attributes::Record(record))
    }

    /// Gives the extended attributes of `record` to `each`.
    pub(crate) fn record_xattrs(
        &self,
        record: &AttributeRecord,
        each: &mut dyn FnMut(&[u8], &[u8]),
    ) -> Result<(), ViewError> {
        let text: &[u8] = self.table(Table::Text)?;
        let start = record.xattrs_off.get() as usize;
        let end = start.checked_add(record.xattrs_len.get() as usize);
        let mut rest = end.and_then(|end| text.get(start..end)).ok_or(damaged("attribute text out of range"))?;
        while !rest.is_empty() {
            let (head, after) = XattrHead::read_from_prefix(rest).map_err(|_| damaged("attribute text ends early"))?;
            let name_len = head.name_len.get() as usize;
            let (name, after) =
                after.split_at_checked(name_len).filter(|_| name_len > 0).ok_or(damaged("attribute without a name"))?;
            let value = after.split_at_checked(head.value_len.get() as usize);
            let (value, after) = value.ok_or(damaged("attribute text ends early"))?;
            each(name, value);
            rest = after;
        }
        Ok(())
    }

    fn layer(&self, position: u16) -> Result<&ViewLayer, ViewError> {
        self.layers.get(usize::from(position)).ok_or(damaged("layer out of range"))
    }

    fn record<T: FromBytes + Immutable + KnownLayout + Unaligned + Copy>(
        &self,
        table: Table,
        index: u32,
    ) -> Result<T, ViewError> {
        self.table::<T>(table)?.get(index as usize).copied().ok_or(damaged("record out of range"))
    }

    /// The records of a table. `T` must be the record type of `table`.
    fn table<T: FromBytes + Immutable + KnownLayout + Unaligned>(&self, table: Table) -> Result<&[T], ViewError> {
        let range = self.starts[table as usize]..self.starts[table as usize + 1];
        let bytes = (*self.bytes).as_ref().get(range).ok_or(damaged("file became shorter"))?;
        <[T]>::ref_from_bytes(bytes).map_err(|_| damaged("table is not whole"))
    }
}

/// Whether `directory` shows `trusted.overlay.opaque`.
pub(crate) const fn shows_opaque(directory: &DirectoryRecord) -> bool {
    directory.flags.get() & FLAG_OPAQUE != 0
}

/// The name of an entry and what its layer has there.
fn child<'a>(layer: &'a ViewLayer, record: &EntryRecord) -> Result<Dirent<'a>, ViewError> {
    let find = || {
        let directory = layer.toc.inode(record.directory.get())?;
        layer.toc.children(&directory)?.get(record.position.get() as usize)
    };
    find().map_err(|source| layer.error(source))
}
