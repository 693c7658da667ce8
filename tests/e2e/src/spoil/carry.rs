//! One connection: what is asked, what the registry says, and what becomes of it.

use std::io::{BufReader, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest as _, Sha256};

use super::fault::Spoiling;
use super::{Guard, REMEMBERED, Seen, Shared, http};

/// Longest wait for one read or write of a connection, and longest silence.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often a slowed answer goes on, in a second.
const BEATS: u32 = 20;
/// How often silence looks whether anybody is still there.
const LOOK: Duration = Duration::from_millis(20);
/// Path of the token server.
const TOKEN: &str = "/token";
/// Parameter of a signed address: the moment at which it expires, in milliseconds.
const UNTIL: &str = "until=";

/// An answer: status line with headers, and body.
struct Answer {
    head: Vec<String>,
    body: Vec<u8>,
}

impl Answer {
    fn new(status: u16, headers: &[String], body: &str) -> Self {
        let mut head = vec![format!("HTTP/1.1 {status} {}", reason(status))];
        head.extend_from_slice(headers);
        head.push(format!("Content-Length: {}", body.len()));
        Self { head, body: body.as_bytes().to_vec() }
    }

    /// Makes the length fit.
    fn resized(mut self) -> Self {
        let length = self.body.len().to_string();
        http::set(&mut self.head, "Content-Length", Some(length));
        self
    }
}

fn reason(status: u16) -> &'static str {
    if status < 400 { "Fine" } else { "Spoiled" }
}

/// Serves one request.
pub(super) fn carry(mut client: TcpStream, shared: &Shared) -> Result<()> {
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    let request = http::head(&mut BufReader::new(client.try_clone()?))?;
    let Some((method, path)) = request.first().and_then(|line| {
        let mut words = line.split(' ');
        Some((words.next()?.to_owned(), words.next()?.to_owned()))
    }) else {
        return Ok(());
    };
    let (spoiling, number, random) = note(shared, &method, &path, &request);
    let of_ours = own_answer(shared, &method, &path, &request, &spoiling, number);
    if spoiling == Spoiling::Mute {
        return be_silent(&mut client, shared);
    }
    let answer = match of_ours {
        Some(answer) => answer,
        None => spoiled(ask(shared, &spoiling, &request)?, &spoiling, &request, random)?,
    };
    http::send_head(&mut client, &answer.head)?;
    let body = if method == "HEAD" { &[][..] } else { &answer.body };
    send_body(client, body, &spoiling, shared)
}

/// Remembers the request and says what shall become of its answer: how it is spoiled, as which one (from 1), and a number for
/// whatever is to be drawn.
fn note(shared: &Shared, method: &str, path: &str, request: &[String]) -> (Spoiling, u32, u64) {
    let mut state = shared.state();
    if state.seen.len() >= REMEMBERED {
        state.seen.pop_front();
    }
    let headers = request.get(1..).unwrap_or_default().to_vec();
    state.seen.push_back(Seen { method: method.to_owned(), path: path.to_owned(), headers });
    let agent = http::header(request, "user-agent").unwrap_or_default();
    let concerned = path.contains("/blobs/sha256:") || (state.manifests && path.contains("/manifests/"));
    if !concerned || !agent.starts_with(&state.only) || state.spoiling == Spoiling::None {
        return (Spoiling::None, 0, 0);
    }
    state.spoiled += 1;
    let (number, random) = (state.spoiled, state.random());
    let over = state.first.is_some_and(|first| number > first);
    (if over { Spoiling::None } else { state.spoiling.clone() }, number, random)
}

