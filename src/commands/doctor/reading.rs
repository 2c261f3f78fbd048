//! The cache that a spec names, read as an import would read it, if it is there. Nothing is written.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::TryStreamExt;

use super::checks::Step;
use super::examination::{Subject, Trouble, unused_key};
use crate::bucket::Bucket;
use crate::cache::DOCUMENT_LIMIT;
use crate::store::{Expected, Store, read, read_whole};

/// A range begins like this, and ends before the object does.
const RANGE: std::ops::Range<u64> = 0..1;

pub(super) struct Reading {
    store: Arc<dyn Store>,
    absent: String,
    manifest: String,
    /// Bytes of the manifest, once it was found.
    size: Option<u64>,
}

impl Reading {
    pub(super) fn new(bucket: &Bucket) -> Self {
        let config = bucket.config();
        Reading {
            store: Arc::clone(bucket.store()),
            absent: unused_key(bucket),
            manifest: config.manifest_key(&config.names[0]),
            size: None,
        }
    }

    async fn get_range(&self) -> Result<(), Trouble> {
        let Some(size) = self.size.filter(|size| *size > RANGE.end) else {
            return Err(Trouble::NotTried("there is no cache to read yet"));
        };
        let expected = Expected {
            size: Some(size),
            content_addressed: false,
        };
        // A 404 shows as well that reading is allowed: someone has deleted the manifest since.
        if let Some(object) = read(&self.store, &self.manifest, Some(RANGE), expected).await? {
            drop(object.body.try_collect::<Vec<Bytes>>().await?);
        }
        Ok(())
    }
}

#[async_trait]
impl Subject for Reading {
    /// Without a cache, this tests the permissions alone.
    async fn attempt(&mut self, step: Step) -> Result<(), Trouble> {
        let (store, key) = (&self.store, &self.manifest);
        match step {
            Step::List => drop(store.list(&self.absent, None).await?),
            Step::Absent => drop(store.head(&self.absent).await?),
            Step::Head => self.size = store.head(key).await?.map(|info| info.size),
            Step::Get => drop(read_whole(store, key, DOCUMENT_LIMIT, |_| Ok(())).await?),
            Step::GetRange => self.get_range().await?,
            _ => return Err(Trouble::NotTried("it would write")),
        }
        Ok(())
    }
}
