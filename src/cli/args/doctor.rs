//! `layercache doctor`.

use anyhow::Result;

use crate::cli::args::format::TextFormat;
use crate::cli::args::specs::{SpecText, Specs};
use crate::config::{DoctorTask, Task};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
SPEC is buildx's: type=s3 with region, bucket, name, prefix, endpoint_url and so on.
Writes, reads and deletes one small object beside the cache's blobs, and leaves nothing behind.
Exit status 1 if an export or an import would fail.

Example:
  layercache doctor --cache-to type=s3,region=eu-west-1,bucket=ci-cache,name=app")]
pub struct DoctorArgs {
    /// What to test; repeat for several [default: LAYERCACHE_CACHE_TO, one spec per line]
    #[arg(long, value_name = "SPEC")]
    pub cache_to: Vec<SpecText>,

    /// How the result is printed
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "text")]
    pub format: TextFormat,
}

impl DoctorArgs {
    pub fn task(self, specs: &mut Specs) -> Result<Task> {
        Ok(Task::Doctor(DoctorTask {
            targets: specs.cache_to(self.cache_to)?,
            json: self.format.is_json(),
        }))
    }
}
