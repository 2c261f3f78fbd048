//! `layercache inspect`.

use std::path::PathBuf;

use anyhow::Result;

use crate::cache::digest::Digest;
use crate::cli::args::format::TreeFormat;
use crate::cli::args::specs::{SpecText, Specs, check_layout};
use crate::cli::args::{tag_name, usage};
use crate::config::{InspectTask, Origin, Selection, Task};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
SPEC is buildx's: type=s3 with region, bucket, name, prefix, endpoint_url and so on.
With -v, layers are shown with their diffIDs.

Examples:
  layercache inspect --cache-from type=s3,region=eu-west-1,bucket=ci-cache,name=app
  layercache inspect ./cache")]
pub struct InspectArgs {
    /// The cache on S3; repeat for several [default: LAYERCACHE_CACHE_FROM, one spec per line]
    #[arg(long, value_name = "SPEC")]
    pub cache_from: Vec<SpecText>,

    /// Inspect what has this tag in the layout [default: latest, or the only entry]
    #[arg(long, value_name = "NAME", value_parser = tag_name)]
    pub tag: Option<String>,

    /// Inspect the manifest with this digest in the layout
    #[arg(long, value_name = "DIGEST", conflicts_with = "tag")]
    pub digest: Option<Digest>,

    /// How the cache is printed
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "tree")]
    pub format: TreeFormat,

    /// Directory of an OCI layout with the cache, instead of S3
    #[arg(value_name = "LAYOUT", conflicts_with = "cache_from")]
    pub layout: Option<PathBuf>,
}

impl InspectArgs {
    pub fn task(self, specs: &mut Specs, verbose: bool) -> Result<Task> {
        if self.layout.is_none() && (self.tag.is_some() || self.digest.is_some()) {
            return Err(usage(
                "--tag and --digest choose from a LAYOUT, but none is given".to_owned(),
            ));
        }
        let origin = match self.layout {
            Some(layout) => {
                check_layout(&layout, "--cache-from")?;
                Origin::Layout(layout)
            }
            None => Origin::S3(specs.cache_from(self.cache_from)?),
        };
        Ok(Task::Inspect(InspectTask {
            origin,
            selection: Selection::new(self.tag, self.digest),
            diff_ids: verbose,
            json: self.format.is_json(),
        }))
    }
}
