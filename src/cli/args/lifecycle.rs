//! `layercache lifecycle`.

use anyhow::Result;

use crate::cli::args::specs::{SpecText, Specs};
use crate::config::{LifecycleAction, LifecycleTask, Task};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Caches expire by age: manifests some days after the last export, blobs later, so that no manifest
outlives its blobs. The spec's touch_refresh and prefixes count, its name does not, unless manifests
share the blobs' prefix. The rules are printed for
`aws s3api put-bucket-lifecycle-configuration`, which replaces all rules of the bucket; --apply
keeps those of others.
Exit status 1 if --check finds a rule that can break builds.

Example:
  layercache lifecycle --cache-to type=s3,region=eu-west-1,bucket=ci-cache --expire-after 30d")]
pub struct LifecycleArgs {
    /// Whose rules; repeat for several [default: LAYERCACHE_CACHE_TO, one spec a line]
    #[arg(long, value_name = "SPEC")]
    pub cache_to: Vec<SpecText>,

    /// How long a cache stays after its last export, in days [default: 14d]
    #[arg(long, value_name = "DAYS", value_parser = days)]
    pub expire_after: Option<u32>,

    /// Say of each rule that the bucket has whether it can break builds
    #[arg(long, conflicts_with_all = ["apply", "expire_after"])]
    pub check: bool,

    /// Write the rules to the bucket, beside those of others
    #[arg(long)]
    pub apply: bool,
}

impl LifecycleArgs {
    pub fn task(self, specs: &mut Specs) -> Result<Task> {
        Ok(Task::Lifecycle(LifecycleTask {
            targets: specs.cache_to(self.cache_to)?,
            expire_after: self.expire_after,
            action: match (self.check, self.apply) {
                (true, _) => LifecycleAction::Check,
                (_, true) => LifecycleAction::Apply,
                _ => LifecycleAction::Print,
            },
        }))
    }
}

/// S3's rules count whole days.
fn days(text: &str) -> Result<u32, &'static str> {
    text.strip_suffix('d')
        .and_then(|number| number.parse().ok())
        .filter(|days| (1..=36_500).contains(days))
        .ok_or("accepted: whole days from 1d to 36500d")
}
