//! Verify: checks whether every cache of a place is whole, and repairs those that are not.

mod local;
mod repair;
mod verified;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use async_trait::async_trait;
use futures::stream::{StreamExt, TryStreamExt};
use serde::Serialize;

use self::repair::{Repair, Repaired};
use self::verified::Verified;
use crate::bucket::{Bucket, Cache, Certainty};
use crate::cache::digest::Digest;
use crate::commands::{Context, PerSpec, Work, for_each_spec, on_layout};
use crate::config::{Origin, S3Config, VerifyTask};
use crate::progress::{self, Blob, Progress, Verb, count};
use crate::quote::printable;
use crate::report::table::{Column, Table};
use crate::report::{Details, Outcome, Place, Report};
use crate::store::ObjectInfo;
use crate::transfer::download::Downloader;
use crate::transfer::limits::Limits;

/// Blobs read at once.
const READS: usize = 16;

/// How often others may replace a blob while it is read again.
const TRIES: usize = 3;

/// How many digests of one cache the summary lists.
const LISTED: usize = 10;

/// Verifies every place of the task.
pub async fn run(task: &VerifyTask, context: &Context<'_>) -> Outcome {
    let (reports, mut errors) = match &task.origin {
        Origin::S3(sources) => for_each_spec(&Verify { task }, sources, context).await,
        Origin::Layout(root) => {
            let place = Place::layout("verify", "verifying", root);
            let report = Report::new(place, VerifyDetails::default());
            on_layout(report, local::verify(task, root, context.progress), context).await
        }
    };
    let verdicts = reports.iter().filter(|report| report.error.is_none());
    errors.extend(verdicts.filter_map(|report| report.details.verdict(&report.place)));
    (reports, errors).into()
}

/// What was found at one place, and what was done about it.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VerifyDetails {
    caches: Vec<Verdict>,
    /// Blobs that the caches need, each counted once, and their bytes.
    blobs: u64,
    bytes: u64,
    /// Blobs were hashed.
    deep: bool,
    /// Damaged objects that were deleted, or files that were moved aside.
    removed: u64,
    /// Damaged objects that a repair could not delete.
    #[serde(skip_serializing_if = "is_zero")]
    not_removed: u64,
    /// A repair was asked for.
    #[serde(skip)]
    repair: bool,
    /// The glob that the names of the caches match.
    #[serde(skip)]
    name: Option<String>,
    #[serde(skip)]
    json: bool,
}

/// One cache.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Verdict {
    name: String,
    /// The manifest's, on S3.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    /// Nothing was wrong with it, or everything was repaired.
    ok: bool,
    missing: Vec<Digest>,
    damaged: Vec<Digest>,
    wrong_size: Vec<Digest>,
    /// Why its manifest is unreadable, if it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    unreadable: Option<String>,
    /// What a repair removed from it.
    #[serde(skip_serializing_if = "Option::is_none")]
    repaired: Option<Lost>,
    #[serde(skip)]
    blobs: u64,
    #[serde(skip)]
    bytes: u64,
    #[serde(skip)]
    not_repaired: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
