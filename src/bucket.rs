//! A cache's home on S3, the counterpart of [`Layout`](crate::layout::Layout): where its manifests and
//! blobs are, and which of them exist.

mod manifest;
mod survey;

use std::sync::Arc;

use anyhow::Result;

pub use self::survey::Certainty;
use crate::cache::digest::Digest;
use crate::config::S3Config;
use crate::progress::Progress;
use crate::store::{ObjectInfo, Store};

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

    /// What the store says of a blob; `None` if it is not there.
    ///
    /// # Errors
    /// The store's.
    pub async fn blob(&self, digest: &Digest) -> Result<Option<ObjectInfo>> {
        Ok(self.store.head(&self.blob_key(digest)).await?)
    }
}
