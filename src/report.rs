//! What came of a run: for each spec a common part (where, at what cost, how it ended) and what the
//! command says of its own work; as text for people, and as JSON in the metadata file.

pub mod metadata;

use std::fmt::Debug;

use serde::Serialize;
use serde_json::Value;

use crate::config::S3Config;
use crate::quote;

/// What came of one spec.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report<D> {
    #[serde(flatten)]
    pub place: Place,
    #[serde(flatten)]
    pub details: D,
    #[serde(flatten)]
    pub cost: Cost,
    /// Why it failed. What was done until then is not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// It failed under `ignore-error`, which is no failure of the run.
    #[serde(skip_serializing_if = "is_false")]
    pub error_ignored: bool,
}

/// Where a command worked.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Place {
    /// The command's name.
    pub command: &'static str,
    /// What it did there, as in "exporting to s3://…".
    #[serde(skip)]
    pub doing: &'static str,
    pub bucket: String,
    pub names: Vec<String>,
    /// The keys of the names' manifests.
    pub keys: Vec<String>,
}

/// What it took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Cost {
    /// HTTP requests, retries included.
    pub requests: u64,
    pub seconds: f64,
}

/// What a command says of its work on one spec.
pub trait Details: Debug + Clone + Default + Serialize + Send + Sync + 'static {
    /// What was done, for people: one or more lines, the last without a line end. What came from the
    /// network or the user is escaped. `cost` is for the first line.
    fn summary(&self, place: &Place, cost: &str) -> String;

    /// What still holds after a failure: the arguments, but no counts.
    fn of_failure(self) -> Self;
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
fn is_false(value: &bool) -> bool {
    !value
}

impl Place {
    /// The manifests of `names` in the bucket that `s3` describes.
    pub fn new(
        command: &'static str,
        doing: &'static str,
        s3: &S3Config,
        names: &[String],
    ) -> Self {
        Place {
            command,
            doing,
            bucket: s3.bucket.clone(),
            names: names.to_vec(),
            keys: names.iter().map(|name| s3.manifest_key(name)).collect(),
        }
    }

    /// The manifests' addresses, `s3://bucket/key`.
    pub fn addresses(&self) -> String {
        let addresses = self
            .keys
            .iter()
            .map(|key| quote::printable(&format!("s3://{}/{key}", self.bucket)).into_owned());
        addresses.collect::<Vec<_>>().join(", ")
    }

    /// The names, each in quotes.
    pub fn quoted_names(&self) -> String {
        let names = self
            .names
            .iter()
            .map(|name| format!("'{}'", quote::printable(name)));
        names.collect::<Vec<_>>().join(", ")
    }
}

impl<D: Details> Report<D> {
    pub fn new(place: Place, details: D) -> Self {
        Report {
            place,
            details,
            ..Report::default()
        }
    }

    /// Records a failure.
    pub fn fail(&mut self, error: &anyhow::Error) {
        self.details = self.details.clone().of_failure();
        self.error = Some(format!("{error:#}"));
    }

    /// Whether this makes the run fail.
    pub fn is_failure(&self) -> bool {
        self.error.is_some() && !self.error_ignored
    }

    /// The closing summary for people.
    pub fn summary(&self) -> String {
        let cost = format!(
            "{} in {:.1} s",
            count(self.cost.requests, "request"),
            self.cost.seconds
        );
        let Some(error) = &self.error else {
            return self.details.summary(&self.place, &cost);
        };
        let ignored = match self.error_ignored {
            true => ", which is ignored",
            false => "",
        };
        format!(
            "{} {} failed{ignored}: {}; {cost}",
            self.place.doing,
            self.place.addresses(),
            quote::printable(error)
        )
    }
}

/// A [`Report`] of any command.
pub trait AnyReport: Debug + Send {
    fn is_failure(&self) -> bool;
    fn summary(&self) -> String;
    fn json(&self) -> Value;
}

impl<D: Details> AnyReport for Report<D> {
    fn is_failure(&self) -> bool {
        self.is_failure()
    }

    fn summary(&self) -> String {
        self.summary()
    }

    fn json(&self) -> Value {
        serde_json::to_value(self).expect("a report has nothing that JSON cannot hold")
    }
}

/// What came of a run.
#[derive(Debug, Default)]
pub struct Outcome {
    /// One for each spec, in their order, including those that failed.
    pub reports: Vec<Box<dyn AnyReport>>,
    /// What went wrong and is not ignored: with any, the run has failed.
    pub errors: Vec<anyhow::Error>,
    /// How the command ended that was run. `None`: there was none.
    pub status: Option<u8>,
}

impl<D: Details> From<(Vec<Report<D>>, Vec<anyhow::Error>)> for Outcome {
    fn from((reports, errors): (Vec<Report<D>>, Vec<anyhow::Error>)) -> Self {
        let reports = reports
            .into_iter()
            .map(|report| Box::new(report) as Box<dyn AnyReport>);
        Outcome {
            reports: reports.collect(),
            errors,
            status: None,
        }
    }
}

/// `1 layer`, `2 layers`.
pub fn count(n: u64, what: &str) -> String {
    match n {
        1 => format!("1 {what}"),
        _ => format!("{n} {what}s"),
    }
}
