//! Prune: removes from a bucket the blobs that no cache needs, abandoned uploads, and the caches that
//! were chosen. Looks, makes a plan, shows it, asks, and only then deletes.

mod deletion;
mod local;
mod selection;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use anyhow::{Result, anyhow, bail};
use async_trait::async_trait;
use futures::stream::TryStreamExt;
use serde::Serialize;

use self::deletion::{Deleted, Deletion};
use self::selection::{Action, Candidate, Decision, Fate, decide, fate};
use crate::bucket::watch::{MOST_OTHERS, Watch, Watched};
use crate::bucket::{Bucket, Key, Tally};
use crate::cache::Time;
use crate::cache::digest::Digest;
use crate::commands::{Context, PerSpec, Work, for_each_spec, on_layout};
use crate::config::{Consent, ExportConfig, PruneLayoutTask, PruneTask, S3Config};
use crate::progress::{self, age, count};
use crate::quote::{first_few, printable};
use crate::report::table::{Column, Table};
use crate::report::{Details, Outcome, Place, Report};
use crate::store::{ObjectInfo, Upload};
use crate::transfer::upload::ABANDONED;

/// How much older than touch_refresh a blob must be to go, unless `--grace` says so: the longest export.
const EXPORT: Duration = Duration::from_secs(24 * 60 * 60);

/// How many caches and keys an error lists.
const LISTED: usize = 5;

/// Prunes every target of the task. If part of the work fails, the rest has not: the report is
/// printed like any other, but the run fails.
pub async fn run(task: &PruneTask, context: &Context<'_>) -> Outcome {
    let prune = Prune { task };
    let (reports, mut errors) = for_each_spec(&prune, &task.targets, context).await;
    for report in reports.iter().filter(|report| report.error.is_none()) {
        let work = report.place.work();
        let of = |problem: &String| anyhow!("{problem} ({work})");
        errors.extend(report.details.problems.iter().map(of));
    }
    (reports, errors).into()
}

/// Prunes a layout.
pub async fn run_local(task: &PruneLayoutTask, context: &Context<'_>) -> Outcome {
    let place = Place::layout("prune", "pruning", &task.layout);
    let report = Report::new(place, local::PruneLayoutDetails::default());
    on_layout(report, local::prune(task, context), context)
        .await
        .into()
}

/// What was planned for one target, and what was done.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PruneDetails {
    dry_run: bool,
    caches: Vec<Planned>,
    blobs: Blobs,
    uploads: Uploads,
    /// What was deleted. Nothing in a dry run.
    deleted: Deleted,
    /// What could not be done: the run fails.
    problems: Vec<String>,
    #[serde(skip)]
    json: bool,
}

/// A cache in the plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Planned {
    name: String,
    key: String,
    written: Option<Time>,
    bytes: u64,
    action: Action,
    reasons: Vec<String>,
}

/// The blobs in the plan.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Blobs {
    remove: u64,
    remove_bytes: u64,
    keep: u64,
    keep_bytes: u64,
    /// Nothing needs them, but they are younger than the grace.
    too_young: u64,
}

impl Blobs {
    /// What goes, for people.
    fn removed(&self) -> String {
        let bytes = progress::bytes(self.remove_bytes);
        format!("{} ({bytes})", count(self.remove, "blob"))
    }

