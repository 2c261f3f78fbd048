//! The blobs of a cache as clients read them: each download is shared by those who read the same blob at
//! the same time, verified, and resumed where it broke off.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use anyhow::{Result, anyhow, bail};
use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::bucket::Bucket;
use crate::cache::DOCUMENT_LIMIT;
use crate::cache::digest::{Digest, Hasher};
use crate::progress::{Progress, Verb};
use crate::serve::flow::{End, Filling, Flow, Flows, Next, Place};
use crate::store::ObjectInfo;
use crate::transfer::download::{Damaged, Downloader};
use crate::transfer::forward::{Forwarded, Wanted};
use crate::transfer::limits::Limits;

/// Downloads at once; more wait.
const DOWNLOADS: usize = 64;

/// Bytes between two points from which the hashing of an interrupted download can continue.
const CHECKPOINT: u64 = 8 << 20;

/// Bytes sent to clients, and received from S3.
#[derive(Debug, Default)]
pub struct Traffic {
    pub served: AtomicU64,
    pub fetched: AtomicU64,
    /// Blobs asked for.
    pub blobs: AtomicU64,
}

/// What is known about the blobs of one bucket, and the downloads in progress.
pub struct Blobs {
    bucket: Bucket,
    downloader: Downloader,
    progress: Progress,
    traffic: Arc<Traffic>,
    known: Mutex<Known>,
    flows: Mutex<HashMap<Digest, Vec<Weak<Flow>>>>,
    flowing: Flows,
    downloads: Arc<Semaphore>,
}

/// A blob that this run has sent or refreshed.
#[derive(Clone, Copy)]
pub struct Settled {
    pub size: u64,
    /// It was sent, not only refreshed.
    pub sent: bool,
    /// By the wall clock, which goes on while the machine sleeps.
    at: SystemTime,
}

#[derive(Default)]
struct Known {
    /// In bytes, on S3.
    sizes: HashMap<Digest, u64>,
    settled: HashMap<Digest, Settled>,
    /// The bytes were wrong, or not as many as a manifest says.
    damaged: HashSet<Digest>,
    /// Clients may have received wrong bytes of these, which must not become the beginning of a
    /// whole blob.
    spoiled: HashSet<Digest>,
    /// Verified in this run: all bytes were right.
    verified: HashSet<Digest>,
    /// States of interrupted downloads, in order of their lengths.
    checkpoints: HashMap<Digest, Vec<Hasher>>,
}

impl Blobs {
    pub fn new(bucket: Bucket, progress: &Progress, limits: Limits, traffic: Arc<Traffic>) -> Self {
        let store = Arc::clone(bucket.store());
        Blobs {
            downloader: Downloader::new(store, progress.clone(), limits),
            progress: progress.clone(),
            bucket,
            traffic,
            known: Mutex::default(),
            flows: Mutex::default(),
            // Beside the half that the downloader takes.
            flowing: Flows::new(limits.memory / 5),
            downloads: Arc::new(Semaphore::new(DOWNLOADS)),
        }
    }

