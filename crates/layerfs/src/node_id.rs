//! Node ids: derived from what a node *is*, so that a new process answers for ids an old one gave out.

use std::fmt;

/// Lowest bit that says whether an id belongs to a view.
const VIEW_BIT: u64 = 1 << 55;
/// In the space of views, the lower half numbers directories and the upper half whiteouts.
const WHITEOUT_BIT: u32 = 1 << 31;
/// Layer and view numbers have this many bits.
const NUMBER_BITS: u32 = 23;

/// Highest layer or view number that fits into an id; the lowest is 1.
pub const MAX_NUMBER: u32 = (1 << NUMBER_BITS) - 1;

/// Identity of a node of the mount, below 2^56; the kernel shows it as `st_ino`.
///
/// ```text
/// bit 55 = 0   (layer number, 23 bits) << 32 | inode of that layer's TOC (32 bits)   everything but directories
/// bit 55 = 1   (view number, 23 bits)  << 32 | 0 | directory of that view (31 bits)  directories
/// bit 55 = 1   (view number, 23 bits)  << 32 | 1 | entry of that view (31 bits)      whiteouts that a view shows
/// ```
///
/// Numbers start at 1, therefore 1 is free for the root of the mount.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u64);

/// What an id stands for. That an id can be decoded does not mean that the node exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Decoded {
    /// The root of the mount, which lists the views.
    Root,
    /// Anything but a directory: an inode of a layer, the same in every view.
    File {
        /// Number of the layer.
        layer: u32,
        /// Index of the inode in the layer's TOC.
        inode: u32,
    },
    /// A directory of a view; directory 0 is the view's root.
    Directory {
        /// Number of the view.
        view: u32,
        /// Index of the directory.
        directory: u32,
    },
    /// A whiteout that a view shows to the overlay above it.
    Whiteout {
        /// Number of the view.
        view: u32,
        /// Index of the entry that is the whiteout.
        entry: u32,
    },
}

impl NodeId {
    /// The root of the mount.
    pub const ROOT: Self = Self(1);

    /// The id of an inode that is not a directory; `None` if `layer` is not within `1..=MAX_NUMBER`.
    #[must_use]
    pub const fn file(layer: u32, inode: u32) -> Option<Self> {
        match number_bits(layer) {
            Some(bits) => Some(Self(bits | inode as u64)),
            None => None,
        }
    }

    /// The id of a directory; `None` if `view` is not within `1..=MAX_NUMBER` or `directory` not below 2^31.
    #[must_use]
    pub const fn directory(view: u32, directory: u32) -> Option<Self> {
        match number_bits(view) {
            Some(bits) if directory & WHITEOUT_BIT == 0 => Some(Self(VIEW_BIT | bits | directory as u64)),
            _ => None,
        }
    }

    /// The id of a whiteout; `None` if `view` is not within `1..=MAX_NUMBER` or `entry` not below 2^31.
    #[must_use]
    pub const fn whiteout(view: u32, entry: u32) -> Option<Self> {
        match number_bits(view) {
            Some(bits) if entry & WHITEOUT_BIT == 0 => Some(Self(VIEW_BIT | bits | (entry | WHITEOUT_BIT) as u64)),
            _ => None,
        }
    }

    /// The number as the kernel sees it.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// Takes a number that came from the kernel; [`NodeId::decode`] says whether it can be one of ours.
    #[must_use]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// What the id stands for, or `None` if it is none that this program ever gives out.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "the masks leave no bits that could be lost")]
    pub const fn decode(self) -> Option<Decoded> {
        if self.0 == Self::ROOT.0 {
            return Some(Decoded::Root);
        }
        if self.0 >= VIEW_BIT << 1 {
            return None;
        }
        let number = (self.0 >> 32) as u32 & MAX_NUMBER;
        let low = self.0 as u32;
        if number == 0 {
            return None;
        }
        Some(if self.0 & VIEW_BIT == 0 {
            Decoded::File { layer: number, inode: low }
        } else if low & WHITEOUT_BIT == 0 {
            Decoded::Directory { view: number, directory: low }
        } else {
            Decoded::Whiteout { view: number, entry: low & !WHITEOUT_BIT }
        })
    }
}

