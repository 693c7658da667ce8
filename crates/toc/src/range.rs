//! Half-open ranges, one type for each of the four address spaces a layer has.

macro_rules! range_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
        pub struct $name {
            /// First byte.
            pub start: u64,
            /// One past the last byte; never below `start`.
            pub end: u64,
        }

        impl $name {
            /// The range `[start, end)`; an `end` below `start` gives the empty range at `start`.
            #[must_use]
            pub const fn new(start: u64, end: u64) -> Self {
                Self { start, end: if end < start { start } else { end } }
            }

            /// `len` bytes from `start` (saturating at the end of the address space).
            #[must_use]
            pub const fn with_len(start: u64, len: u64) -> Self {
                Self { start, end: start.saturating_add(len) }
            }

            /// Number of bytes.
            #[must_use]
            pub const fn len(&self) -> u64 {
                self.end - self.start
            }

            /// Whether it holds no byte.
            #[must_use]
            pub const fn is_empty(&self) -> bool {
                self.start == self.end
            }

            /// The bytes both ranges hold, or `None`.
            #[must_use]
            pub fn intersect(&self, other: &Self) -> Option<Self> {
                let start = self.start.max(other.start);
                let end = self.end.min(other.end);
                (start < end).then_some(Self { start, end })
            }

            /// Whether every byte of `other` is in this range.
            #[must_use]
            pub const fn contains(&self, other: &Self) -> bool {
                self.start <= other.start && other.end <= self.end
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "[{}, {})", self.start, self.end)
            }
        }
    };
}

range_type! {
    /// Compressed bytes of a layer, as the registry stores the blob.
    BlobRange
}
range_type! {
    /// Uncompressed bytes of the layer's tar.
    TarRange
}
range_type! {
    /// Bytes of one regular file (holes of sparse files count).
    FileRange
}
range_type! {
    /// Bytes of a layer's data file in the local store.
    DataRange
}