/// The answer, where the registry need not be asked for it.
fn own_answer(
    shared: &Shared,
    method: &str,
    path: &str,
    request: &[String],
    spoiling: &Spoiling,
    number: u32,
) -> Option<Answer> {
    let (document, guard) = {
        let state = shared.state();
        (state.documents.get(path).cloned(), state.guard.clone())
    };
    if let Some(refused) = guard.and_then(|guard| guarded(shared, &guard, path, request)) {
        return Some(refused);
    }
    if let Some((content_type, body)) = document {
        let digest = hex::encode(Sha256::digest(&body));
        let headers = [format!("Content-Type: {content_type}"), format!("Docker-Content-Digest: sha256:{digest}")];
        let mut answer = Answer::new(200, &headers, "");
        answer.body = body;
        return Some(answer.resized());
    }
    if let Some((_, until)) = path.split_once(UNTIL)
        && until.split('&').next().and_then(|until| until.parse().ok()).is_none_or(|until| now() >= until)
    {
        return Some(Answer::new(403, &[], "<Error><Code>AccessDenied</Code></Error>"));
    }
    let redirect = |to: String| Some(Answer::new(307, &[format!("Location: {to}")], ""));
    match spoiling {
        Spoiling::Status(status) => Some(Answer::new(*status, &[], "spoiled")),
        Spoiling::Busy { status, after, date } => {
            let value =
                if *date { httpdate::fmt_http_date(SystemTime::now() + *after) } else { after.as_secs().to_string() };
            Some(Answer::new(*status, &[format!("Retry-After: {value}")], ""))
        }
        Spoiling::Redirect(to) => redirect(to.replace("{path}", path)),
        Spoiling::Signed { to, life, mark } => {
            let until = now() + u64::try_from(life.as_millis()).unwrap_or(u64::MAX);
            let method = method.to_lowercase();
            redirect(format!("http://{to}{path}?X-Signature={mark}-{number}-{method}&{UNTIL}{until}"))
        }
        Spoiling::Challenge(challenge) => Some(Answer::new(401, &[format!("WWW-Authenticate: {challenge}")], "")),
        _ => None,
    }
}

