//! Downloads a blob from the store into a file: in pieces that arrive in parallel and are written and
//! hashed in order, from where an earlier run stopped.

use std::fs::File;
use std::io::{Seek, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result};
use bytes::Bytes;
use futures::future::{Fuse, FusedFuture, FutureExt};
use futures::stream::StreamExt;

use crate::blocking::blocking;
use crate::cache::digest::{Digest, Hasher};
use crate::process;
use crate::progress::{Blob, Progress};
use crate::store::{self, Expected, Kind, Store, StoreError};
use crate::transfer::buffers::Buffers;
use crate::transfer::hashing::{Feed, FileFeed, Hashing};
use crate::transfer::limits::Limits;
use crate::transfer::pace::Gate;
use crate::transfer::piece::{Next, Pieces};

/// Open files to reserve for each piece in flight: its connection, that connection's replacement, and a
/// share for blobs.
const FILES: usize = 4;

/// Times a blob whose bytes are wrong is fetched again.
pub(super) const REFETCHES: u32 = 2;

/// A file that a blob grows in.
#[derive(Debug, Clone)]
pub struct Growing {
    pub digest: Digest,
    /// Bytes of the whole blob.
    pub size: u64,
    /// Open for reading and writing, positioned at `have`.
    pub file: Arc<File>,
    /// Bytes that are there already, not verified.
    pub have: u64,
}

impl Growing {
    /// Empties the file: nothing good is in it.
    ///
    /// # Errors
    /// The file system's.
    pub fn restart(&mut self) -> Result<()> {
        self.have = 0;
        self.file
            .set_len(0)
            .and_then(|()| (&*self.file).rewind())
            .with_context(|| format!("emptying the file of blob {}", self.digest))
    }
}

/// What came of a download.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fetched {
    /// The file holds the blob, verified; `bytes` came over the network.
    Whole { bytes: u64 },
    /// The store does not have the blob.
    Missing,
    /// The store's object is not the blob.
    Damaged,
}

/// Downloads blobs.
pub struct Downloader {
    pub(super) store: Arc<dyn Store>,
    pub(super) buffers: Buffers,
    pub(super) hashing: Hashing,
    pub(super) progress: Progress,
    pub(super) limits: Limits,
    /// Blobs of several pieces in flight.
    pub(super) active: AtomicUsize,
    /// Bounds their pieces.
    pub(super) gate: Gate,
    /// The store ignores ranges: blobs are fetched in one stream.
    pub(super) one_stream: AtomicBool,
}

impl Downloader {
    pub fn new(store: Arc<dyn Store>, progress: Progress, limits: Limits) -> Self {
        Downloader {
            store,
            // The connections' read buffers come on top.
            buffers: Buffers::new(limits.memory / 2),
            hashing: Hashing::on_every_core(),
            progress,
            limits,
            active: AtomicUsize::new(0),
            gate: Gate::new(process::within_open_files(usize::MAX, FILES)),
            one_stream: AtomicBool::new(false),
        }
    }

