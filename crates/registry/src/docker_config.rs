//! Credentials from Docker's `config.json` and its credential helpers.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use millstream_oci::ImageRef;
use millstream_source::{ErrorKind, SourceError};
use serde::Deserialize;

use crate::{Credential, Secret};

/// Largest `config.json` and largest answer of a helper, in bytes.
const MAX_SIZE: u64 = 1 << 20;
/// How long a helper may take.
const HELPER_TIMEOUT: Duration = Duration::from_secs(10);
/// How often to look whether a helper has ended.
const POLL: Duration = Duration::from_millis(5);
/// Under which name Docker keeps credentials of `docker.io`.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// The credential that Docker's configuration at `path` holds for the registry of `image`: from the helper configured
/// for that registry, else from the general helper, else from the file itself, else none. A file that does not exist
/// holds none.
///
/// Blocks while a helper runs (`docker-credential-NAME get`), at most ten seconds.
///
/// # Errors
///
/// [`ErrorKind::Local`] when the file or a helper's answer cannot be read, or the helper takes too long;
/// [`ErrorKind::Unauthorized`] when there is only an identity token, which is not supported.
pub fn docker_config_credential(path: &Path, image: &ImageRef) -> Result<Credential, SourceError> {
    lookup(path, image, HELPER_TIMEOUT)
}

fn lookup(path: &Path, image: &ImageRef, timeout: Duration) -> Result<Credential, SourceError> {
    let text = match std::fs::metadata(path) {
        Ok(meta) if meta.len() > MAX_SIZE => return Err(local(format!("{} is too large", path.display()))),
        Ok(_) => std::fs::read(path).map_err(|error| local(format!("cannot read {}: {error}", path.display())))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Credential::Anonymous),
        Err(error) => return Err(local(format!("cannot read {}: {error}", path.display()))),
    };
    let config = Config::parse(&text, path)?;
    let names = names(image.registry());
    let helper = names.iter().find_map(|name| config.cred_helpers.get(*name)).or(config.creds_store.as_ref());
    if let Some(helper) = helper.filter(|helper| !helper.is_empty()) {
        let server = names.first().copied().unwrap_or_default();
        if let Some(credential) = ask_helper(helper, server, timeout)? {
            return Ok(credential);
        }
    }
    config.stored(&names, image.registry())
}

/// What a text holds, without asking helpers, for `crate::fuzzing`.
#[cfg(fuzzing)]
pub(crate) fn stored(text: &[u8], image: &ImageRef) -> Result<Credential, SourceError> {
    Config::parse(text, Path::new("config.json"))?.stored(&names(image.registry()), image.registry())
}

/// Names under which a registry's credentials may be kept, the one that helpers know first.
fn names(registry: &str) -> Vec<&str> {
    match registry {
        "docker.io" => vec![DOCKER_HUB, "index.docker.io", "docker.io", "registry-1.docker.io"],
        other => vec![other],
    }
}

/// The host of a key that may be a URL.
fn host_of(key: &str) -> &str {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    key.split('/').next().unwrap_or_default()
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    #[serde(default)]
    auths: HashMap<String, Auth>,
    #[serde(default)]
    cred_helpers: HashMap<String, String>,
    creds_store: Option<String>,
}

impl Config {
    fn parse(text: &[u8], path: &Path) -> Result<Self, SourceError> {
        // The position is all of the error that can be shown: the rest may quote a password.
        serde_json::from_slice(text).map_err(|error| {
            local(format!("{} is malformed at line {}, column {}", path.display(), error.line(), error.column()))
        })
    }

    /// What the file itself holds for a registry under one of its names.
    fn stored(&self, names: &[&str], registry: &str) -> Result<Credential, SourceError> {
        let exact = names.iter().find_map(|name| self.auths.get(*name));
        let by_host = || self.auths.iter().find(|(key, _)| names.contains(&host_of(key))).map(|(_, auth)| auth);
        match exact.or_else(by_host) {
            Some(auth) => auth.credential(registry),
            None => Ok(Credential::Anonymous),
        }
    }
}

