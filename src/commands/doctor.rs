//! Doctor: tests each operation that the other commands use, on one scratch object beside the
//! blobs, and says what does not work, what that costs, and which permission is missing.

mod checks;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::TryStreamExt;
use serde::Serialize;

use self::checks::{CHECKS, Check, Need, Step};
use crate::bucket::Bucket;
use crate::commands::{Context, PerSpec, Work, for_each_spec};
use crate::config::{DoctorTask, ExportConfig, S3Config};
use crate::progress::Progress;
use crate::quote::printable;
use crate::report::{Details, Outcome, Place, Report};
use crate::store::{
    Connection, Expected, Kind, Part, Store, StoreError, StoreResult, read, read_whole,
};
use crate::transfer::body::InMemory;

/// What the scratch object holds. If it is left behind, it explains itself.
const CONTENT: &str = "layercache doctor wrote this to test the bucket. It can be deleted.\
";

/// The part of it that is read with a range.
const RANGE: std::ops::Range<u64> = 11..17;

/// LastModified counts whole seconds: a copy made this long after the object was written moves it.
const TICK: Duration = Duration::from_millis(1100);

/// How long to go on removing the scratch object after the checks were interrupted.
const CLEAN_UP_PATIENCE: Duration = Duration::from_secs(20);

/// Date headers count whole seconds and travel for a while: a clock this many seconds off is right.
const CLOCK_TOLERANCE: i64 = 2;

/// Tests every target of the task. If an export or an import cannot use a target, the doctor itself
/// has not failed: it prints the report like any other, but the run fails.
pub async fn run(task: &DoctorTask, context: &Context<'_>) -> Outcome {
    let (reports, mut errors) = for_each_spec(&Doctor, &task.targets, context).await;
    for report in reports.iter().filter(|report| report.error.is_none()) {
        errors.extend(report.details.verdict(&report.place));
    }
    (reports, errors).into()
}

/// What the checks found out about a target.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DoctorDetails {
    region: String,
    #[serde(flatten)]
    reached: Option<Reached>,
    /// Seconds of the fastest request.
    #[serde(skip_serializing_if = "Option::is_none")]
    round_trip: Option<f64>,
    export_works: bool,
    import_works: bool,
    checks: Vec<Checked>,
    /// What could not be removed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    left_behind: Vec<String>,
}

/// A [`Connection`], for the report.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Reached {
    url: String,
    path_style: bool,
    credentials: Option<String>,
    clock_ahead: Option<i64>,
}

impl From<Connection> for Reached {
    fn from(connection: Connection) -> Self {
        let Connection {
            url,
            path_style,
            credentials,
            clock_ahead,
        } = connection;
        Reached {
            url,
            path_style,
            credentials,
            clock_ahead,
        }
    }
}

/// What came of a [`Check`].
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Checked {
    name: &'static str,
    needed_for: Vec<&'static str>,
    result: Answer,
    /// Why it does not work, or was not tried.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    consequence: Option<&'static str>,
    /// The permission to add, if that is the reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    permission: Option<&'static str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
enum Answer {
    Works,
    Fails,
    NotTried,
}

impl Answer {
    fn word(self) -> &'static str {
        match self {
            Answer::Works => "works",
            Answer::Fails => "FAILS",
            Answer::NotTried => "-",
        }
    }
}

/// How a check can fail.
enum Trouble {
    Failed(StoreError),
    /// It depends on another check that failed.
    NotTried(&'static str),
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Self {
        Trouble::Failed(error)
    }
}

impl Checked {
    fn new(check: &Check, result: Answer, reason: Option<String>) -> Self {
        Checked {
            name: check.name,
            needed_for: check.needed_for.iter().map(|need| need.name()).collect(),
            result,
            reason,
            consequence: None,
            permission: None,
        }
    }

    fn of(check: &Check, ended: &Result<(), Trouble>) -> Self {
        match ended {
            Ok(()) => Checked::new(check, Answer::Works, None),
            Err(Trouble::NotTried(why)) => {
                Checked::new(check, Answer::NotTried, Some((*why).to_owned()))
            }
            Err(Trouble::Failed(error)) => Checked {
                consequence: Some(check.without),
                permission: is_forbidden(error).then_some(check.permission),
                ..Checked::new(check, Answer::Fails, Some(error.message.clone()))
            },
        }
    }

