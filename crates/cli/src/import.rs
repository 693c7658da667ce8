//! `millstream import`: progress of the server's work.

use std::io::Read;

use anyhow::{Context, bail};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use millstream_wire::millstream::v1 as wire;

use crate::arguments::{Output, ServerArguments};
use crate::exit::Failure;
use crate::{connect, show};

pub(crate) async fn run(image: &str, arguments: &ServerArguments, output: Output) -> anyhow::Result<String> {
    let credential = arguments.username.as_ref().map(|username| {
        let mut password = String::new();
        std::io::stdin().read_to_string(&mut password).context("reading the password from standard input")?;
        let basic =
            wire::Basic { username: username.clone(), password: password.trim_end_matches(['\r', '\n']).to_owned() };
        anyhow::Ok(wire::Credential { kind: Some(wire::credential::Kind::Basic(basic)) })
    });
    let request = wire::ImportRequest { image: image.to_owned(), credential: credential.transpose()?, platform: None };
    let identity = arguments.cert.as_deref().zip(arguments.key.as_deref());
    let mut client = connect::server(&arguments.server, arguments.ca.as_deref(), identity).await?;
    let tried = || format!("importing {image} at {}", arguments.server);
    let mut stream = client.import(request).await.map_err(Failure::from).with_context(tried)?.into_inner();
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
    bail!("{} ended the import of {image} without a result; hint: look into its log", arguments.server)
}
