//! Deletes manifests first, then blobs: wherever it stops, no manifest names a deleted blob.
//!
//! Exports may run at the same time. Before each page of blobs is listed, the manifests are looked
//! at again; the page is then deleted at once. An export that names a blob has either sent or
//! refreshed it, so the blob is young in the listing; or it found the blob younger than
//! touch_refresh, and the grace is longer. That leaves a blob that is refreshed between the listing
//! and the deletion. So at the end, the manifests that were written since the plan are read and
//! their blobs looked up.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures::FutureExt;
use futures::future::try_join_all;
use futures::stream::{StreamExt, TryStreamExt};
use parking_lot::RwLock;
use serde::Serialize;
use tokio::sync::Mutex;

use super::selection::{Fate, fate};
use super::{LISTED, Plan, PruneDetails, now, problems};
use crate::bucket::watch::{Watch, Watched};
use crate::bucket::{Bucket, Certainty, Key, Pages};
use crate::cache::digest::Digest;
use crate::progress::Progress;
use crate::progress::count;
use crate::quote::printable;
use crate::store::{Kind, ObjectInfo, StoreError, StoreResult, Upload};

/// Requests in flight at once, each for one object.
const AT_ONCE: usize = 16;

/// Objects that one request deletes at most.
const BATCH: usize = 1000;

/// What was deleted.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Deleted {
    pub caches: u64,
    pub blobs: u64,
    pub bytes: u64,
    /// Unfinished uploads that were aborted.
    pub uploads: u64,
    /// The addresses of manifests that were rewritten.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub repaired: Vec<String>,
}

/// What is known about the bucket while blobs are being deleted.
struct Guard {
    watch: Watch,
    /// When the latest look began.
    looked: Option<Instant>,
    /// Caches that were read since the plan, by their addresses.
    late: BTreeMap<String, Watched>,
}

pub(super) struct Deletion<'a> {
    bucket: &'a Bucket,
    guard: Mutex<Guard>,
    /// Blobs that caches need.
    needed: RwLock<BTreeSet<Digest>>,
    grace: Duration,
    progress: &'a Progress,
    deleted: parking_lot::Mutex<Deleted>,
    /// Objects that could not be deleted.
    failed: parking_lot::Mutex<Vec<String>>,
    failures: parking_lot::Mutex<u64>,
}

/// Tells `details` what was deleted, however the work ends.
struct Counted<'a> {
    deletion: &'a Deletion<'a>,
    details: &'a mut PruneDetails,
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.details.deleted = std::mem::take(&mut *self.deletion.deleted.lock());
    }
}

impl<'a> Deletion<'a> {
    pub fn new(
        bucket: &'a Bucket,
        watch: Watch,
        plan: &Plan,
        grace: Duration,
        progress: &'a Progress,
    ) -> Self {
        Deletion {
            bucket,
            guard: Mutex::new(Guard {
                watch,
                looked: None,
                late: BTreeMap::new(),
            }),
            needed: RwLock::new(plan.needed.clone()),
            grace,
            progress,
            deleted: parking_lot::Mutex::default(),
            failed: parking_lot::Mutex::default(),
            failures: parking_lot::Mutex::default(),
        }
    }

    /// Carries out the plan. `details` say what was deleted, even if it fails midway or is dropped.
    pub async fn run(self, plan: Plan, repair: bool, details: &mut PruneDetails) -> Result<()> {
        let counted = Counted {
            deletion: &self,
            details,
        };
        let ended = self.work(plan, repair, counted.details).await;
        drop(counted);
        let failures = self.failures.into_inner();
        if failures > 0 {
            let shown = self.failed.into_inner().join("; ");
            let objects = count(failures, "object");
            details
                .problems
                .push(format!("{objects} could not be deleted: {shown}"));
        }
        ended
    }

    async fn work(&self, plan: Plan, repair: bool, details: &mut PruneDetails) -> Result<()> {
        self.delete_manifests(&plan.caches).await?;
        if plan.blocked.is_none() {
            let listings = self.bucket.blob_listings().into_iter();
            try_join_all(listings.map(|pages| self.delete_listed(pages))).await?;
        }
        self.abort(&plan.uploads).await;
        if plan.blocked.is_none() {
            self.look().await?;
            details.problems = problems(&self.guard.lock().await.watch, |_| false);
            let broken = self.broken(&plan.needed).await?;
            self.settle(broken, repair, details).await?;
        }
        Ok(())
    }

