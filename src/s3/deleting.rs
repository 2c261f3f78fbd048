//! Deleting objects: in one request, or one by one if the store does not support that.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use futures::stream::{StreamExt, TryStreamExt};
use rusoto_s3::{Delete, DeleteObjectRequest, DeleteObjectsRequest, ObjectIdentifier, S3};
use xml::escape::escape_str_pcdata;

use super::S3Store;
use super::call::{Call, Expect, Failure};
use super::response::Refusal;
use crate::store::{Kind, StoreError, StoreResult};

const DOING: &str = "deleting";
/// Single deletes in flight at once.
const AT_ONCE: usize = 16;

impl S3Store {
    pub(super) async fn delete_objects(
        &self,
        keys: &[String],
    ) -> StoreResult<Vec<StoreResult<()>>> {
        if keys.len() > 1 && keys.iter().all(|key| fits_xml(key)) {
            match self.delete_batch(keys, None).await {
                Err(e) if e.kind == Kind::Unsupported => {}
                done => return done,
            }
        }
        let singly = futures::stream::iter(keys.to_vec()).map(|key| async move {
            match self.delete_object(&key).await {
                // The other keys would fail the same way.
                Err(e) if matches!(e.kind, Kind::Unavailable | Kind::NotS3 | Kind::NoBucket) => {
                    Err(e)
                }
                done => Ok(done),
            }
        });
        singly.buffered(AT_ONCE).try_collect().await
    }

    pub(super) async fn delete_unchanged_objects(
        &self,
        objects: &[(String, String)],
    ) -> StoreResult<Vec<StoreResult<()>>> {
        let keys: Vec<String> = objects.iter().map(|(key, _)| key.clone()).collect();
        let plain = &self.remote.plain_deletes;
        let etags = objects.iter().map(|(_, etag)| etag.as_str());
        if plain.load(Ordering::Relaxed) || !keys.iter().all(|key| fits_xml(key)) {
            return self.delete_objects(&keys).await;
        }
        match self
            .delete_batch(&keys, Some(&etags.collect::<Vec<_>>()))
            .await
        {
            // A store without conditional deletes.
            Err(e) if e.refuses_document() => {
                plain.store(true, Ordering::Relaxed);
                self.delete_objects(&keys).await
            }
            done => done,
        }
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

    /// One DeleteObjects, with the Content-MD5 that MinIO and others insist on. With `etags`, an object
    /// that has another one stays.
    async fn delete_batch(
        &self,
        keys: &[String],
        etags: Option<&[&str]>,
    ) -> StoreResult<Vec<StoreResult<()>>> {
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
        let mut call =
            Call::new("deleting objects in", None, Expect::Listing("DeleteResult")).slow();
        if let Some(etags) = etags {
            // rusoto's request has no field for ETags.
            call = call.with_payload(conditional(keys, etags));
        }
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
            Some(Some(refusal)) if refusal.code.as_deref() == Some("PreconditionFailed") => {
                Err(StoreError {
                    kind: Kind::Changed,
                    status: Some(412),
                    code: refusal.code,
                    message: format!("{key} is no longer the same object"),
                    located: true,
                })
            }
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

/// XML cannot carry control characters.
fn fits_xml(key: &str) -> bool {
    !key.contains(char::is_control)
}

/// The payload of a DeleteObjects that compares ETags.
fn conditional(keys: &[String], etags: &[&str]) -> String {
    let mut xml = String::from("<Delete xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">");
    for (key, etag) in keys.iter().zip(etags) {
        let (key, etag) = (escape_str_pcdata(key), escape_str_pcdata(etag));
        xml += &format!("<Object><Key>{key}</Key><ETag>{etag}</ETag></Object>");
    }
    xml + "</Delete>"
}
