//! A blob uploaded in parts, which continues an upload that an earlier run left if there is one.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Result, bail};
use bytes::Bytes;
use futures::stream::{FuturesUnordered, StreamExt};
use md5::{Digest as _, Md5};
use tokio::sync::{OnceCell, watch};

use crate::blocking::blocking;
use crate::cache::digest::Hasher;
use crate::progress::Blob;
use crate::store::{Kind, Part, StoreError};
use crate::transfer::body::{PartBody, PartRead, Source};
use crate::transfer::limits::ranges;
use crate::transfer::pace::Place;
use crate::transfer::unfinished::Leftover;
use crate::transfer::upload::Uploader;

/// How often an upload starts over when another run takes its multipart upload away.
const RESTARTS: u32 = 5;

/// How a multipart upload failed.
enum Failed {
    /// Another run completed or aborted it.
    Gone,
    /// It holds parts that we cannot recognise: of other bytes, or on a store whose ETags are not an
    /// MD5 (encryption with KMS keys). To send them again could spoil the upload for a run that is
    /// working on it now.
    Untrusted,
    /// Another run has sent its parts again, and the store gave them other ETags.
    Spoiled(StoreError),
    Other(anyhow::Error),
}

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        Failed::Other(error)
    }
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        match error.kind {
            Kind::NoSuchUpload => Failed::Gone,
            _ => Failed::Other(error.into()),
        }
    }
}

impl Uploader {
    pub(super) async fn upload_parts(
        &self,
        key: &str,
        source: Arc<dyn Source>,
        blob: &Arc<Blob>,
    ) -> Result<()> {
        let size = source.size();
        let leftovers = OnceCell::new();
        let mut spoiled = None;
        for attempt in 0..RESTARTS {
            let attempt = Attempt {
                uploader: self,
                key,
                source: &source,
                blob,
                leftovers: &leftovers,
                may_resume: attempt == 0,
                target: OnceCell::new(),
            };
            let sent = attempt.send_parts().await;
            let leftovers = leftovers.get().into_iter().flatten();
            match (sent, attempt.target.get()) {
                (Ok(()), Some(Target { upload, .. })) => {
                    self.unfinished.remove(key, upload);
                    self.abort_superseded(key, leftovers, upload).await;
                    return Ok(());
                }
                (Err(Failed::Other(error)), target) => {
                    if let Some(Target { upload, .. }) = target {
                        self.abort(key, upload).await;
                    }
                    return Err(error);
                }
                (Err(Failed::Untrusted), Some(Target { upload, .. })) => {
                    self.unfinished.remove(key, upload);
                }
                (
                    Err(failed @ (Failed::Gone | Failed::Spoiled(_))),
                    Some(Target { upload, .. }),
                ) => {
                    if let Failed::Spoiled(error) = failed {
                        spoiled = Some(error);
                    }
                    // Even if the store says it is gone: some gateways answer 404 to other failures.
                    self.abort(key, upload).await;
                    // The key is the digest, so whoever completed the object had the same bytes.
                    let found = self.store.head(key).await?;
                    if found.is_some_and(|info| info.size == size) {
                        self.abort_superseded(key, leftovers, upload).await;
                        return Ok(());
                    }
                }
                (_, None) => {}
            }
        }
        if let Some(error) = spoiled {
            return Err(error.into());
        }
        bail!(
            "other runs took the multipart upload of {key} away {RESTARTS} times: try again when they have finished"
        );
    }
}

/// One attempt to send a blob in parts.
struct Attempt<'a> {
    uploader: &'a Uploader,
    key: &'a str,
    source: &'a Arc<dyn Source>,
    blob: &'a Arc<Blob>,
    /// What earlier runs left, once it has been looked for.
    leftovers: &'a OnceCell<Vec<Leftover>>,
    may_resume: bool,
    /// Found or created while the first parts are read.
    target: OnceCell<Target>,
}

/// A multipart upload.
struct Target {
    /// Its id.
    upload: String,
    /// By number, the parts that it held before and that have not been recognised yet.
    unchecked: watch::Sender<BTreeMap<u32, Part>>,
}

