//! What clients push to one cache: blobs first, the manifest last, and only if all its blobs are there.
//! S3 then holds what an export of the same cache would have written.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, anyhow, bail};
use async_trait::async_trait;
use bytes::{Buf, Bytes};
use futures::stream::{BoxStream, StreamExt};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use crate::blocking::blocking;
use crate::bucket::Bucket;
use crate::bucket::publish::{self, Plan, Publisher, Supply, Words, is_old};
use crate::cache::digest::Digest;
use crate::cache::oci::Descriptor;
use crate::cache::read::{self, read_cache};
use crate::cache::{CacheConfig, diff_id};
use crate::config::{ExportConfig, Mode};
use crate::progress::{Progress, count};
use crate::quote::first_few;
use crate::serve::blobs::{Blobs, Settled};
use crate::serve::kept::{Document, Kept};
use crate::store::ObjectInfo;
use crate::transfer::arriving::Incoming;
use crate::transfer::limits::Limits;
use crate::transfer::refresh::Refreshed;
use crate::transfer::upload::Uploader;

/// How messages refer to a push.
const WORDS: Words = Words {
    send: "store",
    sending: "storing",
    run: "push",
    done: "pushed",
};

/// Blobs that an error names.
const LISTED: usize = 5;

/// The largest document that is held back, in bytes.
const HELD_BACK: u64 = 8 << 20;

/// How long a blob that was sent or refreshed is taken to be on S3, and young, without another look. The
/// bound is `touch_refresh` if that is less: no `prune` has a shorter `--grace`.
const VOUCHED: Duration = Duration::from_secs(10 * 60);

/// A manifest names blobs that are missing or damaged on S3 and were not pushed.
#[derive(Debug)]
pub struct UnknownBlobs(pub Vec<Digest>);

impl std::fmt::Display for UnknownBlobs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "the manifest names {} missing or damaged on S3 and not pushed: {}",
            count(self.0.len() as u64, "blob"),
            first_few(&self.0, LISTED)
        )
    }
}

impl std::error::Error for UnknownBlobs {}

/// What has been pushed so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pushed {
    /// Blobs sent to S3, and their bytes.
    pub blobs: u64,
    pub bytes: u64,
    /// Blobs that were already there, and young.
    pub present: u64,
    /// Blobs that were already there, but old, and were refreshed.
    pub refreshed: u64,
    /// Manifests written.
    pub manifests: u64,
}

/// Receives what is pushed to one cache.
pub struct Push {
    bucket: Bucket,
    target: ExportConfig,
    uploader: Uploader,
    progress: Progress,
    blobs: Arc<Blobs>,
    /// Documents that clients sent. They are stored only if a manifest names them as blobs: on S3,
    /// a cache's config is not one.
    documents: Kept,
    done: Mutex<Done>,
    publishing: tokio::sync::Mutex<()>,
}

/// What this run has done so far.
#[derive(Default)]
struct Done {
    /// Blobs that were sent, with their sizes.
    sent: BTreeMap<Digest, u64>,
    /// Blobs that were found, with their sizes; and those also refreshed.
    present: BTreeMap<Digest, u64>,
    refreshed: BTreeMap<Digest, u64>,
    /// Other blobs that were refreshed right before a manifest was written.
    refreshed_last: u64,
    /// Documents that a client has sent, or has asked about sending, since a manifest was written last.
    offered: BTreeSet<Digest>,
    manifests: u64,
}

impl Push {
    pub fn new(
        bucket: Bucket,
        target: &ExportConfig,
        progress: &Progress,
        limits: Limits,
        blobs: Arc<Blobs>,
    ) -> Self {
        let store = Arc::clone(bucket.store());
        // An arriving body can be sent again only from memory, so anything larger than a part is
        // sent in parts.
        let limits = Limits {
            multipart: limits.part,
            ..limits
        };
        Push {
            bucket,
            target: target.clone(),
            uploader: Uploader::new(store, progress.clone(), limits),
            progress: progress.clone(),
            blobs,
            documents: Kept::default(),
            done: Mutex::default(),
            publishing: tokio::sync::Mutex::default(),
        }
    }

