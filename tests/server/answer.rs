//! Takes requests from a connection and answers them: as S3 would, or with the fault that a test chose.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::{pending, poll_fn};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper_util::rt::TokioIo;
use s3s::Body;
use s3s::service::S3Service;
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

use super::access::Hosts;
use super::connection::Connection;
use super::fault::{Ending, Fault, Then, error_xml, operation, raw_answer};
use super::log::{InFlight, Log, Logged};
use super::store::Store;
use super::{Asked, lock};

type Rule = Arc<dyn Fn(&Asked) -> Option<Fault> + Send + Sync>;
type Watcher = Arc<dyn Fn(&Logged, &Store) + Send + Sync>;

#[derive(Default)]
struct Faults {
    rule: Option<Rule>,
    asked: BTreeMap<&'static str, usize>,
}

#[derive(Clone, Copy, PartialEq)]
pub enum When {
    Before,
    After,
}

struct Hook {
    when: When,
    /// How many matching requests pass before the one that runs it.
    skip: usize,
    matches: Box<dyn Fn(&Logged) -> bool + Send>,
    act: Box<dyn FnOnce(&Store) + Send>,
}

/// What all connections share.
pub struct Shared {
    pub store: Store,
    pub service: S3Service,
    pub port: u16,
    /// What the clock is ahead by, which the Date headers show.
    pub clock_ahead: Duration,
    /// Waited before each request is performed.
    pub delay: Duration,
    /// Bytes a second that a connection carries in each direction; 0 is no limit.
    pub rate: u64,
    pub tls: Option<TlsAcceptor>,
    pub log: Arc<Log>,
    faults: Mutex<Faults>,
    hooks: Mutex<Vec<Hook>>,
    watcher: Mutex<Option<Watcher>>,
}

impl Shared {
    pub fn new(store: Store, service: S3Service, port: u16) -> Self {
        Self {
            store,
            service,
            port,
            clock_ahead: Duration::ZERO,
            delay: Duration::ZERO,
            rate: 0,
            tls: None,
            log: Arc::default(),
            faults: Mutex::default(),
            hooks: Mutex::default(),
            watcher: Mutex::default(),
        }
    }

    pub fn set_rule(&self, rule: Option<Rule>) {
        *lock(&self.faults) = Faults {
            rule,
            asked: BTreeMap::new(),
        };
    }

    pub fn add_hook(
        &self,
        when: When,
        skip: usize,
        matches: impl Fn(&Logged) -> bool + Send + 'static,
        act: impl FnOnce(&Store) + Send + 'static,
    ) {
        lock(&self.hooks).push(Hook {
            when,
            skip,
            matches: Box::new(matches),
            act: Box::new(act),
        });
    }

    pub fn set_watcher(&self, watcher: Watcher) {
        *lock(&self.watcher) = Some(watcher);
    }

    pub fn clear_hooks(&self) {
        lock(&self.hooks).clear();
    }

    fn run_hooks(&self, when: When, logged: &Logged) {
        let mut due = Vec::new();
        lock(&self.hooks).retain_mut(|hook| {
            if hook.when != when || !(hook.matches)(logged) {
                return true;
            }
            if hook.skip > 0 {
                hook.skip -= 1;
                return true;
            }
            due.push(std::mem::replace(&mut hook.act, Box::new(|_| {})));
            false
        });
        for act in due {
            act(&self.store);
        }
    }

    fn choose_fault(&self, logged: &Logged) -> Option<Fault> {
        let (rule, asked) = {
            let mut faults = lock(&self.faults);
            let rule = faults.rule.clone()?;
            let index = faults.asked.values().sum();
            let nth = faults.asked.entry(logged.operation).or_default();
            let asked = Asked {
                index,
                nth: *nth,
                operation: logged.operation,
                bucket: logged.bucket.clone(),
                key: logged.key.clone(),
                query: logged.query.clone(),
                headers: logged.headers.clone(),
            };
            *nth += 1;
            (rule, asked)
        };
        rule(&asked)
    }
}

