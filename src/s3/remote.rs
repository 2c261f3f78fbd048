//! The bucket as requests see it: what all of them share.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use aws_credential_types::Credentials;
use http::{HeaderMap, header};
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};

use super::answer::{self, Refusal};
use super::credentials::Keyring;
use super::endpoint::Endpoint;
use super::timing::Timing;
use super::tls::Trust;
use super::wire::Wire;
use crate::config::S3Config;
use crate::progress::Progress;
use crate::redact::Secrets;
use crate::retry::RetryPolicy;

/// A page of a listing is no longer than this. One of 1,000 keys is some 300 KiB.
pub(super) const LARGEST_LISTING: usize = 16 << 20;
/// Nor is any other answer in memory longer than this: S3's have a few hundred bytes.
pub(super) const LARGEST_ANSWER: usize = 64 << 10;
/// KiB of answers in memory at once: hundreds of small ones, or two pages of the largest kind.
const ANSWERS: u32 = 2 * (LARGEST_LISTING >> 10) as u32;

pub(super) struct Remote {
    pub(super) endpoint: Endpoint,
    pub(super) bucket: String,
    pub(super) region: String,
    pub(super) keyring: Keyring,
    pub(super) retry: RetryPolicy,
    pub(super) timing: Timing,
    /// Keys at which a multipart upload may have begun that we got no answer about.
    pub(super) unanswered: Mutex<BTreeSet<String>>,
    pub(super) requests: AtomicU64,
    /// Seconds by which the store's clock is ahead of ours.
    pub(super) clock_ahead: Mutex<Option<i64>>,
    /// Off for Google Cloud Storage's sake.
    pub(super) accept_encoding: bool,
    pub(super) progress: Progress,
    pub(super) secrets: Secrets,
    /// Why HEADs fail with a status, as far as a GET could tell.
    pub(super) reasons: tokio::sync::Mutex<BTreeMap<u16, Option<Refusal>>>,
    /// Held while it is found out whether the endpoint is S3.
    pub(super) finding_out: tokio::sync::Mutex<()>,
    trust: Trust,
    wire: OnceCell<Wire>,
    genuine: AtomicBool,
    warned: AtomicBool,
    memory: Arc<Semaphore>,
}

impl Remote {
    pub(super) fn new(config: &S3Config, progress: Progress, timing: Timing) -> Result<Self> {
        let reports = progress.clone();
        let retry = RetryPolicy::new(
            config.retry_mode,
            config.retry_max_attempts,
            timing.backoff,
            move |text| reports.note(text),
        );
        let trust = Trust::new(config.ca_bundle.as_deref().map(PathBuf::from));
        let secrets = Secrets::default();
        let endpoint = Endpoint::new(config)
            .with_context(|| format!("cannot reach bucket {:?}", config.bucket))?;
        Ok(Remote {
            keyring: Keyring::new(
                config.credentials.as_ref(),
                &config.region,
                trust.clone(),
                secrets.clone(),
            ),
            endpoint,
            bucket: config.bucket.clone(),
            region: config.region.clone(),
            retry,
            timing,
            unanswered: Mutex::default(),
            requests: AtomicU64::new(0),
            clock_ahead: Mutex::default(),
            accept_encoding: !config.disable_accept_encoding,
            progress,
            secrets,
            reasons: tokio::sync::Mutex::default(),
            finding_out: tokio::sync::Mutex::default(),
            trust,
            wire: OnceCell::new(),
            genuine: AtomicBool::new(false),
            warned: AtomicBool::new(false),
            memory: Arc::new(Semaphore::new(ANSWERS as usize)),
        })
    }

    /// The connections; made when the first request needs them.
    pub(super) async fn wire(&self) -> Result<&Wire> {
        self.wire
            .get_or_try_init(|| async { Wire::new(&self.endpoint, &self.trust, &self.timing) })
            .await
    }

    /// Waits until an answer of up to `most` bytes may be held in memory.
    pub(super) async fn room(&self, most: usize) -> Option<OwnedSemaphorePermit> {
        let kib = u32::try_from(most.div_ceil(1024)).unwrap_or(ANSWERS);
        let memory = Arc::clone(&self.memory);
        memory.acquire_many_owned(kib.min(ANSWERS)).await.ok()
    }

    /// Whether the endpoint has answered as only S3 does.
    pub(super) fn is_genuine(&self) -> bool {
        self.genuine.load(Ordering::Relaxed)
    }

    pub(super) fn note_genuine(&self) {
        self.genuine.store(true, Ordering::Relaxed);
    }

    pub(super) fn note_headers(&self, headers: &HeaderMap) {
        if answer::is_evidence(headers) {
            self.note_genuine();
        }
        if let Some(date) = headers.get(header::DATE).and_then(|date| date.to_str().ok())
            && let Ok(date) = httpdate::parse_http_date(date)
        {
            *lock(&self.clock_ahead) = Some(seconds_ahead(date, SystemTime::now()));
        }
    }

    /// A session token that anyone on the way can read is worth a warning, once.
    pub(super) fn warn_of_open_token(&self, credentials: &Credentials) {
        if credentials.session_token().is_some()
            && !self.endpoint.is_https()
            && !self.endpoint.is_loopback()
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            self.progress.warn(&format!(
                "the session token is sent to {} over plain http, readable by anyone on the path: use https",
                self.endpoint.authority()
            ));
        }
    }
}

/// Seconds, rounded, from `here` to `there`, which the Date header has rounded down.
fn seconds_ahead(there: SystemTime, here: SystemTime) -> i64 {
    let there = there + Duration::from_millis(500);
    let ahead = match there.duration_since(here) {
        Ok(ahead) => ahead.as_secs_f64(),
        Err(behind) => -behind.duration().as_secs_f64(),
    };
    ahead.round() as i64
}

/// A panic elsewhere leaves no half-done state in these locks.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
