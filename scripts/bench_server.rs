//! An S3 server for benchmarks, made not to be the bottleneck: it checks no signature, hashes
//! nothing, touches no disk, and can throw away what it is sent when the bytes are at hand anyway
//! (`--contents`). It can behave as a distant store does: a delay before each request, a cap on
//! each connection.
//!
//! It is no model of S3's rules: it believes its client. `/__stats`, `/__reset`, `/__clear`,
//! `/__objects` and `/__fill` are for the runner.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::convert::Infallible;
use std::fmt::Write as _;
use std::fs::File;
use std::future::Future;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};
use bytes::{Bytes, BytesMut};
use clap::Parser;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper_util::rt::{TokioIo, TokioTimer};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};

#[derive(Parser)]
#[command(about = "An S3 server for benchmarks, in memory")]
struct Args {
    /// Port on 127.0.0.1; 0 takes a free one
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Write the port here once requests are taken
    #[arg(long)]
    port_file: Option<PathBuf>,
    /// Milliseconds to wait before each request is looked at
    #[arg(long, default_value_t = 0)]
    delay_ms: u64,
    /// MiB/s that each connection carries at most, up and down apart; 0 is no cap
    #[arg(long, default_value_t = 0)]
    rate_mib: u64,
    /// Keep just the length of objects whose name is a digest
    #[arg(long)]
    discard: bool,
    /// Serve objects whose name is a digest from files of this directory, named by the hex digits
    /// (else a discarded object reads as zeros)
    #[arg(long)]
    contents: Option<PathBuf>,
    /// Exit when standard input ends, so that the server does not outlive whoever started it
    #[arg(long)]
    exit_with_stdin: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if args.exit_with_stdin {
        std::thread::spawn(|| {
            let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
            std::process::exit(0);
        });
    }
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(serve(args))
}

async fn serve(args: Args) -> Result<()> {
    let server = Arc::new(Server {
        delay: Duration::from_millis(args.delay_ms),
        discard: args.discard,
        contents: match &args.contents {
            Some(dir) => map_files(dir)?,
            None => HashMap::new(),
        },
        store: Mutex::default(),
        counts: Arc::default(),
        serial: AtomicU64::new(1),
    });
    let listener = TcpListener::bind(("127.0.0.1", args.port))
        .await
        .with_context(|| format!("listening on port {}", args.port))?;
    let port = listener.local_addr()?.port();
    match &args.port_file {
        // Under another name first: the runner reads the file as soon as it is there.
        Some(path) => {
            let draft = path.with_extension("draft");
            std::fs::write(&draft, port.to_string())?;
            std::fs::rename(&draft, path)?;
        }
        None => println!("{port}"),
    }
    let rate = args.rate_mib << 20;
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                eprintln!("bench-server: accepting a connection: {error}");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let server = Arc::clone(&server);
        tokio::spawn(async move {
            let connection = server.counts.connection();
            let service = hyper::service::service_fn(|request| {
                let server = Arc::clone(&server);
                async move { Ok::<_, Infallible>(server.answer(request).await) }
            });
            // A client that hangs up is no news.
            let _ = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(Paced::new(stream, rate)), service)
                .await;
            drop(connection);
        });
    }
}

/// Maps each file of `dir` whose name is a digest's hex, for as long as the process lives.
fn map_files(dir: &Path) -> Result<HashMap<String, Bytes>> {
    let mut files = HashMap::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let length = usize::try_from(entry.metadata()?.len())?;
        if !is_hex_digest(&name) || length == 0 {
            continue;
        }
        let file = File::open(entry.path())?;
        #[cfg(target_os = "linux")]
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        #[cfg(not(target_os = "linux"))]
        let flags = libc::MAP_SHARED;
        // SAFETY: a new mapping of an open file, for reading. The runner never changes or cuts the
        // files of a layout while a server serves them.
        let bytes = unsafe {
            let start = libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ,
                flags,
                file.as_raw_fd(),
                0,
            );
            if start == libc::MAP_FAILED {
                return Err(io::Error::last_os_error()).context("mapping a blob");
            }
            std::slice::from_raw_parts(start.cast::<u8>(), length)
        };
        files.insert(name, Bytes::from_static(bytes));
    }
    Ok(files)
}

fn is_hex_digest(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|c| c.is_ascii_hexdigit())
}

/// The hex digits that a key ends in, when its last part is a digest.
fn digest_of(key: &str) -> Option<&str> {
    let name = key.rsplit('/').next()?;
    let hex = name.strip_prefix("sha256:").unwrap_or(name);
    is_hex_digest(hex).then_some(hex)
}

// ---------------------------------------------------------------------------------------------
// A connection that carries only so many bytes a second.

struct Paced {
    stream: TcpStream,
    up: Pace,
    down: Pace,
}

/// When the next byte may pass, in one direction.
struct Pace {
    /// Nanoseconds a byte takes; `None` is no cap.
    byte: Option<f64>,
    free_at: Instant,
    sleep: Pin<Box<tokio::time::Sleep>>,
}

/// What a direction may be early or late by. Timers are good to a millisecond, so pacing finer than
/// this would lose rate to them.
const PACE_SLACK: Duration = Duration::from_millis(4);

impl Pace {
    fn new(rate: u64) -> Self {
        Pace {
            byte: (rate > 0).then(|| 1e9 / rate as f64),
            free_at: Instant::now(),
            sleep: Box::pin(tokio::time::sleep(Duration::ZERO)),
        }
    }