/// Serves one connection with hyper until it ends or until a fault takes it over.
pub async fn serve(shared: Arc<Shared>, stream: TcpStream) {
    let connection = Connection::accept(stream, shared.tls.as_ref(), shared.rate).await;
    let Ok(connection) = connection else {
        return;
    };
    let (take_over, mut taken) = mpsc::channel::<Ending>(1);
    let service = hyper::service::service_fn(move |request| {
        let (shared, take_over) = (Arc::clone(&shared), take_over.clone());
        Box::pin(async move {
            let logged = describe(&request);
            let in_flight = shared.log.begin(logged.clone());
            match answer(&shared, request, logged, in_flight).await {
                Answer::Proper(response) => Ok::<_, Infallible>(response),
                Answer::Broken(ending, _in_flight) => {
                    let _ = take_over.send(ending).await;
                    pending().await
                }
            }
        })
    });
    let mut connection = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(connection), service);
    let ending = tokio::select! {
        _ = poll_fn(|cx| connection.poll_without_shutdown(cx)) => None,
        Some(ending) = taken.recv() => Some(ending),
    };
    let mut connection = connection.into_parts().io.into_inner();
    match ending {
        Some(ending) => ending.perform(connection).await,
        // Over TLS, a connection that just closes looks cut off.
        None => drop(connection.shutdown().await),
    }
}

enum Answer {
    Proper(Response<Watched>),
    Broken(Ending, InFlight),
}

