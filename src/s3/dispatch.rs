//! Between rusoto's typed requests and the network: everything that rusoto does not do or does
//! badly. A request is addressed, signed, sent with timeouts and tried again; its answer is read,
//! looked through, and handed to rusoto only if it is the success that was asked for. What else may
//! come is kept beside the call as the [`StoreError`] that its caller gets.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Method, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::client::legacy::connect::capture_connection;
use rusoto_core::request::{
    DispatchSignedRequest, DispatchSignedRequestFuture, HttpDispatchError, HttpResponse,
};
use rusoto_core::signature::{SignedRequest, SignedRequestPayload};
use rustls::CertificateError;
use tokio::sync::OnceCell;
use tokio::time::Instant;

use super::answer::{self, Content, Refusal};
use super::credentials::Keyring;
use super::endpoint::{Endpoint, encode_query};
use super::outgoing::{Fate, Outgoing};
use super::sign::{self, Payload};
use super::timing::Timing;
use super::tls::Trust;
use super::wire::{self, ProxyError, Unresolved, Wire};
use crate::progress::Progress;
use crate::quote::printable;
use crate::retry::{RetryPolicy, Trouble};
use crate::store::{ByteStream, Kind, StoreError, UploadBody};

/// An answer in memory is no longer than this. A page of a listing is some 300 KiB.
const LARGEST_ANSWER: usize = 16 << 20;
/// A download that brings less than this in [`Timing::patience`] of waiting is given up.
const SLOWEST: u64 = 64 << 10;

/// What all requests to one bucket share.
pub(super) struct Connection {
    pub(super) endpoint: Endpoint,
    pub(super) bucket: String,
    pub(super) region: String,
    pub(super) keyring: Keyring,
    pub(super) retry: RetryPolicy,
    pub(super) timing: Timing,
    /// Keys at which a multipart upload may have begun that we got no answer about.
    pub(super) unanswered: Mutex<BTreeSet<String>>,
    pub(super) requests: AtomicU64,
    /// Off for Google Cloud Storage's sake.
    pub(super) accept_encoding: bool,
    pub(super) trust: Trust,
    pub(super) wire: OnceCell<Wire>,
    pub(super) progress: Progress,
    pub(super) warned: AtomicBool,
}

impl Connection {
    pub(super) fn is_unanswered(&self, key: &str) -> bool {
        lock(&self.unanswered).contains(key)
    }
}

/// What the success of a request looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expect {
    /// An object's bytes, streamed.
    Object,
    /// Headers that describe an object.
    Description,
    /// An ETag, and no body.
    ETag,
    /// A status.
    Nothing,
    /// XML under this element.
    Xml(&'static str),
}

/// One operation, beside rusoto's request for it.
pub(super) struct Call {
    /// What is being done, as in "cannot {doing} KEY".
    pub(super) doing: &'static str,
    /// `None`: the bucket's own.
    pub(super) key: Option<String>,
    pub(super) body: Option<Arc<dyn UploadBody>>,
    pub(super) expect: Expect,
    /// The store may work for some time before it answers.
    pub(super) slow: bool,
    /// Done, it leaves behind what only its answer names.
    pub(super) begins_upload: bool,
    failure: Mutex<Option<StoreError>>,
}

impl Call {
    pub(super) fn new(doing: &'static str, key: Option<&str>, expect: Expect) -> Self {
        Call {
            doing,
            key: key.map(str::to_owned),
            body: None,
            expect,
            slow: false,
            begins_upload: false,
            failure: Mutex::new(None),
        }
    }

    pub(super) fn with_body(mut self, body: Arc<dyn UploadBody>) -> Self {
        self.body = Some(body);
        self
    }

    pub(super) fn slow(mut self) -> Self {
        self.slow = true;
        self
    }

    pub(super) fn begins_upload(mut self) -> Self {
        self.begins_upload = true;
        self
    }

    /// An error of this call.
    pub(super) fn error(&self, kind: Kind, connection: &Connection, why: &str) -> StoreError {
        let subject = match &self.key {
            Some(key) => format!("s3://{}/{key}", connection.bucket),
            None => format!("s3://{}", connection.bucket),
        };
        StoreError {
            kind,
            status: None,
            code: None,
            message: format!("cannot {} {}: {why}", self.doing, printable(&subject)),
            source: None,
        }
    }

