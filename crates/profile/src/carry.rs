//! A profile for an image that nobody has recorded yet, out of that of a near relation.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use millstream_toc::format::{ContentIx, InodeIx, Kind};
use millstream_toc::{FormatError, Toc};

use crate::merge::runs;
use crate::piece::pieces;
use crate::proof::Mask;
use crate::run::{PAGE_SIZE, PageRun, Profile, ProfileLayer};

/// Bytes of a path that is looked for; no kernel takes a longer one.
const MAX_PATH: usize = 4096;

/// Where a file's pages are in the other image: layer and first page.
type Place = (u32, u32);

/// The pages of `old` as they are in the image that consists of `layers` (bottom first), in the same order, each once.
///
/// Pages of a layer that both have, by the same table, stay. Of another layer the pages of each file go to the file that the
/// image shows under the same path (in the topmost of `layers` that has the path; whiteouts are not looked at), if it is a file
/// of the same size; else they are left out. `old_tocs` and `tocs` are the tables of `old.layers` and `layers`, in order;
/// what has none takes part only as a layer that stays. Hard links are found by one of their names.
///
/// # Errors
/// When a table is damaged.
pub fn carry_over(
    old: &Profile,
    old_tocs: &[Option<&Toc>],
    layers: &[ProfileLayer],
    tocs: &[Option<&Toc>],
) -> Result<Profile, FormatError> {
    let mut pages = Pages::default();
    let mut moved: HashMap<u32, HashMap<ContentIx, Option<Place>>> = HashMap::new();
    let stays = |layer: &ProfileLayer| (0..).zip(layers).find(|(_, new)| *new == layer).map(|(ix, _)| ix);
    let stays: Vec<Option<u32>> = old.layers.iter().map(stays).collect();
    for run in &old.runs {
        let place = run.layer as usize;
        if let Some(layer) = stays.get(place).copied().flatten() {
            (0..run.pages).for_each(|page| pages.add(layer, run.first.saturating_add(page)));
        } else if let Some(toc) = old_tocs.get(place).copied().flatten() {
            let moved = match moved.entry(run.layer) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => new.insert(moved_files(old, run.layer, toc, tocs)?),
            };
            carry_run(run, toc, moved, &mut pages)?;
        }
    }
    Ok(Profile { layers: layers.to_vec(), runs: runs(pages.list.into_iter()) })
}

/// Pages, each once.
#[derive(Default)]
struct Pages {
    list: Vec<(u32, u32)>,
    seen: HashSet<(u32, u32)>,
}

impl Pages {
    fn add(&mut self, layer: u32, page: u32) {
        if self.seen.insert((layer, page)) {
            self.list.push((layer, page));
        }
    }
}

fn carry_run(
    run: &PageRun,
    toc: &Toc,
    moved: &HashMap<ContentIx, Option<Place>>,
    pages: &mut Pages,
) -> Result<(), FormatError> {
    for (chunk, mask) in pieces(run, toc)? {
        let content = toc.content_of_chunk(chunk.ix)?;
        let Some((layer, first)) = moved.get(&content).copied().flatten() else { continue };
        let start = toc.content(content)?.data_off.get();
        let within = (chunk.data.start - start) / PAGE_SIZE;
        for bit in (0..Mask::BITS).filter(|bit| mask >> bit & 1 == 1) {
            // Both files have the same size, so that the sum is a page of the other layer.
            pages.add(layer, first.saturating_add(u32::try_from(within + u64::from(bit)).unwrap_or(u32::MAX)));
        }
    }
    Ok(())
}

/// Where the files went that `old` has pages of in its layer `layer`.
fn moved_files(
    old: &Profile,
    layer: u32,
    toc: &Toc,
    tocs: &[Option<&Toc>],
) -> Result<HashMap<ContentIx, Option<Place>>, FormatError> {
    let mut wanted = HashSet::new();
    for run in old.runs.iter().filter(|run| run.layer == layer) {
        for (chunk, _) in pieces(run, toc)? {
            wanted.insert(toc.content_of_chunk(chunk.ix)?);
        }
    }
    let mut moved = HashMap::new();
    for (content, path) in paths(toc, &wanted)? {
        moved.insert(content, place_of(&path, toc.content(content)?.size.get(), tocs)?);
    }
    Ok(moved)
}

/// The file at `path`, if it has `size` bytes.
fn place_of(path: &[u8], size: u64, tocs: &[Option<&Toc>]) -> Result<Option<Place>, FormatError> {
    for (layer, toc) in tocs.iter().enumerate().rev() {
        let (Ok(layer), Some(toc)) = (u32::try_from(layer), toc) else { continue };
        let Some(inode) = toc.lookup_path(path)? else { continue };
        let inode = toc.inode(inode)?;
        if inode.kind() != Kind::Regular || toc.size(&inode)? != size {
            return Ok(None);
        }
        let first = u32::try_from(toc.file_data(&inode)?.start / PAGE_SIZE).ok();
        return Ok(first.map(|first| (layer, first)));
    }
    Ok(None)
}

