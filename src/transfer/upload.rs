//! One blob's way from the layout to the store: whole or in parts, read once, hashed while it is
//! read, and made visible only if what was read is what its digest says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use futures::stream::{FuturesUnordered, StreamExt};
use md5::{Digest as _, Md5};
use tokio::sync::{Notify, mpsc};

use crate::cache::digest::Digest;
use crate::layout::Layout;
use crate::progress::{Blob, Progress, Verb};
use crate::store::{ByteStream, Kind, ObjectInfo, Part, Store, StoreError, Upload, UploadBody};
use crate::transfer::buffers::{BUFFER, Buffers};
use crate::transfer::hashing::{Feed, Hasher, Hashing, read_into};

/// A multipart upload so old is nobody's any more.
const FORSAKEN: Duration = Duration::from_secs(24 * 60 * 60);

/// Nor is one that holds no part after so long.
const NEVER_BEGUN: Duration = Duration::from_secs(60 * 60);

/// Unfinished uploads of one blob that are looked into. There are rarely two.
const LOOKED_INTO: usize = 16;

/// How often an upload starts over when another run took its multipart upload away.
const RESTARTS: u32 = 5;

/// Sizes at which a transfer changes its ways. Those that suit S3 unless a test asks for others.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Blobs of at least this many bytes go up in parts.
    pub multipart: u64,
    /// Bytes of a part: at least this.
    pub part: u64,
    /// Objects over this many bytes cannot be copied by one CopyObject.
    pub copy: u64,
    /// Bytes of a part that is copied.
    pub copy_part: u64,
    /// Bytes of a piece. One stream from S3 runs at 85 to 95 MiB/s whatever the line can carry, so
    /// a large blob is fetched in several at once; a piece is held in memory until its turn has come.
    pub piece: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            multipart: 32 << 20,
            // Not the 5 MiB of other clients, BuildKit's among them: by their parts' size, uploads of ours
            // are told from theirs.
            part: (5 << 20) + BUFFER,
            copy: 5 << 30,
            copy_part: 512 << 20,
            piece: 2 << 20,
        }
    }
}

impl Limits {
    /// Bytes of a part of a blob of `size`: equal parts (R2 insists), no more than 10,000; up to
    /// 8 MiB rather than over 1,000 (Scaleway's limit).
    fn part_size(&self, size: u64) -> u64 {
        let wanted = size.div_ceil(1_000).min(8 << 20);
        let wanted = wanted.max(size.div_ceil(10_000));
        if wanted <= self.part {
            return self.part;
        }
        wanted.next_multiple_of(BUFFER)
    }

    /// Bytes of a part of a blob of `size` that is copied.
    fn copy_part_size(&self, size: u64) -> u64 {
        self.copy_part.max(size.div_ceil(10_000))
    }
}

/// Whether `parts` are some of those that a blob of `size` is cut into by `part` bytes.
fn cut_by(part: u64, size: u64, parts: &[Part]) -> bool {
    let last = size.div_ceil(part).max(1);
    let one_of_them = |found: &Part| match u64::from(found.number) {
        number if number < last => found.size == part,
        number if number == last => found.size == size - (last - 1) * part,
        _ => false,
    };
    !parts.is_empty() && parts.iter().all(one_of_them)
}

/// Cuts `size` bytes into ranges of `part`, the last one shorter. Half open: nothing here runs one
/// byte past the end, as BuildKit's own arithmetic does.
pub fn ranges(size: u64, part: u64) -> impl ExactSizeIterator<Item = Range<u64>> {
    let count = usize::try_from(size.div_ceil(part)).unwrap_or(usize::MAX);
    (0..count).map(move |index| {
        let start = index as u64 * part;
        start..size.min(start.saturating_add(part))
    })
}

/// Uploads, refreshes, and what must be given up if they do not end well.
pub struct Uploader {
    store: Arc<dyn Store>,
    layout: Layout,
    buffers: Buffers,
    hashing: Hashing,
    progress: Progress,
    limits: Limits,
    unfinished: Arc<Unfinished>,
}

