//! The command line: first what was typed, as clap has it; then what is to be done, with every spec
//! parsed and every value checked.

mod copy;
mod doctor;
mod export;
mod format;
mod import;
mod inspect;
mod lifecycle;
mod ls;
mod prune;
mod serve;
mod size;
mod specs;
mod verify;

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use anyhow::Result;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgAction, CommandFactory as _, Parser, Subcommand, ValueEnum};

use self::copy::CopyArgs;
use self::doctor::DoctorArgs;
use self::export::ExportArgs;
use self::import::ImportArgs;
use self::inspect::InspectArgs;
use self::lifecycle::LifecycleArgs;
use self::ls::LsArgs;
use self::prune::PruneArgs;
use self::serve::ServeArgs;
use self::specs::Specs;
use self::verify::VerifyArgs;
use crate::cli::manual::Manual;
use crate::cli::spec::{self, Env};
use crate::config::Task;
use crate::layout::check_tag;
use crate::memory;
use crate::progress::Display;

/// Move BuildKit's build cache between a local OCI layout and S3, without a build
#[derive(Debug, Clone, Parser)]
#[command(
    name = "layercache",
    version,
    // Scripts append flags to the ones they are given, so the last one wins.
    args_override_self = true,
    after_help = "\
Exit status: 0 done, 1 failed, 2 usage error, 129, 130 or 143 interrupted.

Examples:
  export LAYERCACHE_CACHE_FROM=type=s3,region=eu-west-1,bucket=ci-cache,name=app
  export LAYERCACHE_CACHE_TO=type=s3,region=eu-west-1,bucket=ci-cache,name=app,mode=max
  layercache import ../cache
  docker buildx build --cache-from type=local,src=../cache \\
    --cache-to type=local,dest=../cache,mode=max .
  layercache export ../cache"
)]
struct Line {
    #[command(subcommand)]
    command: AnyCommand,
    #[command(flatten)]
    global: Global,
}

#[derive(Debug, Clone, Subcommand)]
enum AnyCommand {
    #[command(flatten)]
    Cache(Command),
    #[command(flatten)]
    Manual(Manual),
}

/// What the whole command line asks for.
#[derive(Debug, Clone)]
pub enum Asked {
    /// Work on a cache.
    Work(Args),
    /// Completions or man pages.
    Manual(Manual),
}

/// What was typed for a command that works on a cache.
#[derive(Debug, Clone)]
pub struct Args {
    pub command: Command,
    pub global: Global,
}

/// The heading of the options that all commands share, in the help of each.
const GLOBAL: &str = "Global options";

/// What every subcommand takes.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct Global {
    /// How to show progress [default: BUILDKIT_PROGRESS, else auto]
    // The variable is read by `Global::progress`: an empty one counts as none, unlike with clap.
    #[arg(long, global = true, value_enum, value_name = "MODE", help_heading = GLOBAL)]
    pub progress: Option<Display>,

    /// Show only results, warnings and errors: --progress=quiet
    #[arg(short, long, global = true, overrides_with_all = ["progress", "verbose"], help_heading = GLOBAL)]
    pub quiet: bool,

    /// Write the results to this file, as JSON; - is stdout
    #[arg(long, global = true, value_name = "FILE", help_heading = GLOBAL)]
    pub metadata_file: Option<PathBuf>,

    /// Show in more detail what is done and why
    #[arg(short, long, global = true, action = ArgAction::Count, overrides_with = "quiet", help_heading = GLOBAL)]
    pub verbose: u8,
}

#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Send a cache or an image from a local OCI layout to S3
    Export(ExportArgs),
    /// Fetch a cache from S3 into a local OCI layout
    Import(ImportArgs),
    /// Test what a bucket and its credentials allow, and name missing permissions
    Doctor(DoctorArgs),
    /// List the caches in a bucket, and what else is there
    Ls(LsArgs),
    /// Show the layers of one cache, and what it shares with others
    Inspect(InspectArgs),
    /// Check that every cache is whole, and make broken ones usable
    Verify(VerifyArgs),
    /// Copy a cache to another place on S3, or merge several into one
    Copy(CopyArgs),
    /// Remove garbage and old caches from a bucket or a local directory
    Prune(PruneArgs),
    /// Choose, check or write the lifecycle rules of a bucket
    Lifecycle(LifecycleArgs),
    /// Let builders on this machine read and write a cache on S3, blob by blob
    Serve(ServeArgs),
}

/// The command line, a spec, or a variable that replaces one is invalid: exit status 2.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageError(String);

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// The command line as clap knows it.
pub(super) fn definition() -> clap::Command {
    Line::command()
}

