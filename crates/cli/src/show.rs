//! What the commands print.

use std::fmt::Write;

use indicatif::HumanBytes;
use millstream_wire::millstream::v1 as wire;
use serde_json::{Value, json};

use crate::arguments::Output;

/// A JSON document for scripts.
pub(crate) fn document(value: &Value) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// Result of `millstream status`.
pub(crate) fn status(status: &wire::StatusResponse, output: Output) -> anyhow::Result<String> {
    let transfer = status.transfer.unwrap_or_default();
    let store = status.store.clone().unwrap_or_default();
    if output == Output::Json {
        let layers: Vec<Value> = status.layers.iter().map(layer_json).collect();
        return document(&json!({
            "version": status.version,
            "streaming": status.streaming_enabled,
            "hydration": status.hydration_enabled,
            "layers": layers,
            "store": store_json(&store),
            "damages": status.damages.iter().map(damage_json).collect::<Vec<_>>(),
            "transfer": {
                "demand_bytes": transfer.demand_bytes,
                "hydrate_bytes": transfer.hydrate_bytes,
                "metadata_bytes": transfer.metadata_bytes,
                "requests": transfer.requests,
                "shared_bytes": transfer.shared_bytes,
                "profile_bytes": transfer.profile_bytes,
            },
        }));
    }
    let mut text = String::new();
    let word = |enabled| if enabled { "on" } else { "off" };
    writeln!(text, "streaming of new images: {}", word(status.streaming_enabled))?;
    writeln!(text, "background downloads:    {}", word(status.hydration_enabled))?;
    writeln!(
        text,
        "transferred:             {} ahead of a start, {} on demand, {} in the background, {} of tables, {} requests",
        HumanBytes(transfer.profile_bytes),
        HumanBytes(transfer.demand_bytes),
        HumanBytes(transfer.hydrate_bytes),
        HumanBytes(transfer.metadata_bytes),
        transfer.requests
    )?;
    writeln!(text, "not transferred:         {} shared with other images", HumanBytes(transfer.shared_bytes))?;
    write_store(&mut text, &store)?;
    for damage in &status.damages {
        writeln!(text, "DAMAGED  {}  {}\n    {}", damage.code, damage.object, damage.reason)?;
    }
    if !status.damages.is_empty() {
        writeln!(text)?;
    }
    if status.layers.is_empty() {
        writeln!(text, "no lazy layers on this node")?;
        return Ok(text);
    }
    writeln!(text, "{:<19}  {:<11}  {:>5}  {:>10}  IMAGES", "LAYER", "STATE", "LOCAL", "SIZE")?;
    for layer in &status.layers {
        let percent = (layer.bytes_present * 100).checked_div(layer.bytes_total).unwrap_or(100);
        let short: String = layer.layer.chars().take(19).collect();
        let (size, images) = (HumanBytes(layer.bytes_total).to_string(), layer.images.join(", "));
        writeln!(text, "{short}  {:<11}  {percent:>4}%  {size:>10}  {images}", state(layer))?;
        if !layer.reason.is_empty() {
            writeln!(text, "    {}", layer.reason)?;
        }
    }
    Ok(text)
}

fn write_store(text: &mut String, store: &wire::Store) -> std::fmt::Result {
    let bound = match (store.quota_bytes, store.limit_bytes) {
        (0, u64::MAX) => String::new(),
        (0, limit) => format!(" of {} that the disk has for it", HumanBytes(limit)),
        (quota, _) => format!(" of a quota of {}", HumanBytes(quota)),
    };
    let (used, evicted) = (HumanBytes(store.used_bytes), HumanBytes(store.evicted_bytes));
    writeln!(text, "on disk:                 {used}{bound}, {evicted} given up since the start")?;
    if !store.trouble.is_empty() {
        writeln!(
            text,
            "nothing is stored:       {}; content is served without; hint: see TROUBLESHOOTING",
            store.trouble
        )?;
    }
    writeln!(text)
}

fn store_json(store: &wire::Store) -> Value {
    json!({
        "used_bytes": store.used_bytes,
        "limit_bytes": store.limit_bytes,
        "quota_bytes": store.quota_bytes,
        "evicted_bytes": store.evicted_bytes,
        "trouble": store.trouble,
    })
}

fn state(layer: &wire::LayerStatus) -> &'static str {
    match layer.state() {
        wire::layer_status::State::Unknown => "damaged",
        wire::layer_status::State::Lazy => "lazy",
        wire::layer_status::State::Verified => "verified",
        wire::layer_status::State::Quarantined => "quarantined",
    }
}

