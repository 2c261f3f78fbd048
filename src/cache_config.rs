//! BuildKit's cache graph as it writes it: layers, records, and what is left of them in `mode=min`
//! or when blobs are gone. Pure: no I/O.

use std::collections::BTreeSet;

use anyhow::Result;

use crate::digest::Digest;

/// A cache manifest (on S3) or cache config (in a layout). Every index in it is within range, no
/// chain of parents and no chain of links runs in a circle: `parse` sees to that.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheConfig {
    pub layers: Vec<Layer>,
    pub records: Vec<Record>,
    /// On S3 only, ours: what it takes to give an image layout back. BuildKit ignores it.
    pub image: Option<Image>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    pub blob: Digest,
    /// Index into `layers`; `None` is written -1, and an absent one is read as 0.
    pub parent: Option<usize>,
    /// Written on S3, always; in a layout the descriptors hold it.
    pub annotations: Option<LayerAnnotations>,
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

/// A time as Go writes it in JSON: RFC 3339, UTC, nanoseconds without trailing zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub time::OffsetDateTime);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub results: Vec<LayerResult>,
    pub chains: Vec<ChainResult>,
    /// A cache key. BuildKit writes sha256 digests, but nothing here depends on that.
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

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    pub selector: String,
    /// Index into `records`.
    pub link: usize,
}

/// An image layout that an S3 manifest also describes (the field `layercache`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The entry of `index.json`.
    pub root: crate::oci::Descriptor,
    /// Every blob of it: the root, manifests, configs, layers. In order of digest, none twice.
    pub contents: Vec<Content>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
}

/// What `without_blobs` took away.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dropped {
    pub results: usize,
    pub layers: usize,
}

impl CacheConfig {
    /// Reads S3's form (`annotations` required on every layer) .
    pub fn parse_s3(bytes: &[u8]) -> Result<Self> {
        let _ = bytes;
        todo!()
    }

    /// Reads a layout's config blob (no annotations).
    pub fn parse_local(bytes: &[u8]) -> Result<Self> {
        let _ = bytes;
        todo!()
    }

    /// S3's form, byte for byte as Go writes it. Fails if a layer has no annotations.
    pub fn to_s3(&self) -> Result<Vec<u8>> {
        todo!()
    }

    /// The layout's form: the same without annotations and `image`.
    pub fn to_local(&self) -> Vec<u8> {
        todo!()
    }

    /// The inline cache of an image (`moby.buildkit.cache.v0`, decoded): `records` over the image's
    /// own layers, given from the bottom up with their annotations.
    pub fn from_inline(records: &[u8], layers: &[(Digest, LayerAnnotations)]) -> Result<Self> {
        let _ = (records, layers);
        todo!()
    }

    /// Several caches as one (the platforms of an image): equal layers and equal records once.
    pub fn merged(parts: Vec<CacheConfig>) -> Self {
        let _ = parts;
        todo!()
    }

    /// With layers in BuildKit's order, (blob, parent).
    pub fn sorted(self) -> Self {
        todo!()
    }

    /// `mode=min`, by the rule of docs/format.md.
    pub fn min(&self) -> Self {
        todo!()
    }

    /// What stays valid when `missing` blobs are gone: results that need one are dropped, layers
    /// no result needs any more too; every record and link stays.
    pub fn without_blobs(&self, missing: &BTreeSet<Digest>) -> (Self, Dropped) {
        let _ = missing;
        todo!()
    }
}
