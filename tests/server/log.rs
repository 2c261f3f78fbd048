//! Every request, as it came and as it was answered.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use http::HeaderMap;

use super::lock;

/// One request.
#[derive(Clone, Debug)]
pub struct Logged {
    pub method: String,
    /// S3's name for it: `PutObject`, `UploadPartCopy`, …; `Unknown` if it has none.
    pub operation: &'static str,
    pub bucket: String,
    /// Empty for a request on the bucket.
    pub key: String,
    /// As sent, without the `?`.
    pub query: String,
    pub headers: HeaderMap,
    /// Bytes read of the request's body.
    pub body_len: u64,
    /// 0 if the request was not answered (yet).
    pub status: u16,
    pub began: Instant,
    /// When the last byte of the answer was handed to the connection.
    pub ended: Option<Instant>,
}

/// The log of a server, and its counters.
#[derive(Default)]
pub struct Log {
    requests: Mutex<BTreeMap<usize, Logged>>,
    next: AtomicUsize,
    in_flight: AtomicUsize,
    /// Of those in flight, the requests that will never be answered.
    hung: AtomicUsize,
    peak: AtomicUsize,
    connections: AtomicUsize,
}

impl Log {
    /// Adds a request, which counts as in flight until the result is dropped.
    pub fn begin(self: &Arc<Self>, logged: Logged) -> InFlight {
        let now = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        self.peak.fetch_max(now, Ordering::SeqCst);
        let id = self.next.fetch_add(1, Ordering::SeqCst) + 1;
        lock(&self.requests).insert(id, logged);
        InFlight {
            log: Arc::clone(self),
            id,
            hung: false,
        }
    }

    pub fn requests(&self) -> Vec<Logged> {
        lock(&self.requests).values().cloned().collect()
    }

    pub fn count(&self, operation: &str) -> usize {
        lock(&self.requests)
            .values()
            .filter(|logged| logged.operation == operation)
            .count()
    }

    pub fn connected(&self) {
        self.connections.fetch_add(1, Ordering::SeqCst);
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    pub fn peak_in_flight(&self) -> usize {
        self.peak.load(Ordering::SeqCst)
    }

    /// Whether every request has been answered or never will be.
    pub fn is_settled(&self) -> bool {
        let hung = self.hung.load(Ordering::SeqCst);
        self.in_flight.load(Ordering::SeqCst) <= hung
    }

    pub fn clear(&self) {
        lock(&self.requests).clear();
        let now = self.in_flight.load(Ordering::SeqCst);
        self.peak.store(now, Ordering::SeqCst);
        self.connections.store(0, Ordering::SeqCst);
    }
}

/// A request in flight.
pub struct InFlight {
    log: Arc<Log>,
    id: usize,
    hung: bool,
}

impl InFlight {
    /// The request's number, counted from 1.
    pub fn id(&self) -> usize {
        self.id
    }

    pub fn note(&self, change: impl FnOnce(&mut Logged)) {
        if let Some(logged) = lock(&self.log.requests).get_mut(&self.id) {
            change(logged);
        }
    }

    /// The request will never be answered.
    pub fn hang(&mut self) {
        self.hung = true;
        self.log.hung.fetch_add(1, Ordering::SeqCst);
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.note(|logged| logged.ended = Some(Instant::now()));
        self.log.in_flight.fetch_sub(1, Ordering::SeqCst);
        if self.hung {
            self.log.hung.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// The longest chain of requests that each began after the one before had been answered: what the
/// client paid in round trips, however many requests it sent.
pub fn round_trips(log: &[Logged]) -> usize {
    // At the same instant an end comes before a beginning.
    let mut events: Vec<(Instant, bool, usize)> = Vec::new();
    for (at, logged) in log.iter().enumerate() {
        events.push((logged.began, true, at));
        events.extend(logged.ended.map(|ended| (ended, false, at)));
    }
    events.sort();
    let mut depth = vec![0; log.len()];
    let mut chain = 0;
    for (_, begins, at) in events {
        if begins {
            depth[at] = chain + 1;
        } else {
            chain = chain.max(depth[at]);
        }
    }
    chain
}
