//! One blob's way from the store into the layout: fetched in pieces that arrive side by side, hashed
//! and written in order, resumed where it broke off, named only once it is verified.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use futures::future::{FusedFuture, FutureExt};
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{Notify, Semaphore, mpsc};

use crate::cache::digest::Digest;
use crate::layout::{Layout, Stage, Staged};
use crate::progress::{Activity, Blob, Progress};
use crate::store::{self, Expected, Kind, Store, StoreError};
use crate::transfer::buffers::{Buffers, Room};
use crate::transfer::hashing::{Feed, FileFeed, Hasher, Hashing};
use crate::transfer::upload::{Limits, blocking};

/// Pieces of one blob in flight.
const WINDOW: usize = 20;

/// The least of them, however many blobs are in flight.
const LEAST: usize = 3;

/// Bytes of a blob that are hashed and written at a time, if so many have come.
const BATCH: u64 = 256 << 10;

/// Bytes of a piece in memory once its turn has come, those that are being written included.
const AHEAD: u64 = 2 * BATCH;

/// Bytes of a connection's read buffer, which a piece has room for beside its own.
const READ: u64 = 64 << 10;

/// Staging files opened at once: more would be as many threads, for an instant.
const STAGINGS: usize = 4;

/// Times a blob whose bytes are wrong is fetched again.
const REFETCHES: u32 = 2;

/// How a blob was found on the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fetched {
    /// Fetched, and `bytes` came over the network for it.
    Whole { bytes: u64 },
    /// Not on the store.
    Missing,
}

/// Fetches blobs into one layout.
pub struct Downloader {
    store: Arc<dyn Store>,
    layout: Layout,
    buffers: Buffers,
    hashing: Hashing,
    progress: Progress,
    verified: mpsc::Sender<Staged>,
    replace: bool,
    limits: Limits,
    /// Bounds the threads that open staging files.
    staging: Arc<Semaphore>,
    /// Blobs of several pieces in flight.
    active: AtomicUsize,
    /// The store ignores ranges: each blob is fetched in one stream.
    in_one_stream: AtomicBool,
}

impl Downloader {
    /// Verified blobs are handed to `verified`, for [`publish`] to name them. With `replace`, a blob
    /// that is there already is replaced unless its bytes are good.
    pub fn new(
        store: Arc<dyn Store>,
        layout: Layout,
        buffers: Buffers,
        progress: Progress,
        verified: mpsc::Sender<Staged>,
        replace: bool,
        limits: Limits,
    ) -> Self {
        Downloader {
            store,
            layout,
            buffers,
            hashing: Hashing::on_every_core(),
            progress,
            verified,
            replace,
            limits,
            staging: Arc::new(Semaphore::new(STAGINGS)),
            active: AtomicUsize::new(0),
            in_one_stream: AtomicBool::new(false),
        }
    }

    /// Fetches a blob that the layout lacks.
    pub async fn fetch(&self, key: &str, digest: Digest, size: u64) -> Result<Fetched> {
        let (layout, replace) = (self.layout.clone(), self.replace);
        // Given back by whoever has to wait for another process, so that others need not wait too.
        let mut turn = Arc::clone(&self.staging).acquire_owned().await.ok();
        let waiting = move || drop(turn.take());
        let stage = move || match replace {
            true => layout.stage_replacement(&digest, size, waiting),
            false => layout.stage(&digest, size, waiting),
        };
        let staged = match blocking(stage).await? {
            Stage::Present => return Ok(Fetched::Whole { bytes: 0 }),
            Stage::Staged(staged) => staged,
        };
        let blob = self.progress.blob(Activity::Download, &digest, size);
        let mut receiver = Receiver::take_up(staged, size, &self.hashing, &blob).await?;
        let fetched = self.fetch_verified(key, &mut receiver, &blob).await;
        let Ok(Some(bytes)) = fetched else {
            let (layout, staged) = (self.layout.clone(), receiver.staged);
            blocking(move || {
                layout.discard_empty(staged);
                Ok(())
            })
            .await?;
            return fetched.map(|_| Fetched::Missing);
        };
        blob.done();
        self.verified
            .send(receiver.staged)
            .await
            .ok()
            .context("the task that names blobs has ended")?;
        Ok(Fetched::Whole { bytes })
    }

