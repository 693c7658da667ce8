//! An unpacked image as a container has it, mounted without one: an active snapshot over its topmost one.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use millstream_wire::containerd::services::snapshots::v1::PrepareSnapshotRequest;
use millstream_wire::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use millstream_wire::containerd::types::Mount;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use sha2::{Digest as _, Sha256};

use crate::containerd::Containerd;
use crate::cri::connect;
use crate::image::ImageInfo;

/// A mounted snapshot; it is unmounted when it is dropped.
#[derive(Debug)]
pub struct View {
    at: PathBuf,
}

impl View {
    /// Mounts what containerd has of the image in this namespace, at `at`, which is made if missing.
    ///
    /// # Errors
    ///
    /// If the image is not unpacked, or cannot be mounted.
    pub fn mount(containerd: &Containerd, namespace: &str, image: &ImageInfo, at: &Path) -> Result<Self> {
        std::fs::create_dir_all(at)?;
        let mut request = tonic::Request::new(PrepareSnapshotRequest {
            snapshotter: containerd.snapshotter().to_owned(),
            key: at.display().to_string(),
            parent: chain_id(image),
            // Else the garbage collector takes it.
            labels: [("containerd.io/gc.root".to_owned(), "2024-01-01T00:00:00Z".to_owned())].into(),
        });
        request.metadata_mut().insert("containerd-namespace", namespace.parse()?);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let answer = runtime.block_on(async {
            let mut client = SnapshotsClient::new(connect(&containerd.socket()).await?);
            anyhow::Ok(client.prepare(request).await?.into_inner())
        })?;
        for wanted in &answer.mounts {
            perform(wanted, at).with_context(|| format!("mounting {wanted:?}"))?;
        }
        Ok(Self { at: at.to_owned() })
    }

    /// Its root.
    pub fn root(&self) -> &Path {
        &self.at
    }
}

impl Drop for View {
    fn drop(&mut self) {
        unmount(&self.at, UnmountFlags::DETACH).ok();
    }
}

/// Name of the snapshot that all layers make together.
fn chain_id(image: &ImageInfo) -> String {
    let ids = image.layers.iter().map(|layer| format!("sha256:{}", layer.diff_id));
    let chained =
        |below: String, id: String| format!("sha256:{}", hex::encode(Sha256::digest(format!("{below} {id}"))));
    ids.reduce(chained).unwrap_or_default()
}

fn perform(wanted: &Mount, at: &Path) -> Result<()> {
    ensure!(wanted.r#type == "overlay", "not an overlay");
    let data: Vec<&str> = wanted.options.iter().map(String::as_str).collect();
    let data = std::ffi::CString::new(data.join(","))?;
    Ok(mount(&wanted.source, at, &wanted.r#type, MountFlags::empty(), data.as_c_str())?)
}
