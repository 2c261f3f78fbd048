//! What we need from an object store. `s3/` is the one real implementation; tests wrap a store to make
//! its k-th call fail. Objects are read with [`read()`] or [`read_whole`], which resume.

mod read;

use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;

pub use self::read::{Expected, Object, read, read_whole};
use crate::cache::digest::Digest;
use crate::retry::RetryPolicy;

/// A body in flight: chunks, or the error that ended it.
pub type ByteStream = BoxStream<'static, std::io::Result<Bytes>>;

/// A body that can be sent again from its start when a try failed.
pub trait UploadBody: Send + Sync {
    /// Bytes of the whole body.
    fn len(&self) -> u64;
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The body's digest, if known: sent as x-amz-content-sha256, so that the store refuses other
    /// bytes.
    fn sha256(&self) -> Option<Digest>;
    /// A fresh stream over the whole body. An error that it yields is a local failure: the request
    /// is cut off before its last byte and not tried again.
    fn open(&self) -> ByteStream;
}

/// What a store says about an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Bytes of the whole object, even if only a range was asked for.
    pub size: u64,
    pub last_modified: Option<SystemTime>,
    pub etag: Option<String>,
    pub storage_class: Option<String>,
}

/// The response to a GET as it came: its body may break off, and be shorter or longer than announced.
pub struct Response {
    /// Bytes of the whole object. `None`: the response does not say (chunked encoding).
    pub size: Option<u64>,
    pub last_modified: Option<SystemTime>,
    pub etag: Option<String>,
    pub storage_class: Option<String>,
    pub body: ByteStream,
}

/// How a bucket is reached, as far as requests have shown so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    /// The bucket's URL.
    pub url: String,
    /// The bucket is in the path, not in the host name.
    pub path_style: bool,
    /// Where the credentials came from. `None`: no request needed them yet, or there are none.
    pub credentials: Option<String>,
    /// Seconds by which the store's clock is ahead of ours, to the second. `None`: no response had a
    /// Date.
    pub clock_ahead: Option<i64>,
}

/// One page of a listing, in key order.
#[derive(Debug, Clone, Default)]
pub struct Page {
    pub objects: Vec<(String, ObjectInfo)>,
    /// Pass to the next call; `None` on the last page.
    pub next: Option<String>,
}

/// A multipart upload that is under way or was abandoned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upload {
    /// The key of the object that it is to become.
    pub key: String,
    pub id: String,
    pub initiated: Option<SystemTime>,
}

/// A part of a multipart upload that the store holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// From 1.
    pub number: u32,
    pub size: u64,
    pub etag: String,
}

/// Kinds of failure that callers treat differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// 403, or credentials that are missing or refused.
    Denied,
    /// The bucket is not there.
    NoBucket,
    /// The endpoint is not S3.
    NotS3,
    /// 412: the object is no longer the one that If-Match named.
    Changed,
    /// 404 NoSuchUpload (some stores: 403).
    NoSuchUpload,
    /// The object disappeared during a read, or the source of a copy is missing.
    Missing,
    /// The object does not have the size that the reader expects.
    WrongSize { found: u64 },
    /// The store ignores Range.
    NoRanges,
    /// 501 or 405: the store does not do this operation.
    Unsupported,
    /// A transient failure that outlasted the retries.
    Unavailable,
    /// The body to send could not be read, or is damaged.
    LocalBody,
    /// A response that no store gives: a proxy's page, or one without a required part.
    Nonsense,
    /// Anything else: a refusal, or a request that cannot be sent.
    Other,
}

/// A failed operation on a store. Displays as one line: the cause, the object, and what to try. Never
/// contains a secret.
#[derive(Debug)]
pub struct StoreError {
    pub kind: Kind,
    /// HTTP status, if there was a response.
    pub status: Option<u16>,
    /// S3's error code, if there was one.
    pub code: Option<String>,
    pub message: String,
    /// The message says where on S3, by the address of the object or the bucket.
    pub located: bool,
}

impl StoreError {
    /// Whether the response was one that no store gives.
    pub fn is_nonsense(&self) -> bool {
        self.kind == Kind::Nonsense
    }

    /// Whether a store that does not know an element of the request's document answers like this.
    pub fn refuses_document(&self) -> bool {
        let code = self.code.as_deref().unwrap_or_default();
        self.kind == Kind::Unsupported
            || matches!(code, "MalformedXML" | "InvalidRequest" | "InvalidArgument")
    }
}

impl std::fmt::Display for StoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for StoreError {}

pub type StoreResult<T> = std::result::Result<T, StoreError>;

/// A bucket. Every call retries transient failures before it returns; a missing key is `None`.
#[async_trait]
pub trait Store: Send + Sync {
    /// HEAD.
    async fn head(&self, key: &str) -> StoreResult<Option<ObjectInfo>>;