#[derive(Deserialize)]
struct Auth {
    #[serde(default)]
    auth: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    identitytoken: String,
    #[serde(default)]
    registrytoken: String,
}

impl Auth {
    fn credential(&self, registry: &str) -> Result<Credential, SourceError> {
        if !self.registrytoken.is_empty() {
            return Ok(Credential::Bearer(Secret::new(self.registrytoken.as_str())));
        }
        if !self.identitytoken.is_empty() {
            return Err(identity_token(registry));
        }
        if !self.username.is_empty() {
            return Ok(basic(&self.username, &self.password));
        }
        if self.auth.is_empty() {
            return Ok(Credential::Anonymous);
        }
        let decoded = STANDARD.decode(&self.auth).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        // Some tools pad the password with NULs.
        match decoded.as_deref().map(|text| text.trim_end_matches('\0')).and_then(|text| text.split_once(':')) {
            Some((username, password)) => Ok(basic(username, password)),
            None => Err(local(format!("docker config: \"auth\" of {registry} is not base64 of user:password"))),
        }
    }
}

fn basic(username: &str, password: &str) -> Credential {
    Credential::Basic { username: username.to_owned(), password: Secret::new(password) }
}

fn identity_token(registry: &str) -> SourceError {
    let message = format!(
        "docker config holds an identity token for {registry}, which is not supported; hint: log in with a password or \
         an access token"
    );
    SourceError::new(ErrorKind::Unauthorized, message)
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// Asks `docker-credential-NAME` for the credential of `server`; `None` when it has none.
fn ask_helper(name: &str, server: &str, timeout: Duration) -> Result<Option<Credential>, SourceError> {
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
        return Err(local(format!("{name:?} is not the name of a credential helper")));
    }
    let program = format!("docker-credential-{name}");
    let (success, output) = run(Command::new(&program).arg("get"), server, timeout)
        .map_err(|reason| local(format!("{program} get: {reason}")))?;
    if !success {
        // Helpers say "not found" by failing, in words of their own.
        tracing::debug!("{program} has no credential for {server}");
        return Ok(None);
    }
    // Not shown: the parser's error may quote the secret.
    let answer: HelperAnswer =
        serde_json::from_slice(&output).map_err(|_| local(format!("{program} get: the answer is malformed")))?;
    match (answer.username.as_str(), answer.secret.as_str()) {
        ("<token>", _) => Err(identity_token(server)),
        ("", "") => Ok(None),
        (username, secret) => Ok(Some(basic(username, secret))),
    }
}

/// Runs `command` with `input`; gives whether it succeeded and what it wrote, or why neither can be told.
fn run(command: &mut Command, input: &str, timeout: Duration) -> Result<(bool, Vec<u8>), String> {
    let deadline = Instant::now() + timeout;
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("cannot be started: {error}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A server's name fits a pipe's buffer, so this never waits; a helper that does not read it is no error.
        let _ = stdin.write_all(input.as_bytes());
    }
    let (sender, receiver) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        std::thread::spawn(move || {
            let mut output = Vec::new();
            let result = stdout.take(MAX_SIZE).read_to_end(&mut output).map(|_| output);
            let _ = sender.send(result);
        });
    }
    let output = receiver.recv_timeout(timeout);
    let status = wait(&mut child, deadline);
    match (output, status) {
        (Ok(Ok(output)), Some(success)) => Ok((success, output)),
        (Ok(Err(error)), _) => Err(format!("cannot read its answer: {error}")),
        (Err(_), _) | (_, None) => Err(format!("no answer within {timeout:?}")),
    }
}

/// Whether `child` succeeded; killed and `None` when it is still running at `deadline`.
#[expect(clippy::disallowed_methods, reason = "documented to block; the standard library cannot wait with a time-out")]
fn wait(child: &mut Child, deadline: Instant) -> Option<bool> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status.success()),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(POLL),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return None;
            }
        }
    }
}

