//! The metadata file: every report of a run, as JSON for the next CI step.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;

use crate::quote;
use crate::report::AnyReport;

#[derive(Serialize)]
struct Document {
    version: u32,
    results: Vec<Value>,
}

/// Checks that [`write()`] can be expected to work, before any work is done. Errors name the file.
pub fn check(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    let checked = match target(path) {
        Ok(Target::Stdout | Target::Stderr) => Ok(()),
        Ok(Target::Stream) => rustix::fs::access(path, rustix::fs::Access::WRITE_OK)
            .map_err(|error| std::io::Error::from(error).into()),
        // Opening or replacing an existing file would already be a result.
        Ok(Target::File(target)) => stage(&target).map(drop),
        Err(error) => Err(error),
    };
    checked.with_context(|| cannot_write(path))
}

/// Writes the reports as JSON to the file at `path`, which is replaced atomically, or written to if
/// it is not a regular file (a pipe) or is open already (`/dev/stdout`). Errors name the file.
pub fn write(path: impl AsRef<Path>, reports: &[Box<dyn AnyReport>]) -> Result<()> {
    let path = path.as_ref();
    write_json(path, reports).with_context(|| cannot_write(path))
}

fn cannot_write(path: &Path) -> String {
    let path = path.to_string_lossy();
    format!("cannot write the metadata file {}", quote::printable(&path))
}

fn write_json(path: &Path, reports: &[Box<dyn AnyReport>]) -> Result<()> {
    let document = Document {
        version: 1,
        results: reports.iter().map(|report| report.json()).collect(),
    };
    let mut json = serde_json::to_vec_pretty(&document)?;
    json.push(b'\n');

    match target(path)? {
        Target::Stdout => write_all(std::io::stdout(), &json)?,
        Target::Stderr => write_all(std::io::stderr(), &json)?,
        // What others have written through the descriptor stays.
        Target::Stream => write_all(OpenOptions::new().append(true).open(path)?, &json)?,
        Target::File(target) => {
            let mut staged = stage(&target)?;
            staged.write_all(&json)?;
            staged.persist(&target)?;
        }
    }
    Ok(())
}

fn write_all(mut stream: impl Write, json: &[u8]) -> std::io::Result<()> {
    stream.write_all(json)?;
    stream.flush()
}

/// What a metadata file's path leads to.
enum Target {
    /// A file to be replaced, whether or not it exists.
    File(PathBuf),
    /// A pipe or a device, or what a descriptor of the process stands for, to be written to.
    Stream,
    Stdout,
    Stderr,
}

fn target(path: &Path) -> Result<Target> {
    let descriptor = descriptor(path);
    match descriptor {
        Some(1) => return Ok(Target::Stdout),
        Some(2) => return Ok(Target::Stderr),
        _ => {}
    }
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => bail!("it is a directory"),
        // If it is a regular file, it is one that a shell writes to as well.
        Ok(_) if descriptor.is_some() => Ok(Target::Stream),
        Ok(found) if !found.is_file() => Ok(Target::Stream),
        // A symlink stays; what it points to is replaced.
        Ok(_) => Ok(Target::File(path.canonicalize()?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Ok(Target::File(path.to_path_buf()))
        }
        Err(error) => Err(error.into()),
    }
}

/// The number of the descriptor that a path names.
fn descriptor(path: &Path) -> Option<u32> {
    let path = path.to_str()?;
    match path {
        "-" | "/dev/stdout" => Some(1),
        "/dev/stderr" => Some(2),
        _ => {
            let mut folders = ["/dev/fd/", "/proc/self/fd/"].into_iter();
            let number = folders.find_map(|folder| path.strip_prefix(folder));
            number?.parse().ok()
        }
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
    // tempfile's own error names a file that no one knows.
    if !directory.is_dir() {
        bail!("there is no directory {}", directory.display());
    }
    Ok(builder.tempfile_in(directory)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Cost, Details, Place, Report};

    #[derive(Debug, Clone, Default, Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Sent {
        dry_run: bool,
        bytes: u64,
    }

    impl Details for Sent {
        fn summary(&self, _: &Place, _: &str) -> String {
            String::new()
        }

        fn of_failure(self) -> Self {
            Sent::default()
        }
    }

    fn report() -> Box<dyn AnyReport> {
        let place = Place {
            command: "export",
            doing: "exporting to",
            endpoint: None,
            bucket: "cache".into(),
            names: vec!["main".into()],
            keys: vec!["manifests/main".into()],
            ..Place::default()
        };
        let bytes = 1_258_291;
        let dry_run = false;
        Box::new(Report {
            cost: Cost {
                requests: 12,
                seconds: 1.5,
            },
            ..Report::new(place, Sent { dry_run, bytes })
        })
    }

    #[test]
    fn the_metadata_file_is_replaced_whole_and_nothing_is_left_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metadata.json");
        std::fs::write(&path, "x".repeat(10_000)).unwrap();
        write(&path, &[report()]).unwrap();
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
      "bytes": 1258291,
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
        write(&link, &[]).unwrap();
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(
            std::fs::read_to_string(&real).unwrap(),
            "{\n  \"version\": 1,\n  \"results\": []\n}\n"
        );
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_is_no_regular_file_is_written_to() {
        let error = write("/dev/full", &[report()]).unwrap_err();
        let cause = error.downcast_ref::<std::io::Error>().unwrap();
        assert_eq!(cause.kind(), std::io::ErrorKind::StorageFull);
    }

    #[test]
    fn an_error_names_the_metadata_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("absent").join("metadata.json");
        let error = write(&path, &[report()]).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("cannot write the metadata file {}", path.display())
        );
    }
}
