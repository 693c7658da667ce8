//! Views that are shown, made again and taken away while their layers are removed and admitted: the very file, over a real store
//! on a disk in memory. Others may come before every step on the files of views.

use super::{admission, sync};

#[allow(dead_code)]
#[path = "../../../chunkstore/tests/fixture/tar.rs"]
mod tar;
#[allow(dead_code, unreachable_pub)]
#[path = "../views.rs"]
mod views;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use millstream_chunkstore::{Faults, Step, Store, StoreOptions};
use millstream_layerfs::LayerFs;
use millstream_oci::Digest;
use millstream_toc::{BuildOptions, Compression, build};
use redb::Database;
use redb::backends::InMemoryBackend;
use shuttle::future::{self, JoinHandle, block_on};

use self::admission::Admission;
use self::views::Views;
use crate::damage::Damages;

/// Any time may pass before a step on the file of a view; nothing of the store is locked then.
#[derive(Debug)]
struct Slow;

impl Faults for Slow {
    fn before(&self, step: Step, path: &Path) -> std::io::Result<()> {
        if step != Step::Commit && path.components().any(|part| part.as_os_str() == "views") {
            super::future_point();
        }
        Ok(())
    }
}

/// A base and a layer on it, by their tables.
fn tables() -> [Vec<u8>; 2] {
    thread_local! {
        static TABLES: [Vec<u8>; 2] = ["base", "top"].map(|name| {
            let tar = tar::tar(&[(name, name.into())]);
            build(&tar[..], &BuildOptions::new(Compression::Plain), &mut ()).unwrap().toc
        });
    }
    TABLES.with(Clone::clone)
}

/// A node with these two layers, and a view of both that is shown.
#[derive(Debug)]
struct Node {
    directory: tempfile::TempDir,
    store: Arc<Store>,
    fs: Arc<LayerFs>,
    views: Arc<Views>,
    admission: Arc<Admission>,
    run: [Digest; 2],
}

impl Node {
    fn new() -> Arc<Self> {
        let memory = Path::new("/dev/shm");
        let directory = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let db = Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
        let options = StoreOptions {
            sync_interval: std::time::Duration::ZERO,
            faults: Arc::new(Slow),
            ..StoreOptions::default()
        };
        let store = Arc::new(Store::open(directory.path(), Arc::new(db), options).unwrap());
        let run = tables().map(|toc| store.admit(&toc).unwrap().digest());
        let fs = Arc::new(LayerFs::new());
        let views = Views::new(store.clone(), fs.clone(), PathBuf::from("/m"), Damages::default());
        let (views, admission) = (Arc::new(views), Arc::default());
        let mut node = Self { directory, store, fs, views, admission, run };
        node.admission = node.views.admission();
        block_on(node.views.path(&node.run, &[])).unwrap();
        Arc::new(node)
    }

    /// As `NodeImages::remove_dying`.
    async fn removed(&self) {
        let turn = self.admission.turn().await;
        let hide = |dying: &[Digest]| {
            let layers = dying.iter().filter_map(|digest| self.store.layer(digest));
            self.views.hide(&layers.map(|layer| layer.number()).collect::<Vec<u32>>())
        };
        let remove = |digest: &Digest| {
            super::future_point();
            self.store.remove(digest).unwrap();
            self.store.layer(digest).is_none()
        };
        self.admission.remove_dying(&turn, hide, remove).unwrap();
    }

    /// The last snapshot of the upper layer goes.
    async fn give_back(&self) {
        self.admission.give_back([self.run[1]]);
        self.removed().await;
    }

    /// A pull wants it again.
    async fn admit(&self) {
        self.removed().await;
        let turn = self.admission.turn().await;
        self.store.admit(&tables()[1]).unwrap();
        drop(turn);
    }

    /// A container's `Prepare`.
    async fn show(&self) {
        drop(self.views.path(&self.run, &[]).await);
    }

    /// A view's file is spoiled, and a check comes by.
    async fn check(&self) {
        for file in std::fs::read_dir(self.directory.path().join("views")).unwrap() {
            // Under a name of its own first: whoever has the old one mapped keeps it.
            let spoiled = self.directory.path().join("spoiled");
            std::fs::write(&spoiled, "spoiled").unwrap();
            std::fs::rename(spoiled, file.unwrap().path()).unwrap();
        }
        future::yield_now().await;
        self.views.check().unwrap();
    }

    /// The table of the upper layer is found damaged, and is whole again.
    async fn repair(&self) {
        if let Some(layer) = self.store.layer(&self.run[1]) {
            self.views.hide_with(layer.number()).unwrap();
        }
        future::yield_now().await;
        self.views.restore().unwrap();
    }

    /// What is shown, what is recorded and what is there agree.
    fn settle(&self) {
        let recorded = self.store.views().unwrap();
        let there: BTreeSet<u32> = self.store.layers().iter().map(|layer| layer.number()).collect();
        for (number, key) in &recorded {
            assert!(key.layers.iter().all(|layer| there.contains(layer)), "view {number} has layers that are gone");
        }
        let recorded: Vec<u32> = recorded.into_iter().map(|(number, _)| number).collect();
        assert_eq!(self.fs.views(), recorded, "what is shown, and what is recorded");
        let broken: Vec<u32> = self.views.broken().into_keys().collect();
        assert!(broken.iter().all(|number| recorded.contains(number)), "{broken:?} are named, and are gone");
    }
}

/// Runs these at once, then looks whether all is right.
fn at_once<const N: usize>(node: &Arc<Node>, tasks: [JoinHandle<()>; N]) {
    tasks.into_iter().for_each(|task| block_on(task).unwrap());
    node.settle();
}

/// Starts a method of a node.
macro_rules! task {
    ($node:ident.$method:ident) => {{
        let node = Arc::clone(&$node);
        future::spawn(async move { node.$method().await })
    }};
}

/// Seen to fail with: a view that is built without asking whether its layers were given back; one that is built while views are
/// being taken away; a view that is forgotten and still shown.
#[test]
fn views_are_shown_and_taken_away_with_their_layers() {
    super::explore_some(super::schedules() / 5, || {
        let node = Node::new();
        at_once(&node, [task!(node.show), task!(node.give_back), task!(node.admit), task!(node.show)]);
        // Nothing that was removed keeps the next one from being shown.
        block_on(node.admit());
        block_on(node.show());
        block_on(node.views.path(&node.run, &[])).unwrap();
        assert_eq!(node.fs.views().len(), 1);
        node.settle();
    });
}

/// Seen to fail with: a check, or a restoration, beside which views can be taken away.
#[test]
fn a_view_that_is_made_again_does_not_outlive_its_layers() {
    super::explore_some(super::schedules() / 5, || {
        let node = Node::new();
        at_once(&node, [task!(node.check), task!(node.give_back), task!(node.repair), task!(node.show)]);
    });
}