    pub fn pushed(&self) -> Pushed {
        let done = self.done.lock();
        let only_present = |digest: &&Digest| {
            !done.sent.contains_key(*digest) && !done.refreshed.contains_key(*digest)
        };
        let present = done.present.keys().filter(only_present).count() as u64;
        Pushed {
            blobs: done.sent.len() as u64,
            bytes: done.sent.values().sum(),
            present: present.saturating_sub(done.refreshed_last),
            refreshed: done.refreshed.len() as u64 + done.refreshed_last,
            manifests: done.manifests,
        }
    }

    pub fn ignores_errors(&self) -> bool {
        self.target.ignore_error
    }

    /// A document that a client sent in this run.
    pub fn document(&self, digest: &Digest) -> Option<Document> {
        self.documents.get(digest)
    }

    /// A client has sent this document, or could have: it is about to push a manifest.
    pub fn offer(&self, digest: Digest) {
        self.done.lock().offered.insert(digest);
    }

    /// Whether a client was about to push the manifest of this document: true once for each push.
    pub fn take_offer(&self, digest: &Digest) -> bool {
        self.done.lock().offered.remove(digest)
    }

    /// Keeps a document until a manifest names it.
    pub fn hold(&self, document: Document) {
        self.offer(document.digest);
        self.documents.keep(document);
    }

    /// Whether a blob that begins with `first` is held back as a document.
    pub fn holds_back(&self, first: Option<u8>, size: u64) -> bool {
        first == Some(b'{') && size <= HELD_BACK && self.documents.has_room(size)
    }

    /// A blob that this run has sent or refreshed lately: nothing asks S3 about it again.
    fn settled(&self, digest: &Digest) -> Option<Settled> {
        let within = match self.target.touch_refresh {
            // What this push has sent is not refreshed even if everything else is.
            Duration::ZERO => VOUCHED,
            touch_refresh => touch_refresh.min(VOUCHED),
        };
        self.blobs.settled(digest, within)
    }

    /// The bytes of a blob that a client need not send. One that is old is refreshed; if it cannot be, it
    /// counts as absent: sent again, it is young.
    ///
    /// # Errors
    /// The store's.
    pub async fn look(&self, digest: &Digest) -> Result<Option<u64>> {
        if let Some(settled) = self.settled(digest) {
            return Ok(Some(settled.size));
        }
        if self.blobs.is_damaged(digest) {
            return Ok(None);
        }
        let Some(info) = self.blobs.info(digest).await? else {
            return Ok(None);
        };
        if is_old(&info, self.target.touch_refresh, SystemTime::now())
            && self.refresh(digest, &info).await != Refreshed::Done
        {
            return Ok(None);
        }
        self.done.lock().present.insert(*digest, info.size);
        Ok(Some(info.size))
    }

    async fn refresh(&self, digest: &Digest, info: &ObjectInfo) -> Refreshed {
        let key = self.bucket.blob_key(digest);
        let refreshed = self.uploader.refresh(&key, digest, info).await;
        if refreshed == Refreshed::Done {
            self.done.lock().refreshed.insert(*digest, info.size);
            self.blobs.refreshed(digest, info.size);
        }
        refreshed
    }

    /// Sends a blob to S3 while it arrives.
    ///
    /// # Errors
    /// As [`Uploader::upload_arriving`].
    pub async fn receive(&self, digest: Digest, size: u64, incoming: Incoming) -> Result<()> {
        let key = self.bucket.blob_key(&digest);
        self.uploader
            .upload_arriving(&key, digest, size, incoming)
            .await?;
        self.note_sent(digest, size);
        Ok(())
    }

    /// Sends a blob to S3 that has arrived in a file.
    ///
    /// # Errors
    /// As [`Uploader::upload_arrived`].
    pub async fn send(&self, digest: Digest, size: u64, file: File) -> Result<()> {
        let key = self.bucket.blob_key(&digest);
        self.uploader
            .upload_arrived(&key, digest, size, file)
            .await?;
        self.note_sent(digest, size);
        Ok(())
    }

