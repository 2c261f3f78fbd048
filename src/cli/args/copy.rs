//! `layercache copy`.

use anyhow::Result;

use crate::cli::args::specs::{SpecText, Specs};
use crate::cli::args::usage;
use crate::config::{CopyTask, S3Config, Task};
use crate::quote::printable;

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Several --cache-from become one cache: the parts of a matrix build, or a branch over main. Blobs are
copied on the server where both sides have one endpoint and the target's credentials can read the
source; otherwise they pass through this machine, verified, without touching its disk. If a source
spec has several names, only the first is read; every name of the target is written. All of a cache
is copied unless the target's spec says mode=min.

Example:
  layercache copy --cache-from type=s3,region=eu-west-1,bucket=ci-cache,name=pr-7 \\
    --cache-to type=s3,region=eu-west-1,bucket=ci-cache,name=main")]
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
        let sources = specs.cache_from(self.cache_from)?;
        let targets = specs.copy_to(self.cache_to)?;
        for target in &targets {
            check_is_elsewhere(&sources, &target.s3)?;
        }
        Ok(Task::Copy(CopyTask {
            sources,
            targets,
            dry_run: self.dry_run,
        }))
    }
}

/// A cache that is copied onto itself gains nothing, and loses what a `mode` or a blob that cannot be
/// seen leaves out.
fn check_is_elsewhere(sources: &[S3Config], target: &S3Config) -> Result<()> {
    let is_target = |source: &S3Config| {
        let place = |s3: &S3Config| {
            let blobs = format!("{}{}", s3.prefix, s3.blobs_prefix);
            let (region, bucket) = (s3.region.clone(), s3.bucket.clone());
            (region, bucket, s3.endpoint_url.clone(), blobs)
        };
        let key = source.manifest_key(&source.names[0]);
        let mut keys = target.names.iter().map(|name| target.manifest_key(name));
        // Two accounts of one store can have buckets of the same name.
        place(source) == place(target)
            && source.credentials == target.credentials
            && keys.all(|target| target == key)
    };
    if sources.iter().all(is_target) {
        return Err(usage(format!(
            "--cache-to: {} is the cache that --cache-from names: there is nothing to copy",
            printable(&target.address())
        )));
    }
    Ok(())
}
