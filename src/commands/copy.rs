//! Copy: copies caches from S3 to other places on S3, merging several into one. The server copies
//! blobs if it can; otherwise they pass through this machine's memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use anyhow::{Context as _, Result, anyhow, bail};
use async_trait::async_trait;
use bytes::Bytes;
use serde::Serialize;
use tokio::sync::Semaphore;

use crate::bucket::publish::{self, Counts, Plan, Publisher, Supply, Words};
use crate::bucket::{Bucket, Certainty};
use crate::cache::digest::Digest;
use crate::cache::{CacheConfig, Dropped};
use crate::commands::{Context, PerSpec, Work, for_each_spec, left_out};
use crate::config::{CopyTask, ExportConfig, Mode, S3Config};
use crate::process;
use crate::progress::{self, Progress};
use crate::quote::printable;
use crate::report::{Details, Outcome, Place, Report};
use crate::store::{Kind, ObjectInfo, StoreError};
use crate::transfer::object::ObjectSource;
use crate::transfer::upload::Uploader;

/// Copies on the server in flight at once. Each is one request, and the store does the rest.
const COPIES: usize = 32;

/// Open files of a blob that passes through: connections to both sides, and their replacements.
const FILES: usize = 4;

const WORDS: Words = Words {
    send: "copy",
    sending: "copying",
    run: "copy",
    done: "copied",
};

/// Copies to every target of the task.
pub async fn run(task: &CopyTask, context: &Context<'_>) -> Outcome {
    let copy = Copy { task };
    for_each_spec(&copy, &task.targets, context).await.into()
}

/// What a copy did at one target, or would do.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CopyDetails {
    /// The addresses of the sources' manifests.
    sources: Vec<String>,
    dry_run: bool,
    #[serde(flatten)]
    counts: Counts,
    /// Those of the transferred blobs that were copied on the server.
    on_server: u64,
    /// Blobs of the sources' caches that mode=min leaves out.
    left_out: u64,
    /// Layers and results left out because blobs are missing.
    dropped_layers: u64,
    dropped_results: u64,
}

impl Details for CopyDetails {
    fn summary(&self, place: &Place, cost: &str) -> String {
        let Counts {
            transferred,
            present,
            refreshed,
            bytes,
        } = self.counts;
        let blobs = self.counts.blobs(self.left_out, "copies");
        let sources = self.sources.iter().map(|source| printable(source));
        let sources = sources.collect::<Vec<_>>().join(" and ");
        let (addresses, bytes) = (place.addresses(), progress::bytes(bytes));
        if self.dry_run {
            format!(
                "dry run: would copy {blobs} from {sources} to {addresses}: would copy {transferred} \
                 ({bytes}), {present} already there, would refresh {refreshed}; {cost}"
            )
        } else {
            let on_server = match self.on_server {
                0 => String::new(),
                n => format!(", {n} on the server"),
            };
            format!(
                "copied {blobs} from {sources} to {addresses}: {transferred} copied ({bytes}{on_server}), \
                 {present} already there, {refreshed} refreshed; {cost}"
            )
        }
    }

    fn of_failure(self) -> Self {
        CopyDetails {
            sources: self.sources,
            dry_run: self.dry_run,
            ..CopyDetails::default()
        }
    }
}

/// A cache to be copied, and which of its blobs its bucket has.
struct Original {
    bucket: Bucket,
    cache: CacheConfig,
    found: BTreeMap<Digest, ObjectInfo>,
}

impl Original {
    /// What its bucket says about a blob of this size.
    fn blob(&self, digest: &Digest, size: u64) -> Option<&ObjectInfo> {
        self.found.get(digest).filter(|info| info.size == size)
    }
}

struct Copy<'a> {
    task: &'a CopyTask,
}

