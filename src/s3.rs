//! The store that is S3: the only place that names rusoto.
//!
//! rusoto_s3 (unmaintained since 2022) gives typed requests and responses. `dispatch` sends them, and
//! decides which responses rusoto may parse.

mod call;
mod credentials;
mod deleting;
mod dispatch;
mod early;
mod endpoint;
mod exchange;
mod failure;
mod lifecycle;
mod listing;
mod objects;
mod outgoing;
mod page;
mod remote;
mod response;
mod sign;
mod sign_in;
mod timing;
mod tls;
mod uploads;
mod wire;

use std::future::Future;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::Result;
use async_trait::async_trait;
use futures::FutureExt;
use rusoto_core::{Region, RusotoError};
use rusoto_s3::S3Client;

use self::call::{Call, Expect, Failure};
use self::dispatch::Dispatcher;
use self::remote::Remote;
pub use self::timing::Timing;
use crate::config::S3Config;
use crate::progress::Progress;
use crate::retry::{RetryPolicy, Trouble};
use crate::store::{
    Connection, Kind, ObjectInfo, Page, Part, Response, Store, StoreError, StoreResult, Upload,
    UploadBody,
};

/// Connects to the bucket that `config` describes: in the background, where certificates and credentials
/// are loaded, too. What fails there fails again when the first request needs it. Sends nothing yet.
pub async fn connect(config: &S3Config, progress: Progress) -> Result<Arc<dyn Store>> {
    connect_with(config, progress, Timing::default()).await
}

/// As [`connect`], with other timeouts.
pub async fn connect_with(
    config: &S3Config,
    progress: Progress,
    timing: Timing,
) -> Result<Arc<dyn Store>> {
    let store = S3Store::new(config, progress, timing)?;
    let remote = Arc::clone(&store.remote);
    tokio::spawn(async move {
        let _ = tokio::join!(remote.wire(), remote.keyring.get());
    });
    Ok(Arc::new(store))
}

struct S3Store {
    remote: Arc<Remote>,
}

impl S3Store {
    fn new(config: &S3Config, progress: Progress, timing: Timing) -> Result<Self> {
        let remote = Arc::new(Remote::new(config, progress, timing)?);
        Ok(S3Store { remote })
    }

    fn bucket(&self) -> String {
        self.remote.bucket.clone()
    }

    /// Runs one operation through a rusoto client made for it. The client is cheap, and lets the call
    /// carry what rusoto's request has no field for.
    async fn run<T, E, F>(&self, call: Call, send: impl FnOnce(S3Client) -> F) -> StoreResult<T>
    where
        F: Future<Output = Result<T, RusotoError<E>>>,
    {
        let call = Arc::new(call);
        let dispatcher = Dispatcher {
            remote: self.remote.clone(),
            call: call.clone(),
        };
        let client = S3Client::new_with_client(
            rusoto_core::Client::new_not_signing(dispatcher),
            // Addressing and signing are the dispatcher's.
            Region::Custom {
                name: self.remote.region.clone(),
                endpoint: String::new(),
            },
        );
        // `dispatch` withholds what would make rusoto panic. If something slips through, one call fails.
        let why = match AssertUnwindSafe(send(client)).catch_unwind().await {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(RusotoError::ParseError(why))) => self.remote.secrets.outside(&why),
            Ok(Err(_)) => "rusoto does not take it".to_owned(),
            Err(_) => "rusoto panicked over it".to_owned(),
        };
        let unexpected = || Failure::unexpected(&self.remote, &why);
        Err(call
            .failure()
            .unwrap_or_else(|| unexpected().into_error(&self.remote, &call, None)))
    }

    /// The error for a response that lacks something.
    fn lacks(&self, doing: &'static str, key: Option<&str>, what: &str) -> StoreError {
        let call = Call::new(doing, key, Expect::Nothing);
        Failure::unexpected(&self.remote, what).into_error(&self.remote, &call, None)
    }

    /// Checks that a success without an ETag (Ceph RGW, rclone) left the object there.
    async fn confirm(&self, doing: &'static str, key: &str, size: u64) -> StoreResult<ObjectInfo> {
        match self.head(key).await? {
            Some(info) if info.size == size => Ok(info),
            Some(info) => {
                let found = info.size;
                let what = format!("success, but the object has {found} bytes instead of {size}");
                Err(self.lacks(doing, Some(key), &what))
            }
            None => Err(self.lacks(doing, Some(key), "success, but the object is not there")),
        }
    }

    /// Repeats `operation` while it reports success but the object is not as it should be.
    async fn confirmed<T, F>(&self, operation: impl Fn() -> F) -> StoreResult<T>
    where
        F: Future<Output = StoreResult<T>> + Send,
    {
        let mut tries = self.remote.retry.tries();
        loop {
            match operation().await {
                // An error with a status has been retried by the dispatcher.
                Err(e) if e.kind == Kind::Nonsense && e.status.is_none() => {
                    if !tries.again(Trouble::default(), &e.message).await {
                        return Err(e);
                    }
                }
                done => return done,
            }
        }
    }
}

