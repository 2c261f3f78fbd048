//! An S3 server inside the test process.
//!
//! `s3s` speaks the protocol and verifies every signature and payload hash; [`store`] answers as
//! strictly as S3; [`fault`] is what a test can make go wrong on the wire. The server has a runtime of
//! its own, so a plain test that runs the real program can use it, and an async one as well.

#![allow(dead_code)] // Several test binaries include this file; none uses all of it.

mod fault;
mod store;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::{pending, poll_fn};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};
use hyper_util::rt::TokioIo;
use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::{S3Auth, SecretKey};
use s3s::host::{S3Host, VirtualHost};
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{Body, S3Error, S3ErrorCode, S3Result, s3_error};
use sha2::{Digest as _, Sha256};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

pub use fault::Fault;
use fault::{Ending, Then, error_xml, operation, raw_answer};
pub use store::Stored;
use store::{Limits, State, Store};

/// May do everything.
pub const ACCESS_KEY: &str = "AKIALAYERCACHETEST01";
/// Distinctive, so that a test can look for it in outputs; with characters that need escaping somewhere.
pub const SECRET_KEY: &str = "leaked+secret/of/the/TestServer+0123456789";
/// May only read: all else is 403 AccessDenied.
pub const READER_ACCESS_KEY: &str = "AKIALAYERCACHEREAD02";
pub const READER_SECRET_KEY: &str = "leaked+secret/of/the/TestReader+0123456789";
/// May do everything, with [`SESSION_TOKEN`] only.
pub const SESSION_ACCESS_KEY: &str = "ASIALAYERCACHETEMP03";
pub const SESSION_SECRET_KEY: &str = "leaked+secret/of/the/TestGuest+0123456789A";
pub const SESSION_TOKEN: &str = "leaked/session+token/of/the/TestServer==";
/// The bucket the short methods of [`Server`] mean. [`OTHER_BUCKET`] exists as well.
pub const BUCKET: &str = "cache";
pub const OTHER_BUCKET: &str = "other";

/// One request, as the log keeps it.
#[derive(Clone, Debug)]
pub struct Logged {
    pub method: String,
    /// As S3 names it: `PutObject`, `UploadPartCopy`, …; `Unknown` if it is none.
    pub operation: &'static str,
    pub bucket: String,
    /// Empty for a request on the bucket.
    pub key: String,
    /// As it was sent, without its `?`.
    pub query: String,
    pub headers: HeaderMap,
    /// Bytes of the request's body that were read.
    pub body_len: u64,
    /// 0 if no answer was given (yet).
    pub status: u16,
}

/// What a fault rule sees of a request.
#[derive(Clone, Debug)]
pub struct Asked {
    /// How many requests came before it since the rule was set.
    pub index: usize,
    /// How many requests of the same operation came before it since the rule was set.
    pub nth: usize,
    pub operation: &'static str,
    pub bucket: String,
    pub key: String,
    pub query: String,
    pub headers: HeaderMap,
}

type Rule = Arc<dyn Fn(&Asked) -> Option<Fault> + Send + Sync>;

#[derive(Default)]
struct Faults {
    rule: Option<Rule>,
    asked: BTreeMap<&'static str, usize>,
}

struct Shared {
    store: Store,
    service: S3Service,
    port: u16,
    delay: Duration,
    faults: Mutex<Faults>,
    log: Mutex<Vec<(usize, Logged)>>,
    requests: AtomicUsize,
    in_flight: AtomicUsize,
    /// Of these, those that will never be answered.
    hung: AtomicUsize,
    peak: AtomicUsize,
    connections: AtomicUsize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Settings of a server that is to be started.
#[derive(Clone, Debug, Default)]
pub struct Builder {
    limits: Limits,
    delay: Duration,
    access: Access,
    buckets: Vec<String>,
}

impl Builder {
    /// At most this many entries on a page of a listing.
    pub fn page_size(mut self, entries: usize) -> Self {
        self.limits.page_size = entries;
        self
    }

    /// CopyObject refuses objects over this size, UploadPartCopy ranges over it. 5 GiB unless set.
    pub fn copy_limit(mut self, bytes: u64) -> Self {
        self.limits.copy_limit = bytes;
        self
    }