    /// What stays, for people; `young` says of the young ones why.
    fn kept(&self, young: &str) -> String {
        let bytes = progress::bytes(self.keep_bytes);
        let mut text = format!("{} ({bytes})", count(self.keep, "blob"));
        if self.too_young > 0 {
            let _ = write!(text, ", and {} that {young}", count(self.too_young, "blob"));
        }
        text
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
struct Uploads {
    abort: u64,
}

impl PruneDetails {
    /// The plan, for people.
    fn plan(&self) -> String {
        let now = SystemTime::now();
        let mut text = String::new();
        if !self.caches.is_empty() {
            let mut table = Table::new([
                Column::left("name").cut(),
                Column::right("written"),
                Column::right("size"),
                Column::left("action"),
                Column::left("reason").left_out(),
            ]);
            for cache in &self.caches {
                let written = cache.written.map(|time| {
                    let passed = now.duration_since(time.0.into()).unwrap_or_default();
                    format!("{} ago", age(passed))
                });
                let action = match cache.action {
                    Action::Keep => "keep",
                    Action::Remove => "remove",
                };
                table.row([
                    cache.name.clone(),
                    written.unwrap_or_else(|| "-".to_owned()),
                    progress::bytes(cache.bytes),
                    action.to_owned(),
                    cache.reasons.join(", "),
                ]);
            }
            text = table.text() + "\n\n";
        }
        let _ = write!(
            text,
            "to remove: {}\nto keep: {}, {}",
            match self.is_nothing() {
                true => "nothing".to_owned(),
                false => removed(
                    self.removed_caches(),
                    self.blobs.remove,
                    self.blobs.remove_bytes,
                    self.uploads.abort
                ),
            },
            count(self.caches.len() as u64 - self.removed_caches(), "cache"),
            self.blobs
                .kept("no cache needs but that may be part of an export under way")
        );
        text
    }

    fn removed_caches(&self) -> u64 {
        let removed = |cache: &&Planned| cache.action == Action::Remove;
        self.caches.iter().filter(removed).count() as u64
    }

    fn is_nothing(&self) -> bool {
        self.removed_caches() + self.blobs.remove + self.uploads.abort == 0
    }
}

impl Details for PruneDetails {
    fn summary(&self, place: &Place, cost: &str) -> String {
        let address = place.addresses();
        if self.is_nothing() && self.problems.is_empty() {
            return format!("nothing to prune in {address}; {cost}");
        }
        if self.dry_run {
            return format!("dry run: nothing was removed from {address}; {cost}");
        }
        let Deleted {
            caches,
            blobs,
            bytes,
            uploads,
            ..
        } = &self.deleted;
        let mut text = format!(
            "pruned {address}: removed {}; {cost}",
            removed(*caches, *blobs, *bytes, *uploads)
        );
        for repaired in &self.deleted.repaired {
            let _ = write!(text, "\nrewrote {}", printable(repaired));
        }
        text
    }

    fn of_failure(self) -> Self {
        PruneDetails {
            dry_run: self.dry_run,
            deleted: self.deleted,
            json: self.json,
            ..PruneDetails::default()
        }
    }

    fn as_json(&self) -> bool {
        self.json
    }
}

/// What goes or went, for people. Unfinished uploads are rare.
fn removed(caches: u64, blobs: u64, bytes: u64, uploads: u64) -> String {
    let (caches, bytes) = (count(caches, "cache"), progress::bytes(bytes));
    let mut text = format!("{caches}, {} ({bytes})", count(blobs, "blob"));
    if uploads > 0 {
        let _ = write!(text, ", {}", count(uploads, "unfinished upload"));
    }
    text
}

struct Prune<'a> {
    task: &'a PruneTask,
}

#[async_trait]
impl PerSpec for Prune<'_> {
    type Spec = ExportConfig;
    type Details = PruneDetails;
    /// The places elsewhere whose caches need the same blobs.
    type Ready = Vec<Bucket>;

    fn s3<'a>(&self, target: &'a ExportConfig) -> &'a S3Config {
        &target.s3
    }

    fn blank(&self, target: &ExportConfig) -> Report<PruneDetails> {
        let details = PruneDetails {
            dry_run: self.task.consent == Consent::DryRun,
            json: self.task.json,
            ..PruneDetails::default()
        };
        Report::new(Place::below("prune", "pruning", &target.s3), details)
    }

    async fn prepare(&self, context: &Context<'_>) -> Result<Vec<Bucket>> {
        let mut also = Vec::new();
        for config in &self.task.also {
            let store = (context.connect)(config, context.progress).await?;
            also.push(Bucket::new(store, config, context.progress));
        }
        Ok(also)
    }

    fn work<'a>(
        &'a self,
        also: &'a Vec<Bucket>,
        target: &'a ExportConfig,
        bucket: Bucket,
        _: &[Report<PruneDetails>],
        context: &'a Context<'_>,
    ) -> Box<dyn Work<PruneDetails> + 'a> {
        let grace = self.task.grace;
        Box::new(PruneOne {
            task: self.task,
            also,
            grace: grace.unwrap_or(target.touch_refresh + EXPORT),
            bucket,
            context,
        })
    }
}

