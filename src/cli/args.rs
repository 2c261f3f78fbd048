//! The command line: first what was typed, as clap has it; then, with every spec parsed and every
//! value checked, what is to be done.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};

use crate::cache::digest::Digest;
use crate::cli::manual::Manual;
use crate::cli::spec::{self, Env, Parsed};
use crate::config::{DoctorTask, ExportTask, ImportTask, Missing, Resend, Task};
use crate::layout::{Selection, check_tag};
use crate::progress::Display;

const CACHE_TO: &str = "LAYERCACHE_CACHE_TO";
const CACHE_FROM: &str = "LAYERCACHE_CACHE_FROM";

/// Moves BuildKit's build cache between a local OCI layout and S3, without a build.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "layercache",
    version,
    propagate_version = true,
    after_help = "\
Exit status: 0 done, 1 failed, 2 wrong usage, 129, 130 or 143 interrupted.

Examples:
  layercache import --cache-from type=s3,region=eu-west-1,bucket=ci-cache,name=app ./cache
  docker buildx build --cache-from type=local,src=./cache --cache-to type=local,dest=./cache-new .
  layercache export --cache-to type=s3,region=eu-west-1,bucket=ci-cache,name=app ./cache-new"
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

/// What every subcommand takes.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct Global {
    /// How progress is shown [default: auto, or BUILDKIT_PROGRESS]
    // The variable is read by `Global::progress`: an empty one counts as none, unlike with clap.
    #[arg(long, global = true, value_enum, value_name = "MODE")]
    pub progress: Option<Display>,

    /// Write the summary to this file, as JSON
    #[arg(long, global = true, value_name = "FILE")]
    pub metadata_file: Option<PathBuf>,

    /// Say more about what is done and why
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Upload a cache or an image from a local OCI layout to S3
    Export(ExportArgs),
    /// Download a cache from S3 into a local OCI layout
    Import(ImportArgs),
    /// Try out whether a bucket allows what an export and an import need
    Doctor(DoctorArgs),
}

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
SPEC is buildx's: type=s3 with region, bucket, name, prefix, mode=min|max, endpoint_url and so on.
Credentials are best left to the environment; the AWS default chain finds them.

Example:
  layercache export --cache-to type=s3,region=eu-west-1,bucket=ci-cache,name=app,mode=max ./cache")]
pub struct ExportArgs {
    /// Where to; repeat for several [default: LAYERCACHE_CACHE_TO, one spec a line]
    // By hand rather than by clap's `env`, which knows no lines and could show the value.
    #[arg(long, value_name = "SPEC")]
    pub cache_to: Vec<SpecText>,

    /// Export what has this tag [default: latest, or the only entry]
    #[arg(long, value_name = "NAME", value_parser = tag_name)]
    pub tag: Option<String>,

    /// Export the manifest with this digest
    #[arg(long, value_name = "DIGEST", conflicts_with = "tag")]
    pub digest: Option<Digest>,

    /// Read back the blobs that S3 has already, and send damaged ones again
    #[arg(long, conflicts_with = "force")]
    pub verify_remote: bool,

    /// Send every blob, even those that S3 has already
    #[arg(long)]
    pub force: bool,

    /// Say what would be sent, but write nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Directory of the OCI layout, as buildx's type=local or type=oci,tar=false writes it
    #[arg(value_name = "LAYOUT")]
    pub layout: PathBuf,
}

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
SPEC is buildx's: type=s3 with region, bucket, name, prefix, endpoint_url and so on.
Credentials are best left to the environment; the AWS default chain finds them.
Where there is no cache yet it is a warning, unless --require is given.

Example:
  layercache import --cache-from type=s3,region=eu-west-1,bucket=ci-cache,name=app ./cache")]
pub struct ImportArgs {
    /// Where from; repeat for several [default: LAYERCACHE_CACHE_FROM, one spec a line]
    #[arg(long, value_name = "SPEC")]
    pub cache_from: Vec<SpecText>,

    /// Tag to give what is imported [default: latest]
    #[arg(long, value_name = "NAME", value_parser = tag_name)]
    pub tag: Option<String>,