    fn lines(&self, text: &mut String) {
        let needed_for = self.needed_for.join(", ");
        let row = format!("{:<7} {:<28} {needed_for}", self.result.word(), self.name);
        let _ = write!(text, "\n  {row}");
        if let Some(reason) = &self.reason {
            let _ = write!(text, "\n          {}", printable(reason));
        }
        if let Some(consequence) = self.consequence {
            let _ = write!(text, "\n          without it, {consequence}");
        }
        if let Some(permission) = self.permission {
            let _ = write!(text, "\n          allow {permission}");
        }
    }
}

/// Whether a permission is missing, rather than the credentials being wrong.
fn is_forbidden(error: &StoreError) -> bool {
    error.kind == Kind::Denied
        && error.status == Some(403)
        && matches!(error.code.as_deref(), None | Some("AccessDenied"))
}

/// Whether every other check would fail the same way, perhaps after as many tries.
fn is_hopeless(error: &StoreError, something_works: bool) -> bool {
    match error.kind {
        Kind::NoBucket => true,
        Kind::Unsupported | Kind::Nonsense | Kind::NoRanges => false,
        _ => !something_works && !is_forbidden(error),
    }
}

impl DoctorDetails {
    fn conclude(&mut self) {
        let work = |need: Need| {
            let needed = self
                .checks
                .iter()
                .filter(|checked| checked.needed_for.contains(&need.name()));
            needed.clone().count() > 0
                && needed
                    .into_iter()
                    .all(|checked| checked.result == Answer::Works)
        };
        (self.export_works, self.import_works) = (work(Need::Export), work(Need::Import));
    }

    /// The error for a target that an export or an import cannot use.
    fn verdict(&self, place: &Place) -> Option<anyhow::Error> {
        let what = match (self.export_works, self.import_works) {
            (true, true) => return None,
            (true, false) => "an import",
            (false, true) => "an export",
            (false, false) => "both an export and an import",
        };
        let failed = self.checks.iter().find(|checked| {
            let essential = [Need::Export, Need::Import].map(Need::name);
            checked.result == Answer::Fails
                && (checked
                    .needed_for
                    .iter()
                    .any(|need| essential.contains(need))
                    || self
                        .checks
                        .iter()
                        .all(|other| other.result != Answer::Works))
        });
        let cause = failed.map_or("see above", |checked| checked.name);
        let addresses = place.manifests();
        Some(anyhow!("{what} would fail at {addresses}: cannot {cause}"))
    }
}

impl Details for DoctorDetails {
    fn summary(&self, place: &Place, cost: &str) -> String {
        let verdict = |works| if works { "works" } else { "FAILS" };
        let mut text = format!(
            "checked {}: export {}, import {}; {cost}",
            place.manifests(),
            verdict(self.export_works),
            verdict(self.import_works)
        );
        let mut fact = |name: &str, value: &str| {
            let _ = write!(text, "\n  {name:<12} {}", printable(value));
        };
        if let Some(reached) = &self.reached {
            let credentials = reached.credentials.as_deref();
            fact("credentials", credentials.unwrap_or("none found"));
            fact("region", &self.region);
            fact("bucket URL", &reached.url);
            let style = match reached.path_style {
                true => "path style (use_path_style=true, or the endpoint needs it)",
                false => "virtual-hosted style",
            };
            fact("addressing", style);
            fact("clock", &clock(reached.clock_ahead));
        }
        if let Some(seconds) = self.round_trip {
            fact("round trip", &format!("{seconds:.3} s"));
        }
        for checked in &self.checks {
            checked.lines(&mut text);
        }
        text
    }

    fn of_failure(self) -> Self {
        DoctorDetails {
            region: self.region,
            left_behind: self.left_behind,
            ..DoctorDetails::default()
        }
    }
}

fn clock(ahead: Option<i64>) -> String {
    match ahead {
        None => "unknown: no response had a date".to_owned(),
        Some(ahead) if ahead.abs() <= CLOCK_TOLERANCE => "agrees with the store's".to_owned(),
        Some(ahead) => {
            let way = if ahead > 0 { "behind" } else { "ahead of" };
            format!(
                "{} s {way} the store's: over 15 minutes, S3 refuses all requests",
                ahead.abs()
            )
        }
    }
}

struct Doctor;

#[async_trait]
impl PerSpec for Doctor {
    type Spec = ExportConfig;
    type Details = DoctorDetails;
    type Ready = ();

    fn s3<'a>(&self, target: &'a ExportConfig) -> &'a S3Config {
        &target.s3
    }

    /// `ignore-error` applies to exports only.
    fn ignores_errors(&self, _: &ExportConfig) -> bool {
        false
    }

    fn blank(&self, target: &ExportConfig) -> Report<DoctorDetails> {
        let s3 = &target.s3;
        let details = DoctorDetails {
            region: s3.region.clone(),
            ..DoctorDetails::default()
        };
        Report::new(Place::new("doctor", "checking", s3, &s3.names), details)
    }

    async fn prepare(&self, _: &Context<'_>) -> Result<()> {
        Ok(())
    }

    fn work<'a>(
        &'a self,
        (): &'a (),
        target: &'a ExportConfig,
        bucket: Bucket,
        _: &[Report<DoctorDetails>],
        context: &'a Context<'_>,
    ) -> Box<dyn Work<DoctorDetails> + 'a> {
        let S3Config {
            prefix,
            blobs_prefix,
            ..
        } = &target.s3;
        let random: u64 = rand::random();
        Box::new(Examination {
            store: Arc::clone(bucket.store()),
            bucket: &target.s3.bucket,
            key: format!("{prefix}{blobs_prefix}layercache-doctor-{random:016x}"),
            progress: context.progress,
            object: false,
            written: None,
            creating: false,
            uploads: BTreeSet::new(),
            part: None,
        })
    }
}