/// The multipart uploads that are neither completed nor aborted.
#[derive(Default)]
struct Unfinished {
    uploads: Mutex<Vec<(String, String)>>,
    /// Uploads whose creation was asked for and not yet answered.
    creating: AtomicUsize,
    created: Notify,
    /// By key, while we work on it: the uploads that were there before ours.
    before: Mutex<BTreeMap<String, Vec<String>>>,
    /// Keys at which an upload of ours may have begun whose id we were never told.
    unknown: Mutex<BTreeSet<String>>,
}

impl Unfinished {
    fn add(&self, key: &str, upload: &str) {
        let mut uploads = lock(&self.uploads);
        uploads.push((key.to_owned(), upload.to_owned()));
    }

    fn remove(&self, key: &str, upload: &str) {
        let mut uploads = lock(&self.uploads);
        uploads.retain(|(k, u)| k != key || u != upload);
    }

    fn begin(&self, key: &str, before: &[Upload]) {
        let ids = before.iter().map(|upload| upload.id.clone()).collect();
        // The first look counts: a refresh that failed may have left one since.
        lock(&self.before).entry(key.to_owned()).or_insert(ids);
    }

    fn end(&self, key: &str) {
        lock(&self.before).remove(key);
        lock(&self.unknown).remove(key);
    }

    /// If `key` may hold an unknown upload of ours, the uploads that are not ours.
    fn may_hold_unknown(&self, key: &str) -> Option<Vec<String>> {
        let before = lock(&self.before).get(key).cloned().unwrap_or_default();
        lock(&self.unknown).contains(key).then_some(before)
    }

    /// The keys that still may hold an unknown upload of ours, with the uploads that are not ours.
    fn all_unknown(&self) -> Vec<(String, Vec<String>)> {
        let (unknown, before) = (lock(&self.unknown), lock(&self.before));
        unknown
            .iter()
            .map(|key| (key.clone(), before.get(key).cloned().unwrap_or_default()))
            .collect()
    }

    fn all(&self) -> Vec<(String, String)> {
        lock(&self.uploads).clone()
    }
}

/// A multipart upload that was there before ours.
struct Abandoned {
    /// Its id.
    upload: String,
    parts: Vec<Part>,
}

/// How a multipart upload ended short of success.
enum Interrupted {
    /// It was completed or aborted by another run.
    Gone,
    /// It holds parts that cannot be told to be ours: of other bytes, or on a store whose ETags are no
    /// MD5 (encryption with KMS keys). Sending them again could spoil it for a run that is at it now.
    Untrusted,
    /// Another run has sent parts of it again meanwhile, and the store gave them other ETags.
    Spoiled(StoreError),
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for Interrupted {
    fn from(error: anyhow::Error) -> Self {
        Interrupted::Failed(error)
    }
}

impl From<StoreError> for Interrupted {
    fn from(error: StoreError) -> Self {
        match error.kind {
            Kind::NoSuchUpload => Interrupted::Gone,
            _ => Interrupted::Failed(error.into()),
        }
    }
}

impl Uploader {
    pub fn new(
        store: Arc<dyn Store>,
        layout: Layout,
        buffers: Buffers,
        progress: Progress,
        limits: Limits,
    ) -> Self {
        Uploader {
            store,
            layout,
            buffers,
            hashing: Hashing::on_half_the_cores(),
            progress,
            limits,
            unfinished: Arc::default(),
        }
    }

    /// Uploads a blob that the store lacks. Fails, leaving nothing visible, if the file's bytes are
    /// not those of its digest.
    pub async fn upload(&self, key: &str, digest: Digest, size: u64) -> Result<()> {
        let layout = self.layout.clone();
        let file = blocking(move || layout.open_blob(&digest, size)).await?;
        let blob = self.progress.blob(Verb::Upload, &digest, size);
        let source = Source {
            file: Arc::new(file),
            digest,
            size,
            blob: Arc::clone(&blob),
        };
        if size < self.limits.multipart {
            let body = WholeBlob {
                source,
                buffers: self.buffers.clone(),
                hashing: self.hashing.clone(),
                sent: Arc::default(),
            };
            self.store
                .put(key, "application/octet-stream", Arc::new(body))
                .await
                .map_err(explain_local)?;
        } else {
            self.upload_parts(key, &source).await?;
        }
        blob.done();
        Ok(())
    }

