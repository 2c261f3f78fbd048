//! Import: fetches what an S3 manifest names and the layout lacks, verifies it, and only then points a
//! tag to it.

mod fetch;
mod refresh;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use async_trait::async_trait;
use futures::stream::{StreamExt, TryStreamExt};
use serde::Serialize;

use crate::blocking::blocking;
use crate::bucket::{Bucket, Certainty};
use crate::cache::digest::Digest;
use crate::cache::documents::BUILDKIT_CONFIG_LIMIT;
use crate::cache::{CacheConfig, Record};
use crate::commands::{Context, LOCK_WAIT, PerSpec, Work, for_each_spec, left_out};
use crate::config::{ImportTask, Missing, S3Config};
use crate::layout::{Layout, Published, tag_of};
use crate::progress::{self, Progress, Verb, count};
use crate::quote::{first_few, printable};
use crate::report::{Details, Outcome, Place, Report};
use crate::transfer::download::Damaged;
use crate::transfer::limits::Limits;
use crate::transfer::upload::Uploader;

/// Blobs hashed at once under `--verify`.
const HASHES: usize = 4;

/// How often to fetch blobs again that another process deletes during the import.
const REFETCHES: usize = 10;

/// How many digests an error lists.
const LISTED: usize = 5;

/// Imports from every source of the task.
pub async fn run(task: &ImportTask, context: &Context<'_>) -> Outcome {
    let import = Import { task };
    let (mut reports, mut errors) = for_each_spec(&import, &task.sources, context).await;
    if task.require {
        errors.extend(require_usable(&mut reports));
    }
    (reports, errors).into()
}

/// What an import did with one source, or would do.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ImportDetails {
    /// The layout's directory as the user wrote it.
    layout: String,
    /// The digest of the manifest that was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    manifest: Option<Digest>,
    /// The tag that was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    tag: Option<String>,
    dry_run: bool,
    /// There is no such cache.
    not_found: bool,
    /// Blobs fetched.
    transferred: u64,
    /// Blobs that were in the layout already.
    present: u64,
    refreshed: u64,
    /// Bytes that were fetched.
    bytes: u64,
    /// Layers and results left out because blobs are missing.
    dropped_layers: u64,
    dropped_results: u64,
    /// Blobs that are damaged on S3.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    damaged: BTreeSet<Digest>,
    /// `--require` was given.
    #[serde(skip)]
    require: bool,
    /// `--refresh` was given.
    #[serde(skip)]
    refresh: bool,
    /// Whether a build can use what was imported: it has a result, or is an image.
    #[serde(skip)]
    usable: bool,
}

impl Details for ImportDetails {
    fn summary(&self, place: &Place, cost: &str) -> String {
        let addresses = place.addresses();
        if self.not_found {
            let hint = match self.require {
                true => "",
                false => " (--require makes this an error)",
            };
            return format!(
                "no cache named {} in {} yet: there is no {}{hint}; {cost}",
                place.quoted_names(),
                place.bucket(),
                printable(&place.keys.join(", ")),
            );
        }
        let (transferred, present) = (self.transferred, self.present);
        let (names, destination) = (place.quoted_names(), self.destination());
        let (blobs, bytes) = (
            count(transferred + present, "blob"),
            progress::bytes(self.bytes),
        );
        let refreshed = match (self.refresh, self.dry_run) {
            (false, _) => String::new(),
            (true, false) => format!(", {} refreshed on S3", self.refreshed),
            (true, true) => format!(", would refresh {} on S3", self.refreshed),
        };
        if self.dry_run {
            format!(
                "dry run: would import {names} from {addresses}{destination}: {blobs}: \
                 would fetch {transferred} ({bytes}), {present} already there{refreshed}; {cost}"
            )
        } else {
            format!(
                "imported {names} from {addresses}{destination}: {blobs}: \
                 {transferred} fetched ({bytes}), {present} already there{refreshed}; {cost}"
            )
        }
    }

    fn of_failure(self) -> Self {
        ImportDetails {
            layout: self.layout,
            manifest: self.manifest,
            dry_run: self.dry_run,
            not_found: self.not_found,
            ..ImportDetails::default()
        }
    }
}

