//! `millstream`, the command line of Millstream.

mod connect;
mod pull;
mod show;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use millstream_wire::millstream::v1 as wire;
use tonic::Streaming;

/// Containers start before their image has arrived: ask this node, import images on the server.
#[derive(Debug, Parser)]
#[command(name = "millstream", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Socket of millstreamd on this node.
    #[arg(
        long,
        global = true,
        default_value = "/run/millstream/millstream.sock",
        env = "MILLSTREAM_SOCKET",
        value_name = "PATH"
    )]
    socket: PathBuf,
    /// How results are printed.
    #[arg(long, global = true, default_value = "text", value_name = "FORMAT")]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// For scripts: one JSON document.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Layers on this node, how much of each is local, and what was transferred.
    Status,
    /// Why an image streams on this node, or why not.
    Explain {
        /// Reference as given to the client, or a manifest digest.
        image: String,
    },
    /// Import an image on the server, so that nodes can stream it; without a server, index one that this node's containerd has.
    Import {
        /// Reference with a tag or a digest.
        image: String,
        #[command(flatten)]
        server: ServerArguments,
    },
    /// Pull an image into containerd, lazily: for users of `ctr` and other clients that fetch every layer first.
    Pull(pull::PullArguments),
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
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Debug, Args)]
struct ServerArguments {
    /// `https://HOST:PORT` of millstream-server; `http://` only for a loopback address. Absent: the server embedded in
    /// millstreamd on this node, which takes the image from containerd and downloads nothing.
    #[arg(long, env = "MILLSTREAM_SERVER", value_name = "URL")]
    server: Option<String>,
    /// Namespace of containerd that has the image, for the embedded server. Absent: whichever has it.
    #[arg(long, conflicts_with = "server", value_name = "NAME")]
    namespace: Option<String>,
    /// PEM file with the certificates that may have signed the server's.
    #[arg(long, env = "MILLSTREAM_CA", value_name = "FILE")]
    ca: Option<PathBuf>,
    /// PEM file with a certificate for servers that ask for one.
    #[arg(long, requires = "key", value_name = "FILE")]
    cert: Option<PathBuf>,
    /// PEM file with its key.
    #[arg(long, requires = "cert", value_name = "FILE")]
    key: Option<PathBuf>,
    /// User name at the registry.
    #[arg(long, requires = "password_stdin", value_name = "NAME")]
    username: Option<String>,
    /// Read the password for the registry from standard input.
    #[arg(long, requires = "username")]
    password_stdin: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("millstream: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn run(arguments: Arguments) -> anyhow::Result<()> {
    // A second installation fails, which means that there is one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let text = match arguments.command {
        Command::Import { image, server } => import(&image, &server, &arguments.socket, arguments.output).await?,
        Command::Status => {
            let status = connect::node(&arguments.socket).await?.status(wire::StatusRequest {}).await;
            show::status(&status.map_err(connect::refused)?.into_inner(), arguments.output)?
        }
        Command::Explain { image } => {
            let request = wire::ExplainRequest { image: image.clone() };
            let answer = connect::node(&arguments.socket).await?.explain(request).await;
            show::decisions(&image, &answer.map_err(connect::refused)?.into_inner().decisions, arguments.output)?
        }
        Command::Pull(wanted) => pull::pull(&wanted, &arguments.socket, arguments.output).await?,
        Command::Streaming { state } => {
            let request = wire::SetStreamingRequest { enabled: state == Switch::On };
            connect::node(&arguments.socket).await?.set_streaming(request).await.map_err(connect::refused)?;
            String::new()
        }
        Command::Hydration { state } => {
            let request = wire::SetHydrationRequest { enabled: state == Switch::On };
            connect::node(&arguments.socket).await?.set_hydration(request).await.map_err(connect::refused)?;
            String::new()
        }
    };
    // A closed pipe (`millstream status | head`) is no error worth a message.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(())
}

async fn import(image: &str, arguments: &ServerArguments, socket: &Path, output: Output) -> anyhow::Result<String> {
    let Some(server) = &arguments.server else {
        if arguments.username.is_some() {
            bail!("--username is for the import from a registry; hint: give --server, too");
        }
        let namespace = arguments.namespace.clone().unwrap_or_default();
        let request = wire::IndexImageRequest { image: image.to_owned(), namespace };
        let stream = connect::node(socket).await?.index_image(request).await.map_err(connect::refused)?;
        return follow(image, stream.into_inner(), output).await;
    };
    let credential = arguments.username.as_ref().map(|username| {
        let mut password = String::new();
        std::io::stdin().read_to_string(&mut password).context("reading the password from standard input")?;
        let basic =
            wire::Basic { username: username.clone(), password: password.trim_end_matches(['\r', '\n']).to_owned() };
        anyhow::Ok(wire::Credential { kind: Some(wire::credential::Kind::Basic(basic)) })
    });
    let request = wire::ImportRequest { image: image.to_owned(), credential: credential.transpose()?, platform: None };
    let identity = arguments.cert.as_deref().zip(arguments.key.as_deref());
    let mut client = connect::server(server, arguments.ca.as_deref(), identity).await?;
    let stream = client.import(request).await.map_err(connect::refused)?;
    follow(image, stream.into_inner(), output).await
}

/// Shows progress until the end.
async fn follow(image: &str, mut stream: Streaming<wire::ImportProgress>, output: Output) -> anyhow::Result<String> {
    // Hidden by itself where standard error is no terminal.
    let bar =
        ProgressBar::new(0).with_style(ProgressStyle::with_template("{bytes}/{total_bytes} {bar:40} layers {msg}")?);
    while let Some(progress) = stream.message().await.map_err(connect::refused)? {
        bar.set_length(progress.bytes_total);
        bar.set_position(progress.bytes_done);
        bar.set_message(format!("{}/{}", progress.layers_done, progress.layers_total));
        if let Some(done) = progress.done {
            bar.finish_and_clear();
            return show::imported(image, &progress_total(progress.bytes_total), &done, output);
        }
    }
    bail!("the server ended the import of {image} without a result; hint: look into its log")
}

fn progress_total(bytes: u64) -> String {
    indicatif::HumanBytes(bytes).to_string()
}