    /// PutObject and UploadPart refuse bodies over this size. 5 GiB unless set.
    pub fn put_limit(mut self, bytes: u64) -> Self {
        self.limits.put_limit = bytes;
        self
    }

    /// The smallest part but the last. 5 MiB unless set.
    pub fn min_part(mut self, bytes: u64) -> Self {
        self.limits.min_part = bytes;
        self
    }

    /// GET answers the whole object, with 200, whatever range was asked for.
    pub fn ignore_range(mut self) -> Self {
        self.limits.ignore_range = true;
        self
    }

    /// A missing key is 403 instead of 404, as on S3 for who may not list.
    pub fn hide_missing(mut self) -> Self {
        self.limits.hide_missing = true;
        self
    }

    /// A copy onto itself leaves LastModified as it was.
    pub fn stale_copies(mut self) -> Self {
        self.limits.stale_copies = true;
        self
    }

    /// Listing objects is 403 AccessDenied.
    pub fn no_list(self) -> Self {
        self.refuse("ListObjectsV2", 403, "AccessDenied")
            .refuse("ListObjects", 403, "AccessDenied")
    }

    /// Listing multipart uploads is 501 NotImplemented.
    pub fn no_uploads_listing(self) -> Self {
        self.refuse("ListMultipartUploads", 501, "NotImplemented")
    }

    /// UploadPartCopy is 501 NotImplemented, as on Google Cloud Storage.
    pub fn no_part_copy(self) -> Self {
        self.refuse("UploadPartCopy", 501, "NotImplemented")
    }

    /// An operation, as S3 names it, always gets this error.
    pub fn refuse(mut self, operation: &'static str, status: u16, code: &'static str) -> Self {
        self.access.refused.push((operation, status, code));
        self
    }

    /// Requests signed for another region are 400 AuthorizationHeaderMalformed. Any region will do unless set.
    pub fn region(mut self, region: &'static str) -> Self {
        self.access.region = Some(region);
        self
    }

    /// The server's clock is ahead of the client's: over 15 minutes, requests are RequestTimeTooSkewed.
    pub fn clock_ahead(mut self, by: Duration) -> Self {
        self.access.clock_ahead = by;
        self
    }

    /// Every request waits so long before it is performed.
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// One more bucket.
    pub fn bucket(mut self, name: &str) -> Self {
        self.buckets.push(name.to_owned());
        self
    }

    /// Starts the server on a free port of 127.0.0.1.
    pub fn start(self) -> Server {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .expect("bind a port of 127.0.0.1");
        listener
            .set_nonblocking(true)
            .expect("make the listener nonblocking");
        let port = listener.local_addr().expect("the listener's port").port();

        let mut state = State::default();
        for bucket in [BUCKET, OTHER_BUCKET]
            .into_iter()
            .chain(self.buckets.iter().map(String::as_str))
        {
            state.buckets.insert(bucket.to_owned(), BTreeMap::new());
        }
        let store = Store {
            state: Arc::new(Mutex::new(state)),
            limits: self.limits,
        };
        let mut service = S3ServiceBuilder::new(store.clone());
        service.set_auth(Keys);
        service.set_access(self.access);
        service.set_host(Hosts);

        let shared = Arc::new(Shared {
            store,
            service: service.build(),
            port,
            delay: self.delay,
            faults: Mutex::default(),
            log: Mutex::default(),
            requests: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            hung: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
        });
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("s3-test-server")
            .enable_all()
            .build()
            .expect("a runtime for the test server");
        let accepting = Arc::clone(&shared);
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("hand the listener to tokio");
            loop {
                if let Ok((stream, _)) = listener.accept().await {
                    accepting.connections.fetch_add(1, Ordering::SeqCst);
                    tokio::spawn(serve(Arc::clone(&accepting), stream));
                }
            }
        });
        Server {
            shared,
            runtime: Some(runtime),
        }
    }
}

/// A running server. Dropped, it stops listening and ends every connection.
pub struct Server {
    shared: Arc<Shared>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Waiting for a runtime's end is not allowed on another runtime's thread, where an async
            // test drops its server; and the port should be closed once the drop returns.
            let _ =
                std::thread::spawn(move || runtime.shutdown_timeout(Duration::from_secs(5))).join();
        }
    }
}

impl Server {
    pub fn start() -> Self {
        Self::builder().start()
    }