/// The pruning of one target.
struct PruneOne<'a> {
    task: &'a PruneTask,
    also: &'a [Bucket],
    grace: Duration,
    bucket: Bucket,
    context: &'a Context<'a>,
}

/// What is to be deleted, except blobs: there may be too many to list.
struct Plan {
    /// The chosen caches.
    caches: Vec<Watched>,
    /// The blobs that the remaining caches need.
    needed: BTreeSet<Digest>,
    /// Why no blob may be deleted, if none may.
    blocked: Option<String>,
    uploads: Vec<Upload>,
}

#[async_trait]
impl Work<PruneDetails> for PruneOne<'_> {
    async fn run(&mut self, report: &mut Report<PruneDetails>) -> Result<()> {
        let progress = self.context.progress;
        progress.stage("looking at the bucket", 0, 0);
        let mut watch = Watch::new(&self.bucket, self.also, self.task.only_own);
        let details = &mut report.details;
        let plan = self.plan(&mut watch, details).await?;
        match self.task.consent {
            Consent::Ask => {
                let address = report.place.addresses();
                match details.is_nothing() {
                    true => self.show(details).await?,
                    false => self.context.agree(&details.plan(), &address).await?,
                }
            }
            Consent::Given | Consent::DryRun => self.show(details).await?,
        }
        if self.task.consent == Consent::DryRun || details.is_nothing() {
            return Ok(());
        }
        progress.stage("deleting", 0, 0);
        let deletion = Deletion::new(&self.bucket, watch, &plan, self.grace, progress);
        let ended = deletion.run(plan, self.task.repair, details).await;
        ended.map_err(|error| {
            let Deleted { caches, blobs, .. } = details.deleted;
            error.context(format!(
                "stopped after {} and {}; the next prune continues",
                count(caches, "cache"),
                count(blobs, "blob")
            ))
        })
    }

    async fn clean_up(&mut self) -> Result<()> {
        Ok(())
    }

    fn other_requests(&self) -> u64 {
        let stores = self.also.iter().map(Bucket::store);
        stores.map(|store| store.requests()).sum()
    }
}

