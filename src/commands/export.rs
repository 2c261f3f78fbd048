//! Export: uploads what the layout's manifest refers to and S3 lacks, refreshes what is old, and writes
//! the S3 manifest last.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};
use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{StreamExt, TryStreamExt};
use serde::Serialize;

use crate::blocking::blocking;
use crate::bucket::{Bucket, Certainty};
use crate::cache::CacheConfig;
use crate::cache::digest::Digest;
use crate::commands::{Context, LOCK_WAIT, PerSpec, Work, for_each_spec};
use crate::config::{ExportConfig, ExportTask, Mode, Resend, S3Config};
use crate::layout::Layout;
use crate::process;
use crate::progress::{self, Progress, Verb};
use crate::report::{Details, Outcome, Place, Report, count};
use crate::store::{ObjectInfo, Upload};
use crate::transfer::body::FileSource;
use crate::transfer::download::Downloader;
use crate::transfer::limits::Limits;
use crate::transfer::refresh::{Refreshed, is_due};
use crate::transfer::upload::Uploader;

/// Refreshes in flight at once. Each is one request, and the store does the rest.
const REFRESHES: usize = 32;

/// Open files of an upload: the blob, and two connections that change over.
const FILES: usize = 3;

/// Blobs read back at once under `--verify-remote`.
const READ_BACK: usize = 16;

/// How long to go on aborting uploads after an export failed or was interrupted.
const ABORT_PATIENCE: Duration = Duration::from_secs(20);

/// How often blobs may vanish from S3 during one export before it gives up.
const CHECKS: usize = 5;

/// Exports to every target of the task.
pub async fn run(task: &ExportTask, context: &Context<'_>) -> Outcome {
    let export = Export { task };
    for_each_spec(&export, &task.targets, context).await.into()
}

/// What an export did at one target, or would do.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ExportDetails {
    /// The layout's directory as the user wrote it.
    layout: String,
    /// The digest of the exported manifest.
    #[serde(skip_serializing_if = "Option::is_none")]
    manifest: Option<Digest>,
    dry_run: bool,
    /// Blobs uploaded.
    transferred: u64,
    /// Blobs that were there and young.
    present: u64,
    /// Blobs that were there and old, and are young now.
    refreshed: u64,
    /// Bytes of the uploaded blobs.
    bytes: u64,
    /// Blobs of the layout's cache that mode=min leaves out.
    left_out: u64,
}

impl Details for ExportDetails {
    fn summary(&self, place: &Place, cost: &str) -> String {
        let ExportDetails {
            transferred,
            present,
            refreshed,
            ..
        } = *self;
        let sent = transferred + present + refreshed;
        let blobs = match self.left_out {
            0 => count(sent, "blob"),
            more => format!(
                "{sent} of {} (mode=min; mode=max sends all)",
                count(sent + more, "blob")
            ),
        };
        let (addresses, bytes) = (place.addresses(), progress::bytes(self.bytes));
        if self.dry_run {
            format!(
                "dry run: would export {blobs} to {addresses}: would upload {transferred} ({bytes}), \
                 {present} already there, would refresh {refreshed}; {cost}"
            )
        } else {
            format!(
                "exported {blobs} to {addresses}: {transferred} uploaded ({bytes}), \
                 {present} already there, {refreshed} refreshed; {cost}"
            )
        }
    }

    fn of_failure(self) -> Self {
        ExportDetails {
            layout: self.layout,
            manifest: self.manifest,
            dry_run: self.dry_run,
            ..ExportDetails::default()
        }
    }
}

struct Export<'a> {
    task: &'a ExportTask,
}

/// A cache read from the layout.
struct Exported {
    layout: Layout,
    manifest: Digest,
    cache: CacheConfig,
}

#[async_trait]
impl PerSpec for Export<'_> {
    type Spec = ExportConfig;
    type Details = ExportDetails;
    type Ready = Exported;

    fn s3<'a>(&self, target: &'a ExportConfig) -> &'a S3Config {
        &target.s3
    }

    fn ignores_errors(&self, target: &ExportConfig) -> bool {
        target.ignore_error
    }

    fn blank(&self, target: &ExportConfig) -> Report<ExportDetails> {
        let s3 = &target.s3;
        let details = ExportDetails {
            layout: self.task.layout.display().to_string(),
            dry_run: self.task.dry_run,
            ..ExportDetails::default()
        };
        Report::new(Place::new("export", "exporting to", s3, &s3.names), details)
    }

    async fn prepare(&self, context: &Context<'_>) -> Result<Exported> {
        let (root, selection) = (self.task.layout.clone(), self.task.selection.clone());
        let progress = context.progress.clone();
        blocking(move || {
            let layout = Layout::open(&root, LOCK_WAIT)?;
            let entry = layout.select(&selection)?;
            let cache = layout.read_cache(&entry, &progress).with_context(|| {
                format!("reading manifest {} of {}", entry.digest, root.display())
            })?;
            Ok(Exported {
                layout,
                manifest: entry.digest,
                cache,
            })
        })
        .await
    }

    fn work<'a>(
        &'a self,
        exported: &'a Exported,
        target: &'a ExportConfig,
        bucket: Bucket,
        _: &[Report<ExportDetails>],
        context: &'a Context<'_>,
    ) -> Box<dyn Work<ExportDetails> + 'a> {
        let store = Arc::clone(bucket.store());
        Box::new(ExportTo {
            task: self.task,
            exported,
            target,
            uploader: Uploader::new(store, context.progress.clone(), context.limits),
            bucket,
            progress: context.progress,
            limits: context.limits,
        })
    }
}