    /// Why the dispatcher failed, if it did.
    pub(super) fn failure(&self) -> Option<StoreError> {
        lock(&self.failure).take()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends the requests of one call.
pub(super) struct Dispatcher {
    pub(super) connection: Arc<Connection>,
    pub(super) call: Arc<Call>,
}

impl DispatchSignedRequest for Dispatcher {
    fn dispatch(
        &self,
        request: SignedRequest,
        _timeout: Option<Duration>,
    ) -> DispatchSignedRequestFuture {
        let connection = self.connection.clone();
        let call = self.call.clone();
        let ready = Ready::new(&connection, &call, request);
        Box::pin(async move {
            let sent = match ready {
                Ok(ready) => send(&connection, &call, &ready).await,
                Err(e) => Err(e),
            };
            sent.map_err(|e| {
                *lock(&call.failure) = Some(e);
                HttpDispatchError::new("failed; the reason is beside the call".into())
            })
        })
    }
}

/// A request that needs but a signature.
struct Ready {
    method: Method,
    uri: String,
    headers: HeaderMap,
    payload: Bytes,
}

impl Ready {
    fn new(
        connection: &Connection,
        call: &Call,
        request: SignedRequest,
    ) -> Result<Self, StoreError> {
        let unsendable = |what: &str| {
            call.error(
                Kind::Other,
                connection,
                &format!("the request cannot be sent: {what}"),
            )
        };
        let method = Method::from_bytes(request.method.as_bytes())
            .map_err(|_| unsendable("its method is malformed"))?;
        let query: Vec<String> = request
            .params
            .iter()
            .map(|(name, value)| {
                let value = value.as_deref().unwrap_or_default();
                format!("{}={}", encode_query(name), encode_query(value))
            })
            .collect();
        let uri = connection
            .endpoint
            .uri(call.key.as_deref(), &query.join("&"));
        let has_body = !matches!(method, Method::GET | Method::HEAD | Method::DELETE);

        let mut headers = HeaderMap::new();
        for (name, values) in &request.headers {
            // rusoto's idea of these is its own client's, or for a request with a body.
            if matches!(name.as_str(), "host" | "content-length")
                || (name == "content-type" && !has_body)
            {
                continue;
            }
            let header = HeaderName::from_bytes(name.as_bytes());
            for value in values {
                let (Ok(header), Ok(value)) = (&header, HeaderValue::from_bytes(value)) else {
                    return Err(unsendable(&format!("header {name} is malformed")));
                };
                headers.append(header.clone(), value);
            }
        }
        let mut set = |name: HeaderName, value: &str| match HeaderValue::from_str(value) {
            Ok(value) => {
                headers.insert(name, value);
                Ok(())
            }
            Err(_) => Err(unsendable(&format!("{name} is malformed"))),
        };
        set(header::HOST, connection.endpoint.authority())?;
        set(
            header::USER_AGENT,
            concat!("layercache/", env!("CARGO_PKG_VERSION")),
        )?;
        if connection.accept_encoding {
            // Or a gateway might compress what is to be stored as it is.
            set(header::ACCEPT_ENCODING, "identity")?;
        }
        let payload = match request.payload {
            Some(SignedRequestPayload::Buffer(bytes)) => bytes,
            _ => Bytes::new(),
        };
        if has_body {
            let length = match &call.body {
                Some(body) => body.len(),
                None => payload.len() as u64,
            };
            set(header::CONTENT_LENGTH, &length.to_string())?;
        }
        Ok(Ready {
            method,
            uri,
            headers,
            payload,
        })
    }
}

/// A try that failed.
struct Failure {
    error: StoreError,
    /// It may pass.
    again: Option<Trouble>,
    /// Other credentials may help.
    renew: bool,
}

impl Failure {
    fn last(error: StoreError) -> Self {
        Failure {
            error,
            again: None,
            renew: false,
        }
    }

    fn passing(error: StoreError, timed_out: bool) -> Self {
        Failure {
            error,
            again: Some(Trouble {
                timed_out,
                ..Trouble::default()
            }),
            renew: false,
        }
    }
}

/// Tries until it works, or is not worth another try.
async fn send(
    connection: &Connection,
    call: &Call,
    ready: &Ready,
) -> Result<HttpResponse, StoreError> {
    let denied = |e: anyhow::Error| call.error(Kind::Denied, connection, &format!("{e:#}"));
    let mut tries = connection.retry.tries();
    let mut renewed = false;
    loop {
        tries.permit().await;
        let credentials = connection.keyring.get().await.map_err(denied)?;
        warn_of_open_token(connection, &credentials);
        connection.requests.fetch_add(1, Ordering::Relaxed);
        let mut failure = match attempt(connection, call, ready, &credentials).await {
            Ok(response) => {
                tries.progressed();
                return Ok(response);
            }
            Err(failure) => failure,
        };
        // 4xx is a refusal; after anything else it may have been done all the same.
        let refused = matches!(failure.error.status, Some(400..=499));
        if call.begins_upload
            && !refused
            && let Some(key) = &call.key
        {
            lock(&connection.unanswered).insert(key.clone());
        }
        failure.error.message = Keyring::redact(&credentials, &failure.error.message);
        if failure.renew && !renewed {
            renewed = true;
            connection.progress.debug(&format!(
                "{}; looking for new credentials",
                failure.error.message
            ));
            if connection
                .keyring
                .renew(&credentials)
                .await
                .map_err(denied)?
            {
                continue;
            }
        }
        let made = tries.made();
        if let Some(trouble) = failure.again {
            connection
                .progress
                .debug(&format!("{} (try {made})", failure.error.message));
            if tries.again(trouble, &failure.error.message).await {
                continue;
            }
        }
        if let Some(tries) = tries.summary() {
            failure.error.message.push_str(&format!(" ({tries})"));
        }
        return Err(failure.error);
    }
}

/// A session token that anyone on the way can read is worth a warning, once.
fn warn_of_open_token(connection: &Connection, credentials: &Credentials) {
    if credentials.session_token().is_some()
        && !connection.endpoint.is_https()
        && !connection.endpoint.is_loopback()
        && !connection.warned.swap(true, Ordering::Relaxed)
    {
        connection.progress.warn(&format!(
            "the session token is sent to {} over plain http, where others can read it: use https",
            connection.endpoint.authority()
        ));
    }
}

/// Signs and sends once, and reads the answer as far as it goes into memory.
async fn attempt(
    connection: &Connection,
    call: &Call,
    ready: &Ready,
    credentials: &Credentials,
) -> Result<HttpResponse, Failure> {
    let (body, watch) = match &call.body {
        Some(body) => Outgoing::stream(&**body),
        None => Outgoing::memory(ready.payload.clone()),
    };
    let other =
        |e: anyhow::Error| Failure::last(call.error(Kind::Other, connection, &format!("{e:#}")));
    let wire = connection
        .wire
        .get_or_try_init(|| async {
            Wire::new(&connection.endpoint, &connection.trust, &connection.timing)
        })
        .await
        .map_err(other)?;
    let payload = match &call.body {
        Some(body) if !body.is_empty() => match body.sha256() {
            Some(digest) => Payload::Sha256(digest.hex()),
            None => Payload::Unsigned,
        },
        _ => Payload::Bytes(&ready.payload),
    };
    let mut headers = ready.headers.clone();
    sign::sign(
        credentials,
        &connection.region,
        SystemTime::now(),
        ready.method.as_str(),
        &ready.uri,
        &mut headers,
        payload,
    )
    .map_err(other)?;
    if let Some(authorization) = &wire.proxy_authorization {
        headers.insert(header::PROXY_AUTHORIZATION, authorization.clone());
    }
    let mut request = http::Request::new(body);
    *request.method_mut() = ready.method.clone();
    *request.uri_mut() = ready
        .uri
        .parse()
        .map_err(|e: http::uri::InvalidUri| other(e.into()))?;
    *request.headers_mut() = headers;

    let limit = if call.slow {
        connection.timing.idle_at_work
    } else {
        connection.timing.idle
    };
    let capture = capture_connection(&mut request);
    let answered = tokio::select! {
        biased;
        answered = wire.client.request(request) => answered,
        () = wire::idle(capture, limit) => {
            return Err(too_quiet(connection, call, limit));
        }
    };
    let response = match answered {
        Ok(response) => response,
        Err(e) => return Err(broken(connection, call, &e, watch.fate())),
    };

    let (head, body) = response.into_parts();
    if call.expect == Expect::Object && matches!(head.status.as_u16(), 200 | 206) {
        let body = rusoto_core::ByteStream::new(incoming(body, connection.timing));
        return hand_over(connection, call, head.status, &head.headers, body);
    }
    let read = match tokio::time::timeout(connection.timing.answer, buffer(body, limit)).await {
        Ok(read) => read,
        Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut)),
    };
    if !head.status.is_success() {
        // The status alone says enough, should the rest be lost.
        let body = read.unwrap_or_default();
        let refusal = answer::refusal(head.status, &head.headers, &body);
        return Err(refused(connection, call, &refusal));
    }
    let body = match read {
        Ok(body) => body,
        Err(e) if e.kind() == io::ErrorKind::TimedOut => {
            return Err(too_quiet(connection, call, limit));
        }
        Err(e) => {
            let error = call.error(
                Kind::Unavailable,
                connection,
                &format!("the answer broke off: {e}"),
            );
            return Err(Failure::passing(error, false));
        }
    };
    let nonsense = |what: &str| {
        let error = call.error(
            Kind::Nonsense,
            connection,
            &format!("the store's answer makes no sense: {what}"),
        );
        Failure::passing(
            StoreError {
                status: Some(head.status.as_u16()),
                ..error
            },
            false,
        )
    };
    match watch.fate() {
        Fate::Sent => {}
        Fate::Underway => return Err(nonsense("success before it had the whole body")),
        Fate::Local(e) => return Err(local(connection, call, e)),
    }
    let mut start = 0;
    match call.expect {
        Expect::Xml(root) => match answer::examine(&body, root, head.status.as_u16()) {
            Content::Good { start: from } => start = from,
            Content::Error(refusal) => {
                return Err(refused(connection, call, &refusal));
            }
            Content::Nonsense(what) => return Err(nonsense(&what)),
        },
        _ => {
            if let Some(refusal) = answer::error_in(&body, head.status.as_u16()) {
                return Err(refused(connection, call, &refusal));
            }
            let has = |name| head.headers.contains_key(name);
            if call.expect == Expect::ETag && !has(header::ETAG) {
                return Err(nonsense("success without an ETag"));
            }
            if call.expect == Expect::Description
                && !(has(header::ETAG) || has(header::LAST_MODIFIED))
            {
                return Err(nonsense("an object without ETag and Last-Modified"));
            }
        }
    }
    let body = body.slice(start..);
    let body = rusoto_core::ByteStream::new(futures::stream::iter(
        Some(body).filter(|body| !body.is_empty()).map(Ok),
    ));
    hand_over(connection, call, head.status, &head.headers, body)
}