impl ImportDetails {
    fn destination(&self) -> String {
        let mut destination = format!(" into {}", printable(&self.layout));
        if let Some(tag) = &self.tag {
            destination.push_str(&format!(" as {}", printable(tag)));
        }
        destination
    }
}

/// `--require` demands one cache that a build can use: a branch's may be absent if the main branch's is there. Returns the error if there is none, unless another failure already says why.
fn require_usable(reports: &mut [Report<ImportDetails>]) -> Option<anyhow::Error> {
    let enough = |report: &Report<ImportDetails>| report.details.usable || report.error.is_some();
    if reports.iter().any(enough) {
        return None;
    }
    for report in &mut *reports {
        let why = match report.details.not_found {
            true => "there is no such cache",
            false => "the cache has no usable result",
        };
        report.error = Some(format!("{why}, and --require was given"));
    }
    Some(match reports {
        [_] => anyhow!("--require: the cache has no usable result"),
        _ => anyhow!("--require: none of the caches has a usable result"),
    })
}

/// Whether a build can use anything in `cache`.
fn is_usable(cache: &CacheConfig) -> bool {
    let has_result = |record: &Record| !record.results.is_empty() || !record.chains.is_empty();
    cache.image.is_some() || cache.records.iter().any(has_result)
}

struct Import<'a> {
    task: &'a ImportTask,
}

#[async_trait]
impl PerSpec for Import<'_> {
    type Spec = S3Config;
    type Details = ImportDetails;
    type Ready = Layout;

    fn s3<'a>(&self, source: &'a S3Config) -> &'a S3Config {
        source
    }

    fn blank(&self, source: &S3Config) -> Report<ImportDetails> {
        let details = ImportDetails {
            layout: self.task.layout.display().to_string(),
            dry_run: self.task.dry_run,
            require: self.task.require,
            refresh: self.task.refresh.is_some(),
            ..ImportDetails::default()
        };
        // Like BuildKit, an import reads the first name only.
        let names = &source.names[..1];
        Report::new(
            Place::new("import", "importing from", source, names),
            details,
        )
    }

    async fn prepare(&self, _: &Context<'_>) -> Result<Layout> {
        let root = self.task.layout.clone();
        blocking(move || Layout::open_for_import(&root, LOCK_WAIT)).await
    }

    fn work<'a>(
        &'a self,
        layout: &'a Layout,
        source: &'a S3Config,
        bucket: Bucket,
        earlier: &[Report<ImportDetails>],
        context: &'a Context<'_>,
    ) -> Box<dyn Work<ImportDetails> + 'a> {
        let name = &source.names[0];
        let store = Arc::clone(bucket.store());
        let taken = earlier.iter().filter_map(|r| r.details.tag.as_deref());
        Box::new(ImportFrom {
            task: self.task,
            name,
            tag: tag_for(self.task, name, &taken.collect::<Vec<_>>()),
            uploader: Uploader::new(store, context.progress.clone(), context.limits),
            bucket,
            layout,
            progress: context.progress,
            limits: context.limits,
        })
    }
}

/// The first cache found gets the tag that was asked for, the others one from their own name. No tag is
/// written twice in one run.
fn tag_for(task: &ImportTask, name: &str, taken: &[&str]) -> String {
    let wanted = match (taken, &task.tag) {
        ([], Some(tag)) => tag.as_str(),
        ([], None) => "latest",
        _ => &tag_of(name),
    };
    let mut tag = wanted.to_owned();
    let mut count = 2;
    while taken.contains(&tag.as_str()) {
        tag = format!("{wanted}-{count}");
        count += 1;
    }
    tag
}

/// The import from one source.
struct ImportFrom<'a> {
    task: &'a ImportTask,
    /// The cache's name on S3.
    name: &'a str,
    /// The tag that it gets in the layout.
    tag: String,
    bucket: Bucket,
    /// Refreshes blobs.
    uploader: Uploader,
    layout: &'a Layout,
    progress: &'a Progress,
    limits: Limits,
}

