//! Answers to a registry's challenges: Basic, and tokens from the token server that it names.
//!
//! Tokens are kept for (host, repository, credential), so that no caller ever uses what another one was given.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_auth::ChallengeParser;
use millstream_oci::Digest;
use millstream_source::{ErrorKind, Retry, SourceError};
use oci_client::token_cache::RegistryToken;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Method, Url};
use serde::Deserialize;
use tokio::time::Instant;

use crate::Credential;
use crate::endpoint::Endpoint;
use crate::failure::shown;
use crate::options::{MAX_CACHED, MAX_TOKEN_ANSWER};
use crate::transport::{Request, Transport};

/// How long a token lasts whose server does not say: what the token protocol prescribes.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// No token is used for longer, whatever its server says.
const LONGEST_LIFE: Duration = Duration::from_secs(3600);

/// Who asks whom for what: one token.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct TokenKey {
    /// Scheme, host and port.
    pub(crate) host: String,
    pub(crate) repository: String,
    pub(crate) credential: Digest,
}

/// Everything needed to get a token.
#[derive(Clone, Copy)]
pub(crate) struct Asker<'a> {
    pub(crate) transport: &'a Transport,
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) repository: &'a str,
    pub(crate) credential: &'a Credential,
}

/// What was given to whom.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    slots: Mutex<HashMap<TokenKey, Arc<Slot>>>,
}

/// One lock for each key: whoever finds it taken waits for the token that is being fetched, instead of fetching one.
type Slot = tokio::sync::Mutex<State>;

#[derive(Debug, Default)]
struct State {
    grant: Option<Grant>,
    /// The last failure and when it came: those who were waiting then share it.
    failed: Option<(Instant, SourceError)>,
}

#[derive(Debug)]
struct Grant {
    header: HeaderValue,
    /// Where the next one comes from and when it is due; none for what never expires.
    renewal: Option<(BearerChallenge, Instant)>,
}

impl Tokens {
    /// What to send along without having been challenged: what the last challenge led to, renewed when it is due.
    pub(crate) async fn current(&self, key: &TokenKey, asker: Asker<'_>) -> Result<Option<HeaderValue>, SourceError> {
        let began = Instant::now();
        let slot = self.slot(key);
        let mut state = slot.lock().await;
        let challenge = match &state.grant {
            None => return Ok(None),
            Some(Grant { renewal: Some((challenge, due)), .. }) if *due <= Instant::now() => challenge.clone(),
            Some(grant) => return Ok(Some(grant.header.clone())),
        };
        state.settle(began, fetch(asker, challenge)).await.map(Some)
    }

    /// The answer to the challenges in `headers`, which came for a request that was sent with `used`.
    pub(crate) async fn challenged(
        &self,
        key: &TokenKey,
        asker: Asker<'_>,
        used: Option<&HeaderValue>,
        headers: &HeaderMap,
    ) -> Result<HeaderValue, SourceError> {
        let began = Instant::now();
        let slot = self.slot(key);
        let mut state = slot.lock().await;
        if let Some(grant) = &state.grant
            && Some(&grant.header) != used
        {
            // Another request has been challenged and has settled it.
            return Ok(grant.header.clone());
        }
        let challenges = Challenges::read(headers);
        let static_header = match (asker.credential, challenges) {
            (Credential::Bearer(token), _) => format!("Bearer {}", token.expose()),
            (_, Challenges { bearer: Some(challenge), .. }) => {
                state.grant = None;
                return state.settle(began, fetch(asker, challenge)).await;
            }
            (Credential::Basic { username, password }, Challenges { basic: true, .. }) => {
                basic(username, password.expose())
            }
            (Credential::Anonymous, Challenges { basic: true, .. }) => {
                return Err(unauthorized(asker, "asks for a user name and password"));
            }
            _ => return Err(unauthorized(asker, "asks for credentials in a way that is not supported")),
        };
        let header =
            secret_header(&static_header).ok_or_else(|| unauthorized(asker, "cannot be sent such credentials"))?;
        if used == Some(&header) {
            return Err(unauthorized(asker, "refuses the credentials"));
        }
        state.grant = Some(Grant { header: header.clone(), renewal: None });
        Ok(header)
    }

