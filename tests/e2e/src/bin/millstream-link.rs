//! Helper of the end-to-end tests: runs inside the far network namespace and adds the delay of a long line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};
use millstream_e2e::delay::{Stall, serve};

#[derive(Debug, Parser)]
#[command(about = "Helper of Millstream's end-to-end tests")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Passes TCP connections on, every byte late.
    Delay {
        /// Address to accept connections on.
        #[arg(long)]
        listen: SocketAddr,
        /// Address to pass them on to.
        #[arg(long)]
        target: SocketAddr,
        /// Milliseconds that a byte travels.
        #[arg(long)]
        one_way_ms: u64,
        /// Holds one request of HTTP/1.1 in so many back; 0: none.
        #[arg(long, default_value_t = 0)]
        stall_every: u64,
        /// For so many milliseconds.
        #[arg(long, default_value_t = 0)]
        stall_ms: u64,
        /// Unix socket that tells the counts.
        #[arg(long)]
        stats: PathBuf,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Command::Delay { listen, target, one_way_ms, stall_every, stall_ms, stats } = Arguments::parse().command;
    let stall = (stall_every > 0).then(|| Stall { every: stall_every, time: Duration::from_millis(stall_ms) });
    serve(listen, target, Duration::from_millis(one_way_ms), stall, &stats).await
}