    pub fn builder() -> Builder {
        Builder::default()
    }

    /// For path style: `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.shared.port)
    }

    /// For virtual-hosted style: `http://localhost:PORT`; a bucket's is `http://BUCKET.localhost:PORT`.
    pub fn localhost_url(&self) -> String {
        format!("http://localhost:{}", self.shared.port)
    }

    pub fn addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.shared.port).into()
    }

    /// A cache spec for this server, path style, keys included; `extra` is more attributes, comma-separated.
    pub fn spec(&self, extra: &str) -> String {
        let keys = format!("access_key_id={ACCESS_KEY},secret_access_key={SECRET_KEY}");
        let place = format!("endpoint_url={},use_path_style=true", self.url());
        spec(&[&place, &keys, extra])
    }

    /// [`Server::spec`] in virtual-hosted style.
    pub fn virtual_hosted_spec(&self, extra: &str) -> String {
        let keys = format!("access_key_id={ACCESS_KEY},secret_access_key={SECRET_KEY}");
        let place = format!("endpoint_url={}", self.localhost_url());
        spec(&[&place, &keys, extra])
    }

    /// [`Server::spec`] without keys, for those that come from elsewhere.
    pub fn keyless_spec(&self, extra: &str) -> String {
        let place = format!("endpoint_url={},use_path_style=true", self.url());
        spec(&[&place, extra])
    }

    /// The objects of bucket `cache`.
    pub fn objects(&self) -> BTreeMap<String, Bytes> {
        self.objects_in(BUCKET)
    }

    pub fn objects_in(&self, bucket: &str) -> BTreeMap<String, Bytes> {
        let state = self.shared.store.lock();
        let objects = state.buckets.get(bucket).into_iter().flatten();
        objects
            .map(|(key, object)| (key.clone(), object.body.clone()))
            .collect()
    }

    /// All that is kept with an object of bucket `cache`.
    pub fn object(&self, key: &str) -> Option<Stored> {
        self.shared
            .store
            .lock()
            .buckets
            .get(BUCKET)?
            .get(key)
            .cloned()
    }

    /// Puts an object into bucket `cache`, not over the wire.
    pub fn put(&self, key: &str, body: impl Into<Bytes>) {
        self.put_in(BUCKET, key, body);
    }

    pub fn put_in(&self, bucket: &str, key: &str, body: impl Into<Bytes>) {
        let object = Stored::new(body.into());
        let mut state = self.shared.store.lock();
        state
            .buckets
            .entry(bucket.to_owned())
            .or_default()
            .insert(key.to_owned(), object);
    }

    /// Changes an object of bucket `cache` in place: its metadata, storage class, body, …
    ///
    /// # Panics
    /// If there is no such object.
    pub fn change(&self, key: &str, change: impl FnOnce(&mut Stored)) {
        let mut state = self.shared.store.lock();
        let object = state
            .buckets
            .get_mut(BUCKET)
            .and_then(|bucket| bucket.get_mut(key));
        change(object.unwrap_or_else(|| panic!("the test server holds no object {key}")));
    }

    /// Removes an object from bucket `cache`; says whether it was there.
    pub fn remove(&self, key: &str) -> bool {
        let mut state = self.shared.store.lock();
        state
            .buckets
            .get_mut(BUCKET)
            .is_some_and(|bucket| bucket.remove(key).is_some())
    }

    /// Moves an object's LastModified this far into the past.
    ///
    /// # Panics
    /// If there is no such object.
    pub fn age(&self, key: &str, by: Duration) {
        self.change(key, |object| object.modified -= by);
    }

    /// Moves every object of bucket `cache` this far into the past.
    pub fn age_all(&self, by: Duration) {
        let mut state = self.shared.store.lock();
        for object in state
            .buckets
            .get_mut(BUCKET)
            .into_iter()
            .flat_map(BTreeMap::values_mut)
        {
            object.modified -= by;
        }
    }

    /// Moves the start of every unfinished multipart upload this far into the past.
    pub fn age_uploads(&self, by: Duration) {
        self.shared.store.age_uploads(by);
    }

    pub fn last_modified(&self, key: &str) -> Option<SystemTime> {
        self.object(key).map(|object| object.modified)
    }

    /// How many multipart uploads were begun and neither completed nor aborted.
    pub fn uploads(&self) -> usize {
        self.shared.store.lock().uploads()
    }

    /// Every request since the start or the last [`Server::clear_log`], in the order they came.
    pub fn log(&self) -> Vec<Logged> {
        lock(&self.shared.log)
            .iter()
            .map(|(_, logged)| logged.clone())
            .collect()
    }

    /// Waits until no request is being answered any more: those that a client gave up included.
    ///
    /// # Panics
    /// If that takes more than half a minute.
    pub fn settle(&self) {
        for _ in 0..30_000 {
            let hung = self.shared.hung.load(Ordering::SeqCst);
            if self.shared.in_flight.load(Ordering::SeqCst) <= hung {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("the test server is still answering requests");
    }

    /// Forgets every object, every upload, every fault and the log.
    pub fn clear(&self) {
        self.settle();
        self.reset_faults();
        self.shared.store.lock().clear();
        self.clear_log();
    }

    /// How many requests of an operation the log holds.
    pub fn count(&self, operation: &str) -> usize {
        lock(&self.shared.log)
            .iter()
            .filter(|(_, logged)| logged.operation == operation)
            .count()
    }

    /// Forgets the log, the peak and the count of connections.
    pub fn clear_log(&self) {
        lock(&self.shared.log).clear();
        self.shared.peak.store(
            self.shared.in_flight.load(Ordering::SeqCst),
            Ordering::SeqCst,
        );
        self.shared.connections.store(0, Ordering::SeqCst);
    }

    /// The most requests that were under way at one time.
    pub fn peak_in_flight(&self) -> usize {
        self.shared.peak.load(Ordering::SeqCst)
    }

    /// How many connections were accepted.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// Sets the rule that says which requests go wrong, in place of any before it.
    pub fn fail(&self, rule: impl Fn(&Asked) -> Option<Fault> + Send + Sync + 'static) {
        *lock(&self.shared.faults) = Faults {
            rule: Some(Arc::new(rule)),
            asked: BTreeMap::new(),
        };
    }

    /// The first `times` requests of an operation go wrong.
    pub fn fail_first(&self, times: usize, operation: &'static str, fault: Fault) {
        self.fail(move |asked| {
            (asked.operation == operation && asked.nth < times).then(|| fault.clone())
        });
    }

    /// Every request of an operation goes wrong.
    pub fn fail_all(&self, operation: &'static str, fault: Fault) {
        self.fail_first(usize::MAX, operation, fault);
    }

    pub fn reset_faults(&self) {
        *lock(&self.shared.faults) = Faults::default();
    }
}

fn spec(attributes: &[&str]) -> String {
    let mut spec = format!("type=s3,region=us-east-1,bucket={BUCKET}");
    for attribute in attributes
        .iter()
        .map(|a| a.trim_matches(','))
        .filter(|a| !a.is_empty())
    {
        spec.push(',');
        spec.push_str(attribute);
    }
    spec
}

/// The secrets of those who may sign.
struct Keys;

#[async_trait::async_trait]
impl S3Auth for Keys {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        match access_key {
            ACCESS_KEY => Ok(SECRET_KEY.into()),
            READER_ACCESS_KEY => Ok(READER_SECRET_KEY.into()),
            SESSION_ACCESS_KEY => Ok(SESSION_SECRET_KEY.into()),
            _ => Err(s3_error!(InvalidAccessKeyId)),
        }
    }
}