    fn slot(&self, key: &TokenKey) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= MAX_CACHED && !slots.contains_key(key) {
            // Whoever holds a slot goes on with it; the others ask again.
            slots.clear();
        }
        Arc::clone(slots.entry(key.clone()).or_default())
    }
}

impl State {
    /// Keeps what `fetching` gives, unless a fetch that ended after `began` has just failed.
    async fn settle(
        &mut self,
        began: Instant,
        fetching: impl Future<Output = Result<Grant, SourceError>>,
    ) -> Result<HeaderValue, SourceError> {
        if let Some((when, error)) = &self.failed
            && *when > began
        {
            return Err(error.clone());
        }
        match fetching.await {
            Ok(grant) => {
                let header = grant.header.clone();
                *self = Self { grant: Some(grant), failed: None };
                Ok(header)
            }
            Err(error) => {
                *self = Self { grant: None, failed: Some((Instant::now(), error.clone())) };
                Err(error)
            }
        }
    }
}

/// What a token server needs to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
struct BearerChallenge {
    realm: String,
    service: Option<String>,
    scope: Option<String>,
}

/// The challenges of an answer that we can meet.
#[derive(Debug, Default, PartialEq, Eq)]
struct Challenges {
    bearer: Option<BearerChallenge>,
    basic: bool,
}

impl Challenges {
    /// Unreadable challenges are passed over; of several alike the first counts.
    fn read(headers: &HeaderMap) -> Self {
        let mut found = Self::default();
        let texts = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        for challenge in texts.flat_map(|text| ChallengeParser::new(text).map_while(Result::ok)) {
            let parameter = |name: &str| {
                let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.to_unescaped())
            };
            if challenge.scheme.eq_ignore_ascii_case("basic") {
                found.basic = true;
            } else if challenge.scheme.eq_ignore_ascii_case("bearer")
                && found.bearer.is_none()
                && let Some(realm) = parameter("realm")
            {
                let (service, scope) = (parameter("service"), parameter("scope"));
                found.bearer = Some(BearerChallenge { realm, service, scope });
            }
        }
        found
    }
}

/// Gets a token.
async fn fetch(asker: Asker<'_>, challenge: BearerChallenge) -> Result<Grant, SourceError> {
    let url = token_url(asker, &challenge)?;
    let mut private = HeaderMap::new();
    if let Credential::Basic { username, password } = asker.credential {
        let header = secret_header(&basic(username, password.expose()));
        private.insert(AUTHORIZATION, header.ok_or_else(|| unauthorized(asker, "cannot be sent such credentials"))?);
    }
    let request = Request { method: Method::GET, url, headers: HeaderMap::new(), private };
    let asked = Instant::now();
    let answer = asker.transport.send(&asker.endpoint.client, request).await?.require_success().await?;
    answer.require_identity()?;
    let url = answer.url.clone();
    let body = answer.collect(MAX_TOKEN_ANSWER).await?;
    // The parser's error is not shown: it may quote the token.
    let malformed = || SourceError::new(ErrorKind::Malformed, format!("{} gave no readable token", shown(&url)));
    let token: TokenAnswer = serde_json::from_slice(&body).map_err(|_| malformed())?;
    let life = token.expires_in.map_or(DEFAULT_LIFE, Duration::from_secs).clamp(DEFAULT_LIFE, LONGEST_LIFE);
    let header = secret_header(&token.token.bearer_token()).ok_or_else(malformed)?;
    // A little early, so that it does not expire on its way.
    Ok(Grant { header, renewal: Some((challenge, asked + life * 9 / 10)) })
}