/// Parses what was typed, the program's name first.
///
/// # Errors clap's own, to be printed with its `print` and to exit with its `exit_code`; `--help`
/// and `--version` arrive this way, too. An error that would show a spec is replaced by one that
/// does not.
pub fn parse<I, T>(typed: I) -> Result<Asked, clap::Error>
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
{
    let typed: Vec<OsString> = typed.into_iter().map(Into::into).collect();
    let line = Line::try_parse_from(&typed).map_err(|error| {
        let help = error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
        if error.use_stderr() && !help && looks_like_spec(&error.to_string()) {
            Line::command().error(
                error.kind(),
                "a spec where none is expected (put --cache-to or --cache-from before each \
                 spec, and quotes round it)",
            )
        } else {
            with_tip_about_spec(error, &typed)
        }
    })?;
    let global = line.global;
    Ok(match line.command {
        AnyCommand::Cache(command) => Asked::Work(Args { command, global }),
        AnyCommand::Manual(manual) => Asked::Manual(manual),
    })
}

/// The error, with a tip that fits if an attribute of a spec was typed as an option.
fn with_tip_about_spec(mut error: clap::Error, typed: &[OsString]) -> clap::Error {
    let Some(ContextValue::String(unknown)) = error.get(ContextKind::InvalidArg) else {
        return error;
    };
    let program = definition();
    let command = typed.iter().find_map(|word| program.find_subcommand(word));
    let takes = |flag: &str| {
        let mut options = command.iter().flat_map(|command| command.get_arguments());
        options.any(|option| option.get_long() == Some(flag))
    };
    let Some(flag) = ["cache-to", "cache-from"]
        .into_iter()
        .find(|flag| takes(flag))
    else {
        return error;
    };
    if error.kind() == ErrorKind::UnknownArgument
        && let Some(name) = spec::attribute(unknown.trim_start_matches('-'), flag == "cache-to")
    {
        let tip = format!("{name} is part of the spec: --{flag} type=s3,...,{name}=...");
        error.remove(ContextKind::SuggestedArg);
        error.insert(
            ContextKind::Suggested,
            ContextValue::StyledStrs(vec![tip.into()]),
        );
    }
    error
}

impl Global {
    /// How to show progress: the flag, else BUILDKIT_PROGRESS, else `auto`.
    ///
    /// # Errors
    /// A [`UsageError`] if the variable holds something else.
    pub fn progress(&self, env: Env) -> Result<Display> {
        if self.quiet {
            return Ok(Display::Quiet);
        }
        if let Some(display) = self.progress {
            return Ok(display);
        }
        match env("BUILDKIT_PROGRESS").as_deref() {
            None | Some("") => Ok(Display::Auto),
            Some(value) => Display::from_str(value, false).map_err(|_| {
                usage(format!(
                    "BUILDKIT_PROGRESS: {value:?} is not a mode (accepted: auto, plain, tty, \
                     quiet, rawjson)"
                ))
            }),
        }
    }

    /// The bytes that LAYERCACHE_MEMORY lets a run use. `None`: it is not set.
    ///
    /// # Errors
    /// A [`UsageError`] if the variable holds something else.
    pub fn memory(&self, env: Env) -> Result<Option<u64>> {
        let Some(value) = env("LAYERCACHE_MEMORY").filter(|value| !value.is_empty()) else {
            return Ok(None);
        };
        let least = memory::LEAST;
        match size::size(&value) {
            Ok(bytes) if bytes >= least => Ok(Some(bytes)),
            Ok(_) => Err(usage(format!(
                "LAYERCACHE_MEMORY: {value:?} is too little (accepted: {} MiB and above)",
                least >> 20
            ))),
            Err(accepted) => Err(usage(format!(
                "LAYERCACHE_MEMORY: {value:?} is not a size ({accepted})"
            ))),
        }
    }
}

/// What is to be done, and what its author should know about the specs.
///
/// # Errors
/// A [`UsageError`], for everything.
pub fn resolve(args: Args, env: Env) -> Result<(Task, Vec<String>)> {
    let mut specs = Specs::new(env);
    let task = match args.command {
        Command::Export(export) => export.task(&mut specs)?,
        Command::Import(import) => import.task(&mut specs)?,
        Command::Doctor(doctor) => doctor.task(&mut specs)?,
        Command::Ls(ls) => ls.task(&mut specs)?,
        Command::Verify(verify) => verify.task(&mut specs)?,
        Command::Inspect(inspect) => inspect.task(&mut specs, args.global.verbose > 0)?,
        Command::Copy(copy) => copy.task(&mut specs)?,
        Command::Prune(prune) => prune.task(&mut specs)?,
        Command::Lifecycle(lifecycle) => lifecycle.task(&mut specs)?,
        Command::Serve(serve) => serve.task(&mut specs)?,
    };
    Ok((task, specs.into_warnings()))
}

pub(crate) fn usage(text: String) -> anyhow::Error {
    anyhow::Error::new(UsageError(text))
}

/// Whether a message holds something that could be a piece of a spec, and so of a credential.
fn looks_like_spec(text: &str) -> bool {
    text.to_lowercase().contains("type=") || spec::may_hold_credentials(text)
}

fn tag_name(name: &str) -> Result<String, &'static str> {
    check_tag(name).map(|()| name.to_owned())
}

#[cfg(test)]
mod tests;
