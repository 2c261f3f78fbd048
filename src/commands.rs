//! The commands, one file each, and what they share: the context that a command works with, and the
//! loop over its specs.

pub mod copy;
pub mod doctor;
pub mod export;
pub mod import;
pub mod inspect;
pub mod lifecycle;
pub mod ls;
pub mod prune;
pub mod serve;
pub mod verify;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use async_trait::async_trait;
use futures::future::BoxFuture;

use crate::bucket::Bucket;
use crate::cache::Dropped;
use crate::config::{S3Config, Task};
use crate::interrupt::{Interrupt, Interrupted};
use crate::progress::{Progress, count};
use crate::report::{AnyReport, Details, Outcome, Place, Report};
use crate::store::{Store, StoreError};
use crate::transfer::limits::Limits;

/// How long another process may hold a layout's lock before it is an error.
pub const LOCK_WAIT: Duration = Duration::from_secs(60);

/// How a store is reached: [`s3::connect`](crate::s3::connect), or a test's wrapper around it.
pub type Connect<'a> = &'a (
        dyn for<'b> Fn(&'b S3Config, &'b Progress) -> BoxFuture<'b, Result<Arc<dyn Store>>>
            + Send
            + Sync
    );

/// What every command works with.
pub struct Context<'a> {
    pub connect: Connect<'a>,
    pub limits: Limits,
    pub interrupt: &'a Interrupt,
    pub progress: &'a Progress,
    /// The person who sees a plan and may agree to it.
    pub person: &'a dyn Person,
    /// Called with each report as soon as it is complete.
    pub finished: &'a (dyn Fn(Box<dyn AnyReport>) + Send + Sync),
}

/// The person at the terminal.
#[async_trait]
pub trait Person: Send + Sync {
    /// Prints to stdout now, after any earlier results.
    ///
    /// # Errors
    /// stdout's.
    async fn show(&self, text: &str) -> std::io::Result<()>;

    /// Asks for a yes or no. `None`: there is nobody to ask.
    ///
    /// # Errors
    /// stdin's.
    async fn confirm(&self, question: &str) -> std::io::Result<Option<bool>>;
}

/// Nobody: discards plans and agrees to none, for callers other than the program.
pub struct Nobody;

#[async_trait]
impl Person for Nobody {
    async fn show(&self, _: &str) -> std::io::Result<()> {
        Ok(())
    }

    async fn confirm(&self, _: &str) -> std::io::Result<Option<bool>> {
        Ok(None)
    }
}

/// A plan needs consent, and nobody can be asked: exit status 2.
#[derive(Debug)]
pub struct NobodyToAsk;

impl std::fmt::Display for NobodyToAsk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(
            "nothing was removed: there is no terminal to ask on (--yes skips the question)",
        )
    }
}

impl std::error::Error for NobodyToAsk {}

/// The person did not agree to a plan about this place: exit status 1, but nothing went wrong.
#[derive(Debug)]
pub struct Declined(String);

impl std::fmt::Display for Declined {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "nothing was removed from {}", self.0)
    }
}

impl std::error::Error for Declined {}

impl Context<'_> {
    /// Shows a plan to remove something from the place at `address`, and returns if the person agrees to
    /// it.
    ///
    /// # Errors
    /// [`NobodyToAsk`], or [`Declined`].
    async fn agree(&self, plan: &str, address: &str) -> Result<()> {
        self.person
            .show(plan)
            .await
            .context("cannot write the plan to stdout")?;
        match self
            .person
            .confirm(&format!("Remove this from {address}?"))
            .await
            .context("reading the answer")?
        {
            Some(true) => Ok(()),
            Some(false) => Err(Declined(address.to_owned()).into()),
            None => Err(NobodyToAsk.into()),
        }
    }

    fn finish<D: Details>(&self, report: &Report<D>) {
        self.progress.result(&report.json());
        (self.finished)(Box::new(report.clone()));
    }
}