    /// Fails if the blob could not be read for an upload: for a dry run.
    pub async fn check_readable(&self, digest: &Digest, size: u64) -> Result<()> {
        let (layout, digest) = (self.layout.clone(), *digest);
        blocking(move || layout.open_blob(&digest, size).map(drop)).await
    }

    async fn upload_parts(&self, key: &str, source: &Source) -> Result<()> {
        let abandoned = self.abandoned(key, source.size).await;
        let part = self.limits.part_size(source.size);
        let mut taken_up = abandoned
            .iter()
            .find(|found| cut_by(part, source.size, &found.parts));
        let mut spoiled = None;
        for _ in 0..RESTARTS {
            let (upload, there) = match taken_up.take() {
                Some(Abandoned { upload, parts }) => {
                    self.unfinished.add(key, upload);
                    self.progress.debug(&format!(
                        "{}: taking up an interrupted upload with {} parts",
                        source.digest,
                        parts.len()
                    ));
                    (upload.clone(), parts.clone())
                }
                None => (self.create(key, None).await?, Vec::new()),
            };
            match self.send_parts(key, &upload, source, there).await {
                Ok(()) => {
                    self.unfinished.remove(key, &upload);
                    self.forget(key, &abandoned, &upload).await;
                    return Ok(());
                }
                Err(Interrupted::Failed(error)) => {
                    self.abort(key, &upload).await;
                    return Err(error);
                }
                Err(Interrupted::Untrusted) => self.unfinished.remove(key, &upload),
                Err(ended @ (Interrupted::Gone | Interrupted::Spoiled(_))) => {
                    if let Interrupted::Spoiled(error) = ended {
                        spoiled = Some(error);
                    }
                    // Also where it is said to be gone: some gateways answer 404 to more than that.
                    self.abort(key, &upload).await;
                    // Whoever completed it had the same bytes: the key is their digest.
                    if self
                        .store
                        .head(key)
                        .await?
                        .is_some_and(|info| info.size == source.size)
                    {
                        self.forget(key, &abandoned, &upload).await;
                        return Ok(());
                    }
                }
            }
        }
        if let Some(error) = spoiled {
            return Err(error.into());
        }
        bail!(
            "uploading {key} to s3: other runs took its multipart upload away {RESTARTS} times; try again"
        );
    }

    /// Sends every part that the upload does not hold yet, and completes it if the digest holds.
    async fn send_parts(
        &self,
        key: &str,
        upload: &str,
        source: &Source,
        there: Vec<Part>,
    ) -> Result<(), Interrupted> {
        let there: BTreeMap<u32, Part> =
            there.into_iter().map(|part| (part.number, part)).collect();
        let mut hasher = Hasher::default();
        let mut sending = FuturesUnordered::new();
        let mut parts = Vec::new();
        for (number, range) in (1u32..).zip(ranges(source.size, self.limits.part_size(source.size)))
        {
            // Room is waited for while parts already read go out: they are what frees it.
            let room = self.buffers.room(range.end - range.start);
            tokio::pin!(room);
            let room = loop {
                tokio::select! {
                    biased;
                    room = &mut room => break room,
                    Some(part) = sending.next(), if !sending.is_empty() => parts.push(landed(part)?),
                }
            };
            let size = range.end - range.start;
            let known = there.get(&number).cloned();
            let reading = source.read(range, &self.buffers, hasher, &self.hashing);
            let reading = async {
                let (chunks, hasher) = reading.await?;
                // A part that the store holds is trusted if its ETag is the MD5 of these bytes.
                let Some(part) = known else {
                    return Ok((chunks, hasher, None));
                };
                blocking(move || {
                    let same = part.size == size && part.etag.trim_matches('"') == md5_hex(&chunks);
                    Ok((chunks, hasher, Some(same.then_some(part))))
                })
                .await
            };
            tokio::pin!(reading);
            let (chunks, hashed, held) = loop {
                tokio::select! {
                    read = &mut reading => break read?,
                    Some(part) = sending.next(), if !sending.is_empty() => parts.push(landed(part)?),
                }
            };
            hasher = hashed;
            if let Some(part) = held {
                let part = part.ok_or(Interrupted::Untrusted)?;
                source.blob.resumed(size);
                parts.push(part);
                continue;
            }
            let body: Arc<dyn UploadBody> = Arc::new(PartBody {
                chunks: self.buffers.lend(chunks, &room).collect(),
                size,
                blob: Arc::clone(&source.blob),
                sent: Arc::default(),
            });
            sending.push(async move {
                let etag = self.store.upload_part(key, upload, number, body).await?;
                Ok::<_, StoreError>(Part { number, size, etag })
            });
        }
        while let Some(part) = sending.next().await {
            parts.push(landed(part)?);
        }
        source.check(hasher.digest())?;
        parts.sort_by_key(|part| part.number);
        let completed = self.store.complete_upload(key, upload, &parts).await;
        completed.map_err(|error| match error.code.as_deref() {
            Some("InvalidPart") => Interrupted::Spoiled(error),
            _ => error.into(),
        })
    }