    /// Ready when bytes may pass again, with how many at once.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<usize> {
        let Some(byte) = self.byte else {
            return Poll::Ready(usize::MAX);
        };
        if self.free_at > Instant::now() + PACE_SLACK {
            self.sleep.as_mut().reset(self.free_at.into());
            ready!(self.sleep.as_mut().poll(cx));
        }
        Poll::Ready(((PACE_SLACK.as_nanos() as f64 / byte) as usize).max(1))
    }

    fn passed(&mut self, bytes: usize) {
        if let Some(byte) = self.byte {
            // An idle connection saves nothing up beyond the slack.
            let from = Instant::now()
                .checked_sub(PACE_SLACK)
                .map_or(self.free_at, |early| self.free_at.max(early));
            self.free_at = from + Duration::from_nanos((bytes as f64 * byte) as u64);
        }
    }
}

impl Paced {
    fn new(stream: TcpStream, rate: u64) -> Self {
        Paced {
            stream,
            up: Pace::new(rate),
            down: Pace::new(rate),
        }
    }
}

impl AsyncRead for Paced {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let limit = ready!(self.up.poll(cx));
        let before = buffer.filled().len();
        if limit >= buffer.remaining() {
            ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        } else {
            let mut part = ReadBuf::new(buffer.initialize_unfilled_to(limit));
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut part))?;
            let read = part.filled().len();
            buffer.advance(read);
        }
        let read = buffer.filled().len() - before;
        self.up.passed(read);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Paced {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let limit = ready!(self.down.poll(cx)).min(bytes.len());
        let part = bytes.get(..limit).unwrap_or(bytes);
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, part))?;
        self.down.passed(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut limit = ready!(self.down.poll(cx));
        let mut part = Vec::with_capacity(slices.len());
        for slice in slices {
            let take = slice.len().min(limit);
            part.push(IoSlice::new(slice.get(..take).unwrap_or_default()));
            limit -= take;
            if limit == 0 {
                break;
            }
        }
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, &part))?;
        self.down.passed(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

// ---------------------------------------------------------------------------------------------
// Counting.

#[derive(Default)]
struct Counts(Mutex<Counted>);

#[derive(Default)]
struct Counted {
    by_operation: BTreeMap<&'static str, u64>,
    /// How bodies were signed: what of the client's CPU time goes into hashing for the signature.
    by_signing: BTreeMap<&'static str, u64>,
    received: u64,
    sent: u64,
    now: u64,
    most: u64,
    connections: u64,
    most_connections: u64,
    opened: u64,
    /// The longest chain of requests of which each began after the one before had been answered:
    /// what the client paid in round trips, whatever the number of its requests.
    chain: u64,
}

impl Counts {
    fn lock(&self) -> MutexGuard<'_, Counted> {
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn connection(self: &Arc<Self>) -> Connection {
        let mut counted = self.lock();
        counted.opened += 1;
        counted.connections += 1;
        counted.most_connections = counted.most_connections.max(counted.connections);
        Connection(Arc::clone(self))
    }

    fn begin(self: &Arc<Self>) -> Running {
        let mut counted = self.lock();
        counted.now += 1;
        counted.most = counted.most.max(counted.now);
        Running {
            counts: Arc::clone(self),
            depth: counted.chain + 1,
        }
    }

    fn reset(&self) {
        let mut counted = self.lock();
        *counted = Counted {
            now: counted.now,
            connections: counted.connections,
            ..Counted::default()
        };
    }

    fn json(&self) -> String {
        let counted = self.lock();
        serde_json::json!({
            "requests": counted.by_operation.values().sum::<u64>(),
            "operations": counted.by_operation,
            "signing": counted.by_signing,
            "bytes_received": counted.received,
            "bytes_sent": counted.sent,
            "max_concurrency": counted.most,
            "max_connections": counted.most_connections,
            "connections_opened": counted.opened,
            "round_trips": counted.chain,
        })
        .to_string()
    }
}

struct Connection(Arc<Counts>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.lock().connections -= 1;
    }
}

/// A request that is not answered whole yet.
struct Running {
    counts: Arc<Counts>,
    depth: u64,
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut counted = self.counts.lock();
        counted.now = counted.now.saturating_sub(1);
        counted.chain = counted.chain.max(self.depth);
    }
}

// ---------------------------------------------------------------------------------------------
// Objects.

#[derive(Clone)]
enum Content {
    Kept(Arc<Vec<Bytes>>),
    /// So many zeros.
    Zeros(u64),
}

impl Content {
    fn len(&self) -> u64 {
        match self {
            Content::Kept(pieces) => pieces.iter().map(|piece| piece.len() as u64).sum(),
            Content::Zeros(length) => *length,
        }
    }

    /// Without copying.
    fn slice(&self, range: Range<u64>) -> VecDeque<Bytes> {
        static ZEROS: [u8; 1 << 20] = [0; 1 << 20];
        let mut out = VecDeque::new();
        match self {
            Content::Zeros(_) => {
                let mut left = range.end.saturating_sub(range.start);
                while left > 0 {
                    let take = left.min(ZEROS.len() as u64);
                    out.push_back(Bytes::from_static(&ZEROS).slice(..take as usize));
                    left -= take;
                }
            }
            Content::Kept(pieces) => {
                let mut at = 0;
                for piece in pieces.iter() {
                    let length = piece.len() as u64;
                    let from = range.start.saturating_sub(at).min(length);
                    let to = range.end.saturating_sub(at).min(length);
                    if from < to {
                        out.push_back(piece.slice(from as usize..to as usize));
                    }
                    at += length;
                }
            }
        }
        out
    }
}

