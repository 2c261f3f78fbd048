//! Copying an object on the server, so that its bytes do not travel: from another place at the same
//! endpoint, or onto itself.

use futures::stream::StreamExt;

use crate::cache::digest::Digest;
use crate::progress::Verb;
use crate::store::{Kind, ObjectInfo, Part, StoreError};
use crate::transfer::limits::ranges;
use crate::transfer::upload::Uploader;

/// Parts of one object copied at once.
const COPIES: usize = 8;

impl Uploader {
    /// Copies the object `from` (bucket and key, at the store's endpoint) to `key`. `Ok(false)`: it is
    /// not there.
    ///
    /// # Errors
    /// The store's; [`Kind::Changed`] if the object is no longer the one that `info` describes.
    pub async fn copy(
        &self,
        from: (&str, &str),
        key: &str,
        digest: &Digest,
        info: &ObjectInfo,
    ) -> Result<bool, StoreError> {
        let blob = self.progress.blob(Verb::Copy, digest, info.size);
        let copied = if info.size <= self.limits.copy {
            self.store.copy(from, key, info).await?
        } else {
            self.copy_parts(Some(from), key, info).await?
        };
        if copied {
            blob.advance(info.size);
            blob.done();
        }
        Ok(copied)
    }

    /// Copies in parts. `Ok(false)`: there is nothing at `key` afterwards, because nothing was at `from`.
    pub(super) async fn copy_parts(
        &self,
        from: Option<(&str, &str)>,
        key: &str,
        info: &ObjectInfo,
    ) -> Result<bool, StoreError> {
        let leftovers = self.leftovers(key, info.size).await;
        let upload = self.create(key, Some(info)).await?;
        let copied = self.copy_each_part(from, key, &upload, info).await;
        match copied {
            Ok(()) => {
                self.unfinished.remove(key, &upload);
                self.abort_superseded(key, &leftovers, &upload).await;
                Ok(true)
            }
            Err(error) => {
                self.abort(key, &upload).await;
                // The source is gone, or another run completed the object and aborted this upload.
                let gone = error.kind == Kind::NoSuchUpload || error.status == Some(404);
                if !gone || matches!(error.kind, Kind::Changed | Kind::NoBucket) {
                    return Err(error);
                }
                let found = self.store.head(key).await?;
                Ok(found.is_some_and(|found| found.size == info.size))
            }
        }
    }

    async fn copy_each_part(
        &self,
        from: Option<(&str, &str)>,
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
                    .copy_part(from, key, upload, number, range, etag)
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