#[async_trait]
impl Work<ImportDetails> for ImportFrom<'_> {
    async fn run(&mut self, report: &mut Report<ImportDetails>) -> Result<()> {
        let details = &mut report.details;
        let Some(plan) = self.plan().await? else {
            details.not_found = true;
            // Another of several sources may have one.
            if self.task.require && self.task.sources.len() == 1 {
                bail!("there is no cache yet, and --require was given");
            }
            return Ok(());
        };
        plan.count(details);
        self.warn_of_little_space(&plan).await?;
        if self.task.dry_run {
            self.show(&plan, details).await?;
        } else {
            self.execute(plan, details).await?;
        }
        details.tag = Some(self.tag.clone());
        Ok(())
    }

    async fn clean_up(&mut self) -> Result<()> {
        if self.task.dry_run {
            return Ok(());
        }
        self.uploader.abort_unfinished().await;
        let layout = self.layout.clone();
        // Keeps only what the next run can resume.
        blocking(move || {
            layout.tidy();
            Ok(())
        })
        .await
    }
}

/// What an import is going to do with one source.
struct Plan {
    cache: CacheConfig,
    /// Blobs that the layout has.
    present: usize,
    /// Blobs that it lacks, the largest first.
    fetch: Vec<(Digest, u64)>,
}

impl Plan {
    fn count(&self, details: &mut ImportDetails) {
        details.present = self.present as u64;
        details.transferred = self.fetch.len() as u64;
    }
}