/// The export to one target.
struct ExportTo<'a> {
    task: &'a ExportTask,
    exported: &'a Exported,
    target: &'a ExportConfig,
    bucket: Bucket,
    uploader: Uploader,
    progress: &'a Progress,
    limits: Limits,
}

#[async_trait]
impl Work<ExportDetails> for ExportTo<'_> {
    async fn run(&mut self, report: &mut Report<ExportDetails>) -> Result<()> {
        report.details.manifest = Some(self.exported.manifest);
        let plan = self.plan(&mut report.details).await?;
        plan.count(&mut report.details);
        if self.task.dry_run {
            self.check_readable(&plan).await?;
            plan.show(&self.bucket, self.progress);
            return Ok(());
        }
        self.execute(&plan, &mut report.details).await?;
        self.uploader.abort_pointless(plan.pointless).await;
        Ok(())
    }

    async fn clean_up(&mut self) -> Result<()> {
        self.uploader.abort_unfinished(ABORT_PATIENCE).await;
        Ok(())
    }
}

impl ExportTo<'_> {
    /// Compares the cache with what the bucket has.
    async fn plan(&self, details: &mut ExportDetails) -> Result<Plan> {
        let cache = match self.target.mode {
            Mode::Max => self.exported.cache.clone(),
            Mode::Min => self.exported.cache.min(),
        };
        let manifest = Bytes::from(cache.to_s3()?);
        let blobs = cache.blobs()?;
        details.left_out = (self.exported.cache.blobs()?.len() - blobs.len()) as u64;
        self.progress.stage("looking for blobs on s3", 0, 0);
        let certainty = match self.task.dry_run {
            true => Certainty::Unknown,
            false => Certainty::Known,
        };
        // A dry run aborts nothing.
        let uploads = async {
            match self.task.dry_run {
                true => Vec::new(),
                false => self.bucket.unfinished_uploads().await,
            }
        };
        let digests = blobs.keys().copied();
        let (found, uploads) = tokio::join!(self.bucket.survey(digests, certainty), uploads);
        let mut found = found?;
        match self.task.resend {
            Resend::None => {}
            Resend::Damaged => {
                for digest in self.damaged(&blobs, &found).await? {
                    found.remove(&digest);
                }
            }
            Resend::All => found.clear(),
        }
        let touch_refresh = self.target.touch_refresh;
        let now = SystemTime::now();
        Ok(Plan::new(
            manifest,
            blobs,
            found,
            uploads,
            touch_refresh,
            now,
        ))
    }

    /// Reads back what S3 has of `blobs`. Returns those whose bytes are wrong there.
    async fn damaged(
        &self,
        blobs: &BTreeMap<Digest, u64>,
        found: &BTreeMap<Digest, ObjectInfo>,
    ) -> Result<Vec<Digest>> {
        let there: Vec<_> = blobs
            .iter()
            .filter(|(digest, size)| found.get(digest).is_some_and(|info| info.size == **size))
            .map(|(digest, size)| (*digest, *size))
            .collect();
        let bytes = there.iter().map(|(_, size)| size).sum();
        self.progress
            .stage("reading back", there.len() as u64, bytes);
        let store = Arc::clone(self.bucket.store());
        let downloader = Downloader::new(store, self.progress.clone(), self.limits);
        let checks = futures::stream::iter(there).map(|(digest, size)| {
            let downloader = &downloader;
            async move {
                let blob = self.progress.blob(Verb::Hash, &digest, size);
                let key = self.bucket.blob_key(&digest);
                let good = downloader.verify(&key, digest, size, &blob).await?;
                blob.done();
                if !good {
                    self.progress
                        .warn(&format!("blob {key} on s3 is damaged: sending it again"));
                }
                anyhow::Ok((!good).then_some(digest))
            }
        });
        let damaged: Vec<_> = checks.buffer_unordered(READ_BACK).try_collect().await?;
        Ok(damaged.into_iter().flatten().collect())
    }

    /// Does what the plan says, the manifests last.
    async fn execute(&self, plan: &Plan, done: &mut ExportDetails) -> Result<()> {
        if plan.upload.is_empty() && plan.refresh.is_empty() {
            return self.bucket.write_manifests(&plan.manifest).await;
        }
        let mut settled = BTreeSet::new();
        let mut missing = plan.upload.clone();
        let not_refreshed = self.refresh(&plan.refresh).await;
        settled.extend(plan.refresh.iter().map(|(digest, _)| *digest));
        // Each is looked at again before the manifest is written, unless it is uploaded.
        let (gone, refused): (Vec<_>, Vec<_>) = not_refreshed
            .into_iter()
            .partition(|(_, _, refreshed)| *refreshed == Refreshed::Gone);
        done.refreshed -= (gone.len() + refused.len()) as u64;
        let renewed = futures::stream::iter(refused)
            .map(|(digest, size, _)| async move { (digest, size, self.renew(digest, size).await) })
            .buffer_unordered(process::within_open_files(
                self.target.upload_parallelism,
                FILES,
            ))
            .collect::<Vec<_>>()
            .await;
        for (digest, size, renewed) in renewed {
            if renewed {
                done.transferred += 1;
                done.bytes += size;
            } else {
                done.present += 1;
                settled.remove(&digest);
            }
        }
        for (digest, size, _) in gone {
            missing.push((digest, size));
            done.transferred += 1;
            done.bytes += size;
        }
        for _ in 0..CHECKS {
            self.upload(&missing).await?;
            settled.extend(missing.drain(..).map(|(digest, _)| digest));
            // Uploads take time, in which a lifecycle rule or another program may have deleted what the
            // survey found.
            missing = self.vanished(&plan.blobs, &settled).await?;
            if missing.is_empty() {
                return self.bucket.write_manifests(&plan.manifest).await;
            }
            let bytes: u64 = missing.iter().map(|(_, size)| size).sum();
            done.present -= missing.len() as u64;
            done.transferred += missing.len() as u64;
            done.bytes += bytes;
            self.progress.note(&format!(
                "{} disappeared from s3 during the export; uploading again",
                count(missing.len() as u64, "blob")
            ));
        }
        bail!("something keeps deleting blobs of this cache from s3 while they are exported")
    }

    /// Refreshes old blobs; returns those that still are.
    async fn refresh(&self, old: &[(Digest, ObjectInfo)]) -> Vec<(Digest, u64, Refreshed)> {
        if !old.is_empty() {
            let bytes = old.iter().map(|(_, info)| info.size).sum();
            self.progress.stage("refreshing", old.len() as u64, bytes);
        }
        futures::stream::iter(old.to_vec())
            .map(|(digest, info)| async move {
                let key = self.bucket.blob_key(&digest);
                let refreshed = self.uploader.refresh(&key, &digest, &info).await;
                (digest, info.size, refreshed)
            })
            .buffer_unordered(process::within_open_files(REFRESHES, 1))
            .filter(|(_, _, refreshed)| std::future::ready(*refreshed != Refreshed::Done))
            .collect()
            .await
    }

    /// Uploads a blob that is on S3 but cannot be refreshed. A failure only leaves it old.
    async fn renew(&self, digest: Digest, size: u64) -> bool {
        match self.upload_one(digest, size).await {
            Ok(()) => true,
            Err(error) => {
                self.progress.warn(&format!(
                    "blob {digest} could not be refreshed: a lifecycle rule may delete it before the next export ({error:#})"
                ));
                false
            }
        }
    }

    async fn upload(&self, blobs: &[(Digest, u64)]) -> Result<()> {
        if !blobs.is_empty() {
            let bytes = blobs.iter().map(|(_, size)| size).sum();
            self.progress.stage("uploading", blobs.len() as u64, bytes);
        }
        futures::stream::iter(blobs.to_vec())
            .map(|(digest, size)| self.upload_one(digest, size))
            .buffer_unordered(process::within_open_files(
                self.target.upload_parallelism,
                FILES,
            ))
            .try_collect()
            .await
    }

    async fn upload_one(&self, digest: Digest, size: u64) -> Result<()> {
        let layout = self.exported.layout.clone();
        let file = blocking(move || layout.open_blob(&digest, size)).await?;
        let source = Arc::new(FileSource::new(file, digest, size));
        let key = self.bucket.blob_key(&digest);
        self.uploader.upload(&key, source).await
    }

    /// The blobs that were found on S3 and are not there any more. Those in `settled` were sent or
    /// refreshed in this run.
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

    /// For a dry run: fails if a blob could not be read for its upload.
    async fn check_readable(&self, plan: &Plan) -> Result<()> {
        let (layout, upload) = (self.exported.layout.clone(), plan.upload.clone());
        blocking(move || {
            upload
                .iter()
                .try_for_each(|(digest, size)| layout.open_blob(digest, *size).map(drop))
        })
        .await
    }
}