    /// Deletes the old, unneeded blobs of a listing, page by page.
    async fn delete_listed(&self, mut pages: Pages) -> Result<()> {
        while self.look().await? {
            let Some(page) = pages.try_next().await? else {
                break;
            };
            self.delete_blobs(page).await?;
        }
        Ok(())
    }

    /// Looks at the manifests, unless another look has begun since this was called. `false`: no more
    /// blobs may be deleted.
    async fn look(&self) -> Result<bool> {
        let asked = Instant::now();
        let mut guard = self.guard.lock().await;
        if guard.looked.is_none_or(|looked| looked < asked) {
            guard.looked = Some(Instant::now());
            for watched in guard.watch.look().await? {
                self.protect(&watched);
                guard.late.insert(watched.address.clone(), watched);
            }
        }
        Ok(problems(&guard.watch, |_| false).is_empty())
    }

    fn protect(&self, watched: &Watched) {
        let contents = watched.cache.contents.iter();
        let blobs = contents.flat_map(|contents| &contents.blobs);
        self.needed.write().extend(blobs.map(|(digest, _)| *digest));
    }

    /// Deletes those manifests that have not changed since they were read. The blobs of the others
    /// are needed.
    async fn delete_manifests(&self, caches: &[Watched]) -> Result<()> {
        for batch in caches.chunks(BATCH) {
            let keys: Vec<_> = batch.iter().map(|w| w.cache.named.key.clone()).collect();
            let found: Vec<_> = futures::stream::iter(keys)
                .map(|key| async move { self.bucket.store().head(&key).await })
                .buffered(AT_ONCE)
                .try_collect()
                .await?;
            let (same, others): (Vec<_>, Vec<_>) =
                batch.iter().zip(found).partition(|(watched, info)| {
                    info.as_ref().is_some_and(|info| is_same(watched, info))
                });
            for (watched, info) in others {
                self.protect(watched);
                if info.is_some() {
                    let key = &watched.cache.named.key;
                    self.progress
                        .note(&format!("{key} was written again meanwhile, and stays"));
                }
            }
            let objects: Vec<_> = same
                .iter()
                .map(|(watched, _)| {
                    let named = &watched.cache.named;
                    (named.key.clone(), named.info.etag.clone())
                })
                .collect();
            let results = self.delete(&objects).await?;
            for ((watched, _), result) in same.into_iter().zip(results) {
                match result {
                    Ok(()) => {
                        self.deleted.lock().caches += 1;
                        self.guard
                            .lock()
                            .await
                            .watch
                            .forget(&watched.cache.named.key);
                    }
                    Err(error) => {
                        self.protect(watched);
                        self.note_failure(&error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Deletes the old, unneeded blobs of one page.
    async fn delete_blobs(&self, page: Vec<(String, ObjectInfo)>) -> Result<()> {
        let now = now(self.bucket);
        let (mut objects, mut sizes) = (Vec::new(), Vec::new());
        for (key, info) in page {
            let Key::Blob(digest) = self.bucket.parse_key(&key, info.size) else {
                continue;
            };
            let needed = self.needed.read().contains(&digest);
            if fate(needed, &info, self.grace, now) == Fate::Goes {
                objects.push((key, info.etag));
                sizes.push(info.size);
            }
        }
        // A store may list more on a page than one request deletes.
        for (objects, sizes) in objects.chunks(BATCH).zip(sizes.chunks(BATCH)) {
            let results = self.delete(objects).await?;
            let mut deleted = self.deleted.lock();
            for (result, size) in results.into_iter().zip(sizes) {
                match result {
                    Ok(()) => {
                        deleted.blobs += 1;
                        deleted.bytes += size;
                    }
                    Err(error) => self.note_failure(&error),
                }
            }
        }
        Ok(())
    }

    /// Deletes objects, checking their ETags where they are known.
    async fn delete(
        &self,
        objects: &[(String, Option<String>)],
    ) -> StoreResult<Vec<StoreResult<()>>> {
        if objects.is_empty() {
            return Ok(Vec::new());
        }
        let tagged: Option<Vec<(String, String)>> = objects
            .iter()
            .map(|(key, etag)| Some((key.clone(), etag.clone()?)))
            .collect();
        let store = self.bucket.store();
        match tagged {
            Some(tagged) => store.delete_unchanged(&tagged).await,
            None => {
                let keys: Vec<_> = objects.iter().map(|(key, _)| key.clone()).collect();
                store.delete(&keys).await
            }
        }
    }

    /// An object that has been replaced stays, which is not a failure.
    fn note_failure(&self, error: &StoreError) {
        if error.kind == Kind::Changed {
            return;
        }
        *self.failures.lock() += 1;
        let mut failed = self.failed.lock();
        if failed.len() < LISTED {
            failed.push(error.message.clone());
        }
    }

    async fn abort(&self, uploads: &[Upload]) {
        futures::stream::iter(uploads.to_vec())
            .for_each_concurrent(AT_ONCE, |upload| async move {
                match self
                    .bucket
                    .store()
                    .abort_upload(&upload.key, &upload.id)
                    .await
                {
                    Ok(()) => self.deleted.lock().uploads += 1,
                    Err(error) => self.note_failure(&error),
                }
            })
            .await;
    }

    /// Of the caches that were read since the plan, those that name missing blobs. Blobs `needed`
    /// from the start were not deleted.
    async fn broken(&self, needed: &BTreeSet<Digest>) -> Result<Vec<(Watched, BTreeSet<Digest>)>> {
        let late = std::mem::take(&mut self.guard.lock().await.late);
        let blobs = |watched: &Watched| {
            let contents = watched.cache.contents.iter();
            let blobs = contents.flat_map(|contents| contents.blobs.clone());
            blobs
                .filter(|(digest, _)| !needed.contains(digest))
                .collect::<Vec<_>>()
        };
        let wanted = late.values().flat_map(blobs).map(|(digest, _)| digest);
        let wanted: BTreeSet<Digest> = wanted.collect();
        let found = self.bucket.survey(wanted, Certainty::Known).await?;
        let mut broken = Vec::new();
        for watched in late.into_values() {
            let missing: BTreeSet<Digest> = blobs(&watched)
                .into_iter()
                .map(|(digest, _)| digest)
                .filter(|digest| !found.contains_key(digest))
                .collect();
            if !missing.is_empty() {
                broken.push((watched, missing));
            }
        }
        Ok(broken)
    }

    /// Repairs manifests that name deleted blobs, or reports them.
    async fn settle(
        &self,
        broken: Vec<(Watched, BTreeSet<Digest>)>,
        repair: bool,
        details: &mut PruneDetails,
    ) -> Result<()> {
        for (watched, missing) in broken {
            let blobs = count(missing.len() as u64, "blob");
            let address = &watched.address;
            if !watched.ours || !repair {
                let hint = match watched.ours {
                    true => "export it again, or prune with --repair",
                    false => "export it again",
                };
                details.problems.push(format!(
                    "{address} was written meanwhile and names {blobs} that are gone: {hint}"
                ));
                continue;
            }
            let name = &watched.cache.named.name;
            let none_damaged = |_| async { Ok(false) }.boxed();
            let rewritten = self.bucket.rewrite_without_bad(name, none_damaged);
            let repairing = || format!("repairing {}", printable(address));
            let rewritten = rewritten.await.with_context(repairing)?;
            if rewritten.is_some() {
                self.deleted.lock().repaired.push(address.clone());
            }
        }
        Ok(())
    }
}

/// Whether a manifest is still the one that was read. Some stores (s3s-fs) list no ETags.
fn is_same(watched: &Watched, info: &ObjectInfo) -> bool {
    let known = &watched.cache.named.info;
    let tags = known.etag.as_ref().zip(info.etag.as_ref());
    tags.is_none_or(|(known, found)| known == found)
        && known.size == info.size
        && seconds(known.last_modified) == seconds(info.last_modified)
}

/// A HEAD gives whole seconds, a listing may give more.
fn seconds(time: Option<std::time::SystemTime>) -> Option<u64> {
    let since = time?.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(since.as_secs())
}