#[async_trait]
impl PerSpec for Copy<'_> {
    type Spec = ExportConfig;
    type Details = CopyDetails;
    type Ready = Vec<Original>;

    fn s3<'a>(&self, target: &'a ExportConfig) -> &'a S3Config {
        &target.s3
    }

    fn ignores_errors(&self, target: &ExportConfig) -> bool {
        target.ignore_error
    }

    fn blank(&self, target: &ExportConfig) -> Report<CopyDetails> {
        let s3 = &target.s3;
        let details = CopyDetails {
            sources: self.task.sources.iter().map(S3Config::address).collect(),
            dry_run: self.task.dry_run,
            ..CopyDetails::default()
        };
        Report::new(Place::new("copy", "copying to", s3, &s3.names), details)
    }

    /// Reads the caches.
    async fn prepare(&self, context: &Context<'_>) -> Result<Vec<Original>> {
        let mut originals = Vec::new();
        for source in &self.task.sources {
            let original = read(source, context).await;
            match original.with_context(|| format!("copying from {}", source.address()))? {
                Some(original) => originals.push(original),
                None if self.task.sources.len() > 1 => context.progress.warn(&absent(source)),
                None => bail!(
                    "{}; layercache ls lists those that are there",
                    absent(source)
                ),
            }
        }
        if originals.is_empty() {
            bail!("there is no cache at any --cache-from");
        }
        Ok(originals)
    }

    fn work<'a>(
        &'a self,
        originals: &'a Vec<Original>,
        target: &'a ExportConfig,
        bucket: Bucket,
        earlier: &[Report<CopyDetails>],
        context: &'a Context<'_>,
    ) -> Box<dyn Work<CopyDetails> + 'a> {
        let store = Arc::clone(bucket.store());
        Box::new(CopyTo {
            task: self.task,
            originals,
            target,
            uploader: Uploader::new(store, context.progress.clone(), context.limits),
            bucket,
            progress: context.progress,
            // Only the first target's report counts the requests that read the sources.
            requests_before: match earlier {
                [] => 0,
                _ => requests(originals),
            },
        })
    }
}

fn absent(source: &S3Config) -> String {
    let name = printable(&source.names[0]);
    format!("there is no cache named '{name}' ({})", source.address())
}

fn requests(originals: &[Original]) -> u64 {
    let stores = originals.iter().map(|original| original.bucket.store());
    stores.map(|store| store.requests()).sum()
}

/// Reads a cache, and looks up its blobs. `None`: there is no such cache.
async fn read(source: &S3Config, context: &Context<'_>) -> Result<Option<Original>> {
    let store = (context.connect)(source, context.progress).await?;
    let bucket = Bucket::new(store, source, context.progress);
    context.progress.stage("reading the manifest", 0, 0);
    let Some(cache) = bucket.manifest(&source.names[0]).await? else {
        return Ok(None);
    };
    context.progress.stage("looking for blobs on S3", 0, 0);
    let digests = cache.blobs()?.into_keys();
    let found = bucket.survey(digests, Certainty::Known).await?;
    Ok(Some(Original {
        bucket,
        cache,
        found,
    }))
}

/// The copy to one target.
struct CopyTo<'a> {
    task: &'a CopyTask,
    originals: &'a [Original],
    target: &'a ExportConfig,
    bucket: Bucket,
    uploader: Uploader,
    progress: &'a Progress,
    requests_before: u64,
}

#[async_trait]
impl Work<CopyDetails> for CopyTo<'_> {
    async fn run(&mut self, report: &mut Report<CopyDetails>) -> Result<()> {
        let plan = self.plan(&mut report.details).await?;
        report.details.counts = plan.counts();
        if self.task.dry_run {
            plan.show(&self.bucket, &WORDS, self.progress);
            return Ok(());
        }
        let supply = FromBuckets {
            originals: self.originals,
            target: &self.target.s3,
            progress: self.progress,
            refused: self.originals.iter().map(|_| false.into()).collect(),
            streams: Semaphore::new(self.target.upload_parallelism),
            on_server: AtomicU64::new(0),
        };
        let publisher = Publisher {
            bucket: &self.bucket,
            uploader: &self.uploader,
            supply: &supply,
            parallelism: process::within_open_files(COPIES, FILES),
            small: 0,
            progress: self.progress,
        };
        let done = publisher.execute(plan, &mut report.details.counts).await;
        report.details.on_server = supply.on_server.into_inner();
        done
    }

    async fn clean_up(&mut self) -> Result<()> {
        self.uploader.abort_unfinished().await;
        Ok(())
    }

    fn other_requests(&self) -> u64 {
        requests(self.originals) - self.requests_before
    }
}

