//! Publishing a cache: brings to a bucket what it lacks of the cache's blobs, refreshes what is old
//! there, and writes the manifests last. An export, a copy and a push through `serve` differ only in
//! where blobs come from.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use anyhow::{Result, bail};
use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{StreamExt, TryStreamExt};
use serde::Serialize;

use crate::bucket::{Bucket, Certainty};
use crate::cache::digest::Digest;
use crate::process;
use crate::progress::count;
use crate::progress::{self, Progress};
use crate::store::{ObjectInfo, Upload};
use crate::transfer::refresh::Refreshed;
use crate::transfer::upload::Uploader;

/// Refreshes in flight at once. Each is one request, and the store does the rest.
const REFRESHES: usize = 32;

/// Bytes below which a blob costs a round trip rather than bandwidth.
const SMALL: u64 = 1 << 20;

/// How often blobs may vanish from S3 during one run before it gives up.
const CHECKS: usize = 5;

/// Where blobs come from that a bucket lacks.
#[async_trait]
pub trait Supply: Send + Sync {
    /// What is done with them, for messages.
    fn words(&self) -> &'static Words;

    /// Brings a blob of `size` bytes to `key`.
    ///
    /// # Errors
    /// It cannot be read, is damaged, or the store fails. Nothing is visible at `key` then.
    async fn send(&self, uploader: &Uploader, key: &str, digest: Digest, size: u64) -> Result<()>;
}

/// How a [`Supply`] is spoken of.
pub struct Words {
    /// "upload"
    pub send: &'static str,
    /// "uploading"
    pub sending: &'static str,
    /// "export"
    pub run: &'static str,
    /// "exported"
    pub done: &'static str,
}

/// What became of blobs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Blobs sent.
    pub transferred: u64,
    /// Blobs that were there and young.
    pub present: u64,
    /// Blobs that were there and old, and are young now.
    pub refreshed: u64,
    /// Bytes of the blobs that were sent.
    pub bytes: u64,
}

impl Counts {
    /// All its blobs, for people; `left_out` more would be there if mode=max `sends` all.
    pub fn blobs(&self, left_out: u64, sends: &str) -> String {
        let all = self.transferred + self.present + self.refreshed;
        match left_out {
            0 => count(all, "blob"),
            more => format!(
                "{all} of {} (mode=min; mode=max {sends} all)",
                count(all + more, "blob")
            ),
        }
    }
}

/// What is going to be done at one bucket.
pub struct Plan {
    /// The S3 manifest, to be written under every name.
    manifest: Bytes,
    /// Every blob that it names, with its size.
    blobs: BTreeMap<Digest, u64>,
    /// The largest first, so that none is left to run alone at the end.
    pub send: Vec<(Digest, u64)>,
    refresh: Vec<(Digest, ObjectInfo)>,
    /// Multipart uploads of blobs that are in place, with the blobs' sizes.
    pointless: Vec<(Upload, u64)>,
}

impl Plan {
    /// Compares the cache's `blobs` with what was `found` of them. `uploads` are unfinished ones.
    pub fn new(
        manifest: Bytes,
        blobs: BTreeMap<Digest, u64>,
        mut found: BTreeMap<Digest, ObjectInfo>,
        uploads: Vec<(Digest, Upload)>,
        touch_refresh: Duration,
        now: SystemTime,
    ) -> Self {
        let mut plan = Plan {
            manifest,
            blobs: BTreeMap::new(),
            send: Vec::new(),
            refresh: Vec::new(),
            pointless: Vec::new(),
        };
        let is_there =
            |digest: &Digest, size| found.get(digest).is_some_and(|info| info.size == size);
        for (digest, upload) in uploads {
            if let Some(&size) = blobs.get(&digest)
                && is_there(&digest, size)
            {
                plan.pointless.push((upload, size));
            }
        }
        for (&digest, &size) in &blobs {
            match found.remove(&digest) {
                // An object of another size is not this blob, whatever its key says.
                Some(info) if info.size == size => {
                    if is_old(&info, touch_refresh, now) {
                        plan.refresh.push((digest, info));
                    }
                }
                _ => plan.send.push((digest, size)),
            }
        }
        plan.blobs = blobs;
        plan.send
            .sort_by_key(|&(digest, size)| (Reverse(size), digest));
        plan
    }

