//! The result of a run: for each spec a common part (where, at what cost, how it ended) and what
//! the command reports about its own work; as text for people, and as JSON in the metadata file.

pub mod metadata;
pub mod table;

use std::fmt::Debug;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use crate::config::S3Config;
use crate::progress::count;
use crate::quote;

/// The result for one spec.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report<D> {
    #[serde(flatten)]
    pub place: Place,
    #[serde(flatten)]
    pub details: D,
    #[serde(flatten)]
    pub cost: Cost,
    /// Why it failed. Work done before the failure is not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// It failed under `ignore-error`, so the run has not failed.
    #[serde(skip_serializing_if = "is_false")]
    pub error_ignored: bool,
}

/// Where a command worked.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Place {
    /// The command's name.
    pub command: &'static str,
    /// What it did there, as in "exporting to".
    #[serde(skip)]
    pub doing: &'static str,
    /// Where the bucket is, if not at AWS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub bucket: String,
    /// The directory, for a command that works on a layout instead of a bucket.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub layout: String,
    /// For a command that looks at everything below it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub prefix: String,
    /// Empty for a command that looks at all caches.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// The keys of the names' manifests.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
}

/// A result as JSON on stdout.
#[derive(Serialize)]
struct Document<'a, D> {
    version: u32,
    #[serde(flatten)]
    place: &'a Place,
    #[serde(flatten)]
    details: &'a D,
}

/// What the work cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Cost {
    /// HTTP requests, retries included.
    pub requests: u64,
    pub seconds: f64,
}

/// What a command reports about its work on one spec.
pub trait Details: Debug + Clone + Default + Serialize + Send + Sync + 'static {
    /// What was done, for people: one or more lines, the last without a line end. Text from the
    /// network or the user is escaped. `cost` belongs on the first line.
    fn summary(&self, place: &Place, cost: &str) -> String;

    /// What still applies after a failure: the arguments, but no counts.
    fn of_failure(self) -> Self;

    /// Whether to print a JSON document instead of the summary.
    fn as_json(&self) -> bool {
        false
    }
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
            endpoint: s3
                .endpoint_url
                .as_ref()
                .map(|url| url.as_str().trim_end_matches('/').to_owned()),
            bucket: s3.bucket.clone(),
            layout: String::new(),
            prefix: String::new(),
            names: names.to_vec(),
            keys: names.iter().map(|name| s3.manifest_key(name)).collect(),
        }
    }

    /// Everything in the bucket at the place that `s3` describes.
    pub fn whole(command: &'static str, doing: &'static str, s3: &S3Config) -> Self {
        Place::new(command, doing, s3, &[])
    }

    /// Everything below the prefix that `s3` has.
    pub fn below(command: &'static str, doing: &'static str, s3: &S3Config) -> Self {
        Place {
            prefix: s3.prefix.clone(),
            ..Place::whole(command, doing, s3)
        }
    }

    /// The layout in this directory.
    pub fn layout(command: &'static str, doing: &'static str, root: &Path) -> Self {
        Place {
            command,
            doing,
            layout: root.display().to_string(),
            ..Place::default()
        }
    }

    /// The address of the first manifest; of the bucket or prefix, if the command is about all of it; or
    /// the layout's directory.
    pub fn address(&self) -> String {
        if !self.layout.is_empty() {
            return quote::printable(&self.layout).into_owned();
        }
        match self.keys.first() {
            Some(key) => format!("s3://{}/{key}", self.bucket),
            None if self.prefix.is_empty() => format!("s3://{}", self.bucket),
            None => quote::printable(&format!("s3://{}/{}", self.bucket, self.prefix)).into_owned(),
        }
    }

    /// What the command is about, as [`manifests`](Self::manifests), and the endpoint if it is not AWS.
    pub fn addresses(&self) -> String {
        format!("{}{}", self.manifests(), self.at_endpoint())
    }

    /// The manifests' addresses, `s3://bucket/key`; the bucket's, if the command is about all of it.
    pub fn manifests(&self) -> String {
        if self.keys.is_empty() {
            return self.address();
        }
        let addresses = self
            .keys
            .iter()
            .map(|key| quote::printable(&format!("s3://{}/{key}", self.bucket)).into_owned());
        addresses.collect::<Vec<_>>().join(", ")
    }

    /// The bucket, and the endpoint if it is not AWS.
    pub fn bucket(&self) -> String {
        let bucket = quote::printable(&self.bucket);
        format!("s3://{bucket}{}", self.at_endpoint())
    }

    fn at_endpoint(&self) -> String {
        self.endpoint
            .as_ref()
            .map(|endpoint| format!(" at {}", quote::printable(endpoint)))
            .unwrap_or_default()
    }

    /// What was done, as in "exporting 'app' to s3://ci-cache".
    pub fn work(&self) -> String {
        if self.names.is_empty() {
            return format!("{} {}", self.doing, self.addresses());
        }
        let (names, bucket) = (self.quoted_names(), self.bucket());
        match self.doing.rsplit_once(' ') {
            Some((doing, preposition)) => format!("{doing} {names} {preposition} {bucket}"),
            None => format!("{} {names} in {bucket}", self.doing),
        }
    }

    /// The names, each in quotes.
    pub fn quoted_names(&self) -> String {
        quoted_names(&self.names)
    }
}

/// Names of caches, each in quotes.
pub fn quoted_names(names: &[String]) -> String {
    let names = names
        .iter()
        .map(|name| format!("'{}'", quote::printable(name)));
    names.collect::<Vec<_>>().join(", ")
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

    /// The closing summary for people, of work that succeeded.
    pub fn summary(&self) -> String {
        let requests = count(self.cost.requests, "request");
        let cost = match self.place.layout.is_empty() {
            true => format!("{requests} in {:.1} s", self.cost.seconds),
            false => format!("{:.1} s", self.cost.seconds),
        };
        self.details.summary(&self.place, &cost)
    }
}

/// A [`Report`] of any command.
pub trait AnyReport: Debug + Send {
    /// Whether it failed, ignored or not.
    fn has_failed(&self) -> bool;
    /// What goes to stdout: the summary, or a JSON document.
    fn printed(&self) -> String;
    fn json(&self) -> Value;
}

impl<D: Details> AnyReport for Report<D> {
    fn has_failed(&self) -> bool {
        self.error.is_some()
    }

    fn printed(&self) -> String {
        if !self.details.as_json() {
            return self.summary();
        }
        let document = Document {
            version: 1,
            place: &self.place,
            details: &self.details,
        };
        serde_json::to_string_pretty(&document).expect("a report has nothing that JSON cannot hold")
    }

    fn json(&self) -> Value {
        serde_json::to_value(self).expect("a report has nothing that JSON cannot hold")
    }
}

/// The result of a run.
#[derive(Debug, Default)]
pub struct Outcome {
    /// One per spec, in order, including those that failed.
    pub reports: Vec<Box<dyn AnyReport>>,
    /// Errors that are not ignored: if there are any, the run has failed.
    pub errors: Vec<anyhow::Error>,
    /// How the command that `serve` ran ended. `None`: there was none.
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
