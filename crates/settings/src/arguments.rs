//! The command lines of both daemons, defined once: the daemons parse them, `millstream man` and `millstream completions`
//! describe them.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Of `millstreamd`: the node daemon of Millstream. Containers start before their image has arrived.
#[derive(Debug, Parser)]
#[command(
    name = "millstreamd",
    version,
    about = "The node daemon of Millstream: containers start before their image has arrived"
)]
pub struct NodeArguments {
    /// Absent: the daemon itself.
    #[command(subcommand)]
    pub command: Option<NodeCommand>,
    /// Settings; the defaults without it.
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Read and check the settings, then end.
    #[arg(long)]
    pub check_config: bool,
}

/// What `millstreamd` runs as.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// Go over to the program that now stands at the path of the running one, and to the settings as they are now; containers
    /// go on. If that fails, the old program goes on with the old settings.
    Upgrade {
        /// Another program, also an older one.
        #[arg(long, value_name = "FILE")]
        binary: Option<PathBuf>,
    },
    /// Started by the supervisor only.
    #[command(hide = true)]
    Worker,
    /// Started by a worker only.
    #[command(hide = true)]
    Warm {
        /// Where an image is shown.
        view: PathBuf,
    },
}

/// Of `millstream-server`.
#[derive(Debug, Parser)]
#[command(
    name = "millstream-server",
    version,
    about = "Makes and serves tables of contents of container images, so that containers start before their image has arrived"
)]
pub struct ServerArguments {
    /// Settings file (TOML).
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Check the settings file and exit.
    #[arg(long)]
    pub check_config: bool,
}