impl PruneOne<'_> {
    async fn show(&self, details: &PruneDetails) -> Result<()> {
        if !details.json {
            self.context.person.show(&details.plan()).await?;
        }
        Ok(())
    }

    /// Looks at everything, and decides.
    async fn plan(&self, watch: &mut Watch, details: &mut PruneDetails) -> Result<Plan> {
        watch.look().await?;
        loop {
            let mut plan = self.decide(watch, details)?;
            let odd = self.count_blobs(&plan, details).await?;
            // Rare: a cache whose name begins like a digest.
            if !watch.look_at(odd).await?.is_empty() {
                continue;
            }
            plan.uploads = self.abandoned_uploads().await;
            details.uploads.abort = plan.uploads.len() as u64;
            return Ok(plan);
        }
    }

    /// The store's time: ages are differences to its LastModified.
    fn now(&self) -> SystemTime {
        now(&self.bucket)
    }

    fn decide(&self, watch: &Watch, details: &mut PruneDetails) -> Result<Plan> {
        let caches: Vec<&Watched> = watch.caches().collect();
        let candidates: Vec<Candidate> = caches
            .iter()
            .map(|watched| Candidate {
                name: &watched.cache.named.name,
                written: watched.cache.named.info.last_modified,
                blobs: watched.cache.contents.as_ref().map(|c| &*c.blobs),
                ours: watched.ours,
            })
            .collect();
        let choice = &self.task.choice;
        let (decisions, rest) = decide(&candidates, choice, self.now());
        if let Some(max_size) = choice.max_size
            && rest > max_size
        {
            let (rest, max_size) = (progress::bytes(rest), progress::bytes(max_size));
            self.context.progress.warn(&format!(
                "what may not go has {rest}, more than --max-size {max_size}"
            ));
        }
        details.caches = caches
            .iter()
            .zip(&decisions)
            .map(|(watched, decision)| planned(watched, decision))
            .collect();
        let (mut removed, mut needed, mut left) = (Vec::new(), BTreeSet::new(), 0);
        for (watched, decision) in caches.into_iter().zip(&decisions) {
            if decision.action == Action::Remove {
                removed.push(watched.clone());
                continue;
            }
            left += usize::from(watched.ours);
            let blobs = watched.cache.contents.iter().flat_map(|c| &c.blobs);
            needed.extend(blobs.map(|(digest, _)| *digest));
        }
        if left == 0 && !removed.is_empty() && !choice.allow_empty {
            let names: Vec<_> = removed.iter().map(|w| w.cache.named.name.clone()).collect();
            bail!(
                "this would remove every cache ({}): --allow-empty allows it",
                crate::report::quoted_names(&names)
            );
        }
        let goes = |watched: &Watched| removed.iter().any(|gone| gone.address == watched.address);
        details.problems = problems(watch, goes);
        Ok(Plan {
            blocked: details.problems.first().cloned(),
            caches: removed,
            needed,
            uploads: Vec::new(),
        })
    }

    /// Counts the blobs by their fate. Returns what is listed among them but is not a blob.
    async fn count_blobs(
        &self,
        plan: &Plan,
        details: &mut PruneDetails,
    ) -> Result<Vec<(String, ObjectInfo)>> {
        let (mut goes, mut stays) = (Tally::default(), Tally::default());
        let (mut too_young, mut odd) = (0, Vec::new());
        let mut pages = self.bucket.blobs_in_parallel();
        while let Some(objects) = pages.try_next().await? {
            let now = self.now();
            for (key, info) in objects {
                let Key::Blob(digest) = self.bucket.parse_key(&key, info.size) else {
                    if odd.len() <= MOST_OTHERS {
                        odd.push((key, info));
                    }
                    continue;
                };
                match fate(plan.needed.contains(&digest), &info, self.grace, now) {
                    Fate::Stays => stays.add(info.size),
                    Fate::TooYoung => too_young += 1,
                    Fate::Goes if plan.blocked.is_some() => {}
                    Fate::Goes => goes.add(info.size),
                }
            }
        }
        details.blobs = Blobs {
            remove: goes.objects,
            remove_bytes: goes.bytes,
            keep: stays.objects,
            keep_bytes: stays.bytes,
            too_young,
        };
        Ok(odd)
    }

    /// Uploads of blobs that nobody can still be working on.
    async fn abandoned_uploads(&self) -> Vec<Upload> {
        let now = self.now();
        let is_abandoned = |upload: &Upload| {
            let since = upload.initiated.map(|then| now.duration_since(then));
            matches!(since, Some(Ok(since)) if since > ABANDONED)
        };
        let uploads = self.bucket.unfinished_uploads().await.into_iter();
        let uploads = uploads.map(|(_, upload)| upload);
        uploads.filter(is_abandoned).collect()
    }
}

/// The store's time, as far as its responses have shown.
fn now(bucket: &Bucket) -> SystemTime {
    let now = SystemTime::now();
    let ahead = bucket.store().connection().clock_ahead.unwrap_or_default();
    let by = Duration::from_secs(ahead.unsigned_abs());
    let there = match ahead >= 0 {
        true => now.checked_add(by),
        false => now.checked_sub(by),
    };
    there.unwrap_or(now)
}

fn planned(watched: &Watched, decision: &Decision) -> Planned {
    let named = &watched.cache.named;
    Planned {
        name: named.name.clone(),
        key: named.key.clone(),
        written: named.info.last_modified.map(|time| Time(time.into())),
        bytes: watched.cache.contents.as_ref().map_or(0, |c| c.bytes()),
        action: decision.action,
        reasons: decision.reasons.clone(),
    }
}

/// Why no blob may be deleted once the caches that go are gone.
fn problems(watch: &Watch, goes: impl Fn(&Watched) -> bool) -> Vec<String> {
    let unread = watch.caches().filter_map(|watched| {
        let unreadable = watched.cache.contents.as_ref().err()?;
        let stays = !goes(watched);
        stays.then(|| format!("{} ({})", watched.address, unreadable.reason))
    });
    let unread = first_few(unread, LISTED);
    let mut problems = Vec::new();
    if !unread.is_empty() {
        problems.push(format!(
            "no blob is deleted, because a cache cannot be read: {unread}"
        ));
    }
    if watch.too_many_others {
        problems.push(format!(
            "no blob is deleted, because more than {MOST_OTHERS} objects below the prefix are neither \
             blobs nor manifests, and any may be a cache of another spec: --assume-no-others says that \
             none is"
        ));
    }
    problems
}