#[derive(Clone)]
struct Object {
    content: Content,
    etag: String,
    modified: SystemTime,
    /// Content-Type and x-amz-meta-*, as they came.
    headers: Vec<(HeaderName, HeaderValue)>,
}

struct Upload {
    bucket: String,
    key: String,
    headers: Vec<(HeaderName, HeaderValue)>,
    parts: BTreeMap<u32, (Content, String)>,
    begun: SystemTime,
}

#[derive(Default)]
struct Store {
    buckets: BTreeMap<String, BTreeMap<String, Object>>,
    uploads: BTreeMap<String, Upload>,
}

struct Server {
    delay: Duration,
    discard: bool,
    contents: HashMap<String, Bytes>,
    store: Mutex<Store>,
    counts: Arc<Counts>,
    serial: AtomicU64,
}

/// A request's address, decoded.
struct Target {
    bucket: String,
    key: String,
    query: BTreeMap<String, String>,
}

impl Target {
    fn of(uri: &http::Uri) -> Self {
        let path = uri.path().trim_start_matches('/');
        let (bucket, key) = path.split_once('/').unwrap_or((path, ""));
        Target {
            bucket: decoded(bucket),
            key: decoded(key),
            query: url::form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes())
                .into_owned()
                .collect(),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.query.contains_key(name)
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.query.get(name).map(String::as_str)
    }
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// What an answer is made of before it is one.
struct Answer {
    status: StatusCode,
    headers: Vec<(HeaderName, HeaderValue)>,
    pieces: VecDeque<Bytes>,
    /// Of a HEAD's object, whose body is not sent.
    length: Option<u64>,
}

impl Answer {
    fn status(status: StatusCode) -> Self {
        Answer {
            status,
            headers: Vec::new(),
            pieces: VecDeque::new(),
            length: None,
        }
    }

    fn text(status: StatusCode, kind: &'static str, body: String) -> Self {
        let mut answer = Answer::status(status).with(header::CONTENT_TYPE, kind);
        answer.pieces.push_back(body.into());
        answer
    }

    fn xml(body: String) -> Self {
        let body = format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{body}");
        Answer::text(StatusCode::OK, "application/xml", body)
    }

    fn error(status: StatusCode, code: &str) -> Self {
        let body = format!("<Error><Code>{code}</Code><Message>{code}</Message></Error>");
        Answer {
            status,
            ..Answer::xml(body)
        }
    }

    fn with(mut self, name: HeaderName, value: impl AsRef<str>) -> Self {
        if let Ok(value) = HeaderValue::from_str(value.as_ref()) {
            self.headers.push((name, value));
        }
        self
    }
}

impl Server {
    fn store(&self) -> MutexGuard<'_, Store> {
        self.store
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let head = request.method() == Method::HEAD;
        let own = request.uri().path().starts_with("/__");
        let running = (!own).then(|| self.counts.begin());
        if !own && !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
        let answer = if own {
            self.control(&request)
        } else {
            self.operation(request).await
        };
        let length = answer
            .length
            .unwrap_or_else(|| answer.pieces.iter().map(|piece| piece.len() as u64).sum());
        let pieces = if head { VecDeque::new() } else { answer.pieces };
        if !own {
            let sent: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
            self.counts.lock().sent += sent;
        }
        // An answer without a body is whole as it stands.
        let running = running.filter(|_| !pieces.is_empty());
        let mut response = Response::new(Body { pieces, running });
        *response.status_mut() = answer.status;
        let headers = response.headers_mut();
        headers.extend(answer.headers.into_iter().map(|(n, v)| (Some(n), v)));
        if answer.status != StatusCode::NO_CONTENT {
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        }
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        if let Ok(id) = HeaderValue::from_str(&format!("{serial:016X}")) {
            headers.insert("x-amz-request-id", id);
        }
        response
    }

    /// The runner's own requests, neither counted nor delayed.
    fn control(&self, request: &Request<Incoming>) -> Answer {
        let target = Target::of(request.uri());
        let json = |body| Answer::text(StatusCode::OK, "application/json", body);
        match target.bucket.as_str() {
            "__stats" => json(self.counts.json()),
            "__reset" => {
                self.counts.reset();
                json(self.counts.json())
            }
            "__clear" => {
                let bucket = target.get("bucket").unwrap_or_default();
                let mut store = self.store();
                store.buckets.remove(bucket);
                store.uploads.retain(|_, upload| upload.bucket != bucket);
                json("{}".to_owned())
            }
            "__objects" => {
                let bucket = target.get("bucket").unwrap_or_default();
                let prefix = target.get("prefix").unwrap_or_default();
                let store = self.store();
                let sizes: Vec<u64> = store
                    .buckets
                    .get(bucket)
                    .into_iter()
                    .flatten()
                    .filter(|(key, _)| key.starts_with(prefix))
                    .map(|(_, object)| object.content.len())
                    .collect();
                let bytes: u64 = sizes.iter().sum();
                json(
                    serde_json::json!({"objects": sizes.len(), "bytes": bytes,
                        "unfinished_uploads": store.uploads.len()})
                    .to_string(),
                )
            }
            "__fill" => self.fill(&target),
            _ => Answer::error(StatusCode::NOT_FOUND, "NoSuchControl"),
        }
    }