impl Attempt<'_> {
    /// Sends every part that the upload does not hold yet, and completes it if the digest matches.
    async fn send_parts(&self) -> Result<(), Failed> {
        let Uploader { limits, means, .. } = self.uploader;
        let size = self.source.size();
        let mut hasher = Hasher::default();
        let mut sending = Sending::default();
        for (number, range) in (1u32..).zip(ranges(size, limits.part_size(size))) {
            let entering = async {
                let place = means.gate.enter().await;
                (place, means.buffers.room(range.end - range.start).await)
            };
            let (place, room) = sending.during(entering).await?;
            let (outlet, passed) = means.buffers.outlet(room);
            let (part, hashed) = PartRead::new(range.clone(), hasher.clone(), passed);
            sending.under_way.push(self.send_part(number, part, place));
            let reading = self.source.read(range, hasher, &means.hashing, outlet);
            hasher = sending.during(reading).await??;
            let _ = hashed.send(hasher.digest());
        }
        let mut parts = sending.rest().await?;
        let found = hasher.digest();
        if found != self.source.digest() {
            return Err(self.source.damaged(found).into());
        }
        parts.sort_by_key(|part| part.number);
        let Target { upload, .. } = self.target().await?;
        let store = &self.uploader.store;
        let completed = store.complete_upload(self.key, upload, &parts).await;
        completed.map_err(|error| match error.code.as_deref() {
            Some("InvalidPart") => Failed::Spoiled(error),
            _ => error.into(),
        })
    }

    /// Sends a part, unless the upload holds it already. Its place is free again then.
    async fn send_part(
        &self,
        number: u32,
        mut part: PartRead,
        _place: Place<'_>,
    ) -> Result<Part, Failed> {
        let size = part.range.end - part.range.start;
        let Target { upload, unchecked } = self.target().await?;
        let held = unchecked.borrow().get(&number).cloned();
        if let Some(held) = held {
            // The store's part is good if its ETag is the MD5 of these bytes.
            let chunks: Vec<_> = part.chunks().collect().await;
            let md5 = blocking(move || Ok(md5_hex(&chunks))).await?;
            if held.size != size || held.etag.trim_matches('"') != md5 {
                return Err(Failed::Untrusted);
            }
            unchecked.send_modify(|parts| drop(parts.remove(&number)));
            self.blob.resumed(size);
            return Ok(held);
        }
        // Nothing is sent to an upload whose parts before this one cannot be recognised.
        let are_known = |parts: &BTreeMap<u32, Part>| parts.range(..number).next().is_none();
        let _ = unchecked.subscribe().wait_for(are_known).await;
        part.begun().await;
        let (source, means) = (Arc::clone(self.source), self.uploader.means.clone());
        let body = Arc::new(PartBody::new(source, means, part, self.blob).await);
        let store = &self.uploader.store;
        let etag = store.upload_part(self.key, upload, number, body).await?;
        Ok(Part { number, size, etag })
    }

    async fn target(&self) -> Result<&Target, Failed> {
        self.target.get_or_try_init(|| self.find_target()).await
    }

    async fn find_target(&self) -> Result<Target, Failed> {
        let (key, size) = (self.key, self.source.size());
        let Uploader {
            limits, unfinished, ..
        } = self.uploader;
        let looking = || self.uploader.leftovers(key, size);
        let leftovers = self.leftovers.get_or_init(looking).await;
        let mut resumable = leftovers
            .iter()
            .filter(|found| self.may_resume && limits.cut(size, &found.parts));
        if let Some(Leftover { upload, parts }) = resumable.next() {
            unfinished.add(key, upload);
            let numbered = parts.iter().map(|part| (part.number, part.clone()));
            let (digest, count) = (self.source.digest(), parts.len());
            self.uploader
                .progress
                .debug(&format!("{digest}: resuming an upload with {count} parts"));
            return Ok(Target {
                upload: upload.clone(),
                unchecked: watch::Sender::new(numbered.collect()),
            });
        }
        let created = self.uploader.create(key, None).await;
        Ok(Target {
            upload: created.map_err(anyhow::Error::from)?,
            unchecked: watch::Sender::default(),
        })
    }
}

/// The parts of a blob that are being sent, and those that the store has.
struct Sending<F> {
    under_way: FuturesUnordered<F>,
    sent: Vec<Part>,
}

impl<F> Default for Sending<F> {
    fn default() -> Self {
        Sending {
            under_way: FuturesUnordered::new(),
            sent: Vec::new(),
        }
    }
}

impl<F: Future<Output = Result<Part, Failed>>> Sending<F> {
    /// Does `work` while parts are sent: as they finish, they free what it may wait for.
    async fn during<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Failed> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                Some(part) = self.under_way.next() => self.sent.push(part?),
            }
        }
    }

    /// Sends the rest. Returns all parts, in the order in which they arrived.
    async fn rest(mut self) -> Result<Vec<Part>, Failed> {
        while let Some(part) = self.under_way.next().await {
            self.sent.push(part?);
        }
        Ok(self.sent)
    }
}

fn md5_hex(chunks: &[Bytes]) -> String {
    let mut hasher = Md5::new();
    for chunk in chunks {
        hasher.update(chunk);
    }
    let bytes = hasher.finalize();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