fn local(message: String) -> SourceError {
    SourceError::new(ErrorKind::Local, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(config: &str, image: &str) -> Result<Credential, SourceError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, config).unwrap();
        docker_config_credential(&path, &ImageRef::parse(image).unwrap())
    }

    #[test]
    fn entries_are_found_under_every_spelling() {
        for (key, image, found) in [
            ("https://index.docker.io/v1/", "nginx", true),
            ("index.docker.io", "nginx", true),
            ("docker.io", "nginx", true),
            ("https://registry-1.docker.io/v2/", "nginx", true),
            ("ghcr.io", "ghcr.io/a/b", true),
            ("https://ghcr.io", "ghcr.io/a/b", true),
            ("http://r.example:5000/v1/", "r.example:5000/a", true),
            ("ghcr.io.evil.example", "ghcr.io/a/b", false),
            ("r.example", "r.example:5000/a", false),
        ] {
            // ann:pa:ss
            let config = format!(r#"{{"auths": {{"{key}": {{"auth": "YW5uOnBhOnNz"}}}}}}"#);
            let expected = if found { basic("ann", "pa:ss") } else { Credential::Anonymous };
            assert_eq!(find(&config, image).unwrap(), expected, "{key} for {image}");
        }
    }

    #[test]
    fn every_form_of_entry() {
        let entry = |entry: &str| find(&format!(r#"{{"auths": {{"r.example": {entry}}}}}"#), "r.example/a");
        assert_eq!(entry(r#"{"username": "ann", "password": "x"}"#).unwrap(), basic("ann", "x"));
        assert_eq!(entry(r#"{"auth": "YW5uOngAAA=="}"#).unwrap(), basic("ann", "x"));
        assert_eq!(entry(r#"{"registrytoken": "t"}"#).unwrap(), Credential::Bearer(Secret::new("t")));
        assert_eq!(entry("{}").unwrap(), Credential::Anonymous);
        assert_eq!(entry(r#"{"identitytoken": "t"}"#).unwrap_err().kind, ErrorKind::Unauthorized);
        assert_eq!(entry(r#"{"auth": "!"}"#).unwrap_err().kind, ErrorKind::Local);
        assert_eq!(find("{}", "nginx").unwrap(), Credential::Anonymous);
    }

    #[test]
    fn a_missing_file_is_no_credential_and_a_broken_one_an_error_without_its_text() {
        let image = ImageRef::parse("nginx").unwrap();
        let missing = docker_config_credential(Path::new("/nonexistent/config.json"), &image);
        assert_eq!(missing.unwrap(), Credential::Anonymous);
        let error = find(r#"{"auths": {"a": {"password": "hunter2", "auth": hunter2}}}"#, "nginx").unwrap_err();
        assert_eq!(error.kind, ErrorKind::Local);
        assert!(!error.message.contains("hunter2"), "{error}");
    }

    fn shell(script: &str, timeout: Duration) -> Result<(bool, Vec<u8>), String> {
        run(Command::new("/bin/sh").args(["-c", script]), "r.example", timeout)
    }

    #[test]
    fn helpers_get_the_server_and_a_bounded_time() {
        assert_eq!(shell("cat", HELPER_TIMEOUT).unwrap(), (true, b"r.example".to_vec()));
        assert!(!shell("exit 1", HELPER_TIMEOUT).unwrap().0);
        let began = Instant::now();
        assert!(shell("exec sleep 60", Duration::from_millis(50)).unwrap_err().contains("no answer"));
        assert!(began.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn helper_names_cannot_leave_the_path() {
        let config = r#"{"credsStore": "x/../../evil"}"#;
        assert!(find(config, "nginx").unwrap_err().message.contains("not the name of a credential helper"));
        let error = find(r#"{"credHelpers": {"r.example": "millstream-does-not-exist"}}"#, "r.example/a").unwrap_err();
        assert_eq!(error.kind, ErrorKind::Local);
    }
}
