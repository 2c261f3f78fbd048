//! Deleting objects: in one request, or one by one if the store does not support that.

use std::collections::BTreeMap;

use futures::stream::{StreamExt, TryStreamExt};
use rusoto_s3::{Delete, DeleteObjectRequest, DeleteObjectsRequest, ObjectIdentifier, S3};

use super::S3Store;
use super::call::{Call, Expect, Failure};
use super::response::Refusal;
use crate::store::{Kind, StoreResult};

const DOING: &str = "deleting";
/// Single deletes in flight at once.
const AT_ONCE: usize = 16;

impl S3Store {
    pub(super) async fn delete_objects(
        &self,
        keys: &[String],
    ) -> StoreResult<Vec<StoreResult<()>>> {
        // XML cannot carry control characters.
        let fits = |key: &String| !key.contains(char::is_control);
        if keys.len() > 1 && keys.iter().all(fits) {
            match self.delete_batch(keys).await {
                Err(e) if e.kind == Kind::Unsupported => {}
                done => return done,
            }
        }
        let singly = futures::stream::iter(keys.to_vec()).map(|key| async move {
            match self.delete_object(&key).await {
                // The other keys would fail alike.
                Err(e) if matches!(e.kind, Kind::Unavailable | Kind::NotS3 | Kind::NoBucket) => {
                    Err(e)
                }
                done => Ok(done),
            }
        });
        singly.buffered(AT_ONCE).try_collect().await
    }

    async fn delete_object(&self, key: &str) -> StoreResult<()> {
        let request = DeleteObjectRequest {
            bucket: self.bucket(),
            key: key.to_owned(),
            ..Default::default()
        };
        let call = Call::new(DOING, Some(key), Expect::Nothing);
        let sent = self.run(
            call,
            |client| async move { client.delete_object(request).await },
        );
        match sent.await {
            Ok(_) => Ok(()),
            Err(e) => self.absent(e, DOING, key).await,
        }
    }

    /// One DeleteObjects; rusoto adds the Content-MD5 that MinIO and others insist on.
    async fn delete_batch(&self, keys: &[String]) -> StoreResult<Vec<StoreResult<()>>> {
        let objects = keys.iter().map(|key| ObjectIdentifier {
            key: key.clone(),
            version_id: None,
        });
        let request = DeleteObjectsRequest {
            bucket: self.bucket(),
            delete: Delete {
                objects: objects.collect(),
                quiet: None,
            },
            ..Default::default()
        };
        let call = Call::new(DOING, None, Expect::Listing("DeleteResult")).slow();
        let sent = self.run(call, |client| async move {
            client.delete_objects(request).await
        });
        let done = sent.await?;
        let mut told: BTreeMap<String, Option<Refusal>> = BTreeMap::new();
        for deleted in done.deleted.unwrap_or_default() {
            told.extend(deleted.key.map(|key| (key, None)));
        }
        let outside = |text: String| self.remote.secrets.outside(&text);
        for error in done.errors.unwrap_or_default() {
            let refusal = Refusal {
                status: 200,
                code: error.code.map(outside),
                message: error.message.map(outside),
                ..Refusal::default()
            };
            told.extend(error.key.map(|key| (key, Some(refusal))));
        }
        let results = keys.iter().map(|key| match told.remove(key) {
            Some(None) => Ok(()),
            Some(Some(refusal)) if refusal.is_absence() => Ok(()),
            Some(Some(refusal)) => {
                let call = Call::new(DOING, Some(key), Expect::Nothing);
                let failure = Failure::refused(&self.remote, &call, refusal);
                Err(failure.into_error(&self.remote, &call, None))
            }
            None => Err(self.lacks(DOING, Some(key), "nothing about this key")),
        });
        Ok(results.collect())
    }
}
