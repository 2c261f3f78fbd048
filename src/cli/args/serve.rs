//! `layercache serve`.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Result;

use crate::cli::args::specs::{SpecText, Specs};
use crate::cli::args::usage;
use crate::config::{ServeTask, Task};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
SPEC is buildx's: type=s3 with region, bucket, name, prefix, endpoint_url and so on.
Credentials are best left to the environment; the AWS default chain finds them.
COMMAND, or with --env-file what follows, finds in its environment LAYERCACHE_FROM and LAYERCACHE_TO:
values for --cache-from and --cache-to (one a line if there are several). LAYERCACHE_GHA_FROM and
LAYERCACHE_GHA_TO are the same for type=gha. Nothing can be written without --cache-to.
With COMMAND the exit status is that of COMMAND.

Example:
  layercache serve --cache-from type=s3,region=eu-west-1,bucket=ci-cache,name=app \\
    -- sh -c 'docker buildx build --cache-from \"$LAYERCACHE_FROM\" .'")]
pub struct ServeArgs {
    /// What builders may read; repeat for several [default: LAYERCACHE_CACHE_FROM, one spec a line]
    #[arg(long, value_name = "SPEC")]
    pub cache_from: Vec<SpecText>,

    /// Where builders may write [default: LAYERCACHE_CACHE_TO, without --cache-from]
    #[arg(long, value_name = "SPEC")]
    pub cache_to: Option<SpecText>,

    /// Address to listen at; port 0 is any free one
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,

    /// Allow --listen to be reachable from other machines, in plain HTTP
    #[arg(long)]
    pub insecure_listen: bool,

    /// Append the variables to this file once it is listening, for $GITHUB_ENV
    #[arg(long, value_name = "FILE")]
    pub env_file: Option<PathBuf>,

    /// What to run; serves until it ends [default: until SIGTERM]
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

impl ServeArgs {
    pub fn task(self, specs: &mut Specs) -> Result<Task> {
        if !self.listen.ip().is_loopback() && !self.insecure_listen {
            return Err(usage(format!(
                "--listen: {} can be reached from other machines, without TLS (accepted: loopback; \
                 --insecure-listen allows it)",
                self.listen
            )));
        }
        let (sources, target) = specs.either(self.cache_from, self.cache_to)?;
        Ok(Task::Serve(Box::new(ServeTask {
            sources,
            target,
            listen: self.listen,
            env_file: self.env_file,
            command: self.command,
        })))
    }
}