    /// Fetches until `receiver` holds the blob, and says how many bytes that took; `None` if the
    /// object is not there.
    async fn fetch_verified(
        &self,
        key: &str,
        receiver: &mut Receiver,
        blob: &Arc<Blob>,
    ) -> Result<Option<u64>> {
        let digest = receiver.staged.digest;
        let mut taken_up = receiver.at > 0;
        let mut refetched = 0;
        let mut bytes = 0;
        loop {
            let one = self.in_one_stream.load(Ordering::Relaxed);
            let piece = if one { u64::MAX } else { self.limits.piece };
            match self
                .fetch_rest(key, piece, receiver, blob, &mut bytes)
                .await
            {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(error) if !one && ignores_ranges(&error) => {
                    self.in_one_stream.store(true, Ordering::Relaxed);
                    continue;
                }
                Err(error) => return Err(error),
            }
            let found = receiver.hasher.digest();
            if found == digest {
                return Ok(Some(bytes));
            }
            // What an earlier run left may be at fault, or the network.
            if !taken_up && refetched == REFETCHES {
                // Nothing good is in it: the next run is to begin at its start.
                receiver.begin_again(blob).await?;
                bail!(
                    "blob {key} on s3 is damaged: its bytes hash to {found}; delete the object and export it again"
                );
            }
            refetched += u32::from(!taken_up);
            taken_up = false;
            self.progress
                .note(&format!("{digest}: its bytes are wrong, fetching it again"));
            receiver.begin_again(blob).await?;
        }
    }

    /// Fetches everything from where `receiver` is, in pieces of `piece` bytes; `false` if the object is not there.
    async fn fetch_rest(
        &self,
        key: &str,
        piece: u64,
        receiver: &mut Receiver,
        blob: &Arc<Blob>,
        bytes: &mut u64,
    ) -> Result<bool> {
        let (from, size) = (receiver.at, receiver.size);
        if from == size && size > 0 {
            return Ok(true);
        }
        // Not collected: a size that is a lie can make them very many. An empty blob is asked for all
        // the same: it may not be there.
        let count = (size - from).div_ceil(piece).max(1);
        let mut ranges = (0..count).map(|nth| {
            let start = from + nth * piece;
            start..size.min(start.saturating_add(piece))
        });
        let active = (count > 1).then(|| Active::new(&self.active));
        let mut fetching = FuturesUnordered::new();
        // Those that are not written yet, in order.
        let mut pieces: VecDeque<Arc<Piece>> = VecDeque::new();
        let mut writing = futures::future::Fuse::terminated();
        let mut outcome = Ok(true);
        loop {
            while outcome.as_ref().is_ok_and(|there| *there)
                && pieces.len() < active.as_ref().map_or(1, Active::share)
                && let Some(range) = ranges.next()
            {
                let piece = Arc::new(Piece::new(range, pieces.is_empty()));
                pieces.push_back(Arc::clone(&piece));
                fetching.push(async move {
                    let fetched = self.fetch_piece(key, &piece, size, blob).await;
                    piece.end(matches!(fetched, Ok(Some(_))));
                    fetched
                });
            }
            if writing.is_terminated()
                && let Some(first) = pieces.front()
            {
                match first.take() {
                    Taken::Chunks(chunks) => {
                        let written = receiver.write(chunks);
                        let written = self.hashing.run(receiver.hasher.clone(), written);
                        writing = written.boxed().fuse();
                    }
                    Taken::End => {
                        pieces.pop_front();
                        if let Some(next) = pieces.front() {
                            next.begin_turn();
                        }
                        continue;
                    }
                    // What comes after it has no place.
                    Taken::Break => {
                        fetching.clear();
                        pieces.clear();
                    }
                    Taken::TooLittle => {}
                }
            }
            let came = async {
                match pieces.front() {
                    Some(first) => first.came.notified().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                written = &mut writing, if !writing.is_terminated() => {
                    receiver.accept(written?);
                    if let Some(first) = pieces.front() {
                        first.written();
                    }
                }
                Some(fetched) = fetching.next() => match fetched {
                    Ok(Some(length)) => *bytes += length,
                    // What comes before it is written all the same, for the next run to take up.
                    ended => outcome = outcome.and(ended.map(|_| false)),
                },
                () = came, if !pieces.is_empty() && !fetching.is_empty() => {}
                else => return outcome,
            }
        }
    }

    /// Fetches one piece. Returns its bytes; `None` if the object is not there.
    async fn fetch_piece(
        &self,
        key: &str,
        piece: &Piece,
        size: u64,
        blob: &Arc<Blob>,
    ) -> Result<Option<u64>> {
        let range = piece.range.clone();
        let length = range.end - range.start;
        // A piece whose turn has not come may have to wait as a whole.
        let most = if piece.has_turn() { AHEAD } else { length };
        piece.settle(self.buffers.room(length.min(most) + READ).await);
        let expected = Expected {
            size: Some(size),
            content_addressed: true,
        };
        let object = match store::read(&self.store, key, Some(range), expected).await {
            Ok(Some(object)) => object,
            Ok(None) => return Ok(None),
            Err(error) => return Err(damaged(key, size, error)),
        };
        let mut body = object.body;
        while let Some(chunk) = body.next().await {
            match chunk {
                Ok(chunk) => {
                    blob.advance(chunk.len() as u64);
                    piece.add(chunk).await;
                }
                Err(error) if error.kind == Kind::Missing => return Ok(None),
                Err(error) => return Err(damaged(key, size, error)),
            }
        }
        Ok(Some(length))
    }
}

fn ignores_ranges(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<StoreError>();
    error.is_some_and(|error| error.kind == Kind::NoRanges)
}

fn damaged(key: &str, size: u64, error: StoreError) -> anyhow::Error {
    match error.kind {
        Kind::WrongSize { found } => anyhow!(
            "blob {key} on s3 is damaged: it has {found} bytes where the manifest says {size}; delete the object and export it again"
        ),
        _ => error.into(),
    }
}

/// A blob of several pieces that is being fetched, counted among those of its run.
struct Active<'a>(&'a AtomicUsize);

