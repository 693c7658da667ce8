//! The command line: one definition for parser, help, manual and completions.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use millstream_oci::Platform;

use crate::exit;

/// Containers start before their image has arrived: ask this node, import images on the server.
#[derive(Debug, Parser)]
#[command(name = "millstream", version, arg_required_else_help = true, after_help = exit::TABLE)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Socket of millstreamd on this node [default: as in its settings].
    #[arg(long, global = true, env = "MILLSTREAM_SOCKET", value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// How results are printed.
    #[arg(long, global = true, default_value = "text", value_name = "FORMAT")]
    pub(crate) output: Output,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// For scripts: one JSON document.
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Layers on this node, how much of each is local, and what was transferred.
    Status,
    /// Why an image streams on this node, or why not.
    Explain {
        /// Reference as given to the client, or a manifest digest.
        image: String,
    },
    /// Make an image that is lazy on this node wholly local now, before all others.
    Prefetch {
        /// Reference as given to the client, or a manifest digest.
        image: String,
        /// Wait until every byte is local and proven.
        #[arg(long)]
        wait: bool,
        /// Wait, but not longer than this, such as "10m"; the download goes on all the same.
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        timeout: Option<Duration>,
    },
    /// Pull an image into containerd, lazily: for users of `ctr` and other clients that fetch every layer first.
    Pull(PullArguments),
    /// Give back at once what no container and no image on this node uses.
    Gc {
        /// Only say what would be given back.
        #[arg(long)]
        dry_run: bool,
    },
    /// Compare everything in this node's store with what it should be; what is wrong is fetched again. Containers go on.
    Check,
    /// Check this node: kernel, disk, daemons, server, containerd and its configuration.
    Doctor(DoctorArguments),
    /// Import an image on the server, so that nodes can stream it; without a server, index one that containerd here has.
    Import {
        /// Reference with a tag or a digest.
        image: String,
        #[command(flatten)]
        server: ServerArguments,
    },
    /// Switch streaming of new images on this node; running containers stay as they are.
    Streaming {
        /// The new state.
        state: Switch,
    },
    /// Hold background downloads of this node back, or let them go on; until millstreamd starts again.
    Hydration {
        /// The new state.
        state: Switch,
    },
    /// Settings: defaults, checks, and what each key means.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print completions for a shell.
    Completions {
        /// Which shell.
        shell: Shell,
        /// For which program.
        #[arg(default_value = "millstream")]
        program: Program,
    },
    /// Print the manual, or write the pages of all three programs into a directory.
    Man {
        /// Where to; it must exist.
        dir: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print a commented file with every key and its default.
    Default {
        /// Which file.
        #[arg(default_value = "node")]
        of: Sample,
    },
    /// Check a settings file of a daemon.
    Check {
        /// The file.
        file: PathBuf,
        /// Whose it is [default: told by its name, else tried].
        #[arg(long = "for", value_name = "DAEMON")]
        of: Option<Daemon>,
    },
    /// What a key means: its type, its default, and what it does; all keys without one.
    Explain {
        /// Such as "fetch.connections", or a table such as "fetch".
        key: Option<String>,
        /// Only of this daemon.
        #[arg(long = "for", value_name = "DAEMON")]
        of: Option<Daemon>,
    },
}

/// A daemon with a settings file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Daemon {
    /// millstreamd.
    Node,
    /// millstream-server.
    Server,
}

/// A commented file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sample {
    /// Settings of millstreamd.
    Node,
    /// Settings of millstream-server.
    Server,
    /// What to merge into the configuration of containerd 1.6 and 1.7.
    ContainerdV2,
    /// What to merge into the configuration of containerd 2.1 and newer.
    ContainerdV3,
}

