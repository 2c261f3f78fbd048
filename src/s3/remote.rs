//! What all requests to a bucket share.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use aws_credential_types::Credentials;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use http::{HeaderMap, header};
use parking_lot::Mutex;
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};

use super::credentials::Keyring;
use super::endpoint::Endpoint;
use super::response::{self, Refusal};
use super::timing::Timing;
use super::tls::Trust;
use super::wire::Wire;
use crate::config::S3Config;
use crate::progress::Progress;
use crate::redact::Secrets;
use crate::retry::RetryPolicy;

/// Limit for a page of a listing. One of 1,000 keys has about 300 KiB.
pub(super) const LARGEST_LISTING: usize = 16 << 20;
/// Limit for any other response in memory: S3's have a few hundred bytes.
pub(super) const LARGEST_RESPONSE: usize = 64 << 10;
/// KiB of responses in memory at once: hundreds of small ones, or two of the largest pages.
const RESPONSES: u32 = 2 * (LARGEST_LISTING >> 10) as u32;

pub(super) struct Remote {
    pub(super) endpoint: Endpoint,
    pub(super) bucket: String,
    pub(super) region: String,
    pub(super) keyring: Keyring,
    pub(super) retry: RetryPolicy,
    pub(super) timing: Timing,
    /// Keys to which we may have started an upload whose id we never received.
    pub(super) unanswered: Mutex<BTreeSet<String>>,
    pub(super) requests: AtomicU64,
    /// Seconds by which the store's clock is ahead of ours.
    pub(super) clock_ahead: Mutex<Option<i64>>,
    /// Whether it may be sent: some users turn it off for Google Cloud Storage.
    pub(super) accept_encoding: bool,
    pub(super) progress: Progress,
    pub(super) secrets: Secrets,
    /// By status, why HEADs fail, if a GET could tell.
    pub(super) reasons: tokio::sync::Mutex<BTreeMap<u16, Option<Refusal>>>,
    /// Held while finding out whether the endpoint is S3.
    pub(super) finding_out: tokio::sync::Mutex<()>,
    /// The store refuses ETags in DeleteObjects.
    pub(super) plain_deletes: AtomicBool,
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
            move |text| reports.retry(text),
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
                timing,
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
            plain_deletes: AtomicBool::default(),
            trust,
            wire: OnceCell::new(),
            genuine: AtomicBool::new(false),
            warned: AtomicBool::new(false),
            memory: Arc::new(Semaphore::new(RESPONSES as usize)),
        })
    }

    /// The connections; made when the first request needs them.
    pub(super) async fn wire(&self) -> Result<&Wire> {
        let connect = || async {
            let wire = Wire::new(&self.endpoint, &self.trust, &self.timing)?;
            let secret = wire.proxy_secret.as_ref();
            if let Some(basic) = secret.and_then(|secret| secret.to_str().ok()) {
                let basic = basic.trim_start_matches("Basic ");
                self.secrets.add(basic);
                let decoded = BASE64.decode(basic).unwrap_or_default();
                if let Some((_, password)) = String::from_utf8_lossy(&decoded).split_once(':') {
                    self.secrets.add(password);
                }
            }
            Ok(wire)
        };
        self.wire.get_or_try_init(connect).await
    }

    /// Waits until a response of up to `most` bytes may be held in memory.
    pub(super) async fn room(&self, most: usize) -> Option<OwnedSemaphorePermit> {
        let kib = u32::try_from(most.div_ceil(1024)).unwrap_or(RESPONSES);
        let memory = Arc::clone(&self.memory);
        memory.acquire_many_owned(kib.min(RESPONSES)).await.ok()
    }

    /// Whether the endpoint has responded as only S3 does.
    pub(super) fn is_genuine(&self) -> bool {
        self.genuine.load(Ordering::Relaxed)
    }

    pub(super) fn note_genuine(&self) {
        self.genuine.store(true, Ordering::Relaxed);
    }

    pub(super) fn note_headers(&self, headers: &HeaderMap) {
        if response::is_evidence(headers) {
            self.note_genuine();
        }
        if let Some(date) = headers
            .get(header::DATE)
            .and_then(|date| date.to_str().ok())
            && let Ok(date) = httpdate::parse_http_date(date)
        {
            *self.clock_ahead.lock() = Some(seconds_ahead(date, SystemTime::now()));
        }
    }

    /// Warns, once, of a session token that anyone on the path can read.
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
