//! `layercache verify`.

use std::path::PathBuf;

use anyhow::Result;

use crate::cli::args::format::TableFormat;
use crate::cli::args::specs::{SpecText, Specs, check_layout};
use crate::config::{Origin, Task, VerifyTask};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
SPEC is buildx's: type=s3 with region, bucket, prefix, endpoint_url and so on. Its name does not
matter: all caches are verified, or those that --name matches. A damaged object stays while a cache
that --name leaves out needs it.
An interrupted verify --deep on S3 continues where it stopped: until a run completes, the list of
verified blobs is in the directory layercache below $XDG_CACHE_HOME or ~/.cache.
Exit status 1 if anything is still wrong at the end.

Examples:
  layercache verify --cache-from type=s3,region=eu-west-1,bucket=ci-cache
  layercache verify --cache-from type=s3,region=eu-west-1,bucket=ci-cache --name 'feature/*'
  layercache verify --deep --repair ./cache")]
pub struct VerifyArgs {
    /// Where the caches are; repeat for several [default: LAYERCACHE_CACHE_FROM, one spec per line]
    #[arg(long, value_name = "SPEC")]
    pub cache_from: Vec<SpecText>,

    /// Verify only caches whose names match, as in 'feature/*'
    #[arg(long, value_name = "GLOB", conflicts_with = "layout")]
    pub name: Option<glob::Pattern>,

    /// Also read and hash every blob
    #[arg(long)]
    pub deep: bool,

    /// On S3, drop missing and damaged blobs from the manifests, and delete damaged ones; in a
    /// layout, move damaged blobs aside
    #[arg(long)]
    pub repair: bool,

    /// How the result is printed
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "table")]
    pub format: TableFormat,

    /// Directory of an OCI layout to verify, instead of S3
    #[arg(value_name = "LAYOUT", conflicts_with = "cache_from")]
    pub layout: Option<PathBuf>,
}

impl VerifyArgs {
    pub fn task(self, specs: &mut Specs) -> Result<Task> {
        let origin = match self.layout {
            Some(layout) => {
                check_layout(&layout, "--cache-from")?;
                Origin::Layout(layout)
            }
            None => Origin::S3(specs.places_from(self.cache_from)?),
        };
        let cache = match specs.variable("XDG_CACHE_HOME") {
            Some(cache) => Some(PathBuf::from(cache)),
            None => specs
                .variable("HOME")
                .map(|home| PathBuf::from(home).join(".cache")),
        };
        Ok(Task::Verify(VerifyTask {
            origin,
            name: self.name,
            deep: self.deep,
            repair: self.repair,
            state: cache.map(|cache| cache.join("layercache")),
            json: self.format.is_json(),
        }))
    }
}