const fn number_bits(number: u32) -> Option<u64> {
    if number == 0 || number > MAX_NUMBER { None } else { Some((number as u64) << 32) }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.decode() {
            Some(Decoded::Root) => f.write_str("root"),
            Some(Decoded::File { layer, inode }) => write!(f, "layer {layer} inode {inode}"),
            Some(Decoded::Directory { view, directory }) => write!(f, "view {view} directory {directory}"),
            Some(Decoded::Whiteout { view, entry }) => write!(f, "view {view} whiteout {entry}"),
            None => write!(f, "unknown id {:#x}", self.0),
        }
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({self})")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that panics has found something")]
mod tests {
    use super::*;

    const NUMBERS: [u32; 5] = [1, 2, 0x2A_AAAA, MAX_NUMBER - 1, MAX_NUMBER];
    const LOW31: [u32; 5] = [0, 1, 0x2AAA_AAAA, (1 << 31) - 2, (1 << 31) - 1];

    fn all() -> Vec<(NodeId, Decoded)> {
        let mut ids = vec![(NodeId::ROOT, Decoded::Root)];
        for number in NUMBERS {
            for low in LOW31 {
                for inode in [low, low | WHITEOUT_BIT] {
                    ids.push((NodeId::file(number, inode).unwrap(), Decoded::File { layer: number, inode }));
                }
                ids.push((
                    NodeId::directory(number, low).unwrap(),
                    Decoded::Directory { view: number, directory: low },
                ));
                ids.push((NodeId::whiteout(number, low).unwrap(), Decoded::Whiteout { view: number, entry: low }));
            }
        }
        ids
    }

    #[test]
    fn every_id_decodes_to_what_it_was_made_of_and_stays_below_2_to_the_56() {
        let mut seen = std::collections::BTreeSet::new();
        for (id, decoded) in all() {
            assert_eq!(id.decode(), Some(decoded));
            assert_eq!(NodeId::from_raw(id.raw()), id);
            assert!(id.raw() < 1 << 56 && id.raw() != 0, "{id}");
            assert!(seen.insert(id), "{id} is given out twice");
        }
    }

    #[test]
    fn layout_is_the_documented_one() {
        assert_eq!(NodeId::ROOT.raw(), 1);
        assert_eq!(NodeId::file(1, 0).unwrap().raw(), 0x0000_0001_0000_0000);
        assert_eq!(NodeId::file(MAX_NUMBER, u32::MAX).unwrap().raw(), 0x007F_FFFF_FFFF_FFFF);
        assert_eq!(NodeId::directory(1, 0).unwrap().raw(), 0x0080_0001_0000_0000);
        assert_eq!(NodeId::directory(MAX_NUMBER, 0x7FFF_FFFF).unwrap().raw(), 0x00FF_FFFF_7FFF_FFFF);
        assert_eq!(NodeId::whiteout(1, 0).unwrap().raw(), 0x0080_0001_8000_0000);
    }

    #[test]
    fn numbers_that_do_not_fit_have_no_id() {
        for number in [0, MAX_NUMBER + 1, u32::MAX] {
            assert_eq!(NodeId::file(number, 0), None);
            assert_eq!(NodeId::directory(number, 0), None);
            assert_eq!(NodeId::whiteout(number, 0), None);
        }
        for low in [WHITEOUT_BIT, u32::MAX] {
            assert_eq!(NodeId::directory(1, low), None);
            assert_eq!(NodeId::whiteout(1, low), None);
        }
    }

    #[test]
    fn foreign_ids_are_refused() {
        for raw in [0, 2, 0xFFFF_FFFF, VIEW_BIT, VIEW_BIT | 1, 1 << 56, (1 << 56) | (1 << 32), 1 << 63, u64::MAX] {
            assert_eq!(NodeId::from_raw(raw).decode(), None, "{raw:#x}");
        }
    }

    #[test]
    fn each_bit_below_56_belongs_to_exactly_one_field() {
        for bit in 0..64 {
            let raw = (1 << 32) ^ (1_u64 << bit);
            let decoded = NodeId::from_raw(raw).decode();
            match bit {
                0..32 => assert_eq!(decoded, Some(Decoded::File { layer: 1, inode: 1 << bit })),
                32 => assert_eq!(decoded, None, "number 0"),
                33..55 => assert_eq!(decoded, Some(Decoded::File { layer: 1 | 1 << (bit - 32), inode: 0 })),
                55 => assert_eq!(decoded, Some(Decoded::Directory { view: 1, directory: 0 })),
                _ => assert_eq!(decoded, None),
            }
        }
    }
}
