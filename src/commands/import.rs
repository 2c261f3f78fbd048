//! The import: what an S3 manifest names, fetched where the layout lacks it, verified, and only then
//! pointed to by a tag.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use futures::stream::{StreamExt, TryStreamExt};
use tokio::sync::mpsc;

use crate::bucket::survey::{self as presence, Bucket};
use crate::cache::CacheConfig;
use crate::cache::digest::Digest;
use crate::cache::oci::Descriptor;
use crate::config::{ImportConfig, ImportTask, Missing};
use crate::interrupt::{Interrupt, Interrupted};
use crate::layout::Layout;
use crate::layout::snapshot::{self, blobs_of, documents};
use crate::progress::{Progress, Verb};
use crate::report::{Outcome, Report};
use crate::retry::Trouble;
use crate::store::{Object, Store};
use crate::transfer::buffers::{Buffers, DOWNLOADS};
use crate::transfer::download::{Downloader, Fetched, publish};
use crate::transfer::upload::{Limits, blocking};
use crate::{Connect, LOCK_WAIT};

/// Blobs fetched at once; the buffers' bound decides how many of them are large.
const BLOBS: usize = 160;

/// Verified blobs that may wait to be named: each holds a file open.
const VERIFIED: usize = 32;

/// Blobs hashed at once under `--verify`.
const HASHES: usize = 4;

/// A larger manifest is not one that BuildKit wrote.
const MANIFEST_LIMIT: u64 = 256 << 20;

/// BuildKit's local import refuses a larger cache config.
const BUILDKIT_CONFIG_LIMIT: usize = 1 << 20;

/// Runs the task; one report a source. A source that fails keeps no other from being tried; a
/// signal ends them all.
pub async fn import(
    task: &ImportTask,
    connect: Connect<'_>,
    limits: Limits,
    interrupt: &Interrupt,
    progress: &Progress,
) -> Outcome {
    let began = Instant::now();
    let mut outcome = Outcome::default();
    let root = task.layout.clone();
    let opening = blocking(move || Layout::open_for_import(&root, LOCK_WAIT));
    let layout = match interrupt.or(opening).await {
        Ok(layout) => layout,
        Err(error) => {
            outcome
                .reports
                .extend(task.sources.iter().map(|source| Report {
                    seconds: began.elapsed().as_secs_f64(),
                    ..blank(source, task).failed(&error)
                }));
            outcome.errors.push(error);
            return outcome;
        }
    };
    let mut sources = task.sources.iter();
    for source in sources.by_ref() {
        let taken: Vec<&str> = outcome
            .reports
            .iter()
            .filter_map(|report| report.tag.as_deref())
            .collect();
        let tag = tag_for(task, source, &taken);
        let (report, imported) = match interrupt.or(connect(&source.s3, progress)).await {
            Ok(store) => {
                let import = Import {
                    source,
                    task,
                    layout: &layout,
                    store,
                    progress,
                    limits,
                };
                import.import(tag, interrupt).await
            }
            Err(error) => (blank(source, task), Err(error)),
        };
        if !task.dry_run {
            let layout = layout.clone();
            // However it ended: only what the next run can use is to be left lying about.
            let tidied = blocking(move || {
                layout.tidy();
                Ok(())
            });
            if let Err(error) = tidied.await {
                outcome.errors.push(error);
            }
        }
        let Err(error) = imported else {
            outcome.reports.push(report);
            continue;
        };
        outcome.reports.push(report.failed(&error));
        let stopped = error.is::<Interrupted>();
        let error = error.context(format!("importing from {}", source.s3.address()));
        outcome.errors.push(error);
        if stopped {
            break;
        }
    }
    outcome.not_begun(sources.map(|source| blank(source, task)));
    judge_absent(task, &mut outcome, progress);
    outcome
}

