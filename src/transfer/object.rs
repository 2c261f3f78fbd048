//! Uploads a blob from an object, in this store or another: its bytes pass through memory,
//! verified, and never touch the disk.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, anyhow};
use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt};
use tokio::sync::Mutex;

use crate::cache::digest::{Digest, Hasher};
use crate::store::{self, Expected, Kind, Store, StoreError, StoreResult};
use crate::transfer::body::{Source, hash_and_pass};
use crate::transfer::buffers::{BUFFER, Outlet};
use crate::transfer::download::Damaged;
use crate::transfer::hashing::Hashing;

/// A blob in an object.
pub struct ObjectSource {
    store: Arc<dyn Store>,
    key: String,
    digest: Digest,
    size: u64,
    /// Consecutive reads share one response.
    reading: Mutex<Option<Reading>>,
}

/// A response with the object from some byte on.
struct Reading {
    /// Where `rest` begins.
    at: u64,
    /// Bytes that have arrived but were not asked for yet.
    rest: Bytes,
    body: BoxStream<'static, StoreResult<Bytes>>,
}

impl ObjectSource {
    pub fn new(store: Arc<dyn Store>, key: String, digest: Digest, size: u64) -> Self {
        ObjectSource {
            store,
            key,
            digest,
            size,
            reading: Mutex::default(),
        }
    }

    async fn open(&self, at: u64) -> Result<Reading> {
        let range = (at > 0).then_some(at..self.size);
        let expected = Expected {
            size: Some(self.size),
            content_addressed: true,
        };
        let object = store::read(&self.store, &self.key, range, expected).await;
        let object = object.map_err(|error| self.explain(error))?;
        Ok(Reading {
            at,
            rest: Bytes::new(),
            body: object.ok_or_else(|| self.gone())?.body,
        })
    }

    /// Fills a buffer with the next `wanted` bytes.
    async fn fill(&self, reading: &mut Reading, wanted: usize, buffer: &mut Vec<u8>) -> Result<()> {
        while buffer.len() < wanted {
            if reading.rest.is_empty() {
                let next = reading.body.next().await;
                let next = next.transpose().map_err(|error| self.explain(error))?;
                reading.rest = next.ok_or_else(|| self.gone())?;
                continue;
            }
            let length = reading.rest.len().min(wanted - buffer.len());
            buffer.extend_from_slice(&reading.rest.split_to(length));
            reading.at += length as u64;
        }
        Ok(())
    }

    fn gone(&self) -> anyhow::Error {
        anyhow!("blob {} is no longer on S3", self.key)
    }

    fn explain(&self, error: StoreError) -> anyhow::Error {
        match error.kind {
            Kind::WrongSize { found } => Damaged::size(&self.key, found, self.size).into(),
            Kind::Missing => self.gone(),
            _ => error.into(),
        }
    }
}

#[async_trait]
impl Source for ObjectSource {
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
        if range.is_empty() {
            return Ok(hasher);
        }
        // A read that fails or is dropped leaves nothing for the next one to continue.
        let mut kept = self.reading.lock().await;
        let mut reading = match kept.take() {
            Some(reading) if reading.at == range.start => reading,
            _ => self.open(range.start).await?,
        };
        let mut chunks = Vec::new();
        while reading.at < range.end {
            let wanted = (range.end - reading.at).min(BUFFER) as usize;
            let mut chunk = outlet.take(wanted);
            self.fill(&mut reading, wanted, &mut chunk).await?;
            chunks.push(outlet.lend(chunk));
        }
        *kept = (range.end < self.size).then_some(reading);
        drop(kept);
        hash_and_pass(chunks, hasher, hashing, &outlet).await
    }

    fn damaged(&self, found: Digest) -> anyhow::Error {
        Damaged::bytes(&self.key, found).into()
    }

    /// A second read would be a second download.
    fn can_be_read_again(&self) -> bool {
        false
    }
}
