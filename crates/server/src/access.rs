//! Who may read what: the registry's decision, remembered for minutes only.

use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use millstream_oci::{Digest, ManifestDigest};
use millstream_registry::Credential;
use millstream_source::{ErrorKind, SourceError};
use tokio::time::Instant;

use crate::bounded::Bounded;

/// How long answers of registries count.
#[derive(Debug, Clone)]
pub struct AccessOptions {
    /// How long an allowed caller need not be checked again.
    pub remember_allowed: Duration,
    /// How long a refused caller is refused without asking the registry again.
    pub remember_refused: Duration,
    /// How many answers are remembered at most.
    pub max_answers: u64,
}

impl Default for AccessOptions {
    fn default() -> Self {
        Self {
            remember_allowed: Duration::from_secs(120),
            remember_refused: Duration::from_secs(10),
            max_answers: 16 * 1024,
        }
    }
}

/// Stands for a credential where it must not be kept itself: equal ones have equal fingerprints.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Fingerprint(Digest);

impl Fingerprint {
    pub(crate) fn of(credential: &Credential) -> Self {
        let parts: [&[u8]; 3] = match credential {
            Credential::Anonymous => [b"anonymous", b"", b""],
            Credential::Basic { username, password } => [b"basic", username.as_bytes(), password.expose().as_bytes()],
            Credential::Bearer(token) => [b"bearer", token.expose().as_bytes(), b""],
        };
        // A length before each part: no two credentials give the same bytes.
        let bytes: Vec<u8> = parts
            .iter()
            .flat_map(|part| (part.len() as u64).to_le_bytes().into_iter().chain(part.iter().copied()))
            .collect();
        Self(Digest::of(&bytes))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fingerprint(***)")
    }
}

/// What an answer is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct AccessKey {
    /// Registry and repository.
    pub(crate) repository: String,
    /// Manifest or index.
    pub(crate) manifest: ManifestDigest,
    /// The caller.
    pub(crate) credential: Fingerprint,
}

struct Answer {
    until: Instant,
    refused: Option<SourceError>,
}

/// Held while the registry is asked, so that callers who ask the same wait for one answer.
type Slot = Arc<tokio::sync::Mutex<Option<Answer>>>;

/// Answers of registries.
pub(crate) struct Access {
    options: AccessOptions,
    answers: Mutex<Bounded<AccessKey, Slot>>,
}

impl Access {
    pub(crate) fn new(options: AccessOptions) -> Self {
        let answers = Mutex::new(Bounded::new(options.max_answers.max(1)));
        Self { options, answers }
    }

    /// Whether the registry lets this caller read this manifest: from memory, else by `ask`, whose own bound is the bound of
    /// the wait. Failures that are no decision of the registry are not remembered.
    pub(crate) async fn check<F>(&self, key: AccessKey, ask: F) -> Result<(), SourceError>
    where
        F: Future<Output = Result<(), SourceError>> + Send,
    {
        let slot = self.slot(key);
        let mut answer = slot.lock().await;
        if let Some(known) = answer.as_ref().filter(|known| Instant::now() < known.until) {
            return known.refused.clone().map_or(Ok(()), Err);
        }
        let asked = ask.await;
        *answer = match &asked {
            Ok(()) => Some((self.options.remember_allowed, None)),
            Err(error) if is_decision(error.kind) => Some((self.options.remember_refused, Some(error.clone()))),
            Err(_) => None,
        }
        .map(|(time, refused)| Answer { until: Instant::now() + time, refused });
        asked
    }

    fn slot(&self, key: AccessKey) -> Slot {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = answers.get(&key) {
            return slot;
        }
        let slot = Slot::default();
        answers.insert(key, Arc::clone(&slot), 1);
        slot
    }
}

const fn is_decision(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Unauthorized | ErrorKind::Denied | ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use millstream_registry::Secret;

    use super::*;

    fn key(credential: &Credential) -> AccessKey {
        AccessKey {
            repository: "r.example/a".into(),
            manifest: ManifestDigest(Digest::of(b"m")),
            credential: Fingerprint::of(credential),
        }
    }

    fn basic(username: &str, password: &str) -> Credential {
        Credential::Basic { username: username.into(), password: Secret::new(password) }
    }

    /// Asks with `answer` and says whether the registry was asked.
    async fn asked(access: &Access, credential: &Credential, answer: Result<(), ErrorKind>) -> (bool, bool) {
        let count = AtomicU32::new(0);
        let result = access
            .check(key(credential), async {
                count.fetch_add(1, Ordering::Relaxed);
                answer.map_err(|kind| SourceError::new(kind, "asked"))
            })
            .await;
        (result.is_ok(), count.load(Ordering::Relaxed) == 1)
    }

    #[tokio::test(start_paused = true)]
    async fn answers_are_remembered_for_their_time() {
        let access = Access::new(AccessOptions::default());
        let caller = basic("ada", "1");
        assert_eq!(asked(&access, &caller, Ok(())).await, (true, true));
        tokio::time::advance(Duration::from_secs(119)).await;
        assert_eq!(asked(&access, &caller, Err(ErrorKind::Denied)).await, (true, false));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(asked(&access, &caller, Err(ErrorKind::Denied)).await, (false, true));
        tokio::time::advance(Duration::from_secs(9)).await;
        assert_eq!(asked(&access, &caller, Ok(())).await, (false, false));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(asked(&access, &caller, Ok(())).await, (true, true));
    }

    #[tokio::test(start_paused = true)]
    async fn callers_do_not_share_answers() {
        let access = Access::new(AccessOptions::default());
        assert_eq!(asked(&access, &basic("ada", "1"), Ok(())).await, (true, true));
        for other in [basic("ada", "2"), basic("ada1", ""), Credential::Anonymous, Credential::Bearer(Secret::new("1"))]
        {
            assert_eq!(asked(&access, &other, Err(ErrorKind::Unauthorized)).await, (false, true));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_is_no_answer() {
        let access = Access::new(AccessOptions::default());
        assert_eq!(asked(&access, &Credential::Anonymous, Err(ErrorKind::Unavailable)).await, (false, true));
        assert_eq!(asked(&access, &Credential::Anonymous, Ok(())).await, (true, true));
    }

    #[tokio::test(start_paused = true)]
    async fn concurrent_callers_share_one_question() {
        let access = Access::new(AccessOptions::default());
        let count = AtomicU32::new(0);
        let ask = || async {
            count.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok(())
        };
        let checks = (0..20).map(|_| access.check(key(&Credential::Anonymous), ask()));
        assert!(futures::future::join_all(checks).await.into_iter().all(|result| result.is_ok()));
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }
}