/// A cache that is not there yet is the first build's lot. `--require` wants one to begin with:
/// that of a branch may be absent while main's is there.
fn judge_absent(task: &ImportTask, outcome: &mut Outcome, progress: &Progress) {
    let none = outcome.reports.iter().all(|report| report.not_found);
    for (source, report) in task.sources.iter().zip(&mut outcome.reports) {
        if !report.not_found {
            continue;
        }
        let key = source.s3.manifest_key(&source.s3.names[0]);
        let absent = format!("there is no manifest {key} in bucket {}", source.s3.bucket);
        if task.require && none {
            let error = anyhow!("{absent}, and --require wants one");
            report.error = Some(error.to_string());
            let error = error.context(format!("importing from {}", source.s3.address()));
            outcome.errors.push(error);
        } else if task.require {
            progress.warn(&format!("{absent} yet: nothing imported from there"));
        } else {
            progress.warn(&format!(
                "{absent} yet: nothing imported (--require makes this an error)"
            ));
        }
    }
}

/// A report that says where from, and nothing yet of what was done.
fn blank(source: &ImportConfig, task: &ImportTask) -> Report {
    Report {
        command: "import",
        bucket: source.s3.bucket.clone(),
        names: vec![source.s3.names[0].clone()],
        keys: vec![source.s3.manifest_key(&source.s3.names[0])],
        layout: task.layout.display().to_string(),
        dry_run: task.dry_run,
        ..Report::default()
    }
}

/// The first cache found gets the tag that was asked for, the others that of their own name; no tag
/// is written twice in one run.
fn tag_for(task: &ImportTask, source: &ImportConfig, taken: &[&str]) -> String {
    let wanted = match (taken, &task.tag) {
        ([], Some(tag)) => tag.as_str(),
        ([], None) => "latest",
        _ => source.s3.names[0].as_str(),
    };
    let mut tag = wanted.to_owned();
    let mut count = 2;
    while taken.contains(&tag.as_str()) {
        tag = format!("{wanted}-{count}");
        count += 1;
    }
    tag
}

/// The manifest; `None` if there is none.
async fn read_manifest(store: &dyn Store, key: &str) -> Result<Option<CacheConfig>> {
    let mut tries = store.retries().tries();
    loop {
        // Nothing vouches for these bytes, so what cannot be read (it broke off, it is a proxy's
        // page, an <Error> inside a 200) is asked for again. The name is mutable: from its start.
        let read = match store.get(key, None, None).await {
            Ok(Some(object)) => read_object(object).await,
            Ok(None) => return Ok(None),
            Err(error) if error.is_nonsense() => Err(error.into()),
            Err(error) => return Err(error.into()),
        };
        let (error, damaged) = match read {
            Ok(bytes) => match CacheConfig::parse_s3(&bytes) {
                Ok(cache) => return Ok(Some(cache)),
                // What is JSON all through is what was written, if not by BuildKit or by us.
                Err(error) => (error, !is_json(&bytes)),
            },
            Err(error) => (error, true),
        };
        if !damaged || !tries.again(Trouble::default()).await {
            let tried = tries.summary().map(|tried| format!(" ({tried})"));
            let tried = tried.unwrap_or_default();
            return Err(error.context(format!("reading the manifest {key} on s3{tried}")));
        }
    }
}

fn is_json(bytes: &[u8]) -> bool {
    // On bytes alone serde_json would not look into the strings that it ignores.
    let text = std::str::from_utf8(bytes).ok();
    text.is_some_and(|text| serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok())
}

/// An object's bytes, none missing.
async fn read_object(mut object: Object) -> Result<Vec<u8>> {
    if object.length > MANIFEST_LIMIT {
        bail!(
            "it has {} bytes: no cache manifest is that large",
            object.length
        );
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = object.body.next().await {
        bytes.extend_from_slice(&chunk.context("the body broke off")?);
        if bytes.len() as u64 > object.length {
            break;
        }
    }
    if bytes.len() as u64 != object.length {
        bail!(
            "the body has {} bytes where {} were announced",
            bytes.len(),
            object.length
        );
    }
    Ok(bytes)
}

/// [`BLOBS`], or as many as the limit on open files allows: a blob has its file open twice and a
/// connection, and some wait to be named.
fn blobs_at_once() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let files = limit.current.and_then(|files| usize::try_from(files).ok());
    files.map_or(BLOBS, |files| (files / 6).clamp(1, BLOBS))
}

/// One source being imported.
struct Import<'a> {
    source: &'a ImportConfig,
    task: &'a ImportTask,
    layout: &'a Layout,
    store: Arc<dyn Store>,
    progress: &'a Progress,
    limits: Limits,
}

