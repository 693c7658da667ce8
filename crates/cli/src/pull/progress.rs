//! One bar for each layer, on standard error where that is a terminal.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::image::Resolved;

/// The bars.
pub(crate) struct Progress {
    bars: Vec<ProgressBar>,
}

impl Progress {
    pub(crate) fn new(resolved: &Resolved) -> Self {
        let template = "{prefix:19} {msg:9} {bar:30} {bytes}/{total_bytes}";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let all = MultiProgress::new();
        let bar = |digest: String, size| {
            // Hidden by itself where standard error is no terminal.
            let bar = all.add(ProgressBar::new(size).with_style(style.clone()));
            bar.set_prefix(digest.chars().take(19).collect::<String>());
            bar.set_message("waiting");
            bar
        };
        let layers = resolved.layers.iter();
        Self { bars: layers.map(|layer| bar(layer.descriptor.digest.to_string(), layer.descriptor.size)).collect() }
    }

    /// What is being done with a layer.
    pub(crate) fn state(&self, number: usize, state: &'static str) {
        if let Some(bar) = self.bars.get(number) {
            bar.set_message(state);
        }
    }

    /// How many bytes of it are there.
    pub(crate) fn at(&self, number: usize, bytes: u64) {
        if let Some(bar) = self.bars.get(number) {
            bar.set_position(bytes);
        }
    }

    /// Leaves the bars as they are, and goes below them.
    pub(crate) fn finish(&self) {
        self.bars.iter().for_each(ProgressBar::abandon);
    }
}
