//! Passes a blob on from the store to a taker while it arrives: fetches pieces in parallel, passes
//! them on in order, and hashes them on the way. The last bytes are passed on only if the digest
//! matches.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Result;
use async_trait::async_trait;
use bytes::Bytes;

use crate::cache::digest::{Digest, Hasher};
use crate::progress::Verb;
use crate::transfer::download::{Damaged, Downloader, REFETCHES, ignores_ranges};
use crate::transfer::piece::{Next, Pieces};

/// Pieces in flight for one taker at most.
const WINDOW: usize = 20;

/// A taker that has had no room for this long loses what was fetched ahead for it: others need the
/// memory.
const PATIENCE: Duration = Duration::from_millis(500);

/// The receiver of a blob's bytes.
#[async_trait]
pub trait Taker: Send {
    /// Takes the next bytes once there is room for them. `hashed` has seen everything up to their
    /// end, if the blob is being hashed. `false`: nobody wants them any more.
    async fn take(&mut self, chunks: Vec<Bytes>, hashed: Option<&Hasher>) -> bool;
}

/// Which bytes of a blob are passed on.
pub struct Wanted {
    pub digest: Digest,
    /// Bytes of the whole blob.
    pub size: u64,
    pub range: Range<u64>,
    /// Has seen what comes before `range`, which ends where the blob does. `None`: the bytes are not
    /// verified.
    pub hasher: Option<Hasher>,
}

/// How passing on a blob ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forwarded {
    /// All of it was taken.
    Whole,
    /// The store does not have the blob (any more).
    Missing,
    /// Nobody wanted the rest.
    Unwanted,
}

impl Downloader {
    /// Passes on the wanted bytes of the blob at `key`.
    ///
    /// # Errors
    /// The store's, or [`Damaged`] if the bytes are wrong: the last of them have not been passed on.
    pub async fn forward(
        &self,
        key: &str,
        wanted: Wanted,
        taker: &mut impl Taker,
    ) -> Result<Forwarded> {
        let (start, hasher) = (wanted.range.start, wanted.hasher.clone());
        let mut rest = Rest {
            wanted,
            pieces: WINDOW,
        };
        let mut refetched = 0;
        loop {
            let one_stream = self.one_stream.load(Ordering::Relaxed);
            let piece = match one_stream {
                true => u64::MAX,
                false => self.limits.piece,
            };
            match self.forward_pieces(key, piece, &mut rest, taker).await {
                Ok(Some(forwarded)) => return Ok(forwarded),
                Ok(None) => {}
                Err(error) if !one_stream && ignores_ranges(&error) => {
                    self.one_stream.store(true, Ordering::Relaxed);
                }
                // The network may be at fault, and nobody has seen the bytes yet.
                Err(error)
                    if error.is::<Damaged>()
                        && rest.wanted.range.start == start
                        && refetched < REFETCHES =>
                {
                    refetched += 1;
                    rest.wanted.hasher.clone_from(&hasher);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Passes on pieces from where `rest` begins. `None`: what was fetched ahead has been dropped.
    async fn forward_pieces(
        &self,
        key: &str,
        piece: u64,
        rest: &mut Rest,
        taker: &mut impl Taker,
    ) -> Result<Option<Forwarded>> {
        let Wanted { digest, size, .. } = rest.wanted;
        let range = rest.wanted.range.clone();
        let blob = self
            .progress
            .blob(Verb::Download, &digest, range.end - range.start);
        let mut fetched = Some(Pieces::new(self, key, range, size, piece, &blob));
        let mut since_wait = 0;
        while let Some(pieces) = &mut fetched {
            pieces.at_most(rest.pieces);
            let chunks = match pieces.next() {
                Next::Chunks(chunks) => chunks,
                Next::Wait => {
                    pieces.drive().await;
                    continue;
                }
                Next::End(there) => {
                    return Ok(Some(match there? {
                        true => rest.end(key)?,
                        false => Forwarded::Missing,
                    }));
                }
            };
            let length = chunks.iter().map(|chunk| chunk.len() as u64).sum::<u64>();
            let wants_more = {
                let passing = rest.pass(self, key, chunks, taker);
                let waited = tokio::time::sleep(PATIENCE);
                tokio::pin!(passing, waited);
                let in_time = loop {
                    tokio::select! {
                        biased;
                        passed = &mut passing => break Some(passed?),
                        () = pieces.drive() => {}
                        () = &mut waited => break None,
                    }
                };
                match in_time {
                    Some(wants_more) => wants_more,
                    None => {
                        fetched = None;
                        passing.await?
                    }
                }
            };
            if !wants_more {
                return Ok(Some(Forwarded::Unwanted));
            }
            if let Some(pieces) = &mut fetched {
                pieces.written();
                since_wait += length;
                if since_wait >= self.limits.piece {
                    since_wait = 0;
                    rest.pieces = (rest.pieces + 1).min(WINDOW);
                }
            } else {
                // The last bytes may be the ones that had to wait.
                if rest.wanted.range.is_empty() {
                    return Ok(Some(rest.end(key)?));
                }
                rest.pieces = 1;
            }
        }
        Ok(None)
    }
}

/// What is still to be passed on.
struct Rest {
    wanted: Wanted,
    /// Pieces fetched at once: fewer for a taker that is slow.
    pieces: usize,
}

impl Rest {
    /// Hashes the chunks and passes them on. Whether more is wanted.
    async fn pass(
        &mut self,
        downloader: &Downloader,
        key: &str,
        chunks: Vec<Bytes>,
        taker: &mut impl Taker,
    ) -> Result<bool> {
        let length = chunks.iter().map(|chunk| chunk.len() as u64).sum::<u64>();
        if let Some(hasher) = self.wanted.hasher.take() {
            let (_, hasher) = downloader
                .hashing
                .run_filled(hasher, chunks.clone())
                .await?;
            if self.wanted.range.start + length == self.wanted.size {
                self.check(key, &hasher)?;
            }
            self.wanted.hasher = Some(hasher);
        }
        self.wanted.range.start += length;
        Ok(taker.take(chunks, self.wanted.hasher.as_ref()).await)
    }

    /// Everything has been passed on; an empty blob has nothing to pass on.
    fn end(&self, key: &str) -> Result<Forwarded> {
        if let Some(hasher) = &self.wanted.hasher
            && self.wanted.size == 0
        {
            self.check(key, hasher)?;
        }
        Ok(Forwarded::Whole)
    }

    fn check(&self, key: &str, hasher: &Hasher) -> Result<()> {
        let found = hasher.digest();
        if found != self.wanted.digest {
            return Err(Damaged::bytes(key, found).into());
        }
        Ok(())
    }
}
