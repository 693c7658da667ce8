//! containerd: is it there, does it know us, and does its configuration let images stream?

use std::path::Path;

use millstream_settings::node::Settings;
use millstream_wire::containerd::services::introspection::v1::introspection_client::IntrospectionClient;
use millstream_wire::containerd::services::introspection::v1::{Plugin, PluginsRequest};
use millstream_wire::containerd::services::version::v1::version_client::VersionClient;
use tonic::transport::Channel;

use super::check::{Check, Verdict};
use super::containerd_config::{self, Version};
use super::containerd_file::Loaded;
use crate::arguments::DoctorArguments;
use crate::connect::{self, PATIENCE, within};

pub(super) async fn checks(arguments: &DoctorArguments, settings: &Settings) -> Vec<Check> {
    let socket = arguments.containerd_socket.as_path();
    let config = arguments.containerd_config.as_path();
    let check = |verdict, found: String| Check::new("containerd", socket.display(), verdict, found);
    let mut checks = Vec::new();
    let (mut version, mut channel) = (None, None);
    match connect::unix(socket).await {
        Err(error) => checks.push(
            check(Verdict::Failed, format!("cannot be reached: {error}"))
                .hint("is it running, are you root, and is --containerd-socket right?"),
        ),
        Ok(connected) => {
            let asked = VersionClient::new(connected.clone());
            match ask_version(asked).await {
                Ok(text) => {
                    version = Version::parse(&text);
                    checks.push(check(Verdict::Ok, format!("answers, version {text}")));
                    channel = Some(connected);
                }
                Err(error) => checks.push(check(Verdict::Failed, error)),
            }
        }
    }
    let (name, found) = examine(config, version, settings);
    checks.extend(found);
    if let (Some(channel), Some(name)) = (channel, name) {
        checks.push(plugin(channel, socket, &name).await);
    }
    checks
}

async fn ask_version(mut client: VersionClient<Channel>) -> Result<String, String> {
    let answer = within(PATIENCE, "containerd", client.version(())).await;
    answer.map(|answer| answer.version).map_err(|error| error.to_string())
}

/// Checks of the configuration, with the name that millstreamd has in it.
fn examine(path: &Path, version: Option<Version>, settings: &Settings) -> (Option<String>, Vec<Check>) {
    let loaded = match Loaded::read(path) {
        Ok(loaded) => loaded,
        Err(error) => {
            let check = Check::new("containerd's configuration", path.display(), Verdict::Failed, error);
            let hint = "name it with --containerd-config; what to put there: `millstream config default containerd-v3`";
            return (None, vec![check.hint(hint)]);
        }
    };
    let examined = containerd_config::examine(&loaded.config, version, settings);
    let checks = examined.findings.into_iter().map(|finding| {
        let check = Check::new("containerd's configuration", loaded.names(), finding.verdict, finding.text);
        if finding.hint.is_empty() { check } else { check.hint(finding.hint) }
    });
    (examined.name, checks.collect())
}

/// What containerd made of its entry for us.
async fn plugin(channel: Channel, socket: &Path, name: &str) -> Check {
    let check = |verdict, found: String| Check::new("containerd's plug-in", socket.display(), verdict, found);
    let filter = format!("type==io.containerd.snapshotter.v1,id=={name}");
    let request = PluginsRequest { filters: vec![filter] };
    let mut client = IntrospectionClient::new(channel);
    match within(PATIENCE, "containerd", client.plugins(request)).await {
        Err(error) => check(Verdict::Warning, error.to_string()),
        Ok(answer) => match answer.plugins.first() {
            None => check(Verdict::Failed, format!("no snapshotter {name} is registered"))
                .hint("restart containerd after a change of its configuration"),
            Some(Plugin { init_err: Some(error), .. }) => {
                check(Verdict::Failed, format!("{name} did not start: {}", error.message))
            }
            Some(Plugin { init_err: None, .. }) => check(Verdict::Ok, format!("snapshotter {name} is registered")),
        },
    }
}
