//! Repair on S3: rewrites manifests without missing and damaged blobs, then deletes the damaged
//! objects.
//!
//! Others may export at the same time. So everything is looked at again right before it is changed:
//! the manifest that is rewritten is the latest one, and an object is deleted only if it is still
//! the one that was found damaged and no manifest names it any more.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use futures::FutureExt;

use crate::bucket::Bucket;
use crate::cache::Dropped;
use crate::cache::digest::Digest;
use crate::progress::{Progress, Verb};
use crate::store::ObjectInfo;
use crate::transfer::download::Downloader;

/// How often to look for new manifests that name a damaged object.
const PASSES: usize = 3;

/// Keys in one DeleteObjects.
const BATCH: usize = 1_000;

/// A repair of one bucket.
pub(super) struct Repair<'a> {
    pub(super) bucket: &'a Bucket,
    pub(super) downloader: &'a Downloader,
    pub(super) progress: &'a Progress,
    /// Only caches whose names match may be rewritten.
    pub(super) name: Option<&'a glob::Pattern>,
    /// The objects whose bytes are wrong, as they were found.
    pub(super) damaged: BTreeMap<Digest, ObjectInfo>,
}

/// What a repair has done.
#[derive(Default)]
pub(super) struct Repaired {
    /// The caches that were rewritten, by name, and what they lost.
    pub(super) caches: BTreeMap<String, Dropped>,
    /// The caches that could not be rewritten, by name, and why.
    pub(super) failed: BTreeMap<String, String>,
    pub(super) deleted: u64,
    /// Damaged objects that are still there.
    pub(super) undeleted: u64,
}

impl Repair<'_> {
    /// Repairs the caches `names`, then deletes the blobs of `doomed`: those that are damaged, or whose
    /// size no manifest states. Each comes with the sizes that manifests state.
    ///
    /// # Errors
    /// The store's. A cache that could not be repaired is not an error.
    pub(super) async fn run(
        &self,
        names: BTreeSet<String>,
        doomed: &BTreeMap<Digest, BTreeSet<u64>>,
    ) -> Result<Repaired> {
        let mut done = Repaired::default();
        let mut names = names;
        let mut named = BTreeSet::new();
        for _ in 0..PASSES {
            for name in &names {
                let is_damaged = |blob| self.is_damaged(blob).boxed();
                match self.bucket.rewrite_without_bad(name, is_damaged).await {
                    Ok(None) => {}
                    Ok(Some(dropped)) => {
                        done.caches.insert(name.clone(), dropped);
                    }
                    Err(error) => {
                        done.failed.insert(name.clone(), format!("{error:#}"));
                    }
                }
            }
            if doomed.is_empty() {
                return Ok(done);
            }
            named.clear();
            names.clear();
            for cache in self.bucket.caches().await? {
                let blobs = cache.contents.into_iter().flat_map(|found| found.blobs);
                let doomed = blobs.filter(|(blob, _)| doomed.contains_key(blob));
                let doomed: Vec<Digest> = doomed.map(|(blob, _)| blob).collect();
                if !doomed.is_empty() {
                    named.extend(doomed);
                    names.insert(cache.named.name);
                }
            }
            names.retain(|name| self.name.is_none_or(|glob| glob.matches(name)));
            names.retain(|name| !done.failed.contains_key(name));
            if names.is_empty() {
                break;
            }
        }
        let mut keys = Vec::new();
        for (blob, sizes) in doomed {
            // Someone may have replaced or deleted it meanwhile.
            match self.bucket.blob(blob).await? {
                Some(info) if self.damaged.get(blob) == Some(&info) => {}
                Some(info) if !sizes.contains(&info.size) => {}
                _ => continue,
            }
            match named.contains(blob) {
                true => {
                    done.undeleted += 1;
                    self.progress.warn(&format!(
                        "{blob} is damaged and stays: a cache still needs it"
                    ));
                }
                false => keys.push(self.bucket.blob_key(blob)),
            }
        }
        self.delete(&keys, &mut done).await?;
        Ok(done)
    }

    /// Whether the blob was found damaged and still is.
    async fn is_damaged(&self, blob: Digest) -> Result<bool> {
        let Some(damaged) = self.damaged.get(&blob) else {
            return Ok(false);
        };
        match self.bucket.blob(&blob).await? {
            None => Ok(true),
            Some(info) if info == *damaged => Ok(true),
            Some(info) => {
                let shown = self.progress.blob(Verb::Hash, &blob, info.size);
                let key = self.bucket.blob_key(&blob);
                let good = self
                    .downloader
                    .verify(&key, blob, info.size, &shown)
                    .await?;
                shown.done();
                Ok(!good)
            }
        }
    }

    async fn delete(&self, keys: &[String], done: &mut Repaired) -> Result<()> {
        for batch in keys.chunks(BATCH) {
            let deleted = self.bucket.store().delete(batch).await?;
            for (key, deleted) in batch.iter().zip(deleted) {
                match deleted {
                    Ok(()) => {
                        done.deleted += 1;
                        self.progress.note(&format!("deleted {key}"));
                    }
                    Err(error) => {
                        done.undeleted += 1;
                        self.progress
                            .warn(&format!("{key} is damaged and stays: {error}"));
                    }
                }
            }
        }
        Ok(())
    }
}
