//! HTTP/1.1 as it stands on the wire: reads one message at a time and passes every byte on unchanged.

use std::io::{self, BufRead, Read as _, Write};

/// Bytes of a body that are kept; the rest is only passed on.
const KEPT: usize = 8 << 10;

/// A start line and headers, without the empty line after them.
#[derive(Debug, Clone)]
pub struct Head(pub String);

impl Head {
    pub fn start(&self) -> &str {
        self.0.lines().next().unwrap_or_default()
    }

    /// A header's value; `name` in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let headers = self
            .0
            .lines()
            .skip(1)
            .filter_map(|line| line.split_once(':'));
        let mut found = headers.filter(|(known, _)| known.eq_ignore_ascii_case(name));
        found.next().map(|(_, value)| value.trim())
    }

    /// Of a response; 0 if there is none.
    pub fn status(&self) -> u16 {
        let status = self.start().split(' ').nth(1);
        status.and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    fn is_chunked(&self) -> bool {
        self.header("transfer-encoding")
            .is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"))
    }

    fn length(&self) -> Option<u64> {
        self.header("content-length")?.parse().ok()
    }
}

/// `None` at the end of the connection.
pub fn read_head(from: &mut impl BufRead, to: &mut impl Write) -> io::Result<Option<Head>> {
    let mut bytes = Vec::new();
    loop {
        let begin = bytes.len();
        from.read_until(b'\n', &mut bytes)?;
        match &bytes[begin..] {
            [] => return Ok(None),
            b"\r\n" | b"\n" => break,
            _ => {}
        }
    }
    to.write_all(&bytes)?;
    let text = String::from_utf8_lossy(&bytes).replace("\r\n", "\n");
    Ok(Some(Head(text.trim_end().to_owned())))
}

/// The first bytes of a request's body, decoded from its chunks.
pub fn read_request_body(
    head: &Head,
    from: &mut impl BufRead,
    to: &mut impl Write,
) -> io::Result<Vec<u8>> {
    match head.is_chunked() {
        true => read_chunks(from, to),
        false => read_length(head.length().unwrap_or(0), from, to),
    }
}

/// The first bytes of a response's body, decoded from its chunks.
pub fn read_response_body(
    head: &Head,
    method: &str,
    from: &mut impl BufRead,
    to: &mut impl Write,
) -> io::Result<Vec<u8>> {
    if method == "HEAD" || matches!(head.status(), 100..200 | 204 | 304) {
        Ok(Vec::new())
    } else if head.is_chunked() {
        read_chunks(from, to)
    } else {
        read_length(head.length().unwrap_or(u64::MAX), from, to)
    }
}

fn read_chunks(from: &mut impl BufRead, to: &mut impl Write) -> io::Result<Vec<u8>> {
    let mut kept = Vec::new();
    loop {
        let line = pass_line(from, to)?;
        let size = line.split(';').next().unwrap_or_default().trim();
        let size = u64::from_str_radix(size, 16).map_err(io::Error::other)?;
        if size == 0 {
            // Trailers, up to an empty line.
            while !pass_line(from, to)?.trim().is_empty() {}
            return Ok(kept);
        }
        kept.extend(read_length(size, from, to)?);
        kept.truncate(KEPT);
        pass_line(from, to)?;
    }
}

fn pass_line(from: &mut impl BufRead, to: &mut impl Write) -> io::Result<String> {
    let mut line = String::new();
    if from.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    to.write_all(line.as_bytes())?;
    Ok(line)
}

fn read_length(length: u64, from: &mut impl BufRead, to: &mut impl Write) -> io::Result<Vec<u8>> {
    let mut kept = Vec::new();
    let mut body = from.take(length);
    loop {
        let available = body.fill_buf()?;
        if available.is_empty() {
            return Ok(kept);
        }
        to.write_all(available)?;
        let wanted = KEPT.saturating_sub(kept.len()).min(available.len());
        kept.extend_from_slice(&available[..wanted]);
        let passed = available.len();
        body.consume(passed);
    }
}
