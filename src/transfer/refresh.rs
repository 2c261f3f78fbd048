//! Refreshing an object: its LastModified moves to now, so that lifecycle rules leave it alone.

use std::time::{Duration, SystemTime};

use futures::stream::StreamExt;

use crate::cache::digest::Digest;
use crate::progress::Verb;
use crate::store::{Kind, ObjectInfo, Part, StoreError};
use crate::transfer::limits::ranges;
use crate::transfer::upload::Uploader;

/// Parts of one object copied at once.
const COPIES: usize = 8;

/// What became of an object that was to be refreshed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refreshed {
    /// It is young.
    Done,
    /// It is not there any more.
    Gone,
    /// The store could not copy it onto itself: only an upload makes it young.
    Refused,
}

/// Whether an object is due for a refresh. An unknown age counts as old. With touch_refresh=0s
/// everything is old, even an object of this very second.
pub fn is_due(info: &ObjectInfo, touch_refresh: Duration, now: SystemTime) -> bool {
    let age = info
        .last_modified
        .map(|then| now.duration_since(then).unwrap_or_default());
    touch_refresh.is_zero() || age.is_none_or(|age| age > touch_refresh)
}

impl Uploader {
    /// Refreshes the object at `key` by copying it onto itself. Whatever the store answers is no error:
    /// the object is there and only its age is at stake.
    pub async fn refresh(&self, key: &str, digest: &Digest, info: &ObjectInfo) -> Refreshed {
        let blob = self.progress.blob(Verb::Refresh, digest, info.size);
        let touched = if info.size <= self.limits.copy {
            self.store.touch(key, info).await
        } else {
            self.copy_parts(key, info).await
        };
        let refreshed = match touched {
            Ok(true) => Refreshed::Done,
            Ok(false) => Refreshed::Gone,
            // Google and Storj have no UploadPartCopy, some gateways no CopyObject, and a role may be
            // allowed to write but not to copy.
            Err(error) => {
                self.progress
                    .debug(&format!("{digest}: cannot copy it onto itself: {error}"));
                Refreshed::Refused
            }
        };
        blob.advance(info.size);
        blob.done();
        refreshed
    }

    /// Whether the object is there.
    async fn copy_parts(&self, key: &str, info: &ObjectInfo) -> Result<bool, StoreError> {
        let abandoned = self.abandoned(key, info.size).await;
        let upload = self.create(key, Some(info)).await?;
        let copied = self.copy_each_part(key, &upload, info).await;
        match copied {
            Ok(()) => {
                self.unfinished.remove(key, &upload);
                self.abort_superseded(key, &abandoned, &upload).await;
                Ok(true)
            }
            Err(error) => {
                self.abort(key, &upload).await;
                match error.kind {
                    // Someone has just replaced it.
                    Kind::Changed => Ok(true),
                    // It is gone, or another run refreshed it and aborted this upload.
                    _ if error.kind == Kind::NoSuchUpload || error.status == Some(404) => {
                        Ok(self.store.head(key).await?.is_some())
                    }
                    _ => Err(error),
                }
            }
        }
    }

    async fn copy_each_part(
        &self,
        key: &str,
        upload: &str,
        info: &ObjectInfo,
    ) -> Result<(), StoreError> {
        let part = self.limits.copy_part_size(info.size);
        let mut copies = futures::stream::iter((1u32..).zip(ranges(info.size, part)))
            .map(|(number, range)| async move {
                let size = range.end - range.start;
                let etag = info.etag.as_deref();
                let etag = self
                    .store
                    .copy_part(key, upload, number, range, etag)
                    .await?;
                Ok::<_, StoreError>(Part { number, size, etag })
            })
            .buffered(COPIES);
        let mut parts = Vec::new();
        while let Some(part) = copies.next().await {
            parts.push(part?);
        }
        self.store.complete_upload(key, upload, &parts).await
    }
}
