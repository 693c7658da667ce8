//! The figures that have a target, from the rows.

use serde_json::{Value, json};

use crate::floor::floor_of_transfer;
use crate::matrix::{Job, Link};
use crate::peers::{Known, Subject};
use crate::rows::{Row, Values};
use crate::statistics::{Ratio, geometric_mean, median, ratio};

const MILLSTREAM: &str = "millstream";
const PROFILE: &str = "profile";
const PROFILE_ON_DEMAND: &str = "profile, no hydration";
const INDEXED_ON_DEMAND: &str = "indexed, no hydration";
const COLD: &str = "cold";
/// A ratio is near a target if it is less than this share away from it.
const NEAR: f64 = 0.1;
const MIB: f64 = 1024.0 * 1024.0;

/// A cell of the rows.
#[derive(Debug, Clone, Copy)]
struct Cell<'a> {
    peer: &'a str,
    settings: &'a str,
    job: &'a str,
}

/// One of ours with these settings.
fn ours(settings: &str) -> Cell<'_> {
    Cell { peer: MILLSTREAM, settings, job: "start" }
}

type Take = fn(&Values) -> Option<f64>;

fn ready(values: &Values) -> Option<f64> {
    values.ready_s
}

fn local(values: &Values) -> Option<f64> {
    values.local_s
}

fn pull(values: &Values) -> Option<f64> {
    Some(values.pull_s)
}

/// Rows with questions about them.
pub(crate) struct Figures<'r> {
    rows: &'r [Row],
}

impl<'r> Figures<'r> {
    pub(crate) fn of(rows: &'r [Row]) -> Self {
        Self { rows }
    }

