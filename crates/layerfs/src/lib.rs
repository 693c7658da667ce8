#![doc = include_str!("../README.md")]
#![cfg_attr(test, allow(clippy::duplicate_mod, reason = "`schedules` has the same file with other locks"))]

mod attr;
mod below;
mod fs;
mod implied;
mod node_id;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test that panics has found something")]
mod run_reference;
#[cfg(test)]
mod schedules;
mod sync;
mod view;
mod view_build;
mod view_format;

pub use attr::Attr;
pub use below::{Below, BelowEntry, DirectoryAttributes};
pub use fs::{DirEntry, Entry, File, FsError, LayerFs};
pub use implied::{Contradiction, contradiction};
pub use node_id::{Decoded, MAX_NUMBER, NodeId};
pub use view::{View, ViewLayer};
pub use view_build::{MAX_LAYERS, build_view};
pub use view_format::{VERSION as VIEW_VERSION, ViewError};
