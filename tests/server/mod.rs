//! An S3 server inside the process, for tests, the demonstration and benchmarks.
//!
//! `s3s` speaks the protocol and verifies every signature and payload hash; [`operations`] answers as
//! strictly as S3 from the objects in [`store`]; [`fault`] is what a test can make go wrong on the
//! wire. The server has its own runtime, so both a plain test that runs the real program and an async
//! test can use it.

#![allow(dead_code, unused_imports)] // Several binaries include this file; none uses all of it.

mod access;
mod answer;
pub mod authority;
mod connection;
mod fault;
mod log;
mod operations;
mod store;

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use s3s::service::S3ServiceBuilder;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use access::{Access, Hosts, Keys};
use answer::{Shared, When};
pub use authority::Authority;
pub use fault::Fault;
pub use log::{Logged, round_trips};
use store::{AtHand, Limits};
pub use store::{Store, Stored};

/// May do everything.
pub const ACCESS_KEY: &str = "AKIALAYERCACHETEST01";
/// Distinctive, so that a test can search outputs for it, with characters that need escaping somewhere.
pub const SECRET_KEY: &str = "leaked+secret/of/the/TestServer+0123456789";
/// May only read: everything else is 403 AccessDenied.
pub const READER_ACCESS_KEY: &str = "AKIALAYERCACHEREAD02";
pub const READER_SECRET_KEY: &str = "leaked+secret/of/the/TestReader+0123456789";
/// May do everything, but only with [`SESSION_TOKEN`].
pub const SESSION_ACCESS_KEY: &str = "ASIALAYERCACHETEMP03";
pub const SESSION_SECRET_KEY: &str = "leaked+secret/of/the/TestGuest+0123456789A";
pub const SESSION_TOKEN: &str = "leaked/session+token/of/the/TestServer==";
/// The bucket that methods without a bucket mean. [`OTHER_BUCKET`] exists as well.
pub const BUCKET: &str = "cache";
pub const OTHER_BUCKET: &str = "other";

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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Settings of a server that is to be started.
#[derive(Clone, Default)]
pub struct Builder {
    limits: Limits,
    delay: Duration,
    rate: u64,
    tls: Option<TlsAcceptor>,
    access: Access,
    buckets: Vec<String>,
    at_hand: Option<AtHand>,
}

impl Builder {
    /// At most this many entries on a page of a listing.
    pub fn page_size(mut self, entries: usize) -> Self {
        self.limits.page_size = entries;
        self
    }

    /// Listings come in descending order, against S3's promise.
    pub fn lists_in_reverse(mut self) -> Self {
        self.limits.lists_in_reverse = true;
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

    /// GET answers with the whole object and 200, whatever range was asked for.
    pub fn ignore_range(mut self) -> Self {
        self.limits.ignore_range = true;
        self
    }

    /// Listings begin at the start, whatever key they are to begin after.
    pub fn ignore_start_after(mut self) -> Self {
        self.limits.ignore_start_after = true;
        self
    }

    /// A missing key is 403 instead of 404, as on S3 without the permission to list.
    pub fn hide_missing(mut self) -> Self {
        self.limits.hide_missing = true;
        self
    }

    /// A copy onto itself leaves LastModified as it was.
    pub fn stale_copies(mut self) -> Self {
        self.limits.stale_copies = true;
        self
    }

    /// Deleting a key that starts with `prefix` is AccessDenied: the whole answer of DeleteObject, one
    /// `<Error>` in that of DeleteObjects.
    pub fn undeletable(mut self, prefix: &str) -> Self {
        self.limits.undeletable.push(prefix.to_owned());
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

    /// An operation, by S3's name for it, always gets this error.
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

    /// Every request waits this long before it is performed.
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// Each connection carries at most this many bytes a second in each direction.
    pub fn rate(mut self, bytes_per_second: u64) -> Self {
        self.rate = bytes_per_second;
        self
    }

    /// Speaks TLS, with a certificate of `authority` for 127.0.0.1, localhost and `*.s3.localhost`.
    pub fn tls(mut self, authority: &Authority) -> Self {
        let names = ["127.0.0.1", "localhost", "s3.localhost", "*.s3.localhost"];
        self.tls = Some(authority.acceptor(&names));
        self
    }

    /// One more bucket.
    pub fn bucket(mut self, name: &str) -> Self {
        self.buckets.push(name.to_owned());
        self
    }

    /// For benchmarks, where the server must not be the bottleneck: no signature or checksum is
    /// verified, no MD5 computed, and a blob out of `blobs` (by the hex digits of its digest) is
    /// counted when it is sent, but not kept.
    pub fn unverified(mut self, blobs: HashMap<String, Bytes>) -> Self {
        self.at_hand = Some(AtHand::new(blobs));
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

        let buckets = [BUCKET, OTHER_BUCKET]
            .into_iter()
            .chain(self.buckets.iter().map(String::as_str));
        let verified = self.at_hand.is_none();
        let clock_ahead = self.access.clock_ahead;
        let store = Store::new(buckets, self.limits, self.at_hand);
        let mut service = S3ServiceBuilder::new(store.clone());
        service.set_host(Hosts);
        if verified {
            service.set_auth(Keys);
            service.set_access(self.access);
        }
        let mut shared = Shared::new(store, service.build(), port);
        shared.clock_ahead = clock_ahead;
        (shared.delay, shared.rate, shared.tls) = (self.delay, self.rate, self.tls);
        let shared = Arc::new(shared);
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        if verified {
            runtime.worker_threads(2);
        }
        let runtime = runtime
            .thread_name("s3-test-server")
            .enable_all()
            .build()
            .expect("a runtime for the test server");
        let accepting = Arc::clone(&shared);
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("hand the listener to tokio");
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        accepting.log.connected();
                        tokio::spawn(answer::serve(Arc::clone(&accepting), stream));
                    }
                    // Out of file descriptors, most likely.
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        });
        Server {
            shared,
            runtime: Some(runtime),
        }
    }
}

