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
use crate::inward;
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

/// What the last challenge led to.
#[derive(Debug)]
enum Grant {
    /// The caller's credential as it is. Not kept here: whoever asks brings it along.
    Own,
    Token {
        header: HeaderValue,
        /// Where the next one comes from.
        challenge: BearerChallenge,
        /// When it is due.
        due: Instant,
    },
}

impl Grant {
    fn header(&self, asker: Asker<'_>) -> Result<HeaderValue, SourceError> {
        match self {
            Self::Own => own_header(asker),
            Self::Token { header, .. } => Ok(header.clone()),
        }
    }
}

impl Tokens {
    /// What to send along without having been challenged: what the last challenge led to, renewed when it is due.
    pub(crate) async fn current(&self, key: &TokenKey, asker: Asker<'_>) -> Result<Option<HeaderValue>, SourceError> {
        let began = Instant::now();
        let slot = self.slot(key);
        let mut state = slot.lock().await;
        let challenge = match &state.grant {
            None => return Ok(None),
            Some(Grant::Token { challenge, due, .. }) if *due <= Instant::now() => challenge.clone(),
            Some(grant) => return grant.header(asker).map(Some),
        };
        state.settle(asker, began, fetch(asker, challenge)).await.map(Some)
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
        if let Some(grant) = &state.grant {
            let known = grant.header(asker)?;
            if Some(&known) != used {
                // Another request has been challenged and has settled it.
                return Ok(known);
            }
        }
        let challenges = Challenges::read(headers);
        match (asker.credential, challenges) {
            (Credential::Bearer(_), _) => {}
            (_, Challenges { bearer: Some(challenge), .. }) => {
                state.grant = None;
                return state.settle(asker, began, fetch(asker, challenge)).await;
            }
            (Credential::Basic { .. }, Challenges { basic: true, .. }) => {}
            (Credential::Anonymous, Challenges { basic: true, .. }) => {
                return Err(unauthorized(asker, "asks for a user name and password"));
            }
            _ => return Err(unauthorized(asker, "asks for credentials in a way that is not supported")),
        }
        let header = own_header(asker)?;
        if used == Some(&header) {
            return Err(unauthorized(asker, "refuses the credentials"));
        }
        state.grant = Some(Grant::Own);
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
        asker: Asker<'_>,
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
                let header = grant.header(asker)?;
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
    let url = token_url(&asker.endpoint.config.base, asker.repository, &challenge)?;
    let mut private = HeaderMap::new();
    if let Credential::Basic { .. } = asker.credential {
        private.insert(AUTHORIZATION, own_header(asker)?);
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
    Ok(Grant::Token { header, challenge, due: asked + life * 9 / 10 })
}

#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(flatten)]
    token: RegistryToken,
    /// Seconds; shorter lives than a minute are not allowed by the protocol.
    expires_in: Option<u64>,
}

/// Where to ask for a token. A registry that is reached by HTTPS must not send its callers' passwords elsewhere in clear.
fn token_url(registry: &Url, repository: &str, challenge: &BearerChallenge) -> Result<Url, SourceError> {
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
    if inward::names_token_server(registry, &url) {
        return refuse("at an address of this machine or its networks");
    }
    if !url.username().is_empty() || url.password().is_some() {
        return refuse("with credentials in its address");
    }
    let ours = format!("repository:{repository}:pull");
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

/// What a registry's challenges lead to, for `crate::fuzzing`.
#[cfg(fuzzing)]
pub(crate) fn token_urls(registry: &Url, headers: &HeaderMap) -> Option<Result<Url, SourceError>> {
    Challenges::read(headers).bearer.map(|challenge| token_url(registry, "team/app", &challenge))
}

/// The caller's credential as a header of its own.
fn own_header(asker: Asker<'_>) -> Result<HeaderValue, SourceError> {
    let text = match asker.credential {
        Credential::Anonymous => return Err(unauthorized(asker, "asks for credentials")),
        Credential::Basic { username, password } => {
            format!("Basic {}", STANDARD.encode(format!("{username}:{}", password.expose())))
        }
        Credential::Bearer(token) => format!("Bearer {}", token.expose()),
    };
    secret_header(&text).ok_or_else(|| unauthorized(asker, "cannot be sent such credentials"))
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
