//! A registry on loopback that holds one image, so that a server has something to serve.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use millstream_oci::Digest;

use crate::archive::gzip;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// An image in a registry that answers for as long as the process lives.
#[derive(Debug)]
pub struct Image {
    /// `127.0.0.1:<port>`.
    pub host: String,
    /// Digest of the manifest.
    pub manifest: String,
    /// Digests of the layers' blobs.
    pub layers: Vec<String>,
}

/// Serves an image of these tars as `<host>/image:1`.
///
/// # Panics
///
/// If no port is free.
#[must_use]
pub fn serve(tars: &[Vec<u8>]) -> Image {
    let mut documents: HashMap<String, Vec<u8>> = HashMap::new();
    let mut blob = |bytes: Vec<u8>| {
        let digest = Digest::of(&bytes).to_string();
        let descriptor = format!("\"digest\":\"{digest}\",\"size\":{}", bytes.len());
        documents.insert(format!("/v2/image/blobs/{digest}"), bytes);
        (digest, descriptor)
    };
    let diff_ids: Vec<String> = tars.iter().map(|tar| format!("\"{}\"", Digest::of(tar))).collect();
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
        diff_ids.join(",")
    );
    let (_, config) = blob(config.into_bytes());
    let (layers, descriptors): (Vec<_>, Vec<_>) = tars.iter().map(|tar| blob(gzip(tar, 6))).unzip();
    let layer =
        |descriptor: &String| format!(r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip",{descriptor}}}"#);
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json",{config}}},"layers":[{}]}}"#,
        descriptors.iter().map(layer).collect::<Vec<_>>().join(",")
    );
    let digest = Digest::of(manifest.as_bytes()).to_string();
    for name in ["1", &digest] {
        documents.insert(format!("/v2/image/manifests/{name}"), manifest.clone().into_bytes());
    }
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let host = listener.local_addr().expect("bound").to_string();
    let documents = Arc::new(documents);
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let documents = Arc::clone(&documents);
            std::thread::spawn(move || answer(client, &documents));
        }
    });
    Image { host, manifest: digest, layers }
}

/// Answers requests of one connection until it ends.
fn answer(client: TcpStream, documents: &HashMap<String, Vec<u8>>) -> std::io::Result<()> {
    let mut output = client.try_clone()?;
    let mut lines = BufReader::new(client).lines();
    loop {
        let Some(request) = lines.next().transpose()? else { return Ok(()) };
        let mut range = None;
        for line in lines.by_ref() {
            let line = line?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some((first, last)) = line.strip_prefix("range: bytes=").and_then(|range| range.split_once('-')) {
                range = first.parse::<usize>().ok().zip(last.parse::<usize>().ok());
            }
        }
        let mut words = request.split(' ');
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let path = path.split('?').next().unwrap_or_default();
        let Some(body) = documents.get(path) else {
            output.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?;
            continue;
        };
        let kind = if path.contains("/manifests/") { MANIFEST } else { "application/octet-stream" };
        let (status, part, place) = match range.filter(|(first, _)| *first < body.len()) {
            Some((first, last)) => {
                let end = last.saturating_add(1).min(body.len()).max(first);
                let place = format!("Content-Range: bytes {first}-{}/{}\r\n", end.saturating_sub(1), body.len());
                ("206 Partial Content", &body[first..end], place)
            }
            None => ("200 OK", &body[..], String::new()),
        };
        write!(output, "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{place}Content-Length: {}\r\n\r\n", part.len())?;
        if method == "GET" {
            output.write_all(part)?;
        }
    }
}
