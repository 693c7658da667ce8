//! Completions and manual pages, from the definitions that parse the command lines.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;
use millstream_settings::arguments::{NodeArguments, ServerArguments};
use serde_json::json;

use crate::arguments::{Arguments, Output, Program};
use crate::show::document;

/// Section of the manual for a command that everybody calls, and for a daemon.
const COMMANDS: &str = "1";
const DAEMONS: &str = "8";

fn definition(program: Program) -> clap::Command {
    match program {
        Program::Millstream => Arguments::command(),
        Program::Millstreamd => NodeArguments::command(),
        Program::MillstreamServer => ServerArguments::command(),
    }
}

pub(crate) fn completions(shell: Shell, program: Program, output: Output) -> anyhow::Result<String> {
    let mut command = definition(program);
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    let script = String::from_utf8(script).context("the completions are not text")?;
    match output {
        Output::Text => Ok(script),
        Output::Json => document(&json!({ "shell": shell.to_string(), "script": script })),
    }
}

/// The manual of `millstream` as text, or with `dir` a page for each program and each of its commands.
pub(crate) fn manual(dir: Option<&Path>, output: Output) -> anyhow::Result<String> {
    let Some(dir) = dir else {
        let text = String::from_utf8(page(definition(Program::Millstream), COMMANDS)?).context("not text")?;
        return match output {
            Output::Text => Ok(text),
            Output::Json => document(&json!({ "page": text })),
        };
    };
    let mut written: Vec<PathBuf> = Vec::new();
    for (program, section) in
        [(Program::Millstream, COMMANDS), (Program::Millstreamd, DAEMONS), (Program::MillstreamServer, DAEMONS)]
    {
        let mut command = definition(program).disable_help_subcommand(true);
        command.build();
        write(command, section, dir, &mut written)?;
    }
    match output {
        Output::Text => Ok(written.iter().map(|path| format!("{}\n", path.display())).collect()),
        Output::Json => document(&json!({ "written": written })),
    }
}

fn write(command: clap::Command, section: &str, dir: &Path, written: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let name = command.get_display_name().unwrap_or(command.get_name()).to_owned();
    for inner in command.get_subcommands().filter(|inner| !inner.is_hide_set()) {
        write(inner.clone(), section, dir, written)?;
    }
    let path = dir.join(format!("{name}.{section}"));
    std::fs::write(&path, page(command.display_name(name), section)?)
        .with_context(|| format!("writing {}; hint: does the directory exist?", path.display()))?;
    written.push(path);
    Ok(())
}

fn page(command: clap::Command, section: &str) -> anyhow::Result<Vec<u8>> {
    let mut page = Vec::new();
    Man::new(command).section(section).render(&mut page).context("rendering the manual")?;
    Ok(page)
}
