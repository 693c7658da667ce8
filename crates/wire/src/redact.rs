//! `Debug` of the messages that hold secrets: says which fields are set, never to what.

use std::fmt;

use crate::millstream::v1::{Basic, Credential, credential};

const HIDDEN: &str = "***";

impl fmt::Debug for Basic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Basic").field("username", &self.username).field("password", &format_args!("{HIDDEN}")).finish()
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential").field("kind", &self.kind).finish()
    }
}

impl fmt::Debug for credential::Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Basic(basic) => f.debug_tuple("Basic").field(basic).finish(),
            Self::Bearer(_) => f.debug_tuple("Bearer").field(&format_args!("{HIDDEN}")).finish(),
        }
    }
}

#[cfg(feature = "cri")]
impl fmt::Debug for crate::cri::runtime::v1::AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthConfig")
            .field("username", &self.username)
            .field("server_address", &self.server_address)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::millstream::v1::{GetImageRequest, Scope};

    fn printed(kind: credential::Kind) -> String {
        let scope = Scope { credential: Some(Credential { kind: Some(kind) }), ..Scope::default() };
        format!("{:?}", GetImageRequest { scope: Some(scope), known_layers: vec![] })
    }

    #[test]
    fn secrets_do_not_print() {
        let basic = Basic { username: "ada".into(), password: "hunter2".into() };
        let text = printed(credential::Kind::Basic(basic));
        assert!(text.contains("ada") && !text.contains("hunter2"), "{text}");
        let text = printed(credential::Kind::Bearer("t0ken".into()));
        assert!(text.contains("Bearer") && !text.contains("t0ken"), "{text}");
    }

    #[test]
    #[cfg(feature = "cri")]
    fn cri_secrets_do_not_print() {
        let auth = crate::cri::runtime::v1::AuthConfig {
            username: "ada".into(),
            password: "hunter2".into(),
            auth: "YWRh".into(),
            identity_token: "id3ntity".into(),
            registry_token: "t0ken".into(),
            ..Default::default()
        };
        let text = format!("{auth:?}");
        for secret in ["hunter2", "YWRh", "id3ntity", "t0ken"] {
            assert!(!text.contains(secret), "{text}");
        }
    }

    /// containerd finds the service by this path; the package name in the proto file makes it.
    #[test]
    fn snapshots_service_has_containerds_name() {
        use crate::containerd::services::snapshots::v1::snapshots_server::SERVICE_NAME;
        assert_eq!(SERVICE_NAME, "containerd.services.snapshots.v1.Snapshots");
    }
}