    /// Moves the object's LastModified to now. `false`: the object is gone, and must be uploaded.
    pub async fn refresh(&self, key: &str, digest: &Digest, info: &ObjectInfo) -> Result<bool> {
        let blob = self.progress.blob(Verb::Refresh, digest, info.size);
        let touched = if info.size <= self.limits.copy {
            self.store.touch(key, info).await
        } else {
            self.copy_parts(key, info).await
        };
        let there = match touched {
            Ok(there) => there,
            // Google and Storj have no UploadPartCopy, some gateways no CopyObject.
            Err(error) if error.kind == Kind::Unsupported => {
                self.progress.note(&format!(
                    "{digest}: the store cannot copy it onto itself ({error}); uploading it again"
                ));
                false
            }
            Err(error) => return Err(error.into()),
        };
        blob.advance(info.size);
        blob.done();
        Ok(there)
    }

    async fn copy_parts(&self, key: &str, info: &ObjectInfo) -> Result<bool, StoreError> {
        let abandoned = self.abandoned(key, info.size).await;
        let upload = self.create(key, Some(info)).await?;
        let copied = self.copy_each_part(key, &upload, info).await;
        match copied {
            Ok(()) => {
                self.unfinished.remove(key, &upload);
                self.forget(key, &abandoned, &upload).await;
            }
            Err(_) => self.abort(key, &upload).await,
        }
        match copied {
            Ok(()) => Ok(true),
            // Replaced meanwhile: as fresh as can be.
            Err(error) if error.kind == Kind::Changed => Ok(true),
            // Gone, or another run refreshed it and aborted ours.
            Err(error) if error.kind == Kind::NoSuchUpload || error.status == Some(404) => {
                Ok(self.store.head(key).await?.is_some())
            }
            Err(error) => Err(error),
        }
    }

    async fn copy_each_part(
        &self,
        key: &str,
        upload: &str,
        info: &ObjectInfo,
    ) -> Result<(), StoreError> {
        let size = self.limits.copy_part_size(info.size);
        let mut copies = futures::stream::iter((1u32..).zip(ranges(info.size, size)))
            .map(|(number, range)| async move {
                let size = range.end - range.start;
                let etag = self
                    .store
                    .copy_part(key, upload, number, range, info.etag.as_deref())
                    .await?;
                Ok::<_, StoreError>(Part { number, size, etag })
            })
            .buffered(8);
        let mut parts = Vec::new();
        while let Some(part) = copies.next().await {
            parts.push(part?);
        }
        self.store.complete_upload(key, upload, &parts).await
    }

