//! Where the bytes of an upload come from, and the request bodies made of them.

use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{BoxStream, Stream, StreamExt};
use parking_lot::Mutex;

use crate::cache::digest::{Digest, Hasher};
use crate::progress::Blob;
use crate::quote::printable;
use crate::store::{ByteStream, UploadBody};
use crate::transfer::buffers::{BUFFER, Buffers};
use crate::transfer::hashing::{Feed, Hashing, read_into};

/// Where a blob comes from: a file, an object in another store, a stream that arrives.
#[async_trait]
pub trait Source: Send + Sync {
    fn digest(&self) -> Digest;

    /// Bytes of the whole blob.
    fn size(&self) -> u64;

    /// Reads exactly `range` into buffers and hashes it after what `hasher` has seen.
    ///
    /// # Errors
    /// The source cannot be read, or ends early.
    async fn read(
        &self,
        range: Range<u64>,
        hasher: Hasher,
        means: &Means,
    ) -> Result<(Vec<Vec<u8>>, Hasher)>;

    /// The error of a source whose bytes hash to `found` rather than to its digest.
    fn damaged(&self, found: Digest) -> anyhow::Error;
}

/// What every upload of a run reads with.
#[derive(Clone)]
pub struct Means {
    pub buffers: Buffers,
    pub hashing: Hashing,
}

/// A blob in a local file.
pub struct FileSource {
    file: Arc<File>,
    /// For messages.
    path: PathBuf,
    digest: Digest,
    size: u64,
}

impl FileSource {
    /// The blob in `file`, which is at `path`.
    pub fn new(file: File, path: PathBuf, digest: Digest, size: u64) -> Self {
        FileSource {
            file: Arc::new(file),
            path,
            digest,
            size,
        }
    }
}

#[async_trait]
impl Source for FileSource {
    fn digest(&self) -> Digest {
        self.digest
    }

    fn size(&self) -> u64 {
        self.size
    }

    async fn read(
        &self,
        range: Range<u64>,
        hasher: Hasher,
        means: &Means,
    ) -> Result<(Vec<Vec<u8>>, Hasher)> {
        let reading = Reading {
            file: Arc::clone(&self.file),
            digest: self.digest,
            rest: range,
            buffers: means.buffers.clone(),
            chunks: Vec::new(),
        };
        let (hasher, read) = means.hashing.run(hasher, reading).await?;
        Ok((read.chunks, hasher))
    }

    fn damaged(&self, found: Digest) -> anyhow::Error {
        anyhow!(
            "{} is damaged: its bytes hash to {found}; remove it, and build or import it again",
            printable(&self.path.display().to_string())
        )
    }
}

/// A range of a file on its way into buffers.
struct Reading {
    file: Arc<File>,
    digest: Digest,
    rest: Range<u64>,
    buffers: Buffers,
    /// What has been read.
    chunks: Vec<Vec<u8>>,
}

impl Feed for Reading {
    fn advance(&mut self) -> Result<bool> {
        let missing = self.rest.end - self.rest.start;
        if missing == 0 {
            return Ok(false);
        }
        let digest = self.digest;
        let wanted = missing.min(BUFFER);
        let mut chunk = self.buffers.take(wanted as usize);
        let read = read_into(&mut chunk, &self.file, self.rest.start, wanted)
            .with_context(|| format!("reading blob {digest} of the layout"))?;
        if read < wanted {
            bail!(
                "blob {digest} of the layout shrank while it was read: {} bytes are missing",
                missing - read
            );
        }
        self.rest.start += read;
        self.chunks.push(chunk);
        Ok(true)
    }

    fn bytes(&self) -> &[u8] {
        self.chunks.last().map_or(&[], Vec::as_slice)
    }
}

/// Passes chunks of a blob on, and the last one only if the digest matches: whoever receives them
/// never sees a wrong blob whole. Each chunk comes with a hasher that has seen everything up to its
/// end. `damaged` makes the error of a wrong digest.
pub fn verified<'a>(
    chunks: impl Stream<Item = Result<(Bytes, Hasher)>> + Send + 'a,
    digest: Digest,
    size: u64,
    damaged: impl Fn(Digest) -> anyhow::Error + Send + 'a,
) -> BoxStream<'a, Result<Bytes>> {
    let mut passed = 0;
    let check = move |chunk: Result<(Bytes, Hasher)>| {
        let (bytes, hasher) = chunk?;
        passed += bytes.len() as u64;
        if passed >= size {
            let found = hasher.digest();
            if passed > size || found != digest {
                return Err(damaged(found));
            }
        }
        Ok(bytes)
    };
    chunks.map(check).boxed()
}

/// The bytes of one body that progress counts. A new try takes them back.
#[derive(Clone)]
struct Count {
    blob: Arc<Blob>,
    /// Bytes of the latest try.
    sent: Arc<Mutex<u64>>,
}

impl Count {
    fn new(blob: &Arc<Blob>) -> Self {
        Count {
            blob: Arc::clone(blob),
            sent: Arc::default(),
        }
    }

    fn restart(&self) {
        let sent = std::mem::take(&mut *self.sent.lock());
        self.blob.take_back(sent);
    }

    fn add(&self, bytes: u64) {
        *self.sent.lock() += bytes;
        self.blob.advance(bytes);
    }
}

/// A blob sent in one request. It is hashed while it is sent; a store that does not check
/// x-amz-content-sha256 never sees a damaged blob whole either.
#[derive(Clone)]
pub struct WholeBlob {
    source: Arc<dyn Source>,
    means: Means,
    count: Count,
}

