//! `millstream doctor`: what a person would look at when images do not stream, in one go.

mod check;
mod containerd;
mod containerd_config;
mod containerd_file;
mod daemons;
mod disk;
mod kernel;

use std::path::Path;

use millstream_settings::node::Settings;
use serde_json::{Value, json};

use self::check::{Check, Verdict};
use crate::Outcome;
use crate::arguments::{DoctorArguments, Output};
use crate::exit::Exit;
use crate::show::document;

/// Where the README puts the settings.
const SETTINGS: &str = "/etc/millstream/millstreamd.toml";

/// Checks everything; the exit code is that of a failure if anything failed.
pub(crate) async fn run(arguments: &DoctorArguments, socket: Option<&Path>, output: Output) -> anyhow::Result<Outcome> {
    let (mut settings, first) = settings(arguments.config.as_deref());
    if let Some(socket) = socket {
        settings.socket = socket.to_owned();
    }
    let mut checks = vec![first];
    checks.extend(kernel::checks());
    checks.extend(disk::checks(&settings));
    checks.extend(daemons::checks(&settings).await);
    checks.extend(containerd::checks(arguments, &settings).await);
    let failed = checks.iter().any(|check| check.verdict == Verdict::Failed);
    let text = match output {
        Output::Text => text(&checks),
        Output::Json => {
            let checks: Vec<Value> = checks.iter().map(Check::json).collect();
            document(&json!({ "ok": !failed, "checks": checks }))?
        }
    };
    Ok(Outcome { text, exit: if failed { Exit::Failed } else { Exit::Ok } })
}

/// The settings that the other checks go by; the defaults where there are none.
fn settings(config: Option<&Path>) -> (Settings, Check) {
    let path = config.unwrap_or(Path::new(SETTINGS));
    let check = |verdict, found: String| Check::new("settings", path.display(), verdict, found);
    if config.is_none() && !path.exists() {
        let check = check(Verdict::Ok, "not there: the defaults apply".to_owned());
        return (Settings::default(), check);
    }
    match millstream_settings::read(path) {
        Ok(settings) => (settings, check(Verdict::Ok, "fine".to_owned())),
        Err(error) => {
            let check = check(Verdict::Failed, error.to_string());
            (Settings::default(), check.hint("millstreamd does not start with it; what follows goes by the defaults"))
        }
    }
}

fn text(checks: &[Check]) -> String {
    let count = |verdict| checks.iter().filter(|check| check.verdict == verdict).count();
    let lines: String = checks.iter().map(Check::text).collect();
    format!(
        "{lines}\n{} ok, {} warnings, {} failed\n",
        count(Verdict::Ok),
        count(Verdict::Warning),
        count(Verdict::Failed)
    )
}
