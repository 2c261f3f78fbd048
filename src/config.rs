//! What an export or an import is to do, once every value has been checked. Past this module nothing
//! sees the command line, and only these see the environment:
//!
//! - `s3::wire` reads HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, in either case;
//! - `s3::credentials`, if the spec has no keys, runs AWS's default chain, which reads the AWS_
//!   variables and files that its documentation lists.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use url::Url;

use crate::cache::digest::Digest;

/// Which results of a cache are kept: BuildKit's `mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Only what the build's own results need.
    Min,
    /// Every result.
    Max,
}

/// The SDKs' names for how hard a request is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryMode {
    /// Exponential backoff under a budget shared by the run.
    Standard,
    /// The same, and a rate limit of our own once the store throttles.
    Adaptive,
}

/// Credentials given in the spec. `Debug` shows no value.
#[derive(Clone, PartialEq, Eq)]
pub struct StaticCredentials {
    pub access_key_id: String,
    pub secret_access_key: String,
    pub session_token: Option<String>,
}

impl std::fmt::Debug for StaticCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StaticCredentials(redacted)")
    }
}

/// Where a cache is on S3 and how it is reached: one validated `type=s3` spec, less what only one
/// direction needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Config {
    pub region: String,
    pub bucket: String,
    /// From the spec, else AWS_ENDPOINT_URL_S3, else AWS_ENDPOINT_URL. http or https.
    pub endpoint_url: Option<Url>,
    pub use_path_style: bool,
    pub prefix: String,
    pub blobs_prefix: String,
    pub manifests_prefix: String,
    /// The `;`-separated names, at least one, none empty, none twice.
    pub names: Vec<String>,
    /// `None`: the AWS default chain.
    pub credentials: Option<StaticCredentials>,
    pub retry_mode: RetryMode,
    /// Counts the first try; at least 1.
    pub retry_max_attempts: u32,
    pub disable_accept_encoding: bool,
    /// From AWS_CA_BUNDLE: certificates trusted beside the system's.
    pub ca_bundle: Option<PathBuf>,
}

impl S3Config {
    /// The key of a blob: plain concatenation, as BuildKit does it.
    pub fn blob_key(&self, digest: &Digest) -> String {
        format!("{}{}{digest}", self.prefix, self.blobs_prefix)
    }

    /// The key of the manifest called `name`.
    pub fn manifest_key(&self, name: &str) -> String {
        format!("{}{}{name}", self.prefix, self.manifests_prefix)
    }

    /// Where the first name's manifest is, for messages.
    pub fn address(&self) -> String {
        format!("s3://{}/{}", self.bucket, self.manifest_key(&self.names[0]))
    }
}

/// One validated `--cache-to`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportConfig {
    pub s3: S3Config,
    /// Layers uploaded at once; at least 1.
    pub upload_parallelism: usize,
    /// Small blobs uploaded at once in addition.
    pub small_uploads: usize,
    /// Blobs last modified longer ago than this are refreshed.
    pub touch_refresh: Duration,
    pub mode: Mode,
    /// A failure of this export is a warning.
    pub ignore_error: bool,
}

/// What a run is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Task {
    Export(ExportTask),
    Import(ImportTask),
    Doctor(DoctorTask),
    Copy(CopyTask),
    Lifecycle(LifecycleTask),
    Prune(PruneTask),
    PruneLayout(PruneLayoutTask),
    Ls(LsTask),
    Inspect(InspectTask),
    Verify(VerifyTask),
    Serve(Box<ServeTask>),
}

/// From one layout to at least one cache on S3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportTask {
    /// At least one, none twice.
    pub targets: Vec<ExportConfig>,
    pub layout: PathBuf,
    pub selection: Selection,
    /// Which blobs that S3 has already are sent all the same.
    pub resend: Resend,
    /// Say what would be sent; write nothing.
    pub dry_run: bool,
}

/// Which manifest of a layout to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// The tag `latest`, or the only entry.
    Default,
    Tag(String),
    Digest(Digest),
}

impl Selection {
    /// What a tag or a digest chooses; not both.
    pub fn new(tag: Option<String>, digest: Option<Digest>) -> Self {
        match (tag, digest) {
            (_, Some(digest)) => Selection::Digest(digest),
            (Some(tag), None) => Selection::Tag(tag),
            (None, None) => Selection::Default,
        }
    }
}

/// Which blobs that S3 has already an export sends again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resend {
    None,
    /// Those whose bytes are wrong: each is read back.
    Damaged,
    All,
}

/// From at least one cache on S3 into one layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportTask {
    /// At least one, none twice.
    pub sources: Vec<S3Config>,
    pub layout: PathBuf,
    /// The tag to write; `None`: `latest`.
    pub tag: Option<String>,
    /// It is an error if no source has a cache.
    pub require: bool,
    pub missing: Missing,
    /// Hash the blobs that are there already, too.
    pub verify: bool,
    /// Refresh the blobs on S3 that are older than this.
    pub refresh: Option<Duration>,
    /// Say what would be fetched; write nothing.
    pub dry_run: bool,
}