    /// Fail unless there is a cache that a build can use
    #[arg(long)]
    pub require: bool,

    /// What to do with results whose layers are missing or damaged on S3
    #[arg(long, value_enum, value_name = "WHAT", default_value = "drop")]
    pub missing: Missing,

    /// Hash the blobs that are in the layout already, and fetch damaged ones again
    #[arg(long)]
    pub verify: bool,

    /// Say what would be fetched, but write nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Directory of the OCI layout: absent, empty, or a layout to add to
    #[arg(value_name = "LAYOUT")]
    pub layout: PathBuf,
}

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
SPEC is buildx's: type=s3 with region, bucket, name, prefix, endpoint_url and so on.
Writes, reads and deletes one small object beside the cache's blobs, and leaves nothing behind.
Exit status 1 if an export or an import would fail.

Example:
  layercache doctor --cache-to type=s3,region=eu-west-1,bucket=ci-cache,name=app")]
pub struct DoctorArgs {
    /// What to try out; repeat for several [default: LAYERCACHE_CACHE_TO, one spec a line]
    #[arg(long, value_name = "SPEC")]
    pub cache_to: Vec<SpecText>,
}

/// A spec as it was typed. It can hold credentials, so `Debug` does not show it.
#[derive(Clone)]
pub struct SpecText(String);

impl fmt::Debug for SpecText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SpecText(redacted)")
    }
}

impl std::str::FromStr for SpecText {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(SpecText(text.to_owned()))
    }
}

/// Something is wrong with the command line, a spec, or a variable in their stead: exit status 2.
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
/// # Errors
/// clap's own, to be printed with its `print` and to exit with its `exit_code`: that is also how
/// `--help` and `--version` come. An error that would show a spec is replaced by one that does not.
pub fn parse<I, T>(typed: I) -> Result<Asked, clap::Error>
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
{
    let line = Line::try_parse_from(typed).map_err(|error| {
        let help = error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
        if error.use_stderr() && !help && looks_like_spec(&error.to_string()) {
            Line::command().error(
                error.kind(),
                "a spec stands where none is expected (put --cache-to or --cache-from before each \
                 spec, and quotes round it)",
            )
        } else {
            error
        }
    })?;
    let global = line.global;
    Ok(match line.command {
        AnyCommand::Cache(command) => Asked::Work(Args { command, global }),
        AnyCommand::Manual(manual) => Asked::Manual(manual),
    })
}

