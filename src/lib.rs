//! layercache moves BuildKit's build cache between a local OCI layout and S3, without a build.
//!
//! Data flows one way. [`args`] holds what was typed, [`spec`] turns each CSV spec into a validated
//! [`config`], and past that nothing sees the command line or the environment. An [`export`] reads
//! a [`layout`], makes a [`snapshot`] of the manifest chosen in it, asks the [`store`] which blobs
//! are there ([`presence`]), sends the others ([`upload`]) and writes the manifest. An [`import`]
//! reads the manifest, fetches blobs ([`download`]) and tags what it wrote. A [`report`] says what
//! was done. [`cache_config`] is BuildKit's graph, [`s3`] the one real store, and [`progress`]
//! watches all of it.

use std::ffi::OsString;
use std::future::Future;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use futures::future::{BoxFuture, FutureExt};
use tokio::sync::watch;

pub mod args;
pub mod buffers;
pub mod cache_config;
pub mod config;
pub mod diff_id;
pub mod digest;
pub mod download;
pub mod export;
pub mod hashing;
pub mod import;
pub mod layout;
pub mod oci;
pub mod presence;
pub mod progress;
pub mod report;
pub mod retry;
pub mod s3;
pub mod snapshot;
pub mod spec;
pub mod store;
pub mod upload;

use config::{S3Config, Task};
use progress::Progress;
use store::Store;
use upload::Limits;

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

/// The run was stopped by a signal.
#[derive(Debug)]
pub struct Interrupted {
    /// SIGINT or SIGTERM.
    signal: i32,
}

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted: run the command again to finish")
    }
}

impl std::error::Error for Interrupted {}

/// Tells the work that a signal came.
#[derive(Clone)]
pub struct Interrupt {
    signal: watch::Receiver<i32>,
}

impl Interrupt {
    /// One that never comes.
    pub fn never() -> Self {
        Interrupt {
            signal: watch::channel(0).1,
        }
    }

    /// Listens for SIGINT and SIGTERM. The second one does not wait for anything.
    fn listen() -> Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        static SEEN: AtomicI32 = AtomicI32::new(0);
        let (sender, receiver) = watch::channel(0);
        let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
        let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        tokio::spawn(async move {
            loop {
                let came = tokio::select! {
                    _ = interrupt.recv() => libc::SIGINT,
                    _ = terminate.recv() => libc::SIGTERM,
                };
                if SEEN.swap(came, Ordering::SeqCst) != 0 {
                    std::process::exit(128 + came);
                }
                let _ = sender.send(came);
            }
        });
        Ok(Interrupt { signal: receiver })
    }

    /// Whether a signal has come.
    pub fn happened(&self) -> bool {
        *self.signal.borrow() != 0
    }

    /// Does `work`, or drops it where it stands when a signal comes.
    ///
    /// # Errors
    /// The work's own, or [`Interrupted`].
    pub async fn or<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut signal = self.signal.clone();
        tokio::select! {
            biased;
            signal = async {
                let came = signal.wait_for(|signal| *signal != 0).await.map(|signal| *signal);
                match came {
                    Ok(signal) => signal,
                    // Nobody is left to send one.
                    Err(_) => std::future::pending().await,
                }
            } => Err(Interrupted { signal }.into()),
            done = work => done,
        }
    }
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
    allow_many_files();
    keep_one_heap();
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

/// Many blobs at once are many files and connections. The soft limit of 1,024, or macOS's 256, is
/// there for programs that use select(2); whoever wants less sets the hard one.
fn allow_many_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const WANTED: u64 = 8_192;
    let limit = getrlimit(Resource::Nofile);
    let current = limit.current.unwrap_or(u64::MAX);
    let raised = limit.maximum.map_or(WANTED, |most| most.min(WANTED));
    if current < raised {
        // Refused, it stays as it is, which is enough for most caches.
        let _ = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: Some(raised),
                maximum: limit.maximum,
            },
        );
    }
}

/// glibc keeps a heap for each thread, up to eight a core, and memory that was freed in one is not
/// used by another: peak memory was a third more, and would grow with the cores.
fn keep_one_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt has no conditions, and takes its own lock. That it can fail does no harm.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
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
