//! A cache's manifest on S3: read, and written last.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;

use crate::bucket::Bucket;
use crate::cache::{CacheConfig, DOCUMENT_LIMIT};
use crate::store;
use crate::transfer::body::InMemory;

impl Bucket {
    /// The cache called `name`; `None` if there is none.
    ///
    /// # Errors
    /// The store fails, or the manifest is not one that BuildKit could read.
    pub async fn manifest(&self, name: &str) -> Result<Option<CacheConfig>> {
        let Some(bytes) = self.manifest_bytes(name).await? else {
            return Ok(None);
        };
        let reading = || {
            let key = self.config.manifest_key(name);
            format!("reading the manifest {key} on s3")
        };
        // The error quotes what the bucket holds.
        CacheConfig::parse_s3(&bytes)
            .map(Some)
            .map_err(|error| anyhow!(self.store.outside(&format!("{error:#}"))))
            .with_context(reading)
    }

    /// Writes the manifest under every name of the spec. Every blob that it names must be there.
    ///
    /// # Errors
    /// The store's.
    pub async fn write_manifests(&self, manifest: &Bytes) -> Result<()> {
        for name in &self.config.names {
            let key = self.config.manifest_key(name);
            self.store
                .put(&key, Arc::new(InMemory(manifest.clone())))
                .await
                .with_context(|| format!("writing the manifest {key}"))?;
            self.progress.note(&format!("wrote {key}"));
        }
        Ok(())
    }

    /// The bytes of the manifest called `name`, as they are; `None` if there is none.
    ///
    /// # Errors
    /// The store's, or it is no JSON.
    pub async fn manifest_bytes(&self, name: &str) -> Result<Option<Bytes>> {
        let key = self.config.manifest_key(name);
        let read = store::read_whole(&self.store, &key, DOCUMENT_LIMIT, check_json).await;
        read.with_context(|| format!("reading the manifest {key} on s3"))
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
