#![allow(clippy::cast_possible_truncation, reason = "numbers of a test are small")]

use super::*;

const ROWS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("rows");

fn put(db: &Database, rows: std::ops::Range<u64>) {
    let write = db.begin_write().unwrap();
    for row in rows {
        write.open_table(ROWS).unwrap().insert(row, [row as u8; 100].as_slice()).unwrap();
    }
    write.commit().unwrap();
}

fn rows(db: &Database) -> u64 {
    let read = db.begin_read().unwrap();
    match read.open_table(ROWS) {
        Ok(table) => redb::ReadableTableMetadata::len(&table).unwrap(),
        Err(_) => 0,
    }
}

/// A root with a database of some pages, and a snapshot.
fn root() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let (db, found) = open(root.path()).unwrap();
    assert_eq!(found, Found::Whole);
    put(&db, 0..1000);
    fs::create_dir_all(root.path().join("s/1/fs")).unwrap();
    fs::write(root.path().join("s/1/fs/written"), "by a container").unwrap();
    root
}

fn aside(root: &Path) -> Vec<String> {
    let names = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| name.contains(".damaged-")).collect();
    names.sort();
    names
}

type Harm = fn(&Path);

fn write_garbage(path: &Path, at: u64) {
    let garbage: Vec<u8> = (0..4096u32).map(|byte| (byte.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    File::options().write(true).open(path).unwrap().write_all_at(&garbage, at).unwrap();
}

fn len(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

fn cut(path: &Path, len: u64) {
    File::options().write(true).open(path).unwrap().set_len(len).unwrap();
}

const HARMS: [(&str, Harm); 9] = [
    ("gone", |path| fs::remove_file(path).unwrap()),
    ("empty", |path| cut(path, 0)),
    ("half", |path| cut(path, len(path) / 2)),
    ("its header garbage", |path| write_garbage(path, 0)),
    ("every page garbage", |path| (1..len(path) / 4096).for_each(|page| write_garbage(path, page * 4096))),
    ("zeros", |path| fs::write(path, vec![0; len(path) as usize]).unwrap()),
    ("text", |path| fs::write(path, "no database").unwrap()),
    ("a directory", |path| {
        fs::remove_file(path).unwrap();
        fs::create_dir(path).unwrap();
    }),
    ("a link to itself", |path| {
        fs::remove_file(path).unwrap();
        std::os::unix::fs::symlink(path, path).unwrap();
    }),
];

#[test]
fn whatever_becomes_of_the_first_file_nothing_is_lost() {
    for (name, harm) in HARMS {
        let root = root();
        harm(&root.path().join(FILE));
        let (db, found) = open(root.path()).unwrap();
        assert!(matches!(found, Found::FromCopy { .. }), "{name}: {found:?}");
        assert_eq!(rows(&db), 1000, "{name}");
        put(&db, 1000..1001);
        drop(db);
        // What was damaged is kept, unless there was nothing.
        assert_eq!(aside(root.path()).len(), usize::from(!matches!(name, "gone" | "empty")), "{name}");
        assert!(root.path().join("s/1/fs/written").exists(), "{name}");
        // And the copy is one again.
        harm(&root.path().join(FILE));
        let (db, found) = open(root.path()).unwrap();
        assert!(matches!(found, Found::FromCopy { .. }), "{name}, again: {found:?}");
        assert_eq!(rows(&db), 1001, "{name}, again");
    }
}

#[test]
fn one_page_of_garbage_is_never_read_as_data() {
    let whole = root();
    let pages = len(&whole.path().join(FILE)) / 4096;
    let (mut unused, mut restored) = (0, 0);
    // Every 7th: each of them is an open and a check.
    for page in (0..pages).step_by(7).chain([pages - 1]) {
        let root = tempfile::tempdir().unwrap();
        for file in [FILE, COPY] {
            fs::copy(whole.path().join(file), root.path().join(file)).unwrap();
        }
        write_garbage(&root.path().join(FILE), page * 4096);
        let (db, found) = open(root.path()).unwrap();
        assert_eq!(rows(&db), 1000, "page {page}");
        match found {
            Found::Whole => unused += 1,
            Found::FromCopy { .. } => restored += 1,
            Found::Lost { what } => panic!("page {page}: {what}"),
        }
    }
    assert!(restored > 0, "{unused} pages were not used");
}

#[test]
fn a_damaged_copy_is_made_again() {
    for (name, harm) in HARMS {
        let root = root();
        harm(&root.path().join(COPY));
        let (db, found) = open(root.path()).unwrap();
        assert_eq!(found, Found::Whole, "{name}");
        assert_eq!(rows(&db), 1000);
        put(&db, 1000..1001);
        drop(db);
        fs::remove_file(root.path().join(FILE)).unwrap();
        let (db, _) = open(root.path()).unwrap();
        assert_eq!(rows(&db), 1001, "{name}");
    }
}

#[test]
fn what_a_power_cut_leaves_of_either_file_is_whole() {
    let root = root();
    let (db, _) = open(root.path()).unwrap();
    put(&db, 1000..1100);
    // As they are on the disk at this moment, without an orderly end.
    let cut_off = tempfile::tempdir().unwrap();
    for file in [FILE, COPY] {
        fs::copy(root.path().join(file), cut_off.path().join(file)).unwrap();
    }
    let (again, found) = open(cut_off.path()).unwrap();
    assert_eq!((rows(&again), found), (1100, Found::Whole));
    drop(again);
    fs::copy(root.path().join(COPY), cut_off.path().join(COPY)).unwrap();
    fs::remove_file(cut_off.path().join(FILE)).unwrap();
    let (again, _) = open(cut_off.path()).unwrap();
    assert_eq!(rows(&again), 1100);
}

#[test]
fn with_both_files_lost_what_containers_wrote_is_kept() {
    for (name, harm) in HARMS {
        let root = root();
        harm(&root.path().join(FILE));
        harm(&root.path().join(COPY));
        let (db, found) = open(root.path()).unwrap();
        let Found::Lost { what } = found else { panic!("{name}: {found:?}") };
        assert_eq!(rows(&db), 0, "{name}");
        let kept = aside(root.path());
        let snapshots = kept.iter().find(|name| name.starts_with("s.damaged-")).unwrap();
        assert!(what.contains(snapshots), "{what}");
        let written = fs::read_to_string(root.path().join(snapshots).join("1/fs/written")).unwrap();
        assert_eq!(written, "by a container");
    }
}

#[test]
fn a_newer_format_is_refused_and_left_alone() {
    let root = root();
    let (db, _) = open(root.path()).unwrap();
    let write = db.begin_write().unwrap();
    write.open_table(FORMAT_TABLE).unwrap().insert(FORMAT_KEY, FORMAT + 1).unwrap();
    write.commit().unwrap();
    drop(db);
    let error = open(root.path()).unwrap_err().to_string();
    assert!(error.contains("newer program"), "{error}");
    assert!(aside(root.path()).is_empty());

    let root = self::root();
    let file = root.path().join(FILE);
    File::options().write(true).open(&file).unwrap().write_all_at(&[REDB_FORMAT + 1], REDB_FORMAT_AT).unwrap();
    let error = open(root.path()).unwrap_err().to_string();
    assert!(error.contains("newer program"), "{error}");
    assert!(aside(root.path()).is_empty());
}

#[test]
fn a_copy_that_cannot_be_written_is_given_up() {
    let root = root();
    let copy = root.path().join(COPY);
    let mirror = Mirror::open(&root.path().join(FILE), &copy).unwrap();
    // As a disk would that refuses: a descriptor for reading only.
    mirror.break_second(File::open(&copy).unwrap());
    let db = Builder::new().create_with_backend(mirror).unwrap();
    put(&db, 1000..1001);
    assert_eq!(rows(&db), 1001);
    assert!(!copy.exists());
    drop(db);
    let (db, found) = open(root.path()).unwrap();
    assert_eq!((rows(&db), found), (1001, Found::Whole));
    assert!(copy.exists());
}

#[test]
fn a_check_of_an_open_database_names_the_file_that_is_damaged_and_changes_nothing() {
    let root = root();
    let root = root.path();
    let (db, _) = open(root).unwrap();
    assert_eq!(check(root, &db).unwrap(), []);
    let bytes = fs::read(root.join(FILE)).unwrap();
    for (harmed, twin) in [(FILE, COPY), (COPY, FILE)] {
        // Some page is in use whatever the library does, so all of them are tried.
        let mut named = 0;
        for at in (0..len(&root.join(harmed))).step_by(4096) {
            write_garbage(&root.join(harmed), at);
            let found = check(root, &db).unwrap();
            let names: Vec<&str> = found.iter().map(|(name, _)| *name).collect();
            // In a page that nobody needs they are just not equal, and then it is the copy that is to be made anew.
            assert!(names == [harmed] || names == [COPY], "{at}: {found:?}");
            named += usize::from(names == [harmed]);
            assert!(fs::read(root.join(twin)).unwrap() == bytes, "the other file was changed");
            fs::write(root.join(harmed), &bytes).unwrap();
        }
        assert!(named > 2, "{harmed}: {named}");
    }
    fs::remove_file(root.join(COPY)).unwrap();
    assert!(matches!(&check(root, &db).unwrap()[..], [(COPY, what)] if what.contains("cannot be read")));
    put(&db, 1000..1001);
    assert_eq!(rows(&db), 1001, "it is in use as before");
}
