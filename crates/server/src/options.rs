//! From settings to the options of the library and of `registry`.

use millstream_registry::{Egress, RegistryOptions};
use millstream_server::{
    AccessOptions, ContentOptions, ImportOptions, LimitOptions, ListenOptions, ProfileOptions, ServiceOptions, TlsFiles,
};
use millstream_settings::server::{
    AccessSettings, BudgetSettings, LimitSettings, RegistrySettings, Settings, TlsSettings,
};
use millstream_toc::Budget;

/// Connections to one registry beside those of imports.
const CONNECTIONS_BESIDE_IMPORTS: usize = 32;

/// Where and how to listen.
pub(crate) fn listen(settings: &Settings) -> ListenOptions {
    let tls = settings.tls.clone().map(|TlsSettings { cert, key, client_ca }| TlsFiles { cert, key, client_ca });
    ListenOptions { address: settings.listen, tls }
}

/// How registries are reached.
pub(crate) fn registry(settings: &Settings) -> RegistryOptions {
    // A transfer for an import holds its connection for as long as a builder needs: callers' questions must not wait for it.
    let max_connections_per_host = service(settings).import.builders.saturating_add(CONNECTIONS_BESIDE_IMPORTS);
    let hosts_dir = settings.registry.hosts_dir.clone();
    let RegistrySettings { allowed, private, .. } = &settings.registry;
    let besides = allowed.iter().map(|registry| host_of(registry)).chain(private.iter().map(String::as_str));
    let egress = Egress::Outside { besides: besides.map(str::to_owned).collect() };
    RegistryOptions { hosts_dir, max_connections_per_host, egress, ..RegistryOptions::default() }
}

/// A registry without its port.
fn host_of(registry: &str) -> &str {
    match registry.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => registry,
    }
}

/// What the service may use.
pub(crate) fn service(settings: &Settings) -> ServiceOptions {
    let AccessSettings { remember_allowed, remember_refused, max_answers } = settings.access;
    let LimitSettings { requests, requests_per_peer } = settings.limits;
    let mut import = ImportOptions {
        images: settings.import.images,
        deadline: settings.import.deadline,
        scratch: settings.import.scratch.clone(),
        budget: budget(&settings.import.budget),
        packed_max: settings.import.packed_max,
        ..ImportOptions::default()
    };
    if settings.import.builders > 0 {
        import.builders = settings.import.builders;
    }
    ServiceOptions {
        access: AccessOptions { remember_allowed, remember_refused, max_answers },
        limits: LimitOptions { requests, requests_per_peer },
        import,
        content: ContentOptions {
            toc_cache: settings.cache.tocs,
            chunk_cache: settings.cache.chunks,
            ..ContentOptions::default()
        },
        profile: ProfileOptions { max: settings.profile.max },
        import_on_demand: settings.import.on_demand,
        embedded: false,
        allowed_registries: settings.registry.allowed.clone(),
    }
}

/// What a layer may cost; the rest of a budget are limits of what containerd reads.
fn budget(settings: &BudgetSettings) -> Budget {
    let BudgetSettings { entries, tar_size, file_size, ratio, toc_size } = *settings;
    Budget {
        max_entries: entries,
        max_tar_size: tar_size,
        max_file_size: file_size,
        max_ratio: ratio,
        max_toc_bytes: toc_size,
        ..Budget::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_of_settings_and_library_are_the_same() {
        let settings = Settings::default();
        let mut expected = ServiceOptions::default();
        // The library's is the directory for temporary files of whoever runs it.
        expected.import.scratch.clone_from(&settings.import.scratch);
        assert_eq!(format!("{:?}", service(&settings)), format!("{expected:?}"));
        assert!(listen(&settings).check().is_ok());
    }
}