    /// The unfinished uploads to `key` that we may go on with or abort, the latest first: those of runs
    /// of this program, killed or under way, and those that nobody can still be working on. BuildKit
    /// exports to the same keys, and fails if its upload is taken away.
    async fn abandoned(&self, key: &str, size: u64) -> Vec<Abandoned> {
        let mut uploads = match self.store.list_uploads(key).await {
            Ok(uploads) => uploads,
            // Not every store can tell (OCI, Storj), and not every role may ask.
            Err(error) => {
                self.progress
                    .debug(&format!("not looking for interrupted uploads: {error}"));
                Vec::new()
            }
        };
        self.unfinished.begin(key, &uploads);
        uploads.sort_by_key(|upload| std::cmp::Reverse(upload.initiated));
        let (part, copied) = (
            self.limits.part_size(size),
            self.limits.copy_part_size(size),
        );
        let mut abandoned = Vec::new();
        for upload in uploads.into_iter().take(LOOKED_INTO) {
            let Ok(parts) = self.store.list_parts(key, &upload.id).await else {
                continue;
            };
            let patience = match parts.is_empty() {
                true => NEVER_BEGUN,
                false => FORSAKEN,
            };
            let forsaken = upload
                .initiated
                .and_then(|then| SystemTime::now().duration_since(then).ok())
                .is_some_and(|age| age > patience);
            if forsaken || cut_by(part, size, &parts) || cut_by(copied, size, &parts) {
                let upload = upload.id;
                abandoned.push(Abandoned { upload, parts });
            }
        }
        abandoned
    }

    /// Creates an upload so that it is known here even if nobody waits for the answer any more.
    async fn create(&self, key: &str, touched: Option<&ObjectInfo>) -> Result<String, StoreError> {
        let (store, unfinished) = (Arc::clone(&self.store), Arc::clone(&self.unfinished));
        let (key, touched) = (key.to_owned(), touched.cloned());
        unfinished.creating.fetch_add(1, Ordering::SeqCst);
        let creating = tokio::spawn(async move {
            let created = store.create_upload(&key, touched.as_ref()).await;
            if let Ok(upload) = &created {
                unfinished.add(&key, upload);
            }
            if created.is_err() || store.may_hold_unknown_upload(&key) {
                lock(&unfinished.unknown).insert(key);
            }
            unfinished.creating.fetch_sub(1, Ordering::SeqCst);
            unfinished.created.notify_waiters();
            created
        });
        creating.await.unwrap_or_else(|panic| {
            Err(StoreError {
                kind: Kind::Other,
                status: None,
                code: None,
                message: format!("creating a multipart upload: {panic}"),
                source: None,
            })
        })
    }

    async fn abort(&self, key: &str, upload: &str) {
        match self.store.abort_upload(key, upload).await {
            Ok(()) => self.unfinished.remove(key, upload),
            Err(error) => self.progress.debug(&format!("aborting an upload: {error}")),
        }
    }

    /// Aborts uploads that a finished blob has made pointless: those that were there before `ours`,
    /// and those of ours that we were never told the id of. A run that one of them belongs to finds
    /// the blob whole.
    async fn forget(&self, key: &str, abandoned: &[Abandoned], ours: &str) {
        for found in abandoned.iter().filter(|found| found.upload != ours) {
            self.abort(key, &found.upload).await;
        }
        if let Some(before) = self.unfinished.may_hold_unknown(key) {
            self.abort_but(key, &before).await;
        }
        self.unfinished.end(key);
    }

    /// Aborts the uploads to `key` that are not among `spared` and hold nothing: no part was ever sent to
    /// one whose id we do not know.
    async fn abort_but(&self, key: &str, spared: &[String]) {
        let found = match self.store.list_uploads(key).await {
            Ok(found) => found,
            Err(error) => {
                self.progress.warn(&format!(
                    "a multipart upload to {key} may be left, which no answer named ({error}); a lifecycle rule that aborts incomplete uploads removes it"
                ));
                return;
            }
        };
        for upload in found.iter().filter(|upload| !spared.contains(&upload.id)) {
            let parts = self.store.list_parts(key, &upload.id).await;
            if parts.is_ok_and(|parts| parts.is_empty()) {
                self.abort(key, &upload.id).await;
            }
        }
    }

