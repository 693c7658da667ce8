//! Each row of the hostile-tar table has the verdict that stands there. That the verdicts are right is held by the end-to-end
//! test of the same name, with containerd as the judge.
#![allow(missing_docs, reason = "tests")]
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "hostile/mod.rs"]
mod table;

use std::collections::HashSet;

use millstream_toc::build::{BuildOptions, Built, build};
use millstream_toc::{BuildError, Compression, Toc};
use table::{Canary, Expect, Media, Row};

const CANARY: Canary<'_> = Canary { dir: "/outside/of/all", name: "canary" };

fn judge(row: &Row) -> Result<(), String> {
    let compression = match row.media {
        Media::Plain => Compression::Plain,
        Media::Gzip => Compression::Gzip,
    };
    let built = build(&row.blob[..], &BuildOptions::new(compression), &mut ());
    match (row.expect, built) {
        (Expect::Lazy, Ok(Built { toc })) => {
            let toc = Toc::open(toc).map_err(|error| error.to_string())?;
            toc.check().map_err(|error| error.to_string())?;
            let diff_id = millstream_oci::Digest::of(&row.tar);
            if toc.diff_id().0 == diff_id { Ok(()) } else { Err("another diff ID".to_owned()) }
        }
        (Expect::Declined(part), Err(error @ BuildError::Ineligible { .. })) if error.to_string().contains(part) => {
            Ok(())
        }
        (Expect::Refused(part), Err(error @ BuildError::Invalid { .. })) if error.to_string().contains(part) => Ok(()),
        (expect, built) => Err(format!("should be {expect:?}, is {:?}", built.map(|built| built.toc.len()))),
    }
}

#[test]
fn every_archive_has_its_verdict() {
    let rows = table::rows(&CANARY);
    assert!(rows.len() > 200, "{}", rows.len());
    let names: HashSet<&str> = rows.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names.len(), rows.len(), "a name is there twice");
    let wrong: Vec<String> =
        rows.iter().filter_map(|row| Some(format!("{}: {}", row.name, judge(row).err()?))).collect();
    assert!(wrong.is_empty(), "{} of {} rows:\n{}", wrong.len(), rows.len(), wrong.join("\n"));
}

#[test]
fn the_layer_below_them_is_a_good_one() {
    let built = build(&table::base()[..], &BuildOptions::new(Compression::Plain), &mut ()).unwrap();
    assert!(Toc::open(built.toc).unwrap().inode_count() > 20);
}