/// A program of Millstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Program {
    /// This one.
    Millstream,
    /// The node daemon.
    Millstreamd,
    /// The server.
    MillstreamServer,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArguments {
    /// Settings of millstreamd [default: /etc/millstream/millstreamd.toml, if it is there].
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// containerd's configuration.
    #[arg(long, value_name = "FILE", default_value = "/etc/containerd/config.toml")]
    pub(crate) containerd_config: PathBuf,
    /// containerd's socket.
    #[arg(long, value_name = "PATH", default_value = "/run/containerd/containerd.sock")]
    pub(crate) containerd_socket: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct PullArguments {
    /// Reference with a tag or a digest.
    pub(crate) image: String,
    /// Namespace of containerd.
    #[arg(long, env = "CONTAINERD_NAMESPACE", default_value = "default", value_name = "NAME")]
    pub(crate) namespace: String,
    /// Snapshotter that gets the image; with any but Millstream's the pull is an ordinary one.
    #[arg(long, env = "CONTAINERD_SNAPSHOTTER", default_value = "millstream", value_name = "NAME")]
    pub(crate) snapshotter: String,
    /// Socket of containerd.
    #[arg(long, env = "CONTAINERD_ADDRESS", default_value = "/run/containerd/containerd.sock", value_name = "PATH")]
    pub(crate) containerd: PathBuf,
    /// Platform to take of an image for several, as `os/architecture` or `os/architecture/variant` [default: this
    /// machine's].
    #[arg(long, value_name = "PLATFORM", value_parser = pull_platform)]
    pub(crate) platform: Option<Platform>,
    /// Directory of `HOST/hosts.toml` files, as containerd's: mirrors, certificates, plain HTTP.
    #[arg(long, default_value = "/etc/containerd/certs.d", value_name = "DIR")]
    pub(crate) hosts_dir: PathBuf,
    /// User name at the registry [default: what Docker's configuration says].
    #[arg(long, requires = "password_stdin", value_name = "NAME")]
    pub(crate) username: Option<String>,
    /// Read the password for the registry from standard input.
    #[arg(long, requires = "username")]
    pub(crate) password_stdin: bool,
    /// Docker's config.json with credentials [default: that of this user, if there is one].
    #[arg(long, value_name = "FILE")]
    pub(crate) docker_config: Option<PathBuf>,
    /// Wait until every byte of the image is on this node.
    #[arg(long)]
    pub(crate) wait: bool,
}

/// Such as `linux/arm64`.
fn pull_platform(text: &str) -> Result<Platform, String> {
    let mut parts = text.split('/').map(str::to_owned);
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(os), Some(architecture), variant, None) if !os.is_empty() && !architecture.is_empty() => {
            Ok(Platform { os, architecture, variant })
        }
        _ => Err("expected os/architecture, as linux/arm64".to_owned()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct ServerArguments {
    /// `https://HOST:PORT` of millstream-server; `http://` only for a loopback address. Absent: the server embedded in
    /// millstreamd on this node, which takes the image from containerd and downloads nothing.
    #[arg(long, env = "MILLSTREAM_SERVER", value_name = "URL")]
    pub(crate) server: Option<String>,
    /// Namespace of containerd that has the image, for the embedded server. Absent: whichever has it.
    #[arg(long, conflicts_with = "server", value_name = "NAME")]
    pub(crate) namespace: Option<String>,
    /// PEM file with the certificates that may have signed the server's.
    #[arg(long, env = "MILLSTREAM_CA", value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// PEM file with a certificate for servers that ask for one.
    #[arg(long, requires = "key", value_name = "FILE")]
    pub(crate) cert: Option<PathBuf>,
    /// PEM file with its key.
    #[arg(long, requires = "cert", value_name = "FILE")]
    pub(crate) key: Option<PathBuf>,
    /// User name at the registry.
    #[arg(long, requires = "password_stdin", value_name = "NAME")]
    pub(crate) username: Option<String>,
    /// Read the password for the registry from standard input.
    #[arg(long, requires = "username")]
    pub(crate) password_stdin: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_are_read_as_people_write_them() {
        assert_eq!(pull_platform("linux/arm64").unwrap().to_string(), "linux/arm64");
        assert_eq!(pull_platform("linux/arm/v7").unwrap().to_string(), "linux/arm/v7");
        for text in ["", "linux", "/amd64", "linux/", "a/b/c/d"] {
            assert!(pull_platform(text).is_err(), "{text}");
        }
    }
}
