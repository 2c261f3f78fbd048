//! Rewrites a manifest without the blobs that a cache cannot have, while others may replace it.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use bytes::Bytes;
use futures::future::BoxFuture;

use crate::bucket::{Bucket, Certainty};
use crate::cache::Dropped;
use crate::cache::digest::Digest;
use crate::quote::printable;

/// How often a manifest may be replaced by others while it is rewritten.
const ATTEMPTS: usize = 5;

impl Bucket {
    /// Rewrites the manifest called `name` without its blobs that are missing by now, have another size,
    /// or are damaged, which `is_damaged` tells of those that are there. `None`: it has none of them, or
    /// is gone.
    ///
    /// # Errors
    /// The store's, or other programs keep replacing the manifest.
    pub async fn rewrite_without_bad<'a>(
        &self,
        name: &str,
        is_damaged: impl Fn(Digest) -> BoxFuture<'a, Result<bool>>,
    ) -> Result<Option<Dropped>> {
        for _ in 0..ATTEMPTS {
            let Some(cache) = self.manifest(name).await? else {
                return Ok(None);
            };
            let blobs = cache.blobs()?;
            let digests = blobs.keys().copied();
            let found = self.survey(digests, Certainty::Known).await?;
            let mut bad = BTreeSet::new();
            for (blob, size) in blobs {
                let is_there = found.get(&blob).is_some_and(|info| info.size == size);
                if !is_there || is_damaged(blob).await? {
                    bad.insert(blob);
                }
            }
            if bad.is_empty() {
                return Ok(None);
            }
            let (left, dropped) = cache.without_blobs(&bad);
            let manifest = Bytes::from(left.to_s3()?);
            if self.manifest(name).await?.as_ref() == Some(&cache) {
                self.write_manifest(name, manifest).await?;
                return Ok(Some(dropped));
            }
            self.progress.note(&format!(
                "{}: replaced meanwhile; looking again",
                printable(name)
            ));
        }
        bail!("other programs keep replacing the manifest")
    }
}
