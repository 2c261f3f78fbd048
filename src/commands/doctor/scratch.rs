//! A scratch object beside the blobs, on which every operation is tried, and of which nothing is left.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::TryStreamExt;

use super::checks::Step;
use super::examination::{Subject, Trouble, unused_key};
use super::is_forbidden;
use crate::bucket::Bucket;
use crate::store::{Expected, Kind, Part, Store, StoreError, StoreResult, read, read_whole};
use crate::transfer::body::InMemory;

/// What the scratch object holds. If it is left behind, it explains itself.
const CONTENT: &str = "layercache doctor wrote this to test the bucket. It can be deleted.\n";

/// The part of it that is read with a range.
const RANGE: std::ops::Range<u64> = 11..17;

/// LastModified counts whole seconds: a copy made this long after the object was written moves it.
const TICK: Duration = Duration::from_millis(1100);

/// The scratch object, and what has been created under its key and must be removed.
pub(super) struct Scratch {
    store: Arc<dyn Store>,
    bucket: String,
    key: String,
    /// It may exist.
    object: bool,
    /// When it was written, if it was.
    written: Option<Instant>,
    /// An upload may have begun whose id we never received.
    creating: bool,
    uploads: BTreeSet<String>,
    /// The part that the one upload has.
    part: Option<Part>,
}

impl Scratch {
    pub(super) fn new(bucket: &Bucket) -> Self {
        Scratch {
            store: Arc::clone(bucket.store()),
            bucket: bucket.config().bucket.clone(),
            key: unused_key(bucket),
            object: false,
            written: None,
            creating: false,
            uploads: BTreeSet::new(),
            part: None,
        }
    }
}

#[async_trait]
impl Subject for Scratch {
    async fn attempt(&mut self, step: Step) -> Result<(), Trouble> {
        match step {
            Step::List => drop(self.store.list(&self.key, None).await?),
            Step::Absent => drop(self.store.head(&self.key).await?),
            Step::Put => self.put().await?,
            Step::Head => self.head().await?,
            Step::Get => self.get().await?,
            Step::GetRange => self.get_range().await?,
            Step::CreateUpload => drop(self.create().await?),
            Step::UploadPart => self.upload_part().await?,
            Step::ListParts => {
                let upload = self.upload()?;
                drop(self.store.list_parts(&self.key, &upload).await?);
            }
            Step::ListUploads => drop(self.store.list_uploads(&self.key).await?),
            Step::Complete => self.complete().await?,
            Step::Abort => self.abort().await?,
            Step::Copy => self.copy().await?,
            Step::Delete => self.delete().await?,
        }
        Ok(())
    }

    async fn remove(&mut self) {
        if self.creating
            && let Ok(uploads) = self.store.list_uploads(&self.key).await
        {
            let ours = uploads.into_iter().filter(|upload| upload.key == self.key);
            self.uploads.extend(ours.map(|upload| upload.id));
            self.creating = false;
        }
        for upload in self.uploads.clone() {
            if self.store.abort_upload(&self.key, &upload).await.is_ok() {
                self.uploads.remove(&upload);
            }
        }
        if self.object {
            // If it fails, that is reported with what is left behind.
            let _ = self.delete().await;
        }
    }

    fn left_behind(&self) -> Vec<String> {
        let address = format!("s3://{}/{}", self.bucket, self.key);
        let mut left = Vec::new();
        if self.object {
            left.push(format!("the object {address}"));
        }
        if self.creating || !self.uploads.is_empty() {
            left.push(format!("a multipart upload of {address}"));
        }
        left
    }
}

impl Scratch {
    async fn put(&mut self) -> StoreResult<()> {
        self.object = true;
        let put = self.store.put(&self.key, content()).await;
        self.wrote(put)
    }

    /// Notes whether the object is there after it was written, in one piece or in parts.
    fn wrote(&mut self, done: StoreResult<()>) -> StoreResult<()> {
        match &done {
            Ok(()) => self.written = Some(Instant::now()),
            // A refused request wrote nothing.
            Err(error) if self.written.is_none() && is_forbidden(error) => self.object = false,
            Err(_) => {}
        }
        done
    }

    /// Without an object, this tests the permission alone.
    async fn head(&self) -> StoreResult<()> {
        match self.store.head(&self.key).await? {
            None if self.written.is_some() => {
                Err(self.lost("not found right after it was written"))
            }
            Some(info) if info.size != CONTENT.len() as u64 => {
                Err(self.lost(&format!("{} bytes instead of {}", info.size, CONTENT.len())))
            }
            _ => Ok(()),
        }
    }

