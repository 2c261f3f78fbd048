//! The export: what the layout's manifest refers to, uploaded where S3 lacks it, refreshed where it
//! is old; the S3 manifest last.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use bytes::Bytes;
use futures::stream::{StreamExt, TryStreamExt};

use crate::bucket::survey::{self as presence, Bucket};
use crate::cache::CacheConfig;
use crate::cache::digest::Digest;
use crate::config::{ExportConfig, ExportTask, Mode};
use crate::interrupt::{Interrupt, Interrupted};
use crate::layout::Layout;
use crate::progress::Progress;
use crate::report::{Outcome, Report};
use crate::store::{ObjectInfo, Store};
use crate::transfer::buffers::{Buffers, UPLOADS};
use crate::transfer::upload::{Document, Limits, Uploader, blocking};
use crate::{Connect, LOCK_WAIT};

/// Refreshes in flight at once: nothing but a request each, on the store's side all.
const REFRESHES: usize = 32;

/// How long to go on aborting uploads after an export failed or was interrupted.
const ABORT_PATIENCE: Duration = Duration::from_secs(20);

/// Runs the task; one report a target. A target that fails keeps no other from being tried, and
/// under `ignore-error` is a warning; a signal ends them all.
pub async fn export(
    task: &ExportTask,
    connect: Connect<'_>,
    limits: Limits,
    interrupt: &Interrupt,
    progress: &Progress,
) -> Outcome {
    let began = Instant::now();
    let read = read_layout(task, progress);
    let source = match interrupt.or(read).await {
        Ok(read) => read,
        Err(error) => return all_failed(task, error, began, progress),
    };
    let mut outcome = Outcome::default();
    let mut targets = task.targets.iter();
    for target in targets.by_ref() {
        let (report, exported) =
            export_to(target, task, &source, connect, limits, interrupt, progress).await;
        let Err(error) = exported else {
            outcome.reports.push(report);
            continue;
        };
        let mut report = report.failed(&error);
        let stopped = error.is::<Interrupted>();
        if target.ignore_error && !interrupt.happened() {
            progress.warn(&format!(
                "the export to {} failed, which ignore-error=true allows: {error:#}",
                target.s3.address()
            ));
            report.error_ignored = true;
        } else {
            let error = error.context(format!("exporting to {}", target.s3.address()));
            outcome.errors.push(error);
        }
        outcome.reports.push(report);
        if stopped {
            break;
        }
    }
    outcome.not_begun(targets.map(|target| blank(target, task)));
    outcome
}

/// What comes of it when there is nothing to send: one error, and every target has it.
fn all_failed(
    task: &ExportTask,
    error: anyhow::Error,
    began: Instant,
    progress: &Progress,
) -> Outcome {
    let mut outcome = Outcome::default();
    for target in &task.targets {
        outcome.reports.push(Report {
            seconds: began.elapsed().as_secs_f64(),
            error_ignored: target.ignore_error && !error.is::<Interrupted>(),
            ..blank(target, task).failed(&error)
        });
    }
    if outcome.reports.iter().any(Report::is_failure) {
        outcome.errors.push(error);
    } else {
        progress.warn(&format!(
            "the export failed, which ignore-error=true allows: {error:#}"
        ));
    }
    outcome
}

/// A report that says where to, and nothing yet of what was done.
fn blank(target: &ExportConfig, task: &ExportTask) -> Report {
    Report {
        command: "export",
        bucket: target.s3.bucket.clone(),
        names: target.s3.names.clone(),
        keys: target
            .s3
            .names
            .iter()
            .map(|name| target.s3.manifest_key(name))
            .collect(),
        layout: task.layout.display().to_string(),
        dry_run: task.dry_run,
        ..Report::default()
    }
}

/// What is exported.
struct Source {
    layout: Layout,
    manifest: Digest,
    cache: CacheConfig,
}

async fn read_layout(task: &ExportTask, progress: &Progress) -> Result<Source> {
    let (root, selection, progress) = (
        task.layout.clone(),
        task.selection.clone(),
        progress.clone(),
    );
    blocking(move || {
        let layout = Layout::open(&root, LOCK_WAIT)?;
        let entry = layout.select(&selection)?;
        let cache = layout
            .read_cache(&entry, &progress)
            .with_context(|| format!("reading manifest {} of {}", entry.digest, root.display()))?;
        Ok(Source {
            layout,
            manifest: entry.digest,
            cache,
        })
    })
    .await
}

/// What is to be done for one target.
struct Plan {
    absent: Vec<(Digest, u64)>,
    old: Vec<(Digest, ObjectInfo)>,
    present: usize,
}

impl Plan {
    fn new(
        blobs: &BTreeMap<Digest, u64>,
        mut found: BTreeMap<Digest, ObjectInfo>,
        touch_refresh: Duration,
        now: SystemTime,
    ) -> Self {
        let mut plan = Plan {
            absent: Vec::new(),
            old: Vec::new(),
            present: 0,
        };
        for (&digest, &size) in blobs {
            match found.remove(&digest) {
                // An object of another size is not this blob, whatever its key says.
                Some(info) if info.size == size => {
                    let age = info
                        .last_modified
                        .map(|then| now.duration_since(then).unwrap_or_default());
                    // An age that is not known counts as old. With touch_refresh=0s every blob is
                    // refreshed, also one from this very second.
                    if touch_refresh.is_zero() || age.is_none_or(|age| age > touch_refresh) {
                        plan.old.push((digest, info));
                    } else {
                        plan.present += 1;
                    }
                }
                _ => plan.absent.push((digest, size)),
            }
        }
        // The largest first, so that none is left to run alone at the end.
        plan.absent
            .sort_by_key(|&(digest, size)| (std::cmp::Reverse(size), digest));
        plan
    }
}

