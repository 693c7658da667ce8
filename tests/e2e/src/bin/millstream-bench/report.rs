//! Summary for programs, table for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::matrix::Link;
use crate::metrics::Figures;
use crate::rows::{Row, Rows, Values};
use crate::{plots, statistics};

/// Key of the summary, name of the figure, target.
const TARGETS: [(&str, &str, &str, &str); 19] = [
    ("M1", "ratio_best_peer", "time to ready with a profile / best peer, 100 Mbit/s, 20 ms", "<= 0.80"),
    ("M1", "worst_image_ratio", "the same, worst image", "<= 1.00"),
    ("M1", "ratio_floor", "the same / floor", "<= 1.35"),
    ("M2", "ratio", "first run ever, nothing indexed / containerd 2.x unpacking in parallel, 1 Gbit/s", "<= 0.75"),
    ("M3", "round_trips", "round trips added before runc", "<= 1"),
    ("M3", "layers_ratio", "pull of 50 layers / pull of 1", "<= 1.10"),
    ("M4", "with_profile", "bytes fetched / bytes needed at ready, with a profile", "<= 1.3"),
    ("M4", "without", "the same without", "<= 2.5"),
    ("M5", "ratio_floor", "whole image local / floor, 100 Mbit/s", "<= 1.10"),
    ("M5", "ratio_containerd", "the same / containerd's own pull, 1 Gbit/s", "<= 0.60"),
    ("M6", "ratio", "time to ready with hydration / without", "<= 1.05"),
    ("M7", "read_ratio", "hydrated: speed of reads / overlayfs, worst", ">= 0.95"),
    ("M7", "metadata_ratio", "the same of metadata", ">= 0.90"),
    ("M7", "small_files_cold_ratio", "the same of many small files, cold", ">= 2"),
    ("M8", "idle_mib", "memory of the daemon, idle (MiB)", "<= 20"),
    ("M8", "per_image_mib", "the same for one image more (MiB)", "<= 1"),
    ("M8", "peak_mib", "the same at most (MiB)", "<= 96"),
    ("M9", "ratio_floor", "processor time of the daemon until all is local / floor", "<= 1.3"),
    ("M10", "", "much at once, stalled requests, deaths: `make soak` and the tests of `load`", ""),
];

/// Writes all of it from the rows of the latest commit.
pub(crate) fn write(dir: &Path, table: Option<&Path>) -> Result<()> {
    let rows = Rows::open(dir)?.latest();
    ensure!(!rows.is_empty(), "nothing was measured yet; hint: millstream-bench run");
    let metrics = Figures::of(&rows).json();
    let summary = json!({ "origin": rows[0].origin, "metrics": metrics, "rows": rows });
    keep(&dir.join("summary.json"), &serde_json::to_string_pretty(&summary)?)?;
    let text = markdown(&rows, &metrics);
    keep(&dir.join("RESULTS.md"), &text)?;
    if let Some(table) = table {
        keep(table, &text)?;
    }
    for link in [Link::Slow, Link::Fast] {
        for plot in plots::of(&rows, link) {
            keep(&dir.join(&plot.name), &plot.svg)?;
        }
    }
    println!("\n{text}\nThe same as JSON: {}", dir.join("summary.json").display());
    Ok(())
}

fn keep(file: &Path, text: &str) -> Result<()> {
    std::fs::write(file, text).with_context(|| format!("writing {}", file.display()))
}

/// Runs of one cell.
#[derive(Debug, Default)]
pub(crate) struct Cell<'r> {
    pub(crate) rows: Vec<&'r Row>,
}

impl Cell<'_> {
    /// The median of a figure over the runs that have it.
    pub(crate) fn median(&self, take: impl Fn(&Values) -> Option<f64>) -> Option<f64> {
        statistics::median(&self.rows.iter().filter_map(|row| take(&row.values)).collect::<Vec<_>>())
    }
}