    /// Likewise.
    async fn get(&self) -> StoreResult<()> {
        let check = |bytes: &[u8]| match bytes == CONTENT.as_bytes() {
            true => Ok(()),
            false => Err("other bytes came back than were written".to_owned()),
        };
        let limit = CONTENT.len() as u64;
        let found = read_whole(&self.store, &self.key, limit, check).await?;
        match found {
            None if self.written.is_some() => {
                Err(self.lost("not found right after it was written"))
            }
            _ => Ok(()),
        }
    }

    async fn get_range(&self) -> Result<(), Trouble> {
        if self.written.is_none() {
            return Err(Trouble::NotTried("there is no object to read"));
        }
        let expected = Expected {
            size: Some(CONTENT.len() as u64),
            content_addressed: false,
        };
        let found = read(&self.store, &self.key, Some(RANGE), expected).await?;
        let Some(object) = found else {
            return Err(self.lost("not found right after it was written").into());
        };
        let chunks: Vec<Bytes> = object.body.try_collect().await?;
        let range = RANGE.start as usize..RANGE.end as usize;
        match chunks.concat() == CONTENT.as_bytes()[range] {
            true => Ok(()),
            false => Err(self.lost("other bytes came back than were written").into()),
        }
    }

    async fn create(&mut self) -> StoreResult<String> {
        self.creating = true;
        let created = self.store.create_upload(&self.key, None).await;
        self.creating = self.store.may_hold_unknown_upload(&self.key);
        let upload = created?;
        self.uploads.insert(upload.clone());
        Ok(upload)
    }

    fn upload(&self) -> Result<String, Trouble> {
        let upload = self.uploads.first().cloned();
        upload.ok_or(Trouble::NotTried("there is no multipart upload"))
    }

    async fn upload_part(&mut self) -> Result<(), Trouble> {
        let upload = self.upload()?;
        let etag = self
            .store
            .upload_part(&self.key, &upload, 1, content())
            .await?;
        self.part = Some(Part {
            number: 1,
            size: CONTENT.len() as u64,
            etag,
        });
        Ok(())
    }

    async fn complete(&mut self) -> Result<(), Trouble> {
        let upload = self.upload()?;
        let Some(part) = self.part.take() else {
            return Err(Trouble::NotTried("there is no part"));
        };
        self.object = true;
        let done = self
            .store
            .complete_upload(&self.key, &upload, &[part])
            .await;
        self.wrote(done)?;
        self.uploads.remove(&upload);
        Ok(())
    }

    /// Aborts the upload that could not be completed, or else one of its own.
    async fn abort(&mut self) -> Result<(), Trouble> {
        let upload = match self.uploads.first().cloned() {
            Some(upload) => upload,
            None => match self.create().await {
                Ok(upload) => upload,
                Err(_) => return Err(Trouble::NotTried("there is no multipart upload")),
            },
        };
        self.store.abort_upload(&self.key, &upload).await?;
        self.uploads.remove(&upload);
        Ok(())
    }

    async fn copy(&mut self) -> Result<(), Trouble> {
        let Some(written) = self.written else {
            return Err(Trouble::NotTried("there is no object to copy"));
        };
        let Some(before) = self.store.head(&self.key).await? else {
            return Err(self.lost("not found after it was written").into());
        };
        tokio::time::sleep(TICK.saturating_sub(written.elapsed())).await;
        if !self.store.touch(&self.key, &before).await? {
            return Err(self.lost("not found after it was written").into());
        }
        let after = self.store.head(&self.key).await?;
        let modified = after.and_then(|after| after.last_modified);
        if modified <= before.last_modified {
            let stays = self.lost("the copy succeeded, but LastModified has not moved");
            return Err(stays.into());
        }
        Ok(())
    }

    /// A store allows or refuses to delete whether the object is there or not.
    async fn delete(&mut self) -> StoreResult<()> {
        let key = std::slice::from_ref(&self.key);
        self.store
            .delete(key)
            .await?
            .into_iter()
            .collect::<StoreResult<()>>()?;
        self.object = false;
        Ok(())
    }

    /// The store did not do what it said.
    fn lost(&self, what: &str) -> StoreError {
        StoreError {
            kind: Kind::Nonsense,
            status: None,
            code: None,
            message: format!("{what}: {}", self.key),
            located: false,
        }
    }
}

fn content() -> Arc<InMemory> {
    Arc::new(InMemory(Bytes::from_static(CONTENT.as_bytes())))
}
