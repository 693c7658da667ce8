//! Documents that two readers could see differently, or that are no image: each is refused or declined with its reason, and the pull
//! ends as it would without Millstream.

#![allow(clippy::unwrap_used, missing_docs)]

use millstream_e2e::containerd::Version;
use millstream_e2e::image::{Image, ImageInfo};
use millstream_e2e::layer::{Entry, Packing};
use millstream_e2e::stage::{Pushed, Stage, can_be_set};
use millstream_wire::millstream::v1::decision::Outcome;
use serde_json::{Value, json};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// What the import says.
#[derive(Debug, Clone, Copy)]
enum Said {
    /// It fails with this.
    Fails(&'static str),
    /// It imports the image, and says this of its top layer.
    Declines(&'static str),
}
use Said::{Declines, Fails};

/// Documents that another one refers to: media type and text.
type Referred = Vec<(&'static str, String)>;

/// A document that is made from an honest manifest.
struct Row {
    name: &'static str,
    said: Said,
    content_type: &'static str,
    /// The text, and documents of type [`INDEX`] or [`MANIFEST`] that it refers to.
    make: fn(Value) -> (String, Referred),
}

fn alone(value: &Value) -> (String, Vec<(&'static str, String)>) {
    (value.to_string(), Vec::new())
}

fn with(mut manifest: Value, key: &str, value: Value) -> (String, Vec<(&'static str, String)>) {
    manifest[key] = value;
    alone(&manifest)
}

fn with_top(mut manifest: Value, key: &str, value: Value) -> (String, Vec<(&'static str, String)>) {
    let top = manifest["layers"].as_array().unwrap().len() - 1;
    manifest["layers"][top][key] = value;
    alone(&manifest)
}

fn entry(media_type: &str, document: &str, platform: &Value) -> Value {
    let digest = millstream_e2e::image::sha256(document.as_bytes());
    json!({ "mediaType": media_type, "digest": digest, "size": document.len(), "platform": platform })
}

fn index(manifests: &[Value]) -> String {
    json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests }).to_string()
}

fn linux() -> Value {
    json!({ "os": "linux", "architecture": "amd64" })
}

fn rows() -> Vec<Row> {
    let row = |name, said, content_type, make| Row { name, said, content_type, make };
    vec![
        row("manifest-and-index", Fails("ambiguous"), MANIFEST, |m| with(m, "manifests", json!([]))),
        row("other-content-type", Fails("was served as"), DOCKER_MANIFEST, |m| alone(&m)),
        row("index-by-content-type", Fails("was served as"), INDEX, |m| alone(&m)),
        row("layers-twice", Fails("twice"), MANIFEST, |m| {
            let text = m.to_string();
            (format!("{{\"layers\":[],{}", &text[1..]), Vec::new())
        }),
        row("layers-in-capitals", Fails("in another case"), MANIFEST, |m| with(m, "LAYERS", json!([]))),
        row("schema-1", Fails("schema 1"), "application/vnd.docker.distribution.manifest.v1+json", |_| {
            alone(
                &json!({ "schemaVersion": 1, "name": "a", "tag": "b", "architecture": "amd64", "fsLayers": [], "history": [] }),
            )
        }),
        row("too-large", Fails("gave more than 4194304 bytes"), MANIFEST, |m| {
            (m.to_string() + &" ".repeat(5 << 20), Vec::new())
        }),
        row("sha512", Fails("digest"), MANIFEST, |m| {
            with_top(m, "digest", format!("sha512:{}", "a".repeat(128)).into())
        }),
        row("layer-missing", Fails("diff IDs"), MANIFEST, |mut m| {
            m["layers"].as_array_mut().unwrap().pop();
            alone(&m)
        }),
        row("layer-too-many", Fails("diff IDs"), MANIFEST, |mut m| {
            let first = m["layers"][0].clone();
            m["layers"].as_array_mut().unwrap().push(first);
            alone(&m)
        }),
        row("not-an-image", Fails("config"), MANIFEST, |mut m| {
            m["artifactType"] = json!("application/vnd.example.rocket");
            m["config"] = m["layers"][0].clone();
            alone(&m)
        }),
        row("unknown-layer", Declines("is not known"), MANIFEST, |m| {
            with_top(m, "mediaType", json!("application/vnd.example.layer"))
        }),
        row("encrypted-layer", Declines("encrypted"), MANIFEST, |m| {
            with_top(m, "mediaType", format!("{LAYER}+encrypted").into())
        }),
        row("foreign-layer", Declines("foreign"), MANIFEST, |m| {
            let urls = json!(["https://127.0.0.1:1/elsewhere"]);
            let manifest: Value = serde_json::from_str(&with_top(m, "urls", urls).0).unwrap();
            with_top(manifest, "mediaType", json!("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"))
        }),
        row("nondistributable-layer", Declines("foreign"), MANIFEST, |m| {
            with_top(m, "mediaType", json!("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"))
        }),
        row("other-platform", Fails("has no image for"), INDEX, |m| {
            let manifest = m.to_string();
            let windows = json!({ "os": "windows", "architecture": "amd64" });
            (index(&[entry(MANIFEST, &manifest, &windows)]), vec![(MANIFEST, manifest)])
        }),
        row("empty-index", Fails("has no image for"), INDEX, |_| (index(&[]), Vec::new())),
        row("index-in-index", Fails("an index within an index"), INDEX, |m| {
            let manifest = m.to_string();
            let inner = index(&[entry(MANIFEST, &manifest, &linux())]);
            (index(&[entry(INDEX, &inner, &linux())]), vec![(INDEX, inner), (MANIFEST, manifest)])
        }),
    ]
}

/// An image of its own for each row: containerd asks nobody about layers that it knows.
fn image(name: &str) -> Image {
    let layer = |part: &str| vec![Entry::file(format!("{name}-{part}"), name)];
    Image::new().layer(layer("bottom"), Packing::Gzip).layer(layer("top"), Packing::Gzip)
}

#[test]
fn strange_documents_change_nothing_about_a_pull() {
    if !can_be_set(&[]) {
        return;
    }
    let stage = Stage::with_spoiler().unwrap();
    let rows = rows();
    let images: Vec<Image> = rows.iter().map(|row| image(row.name)).collect();
    let honest = stage.push_many("documents", &images).unwrap();
    let node = stage.node_on_demand().unwrap();
    let (containerd, oracle) = (stage.containerd(Version::V1, &node, false).unwrap(), stage.oracle().unwrap());
    let (cri, truth) = (stage.cri(&containerd).unwrap(), stage.cri(&oracle).unwrap());
    let spoiler = stage.spoiler().unwrap();
    let mut wrong = Vec::new();
    for (row, honest) in rows.iter().zip(&honest) {
        let (document, others) = (row.make)(stage.manifest("documents", honest).unwrap());
        for (media_type, other) in &others {
            spoiler.publish("documents", "unnamed", media_type, other.as_bytes());
        }
        let manifest = spoiler.publish("documents", row.name, row.content_type, document.as_bytes());
        let reference = format!("{}/documents:{}", spoiler.address(), row.name);
        let image = Pushed { reference, info: ImageInfo { manifest, layers: honest.info.layers.clone() } };

        let imported = stage.import(&image).map_err(|error| format!("{error:#}"));
        match (row.said, &imported) {
            (Fails(part), Err(text)) | (Declines(part), Ok(text)) if text.contains(part) => {}
            _ => wrong.push(format!("{}: should be {:?}, the import says {imported:?}", row.name, row.said)),
        }
        let ours = cri.pull(&image.reference, None).map(drop).map_err(|error| format!("{error:#}"));
        let theirs = truth.pull(&image.reference, None).map(drop).map_err(|error| format!("{error:#}"));
        if ours.is_ok() != theirs.is_ok() {
            wrong.push(format!("{}: {ours:?}, without us {theirs:?}", row.name));
        }
        let decisions = node.explain(&image.reference).unwrap().decisions;
        let explained = match row.said {
            // A digest that is none of ours already makes the label of its layer one that cannot be read.
            Fails(_) => decisions.iter().all(|one| {
                one.outcome() == Outcome::Deferred
                    && one.image == image.reference
                    && ["server.not-imported", "labels.missing"].contains(&one.code.as_str())
            }),
            // The bottom layer may be lazy; the top one is not, for the reason that the import gave.
            Declines(part) => theirs.is_err() || decisions.iter().any(|one| one.reason.contains(part)),
        };
        if !explained {
            wrong.push(format!("{}: explained by {decisions:?}", row.name));
        }
        println!("{}: containerd {}", row.name, if theirs.is_ok() { "takes it" } else { "refuses it" });
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
