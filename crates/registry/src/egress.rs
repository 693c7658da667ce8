//! Names and addresses: where connections lead, and where they may.
//!
//! A name is resolved once for each connection, what it resolves to is judged, and the connection goes to exactly that: there
//! is no second look-up that somebody could answer otherwise. Addresses that were good are kept for when names cannot be
//! resolved for a while.

use std::collections::{HashMap, HashSet};
use std::error::Error;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use millstream_source::{ErrorKind, Retry, SourceError};
use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::time::Instant;

use crate::failure::shown;
use crate::options::MAX_CACHED;

/// How long addresses are used after the last time that their name could be resolved.
const LAST_GOOD: Duration = Duration::from_secs(3600);

/// Where connections may lead.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Egress {
    /// Wherever this machine reaches: for who reads on its own behalf.
    #[default]
    Anywhere,
    /// Not to this machine, its link or private networks, but for these hosts (names or addresses, without a port) and those
    /// that [`crate::RegistryOptions::hosts_dir`] names: for who reads on behalf of others, who say where.
    Outside {
        /// The hosts.
        besides: Vec<String>,
    },
}

/// Resolves names for all clients of a registry, and judges where requests may go.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    egress: Egress,
    /// For one look-up.
    patience: Duration,
    /// Hosts that `hosts.toml` files name.
    configured: Mutex<HashSet<String>>,
    good: Mutex<HashMap<String, Good>>,
}

/// A name leads where nobody may be led.
#[derive(Debug)]
pub(crate) struct Inside {
    host: String,
}

impl fmt::Display for Inside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is in a private network; hint: registry.private", self.host)
    }
}

impl Error for Inside {}

/// What a name resolved to, and when.
#[derive(Debug, Clone)]
struct Good {
    addresses: Vec<SocketAddr>,
    when: Instant,
}

impl Names {
    /// `patience` bounds one look-up.
    pub(crate) fn new(egress: Egress, patience: Duration) -> Self {
        let inner = Inner { egress, patience, configured: Mutex::default(), good: Mutex::default() };
        Self { inner: Arc::new(inner) }
    }

    /// Whoever writes the settings of this machine decides that this host may be asked, wherever it is.
    pub(crate) fn configure(&self, host: &str) {
        let mut configured = self.inner.configured.lock().unwrap_or_else(PoisonError::into_inner);
        if configured.len() < MAX_CACHED {
            configured.insert(bare(host).to_owned());
        }
    }

    /// Fails for the bare address of a private network or of the link: those are not resolved. This machine's own addresses
    /// are `inward`'s matter, and that of who may name a registry.
    pub(crate) fn check(&self, url: &Url) -> Result<(), SourceError> {
        let host = url.host_str().unwrap_or_default();
        let Ok(address) = bare(host).parse::<IpAddr>() else { return Ok(()) };
        if address.to_canonical().is_loopback() || self.inner.permits(host, address) {
            return Ok(());
        }
        let message = format!("{} is in a private network; hint: registry.private", shown(url));
        Err(SourceError::new(ErrorKind::Denied, message).with_retry(Retry::Never))
    }
}