/// What is checked once the signature is known to be good.
#[derive(Clone, Debug, Default)]
struct Access {
    refused: Vec<(&'static str, u16, &'static str)>,
    region: Option<&'static str>,
    clock_ahead: Duration,
}

#[async_trait::async_trait]
impl S3Access for Access {
    async fn check(&self, cx: &mut S3AccessContext<'_>) -> S3Result<()> {
        let Some(credentials) = cx.credentials() else {
            return Err(s3_error!(AccessDenied));
        };
        let operation = cx.s3_op().name();
        let header = |name: &str| cx.headers().get(name).and_then(|value| value.to_str().ok());
        match credentials.access_key.as_str() {
            READER_ACCESS_KEY
                if !["Get", "Head", "List"]
                    .iter()
                    .any(|verb| operation.starts_with(verb)) =>
            {
                return Err(s3_error!(AccessDenied));
            }
            SESSION_ACCESS_KEY if header("x-amz-security-token") != Some(SESSION_TOKEN) => {
                return Err(s3_error!(InvalidToken));
            }
            _ => {}
        }
        // AKID/20261121/us-east-1/s3/aws4_request
        let scope = header("authorization").and_then(|value| value.split_once("Credential="));
        if let (Some(region), Some((_, scope))) = (self.region, scope)
            && scope.split('/').nth(2) != Some(region)
        {
            let code = "AuthorizationHeaderMalformed";
            return Err(error(
                StatusCode::BAD_REQUEST,
                code,
                &[("x-amz-bucket-region", region)],
            ));
        }
        if let Some(sent) = header("x-amz-date").and_then(amz_date) {
            let now = SystemTime::now() + self.clock_ahead;
            let skew = now
                .duration_since(sent)
                .unwrap_or_else(|ahead| ahead.duration());
            if skew > Duration::from_secs(15 * 60) {
                return Err(s3_error!(RequestTimeTooSkewed));
            }
        }
        if let Some((_, status, code)) = self
            .refused
            .iter()
            .find(|(refused, ..)| *refused == operation)
        {
            let status = StatusCode::from_u16(*status).unwrap_or(StatusCode::FORBIDDEN);
            return Err(error(status, code, &[]));
        }
        Ok(())
    }
}