/// What a client gets who has no token (yet), or asks for one.
fn guarded(shared: &Shared, guard: &Guard, path: &str, request: &[String]) -> Option<Answer> {
    let shown = http::header(request, "authorization").unwrap_or_default();
    if path.starts_with(TOKEN) {
        let login = format!("{}:{}", guard.login.user, guard.login.password);
        if shown.strip_prefix("Basic ") != Some(&STANDARD.encode(login)) {
            return Some(Answer::new(401, &[], ""));
        }
        let until = now() + u64::try_from(guard.life.as_millis()).unwrap_or(u64::MAX);
        let token = format!(r#"{{"token":"{}-{until}","expires_in":300}}"#, guard.mark);
        return Some(Answer::new(200, &["Content-Type: application/json".to_owned()], &token));
    }
    let token = shown.strip_prefix("Bearer ").and_then(|token| token.strip_prefix(&guard.mark));
    let until = token.and_then(|rest| rest.strip_prefix('-')).and_then(|until| until.parse().ok());
    if until.is_some_and(|until| now() <= until) {
        return None;
    }
    let challenge = format!("Bearer realm=\"http://{}{TOKEN}\",service=\"double\"", shared.address);
    Some(Answer::new(401, &[format!("WWW-Authenticate: {challenge}")], ""))
}

/// What the registry says.
fn ask(shared: &Shared, spoiling: &Spoiling, request: &[String]) -> Result<Answer> {
    let mut asked = request.to_vec();
    match (spoiling, http::range(request)) {
        (Spoiling::NoRange, _) => http::set(&mut asked, "Range", None),
        (Spoiling::OtherRange, Some((first, last))) if last > first => {
            http::set(&mut asked, "Range", Some(format!("bytes={first}-{}", last - 1)));
        }
        _ => {}
    }
    // The registry behind asks for nothing, and refuses what it does not know.
    if shared.state().guard.is_some() {
        http::set(&mut asked, "Authorization", None);
    }
    let target = shared.target;
    let mut server = TcpStream::connect(target).with_context(|| format!("connecting to {target}"))?;
    server.set_read_timeout(Some(PATIENCE))?;
    server.set_write_timeout(Some(PATIENCE))?;
    http::send_head(&mut server, &asked)?;
    let mut server = BufReader::new(server);
    let head = http::head(&mut server)?;
    let mut body = Vec::new();
    server.read_to_end(&mut body)?;
    Ok(Answer { head, body })
}

/// What becomes of it.
fn spoiled(mut answer: Answer, spoiling: &Spoiling, request: &[String], random: u64) -> Result<Answer> {
    let length = answer.body.len();
    match spoiling {
        Spoiling::WrongByte if length > 0 => {
            let (at, bit) = (usize::try_from(random)? % length, (random >> 32) % 8);
            if let Some(byte) = answer.body.get_mut(at) {
                *byte ^= 1 << bit;
            }
            Ok(answer)
        }
        Spoiling::Short(bytes) => {
            answer.body.truncate(length.saturating_sub(*bytes));
            Ok(answer.resized())
        }
        Spoiling::Long(bytes) => {
            answer.body.resize(length + bytes, 0);
            Ok(answer.resized())
        }
        Spoiling::ForgedRange if length > 1 => {
            answer.body.rotate_left(1);
            Ok(answer)
        }
        Spoiling::Multipart => {
            let (first, last) = http::range(request).unwrap_or_default();
            let mut body = format!("--part\r\nContent-Range: bytes {first}-{last}/*\r\n\r\n").into_bytes();
            body.append(&mut answer.body);
            body.extend_from_slice(b"\r\n--part--\r\n");
            http::set(&mut answer.head, "Content-Range", None);
            http::set(&mut answer.head, "Content-Type", Some("multipart/byteranges; boundary=part".to_owned()));
            Ok(Answer { body, ..answer }.resized())
        }
        Spoiling::Gzip => {
            let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
            packed.write_all(&answer.body)?;
            http::set(&mut answer.head, "Content-Encoding", Some("gzip".to_owned()));
            Ok(Answer { body: packed.finish()?, ..answer }.resized())
        }
        _ => Ok(answer),
    }
}

fn send_body(mut client: TcpStream, body: &[u8], spoiling: &Spoiling, shared: &Shared) -> Result<()> {
    let first = |bytes: usize| body.get(..bytes).unwrap_or(body);
    match spoiling {
        Spoiling::Slow(bytes) => send_slowly(&mut client, body, *bytes, shared),
        Spoiling::Stall(bytes) => {
            client.write_all(first(*bytes))?;
            be_silent(&mut client, shared)
        }
        Spoiling::Reset(bytes) => {
            client.write_all(first(*bytes))?;
            // Time zero to linger: the end of the connection is a reset.
            rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO))?;
            Ok(())
        }
        Spoiling::Cut(bytes) => {
            client.write_all(first(*bytes))?;
            // One half only; the other one stays open while the client likes.
            client.shutdown(Shutdown::Write)?;
            be_silent(&mut client, shared)
        }
        _ => Ok(client.write_all(body)?),
    }
}

// The pause is the measure here, not a wait for something.
#[allow(clippy::disallowed_methods)]
fn send_slowly(client: &mut TcpStream, body: &[u8], bytes: u32, shared: &Shared) -> Result<()> {
    let piece = (bytes / BEATS).max(1);
    for piece in body.chunks(usize::try_from(piece)?) {
        if shared.ended() {
            break;
        }
        client.write_all(piece)?;
        let share = u32::try_from(piece.len())?;
        std::thread::sleep(Duration::from_secs(1) * share / bytes.max(1));
    }
    Ok(())
}

/// Holds the connection open until the other side or the proxy ends.
fn be_silent(client: &mut TcpStream, shared: &Shared) -> Result<()> {
    client.set_read_timeout(Some(LOOK))?;
    let begun = Instant::now();
    while !shared.ended() && begun.elapsed() < PATIENCE {
        match client.read(&mut [0]) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            _ => break,
        }
    }
    Ok(())
}

/// Milliseconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