/// The checks of one target, and what they have created and must remove.
struct Examination<'a> {
    store: Arc<dyn Store>,
    bucket: &'a str,
    /// The scratch object.
    key: String,
    progress: &'a Progress,
    /// It may exist.
    object: bool,
    /// When it was written, if it was.
    written: Option<Instant>,
    /// An upload may have begun whose id we never received.
    creating: bool,
    uploads: BTreeSet<String>,
    /// The part that the one upload has.
    part: Option<Part>,
}

#[async_trait]
impl Work<DoctorDetails> for Examination<'_> {
    async fn run(&mut self, report: &mut Report<DoctorDetails>) -> Result<()> {
        self.progress.stage("testing the bucket", 0, 0);
        let details = &mut report.details;
        let mut hopeless = false;
        for check in &CHECKS {
            if hopeless {
                details
                    .checks
                    .push(Checked::new(check, Answer::NotTried, None));
                continue;
            }
            let began = Instant::now();
            let requests = self.store.requests();
            let ended = self.attempt(check.step).await;
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
        details.conclude();
        details.reached = Some(self.store.connection().into());
        self.remove().await;
        details.left_behind = self.left_behind();
        Ok(())
    }

    async fn clean_up(&mut self) -> Result<()> {
        let _ = tokio::time::timeout(CLEAN_UP_PATIENCE, self.remove()).await;
        for left in self.left_behind() {
            self.progress.warn(&format!("left behind: {left}"));
        }
        Ok(())
    }
}

