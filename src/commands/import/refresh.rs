//! `--refresh`: keeps the blobs that an import uses young on S3, as an export does.

use std::time::{Duration, SystemTime};

use anyhow::Result;

use super::ImportFrom;
use crate::bucket::Certainty;
use crate::bucket::publish::{self, is_old};
use crate::cache::digest::Digest;
use crate::progress::count;
use crate::store::ObjectInfo;

impl ImportFrom<'_> {
    /// Those of the blobs that were written to S3 longer than `age` ago.
    pub(super) async fn old(
        &self,
        blobs: impl IntoIterator<Item = Digest>,
        age: Duration,
    ) -> Result<Vec<(Digest, ObjectInfo)>> {
        let found = self.bucket.survey(blobs, Certainty::Known).await?;
        let now = SystemTime::now();
        let found = found.into_iter();
        Ok(found.filter(|(_, info)| is_old(info, age, now)).collect())
    }

    /// Refreshes them; returns how many. The import is already done, so a failure is only a
    /// warning.
    pub(super) async fn refresh(
        &self,
        blobs: impl IntoIterator<Item = Digest>,
        age: Duration,
    ) -> u64 {
        let old = match self.old(blobs, age).await {
            Ok(old) => old,
            Err(error) => {
                self.progress
                    .warn(&format!("no blob was refreshed on S3: {error:#}"));
                return 0;
            }
        };
        let left = publish::refresh(&self.bucket, &self.uploader, &old, self.progress).await;
        if !left.is_empty() {
            let blobs = count(left.len() as u64, "blob");
            self.progress.warn(&format!(
                "{blobs} could not be refreshed: a lifecycle rule may delete them before the next \
                 export (-v says why)"
            ));
        }
        (old.len() - left.len()) as u64
    }
}
