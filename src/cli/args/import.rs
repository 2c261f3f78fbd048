//! `layercache import`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use crate::cli::args::specs::{SpecText, Specs, check_layout};
use crate::cli::args::tag_name;
use crate::config::{ImportTask, Missing, Task};

/// The default of an export's touch_refresh, which --cache-from does not have.
const REFRESH: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
SPEC is buildx's: type=s3 with region, bucket, name, prefix, endpoint_url and so on.
Leave credentials to the environment: the AWS default chain finds them.
If there is no cache yet, the import succeeds, unless --require is given.

Example:
  layercache import --cache-from type=s3,region=eu-west-1,bucket=ci-cache,name=app ../cache")]
pub struct ImportArgs {
    /// Where to import from; repeat for several [default: LAYERCACHE_CACHE_FROM, one spec per line]
    #[arg(long, value_name = "SPEC")]
    pub cache_from: Vec<SpecText>,

    /// The tag for the first cache found [default: latest]
    #[arg(long, value_name = "NAME", value_parser = tag_name)]
    pub tag: Option<String>,

    /// Fail if there is no cache that a build can use
    #[arg(long)]
    pub require: bool,

    /// What to do about blobs that are missing or damaged on S3
    #[arg(long, value_enum, value_name = "WHAT", default_value = "drop")]
    pub missing: Missing,

    /// Hash the blobs that the layout already has, and fetch damaged ones again
    #[arg(long)]
    pub verify: bool,

    /// Refresh blobs on S3 that are older than 24 h, as an export does, so that lifecycle rules
    /// spare a cache that is only imported. Needs permission to write
    #[arg(long)]
    pub refresh: bool,

    /// Show what would be fetched, but write nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Directory of the OCI layout: absent, empty, or a layout to add to
    #[arg(value_name = "LAYOUT")]
    pub layout: PathBuf,
}

impl ImportArgs {
    pub fn task(self, specs: &mut Specs) -> Result<Task> {
        check_layout(&self.layout, "--cache-from")?;
        Ok(Task::Import(ImportTask {
            sources: specs.cache_from(self.cache_from)?,
            layout: self.layout,
            tag: self.tag,
            require: self.require,
            missing: self.missing,
            verify: self.verify,
            refresh: self.refresh.then_some(REFRESH),
            dry_run: self.dry_run,
        }))
    }
}