    fn note_sent(&self, digest: Digest, size: u64) {
        self.done.lock().sent.insert(digest, size);
        self.blobs.sent(&digest, size);
    }

    /// Reads the cache that the manifest `root` describes, in any form that an export reads.
    ///
    /// # Errors
    /// [`UnknownBlobs`] if a document was not sent, or what is wrong with one.
    pub async fn read(
        self: &Arc<Self>,
        root: Descriptor,
        generated: Arc<Kept>,
    ) -> Result<CacheConfig> {
        let sent = Sent {
            push: Arc::clone(self),
            generated,
            runtime: Handle::current(),
        };
        blocking(move || read_cache(&root, &sent)).await
    }

    /// Writes the manifest of `cache`, once all its blobs are on S3.
    ///
    /// # Errors
    /// [`UnknownBlobs`], or the store's.
    pub async fn publish(&self, cache: CacheConfig) -> Result<()> {
        let mode = self.target.mode;
        let (manifest, blobs) = blocking(move || {
            let cache = match mode {
                Mode::Max => cache,
                Mode::Min => cache.min(),
            };
            Ok((cache.to_s3()?, cache.blobs()?))
        })
        .await?;
        self.publish_manifest(manifest.into(), blobs).await
    }

    /// Writes `manifest` as it is, once the `blobs` that it names are on S3.
    ///
    /// # Errors
    /// As [`publish`](Self::publish).
    pub async fn publish_manifest(
        &self,
        manifest: Bytes,
        blobs: BTreeMap<Digest, u64>,
    ) -> Result<()> {
        let _one = self.publishing.lock().await;
        let now = SystemTime::now();
        let settled = self.settled_among(&blobs);
        // A refreshed blob is looked at once more: before it was, a prune may have decided to delete it.
        let mut others = blobs.clone();
        others.retain(|digest, _| settled.get(digest).is_none_or(|settled| !settled.sent));
        let (mut found, uploads) = publish::survey(&self.bucket, &others, false).await?;
        self.blobs.surveyed(others.keys(), &found);
        for (digest, info) in &found {
            if info.size != blobs[digest] {
                // From now on, clients are asked to send it.
                self.blobs.damaged(digest);
            }
        }
        found.retain(|digest, _| !self.blobs.is_damaged(digest));
        let is_there =
            |digest: &Digest, size: &u64| found.get(digest).is_some_and(|info| info.size == *size);
        others.retain(|digest, size| is_there(digest, size));
        for (digest, settled) in settled {
            if settled.sent || others.contains_key(&digest) {
                let young = ObjectInfo {
                    size: settled.size,
                    last_modified: Some(now),
                    etag: None,
                    storage_class: None,
                };
                found.insert(digest, young);
            }
        }
        // Settled blobs stay settled even if everything else counts as old.
        let touch_refresh = self.target.touch_refresh.max(Duration::from_nanos(1));
        let plan = Plan::new(manifest, blobs, found, uploads, touch_refresh, now);
        let held = |digest: &Digest| self.documents.get(digest).is_some();
        let lacking = plan.send.iter().map(|(digest, _)| *digest);
        let unknown: Vec<Digest> = lacking.filter(|digest| !held(digest)).collect();
        if !unknown.is_empty() {
            return Err(UnknownBlobs(unknown).into());
        }
        let publisher = Publisher {
            bucket: &self.bucket,
            uploader: &self.uploader,
            supply: self,
            parallelism: self.target.upload_parallelism,
            small: self.target.small_uploads,
            progress: &self.progress,
        };
        let mut counts = plan.counts();
        publisher.execute(plan, &mut counts).await?;
        let mut done = self.done.lock();
        done.present.extend(others);
        done.refreshed_last += counts.refreshed;
        done.offered.clear();
        done.manifests += 1;
        Ok(())
    }

