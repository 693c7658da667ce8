//! One header block: which of the formats it is, and its fields.

use super::{Fault, Member, MemberKind, TarLimits};

/// Bytes of a block, the unit of an archive.
pub(super) const BLOCK: usize = 512;
/// A block.
pub(super) type Block = [u8; BLOCK];

/// Largest major number of a device (12 bits) and largest minor number (20 bits): what Linux' `dev_t` holds.
const MAX_DEVICE: (u32, u32) = (0xfff, 0xf_ffff);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

/// The fields of a header as written, later changed by what was announced before it.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) typeflag: u8,
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) size: i64,
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) mtime: (i64, u32),
    device: (i64, i64),
}

impl Header {
    /// Checks the sum of `block` and reads its fields.
    pub(super) fn parse(block: &Block) -> Result<Self, Fault> {
        let format = format_of(block)?;
        let mut header = Self {
            typeflag: block[156],
            name: c_string(&block[..100]).to_vec(),
            link: c_string(&block[157..257]).to_vec(),
            size: number(&block[124..136])?,
            mode: number(&block[100..108])?,
            uid: number(&block[108..116])?,
            gid: number(&block[116..124])?,
            mtime: (number(&block[136..148])?, 0),
            device: (0, 0),
        };
        if format != Format::V7 {
            header.device = (number(&block[329..337])?, number(&block[337..345])?);
        }
        let prefix: &[u8] = match format {
            Format::V7 => &[],
            Format::Ustar => c_string(&block[345..500]),
            Format::Star => {
                // Access and change time: not kept, but a header that has them wrong is refused.
                number(&block[476..488])?;
                number(&block[488..500])?;
                c_string(&block[345..476])
            }
            Format::Gnu => gnu_prefix(block),
        };
        if !prefix.is_empty() {
            header.name = [prefix, &header.name].join(&b'/');
        }
        Ok(header)
    }

    /// Whether no content follows, whatever size the header gives.
    pub(super) const fn has_no_data(&self) -> bool {
        matches!(self.typeflag, b'1'..=b'6')
    }

    /// The member, without its content.
    pub(super) fn into_member(self, xattrs: Vec<(Vec<u8>, Vec<u8>)>, limits: &TarLimits) -> Result<Member, Fault> {
        let kind = match self.typeflag {
            b'0' | b'S' => MemberKind::Regular,
            b'1' => MemberKind::HardLink,
            b'2' => MemberKind::Symlink,
            b'3' => MemberKind::CharDevice,
            b'4' => MemberKind::BlockDevice,
            b'5' => MemberKind::Directory,
            b'6' => MemberKind::Fifo,
            _ => MemberKind::Unknown,
        };
        if self.name.len() > limits.max_name || self.link.len() > limits.max_name {
            return Err(Fault::Limit("name is too long"));
        }
        // The one way in is `GNU.sparse.name`. The model lets it pass, the system calls that follow do not.
        if self.name.contains(&0) {
            return Err(Fault::Invalid("NUL in a name"));
        }
        let rdev = match kind {
            MemberKind::CharDevice | MemberKind::BlockDevice => {
                (device(self.device.0, MAX_DEVICE.0)?, device(self.device.1, MAX_DEVICE.1)?)
            }
            _ => (0, 0),
        };
        let size = if kind == MemberKind::Regular { self.size } else { 0 };
        Ok(Member {
            kind,
            typeflag: self.typeflag,
            mode: u16::try_from(self.mode & 0o7777).unwrap_or_default(),
            uid: owner(self.uid)?,
            gid: owner(self.gid)?,
            mtime: self.mtime,
            size: u64::try_from(size).map_err(|_| Fault::Invalid("negative size"))?,
            stored: 0,
            data_off: 0,
            extents: None,
            rdev,
            xattrs,
            name: self.name,
            link: self.link,
        })
    }
}

/// The highest number means "leave as it is" to `chown`, so nobody can own a file with it.
fn owner(id: i64) -> Result<u32, Fault> {
    u32::try_from(id).ok().filter(|id| *id != u32::MAX).ok_or(Fault::Unusable("owner or group out of range"))
}

fn device(number: i64, most: u32) -> Result<u32, Fault> {
    u32::try_from(number).ok().filter(|number| *number <= most).ok_or(Fault::Unusable("device number out of range"))
}

fn format_of(block: &Block) -> Result<Format, Fault> {
    let (mut unsigned, mut signed) = (0_i64, 0_i64);
    for (i, byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&i) { b' ' } else { *byte };
        unsigned += i64::from(byte);
        // Some old writers summed signed bytes.
        signed += i64::from(byte.cast_signed());
    }
    let sum = octal(&block[148..156])?;
    if sum != unsigned && sum != signed {
        return Err(Fault::Invalid("wrong checksum of a header"));
    }
    Ok(match (&block[257..263], &block[263..265], &block[508..512]) {
        (b"ustar\0", _, b"tar\0") => Format::Star,
        (b"ustar\0", ..) => Format::Ustar,
        (b"ustar ", b" \0", _) => Format::Gnu,
        _ => Format::V7,
    })
}

/// GNU headers have times where USTAR has the prefix. A writer that is still around (Go before 1.8) put a prefix there all the
/// same; where the times make no sense, the prefix is meant.
fn gnu_prefix(block: &Block) -> &[u8] {
    let is_time = |field: &[u8]| field[0] == 0 || number(field).is_ok();
    if is_time(&block[345..357]) && is_time(&block[357..369]) {
        return &[];
    }
    let prefix = c_string(&block[345..500]);
    if prefix.is_ascii() { prefix } else { &[] }
}

/// The size of a sparse file with its holes, of an old GNU header.
pub(super) fn gnu_real_size(block: &Block) -> Result<i64, Fault> {
    // STAR uses the same type for something else.
    if format_of(block)? != Format::Gnu {
        return Err(Fault::Invalid("sparse file that is not in the GNU format"));
    }
    number(&block[483..495])
}

/// The bytes before the first NUL.
pub(super) fn c_string(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A number in base 256 (first bit set; two's complement, big-endian) or octal.
pub(super) fn number(field: &[u8]) -> Result<i64, Fault> {
    let Some(first) = field.first().filter(|byte| **byte & 0x80 != 0) else { return octal(field) };
    // Negative numbers are read inverted: -a - 1 is !a.
    let invert = if first & 0x40 == 0 { 0 } else { 0xff };
    let mut value = 0_i64;
    for (i, byte) in field.iter().enumerate() {
        let byte = byte ^ invert;
        let byte = if i == 0 { byte & 0x7f } else { byte };
        value = value
            .checked_mul(256)
            .and_then(|value| value.checked_add(byte.into()))
            .ok_or(Fault::Invalid("number in a header is too large"))?;
    }
    Ok(if invert == 0 { value } else { !value })
}

/// An octal number, padded with blanks or NULs; none at all is 0.
fn octal(field: &[u8]) -> Result<i64, Fault> {
    let is_padding = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field.iter().position(|byte| !is_padding(byte)).unwrap_or(field.len());
    let end = field.iter().rposition(|byte| !is_padding(byte)).map_or(start, |last| last + 1);
    let mut value = 0_i64;
    for byte in c_string(&field[start..end]) {
        if !matches!(byte, b'0'..=b'7') {
            return Err(Fault::Invalid("number in a header is not octal"));
        }
        // The longest field has 12 digits of 3 bits.
        value = (value << 3) | i64::from(byte - b'0');
    }
    Ok(value)
}
