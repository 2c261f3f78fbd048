//! `layercache lifecycle`.

use anyhow::Result;

use crate::cli::args::format::TextFormat;
use crate::cli::args::specs::{SpecText, Specs};
use crate::config::{LifecycleAction, LifecycleTask, Task};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Caches expire by age: manifests some days after the last export, blobs later, so that no manifest
outlives its blobs. The rules depend on the spec's touch_refresh and prefixes, and on its name only
if manifests share the blobs' prefix. They are printed for
`aws s3api put-bucket-lifecycle-configuration`, which replaces all rules of the bucket; --apply
keeps the rules of others.
Exit status 1 if --check finds a rule that can break builds.

Example:
  layercache lifecycle --cache-to type=s3,region=eu-west-1,bucket=ci-cache --expire-after 30d")]
pub struct LifecycleArgs {
    /// The caches to expire; repeat for several [default: LAYERCACHE_CACHE_TO, one spec per line]
    #[arg(long, value_name = "SPEC")]
    pub cache_to: Vec<SpecText>,

    /// How long a cache stays after its last export, in days [default: 14d]
    #[arg(long, value_name = "DAYS", value_parser = days)]
    pub expire_after: Option<u32>,

    /// Say whether each of the bucket's rules can break builds
    #[arg(long, conflicts_with_all = ["apply", "expire_after"])]
    pub check: bool,

    /// Write the rules to the bucket, and keep the rules of others
    #[arg(long)]
    pub apply: bool,

    /// How the result of --check or --apply is printed
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "text")]
    pub format: TextFormat,
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
            json: self.format.is_json(),
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