struct Lost {
    layers: u64,
    results: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Verdict {
    fn new(name: String, blobs: &[(Digest, u64)]) -> Self {
        Verdict {
            name,
            blobs: blobs.len() as u64,
            bytes: blobs.iter().map(|(_, size)| size).sum(),
            ..Verdict::default()
        }
    }

    /// Counts a blob of `size` bytes, of which this size was `found`.
    fn blob(&mut self, blob: Digest, size: u64, found: Option<u64>, is_damaged: bool) {
        match found {
            None => self.missing.push(blob),
            Some(found) if found != size => self.wrong_size.push(blob),
            Some(_) if is_damaged => self.damaged.push(blob),
            Some(_) => {}
        }
    }

    fn found_wrong(&self) -> [(&'static str, &[Digest]); 3] {
        [
            ("missing", &self.missing),
            ("damaged", &self.damaged),
            ("wrong size", &self.wrong_size),
        ]
    }

    fn is_intact(&self) -> bool {
        self.unreadable.is_none() && self.found_wrong().iter().all(|(_, blobs)| blobs.is_empty())
    }

    fn word(&self) -> &'static str {
        match self {
            Verdict {
                unreadable: Some(_),
                ..
            } => "UNREADABLE",
            Verdict {
                repaired: Some(_), ..
            } => "repaired",
            Verdict { ok: true, .. } => "ok",
            _ => "BROKEN",
        }
    }

    /// What is said about it below the table.
    fn lines(&self, text: &mut String) {
        let name = printable(&self.name);
        if let Some(reason) = &self.unreadable {
            let _ = write!(text, "\n{name} is unreadable: {}", printable(reason));
        }
        for (what, blobs) in self.found_wrong() {
            if blobs.is_empty() {
                continue;
            }
            let _ = write!(
                text,
                "\n{name}: {}, {what}:",
                count(blobs.len() as u64, "blob")
            );
            for blob in blobs.iter().take(LISTED) {
                let _ = write!(text, "\n  {blob}");
            }
            if let more @ 1.. = blobs.len().saturating_sub(LISTED) {
                let _ = write!(text, "\n  and {more} more (--format=json lists all)");
            }
        }
        if let Some(Lost { layers, results }) = self.repaired {
            let _ = write!(
                text,
                "\n{name}: repaired, without {} and {}",
                count(layers, "layer"),
                count(results, "result")
            );
        }
        if let Some(reason) = &self.not_repaired {
            let _ = write!(text, "\n{name}: not repaired: {}", printable(reason));
        }
    }
}

impl Details for VerifyDetails {
    fn summary(&self, place: &Place, cost: &str) -> String {
        let mut table = Table::new([
            Column::left("name").cut(),
            Column::right("blobs").left_out(),
            Column::right("size").left_out(),
            Column::right("missing"),
            Column::right("damaged"),
            Column::right("wrong size"),
            Column::left("verdict"),
        ]);
        let mut lines = String::new();
        for cache in &self.caches {
            let damaged = match self.deep {
                true => cache.damaged.len().to_string(),
                false => "-".to_owned(),
            };
            table.row([
                cache.name.clone(),
                cache.blobs.to_string(),
                progress::bytes(cache.bytes),
                cache.missing.len().to_string(),
                damaged,
                cache.wrong_size.len().to_string(),
                cache.word().to_owned(),
            ]);
            cache.lines(&mut lines);
        }
        let mut text = match table.is_empty() {
            true => String::new(),
            false => table.text() + "\n\n",
        };
        let _ = write!(
            text,
            "{} {} in {}, {} ({}); {cost}{lines}",
            match self.deep {
                true => "hashed the blobs of",
                false => "looked for the blobs of",
            },
            count(self.caches.len() as u64, "cache"),
            place.addresses(),
            count(self.blobs, "blob"),
            progress::bytes(self.bytes),
        );
        if self.removed > 0 {
            let (what, done) = match place.layout.is_empty() {
                true => ("damaged object", "deleted"),
                false => ("damaged blob", "moved aside"),
            };
            let _ = write!(text, "\n{}: {done}", count(self.removed, what));
        }
        text
    }

    fn of_failure(self) -> Self {
        VerifyDetails::default()
    }

    fn as_json(&self) -> bool {
        self.json
    }
}

impl VerifyDetails {
    fn new(task: &VerifyTask) -> Self {
        VerifyDetails {
            deep: task.deep,
            repair: task.repair,
            name: task.name.as_ref().map(|glob| glob.as_str().to_owned()),
            json: task.json,
            ..VerifyDetails::default()
        }
    }

    /// Counts all blobs, once each. `caches` are those of the verdicts.
    fn count<'a>(&mut self, blobs: impl Iterator<Item = &'a (Digest, u64)>) {
        let blobs: BTreeMap<Digest, u64> = blobs.copied().collect();
        self.blobs = blobs.len() as u64;
        self.bytes = blobs.into_values().fold(0, u64::saturating_add);
    }

    /// The error for a place where something is still wrong.
    fn verdict(&self, place: &Place) -> Option<anyhow::Error> {
        let wrong = self.caches.iter().filter(|cache| !cache.ok).count() as u64;
        let address = place.addresses();
        // A name with a typing error would pass for a whole cache.
        if let (Some(glob), true) = (&self.name, self.caches.is_empty()) {
            let glob = printable(glob);
            return Some(anyhow!("no cache in {address} matches '{glob}'"));
        }
        if wrong == 0 && self.not_removed == 0 {
            return None;
        }
        if wrong == 0 {
            let objects = count(self.not_removed, "damaged object");
            return Some(anyhow!("{objects} could not be deleted from {address}"));
        }
        let caches = count(self.caches.len() as u64, "cache");
        let is_bad = |cache: &Verdict| !cache.damaged.is_empty() || !cache.wrong_size.is_empty();
        let advice = match (self.repair, place.layout.is_empty()) {
            (false, true) => "; --repair fixes those whose manifests can be read",
            (false, false) if self.caches.iter().any(is_bad) => {
                "; --repair moves damaged blobs aside, so that an import fetches them"
            }
            (_, false) => "; import or build them again",
            (true, true) => "",
        };
        let are = if wrong == 1 { "is" } else { "are" };
        Some(anyhow!(
            "{wrong} of {caches} in {address} {are} not whole{advice}"
        ))
    }
}

