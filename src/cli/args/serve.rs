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
Leave credentials to the environment: the AWS default chain finds them.
COMMAND gets LAYERCACHE_FROM and LAYERCACHE_TO in its environment: values for --cache-from and
--cache-to (one per line if there are several). LAYERCACHE_GHA_FROM and LAYERCACHE_GHA_TO are the
same for type=gha. Without --cache-to, builders cannot write.
The exit status is COMMAND's.

Example:
  layercache serve --cache-from type=s3,region=eu-west-1,bucket=ci-cache,name=app \\
    -- sh -c 'docker buildx build --cache-from \"$LAYERCACHE_FROM\" .'")]
pub struct ServeArgs {
    /// What builders may read; repeat for several [default: LAYERCACHE_CACHE_FROM, one spec per line]
    #[arg(long, value_name = "SPEC")]
    pub cache_from: Vec<SpecText>,

    /// Where builders may write, one spec [default: LAYERCACHE_CACHE_TO, unless --cache-from is given]
    #[arg(long, value_name = "SPEC")]
    pub cache_to: Vec<SpecText>,

    /// Address to listen on; port 0 takes any free one
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,

    /// Allow --listen to be reachable from other machines, in plain HTTP
    #[arg(long)]
    pub insecure_listen: bool,

    /// Append the variables to this file once the endpoint listens, for $GITHUB_ENV
    #[arg(long, value_name = "FILE")]
    pub env_file: Option<PathBuf>,

    /// Command to run; serve until it ends [default: until SIGTERM]
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
        let source = match self.cache_to.is_empty() {
            true => "LAYERCACHE_CACHE_TO",
            false => "--cache-to",
        };
        let (sources, mut targets) = specs.either(self.cache_from, self.cache_to)?;
        if targets.len() > 1 {
            return Err(usage(format!(
                "{source}: {} specs are given (accepted: one; name=a;b in it writes two caches)",
                targets.len()
            )));
        }
        Ok(Task::Serve(Box::new(ServeTask {
            sources,
            target: targets.pop(),
            listen: self.listen,
            env_file: self.env_file,
            command: self.command,
        })))
    }
}
