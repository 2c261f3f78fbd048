//! layercache moves BuildKit's build cache between a local OCI layout and S3, without a build.
//!
//! Data flows one way. [`cli`] turns what was typed into a validated [`config`]; past that nothing
//! sees the command line. A command in [`commands`] plans and executes with a [`bucket`], a cache's
//! home on S3, and a [`layout`], its home on disk. [`transfer`] moves one blob, [`cache`] is
//! BuildKit's graph, [`store`] is what we need from an object store, and [`s3`] the one real
//! implementation. [`progress`] shows the work as it goes on; a [`report`] says how it ended.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};

use anyhow::{Context as _, Result};
use futures::future::BoxFuture;

pub mod blocking;
pub mod bucket;
pub mod cache;
pub mod cli;
pub mod commands;
pub mod config;
pub mod interrupt;
pub mod layout;
pub mod memory;
mod process;
pub mod progress;
pub mod quote;
pub mod redact;
pub mod report;
pub mod retry;
pub mod s3;
pub mod serve;
pub mod store;
mod terminal;
pub mod transfer;

use cli::args::{self, Args, Asked, UsageError};
use commands::{Context, Declined, NobodyToAsk};
use config::{S3Config, Task};
use interrupt::{Interrupted, Signals};
use progress::Progress;
use report::Outcome;
use store::Store;
use terminal::{Printed, Terminal};
use transfer::limits::Limits;

/// Runs the command in `args` (the program's name first), and prints the outcome: results to
/// stdout, everything else to stderr. Can be called more than once in a process.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match args::parse(args) {
        Ok(Asked::Work(args)) => args,
        Ok(Asked::Manual(manual)) => {
            let errors: Vec<_> = manual.write().err().into_iter().collect();
            return end(&Progress::new(progress::Display::Quiet, 0), &errors);
        }
        Err(shown) => {
            let _ = shown.print();
            return ExitCode::from(shown.exit_code() as u8);
        }
    };
    let env = |name: &str| std::env::var(name).ok();
    let progress = match args.global.progress(&env) {
        Ok(display) => Progress::new(display, i8::from(args.global.verbose > 0)),
        Err(error) => {
            return end(&Progress::new(progress::Display::Quiet, 0), &[error]);
        }
    };
    match run_command(args, &env, &progress) {
        // A signal ends the program even if nobody takes its last output.
        Ok((errors, status, _signals)) => {
            let code = end(&progress, &errors);
            match status {
                Some(status) if status != 0 => ExitCode::from(status),
                _ => code,
            }
        }
        Err(error) => end(&progress, &[error]),
    }
}

/// Prints what went wrong, if anything did. Returns the exit code for it.
fn end(progress: &Progress, errors: &[anyhow::Error]) -> ExitCode {
    for error in errors {
        let text = format!("{error:#}");
        match error.is::<Declined>() {
            true => progress.summary(&text),
            false => progress.error(&text),
        }
    }
    exit_code(errors)
}

/// If there are several errors, a signal counts most.
fn exit_code(errors: &[anyhow::Error]) -> ExitCode {
    let interrupted = errors.iter().find_map(|error| error.downcast_ref());
    if let Some(Interrupted { signal }) = interrupted {
        ExitCode::from(128 + *signal as u8)
    } else if errors
        .iter()
        .any(|error| error.is::<UsageError>() || error.is::<NobodyToAsk>())
    {
        ExitCode::from(2)
    } else if errors.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Arguments → task → outcome → output. Returns the failures, the exit status of a command that was
/// run, and what still handles signals; an error if nothing was begun.
fn run_command(
    args: Args,
    env: cli::spec::Env,
    progress: &Progress,
) -> Result<(Vec<anyhow::Error>, Option<u8>, Signals)> {
    let metadata_file = args.global.metadata_file.clone();
    let limits = Limits {
        memory: memory::limit(args.global.memory(env)?, memory::available()),
        ..Limits::default()
    };
    let (task, warnings) = args::resolve(args, env)?;
    for warning in warnings {
        progress.warn(&warning);
    }
    // After hours of work it would be too late.
    if let Some(file) = &metadata_file {
        report::metadata::check(file).map_err(|error| args::usage(format!("{error:#}")))?;
    }
    let (outcome, printed, signals) = perform(task, limits, progress)?;
    let Outcome {
        reports,
        mut errors,
        status,
    } = outcome;
    if let Err(error) = printed {
        errors.push(anyhow::Error::new(error).context("cannot write the result to stdout"));
    }
    // Also if the run failed: otherwise the file of an earlier run would pass for its result.
    if let Some(file) = metadata_file
        && let Err(error) = report::metadata::write(&file, &reports)
    {
        errors.push(error);
    }
    Ok((errors, status, signals))
}

/// Performs `task` on a runtime of its own, until a signal arrives, and prints each result as soon
/// as there is one. Returns the outcome of the work, and of the printing, and what handles signals:
/// without it they would be ignored.
fn perform(
    task: Task,
    limits: Limits,
    progress: &Progress,
) -> Result<(Outcome, io::Result<()>, Signals)> {
    process::allow_many_files();
    process::keep_one_heap();
    process::survive_file_size_limit();
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let workers = cores.clamp(2, 4);
    // One more for blocking work; further ones only make it faster.
    process::check_limits(workers + 1)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let (printer, printed) = mpsc::channel();
    let watched = progress.clone();
    // As a task, so that it runs on the threads that read its connections: otherwise each chunk of a
    // download would cost a switch between threads.
    let working = runtime.spawn(async move {
        let signals = Signals::listen()?;
        let interrupt = signals.interrupt()?;
        let context = Context {
            connect: &connect,
            limits,
            interrupt: &interrupt,
            progress: &watched,
            person: &Terminal {
                printer: printer.clone(),
                progress: watched.clone(),
            },
            finished: &move |report| drop(printer.send(Printed::Report(report))),
        };
        let outcome = commands::perform(&task, &context).await;
        watched.end();
        signals.work_is_done();
        // Handled until all output is written.
        anyhow::Ok((outcome, signals))
    });
    let printed = print(printed, progress);
    let done = runtime.block_on(working);
    // What a signal or a failure left running ends with the process; nothing needs it.
    runtime.shutdown_background();
    progress.end();
    match done {
        Ok(done) => done.map(|(outcome, signals)| (outcome, printed, signals)),
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Prints successful results, and plans, as they arrive. A reader that has gone away (`| head`) is
/// not an error.
fn print(printed: mpsc::Receiver<Printed>, progress: &Progress) -> io::Result<()> {
    let mut done = Ok(());
    for printed in printed {
        match printed {
            Printed::Report(report) if report.has_failed() => {}
            Printed::Report(report) => match print_line(&report.printed(), progress) {
                Ok(()) => {}
                Err(error) => done = Err(error),
            },
            Printed::Text(text, shown) => drop(shown.send(print_line(&text, progress))),
        }
    }
    done
}

fn print_line(text: &str, progress: &Progress) -> io::Result<()> {
    let written = progress.suspend(|| {
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{text}").and_then(|()| stdout.flush())
    });
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

/// [`s3::connect`] as a [`commands::Connect`].
fn connect<'a>(
    config: &'a S3Config,
    progress: &'a Progress,
) -> BoxFuture<'a, Result<Arc<dyn Store>>> {
    Box::pin(s3::connect(config, progress.clone()))
}
