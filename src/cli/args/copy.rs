//! `layercache copy`.

use anyhow::Result;

use crate::cli::args::specs::{SpecText, Specs};
use crate::config::{CopyTask, Task};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Several --cache-from become one cache: the parts of a matrix build, or a branch over main. Blobs are
copied on the server where both sides have one endpoint and the target's credentials can read the
source; otherwise they pass through this machine, verified, without touching its disk. If a source
spec has several names, only the first is read; every name of the target is written.

Example:
  layercache copy --cache-from type=s3,region=eu-west-1,bucket=ci-cache,name=pr-7 \\
    --cache-to type=s3,region=eu-west-1,bucket=ci-cache,name=main,mode=max")]
pub struct CopyArgs {
    /// What to copy; repeat to merge [default: LAYERCACHE_CACHE_FROM, one spec per line]
    #[arg(long, value_name = "SPEC")]
    pub cache_from: Vec<SpecText>,

    /// Where to copy to; repeat for several [default: LAYERCACHE_CACHE_TO, one spec per line]
    #[arg(long, value_name = "SPEC")]
    pub cache_to: Vec<SpecText>,

    /// Show what would be copied, but write nothing
    #[arg(long)]
    pub dry_run: bool,
}

impl CopyArgs {
    pub fn task(self, specs: &mut Specs) -> Result<Task> {
        Ok(Task::Copy(CopyTask {
            sources: specs.cache_from(self.cache_from)?,
            targets: specs.cache_to(self.cache_to)?,
            dry_run: self.dry_run,
        }))
    }
}