async fn export_to(
    target: &ExportConfig,
    task: &ExportTask,
    source: &Source,
    connect: Connect<'_>,
    limits: Limits,
    interrupt: &Interrupt,
    progress: &Progress,
) -> (Report, Result<()>) {
    let began = Instant::now();
    let mut report = Report {
        manifest: Some(source.manifest.to_string()),
        ..blank(target, task)
    };
    let exported = async {
        let cache = match target.mode {
            Mode::Max => source.cache.clone(),
            Mode::Min => source.cache.min(),
        };
        let blobs = cache.blobs()?;
        let store = connect(&target.s3, progress).await?;
        let uploader = Arc::new(Uploader::new(
            Arc::clone(&store),
            source.layout.clone(),
            Buffers::new(UPLOADS),
            progress.clone(),
            limits,
        ));
        let sent = send(
            target,
            &mut report,
            &cache,
            &blobs,
            &*store,
            &uploader,
            progress,
        );
        let sent = interrupt.or(sent).await;
        if sent.is_err() {
            uploader.abort_unfinished(ABORT_PATIENCE).await;
        }
        report.requests = store.requests();
        sent
    };
    let exported = exported.await;
    report.seconds = began.elapsed().as_secs_f64();
    (report, exported)
}

async fn send(
    target: &ExportConfig,
    report: &mut Report,
    cache: &CacheConfig,
    blobs: &BTreeMap<Digest, u64>,
    store: &dyn Store,
    uploader: &Uploader,
    progress: &Progress,
) -> Result<()> {
    let manifest = Bytes::from(cache.to_s3()?);
    progress.stage("looking for blobs on s3", 0, 0);
    let bucket = match report.dry_run {
        true => Bucket::Unseen,
        false => Bucket::Sure,
    };
    let digests = blobs.keys().copied();
    let found = presence::survey(store, &target.s3, digests, bucket, progress).await?;
    let plan = Plan::new(blobs, found, target.touch_refresh, SystemTime::now());
    report.transferred = plan.absent.len() as u64;
    report.present = plan.present as u64;
    report.refreshed = plan.old.len() as u64;
    report.bytes = plan.absent.iter().map(|(_, size)| size).sum();
    if report.dry_run {
        for (digest, size) in &plan.absent {
            uploader.check_readable(digest, *size).await?;
            progress.note(&format!(
                "would upload {digest} ({})",
                crate::progress::bytes(*size)
            ));
        }
        for (digest, _) in &plan.old {
            progress.note(&format!("would refresh {digest}"));
        }
        for name in &target.s3.names {
            progress.note(&format!("would write {}", target.s3.manifest_key(name)));
        }
        return Ok(());
    }

    if !plan.old.is_empty() {
        progress.stage(
            "refreshing",
            plan.old.len() as u64,
            plan.old.iter().map(|(_, info)| info.size).sum(),
        );
    }
    let mut absent = plan.absent;
    let refreshed: Vec<_> = futures::stream::iter(plan.old)
        .map(|(digest, info)| async move {
            let key = target.s3.blob_key(&digest);
            let there = uploader.refresh(&key, &digest, &info).await?;
            Ok::<_, anyhow::Error>((!there).then_some((digest, info.size)))
        })
        .buffer_unordered(REFRESHES)
        .try_collect()
        .await?;
    for (digest, size) in refreshed.into_iter().flatten() {
        report.refreshed -= 1;
        report.transferred += 1;
        report.bytes += size;
        absent.push((digest, size));
    }

    if !absent.is_empty() {
        progress.stage(
            "uploading",
            absent.len() as u64,
            absent.iter().map(|(_, size)| size).sum(),
        );
    }
    futures::stream::iter(absent)
        .map(|(digest, size)| async move {
            uploader
                .upload(&target.s3.blob_key(&digest), digest, size)
                .await
        })
        .buffer_unordered(target.upload_parallelism)
        .try_collect::<()>()
        .await?;

    // Every blob is there: the pointers to them come last.
    for name in &target.s3.names {
        let key = target.s3.manifest_key(name);
        store
            .put(
                &key,
                "application/octet-stream",
                Arc::new(Document(manifest.clone())),
            )
            .await
            .with_context(|| format!("writing the manifest {key}"))?;
        progress.note(&format!("wrote {key}"));
    }
    Ok(())
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
        let plan = Plan::new(&blobs, found, Duration::from_secs(60), now);
        assert_eq!(plan.absent, vec![(absent, 3), (short, 2)]);
        assert_eq!(
            plan.old
                .iter()
                .map(|(digest, _)| *digest)
                .collect::<Vec<_>>(),
            vec![old]
        );
        assert_eq!(plan.present, 1);
    }
}
