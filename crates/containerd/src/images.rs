//! The image store: names that point at manifests and indexes.

use std::collections::BTreeMap;

use millstream_oci::Digest;
use millstream_wire::containerd::services::images::v1 as wire;
use millstream_wire::containerd::services::images::v1::images_client::ImagesClient;
use millstream_wire::containerd::types;
use prost_types::FieldMask;
use tonic::transport::Channel;

use crate::{ContainerdError, Namespace, label_paths};

/// Type, digest and size of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobDescriptor {
    /// Its media type.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

impl BlobDescriptor {
    pub(crate) fn to_wire(&self) -> types::Descriptor {
        types::Descriptor {
            media_type: self.media_type.clone(),
            digest: self.digest.to_string(),
            size: i64::try_from(self.size).unwrap_or(i64::MAX),
            ..types::Descriptor::default()
        }
    }

    pub(crate) fn from_wire(raw: types::Descriptor) -> Option<Self> {
        let size = u64::try_from(raw.size).ok()?;
        Some(Self { media_type: raw.media_type, digest: raw.digest.parse().ok()?, size })
    }
}

/// A name and what it points at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// A reference in full form.
    pub name: String,
    /// Manifest or index.
    pub target: BlobDescriptor,
    /// Labels of the name.
    pub labels: BTreeMap<String, String>,
}

impl Namespace {
    fn images_client(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel()).max_decoding_message_size(self.options().max_message)
    }

    /// The image of exactly this name.
    ///
    /// # Errors
    /// [`ContainerdError::NotFound`]; those of every call.
    pub async fn image(&self, name: &str) -> Result<Image, ContainerdError> {
        let action = format!("looking for image {name}");
        let mut client = self.images_client();
        let request = wire::GetImageRequest { name: name.to_owned() };
        let answer = self.short(&action, request, |request| client.get(request)).await?;
        let image = answer.image.and_then(image);
        image.ok_or_else(|| ContainerdError::malformed(&action, "containerd answered without a target"))
    }

    /// The images that `filter` (containerd's language; empty: all) selects.
    ///
    /// # Errors
    /// Those of every call.
    pub async fn images(&self, filter: &str) -> Result<Vec<Image>, ContainerdError> {
        let filters = if filter.is_empty() { Vec::new() } else { vec![filter.to_owned()] };
        let mut client = self.images_client();
        let request = wire::ListImagesRequest { filters };
        let answer = self.short("listing images", request, |request| client.list(request)).await?;
        Ok(answer.images.into_iter().filter_map(image).collect())
    }

    /// Lets a name point at `image.target`, whether it is new or not. Labels that are not named here stay.
    ///
    /// # Errors
    /// Those of every call.
    pub async fn put_image(&self, image: &Image) -> Result<(), ContainerdError> {
        let action = format!("recording image {}", image.name);
        let raw = wire::Image {
            name: image.name.clone(),
            labels: image.labels.clone().into_iter().collect(),
            target: Some(image.target.to_wire()),
            ..wire::Image::default()
        };
        let mut client = self.images_client();
        let request = wire::CreateImageRequest { image: Some(raw.clone()) };
        match self.short(&action, request, |request| client.create(request)).await {
            Err(ContainerdError::AlreadyExists { .. }) => {
                let mut paths = label_paths(image.labels.keys());
                paths.push("target".to_owned());
                let update_mask = Some(FieldMask { paths });
                let request = wire::UpdateImageRequest { image: Some(raw), update_mask };
                self.short(&action, request, |request| client.update(request)).await.map(drop)
            }
            created => created.map(drop),
        }
    }
}

fn image(raw: wire::Image) -> Option<Image> {
    let target = BlobDescriptor::from_wire(raw.target?)?;
    Some(Image { name: raw.name, target, labels: raw.labels.into_iter().collect() })
}
