//! One request and its response: signed, sent, read unless it is streamed, and checked.

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use bytes::BytesMut;
use futures::StreamExt;
use http::header;
use http::uri::InvalidUri;
use http::{HeaderMap, Method, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::client::legacy::connect::capture_connection;
use rusoto_core::request::HttpResponse;
use tokio::time::Instant;

use super::call::{Call, Expect, Failure};
use super::dispatch::Ready;
use super::failure::Causes;
use super::outgoing::{Fate, Outgoing, Watch};
use super::page;
use super::remote::{LARGEST_LISTING, LARGEST_RESPONSE, Remote};
use super::response::{self, Content, Wanted};
use super::sign::{self, Payload};
use super::timing::Timing;
use super::wire;
use crate::redact::Secrets;
use crate::store::{ByteStream, Kind};

/// A download that brings less than this in [`Timing::patience`] of waiting is given up.
const SLOWEST: u64 = 64 << 10;

/// Signs and sends once, and reads the response unless it is streamed.
pub(super) async fn attempt(
    remote: &Remote,
    call: &Call,
    ready: &Ready,
    credentials: &Credentials,
) -> Result<HttpResponse, Failure> {
    let (body, watch) = match &call.body {
        Some(body) => Outgoing::stream(&**body),
        None => Outgoing::memory(ready.payload.clone()),
    };
    let wire = remote.wire().await.map_err(other)?;
    let mut request = http::Request::new(body);
    *request.method_mut() = ready.method.clone();
    *request.uri_mut() = ready.uri.parse().map_err(|e: InvalidUri| other(e.into()))?;
    *request.headers_mut() = signed_headers(remote, call, ready, credentials)?;
    if let Some(authorization) = &wire.proxy_authorization {
        let authorization = authorization.clone();
        request
            .headers_mut()
            .insert(header::PROXY_AUTHORIZATION, authorization);
    }

    let (idle, complete) = patience(remote, call);
    let capture = capture_connection(&mut request);
    remote.requests.fetch_add(1, Ordering::Relaxed);
    let answered = tokio::select! {
        biased;
        answered = wire.client.request(request) => answered,
        limit = wire::silent(capture, idle, complete) => {
            return Err(Failure::silence(remote, limit));
        }
    };
    let response = match answered {
        Ok(response) => response,
        Err(e) => return Err(Failure::broken(remote, &e, watch.fate())),
    };

    let (head, body) = response.into_parts();
    remote.note_headers(&head.headers);
    let described = call.expect == Expect::Object || ready.method == Method::HEAD;
    if described && head.status.is_success() && response::is_page(&head.headers) {
        return Err(page_in_place_of_an_object(remote));
    }
    if call.expect == Expect::Object && matches!(head.status.as_u16(), 200 | 206) {
        if !describes_object(&head.headers) {
            return Err(Failure::unexpected(remote, UNDESCRIBED));
        }
        check_range(remote, call, &head.headers)?;
        let timing = remote.timing;
        let body = rusoto_core::ByteStream::new(incoming(body, timing, remote.secrets.clone()));
        return hand_over(remote, head.status, &head.headers, body);
    }
    receive(remote, call, &head, body, &watch).await
}

fn other(error: anyhow::Error) -> Failure {
    Failure::general(Kind::Other, &error)
}

/// How long a response may be silent, and how long its headers may take altogether.
fn patience(remote: &Remote, call: &Call) -> (Duration, Duration) {
    let timing = &remote.timing;
    match call.slow {
        true => (timing.idle_at_work, timing.idle_at_work),
        false => (timing.idle, timing.headers),
    }
}

/// The request's headers, with those of a signature.
fn signed_headers(
    remote: &Remote,
    call: &Call,
    ready: &Ready,
    credentials: &Credentials,
) -> Result<HeaderMap, Failure> {
    let payload = match &call.body {
        Some(body) if !body.is_empty() => match body.sha256() {
            Some(digest) => Payload::Sha256(digest.hex()),
            None => Payload::Unsigned,
        },
        _ => Payload::Bytes(&ready.payload),
    };
    let mut headers = ready.headers.clone();
    let signature = sign::sign(
        credentials,
        &remote.region,
        SystemTime::now(),
        ready.method.as_str(),
        &ready.uri,
        &mut headers,
        payload,
    );
    remote.secrets.add_signature(&signature.map_err(other)?);
    Ok(headers)
}

fn page_in_place_of_an_object(remote: &Remote) -> Failure {
    Failure {
        advice: (!remote.is_genuine()).then(|| response::MINIO.to_owned()),
        ..Failure::unexpected(remote, "a web page, which is not what S3 answers")
    }
}

/// Reads a response whole, and checks it. `sent` knows what became of the request's body.
async fn receive(
    remote: &Remote,
    call: &Call,
    head: &http::response::Parts,
    body: Incoming,
    sent: &Watch,
) -> Result<HttpResponse, Failure> {
    let most = match call.expect {
        Expect::Listing(_) if head.status.is_success() => LARGEST_LISTING,
        _ => LARGEST_RESPONSE,
    };
    call.hold(remote.room(most).await);
    let (idle, _) = patience(remote, call);
    let mut read = BytesMut::new();
    let reading = buffer(body, idle, most, &mut read);
    let whole = match tokio::time::timeout(remote.timing.answer, reading).await {
        Ok(whole) => whole,
        Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut)),
    };
    if !head.status.is_success() {
        // If the body was lost, the status is enough.
        let refusal = response::refusal(head.status, &head.headers, &read, &remote.secrets);
        return Err(Failure::refused(remote, call, refusal));
    }
    match whole {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::TimedOut => {
            return Err(Failure::silence(remote, idle));
        }
        Err(e) => {
            let peer = remote.endpoint.name();
            let why = remote.secrets.outside(&e.to_string());
            let cause = format!("the answer of {peer} broke off ({why})");
            return Err(Failure::passing(Kind::Unavailable, cause));
        }
    }
    let unexpected = |what: &str| Failure {
        status: Some(head.status.as_u16()),
        ..Failure::unexpected(remote, what)
    };
    match sent.fate() {
        Fate::Sent => {}
        Fate::Underway => return Err(unexpected("success before it had the whole body")),
        Fate::Local(e) => return Err(Failure::local(&e)),
    }
    let checked = check_success(remote, call, head.status, &head.headers, &read);
    let start = checked.map_err(|problem| match problem {
        Problem::Refused(refusal) => Failure::refused(remote, call, *refusal),
        Problem::Unexpected(what) => unexpected(&what),
    })?;
    let mut body = read.freeze().slice(start..);
    if let Some(kept) = &call.kept {
        *kept.lock() = std::mem::take(&mut body);
    }
    let body = rusoto_core::ByteStream::new(futures::stream::iter(
        Some(body).filter(|body| !body.is_empty()).map(Ok),
    ));
    hand_over(remote, head.status, &head.headers, body)
}

