//! `millstream check`: the store of this node, compared with what it should be.

use std::fmt::Write;

use anyhow::Context;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use millstream_wire::millstream::v1 as wire;
use millstream_wire::millstream::v1::check_finding::Outcome as Found;
use serde_json::{Value, json};

use crate::Outcome;
use crate::arguments::Output;
use crate::connect::{Node, PATIENCE, within};
use crate::exit::{Exit, Failure};
use crate::show::document;

pub(crate) async fn run(node: &Node, output: Output) -> anyhow::Result<Outcome> {
    let mut client = node.connect().await?;
    let messages = within(PATIENCE, &node.name(), client.check(wire::CheckRequest {})).await;
    let mut messages = messages.context("checking the store")?;
    // Hidden by itself where standard error is no terminal.
    let bar =
        ProgressBar::new(0).with_style(ProgressStyle::with_template("{bytes}/{total_bytes} {bar:40} layers {msg}")?);
    let (mut latest, mut findings) = (wire::CheckProgress::default(), Vec::new());
    while let Some(mut progress) = messages.message().await.map_err(Failure::from)? {
        findings.append(&mut progress.findings);
        bar.set_length(progress.bytes_total);
        bar.set_position(progress.bytes_checked);
        bar.set_message(format!("{}/{}", progress.layers_checked, progress.layers_total));
        latest = progress;
    }
    bar.finish_and_clear();
    if !latest.done {
        let message = format!("{} ended before the check did; hint: check again", node.name());
        return Err(Failure::new(Exit::Unreachable, message).into());
    }
    let whole = findings.iter().all(|finding| finding.outcome() == Found::Repaired);
    Ok(Outcome { text: show(&latest, &findings, output)?, exit: if whole { Exit::Ok } else { Exit::Failed } })
}

fn show(done: &wire::CheckProgress, findings: &[wire::CheckFinding], output: Output) -> anyhow::Result<String> {
    if output == Output::Json {
        return document(&json!({
            "layers": done.layers_checked,
            "bytes": done.bytes_checked,
            "findings": findings.iter().map(to_json).collect::<Vec<Value>>(),
        }));
    }
    let mut text = format!("{} in {} layers checked\n", HumanBytes(done.bytes_checked), done.layers_checked);
    for finding in findings {
        let damage = finding.damage.clone().unwrap_or_default();
        writeln!(text, "{:<12}  {}  {}\n    {}", word(finding), damage.code, damage.object, damage.reason)?;
    }
    if findings.is_empty() {
        text.push_str("nothing is damaged\n");
    }
    Ok(text)
}

fn word(finding: &wire::CheckFinding) -> &'static str {
    match finding.outcome() {
        Found::Repaired => "repaired",
        Found::Waiting => "waiting",
        Found::NotRepaired => "not repaired",
        Found::Unknown => "unknown",
    }
}

fn to_json(finding: &wire::CheckFinding) -> Value {
    let damage = finding.damage.clone().unwrap_or_default();
    json!({ "code": damage.code, "object": damage.object, "reason": damage.reason, "outcome": word(finding) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_is_shown_with_what_became_of_it() {
        let damage =
            wire::Damage { code: "store.chunks-damaged".into(), object: "sha256:00".into(), reason: "why".into() };
        let finding = wire::CheckFinding { damage: Some(damage), outcome: Found::Waiting.into() };
        let done = wire::CheckProgress { layers_checked: 2, bytes_checked: 5, done: true, ..Default::default() };
        let text = show(&done, std::slice::from_ref(&finding), Output::Text).unwrap();
        assert_eq!(text, "5 B in 2 layers checked\nwaiting       store.chunks-damaged  sha256:00\n    why\n");
        let json: Value = serde_json::from_str(&show(&done, &[finding], Output::Json).unwrap()).unwrap();
        assert_eq!((&json["findings"][0]["outcome"], &json["layers"]), (&json!("waiting"), &json!(2)));
        assert!(show(&done, &[], Output::Text).unwrap().ends_with("nothing is damaged\n"));
    }
}