#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(flatten)]
    token: RegistryToken,
    /// Seconds; shorter lives than a minute are not allowed by the protocol.
    expires_in: Option<u64>,
}

/// Where to ask for a token. A registry that is reached by HTTPS must not send its callers' passwords elsewhere in clear.
fn token_url(asker: Asker<'_>, challenge: &BearerChallenge) -> Result<Url, SourceError> {
    let registry = &asker.endpoint.config.base;
    let refuse = |reason: &str| {
        let message = format!("{} names a token server {reason}", shown(registry));
        Err(SourceError::new(ErrorKind::Unauthorized, message).with_retry(Retry::Never))
    };
    let Ok(mut url) = Url::parse(&challenge.realm) else {
        return refuse("with an unreadable address");
    };
    match (registry.scheme(), url.scheme()) {
        (_, "https") | ("http", "http") => {}
        _ => return refuse("that is not reached by https"),
    }
    if !url.username().is_empty() || url.password().is_some() {
        return refuse("with credentials in its address");
    }
    let ours = format!("repository:{}:pull", asker.repository);
    {
        let mut query = url.query_pairs_mut();
        if let Some(service) = &challenge.service {
            query.append_pair("service", service);
        }
        query.append_pair("scope", &ours);
        // A mirror may call the repository by another name. More than reading is never asked for.
        let theirs = challenge.scope.as_deref().unwrap_or_default().split(' ');
        for scope in theirs.filter(|scope| *scope != ours && is_pull_scope(scope)).take(4) {
            query.append_pair("scope", scope);
        }
    }
    Ok(url)
}

fn is_pull_scope(scope: &str) -> bool {
    scope.starts_with("repository:") && scope.ends_with(":pull")
}

fn basic(username: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{username}:{password}")))
}

fn secret_header(text: &str) -> Option<HeaderValue> {
    let mut header = HeaderValue::from_str(text).ok()?;
    header.set_sensitive(true);
    Some(header)
}

fn unauthorized(asker: Asker<'_>, reason: &str) -> SourceError {
    let registry = shown(&asker.endpoint.config.base);
    let message = format!("{registry} {reason} for {}; hint: check the pull secret or log in", asker.repository);
    SourceError::new(ErrorKind::Unauthorized, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(values: &[&str]) -> Challenges {
        let headers = values.iter().map(|value| (WWW_AUTHENTICATE, value.parse().unwrap()));
        Challenges::read(&HeaderMap::from_iter(headers))
    }

    #[test]
    fn challenges_are_read() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| {
            let (service, scope) = (service.map(str::to_owned), scope.map(str::to_owned));
            Some(BearerChallenge { realm: realm.to_owned(), service, scope })
        };
        let full = r#"Bearer realm="https://a/t",service="r.io",scope="repository:x:pull,push""#;
        assert_eq!(read(&[full]).bearer, bearer("https://a/t", Some("r.io"), Some("repository:x:pull,push")));
        assert_eq!(read(&["bEARER Realm=\"https://a\""]).bearer, bearer("https://a", None, None));
        assert_eq!(
            read(&["Basic realm=\"x\", Bearer realm=\"y\""]),
            Challenges { bearer: bearer("y", None, None), basic: true }
        );
        assert_eq!(read(&["Basic realm=x"]), Challenges { bearer: None, basic: true });
        for nothing in ["Bearer service=\"a\"", "Negotiate", "", "Bearer realm=\"unclosed", ",,,="] {
            assert_eq!(read(&[nothing]), Challenges::default(), "{nothing}");
        }
    }

    #[test]
    fn only_pull_scopes_are_taken_over() {
        assert!(is_pull_scope("repository:proxy/library/nginx:pull"));
        for scope in ["repository:x:pull,push", "repository:x:*", "registry:catalog:*", "", "x:pull"] {
            assert!(!is_pull_scope(scope), "{scope}");
        }
    }
}
