//! What the server holds, and how a test reads and changes it without a request.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use md5::{Digest as _, Md5};
use s3s::dto::LifecycleRule;
use s3s::{S3Result, s3_error};

use super::{BUCKET, lock};

/// One object.
#[derive(Clone, Debug)]
pub struct Stored {
    pub body: Bytes,
    /// Without its quotes.
    pub etag: String,
    pub modified: SystemTime,
    pub metadata: BTreeMap<String, String>,
    pub content_type: Option<String>,
    /// `None` is STANDARD, which S3 does not name in its answers.
    pub storage_class: Option<String>,
}

impl Stored {
    /// An object as PutObject would make it now.
    pub fn new(body: Bytes) -> Self {
        Self::with_etag(hex_md5(&body), body)
    }

    pub fn with_etag(etag: String, body: Bytes) -> Self {
        Self {
            body,
            etag,
            modified: SystemTime::now(),
            metadata: BTreeMap::new(),
            content_type: None,
            storage_class: None,
        }
    }

    pub fn size(&self) -> u64 {
        self.body.len() as u64
    }
}

pub struct PartBody {
    pub body: Bytes,
    pub etag: String,
    pub modified: SystemTime,
}

/// An unfinished multipart upload.
pub struct Upload {
    pub bucket: String,
    pub key: String,
    pub initiated: SystemTime,
    pub metadata: BTreeMap<String, String>,
    pub content_type: Option<String>,
    pub storage_class: Option<String>,
    pub parts: BTreeMap<i32, PartBody>,
}

/// What this store allows: S3's own limits unless a test makes them small.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most entries on a page of any listing.
    pub page_size: usize,
    /// Largest object CopyObject takes and largest range UploadPartCopy takes, in bytes.
    pub copy_limit: u64,
    /// Largest body of one PutObject or UploadPart, in bytes.
    pub put_limit: u64,
    /// Smallest part but the last, in bytes.
    pub min_part: u64,
    /// GET answers with the whole object whatever range was asked for.
    pub ignore_range: bool,
    /// Listings begin at the start whatever key they are to begin after.
    pub ignore_start_after: bool,
    /// Listings come in descending order.
    pub lists_in_reverse: bool,
    /// A missing key is 403, as on S3 without the permission to list.
    pub hide_missing: bool,
    /// A copy onto itself leaves LastModified as it was, as MinIO once did.
    pub stale_copies: bool,
    /// Deleting a key that starts with one of these is AccessDenied.
    pub undeletable: Vec<String>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            page_size: 1000,
            copy_limit: 5 << 30,
            put_limit: 5 << 30,
            min_part: 5 << 20,
            ignore_range: false,
            ignore_start_after: false,
            lists_in_reverse: false,
            hide_missing: false,
            stale_copies: false,
            undeletable: Vec::new(),
        }
    }
}

#[derive(Default)]
pub struct State {
    pub buckets: BTreeMap<String, BTreeMap<String, Stored>>,
    pub uploads: BTreeMap<String, Upload>,
    pub uploads_begun: u64,
    pub lifecycles: BTreeMap<String, Vec<LifecycleRule>>,
}

impl State {
    pub fn bucket(&self, name: &str) -> S3Result<&BTreeMap<String, Stored>> {
        self.buckets
            .get(name)
            .ok_or_else(|| s3_error!(NoSuchBucket))
    }

    pub fn bucket_mut(&mut self, name: &str) -> S3Result<&mut BTreeMap<String, Stored>> {
        self.buckets
            .get_mut(name)
            .ok_or_else(|| s3_error!(NoSuchBucket))
    }

    pub fn upload(&mut self, bucket: &str, key: &str, id: &str) -> S3Result<&mut Upload> {
        self.bucket(bucket)?;
        self.uploads
            .get_mut(id)
            .filter(|upload| upload.bucket == bucket && upload.key == key)
            .ok_or_else(|| s3_error!(NoSuchUpload))
    }
}

/// The store behind the server; clones share their objects. Where a method names no bucket, it means
/// [`BUCKET`].
#[derive(Clone)]
pub struct Store {
    state: Arc<Mutex<State>>,
    pub limits: Limits,
    /// Set in a server for benchmarks.
    pub at_hand: Option<AtHand>,
}