impl Import<'_> {
    async fn import(&self, tag: String, interrupt: &Interrupt) -> (Report, Result<()>) {
        let began = Instant::now();
        let mut report = blank(self.source, self.task);
        let imported = interrupt.or(self.run(tag, &mut report)).await;
        report.requests = self.store.requests();
        report.seconds = began.elapsed().as_secs_f64();
        (report, imported)
    }

    async fn run(&self, tag: String, report: &mut Report) -> Result<()> {
        let key = self.source.s3.manifest_key(&self.source.s3.names[0]);
        self.progress.stage("reading the manifest", 0, 0);
        let Some(mut cache) = read_manifest(&*self.store, &key).await? else {
            report.not_found = true;
            return Ok(());
        };
        let blobs = blobs_of(&cache)?;
        let absent = self.absent(&blobs).await?;
        report.present = (blobs.len() - absent.len()) as u64;
        report.transferred = absent.len() as u64;
        if self.task.dry_run {
            let missing = self.would_fetch(&absent, report).await?;
            if !missing.is_empty() {
                self.without(&cache, &missing, report)?;
            }
            report.tag = Some(tag);
            return Ok(());
        }

        let layout = self.layout.clone();
        blocking(move || layout.prepare()).await?;
        let missing = self.fetch(absent, report).await?;
        if !missing.is_empty() {
            cache = self.without(&cache, &missing, report)?;
        }

        let (layout, tag_name) = (self.layout.clone(), tag.clone());
        let (entry, config_bytes) = blocking(move || write(&layout, &cache, &tag_name)).await?;
        if config_bytes > BUILDKIT_CONFIG_LIMIT {
            self.progress.warn(&format!(
                "the cache config has {}: BuildKit's local import refuses more than 1 MiB; export with mode=min, or fewer stages",
                crate::progress::bytes(config_bytes as u64)
            ));
        }
        report.manifest = Some(entry.to_string());
        report.tag = Some(tag);
        Ok(())
    }

    /// What the layout lacks, the largest first.
    async fn absent(&self, blobs: &BTreeMap<Digest, u64>) -> Result<Vec<(Digest, u64)>> {
        let (layout, wanted, verify) = (self.layout.clone(), blobs.clone(), self.task.verify);
        let mut absent: Vec<(Digest, u64)> = if verify {
            let known: u64 = wanted.values().sum();
            self.progress.stage("verifying", wanted.len() as u64, known);
            let checks = wanted.into_iter().map(|(digest, size)| {
                let (layout, progress) = (layout.clone(), self.progress.clone());
                blocking(move || {
                    let blob = progress.blob(Verb::Hash, &digest, size);
                    let good = layout.verify_blob(&digest, size)?;
                    blob.advance(size);
                    blob.done();
                    Ok((!good).then_some((digest, size)))
                })
            });
            let found: Vec<_> = futures::stream::iter(checks)
                .buffer_unordered(HASHES)
                .try_collect()
                .await?;
            found.into_iter().flatten().collect()
        } else {
            blocking(move || {
                Ok(wanted
                    .into_iter()
                    .filter(|(digest, size)| !layout.has_blob(digest, *size))
                    .collect())
            })
            .await?
        };
        absent.sort_by_key(|&(digest, size)| (std::cmp::Reverse(size), digest));
        Ok(absent)
    }

    /// Says what would be fetched; returns what S3 does not have.
    async fn would_fetch(
        &self,
        absent: &[(Digest, u64)],
        report: &mut Report,
    ) -> Result<BTreeSet<Digest>> {
        let config = &self.source.s3;
        self.progress.stage("looking for blobs on s3", 0, 0);
        let digests = absent.iter().map(|(digest, _)| *digest);
        let found =
            presence::survey(&*self.store, config, digests, Bucket::Sure, self.progress).await?;
        let mut missing = BTreeSet::new();
        for (digest, size) in absent {
            let Some(info) = found.get(digest) else {
                missing.insert(*digest);
                continue;
            };
            if info.size != *size {
                bail!(
                    "blob {} on s3 is damaged: it has {} bytes where the manifest says {size}; delete the object and export it again",
                    config.blob_key(digest),
                    info.size
                );
            }
            self.progress.note(&format!(
                "would fetch {digest} ({})",
                crate::progress::bytes(*size)
            ));
            report.bytes += size;
        }
        Ok(missing)
    }

    /// Fetches what is absent; returns what S3 does not have either.
    async fn fetch(
        &self,
        absent: Vec<(Digest, u64)>,
        report: &mut Report,
    ) -> Result<BTreeSet<Digest>> {
        if !absent.is_empty() {
            self.progress.stage(
                "fetching",
                absent.len() as u64,
                absent.iter().map(|(_, size)| size).sum(),
            );
        }
        let (sender, receiver) = mpsc::channel(VERIFIED);
        let downloader = Downloader::new(
            Arc::clone(&self.store),
            self.layout.clone(),
            Buffers::new(DOWNLOADS),
            self.progress.clone(),
            sender,
            self.task.verify,
            self.limits,
        );
        let naming = publish(self.layout.clone(), receiver);
        let fetching = async {
            // Moved in, so that the last sender goes with it and the naming ends.
            let downloader = downloader;
            let fetched = futures::stream::iter(absent)
                .map(|(digest, size)| {
                    let downloader = &downloader;
                    async move {
                        let fetched = downloader
                            .fetch(&self.source.s3.blob_key(&digest), digest, size)
                            .await;
                        Ok::<_, anyhow::Error>((digest, fetched?))
                    }
                })
                .buffer_unordered(blobs_at_once())
                .try_fold(
                    (BTreeSet::new(), 0, 0),
                    |(mut missing, mut bytes, mut present), (digest, fetched)| async move {
                        match fetched {
                            Fetched::Present => present += 1,
                            Fetched::Missing => {
                                missing.insert(digest);
                            }
                            Fetched::Whole { bytes: more } => bytes += more,
                        }
                        Ok((missing, bytes, present))
                    },
                )
                .await;
            drop(downloader);
            fetched
        };
        // Both run to their ends: what was verified before a failure is kept for the next run.
        let (fetched, named) = tokio::join!(fetching, naming);
        named?;
        let (missing, bytes, present) = fetched?;
        report.bytes += bytes;
        report.transferred -= present;
        report.present += present;
        Ok(missing)
    }

    /// The cache without what S3 no longer has.
    fn without(
        &self,
        cache: &CacheConfig,
        missing: &BTreeSet<Digest>,
        report: &mut Report,
    ) -> Result<CacheConfig> {
        if self.task.missing == Missing::Error {
            let named: Vec<String> = missing.iter().take(5).map(Digest::to_string).collect();
            bail!(
                "{} blob(s) that the manifest names are not on s3 (expired?): {}{}; export the cache again, or let --missing=drop leave out what needs them",
                missing.len(),
                named.join(", "),
                if missing.len() > named.len() {
                    ", …"
                } else {
                    ""
                }
            );
        }
        report.transferred -= missing.len() as u64;
        for digest in missing {
            self.progress
                .note(&format!("{digest} is not on s3 any more"));
        }
        let (kept, dropped) = cache.without_blobs(missing);
        report.dropped_layers = dropped.layers as u64;
        report.dropped_results = dropped.results as u64;
        self.progress.warn(&format!(
            "{} blob(s) that the manifest names are not on s3 (expired?): {} result(s) and {} layer(s) {} left out{}",
            missing.len(),
            dropped.results,
            dropped.layers,
            if self.task.dry_run { "would be" } else { "were" },
            if cache.image.is_some() && kept.image.is_none() { ", and the image cannot be given back" } else { "" }
        ));
        Ok(kept)
    }
}

/// Writes the documents of `cache` and points `tag` to them, when all that they name is there.
/// Returns the manifest's digest and the bytes of the cache config.
fn write(layout: &Layout, cache: &CacheConfig, tag: &str) -> Result<(Digest, usize)> {
    if let Some(image) = &cache.image {
        // The manifest on S3 said what belongs to the image; the image itself has the last word.
        snapshot::check_complete(layout, &image.root)
            .context("checking the image that came from s3")?;
        layout.tag(tag, &image.root)?;
        return Ok((image.root.digest, 0));
    }
    let documents = documents(cache)?;
    let config = Digest::of(&documents.config);
    layout.write_document(&config, &documents.config)?;
    let entry: Descriptor = documents.descriptor;
    layout.write_document(&entry.digest, &documents.manifest)?;
    layout.tag(tag, &entry)?;
    Ok((entry.digest, documents.config.len()))
}