async fn answer(
    shared: &Shared,
    request: Request<Incoming>,
    logged: Logged,
    mut in_flight: InFlight,
) -> Answer {
    let fault = shared.choose_fault(&logged);
    let head = request.method() == http::Method::HEAD;
    match fault {
        Some(Fault::Hang) => {
            // With the request unread, hyper does not see its sender leave.
            in_flight.hang();
            pending().await
        }
        Some(Fault::ResetBeforeReading) => return Answer::Broken(Ending::Reset, in_flight),
        Some(Fault::EarlyAnswer(status)) => {
            in_flight.note(|logged| logged.status = status);
            let status = status_code(status);
            let body = error_xml(code_for(status));
            let bytes = raw_answer(status, &HeaderMap::new(), Some(body.len() as u64), &body);
            let then = Then::CloseUnread;
            return Answer::Broken(Ending::Write { bytes, then }, in_flight);
        }
        _ => {}
    }

    let (parts, incoming) = request.into_parts();
    let most = match fault {
        Some(Fault::ResetWhileReading(bytes)) => bytes,
        _ => u64::MAX,
    };
    let at_hand = shared.blob_at_hand(&logged);
    let (length, body) = match read(incoming, most, at_hand.is_none()).await {
        Ok(read) => read,
        Err(_) => return Answer::Broken(Ending::Reset, in_flight),
    };
    in_flight.note(|logged| logged.body_len = length);
    if most != u64::MAX {
        return Answer::Broken(Ending::Reset, in_flight);
    }
    let body = match at_hand {
        Some(blob) => blob.slice(..decoded_length(&parts.headers, length).min(blob.len())),
        None => body,
    };

    let mut response = match &fault {
        Some(Fault::Status(status, code)) => xml(status_code(*status), error_xml(code)),
        Some(Fault::StatusEmpty(status)) => empty(status_code(*status)),
        Some(Fault::ErrorIn200(code)) => xml(StatusCode::OK, error_xml(code)),
        Some(Fault::Throttle { retry_after }) => {
            let mut response = xml(StatusCode::SERVICE_UNAVAILABLE, error_xml("SlowDown"));
            if let Some(seconds) = retry_after {
                response
                    .headers_mut()
                    .insert(header::RETRY_AFTER, HeaderValue::from(*seconds));
            }
            response
        }
        Some(Fault::Redirect { region }) => {
            let body = error_xml("PermanentRedirect");
            let mut response = xml(StatusCode::MOVED_PERMANENTLY, body);
            response
                .headers_mut()
                .insert("x-amz-bucket-region", HeaderValue::from_static(region));
            response
        }
        Some(Fault::BadXml) => xml(
            StatusCode::OK,
            Bytes::from(format!(
                "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<{}Result><IsTruncated>tr</Is",
                logged.operation
            )),
        ),
        Some(Fault::Html200) => {
            let page = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body><p>Welcome<br></body></html>\n";
            let mut response = xml(StatusCode::OK, Bytes::from_static(page.as_bytes()));
            response
                .headers_mut()
                .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html"));
            response
        }
        Some(Fault::Empty200) => empty(StatusCode::OK),
        Some(Fault::Reset) => return Answer::Broken(Ending::Reset, in_flight),
        Some(Fault::EndlessBody { length }) => {
            in_flight.note(|logged| logged.status = 200);
            let head = raw_answer(StatusCode::OK, &HeaderMap::new(), *length, b"");
            return Answer::Broken(Ending::Endless { head }, in_flight);
        }
        _ => {
            let pause = match &fault {
                Some(Fault::Delay(pause)) => *pause + shared.delay,
                _ => shared.delay,
            };
            // A sleep of nothing still lasts until the next tick of the timer.
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            shared.run_hooks(When::Before, &logged);
            let response = perform(shared, Request::from_parts(parts, body)).await;
            shared.run_hooks(When::After, &logged);
            let watcher = lock(&shared.watcher).clone();
            if let Some(watcher) = watcher {
                watcher(&logged, &shared.store);
            }
            response
        }
    };
    let request_id = format!("TEST{:012}", in_flight.id());
    let request_id = HeaderValue::from_str(&request_id).expect("digits are a header value");
    response
        .headers_mut()
        .insert("x-amz-request-id", request_id);
    let date = httpdate::fmt_http_date(SystemTime::now() + shared.clock_ahead);
    let date = HeaderValue::from_str(&date).expect("a date is a header value");
    response.headers_mut().insert(header::DATE, date);

    let response = match fault {
        Some(Fault::ApplyThenReset) => return Answer::Broken(Ending::Reset, in_flight),
        Some(Fault::ApplyThenStatus(status, code)) => xml(status_code(status), error_xml(code)),
        Some(Fault::NonAsciiHeader) => {
            let value = HeaderValue::from_bytes(b"caf\xe9").expect("obs-text is a header value");
            response.headers_mut().insert("x-amz-meta-note", value);
            response
        }
        Some(Fault::Header(name, value)) => {
            response
                .headers_mut()
                .insert(name, HeaderValue::from_static(value));
            response
        }
        Some(
            fault @ (Fault::ResetMidBody(_)
            | Fault::Truncate(_)
            | Fault::ShortLength
            | Fault::WrongLength
            | Fault::FlipByte(_)
            | Fault::Rewrite(_)
            | Fault::SlowDrip { .. }),
        ) if !head => match spoil(response, &fault).await {
            Ok(response) => response,
            Err(ending) => {
                in_flight.note(|logged| logged.status = 200);
                return Answer::Broken(ending, in_flight);
            }
        },
        _ => response,
    };
    in_flight.note(|logged| logged.status = response.status().as_u16());
    Answer::Proper(response.map(|body| Watched {
        body,
        frame: Bytes::new(),
        in_flight: Some(in_flight),
    }))
}

impl Shared {
    /// The blob that a request sends, if this server need not keep what it is sent of it.
    fn blob_at_hand(&self, logged: &Logged) -> Option<Bytes> {
        let at_hand = self.store.at_hand.as_ref()?;
        match logged.operation {
            "PutObject" | "UploadPart" => at_hand.blob(&logged.key).cloned(),
            _ => None,
        }
    }
}