/// The success, as rusoto wants it.
fn hand_over(
    connection: &Connection,
    call: &Call,
    status: StatusCode,
    headers: &HeaderMap,
    body: rusoto_core::ByteStream,
) -> Result<HttpResponse, Failure> {
    // rusoto has the types of an older http crate: its conversions say which.
    let kept: std::collections::HashMap<String, String> =
        answer::kept_headers(headers).into_iter().collect();
    let wrong = || {
        Failure::last(call.error(
            Kind::Nonsense,
            connection,
            "the store's answer makes no sense: malformed headers",
        ))
    };
    Ok(HttpResponse {
        status: status.as_u16().try_into().map_err(|_| wrong())?,
        headers: (&kept).try_into().map_err(|_| wrong())?,
        body,
    })
}

fn refused(connection: &Connection, call: &Call, refusal: &Refusal) -> Failure {
    let reads = matches!(call.expect, Expect::Object | Expect::Description);
    let verdict = refusal.verdict();
    let mut why = refusal.explain(&connection.region, &connection.bucket, reads);
    // An answer to HEAD has no body to say that the token has expired: S3 gives a bare 400.
    let mute = call.expect == Expect::Description
        && refusal.status == 400
        && refusal.code.is_none()
        && refusal.region.is_none();
    if mute {
        why.push_str(
            " and, as this was a HEAD, no reason: the session token may have expired, or region or \
             endpoint_url be wrong",
        );
    }
    Failure {
        error: StoreError {
            status: Some(refusal.status),
            code: refusal.code.clone(),
            ..call.error(verdict.kind, connection, &why)
        },
        again: verdict.again,
        renew: verdict.renew || mute,
    }
}

