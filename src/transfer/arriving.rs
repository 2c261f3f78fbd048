//! Uploads a blob that a client sends only once. If its bytes arrive in order, nothing is kept on disk: a
//! part stays in memory until the store has it, so that it can be sent again. If not, they wait in a file.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, bail};
use async_trait::async_trait;
use bytes::{Buf, Bytes};
use futures::stream::{BoxStream, StreamExt};
use tokio::sync::Mutex;

use crate::cache::digest::{Digest, Hasher};
use crate::progress::Verb;
use crate::transfer::body::{FileSource, InMemory, Source, hash_and_pass};
use crate::transfer::buffers::{BUFFER, Outlet};
use crate::transfer::hashing::Hashing;
use crate::transfer::upload::Uploader;

/// The bytes that a client sends.
pub type Incoming = BoxStream<'static, Result<Bytes>>;

/// The bytes that arrived are not those that were announced.
#[derive(Debug)]
pub struct WrongBytes {
    pub announced: Digest,
    pub found: Digest,
}

impl std::fmt::Display for WrongBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let WrongBytes { announced, found } = self;
        write!(f, "the bytes sent as {announced} hash to {found}")
    }
}

impl std::error::Error for WrongBytes {}

impl Uploader {
    /// Uploads a blob of `size` bytes while it arrives: in parts, or, if it is smaller than one, whole
    /// from memory.
    ///
    /// # Errors
    /// [`WrongBytes`], the error of `incoming`, or the store's. Nothing is visible at `key` then.
    pub async fn upload_arriving(
        &self,
        key: &str,
        digest: Digest,
        size: u64,
        incoming: Incoming,
    ) -> Result<()> {
        let source: Arc<dyn Source> = Arc::new(Arriving {
            digest,
            size,
            rest: Mutex::new(Unread {
                incoming,
                chunk: Bytes::new(),
                at: 0,
            }),
        });
        let blob = self.progress.blob(Verb::Upload, &digest, size);
        if size < self.limits.part {
            let room = self.means.buffers.room(size).await;
            let (outlet, passed) = self.means.buffers.outlet(room);
            let reading = source.read(0..size, Hasher::default(), &self.means.hashing, outlet);
            let found = reading.await?.digest();
            if found != digest {
                return Err(source.damaged(found));
            }
            let chunks: Vec<_> = passed.collect().await;
            let bytes = InMemory(chunks.concat().into());
            self.store.put(key, Arc::new(bytes)).await?;
        } else {
            self.upload_parts(key, source, &blob).await?;
        }
        blob.done();
        Ok(())
    }

    /// Uploads a blob whose bytes arrived in any order and wait in a file.
    ///
    /// # Errors
    /// As [`upload_arriving`](Self::upload_arriving), and the file's.
    pub async fn upload_arrived(
        &self,
        key: &str,
        digest: Digest,
        size: u64,
        file: File,
    ) -> Result<()> {
        let path = std::env::temp_dir();
        let source = Arrived(FileSource::new(file, path, digest, size));
        self.upload(key, Arc::new(source)).await
    }
}

struct Arriving {
    digest: Digest,
    size: u64,
    rest: Mutex<Unread>,
}

/// The bytes that have not been read yet.
struct Unread {
    incoming: Incoming,
    /// The rest of the latest chunk.
    chunk: Bytes,
    /// Bytes read so far.
    at: u64,
}

impl Unread {
    /// Fills a buffer with the next `length` bytes.
    async fn fill(&mut self, buffer: &mut Vec<u8>, length: usize) -> Result<()> {
        while buffer.len() < length {
            if self.chunk.is_empty() {
                match self.incoming.next().await {
                    Some(chunk) => self.chunk = chunk?,
                    None => bail!("the client sent fewer bytes than it announced"),
                }
            }
            let fits = self.chunk.len().min(length - buffer.len());
            buffer.extend_from_slice(&self.chunk[..fits]);
            self.chunk.advance(fits);
            self.at += fits as u64;
        }
        Ok(())
    }
}

#[async_trait]
impl Source for Arriving {
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
        hashing: &Hashing,
        mut outlet: Outlet,
    ) -> Result<Hasher> {
        let mut rest = self.rest.lock().await;
        if rest.at != range.start {
            bail!("the upload was taken away, and the client has to send the blob again");
        }
        let mut chunks = Vec::new();
        while rest.at < range.end {
            let length = (range.end - rest.at).min(BUFFER) as usize;
            let mut buffer = outlet.take(length);
            rest.fill(&mut buffer, length).await?;
            chunks.push(outlet.lend(buffer));
        }
        hash_and_pass(chunks, hasher, hashing, &outlet).await
    }

    fn damaged(&self, found: Digest) -> anyhow::Error {
        wrong_bytes(self.digest, found)
    }

    fn can_be_read_again(&self) -> bool {
        false
    }
}

fn wrong_bytes(announced: Digest, found: Digest) -> anyhow::Error {
    WrongBytes { announced, found }.into()
}

/// A blob that waits in a file.
struct Arrived(FileSource);

#[async_trait]
impl Source for Arrived {
    fn digest(&self) -> Digest {
        self.0.digest()
    }

    fn size(&self) -> u64 {
        self.0.size()
    }

    async fn read(
        &self,
        range: Range<u64>,
        hasher: Hasher,
        hashing: &Hashing,
        outlet: Outlet,
    ) -> Result<Hasher> {
        self.0.read(range, hasher, hashing, outlet).await
    }

    fn damaged(&self, found: Digest) -> anyhow::Error {
        wrong_bytes(self.digest(), found)
    }

    fn can_be_read_again(&self) -> bool {
        self.0.can_be_read_again()
    }
}