    /// Aborts what is unfinished, for at most `patience`: called whenever an export ends short.
    pub async fn abort_unfinished(&self, patience: Duration) {
        let aborting = async {
            loop {
                let created = self.unfinished.created.notified();
                if self.unfinished.creating.load(Ordering::SeqCst) == 0 {
                    break;
                }
                created.await;
            }
            let uploads = self.unfinished.all();
            futures::stream::iter(uploads)
                .for_each_concurrent(8, |(key, upload)| async move {
                    self.abort(&key, &upload).await;
                })
                .await;
            let unknown = self.unfinished.all_unknown();
            futures::stream::iter(unknown)
                .for_each_concurrent(8, |(key, before)| async move {
                    self.abort_but(&key, &before).await;
                })
                .await;
        };
        let in_time = tokio::time::timeout(patience, aborting).await.is_ok();
        let left = self.unfinished.all().len();
        if !in_time || left > 0 {
            self.progress.warn(&format!(
                "{left} multipart upload(s) could not be aborted; a lifecycle rule that aborts incomplete uploads removes them"
            ));
        }
    }
}

/// A panic elsewhere leaves no half-done state in these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn landed(part: Result<Part, StoreError>) -> Result<Part, Interrupted> {
    part.map_err(|error| match error.kind {
        Kind::LocalBody => Interrupted::Failed(explain_local(error)),
        _ => error.into(),
    })
}

/// A body that failed on our side says so itself, better than the store's error can.
fn explain_local(error: StoreError) -> anyhow::Error {
    match (error.kind, error.source) {
        (Kind::LocalBody, Some(source)) => anyhow!("{source}").context(error.message),
        (kind, source) => StoreError {
            source,
            kind,
            ..error
        }
        .into(),
    }
}

