//! `millstream config`: what the daemons may be told.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, bail};
use millstream_settings::reference::{Key, keys};
use millstream_settings::{Schema, node, server};
use serde_json::{Value, json};

use crate::arguments::{ConfigCommand, Daemon, Output, Sample};
use crate::show::document;

const CONTAINERD_V2: &str = include_str!("../../../config/containerd-v2.toml");
const CONTAINERD_V3: &str = include_str!("../../../config/containerd-v3.toml");
/// Columns of explained text.
const WIDTH: usize = 100;

pub(crate) fn run(command: &ConfigCommand, output: Output) -> anyhow::Result<String> {
    match command {
        ConfigCommand::Default { of } => sample(*of, output),
        ConfigCommand::Check { file, of } => check(file, *of, output),
        ConfigCommand::Explain { key, of } => explain(key.as_deref(), *of, output),
    }
}

fn sample(of: Sample, output: Output) -> anyhow::Result<String> {
    let text = match of {
        Sample::Node => node::Settings::SAMPLE,
        Sample::Server => server::Settings::SAMPLE,
        Sample::ContainerdV2 => CONTAINERD_V2,
        Sample::ContainerdV3 => CONTAINERD_V3,
    };
    match (output, of) {
        (Output::Text, _) => Ok(text.to_owned()),
        (Output::Json, Sample::Node) => document(&json!(node::Settings::default())),
        (Output::Json, Sample::Server) => document(&json!(server::Settings::default())),
        (Output::Json, _) => document(&json!({ "text": text })),
    }
}

/// Checks a file, and shows the settings that it makes.
fn check(file: &Path, of: Option<Daemon>, output: Output) -> anyhow::Result<String> {
    let of = match of {
        Some(of) => of,
        None => whose(file)?,
    };
    let (program, settings) = match of {
        Daemon::Node => ("millstreamd", json!(millstream_settings::read::<node::Settings>(file)?)),
        Daemon::Server => ("millstream-server", json!(millstream_settings::read::<server::Settings>(file)?)),
    };
    match output {
        Output::Text => Ok(format!("{}: settings of {program}, fine\n", file.display())),
        Output::Json => document(&json!({ "file": file, "program": program, "settings": settings })),
    }
}

/// Told by the file's name, else by its tables.
fn whose(file: &Path) -> anyhow::Result<Daemon> {
    let name = file.file_stem().unwrap_or_default().to_string_lossy();
    match name.as_ref() {
        "millstreamd" => return Ok(Daemon::Node),
        "millstream-server" => return Ok(Daemon::Server),
        _ => {}
    }
    let text = std::fs::read_to_string(file).with_context(|| format!("reading settings {}", file.display()))?;
    match (millstream_settings::parse::<node::Settings>(&text), millstream_settings::parse::<server::Settings>(&text)) {
        (Ok(_), Err(_)) => Ok(Daemon::Node),
        (Err(_), Ok(_)) => Ok(Daemon::Server),
        _ => bail!(
            "cannot tell whether {} is for millstreamd or millstream-server; hint: add --for node or --for server",
            file.display()
        ),
    }
}

fn explain(wanted: Option<&str>, of: Option<Daemon>, output: Output) -> anyhow::Result<String> {
    let all = [
        (Daemon::Node, "millstreamd.toml", keys::<node::Settings>()),
        (Daemon::Server, "millstream-server.toml", keys::<server::Settings>()),
    ];
    let is_wanted = |key: &Key| {
        wanted.is_none_or(|wanted| {
            key.name == wanted || key.name.strip_prefix(wanted).is_some_and(|rest| rest.starts_with('.'))
        })
    };
    let files = all.into_iter().filter(|(daemon, ..)| of.is_none_or(|of| of == *daemon));
    let found: Vec<(&str, Key)> = files
        .flat_map(|(_, file, keys)| keys.into_iter().map(move |key| (file, key)))
        .filter(|(_, key)| is_wanted(key))
        .collect();
    if found.is_empty() {
        let wanted = wanted.unwrap_or_default();
        bail!("there is no key `{wanted}`; hint: `millstream config explain` lists all");
    }
    if output == Output::Json {
        let found: Vec<Value> = found
            .iter()
            .map(|(file, key)| {
                json!({
                    "file": file,
                    "key": key.name,
                    "type": key.kind.as_str(),
                    "default": if key.absent { Value::Null } else { json!(key.value) },
                    "example": if key.absent { json!(key.value) } else { Value::Null },
                    "meaning": key.meaning,
                })
            })
            .collect();
        return document(&json!(found));
    }
    let mut text = String::new();
    for (file, key) in found {
        let value = if key.absent { format!("absent, such as {}", key.value) } else { key.value };
        writeln!(text, "{}  ({file}; {}; default: {value})", key.name, key.kind.as_str())?;
        for line in wrap(&key.meaning, WIDTH - 4) {
            writeln!(text, "    {line}")?;
        }
    }
    Ok(text)
}

/// Lines of at most `width` characters, broken at spaces.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}