    /// What would become of the blobs if nothing stood in the way.
    pub fn counts(&self) -> Counts {
        let (transferred, refreshed) = (self.send.len() as u64, self.refresh.len() as u64);
        Counts {
            transferred,
            refreshed,
            present: self.blobs.len() as u64 - transferred - refreshed,
            bytes: self.send.iter().map(|(_, size)| size).sum(),
        }
    }

    /// Says what would be done.
    pub fn show(&self, bucket: &Bucket, words: &Words, progress: &Progress) {
        for (digest, size) in &self.send {
            let size = progress::bytes(*size);
            progress.note(&format!("would {} {digest} ({size})", words.send));
        }
        for (digest, _) in &self.refresh {
            progress.note(&format!("would refresh {digest}"));
        }
        let s3 = bucket.config();
        for name in &s3.names {
            progress.note(&format!("would write {}", s3.manifest_key(name)));
        }
    }
}

/// What the bucket has of `blobs`, and its unfinished uploads; none in a dry run, which aborts nothing.
///
/// # Errors
/// The store's.
pub async fn survey(
    bucket: &Bucket,
    blobs: &BTreeMap<Digest, u64>,
    dry_run: bool,
) -> Result<(BTreeMap<Digest, ObjectInfo>, Vec<(Digest, Upload)>)> {
    // Unless it is written to, nothing else says that the bucket is there.
    let certainty = match dry_run {
        true => Certainty::Unknown,
        false => Certainty::Known,
    };
    let uploads = async {
        match dry_run {
            true => Vec::new(),
            false => bucket.unfinished_uploads().await,
        }
    };
    let digests = blobs.keys().copied();
    let (found, uploads) = tokio::join!(bucket.survey(digests, certainty), uploads);
    Ok((found?, uploads))
}

/// Whether an object is due for a refresh. An unknown age counts as old. With touch_refresh=0s
/// everything is old, even an object of this very second.
pub fn is_old(info: &ObjectInfo, touch_refresh: Duration, now: SystemTime) -> bool {
    let age = info
        .last_modified
        .map(|then| now.duration_since(then).unwrap_or_default());
    touch_refresh.is_zero() || age.is_none_or(|age| age > touch_refresh)
}

/// Refreshes old blobs. Returns those that still are old, with their sizes, and why.
pub async fn refresh(
    bucket: &Bucket,
    uploader: &Uploader,
    old: &[(Digest, ObjectInfo)],
    progress: &Progress,
) -> Vec<(Digest, u64, Refreshed)> {
    if !old.is_empty() {
        let bytes = old.iter().map(|(_, info)| info.size).sum();
        progress.stage("refreshing", old.len() as u64, bytes);
    }
    futures::stream::iter(old.to_vec())
        .map(|(digest, info)| async move {
            let key = bucket.blob_key(&digest);
            let refreshed = uploader.refresh(&key, &digest, &info).await;
            (digest, info.size, refreshed)
        })
        .buffer_unordered(process::within_open_files(REFRESHES, 1))
        .filter(|(_, _, refreshed)| std::future::ready(*refreshed != Refreshed::Done))
        .collect()
        .await
}

/// Carries out plans at one bucket.
pub struct Publisher<'a> {
    pub bucket: &'a Bucket,
    pub uploader: &'a Uploader,
    pub supply: &'a dyn Supply,
    /// Blobs sent at once.
    pub parallelism: usize,
    /// Blobs below 1 MiB sent at once in addition. 0: they are sent like the others.
    pub small: usize,
    pub progress: &'a Progress,
}

