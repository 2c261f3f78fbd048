//! Doctor: tests each operation that the other commands use, and says what does not work, what that
//! costs, and which permission is missing.

mod checks;
mod examination;
mod reading;
mod scratch;

use std::fmt::Write as _;

use anyhow::{Result, anyhow};
use async_trait::async_trait;
use serde::Serialize;

use self::checks::{Check, Need};
use self::examination::{Examination, Trouble};
use crate::bucket::Bucket;
use crate::commands::{Context, PerSpec, Work, for_each_spec};
use crate::config::{DoctorTask, S3Config, TestedPlace};
use crate::quote::printable;
use crate::report::{Details, Outcome, Place, Report};
use crate::store::{Connection, Kind, StoreError};

/// Date headers count whole seconds and travel for a while: a clock this many seconds off is right.
const CLOCK_TOLERANCE: i64 = 2;

/// Tests every place of the task. If an export or an import cannot use one, the doctor itself has not
/// failed: it prints the report like any other, but the run fails.
pub async fn run(task: &DoctorTask, context: &Context<'_>) -> Outcome {
    let doctor = Doctor { task };
    let (reports, mut errors) = for_each_spec(&doctor, &task.places, context).await;
    for report in reports.iter().filter(|report| report.error.is_none()) {
        errors.extend(report.details.verdict(&report.place));
    }
    (reports, errors).into()
}

/// What the checks found out about a place.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DoctorDetails {
    region: String,
    #[serde(flatten)]
    reached: Option<Reached>,
    /// Seconds of the fastest request.
    #[serde(skip_serializing_if = "Option::is_none")]
    round_trip: Option<f64>,
    /// `None`: that was not to be tested.
    #[serde(skip_serializing_if = "Option::is_none")]
    export_works: Option<bool>,
    import_works: bool,
    checks: Vec<Checked>,
    /// What could not be removed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    left_behind: Vec<String>,
    #[serde(skip)]
    json: bool,
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

impl DoctorDetails {
    /// Judges the checks. If nothing was to be written, what only an export needs is not among them.
    fn conclude(&mut self, writes: bool) {
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
        let (exports, imports) = (work(Need::Export), work(Need::Import));
        (self.export_works, self.import_works) = (writes.then_some(exports), imports);
        if !writes {
            for checked in &mut self.checks {
                checked
                    .needed_for
                    .retain(|need| *need != Need::Export.name());
            }
        }
    }

    /// Why no request can succeed: the first check told, and the others were not tried.
    fn nothing_works(&self) -> Option<&str> {
        let (first, others) = self.checks.split_first()?;
        let untried = |checked: &Checked| checked.result == Answer::NotTried;
        let all = first.result == Answer::Fails && others.iter().all(untried);
        first.reason.as_deref().filter(|_| all)
    }

    /// The error for a place that an export or an import cannot use.
    fn verdict(&self, place: &Place) -> Option<anyhow::Error> {
        let addresses = place.manifests();
        if let Some(reason) = self.nothing_works() {
            return Some(anyhow!(
                "nothing works at {addresses}: {}",
                printable(reason)
            ));
        }
        let what = match (self.export_works, self.import_works) {
            (Some(true) | None, true) => return None,
            (Some(true) | None, false) => "an import",
            (Some(false), true) => "an export",
            (Some(false), false) => "both an export and an import",
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
        Some(anyhow!("{what} would fail at {addresses}: cannot {cause}"))
    }
}

impl Details for DoctorDetails {
    fn summary(&self, place: &Place, cost: &str) -> String {
        let verdict = |works| if works { "works" } else { "FAILS" };
        let export = match self.export_works {
            Some(works) => format!("export {}, ", verdict(works)),
            None => String::new(),
        };
        let mut text = format!(
            "checked {}: {export}import {}; {cost}",
            place.manifests(),
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
        if self.nothing_works().is_none() {
            for checked in &self.checks {
                checked.lines(&mut text);
            }
        }
        text
    }

    fn of_failure(self) -> Self {
        DoctorDetails {
            region: self.region,
            left_behind: self.left_behind,
            json: self.json,
            ..DoctorDetails::default()
        }
    }

    fn as_json(&self) -> bool {
        self.json
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

struct Doctor<'a> {
    task: &'a DoctorTask,
}

#[async_trait]
impl PerSpec for Doctor<'_> {
    type Spec = TestedPlace;
    type Details = DoctorDetails;
    type Ready = ();

    fn s3<'a>(&self, place: &'a TestedPlace) -> &'a S3Config {
        &place.s3
    }

    fn blank(&self, place: &TestedPlace) -> Report<DoctorDetails> {
        let s3 = &place.s3;
        let details = DoctorDetails {
            region: s3.region.clone(),
            json: self.task.json,
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
        place: &'a TestedPlace,
        bucket: Bucket,
        _: &[Report<DoctorDetails>],
        context: &'a Context<'_>,
    ) -> Box<dyn Work<DoctorDetails> + 'a> {
        Box::new(Examination::new(&bucket, place.writes, context.progress))
    }
}