    /// Images that have rows, in alphabetical order.
    fn images(&self) -> Vec<&'r str> {
        let mut images: Vec<&str> = self.rows.iter().map(|row| row.key.image.as_str()).collect();
        images.sort_unstable();
        images.dedup();
        images
    }

    fn cell<'s>(&'s self, image: &'s str, link: Link, cell: Cell<'s>) -> impl Iterator<Item = &'r Row> + 's {
        self.rows.iter().filter(move |row| {
            let key = &row.key;
            key.image == image
                && key.link == link.name()
                && key.peer == cell.peer
                && key.settings == cell.settings
                && key.job == cell.job
        })
    }

    fn values(&self, image: &str, link: Link, cell: Cell<'_>, take: impl Fn(&Values) -> Option<f64>) -> Vec<f64> {
        self.cell(image, link, cell).filter_map(|row| take(&row.values)).collect()
    }

    /// Ratio of two cells, round by round.
    fn paired(&self, image: &str, link: Link, above: (Cell<'_>, Take), below: (Cell<'_>, Take)) -> Option<Ratio> {
        let pairs: Vec<(f64, f64)> = self
            .cell(image, link, above.0)
            .filter_map(|row| {
                let other = self.cell(image, link, below.0).find(|other| other.key.round == row.key.round)?;
                Some((above.1(&row.values)?, below.1(&other.values)?))
            })
            .collect();
        ratio(&pairs)
    }

    /// Ratio of two figures of the same runs.
    fn within(&self, image: &str, link: Link, cell: Cell<'_>, above: Take, below: Take) -> Option<Ratio> {
        let pairs = self.cell(image, link, cell).filter_map(|row| Some((above(&row.values)?, below(&row.values)?)));
        ratio(&pairs.collect::<Vec<_>>())
    }

    /// The peer whose median is the best on this image.
    fn best_peer(&self, image: &str, link: Link) -> Option<Cell<'r>> {
        let mut cells: Vec<Cell<'r>> = Vec::new();
        for row in self.rows.iter().filter(|row| row.key.image == image && row.key.link == link.name()) {
            let cell = Cell { peer: &row.key.peer, settings: &row.key.settings, job: "start" };
            let known = |one: &Cell<'_>| one.peer == cell.peer && one.settings == cell.settings;
            if row.key.job == "start" && !cell.peer.starts_with(MILLSTREAM) && !cells.iter().any(known) {
                cells.push(cell);
            }
        }
        let timed = cells.into_iter().filter_map(|cell| Some((median(&self.values(image, link, cell, ready))?, cell)));
        timed.min_by(|one, two| one.0.total_cmp(&two.0)).map(|(_, cell)| cell)
    }

    /// The ordinary pull that unpacks in parallel, of containerd 2.x.
    fn parallel(&self, image: &str, link: Link) -> Option<Cell<'r>> {
        let found = self.rows.iter().find(|row| {
            row.key.image == image
                && row.key.link == link.name()
                && row.key.settings == "tuned"
                && row.key.peer.starts_with("overlayfs, containerd 2")
        })?;
        Some(Cell { peer: &found.key.peer, settings: &found.key.settings, job: "start" })
    }

    /// Of every image that has it, the ratio; and their geometric mean.
    fn over_images(&self, of: impl Fn(&'r str) -> Option<Ratio>) -> Option<(f64, Vec<(&'r str, Ratio)>)> {
        let all: Vec<(&str, Ratio)> = self.images().into_iter().filter_map(|image| Some((image, of(image)?))).collect();
        let medians: Vec<f64> = all.iter().map(|(_, ratio)| ratio.median).collect();
        Some((geometric_mean(&medians)?, all))
    }

    /// All of them, as they stand in the summary.
    pub(crate) fn json(&self) -> Value {
        json!({
            "M1": self.m1(), "M2": self.m2(), "M3": self.m3(), "M4": self.m4(), "M5": self.m5(),
            "M6": self.m6(), "M7": self.m7(), "M8": self.m8(), "M9": self.m9(),
        })
    }

    fn m1(&self) -> Option<Value> {
        let link = Link::Slow;
        let (best, images) = self.over_images(|image| {
            let peer = self.best_peer(image, link)?;
            self.paired(image, link, (ours(PROFILE), ready), (peer, ready))
        })?;
        let floor = self.over_images(|image| self.within(image, link, ours(PROFILE), ready, |v| v.floor_s));
        let worst = images.iter().map(|(_, ratio)| ratio.median).fold(0.0, f64::max);
        Some(json!({
            "ratio_best_peer": best,
            "ratio_floor": floor.as_ref().map(|(mean, _)| *mean),
            "worst_image_ratio": worst,
            "images": by_image(&images),
            "images_floor": floor.map(|(_, images)| by_image(&images)),
        }))
    }

    fn m2(&self) -> Option<Value> {
        let link = Link::Fast;
        let (mean, images) = self
            .over_images(|image| self.paired(image, link, (ours(COLD), ready), (self.parallel(image, link)?, ready)))?;
        Some(json!({ "ratio": mean, "images": by_image(&images) }))
    }

    /// Round trips are seen by the time that they take where one is long.
    fn m3(&self) -> Option<Value> {
        let cell = Cell { peer: MILLSTREAM, settings: INDEXED_ON_DEMAND, job: "pull" };
        let of = |image, link| median(&self.values(image, link, cell, pull));
        let longer = Link::Long.round_trip() - Link::Fast.round_trip();
        let trips = of("layers", Link::Long)
            .zip(of("layers", Link::Fast))
            .map(|(long, short)| (long - short) / longer.as_secs_f64());
        // One after the other, on a connection that has to be opened first.
        let containerds = self.values("layers", Link::Long, cell, |v| v.containerd_requests.map(|n| n as f64 + 1.0));
        let containerds = median(&containerds);
        let layers = self.layers_ratio(cell);
        (trips.is_some() || layers.is_some()).then(|| {
            json!({
                "round_trips": trips.zip(containerds).map(|(all, own)| all - own),
                "round_trips_of_containerd": containerds,
                "layers_ratio": layers.map(|ratio| ratio.median),
                "layers": layers,
            })
        })
    }

    fn layers_ratio(&self, cell: Cell<'_>) -> Option<Ratio> {
        let (many, one) = ("layers", crate::images::FLAT);
        let pairs = self.cell(many, Link::Fast, cell).filter_map(|row| {
            let other = self.cell(one, Link::Fast, cell).find(|other| other.key.round == row.key.round)?;
            Some((row.values.pull_s, other.values.pull_s))
        });
        ratio(&pairs.collect::<Vec<_>>())
    }

    fn m4(&self) -> Option<Value> {
        let fetched: Take = |values| values.bytes_until_ready.map(|bytes| bytes as f64);
        let needed: Take = |values| values.bytes_needed.map(|bytes| bytes as f64);
        let of = |settings| self.over_images(|image| self.within(image, Link::Slow, ours(settings), fetched, needed));
        let (with, without) = (of(PROFILE_ON_DEMAND), of(INDEXED_ON_DEMAND));
        (with.is_some() || without.is_some()).then(|| {
            json!({
                "with_profile": with.as_ref().map(|(mean, _)| *mean),
                "without": without.as_ref().map(|(mean, _)| *mean),
                "images_with_profile": with.map(|(_, images)| by_image(&images)),
                "images_without": without.map(|(_, images)| by_image(&images)),
            })
        })
    }

    fn m5(&self) -> Option<Value> {
        let transfer: Take = |values| Some(floor_of_transfer(values.image_bytes, Link::Slow));
        let floor = self.over_images(|image| self.within(image, Link::Slow, ours(PROFILE), local, transfer));
        let containerd = self.over_images(|image| {
            self.paired(image, Link::Fast, (ours(PROFILE), local), (self.parallel(image, Link::Fast)?, pull))
        });
        (floor.is_some() || containerd.is_some()).then(|| {
            json!({
                "ratio_floor": floor.as_ref().map(|(mean, _)| *mean),
                "ratio_containerd": containerd.as_ref().map(|(mean, _)| *mean),
                "images_floor": floor.map(|(_, images)| by_image(&images)),
                "images_containerd": containerd.map(|(_, images)| by_image(&images)),
            })
        })
    }

    fn m6(&self) -> Option<Value> {
        let (mean, images) = self.over_images(|image| {
            self.paired(image, Link::Slow, (ours(PROFILE), ready), (ours(PROFILE_ON_DEMAND), ready))
        })?;
        Some(json!({ "ratio": mean, "images": by_image(&images) }))
    }

    /// Speeds: the peer's time above ours, so that more is better.
    fn files(&self, image: &str, take: Take) -> Option<Ratio> {
        let link = Link::Fast;
        let peer = Cell { job: "files", ..self.parallel(image, link)? };
        self.paired(image, link, (peer, take), (Cell { job: "files", ..ours(PROFILE) }, take))
    }

    fn m7(&self) -> Option<Value> {
        let least = |takes: &[Take]| {
            let images = self.images();
            let all = images.iter().flat_map(|image| takes.iter().filter_map(|take| self.files(image, *take)));
            all.map(|ratio| ratio.median).min_by(f64::total_cmp)
        };
        let reads = least(&[|v| v.more.get("read_cold_s").copied(), |v| v.more.get("read_warm_s").copied()]);
        let metadata = least(&[|v| v.more.get("walk_cold_s").copied(), |v| v.more.get("walk_warm_s").copied()]);
        let small = self.files("node", |values| values.more.get("read_cold_s").copied());
        reads.is_some().then(|| {
            json!({
                "read_ratio": reads,
                "metadata_ratio": metadata,
                "small_files_cold_ratio": small.map(|ratio| ratio.median),
                "small_files_cold": small,
            })
        })
    }

    fn m8(&self) -> Option<Value> {
        let memory = |name: &'static str, image: Option<&str>| -> Vec<f64> {
            let rows = self.rows.iter().filter(|row| row.key.peer.starts_with(MILLSTREAM));
            let rows = rows.filter(|row| image.is_none_or(|image| row.key.image == image));
            rows.filter_map(|row| row.values.more.get(name)).map(|bytes| bytes / MIB).collect()
        };
        let idle = median(&memory("memory_idle", None))?;
        let has_node = !memory("memory_after", Some("node")).is_empty();
        // The image with the most files, if it was measured.
        let after = median(&memory("memory_after", has_node.then_some("node")))?;
        let peak = memory("memory_peak", None).into_iter().fold(0.0, f64::max);
        Some(json!({ "idle_mib": idle, "per_image_mib": (after - idle).max(0.0), "peak_mib": peak }))
    }

    fn m9(&self) -> Option<Value> {
        let used: Take = |values| values.more.get("cpu_local_s").copied();
        let least: Take = |values| values.more.get("cpu_floor_s").copied();
        let of = |link| self.over_images(|image| self.within(image, link, ours(PROFILE), used, least));
        let (mean, images) = of(Link::Fast).or_else(|| of(Link::Slow))?;
        Some(json!({ "ratio_floor": mean, "images": by_image(&images) }))
    }
}