/// What is wrong with a 2xx response.
enum Problem {
    Refused(Box<response::Refusal>),
    Unexpected(String),
}

/// Checks a 2xx response. Returns where in the body rusoto is to start parsing.
fn check_success(
    remote: &Remote,
    call: &Call,
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<usize, Problem> {
    let (status, secrets) = (status.as_u16(), &remote.secrets);
    let examine = |wanted| response::examine(body, wanted, status, secrets);
    let wanted = match call.expect {
        Expect::Listing(root) | Expect::Xml(root) => Some(Wanted::Root(root)),
        Expect::XmlWith(element) => Some(Wanted::Element(element)),
        _ => None,
    };
    if let Some(wanted) = wanted {
        if let Some(page) = &call.page
            && let Some(read) = page::read(body)
        {
            *page.lock() = read;
            remote.note_genuine();
            return Ok(body.len());
        }
        return match examine(wanted) {
            Content::Good { .. } if call.page.is_some() => {
                Err(Problem::Unexpected("malformed XML".into()))
            }
            Content::Good { start } => {
                remote.note_genuine();
                Ok(start)
            }
            Content::Error(refusal) => Err(Problem::Refused(Box::new(refusal))),
            Content::Nonsense(what) => Err(Problem::Unexpected(what)),
        };
    }
    if let Some(refusal) = response::error_in(body, status, &remote.secrets) {
        return Err(Problem::Refused(Box::new(refusal)));
    }
    let has = |name| headers.contains_key(name);
    match call.expect {
        Expect::ETag if !has(header::ETAG) => {
            Err(Problem::Unexpected("success without an ETag".into()))
        }
        Expect::Stored if !has(header::ETAG) && !body.trim_ascii().is_empty() => {
            let words = response::first_words(body, &remote.secrets).unwrap_or_default();
            Err(Problem::Unexpected(format!(
                "success, but not like S3 ({words})"
            )))
        }
        Expect::Description if !describes_object(headers) => {
            Err(Problem::Unexpected(UNDESCRIBED.into()))
        }
        _ => Ok(0),
    }
}

const UNDESCRIBED: &str = "an object without ETag and Last-Modified";

/// Whether these are an object's headers: every store gives one of the two, a proxy's page neither.
fn describes_object(headers: &HeaderMap) -> bool {
    headers.contains_key(header::ETAG) || headers.contains_key(header::LAST_MODIFIED)
}

/// Checks that the response brings the range that was asked for.
fn check_range(remote: &Remote, call: &Call, headers: &HeaderMap) -> Result<(), Failure> {
    let announced = response::content_length(headers);
    let given = headers.get(header::CONTENT_RANGE);
    let unexpected = |what: &str| Err(Failure::unexpected(remote, what));
    let given = match given {
        None => None,
        Some(given) => match given.to_str().ok().and_then(response::content_range) {
            Some(given) => Some(given),
            None => {
                let text = String::from_utf8_lossy(given.as_bytes());
                let text = remote.secrets.outside(&text);
                return unexpected(&format!("Content-Range {text:?}"));
            }
        },
    };
    match (&call.range, given) {
        (None, None) => Ok(()),
        (None, Some(_)) => unexpected("part of an object that was asked for whole"),
        (Some(range), Some((first, last, size))) => {
            if first != range.start || last != range.end.min(size) - 1 {
                return unexpected("another range than was asked for");
            }
            if announced.is_some_and(|announced| announced != last - first + 1) {
                return unexpected("a length that is not the range's");
            }
            Ok(())
        }
        // The whole object satisfies a range that covers it.
        (Some(range), None)
            if range.start == 0 && announced.is_some_and(|size| range.end >= size) =>
        {
            Ok(())
        }
        (Some(_), None) => {
            let cause = format!("{} ignores Range", remote.endpoint.name());
            Err(Failure::new(Kind::NoRanges, cause))
        }
    }
}

/// Converts the response to rusoto's type.
fn hand_over(
    remote: &Remote,
    status: StatusCode,
    headers: &HeaderMap,
    body: rusoto_core::ByteStream,
) -> Result<HttpResponse, Failure> {
    // rusoto uses an older http crate.
    let kept: std::collections::HashMap<String, String> =
        response::kept_headers(headers).into_iter().collect();
    let wrong = || Failure::unexpected(remote, "malformed headers");
    Ok(HttpResponse {
        status: status.as_u16().try_into().map_err(|_| wrong())?,
        headers: (&kept).try_into().map_err(|_| wrong())?,
        body,
    })
}

/// Reads a body of at most `most` bytes into `whole`, unless it stops for `idle`.
async fn buffer(
    mut body: Incoming,
    idle: Duration,
    most: usize,
    whole: &mut BytesMut,
) -> io::Result<()> {
    loop {
        let frame = tokio::time::timeout(idle, body.frame())
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
        let Some(frame) = frame else {
            return Ok(());
        };
        let frame = frame.map_err(|e| io::Error::other(Causes::of(&e).text))?;
        if let Ok(data) = frame.into_data() {
            let room = most - whole.len();
            whole.extend_from_slice(&data[..data.len().min(room)]);
            if data.len() > room {
                let most = match most >> 20 {
                    0 => format!("{} KiB", most >> 10),
                    mib => format!("{mib} MiB"),
                };
                let why = format!("longer than {most}");
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
        }
    }
}

/// A download's chunks. Ends with an error if none come for too long, or too few.
fn incoming(body: Incoming, timing: Timing, secrets: Secrets) -> ByteStream {
    struct Download {
        body: Incoming,
        /// Time spent waiting for the network since the last check; a slow reader does not count.
        waited: Duration,
        /// Bytes received since the last check.
        got: u64,
    }
    let download = Download {
        body,
        waited: Duration::ZERO,
        got: 0,
    };
    futures::stream::unfold(Some((download, secrets)), move |download| async move {
        let (mut download, secrets) = download?;
        loop {
            let before = Instant::now();
            let frame = tokio::time::timeout(timing.idle, download.body.frame()).await;
            download.waited += before.elapsed();
            let quiet = |what: String| {
                let e = io::Error::new(io::ErrorKind::TimedOut, what);
                Some((Err(e), None))
            };
            let Ok(frame) = frame else {
                return quiet(format!("no byte came for {} s", timing.idle.as_secs()));
            };
            let data = match frame? {
                Ok(frame) => match frame.into_data() {
                    Ok(data) if !data.is_empty() => data,
                    _ => continue,
                },
                Err(e) => {
                    let reasons = secrets.outside(&Causes::of(&e).text);
                    let kind = if e.is_incomplete_message() {
                        io::ErrorKind::UnexpectedEof
                    } else {
                        io::ErrorKind::ConnectionReset
                    };
                    return Some((Err(io::Error::new(kind, reasons)), None));
                }
            };
            download.got += data.len() as u64;
            if download.waited >= timing.patience {
                if download.got < SLOWEST {
                    return quiet(format!(
                        "only {} bytes came in {} s",
                        download.got,
                        download.waited.as_secs()
                    ));
                }
                download.waited = Duration::ZERO;
                download.got = 0;
            }
            return Some((Ok(data), Some((download, secrets))));
        }
    })
    .boxed()
}