/// Runs of one job on one link, by image, peer and settings.
pub(crate) fn cells<'r>(rows: &'r [Row], link: Link, job: &str) -> BTreeMap<(&'r str, &'r str, &'r str), Cell<'r>> {
    let mut cells: BTreeMap<_, Cell<'r>> = BTreeMap::new();
    for row in rows.iter().filter(|row| row.key.link == link.name() && row.key.job == job) {
        let key = &row.key;
        cells.entry((key.image.as_str(), key.peer.as_str(), key.settings.as_str())).or_default().rows.push(row);
    }
    cells
}

fn markdown(rows: &[Row], metrics: &Value) -> String {
    let mut text = String::new();
    let origin = &rows[0].origin;
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "# Results\n\nWritten by `millstream-bench report`: commit {}, {}. Medians; what the columns mean is in\n[README](README.md).\n",
        origin.commit, origin.machine
    );
    let _ = writeln!(text, "| | | measured | target |\n|---|---|---|---|");
    for (metric, figure, what, target) in TARGETS {
        let value = metrics[metric][figure].as_f64();
        let _ = writeln!(text, "| {metric} | {what} | {} | {target} |", number(value, 2));
    }
    for link in Link::ALL {
        starts(&mut text, rows, link);
    }
    for link in Link::ALL {
        pulls(&mut text, rows, link);
        files(&mut text, rows, link);
    }
    text
}

fn starts(text: &mut String, rows: &[Row], link: Link) {
    let cells = cells(rows, link, "start");
    if cells.is_empty() {
        return;
    }
    let _ = writeln!(
        text,
        "\n## {}\n\n| image | peer | settings | runs | pulled s | ready s | floor s | ready / floor | MB until ready | needed MB | requests | at once for a blob | CPU s | local s | inflated by |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        link.name()
    );
    for ((image, peer, settings), cell) in cells {
        let (ready, floor) = (cell.median(|v| v.ready_s), cell.median(|v| v.floor_s));
        let megabytes = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64 / 1e6);
        let by = cell.rows.iter().find_map(|row| row.values.decompressor.as_deref()).unwrap_or("-");
        let _ = writeln!(
            text,
            "| {image} | {peer} | {settings} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {by} |",
            cell.rows.len(),
            number(cell.median(|v| Some(v.pull_s)), 2),
            number(ready, 2),
            number(floor, 2),
            number(ready.zip(floor).map(|(ready, floor)| ready / floor), 2),
            number(cell.median(|v| megabytes(v.bytes_until_ready)), 1),
            number(cell.median(|v| megabytes(v.bytes_needed)), 1),
            number(cell.median(|v| v.requests.map(|n| n as f64)), 0),
            number(cell.median(|v| v.blob_peak.map(|n| n as f64)), 0),
            number(cell.median(|v| v.daemon_cpu_s), 1),
            number(cell.median(|v| v.local_s), 1),
        );
    }
}

fn pulls(text: &mut String, rows: &[Row], link: Link) {
    let cells = cells(rows, link, "pull");
    if cells.is_empty() {
        return;
    }
    let _ = writeln!(
        text,
        "\n## Pull only, {}\n\n| image | peer | settings | runs | pulled s | requests | of containerd |\n|---|---|---|---|---|---|---|",
        link.name()
    );
    for ((image, peer, settings), cell) in cells {
        let _ = writeln!(
            text,
            "| {image} | {peer} | {settings} | {} | {} | {} | {} |",
            cell.rows.len(),
            number(cell.median(|v| Some(v.pull_s)), 3),
            number(cell.median(|v| v.requests.map(|n| n as f64)), 0),
            number(cell.median(|v| v.containerd_requests.map(|n| n as f64)), 0),
        );
    }
}

fn files(text: &mut String, rows: &[Row], link: Link) {
    let cells = cells(rows, link, "files");
    if cells.is_empty() {
        return;
    }
    let _ = writeln!(
        text,
        "\n## Everything local: walking and reading all files\n\n| image | peer | runs | files | MB | walk cold s | warm s | read cold s | warm s |\n|---|---|---|---|---|---|---|---|---|"
    );
    for ((image, peer, _), cell) in cells {
        let more = |name: &'static str| cell.median(move |v| v.more.get(name).copied());
        let _ = writeln!(
            text,
            "| {image} | {peer} | {} | {} | {} | {} | {} | {} | {} |",
            cell.rows.len(),
            number(more("files"), 0),
            number(more("bytes").map(|bytes| bytes / 1e6), 0),
            number(more("walk_cold_s"), 2),
            number(more("walk_warm_s"), 2),
            number(more("read_cold_s"), 2),
            number(more("read_warm_s"), 2),
        );
    }
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}
