//! `millstream import`: progress of the server's work, or of the embedded server's.

use std::io::Read;

use anyhow::{Context, bail};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use millstream_wire::millstream::v1 as wire;
use tonic::Streaming;

use crate::arguments::{Output, ServerArguments};
use crate::connect::Node;
use crate::exit::Failure;
use crate::{connect, show};

pub(crate) async fn run(
    image: &str,
    arguments: &ServerArguments,
    node: &Node,
    output: Output,
) -> anyhow::Result<String> {
    let Some(server) = &arguments.server else {
        if arguments.username.is_some() {
            bail!("--username is for the registry, which the embedded server does not ask; hint: give --server, too");
        }
        let name = node.name();
        let namespace = arguments.namespace.clone().unwrap_or_default();
        let request = wire::IndexImageRequest { image: image.to_owned(), namespace };
        let stream = node.connect().await?.index_image(request).await;
        let stream = stream.map_err(Failure::from).with_context(|| format!("importing {image} at {name}"))?;
        return follow(image, &name, stream.into_inner(), output).await;
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
    let stream = client.import(request).await;
    let stream = stream.map_err(Failure::from).with_context(|| format!("importing {image} at {server}"))?;
    follow(image, server, stream.into_inner(), output).await
}

/// Shows progress until the end.
async fn follow(
    image: &str,
    server: &str,
    mut stream: Streaming<wire::ImportProgress>,
    output: Output,
) -> anyhow::Result<String> {
    let tried = || format!("importing {image} at {server}");
    // Hidden by itself where standard error is no terminal.
    let bar =
        ProgressBar::new(0).with_style(ProgressStyle::with_template("{bytes}/{total_bytes} {bar:40} layers {msg}")?);
    while let Some(progress) = stream.message().await.map_err(Failure::from).with_context(tried)? {
        bar.set_length(progress.bytes_total);
        bar.set_position(progress.bytes_done);
        bar.set_message(format!("{}/{}", progress.layers_done, progress.layers_total));
        if let Some(done) = progress.done {
            bar.finish_and_clear();
            return show::imported(image, &HumanBytes(progress.bytes_total).to_string(), &done, output);
        }
    }
    bail!("{server} ended the import of {image} without a result; hint: look into its log")
}