impl ImportFrom<'_> {
    /// Compares the manifest with what the layout has. `None`: there is no manifest.
    async fn plan(&self) -> Result<Option<Plan>> {
        self.progress.stage("reading the manifest", 0, 0);
        let Some(cache) = self.bucket.manifest(self.name).await? else {
            return Ok(None);
        };
        let blobs = cache.blobs()?;
        let all = blobs.len();
        let mut fetch = match self.task.verify {
            true => self.not_intact(blobs).await?,
            false => self.not_there(blobs).await?,
        };
        fetch.sort_by_key(|&(digest, size)| (Reverse(size), digest));
        Ok(Some(Plan {
            cache,
            present: all - fetch.len(),
            fetch,
        }))
    }

    /// The blobs that are not in the layout.
    async fn not_there(&self, blobs: BTreeMap<Digest, u64>) -> Result<Vec<(Digest, u64)>> {
        let layout = self.layout.clone();
        blocking(move || {
            Ok(blobs
                .into_iter()
                .filter(|(digest, size)| !layout.has_blob(digest, *size))
                .collect())
        })
        .await
    }

    /// The blobs that are not in the layout, or whose bytes are wrong there.
    async fn not_intact(&self, blobs: BTreeMap<Digest, u64>) -> Result<Vec<(Digest, u64)>> {
        let bytes = blobs.values().sum();
        self.progress.stage("verifying", blobs.len() as u64, bytes);
        let checks = blobs.into_iter().map(|(digest, size)| {
            let (layout, progress) = (self.layout.clone(), self.progress.clone());
            blocking(move || {
                let blob = progress.blob(Verb::Hash, &digest, size);
                let good = layout.verify_blob(&digest, size, |read| blob.advance(read))?;
                blob.done();
                Ok((!good).then_some((digest, size)))
            })
        });
        let wrong: Vec<_> = futures::stream::iter(checks)
            .buffer_unordered(HASHES)
            .try_collect()
            .await?;
        Ok(wrong.into_iter().flatten().collect())
    }

    /// Other programs may free space in time, so this is not an error.
    async fn warn_of_little_space(&self, plan: &Plan) -> Result<()> {
        let sizes = plan.fetch.iter().map(|(_, size)| *size);
        let needed = sizes.fold(0, u64::saturating_add);
        let layout = self.layout.clone();
        let free = blocking(move || Ok(layout.free_space())).await?;
        if let Some(free) = free.filter(|free| *free < needed) {
            self.progress.warn(&format!(
                "too little disk space for {}: {} to fetch, {} free",
                printable(&self.task.layout.display().to_string()),
                progress::bytes(needed),
                progress::bytes(free)
            ));
        }
        Ok(())
    }

    /// Says what would be fetched, after a look at what S3 has.
    async fn show(&self, plan: &Plan, details: &mut ImportDetails) -> Result<()> {
        details.usable = is_usable(&plan.cache);
        self.progress.stage("looking for blobs on S3", 0, 0);
        let digests = plan.fetch.iter().map(|(digest, _)| *digest);
        let found = self.bucket.survey(digests, Certainty::Known).await?;
        let mut missing = BTreeSet::new();
        for (digest, size) in &plan.fetch {
            let Some(info) = found.get(digest) else {
                missing.insert(*digest);
                continue;
            };
            if info.size != *size {
                let key = self.bucket.blob_key(digest);
                return Err(Damaged::size(&key, info.size, *size).into());
            }
            let text = progress::bytes(*size);
            self.progress
                .note(&format!("would fetch {digest} ({text})"));
            details.bytes += size;
        }
        let used = match missing.is_empty() {
            true => plan.cache.blobs()?,
            false => {
                let kept = self.without(&plan.cache, &missing, details)?;
                details.usable = is_usable(&kept);
                kept.blobs()?
            }
        };
        if let Some(age) = self.task.refresh {
            details.refreshed = self.old(used.into_keys(), age).await?.len() as u64;
        }
        Ok(())
    }

    /// Fetches the blobs, then publishes the cache in the layout.
    async fn execute(&self, plan: Plan, details: &mut ImportDetails) -> Result<()> {
        let layout = self.layout.clone();
        blocking(move || layout.prepare()).await?;
        let missing = self.fetch_into(plan.fetch, details).await?;
        let mut cache = plan.cache;
        if !missing.is_empty() {
            self.set_damaged_aside(&missing, &cache.blobs()?).await?;
            cache = self.without(&cache, &missing, details)?;
        }
        let used = cache.blobs()?;
        let (manifest, config_size) = self.publish(cache, details).await?;
        if let Some(age) = self.task.refresh {
            details.refreshed = self.refresh(used.into_keys(), age).await;
        }
        if config_size > BUILDKIT_CONFIG_LIMIT {
            let size = progress::bytes(config_size);
            self.progress.warn(&format!(
                "the cache config has {size}: BuildKit's local import refuses more than 1 MiB; export with mode=min, or fewer stages"
            ));
        }
        details.manifest = Some(manifest);
        Ok(())
    }

    /// Fetches `blobs` and counts them in `details`. Returns those that S3 does not have, or not intact.
    async fn fetch_into(
        &self,
        blobs: Vec<(Digest, u64)>,
        details: &mut ImportDetails,
    ) -> Result<BTreeSet<Digest>> {
        let haul = self.fetch(blobs).await?;
        details.bytes += haul.bytes;
        details.transferred -= haul.present;
        details.present += haul.present;
        let mut missing = haul.missing;
        missing.extend(&haul.damaged);
        details.damaged.extend(haul.damaged);
        Ok(missing)
    }

    /// Moves the layout's copies of these blobs out of the way. They are damaged, and no later run
    /// would replace them.
    async fn set_damaged_aside(
        &self,
        missing: &BTreeSet<Digest>,
        sizes: &BTreeMap<Digest, u64>,
    ) -> Result<()> {
        for digest in missing {
            let (layout, digest, size) = (self.layout.clone(), *digest, sizes[digest]);
            let moved = blocking(move || layout.set_damaged_aside(&digest, size)).await?;
            if let Some(path) = moved {
                self.progress.warn(&format!(
                    "blob {digest} of the layout is damaged: moved to {}",
                    path.display()
                ));
            }
        }
        Ok(())
    }

    /// Tags the cache once all its blobs are there at the same time; fetches again what another
    /// process deletes in between. Returns the manifest's digest and the bytes of the cache config.
    async fn publish(
        &self,
        mut cache: CacheConfig,
        details: &mut ImportDetails,
    ) -> Result<(Digest, u64)> {
        for _ in 0..REFETCHES {
            let (layout, tag, tagged) = (self.layout.clone(), self.tag.clone(), cache.clone());
            let mut gone = match blocking(move || layout.publish_cache(&tag, &tagged)).await? {
                Published::Done {
                    manifest,
                    config_size,
                } => {
                    details.usable = is_usable(&cache);
                    return Ok((manifest, config_size));
                }
                Published::Gone(gone) => gone,
            };
            let count = count(gone.len() as u64, "blob");
            self.progress.note(&format!(
                "another process deleted {count} of this cache from the layout; fetching again"
            ));
            gone.sort_by_key(|&(digest, size)| (Reverse(size), digest));
            details.transferred += gone.len() as u64;
            let missing = self.fetch_into(gone, details).await?;
            if !missing.is_empty() {
                cache = self.without(&cache, &missing, details)?;
            }
        }
        bail!("another process keeps deleting blobs of this cache from the layout")
    }

    /// The cache without what S3 no longer has.
    fn without(
        &self,
        cache: &CacheConfig,
        missing: &BTreeSet<Digest>,
        details: &mut ImportDetails,
    ) -> Result<CacheConfig> {
        if self.task.missing == Missing::Error {
            bail!(
                "S3 lacks {} of the cache (expired?): {}; export the cache again, or let --missing=drop leave out what needs them",
                count(missing.len() as u64, "blob"),
                first_few(missing, LISTED),
            );
        }
        details.transferred -= missing.len() as u64;
        for digest in missing.difference(&details.damaged) {
            self.progress
                .note(&format!("{digest} is not on S3 any more"));
        }
        let (kept, dropped) = cache.without_blobs(missing);
        // More may be missing when the cache is published than when it was fetched.
        details.dropped_layers += dropped.layers as u64;
        details.dropped_results += dropped.results as u64;
        let why = match details.damaged.is_empty() {
            true => "expired?",
            false => "gone or damaged",
        };
        let mut warning = left_out(missing.len() as u64, why, &dropped, self.task.dry_run);
        if cache.image.is_some() && kept.image.is_none() {
            warning += ", and the image cannot be restored";
        }
        self.progress.warn(&warning);
        Ok(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report<ImportDetails> {
        let place = Place {
            command: "import",
            doing: "importing from",
            endpoint: Some("http://s3.example.com".into()),
            bucket: "cache".into(),
            names: vec!["main".into()],
            keys: vec!["manifests/main".into()],
            ..Place::default()
        };
        let details = ImportDetails {
            layout: "build/cache".into(),
            tag: Some("latest".into()),
            transferred: 3,
            present: 7,
            bytes: 1_258_291,
            ..ImportDetails::default()
        };
        let mut report = Report::new(place, details);
        (report.cost.requests, report.cost.seconds) = (12, 1.4321);
        report
    }

    #[test]
    fn an_import_says_where_from_and_where_to() {
        let mut report = report();
        assert_eq!(
            report.summary(),
            "imported 'main' from s3://cache/manifests/main at http://s3.example.com into build/cache as \
             latest: 10 blobs: 3 fetched (1.20 MiB), 7 already there; 12 requests in 1.4 s"
        );
        report.details.dry_run = true;
        assert_eq!(
            report.summary(),
            "dry run: would import 'main' from s3://cache/manifests/main at http://s3.example.com into \
             build/cache as latest: 10 blobs: would fetch 3 (1.20 MiB), 7 already there; 12 requests in 1.4 s"
        );
    }

    #[test]
    fn a_cache_that_does_not_exist_is_reported_as_absent() {
        let mut report = report();
        report.details.not_found = true;
        report.cost.requests = 1;
        assert_eq!(
            report.summary(),
            "no cache named 'main' in s3://cache at http://s3.example.com yet: there is no \
             manifests/main (--require makes this an error); 1 request in 1.4 s"
        );
    }

    #[test]
    fn names_cannot_steer_the_terminal() {
        let mut report = report();
        report.place.names = vec!["a\x1b[31m".into()];
        report.details.layout = "dir\r".into();
        report.details.tag = Some("t\n".into());
        assert_eq!(
            report.summary(),
            "imported 'a\\u{1b}[31m' from s3://cache/manifests/main at http://s3.example.com into dir\\r as t\\n: \
             10 blobs: 3 fetched (1.20 MiB), 7 already there; 12 requests in 1.4 s"
        );
    }
}
