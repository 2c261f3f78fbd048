//! What an interrupted `verify --deep` has verified, so that the next run can skip it.
//!
//! There is one file per bucket, with one line per blob: its key, ETag, LastModified and size. A
//! blob counts as verified only if all four are still the same. A run that completes removes the
//! file, so that each complete run reads everything; after a week the file is ignored.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::cache::digest::Digest;
use crate::store::ObjectInfo;

/// A file that has not been written to for this long is ignored.
const BELIEVED: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// An object as it was when its bytes were verified.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Line {
    key: String,
    etag: String,
    /// Seconds since 1970: a HEAD is no more precise.
    modified: u64,
    size: u64,
}

impl Line {
    /// `None`: the store does not say enough to recognise the object.
    fn new(key: &str, info: &ObjectInfo) -> Option<Self> {
        let modified = info.last_modified?.duration_since(SystemTime::UNIX_EPOCH);
        Some(Line {
            key: key.to_owned(),
            etag: info.etag.as_ref()?.trim_matches('"').to_owned(),
            modified: modified.ok()?.as_secs(),
            size: info.size,
        })
    }
}

/// The blobs of one bucket that are verified.
pub(super) struct Verified {
    path: PathBuf,
    earlier: HashSet<Line>,
    file: Mutex<File>,
}

impl Verified {
    /// Opens the file of the bucket at `url` in `directory`, and creates it if needed.
    ///
    /// # Errors
    /// The file system's.
    pub(super) fn open(directory: &Path, url: &str) -> Result<Self> {
        let name = format!("verified-{}", &Digest::of(url.as_bytes()).hex()[..16]);
        let path = directory.join(name);
        let opening = || format!("opening {}", path.display());
        std::fs::create_dir_all(directory).with_context(opening)?;
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true).mode(0o600);
        let file = options.open(&path).with_context(opening)?;
        let written = file.metadata().and_then(|found| found.modified());
        let age = SystemTime::now().duration_since(written.with_context(opening)?);
        let mut earlier = HashSet::new();
        match age.unwrap_or_default() > BELIEVED {
            true => file.set_len(0).with_context(opening)?,
            false => {
                // Ignores a line that was cut off, or that someone else wrote.
                let lines = BufReader::new(&file).split(b'\n').map_while(Result::ok);
                earlier.extend(lines.filter_map(|line| serde_json::from_slice(&line).ok()));
            }
        }
        Ok(Verified {
            path,
            earlier,
            file: Mutex::new(file),
        })
    }

    /// Whether an earlier run has verified the object that `info` describes.
    pub(super) fn has(&self, key: &str, info: &ObjectInfo) -> bool {
        Line::new(key, info).is_some_and(|line| self.earlier.contains(&line))
    }

    /// Notes that the object that `info` describes is verified. If that fails, the next run
    /// verifies it again.
    pub(super) fn note(&self, key: &str, info: &ObjectInfo) {
        let Some(line) = Line::new(key, info) else {
            return;
        };
        let mut json = serde_json::to_vec(&line).expect("a line has nothing that JSON cannot hold");
        // A line of an interrupted run may lack its end.
        json.insert(0, b'\n');
        json.push(b'\n');
        let _ = self.file.lock().write_all(&json);
    }

    /// The run is complete.
    pub(super) fn remove(self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(etag: &str, modified: u64, size: u64) -> ObjectInfo {
        ObjectInfo {
            size,
            last_modified: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(modified)),
            etag: Some(etag.to_owned()),
            storage_class: None,
        }
    }

    #[test]
    fn only_the_same_object_counts_as_verified() {
        let directory = tempfile::tempdir().unwrap();
        let open = || Verified::open(&directory.path().join("layercache"), "http://a").unwrap();
        let first = open();
        let good = info("\"e\"", 7, 3);
        assert!(!first.has("k", &good));
        first.note("k", &good);
        first.note(
            "unknown age",
            &ObjectInfo {
                last_modified: None,
                ..good.clone()
            },
        );
        std::fs::OpenOptions::new()
            .append(true)
            .open(&first.path)
            .and_then(|mut file| file.write_all(b"{\"key\":\"cut o"))
            .unwrap();

        let second = open();
        assert!(second.has("k", &good));
        let subsecond = Duration::from_millis(7_900);
        let listed = ObjectInfo {
            last_modified: Some(SystemTime::UNIX_EPOCH + subsecond),
            ..good.clone()
        };
        assert!(second.has("k", &listed));
        for other in [
            info("\"f\"", 7, 3),
            info("\"e\"", 8, 3),
            info("\"e\"", 7, 4),
        ] {
            assert!(!second.has("k", &other), "{other:?}");
        }
        assert!(!second.has("other", &good));
        assert!(!second.has(
            "unknown age",
            &ObjectInfo {
                last_modified: None,
                ..good.clone()
            }
        ));
        second.note("after the cut", &good);
        assert!(open().has("after the cut", &good));

        let other = Verified::open(&directory.path().join("layercache"), "http://b").unwrap();
        assert!(!other.has("k", &good));
        open().remove();
        assert!(!open().has("k", &good));
    }

    #[test]
    fn what_was_verified_long_ago_is_verified_again() {
        let directory = tempfile::tempdir().unwrap();
        let verified = Verified::open(directory.path(), "http://a").unwrap();
        let good = info("e", 7, 3);
        verified.note("k", &good);
        let before = SystemTime::now() - BELIEVED - Duration::from_secs(60);
        verified.file.lock().set_modified(before).unwrap();
        let again = Verified::open(directory.path(), "http://a").unwrap();
        assert!(!again.has("k", &good));
    }
}
