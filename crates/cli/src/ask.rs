//! Commands that ask millstreamd one question.

use millstream_wire::millstream::v1 as wire;

use crate::arguments::{Output, Switch};
use crate::connect::{LONG, Node, PATIENCE, within};
use crate::show;

pub(crate) async fn status(node: &Node, output: Output) -> anyhow::Result<String> {
    let mut client = node.connect().await?;
    let status = within(PATIENCE, &node.name(), client.status(wire::StatusRequest {})).await?;
    show::status(&status, output)
}

pub(crate) async fn explain(node: &Node, image: String, output: Output) -> anyhow::Result<String> {
    let mut client = node.connect().await?;
    let request = wire::ExplainRequest { image: image.clone() };
    let answer = within(PATIENCE, &node.name(), client.explain(request)).await?;
    show::decisions(&image, &answer.decisions, output)
}

pub(crate) async fn gc(node: &Node, dry_run: bool, output: Output) -> anyhow::Result<String> {
    let mut client = node.connect().await?;
    // Deleting many large files takes its time.
    let answer = within(LONG, &node.name(), client.gc(wire::GcRequest { dry_run })).await?;
    show::garbage(&answer.layers, dry_run, output)
}

pub(crate) async fn streaming(node: &Node, state: Switch, output: Output) -> anyhow::Result<String> {
    let enabled = state == Switch::On;
    let mut client = node.connect().await?;
    within(PATIENCE, &node.name(), client.set_streaming(wire::SetStreamingRequest { enabled })).await?;
    show::switched("streaming", "streaming of new images", enabled, output)
}

pub(crate) async fn hydration(node: &Node, state: Switch, output: Output) -> anyhow::Result<String> {
    let enabled = state == Switch::On;
    let mut client = node.connect().await?;
    within(PATIENCE, &node.name(), client.set_hydration(wire::SetHydrationRequest { enabled })).await?;
    show::switched("hydration", "background downloads", enabled, output)
}
