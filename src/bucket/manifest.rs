//! A cache's manifest on S3: read, and written last.

use std::sync::Arc;

use anyhow::{Result, anyhow};
use bytes::Bytes;

use crate::bucket::Bucket;
use crate::cache::{CacheConfig, DOCUMENT_LIMIT};
use crate::store::{self, Kind, StoreError, StoreResult};
use crate::transfer::body::InMemory;

/// Why a manifest was not read.
pub(super) enum Unread {
    /// The store does not answer, or refuses every request.
    Store(StoreError),
    /// This object cannot be read, or is not a manifest that BuildKit could read.
    Invalid(Unreadable),
}

/// What is wrong with a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    pub reason: String,
    /// It was read, and is none. Otherwise it may be one that others can read.
    pub damaged: bool,
}

impl Unreadable {
    pub(super) fn damaged(reason: String) -> Self {
        Unreadable {
            reason,
            damaged: true,
        }
    }
}

impl Bucket {
    /// The cache called `name`; `None` if there is none.
    ///
    /// # Errors
    /// The store fails, or the manifest is not one that BuildKit could read.
    pub async fn manifest(&self, name: &str) -> Result<Option<CacheConfig>> {
        let key = self.config.manifest_key(name);
        let Some(bytes) = self.read(&key).await? else {
            return Ok(None);
        };
        let parsed = self.parse(&bytes).map(Some);
        parsed.map_err(|reason| anyhow!("the manifest {key} is damaged: {reason}"))
    }

    pub(super) async fn read_manifest(&self, name: &str) -> Result<Option<CacheConfig>, Unread> {
        self.read_manifest_at(&self.config.manifest_key(name)).await
    }

    /// The bytes of the manifest called `name`, as they are; `None` if there is none.
    ///
    /// # Errors
    /// The store's, or it is not JSON.
    pub async fn manifest_bytes(&self, name: &str) -> Result<Option<Bytes>> {
        let key = self.config.manifest_key(name);
        Ok(store::read_whole(&self.store, &key, DOCUMENT_LIMIT, check_json).await?)
    }

    /// The manifest at `key`, wherever that is.
    pub(super) async fn read_manifest_at(&self, key: &str) -> Result<Option<CacheConfig>, Unread> {
        let Some(bytes) = self.read(key).await? else {
            return Ok(None);
        };
        let parsed = self.parse(&bytes).map(Some);
        parsed.map_err(|reason| Unread::Invalid(Unreadable::damaged(reason)))
    }

    async fn read(&self, key: &str) -> StoreResult<Option<Bytes>> {
        store::read_whole(&self.store, key, DOCUMENT_LIMIT, check_json).await
    }

    fn parse(&self, bytes: &[u8]) -> Result<CacheConfig, String> {
        // The error quotes what the bucket holds.
        CacheConfig::parse_s3(bytes).map_err(|error| self.store.outside(&format!("{error:#}")))
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

impl From<StoreError> for Unread {
    fn from(error: StoreError) -> Self {
        match error.kind {
            Kind::Unavailable | Kind::NoBucket | Kind::NotS3 | Kind::Missing => {
                Unread::Store(error)
            }
            kind => Unread::Invalid(Unreadable {
                reason: error.message,
                damaged: matches!(kind, Kind::Nonsense | Kind::WrongSize { .. }),
            }),
        }
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
