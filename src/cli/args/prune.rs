//! `layercache prune`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use crate::cli::args::format::TableFormat;
use crate::cli::args::size::size;
use crate::cli::args::specs::{SpecText, Specs, check_layout};
use crate::cli::args::usage;
use crate::cli::spec;
use crate::config::{CacheChoice, Consent, ExportConfig, PruneLayoutTask, PruneTask, Task};

/// How old a blob in a layout must be to go, by default: builds write blobs before the index names
/// them.
const LAYOUT_GRACE: Duration = Duration::from_secs(60 * 60);

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Options about a bucket.
const OF_BUCKETS: [&str; 10] = [
    "cache_to",
    "older_than",
    "keep_last",
    "name",
    "keep",
    "max_size",
    "also",
    "assume_no_others",
    "allow_empty",
    "repair",
];

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Without options, prune removes no cache, only garbage: blobs that no cache needs, and abandoned
uploads. The spec's name does not matter: all caches of its manifests_prefix count. Blobs younger
than --grace stay, because an export may be about to name them. All caches of other specs below the
spec's prefix count, too: a manifest does not say where its blobs are. --assume-no-others says that
they need none of this spec's, and --also names those that do.
Exit status 2 without --yes where nobody can be asked.

Examples:
  layercache prune --cache-to type=s3,region=eu-west-1,bucket=ci-cache --older-than 30d --keep main
  layercache prune ./cache")]
pub struct PruneArgs {
    /// Where to prune; repeat for several [default: LAYERCACHE_CACHE_TO, one spec per line]
    #[arg(long, value_name = "SPEC")]
    pub cache_to: Vec<SpecText>,

    /// Remove caches written longer ago than this
    #[arg(long, value_name = "AGE", value_parser = age)]
    pub older_than: Option<Duration>,

    /// Keep the N caches that were written last, and those of the same second as the last of them
    #[arg(long, value_name = "N")]
    pub keep_last: Option<usize>,

    /// Remove only caches whose names match, even damaged ones; repeat for several
    #[arg(long, value_name = "GLOB")]
    pub name: Vec<glob::Pattern>,

    /// Keep caches whose names match; repeat for several
    #[arg(long, value_name = "GLOB")]
    pub keep: Vec<glob::Pattern>,

    /// Remove the oldest caches until the rest fits
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_size: Option<u64>,

    /// Caches elsewhere that need the same blobs; repeat for several
    #[arg(long, value_name = "SPEC")]
    pub also: Vec<SpecText>,

    /// No cache of another spec needs the blobs: do not look below the prefix for any
    #[arg(long)]
    pub assume_no_others: bool,

    /// Allow every cache to be removed
    #[arg(long)]
    pub allow_empty: bool,

    /// Rewrite manifests that were written meanwhile and name a deleted blob
    #[arg(long)]
    pub repair: bool,

    /// Keep blobs younger than this [default: touch_refresh plus a day; 1h for a LAYOUT]
    #[arg(long, value_name = "AGE", value_parser = age)]
    pub grace: Option<Duration>,

    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,

    /// Show what would be removed, but remove nothing, even with --yes
    #[arg(long)]
    pub dry_run: bool,

    /// How the plan is printed
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "table")]
    pub format: TableFormat,

    /// Directory of a local cache to prune, instead of a bucket
    #[arg(value_name = "LAYOUT", conflicts_with_all = OF_BUCKETS)]
    pub layout: Option<PathBuf>,
}

impl PruneArgs {
    pub fn task(self, specs: &mut Specs) -> Result<Task> {
        let consent = match (self.dry_run, self.yes) {
            (true, _) => Consent::DryRun,
            (_, true) => Consent::Given,
            _ => Consent::Ask,
        };
        let json = self.format.is_json();
        if json && consent == Consent::Ask {
            return Err(usage(
                "--format json cannot ask: give --yes or --dry-run, too".to_owned(),
            ));
        }
        if let Some(layout) = self.layout {
            check_layout(&layout, "--cache-to")?;
            return Ok(Task::PruneLayout(PruneLayoutTask {
                layout,
                grace: self.grace.unwrap_or(LAYOUT_GRACE),
                consent,
                json,
            }));
        }
        let targets = specs.cache_to(self.cache_to)?;
        if let Some(grace) = self.grace {
            check_grace(grace, &targets)?;
        }
        Ok(Task::Prune(PruneTask {
            targets,
            choice: CacheChoice {
                older_than: self.older_than,
                keep_last: self.keep_last,
                name: self.name,
                keep: self.keep,
                max_size: self.max_size,
                allow_empty: self.allow_empty,
            },
            also: specs.also(self.also)?,
            only_own: self.assume_no_others,
            grace: self.grace,
            repair: self.repair,
            consent,
            json,
        }))
    }
}

/// Exports rely on blobs that are younger than touch_refresh.
fn check_grace(grace: Duration, targets: &[ExportConfig]) -> Result<()> {
    for target in targets {
        if grace < target.touch_refresh {
            return Err(usage(format!(
                "--grace: it must not be below touch_refresh ({}): exports rely on blobs younger \
                 than that",
                span(target.touch_refresh)
            )));
        }
    }
    Ok(())
}

/// A duration as one types it.
fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        s if s % (60 * 60) == 0 => format!("{}h", s / (60 * 60)),
        s if s % 60 == 0 => format!("{}m", s / 60),
        s => format!("{s}s"),
    }
}

fn age(text: &str) -> Result<Duration, &'static str> {
    if let Some(days) = text
        .strip_suffix('d')
        .and_then(|days| days.parse::<u32>().ok())
    {
        return Ok(DAY.saturating_mul(days));
    }
    spec::duration("", text).map_err(|_| "accepted: days as in 30d, or hours as in 720h or 1h30m")
}
