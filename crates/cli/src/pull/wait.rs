//! Waiting for the background downloads of one image.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::bail;
use indicatif::{ProgressBar, ProgressStyle};
use millstream_wire::millstream::v1 as wire;

use super::image::Resolved;
use crate::connect::{Node, PATIENCE, within};

/// How often is looked.
const PAUSE: Duration = Duration::from_millis(250);
/// How long may pass without a byte.
const STANDSTILL: Duration = Duration::from_secs(600);

/// Waits until every layer of the image that the node has lazily is wholly local and verified. Others are local anyway.
pub(crate) async fn until_local(node: &Node, resolved: &Resolved) -> anyhow::Result<()> {
    let wanted: BTreeSet<String> = resolved.layers.iter().map(|layer| layer.descriptor.digest.to_string()).collect();
    let mut client = node.connect().await?;
    let bar = ProgressBar::new(0).with_style(ProgressStyle::with_template("{bytes}/{total_bytes} {bar:40} local")?);
    let (mut best, mut since) = (0, Instant::now());
    loop {
        let status = within(PATIENCE, &node.name(), client.status(wire::StatusRequest {})).await?;
        let layers: Vec<_> = status.layers.iter().filter(|layer| wanted.contains(&layer.layer)).collect();
        let open: Vec<_> = layers.iter().filter(|layer| layer.state() != wire::layer_status::State::Verified).collect();
        if open.is_empty() {
            bar.finish_and_clear();
            return Ok(());
        }
        if let Some(lost) = open.iter().find(|layer| layer.state() != wire::layer_status::State::Lazy) {
            bail!("layer {} will not become local: {}", lost.layer, lost.reason);
        }
        if !status.hydration_enabled {
            bail!("background downloads are off on this node; hint: millstream hydration on");
        }
        let here = layers.iter().map(|layer| layer.bytes_present).sum();
        bar.set_length(layers.iter().map(|layer| layer.bytes_total).sum());
        bar.set_position(here);
        if here > best {
            (best, since) = (here, Instant::now());
        }
        if since.elapsed() > STANDSTILL {
            let reason = open.iter().map(|layer| layer.reason.as_str()).find(|reason| !reason.is_empty());
            bail!(
                "no byte came for {STANDSTILL:?}: {}; hint: millstream status",
                reason.unwrap_or("no reason is known")
            );
        }
        tokio::time::sleep(PAUSE).await;
    }
}
