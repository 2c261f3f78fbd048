//! The examination of one place: each check is tried on its subject until none can succeed any more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use async_trait::async_trait;

use super::checks::{CHECKS, Step};
use super::reading::Reading;
use super::scratch::Scratch;
use super::{Answer, Checked, DoctorDetails, is_forbidden};
use crate::bucket::Bucket;
use crate::commands::Work;
use crate::progress::Progress;
use crate::report::Report;
use crate::store::{Kind, Store, StoreError};

/// How long to go on removing what was created after the checks were interrupted.
const CLEAN_UP_PATIENCE: Duration = Duration::from_secs(20);

/// How a check can fail.
pub(super) enum Trouble {
    Failed(StoreError),
    /// It depends on another check that failed, or on an object that is not there.
    NotTried(&'static str),
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Self {
        Trouble::Failed(error)
    }
}

/// What the operations are tried on.
#[async_trait]
pub(super) trait Subject: Send + Sync {
    async fn attempt(&mut self, step: Step) -> Result<(), Trouble>;

    /// Removes what was created, as far as the permissions allow.
    async fn remove(&mut self) {}

    fn left_behind(&self) -> Vec<String> {
        Vec::new()
    }
}

/// A key beside the blobs that nothing has.
pub(super) fn unused_key(bucket: &Bucket) -> String {
    let config = bucket.config();
    let random: u64 = rand::random();
    let folder = format!("{}{}", config.prefix, config.blobs_prefix);
    format!("{folder}layercache-doctor-{random:016x}")
}

/// Whether every other check would fail the same way, perhaps after as many tries.
fn is_hopeless(error: &StoreError, something_works: bool) -> bool {
    match error.kind {
        Kind::NoBucket => true,
        Kind::Unsupported | Kind::Nonsense | Kind::NoRanges => false,
        _ => !something_works && !is_forbidden(error),
    }
}

/// The checks of one place.
pub(super) struct Examination<'a> {
    store: Arc<dyn Store>,
    subject: Box<dyn Subject>,
    /// Whether what an export needs is tried, too.
    writes: bool,
    progress: &'a Progress,
}

impl<'a> Examination<'a> {
    pub(super) fn new(bucket: &Bucket, writes: bool, progress: &'a Progress) -> Self {
        Examination {
            store: Arc::clone(bucket.store()),
            subject: match writes {
                true => Box::new(Scratch::new(bucket)),
                false => Box::new(Reading::new(bucket)),
            },
            writes,
            progress,
        }
    }
}

#[async_trait]
impl Work<DoctorDetails> for Examination<'_> {
    async fn run(&mut self, report: &mut Report<DoctorDetails>) -> Result<()> {
        self.progress.stage("testing the bucket", 0, 0);
        let details = &mut report.details;
        let mut hopeless = false;
        let writes = self.writes;
        for check in CHECKS.iter().filter(|c| writes || c.step.only_reads()) {
            if hopeless {
                details
                    .checks
                    .push(Checked::new(check, Answer::NotTried, None));
                continue;
            }
            let began = Instant::now();
            let requests = self.store.requests();
            let ended = self.subject.attempt(check.step).await;
            if ended.is_ok() && self.store.requests() == requests + 1 {
                let seconds = began.elapsed().as_secs_f64();
                details.round_trip = Some(details.round_trip.unwrap_or(seconds).min(seconds));
            }
            if let Err(Trouble::Failed(error)) = &ended {
                let works = |checked: &Checked| checked.result == Answer::Works;
                hopeless = is_hopeless(error, details.checks.iter().any(works));
            }
            details.checks.push(Checked::of(check, &ended));
        }
        details.conclude(writes);
        details.reached = Some(self.store.connection().into());
        self.subject.remove().await;
        details.left_behind = self.subject.left_behind();
        Ok(())
    }

    async fn clean_up(&mut self) -> Result<()> {
        let _ = tokio::time::timeout(CLEAN_UP_PATIENCE, self.subject.remove()).await;
        for left in self.subject.left_behind() {
            self.progress.warn(&format!("left behind: {left}"));
        }
        Ok(())
    }
}
