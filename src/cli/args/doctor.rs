//! `layercache doctor`.

use anyhow::Result;

use crate::cli::args::format::TextFormat;
use crate::cli::args::specs::{SpecText, Specs, is_same_place};
use crate::config::{DoctorTask, Task, TestedPlace};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
SPEC is buildx's: type=s3 with region, bucket, name, prefix, endpoint_url and so on.
For --cache-to, one small object beside the cache's blobs is written, read and deleted; nothing is
left behind. For --cache-from, nothing is written. A place that both name is tested once.
Exit status 1 if an export or an import would fail.

Examples:
  layercache doctor --cache-to type=s3,region=eu-west-1,bucket=ci-cache,name=app
  layercache doctor --cache-from type=s3,region=eu-west-1,bucket=ci-cache,name=app")]
pub struct DoctorArgs {
    /// Where imports alone must work; repeat for several [default: LAYERCACHE_CACHE_FROM, unless
    /// --cache-to is given]
    #[arg(long, value_name = "SPEC")]
    pub cache_from: Vec<SpecText>,

    /// Where exports and imports must work; repeat for several [default: LAYERCACHE_CACHE_TO, unless
    /// --cache-from is given]
    #[arg(long, value_name = "SPEC")]
    pub cache_to: Vec<SpecText>,

    /// How the result is printed
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "text")]
    pub format: TextFormat,
}

impl DoctorArgs {
    pub fn task(self, specs: &mut Specs) -> Result<Task> {
        let (sources, targets) = specs.either(self.cache_from, self.cache_to)?;
        let mut places: Vec<TestedPlace> = Vec::new();
        places.extend(targets.into_iter().map(|target| TestedPlace {
            s3: target.s3,
            writes: true,
        }));
        for s3 in sources {
            if !places.iter().any(|known| is_same_place(&known.s3, &s3)) {
                places.push(TestedPlace { s3, writes: false });
            }
        }
        Ok(Task::Doctor(DoctorTask {
            places,
            json: self.format.is_json(),
        }))
    }
}
