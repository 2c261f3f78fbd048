//! A cache's manifest on S3: read, and written last.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures::stream::StreamExt;

use crate::bucket::Bucket;
use crate::cache::CacheConfig;
use crate::retry::Trouble;
use crate::store::Object;
use crate::transfer::body::InMemory;

/// Bytes of the largest manifest that is read. BuildKit writes none of this size.
const MANIFEST_LIMIT: u64 = 256 << 20;

impl Bucket {
    /// The cache called `name`; `None` if there is none.
    ///
    /// # Errors
    /// The store fails, or the manifest is not one that BuildKit could read.
    pub async fn manifest(&self, name: &str) -> Result<Option<CacheConfig>> {
        let key = self.config.manifest_key(name);
        let mut tries = self.store.retries().tries();
        loop {
            // Nothing vouches for these bytes, so what is not JSON (it broke off, or is a proxy's page) is
            // requested again, from its start: another run may replace the manifest at any time.
            let read = match self.store.get(&key, None, None).await {
                Ok(Some(object)) => read_object(object).await,
                Ok(None) => return Ok(None),
                Err(error) if error.is_nonsense() => Err(error.into()),
                Err(error) => return Err(error.into()),
            };
            let (error, damaged) = match read {
                Ok(bytes) => match CacheConfig::parse_s3(&bytes) {
                    Ok(cache) => return Ok(Some(cache)),
                    // Well-formed JSON is what someone wrote: it would come again.
                    Err(error) => (error, !is_json(&bytes)),
                },
                Err(error) => (error, true),
            };
            if !damaged || !tries.again(Trouble::default()).await {
                let tried = tries.summary().map(|tried| format!(" ({tried})"));
                let tried = tried.unwrap_or_default();
                return Err(error.context(format!("reading the manifest {key} on s3{tried}")));
            }
        }
    }

    /// Writes the manifest called `name`. Every blob that it names must be there.
    ///
    /// # Errors
    /// The store's.
    pub async fn write_manifest(&self, name: &str, manifest: Bytes) -> Result<()> {
        let key = self.config.manifest_key(name);
        self.store
            .put(&key, Arc::new(InMemory(manifest)))
            .await
            .with_context(|| format!("writing the manifest {key}"))?;
        self.progress.note(&format!("wrote {key}"));
        Ok(())
    }
}

fn is_json(bytes: &[u8]) -> bool {
    // From bytes, serde_json would not look into the strings that it ignores.
    let text = std::str::from_utf8(bytes).ok();
    text.is_some_and(|text| serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok())
}

/// All bytes of an object.
async fn read_object(mut object: Object) -> Result<Vec<u8>> {
    if object.length > MANIFEST_LIMIT {
        bail!(
            "it has {} bytes: no cache manifest is that large",
            object.length
        );
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = object.body.next().await {
        bytes.extend_from_slice(&chunk.context("the body broke off")?);
    }
    Ok(bytes)
}
