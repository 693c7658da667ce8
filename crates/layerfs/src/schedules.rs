//! Views that are shown, replaced and taken away under look-ups, run under a scheduler that tries orders out: the very file, with
//! its lock in place of the usual one. Each test says which change of the code it was seen to fail on.

mod sync {
    pub(crate) use std::sync::PoisonError;

    pub(crate) use shuttle::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
}

#[allow(dead_code, unreachable_pub)]
#[path = "fs.rs"]
mod fs;

use std::cell::LazyCell;
use std::sync::Arc;

use millstream_toc::{BuildOptions, Compression, Toc, build};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner, thread};

use self::fs::{Entry, FsError, LayerFs};
use crate::{NodeId, View, ViewLayer, build_view};

/// Orders that a test tries in each of two ways: `MILLSTREAM_SCHEDULES`, else few enough for every day.
fn schedules() -> usize {
    std::env::var("MILLSTREAM_SCHEDULES").ok().and_then(|number| number.parse().ok()).unwrap_or(2000)
}

/// Tries orders at random, and such as change seldom at the worst moments.
fn explore(test: fn()) {
    let config = || {
        let mut config = Config::new();
        config.stack_size = 1 << 18;
        config
    };
    Runner::new(RandomScheduler::new(schedules()), config()).run(test);
    Runner::new(PctScheduler::new(3, schedules()), config()).run(test);
}

/// A layer with one file `directory/name`.
fn layer(number: u32, name: &str) -> ViewLayer {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(name.len() as u64);
    header.set_mode(0o644);
    header.set_path(format!("directory/{name}")).unwrap();
    header.set_cksum();
    tar.append(&header, name.as_bytes()).unwrap();
    let tar = tar.into_inner().unwrap();
    let built = build(&tar[..], &BuildOptions::new(Compression::Plain), &mut ()).unwrap();
    ViewLayer { number, toc: Arc::new(Toc::open(built.toc).unwrap()) }
}

/// Number of the layer that all views have, of the other one of view 1, and of that of view 2.
const BASE: u32 = 1;
const FIRST: u32 = 2;
const SECOND: u32 = 3;

thread_local! {
    static LAYERS: LazyCell<[ViewLayer; 3]> =
        LazyCell::new(|| [layer(BASE, "base"), layer(FIRST, "first"), layer(SECOND, "second")]);
}

/// View 1 or 2: the common layer and one of its own.
fn view(number: u32) -> View {
    let layers = LAYERS.with(|layers| vec![layers[0].clone(), layers[number as usize].clone()]);
    View::open(number, build_view(&layers, None).unwrap(), layers).unwrap()
}

/// Looks a path up from the root of the mount, as the kernel does, name by name.
fn find(fs: &LayerFs, path: &str) -> Result<Entry, FsError> {
    let mut names = path.split('/');
    let first = fs.lookup(NodeId::ROOT, names.next().unwrap_or_default().as_bytes())?;
    names.try_fold(first, |parent, name| fs.lookup(parent.id, name.as_bytes()))
}

/// Asks all there is to be asked about a file.
fn ask(fs: &LayerFs, id: NodeId, size: u64) -> Result<u32, FsError> {
    assert_eq!(fs.attr(id)?.size, size);
    assert_eq!(fs.xattr_names(id)?, b"");
    let file = fs.file(id)?;
    assert_eq!(file.data.len(), size);
    Ok(file.layer)
}

fn task(fs: &Arc<LayerFs>, work: impl FnOnce(&LayerFs) + Send + 'static) -> thread::JoinHandle<()> {
    let fs = Arc::clone(fs);
    thread::spawn(move || work(&fs))
}

fn end(tasks: impl IntoIterator<Item = thread::JoinHandle<()>>) {
    tasks.into_iter().for_each(|task| task.join().unwrap());
}

/// Seen to fail with: a view that is taken away and then shown anew where it is replaced, in two steps; a layer that is counted
/// once for all views.
#[test]
fn who_reads_a_view_that_stays_notices_nothing_of_what_comes_and_goes() {
    explore(|| {
        let fs = Arc::new(LayerFs::new());
        fs.add(view(1));
        let open = find(&fs, "1/directory/base").unwrap().id;
        let reads = task(&fs, move |fs| {
            // A file that was opened, a look-up by name, and a listing.
            assert_eq!(ask(fs, open, 4).unwrap(), BASE);
            let found = find(fs, "1/directory/first").unwrap();
            assert_eq!(ask(fs, found.id, 5).unwrap(), FIRST);
            let (mut names, directory) = (Vec::new(), find(fs, "1/directory").unwrap().id);
            fs.read_dir(directory, 0, &mut |entry| {
                names.push(entry.name.to_vec());
                false
            })
            .unwrap();
            assert_eq!(names, [&b"."[..], b"..", b"base", b"first"]);
            assert_eq!(ask(fs, open, 4).unwrap(), BASE);
        });
        // Made again in place, as after damage of its file.
        let again = task(&fs, |fs| fs.add(view(1)));
        let comes_and_goes = task(&fs, |fs| {
            fs.add(view(2));
            fs.remove(2);
        });
        let goes = task(&fs, |fs| fs.remove(2));
        end([reads, again, comes_and_goes, goes]);
        assert_eq!(fs.views(), [1]);
        fs.remove(1);
        assert!(matches!(fs.file(open), Err(FsError::Stale)), "its layer stays although no view has it");
    });
}

/// Seen to fail with: a removal that looks for the view under one lock and takes it away under the next (the layers are given
/// back twice).
#[test]
fn who_reads_a_view_that_goes_has_right_answers_or_none() {
    explore(|| {
        let fs = Arc::new(LayerFs::new());
        fs.add(view(1));
        fs.add(view(2));
        let own = find(&fs, "2/directory/second").unwrap().id;
        let reads = task(&fs, move |fs| {
            for (path, size, layer) in [("2/directory/second", 6, SECOND), ("2/directory/base", 4, BASE)] {
                match find(fs, path).and_then(|found| ask(fs, found.id, size)) {
                    Ok(found) => assert_eq!(found, layer),
                    Err(FsError::Stale) => {}
                    // The view itself is not listed any more.
                    Err(FsError::NotFound) => assert!(!fs.views().contains(&2)),
                    Err(error) => panic!("{path}: {error}"),
                }
            }
        });
        let open = task(&fs, move |fs| match ask(fs, own, 6) {
            Ok(layer) => assert_eq!(layer, SECOND),
            Err(error) => assert!(matches!(error, FsError::Stale), "{error}"),
        });
        let one = task(&fs, |fs| fs.remove(2));
        let two = task(&fs, |fs| fs.remove(2));
        end([reads, open, one, two]);
        assert_eq!(fs.views(), [1]);
        assert!(matches!(fs.file(own), Err(FsError::Stale)));
        let base = find(&fs, "1/directory/base").unwrap();
        assert_eq!(ask(&fs, base.id, 4).unwrap(), BASE);
    });
}