fn too_quiet(connection: &Connection, call: &Call, limit: Duration) -> Failure {
    let why = format!(
        "nothing came from or went to {} for {} s",
        connection.endpoint.authority(),
        limit.as_secs()
    );
    Failure::passing(call.error(Kind::Unavailable, connection, &why), true)
}

fn local(connection: &Connection, call: &Call, e: io::Error) -> Failure {
    Failure::last(StoreError {
        source: Some(Box::new(e)),
        ..call.error(Kind::LocalBody, connection, "reading it failed")
    })
}

/// The request did not get an answer.
fn broken(
    connection: &Connection,
    call: &Call,
    e: &hyper_util::client::legacy::Error,
    fate: Fate,
) -> Failure {
    if let Fate::Local(e) = fate {
        return local(connection, call, e);
    }
    let peer = connection.endpoint.authority();
    let causes = Causes::of(e);
    let reasons = &causes.text;
    let mut why = if causes.certificate {
        let peer = match &causes.proxy {
            Some(proxy) => format!("the proxy {proxy}"),
            None => peer.to_owned(),
        };
        format!(
            "no trust in the certificate of {peer} ({reasons}); if it is signed by a CA of your own, \
             set AWS_CA_BUNDLE to its PEM file"
        )
    } else if e.is_connect() {
        format!("cannot connect to {peer} ({reasons})")
    } else {
        format!("the connection to {peer} broke ({reasons})")
    };
    // A name that only AWS would know, or vouch for. A proxy's own name is another matter.
    if connection.endpoint.is_prefixed() && causes.proxy.is_none() && causes.wrong_name {
        why.push_str("; the bucket is part of that name: try use_path_style=true");
    }
    let error = call.error(Kind::Unavailable, connection, &why);
    if causes.certificate {
        Failure::last(StoreError {
            kind: Kind::Other,
            ..error
        })
    } else {
        Failure::passing(error, causes.timed_out)
    }
}

