//! A cache's manifest on S3: read, and written last.

use std::sync::Arc;

use anyhow::{Result, anyhow};
use bytes::Bytes;

use crate::bucket::Bucket;
use crate::cache::{CacheConfig, DOCUMENT_LIMIT};
use crate::store::{self, StoreError};
use crate::transfer::body::InMemory;

/// Why a manifest was not read.
pub(super) enum Unread {
    Store(StoreError),
    /// The object is not a manifest that BuildKit could read.
    Damaged(String),
}

impl Bucket {
    /// The cache called `name`; `None` if there is none.
    ///
    /// # Errors
    /// The store fails, or the manifest is not one that BuildKit could read.
    pub async fn manifest(&self, name: &str) -> Result<Option<CacheConfig>> {
        let read = self.read_manifest(name).await;
        read.map_err(|unread| match unread {
            Unread::Store(error) => anyhow::Error::new(error),
            Unread::Damaged(reason) => {
                let key = self.config.manifest_key(name);
                anyhow!("the manifest {key} is damaged: {reason}")
            }
        })
    }

    pub(super) async fn read_manifest(&self, name: &str) -> Result<Option<CacheConfig>, Unread> {
        let key = self.config.manifest_key(name);
        let read = store::read_whole(&self.store, &key, DOCUMENT_LIMIT, check_json).await;
        let Some(bytes) = read.map_err(Unread::Store)? else {
            return Ok(None);
        };
        CacheConfig::parse_s3(&bytes)
            .map(Some)
            // The error quotes what the bucket holds.
            .map_err(|error| Unread::Damaged(self.store.outside(&format!("{error:#}"))))
    }

    /// Writes the manifest called `name`. Every blob that it names must be there.
    ///
    /// # Errors
    /// The store's.
    pub async fn write_manifest(&self, name: &str, manifest: Bytes) -> Result<()> {
        let key = self.config.manifest_key(name);
        self.store.put(&key, Arc::new(InMemory(manifest))).await?;
        self.progress.note(&format!("wrote {key}"));
        Ok(())
    }
}

/// Well-formed JSON is what someone wrote. Anything else may be a proxy's page.
fn check_json(bytes: &[u8]) -> Result<(), String> {
    // From bytes, serde_json would not look into the strings that it ignores.
    let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
    match serde_json::from_str::<serde::de::IgnoredAny>(text) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("it is not JSON ({error})")),
    }
}