fn damage_json(damage: &wire::Damage) -> Value {
    json!({ "code": damage.code, "object": damage.object, "reason": damage.reason })
}

fn layer_json(layer: &wire::LayerStatus) -> Value {
    json!({
        "layer": layer.layer,
        "state": state(layer),
        "bytes_total": layer.bytes_total,
        "bytes_present": layer.bytes_present,
        "bytes_synced": layer.bytes_synced,
        "images": layer.images,
        "reason": layer.reason,
    })
}

/// Result of `millstream explain`.
pub(crate) fn decisions(image: &str, decisions: &[wire::Decision], output: Output) -> anyhow::Result<String> {
    if output == Output::Json {
        let decisions: Vec<Value> = decisions
            .iter()
            .map(|decision| {
                json!({
                    "image": decision.image,
                    "manifest_digest": decision.manifest_digest,
                    "outcome": outcome(decision),
                    "code": decision.code,
                    "reason": decision.reason,
                    "decided_at": decision.decided_at,
                })
            })
            .collect();
        return document(&json!({ "image": image, "decisions": decisions }));
    }
    let Some(latest) = decisions.first() else {
        return Ok(format!(
            "{image}: nothing was decided about it on this node.\n\
             Was it pulled with this snapshotter, since its last removal? Is it written as it was given to the client?\n"
        ));
    };
    let mut text = match latest.outcome() {
        wire::decision::Outcome::Lazy => format!("{image} is streamed.\n"),
        wire::decision::Outcome::Local => format!("{image} is already on this node, every byte of it.\n"),
        wire::decision::Outcome::Deferred if latest.image.is_empty() => format!(
            "{image}: nothing was decided about it on this node, but a client pulled an image without naming it.\n"
        ),
        wire::decision::Outcome::Deferred if is_partly_lazy(decisions) => {
            format!("{image} is streamed in part: its lower layers are, the others were pulled the ordinary way.\n")
        }
        wire::decision::Outcome::Deferred => format!("{image} was pulled the ordinary way.\n"),
        wire::decision::Outcome::Failed | wire::decision::Outcome::Unknown => {
            format!("{image} was pulled the ordinary way because something of Millstream failed.\n")
        }
    };
    if !latest.code.is_empty() {
        writeln!(text, "  {}: {}", latest.code, latest.reason)?;
    }
    for earlier in decisions.iter().skip(1).take(4) {
        writeln!(text, "  earlier: {} {} {}", outcome(earlier), earlier.code, earlier.reason)?;
    }
    Ok(text)
}

/// Seconds that the decisions of one pull lie apart at most: a large layer is unpacked between two of them.
const ONE_PULL: i64 = 600;

/// Whether the pull that ended with the latest decision had begun with lazy layers.
fn is_partly_lazy(decisions: &[wire::Decision]) -> bool {
    let [latest, earlier, ..] = decisions else { return false };
    matches!(earlier.outcome(), wire::decision::Outcome::Lazy | wire::decision::Outcome::Local)
        && latest.code == "image.not-eligible"
        && earlier.manifest_digest == latest.manifest_digest
        && latest.decided_at - earlier.decided_at < ONE_PULL
}

fn outcome(decision: &wire::Decision) -> &'static str {
    match decision.outcome() {
        wire::decision::Outcome::Unknown => "unknown",
        wire::decision::Outcome::Lazy => "lazy",
        wire::decision::Outcome::Local => "local",
        wire::decision::Outcome::Deferred => "deferred",
        wire::decision::Outcome::Failed => "failed",
    }
}

/// Result of `millstream import`.
pub(crate) fn imported(image: &str, size: &str, done: &wire::ImportDone, output: Output) -> anyhow::Result<String> {
    if output == Output::Json {
        let ineligible: Vec<Value> =
            done.ineligible.iter().map(|layer| json!({ "layer": layer.layer, "reason": layer.reason })).collect();
        return document(&json!({
            "image": image,
            "manifest_digest": done.manifest_digest,
            "ineligible": ineligible,
        }));
    }
    let mut text = format!("{image} is imported: {size}, manifest {}\n", done.manifest_digest);
    for layer in &done.ineligible {
        writeln!(text, "  layer {} cannot be streamed: {}", layer.layer, layer.reason)?;
    }
    Ok(text)
}