/// Try out what an export and an import need of at least one place on S3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DoctorTask {
    /// At least one, none twice.
    pub places: Vec<TestedPlace>,
    /// Print JSON documents instead of text.
    pub json: bool,
}

/// A place on S3 that is tried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestedPlace {
    pub s3: S3Config,
    /// Try out what an export needs, too, which writes an object and deletes it. Otherwise nothing is
    /// written.
    pub writes: bool,
}

/// Serve caches on S3 to builders on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServeTask {
    /// In the order in which a build is to look at them. None twice.
    pub sources: Vec<S3Config>,
    /// Where builds may write. With no source, there is one.
    pub target: Option<ExportConfig>,
    pub listen: SocketAddr,
    /// The variables are appended to it.
    pub env_file: Option<PathBuf>,
    /// What to run, and its arguments. Empty: serve until a signal arrives.
    pub command: Vec<OsString>,
}

/// What becomes of results whose layers are no longer on S3 (moby/buildkit#3223).
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Missing {
    /// leave out the results that need them, and import the rest
    Drop,
    /// fail
    Error,
}

/// Choose, check or write the lifecycle rules of at least one place on S3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LifecycleTask {
    /// At least one, none twice.
    pub targets: Vec<ExportConfig>,
    /// Days that a cache stays after its last export. `None`: a default.
    pub expire_after: Option<u32>,
    pub action: LifecycleAction,
    /// Print what `action` found or did as JSON instead of text.
    pub json: bool,
}

/// What is done with lifecycle rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub enum LifecycleAction {
    /// Print those that fit.
    Print,
    /// Judge those that the bucket has.
    Check,
    /// Write those that fit, beside others that the bucket has.
    Apply,
}

/// List the caches of at least one place on S3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LsTask {
    /// At least one, none twice.
    pub sources: Vec<S3Config>,
    /// Only caches whose names match.
    pub name: Option<glob::Pattern>,
    pub sort: Sort,
    /// Print JSON instead of a table.
    pub json: bool,
}

/// The order of a list of caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Sort {
    Name,
    /// the newest first
    Written,
    /// the largest first
    Size,
}

/// From caches on S3, merged into one, to at least one cache on S3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyTask {
    /// At least one, none twice.
    pub sources: Vec<S3Config>,
    /// At least one, none twice.
    pub targets: Vec<ExportConfig>,
    /// Say what would be copied; write nothing.
    pub dry_run: bool,
}

/// Where the caches are that a command looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// At least one, none twice.
    S3(Vec<S3Config>),
    Layout(PathBuf),
}

/// Show what is in single caches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InspectTask {
    pub origin: Origin,
    /// Which manifest of a layout.
    pub selection: Selection,
    /// Show the layers' diffIDs.
    pub diff_ids: bool,
    /// Print JSON instead of a tree.
    pub json: bool,
}

/// Remove garbage, and the caches that are chosen, from at least one place on S3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PruneTask {
    /// At least one, none twice.
    pub targets: Vec<ExportConfig>,
    pub choice: CacheChoice,
    /// Places elsewhere whose caches need the same blobs.
    pub also: Vec<S3Config>,
    /// No other spec's caches need the blobs: do not look for any.
    pub only_own: bool,
    /// How old a blob that no cache needs must be to go; at least each target's touch_refresh. `None`:
    /// a day more than that.
    pub grace: Option<Duration>,
    /// Rewrite manifests that name blobs which were deleted meanwhile.
    pub repair: bool,
    pub consent: Consent,
    pub json: bool,
}

/// Which caches are to be removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheChoice {
    pub older_than: Option<Duration>,
    /// This many stay: those that were written last.
    pub keep_last: Option<usize>,
    /// Only these may go; empty: all may.
    pub name: Vec<glob::Pattern>,
    /// These stay.
    pub keep: Vec<glob::Pattern>,
    /// Bytes: the oldest go until the blobs of the rest fit.
    pub max_size: Option<u64>,
    /// All caches may go.
    pub allow_empty: bool,
}

/// Remove garbage from a layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PruneLayoutTask {
    pub layout: PathBuf,
    /// How old a blob that nothing reaches must be to go.
    pub grace: Duration,
    pub consent: Consent,
    pub json: bool,
}

/// Whether a plan may be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consent {
    /// Ask.
    Ask,
    /// Do not ask.
    Given,
    /// Stop after the plan.
    DryRun,
}

/// Find out whether all caches of a place are whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyTask {
    pub origin: Origin,
    /// Only caches on S3 whose names match.
    pub name: Option<glob::Pattern>,
    /// Hash every blob.
    pub deep: bool,
    /// Make caches usable that are not whole.
    pub repair: bool,
    /// Where an interrupted run leaves what it has verified. `None`: nowhere.
    pub state: Option<PathBuf>,
    /// Print JSON instead of a table.
    pub json: bool,
}
