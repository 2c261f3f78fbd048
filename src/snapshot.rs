//! From a manifest in a layout to what an export sends, and from an S3 manifest to the documents
//! that an import writes.

use std::collections::BTreeMap;

use anyhow::Result;

use crate::cache_config::CacheConfig;
use crate::digest::Digest;
use crate::layout::Layout;
use crate::oci::Descriptor;

/// What the chosen manifest of a layout stands for.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The whole cache (`mode=max`). Layers lack annotations only until `Snapshot::read` returns.
    pub cache: CacheConfig,
    /// Sizes of all blobs that `cache` (its layers, and `cache.image` where there is one) names.
    pub blobs: BTreeMap<Digest, u64>,
}

impl Snapshot {
    /// Reads the manifest that `root` describes, in any of its forms. Computes diffIDs that nothing
    /// tells, by decompressing; `hashing` is told of each such blob.
    pub fn read(
        layout: &Layout,
        root: &Descriptor,
        progress: &crate::progress::Progress,
    ) -> Result<Self> {
        let _ = (layout, root, progress);
        todo!()
    }
}

/// The blobs that `cache` needs, with their sizes.
pub fn blobs_of(cache: &CacheConfig) -> Result<BTreeMap<Digest, u64>> {
    let _ = cache;
    todo!()
}

/// The documents of a cache in a layout, as BuildKit's image-manifest form writes them.
pub struct Documents {
    pub config: Vec<u8>,
    pub manifest: Vec<u8>,
    /// Of `manifest`, without annotations.
    pub descriptor: Descriptor,
}

/// Byte for byte what BuildKit's `--cache-to type=local` writes for this cache.
pub fn documents(cache: &CacheConfig) -> Result<Documents> {
    let _ = cache;
    todo!()
}
