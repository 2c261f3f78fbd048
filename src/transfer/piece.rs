//! A blob as a sequence of pieces that are fetched side by side and taken in order.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::Result;
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{FuturesUnordered, StreamExt};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use crate::progress::Blob;
use crate::store::{self, Expected, Kind, StoreError};
use crate::transfer::buffers::Room;
use crate::transfer::download::{Damaged, Downloader};

/// The fewest pieces of one blob in flight, however many blobs are.
const LEAST: usize = 3;

/// Bytes of a blob that are taken at a time, once that many have arrived.
const BATCH: u64 = 256 << 10;

/// Bytes of the first piece in memory, those taken and not yet written included.
const AHEAD: u64 = 2 * BATCH;

/// Bytes of a connection's read buffer, which a piece has room for beside its own.
const READ: u64 = 256 << 10;

/// What [`Pieces::next`] found.
pub(super) enum Next {
    /// The bytes that come next.
    Chunks(Vec<Bytes>),
    /// Too little has arrived: call [`Pieces::drive`].
    Wait,
    /// Nothing more comes. `false`: the object is not there.
    End(Result<bool>),
}

/// A range of a blob on its way.
pub(super) struct Pieces<'a> {
    downloader: &'a Downloader,
    key: &'a str,
    size: u64,
    blob: &'a Arc<Blob>,
    /// Those not begun yet. Not collected: a size that is a lie could make them very many.
    ranges: Box<dyn Iterator<Item = Range<u64>> + Send + 'a>,
    /// Counts this blob among those in flight if it has several pieces.
    active: Option<Active<'a>>,
    /// Pieces in flight at most.
    most: usize,
    fetching: FuturesUnordered<BoxFuture<'a, Result<Option<u64>>>>,
    /// Those not taken whole yet, in order.
    waiting: VecDeque<Arc<Piece>>,
    outcome: Result<bool>,
    /// Bytes that came over the network.
    fetched: u64,
}

impl<'a> Pieces<'a> {
    /// The bytes of `range` of the blob at `key`, which has `size` bytes, in pieces of `piece` bytes.
    pub(super) fn new(
        downloader: &'a Downloader,
        key: &'a str,
        range: Range<u64>,
        size: u64,
        piece: u64,
        blob: &'a Arc<Blob>,
    ) -> Self {
        // An empty blob is requested all the same: it may not be there.
        let count = (range.end - range.start).div_ceil(piece).max(1);
        let ranges = (0..count).map(move |nth| {
            let start = range.start + nth * piece;
            start..range.end.min(start.saturating_add(piece))
        });
        Pieces {
            downloader,
            key,
            size,
            blob,
            ranges: Box::new(ranges),
            active: (count > 1).then(|| Active::new(downloader)),
            most: usize::MAX,
            fetching: FuturesUnordered::new(),
            waiting: VecDeque::new(),
            outcome: Ok(true),
            fetched: 0,
        }
    }

    /// Bounds the pieces in flight, beside this blob's share.
    pub(super) fn at_most(&mut self, pieces: usize) {
        self.most = pieces;
    }

    /// Bytes that came over the network.
    pub(super) fn fetched(&self) -> u64 {
        self.fetched
    }

    /// Takes what has arrived of the bytes that come next. After [`Next::Chunks`], call
    /// [`written`](Self::written) once they are out of memory.
    pub(super) fn next(&mut self) -> Next {
        self.begin_more();
        while let Some(first) = self.waiting.front() {
            match first.take() {
                Taken::Chunks(chunks) => return Next::Chunks(chunks),
                Taken::TooLittle => return Next::Wait,
                Taken::End => {
                    self.waiting.pop_front();
                    if let Some(next) = self.waiting.front() {
                        next.begin_turn();
                    }
                    self.begin_more();
                }
                // What comes after the gap is useless.
                Taken::Break => {
                    self.fetching.clear();
                    self.waiting.clear();
                }
            }
        }
        Next::End(std::mem::replace(&mut self.outcome, Ok(true)))
    }