impl Publisher<'_> {
    /// Does what the plan says, the manifests last. `counts` are corrected as it turns out.
    ///
    /// # Errors
    /// A blob could not be sent, blobs keep disappearing, or a manifest could not be written.
    pub async fn execute(&self, plan: Plan, counts: &mut Counts) -> Result<()> {
        self.bring(&plan, counts).await?;
        // The pointers to the blobs come last.
        for name in &self.bucket.config().names {
            let manifest = plan.manifest.clone();
            self.bucket.write_manifest(name, manifest).await?;
        }
        self.check_refreshed(&plan, counts).await?;
        self.uploader.abort_pointless(plan.pointless).await;
        Ok(())
    }

    /// Makes sure that every blob of the plan is there.
    async fn bring(&self, plan: &Plan, counts: &mut Counts) -> Result<()> {
        if plan.send.is_empty() && plan.refresh.is_empty() {
            return Ok(());
        }
        let mut settled = BTreeSet::new();
        let mut missing = plan.send.clone();
        let refreshing = refresh(self.bucket, self.uploader, &plan.refresh, self.progress);
        let not_refreshed = refreshing.await;
        // Each is looked at again before the manifest is written, unless it is sent.
        let (gone, refused): (Vec<_>, Vec<_>) = not_refreshed
            .into_iter()
            .partition(|(_, _, refreshed)| *refreshed == Refreshed::Gone);
        counts.refreshed -= (gone.len() + refused.len()) as u64;
        let renewed = futures::stream::iter(refused)
            .map(|(digest, size, _)| async move { (digest, size, self.renew(digest, size).await) })
            .buffer_unordered(self.parallelism)
            .collect::<Vec<_>>()
            .await;
        for (digest, size, renewed) in renewed {
            if renewed {
                counts.transferred += 1;
                counts.bytes += size;
                settled.insert(digest);
            } else {
                counts.present += 1;
            }
        }
        for (digest, size, _) in gone {
            missing.push((digest, size));
            counts.transferred += 1;
            counts.bytes += size;
        }
        let done = self.supply.words().done;
        for _ in 0..CHECKS {
            self.send_all(&missing).await?;
            settled.extend(missing.drain(..).map(|(digest, _)| digest));
            // Sending takes time, in which a lifecycle rule or another program may have deleted what
            // the survey found.
            missing = self.vanished(&plan.blobs, &settled).await?;
            if missing.is_empty() {
                return Ok(());
            }
            self.count_vanished(plan, &missing, counts);
        }
        bail!("something keeps deleting blobs of this cache from S3 while they are {done}")
    }

    /// A prune that listed a blob before it was refreshed may delete it once this run has looked for it
    /// the last time. After its deletions, a prune reads the manifests once more: so either it finds the
    /// manifest, or this finds the blob missing.
    async fn check_refreshed(&self, plan: &Plan, counts: &mut Counts) -> Result<()> {
        let refreshed = plan.refresh.iter();
        let refreshed = refreshed
            .map(|(digest, info)| (*digest, info.size))
            .collect();
        let missing = self.vanished(&refreshed, &BTreeSet::new()).await?;
        if !missing.is_empty() {
            self.count_vanished(plan, &missing, counts);
            self.send_all(&missing).await?;
        }
        Ok(())
    }

    /// Blobs that were found are going to be sent after all.
    fn count_vanished(&self, plan: &Plan, missing: &[(Digest, u64)], counts: &mut Counts) {
        let Words { sending, run, .. } = self.supply.words();
        self.progress.note(&format!(
            "{} disappeared from S3 during the {run}; {sending} again",
            count(missing.len() as u64, "blob")
        ));
        for (digest, size) in missing {
            let was_old = plan.refresh.iter().any(|(old, _)| old == digest);
            let before = match was_old && counts.refreshed > 0 {
                true => &mut counts.refreshed,
                false => &mut counts.present,
            };
            *before = before.saturating_sub(1);
            counts.transferred += 1;
            counts.bytes += size;
        }
    }

    /// Sends a blob that is on S3 but cannot be refreshed. A failure only leaves it old.
    async fn renew(&self, digest: Digest, size: u64) -> bool {
        match self.send(digest, size).await {
            Ok(()) => true,
            Err(error) => {
                let run = self.supply.words().run;
                self.progress.warn(&format!(
                    "blob {digest} could not be refreshed: a lifecycle rule may delete it before the next {run} ({error:#})"
                ));
                false
            }
        }
    }

    async fn send_all(&self, blobs: &[(Digest, u64)]) -> Result<()> {
        if !blobs.is_empty() {
            let bytes = blobs.iter().map(|(_, size)| size).sum();
            let sending = self.supply.words().sending;
            self.progress.stage(sending, blobs.len() as u64, bytes);
        }
        let is_small = |&(_, size): &(Digest, u64)| self.small > 0 && size < SMALL;
        let (small, others): (Vec<_>, Vec<_>) = blobs.iter().copied().partition(is_small);
        let send = |blobs: Vec<(Digest, u64)>, at_once: usize| {
            futures::stream::iter(blobs)
                .map(|(digest, size)| self.send(digest, size))
                .buffer_unordered(at_once)
                .try_collect::<()>()
        };
        // Small ones also have the places that the others leave free.
        let idle = self.parallelism.saturating_sub(others.len());
        let small = send(small, (self.small + idle).max(1));
        tokio::try_join!(send(others, self.parallelism), small)?;
        Ok(())
    }

    async fn send(&self, digest: Digest, size: u64) -> Result<()> {
        let key = self.bucket.blob_key(&digest);
        self.supply.send(self.uploader, &key, digest, size).await
    }

    /// The blobs that were found on S3 and are not there any more. Those in `settled` were sent in this
    /// run and need no second look.
    async fn vanished(
        &self,
        blobs: &BTreeMap<Digest, u64>,
        settled: &BTreeSet<Digest>,
    ) -> Result<Vec<(Digest, u64)>> {
        let others = || blobs.iter().filter(|(digest, _)| !settled.contains(digest));
        let digests = others().map(|(digest, _)| *digest);
        let found = self.bucket.survey(digests, Certainty::Known).await?;
        let is_there =
            |digest: &Digest, size| found.get(digest).is_some_and(|info| info.size == size);
        Ok(others()
            .filter(|(digest, size)| !is_there(digest, **size))
            .map(|(digest, size)| (*digest, *size))
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(size: u64, age: u64, now: SystemTime) -> ObjectInfo {
        ObjectInfo {
            size,
            last_modified: Some(now - Duration::from_secs(age)),
            etag: None,
            storage_class: None,
        }
    }

    #[test]
    fn a_blob_is_refreshed_when_older_than_touch_refresh_and_sent_when_its_size_is_wrong() {
        let now = SystemTime::now();
        let [young, old, short, absent] = [b"a", b"b", b"c", b"d"].map(|text| Digest::of(text));
        let blobs = BTreeMap::from([(young, 1), (old, 1), (short, 2), (absent, 3)]);
        let found = BTreeMap::from([
            (young, info(1, 60, now)),
            (old, info(1, 61, now)),
            (short, info(1, 0, now)),
        ]);
        let touch_refresh = Duration::from_secs(60);
        let plan = Plan::new(Bytes::new(), blobs, found, vec![], touch_refresh, now);
        assert_eq!(plan.send, vec![(absent, 3), (short, 2)]);
        let refresh: Vec<Digest> = plan.refresh.iter().map(|(digest, _)| *digest).collect();
        assert_eq!(refresh, vec![old]);
        let counts = plan.counts();
        assert_eq!((counts.present, counts.bytes), (1, 5));
    }
}