#[async_trait]
impl Store for S3Store {
    async fn head(&self, key: &str) -> StoreResult<Option<ObjectInfo>> {
        self.head_object(key).await
    }

    async fn get(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        if_match: Option<&str>,
    ) -> StoreResult<Option<Response>> {
        self.get_object(key, range, if_match).await
    }

    async fn put(&self, key: &str, body: Arc<dyn UploadBody>) -> StoreResult<()> {
        self.confirmed(|| self.put_object(key, body.clone())).await
    }

    async fn touch(&self, key: &str, info: &ObjectInfo) -> StoreResult<bool> {
        self.confirmed(|| self.copy_onto_itself(key, info)).await
    }

    async fn copy(&self, from: (&str, &str), key: &str, info: &ObjectInfo) -> StoreResult<bool> {
        self.confirmed(|| self.copy_object(from, key, info)).await
    }

    async fn delete(&self, keys: &[String]) -> StoreResult<Vec<StoreResult<()>>> {
        self.delete_objects(keys).await
    }

    async fn delete_unchanged(
        &self,
        objects: &[(String, String)],
    ) -> StoreResult<Vec<StoreResult<()>>> {
        self.delete_unchanged_objects(objects).await
    }

    async fn lifecycle(&self) -> StoreResult<Option<String>> {
        self.get_lifecycle().await
    }

    async fn set_lifecycle(&self, xml: &str) -> StoreResult<()> {
        self.put_lifecycle(xml).await
    }

    async fn list(&self, prefix: &str, next: Option<&str>) -> StoreResult<Page> {
        self.list_objects(prefix, next, None).await
    }

    async fn list_after(&self, prefix: &str, after: &str) -> StoreResult<Page> {
        self.list_objects(prefix, None, Some(after)).await
    }

    async fn create_upload(&self, key: &str, touched: Option<&ObjectInfo>) -> StoreResult<String> {
        self.create_multipart(key, touched).await
    }

    async fn upload_part(
        &self,
        key: &str,
        upload: &str,
        number: u32,
        body: Arc<dyn UploadBody>,
    ) -> StoreResult<String> {
        self.send_part(key, upload, number, body).await
    }

    async fn copy_part(
        &self,
        from: Option<(&str, &str)>,
        key: &str,
        upload: &str,
        number: u32,
        range: Range<u64>,
        etag: Option<&str>,
    ) -> StoreResult<String> {
        self.send_copied_part(from, key, upload, number, range, etag)
            .await
    }

    async fn complete_upload(&self, key: &str, upload: &str, parts: &[Part]) -> StoreResult<()> {
        self.confirmed(|| self.complete_multipart(key, upload, parts))
            .await
    }

    async fn abort_upload(&self, key: &str, upload: &str) -> StoreResult<()> {
        self.abort_multipart(key, upload).await
    }

    async fn list_uploads(&self, prefix: &str) -> StoreResult<Vec<Upload>> {
        self.list_multiparts(prefix).await
    }

    async fn list_parts(&self, key: &str, upload: &str) -> StoreResult<Vec<Part>> {
        self.list_held_parts(key, upload).await
    }

    fn may_hold_unknown_upload(&self, key: &str) -> bool {
        self.remote.unanswered.lock().contains(key)
    }

    fn outside(&self, text: &str) -> String {
        self.remote.secrets.outside(text)
    }

    fn connection(&self) -> Connection {
        Connection {
            url: self.remote.endpoint.uri(None, ""),
            path_style: self.remote.endpoint.is_path_style(),
            credentials: self.remote.keyring.source(),
            clock_ahead: *self.remote.clock_ahead.lock(),
        }
    }

    fn requests(&self) -> u64 {
        self.remote.requests.load(Ordering::Relaxed)
    }

    fn retries(&self) -> &RetryPolicy {
        &self.remote.retry
    }
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
pub(crate) mod tests;