/// Performs a task: what the program does, without the command line and the terminal.
pub async fn perform(task: &Task, context: &Context<'_>) -> Outcome {
    match task {
        Task::Export(task) => export::run(task, context).await,
        Task::Import(task) => import::run(task, context).await,
        Task::Doctor(task) => doctor::run(task, context).await,
        Task::Copy(task) => copy::run(task, context).await,
        Task::Prune(task) => prune::run(task, context).await,
        Task::PruneLayout(task) => prune::run_local(task, context).await,
        Task::Lifecycle(task) => lifecycle::run(task, context).await,
        Task::Ls(task) => ls::run(task, context).await,
        Task::Inspect(task) => inspect::run(task, context).await,
        Task::Verify(task) => verify::run(task, context).await,
        Task::Serve(task) => serve::run(task, context).await,
    }
}

/// A command that does the same work for each of its specs.
#[async_trait]
trait PerSpec: Send + Sync {
    /// A validated spec.
    type Spec: Send + Sync;
    /// What the command reports about its work on one spec.
    type Details: Details;
    /// What is prepared once, for all specs.
    type Ready: Send + Sync;

    fn s3<'a>(&self, spec: &'a Self::Spec) -> &'a S3Config;

    /// Whether a failure at this spec is only a warning: `ignore-error` applies to what writes caches.
    fn ignores_errors(&self, _: &Self::Spec) -> bool {
        false
    }

    /// What to say where the store denies access.
    fn if_denied(&self) -> &'static str {
        "layercache doctor tells which permission is missing"
    }

    /// A report that says where the work is, before any of it is done.
    fn blank(&self, spec: &Self::Spec) -> Report<Self::Details>;

    /// Called before the first spec. If it fails, so do all specs.
    async fn prepare(&self, context: &Context<'_>) -> Result<Self::Ready>;

    /// The work on one spec; `earlier` are the reports on those before it.
    fn work<'a>(
        &'a self,
        ready: &'a Self::Ready,
        spec: &'a Self::Spec,
        bucket: Bucket,
        earlier: &[Report<Self::Details>],
        context: &'a Context<'_>,
    ) -> Box<dyn Work<Self::Details> + 'a>;
}

/// The work of a command on one spec.
#[async_trait]
trait Work<D>: Send + Sync {
    /// Does the work. A signal drops this future wherever it is.
    async fn run(&mut self, report: &mut Report<D>) -> Result<()>;

    /// Cleans up after [`run`](Self::run), however that ended.
    async fn clean_up(&mut self) -> Result<()>;

    /// Requests sent to stores other than the spec's.
    fn other_requests(&self) -> u64 {
        0
    }
}

/// Runs `command` for each of `specs` in turn. If a spec fails, the others are still tried; a
/// signal ends them all. There is one report per spec.
async fn for_each_spec<C: PerSpec>(
    command: &C,
    specs: &[C::Spec],
    context: &Context<'_>,
) -> (Vec<Report<C::Details>>, Vec<anyhow::Error>) {
    let (mut reports, mut errors) = (Vec::new(), Vec::new());
    let began = Instant::now();
    // Meanwhile the way to the first store is prepared.
    let mut early = match specs.first() {
        Some(spec) => Some((context.connect)(command.s3(spec), context.progress).await),
        None => None,
    };
    let ready = match context.interrupt.or(command.prepare(context)).await {
        Ok(ready) => ready,
        Err(error) => return fail_all(command, specs, error, began, context),
    };
    let several = specs.len();
    let mut specs = specs.iter();
    for spec in specs.by_ref() {
        if several > 1 {
            let work = command.blank(spec).place.work();
            let number = reports.len() + 1;
            context
                .progress
                .note(&format!("{work} ({number} of {several})"));
        }
        let connected = match early.take() {
            Some(connected) => connected,
            None => {
                let connecting = (context.connect)(command.s3(spec), context.progress);
                context.interrupt.or(connecting).await
            }
        };
        let (mut report, done) = run_one(command, &ready, spec, connected, &reports, context).await;
        let Err(error) = done else {
            context.finish(&report);
            reports.push(report);
            continue;
        };
        report.fail(&error);
        let stopped = error.is::<Interrupted>();
        let error = located(error, &report.place, command.if_denied());
        if command.ignores_errors(spec) && !context.interrupt.happened() {
            report.error_ignored = true;
            warn_of_ignored(&error, context);
        } else {
            errors.push(error);
        }
        context.finish(&report);
        reports.push(report);
        if stopped {
            break;
        }
    }
    let not_started = anyhow!("not started: the run was interrupted");
    reports.extend(specs.map(|spec| {
        let mut report = command.blank(spec);
        report.fail(&not_started);
        context.finish(&report);
        report
    }));
    (reports, errors)
}