    /// GET, whole or the bytes of `range`. With `if_match`, [`Kind::Changed`] if the object's ETag
    /// is another; [`Kind::NoRanges`] if the whole object came instead of `range`. Use [`read()`], which
    /// checks and resumes the body.
    async fn get(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        if_match: Option<&str>,
    ) -> StoreResult<Option<Response>>;

    /// PUT, whole.
    async fn put(&self, key: &str, body: Arc<dyn UploadBody>) -> StoreResult<()>;

    /// Copies the object onto itself with metadata `updated-at` replaced (so that its LastModified
    /// moves), keeping its storage class. One request; objects over 5 GiB need `copy_part`.
    /// `Ok(false)`: the object is not there any more.
    async fn touch(&self, key: &str, info: &ObjectInfo) -> StoreResult<bool>;

    /// Copies the object `from` (bucket and key, at the same endpoint) to `key`, if its ETag is still
    /// that of `info`, keeping its storage class. One request; objects over 5 GiB need parts.
    /// `Ok(false)`: the source is not there. [`Kind::Changed`]: it is another one.
    async fn copy(&self, from: (&str, &str), key: &str, info: &ObjectInfo) -> StoreResult<bool>;

    /// Deletes at most 1,000 objects; returns the result for each key, in order. A key that is not
    /// there is no error.
    async fn delete(&self, keys: &[String]) -> StoreResult<Vec<StoreResult<()>>>;

    /// Deletes at most 1,000 objects, each only if its ETag is still the one given, as far as the
    /// store can compare; returns the result for each key, in order. [`Kind::Changed`]: it is
    /// another object.
    async fn delete_unchanged(
        &self,
        objects: &[(String, String)],
    ) -> StoreResult<Vec<StoreResult<()>>>;

    /// The bucket's lifecycle rules: S3's XML, under `LifecycleConfiguration`. `None`: it has none.
    async fn lifecycle(&self) -> StoreResult<Option<String>>;

    /// Replaces all of the bucket's lifecycle rules.
    async fn set_lifecycle(&self, xml: &str) -> StoreResult<()>;

    /// One page, at most 1,000 keys, of those that begin with `prefix`; `next` is the last page's.
    async fn list(&self, prefix: &str, next: Option<&str>) -> StoreResult<Page>;

    /// As [`list`](Self::list), the first page of the keys that sort after `after`. Stores exist that
    /// ignore `after`.
    async fn list_after(&self, prefix: &str, after: &str) -> StoreResult<Page>;

    /// Starts a multipart upload. `touched`: of an object being refreshed by copying; its
    /// storage class is kept and metadata `updated-at` set.
    async fn create_upload(&self, key: &str, touched: Option<&ObjectInfo>) -> StoreResult<String>;

    /// Uploads part `number` (from 1); the part's ETag.
    async fn upload_part(
        &self,
        key: &str,
        upload: &str,
        number: u32,
        body: Arc<dyn UploadBody>,
    ) -> StoreResult<String>;

    /// Copies `range` of the object `from` (bucket and key, at the same endpoint; `None`: the object at
    /// `key`) into part `number` of an upload to `key`, if its ETag is still `etag`; the part's ETag.
    async fn copy_part(
        &self,
        from: Option<(&str, &str)>,
        key: &str,
        upload: &str,
        number: u32,
        range: Range<u64>,
        etag: Option<&str>,
    ) -> StoreResult<String>;

    /// Makes the parts, in order of number, the object.
    async fn complete_upload(&self, key: &str, upload: &str, parts: &[Part]) -> StoreResult<()>;

    /// Aborts a multipart upload. It is not an error if the upload is gone.
    async fn abort_upload(&self, key: &str, upload: &str) -> StoreResult<()>;

    /// Unfinished multipart uploads to keys that begin with `prefix`.
    async fn list_uploads(&self, prefix: &str) -> StoreResult<Vec<Upload>>;

    /// The parts that an unfinished upload holds, in order.
    async fn list_parts(&self, key: &str, upload: &str) -> StoreResult<Vec<Part>>;

    /// Whether we may have started a multipart upload to `key` but never received its id, because the
    /// response to a [`create_upload`](Self::create_upload) was lost and the next try answered.
    fn may_hold_unknown_upload(&self, key: &str) -> bool;

    /// Text from outside made fit for a message: no secrets, one line, limited length.
    fn outside(&self, text: &str) -> String;

    /// How the bucket is reached.
    fn connection(&self) -> Connection;

    /// Requests sent so far, retries included.
    fn requests(&self) -> u64;

    /// Decides whether a body that broke off is asked for again.
    fn retries(&self) -> &RetryPolicy;
}