/// Reads a body to its end, or until it has at least `most` bytes: its length, and the bytes if they
/// are to be kept.
async fn read(mut body: Incoming, most: u64, keep: bool) -> hyper::Result<(u64, Bytes)> {
    let expected = body.size_hint().exact().unwrap_or(0).min(256 << 20);
    let mut kept = BytesMut::with_capacity(if keep { expected as usize } else { 0 });
    let mut length = 0;
    while length < most
        && let Some(frame) = body.frame().await
    {
        if let Ok(data) = frame?.into_data() {
            length += data.len() as u64;
            if keep {
                kept.extend_from_slice(&data);
            }
        }
    }
    Ok((length, kept.freeze()))
}

/// How long a body is without the frames of aws-chunked, if it has any.
fn decoded_length(headers: &HeaderMap, length: u64) -> usize {
    let decoded = headers
        .get("x-amz-decoded-content-length")
        .and_then(|value| value.to_str().ok()?.parse().ok());
    decoded.unwrap_or(length as usize)
}

fn describe(request: &Request<Incoming>) -> Logged {
    let host = request
        .headers()
        .get(header::HOST)
        .and_then(|host| host.to_str().ok())
        .unwrap_or_default();
    let path = percent_encoding::percent_decode_str(request.uri().path()).decode_utf8_lossy();
    let path = path.strip_prefix('/').unwrap_or(&path);
    let (bucket, key) = match Hosts.bucket(host) {
        Some(bucket) => (bucket, path),
        None => path.split_once('/').unwrap_or((path, "")),
    };
    let query = request.uri().query().unwrap_or_default();
    let pairs: Vec<(String, String)> = url::form_urlencoded::parse(query.as_bytes())
        .into_owned()
        .collect();
    Logged {
        method: request.method().to_string(),
        operation: operation(request.method(), !key.is_empty(), &pairs, request.headers()),
        bucket: bucket.to_owned(),
        key: key.to_owned(),
        query: query.to_owned(),
        headers: request.headers().clone(),
        body_len: 0,
        status: 0,
        began: Instant::now(),
        ended: None,
    }
}

/// Lets s3s and the store answer.
async fn perform(shared: &Shared, mut request: Request<Bytes>) -> Response<Body> {
    if shared.store.at_hand.is_some() {
        believe(&mut request);
    }
    let header = |name: &str| {
        let value = request.headers().get(name)?.to_str().ok()?;
        Some(value.to_owned())
    };
    let (sha256, md5) = (header("x-amz-content-sha256"), header("content-md5"));
    let body = request.body().clone();
    if md5.is_some_and(|claimed| claimed != base64_md5(&body)) {
        return xml(StatusCode::BAD_REQUEST, error_xml("BadDigest"));
    }
    let response = match shared.service.call(request.map(Body::from)).await {
        Ok(response) => response,
        Err(error) => {
            let text = Bytes::from(format!("{error:?}"));
            return xml(StatusCode::INTERNAL_SERVER_ERROR, text);
        }
    };
    // s3s ends a body whose hash is wrong with an error like any other, a 500 in the end; S3 says 400.
    if response.status() == StatusCode::INTERNAL_SERVER_ERROR
        && let Some(claimed) = sha256
        && claimed.len() == 64
        && claimed != hex::encode(Sha256::digest(&body))
    {
        let body = error_xml("XAmzContentSHA256Mismatch");
        return xml(StatusCode::BAD_REQUEST, body);
    }
    response
}

fn base64_md5(body: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(md5::Md5::digest(body))
}

/// Makes a request anonymous and without checksums, so that nothing is computed to verify it.
fn believe(request: &mut Request<Bytes>) {
    let length = request.body().len();
    let headers = request.headers_mut();
    let names: Vec<header::HeaderName> = headers
        .keys()
        .filter(|name| {
            let name = name.as_str();
            matches!(
                name,
                "authorization"
                    | "content-encoding"
                    | "content-md5"
                    | "x-amz-content-sha256"
                    | "x-amz-date"
                    | "x-amz-decoded-content-length"
                    | "x-amz-sdk-checksum-algorithm"
                    | "x-amz-security-token"
                    | "x-amz-trailer"
            ) || name.starts_with("x-amz-checksum-")
        })
        .cloned()
        .collect();
    for name in names {
        headers.remove(name);
    }
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
}

