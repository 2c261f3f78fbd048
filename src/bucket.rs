//! A cache's home on S3, the counterpart of [`Layout`](crate::layout::Layout): where its manifests and
//! blobs are, and which of them exist.

mod manifest;
pub mod rules;
mod survey;

use std::sync::Arc;

use anyhow::Result;

pub use self::survey::Certainty;
use crate::cache::digest::Digest;
use crate::config::S3Config;
use crate::progress::Progress;
use crate::store::{ObjectInfo, Store, Upload};

/// A bucket, and where in it a spec's caches are. Cheap to clone.
#[derive(Clone)]
pub struct Bucket {
    store: Arc<dyn Store>,
    config: S3Config,
    progress: Progress,
}

impl Bucket {
    /// Sends nothing.
    pub fn new(store: Arc<dyn Store>, config: &S3Config, progress: &Progress) -> Self {
        Bucket {
            store,
            config: config.clone(),
            progress: progress.clone(),
        }
    }

    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    pub fn config(&self) -> &S3Config {
        &self.config
    }

    /// The key of a blob.
    pub fn blob_key(&self, digest: &Digest) -> String {
        self.config.blob_key(digest)
    }

    /// The unfinished multipart uploads of blobs. Empty where the store or the role does not allow to
    /// list them.
    pub async fn unfinished_uploads(&self) -> Vec<(Digest, Upload)> {
        let blobs = format!("{}{}", self.config.prefix, self.config.blobs_prefix);
        match self.store.list_uploads(&blobs).await {
            Ok(uploads) => uploads
                .into_iter()
                .filter_map(|upload| {
                    let digest = upload.key.strip_prefix(&blobs)?.parse().ok()?;
                    Some((digest, upload))
                })
                .collect(),
            Err(error) => {
                self.progress
                    .debug(&format!("not looking for abandoned uploads: {error}"));
                Vec::new()
            }
        }
    }

    /// What the store says of a blob; `None` if it is not there.
    ///
    /// # Errors
    /// The store's.
    pub async fn blob(&self, digest: &Digest) -> Result<Option<ObjectInfo>> {
        Ok(self.store.head(&self.blob_key(digest)).await?)
    }
}