    /// Puts every mapped file into `bucket` under `prefix`, as if it had been uploaded at `mtime`
    /// (Unix seconds) by a client that notes modification times as rclone does.
    fn fill(&self, target: &Target) -> Answer {
        let bucket = target.get("bucket").unwrap_or_default().to_owned();
        let prefix = target.get("prefix").unwrap_or_default();
        let mtime = target.get("mtime").unwrap_or("0");
        let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(mtime.parse().unwrap_or(0));
        let mut headers = Vec::new();
        if let Ok(value) = HeaderValue::from_str(mtime) {
            headers.push((HeaderName::from_static("x-amz-meta-mtime"), value));
        }
        let mut store = self.store();
        let objects = store.buckets.entry(bucket).or_default();
        for (hex, bytes) in &self.contents {
            let object = Object {
                content: Content::Kept(Arc::new(vec![bytes.clone()])),
                etag: self.etag(),
                modified,
                headers: headers.clone(),
            };
            objects.insert(format!("{prefix}{hex}"), object);
        }
        let filled = self.contents.len();
        Answer::text(
            StatusCode::OK,
            "application/json",
            serde_json::json!({ "objects": filled }).to_string(),
        )
    }

    /// Never the content's MD5, which would have to be computed: the form that multipart uploads
    /// have, which clients know not to be one.
    fn etag(&self) -> String {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        format!("\"{serial:032x}-1\"")
    }

    async fn operation(&self, request: Request<Incoming>) -> Answer {
        let target = Target::of(request.uri());
        let (parts, body) = request.into_parts();
        let headers = &parts.headers;
        let name = operation_name(&parts.method, &target, headers);
        {
            let mut counted = self.counts.lock();
            *counted.by_operation.entry(name).or_default() += 1;
            if matches!(name, "PutObject" | "UploadPart") {
                *counted.by_signing.entry(signing(headers)).or_default() += 1;
            }
        }
        // Not the list of parts that completes an upload.
        let blob = matches!(name, "PutObject" | "UploadPart") && digest_of(&target.key).is_some();
        let keep = !(self.discard && blob);
        let Ok(content) = self.receive(headers, body, keep).await else {
            return Answer::error(StatusCode::BAD_REQUEST, "IncompleteBody");
        };
        match name {
            "ListBuckets" => self.list_buckets(),
            "HeadBucket" | "CreateBucket" => Answer::status(StatusCode::OK),
            "GetBucketLocation" => Answer::xml("<LocationConstraint/>".to_owned()),
            "ListObjectsV2" | "ListObjects" => self.list(&target),
            "GetObject" | "HeadObject" => self.get(&target, headers),
            "PutObject" => self.put(&target, headers, content),
            "CopyObject" => self.copy(&target, headers),
            "DeleteObject" => {
                let mut store = self.store();
                if let Some(objects) = store.buckets.get_mut(&target.bucket) {
                    objects.remove(&target.key);
                }
                Answer::status(StatusCode::NO_CONTENT)
            }
            "DeleteObjects" => self.delete_objects(&target, &content),
            "CreateMultipartUpload" => self.create_upload(target, headers),
            "UploadPart" => self.upload_part(&target, content),
            "UploadPartCopy" => self.copy_part(&target, headers),
            "CompleteMultipartUpload" => self.complete_upload(&target, &content),
            "AbortMultipartUpload" => {
                let upload = target.get("uploadId").unwrap_or_default();
                match self.store().uploads.remove(upload) {
                    Some(_) => Answer::status(StatusCode::NO_CONTENT),
                    None => Answer::error(StatusCode::NOT_FOUND, "NoSuchUpload"),
                }
            }
            "ListParts" => self.list_parts(&target),
            "ListMultipartUploads" => self.list_uploads(&target),
            _ => Answer::error(StatusCode::NOT_IMPLEMENTED, "NotImplemented"),
        }
    }

