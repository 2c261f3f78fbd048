//! layercache moves BuildKit's build cache between a local OCI layout and S3, without a build.
//!
//! Data flows one way. [`cli`] holds what was typed and turns each CSV spec into a validated
//! [`config`]; past that nothing sees the command line. A command in [`commands`] plans and executes
//! with a [`bucket`], the cache's home on S3, and a [`layout`], its home on disk. [`transfer`] moves
//! one blob, [`cache`] is BuildKit's graph, [`s3`] the one real [`store`], and [`progress`] watches
//! all of it. A [`report`] says what was done.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::future::{BoxFuture, FutureExt};

pub mod bucket;
pub mod cache;
pub mod cli;
pub mod commands;
pub mod config;
pub mod interrupt;
pub mod layout;
mod process;
pub mod progress;
pub mod redact;
pub mod report;
pub mod retry;
pub mod s3;
pub mod store;
pub mod transfer;

use cli::{args, spec};
use commands::{export, import};
use config::{S3Config, Task};
use interrupt::{Interrupt, Interrupted};
use progress::Progress;
use store::Store;
use transfer::upload::Limits;

/// How long another process may hold a layout's lock before it is an error.
pub const LOCK_WAIT: Duration = Duration::from_secs(60);

/// How a store is reached: [`s3::connect`], or a test's wrapper around it.
pub type Connect<'a> = &'a (
        dyn for<'b> Fn(&'b S3Config, &'b Progress) -> BoxFuture<'b, Result<Arc<dyn Store>>>
            + Send
            + Sync
    );

/// [`s3::connect`] as a [`Connect`].
pub fn connect<'a>(
    config: &'a S3Config,
    progress: &'a Progress,
) -> BoxFuture<'a, Result<Arc<dyn Store>>> {
    Box::pin(s3::connect(config, progress.clone()))
}

/// Runs the command that `args` (the program's name first) spell, and prints what came of it:
/// results to stdout, all else to stderr. Can be called more than once in a process.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match args::parse(args) {
        Ok(args) => args,
        Err(shown) => {
            let _ = shown.print();
            return ExitCode::from(shown.exit_code() as u8);
        }
    };
    let env = |name: &str| std::env::var(name).ok();
    let progress = match args.global.progress(&env) {
        Ok(mode) => Progress::new(mode, args.global.verbose),
        Err(error) => {
            Progress::new(progress::Mode::Quiet, false).error(&format!("{error:#}"));
            return exit_code(&[error]);
        }
    };
    let errors = run_command(args, &env, &progress).unwrap_or_else(|error| vec![error]);
    for error in &errors {
        progress.error(&format!("{error:#}"));
    }
    exit_code(&errors)
}

/// Of several errors a signal counts the most.
fn exit_code(errors: &[anyhow::Error]) -> ExitCode {
    let interrupted = errors.iter().find_map(|error| error.downcast_ref());
    if let Some(Interrupted { signal }) = interrupted {
        ExitCode::from(128 + *signal as u8)
    } else if errors.iter().any(|error| error.is::<args::UsageError>()) {
        ExitCode::from(2)
    } else if errors.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Does what was asked for, and returns what went wrong with it; an error if it was not begun.
fn run_command(
    args: args::Args,
    env: spec::Env,
    progress: &Progress,
) -> Result<Vec<anyhow::Error>> {
    let metadata_file = args.global.metadata_file.clone();
    let (task, warnings) = args::resolve(args, env)?;
    for warning in warnings {
        progress.warn(&warning);
    }
    // At the end of hours of work it would be too late.
    if let Some(file) = &metadata_file {
        report::check_metadata(file)
            .map_err(|error| args::usage(format!("--metadata-file: {error:#}")))?;
    }
    process::allow_many_files();
    process::keep_one_heap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(
            std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 4)),
        )
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let watched = progress.clone();
    // As a task, so that it runs on the threads that its connections are read by: woken from this one,
    // each chunk of a download would cost a switch between threads.
    let working = runtime.spawn(async move {
        let interrupt = Interrupt::listen()?;
        anyhow::Ok(perform(&task, &connect, &interrupt, &watched).await)
    });
    let done = runtime.block_on(working);
    // Work that a signal or a failure left behind ends with the process; nothing of it is needed.
    runtime.shutdown_background();
    progress.end();
    let report::Outcome {
        reports,
        mut errors,
    } = match done {
        Ok(done) => done?,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    };
    // What failed is told with the errors.
    for report in reports.iter().filter(|report| !report.is_failure()) {
        let _ = writeln!(std::io::stdout(), "{}", report.summary());
    }
    // Also of a run that failed, or what an earlier one left would pass for its result.
    if let Some(file) = metadata_file
        && let Err(error) = report::write_metadata(&file, &reports)
    {
        errors.push(error);
    }
    Ok(errors)
}

/// Performs a resolved task: what the program does, less the command line and the terminal.
pub async fn perform(
    task: &Task,
    connect: Connect<'_>,
    interrupt: &Interrupt,
    progress: &Progress,
) -> report::Outcome {
    perform_within(Limits::default(), task, connect, interrupt, progress).await
}

/// As [`perform`], with other sizes: what takes gigabytes on S3 can then be seen on kilobytes.
pub fn perform_within<'a>(
    limits: Limits,
    task: &'a Task,
    connect: Connect<'a>,
    interrupt: &'a Interrupt,
    progress: &'a Progress,
) -> BoxFuture<'a, report::Outcome> {
    match task {
        Task::Export(task) => export::export(task, connect, limits, interrupt, progress).boxed(),
        Task::Import(task) => import::import(task, connect, limits, interrupt, progress).boxed(),
    }
}