    /// Whether the object at `key` is the blob: reads and hashes it, and keeps nothing.
    ///
    /// # Errors
    /// The store's.
    pub async fn verify(&self, key: &str, digest: Digest, size: u64, blob: &Blob) -> Result<bool> {
        let expected = Expected {
            size: Some(size),
            content_addressed: true,
        };
        let wrong =
            |error: &StoreError| matches!(error.kind, Kind::WrongSize { .. } | Kind::Missing);
        let mut object = match store::read(&self.store, key, None, expected).await {
            Ok(Some(object)) => object,
            Ok(None) => return Ok(false),
            Err(error) if wrong(&error) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let mut hasher = Hasher::default();
        while let Some(chunk) = object.body.next().await {
            match chunk {
                Ok(chunk) => {
                    hasher.update(&chunk);
                    blob.advance(chunk.len() as u64);
                }
                Err(error) if wrong(&error) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(hasher.length() == size && hasher.digest() == digest)
    }

    /// Downloads the blob at `key` until `target` holds it whole.
    ///
    /// # Errors
    /// The store or the file fails, or the object's bytes are wrong. The target keeps what it has, for
    /// the next run to resume, or is empty where the bytes were wrong.
    pub async fn fetch(&self, key: &str, target: &Growing, blob: &Arc<Blob>) -> Result<Fetched> {
        let digest = target.digest;
        let mut writer = Writer::resume(target, &self.hashing, blob).await?;
        let mut resumed = target.have > 0;
        let mut refetched = 0;
        let mut bytes = 0;
        loop {
            let one_stream = self.one_stream.load(Ordering::Relaxed);
            let piece = match one_stream {
                true => u64::MAX,
                false => self.limits.piece,
            };
            let rest = self.fetch_rest(key, piece, &mut writer, blob, &mut bytes);
            match rest.await {
                Ok(true) => {}
                Ok(false) => return Ok(Fetched::Missing),
                Err(error) if !one_stream && ignores_ranges(&error) => {
                    self.one_stream.store(true, Ordering::Relaxed);
                    continue;
                }
                Err(error) => return Err(error),
            }
            let found = writer.hasher.digest();
            if found == digest {
                return Ok(Fetched::Whole { bytes });
            }
            writer.restart(blob)?;
            // What an earlier run left may be at fault, or the network.
            if !resumed && refetched == REFETCHES {
                return Err(Damaged::bytes(key, found).into());
            }
            refetched += u32::from(!resumed);
            resumed = false;
            self.progress
                .note(&format!("{digest}: its bytes are wrong, fetching it again"));
        }
    }

    /// Fetches everything from where `writer` is, in pieces of `piece` bytes. `false`: the object is
    /// not there.
    async fn fetch_rest(
        &self,
        key: &str,
        piece: u64,
        writer: &mut Writer,
        blob: &Arc<Blob>,
        bytes: &mut u64,
    ) -> Result<bool> {
        let Growing { have, size, .. } = writer.target;
        if have == size && size > 0 {
            return Ok(true);
        }
        let mut pieces = Pieces::new(self, key, have..size, size, piece, blob);
        let mut writing = Fuse::terminated();
        let there = loop {
            if writing.is_terminated() {
                match pieces.next() {
                    Next::Chunks(chunks) => {
                        let written = self.take_in(writer.hasher.clone(), writer.write(chunks));
                        writing = written.boxed().fuse();
                    }
                    Next::Wait => {}
                    Next::End(there) => break there?,
                }
            }
            tokio::select! {
                written = &mut writing, if !writing.is_terminated() => {
                    writer.accept(written?);
                    pieces.written();
                }
                () = pieces.drive() => {}
            }
        };
        *bytes += pieces.fetched();
        Ok(there)
    }

    /// Writes and hashes. On one thread, whose CPU then has the bytes in its cache; on two if no other
    /// blob has a use for them.
    async fn take_in(&self, hasher: Hasher, mut writing: Writing) -> Result<(Hasher, Writing)> {
        if self.active.load(Ordering::Relaxed) != 1 {
            return self.hashing.run(hasher, writing).await;
        }
        let chunks = writing.chunks.as_slice().to_vec();
        let written = blocking(move || {
            while writing.advance()? {}
            Ok(writing)
        });
        let hashed = self.hashing.run_filled(hasher, chunks);
        let (writing, (_, hasher)) = tokio::try_join!(written, hashed)?;
        Ok((hasher, writing))
    }
}

pub(super) fn ignores_ranges(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<StoreError>();
    error.is_some_and(|error| error.kind == Kind::NoRanges)
}

/// An object on the store that is not the blob that its key says.
#[derive(Debug)]
pub struct Damaged {
    key: String,
    how: String,
    /// The size is right, so that an export does not notice.
    pub unnoticed: bool,
}

impl Damaged {
    /// It has `found` bytes instead of `size`.
    pub fn size(key: &str, found: u64, size: u64) -> Self {
        Damaged {
            key: key.to_owned(),
            how: format!("it has {found} bytes where the manifest says {size}"),
            unnoticed: false,
        }
    }

    /// Its bytes hash to `found`.
    pub fn bytes(key: &str, found: Digest) -> Self {
        Damaged {
            key: key.to_owned(),
            how: format!("its bytes hash to {found}"),
            unnoticed: true,
        }
    }
}

impl std::fmt::Display for Damaged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Damaged { key, how, .. } = self;
        let with = match self.unnoticed {
            true => " with --verify-remote",
            false => "",
        };
        write!(
            f,
            "blob {key} on S3 is damaged: {how}; export the cache again{with}"
        )
    }
}

impl std::error::Error for Damaged {}

/// Writes a blob's chunks to the end of its file, and hashes them.
struct Writer {
    target: Growing,
    /// Has seen what the file holds.
    hasher: Hasher,
}

impl Writer {
    /// Hashes what an earlier run left.
    async fn resume(target: &Growing, hashing: &Hashing, blob: &Blob) -> Result<Self> {
        let mut hasher = Hasher::default();
        if target.have > 0 {
            let left = FileFeed::new(Arc::clone(&target.file), 0..target.have);
            let reading = || format!("reading what there is of blob {}", target.digest);
            (hasher, _) = hashing.run(hasher, left).await.with_context(reading)?;
            blob.resumed(target.have);
        }
        let target = target.clone();
        Ok(Writer { target, hasher })
    }

    fn write(&self, chunks: Vec<Bytes>) -> Writing {
        Writing {
            file: Arc::clone(&self.target.file),
            digest: self.target.digest,
            chunks: chunks.into_iter(),
            current: Bytes::new(),
            length: 0,
        }
    }

    /// A write has ended.
    fn accept(&mut self, (hasher, written): (Hasher, Writing)) {
        self.hasher = hasher;
        self.target.have += written.length;
    }

    fn restart(&mut self, blob: &Blob) -> Result<()> {
        blob.take_back(self.target.have);
        self.hasher = Hasher::default();
        self.target.restart()
    }
}

/// Chunks on their way to the end of a file.
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