impl<'a> Active<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Active(count)
    }

    /// Pieces that it may have in flight: all for one, but few each for many, lest the blobs be
    /// fetched (and hashed, which no two cores can share for one blob) one after the other.
    fn share(&self) -> usize {
        (WINDOW / self.0.load(Ordering::Relaxed).max(1)).max(LEAST)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A range of a blob on its way into memory, and from there into the blob's file. Its turn has come
/// when all before it has been written: from then on it is written while it comes.
struct Piece {
    range: Range<u64>,
    waiting: Mutex<Waiting>,
    /// There is more to write.
    came: Notify,
    /// There is room for more.
    went: Notify,
}

/// What has come of a piece and has not been written.
#[derive(Default)]
struct Waiting {
    chunks: Vec<Bytes>,
    bytes: u64,
    /// Bytes that were taken and are not yet out of memory.
    taken: u64,
    has_turn: bool,
    /// Nothing more comes; and whether all has.
    ended: Option<bool>,
    room: Option<Room>,
}

/// What [`Piece::take`] found.
enum Taken {
    Chunks(Vec<Bytes>),
    /// All of the piece has been taken.
    End,
    /// All that has come has been taken, and the rest does not come.
    Break,
    /// Less than is worth a turn of the hashing threads.
    TooLittle,
}

impl Piece {
    fn new(range: Range<u64>, has_turn: bool) -> Self {
        Piece {
            range,
            waiting: Mutex::new(Waiting {
                has_turn,
                ..Waiting::default()
            }),
            came: Notify::new(),
            went: Notify::new(),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_turn(&self) -> bool {
        self.waiting().has_turn
    }

    fn begin_turn(&self) {
        self.waiting().has_turn = true;
    }

    /// Takes over the room that it was given.
    fn settle(&self, room: Room) {
        self.waiting().room = Some(room);
    }

    /// Adds what has come; then waits until it is worth going on.
    async fn add(&self, chunk: Bytes) {
        {
            let mut waiting = self.waiting();
            waiting.bytes += chunk.len() as u64;
            waiting.chunks.push(chunk);
            if waiting.has_turn && waiting.bytes >= BATCH {
                self.came.notify_one();
            }
        }
        while self.is_full() {
            self.went.notified().await;
        }
    }

    fn is_full(&self) -> bool {
        let waiting = self.waiting();
        waiting.has_turn && waiting.taken + waiting.bytes >= AHEAD
    }

    fn end(&self, whole: bool) {
        self.waiting().ended.get_or_insert(whole);
        self.came.notify_one();
    }

    fn take(&self) -> Taken {
        let mut waiting = self.waiting();
        match waiting.ended {
            Some(true) if waiting.bytes == 0 => return Taken::End,
            Some(false) if waiting.bytes == 0 => return Taken::Break,
            None if waiting.bytes < BATCH => return Taken::TooLittle,
            _ => {}
        }
        waiting.taken = std::mem::take(&mut waiting.bytes);
        Taken::Chunks(std::mem::take(&mut waiting.chunks))
    }

    /// What was taken is out of memory: the room for it is given back, but for what may still come
    /// before the next turn.
    fn written(&self) {
        self.went.notify_one();
        let mut waiting = self.waiting();
        waiting.taken = 0;
        let needed = waiting.bytes.max(AHEAD) + READ;
        if let Some(room) = &mut waiting.room {
            room.shrink(needed);
        }
    }
}

/// Chunks on their way into the blob's file, at its end.
struct Writing {
    file: Arc<File>,
    digest: Digest,
    chunks: std::vec::IntoIter<Bytes>,
    current: Bytes,
    length: u64,
}

impl Feed for Writing {
    fn advance(&mut self) -> Result<bool> {
        self.current = match self.chunks.next() {
            Some(chunk) => chunk,
            None => return Ok(false),
        };
        self.length += self.current.len() as u64;
        let written = (&*self.file).write_all(&self.current);
        written.with_context(|| format!("writing blob {} into the layout", self.digest))?;
        Ok(true)
    }

    fn bytes(&self) -> &[u8] {
        &self.current
    }
}

/// The file that a blob grows in, and the digest of what it holds.
struct Receiver {
    staged: Staged,
    size: u64,
    at: u64,
    hasher: Hasher,
}

impl Receiver {
    /// Hashes what an earlier run left.
    async fn take_up(
        staged: Staged,
        size: u64,
        hashing: &Hashing,
        blob: &Arc<Blob>,
    ) -> Result<Self> {
        let mut receiver = Receiver {
            at: staged.have,
            staged,
            size,
            hasher: Hasher::default(),
        };
        if receiver.at > 0 {
            let digest = receiver.staged.digest;
            let left = FileFeed::new(Arc::clone(&receiver.staged.file), 0..receiver.at);
            let reading = || format!("reading what there is of blob {digest}");
            (receiver.hasher, _) = hashing
                .run(Hasher::default(), left)
                .await
                .with_context(reading)?;
            blob.advance(receiver.at);
        }
        Ok(receiver)
    }

    /// Puts `chunks` behind what is there.
    fn write(&self, chunks: Vec<Bytes>) -> Writing {
        Writing {
            file: Arc::clone(&self.staged.file),
            digest: self.staged.digest,
            chunks: chunks.into_iter(),
            current: Bytes::new(),
            length: 0,
        }
    }

    /// `write` has come to its end.
    fn accept(&mut self, (hasher, written): (Hasher, Writing)) {
        self.hasher = hasher;
        self.at += written.length;
    }

    async fn begin_again(&mut self, blob: &Arc<Blob>) -> Result<()> {
        blob.take_back(self.at);
        self.staged.restart()?;
        self.at = 0;
        self.hasher = Hasher::default();
        Ok(())
    }
}

/// Names verified blobs as they come, however many have gathered at once: that shares the cost of
/// syncing. Ends when every sender is gone.
pub async fn publish(layout: Layout, mut verified: mpsc::Receiver<Staged>) -> Result<()> {
    let mut batch = Vec::new();
    while verified.recv_many(&mut batch, 256).await > 0 {
        let (layout, staged) = (layout.clone(), std::mem::take(&mut batch));
        blocking(move || layout.publish(staged)).await?;
    }
    Ok(())
}
