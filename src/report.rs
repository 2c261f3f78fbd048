//! What a run did, in numbers: the closing summary and the metadata file.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;

use crate::{progress, quote};

/// One spec's outcome.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// `export` or `import`.
    pub command: &'static str,
    pub bucket: String,
    pub names: Vec<String>,
    /// The keys of the names' manifests in the bucket, where they are known.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
    /// The layout's directory as the user wrote it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub layout: String,
    /// The layout's manifest: chosen on export, written on import.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manifest: Option<String>,
    /// Under which tag an import was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    pub dry_run: bool,
    /// Import: nothing is stored under the name.
    pub not_found: bool,
    /// Blobs sent or fetched; in a dry run those that would be.
    pub transferred: u64,
    /// Blobs that were there already and stayed as they were.
    pub present: u64,
    /// Blobs that were there already and were made young again; in a dry run those that would be.
    pub refreshed: u64,
    /// Bytes of blobs sent or fetched.
    pub bytes: u64,
    /// Layers and results that an import left out because blobs were missing.
    pub dropped_layers: u64,
    pub dropped_results: u64,
    /// HTTP requests, retries included.
    pub requests: u64,
    pub seconds: f64,
    /// Why it failed. What was moved until then is not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// It failed under `ignore-error`, which is no failure of the run.
    #[serde(skip_serializing_if = "is_false")]
    pub error_ignored: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
fn is_false(value: &bool) -> bool {
    !value
}

/// What came of a run.
#[derive(Debug, Default)]
pub struct Outcome {
    /// One for each spec, in their order, of those that failed too.
    pub reports: Vec<Report>,
    /// What went wrong and is not ignored: with any, the run has failed.
    pub errors: Vec<anyhow::Error>,
}

impl Outcome {
    /// Adds the reports of what a signal kept from being begun.
    pub fn not_begun(&mut self, blank: impl Iterator<Item = Report>) {
        let why = anyhow!("not begun: the run was interrupted");
        self.reports.extend(blank.map(|report| report.failed(&why)));
    }
}

impl Report {
    /// The same place and nothing done there.
    pub fn failed(self, error: &anyhow::Error) -> Self {
        Report {
            command: self.command,
            bucket: self.bucket,
            names: self.names,
            keys: self.keys,
            layout: self.layout,
            manifest: self.manifest,
            dry_run: self.dry_run,
            requests: self.requests,
            seconds: self.seconds,
            error: Some(format!("{error:#}")),
            ..Report::default()
        }
    }

    /// Whether this is what the run failed of.
    pub fn is_failure(&self) -> bool {
        self.error.is_some() && !self.error_ignored
    }

    /// The closing summary for people: one or two lines, the last without a line end. What came
    /// from the network or the user is escaped.
    pub fn summary(&self) -> String {
        let remote = quote::printable(&self.remote()).into_owned();
        let cost = format!(
            "{} in {:.1} s",
            count(self.requests, "request"),
            self.seconds
        );
        let import = self.command == "import";
        if let Some(error) = &self.error {
            let error = quote::printable(error);
            let action = if import { "import from" } else { "export to" };
            let ignored = match self.error_ignored {
                true => ", which is ignored",
                false => "",
            };
            return format!("{action} {remote} failed{ignored}: {error}; {cost}");
        }
        if self.not_found {
            return format!("nothing is stored at {remote}: nothing imported; {cost}");
        }
        let total = self
            .transferred
            .saturating_add(self.present)
            .saturating_add(self.refreshed);
        let (layers, bytes) = (count(total, "layer"), progress::bytes(self.bytes));
        let (transferred, present, refreshed) = (self.transferred, self.present, self.refreshed);
        let mut summary = match (import, self.dry_run) {
            (false, false) => format!(
                "exported {layers} to {remote}: {transferred} uploaded ({bytes}), \
                 {present} already there, {refreshed} refreshed; {cost}"
            ),
            (false, true) => format!(
                "dry run: would export {layers} to {remote}: would upload {transferred} ({bytes}), \
                 {present} already there, would refresh {refreshed}; {cost}"
            ),
            (true, false) => format!(
                "imported {} from {remote}{}: {layers}: {transferred} fetched ({bytes}), \
                 {present} already there; {cost}",
                self.quoted_names(),
                self.destination(),
            ),
            (true, true) => format!(
                "dry run: would import {} from {remote}{}: {layers}: would fetch {transferred} \
                 ({bytes}), {present} already there; {cost}",
                self.quoted_names(),
                self.destination(),
            ),
        };
        let dropped: Vec<String> = [
            (self.dropped_layers, "layer"),
            (self.dropped_results, "result"),
        ]
        .into_iter()
        .filter(|(n, _)| *n > 0)
        .map(|(n, what)| count(n, what))
        .collect();
        if !dropped.is_empty() {
            let _ = write!(
                summary,
                "\n{} {} because blobs are missing",
                if self.dry_run {
                    "would leave out"
                } else {
                    "left out"
                },
                dropped.join(" and ")
            );
        }
        summary
    }

