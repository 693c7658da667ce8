//! Takes TOCs into a store of its own, reads all of every one, and says how much anonymous memory that left behind.
//!
//!     cargo run --release -p millstream-toc --example build_toc -- layer.tar.gz /tmp/layer.toc
//!     cargo run --release -p millstream-chunkstore --example admit -- /tmp/layer.toc
//!
//! Pages of the mapped files are not anonymous: the kernel takes them back when it needs them.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;

use millstream_chunkstore::{Store, StoreOptions};
use millstream_toc::Toc;
use redb::Database;

/// Anonymous memory of this process in KiB.
fn anonymous() -> Result<u64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).ok_or("no RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Looks at every inode and name.
fn read_all(toc: &Toc) -> Result<u64, Box<dyn Error>> {
    let mut names = 0;
    for ix in 0..toc.inode_count() {
        let inode = toc.inode(ix)?;
        std::hint::black_box(toc.size(&inode)?);
        if inode.is_dir() {
            for entry in toc.children(&inode)? {
                names += entry?.name.len() as u64;
            }
        }
    }
    Ok(names)
}

fn main() -> Result<(), Box<dyn Error>> {
    let tocs: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let dir = std::env::temp_dir().join(format!("millstream-admit-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let store = Store::open(&dir.join("store"), Arc::new(Database::create(dir.join("db"))?), StoreOptions::default())?;
    for path in tocs {
        let before = anonymous()?;
        let bytes = std::fs::read(&path)?;
        let size = bytes.len();
        let layer = store.admit(&bytes)?;
        drop(bytes);
        let admitted = anonymous()?;
        let names = read_all(layer.toc())?;
        println!(
            "{}: TOC {size} bytes, {} inodes, {names} bytes of names; anonymous memory {before} KiB before, {:+} KiB \
             when admitted, {:+} KiB when all was read",
            path.display(),
            layer.toc().inode_count(),
            i128::from(admitted) - i128::from(before),
            i128::from(anonymous()?) - i128::from(before),
        );
    }
    drop(store);
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}
