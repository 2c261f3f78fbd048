//! A blob uploaded in parts, which continues an upload that an earlier run left if there is one.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Result, bail};
use futures::stream::{FuturesUnordered, StreamExt};
use md5::{Digest as _, Md5};

use crate::blocking::blocking;
use crate::cache::digest::Hasher;
use crate::progress::Blob;
use crate::store::{Kind, Part, StoreError};
use crate::transfer::body::{PartBody, Source};
use crate::transfer::limits::ranges;
use crate::transfer::unfinished::Abandoned;
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
        let (digest, size) = (source.digest(), source.size());
        let abandoned = self.abandoned(key, size).await;
        let mut resumable = abandoned
            .iter()
            .find(|found| self.limits.cut(size, &found.parts));
        let mut spoiled = None;
        for _ in 0..RESTARTS {
            let (upload, held) = match resumable.take() {
                Some(Abandoned { upload, parts }) => {
                    self.unfinished.add(key, upload);
                    let count = parts.len();
                    self.progress
                        .debug(&format!("{digest}: resuming an upload with {count} parts"));
                    (upload.clone(), parts.clone())
                }
                None => (self.create(key, None).await?, Vec::new()),
            };
            match self.send_parts(key, &upload, &source, held, blob).await {
                Ok(()) => {
                    self.unfinished.remove(key, &upload);
                    self.abort_superseded(key, &abandoned, &upload).await;
                    return Ok(());
                }
                Err(Failed::Other(error)) => {
                    self.abort(key, &upload).await;
                    return Err(error);
                }
                Err(Failed::Untrusted) => self.unfinished.remove(key, &upload),
                Err(failed @ (Failed::Gone | Failed::Spoiled(_))) => {
                    if let Failed::Spoiled(error) = failed {
                        spoiled = Some(error);
                    }
                    // Even if the store says it is gone: some gateways answer 404 to other failures.
                    self.abort(key, &upload).await;
                    // The key is the digest, so whoever completed the object had the same bytes.
                    let found = self.store.head(key).await?;
                    if found.is_some_and(|info| info.size == size) {
                        self.abort_superseded(key, &abandoned, &upload).await;
                        return Ok(());
                    }
                }
            }
        }
        if let Some(error) = spoiled {
            return Err(error.into());
        }
        bail!(
            "other runs took the multipart upload of {key} away {RESTARTS} times: try again when they have finished"
        );
    }

    /// Sends every part that the upload does not hold yet, and completes it if the digest matches.
    async fn send_parts(
        &self,
        key: &str,
        upload: &str,
        source: &Arc<dyn Source>,
        held: Vec<Part>,
        blob: &Arc<Blob>,
    ) -> Result<(), Failed> {
        let held: BTreeMap<u32, Part> = held.into_iter().map(|part| (part.number, part)).collect();
        let part_size = self.limits.part_size(source.size());
        let mut hasher = Hasher::default();
        let mut sending = FuturesUnordered::new();
        let mut parts = Vec::new();
        for (number, range) in (1u32..).zip(ranges(source.size(), part_size)) {
            let size = range.end - range.start;
            let known = held.get(&number).cloned();
            let before = hasher.clone();
            let read = source.read(range.clone(), hasher, &self.means);
            let prepare = async {
                let place = self.means.gate.enter().await;
                let room = self.means.buffers.room(size).await;
                let (chunks, hasher) = read.await?;
                let Some(part) = known else {
                    return Ok((place, room, chunks, hasher, None));
                };
                // The store's part is good if its ETag is the MD5 of these bytes.
                let (chunks, known) = blocking(move || {
                    let same = part.size == size && part.etag.trim_matches('"') == md5_hex(&chunks);
                    Ok((chunks, same.then_some(part)))
                })
                .await?;
                anyhow::Ok((place, room, chunks, hasher, Some(known)))
            };
            tokio::pin!(prepare);
            // Parts are sent meanwhile: as they finish, they free what this one waits for.
            let (place, room, chunks, hashed, known) = loop {
                tokio::select! {
                    biased;
                    prepared = &mut prepare => break prepared?,
                    Some(part) = sending.next(), if !sending.is_empty() => parts.push(part?),
                }
            };
            hasher = hashed;
            if let Some(part) = known {
                let part = part.ok_or(Failed::Untrusted)?;
                blob.resumed(size);
                parts.push(part);
                continue;
            }
            let chunks = self.means.buffers.lend(chunks, room).collect();
            let (source, means) = (Arc::clone(source), self.means.clone());
            let hashes = (before, hasher.digest());
            let body = PartBody::new(source, means, range, hashes, chunks, blob);
            sending.push(async move {
                let body = Arc::new(body);
                let etag = self.store.upload_part(key, upload, number, body).await?;
                drop(place);
                Ok::<_, StoreError>(Part { number, size, etag })
            });
        }
        while let Some(part) = sending.next().await {
            parts.push(part?);
        }
        let found = hasher.digest();
        if found != source.digest() {
            return Err(source.damaged(found).into());
        }
        parts.sort_by_key(|part| part.number);
        let completed = self.store.complete_upload(key, upload, &parts).await;
        completed.map_err(|error| match error.code.as_deref() {
            Some("InvalidPart") => Failed::Spoiled(error),
            _ => error.into(),
        })
    }
}

fn md5_hex(chunks: &[Vec<u8>]) -> String {
    let mut hasher = Md5::new();
    for chunk in chunks {
        hasher.update(chunk);
    }
    let bytes = hasher.finalize();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