fn error(status: StatusCode, code: &str, headers: &[(&'static str, &'static str)]) -> S3Error {
    let code = S3ErrorCode::from_bytes(code.as_bytes()).unwrap_or(S3ErrorCode::InternalError);
    let mut error = S3Error::with_message(code, "The test server was built to refuse this.");
    error.set_status_code(status);
    error.set_headers(
        headers
            .iter()
            .map(|(name, value)| {
                (
                    http::HeaderName::from_static(name),
                    HeaderValue::from_static(value),
                )
            })
            .collect(),
    );
    error
}

/// `20261121T221811Z`
fn amz_date(text: &str) -> Option<SystemTime> {
    let format = time::macros::format_description!("[year][month][day]T[hour][minute][second]Z");
    Some(
        time::PrimitiveDateTime::parse(text, format)
            .ok()?
            .assume_utc()
            .into(),
    )
}

/// `BUCKET.localhost` and `BUCKET.s3.localhost` name a bucket, any other host none. The port may be that
/// of a proxy in front of us.
struct Hosts;

impl Hosts {
    fn bucket<'a>(&self, host: &'a str) -> Option<&'a str> {
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
        let name = name.strip_suffix(".localhost")?;
        match name.strip_suffix(".s3") {
            Some(bucket) => Some(bucket),
            None => Some(name).filter(|name| *name != "s3"),
        }
    }
}

impl S3Host for Hosts {
    fn parse_host_header<'a>(&'a self, host: &'a str) -> S3Result<VirtualHost<'a>> {
        Ok(match self.bucket(host) {
            Some(bucket) => VirtualHost::new(host).with_bucket(bucket),
            None => VirtualHost::new(host),
        })
    }
}

/// Serves one connection with hyper until it ends, or until a fault takes it over.
async fn serve(shared: Arc<Shared>, stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let (take_over, mut taken) = mpsc::channel::<Ending>(1);
    let service = hyper::service::service_fn(move |request| {
        let (shared, take_over) = (Arc::clone(&shared), take_over.clone());
        Box::pin(async move {
            let _in_flight = InFlight::enter(Arc::clone(&shared));
            match answer(&shared, request).await {
                Answer::Proper(response) => Ok::<_, Infallible>(response),
                Answer::Broken(ending) => {
                    let _ = take_over.send(ending).await;
                    pending().await
                }
            }
        })
    });
    let mut connection =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    let ending = tokio::select! {
        _ = poll_fn(|cx| connection.poll_without_shutdown(cx)) => return,
        Some(ending) = taken.recv() => ending,
    };
    ending
        .perform(connection.into_parts().io.into_inner())
        .await;
}

/// Counts a request for as long as it is being answered.
struct InFlight(Arc<Shared>);

impl InFlight {
    fn enter(shared: Arc<Shared>) -> Self {
        let now = shared.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        shared.peak.fetch_max(now, Ordering::SeqCst);
        Self(shared)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

struct Hung<'a>(&'a Shared);

impl<'a> Hung<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.hung.fetch_add(1, Ordering::SeqCst);
        Self(shared)
    }
}