    /// The chunks taken last are out of memory.
    pub(super) fn written(&mut self) {
        if let Some(first) = self.waiting.front() {
            first.written();
        }
    }

    /// Makes progress until [`next`](Self::next) may have something. Can be cancelled. Never returns
    /// while there is nothing to wait for.
    pub(super) async fn drive(&mut self) {
        let Some(first) = self.waiting.front().cloned() else {
            return std::future::pending().await;
        };
        loop {
            tokio::select! {
                () = first.came.notified() => return,
                Some(fetched) = self.fetching.next() => {
                    match fetched {
                        Ok(Some(length)) => self.fetched += length,
                        // What comes before it is taken all the same: a later run resumes behind it.
                        Ok(None) => self.fail(Ok(false)),
                        Err(error) => self.fail(Err(error)),
                    }
                    self.begin_more();
                }
            }
        }
    }

    /// The first failure counts.
    fn fail(&mut self, outcome: Result<bool>) {
        if matches!(self.outcome, Ok(true)) {
            self.outcome = outcome;
        }
    }

    /// Begins as many pieces as this blob's share allows.
    fn begin_more(&mut self) {
        let share = self.active.as_ref().map_or(1, Active::share);
        let share = share.min(self.most);
        while matches!(self.outcome, Ok(true))
            && self.waiting.len() < share
            && let Some(range) = self.ranges.next()
        {
            let piece = Arc::new(Piece::new(range, self.waiting.is_empty()));
            self.waiting.push_back(Arc::clone(&piece));
            let (downloader, key, size, blob) = (self.downloader, self.key, self.size, self.blob);
            let fetch = async move {
                let fetched = downloader.fetch_piece(key, &piece, size, blob).await;
                piece.end(matches!(fetched, Ok(Some(_))));
                fetched
            };
            self.fetching.push(fetch.boxed());
            if self.waiting.len() >= share {
                self.downloader.gate.note_full();
            }
        }
    }
}

impl Downloader {
    /// Fetches one piece. Returns its bytes; `None` if the object is not there.
    async fn fetch_piece(
        &self,
        key: &str,
        piece: &Piece,
        size: u64,
        blob: &Blob,
    ) -> Result<Option<u64>> {
        let range = piece.range.clone();
        let length = range.end - range.start;
        // A piece whose turn has not come may have to wait in memory whole.
        let most = if piece.has_turn() { AHEAD } else { length };
        piece.settle(self.buffers.room(length.min(most) + length.min(READ)).await);
        let expected = Expected {
            size: Some(size),
            content_addressed: true,
        };
        let Some(mut object) = store::read(&self.store, key, Some(range), expected)
            .await
            .map_err(|error| explain(key, size, error))?
        else {
            return Ok(None);
        };
        while let Some(chunk) = object.body.next().await {
            match chunk {
                Ok(chunk) => {
                    blob.advance(chunk.len() as u64);
                    self.gate.moved(chunk.len() as u64);
                    piece.add(chunk).await;
                }
                Err(error) if error.kind == Kind::Missing => return Ok(None),
                Err(error) => return Err(explain(key, size, error)),
            }
        }
        Ok(Some(length))
    }
}

fn explain(key: &str, size: u64, error: StoreError) -> anyhow::Error {
    match error.kind {
        Kind::WrongSize { found } => Damaged::size(key, found, size).into(),
        _ => error.into(),
    }
}

/// A blob of several pieces that is being fetched, counted among those of its run.
struct Active<'a>(&'a Downloader);

impl<'a> Active<'a> {
    fn new(downloader: &'a Downloader) -> Self {
        downloader.active.fetch_add(1, Ordering::Relaxed);
        Active(downloader)
    }

    /// Pieces that it may have in flight: all for one blob, few for each of many. Otherwise blobs would
    /// be fetched one after another, and hashed so, too: one blob is hashed on one core.
    fn share(&self) -> usize {
        let active = self.0.active.load(Ordering::Relaxed);
        (self.0.gate.limit() / active.max(1)).max(LEAST)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
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
        self.waiting.lock()
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