    /// Takes the whole body in, without aws-chunked's frames.
    async fn receive(
        &self,
        headers: &HeaderMap,
        mut body: Incoming,
        keep: bool,
    ) -> Result<Content> {
        let chunked = header(headers, "content-encoding")
            .is_some_and(|value| value.contains("aws-chunked"))
            || header(headers, "x-amz-content-sha256")
                .is_some_and(|value| value.starts_with("STREAMING-"));
        let mut chunks = AwsChunks::default();
        let mut pieces: Vec<Bytes> = Vec::new();
        let (mut received, mut length) = (0, 0);
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else {
                continue;
            };
            received += data.len() as u64;
            let mut take = |piece: Bytes| {
                length += piece.len() as u64;
                if keep {
                    pieces.push(piece);
                }
            };
            if chunked {
                chunks.decode(data, &mut take)?;
            } else {
                take(data);
            }
        }
        self.counts.lock().received += received;
        if !keep {
            return Ok(Content::Zeros(length));
        }
        // A small piece would hold the whole of the buffer it was read into.
        if length < 64 << 10 && !pieces.is_empty() {
            let mut whole = BytesMut::with_capacity(length as usize);
            pieces
                .iter()
                .for_each(|piece| whole.extend_from_slice(piece));
            pieces = vec![whole.freeze()];
        }
        Ok(Content::Kept(Arc::new(pieces)))
    }

    /// The real bytes in place of a discarded body, where they are at hand.
    fn content_for(&self, key: &str, content: Content) -> Content {
        if let Content::Zeros(length) = content
            && let Some(bytes) = digest_of(key).and_then(|hex| self.contents.get(hex))
            && bytes.len() as u64 == length
        {
            return Content::Kept(Arc::new(vec![bytes.clone()]));
        }
        content
    }

    fn list_buckets(&self) -> Answer {
        let mut body = String::from(
            "<ListAllMyBucketsResult><Owner><ID>bench</ID><DisplayName>bench</DisplayName></Owner><Buckets>",
        );
        for name in self.store().buckets.keys() {
            let _ = write!(
                body,
                "<Bucket><Name>{}</Name><CreationDate>2026-01-01T00:00:00.000Z</CreationDate></Bucket>",
                escaped(name)
            );
        }
        body.push_str("</Buckets></ListAllMyBucketsResult>");
        Answer::xml(body)
    }

    /// Both versions: rclone asks a store it does not know for the first.
    fn list(&self, target: &Target) -> Answer {
        let second = target.get("list-type") == Some("2");
        let get = |name| target.get(name).unwrap_or_default();
        let (prefix, delimiter) = (get("prefix"), get("delimiter"));
        let after = match (second, target.get("continuation-token")) {
            (true, Some(token)) => token,
            (true, None) => get("start-after"),
            (false, _) => get("marker"),
        };
        let most = target
            .get("max-keys")
            .and_then(|value| value.parse().ok())
            .unwrap_or(1000)
            .min(1000);
        let text = |value: &str| {
            if get("encoding-type") == "url" {
                utf8_percent_encode(value, &KEY).to_string()
            } else {
                escaped(value)
            }
        };
        let (mut entries, mut count, mut last, mut truncated) =
            (String::new(), 0, String::new(), false);
        let store = self.store();
        let objects = store.buckets.get(&target.bucket);
        for (key, object) in objects
            .into_iter()
            .flat_map(|objects| objects.range(after.max(prefix).to_owned()..))
        {
            if !key.starts_with(prefix) {
                break;
            }
            let group = key[prefix.len()..]
                .find(delimiter)
                .filter(|_| !delimiter.is_empty())
                .map(|at| &key[..prefix.len() + at + delimiter.len()]);
            let name = group.unwrap_or(key);
            // A page that ends in a group goes on after all of the group.
            if name <= after || name == last {
                continue;
            }
            if count == most {
                truncated = true;
                break;
            }
            count += 1;
            name.clone_into(&mut last);
            let _ = match group {
                Some(group) => write!(
                    entries,
                    "<CommonPrefixes><Prefix>{}</Prefix></CommonPrefixes>",
                    text(group)
                ),
                None => write!(
                    entries,
                    "<Contents><Key>{}</Key><LastModified>{}</LastModified><ETag>{}</ETag>\
                     <Size>{}</Size><StorageClass>STANDARD</StorageClass></Contents>",
                    text(key),
                    iso(object.modified),
                    escaped(&object.etag),
                    object.content.len()
                ),
            };
        }
        let mut body = format!(
            "<ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Name>{}</Name>\
             <Prefix>{}</Prefix><MaxKeys>{most}</MaxKeys><IsTruncated>{truncated}</IsTruncated>",
            escaped(&target.bucket),
            text(prefix)
        );
        if !delimiter.is_empty() {
            let _ = write!(body, "<Delimiter>{}</Delimiter>", text(delimiter));
        }
        if get("encoding-type") == "url" {
            body.push_str("<EncodingType>url</EncodingType>");
        }
        if second {
            let _ = write!(body, "<KeyCount>{count}</KeyCount>");
            if truncated {
                // Opaque to the client, so the key as it is.
                let _ = write!(
                    body,
                    "<NextContinuationToken>{}</NextContinuationToken>",
                    escaped(&last)
                );
            }
        } else {
            let _ = write!(body, "<Marker>{}</Marker>", text(after));
            if truncated {
                let _ = write!(body, "<NextMarker>{}</NextMarker>", text(&last));
            }
        }
        body.push_str(&entries);
        body.push_str("</ListBucketResult>");
        Answer::xml(body)
    }

    fn get(&self, target: &Target, headers: &HeaderMap) -> Answer {
        let store = self.store();
        let Some(object) = store
            .buckets
            .get(&target.bucket)
            .and_then(|objects| objects.get(&target.key))
        else {
            return Answer::error(StatusCode::NOT_FOUND, "NoSuchKey");
        };
        if header(headers, "if-match").is_some_and(|etag| !same_etag(etag, &object.etag)) {
            return Answer::error(StatusCode::PRECONDITION_FAILED, "PreconditionFailed");
        }
        if header(headers, "if-none-match").is_some_and(|etag| same_etag(etag, &object.etag)) {
            return Answer::status(StatusCode::NOT_MODIFIED);
        }
        let size = object.content.len();
        let (status, range) = match header(headers, "range").map(|range| parse_range(range, size)) {
            None => (StatusCode::OK, 0..size),
            Some(Some(range)) => (StatusCode::PARTIAL_CONTENT, range),
            Some(None) => {
                return Answer::error(StatusCode::RANGE_NOT_SATISFIABLE, "InvalidRange")
                    .with(header::CONTENT_RANGE, format!("bytes */{size}"));
            }
        };
        let mut answer = Answer::status(status)
            .with(header::ETAG, &object.etag)
            .with(
                header::LAST_MODIFIED,
                httpdate::fmt_http_date(object.modified),
            )
            .with(header::ACCEPT_RANGES, "bytes");
        if status == StatusCode::PARTIAL_CONTENT {
            let shown = format!("bytes {}-{}/{size}", range.start, range.end - 1);
            answer = answer.with(header::CONTENT_RANGE, shown);
        }
        answer.headers.extend(object.headers.iter().cloned());
        answer.length = Some(range.end - range.start);
        answer.pieces = object.content.slice(range);
        answer
    }

    fn put(&self, target: &Target, headers: &HeaderMap, content: Content) -> Answer {
        let content = self.content_for(&target.key, content);
        let etag = self.etag();
        let mut store = self.store();
        let objects = store.buckets.entry(target.bucket.clone()).or_default();
        if headers.contains_key("if-none-match") && objects.contains_key(&target.key) {
            return Answer::error(StatusCode::PRECONDITION_FAILED, "PreconditionFailed");
        }
        let object = Object {
            content,
            etag: etag.clone(),
            modified: SystemTime::now(),
            headers: kept_headers(headers),
        };
        objects.insert(target.key.clone(), object);
        Answer::status(StatusCode::OK).with(header::ETAG, etag)
    }

    fn copy_source(&self, headers: &HeaderMap) -> Option<Object> {
        let source = decoded(header(headers, "x-amz-copy-source")?);
        let (bucket, key) = source.trim_start_matches('/').split_once('/')?;
        self.store().buckets.get(bucket)?.get(key).cloned()
    }

    fn copy(&self, target: &Target, headers: &HeaderMap) -> Answer {
        let Some(mut object) = self.copy_source(headers) else {
            return Answer::error(StatusCode::NOT_FOUND, "NoSuchKey");
        };
        if header(headers, "x-amz-metadata-directive") == Some("REPLACE") {
            object.headers = kept_headers(headers);
        }
        object.modified = SystemTime::now();
        let body = format!(
            "<CopyObjectResult><LastModified>{}</LastModified><ETag>{}</ETag></CopyObjectResult>",
            iso(object.modified),
            escaped(&object.etag)
        );
        self.store()
            .buckets
            .entry(target.bucket.clone())
            .or_default()
            .insert(target.key.clone(), object);
        Answer::xml(body)
    }

    fn delete_objects(&self, target: &Target, content: &Content) -> Answer {
        let body = text_of(content);
        let mut store = self.store();
        let objects = store.buckets.entry(target.bucket.clone()).or_default();
        for key in elements(&body, "Key") {
            objects.remove(&unescaped(key));
        }
        Answer::xml("<DeleteResult></DeleteResult>".to_owned())
    }

    fn create_upload(&self, target: Target, headers: &HeaderMap) -> Answer {
        let id = format!("upload-{}", self.serial.fetch_add(1, Ordering::Relaxed));
        let body = format!(
            "<InitiateMultipartUploadResult><Bucket>{}</Bucket><Key>{}</Key>\
             <UploadId>{id}</UploadId></InitiateMultipartUploadResult>",
            escaped(&target.bucket),
            escaped(&target.key)
        );
        let upload = Upload {
            bucket: target.bucket,
            key: target.key,
            headers: kept_headers(headers),
            parts: BTreeMap::new(),
            begun: SystemTime::now(),
        };
        self.store().uploads.insert(id, upload);
        Answer::xml(body)
    }

    /// The part's ETag, or the refusal.
    fn add_part(&self, target: &Target, content: Content) -> Result<String, Answer> {
        let number = target.get("partNumber").and_then(|text| text.parse().ok());
        let etag = self.etag();
        let mut store = self.store();
        let upload = store
            .uploads
            .get_mut(target.get("uploadId").unwrap_or_default());
        match (upload, number) {
            (Some(upload), Some(number)) => {
                upload.parts.insert(number, (content, etag.clone()));
                Ok(etag)
            }
            (None, _) => Err(Answer::error(StatusCode::NOT_FOUND, "NoSuchUpload")),
            (_, None) => Err(Answer::error(StatusCode::BAD_REQUEST, "InvalidArgument")),
        }
    }

    fn upload_part(&self, target: &Target, content: Content) -> Answer {
        match self.add_part(target, content) {
            Ok(etag) => Answer::status(StatusCode::OK).with(header::ETAG, etag),
            Err(answer) => answer,
        }
    }

    fn copy_part(&self, target: &Target, headers: &HeaderMap) -> Answer {
        let Some(source) = self.copy_source(headers) else {
            return Answer::error(StatusCode::NOT_FOUND, "NoSuchKey");
        };
        let size = source.content.len();
        let range = match header(headers, "x-amz-copy-source-range") {
            None => 0..size,
            Some(text) => match parse_range(text, size) {
                Some(range) => range,
                None => return Answer::error(StatusCode::BAD_REQUEST, "InvalidRange"),
            },
        };
        let pieces = source.content.slice(range).into();
        match self.add_part(target, Content::Kept(Arc::new(pieces))) {
            Ok(etag) => Answer::xml(format!(
                "<CopyPartResult><LastModified>{}</LastModified><ETag>{}</ETag></CopyPartResult>",
                iso(SystemTime::now()),
                escaped(&etag)
            )),
            Err(answer) => answer,
        }
    }

    fn complete_upload(&self, target: &Target, body: &Content) -> Answer {
        let body = text_of(body);
        let id = target.get("uploadId").unwrap_or_default();
        let mut store = self.store();
        let Some(upload) = store.uploads.get(id) else {
            return Answer::error(StatusCode::NOT_FOUND, "NoSuchUpload");
        };
        let (mut pieces, mut zeros) = (Vec::new(), 0);
        for number in elements(&body, "PartNumber") {
            let part = number.trim().parse().ok();
            match part.and_then(|number: u32| upload.parts.get(&number)) {
                Some((Content::Kept(kept), _)) => pieces.extend(kept.iter().cloned()),
                Some((Content::Zeros(length), _)) => zeros += length,
                None => return Answer::error(StatusCode::BAD_REQUEST, "InvalidPart"),
            }
        }
        let content = match (pieces.is_empty(), zeros) {
            (_, 0) => Content::Kept(Arc::new(pieces)),
            (true, zeros) => self.content_for(&target.key, Content::Zeros(zeros)),
            // Copied parts beside discarded ones: no benchmark does that.
            (false, _) => return Answer::error(StatusCode::NOT_IMPLEMENTED, "NotImplemented"),
        };
        let object = Object {
            content,
            etag: self.etag(),
            modified: SystemTime::now(),
            headers: upload.headers.clone(),
        };
        let body = format!(
            "<CompleteMultipartUploadResult><Bucket>{}</Bucket><Key>{}</Key><ETag>{}</ETag>\
             </CompleteMultipartUploadResult>",
            escaped(&target.bucket),
            escaped(&target.key),
            escaped(&object.etag)
        );
        store.uploads.remove(id);
        store
            .buckets
            .entry(target.bucket.clone())
            .or_default()
            .insert(target.key.clone(), object);
        Answer::xml(body)
    }

    fn list_parts(&self, target: &Target) -> Answer {
        let store = self.store();
        let id = target.get("uploadId").unwrap_or_default();
        let Some(upload) = store.uploads.get(id) else {
            return Answer::error(StatusCode::NOT_FOUND, "NoSuchUpload");
        };
        let mut body = format!(
            "<ListPartsResult><Bucket>{}</Bucket><Key>{}</Key><UploadId>{}</UploadId>\
             <IsTruncated>false</IsTruncated>",
            escaped(&target.bucket),
            escaped(&target.key),
            escaped(id)
        );
        for (number, (content, etag)) in &upload.parts {
            let _ = write!(
                body,
                "<Part><PartNumber>{number}</PartNumber><LastModified>{}</LastModified>\
                 <ETag>{}</ETag><Size>{}</Size></Part>",
                iso(upload.begun),
                escaped(etag),
                content.len()
            );
        }
        body.push_str("</ListPartsResult>");
        Answer::xml(body)
    }

    fn list_uploads(&self, target: &Target) -> Answer {
        let prefix = target.get("prefix").unwrap_or_default();
        let mut body = format!(
            "<ListMultipartUploadsResult><Bucket>{}</Bucket><IsTruncated>false</IsTruncated>",
            escaped(&target.bucket)
        );
        for (id, upload) in &self.store().uploads {
            if upload.bucket == target.bucket && upload.key.starts_with(prefix) {
                let _ = write!(
                    body,
                    "<Upload><Key>{}</Key><UploadId>{id}</UploadId><Initiated>{}</Initiated></Upload>",
                    escaped(&upload.key),
                    iso(upload.begun)
                );
            }
        }
        body.push_str("</ListMultipartUploadsResult>");
        Answer::xml(body)
    }
}