impl Global {
    /// How progress is to be shown: the flag, else BUILDKIT_PROGRESS, else `auto`.
    ///
    /// # Errors
    /// A [`UsageError`] if the variable holds something else.
    pub fn progress(&self, env: Env) -> Result<Display> {
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
}

/// What is to be done, and what its author should know about the specs.
///
/// # Errors
/// A [`UsageError`], for everything.
pub fn resolve(args: Args, env: Env) -> Result<(Task, Vec<String>)> {
    let mut warnings = Vec::new();
    let task = match args.command {
        Command::Export(export) => {
            check_layout(&export.layout, "--cache-to")?;
            let specs = Specs {
                flag: "--cache-to",
                variable: CACHE_TO,
                typed: export.cache_to,
            };
            Task::Export(ExportTask {
                targets: specs.resolve(env, spec::cache_to, &mut warnings)?,
                layout: export.layout,
                selection: match (export.tag, export.digest) {
                    (_, Some(digest)) => Selection::Digest(digest),
                    (Some(tag), None) => Selection::Tag(tag),
                    (None, None) => Selection::Default,
                },
                resend: match (export.force, export.verify_remote) {
                    (true, _) => Resend::All,
                    (_, true) => Resend::Damaged,
                    _ => Resend::None,
                },
                dry_run: export.dry_run,
            })
        }
        Command::Import(import) => {
            check_layout(&import.layout, "--cache-from")?;
            let specs = Specs {
                flag: "--cache-from",
                variable: CACHE_FROM,
                typed: import.cache_from,
            };
            Task::Import(ImportTask {
                sources: specs.resolve(env, spec::cache_from, &mut warnings)?,
                layout: import.layout,
                tag: import.tag,
                require: import.require,
                missing: import.missing,
                verify: import.verify,
                dry_run: import.dry_run,
            })
        }
        Command::Doctor(doctor) => {
            let specs = Specs {
                flag: "--cache-to",
                variable: CACHE_TO,
                typed: doctor.cache_to,
            };
            Task::Doctor(DoctorTask {
                targets: specs.resolve(env, spec::cache_to, &mut warnings)?,
            })
        }
    };
    Ok((task, warnings))
}

/// The specs of one flag, or of the variable that stands in for it.
struct Specs {
    flag: &'static str,
    variable: &'static str,
    typed: Vec<SpecText>,
}

impl Specs {
    fn resolve<T: PartialEq>(
        self,
        env: Env,
        parse: fn(&str, Env) -> Result<Parsed<T>>,
        warnings: &mut Vec<String>,
    ) -> Result<Vec<T>> {
        let (source, specs) = if self.typed.is_empty() {
            let value = env(self.variable).unwrap_or_default();
            (self.variable, spec::specs_from_env(&value))
        } else {
            (
                self.flag,
                self.typed.into_iter().map(|spec| spec.0).collect(),
            )
        };
        let several = specs.len() > 1;
        let mut configs = Vec::with_capacity(specs.len());
        for (index, spec) in specs.iter().enumerate() {
            let label = if several {
                format!("{source} #{}", index + 1)
            } else {
                source.to_owned()
            };
            // buildx passes over a flag whose variable was empty.
            if spec.is_empty() {
                warnings.push(format!("{label}: the spec is empty, and ignored"));
                continue;
            }
            let parsed = parse(spec, env).map_err(|error| usage(format!("{label}: {error:#}")))?;
            warnings.extend(
                parsed
                    .warnings
                    .iter()
                    .map(|warning| format!("{label}: {warning}")),
            );
            if configs.contains(&parsed.config) {
                warnings.push(format!("{label}: the same as an earlier one, and ignored"));
            } else {
                configs.push(parsed.config);
            }
        }
        if configs.is_empty() {
            return Err(usage(format!(
                "no cache is given (use {flag} type=s3,region=...,bucket=..., or set {variable} to \
                 one spec a line)",
                flag = self.flag,
                variable = self.variable,
            )));
        }
        Ok(configs)
    }
}

pub(crate) fn usage(text: String) -> anyhow::Error {
    anyhow::Error::new(UsageError(text))
}

/// A forgotten flag makes a spec the layout, and later errors would show it as a path.
fn check_layout(layout: &Path, flag: &str) -> Result<()> {
    if spec::is_spec(&layout.to_string_lossy()) {
        return Err(usage(format!(
            "LAYOUT looks like a spec (put {flag} before the spec, and the directory last)"
        )));
    }
    Ok(())
}

/// Whether a message holds something that could be a piece of a spec, and so of a credential.
fn looks_like_spec(text: &str) -> bool {
    text.to_lowercase().contains("type=") || spec::may_hold_credentials(text)
}

fn tag_name(name: &str) -> Result<String, &'static str> {
    check_tag(name).map(|()| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::spec::tests::{env_of, no_env};

    const SPEC: &str = "type=s3,region=us-east-1,bucket=cache";

    fn typed(words: &[&str]) -> Args {
        match parse([&["layercache"], words].concat()) {
            Ok(Asked::Work(args)) => args,
            Ok(Asked::Manual(manual)) => panic!("{manual:?} works on no cache"),
            Err(error) => panic!("{error}"),
        }
    }

    fn refused(words: &[&str]) -> clap::Error {
        parse([&["layercache"], words].concat()).expect_err("the command line was accepted")
    }

    fn export(words: &[&str]) -> (ExportTask, Vec<String>) {
        match resolve(typed(&[&["export"], words].concat()), &no_env).unwrap() {
            (Task::Export(task), warnings) => (task, warnings),
            (task, _) => panic!("export became {task:?}"),
        }
    }

    fn import(words: &[&str]) -> (ImportTask, Vec<String>) {
        match resolve(typed(&[&["import"], words].concat()), &no_env).unwrap() {
            (Task::Import(task), warnings) => (task, warnings),
            (task, _) => panic!("import became {task:?}"),
        }
    }

    fn usage_error(words: &[&str], env: Env) -> String {
        let error = resolve(typed(words), env).expect_err("the command line was accepted");
        assert!(error.is::<UsageError>(), "{error:?}");
        format!("{error:#}")
    }

    fn spec_of(bucket: &str) -> String {
        format!("type=s3,region=us-east-1,bucket={bucket}")
    }

    #[test]
    fn the_definition_is_sound() {
        definition().debug_assert();
    }

    #[test]
    fn an_export_has_its_defaults() {
        let (task, warnings) = export(&["--cache-to", SPEC, "dir"]);
        assert_eq!(
            task,
            ExportTask {
                targets: vec![spec::cache_to(SPEC, &no_env).unwrap().config],
                layout: PathBuf::from("dir"),
                selection: Selection::Default,
                resend: Resend::None,
                dry_run: false,
            }
        );
        assert_eq!(warnings, Vec::<String>::new());
    }

    #[test]
    fn an_import_has_its_defaults() {
        let (task, warnings) = import(&["--cache-from", SPEC, "dir"]);
        assert_eq!(
            task,
            ImportTask {
                sources: vec![spec::cache_from(SPEC, &no_env).unwrap().config],
                layout: PathBuf::from("dir"),
                tag: None,
                require: false,
                missing: Missing::Drop,
                verify: false,
                dry_run: false,
            }
        );
        assert_eq!(warnings, Vec::<String>::new());
    }

    #[test]
    fn every_flag_of_an_export_takes_effect() {
        let (task, _) = export(&["--cache-to", SPEC, "--tag", "v1", "--dry-run", "dir"]);
        assert_eq!(task.selection, Selection::Tag("v1".to_owned()));
        assert!(task.dry_run);
        let digest = Digest::of(b"manifest");
        let (task, _) = export(&["--cache-to", SPEC, "--digest", &digest.to_string(), "dir"]);
        assert_eq!(task.selection, Selection::Digest(digest));
    }

    #[test]
    fn every_flag_of_an_import_takes_effect() {
        let (task, _) = import(&[
            "dir",
            "--cache-from",
            SPEC,
            "--tag=v1",
            "--require",
            "--missing=error",
            "--verify",
            "--dry-run",
        ]);
        assert_eq!(
            (task.tag.as_deref(), task.missing),
            (Some("v1"), Missing::Error)
        );
        assert!(task.require && task.verify && task.dry_run);
        let (task, _) = import(&["--cache-from", SPEC, "--missing", "drop", "dir"]);
        assert_eq!(task.missing, Missing::Drop);
    }

    #[test]
    fn global_flags_stand_before_or_after_the_subcommand() {
        let globals = [
            "--progress",
            "rawjson",
            "--metadata-file",
            "meta.json",
            "-v",
        ];
        let rest = ["export", "--cache-to", SPEC, "dir"];
        let expected = Global {
            progress: Some(Display::Rawjson),
            metadata_file: Some(PathBuf::from("meta.json")),
            verbose: true,
        };
        assert_eq!(typed(&[&globals[..], &rest].concat()).global, expected);
        assert_eq!(typed(&[&rest[..], &globals].concat()).global, expected);
    }

    #[test]
    fn progress_is_the_flags_then_the_environments_then_auto() {
        let flag = typed(&["--progress", "tty", "export", "dir"]).global;
        let none = typed(&["export", "dir"]).global;
        let plain = env_of(&[("BUILDKIT_PROGRESS", "plain")]);
        assert_eq!(flag.progress(&plain).unwrap(), Display::Tty);
        assert_eq!(none.progress(&plain).unwrap(), Display::Plain);
        assert_eq!(none.progress(&no_env).unwrap(), Display::Auto);
        let empty = env_of(&[("BUILDKIT_PROGRESS", "")]);
        assert_eq!(none.progress(&empty).unwrap(), Display::Auto);
        let buildx = env_of(&[("BUILDKIT_PROGRESS", "none")]);
        assert_eq!(none.progress(&buildx).unwrap(), Display::Quiet);
        let flag = typed(&["--progress=none", "export", "dir"]).global;
        assert_eq!(flag.progress(&no_env).unwrap(), Display::Quiet);
        let error = none
            .progress(&env_of(&[("BUILDKIT_PROGRESS", "fancy")]))
            .unwrap_err();
        assert!(error.is::<UsageError>());
        assert_eq!(
            error.to_string(),
            "BUILDKIT_PROGRESS: \"fancy\" is not a mode (accepted: auto, plain, tty, quiet, rawjson)"
        );
    }

    #[test]
    fn specs_repeat_and_keep_their_order() {
        let (task, _) = export(&[
            "--cache-to",
            &spec_of("one"),
            "--cache-to",
            &spec_of("two"),
            "dir",
        ]);
        let buckets: Vec<_> = task.targets.iter().map(|to| &*to.s3.bucket).collect();
        assert_eq!(buckets, ["one", "two"]);
    }

    #[test]
    fn the_variable_holds_one_spec_a_line_and_yields_to_the_flag() {
        let env = env_of(&[
            (
                "LAYERCACHE_CACHE_TO",
                "type=s3,region=a,bucket=one\n\n type=s3,region=a,bucket=two\n",
            ),
            ("LAYERCACHE_CACHE_FROM", "type=s3,region=a,bucket=three"),
        ]);
        let (Task::Export(task), _) = resolve(typed(&["export", "dir"]), &env).unwrap() else {
            panic!("export became import");
        };
        let buckets: Vec<_> = task.targets.iter().map(|to| &*to.s3.bucket).collect();
        assert_eq!(buckets, ["one", "two"]);
        let (Task::Import(task), _) = resolve(typed(&["import", "dir"]), &env).unwrap() else {
            panic!("import became export");
        };
        assert_eq!(task.sources[0].bucket, "three");
        let flagged = typed(&["import", "--cache-from", SPEC, "dir"]);
        let (Task::Import(task), _) = resolve(flagged, &env).unwrap() else {
            panic!("import became export");
        };
        assert_eq!(task.sources.len(), 1);
        assert_eq!(task.sources[0].bucket, "cache");
    }

    #[test]
    fn no_spec_at_all_is_a_usage_error_that_names_flag_and_variable() {
        assert_eq!(
            usage_error(&["export", "dir"], &no_env),
            "no cache is given (use --cache-to type=s3,region=...,bucket=..., or set \
             LAYERCACHE_CACHE_TO to one spec a line)"
        );
        let blank = env_of(&[("LAYERCACHE_CACHE_FROM", " \n")]);
        let expected = "no cache is given (use --cache-from type=s3,region=...,bucket=..., or set \
             LAYERCACHE_CACHE_FROM to one spec a line)";
        assert_eq!(usage_error(&["import", "dir"], &blank), expected);
        assert_eq!(
            usage_error(&["import", "--cache-from", "", "dir"], &no_env),
            expected
        );
    }

    #[test]
    fn an_error_says_which_of_several_specs_is_wrong() {
        let env = env_of(&[(
            "LAYERCACHE_CACHE_FROM",
            "type=s3,region=a,bucket=one\ntype=gha",
        )]);
        let gha = "type: \"gha\" is not supported (accepted: s3)";
        for (words, expected) in [
            (
                &["export", "--cache-to", SPEC, "--cache-to=type=gha", "dir"][..],
                "--cache-to #2",
            ),
            (&["export", "--cache-to=type=gha", "dir"], "--cache-to"),
            (&["import", "dir"], "LAYERCACHE_CACHE_FROM #2"),
        ] {
            assert_eq!(usage_error(words, &env), format!("{expected}: {gha}"));
        }
    }

    #[test]
    fn warnings_say_which_spec_they_are_about() {
        let (task, warnings) = import(&[
            "--cache-from",
            &spec_of("one"),
            "--cache-from",
            &format!("{},mode=max", spec_of("two")),
            "--cache-from",
            "",
            "--cache-from",
            &spec_of("one"),
            "dir",
        ]);
        assert_eq!(task.sources.len(), 2);
        assert_eq!(
            warnings,
            [
                "--cache-from #2: mode: ignored: it means something on --cache-to only",
                "--cache-from #3: the spec is empty, and ignored",
                "--cache-from #4: the same as an earlier one, and ignored",
            ]
        );
    }

    #[test]
    fn a_wrong_command_line_is_refused_with_status_2() {
        let digest = Digest::of(b"").to_string();
        for (words, kind) in [
            (
                &["export", "--cache-to", SPEC][..],
                ErrorKind::MissingRequiredArgument,
            ),
            (
                &["export", "--tag", "a", "--digest", &digest, "dir"],
                ErrorKind::ArgumentConflict,
            ),
            (
                &["export", "--digest", "sha256:12", "dir"],
                ErrorKind::ValueValidation,
            ),
            (&["export", "--tag", "", "dir"], ErrorKind::ValueValidation),
            (
                &["import", "--tag", "a b", "dir"],
                ErrorKind::ValueValidation,
            ),
            (
                &["import", "--tag", "a\u{7}", "dir"],
                ErrorKind::ValueValidation,
            ),
            (
                &["import", "--missing", "keep", "dir"],
                ErrorKind::InvalidValue,
            ),
            (
                &["import", "--progress", "fancy", "dir"],
                ErrorKind::InvalidValue,
            ),
            (
                &["import", "--cache-to", SPEC, "dir"],
                ErrorKind::UnknownArgument,
            ),
            (&["export", "--require", "dir"], ErrorKind::UnknownArgument),
            (&[], ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand),
        ] {
            let error = refused(words);
            assert_eq!((error.kind(), error.exit_code()), (kind, 2), "{words:?}");
        }
    }

    #[test]
    fn help_and_version_are_no_failures() {
        for words in [
            &["--help"][..],
            &["-h"],
            &["export", "--help"],
            &["import", "--help"],
            &["--version"],
            &["export", "--version"],
        ] {
            assert_eq!(refused(words).exit_code(), 0, "{words:?}");
        }
        assert_eq!(
            refused(&["--version"]).to_string(),
            format!("layercache {}\n", env!("CARGO_PKG_VERSION"))
        );
        let help = refused(&["export", "--help"]).to_string();
        assert!(help.contains("LAYERCACHE_CACHE_TO"), "{help}");
        assert!(help.contains("Example:"), "{help}");
    }

    #[test]
    fn a_directory_with_an_odd_name_is_no_spec() {
        for layout in [
            "./cache-key=1",
            "/var/jenkins/job@2//cache",
            "/data/type=local/token=1",
            "out,key=2",
            "prototype=3",
        ] {
            let (task, _) = export(&["--cache-to", SPEC, layout]);
            assert_eq!(task.layout, PathBuf::from(layout));
        }
    }

    #[test]
    fn no_message_shows_a_spec_that_stands_in_the_wrong_place() {
        let spec = format!("{SPEC},access_key_id=a,secret_access_key=hidden");
        for words in [
            &["export", "dir", &spec][..],
            &["export", "--progress", &spec, "dir"],
            &["export", "--tag", &format!("{spec} "), "dir"],
            &["export", "--digest", &spec, "dir"],
            &[&spec],
            &["import", "--missing", &spec, "dir"],
        ] {
            let error = refused(words);
            assert_eq!(error.exit_code(), 2);
            assert!(!error.to_string().contains("hidden"), "{error}");
        }
        for spec in [
            &*spec,
            "Bucket=cache",
            "a b, type=s3",
            "region=a;secret_access_key=hidden",
            "./session_token=hidden",
            "http://me:hidden@host/",
        ] {
            assert_eq!(
                usage_error(&["export", spec], &no_env),
                "LAYOUT looks like a spec (put --cache-to before the spec, and the directory last)"
            );
        }
        let args = typed(&["export", "--cache-to", &spec, "dir"]);
        assert!(!format!("{args:?}").contains("hidden"));
    }
}
