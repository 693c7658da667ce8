//! PAX extended headers: `length key=value\n`, again and again.

use std::collections::BTreeMap;

use super::Fault;
use super::header::Header;

const XATTR: &[u8] = b"SCHILY.xattr.";
const SPARSE_MAP: &[u8] = b"GNU.sparse.map";
const SPARSE_OFFSET: &[u8] = b"GNU.sparse.offset";
const SPARSE_NUMBYTES: &[u8] = b"GNU.sparse.numbytes";

/// Keys that change a member. All others are checked like these, and forgotten.
const KEYS: [&[u8]; 15] = [
    b"path",
    b"linkpath",
    b"size",
    b"uid",
    b"gid",
    b"mtime",
    b"atime",
    b"ctime",
    b"GNU.sparse.major",
    b"GNU.sparse.minor",
    b"GNU.sparse.name",
    b"GNU.sparse.size",
    b"GNU.sparse.realsize",
    b"GNU.sparse.numblocks",
    SPARSE_MAP,
];

/// Where a sparse map is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SparseForm<'a> {
    /// Forms 0.0 and 0.1: in the records, as the number of entries and a list with commas.
    InRecords {
        /// Number of entries, in digits.
        count: &'a [u8],
        /// Offset, length, offset, length...
        list: &'a [u8],
    },
    /// Form 1.0: before the content.
    InContent,
}

/// The records that matter. Of equal keys the last one counts, even if it is empty.
#[derive(Debug, Default)]
pub(super) struct PaxRecords {
    records: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl PaxRecords {
    /// Reads all records; one that is malformed spoils them all.
    pub(super) fn parse(mut text: &[u8]) -> Result<Self, Fault> {
        let mut records = BTreeMap::new();
        // Form 0.0 repeats its two keys for every entry; it is turned into the list that form 0.1 has.
        let mut list: Vec<&[u8]> = Vec::new();
        while !text.is_empty() {
            let (key, value, rest) = record(text)?;
            text = rest;
            if matches!(key, SPARSE_OFFSET | SPARSE_NUMBYTES) {
                let expected = if list.len().is_multiple_of(2) { SPARSE_OFFSET } else { SPARSE_NUMBYTES };
                if key != expected || value.contains(&b',') {
                    return Err(Fault::Invalid("sparse map in PAX records is out of order"));
                }
                list.push(value);
            } else if key.starts_with(XATTR) || KEYS.contains(&key) {
                records.insert(key.to_vec(), value.to_vec());
            }
        }
        if !list.is_empty() {
            records.insert(SPARSE_MAP.to_vec(), list.join(&b','));
        }
        Ok(Self { records })
    }

    /// The value of `key`; empty when there is none, which means the same.
    fn get(&self, key: &[u8]) -> &[u8] {
        self.records.get(key).map(Vec::as_slice).unwrap_or_default()
    }

    /// Whether there is a record for the name.
    pub(super) fn has_path(&self) -> bool {
        !self.get(b"path").is_empty()
    }

    /// Replaces the fields of `header` for which there are records.
    pub(super) fn merge_into(&self, header: &mut Header) -> Result<(), Fault> {
        for (key, value) in self.records.iter().filter(|(_, value)| !value.is_empty()) {
            match key.as_slice() {
                b"path" => header.name.clone_from(value),
                b"linkpath" => header.link.clone_from(value),
                b"size" => header.size = decimal(value)?,
                b"uid" => header.uid = decimal(value)?,
                b"gid" => header.gid = decimal(value)?,
                b"mtime" => header.mtime = time(value)?,
                b"atime" | b"ctime" => drop(time(value)?),
                _ => {}
            }
        }
        Ok(())
    }

    /// Which sparse form the records announce.
    pub(super) fn sparse_form(&self) -> Option<SparseForm<'_>> {
        let list = self.get(SPARSE_MAP);
        let in_records = SparseForm::InRecords { count: self.get(b"GNU.sparse.numblocks"), list };
        match (self.get(b"GNU.sparse.major"), self.get(b"GNU.sparse.minor")) {
            (b"0", b"0" | b"1") => Some(in_records),
            (b"1", b"0") => Some(SparseForm::InContent),
            // The forms before 1.0 did not always say which they were.
            (b"", b"") if !list.is_empty() => Some(in_records),
            _ => None,
        }
    }

    /// Name and size of a sparse file, for which the header has stand-ins.
    pub(super) fn merge_sparse_into(&self, header: &mut Header) -> Result<(), Fault> {
        let name = self.get(b"GNU.sparse.name");
        if !name.is_empty() {
            header.name = name.to_vec();
        }
        let size = match self.get(b"GNU.sparse.size") {
            b"" => self.get(b"GNU.sparse.realsize"),
            size => size,
        };
        if !size.is_empty() {
            header.size = decimal(size)?;
        }
        Ok(())
    }

    /// Takes the extended attributes out, sorted by name. An empty value is one: only for the other keys it means "none".
    pub(super) fn take_xattrs(&mut self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let records = std::mem::take(&mut self.records);
        records.into_iter().filter_map(|(key, value)| Some((key.strip_prefix(XATTR)?.to_vec(), value))).collect()
    }
}

/// Key, value, and the text after the record.
type Record<'a> = (&'a [u8], &'a [u8], &'a [u8]);

/// The first record of `text`.
fn record(text: &[u8]) -> Result<Record<'_>, Fault> {
    const BAD: Fault = Fault::Invalid("malformed PAX record");
    let blank = text.iter().position(|byte| *byte == b' ').ok_or(BAD)?;
    // The length counts its own digits and the newline.
    let len = decimal(&text[..blank]).ok().and_then(|len| usize::try_from(len).ok()).ok_or(BAD)?;
    if len < 5 || len > text.len() || len <= blank + 1 {
        return Err(BAD);
    }
    let (body, newline) = text[blank + 1..len].split_at(len - blank - 2);
    let equals = body.iter().position(|byte| *byte == b'=').ok_or(BAD)?;
    let (key, value) = (&body[..equals], &body[equals + 1..]);
    let has_nul = match key {
        b"path" | b"linkpath" | b"uname" | b"gname" => value.contains(&0),
        _ => key.contains(&0),
    };
    if newline != b"\n" || key.is_empty() || has_nul {
        return Err(BAD);
    }
    Ok((key, value, &text[len..]))
}

/// A decimal number with an optional sign and nothing else.
pub(super) fn decimal(text: &[u8]) -> Result<i64, Fault> {
    std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or(Fault::Invalid("malformed number in extended header"))
}

/// Seconds since 1970 with an optional fraction, of which nanoseconds are kept; negative before 1970.
fn time(text: &[u8]) -> Result<(i64, u32), Fault> {
    const BAD: Fault = Fault::Invalid("malformed time in PAX record");
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(point) => (&text[..point], &text[point + 1..]),
        None => (text, &[][..]),
    };
    let seconds = decimal(whole)?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(BAD);
    }
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanos = digits.fold(0, |nanos, digit| nanos * 10 + u32::from(digit - b'0'));
    if whole.starts_with(b"-") && nanos > 0 {
        // Nanoseconds count upward from the second before.
        let seconds = seconds.checked_sub(1).ok_or(Fault::Unusable("time out of range"))?;
        return Ok((seconds, 1_000_000_000 - nanos));
    }
    Ok((seconds, nanos))
}