fn operation_name(method: &Method, target: &Target, headers: &HeaderMap) -> &'static str {
    let copy = headers.contains_key("x-amz-copy-source");
    let (bucket, key) = (!target.bucket.is_empty(), !target.key.is_empty());
    match (method.as_str(), bucket, key) {
        ("GET", false, _) => "ListBuckets",
        ("HEAD", true, false) => "HeadBucket",
        ("PUT", true, false) => "CreateBucket",
        ("POST", true, false) if target.has("delete") => "DeleteObjects",
        ("GET", true, false) if target.has("location") => "GetBucketLocation",
        ("GET", true, false) if target.has("uploads") => "ListMultipartUploads",
        ("GET", true, false) if target.get("list-type") == Some("2") => "ListObjectsV2",
        ("GET", true, false) if !target.has("versioning") && !target.has("versions") => {
            "ListObjects"
        }
        ("GET", true, true) if target.has("uploadId") => "ListParts",
        ("GET", true, true) => "GetObject",
        ("HEAD", true, true) => "HeadObject",
        ("PUT", true, true) if target.has("uploadId") && copy => "UploadPartCopy",
        ("PUT", true, true) if target.has("uploadId") => "UploadPart",
        ("PUT", true, true) if copy => "CopyObject",
        ("PUT", true, true) => "PutObject",
        ("POST", true, true) if target.has("uploads") => "CreateMultipartUpload",
        ("POST", true, true) if target.has("uploadId") => "CompleteMultipartUpload",
        ("DELETE", true, true) if target.has("uploadId") => "AbortMultipartUpload",
        ("DELETE", true, true) => "DeleteObject",
        _ => "Other",
    }
}

