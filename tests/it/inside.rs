//! Runs tasks inside the test process: at a faster pace, in smaller sizes, over a store that a test
//! wraps.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use layercache::cli::args;
use layercache::commands::{Context, perform};
use layercache::config::{S3Config, Task};
use layercache::interrupt::Interrupt;
use layercache::progress::Progress;
use layercache::report::AnyReport;
use layercache::s3::Timing;
use layercache::store::Store;
use layercache::transfer::limits::Limits;

/// Makes a test's store of the real one.
pub type Wrap = Arc<dyn Fn(Arc<dyn Store>) -> Arc<dyn Store> + Send + Sync>;

/// Longer than any run of these tests may take, however it fails.
const FOR_EVER: Duration = Duration::from_secs(90);

#[derive(Clone)]
pub struct Inside {
    pub limits: Limits,
    pub timing: Timing,
    pub wrap: Option<Wrap>,
}

impl Inside {
    /// Retries follow at once; timeouts are the network's.
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

    /// As [`fast`](Self::fast), and silence is noticed soon.
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

    /// Does what the program does, but for the terminal. The error is the whole chain.
    ///
    /// # Errors
    /// The run's own.
    ///
    /// # Panics
    /// If the run does not come to an end.
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
        };
        let run = perform(task, &context);
        match tokio::time::timeout(FOR_EVER, run).await {
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

/// Tells the compiler how general a closure is.
fn connector<F>(connect: F) -> F
where
    F: for<'a> Fn(&'a S3Config, &'a Progress) -> BoxFuture<'a, anyhow::Result<Arc<dyn Store>>>,
{
    connect
}

/// A runtime such as the program's.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
}

fn task(args: &[&std::ffi::OsStr]) -> Task {
    let args = args::parse(args).expect("the arguments can be parsed");
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