impl Drop for Hung<'_> {
    fn drop(&mut self) {
        self.0.hung.fetch_sub(1, Ordering::SeqCst);
    }
}

enum Answer {
    Proper(Response<Body>),
    Broken(Ending),
}

async fn answer(shared: &Shared, request: Request<Incoming>) -> Answer {
    let id = shared.requests.fetch_add(1, Ordering::SeqCst) + 1;
    let logged = describe(&request);
    let fault = choose_fault(shared, &logged);
    let head = request.method() == http::Method::HEAD;
    let operation = logged.operation;
    lock(&shared.log).push((id, logged));
    let note = |change: &dyn Fn(&mut Logged)| {
        if let Some((_, logged)) = lock(&shared.log).iter_mut().rev().find(|(at, _)| *at == id) {
            change(logged);
        }
    };

    match fault {
        Some(Fault::Hang) => {
            // With the request unread, hyper does not see its sender leave.
            let _hung = Hung::new(shared);
            pending().await
        }
        Some(Fault::ResetBeforeReading) => return Answer::Broken(Ending::Reset),
        Some(Fault::EarlyAnswer(status)) => {
            note(&|logged| logged.status = status);
            let status = status_code(status);
            let body = error_xml(code_for(status));
            let bytes = raw_answer(status, &HeaderMap::new(), Some(body.len() as u64), &body);
            return Answer::Broken(Ending::Write {
                bytes,
                then: Then::CloseUnread,
            });
        }
        _ => {}
    }

    let (parts, mut incoming) = request.into_parts();
    let most = match fault {
        Some(Fault::ResetWhileReading(bytes)) => bytes,
        _ => u64::MAX,
    };
    let expected = incoming.size_hint().exact().unwrap_or(0).min(256 << 20);
    let mut body = BytesMut::with_capacity(expected as usize);
    while let Some(frame) = incoming.frame().await {
        let Ok(frame) = frame else {
            return Answer::Broken(Ending::Reset);
        };
        if let Ok(data) = frame.into_data() {
            body.extend_from_slice(&data);
        }
        if body.len() as u64 >= most {
            break;
        }
    }
    note(&|logged| logged.body_len = body.len() as u64);
    if most != u64::MAX {
        return Answer::Broken(Ending::Reset);
    }
    let body = body.freeze();

    let mut response = match &fault {
        Some(Fault::Status(status, code)) => xml(status_code(*status), error_xml(code)),
        Some(Fault::StatusEmpty(status)) => empty(status_code(*status)),
        Some(Fault::ErrorIn200(code)) => xml(StatusCode::OK, error_xml(code)),
        Some(Fault::Throttle { retry_after }) => {
            let mut response = xml(StatusCode::SERVICE_UNAVAILABLE, error_xml("SlowDown"));
            if let Some(seconds) = retry_after {
                response
                    .headers_mut()
                    .insert(http::header::RETRY_AFTER, HeaderValue::from(*seconds));
            }
            response
        }
        Some(Fault::Redirect { region }) => {
            let mut response = xml(
                StatusCode::MOVED_PERMANENTLY,
                error_xml("PermanentRedirect"),
            );
            response
                .headers_mut()
                .insert("x-amz-bucket-region", HeaderValue::from_static(region));
            response
        }
        Some(Fault::BadXml) => xml(
            StatusCode::OK,
            Bytes::from(format!(
                "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<{operation}Result><IsTruncated>tr</Is"
            )),
        ),
        Some(Fault::Html200) => {
            let page = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body><p>Welcome<br></body></html>\n";
            let mut response = xml(StatusCode::OK, Bytes::from_static(page.as_bytes()));
            response.headers_mut().insert(
                http::header::CONTENT_TYPE,
                HeaderValue::from_static("text/html"),
            );
            response
        }
        Some(Fault::Empty200) => empty(StatusCode::OK),
        Some(Fault::Reset) => return Answer::Broken(Ending::Reset),
        Some(Fault::EndlessBody { length }) => {
            note(&|logged| logged.status = 200);
            let head = raw_answer(StatusCode::OK, &HeaderMap::new(), *length, b"");
            return Answer::Broken(Ending::Endless { head });
        }
        _ => {
            let pause = match &fault {
                Some(Fault::Delay(pause)) => *pause + shared.delay,
                _ => shared.delay,
            };
            tokio::time::sleep(pause).await;
            perform(shared, Request::from_parts(parts, body)).await
        }
    };
    let request_id =
        HeaderValue::from_str(&format!("TEST{id:012}")).expect("digits are a header value");
    response
        .headers_mut()
        .insert("x-amz-request-id", request_id);

    let response = match fault {
        Some(Fault::ApplyThenReset) => return Answer::Broken(Ending::Reset),
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
            | Fault::SlowDrip { .. }),
        ) if !head => match spoil(response, &fault).await {
            Answer::Proper(response) => response,
            broken => {
                note(&|logged| logged.status = 200);
                return broken;
            }
        },
        _ => response,
    };
    note(&|logged| logged.status = response.status().as_u16());
    Answer::Proper(response)
}