/// Performs those faults that need the true answer and change its body or its length.
async fn spoil(response: Response<Body>, fault: &Fault) -> Result<Response<Body>, Ending> {
    let (mut parts, body) = response.into_parts();
    let mut body = match body.collect().await {
        Ok(body) => Vec::from(body.to_bytes()),
        Err(_) => return Err(Ending::Reset),
    };
    let size = body.len();
    let write = |length: usize, body: &[u8], then| {
        let bytes = raw_answer(parts.status, &parts.headers, Some(length as u64), body);
        Err(Ending::Write { bytes, then })
    };
    match *fault {
        Fault::ResetMidBody(n) => write(size, &body[..n.min(size)], Then::Reset),
        Fault::Truncate(n) => write(size, &body[..n.min(size)], Then::Close),
        Fault::ShortLength if size == 0 => write(0, b"x", Then::Close),
        Fault::ShortLength => write(size - 1, &body, Then::Close),
        Fault::WrongLength => write(size + 7, &body, Then::Close),
        Fault::Rewrite(rewrite) => {
            let text = rewrite(&String::from_utf8_lossy(&body));
            parts.headers.remove(header::CONTENT_LENGTH);
            Ok(Response::from_parts(parts, Body::from(text)))
        }
        Fault::SlowDrip { bytes, tick } => {
            parts
                .headers
                .insert(header::CONTENT_LENGTH, HeaderValue::from(size));
            let rest = Bytes::from(body);
            let drips = futures::stream::unfold(rest, move |mut rest| async move {
                if rest.is_empty() {
                    return None;
                }
                tokio::time::sleep(tick).await;
                let drip = rest.split_to(bytes.clamp(1, rest.len()));
                Some((Ok::<_, Infallible>(Frame::data(drip)), rest))
            });
            let body = Body::http_body_unsync(StreamBody::new(drips));
            Ok(Response::from_parts(parts, body))
        }
        Fault::FlipByte(offset) => {
            if let Some(at) = offset.checked_rem(size) {
                body[at] = !body[at];
            }
            Ok(Response::from_parts(parts, Body::from(body)))
        }
        _ => Ok(Response::from_parts(parts, Body::from(body))),
    }
}

/// The body of an answer. Its request is in flight until its last byte is handed to the connection.
struct Watched {
    body: Body,
    /// What is left of the frame that is being handed out.
    frame: Bytes,
    in_flight: Option<InFlight>,
}

/// The largest frame handed to hyper: with larger ones a request would end long before its answer
/// has been sent.
const FRAME: usize = 256 << 10;

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = <Body as HttpBody>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if self.frame.is_empty() {
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.frame = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                other => {
                    self.in_flight = None;
                    return Poll::Ready(other);
                }
            }
        }
        let most = self.frame.len().min(FRAME);
        let data = self.frame.split_to(most);
        if self.is_end_stream() {
            self.in_flight = None;
        }
        Poll::Ready(Some(Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        self.frame.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (rest, mut hint) = (self.frame.len() as u64, self.body.size_hint());
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper + rest);
        }
        hint.set_lower(hint.lower() + rest);
        hint
    }
}

fn status_code(status: u16) -> StatusCode {
    StatusCode::from_u16(status).expect("a fault's status is an HTTP status")
}

fn code_for(status: StatusCode) -> &'static str {
    match status.as_u16() {
        400 => "BadRequest",
        401 | 403 => "AccessDenied",
        404 => "NoSuchBucket",
        429 => "TooManyRequests",
        503 => "SlowDown",
        _ => "InternalError",
    }
}

fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

fn xml(status: StatusCode, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/xml"),
    );
    response
}