impl WholeBlob {
    pub fn new(source: Arc<dyn Source>, means: Means, blob: &Arc<Blob>) -> Self {
        WholeBlob {
            source,
            means,
            count: Count::new(blob),
        }
    }

    /// The chunks of the blob, each with the hasher that has seen it. An empty blob is one empty chunk.
    fn chunks(self) -> impl Stream<Item = Result<(Bytes, Hasher)>> + Send {
        let size = self.source.size();
        let state = Some((self, 0, Hasher::default()));
        futures::stream::try_unfold(state, move |state| async move {
            let Some((body, at, hasher)) = state else {
                return Ok(None);
            };
            let end = size.min(at + BUFFER);
            let room = body.means.buffers.room(end - at).await;
            let (chunks, hasher) = body.source.read(at..end, hasher, &body.means).await?;
            let bytes = body.means.buffers.lend(chunks, &room).next();
            let chunk = (bytes.unwrap_or_default(), hasher.clone());
            let rest = (end < size).then_some((body, end, hasher));
            Ok(Some((chunk, rest)))
        })
    }
}

impl UploadBody for WholeBlob {
    fn len(&self) -> u64 {
        self.source.size()
    }

    fn sha256(&self) -> Option<Digest> {
        Some(self.source.digest())
    }

    fn open(&self) -> ByteStream {
        self.count.restart();
        let (source, count) = (Arc::clone(&self.source), self.count.clone());
        let (digest, size) = (source.digest(), source.size());
        let chunks = verified(self.clone().chunks(), digest, size, move |found| {
            source.damaged(found)
        });
        let chunks = chunks.map(|chunk| {
            chunk.map_err(|error| {
                std::io::Error::new(std::io::ErrorKind::InvalidData, format!("{error:#}"))
            })
        });
        let count_sent = move |chunk: &std::io::Result<Bytes>| {
            if let Ok(bytes) = chunk {
                count.add(bytes.len() as u64);
            }
        };
        read_ahead(chunks).inspect(count_sent).boxed()
    }
}

/// Reads one chunk ahead while the one before it is being sent.
fn read_ahead(
    mut chunks: impl Stream<Item = std::io::Result<Bytes>> + Send + Unpin + 'static,
) -> ByteStream {
    let (sender, mut receiver) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        while let Some(chunk) = chunks.next().await {
            // An empty blob has an empty chunk, which is nothing to send.
            let empty = chunk.as_ref().is_ok_and(Bytes::is_empty);
            if !empty && sender.send(chunk).await.is_err() {
                return;
            }
        }
    });
    futures::stream::poll_fn(move |context| receiver.poll_recv(context)).boxed()
}

/// A part of a blob, in memory.
pub struct PartBody {
    chunks: Vec<Bytes>,
    size: u64,
    count: Count,
}

impl PartBody {
    pub fn new(chunks: Vec<Bytes>, size: u64, blob: &Arc<Blob>) -> Self {
        PartBody {
            chunks,
            size,
            count: Count::new(blob),
        }
    }
}

impl UploadBody for PartBody {
    fn len(&self) -> u64 {
        self.size
    }

    fn sha256(&self) -> Option<Digest> {
        None
    }

    fn open(&self) -> ByteStream {
        self.count.restart();
        let count = self.count.clone();
        futures::stream::iter(self.chunks.clone())
            .map(move |chunk| {
                count.add(chunk.len() as u64);
                Ok(chunk)
            })
            .boxed()
    }
}

/// A small body from memory whose digest is known: a manifest.
pub struct InMemory(pub Bytes);

impl UploadBody for InMemory {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn sha256(&self) -> Option<Digest> {
        Some(Digest::of(&self.0))
    }

    fn open(&self) -> ByteStream {
        let bytes = self.0.clone();
        futures::stream::once(async move { Ok(bytes) }).boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn pass(chunks: &[&[u8]], digest: Digest, size: u64) -> Vec<Result<Bytes, String>> {
        let mut hasher = Hasher::default();
        let chunks: Vec<_> = chunks
            .iter()
            .map(|chunk| {
                hasher.update(chunk);
                Ok((Bytes::copy_from_slice(chunk), hasher.clone()))
            })
            .collect();
        let damaged = |found| anyhow!("hashes to {found}");
        verified(futures::stream::iter(chunks), digest, size, damaged)
            .map(|chunk| chunk.map_err(|error| error.to_string()))
            .collect()
            .await
    }

    #[tokio::test]
    async fn the_last_chunk_passes_only_if_the_digest_matches() {
        let good = Digest::of(b"abcd");
        let passed = pass(&[b"ab", b"cd"], good, 4).await;
        assert_eq!(passed, [Ok("ab".into()), Ok("cd".into())]);
        let passed = pass(&[b"ab", b"ce"], good, 4).await;
        let found = Digest::of(b"abce");
        assert_eq!(passed, [Ok("ab".into()), Err(format!("hashes to {found}"))]);
        let passed = pass(&[b""], Digest::of(b""), 0).await;
        assert_eq!(passed, [Ok("".into())]);
    }

    #[tokio::test]
    async fn a_blob_that_is_too_long_does_not_pass_whole() {
        let passed = pass(&[b"ab", b"cde"], Digest::of(b"abcd"), 4).await;
        assert_eq!(passed[0], Ok("ab".into()));
        assert!(passed[1].is_err());
    }
}