    /// The manifests' places, `s3://bucket/key`; the bucket and the names where keys are not known.
    fn remote(&self) -> String {
        if self.keys.is_empty() {
            return format!("s3://{} ({})", self.bucket, self.quoted_names());
        }
        let places: Vec<String> = self
            .keys
            .iter()
            .map(|key| format!("s3://{}/{key}", self.bucket))
            .collect();
        places.join(", ")
    }

    fn quoted_names(&self) -> String {
        let names: Vec<String> = self
            .names
            .iter()
            .map(|name| format!("'{}'", quote::printable(name)))
            .collect();
        names.join(", ")
    }

    fn destination(&self) -> String {
        let mut destination = String::new();
        if !self.layout.is_empty() {
            let _ = write!(destination, " into {}", quote::printable(&self.layout));
        }
        if let Some(tag) = &self.tag {
            let _ = write!(destination, " as {}", quote::printable(tag));
        }
        destination
    }
}

/// `1 layer`, `2 layers`.
fn count(n: u64, what: &str) -> String {
    match n {
        1 => format!("1 {what}"),
        _ => format!("{n} {what}s"),
    }
}

#[derive(Serialize)]
struct Metadata<'a> {
    version: u32,
    results: &'a [Report],
}

/// Whether [`write_metadata`] can be expected to work, asked before there is anything to lose.
/// Errors name the file.
pub fn check_metadata(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    let checked = match place(path) {
        Ok(Place::Stream) => rustix::fs::access(path, rustix::fs::Access::WRITE_OK)
            .map_err(|error| std::io::Error::from(error).into()),
        // Opening or replacing what is there would already be a result.
        Ok(Place::File(target)) => stage(&target).map(drop),
        Err(error) => Err(error),
    };
    checked.with_context(|| format!("cannot write metadata file {path:?}"))
}

/// Writes the reports as JSON to the file at `path`, which is replaced in one step, or written to
/// where it is no regular file (`/dev/stdout`, a pipe). Errors name the file.
pub fn write_metadata(path: impl AsRef<Path>, reports: &[Report]) -> Result<()> {
    let path = path.as_ref();
    write_json(path, reports).with_context(|| format!("cannot write metadata file {path:?}"))
}

fn write_json(path: &Path, reports: &[Report]) -> Result<()> {
    let metadata = Metadata {
        version: 1,
        results: reports,
    };
    let mut json = serde_json::to_vec_pretty(&metadata)?;
    json.push(b'\n');

    match place(path)? {
        Place::Stream => {
            let mut stream = std::fs::OpenOptions::new().write(true).open(path)?;
            stream.write_all(&json)?;
        }
        Place::File(target) => {
            let mut staged = stage(&target)?;
            staged.write_all(&json)?;
            staged.persist(&target)?;
        }
    }
    Ok(())
}

/// What a metadata file's path leads to.
enum Place {
    /// A file that is there or is not, to be replaced.
    File(PathBuf),
    /// A pipe or a device, to be written to.
    Stream,
}

fn place(path: &Path) -> Result<Place> {
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => bail!("it is a directory"),
        Ok(found) if !found.is_file() => Ok(Place::Stream),
        // A symlink stays; what it points to is replaced.
        Ok(_) => Ok(Place::File(path.canonicalize()?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Ok(Place::File(path.to_path_buf()))
        }
        Err(error) => Err(error.into()),
    }
}