impl CopyTo<'_> {
    /// Merges the caches, without what is lost, and compares the result with what the target has.
    async fn plan(&self, details: &mut CopyDetails) -> Result<Plan> {
        let mut all = BTreeMap::new();
        for original in self.originals {
            all.extend(original.cache.blobs()?);
        }
        self.progress.stage("looking for blobs on S3", 0, 0);
        let surveyed = publish::survey(&self.bucket, &all, self.task.dry_run);
        let (found, uploads) = surveyed.await?;
        let (mut missing, mut dropped) = (BTreeSet::new(), Dropped::default());
        let mut parts = Vec::new();
        for original in self.originals {
            let lost = self.missing(original, &found)?;
            let (left, gone) = original.cache.without_blobs(&lost);
            missing.extend(lost);
            dropped.layers += gone.layers;
            dropped.results += gone.results;
            parts.push(left);
        }
        if !missing.is_empty() {
            let blobs = missing.len() as u64;
            let warning = left_out(blobs, "expired?", &dropped, self.task.dry_run);
            self.progress.warn(&warning);
        }
        details.dropped_layers = dropped.layers as u64;
        details.dropped_results = dropped.results as u64;
        let whole = merge(parts.clone());
        let cache = match self.target.mode {
            Mode::Max => whole.clone(),
            // Reduced one by one: in a merge, one build's own result may be another's intermediate
            // one.
            Mode::Min => merge(parts.iter().map(CacheConfig::min).collect()),
        };
        let blobs = cache.blobs()?;
        details.left_out = (whole.blobs()?.len() - blobs.len()) as u64;
        let manifest = Bytes::from(cache.to_s3()?);
        let now = SystemTime::now();
        Ok(Plan::new(
            manifest,
            blobs,
            found,
            uploads,
            self.target.touch_refresh,
            now,
        ))
    }

    /// The blobs of the cache that are neither at the target nor at any source.
    fn missing(
        &self,
        original: &Original,
        found: &BTreeMap<Digest, ObjectInfo>,
    ) -> Result<BTreeSet<Digest>> {
        let is_somewhere = |digest: &Digest, size: u64| {
            let at_target = found.get(digest).is_some_and(|info| info.size == size);
            let at = |original: &Original| original.blob(digest, size).is_some();
            at_target || self.originals.iter().any(at)
        };
        let blobs = original.cache.blobs()?;
        let missing = blobs
            .into_iter()
            .filter(|(digest, size)| !is_somewhere(digest, *size));
        Ok(missing.map(|(digest, _)| digest).collect())
    }
}

/// One cache stays as it is.
fn merge(parts: Vec<CacheConfig>) -> CacheConfig {
    match parts.len() {
        1 => CacheConfig::merged(parts),
        _ => CacheConfig::merged(parts).without_dangling(),
    }
}

/// The buckets that blobs are copied from.
struct FromBuckets<'a> {
    originals: &'a [Original],
    target: &'a S3Config,
    progress: &'a Progress,
    /// For each original, whether the store refuses to copy from it.
    refused: Vec<AtomicBool>,
    /// Room for blobs that pass through this machine.
    streams: Semaphore,
    /// Blobs copied on the server.
    on_server: AtomicU64,
}

impl FromBuckets<'_> {
    /// Whether the store copied the blob.
    async fn copy(
        &self,
        at: usize,
        info: &ObjectInfo,
        uploader: &Uploader,
        key: &str,
        digest: &Digest,
    ) -> bool {
        let source = self.originals[at].bucket.config();
        let from = self.originals[at].bucket.blob_key(digest);
        let itself = source.bucket == self.target.bucket && from == key;
        // Two accounts of one store can have buckets of the same name: the ETag tells them apart.
        if source.endpoint_url != self.target.endpoint_url
            || itself
            || info.etag.is_none()
            || self.refused[at].load(Ordering::Relaxed)
        {
            return false;
        }
        let copied = uploader.copy((&source.bucket, &from), key, digest, info);
        let why = match copied.await {
            Ok(true) => {
                self.on_server.fetch_add(1, Ordering::Relaxed);
                return true;
            }
            Ok(false) => "it is not visible to the target's credentials".to_owned(),
            Err(error) => {
                if matches!(
                    error.kind,
                    Kind::Denied | Kind::NoBucket | Kind::Unsupported
                ) {
                    self.refused[at].store(true, Ordering::Relaxed);
                }
                error.to_string()
            }
        };
        self.progress
            .debug(&format!("{digest}: not copied on the server: {why}"));
        false
    }
}

#[async_trait]
impl Supply for FromBuckets<'_> {
    fn words(&self) -> &'static Words {
        &WORDS
    }

    async fn send(&self, uploader: &Uploader, key: &str, digest: Digest, size: u64) -> Result<()> {
        let originals = self.originals.iter().enumerate();
        let holders: Vec<_> = originals
            .filter_map(|(at, original)| Some((at, original.blob(&digest, size)?)))
            .collect();
        for (at, info) in &holders {
            if self.copy(*at, info, uploader, key, &digest).await {
                return Ok(());
            }
        }
        let _room = self.streams.acquire().await?;
        let mut failed = anyhow!("blob {digest} disappeared from the target, and no source has it");
        for (at, _) in holders {
            let bucket = &self.originals[at].bucket;
            let store = Arc::clone(bucket.store());
            let source = ObjectSource::new(store, bucket.blob_key(&digest), digest, size);
            match uploader.upload(key, Arc::new(source)).await {
                // Another source may have it whole.
                Err(error) if is_of_source(&error) => failed = error,
                done => return done,
            }
        }
        Err(failed)
    }
}

/// Whether an upload failed at what was to be sent, not at the target.
fn is_of_source(error: &anyhow::Error) -> bool {
    let store_error = error.downcast_ref::<StoreError>();
    store_error.is_none_or(|error| error.kind == Kind::LocalBody)
}