/// Result of `millstream prefetch`.
pub(crate) fn prefetched(image: &str, done: &wire::PrefetchProgress, output: Output) -> anyhow::Result<String> {
    let local = done.layers_verified == done.layers_total;
    if output == Output::Json {
        return document(&json!({
            "image": image,
            "local": local,
            "layers_total": done.layers_total,
            "layers_verified": done.layers_verified,
            "bytes_total": done.bytes_total,
            "bytes_present": done.bytes_present,
            "last_error": done.last_error,
        }));
    }
    let total = HumanBytes(done.bytes_total);
    if local {
        return Ok(format!("{image} is wholly local and proven: {total} in {} layers\n", done.layers_total));
    }
    let present = HumanBytes(done.bytes_present);
    Ok(format!("{image} is being fetched: {present} of {total} are here; `millstream status` shows how far it is\n"))
}

/// Result of `millstream gc`.
pub(crate) fn garbage(layers: &[wire::GarbageLayer], dry_run: bool, output: Output) -> anyhow::Result<String> {
    let bytes = layers.iter().map(|layer| layer.bytes).sum();
    if output == Output::Json {
        let layers: Vec<Value> =
            layers.iter().map(|layer| json!({ "layer": layer.layer, "bytes": layer.bytes })).collect();
        return document(&json!({ "dry_run": dry_run, "bytes": bytes, "layers": layers }));
    }
    if layers.is_empty() {
        return Ok("nothing to give back: every layer is used by a container or an image\n".to_owned());
    }
    let mut text = String::new();
    for layer in layers {
        writeln!(text, "{}  {}", layer.layer, HumanBytes(layer.bytes))?;
    }
    let done = if dry_run { "would be given back" } else { "given back" };
    writeln!(text, "{} in {} layers {done}", HumanBytes(bytes), layers.len())?;
    Ok(text)
}

/// Result of a switch.
pub(crate) fn switched(key: &str, what: &str, enabled: bool, output: Output) -> anyhow::Result<String> {
    if output == Output::Json {
        return document(&json!({ key: enabled }));
    }
    Ok(format!("{what}: {}\n", if enabled { "on" } else { "off" }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decision(outcome: wire::decision::Outcome, code: &str) -> wire::Decision {
        wire::Decision {
            image: "app".into(),
            outcome: outcome.into(),
            code: code.into(),
            reason: "why".into(),
            ..wire::Decision::default()
        }
    }

    #[test]
    fn explain_says_what_happened_and_why() {
        let deferred = [decision(wire::decision::Outcome::Deferred, "server.not-imported")];
        let text = decisions("app", &deferred, Output::Text).unwrap();
        assert_eq!(text, "app was pulled the ordinary way.\n  server.not-imported: why\n");
        let partly = [
            decision(wire::decision::Outcome::Deferred, "image.not-eligible"),
            decision(wire::decision::Outcome::Lazy, ""),
        ];
        assert!(decisions("app", &partly, Output::Text).unwrap().starts_with("app is streamed in part"));
        assert!(decisions("app", &[], Output::Text).unwrap().contains("nothing was decided"));
        let json: Value = serde_json::from_str(&decisions("app", &deferred, Output::Json).unwrap()).unwrap();
        assert_eq!(json["decisions"][0]["code"], "server.not-imported");
    }

    #[test]
    fn garbage_is_added_up_and_a_dry_run_says_so() {
        let layers = [3, 4].map(|bytes| wire::GarbageLayer { layer: "sha256:00".into(), bytes });
        assert!(garbage(&layers, true, Output::Text).unwrap().ends_with("7 B in 2 layers would be given back\n"));
        assert!(garbage(&layers, false, Output::Text).unwrap().ends_with("7 B in 2 layers given back\n"));
        assert!(garbage(&[], false, Output::Text).unwrap().starts_with("nothing to give back"));
        let json: Value = serde_json::from_str(&garbage(&layers, true, Output::Json).unwrap()).unwrap();
        assert_eq!((&json["bytes"], &json["dry_run"]), (&json!(7), &json!(true)));
    }

    #[test]
    fn status_counts_an_empty_layer_as_local() {
        let layer = wire::LayerStatus { layer: "sha256:00".into(), ..wire::LayerStatus::default() };
        let answer = wire::StatusResponse { layers: vec![layer], ..wire::StatusResponse::default() };
        assert!(status(&answer, Output::Text).unwrap().contains("100%"));
    }
}
