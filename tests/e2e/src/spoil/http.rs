//! Heads of requests and answers, as lines.

use std::io::{BufRead, Read as _, Write};

use anyhow::{Context as _, Result};

/// Bytes of a head, at most.
const HEAD: u64 = 64 * 1024;

/// Request or status line and headers, without the empty line at the end.
pub(super) fn head(stream: &mut impl BufRead) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let mut limited = stream.take(HEAD);
    loop {
        let mut line = String::new();
        limited.read_line(&mut line).context("reading a head")?;
        let line = line.trim_end();
        if line.is_empty() {
            return Ok(lines);
        }
        lines.push(line.to_owned());
    }
}

/// Whether the line is this header.
pub(super) fn is_header(line: &str, name: &str) -> bool {
    line.split_once(':').is_some_and(|(found, _)| found.eq_ignore_ascii_case(name))
}

/// The value of the first header of this name.
pub(super) fn header<'a>(lines: &'a [String], name: &str) -> Option<&'a str> {
    let line = lines.iter().find(|line| is_header(line, name))?;
    line.split_once(':').map(|(_, value)| value.trim())
}

/// Replaces a header, or leaves it out.
pub(super) fn set(lines: &mut Vec<String>, name: &str, value: Option<String>) {
    lines.retain(|line| !is_header(line, name));
    lines.extend(value.map(|value| format!("{name}: {value}")));
}

/// Writes a head that promises no second message on this connection.
pub(super) fn send_head(to: &mut impl Write, lines: &[String]) -> Result<()> {
    let mut text = String::new();
    for line in lines.iter().filter(|line| !is_header(line, "connection")) {
        text.push_str(line);
        text.push_str("\r\n");
    }
    text.push_str("Connection: close\r\n\r\n");
    Ok(to.write_all(text.as_bytes())?)
}

/// First and last byte of the range that a request asks for.
pub(super) fn range(lines: &[String]) -> Option<(u64, u64)> {
    let (first, last) = header(lines, "range")?.strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
}