    /// Those of `blobs` that were sent or refreshed lately, with these sizes.
    fn settled_among(&self, blobs: &BTreeMap<Digest, u64>) -> BTreeMap<Digest, Settled> {
        let settled = blobs.iter().filter_map(|(digest, size)| {
            let settled = self.settled(digest)?;
            (settled.size == *size).then_some((*digest, settled))
        });
        settled.collect()
    }

    /// Aborts unfinished uploads at the end of the run.
    pub async fn clean_up(&self) {
        self.uploader.abort_unfinished().await;
    }
}

/// Stores the documents that a manifest names as blobs; all other blobs are already on S3.
#[async_trait]
impl Supply for Push {
    fn words(&self) -> &'static Words {
        &WORDS
    }

    async fn send(&self, uploader: &Uploader, key: &str, digest: Digest, size: u64) -> Result<()> {
        let Some(document) = self.documents.get(&digest) else {
            // It vanished while the others were sent.
            self.blobs.lost(&digest);
            return Err(UnknownBlobs(vec![digest]).into());
        };
        let bytes = futures::stream::once(async move { Ok(document.bytes) });
        let sent = uploader.upload_arriving(key, digest, size, bytes.boxed());
        sent.await?;
        self.note_sent(digest, size);
        Ok(())
    }
}

/// The blobs that a pushed manifest can name: those sent or generated in this run, and those on S3.
struct Sent {
    push: Arc<Push>,
    generated: Arc<Kept>,
    runtime: Handle,
}

impl Sent {
    fn held(&self, digest: &Digest) -> Option<Bytes> {
        let held = self.push.documents.get(digest);
        let held = held.or_else(|| self.generated.get(digest));
        held.map(|document| document.bytes)
    }

    /// The content of a blob on S3.
    fn stored(&self, digest: &Digest, size: u64) -> Result<BoxStream<'static, Result<Bytes>>> {
        let reading = self.push.blobs.read(*digest, size, 0..size);
        let found = self.runtime.block_on(reading)?;
        found.ok_or_else(|| UnknownBlobs(vec![*digest]).into())
    }
}

impl read::Blobs for Sent {
    const PLACE: &'static str = "that was pushed";

    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let digest = &descriptor.digest;
        let bytes = match self.held(digest) {
            Some(bytes) => bytes,
            None => self
                .runtime
                .block_on(self.push.blobs.document(digest))?
                .ok_or_else(|| anyhow!(UnknownBlobs(vec![*digest])))?,
        };
        if bytes.len() as u64 != descriptor.size {
            bail!(
                "{digest} has {} bytes where its descriptor says {}",
                bytes.len(),
                descriptor.size
            );
        }
        Ok(bytes.into())
    }

    fn has(&self, digest: &Digest, size: u64) -> bool {
        let found = || self.runtime.block_on(self.push.look(digest));
        self.held(digest).is_some() || found().is_ok_and(|found| found == Some(size))
    }

    fn diff_id(&self, blob: &Digest, size: u64) -> Result<Digest> {
        if let Some(bytes) = self.held(blob) {
            return diff_id::compute(bytes.as_ref());
        }
        let content = Content {
            chunks: self.stored(blob, size)?,
            chunk: Bytes::new(),
            runtime: self.runtime.clone(),
        };
        diff_id::compute(content).with_context(|| format!("reading blob {blob} on S3"))
    }

    fn warn(&self, text: &str) {
        self.push.progress.warn(text);
    }
}

/// Reads a stream on a thread that may block.
struct Content {
    chunks: BoxStream<'static, Result<Bytes>>,
    chunk: Bytes,
    runtime: Handle,
}

impl Read for Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() {
            match self.runtime.block_on(self.chunks.next()) {
                Some(Ok(chunk)) => self.chunk = chunk,
                Some(Err(error)) => return Err(io::Error::other(format!("{error:#}"))),
                None => return Ok(0),
            }
        }
        let length = self.chunk.len().min(buffer.len());
        self.chunk.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}
