//! `millstream prefetch`: one image, wholly local, now.

use std::time::Duration;

use anyhow::Context;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use millstream_wire::millstream::v1 as wire;

use crate::arguments::Output;
use crate::connect::{Node, PATIENCE, within};
use crate::exit::{Exit, Failure};
use crate::show;

/// Starts it and, with `wait`, stays until it is done or `timeout` has passed.
pub(crate) async fn run(
    node: &Node,
    image: String,
    wait: bool,
    timeout: Option<Duration>,
    output: Output,
) -> anyhow::Result<String> {
    let mut client = node.connect().await?;
    let request = wire::PrefetchRequest { image: image.clone(), wait };
    let messages = within(PATIENCE, &node.name(), client.prefetch(request)).await;
    let mut messages = messages.with_context(|| format!("fetching {image}"))?;
    let mut latest = wire::PrefetchProgress::default();
    let follow = follow(&mut messages, &mut latest);
    let in_time = match timeout {
        Some(timeout) => tokio::time::timeout(timeout, follow).await,
        None => Ok(follow.await),
    };
    let Ok(ended) = in_time else {
        let failed = if latest.last_error.is_empty() {
            "hint: it goes on; `millstream status` shows how far it is".to_owned()
        } else {
            format!("the last attempt failed: {}; it is tried again", latest.last_error)
        };
        let message = format!(
            "{image} is not wholly local in the time given: {} of {}; {failed}",
            HumanBytes(latest.bytes_present),
            HumanBytes(latest.bytes_total)
        );
        return Err(Failure::new(Exit::TimedOut, message).into());
    };
    ended.with_context(|| format!("fetching {image}"))?;
    if wait && latest.layers_verified < latest.layers_total {
        let message = format!("{} ended before {image} was local; hint: ask again", node.name());
        return Err(Failure::new(Exit::Unreachable, message).into());
    }
    show::prefetched(&image, &latest, output)
}

/// Shows progress until the last message.
async fn follow(
    messages: &mut tonic::Streaming<wire::PrefetchProgress>,
    latest: &mut wire::PrefetchProgress,
) -> anyhow::Result<()> {
    // Hidden by itself where standard error is no terminal.
    let bar =
        ProgressBar::new(0).with_style(ProgressStyle::with_template("{bytes}/{total_bytes} {bar:40} layers {msg}")?);
    while let Some(progress) = messages.message().await.map_err(Failure::from)? {
        bar.set_length(progress.bytes_total);
        bar.set_position(progress.bytes_present);
        bar.set_message(format!("{}/{}", progress.layers_verified, progress.layers_total));
        *latest = progress;
    }
    bar.finish_and_clear();
    Ok(())
}