impl Resolve for Names {
    fn resolve(&self, name: Name) -> Resolving {
        let (inner, host) = (Arc::clone(&self.inner), name.as_str().to_owned());
        Box::pin(async move {
            let addresses = inner.addresses(&host).await?;
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

impl Inner {
    async fn addresses(&self, host: &str) -> Result<Vec<SocketAddr>, Box<dyn Error + Send + Sync>> {
        let found = match tokio::time::timeout(self.patience, tokio::net::lookup_host((host, 0))).await {
            Ok(Ok(found)) => Ok(found.collect()),
            Ok(Err(error)) => Err(format!("{host} cannot be resolved: {error}")),
            Err(_) => Err(format!("{host} was not resolved within {:?}", self.patience)),
        };
        let addresses = self.settle(host, found)?;
        let outside: Vec<_> = addresses.into_iter().filter(|address| self.permits(host, address.ip())).collect();
        if outside.is_empty() {
            return Err(Box::new(Inside { host: host.to_owned() }));
        }
        Ok(outside)
    }

    /// What was found, or what was found last if now there is nothing.
    fn settle(&self, host: &str, found: Result<Vec<SocketAddr>, String>) -> Result<Vec<SocketAddr>, String> {
        let now = Instant::now();
        let mut good = self.good();
        match found {
            Ok(addresses) if !addresses.is_empty() => {
                if good.len() >= MAX_CACHED && !good.contains_key(host) {
                    good.clear();
                }
                good.insert(host.to_owned(), Good { addresses: addresses.clone(), when: now });
                Ok(addresses)
            }
            other => {
                let known = good.get(host).filter(|known| now.duration_since(known.when) < LAST_GOOD);
                let Some(known) = known else { return other };
                tracing::debug!(address = host, "a name cannot be resolved now; its last addresses are used");
                Ok(known.addresses.clone())
            }
        }
    }

    fn permits(&self, host: &str, address: IpAddr) -> bool {
        let Egress::Outside { besides } = &self.egress else { return true };
        // Its owner says who may name it; nobody else is meant by this name.
        if host == "localhost" || !is_inside(address) {
            return true;
        }
        let host = bare(host);
        besides.iter().any(|other| bare(other).eq_ignore_ascii_case(host))
            || self.configured.lock().unwrap_or_else(PoisonError::into_inner).contains(host)
    }

    fn good(&self) -> MutexGuard<'_, HashMap<String, Good>> {
        self.good.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Without the brackets of an IPv6 address.
fn bare(host: &str) -> &str {
    host.trim_start_matches('[').trim_end_matches(']')
}

/// Whether an address is of this machine, its link, a private network, or of nobody.
fn is_inside(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => is_inside_v4(address),
        IpAddr::V6(address) => {
            let segments = address.segments();
            // 64:ff9b::/96 is translated to the IPv4 address at its end.
            let translated = segments[..6] == [0x64, 0xff9b, 0, 0, 0, 0];
            let [.., a, b, c, d] = address.octets();
            address.is_loopback()
                || address.is_unspecified()
                || address.is_multicast()
                || address.is_unique_local()
                || address.is_unicast_link_local()
                || (translated && is_inside_v4(Ipv4Addr::new(a, b, c, d)))
        }
    }
}

fn is_inside_v4(address: Ipv4Addr) -> bool {
    let [first, second, ..] = address.octets();
    address.is_loopback()
        || address.is_private()
        || address.is_link_local()
        || address.is_multicast()
        || first == 0
        || first >= 240
        // Shared between a provider and its customers, and between devices under test.
        || (first == 100 && second & 0xc0 == 64)
        || (first == 198 && second & 0xfe == 18)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outside(besides: &[&str]) -> Names {
        let besides = besides.iter().map(|host| (*host).to_owned()).collect();
        Names::new(Egress::Outside { besides }, Duration::from_secs(1))
    }

    #[test]
    fn addresses_are_inside_or_outside() {
        for (address, inside) in [
            ("8.8.8.8", false),
            ("2001:4860:4860::8888", false),
            ("64:ff9b::808:808", false),
            ("127.0.0.1", true),
            ("0.0.0.0", true),
            ("10.1.2.3", true),
            ("172.31.0.1", true),
            ("192.168.0.1", true),
            ("169.254.169.254", true),
            ("100.64.0.1", true),
            ("198.19.0.1", true),
            ("224.0.0.1", true),
            ("255.255.255.255", true),
            ("::1", true),
            ("::", true),
            ("fd00::1", true),
            ("fe80::1", true),
            ("::ffff:10.0.0.1", true),
            ("64:ff9b::a00:1", true),
        ] {
            assert_eq!(is_inside(address.parse().unwrap()), inside, "{address}");
        }
    }

    #[test]
    fn hosts_inside_are_reached_only_if_they_are_named() {
        let inside: IpAddr = "10.0.0.7".parse().unwrap();
        let names = outside(&["harbor.corp", "10.0.0.9", "fd00::9"]);
        assert!(names.inner.permits("r.example", "8.8.8.8".parse().unwrap()));
        assert!(!names.inner.permits("r.example", inside));
        assert!(names.inner.permits("Harbor.corp", inside));
        names.configure("mirror.corp");
        assert!(names.inner.permits("mirror.corp", inside));
        assert!(Names::new(Egress::Anywhere, Duration::ZERO).inner.permits("r.example", inside));
        for (url, ok) in [
            ("https://10.0.0.7/v2", false),
            ("https://169.254.169.254/latest", false),
            ("https://[fd00::7]/v2", false),
            ("https://10.0.0.9:5000/v2", true),
            ("https://[fd00::9]/v2", true),
            ("https://8.8.8.8/v2", true),
            ("https://r.example/v2", true),
        ] {
            assert_eq!(names.check(&Url::parse(url).unwrap()).is_ok(), ok, "{url}");
        }
    }

    #[tokio::test]
    async fn a_name_that_leads_inside_leads_nowhere() {
        // Every machine resolves its own name for loopback, also written so.
        let asked = outside(&[]).inner.addresses("localhost.").await;
        assert!(
            asked.as_ref().is_err_and(|error| error.is::<Inside>() || error.to_string().contains("resolved")),
            "{asked:?}"
        );
        assert!(outside(&[]).inner.addresses("localhost").await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_good_addresses_stand_in_for_an_hour() {
        let names = outside(&[]);
        let settle = |found: Result<Vec<SocketAddr>, String>| names.inner.settle("r.example", found);
        let (one, two): (SocketAddr, SocketAddr) = ("8.8.8.8:0".parse().unwrap(), "8.8.4.4:0".parse().unwrap());
        let lost = || Err("no such name".to_owned());
        assert!(settle(lost()).is_err());
        assert_eq!(settle(Ok(vec![one])).unwrap(), [one]);
        assert_eq!(settle(lost()).unwrap(), [one]);
        assert_eq!(settle(Ok(Vec::new())).unwrap(), [one]);
        assert_eq!(settle(Ok(vec![two])).unwrap(), [two], "a new address counts at once");
        tokio::time::advance(LAST_GOOD).await;
        assert!(settle(lost()).is_err());
    }
}