fn md5_hex(chunks: &[Vec<u8>]) -> String {
    let mut hasher = Md5::new();
    for chunk in chunks {
        hasher.update(chunk);
    }
    let bytes = hasher.finalize();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A blob's open file.
#[derive(Clone)]
struct Source {
    file: Arc<File>,
    digest: Digest,
    size: u64,
    blob: Arc<Blob>,
}

impl Source {
    /// Reads exactly `range`, and hashes it on the way.
    async fn read(
        &self,
        range: Range<u64>,
        buffers: &Buffers,
        hasher: Hasher,
        hashing: &Hashing,
    ) -> Result<(Vec<Vec<u8>>, Hasher)> {
        let reading = Reading {
            source: self.clone(),
            rest: range,
            buffers: buffers.clone(),
            chunks: Vec::new(),
        };
        let (hasher, read) = hashing.run(hasher, reading).await?;
        Ok((read.chunks, hasher))
    }

    fn check(&self, read: Digest) -> Result<()> {
        if read != self.digest {
            bail!(
                "blob {} of the layout is damaged: its bytes hash to {read}; remove the file and build or fetch it again",
                self.digest
            );
        }
        Ok(())
    }
}

/// A range of a blob's file on its way into memory.
struct Reading {
    source: Source,
    rest: Range<u64>,
    buffers: Buffers,
    /// What has been read.
    chunks: Vec<Vec<u8>>,
}

impl Feed for Reading {
    fn advance(&mut self) -> Result<bool> {
        let missing = self.rest.end - self.rest.start;
        if missing == 0 {
            return Ok(false);
        }
        let digest = self.source.digest;
        let wanted = missing.min(BUFFER);
        let mut chunk = self.buffers.take(wanted as usize);
        let read = read_into(&mut chunk, &self.source.file, self.rest.start, wanted)
            .with_context(|| format!("reading blob {digest} of the layout"))?;
        if read < wanted {
            bail!(
                "blob {digest} of the layout shrank while it was read: {} bytes are missing",
                missing - read
            );
        }
        self.rest.start += read;
        self.chunks.push(chunk);
        Ok(true)
    }

    fn bytes(&self) -> &[u8] {
        self.chunks.last().map_or(&[], Vec::as_slice)
    }
}

/// A blob sent in one request. It is hashed while it is sent, and the last chunk goes out only if
/// the digest holds: a store that does not check x-amz-content-sha256 never sees a damaged blob
/// whole either.
struct WholeBlob {
    source: Source,
    buffers: Buffers,
    hashing: Hashing,
    /// Bytes that progress counts for the latest try.
    sent: Arc<Mutex<u64>>,
}

impl WholeBlob {
    /// The next bytes from `at` on, none of an empty blob.
    async fn chunk(&self, at: u64, hasher: Hasher) -> Result<(Option<Bytes>, Hasher)> {
        let end = self.source.size.min(at + BUFFER);
        let room = self.buffers.room(end - at).await;
        let reading = self
            .source
            .read(at..end, &self.buffers, hasher, &self.hashing);
        let (chunks, hasher) = reading.await?;
        if end == self.source.size {
            self.source.check(hasher.digest())?;
        }
        Ok((self.buffers.lend(chunks, &room).next(), hasher))
    }

    async fn send(self, to: mpsc::Sender<std::io::Result<Bytes>>) {
        if let Err(error) = self.send_chunks(&to).await {
            let error = std::io::Error::new(std::io::ErrorKind::InvalidData, format!("{error:#}"));
            let _ = to.send(Err(error)).await;
        }
    }

    async fn send_chunks(&self, to: &mpsc::Sender<std::io::Result<Bytes>>) -> Result<()> {
        let mut hasher = Hasher::default();
        let mut at = 0;
        loop {
            let (chunk, hashed) = self.chunk(at, hasher).await?;
            hasher = hashed;
            let Some(bytes) = chunk else { return Ok(()) };
            let length = bytes.len() as u64;
            at += length;
            if to.send(Ok(bytes)).await.is_err() {
                return Ok(());
            }
            count(&self.sent, &self.source.blob, length);
            if at == self.source.size {
                return Ok(());
            }
        }
    }
}

impl UploadBody for WholeBlob {
    fn len(&self) -> u64 {
        self.source.size
    }

    fn sha256(&self) -> Option<Digest> {
        Some(self.source.digest)
    }

    fn open(&self) -> ByteStream {
        restart(&self.sent, &self.source.blob);
        let body = WholeBlob {
            source: self.source.clone(),
            buffers: self.buffers.clone(),
            hashing: self.hashing.clone(),
            sent: Arc::clone(&self.sent),
        };
        // One chunk is read ahead while the last one is on its way.
        let (sender, mut receiver) = mpsc::channel(1);
        tokio::spawn(body.send(sender));
        futures::stream::poll_fn(move |context| receiver.poll_recv(context)).boxed()
    }
}

/// A part already in memory.
struct PartBody {
    chunks: Vec<Bytes>,
    size: u64,
    blob: Arc<Blob>,
    sent: Arc<Mutex<u64>>,
}

impl UploadBody for PartBody {
    fn len(&self) -> u64 {
        self.size
    }

    fn sha256(&self) -> Option<Digest> {
        None
    }

    fn open(&self) -> ByteStream {
        restart(&self.sent, &self.blob);
        let (blob, sent) = (Arc::clone(&self.blob), Arc::clone(&self.sent));
        futures::stream::iter(self.chunks.clone())
            .map(move |chunk| {
                count(&sent, &blob, chunk.len() as u64);
                Ok(chunk)
            })
            .boxed()
    }
}

/// A small body from memory, its digest known: a manifest.
pub struct Document(pub Bytes);

impl UploadBody for Document {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn sha256(&self) -> Option<Digest> {
        Some(Digest::of(&self.0))
    }

    fn open(&self) -> ByteStream {
        let bytes = self.0.clone();
        futures::stream::once(async move { Ok(bytes) }).boxed()
    }
}

/// A body begins again: what progress had counted was for nothing.
fn restart(sent: &Mutex<u64>, blob: &Blob) {
    let sent = std::mem::take(&mut *lock(sent));
    blob.take_back(sent);
}

fn count(sent: &Mutex<u64>, blob: &Blob, bytes: u64) {
    *lock(sent) += bytes;
    blob.advance(bytes);
}

/// Runs `work` where it may block.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(anyhow!(error).context("the program is shutting down")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_a_blob_exactly_at_under_and_over_a_part() {
        let cut = |size| ranges(size, 10).collect::<Vec<_>>();
        assert_eq!(cut(0), vec![]);
        assert_eq!(cut(9), vec![0..9]);
        assert_eq!(cut(10), vec![0..10]);
        assert_eq!(cut(11), vec![0..10, 10..11]);
        assert_eq!(cut(20), vec![0..10, 10..20]);
    }

    #[test]
    fn no_blob_has_more_than_ten_thousand_parts() {
        let limits = Limits::default();
        for size in [1, 5 << 20, 5 << 30, 50 << 30, 5 << 40] {
            let part = limits.part_size(size);
            assert!(part >= 5 << 20);
            assert!(size.div_ceil(part) <= 10_000, "{size} in parts of {part}");
        }
    }
}
