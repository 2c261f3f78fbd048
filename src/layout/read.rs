//! Reads a cache from a layout.

#[cfg(test)]
mod tests;

use std::io::{self, Read};
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use crate::cache::digest::{Digest, Hasher};
use crate::cache::oci::Descriptor;
use crate::cache::read::{Blobs, read_cache};
use crate::cache::{CacheConfig, diff_id};
use crate::layout::Layout;
use crate::progress::{Blob, Progress, Verb};

impl Layout {
    /// Reads the whole cache (`mode=max`) below the manifest that `root` describes. Computes missing
    /// diffIDs by decompressing the blobs, and shows that in `progress`.
    ///
    /// # Errors
    /// A document is absent, damaged or invalid, or a blob whose diffID is missing cannot be read.
    pub fn read_cache(&self, root: &Descriptor, progress: &Progress) -> Result<CacheConfig> {
        let layout = self;
        read_cache(root, &InLayout { layout, progress })
    }
}

struct InLayout<'a> {
    layout: &'a Layout,
    progress: &'a Progress,
}

impl Blobs for InLayout<'_> {
    const PLACE: &'static str = "of the layout";

    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        self.layout.read_document(descriptor)
    }

    fn has(&self, digest: &Digest, size: u64) -> bool {
        self.layout.has_blob(digest, size)
    }

    fn diff_id(&self, blob: &Digest, size: u64) -> Result<Digest> {
        let shown = self.progress.blob(Verb::Hash, blob, size);
        let mut file = Tee {
            inner: self.layout.open_blob(blob, size)?,
            hasher: Hasher::default(),
            shown: Arc::clone(&shown),
        };
        let computed = diff_id::compute(&mut file);
        if computed.is_err() {
            // Read to the end: only all its bytes show whether the blob itself is damaged.
            io::copy(&mut file, &mut io::sink()).context("reading the blob")?;
        }
        let actual = file.hasher.digest();
        if actual != *blob {
            bail!("the blob in the layout is damaged: its bytes hash to {actual}");
        }
        let computed = computed?;
        shown.done();
        Ok(computed)
    }

    fn warn(&self, text: &str) {
        self.progress.warn(text);
    }
}

/// A reader that hashes, and shows as progress, what passes through it.
struct Tee<R> {
    inner: R,
    hasher: Hasher,
    shown: Arc<Blob>,
}

impl<R: Read> Read for Tee<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        self.shown.advance(read as u64);
        Ok(read)
    }
}