impl Store {
    pub fn new<'a>(
        buckets: impl IntoIterator<Item = &'a str>,
        limits: Limits,
        at_hand: Option<AtHand>,
    ) -> Self {
        let mut state = State::default();
        for bucket in buckets {
            state.buckets.insert(bucket.to_owned(), BTreeMap::new());
        }
        Self {
            state: Arc::new(Mutex::new(state)),
            limits,
            at_hand,
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The objects by their keys.
    pub fn objects(&self) -> BTreeMap<String, Bytes> {
        self.objects_in(BUCKET)
    }

    pub fn objects_in(&self, bucket: &str) -> BTreeMap<String, Bytes> {
        let state = self.lock();
        let objects = state.buckets.get(bucket).into_iter().flatten();
        objects
            .map(|(key, object)| (key.clone(), object.body.clone()))
            .collect()
    }

    /// The keys in order.
    pub fn keys(&self) -> Vec<String> {
        self.objects().into_keys().collect()
    }

    pub fn object(&self, key: &str) -> Option<Stored> {
        self.lock().buckets.get(BUCKET)?.get(key).cloned()
    }

    pub fn put(&self, key: &str, body: impl Into<Bytes>) {
        self.put_in(BUCKET, key, body);
    }

    pub fn put_in(&self, bucket: &str, key: &str, body: impl Into<Bytes>) {
        self.insert(bucket, key, Stored::new(body.into()));
    }

    pub fn insert(&self, bucket: &str, key: &str, object: Stored) {
        let mut state = self.lock();
        let objects = state.buckets.entry(bucket.to_owned()).or_default();
        objects.insert(key.to_owned(), object);
    }

    /// Changes an object in place: its metadata, storage class, body, …
    ///
    /// # Panics
    /// If there is no such object.
    pub fn change(&self, key: &str, change: impl FnOnce(&mut Stored)) {
        let mut state = self.lock();
        let object = state
            .buckets
            .get_mut(BUCKET)
            .and_then(|bucket| bucket.get_mut(key));
        change(object.unwrap_or_else(|| panic!("the test server holds no object {key}")));
    }

    /// Removes an object; says whether it was there.
    pub fn remove(&self, key: &str) -> bool {
        let mut state = self.lock();
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

    /// Moves every object this far into the past.
    pub fn age_all(&self, by: Duration) {
        let mut state = self.lock();
        for object in state
            .buckets
            .entry(BUCKET.to_owned())
            .or_default()
            .values_mut()
        {
            object.modified -= by;
        }
    }

    pub fn last_modified(&self, key: &str) -> Option<SystemTime> {
        self.object(key).map(|object| object.modified)
    }

    /// How many multipart uploads were begun and neither completed nor aborted.
    pub fn uploads(&self) -> usize {
        self.lock().uploads.len()
    }

    /// Moves the start of every unfinished multipart upload this far into the past.
    pub fn age_uploads(&self, by: Duration) {
        for upload in self.lock().uploads.values_mut() {
            upload.initiated -= by;
        }
    }

    /// The lifecycle rules of the bucket; empty if it has none.
    pub fn lifecycle(&self) -> Vec<LifecycleRule> {
        let state = self.lock();
        state.lifecycles.get(BUCKET).cloned().unwrap_or_default()
    }

    pub fn set_lifecycle(&self, rules: Vec<LifecycleRule>) {
        self.lock().lifecycles.insert(BUCKET.to_owned(), rules);
    }

    /// Forgets the objects and unfinished uploads of a bucket, but not the bucket.
    pub fn empty(&self, bucket: &str) {
        let mut state = self.lock();
        state.uploads.retain(|_, upload| upload.bucket != bucket);
        state.buckets.entry(bucket.to_owned()).or_default().clear();
    }

    /// Forgets everything but the names of the buckets.
    pub fn forget_all(&self) {
        let mut state = self.lock();
        state.uploads.clear();
        state.lifecycles.clear();
        state.buckets.values_mut().for_each(BTreeMap::clear);
    }

    /// The ETag of an object or part with this body.
    pub fn etag(&self, body: &[u8]) -> String {
        match &self.at_hand {
            Some(at_hand) => at_hand.etag(),
            None => hex_md5(body),
        }
    }

    /// The object that `parts`, in their order, make under `key`: its body and its ETag.
    pub fn joined(&self, key: &str, parts: &[&PartBody]) -> (Bytes, String) {
        let length = parts.iter().map(|part| part.body.len()).sum();
        if let Some(at_hand) = &self.at_hand
            && let Some(body) = at_hand.blob(key)
            && body.len() == length
        {
            return (body.clone(), at_hand.etag());
        }
        let mut body = BytesMut::with_capacity(length);
        let mut digests = Md5::new();
        for part in parts {
            body.extend_from_slice(&part.body);
            digests.update(hex::decode(&part.etag).unwrap_or_default());
        }
        let etag = format!("{}-{}", hex::encode(digests.finalize()), parts.len());
        (body.freeze(), etag)
    }
}

pub fn hex_md5(body: &[u8]) -> String {
    hex::encode(Md5::digest(body))
}

/// The blobs that a server for benchmarks already has: it counts what it is sent of them and serves
/// its own copy.
#[derive(Clone, Debug)]
pub struct AtHand {
    /// By the hex digits of their digests.
    blobs: Arc<HashMap<String, Bytes>>,
    etags: Arc<AtomicU64>,
}

impl AtHand {
    pub fn new(blobs: HashMap<String, Bytes>) -> Self {
        Self {
            blobs: Arc::new(blobs),
            etags: Arc::default(),
        }
    }

    pub fn blobs(&self) -> &HashMap<String, Bytes> {
        &self.blobs
    }

    /// The blob that `key` names in its last segment, as `sha256:HEX` or `HEX`.
    pub fn blob(&self, key: &str) -> Option<&Bytes> {
        let name = key.rsplit('/').next().unwrap_or(key);
        self.blobs.get(name.strip_prefix("sha256:").unwrap_or(name))
    }

    /// Never the content's MD5, which would have to be computed: it has the form of a multipart
    /// upload's ETag, which clients know to be none.
    pub fn etag(&self) -> String {
        let serial = self.etags.fetch_add(1, Ordering::Relaxed);
        format!("{serial:032x}-1")
    }
}
