//! Runs tasks inside the test process, with shorter waits, smaller limits, or a wrapped store. The only
//! place in the tests that names the program's inner functions for this.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use layercache::cli::args::{self, Asked};
use layercache::commands::{Context, Nobody, perform};
use layercache::config::{S3Config, Task};
use layercache::interrupt::Interrupt;
use layercache::progress::Progress;
use layercache::report::AnyReport;
use layercache::s3::Timing;
use layercache::store::Store;
use layercache::transfer::limits::Limits;

/// Wraps the real store.
pub type Wrap = Arc<dyn Fn(Arc<dyn Store>) -> Arc<dyn Store> + Send + Sync>;

/// Longer than any run of these tests takes, however it fails.
const LONGEST: Duration = Duration::from_secs(90);

#[derive(Clone)]
pub struct Inside {
    pub limits: Limits,
    pub timing: Timing,
    pub wrap: Option<Wrap>,
}

impl Inside {
    /// Retries without delay; the usual timeouts.
    pub fn fast() -> Self {
        Inside {
            limits: Limits::default(),
            timing: Timing {
                backoff: Duration::from_millis(1),
                ..Timing::default()
            },
            wrap: None,
        }
    }

    /// As [`fast`](Self::fast), with short timeouts.
    pub fn impatient() -> Self {
        let soon = Duration::from_millis(500);
        let mut inside = Self::fast();
        inside.timing = Timing {
            idle: soon,
            idle_at_work: soon,
            answer: soon,
            patience: soon,
            ..inside.timing
        };
        inside
    }

    /// Does what the program does, without a terminal. The error is the whole chain.
    ///
    /// # Errors
    /// If the run fails.
    ///
    /// # Panics
    /// If the run hangs.
    pub async fn run(&self, task: &Task) -> Result<Vec<Box<dyn AnyReport>>, String> {
        let connect = connector(|config, progress| {
            let (config, progress) = (config.clone(), progress.clone());
            let (timing, wrap) = (self.timing, self.wrap.clone());
            Box::pin(async move {
                let store = layercache::s3::connect_with(&config, progress, timing).await?;
                Ok(match wrap {
                    Some(wrap) => wrap(store),
                    None => store,
                })
            })
        });
        let (interrupt, progress) = (Interrupt::never(), Progress::silent());
        let context = Context {
            connect: &connect,
            limits: self.limits,
            interrupt: &interrupt,
            progress: &progress,
            person: &Nobody,
            finished: &drop,
        };
        let run = perform(task, &context);
        match tokio::time::timeout(LONGEST, run).await {
            Ok(done) if done.errors.is_empty() => Ok(done.reports),
            Ok(done) => Err(done
                .errors
                .iter()
                .map(|error| format!("{error:#}"))
                .collect::<Vec<_>>()
                .join("\n")),
            Err(_) => panic!("the run hangs"),
        }
    }
}

/// Helps the compiler infer the closure's lifetimes.
fn connector<F>(connect: F) -> F
where
    F: for<'a> Fn(&'a S3Config, &'a Progress) -> BoxFuture<'a, anyhow::Result<Arc<dyn Store>>>,
{
    connect
}

/// A runtime like the program's.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
}

fn task(args: &[&std::ffi::OsStr]) -> Task {
    let args = match args::parse(args).expect("the arguments can be parsed") {
        Asked::Work(args) => args,
        Asked::Manual(manual) => panic!("{manual:?} works on no cache"),
    };
    let (task, _) = args::resolve(args, &|_| None).expect("the arguments make sense");
    task
}

pub fn export(spec: &str, layout: &Path) -> Task {
    let (spec, layout) = (spec.as_ref(), layout.as_os_str());
    task(&[
        "layercache".as_ref(),
        "export".as_ref(),
        "--cache-to".as_ref(),
        spec,
        layout,
    ])
}

pub fn import(spec: &str, layout: &Path) -> Task {
    let (spec, layout) = (spec.as_ref(), layout.as_os_str());
    task(&[
        "layercache".as_ref(),
        "import".as_ref(),
        "--cache-from".as_ref(),
        spec,
        layout,
    ])
}

/// The task of any command line, given without the program's name.
pub fn command(args: &[&str]) -> Task {
    let args = std::iter::once("layercache").chain(args.iter().copied());
    task(&args.map(AsRef::as_ref).collect::<Vec<_>>())
}

pub fn copy(from: &str, to: &str) -> Task {
    task(&[
        "layercache".as_ref(),
        "copy".as_ref(),
        "--cache-from".as_ref(),
        from.as_ref(),
        "--cache-to".as_ref(),
        to.as_ref(),
    ])
}
