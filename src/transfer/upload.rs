//! One blob's way to the store. It is read once and hashed while it is read, and becomes visible only
//! if its bytes match its digest.

use std::sync::Arc;

use anyhow::Result;

use crate::process;
use crate::progress::{Progress, Verb};
use crate::store::Store;
use crate::transfer::body::{Means, Source, WholeBlob};
use crate::transfer::buffers::Buffers;
use crate::transfer::hashing::Hashing;
use crate::transfer::limits::Limits;
use crate::transfer::pace::Gate;
pub use crate::transfer::unfinished::ABANDONED;
use crate::transfer::unfinished::Unfinished;

/// Open files to reserve for each part in flight: its connection, that connection's replacement, and a
/// share for blobs.
const FILES: usize = 4;

/// One byte of the buffers in this many is for bodies that are read a chunk at a time.
const STREAMS: u64 = 8;

/// Uploads and refreshes blobs, and cleans up what did not end well.
pub struct Uploader {
    pub(super) store: Arc<dyn Store>,
    pub(super) means: Means,
    pub(super) progress: Progress,
    pub(super) limits: Limits,
    pub(super) unfinished: Arc<Unfinished>,
}

impl Uploader {
    pub fn new(store: Arc<dyn Store>, progress: Progress, limits: Limits) -> Self {
        let budget = limits.memory / 4 * 3;
        let streams = budget / STREAMS;
        let buffers = Buffers::new(budget - streams);
        Uploader {
            store,
            means: Means {
                streams: buffers.beside(streams),
                buffers,
                hashing: Hashing::on_every_core(),
                gate: Arc::new(Gate::new(process::within_open_files(usize::MAX, FILES))),
            },
            progress,
            limits,
            unfinished: Arc::default(),
        }
    }

    /// Uploads a blob that the store lacks.
    ///
    /// # Errors
    /// The source cannot be read, its bytes do not match its digest, or the store fails. Nothing is
    /// visible at `key` then.
    pub async fn upload(&self, key: &str, source: Arc<dyn Source>) -> Result<()> {
        let (digest, size) = (source.digest(), source.size());
        let blob = self.progress.blob(Verb::Upload, &digest, size);
        if size < self.limits.multipart {
            let body = WholeBlob::new(source, self.means.clone(), &blob).await;
            self.store.put(key, Arc::new(body)).await?;
        } else {
            self.upload_parts(key, source, &blob).await?;
        }
        blob.done();
        Ok(())
    }
}
