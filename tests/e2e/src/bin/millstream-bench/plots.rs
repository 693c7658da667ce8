//! Bars of time and bytes until ready, as SVG. Drawn by hand: two kinds of bar are less than a library of plots.

use std::fmt::Write as _;

use crate::matrix::Link;
use crate::report::{Cell, cells};
use crate::rows::{Row, Values};

const WIDTH: f64 = 900.0;
/// Left of the bars: names of peers.
const NAMES: f64 = 330.0;
/// Right of the bars: figures.
const FIGURES: f64 = 70.0;
const BAR: f64 = 14.0;
const LINE: f64 = 20.0;
/// Above the first bar of an image.
const HEAD: f64 = 34.0;
const OURS: &str = "#1b6ca8";
const OTHERS: &str = "#9aa5b1";
const FLOOR: &str = "#c0392b";

/// A figure of a run.
type Take = fn(&Values) -> Option<f64>;

/// A file.
pub(crate) struct Plot {
    pub(crate) name: String,
    pub(crate) svg: String,
}

/// A bar.
struct Bar {
    name: String,
    ours: bool,
    value: f64,
    /// Least and most of the runs.
    spread: (f64, f64),
    floor: Option<f64>,
}

/// The plots of a link; none where nothing was measured.
pub(crate) fn of(rows: &[Row], link: Link) -> Vec<Plot> {
    let title =
        link.name().replace('-', ", ").replace("mbit", " Mbit/s").replace("gbit", " Gbit/s").replace("ms", " ms");
    let time: Take = |values| values.ready_s;
    let bytes: Take = |values| values.bytes_until_ready.map(|bytes| bytes as f64 / 1e6);
    let plots = [
        (
            format!("ready-{}.svg", link.name()),
            format!("Seconds until the first answer, {title} (red: floor)"),
            time,
            true,
        ),
        (format!("bytes-{}.svg", link.name()), format!("MB received until the first answer, {title}"), bytes, false),
    ];
    let cells = cells(rows, link, "start");
    let plot = |(name, title, take, floor): (String, String, Take, bool)| {
        let mut images: Vec<(&str, Vec<Bar>)> = Vec::new();
        for ((image, peer, settings), cell) in &cells {
            let Some(bar) = bar(format!("{peer}, {settings}"), peer.starts_with("millstream"), cell, take, floor)
            else {
                continue;
            };
            match images.last_mut() {
                Some((last, bars)) if last == image => bars.push(bar),
                _ => images.push((image, vec![bar])),
            }
        }
        (!images.is_empty()).then(|| Plot { name, svg: draw(&title, &images) })
    };
    plots.into_iter().filter_map(plot).collect()
}

fn bar(name: String, ours: bool, cell: &Cell<'_>, take: Take, floor: bool) -> Option<Bar> {
    let value = cell.median(take)?;
    let all = || cell.rows.iter().filter_map(|row| take(&row.values));
    let spread = (all().fold(f64::INFINITY, f64::min), all().fold(0.0, f64::max));
    Some(Bar { name, ours, value, spread, floor: cell.median(|values| values.floor_s).filter(|_| floor) })
}

fn draw(title: &str, images: &[(&str, Vec<Bar>)]) -> String {
    let most = images.iter().flat_map(|(_, bars)| bars).map(|bar| bar.spread.1).fold(f64::MIN_POSITIVE, f64::max);
    let scale = (WIDTH - NAMES - FIGURES) / most;
    let height = images.iter().map(|(_, bars)| HEAD + LINE * bars.len() as f64).sum::<f64>() + HEAD + 10.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"10\" y=\"22\" font-size=\"15\">{}</text>\n",
        escaped(title)
    );
    let mut top = HEAD;
    for (image, bars) in images {
        // Writing to a string cannot fail.
        let _ = writeln!(svg, "<text x=\"10\" y=\"{}\" font-weight=\"bold\">{}</text>", top + 22.0, escaped(image));
        top += HEAD;
        for bar in bars {
            draw_bar(&mut svg, bar, top, scale);
            top += LINE;
        }
    }
    svg.push_str("</svg>\n");
    svg
}

fn draw_bar(svg: &mut String, bar: &Bar, top: f64, scale: f64) {
    let (middle, text) = (top + BAR / 2.0, top + BAR - 3.0);
    let colour = if bar.ours { OURS } else { OTHERS };
    let (low, high) = (NAMES + bar.spread.0 * scale, NAMES + bar.spread.1 * scale);
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{text}\" text-anchor=\"end\">{}</text>\n\
         <rect x=\"{NAMES}\" y=\"{top}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>\n\
         <line x1=\"{low:.1}\" y1=\"{middle}\" x2=\"{high:.1}\" y2=\"{middle}\" stroke=\"black\"/>\n\
         <text x=\"{:.1}\" y=\"{text}\">{:.2}</text>",
        NAMES - 8.0,
        escaped(&bar.name),
        bar.value * scale,
        high + 6.0,
        bar.value
    );
    if let Some(floor) = bar.floor {
        let x = NAMES + floor * scale;
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" y1=\"{}\" x2=\"{x:.1}\" y2=\"{}\" stroke=\"{FLOOR}\" stroke-width=\"2\"/>",
            top - 2.0,
            top + BAR + 2.0
        );
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