struct Verify<'a> {
    task: &'a VerifyTask,
}

#[async_trait]
impl PerSpec for Verify<'_> {
    type Spec = S3Config;
    type Details = VerifyDetails;
    type Ready = ();

    fn s3<'a>(&self, source: &'a S3Config) -> &'a S3Config {
        source
    }

    fn blank(&self, source: &S3Config) -> Report<VerifyDetails> {
        let place = Place::below("verify", "verifying", source);
        Report::new(place, VerifyDetails::default())
    }

    async fn prepare(&self, _: &Context<'_>) -> Result<()> {
        Ok(())
    }

    fn work<'a>(
        &'a self,
        (): &'a (),
        _: &'a S3Config,
        bucket: Bucket,
        _: &[Report<VerifyDetails>],
        context: &'a Context<'_>,
    ) -> Box<dyn Work<VerifyDetails> + 'a> {
        let store = Arc::clone(bucket.store());
        let limits: Limits = context.limits;
        Box::new(Verification {
            task: self.task,
            downloader: Downloader::new(store, context.progress.clone(), limits),
            bucket,
            progress: context.progress,
        })
    }
}

/// The verification of one place on S3.
struct Verification<'a> {
    task: &'a VerifyTask,
    bucket: Bucket,
    downloader: Downloader,
    progress: &'a Progress,
}

/// What was found of the blobs that caches need.
#[derive(Default)]
struct Found {
    /// Those that are there.
    blobs: BTreeMap<Digest, ObjectInfo>,
    /// Those whose bytes are wrong.
    damaged: BTreeMap<Digest, ObjectInfo>,
}

#[async_trait]
impl Work<VerifyDetails> for Verification<'_> {
    async fn run(&mut self, report: &mut Report<VerifyDetails>) -> Result<()> {
        self.progress.stage("reading the manifests", 0, 0);
        let caches = self.bucket.caches().await?;
        let chosen = || {
            let glob = self.task.name.as_ref();
            let caches = caches.iter();
            caches.filter(move |cache| glob.is_none_or(|glob| glob.matches(&cache.named.name)))
        };
        let contents = chosen().flat_map(|cache| &cache.contents);
        let named = contents.flat_map(|contents| &contents.blobs);
        let mut details = VerifyDetails::new(self.task);
        details.count(named.clone());
        self.progress.stage("looking for blobs on S3", 0, 0);
        let digests = named.clone().map(|(blob, _)| *blob);
        let mut found = Found {
            blobs: self.bucket.survey(digests, Certainty::Known).await?,
            ..Found::default()
        };
        if self.task.deep {
            let named: BTreeSet<(Digest, u64)> = named.copied().collect();
            self.hash(named, &mut found).await?;
        }
        details.caches = chosen().map(|cache| judge(cache, &found)).collect();
        if self.task.repair {
            self.repair(&caches, found, &mut details).await?;
        }
        report.details = details;
        Ok(())
    }

    async fn clean_up(&mut self) -> Result<()> {
        Ok(())
    }
}

fn judge(cache: &Cache, found: &Found) -> Verdict {
    let name = cache.named.name.clone();
    let mut verdict = match &cache.contents {
        Err(unreadable) => Verdict {
            unreadable: Some(unreadable.reason.clone()),
            ..Verdict::new(name, &[])
        },
        Ok(contents) => {
            let mut verdict = Verdict::new(name, &contents.blobs);
            for (blob, size) in &contents.blobs {
                let there = found.blobs.get(blob).map(|info| info.size);
                verdict.blob(*blob, *size, there, found.damaged.contains_key(blob));
            }
            verdict
        }
    };
    verdict.key = Some(cache.named.key.clone());
    verdict.ok = verdict.is_intact();
    verdict
}