/// What an export is going to do at one target.
struct Plan {
    /// The S3 manifest, to be written under every name.
    manifest: Bytes,
    /// Every blob that it names, with its size.
    blobs: BTreeMap<Digest, u64>,
    /// The largest first, so that none is left to run alone at the end.
    upload: Vec<(Digest, u64)>,
    refresh: Vec<(Digest, ObjectInfo)>,
    /// Multipart uploads of blobs that are in place, with the blobs' sizes.
    pointless: Vec<(Upload, u64)>,
}

impl Plan {
    fn new(
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
            upload: Vec::new(),
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
                    if is_due(&info, touch_refresh, now) {
                        plan.refresh.push((digest, info));
                    }
                }
                _ => plan.upload.push((digest, size)),
            }
        }
        plan.blobs = blobs;
        plan.upload
            .sort_by_key(|&(digest, size)| (Reverse(size), digest));
        plan
    }

    fn count(&self, details: &mut ExportDetails) {
        details.transferred = self.upload.len() as u64;
        details.refreshed = self.refresh.len() as u64;
        details.present = self.blobs.len() as u64 - details.transferred - details.refreshed;
        details.bytes = self.upload.iter().map(|(_, size)| size).sum();
    }

    fn show(&self, bucket: &Bucket, progress: &Progress) {
        for (digest, size) in &self.upload {
            let size = progress::bytes(*size);
            progress.note(&format!("would upload {digest} ({size})"));
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
    fn a_blob_is_refreshed_when_older_than_touch_refresh_and_uploaded_when_its_size_is_wrong() {
        let now = SystemTime::now();
        let [young, old, short, absent] = [b"a", b"b", b"c", b"d"].map(|text| Digest::of(text));
        let blobs = BTreeMap::from([(young, 1), (old, 1), (short, 2), (absent, 3)]);
        let found = BTreeMap::from([
            (young, info(1, 60, now)),
            (old, info(1, 61, now)),
            (short, info(1, 0, now)),
        ]);
        let plan = Plan::new(
            Bytes::new(),
            blobs,
            found,
            vec![],
            Duration::from_secs(60),
            now,
        );
        assert_eq!(plan.upload, vec![(absent, 3), (short, 2)]);
        let refresh: Vec<Digest> = plan.refresh.iter().map(|(digest, _)| *digest).collect();
        assert_eq!(refresh, vec![old]);
        let mut details = ExportDetails::default();
        plan.count(&mut details);
        assert_eq!((details.present, details.bytes), (1, 5));
    }

    fn report() -> Report<ExportDetails> {
        let place = Place {
            command: "export",
            doing: "exporting to",
            bucket: "cache".into(),
            names: vec!["main".into()],
            keys: vec!["manifests/main".into()],
        };
        let details = ExportDetails {
            transferred: 3,
            present: 7,
            bytes: 1_258_291,
            ..ExportDetails::default()
        };
        let mut report = Report::new(place, details);
        (report.cost.requests, report.cost.seconds) = (12, 1.4321);
        report
    }

    #[test]
    fn an_export_says_what_it_sent_and_what_was_there() {
        let mut report = report();
        assert_eq!(
            report.summary(),
            "exported 10 blobs to s3://cache/manifests/main: 3 uploaded (1.20 MiB), \
             7 already there, 0 refreshed; 12 requests in 1.4 s"
        );
        report.details.dry_run = true;
        assert_eq!(
            report.summary(),
            "dry run: would export 10 blobs to s3://cache/manifests/main: would upload 3 \
             (1.20 MiB), 7 already there, would refresh 0; 12 requests in 1.4 s"
        );
    }

    #[test]
    fn one_is_singular_and_every_name_is_listed() {
        let mut report = report();
        report.place.keys = vec!["m/a".into(), "m/b".into()];
        report.details = ExportDetails {
            refreshed: 1,
            ..ExportDetails::default()
        };
        report.cost.requests = 1;
        assert_eq!(
            report.summary(),
            "exported 1 blob to s3://cache/m/a, s3://cache/m/b: 0 uploaded (0 B), \
             0 already there, 1 refreshed; 1 request in 1.4 s"
        );
    }

    #[test]
    fn a_failure_that_is_ignored_says_so_and_counts_nothing() {
        let mut report = report();
        report.fail(&anyhow::anyhow!("access denied\x1b[2J"));
        report.error_ignored = true;
        assert_eq!(
            report.summary(),
            "exporting to s3://cache/manifests/main failed, which is ignored: \
             access denied\\u{1b}[2J; 12 requests in 1.4 s"
        );
        assert_eq!(report.details, ExportDetails::default());
    }
}
