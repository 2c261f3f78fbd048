//! `layercache ls`.

use anyhow::Result;

use crate::cli::args::format::TableFormat;
use crate::cli::args::specs::{SpecText, Specs};
use crate::config::{LsTask, Sort, Task};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
SPEC is buildx's: type=s3 with region, bucket, prefix, endpoint_url and so on. Its name does
not matter: all caches are listed.

Example:
  layercache ls --cache-from type=s3,region=eu-west-1,bucket=ci-cache --sort size")]
pub struct LsArgs {
    /// Where to look; repeat for several [default: LAYERCACHE_CACHE_FROM, one spec per line]
    #[arg(long, value_name = "SPEC")]
    pub cache_from: Vec<SpecText>,

    /// List only caches whose names match, as in 'feature/*'
    #[arg(long, value_name = "GLOB")]
    pub name: Option<glob::Pattern>,

    /// The order of the caches
    #[arg(long, value_enum, value_name = "ORDER", default_value = "name")]
    pub sort: Sort,

    /// How the list is printed
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "table")]
    pub format: TableFormat,
}

impl LsArgs {
    pub fn task(self, specs: &mut Specs) -> Result<Task> {
        Ok(Task::Ls(LsTask {
            sources: specs.places_from(self.cache_from)?,
            name: self.name,
            sort: self.sort,
            json: self.format.is_json(),
        }))
    }
}