fn by_image(all: &[(&str, Ratio)]) -> Value {
    all.iter().map(|(image, ratio)| ((*image).to_owned(), json!(ratio))).collect::<serde_json::Map<_, _>>().into()
}

/// The cells whose ratio to another one of the group is so near a target that more runs have to tell.
pub(crate) fn near(rows: &[Row], image: &str, link: Link, cells: &[(Subject, Job)]) -> Vec<(Subject, Job)> {
    let figures = Figures::of(rows);
    let named = |subject: Subject, job: Job| (subject.peer(), subject.settings(), job.name());
    let mut found: Vec<(Subject, Job)> = Vec::new();
    for &(one, one_job) in cells {
        for &(two, two_job) in cells {
            let targets = targets(one, two);
            if targets.is_empty() {
                continue;
            }
            let (above, below) = (named(one, one_job), named(two, two_job));
            let cell = |name: &'static str, (peer, settings, _): &(String, String, &str)| -> Option<Vec<(u32, f64)>> {
                let cell = Cell { peer, settings, job: name };
                Some(figures.cell(image, link, cell).filter_map(|row| Some((row.key.round, of_job(row)?))).collect())
            };
            let (Some(above), Some(below)) = (cell(above.2, &above), cell(below.2, &below)) else { continue };
            let pairs = above.iter().filter_map(|(round, value)| {
                below.iter().find(|(other, _)| other == round).map(|(_, other)| (*value, *other))
            });
            let Some(ratio) = ratio(&pairs.collect::<Vec<_>>()) else { continue };
            if targets.iter().any(|target| (ratio.median / target - 1.0).abs() < NEAR) {
                for cell in [(one, one_job), (two, two_job)] {
                    if !found.contains(&cell) {
                        found.push(cell);
                    }
                }
            }
        }
    }
    found
}

/// What a row is judged by.
fn of_job(row: &Row) -> Option<f64> {
    if row.key.job == "files" { row.values.more.get("read_cold_s").copied() } else { row.values.ready_s }
}

/// The targets of the ratio of the first to the second.
fn targets(one: Subject, two: Subject) -> Vec<f64> {
    match (one, two) {
        (
            Subject::Millstream { known: Known::Profile, hydration: true, .. },
            Subject::Millstream { known: Known::Profile, hydration: false, .. },
        ) => vec![1.05],
        (Subject::Millstream { .. }, Subject::Millstream { .. }) => Vec::new(),
        (Subject::Millstream { known: Known::Profile, hydration: true, .. }, _) => vec![0.8, 1.0],
        (Subject::Millstream { known: Known::Nothing, .. }, Subject::Overlayfs { tuned: true, .. }) => vec![0.75, 1.05],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests;