fn signing(headers: &HeaderMap) -> &'static str {
    match header(headers, "x-amz-content-sha256") {
        None => "none",
        Some("UNSIGNED-PAYLOAD") => "unsigned",
        Some(value) if value.starts_with("STREAMING-UNSIGNED") => "chunks, unsigned",
        Some(value) if value.starts_with("STREAMING-") => "chunks, signed",
        Some(_) => "sha256",
    }
}

fn kept_headers(headers: &HeaderMap) -> Vec<(HeaderName, HeaderValue)> {
    headers
        .iter()
        .filter(|(name, _)| {
            *name == header::CONTENT_TYPE || name.as_str().starts_with("x-amz-meta-")
        })
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

fn same_etag(asked: &str, etag: &str) -> bool {
    asked == "*" || asked.trim_matches('"') == etag.trim_matches('"')
}

/// `bytes=a-b`, `bytes=a-` or `bytes=-n`; `None` if nothing of the object is in it.
fn parse_range(text: &str, size: u64) -> Option<Range<u64>> {
    let (from, to) = text.strip_prefix("bytes=")?.split_once('-')?;
    let range = match (from, to) {
        ("", last) => size.saturating_sub(last.parse().ok()?)..size,
        (from, "") => from.parse().ok()?..size,
        (from, to) => from.parse().ok()?..to.parse::<u64>().ok()?.saturating_add(1).min(size),
    };
    (range.start < range.end).then_some(range)
}

fn text_of(content: &Content) -> String {
    let bytes: Vec<u8> = content
        .slice(0..content.len())
        .into_iter()
        .flatten()
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The texts of all elements called `name`. Enough for the two bodies that clients send.
fn elements<'a>(xml: &'a str, name: &str) -> Vec<&'a str> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    xml.split(&open)
        .skip(1)
        .filter_map(|rest| rest.split_once(&close).map(|(text, _)| text))
        .collect()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

fn unescaped(text: &str) -> String {
    text.replace("&quot;", "\"")
        .replace("&gt;", ">")
        .replace("&lt;", "<")
        .replace("&amp;", "&")
}

/// What S3 leaves as it is in a url-encoded listing.
const KEY: AsciiSet = NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'*');

