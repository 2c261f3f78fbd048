//! Prunes a layout: blobs that its index does not reach, and entries whose manifest is gone.

use std::fmt::Write as _;

use anyhow::{Result, anyhow};
use serde::Serialize;

use super::Blobs;
use crate::blocking::blocking;
use crate::cache::digest::Digest;
use crate::commands::{Context, LOCK_WAIT};
use crate::config::{Consent, PruneLayoutTask};
use crate::layout::{Layout, Orphan, PrunePlan, Pruned};
use crate::progress::{self, count};
use crate::quote::printable;
use crate::report::{Details, Place};

/// What was planned, and what was done.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PruneLayoutDetails {
    dry_run: bool,
    /// Entries of the index whose manifest is gone.
    entries: Vec<Entry>,
    blobs: Blobs,
    /// What was deleted. Nothing in a dry run.
    deleted: Deleted,
    #[serde(skip)]
    json: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Entry {
    entry: String,
    manifest: Digest,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
struct Deleted {
    entries: u64,
    blobs: u64,
    bytes: u64,
}

impl PruneLayoutDetails {
    fn new(plan: &PrunePlan, task: &PruneLayoutTask) -> Self {
        let bytes = |orphans: &[Orphan]| orphans.iter().map(|orphan| orphan.size).sum();
        let entries = plan.dangling.iter().map(|dangling| Entry {
            entry: dangling.label.clone(),
            manifest: dangling.digest,
        });
        PruneLayoutDetails {
            dry_run: task.consent == Consent::DryRun,
            entries: entries.collect(),
            blobs: Blobs {
                remove: plan.orphans.len() as u64,
                remove_bytes: bytes(&plan.orphans),
                keep: plan.kept.0,
                keep_bytes: plan.kept.1,
                too_young: plan.recent.len() as u64,
            },
            deleted: Deleted::default(),
            json: task.json,
        }
    }

    fn is_nothing(&self) -> bool {
        self.entries.is_empty() && self.blobs.remove == 0
    }

    /// The plan, for people.
    fn plan(&self) -> String {
        let mut text = String::new();
        for Entry { entry, manifest } in &self.entries {
            let _ = writeln!(
                text,
                "{}: its manifest {manifest} is gone",
                printable(entry)
            );
        }
        let entries = match self.entries.len() as u64 {
            0 => String::new(),
            1 => "1 entry, ".to_owned(),
            n => format!("{n} entries, "),
        };
        let removed = match self.is_nothing() {
            true => "nothing".to_owned(),
            false => entries + &self.blobs.removed(),
        };
        let kept = self
            .blobs
            .kept("nothing reaches but that may be part of a build under way");
        let _ = write!(text, "to remove: {removed}\nto keep: {kept}");
        text
    }
}

impl Details for PruneLayoutDetails {
    fn summary(&self, place: &Place, cost: &str) -> String {
        let address = place.addresses();
        if self.is_nothing() {
            return format!("nothing to prune in {address}; {cost}");
        }
        if self.dry_run {
            return format!("dry run: nothing was removed from {address}; {cost}");
        }
        let Deleted {
            entries,
            blobs,
            bytes,
        } = self.deleted;
        let entries = match entries {
            0 => String::new(),
            1 => "1 entry, ".to_owned(),
            n => format!("{n} entries, "),
        };
        format!(
            "pruned {address}: removed {entries}{} ({}); {cost}",
            count(blobs, "blob"),
            progress::bytes(bytes)
        )
    }

    fn of_failure(self) -> Self {
        PruneLayoutDetails {
            dry_run: self.dry_run,
            json: self.json,
            ..PruneLayoutDetails::default()
        }
    }

    fn as_json(&self) -> bool {
        self.json
    }
}

pub(super) async fn prune(
    task: &PruneLayoutTask,
    context: &Context<'_>,
) -> Result<PruneLayoutDetails> {
    context.progress.stage("reading the layout", 0, 0);
    let (root, grace) = (task.layout.clone(), task.grace);
    let (layout, plan) = blocking(move || {
        let layout = Layout::open(&root, LOCK_WAIT)?;
        let plan = layout.plan_prune(grace)?;
        Ok((layout, plan))
    })
    .await?;
    let mut details = PruneLayoutDetails::new(&plan, task);
    match task.consent {
        Consent::Ask if !details.is_nothing() => {
            let address = printable(&task.layout.to_string_lossy()).into_owned();
            context.agree(&details.plan(), &address).await?;
        }
        _ if task.json => {}
        _ => context.person.show(&details.plan()).await?,
    }
    if task.consent == Consent::DryRun || details.is_nothing() {
        return Ok(details);
    }
    context.progress.stage("deleting", 0, 0);
    let pruned = blocking(move || layout.prune(&plan)).await;
    let Pruned {
        entries,
        blobs,
        bytes,
    } = pruned.map_err(|error| anyhow!("{error:#}; the next prune continues"))?;
    details.deleted = Deleted {
        entries,
        blobs,
        bytes,
    };
    Ok(details)
}
