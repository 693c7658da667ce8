//! millstreamd and millstream-server: are they there, and do they fit?

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;

use millstream_settings::node::Settings;
use millstream_wire::millstream::v1 as wire;

use super::check::{Check, Verdict};
use crate::connect::{self, Node, PATIENCE, within};

/// Every layer keeps a file open, so the usual 1024 are those of a few dozen images.
const MANY_FILES: u64 = 65_536;

pub(super) async fn checks(settings: &Settings) -> Vec<Check> {
    let mut checks = daemon(&settings.socket).await;
    checks.push(server(settings).await);
    checks
}

async fn daemon(socket: &Path) -> Vec<Check> {
    let node = Node::at(Some(socket));
    let check = |verdict, found: String| Check::new("millstreamd", socket.display(), verdict, found);
    let status = async {
        let mut client = node.connect().await?;
        within(PATIENCE, &node.name(), client.status(wire::StatusRequest {})).await
    };
    let status = match status.await {
        Ok(status) => status,
        Err(error) => {
            return vec![check(Verdict::Failed, error.to_string()).hint("start millstreamd, or give its --socket")];
        }
    };
    let (ours, theirs) = (env!("CARGO_PKG_VERSION"), status.version.as_str());
    let version = if ours == theirs {
        check(Verdict::Ok, format!("answers, version {theirs}"))
    } else {
        check(Verdict::Warning, format!("answers, version {theirs}; this command is {ours}"))
            .hint("install programs of one version, and restart millstreamd when no lazy container runs")
    };
    let streaming = if status.streaming_enabled {
        Check::new("streaming", socket.display(), Verdict::Ok, "on")
    } else {
        Check::new("streaming", socket.display(), Verdict::Warning, "switched off: new images are pulled as always")
            .hint("`millstream streaming on`")
    };
    let mut checks = vec![version, streaming];
    checks.extend(open_files(socket));
    let bad = status.layers.iter().filter(|layer| {
        !matches!(layer.state(), wire::layer_status::State::Lazy | wire::layer_status::State::Verified)
    });
    checks.extend(bad.map(|layer| {
        Check::new("layer", &layer.layer, Verdict::Warning, layer.reason.clone())
            .hint("stop its containers, remove the images that use it and pull them again")
    }));
    checks
}

/// The limit of the process that listens at the socket.
fn open_files(socket: &Path) -> Option<Check> {
    let stream = UnixStream::connect(socket).ok()?;
    let peer = rustix::net::sockopt::socket_peercred(&stream).ok()?;
    let path = format!("/proc/{}/limits", peer.pid.as_raw_nonzero());
    let limits = fs::read_to_string(&path).ok()?;
    let limit = hard_limit(&limits)?;
    let found = limit.map_or_else(|| "no limit".to_owned(), |limit| format!("at most {limit}"));
    let check = |verdict| Check::new("open files of millstreamd", &path, verdict, found.clone());
    Some(match limit {
        Some(limit) if limit < MANY_FILES => check(Verdict::Warning).hint(format!(
            "each layer keeps one open: start it with a hard limit of {MANY_FILES} or more (`ulimit -Hn`, LimitNOFILE)"
        )),
        _ => check(Verdict::Ok),
    })
}

/// Of a `limits` file: the hard limit of open files; `Some(None)` when there is none.
fn hard_limit(limits: &str) -> Option<Option<u64>> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    match line.split_whitespace().nth(1)? {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    }
}

async fn server(settings: &Settings) -> Check {
    let server = &settings.server;
    if server.address.is_empty() {
        let check = |verdict, found| Check::new("millstream-server", "server.address", verdict, found);
        return if !server.embedded {
            check(Verdict::Warning, "not set, and server.embedded is false: every image is pulled as always")
                .hint("set server.address and server.ca in the settings of millstreamd")
        } else if settings.containerd.address.as_os_str().is_empty() {
            check(Verdict::Warning, "not set, and the embedded server needs containerd.address to index images")
                .hint("set containerd.address in the settings of millstreamd")
        } else {
            check(Verdict::Ok, "not set: the embedded server indexes what ordinary pulls leave in containerd")
        };
    }
    let identity = server.cert.as_deref().zip(server.key.as_deref());
    let check = |verdict, found: String| Check::new("millstream-server", &server.address, verdict, found);
    match connect::server(&server.address, server.ca.as_deref(), identity).await {
        Ok(_) if server.address.starts_with("https://") => {
            check(Verdict::Ok, "answers, and its certificate is right".to_owned())
        }
        Ok(_) => check(Verdict::Ok, "answers".to_owned()),
        Err(error) => check(Verdict::Failed, format!("{error:#}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hard_limit_is_the_second_number() {
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024                 524288               files\n";
        assert_eq!(hard_limit(limits), Some(Some(524_288)));
        assert_eq!(hard_limit("Max open files  1024  unlimited  files"), Some(None));
        assert_eq!(hard_limit("Max processes 1 2"), None);
    }
}
