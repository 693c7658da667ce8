//! The table for people and the summary for programs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use crate::job::{Kind, Measured};

/// Everything that was measured.
pub(crate) struct Results {
    image_bytes: u64,
    import: Duration,
    jobs: BTreeMap<Kind, Vec<Measured>>,
}

impl Results {
    pub(crate) fn new(image_bytes: u64, import: Duration) -> Self {
        Self { image_bytes, import, jobs: BTreeMap::new() }
    }

    pub(crate) fn add(&mut self, kind: Kind, measured: Measured) {
        self.jobs.entry(kind).or_default().push(measured);
    }

    /// The median over the rounds of what `value` takes from each.
    fn median(&self, kind: Kind, value: impl Fn(&Measured) -> f64) -> f64 {
        let mut values: Vec<f64> = self.jobs.get(&kind).into_iter().flatten().map(value).collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        match values.len() {
            0 => 0.0,
            len if len % 2 == 1 => values[middle],
            _ => f64::midpoint(values[middle - 1], values[middle]),
        }
    }

    fn seconds(&self, kind: Kind, value: impl Fn(&Measured) -> Duration) -> f64 {
        self.median(kind, |measured| value(measured).as_secs_f64())
    }

    fn bytes(&self, kind: Kind, value: impl Fn(&Measured) -> u64) -> f64 {
        self.median(kind, |measured| value(measured) as f64)
    }

    fn all_verified(&self) -> bool {
        self.jobs.get(&Kind::Millstream).is_some_and(|jobs| jobs.iter().all(|job| job.verified))
    }

    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        let rounds = self.jobs.values().map(Vec::len).max().unwrap_or_default();
        let size = self.image_bytes as f64 / 1e6;
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "An image of {size:.0} MB (compressed), unmodified, over 200 Mbit/s and 20 ms; medians of {rounds} run(s).\n\
             Import on the server, once for all nodes: {:.1} s\n",
            self.import.as_secs_f64()
        );
        let _ = writeln!(text, "{:<36}{:>10}{:>14}{:>24}", "", "pulled", "app answers", "MB on the link by then");
        for &kind in self.jobs.keys() {
            let _ = writeln!(
                text,
                "{:<36}{:>8.2} s{:>12.2} s{:>24.1}",
                kind.name(),
                self.seconds(kind, |job| job.pull),
                self.seconds(kind, |job| job.ready),
                self.bytes(kind, |job| job.link_bytes) / 1e6
            );
        }
        if self.jobs.contains_key(&Kind::Overlayfs2) {
            let (plain, lazy) =
                (self.seconds(Kind::Overlayfs2, |job| job.ready), self.seconds(Kind::Millstream2, |job| job.ready));
            let _ = write!(text, "\ntime to answer, Millstream / overlayfs, containerd 2  {:.2}", lazy / plain);
        }
        let overlay = self.seconds(Kind::Overlayfs, |job| job.ready);
        let (lazy, demand) =
            (self.seconds(Kind::Millstream, |job| job.ready), self.seconds(Kind::Demand, |job| job.ready));
        let demanded = self.bytes(Kind::Demand, |job| job.demanded);
        let (requests, ours) =
            (self.bytes(Kind::Demand, |job| job.pull_requests.0), self.bytes(Kind::Demand, |job| job.pull_requests.1));
        let _ = write!(
            text,
            "\ntime to answer, Millstream / overlayfs                {:.2}\n\
             the same on the next node                            {:.2}\n\
             time to answer with / without background download    {:.2}\n\
             needed for the answer                                {:.1} MB, {:.0} % of the image\n\
             requests to the registry during the pull             {:.0} of containerd, {ours:.0} of Millstream\n\
             (and 1 of Millstream to its server, side by side)\n\
             whole image local and verified                       after {:.1} s: {}\n",
            lazy / overlay,
            self.seconds(Kind::Profile, |job| job.ready) / overlay,
            lazy / demand,
            demanded / 1e6,
            100.0 * demanded / self.image_bytes as f64,
            requests - ours,
            self.seconds(Kind::Millstream, |job| job.hydrated.unwrap_or_default()),
            if self.all_verified() { "every layer's digest, diff ID and table are proven" } else { "NOT VERIFIED" },
        );
        text
    }

    pub(crate) fn json(&self) -> Result<String> {
        let common = |kind| {
            json!({
                "pull_s": self.seconds(kind, |job| job.pull),
                "ready_s": self.seconds(kind, |job| job.ready),
                "bytes_until_ready": self.bytes(kind, |job| job.link_bytes),
            })
        };
        let mut lazy = common(Kind::Millstream);
        lazy["bytes_demanded"] = json!(self.bytes(Kind::Demand, |job| job.demanded));
        lazy["bytes_until_ready_without_hydration"] = json!(self.bytes(Kind::Demand, |job| job.link_bytes));
        lazy["ready_without_hydration_s"] = json!(self.seconds(Kind::Demand, |job| job.ready));
        lazy["hydrated_s"] = json!(self.seconds(Kind::Millstream, |job| job.hydrated.unwrap_or_default()));
        lazy["verified"] = json!(self.all_verified());
        let mut summary = json!({
            "image_bytes": self.image_bytes,
            "import_s": self.import.as_secs_f64(),
            "overlayfs": common(Kind::Overlayfs),
            "millstream": lazy,
            "millstream_next_node": common(Kind::Profile),
        });
        if self.jobs.contains_key(&Kind::Overlayfs2) {
            summary["overlayfs_containerd2"] = common(Kind::Overlayfs2);
            summary["millstream_containerd2"] = common(Kind::Millstream2);
        }
        Ok(serde_json::to_string_pretty(&summary)? + "\n")
    }
}
