//! Where nobody may send us: addresses that mean the machine this program runs on, or the metadata server beside it.
//!
//! A registry decides where its redirects and its token server lead. Whoever reads for others (`millstream-server`) must
//! not be led to what only this machine reaches. Judged by what the address says; a name is as good as whoever resolves it.

use std::net::{IpAddr, Ipv6Addr};

use reqwest::Url;

/// How near an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Nearness {
    /// This machine.
    Loopback,
    /// Its link: where clouds keep their metadata servers.
    Link,
    /// A private network.
    Private,
    /// Anywhere else, and every name but `localhost`.
    Elsewhere,
}

fn nearness(url: &Url) -> Nearness {
    let host = url.host_str().unwrap_or_default();
    let Ok(address) = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() else {
        let name = host.trim_end_matches('.');
        let is_local = name == "localhost" || name.ends_with(".localhost");
        return if is_local { Nearness::Loopback } else { Nearness::Elsewhere };
    };
    let address = address.to_canonical();
    let (link, private) = match address {
        IpAddr::V4(address) => (address.is_link_local(), address.is_private()),
        IpAddr::V6(address) => (Ipv6Addr::is_unicast_link_local(&address), Ipv6Addr::is_unique_local(&address)),
    };
    match address {
        // To connect to the unspecified address is to connect to oneself.
        address if address.is_loopback() || address.is_unspecified() => Nearness::Loopback,
        _ if link => Nearness::Link,
        _ if private => Nearness::Private,
        _ => Nearness::Elsewhere,
    }
}

/// Whether a redirect leads from `from` to this machine or its link, where `from` is not itself. Private networks are
/// fine: storage is often there, under its bare address.
pub(crate) fn redirects(from: &Url, to: &Url) -> bool {
    match nearness(to) {
        Nearness::Elsewhere | Nearness::Private => false,
        Nearness::Loopback => nearness(from) != Nearness::Loopback,
        Nearness::Link => from.host_str() != to.host_str(),
    }
}

/// The same for the token server that a registry names, which gets a password: private addresses count, too, unless the
/// registry has one itself.
pub(crate) fn names_token_server(registry: &Url, realm: &Url) -> bool {
    match nearness(realm) {
        Nearness::Private => nearness(registry) == Nearness::Elsewhere && registry.host_str() != realm.host_str(),
        _ => redirects(registry, realm),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_outside_leads_inside() {
        for (from, to, redirect, realm) in [
            ("https://r.example", "https://cdn.example", false, false),
            ("https://r.example", "https://8.8.8.8", false, false),
            ("https://r.example", "https://127.0.0.1:8080", true, true),
            ("https://r.example", "https://localhost", true, true),
            ("https://r.example", "https://x.localhost.", true, true),
            ("https://r.example", "https://2130706433", true, true),
            ("https://r.example", "https://[::1]", true, true),
            ("https://r.example", "https://[::ffff:127.0.0.1]", true, true),
            ("https://r.example", "https://0.0.0.0", true, true),
            ("https://r.example", "https://169.254.169.254/latest", true, true),
            ("https://r.example", "https://[fe80::1]", true, true),
            ("https://r.example", "https://10.0.0.7", false, true),
            ("https://r.example", "https://[fd00::7]", false, true),
            ("http://10.0.0.1:5000", "http://10.0.0.7", false, false),
            ("http://10.0.0.1:5000", "http://127.0.0.1", true, true),
            ("http://127.0.0.1:5000", "http://localhost:5001", false, false),
            ("http://127.0.0.1:5000", "http://169.254.169.254", true, true),
            ("http://169.254.1.1", "http://169.254.1.1:81", false, false),
        ] {
            let (from, to) = (Url::parse(from).unwrap(), Url::parse(to).unwrap());
            assert_eq!(redirects(&from, &to), redirect, "{from} {to}");
            assert_eq!(names_token_server(&from, &to), realm, "{from} {to}");
        }
    }
}
