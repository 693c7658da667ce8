//! Snapshots as a client of containerd makes them for containers, without a container.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use millstream_wire::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use millstream_wire::containerd::services::snapshots::v1::{PrepareSnapshotRequest, RemoveSnapshotRequest};
use millstream_wire::containerd::types::Mount;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use sha2::{Digest as _, Sha256};
use tonic::transport::Channel;

use crate::containerd::Containerd;
use crate::cri::connect;
use crate::image::ImageInfo;

/// The snapshots of one namespace of a containerd. Cheap to clone; clones work side by side.
#[derive(Debug, Clone)]
pub struct Snapshots {
    client: SnapshotsClient<Channel>,
    snapshotter: &'static str,
    namespace: String,
}

impl Snapshots {
    /// Connects.
    ///
    /// # Errors
    ///
    /// If nobody answers.
    pub async fn connect(containerd: &Containerd, namespace: &str) -> Result<Self> {
        let client = SnapshotsClient::new(connect(&containerd.socket()).await?);
        Ok(Self { client, snapshotter: containerd.snapshotter(), namespace: namespace.to_owned() })
    }

    fn request<T>(&self, message: T) -> Result<tonic::Request<T>> {
        let mut request = tonic::Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.namespace.parse()?);
        Ok(request)
    }

    /// Makes an active snapshot of this key over the image, which garbage collection leaves alone; gives what to mount.
    ///
    /// # Errors
    ///
    /// If the image is not unpacked, or the key is taken.
    pub async fn prepare(&self, key: &str, image: &ImageInfo) -> Result<Vec<Mount>> {
        let request = self.request(PrepareSnapshotRequest {
            snapshotter: self.snapshotter.to_owned(),
            key: key.to_owned(),
            parent: chain_ids(image).pop().unwrap_or_default(),
            labels: HashMap::from([("containerd.io/gc.root".to_owned(), "2024-01-01T00:00:00Z".to_owned())]),
        })?;
        Ok(self.client.clone().prepare(request).await?.into_inner().mounts)
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    ///
    /// If there is none of this key.
    pub async fn remove(&self, key: &str) -> Result<()> {
        let message = RemoveSnapshotRequest { snapshotter: self.snapshotter.to_owned(), key: key.to_owned() };
        self.client.clone().remove(self.request(message)?).await?;
        Ok(())
    }
}

/// A mounted snapshot; it is unmounted when it is dropped.
#[derive(Debug)]
pub struct View {
    at: PathBuf,
}

impl View {
    /// Mounts what containerd has of the image in this namespace, at `at`, which is made if missing. The snapshot below it stays.
    ///
    /// # Errors
    ///
    /// If the image is not unpacked, or cannot be mounted.
    pub fn mount(containerd: &Containerd, namespace: &str, image: &ImageInfo, at: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mounts = runtime.block_on(async {
            Snapshots::connect(containerd, namespace).await?.prepare(&at.display().to_string(), image).await
        })?;
        Self::of(&mounts, at)
    }

    /// Mounts a prepared snapshot at `at`, which is made if missing.
    ///
    /// # Errors
    ///
    /// If it cannot be mounted.
    pub fn of(mounts: &[Mount], at: &Path) -> Result<Self> {
        std::fs::create_dir_all(at)?;
        for wanted in mounts {
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

/// Names of the snapshots of an image's layers, bottom first; each stands for its layer and all below it.
#[must_use]
pub fn chain_ids(image: &ImageInfo) -> Vec<String> {
    let mut chain: Vec<String> = Vec::new();
    for layer in &image.layers {
        let id = format!("sha256:{}", layer.diff_id);
        chain.push(match chain.last() {
            Some(below) => format!("sha256:{}", hex::encode(Sha256::digest(format!("{below} {id}")))),
            None => id,
        });
    }
    chain
}

fn perform(wanted: &Mount, at: &Path) -> Result<()> {
    ensure!(wanted.r#type == "overlay", "not an overlay");
    let data: Vec<&str> = wanted.options.iter().map(String::as_str).collect();
    let data = std::ffi::CString::new(data.join(","))?;
    Ok(mount(&wanted.source, at, &wanted.r#type, MountFlags::empty(), data.as_c_str())?)
}