fn iso(time: SystemTime) -> String {
    let format = time::macros::format_description!(
        "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z"
    );
    time::OffsetDateTime::from(time)
        .format(format)
        .unwrap_or_default()
}

// ---------------------------------------------------------------------------------------------
// Bodies.

/// An answer's body: pieces as they lie in memory.
struct Body {
    pieces: VecDeque<Bytes>,
    running: Option<Running>,
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        // Frames of this size, so that the last one is handed out (and the request counts as
        // answered) only when nearly all has gone to the socket.
        const FRAME: usize = 256 << 10;
        let Some(first) = self.pieces.front_mut() else {
            return Poll::Ready(None);
        };
        let frame = first.split_to(first.len().min(FRAME));
        if first.is_empty() {
            self.pieces.pop_front();
        }
        if self.pieces.is_empty() {
            self.running = None;
        }
        Poll::Ready(Some(Ok(Frame::data(frame))))
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.pieces.iter().map(|piece| piece.len() as u64).sum())
    }
}

/// Takes aws-chunked's frames off a body: `<hex>[;extension]CRLF <data> CRLF`, then a chunk of no
/// length and trailers.
#[derive(Default)]
struct AwsChunks {
    state: Chunk,
    line: Vec<u8>,
}

#[derive(Default, Clone, Copy)]
enum Chunk {
    #[default]
    Size,
    Data(usize),
    /// The line break after data.
    End,
    Trailers,
}

impl AwsChunks {
    fn decode(&mut self, mut data: Bytes, take: &mut impl FnMut(Bytes)) -> Result<()> {
        while !data.is_empty() {
            match self.state {
                Chunk::Trailers => return Ok(()),
                Chunk::Data(left) => {
                    let piece = data.split_to(left.min(data.len()));
                    self.state = match left - piece.len() {
                        0 => Chunk::End,
                        left => Chunk::Data(left),
                    };
                    take(piece);
                }
                Chunk::End => {
                    if data.split_to(1).as_ref() == b"\n" {
                        self.state = Chunk::Size;
                    }
                }
                Chunk::Size => {
                    let end = data.iter().position(|&byte| byte == b'\n');
                    let line = data.split_to(end.map_or(data.len(), |at| at + 1));
                    self.line.extend_from_slice(&line);
                    anyhow::ensure!(self.line.len() <= 4096, "an endless chunk header");
                    if end.is_none() {
                        continue;
                    }
                    let line = String::from_utf8_lossy(&self.line).into_owned();
                    self.line.clear();
                    let size = line.trim_end().split(';').next().unwrap_or_default();
                    self.state = match usize::from_str_radix(size, 16)
                        .with_context(|| format!("a chunk of size {size:?}"))?
                    {
                        0 => Chunk::Trailers,
                        size => Chunk::Data(size),
                    };
                }
            }
        }
        Ok(())
    }
}
