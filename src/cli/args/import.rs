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
Credentials are best left to the environment; the AWS default chain finds them.
Where there is no cache yet it is a warning, unless --require is given.

Example:
  layercache import --cache-from type=s3,region=eu-west-1,bucket=ci-cache,name=app ./cache")]
pub struct ImportArgs {
    /// Where from; repeat for several [default: LAYERCACHE_CACHE_FROM, one spec a line]
    #[arg(long, value_name = "SPEC")]
    pub cache_from: Vec<SpecText>,

    /// Tag to give what is imported [default: latest]
    #[arg(long, value_name = "NAME", value_parser = tag_name)]
    pub tag: Option<String>,

    /// Fail unless there is a cache that a build can use
    #[arg(long)]
    pub require: bool,

    /// What to do with results whose layers are missing or damaged on S3
    #[arg(long, value_enum, value_name = "WHAT", default_value = "drop")]
    pub missing: Missing,

    /// Hash the blobs that are in the layout already, and fetch damaged ones again
    #[arg(long)]
    pub verify: bool,

    /// Refresh the cache's blobs on S3 that are older than 24h, as an export does: a lifecycle rule
    /// then lets those live that are only imported. Needs the permission to write
    #[arg(long)]
    pub refresh: bool,

    /// Say what would be fetched, but write nothing
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
