//! Refreshing an object: its LastModified moves to now, so that lifecycle rules leave it alone.

use crate::cache::digest::Digest;
use crate::progress::Verb;
use crate::store::{Kind, ObjectInfo};
use crate::transfer::upload::Uploader;

/// The outcome of a refresh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refreshed {
    /// The object is young now.
    Done,
    /// It is not there any more.
    Gone,
    /// The store could not copy the object onto itself: only an upload can make it young.
    Refused,
}

impl Uploader {
    /// Refreshes the object at `key` by copying it onto itself. No answer of the store is an error:
    /// the object exists, and only its age is at stake.
    pub async fn refresh(&self, key: &str, digest: &Digest, info: &ObjectInfo) -> Refreshed {
        let blob = self.progress.blob(Verb::Refresh, digest, info.size);
        let touched = if info.size <= self.limits.copy {
            self.store.touch(key, info).await
        } else {
            self.copy_parts(None, key, info).await
        };
        let refreshed = match touched {
            Ok(true) => Refreshed::Done,
            // Someone has just replaced it.
            Err(error) if error.kind == Kind::Changed => Refreshed::Done,
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
}