/// A file beside `target`, to be given its name.
fn stage(target: &Path) -> Result<tempfile::NamedTempFile> {
    let directory = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".metadata-");
    // tempfile's own default is for secrets; this is a result that other CI steps read.
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    Ok(builder.tempfile_in(directory)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn export() -> Report {
        Report {
            command: "export",
            bucket: "cache".into(),
            names: vec!["main".into()],
            keys: vec!["manifests/main".into()],
            transferred: 3,
            present: 7,
            bytes: 1_258_291,
            requests: 12,
            seconds: 1.4321,
            ..Report::default()
        }
    }

    fn import() -> Report {
        Report {
            command: "import",
            layout: "build/cache".into(),
            tag: Some("latest".into()),
            ..export()
        }
    }

    #[test]
    fn an_export_tells_what_it_sent_and_what_was_there() {
        assert_eq!(
            export().summary(),
            "exported 10 layers to s3://cache/manifests/main: 3 uploaded (1.20 MiB), \
             7 already there, 0 refreshed; 12 requests in 1.4 s"
        );
    }

    #[test]
    fn one_is_singular_and_every_name_is_told() {
        let report = Report {
            names: vec!["a".into(), "b".into()],
            keys: vec!["m/a".into(), "m/b".into()],
            transferred: 0,
            present: 0,
            refreshed: 1,
            bytes: 0,
            requests: 1,
            ..export()
        };
        assert_eq!(
            report.summary(),
            "exported 1 layer to s3://cache/m/a, s3://cache/m/b: 0 uploaded (0 B), \
             0 already there, 1 refreshed; 1 request in 1.4 s"
        );
    }

    #[test]
    fn an_import_tells_where_from_where_to_and_what_was_dropped() {
        let mut report = import();
        assert_eq!(
            report.summary(),
            "imported 'main' from s3://cache/manifests/main into build/cache as latest: \
             10 layers: 3 fetched (1.20 MiB), 7 already there; 12 requests in 1.4 s"
        );
        report.dropped_layers = 2;
        report.dropped_results = 1;
        assert_eq!(
            report.summary().lines().nth(1),
            Some("left out 2 layers and 1 result because blobs are missing")
        );
        report.dropped_layers = 0;
        assert_eq!(
            report.summary().lines().nth(1),
            Some("left out 1 result because blobs are missing")
        );
    }

    #[test]
    fn a_dry_run_tells_what_would_be_done() {
        let dry = |report| Report {
            dry_run: true,
            ..report
        };
        assert_eq!(
            dry(export()).summary(),
            "dry run: would export 10 layers to s3://cache/manifests/main: would upload 3 \
             (1.20 MiB), 7 already there, would refresh 0; 12 requests in 1.4 s"
        );
        assert_eq!(
            dry(import()).summary(),
            "dry run: would import 'main' from s3://cache/manifests/main into build/cache as \
             latest: 10 layers: would fetch 3 (1.20 MiB), 7 already there; 12 requests in 1.4 s"
        );
    }

    #[test]
    fn a_name_that_is_not_there_and_an_ignored_error_are_told() {
        let absent = Report {
            not_found: true,
            requests: 1,
            ..import()
        };
        assert_eq!(
            absent.summary(),
            "nothing is stored at s3://cache/manifests/main: nothing imported; 1 request in 1.4 s"
        );
        let failed = Report {
            error: Some("access denied\x1b[2J".into()),
            error_ignored: true,
            ..export()
        };
        assert_eq!(
            failed.summary(),
            "export to s3://cache/manifests/main failed, which is ignored: \
             access denied\\u{1b}[2J; 12 requests in 1.4 s"
        );
    }

    #[test]
    fn names_cannot_steer_the_terminal() {
        let report = Report {
            names: vec!["a\x1b[31m".into()],
            keys: vec![],
            layout: "dir\r".into(),
            tag: Some("t\n".into()),
            ..import()
        };
        assert_eq!(
            report.summary(),
            "imported 'a\\u{1b}[31m' from s3://cache ('a\\u{1b}[31m') into dir\\r as t\\n: \
             10 layers: 3 fetched (1.20 MiB), 7 already there; 12 requests in 1.4 s"
        );
    }

    #[test]
    fn the_metadata_file_is_replaced_whole_and_nothing_is_left_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metadata.json");
        std::fs::write(&path, "x".repeat(10_000)).unwrap();
        let report = Report {
            seconds: 1.5,
            ..export()
        };
        write_metadata(&path, &[report]).unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            r#"{
  "version": 1,
  "results": [
    {
      "command": "export",
      "bucket": "cache",
      "names": [
        "main"
      ],
      "keys": [
        "manifests/main"
      ],
      "dryRun": false,
      "notFound": false,
      "transferred": 3,
      "present": 7,
      "refreshed": 0,
      "bytes": 1258291,
      "droppedLayers": 0,
      "droppedResults": 0,
      "requests": 12,
      "seconds": 1.5
    }
  ]
}
"#
        );
        assert_eq!(directory.path().read_dir().unwrap().count(), 1);
    }

    #[test]
    fn a_symlink_stays_and_what_it_points_to_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let (real, link) = (directory.path().join("real"), directory.path().join("link"));
        std::fs::write(&real, "old").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        write_metadata(&link, &[]).unwrap();
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(
            std::fs::read_to_string(&real).unwrap(),
            "{\n  \"version\": 1,\n  \"results\": []\n}\n"
        );
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_is_no_regular_file_is_written_to() {
        let error = write_metadata("/dev/full", &[export()]).unwrap_err();
        let cause = error.downcast_ref::<std::io::Error>().unwrap();
        assert_eq!(cause.kind(), std::io::ErrorKind::StorageFull);
    }

    #[test]
    fn an_error_names_the_metadata_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("absent").join("metadata.json");
        let error = write_metadata(&path, &[export()]).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("cannot write metadata file {path:?}")
        );
    }
}