/// What the chain of an error's causes says.
#[derive(Default)]
struct Causes {
    /// All of it in one line.
    text: String,
    /// A certificate is not trusted.
    certificate: bool,
    /// DNS does not know the name, or the certificate is for another.
    wrong_name: bool,
    timed_out: bool,
    /// The proxy that it went wrong at.
    proxy: Option<String>,
}

impl Causes {
    fn of(e: &(dyn std::error::Error + 'static)) -> Self {
        let mut causes = Causes::default();
        let mut reasons: Vec<String> = Vec::new();
        let mut next = Some(e);
        while let Some(e) = next {
            let mut cause = e.source();
            if let Some(io) = e.downcast_ref::<io::Error>() {
                causes.timed_out |= io.kind() == io::ErrorKind::TimedOut;
                // An io::Error shows what it wraps, but does not give it as its source.
                if let Some(inner) = io.get_ref() {
                    cause = Some(inner as &(dyn std::error::Error + 'static));
                }
            }
            if let Some(e) = e.downcast_ref::<rustls::Error>() {
                causes.certificate |= matches!(
                    e,
                    rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented
                );
            }
            causes.wrong_name |= e.is::<Unresolved>()
                || matches!(
                    e.downcast_ref::<rustls::Error>(),
                    Some(rustls::Error::InvalidCertificate(
                        CertificateError::NotValidForName
                            | CertificateError::NotValidForNameContext { .. }
                    ))
                );
            if let Some(e) = e.downcast_ref::<ProxyError>() {
                causes.proxy = Some(e.proxy.clone());
            }
            let reason = e.to_string();
            // hyper's own layers say nothing that a reader could use.
            let empty = reason.starts_with("client error");
            if !empty && !reasons.iter().any(|earlier| earlier.contains(&reason)) {
                reasons.push(reason);
            }
            next = cause;
        }
        causes.text = reasons.join(": ");
        causes
    }
}

/// The whole body, if it is not too long and does not stop for `limit`.
async fn buffer(mut body: Incoming, limit: Duration) -> io::Result<Bytes> {
    let mut whole = BytesMut::new();
    loop {
        let frame = tokio::time::timeout(limit, body.frame())
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
        let Some(frame) = frame else {
            return Ok(whole.freeze());
        };
        let frame = frame.map_err(|e| io::Error::other(Causes::of(&e).text))?;
        if let Ok(data) = frame.into_data() {
            if whole.len().saturating_add(data.len()) > LARGEST_ANSWER {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("longer than {} MiB", LARGEST_ANSWER >> 20),
                ));
            }
            whole.extend_from_slice(&data);
        }
    }
}

/// A download's chunks as hyper reads them, or the error that ends them: also when none come, or
/// hardly any.
fn incoming(body: Incoming, timing: Timing) -> ByteStream {
    struct Download {
        body: Incoming,
        /// Spent waiting in the present stretch. A reader that takes its time is not counted.
        waited: Duration,
        /// Got in the present stretch.
        got: u64,
    }
    let download = Download {
        body,
        waited: Duration::ZERO,
        got: 0,
    };
    futures::stream::unfold(Some(download), move |download| async move {
        let mut download = download?;
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
                    let reasons = Causes::of(&e).text;
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
            return Some((Ok(data), Some(download)));
        }
    })
    .boxed()
}
