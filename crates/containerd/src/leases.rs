//! Leases: what is made under one is no garbage while the lease lives.

use std::time::{Duration, SystemTime};

use millstream_wire::containerd::services::leases::v1 as wire;
use millstream_wire::containerd::services::leases::v1::leases_client::LeasesClient;
use tonic::transport::Channel;

use crate::{ContainerdError, Namespace};

/// Label with the end of a lease.
const EXPIRE: &str = "containerd.io/gc.expire";

impl Namespace {
    fn leases_client(&self) -> LeasesClient<Channel> {
        LeasesClient::new(self.channel()).max_decoding_message_size(self.options().max_message)
    }

    /// The same namespace, with a new lease on whatever is made or used through it. The lease ends with
    /// [`Namespace::release`], or by itself after `life`.
    ///
    /// # Errors
    /// Those of every call.
    pub async fn leased(&self, life: Duration) -> Result<Self, ContainerdError> {
        let action = "making a lease";
        let expire = prost_types::Timestamp::from(SystemTime::now() + life).to_string();
        let labels = [(EXPIRE.to_owned(), expire)].into();
        let mut client = self.leases_client();
        let request = wire::CreateRequest { id: String::new(), labels };
        let answer = self.short(action, request, |request| client.create(request)).await?;
        let id = answer.lease.and_then(|lease| lease.id.parse().ok());
        let id = id.ok_or_else(|| ContainerdError::malformed(action, "containerd answered without a usable name"))?;
        Ok(Self { lease: Some(id), ..self.clone() })
    }

    /// Ends the lease of [`Namespace::leased`]; nothing happens where there is none.
    ///
    /// # Errors
    /// Those of every call.
    pub async fn release(self) -> Result<(), ContainerdError> {
        let Some(id) = self.lease.as_ref().and_then(|lease| lease.to_str().ok()).map(str::to_owned) else {
            return Ok(());
        };
        let plain = Self { lease: None, ..self };
        let mut client = plain.leases_client();
        let request = wire::DeleteRequest { id, sync: false };
        match plain.short("ending the lease", request, |request| client.delete(request)).await {
            // It had ended by itself.
            Err(ContainerdError::NotFound { .. }) => Ok(()),
            deleted => deleted.map(drop),
        }
    }
}
