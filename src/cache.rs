//! BuildKit's cache graph, its JSON on S3 and in a layout, and what remains of it in `mode=min` or
//! without some blobs. Pure: no I/O.

pub mod diff_id;
pub mod digest;
pub mod documents;
mod graph;
mod merge;
pub mod oci;
pub mod read;
mod reduce;
#[cfg(test)]
mod tests;
mod time;
mod wire;

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

pub use self::reduce::Dropped;
pub use self::time::{InvalidTime, Time};
use crate::cache::digest::Digest;

/// Larger manifests, configs and indexes are neither read nor written, on S3 and in layouts alike:
/// they are held in memory. Bytes.
pub const DOCUMENT_LIMIT: u64 = 64 << 20;

/// A cache: the manifest on S3, or a layout's cache config with its descriptors. Parsing makes sure
/// that every index is within range and that no chain of parents or links runs in a circle; the
/// code here relies on that.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheConfig {
    pub layers: Vec<Layer>,
    pub records: Vec<Record>,
    /// Our extension, on S3 only: what it takes to restore an image layout. BuildKit ignores it.
    pub image: Option<Image>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    pub blob: Digest,
    /// Index into `layers`. `None` is written as -1; an absent field means 0.
    pub parent: Option<usize>,
    /// Part of the layer on S3; in a layout, they are in the blob's descriptor.
    pub annotations: LayerAnnotations,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerAnnotations {
    /// Normalised to OCI.
    pub media_type: String,
    pub diff_id: Digest,
    /// Bytes.
    pub size: u64,
    pub created_at: Time,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    pub results: Vec<LayerResult>,
    pub chains: Vec<ChainResult>,
    /// A cache key. BuildKit writes sha256 digests; any string will do.
    pub digest: String,
    pub inputs: Vec<Vec<Input>>,
}

/// A layer with all its ancestors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerResult {
    pub layer: usize,
    pub created_at: Time,
}

/// Just these layers, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainResult {
    pub layers: Vec<usize>,
    pub created_at: Time,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Input {
    pub selector: String,
    /// Index into `records`.
    pub link: usize,
}

/// An image layout that an S3 manifest also describes (the field `layercache`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The image's entry in `index.json`, as [`oci::Descriptor::unnamed`] leaves it.
    pub root: oci::Descriptor,
    /// All its blobs: the root, manifests, configs, layers. By digest, each once.
    pub contents: Vec<Content>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
}

impl CacheConfig {
    /// Reads S3's form, in which every layer has annotations.
    pub fn parse_s3(bytes: &[u8]) -> Result<Self> {
        wire::parse_s3(bytes).context("reading the cache manifest")
    }

    /// Reads a layout's config blob. It has no annotations: `annotate` supplies those of each layer,
    /// given its index and blob, once the rest has been validated.
    ///
    /// # Errors
    /// The config is invalid, or `annotate` fails.
    pub fn parse_local(
        bytes: &[u8],
        annotate: impl FnMut(usize, &Digest) -> Result<LayerAnnotations>,
    ) -> Result<Self> {
        wire::parse_local(bytes, annotate).context("reading the cache config")
    }

    /// Reads an image's inline cache (`moby.buildkit.cache.v0`, decoded): `records` over the image's
    /// own layers, which are given from the bottom up. The result's layers are sorted.
    pub fn from_inline(records: &[u8], layers: &[(Digest, LayerAnnotations)]) -> Result<Self> {
        let layers = layers
            .iter()
            .enumerate()
            .map(|(at, (blob, annotations))| Layer {
                blob: *blob,
                parent: at.checked_sub(1),
                annotations: annotations.clone(),
            });
        let cache = wire::parse_records(records, layers.collect())
            .context("reading the image's inline cache")?;
        Ok(cache.sorted())
    }

    /// S3's form, byte for byte as Go writes it.
    ///
    /// # Errors
    /// It would exceed [`DOCUMENT_LIMIT`].
    pub fn to_s3(&self) -> Result<Vec<u8>> {
        let bytes = wire::write_s3(self).context("writing the cache manifest")?;
        check_written("manifest", &bytes)?;
        Ok(bytes)
    }

    /// The layout's form: the same without annotations and `image`.
    pub fn to_local(&self) -> Vec<u8> {
        wire::write_local(self)
    }

    /// The blobs that the cache needs (its layers' and its image's), and their sizes in bytes.
    ///
    /// # Errors
    /// One blob is given two sizes, or the sizes do not add up to an `i64`: callers may add them.
    pub fn blobs(&self) -> Result<BTreeMap<Digest, u64>> {
        let contents = self.image.iter().flat_map(|image| &image.contents);
        let contents = contents.map(|content| (content.digest, content.size));
        let layers = self.layers.iter().map(|l| (l.blob, l.annotations.size));
        let mut blobs = BTreeMap::new();
        for (digest, size) in contents.chain(layers) {
            add_blob(&mut blobs, digest, size)?;
        }
        let total: u128 = blobs.values().map(|&size| u128::from(size)).sum();
        if i64::try_from(total).is_err() {
            bail!("the blobs are said to have {total} bytes together, which cannot be");
        }
        Ok(blobs)
    }
}

/// Makes sure that a document of a cache can be read again.
///
/// # Errors
/// It exceeds [`DOCUMENT_LIMIT`].
pub(crate) fn check_written(kind: &str, document: &[u8]) -> Result<()> {
    if document.len() as u64 > DOCUMENT_LIMIT {
        bail!(
            "the cache's {kind} would have {} bytes, more than the {DOCUMENT_LIMIT} that are ever read; \
             export with mode=min, or cache fewer stages",
            document.len()
        );
    }
    Ok(())
}

/// Adds a blob and its size to `blobs`; returns whether it is new there.
///
/// # Errors
/// It is there with another size.
pub(crate) fn add_blob(
    blobs: &mut BTreeMap<Digest, u64>,
    digest: Digest,
    size: u64,
) -> Result<bool> {
    match blobs.insert(digest, size) {
        None => Ok(true),
        Some(other) if other == size => Ok(false),
        Some(other) => bail!("blob {digest} is given two sizes, {other} and {size} bytes"),
    }
}