/// A path of each of these contents. Looks at every name once; memory: a few words for each directory.
fn paths(toc: &Toc, wanted: &HashSet<ContentIx>) -> Result<HashMap<ContentIx, Vec<u8>>, FormatError> {
    let mut found = HashMap::new();
    let mut parents: HashMap<InodeIx, (InodeIx, &[u8])> = HashMap::from([(0, (0, &b""[..]))]);
    let mut pending = vec![0];
    while let Some(dir) = pending.pop() {
        if found.len() == wanted.len() {
            break;
        }
        for entry in toc.children(&toc.inode(dir)?)? {
            let entry = entry?;
            let Some(child) = entry.inode else { continue };
            let inode = toc.inode(child)?;
            if inode.is_dir() {
                // In a damaged table a directory may have two names, even within itself; the first counts.
                if let Entry::Vacant(new) = parents.entry(child) {
                    new.insert((dir, entry.name));
                    pending.push(child);
                }
            } else if let Some(content) = inode.content().filter(|content| wanted.contains(content))
                && !found.contains_key(&content)
                && let Some(path) = path(&parents, dir, entry.name)
            {
                found.insert(content, path);
            }
        }
    }
    Ok(found)
}

fn path(parents: &HashMap<InodeIx, (InodeIx, &[u8])>, mut dir: InodeIx, name: &[u8]) -> Option<Vec<u8>> {
    let (mut names, mut len) = (vec![name], name.len());
    while dir != 0 {
        let (parent, name) = parents.get(&dir)?;
        len += name.len() + 1;
        if len > MAX_PATH {
            return None;
        }
        names.push(name);
        dir = *parent;
    }
    names.reverse();
    Some(names.join(&b'/'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{Sample, sample};
    use millstream_oci::Digest;

    fn layer(sample: &Sample) -> ProfileLayer {
        ProfileLayer { digest: sample.toc.blob_digest(), toc: sample.toc.digest() }
    }

    fn carried(old: &[&Sample], numbers: &[u32], new: &[&Sample]) -> Vec<u32> {
        let layers = |samples: &[&Sample]| samples.iter().map(|sample| layer(sample)).collect::<Vec<_>>();
        fn tocs<'t>(samples: &[&'t Sample]) -> Vec<Option<&'t Toc>> {
            samples.iter().map(|sample| Some(&sample.toc)).collect()
        }
        let profile = Profile::from_numbers(layers(old), numbers).unwrap();
        assert!(profile.fits(&tocs(old)));
        let carried = carry_over(&profile, &tocs(old), &layers(new), &tocs(new)).unwrap();
        assert_eq!(carried.layers, layers(new));
        assert!(carried.fits(&tocs(new)));
        carried.numbers()
    }

    #[test]
    fn the_same_layer_keeps_its_pages_wherever_it_lies() {
        let (base, top, other) =
            (sample(&[("a", 9000)]), sample(&[("b", 50_000)]), sample(&[("unrelated", 100), ("z", 1)]));
        let numbers = [1, 2, 3, 0, 0, 1];
        assert_eq!(carried(&[&base, &top], &numbers, &[&base, &top]), numbers);
        assert_eq!(carried(&[&base, &top], &numbers, &[&top, &other, &base]), [0, 2, 3, 2, 0, 1]);
        assert!(carried(&[&base, &top], &numbers, &[&other]).is_empty());
    }

    #[test]
    fn files_of_a_changed_layer_are_found_by_path_and_size() {
        // Pages: a 0..3, big 3..16, s 16.
        let old = sample(&[("bin/a", 9000), ("lib/deep/big", 50_000), ("s", 10)]);
        // Pages: new 0..25, big 25..38, a 38..41; s has grown.
        let new = sample(&[("0new", 100_000), ("lib/deep/big", 50_000), ("bin/a", 9000), ("s", 11)]);
        let numbers = [0, 16, 1, 0, 2, 1, 0, 5, 10, 0, 0, 2];
        assert_eq!(carried(&[&old], &numbers, &[&new]), [0, 40, 1, 0, 27, 10, 0, 38, 2]);
        // One run over the end of a file and the begin of the next: they lie apart now.
        assert_eq!(carried(&[&old], &[0, 2, 2], &[&new]), [0, 40, 1, 0, 25, 1]);
        // The topmost counts: there it is a directory, and the other has no page of it.
        let cover = sample(&[("bin/a/x", 5), ("lib/deep/big", 50_000)]);
        assert_eq!(carried(&[&old], &numbers, &[&new, &cover]), [1, 3, 10]);
    }

    #[test]
    fn without_a_table_nothing_is_found_again() {
        let (old, new) = (sample(&[("a", 9000)]), sample(&[("a", 9000), ("b", 1)]));
        let profile = Profile::from_numbers(vec![layer(&old)], &[0, 0, 2]).unwrap();
        for (old_tocs, tocs) in [(None, Some(&new.toc)), (Some(&old.toc), None)] {
            assert!(carry_over(&profile, &[old_tocs], &[layer(&new)], &[tocs]).unwrap().runs.is_empty());
        }
        let other_table = ProfileLayer { toc: Digest::of(b"other"), ..layer(&old) };
        let carried = carry_over(&profile, &[Some(&old.toc)], &[other_table], &[Some(&old.toc)]).unwrap();
        assert_eq!(carried.numbers(), [0, 0, 2], "of a table that changed the files are found again");
    }
}