impl Examination<'_> {
    async fn attempt(&mut self, step: Step) -> Result<(), Trouble> {
        match step {
            Step::List => drop(self.store.list(&self.key, None).await?),
            Step::Absent => drop(self.store.head(&self.key).await?),
            Step::Put => self.put().await?,
            Step::Head => self.head().await?,
            Step::Get => self.get().await?,
            Step::GetRange => self.get_range().await?,
            Step::CreateUpload => drop(self.create().await?),
            Step::UploadPart => self.upload_part().await?,
            Step::ListParts => {
                let upload = self.upload()?;
                drop(self.store.list_parts(&self.key, &upload).await?);
            }
            Step::ListUploads => drop(self.store.list_uploads(&self.key).await?),
            Step::Complete => self.complete().await?,
            Step::Abort => self.abort().await?,
            Step::Copy => self.copy().await?,
            Step::Delete => self.delete().await?,
        }
        Ok(())
    }

    async fn put(&mut self) -> StoreResult<()> {
        self.object = true;
        let put = self.store.put(&self.key, content()).await;
        self.wrote(put)
    }

    /// Notes whether the object is there after it was written, in one piece or in parts.
    fn wrote(&mut self, done: StoreResult<()>) -> StoreResult<()> {
        match &done {
            Ok(()) => self.written = Some(Instant::now()),
            // A refused request wrote nothing.
            Err(error) if self.written.is_none() && is_forbidden(error) => self.object = false,
            Err(_) => {}
        }
        done
    }

    /// Without an object, this tests the permission alone.
    async fn head(&self) -> StoreResult<()> {
        match self.store.head(&self.key).await? {
            None if self.written.is_some() => {
                Err(self.lost("not found right after it was written"))
            }
            Some(info) if info.size != CONTENT.len() as u64 => {
                Err(self.lost(&format!("{} bytes instead of {}", info.size, CONTENT.len())))
            }
            _ => Ok(()),
        }
    }

    /// Likewise.
    async fn get(&self) -> StoreResult<()> {
        let check = |bytes: &[u8]| match bytes == CONTENT.as_bytes() {
            true => Ok(()),
            false => Err("other bytes came back than were written".to_owned()),
        };
        let limit = CONTENT.len() as u64;
        let found = read_whole(&self.store, &self.key, limit, check).await?;
        match found {
            None if self.written.is_some() => {
                Err(self.lost("not found right after it was written"))
            }
            _ => Ok(()),
        }
    }

    async fn get_range(&self) -> Result<(), Trouble> {
        if self.written.is_none() {
            return Err(Trouble::NotTried("there is no object to read"));
        }
        let expected = Expected {
            size: Some(CONTENT.len() as u64),
            content_addressed: false,
        };
        let found = read(&self.store, &self.key, Some(RANGE), expected).await?;
        let Some(object) = found else {
            return Err(self.lost("not found right after it was written").into());
        };
        let chunks: Vec<Bytes> = object.body.try_collect().await?;
        let range = RANGE.start as usize..RANGE.end as usize;
        match chunks.concat() == CONTENT.as_bytes()[range] {
            true => Ok(()),
            false => Err(self.lost("other bytes came back than were written").into()),
        }
    }

    async fn create(&mut self) -> StoreResult<String> {
        self.creating = true;
        let created = self.store.create_upload(&self.key, None).await;
        self.creating = self.store.may_hold_unknown_upload(&self.key);
        let upload = created?;
        self.uploads.insert(upload.clone());
        Ok(upload)
    }

    fn upload(&self) -> Result<String, Trouble> {
        let upload = self.uploads.first().cloned();
        upload.ok_or(Trouble::NotTried("there is no multipart upload"))
    }

    async fn upload_part(&mut self) -> Result<(), Trouble> {
        let upload = self.upload()?;
        let etag = self
            .store
            .upload_part(&self.key, &upload, 1, content())
            .await?;
        self.part = Some(Part {
            number: 1,
            size: CONTENT.len() as u64,
            etag,
        });
        Ok(())
    }

    async fn complete(&mut self) -> Result<(), Trouble> {
        let upload = self.upload()?;
        let Some(part) = self.part.take() else {
            return Err(Trouble::NotTried("there is no part"));
        };
        self.object = true;
        let done = self
            .store
            .complete_upload(&self.key, &upload, &[part])
            .await;
        self.wrote(done)?;
        self.uploads.remove(&upload);
        Ok(())
    }

    /// Aborts the upload that could not be completed, or else one of its own.
    async fn abort(&mut self) -> Result<(), Trouble> {
        let upload = match self.uploads.first().cloned() {
            Some(upload) => upload,
            None => match self.create().await {
                Ok(upload) => upload,
                Err(_) => return Err(Trouble::NotTried("there is no multipart upload")),
            },
        };
        self.store.abort_upload(&self.key, &upload).await?;
        self.uploads.remove(&upload);
        Ok(())
    }

    async fn copy(&mut self) -> Result<(), Trouble> {
        let Some(written) = self.written else {
            return Err(Trouble::NotTried("there is no object to copy"));
        };
        let Some(before) = self.store.head(&self.key).await? else {
            return Err(self.lost("not found after it was written").into());
        };
        tokio::time::sleep(TICK.saturating_sub(written.elapsed())).await;
        if !self.store.touch(&self.key, &before).await? {
            return Err(self.lost("not found after it was written").into());
        }
        let after = self.store.head(&self.key).await?;
        let modified = after.and_then(|after| after.last_modified);
        if modified <= before.last_modified {
            let stays = self.lost("the copy succeeded, but LastModified has not moved");
            return Err(stays.into());
        }
        Ok(())
    }

    /// A store allows or refuses to delete whether the object is there or not.
    async fn delete(&mut self) -> StoreResult<()> {
        let key = std::slice::from_ref(&self.key);
        self.store
            .delete(key)
            .await?
            .into_iter()
            .collect::<StoreResult<()>>()?;
        self.object = false;
        Ok(())
    }

    /// The store did not do what it said.
    fn lost(&self, what: &str) -> StoreError {
        StoreError {
            kind: Kind::Nonsense,
            status: None,
            code: None,
            message: format!("{what}: {}", self.key),
            located: false,
        }
    }

    /// Removes what is left, as far as the permissions allow.
    async fn remove(&mut self) {
        if self.creating
            && let Ok(uploads) = self.store.list_uploads(&self.key).await
        {
            let ours = uploads.into_iter().filter(|upload| upload.key == self.key);
            self.uploads.extend(ours.map(|upload| upload.id));
            self.creating = false;
        }
        for upload in self.uploads.clone() {
            if self.store.abort_upload(&self.key, &upload).await.is_ok() {
                self.uploads.remove(&upload);
            }
        }
        if self.object {
            // If it fails, that is reported with what is left behind.
            let _ = self.delete().await;
        }
    }

    fn left_behind(&self) -> Vec<String> {
        let address = format!("s3://{}/{}", self.bucket, self.key);
        let mut left = Vec::new();
        if self.object {
            left.push(format!("the object {address}"));
        }
        if self.creating || !self.uploads.is_empty() {
            left.push(format!("a multipart upload of {address}"));
        }
        left
    }
}

fn content() -> Arc<InMemory> {
    Arc::new(InMemory(Bytes::from_static(CONTENT.as_bytes())))
}