    /// Takes note of what a survey of `asked` found.
    pub fn surveyed<'a>(
        &self,
        asked: impl IntoIterator<Item = &'a Digest>,
        found: &BTreeMap<Digest, ObjectInfo>,
    ) {
        let mut known = self.known.lock();
        for digest in asked {
            match found.get(digest) {
                Some(info) => drop(known.sizes.insert(*digest, info.size)),
                None => known.forget(digest),
            }
        }
    }

    /// Notes that a blob was sent that was absent or damaged before.
    pub fn sent(&self, digest: &Digest, size: u64) {
        let mut known = self.known.lock();
        known.settle(digest, size, true);
        known.damaged.remove(digest);
    }

    /// Notes that a blob is young again.
    pub fn refreshed(&self, digest: &Digest, size: u64) {
        self.known.lock().settle(digest, size, false);
    }

    /// Notes that a blob is not what it should be.
    pub fn damaged(&self, digest: &Digest) {
        self.known.lock().damaged.insert(*digest);
    }

    /// Notes that a blob is not there any more.
    pub fn lost(&self, digest: &Digest) {
        self.known.lock().forget(digest);
    }

    /// A blob that was sent or refreshed no longer than `within` ago, if nothing is known against it.
    pub fn settled(&self, digest: &Digest, within: Duration) -> Option<Settled> {
        let known = self.known.lock();
        let settled = *known.settled.get(digest)?;
        if known.damaged.contains(digest) {
            return None;
        }
        let age = settled.at.elapsed();
        age.is_ok_and(|age| age < within).then_some(settled)
    }

    /// Whether the blob was wrong when last looked at.
    pub fn is_damaged(&self, digest: &Digest) -> bool {
        self.known.lock().damaged.contains(digest)
    }

    /// The bytes of a blob on S3; `None` if it is not there.
    ///
    /// # Errors
    /// The store's.
    pub async fn size(&self, digest: &Digest) -> Result<Option<u64>> {
        let known = self.known.lock().sizes.get(digest).copied();
        match known {
            Some(size) => Ok(Some(size)),
            None => self.look(digest).await,
        }
    }

    /// The same, as it is now; a damaged blob counts as absent.
    ///
    /// # Errors
    /// The store's.
    pub async fn look(&self, digest: &Digest) -> Result<Option<u64>> {
        if self.is_damaged(digest) {
            return Ok(None);
        }
        Ok(self.info(digest).await?.map(|info| info.size))
    }

    /// What S3 says of a blob, damaged or not.
    ///
    /// # Errors
    /// The store's.
    pub async fn info(&self, digest: &Digest) -> Result<Option<ObjectInfo>> {
        let found = self.bucket.blob(digest).await?;
        let mut known = self.known.lock();
        match &found {
            Some(info) => drop(known.sizes.insert(*digest, info.size)),
            None => known.forget(digest),
        }
        Ok(found)
    }

    /// A small blob, verified; `None` if it is not there.
    ///
    /// # Errors
    /// The store's; or it is damaged, or larger than a document.
    pub async fn document(self: &Arc<Self>, digest: &Digest) -> Result<Option<Bytes>> {
        let Some(size) = self.size(digest).await? else {
            return Ok(None);
        };
        if size > DOCUMENT_LIMIT {
            bail!("blob {digest} has {size} bytes, more than the {DOCUMENT_LIMIT} of a document");
        }
        let Some(mut body) = self.read(*digest, size, 0..size).await? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        while let Some(chunk) = body.next().await {
            bytes.extend_from_slice(&chunk?);
        }
        Ok(Some(bytes.into()))
    }

    /// The bytes of `range` of a blob, once the first of them have arrived. `None`: it is not
    /// there.
    ///
    /// # Errors
    /// Whatever keeps the first bytes from arriving; the stream yields later errors.
    pub async fn read(
        self: &Arc<Self>,
        digest: Digest,
        size: u64,
        range: Range<u64>,
    ) -> Result<Option<BoxStream<'static, Result<Bytes>>>> {
        if range.start > 0 && self.known.lock().spoiled.contains(&digest) {
            bail!(
                "blob {digest} was damaged when it was sent, and has to be read from its beginning"
            );
        }
        let mut reader = Reader {
            blobs: Arc::clone(self),
            digest,
            size,
            end: range.end,
            place: self.place(digest, size, &range),
        };
        let first = match reader.next().await {
            Ok(Some(first)) => first,
            Ok(None) => return Ok(Some(futures::stream::empty().boxed())),
            Err(Stopped::Missing) => return Ok(None),
            Err(Stopped::Broken(error)) => return Err(error),
        };
        let rest = futures::stream::unfold(Some(reader), |reader| async {
            let mut reader = reader?;
            match reader.next().await {
                Ok(Some(chunk)) => Some((Ok(chunk), Some(reader))),
                Ok(None) => None,
                Err(stopped) => Some((Err(stopped.into()), None)),
            }
        });
        let first = futures::stream::once(async { Ok(first) });
        Ok(Some(first.chain(rest).boxed()))
    }

    /// A reader's place in a download that still has `range` ahead of it: one in progress, or a new
    /// one.
    fn place(self: &Arc<Self>, digest: Digest, size: u64, range: &Range<u64>) -> Place {
        let mut flows = self.flows.lock();
        let of_blob = flows.entry(digest).or_default();
        of_blob.retain(|flow| flow.strong_count() > 0);
        let joined = of_blob.iter().filter_map(Weak::upgrade);
        if let Some(place) = joined.filter_map(|flow| flow.join(range.start)).next() {
            return place;
        }
        let (flow, place) = Flow::new(range.start, &self.flowing);
        let wanted = self.wanted(digest, size, range);
        // A download that stops before the blob's end cannot serve other readers.
        if wanted.range.end == size {
            of_blob.push(Arc::downgrade(&flow));
        } else if of_blob.is_empty() {
            flows.remove(&digest);
        }
        drop(flows);
        tokio::spawn(Arc::clone(self).fill(flow, wanted));
        place
    }

    /// What to download: the blob to its end, from where it has been hashed before `range`, so that it is
    /// verified. Of a blob that has been verified, a later range alone.
    fn wanted(&self, digest: Digest, size: u64, range: &Range<u64>) -> Wanted {
        let known = self.known.lock();
        if range.start > 0 && known.verified.contains(&digest) {
            return Wanted {
                digest,
                size,
                range: range.clone(),
                hasher: None,
            };
        }
        let checkpoints = known.checkpoints.get(&digest);
        let before = checkpoints.and_then(|hashers| {
            let mut hashers = hashers.iter();
            hashers.rfind(|hasher| hasher.length() <= range.start)
        });
        let hasher = before.cloned().unwrap_or_default();
        Wanted {
            digest,
            size,
            range: hasher.length()..size,
            hasher: Some(hasher),
        }
    }

    /// Reads a blob again whose bytes were wrong: if only the transfer was at fault, builds can
    /// keep using it.
    async fn confirm_damage(&self, digest: Digest, size: u64) {
        let blob = self.progress.blob(Verb::Hash, &digest, size);
        let key = self.bucket.blob_key(&digest);
        let good = self.downloader.verify(&key, digest, size, &blob).await;
        if let Ok(true) = good {
            self.known.lock().damaged.remove(&digest);
        }
        blob.done();
    }

    async fn fill(self: Arc<Self>, flow: Arc<Flow>, wanted: Wanted) {
        let Wanted { digest, size, .. } = wanted;
        let (verifies, start) = (wanted.hasher.is_some(), wanted.range.start);
        let key = self.bucket.blob_key(&digest);
        let _download = Arc::clone(&self.downloads).acquire_owned().await;
        let note = |received, hasher: Option<&Hasher>| {
            self.traffic.fetched.fetch_add(received, Ordering::Relaxed);
            if let Some(hasher) = hasher {
                self.known.lock().checkpoint(digest, hasher);
            }
        };
        let mut filling = Filling::new(Arc::clone(&flow), start, note);
        let forwarded = self.downloader.forward(&key, wanted, &mut filling).await;
        let end = match forwarded {
            Ok(Forwarded::Whole | Forwarded::Unwanted) => End::Whole,
            Ok(Forwarded::Missing) => {
                self.lost(&digest);
                self.progress
                    .note(&format!("{digest} is not on S3 any more"));
                End::Missing
            }
            Err(error) => {
                // What we believed about the blob may be the reason.
                let damaged = error.is::<Damaged>();
                {
                    let mut known = self.known.lock();
                    known.forget(&digest);
                    if damaged {
                        known.damaged.insert(digest);
                        known.spoiled.insert(digest);
                    }
                }
                self.progress.warn(&format!("{error:#}"));
                flow.end(End::Broken(Arc::new(error)));
                if damaged {
                    self.confirm_damage(digest, size).await;
                }
                return;
            }
        };
        if verifies && matches!(end, End::Whole) && filling.at == size {
            let mut known = self.known.lock();
            known.verified.insert(digest);
            known.checkpoints.remove(&digest);
        }
        flow.end(end);
    }
}