/// A running server. Dropping it stops listening and ends every connection. Its objects are those of
/// its [`Store`].
pub struct Server {
    shared: Arc<Shared>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Deref for Server {
    type Target = Store;

    fn deref(&self) -> &Store {
        &self.shared.store
    }
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

    fn scheme(&self) -> &'static str {
        match self.shared.tls {
            Some(_) => "https",
            None => "http",
        }
    }

    /// For path style: `http://127.0.0.1:PORT`, or https if the server speaks TLS.
    pub fn url(&self) -> String {
        format!("{}://127.0.0.1:{}", self.scheme(), self.shared.port)
    }

    /// For virtual-hosted style: `http://localhost:PORT`; a bucket's is `http://BUCKET.localhost:PORT`.
    pub fn localhost_url(&self) -> String {
        format!("{}://localhost:{}", self.scheme(), self.shared.port)
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

    /// [`Server::spec`] without keys.
    pub fn keyless_spec(&self, extra: &str) -> String {
        let place = format!("endpoint_url={},use_path_style=true", self.url());
        spec(&[&place, extra])
    }

    /// Every request since the start or the last [`Server::clear_log`], in the order they came.
    pub fn log(&self) -> Vec<Logged> {
        self.shared.log.requests()
    }

    /// How many requests of an operation the log holds.
    pub fn count(&self, operation: &str) -> usize {
        self.shared.log.count(operation)
    }

    /// Forgets the log, the peak and the number of connections.
    pub fn clear_log(&self) {
        self.shared.log.clear();
    }

    /// The most requests that were in flight at one time.
    pub fn peak_in_flight(&self) -> usize {
        self.shared.log.peak_in_flight()
    }

    /// How many connections were accepted.
    pub fn connections(&self) -> usize {
        self.shared.log.connections()
    }

    /// Waits until no request is in flight, including those that a client gave up.
    ///
    /// # Panics
    /// If that takes more than half a minute.
    pub fn settle(&self) {
        for _ in 0..30_000 {
            if self.shared.log.is_settled() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("the test server is still answering requests");
    }

    /// Forgets every object, upload, lifecycle rule, fault and hook, and the log.
    pub fn clear(&self) {
        self.settle();
        self.reset_faults();
        self.shared.clear_hooks();
        self.forget_all();
        self.clear_log();
    }

    /// Sets the rule that says which requests go wrong, in place of any before it.
    pub fn fail(&self, rule: impl Fn(&Asked) -> Option<Fault> + Send + Sync + 'static) {
        self.shared.set_rule(Some(Arc::new(rule)));
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
        self.shared.set_rule(None);
    }

    /// Runs `act` once, right before the `nth` request (from 0) that `matches` is performed: another
    /// client's change at the worst moment.
    pub fn before(
        &self,
        nth: usize,
        matches: impl Fn(&Logged) -> bool + Send + 'static,
        act: impl FnOnce(&Store) + Send + 'static,
    ) {
        self.shared.add_hook(When::Before, nth, matches, act);
    }

    /// Runs `act` once, after the `nth` request (from 0) that `matches` was performed and before it is
    /// answered.
    pub fn after(
        &self,
        nth: usize,
        matches: impl Fn(&Logged) -> bool + Send + 'static,
        act: impl FnOnce(&Store) + Send + 'static,
    ) {
        self.shared.add_hook(When::After, nth, matches, act);
    }

    /// Calls `watcher` after each request was performed and before it is answered.
    pub fn watch(&self, watcher: impl Fn(&Logged, &Store) + Send + Sync + 'static) {
        self.shared.set_watcher(Arc::new(watcher));
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
