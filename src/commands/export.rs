//! Export: uploads what the layout's manifest refers to and S3 lacks, refreshes old blobs, and
//! writes the S3 manifest last.

mod build_context;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context as _, Result};
use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{StreamExt, TryStreamExt};
use serde::Serialize;
use tokio::sync::Semaphore;

use crate::blocking::blocking;
use crate::bucket::Bucket;
use crate::bucket::publish::{self, Counts, Plan, Publisher, Supply, Words};
use crate::cache::CacheConfig;
use crate::cache::digest::Digest;
use crate::commands::{Context, LOCK_WAIT, PerSpec, Work, for_each_spec};
use crate::config::{ExportConfig, ExportTask, Mode, Resend, S3Config};
use crate::layout::Layout;
use crate::process;
use crate::progress::{self, Progress, Verb};
use crate::report::{Details, Outcome, Place, Report};
use crate::store::ObjectInfo;
use crate::transfer::body::FileSource;
use crate::transfer::download::Downloader;
use crate::transfer::limits::Limits;
use crate::transfer::upload::Uploader;

/// Open files of an upload: the blob, a connection, and its replacement.
const FILES: usize = 3;

/// Blobs read back at once under `--verify-remote`.
const READ_BACK: usize = 16;

const WORDS: Words = Words {
    send: "upload",
    sending: "uploading",
    run: "export",
    done: "exported",
};

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
    #[serde(flatten)]
    counts: Counts,
    /// Blobs of the layout's cache that mode=min leaves out.
    left_out: u64,
}

impl Details for ExportDetails {
    fn summary(&self, place: &Place, cost: &str) -> String {
        let Counts {
            transferred,
            present,
            refreshed,
            bytes,
        } = self.counts;
        let blobs = self.counts.blobs(self.left_out, "sends");
        let (addresses, bytes) = (place.addresses(), progress::bytes(bytes));
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
            if let Some(warning) = build_context::warning(&root) {
                progress.warn(&warning);
            }
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
        report.details.counts = plan.counts();
        if self.task.dry_run {
            self.check_readable(&plan).await?;
            plan.show(&self.bucket, &WORDS, self.progress);
            return Ok(());
        }
        let (layers, small) = (self.target.upload_parallelism, self.target.small_uploads);
        let at_once = process::within_open_files(layers + small, FILES);
        let publisher = Publisher {
            bucket: &self.bucket,
            uploader: &self.uploader,
            supply: &FromLayout {
                layout: &self.exported.layout,
                openings: Semaphore::new(process::OPENINGS),
            },
            parallelism: at_once.min(layers),
            small: at_once.saturating_sub(layers),
            progress: self.progress,
        };
        publisher.execute(plan, &mut report.details.counts).await
    }

    async fn clean_up(&mut self) -> Result<()> {
        self.uploader.abort_unfinished().await;
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
        self.progress.stage("looking for blobs on S3", 0, 0);
        let surveyed = publish::survey(&self.bucket, &blobs, self.task.dry_run);
        let (mut found, uploads) = surveyed.await?;
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

    /// Reads back those of `blobs` that S3 has. Returns the ones whose bytes are wrong there.
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
                        .warn(&format!("blob {key} on S3 is damaged: sending it again"));
                }
                anyhow::Ok((!good).then_some(digest))
            }
        });
        let damaged: Vec<_> = checks.buffer_unordered(READ_BACK).try_collect().await?;
        Ok(damaged.into_iter().flatten().collect())
    }

    /// For a dry run: fails if a blob could not be read for its upload.
    async fn check_readable(&self, plan: &Plan) -> Result<()> {
        let (layout, upload) = (self.exported.layout.clone(), plan.send.clone());
        blocking(move || {
            upload
                .iter()
                .try_for_each(|(digest, size)| layout.open_blob(digest, *size).map(drop))
        })
        .await
    }
}

/// The layout that blobs are uploaded from.
struct FromLayout<'a> {
    layout: &'a Layout,
    openings: Semaphore,
}

#[async_trait]
impl Supply for FromLayout<'_> {
    fn words(&self) -> &'static Words {
        &WORDS
    }

    async fn send(&self, uploader: &Uploader, key: &str, digest: Digest, size: u64) -> Result<()> {
        let layout = self.layout.clone();
        let path = layout.blob_path(&digest);
        let opening = self.openings.acquire().await?;
        let file = blocking(move || layout.open_blob(&digest, size)).await?;
        drop(opening);
        let source = Arc::new(FileSource::new(file, path, digest, size));
        uploader.upload(key, source).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report<ExportDetails> {
        let place = Place {
            command: "export",
            doing: "exporting to",
            endpoint: None,
            bucket: "cache".into(),
            names: vec!["main".into()],
            keys: vec!["manifests/main".into()],
            ..Place::default()
        };
        let details = ExportDetails {
            counts: Counts {
                transferred: 3,
                present: 7,
                bytes: 1_258_291,
                ..Counts::default()
            },
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
        report.details.counts = Counts {
            refreshed: 1,
            ..Counts::default()
        };
        report.cost.requests = 1;
        assert_eq!(
            report.summary(),
            "exported 1 blob to s3://cache/m/a, s3://cache/m/b: 0 uploaded (0 B), \
             0 already there, 1 refreshed; 1 request in 1.4 s"
        );
    }

    #[test]
    fn a_failure_counts_nothing() {
        let mut report = report();
        report.fail(&anyhow::anyhow!("access denied"));
        assert_eq!(report.details, ExportDetails::default());
    }
}
