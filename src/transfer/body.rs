//! Where the bytes of an upload come from, and the request bodies made of them.

use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use async_trait::async_trait;
use bytes::Bytes;
use futures::channel::mpsc;
use futures::future::{FutureExt, Shared};
use futures::stream::{BoxStream, Peekable, Stream, StreamExt, TryStreamExt};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::cache::digest::{Digest, Hasher};
use crate::progress::Blob;
use crate::quote::printable;
use crate::store::{ByteStream, UploadBody};
use crate::transfer::buffers::{BUFFER, Buffers, Outlet, Room};
use crate::transfer::hashing::{Feed, Hashing, read_into};
use crate::transfer::pace::Gate;

/// Where a blob comes from: a file, an object in another store, a stream that arrives.
#[async_trait]
pub trait Source: Send + Sync {
    fn digest(&self) -> Digest;

    /// Bytes of the whole blob.
    fn size(&self) -> u64;

    /// Reads exactly `range`, hashes it after what `hasher` has seen, and passes it on to `outlet`.
    ///
    /// # Errors
    /// The source cannot be read, or ends early.
    async fn read(
        &self,
        range: Range<u64>,
        hasher: Hasher,
        hashing: &Hashing,
        outlet: Outlet,
    ) -> Result<Hasher>;

    /// The error of a source whose bytes hash to `found` rather than to its digest.
    fn damaged(&self, found: Digest) -> anyhow::Error;

    /// Whether any range can be read again later, while others are read.
    fn can_be_read_again(&self) -> bool;
}

/// What every upload of a run reads with.
#[derive(Clone)]
pub struct Means {
    /// For parts, each of which has room as a whole before its request is opened.
    pub buffers: Buffers,
    /// For bodies that are read a chunk at a time: a request that is open cannot wait until a whole
    /// part has found room, because the store would close it.
    pub streams: Buffers,
    pub hashing: Hashing,
    /// Bounds the parts in flight.
    pub(super) gate: Arc<Gate>,
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

    /// Each chunk is passed on as soon as it is hashed, while it is in the CPU's cache.
    async fn read(
        &self,
        range: Range<u64>,
        hasher: Hasher,
        hashing: &Hashing,
        outlet: Outlet,
    ) -> Result<Hasher> {
        let reading = Reading {
            file: Arc::clone(&self.file),
            digest: self.digest,
            rest: range,
            chunk: Bytes::new(),
            outlet,
        };
        let (hasher, _) = hashing.run(hasher, reading).await?;
        Ok(hasher)
    }

    fn damaged(&self, found: Digest) -> anyhow::Error {
        anyhow!(
            "{} is damaged: its bytes hash to {found}; remove it, and build or import it again",
            printable(&self.path.display().to_string())
        )
    }

    fn can_be_read_again(&self) -> bool {
        true
    }
}

/// Hashes filled chunks after what `hasher` has seen, and passes them on.
pub(super) async fn hash_and_pass(
    chunks: Vec<Bytes>,
    hasher: Hasher,
    hashing: &Hashing,
    outlet: &Outlet,
) -> Result<Hasher> {
    let (chunks, hasher) = hashing.run_filled(hasher, chunks).await?;
    for chunk in chunks {
        outlet.pass(chunk);
    }
    Ok(hasher)
}

/// A range of a file on its way to an outlet.
struct Reading {
    file: Arc<File>,
    digest: Digest,
    rest: Range<u64>,
    /// What has been read last, and is being hashed.
    chunk: Bytes,
    outlet: Outlet,
}

impl Feed for Reading {
    fn advance(&mut self) -> Result<bool> {
        let hashed = std::mem::take(&mut self.chunk);
        if !hashed.is_empty() {
            self.outlet.pass(hashed);
        }
        let missing = self.rest.end - self.rest.start;
        if missing == 0 {
            return Ok(false);
        }
        let digest = self.digest;
        let wanted = missing.min(BUFFER);
        let mut chunk = self.outlet.take(wanted as usize);
        let read = read_into(&mut chunk, &self.file, self.rest.start, wanted)
            .with_context(|| format!("reading blob {digest} of the layout"))?;
        if read < wanted {
            bail!(
                "blob {digest} of the layout shrank while it was read: {} bytes are missing",
                missing - read
            );
        }
        self.rest.start += read;
        self.chunk = self.outlet.lend(chunk);
        Ok(true)
    }