impl Verification<'_> {
    /// Reads and hashes the blobs that are there with the right size, the largest first.
    async fn hash(&self, named: BTreeSet<(Digest, u64)>, found: &mut Found) -> Result<()> {
        let verified = self.earlier();
        let mut unread = Vec::new();
        let mut passed_over = 0;
        for (blob, size) in named {
            let Some(info) = found.blobs.get(&blob).filter(|info| info.size == size) else {
                continue;
            };
            let key = self.bucket.blob_key(&blob);
            match &verified {
                Some(verified) if verified.has(&key, info) => passed_over += 1,
                _ => unread.push((blob, info.clone())),
            }
        }
        if passed_over > 0 {
            let blobs = count(passed_over, "blob");
            self.progress
                .note(&format!("an interrupted run has verified {blobs} already"));
        }
        unread.sort_by_key(|(blob, info)| (std::cmp::Reverse(info.size), *blob));
        let bytes = unread.iter().map(|(_, info)| info.size).sum();
        self.progress.stage("verifying", unread.len() as u64, bytes);
        let mut reads = futures::stream::iter(unread)
            .map(|(blob, info)| {
                let verified = verified.as_ref();
                async move { anyhow::Ok((blob, self.hash_one(blob, &info, verified).await?)) }
            })
            .buffer_unordered(READS);
        while let Some((blob, health)) = reads.try_next().await? {
            match health {
                Health::Good => {}
                Health::Missing => {
                    found.blobs.remove(&blob);
                }
                Health::Other(info) => {
                    found.blobs.insert(blob, info);
                }
                Health::Damaged(info) => {
                    let key = self.bucket.blob_key(&blob);
                    self.progress
                        .note(&format!("{key} is damaged: its bytes have another digest"));
                    found.damaged.insert(blob, info);
                }
            }
        }
        drop(reads);
        if let Some(verified) = verified {
            verified.remove();
        }
        Ok(())
    }

    /// What an interrupted run has verified.
    fn earlier(&self) -> Option<Verified> {
        let directory = self.task.state.as_ref()?;
        match Verified::open(directory, &self.bucket.store().connection().url) {
            Ok(verified) => Some(verified),
            Err(error) => {
                self.progress.debug(&format!(
                    "if this run is interrupted, the next one starts over: {error:#}"
                ));
                None
            }
        }
    }

    async fn hash_one(
        &self,
        blob: Digest,
        info: &ObjectInfo,
        verified: Option<&Verified>,
    ) -> Result<Health> {
        let (key, size) = (self.bucket.blob_key(&blob), info.size);
        let shown = self.progress.blob(Verb::Hash, &blob, size);
        if self.is_good(&key, blob, size, &shown).await? {
            shown.done();
            if let Some(verified) = verified {
                verified.note(&key, info);
            }
            return Ok(Health::Good);
        }
        // The network may be at fault, or another program has just replaced the object.
        for _ in 0..TRIES {
            let before = match self.bucket.blob(&blob).await? {
                None => return Ok(Health::Missing),
                Some(before) if before.size != size => return Ok(Health::Other(before)),
                Some(before) => before,
            };
            shown.take_back(size);
            if self.is_good(&key, blob, size, &shown).await? {
                shown.done();
                return Ok(Health::Good);
            }
            if self.bucket.blob(&blob).await?.as_ref() == Some(&before) {
                shown.done();
                return Ok(Health::Damaged(before));
            }
        }
        bail!("other programs keep replacing {key}")
    }

    async fn is_good(&self, key: &str, blob: Digest, size: u64, shown: &Blob) -> Result<bool> {
        self.downloader.verify(key, blob, size, shown).await
    }

    async fn repair(
        &self,
        caches: &[Cache],
        found: Found,
        details: &mut VerifyDetails,
    ) -> Result<()> {
        let broken = details.caches.iter();
        let broken = broken.filter(|cache| !cache.ok && cache.unreadable.is_none());
        let broken: BTreeSet<String> = broken.map(|cache| cache.name.clone()).collect();
        if broken.is_empty() {
            return Ok(());
        }
        self.progress.stage("repairing", 0, 0);
        // By the sizes that any cache gives a blob.
        let mut doomed: BTreeMap<Digest, BTreeSet<u64>> = BTreeMap::new();
        for contents in caches.iter().flat_map(|cache| &cache.contents) {
            for (blob, size) in &contents.blobs {
                doomed.entry(*blob).or_default().insert(*size);
            }
        }
        doomed.retain(|blob, sizes| {
            let wrong_size = |info: &ObjectInfo| !sizes.contains(&info.size);
            found.damaged.contains_key(blob) || found.blobs.get(blob).is_some_and(wrong_size)
        });
        let repair = Repair {
            bucket: &self.bucket,
            downloader: &self.downloader,
            progress: self.progress,
            name: self.task.name.as_ref(),
            damaged: found.damaged,
        };
        let Repaired {
            caches,
            failed,
            deleted,
            undeleted,
        } = repair.run(broken, &doomed).await?;
        (details.removed, details.not_removed) = (deleted, undeleted);
        for cache in &mut details.caches {
            let lost = caches.get(&cache.name);
            cache.repaired = lost.map(|dropped| Lost {
                layers: dropped.layers as u64,
                results: dropped.results as u64,
            });
            cache.not_repaired = failed.get(&cache.name).cloned();
            // A cache that others have replaced or fixed meanwhile needs no repair.
            cache.ok = cache.unreadable.is_none() && cache.not_repaired.is_none();
        }
        Ok(())
    }
}

/// The state in which a blob was found.
enum Health {
    Good,
    Missing,
    Damaged(ObjectInfo),
    /// An object of the wrong size.
    Other(ObjectInfo),
}