fn describe(request: &Request<Incoming>) -> Logged {
    let host = request
        .headers()
        .get(http::header::HOST)
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
    }
}

fn choose_fault(shared: &Shared, logged: &Logged) -> Option<Fault> {
    let (rule, asked) = {
        let mut faults = lock(&shared.faults);
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

/// Lets s3s and the store answer.
async fn perform(shared: &Shared, request: Request<Bytes>) -> Response<Body> {
    let claimed = request.headers().get("x-amz-content-sha256").cloned();
    let body = request.body().clone();
    let response = match shared.service.call(request.map(Body::from)).await {
        Ok(response) => response,
        Err(error) => {
            return xml(
                StatusCode::INTERNAL_SERVER_ERROR,
                Bytes::from(format!("{error:?}")),
            );
        }
    };
    // s3s ends a body whose hash is wrong with an error like any other, a 500 in the end; S3 says 400.
    if response.status() == StatusCode::INTERNAL_SERVER_ERROR
        && let Some(claimed) = claimed.as_ref().and_then(|claimed| claimed.to_str().ok())
        && claimed.len() == 64
        && claimed != hex::encode(Sha256::digest(&body))
    {
        return xml(
            StatusCode::BAD_REQUEST,
            error_xml("XAmzContentSHA256Mismatch"),
        );
    }
    response
}

/// Performs those faults that need the true answer and change its body or its length.
async fn spoil(response: Response<Body>, fault: &Fault) -> Answer {
    let (mut parts, body) = response.into_parts();
    let mut body = match body.collect().await {
        Ok(body) => Vec::from(body.to_bytes()),
        Err(_) => return Answer::Broken(Ending::Reset),
    };
    let size = body.len();
    let write = |length: usize, body: &[u8], then| {
        let bytes = raw_answer(parts.status, &parts.headers, Some(length as u64), body);
        Answer::Broken(Ending::Write { bytes, then })
    };
    match *fault {
        Fault::ResetMidBody(n) => write(size, &body[..n.min(size)], Then::Reset),
        Fault::Truncate(n) => write(size, &body[..n.min(size)], Then::Close),
        Fault::ShortLength if size == 0 => write(0, b"x", Then::Close),
        Fault::ShortLength => write(size - 1, &body, Then::Close),
        Fault::WrongLength => write(size + 7, &body, Then::Close),
        Fault::SlowDrip { bytes, tick } => {
            parts
                .headers
                .insert(http::header::CONTENT_LENGTH, HeaderValue::from(size));
            let rest = Bytes::from(body);
            let drips = futures::stream::unfold(rest, move |mut rest| async move {
                if rest.is_empty() {
                    return None;
                }
                tokio::time::sleep(tick).await;
                let drip = rest.split_to(bytes.clamp(1, rest.len()));
                Some((Ok::<_, Infallible>(Frame::data(drip)), rest))
            });
            Answer::Proper(Response::from_parts(
                parts,
                Body::http_body_unsync(StreamBody::new(drips)),
            ))
        }
        Fault::FlipByte(offset) => {
            if let Some(at) = offset.checked_rem(size) {
                body[at] = !body[at];
            }
            Answer::Proper(Response::from_parts(parts, Body::from(body)))
        }
        _ => Answer::Proper(Response::from_parts(parts, Body::from(body))),
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
        http::header::CONTENT_TYPE,
        HeaderValue::from_static("application/xml"),
    );
    response
}