/// The error, followed by what was being done unless it already says where on S3 it happened.
fn located(error: anyhow::Error, place: &Place, if_denied: &str) -> anyhow::Error {
    // Each has a message of its own.
    if error.is::<Interrupted>() || error.is::<NobodyToAsk>() || error.is::<Declined>() {
        return error;
    }
    let of_store = error.chain().find_map(|cause| cause.downcast_ref());
    match of_store {
        Some(StoreError {
            located: true,
            code: Some(code),
            ..
        }) if code == "AccessDenied" => {
            anyhow!("{error:#}; {if_denied}")
        }
        Some(StoreError { located: true, .. }) => error,
        _ => anyhow!("{error:#} ({})", place.work()),
    }
}

/// What is said where S3 lacks `blobs` of a cache because of `why`, and what needs them is left out.
fn left_out(blobs: u64, why: &str, dropped: &Dropped, dry_run: bool) -> String {
    format!(
        "S3 lacks {} of the cache ({why}): {} {} and {}",
        count(blobs, "blob"),
        match dry_run {
            true => "would leave out",
            false => "left out",
        },
        count(dropped.results as u64, "result"),
        count(dropped.layers as u64, "layer"),
    )
}

fn warn_of_ignored(error: &anyhow::Error, context: &Context<'_>) {
    context
        .progress
        .warn(&format!("ignored because of ignore-error=true: {error:#}"));
}

async fn run_one<C: PerSpec>(
    command: &C,
    ready: &C::Ready,
    spec: &C::Spec,
    connected: Result<Arc<dyn Store>>,
    earlier: &[Report<C::Details>],
    context: &Context<'_>,
) -> (Report<C::Details>, Result<()>) {
    let began = Instant::now();
    let mut report = command.blank(spec);
    let done = match connected {
        Ok(store) => {
            let config = command.s3(spec);
            let bucket = Bucket::new(Arc::clone(&store), config, context.progress);
            let mut work = command.work(ready, spec, bucket, earlier, context);
            let ran = context.interrupt.or(work.run(&mut report)).await;
            let cleaned_up = work.clean_up().await;
            report.cost.requests = store.requests() + work.other_requests();
            ran.and(cleaned_up)
        }
        Err(error) => Err(error),
    };
    report.cost.seconds = began.elapsed().as_secs_f64();
    (report, done)
}

/// Runs `work` on a layout in place of a spec. There is one report, which begins as `report`.
async fn on_layout<D: Details>(
    mut report: Report<D>,
    work: impl Future<Output = Result<D>>,
    context: &Context<'_>,
) -> (Vec<Report<D>>, Vec<anyhow::Error>) {
    let began = Instant::now();
    let done = context.interrupt.or(work).await;
    report.cost.seconds = began.elapsed().as_secs_f64();
    let mut errors = Vec::new();
    match done {
        Ok(details) => report.details = details,
        Err(error) => {
            report.fail(&error);
            let place = &report.place;
            errors.push(match error.is::<Declined>() {
                true => error,
                false => error.context(format!("{} {}", place.doing, place.address())),
            });
        }
    }
    context.finish(&report);
    (vec![report], errors)
}

/// If the preparation fails, no spec can be tried. That is a single error, recorded in every
/// report.
fn fail_all<C: PerSpec>(
    command: &C,
    specs: &[C::Spec],
    error: anyhow::Error,
    began: Instant,
    context: &Context<'_>,
) -> (Vec<Report<C::Details>>, Vec<anyhow::Error>) {
    let reports: Vec<_> = specs
        .iter()
        .map(|spec| {
            let mut report = command.blank(spec);
            report.cost.seconds = began.elapsed().as_secs_f64();
            report.fail(&error);
            report.error_ignored = command.ignores_errors(spec) && !error.is::<Interrupted>();
            context.finish(&report);
            report
        })
        .collect();
    if reports.iter().any(Report::is_failure) {
        return (reports, vec![error]);
    }
    warn_of_ignored(&error, context);
    (reports, Vec::new())
}