    fn bytes(&self) -> &[u8] {
        &self.chunk
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

/// The bytes of one body, counted as they are sent. A new try takes them back from progress.
#[derive(Clone)]
struct Count {
    blob: Arc<Blob>,
    gate: Arc<Gate>,
    /// Bytes of the latest try.
    sent: Arc<Mutex<u64>>,
}

impl Count {
    fn new(blob: &Arc<Blob>, means: &Means) -> Self {
        Count {
            blob: Arc::clone(blob),
            gate: Arc::clone(&means.gate),
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
        self.gate.moved(bytes);
    }
}

/// A blob sent in one request. It is hashed while it is sent; a store that does not check
/// x-amz-content-sha256 never sees a damaged blob whole either.
pub struct WholeBlob {
    source: Arc<dyn Source>,
    means: Means,
    /// For the first chunk of the first try.
    first: Mutex<Option<Room>>,
    count: Count,
}

impl WholeBlob {
    /// Waits for the room that its first chunk needs.
    pub async fn new(source: Arc<dyn Source>, means: Means, blob: &Arc<Blob>) -> Self {
        let first = means.streams.room(source.size().min(BUFFER)).await;
        WholeBlob {
            source,
            count: Count::new(blob, &means),
            means,
            first: Mutex::new(Some(first)),
        }
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
        let source = Arc::clone(&self.source);
        let (digest, size) = (source.digest(), source.size());
        let chunks = chunks(
            Arc::clone(&source),
            self.means.clone(),
            0..size,
            Hasher::default(),
            self.first.lock().take(),
        );
        let chunks = verified(chunks, digest, size, move |found| source.damaged(found));
        counted(request_body(chunks), self.count.clone())
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

/// The chunks of `range` of `source`, each with the hasher that has seen it after what `hasher` had.
/// An empty range is one empty chunk. There may be room for the `first` one already.
fn chunks(
    source: Arc<dyn Source>,
    means: Means,
    range: Range<u64>,
    hasher: Hasher,
    first: Option<Room>,
) -> impl Stream<Item = Result<(Bytes, Hasher)>> + Send {
    futures::stream::try_unfold(Some((range, hasher, first)), move |rest| {
        let (source, means) = (Arc::clone(&source), means.clone());
        async move {
            let Some((range, hasher, room)) = rest else {
                return Ok(None);
            };
            let end = range.end.min(range.start + BUFFER);
            let room = match room {
                Some(room) => room,
                None => means.streams.room(end - range.start).await,
            };
            let (outlet, mut passed) = means.streams.outlet(room);
            let reading = source.read(range.start..end, hasher, &means.hashing, outlet);
            let hasher = reading.await?;
            let bytes = passed.next().await.unwrap_or_default();
            let rest = (end < range.end).then(|| (end..range.end, hasher.clone(), None));
            Ok(Some(((bytes, hasher), rest)))
        }
    })
}

/// A part of a blob while it is read.
pub struct PartRead {
    pub range: Range<u64>,
    /// Has seen what comes before it.
    before: Hasher,
    after: After,
    /// What has been passed on and not been taken.
    passed: Peekable<mpsc::UnboundedReceiver<Bytes>>,
}

/// The digest of a blob up to a part's end, once the part has been read.
type After = Shared<oneshot::Receiver<Digest>>;

impl PartRead {
    /// The part whose chunks come from `passed`. Whoever reads it sends the digest of the blob up to its
    /// end, or drops the sender and reports why it cannot be read.
    pub fn new(
        range: Range<u64>,
        before: Hasher,
        passed: mpsc::UnboundedReceiver<Bytes>,
    ) -> (PartRead, oneshot::Sender<Digest>) {
        let (hashed, after) = oneshot::channel();
        let part = PartRead {
            range,
            before,
            after: after.shared(),
            passed: passed.peekable(),
        };
        (part, hashed)
    }

    /// Waits for the first chunk: many parts may be read before this one, and a store closes a request
    /// in which nothing moves. Never returns if the part cannot be read.
    pub async fn begun(&mut self) {
        if Pin::new(&mut self.passed).peek().await.is_none() {
            std::future::pending::<()>().await;
        }
    }

    /// Its chunks. The stream never ends if the part cannot be read: an error here would hide the reader's.
    pub fn chunks(self) -> BoxStream<'static, Bytes> {
        let after = self.after;
        let end = async move {
            if after.await.is_err() {
                std::future::pending::<()>().await;
            }
            None
        };
        let end = futures::stream::once(end).filter_map(std::future::ready);
        self.passed.chain(end).boxed()
    }
}

/// A part of a blob. What is read for the digest is sent, and forgotten chunk by chunk. If it has to be
/// sent again, it is read again: its last chunk passes only if the blob up to its end hashes as before.
pub struct PartBody {
    source: Arc<dyn Source>,
    means: Means,
    range: Range<u64>,
    before: Hasher,
    after: After,
    chunks: Mutex<Chunks>,
    count: Count,
}

enum Chunks {
    /// Streamed to the first try. `None`: it has begun, and a retry reads the source again.
    Passed(Option<BoxStream<'static, Bytes>>),
    /// The whole part, kept for retries.
    Kept(Vec<Bytes>),
}

impl PartBody {
    /// A part of `source`. If the source cannot be read again, waits until all of the part is there.
    pub async fn new(
        source: Arc<dyn Source>,
        means: Means,
        part: PartRead,
        blob: &Arc<Blob>,
    ) -> Self {
        let range = part.range.clone();
        let (before, after) = (part.before.clone(), part.after.clone());
        let chunks = match source.can_be_read_again() {
            true => Chunks::Passed(Some(part.chunks())),
            false => Chunks::Kept(part.chunks().collect().await),
        };
        PartBody {
            source,
            count: Count::new(blob, &means),
            means,
            range,
            before,
            after,
            chunks: Mutex::new(chunks),
        }
    }

    /// The part once more, from the source.
    fn again(&self) -> BoxStream<'static, Result<Bytes>> {
        let digest = self.source.digest();
        let changed = move |_| anyhow!("blob {digest} changed while it was sent");
        let (source, means) = (Arc::clone(&self.source), self.means.clone());
        let chunks = chunks(source, means, self.range.clone(), self.before.clone(), None);
        let (length, after) = (self.len(), self.after.clone());
        let verified = async move {
            let after = after.await.context("a part was never read to its end")?;
            anyhow::Ok(verified(chunks, after, length, changed))
        };
        futures::stream::once(verified).try_flatten().boxed()
    }
}

impl UploadBody for PartBody {
    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn sha256(&self) -> Option<Digest> {
        None
    }

    fn open(&self) -> ByteStream {
        self.count.restart();
        let chunks = match &mut *self.chunks.lock() {
            Chunks::Passed(passed) => match passed.take() {
                Some(passed) => passed.map(Ok).boxed(),
                None => request_body(self.again()),
            },
            Chunks::Kept(chunks) => futures::stream::iter(chunks.clone()).map(Ok).boxed(),
        };
        counted(chunks, self.count.clone())
    }
}

/// `chunks` as the body of a request: one read ahead, with the source's errors as I/O errors.
fn request_body(chunks: BoxStream<'static, Result<Bytes>>) -> ByteStream {
    let failed = |error| {
        let text = format!("{error:#}");
        std::io::Error::new(std::io::ErrorKind::InvalidData, text)
    };
    read_ahead(chunks.map(move |chunk| chunk.map_err(failed)))
}

/// `chunks`, each counted when it is passed on.
fn counted(chunks: ByteStream, count: Count) -> ByteStream {
    let count_sent = move |chunk: &std::io::Result<Bytes>| {
        if let Ok(bytes) = chunk {
            count.add(bytes.len() as u64);
        }
    };
    chunks.inspect(count_sent).boxed()
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
    use crate::progress::{Display, Progress, Verb};

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

    fn means() -> Means {
        Means {
            buffers: Buffers::new(1 << 20),
            streams: Buffers::new(1 << 20),
            hashing: Hashing::on_every_core(),
            gate: Arc::new(Gate::new(1)),
        }
    }

    /// What a part passes on: its bytes, and the error that ended it.
    async fn send(part: &PartBody) -> (Vec<u8>, Option<String>) {
        all(part.open()).await
    }

    async fn all(mut stream: ByteStream) -> (Vec<u8>, Option<String>) {
        let mut sent = Vec::new();
        while let Some(chunk) = stream.next().await {
            match chunk {
                Ok(bytes) => sent.extend_from_slice(&bytes),
                Err(error) => return (sent, Some(error.to_string())),
            }
        }
        (sent, None)
    }

    #[tokio::test]
    async fn a_part_that_is_sent_again_is_read_again_and_must_hash_as_before() {
        let bytes: Vec<u8> = (0..1 << 20).map(|at: u32| (at >> 7) as u8).collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("blob");
        std::fs::write(&path, &bytes).unwrap();
        let digest = Digest::of(&bytes);
        let file = File::open(&path).unwrap();
        let source = FileSource::new(file, path.clone(), digest, bytes.len() as u64);
        let source: Arc<dyn Source> = Arc::new(source);
        let means = means();
        let progress = Progress::new(Display::Quiet, 0);
        let blob = progress.blob(Verb::Upload, &digest, bytes.len() as u64);

        let (start, end) = (100_000, 900_000);
        let mut before = Hasher::default();
        before.update(&bytes[..start as usize]);
        let room = means.buffers.room(end - start).await;
        let (outlet, passed) = means.buffers.outlet(room);
        let (read, hashed) = PartRead::new(start..end, before.clone(), passed);
        let part = PartBody::new(Arc::clone(&source), means.clone(), read, &blob).await;
        // A first try that breaks off before the part has been read to its end.
        drop(part.open());
        let mut early = part.open();
        assert!(futures::poll!(early.next()).is_pending());
        let reading = source.read(start..end, before, &means.hashing, outlet);
        hashed.send(reading.await.unwrap().digest()).unwrap();

        let range = start as usize..end as usize;
        assert_eq!(all(early).await, (bytes[range.clone()].to_vec(), None));
        assert_eq!(send(&part).await, (bytes[range.clone()].to_vec(), None));
        // Nothing of it is in memory any more.
        drop(means.buffers.room(1 << 20).await);
        assert_eq!(send(&part).await, (bytes[range.clone()].to_vec(), None));

        let mut changed = bytes.clone();
        changed[start as usize] ^= 1;
        std::fs::write(&path, &changed).unwrap();
        let (sent, error) = send(&part).await;
        assert!(sent.len() < range.len());
        let expected = format!("blob {digest} changed while it was sent");
        assert_eq!(error, Some(expected));
        // What follows it is none of its business.
        let mut changed = bytes.clone();
        changed[range.end] ^= 1;
        std::fs::write(&path, &changed).unwrap();
        assert_eq!(send(&part).await, (bytes[range].to_vec(), None));
    }

    #[tokio::test]
    async fn a_part_that_is_not_read_to_its_end_has_no_error_of_its_own() {
        let bytes = [7; 1000];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("blob");
        std::fs::write(&path, bytes).unwrap();
        let digest = Digest::of(&bytes);
        let file = File::open(&path).unwrap();
        // As if 500 bytes had been cut off.
        let source: Arc<dyn Source> = Arc::new(FileSource::new(file, path, digest, 1500));
        let means = means();
        let progress = Progress::new(Display::Quiet, 0);
        let blob = progress.blob(Verb::Upload, &digest, 1500);
        let (outlet, passed) = means.buffers.outlet(means.buffers.room(1500).await);
        let (read, hashed) = PartRead::new(0..1500, Hasher::default(), passed);
        let part = PartBody::new(Arc::clone(&source), means.clone(), read, &blob).await;
        let reading = source.read(0..1500, Hasher::default(), &means.hashing, outlet);
        let error = reading.await.err().unwrap().to_string();
        assert!(error.ends_with("500 bytes are missing"), "{error}");
        let wait = std::time::Duration::from_millis(100);
        let sent = tokio::time::timeout(wait, send(&part)).await;
        assert!(sent.is_err(), "{sent:?}");
        drop(hashed);
    }

    #[tokio::test]
    async fn a_blob_that_is_sent_whole_waits_for_no_part() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("blob");
        std::fs::write(&path, b"abcd").unwrap();
        let file = File::open(&path).unwrap();
        let source = FileSource::new(file, path, Digest::of(b"abcd"), 4);
        let means = means();
        let _parts = means.buffers.room(1 << 20).await;
        let progress = Progress::new(Display::Quiet, 0);
        let blob = progress.blob(Verb::Upload, &Digest::of(b"abcd"), 4);
        let body = WholeBlob::new(Arc::new(source), means, &blob).await;
        for _ in 0..2 {
            let sent: Vec<_> = body.open().map(|chunk| chunk.unwrap()).collect().await;
            assert_eq!(sent.concat(), b"abcd");
        }
    }

    #[tokio::test]
    async fn a_blob_that_is_too_long_does_not_pass_whole() {
        let passed = pass(&[b"ab", b"cde"], Digest::of(b"abcd"), 4).await;
        assert_eq!(passed[0], Ok("ab".into()));
        assert!(passed[1].is_err());
    }
}
