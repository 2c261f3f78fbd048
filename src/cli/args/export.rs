//! `layercache export`.

use std::path::PathBuf;

use anyhow::Result;

use crate::cache::digest::Digest;
use crate::cli::args::specs::{SpecText, Specs, check_layout};
use crate::cli::args::tag_name;
use crate::config::Selection;
use crate::config::{ExportTask, Resend, Task};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
SPEC is buildx's: type=s3 with region, bucket, name, prefix, mode=min|max, endpoint_url and so on.
Leave credentials to the environment: the AWS default chain finds them.

Example:
  layercache export --cache-to type=s3,region=eu-west-1,bucket=ci-cache,name=app,mode=max ../cache")]
pub struct ExportArgs {
    /// Where to export to; repeat for several [default: LAYERCACHE_CACHE_TO, one spec per line]
    // Not clap's `env`, which does not split lines and could show the value.
    #[arg(long, value_name = "SPEC")]
    pub cache_to: Vec<SpecText>,

    /// Export the entry with this tag [default: latest, or the only entry]
    #[arg(long, value_name = "NAME", value_parser = tag_name)]
    pub tag: Option<String>,

    /// Export the entry with this digest
    #[arg(long, value_name = "DIGEST", conflicts_with = "tag")]
    pub digest: Option<Digest>,

    /// Read back the blobs that S3 already has, and send damaged ones again
    #[arg(long, conflicts_with = "force")]
    pub verify_remote: bool,

    /// Send every blob, even those that S3 already has
    #[arg(long)]
    pub force: bool,

    /// Show what would be sent, but write nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Directory of the OCI layout, as buildx's type=local or type=oci,tar=false writes it
    #[arg(value_name = "LAYOUT")]
    pub layout: PathBuf,
}

impl ExportArgs {
    pub fn task(self, specs: &mut Specs) -> Result<Task> {
        check_layout(&self.layout, "--cache-to")?;
        Ok(Task::Export(ExportTask {
            targets: specs.cache_to(self.cache_to)?,
            layout: self.layout,
            selection: Selection::new(self.tag, self.digest),
            resend: match (self.force, self.verify_remote) {
                (true, _) => Resend::All,
                (_, true) => Resend::Damaged,
                _ => Resend::None,
            },
            dry_run: self.dry_run,
        }))
    }
}