impl Known {
    fn settle(&mut self, digest: &Digest, size: u64, sent: bool) {
        let at = SystemTime::now();
        self.sizes.insert(*digest, size);
        self.settled.insert(*digest, Settled { size, sent, at });
    }

    fn forget(&mut self, digest: &Digest) {
        self.sizes.remove(digest);
        self.settled.remove(digest);
    }

    fn checkpoint(&mut self, digest: Digest, hasher: &Hasher) {
        if hasher.length() < CHECKPOINT {
            return;
        }
        let hashers = self.checkpoints.entry(digest).or_default();
        let last = hashers.last().map_or(0, Hasher::length);
        if hasher.length() >= last + CHECKPOINT {
            hashers.push(hasher.clone());
        }
    }
}

/// Why a reader gets no more bytes.
enum Stopped {
    Missing,
    Broken(anyhow::Error),
}

impl From<Stopped> for anyhow::Error {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::Missing => anyhow!("the blob was deleted while it was read"),
            Stopped::Broken(error) => error,
        }
    }
}

/// A client that reads a blob.
struct Reader {
    blobs: Arc<Blobs>,
    digest: Digest,
    size: u64,
    /// Where in the blob to stop.
    end: u64,
    place: Place,
}

impl Reader {
    async fn next(&mut self) -> Result<Option<Bytes>, Stopped> {
        loop {
            if self.place.at >= self.end && self.size > 0 {
                return Ok(None);
            }
            match self.place.next().await {
                Next::Chunk(mut chunk) => {
                    let past = self.place.at.saturating_sub(self.end);
                    chunk.truncate(chunk.len() - past.min(chunk.len() as u64) as usize);
                    let length = chunk.len() as u64;
                    self.blobs
                        .traffic
                        .served
                        .fetch_add(length, Ordering::Relaxed);
                    return Ok(Some(chunk));
                }
                Next::End(End::Whole) if self.place.at >= self.end => return Ok(None),
                // Others were served faster.
                Next::Behind | Next::End(End::Whole) => {
                    let rest = self.place.at..self.end;
                    self.place = self.blobs.place(self.digest, self.size, &rest);
                }
                Next::End(End::Missing) => return Err(Stopped::Missing),
                Next::End(End::Broken(error)) => {
                    return Err(Stopped::Broken(anyhow!("{error:#}")));
                }
            }
        }
    }
}
