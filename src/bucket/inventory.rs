//! What a bucket holds below a spec's prefix, as one value.
//!
//! The manifests come first: they are listed, and several are read at once. Then everything below
//! the prefix is listed. Only blobs that a manifest names are kept; everything else is just
//! counted. So memory is proportional to what manifests name, not to the objects in the bucket.
//!
//! Others may change the bucket meanwhile. A manifest written since the listing is not in the inventory,
//! and the blobs that only it names count as unreferenced.

use std::collections::BTreeMap;

use anyhow::Result;
use futures::stream::TryStreamExt;
use tokio::sync::Semaphore;

use crate::bucket::manifest::{Unread, Unreadable};
use crate::bucket::{Bucket, Key, Named};
use crate::cache::digest::Digest;
use crate::cache::{CacheConfig, Record};
use crate::store::{Kind, ObjectInfo};

/// Manifests read at once.
const MANIFESTS: usize = 16;

/// Total size in KiB of manifests that are read at once; a larger one is read alone. Parsed, a
/// manifest takes a few times as much.
const MANIFEST_KIB: u32 = 16 << 10;

/// Everything below a spec's prefix.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// In order of their names.
    pub caches: Vec<Cache>,
    /// Every blob that a cache needs. `None`: it is not there.
    pub blobs: BTreeMap<Digest, Option<ObjectInfo>>,
    /// Blobs that no cache needs, as far as manifests can be read.
    pub unreferenced: Tally,
    /// Objects that are no blob or manifest of these caches: another prefix's may be.
    pub other: Tally,
}

/// A cache in a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cache {
    pub named: Named,
    /// Why its manifest is unreadable, if it is.
    pub contents: Result<Contents, Unreadable>,
}

/// What is kept of a manifest when many are held at once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    pub layers: u64,
    pub records: u64,
    pub results: u64,
    /// Whether it also describes an image.
    pub image: bool,
    /// The blobs that it needs, in order of their digests, with their sizes in bytes.
    pub blobs: Vec<(Digest, u64)>,
}

/// Objects, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    pub objects: u64,
    pub bytes: u64,
}

impl Tally {
    pub fn add(&mut self, bytes: u64) {
        self.objects += 1;
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

impl Contents {
    /// # Errors
    /// One blob is given two sizes, or the sizes cannot be.
    pub fn of(cache: &CacheConfig) -> Result<Self> {
        let results = |record: &Record| record.results.len() + record.chains.len();
        Ok(Contents {
            layers: cache.layers.len() as u64,
            records: cache.records.len() as u64,
            results: cache.records.iter().map(results).sum::<usize>() as u64,
            image: cache.image.is_some(),
            blobs: cache.blobs()?.into_iter().collect(),
        })
    }

    /// Those of a manifest, unless it contradicts itself.
    pub(super) fn of_manifest(cache: &CacheConfig) -> Result<Self, Unreadable> {
        Contents::of(cache).map_err(|error| Unreadable::damaged(format!("{error:#}")))
    }

    /// Bytes of all its blobs.
    pub fn bytes(&self) -> u64 {
        self.blobs.iter().map(|(_, size)| size).sum()
    }
}

impl Bucket {
    /// Everything below the prefix, including all caches.
    ///
    /// # Errors
    /// The store's. An unreadable manifest is not an error.
    pub async fn inventory(&self) -> Result<Inventory> {
        let caches = self.caches().await?;
        let contents = caches.iter().flat_map(|cache| &cache.contents);
        let named = contents.flat_map(|contents| &contents.blobs);
        let mut blobs: BTreeMap<Digest, Option<ObjectInfo>> =
            named.map(|(digest, _)| (*digest, None)).collect();
        let (mut unreferenced, mut other) = (Tally::default(), Tally::default());
        let mut pages = self.objects_below(&self.config.prefix);
        while let Some(objects) = pages.try_next().await? {
            for (key, info) in objects {
                match self.parse_key(&key, info.size) {
                    Key::Blob(digest) => match blobs.get_mut(&digest) {
                        Some(blob) => *blob = Some(info),
                        None => unreferenced.add(info.size),
                    },
                    Key::Manifest(_) => {}
                    Key::Other => other.add(info.size),
                }
            }
        }
        Ok(Inventory {
            caches,
            blobs,
            unreferenced,
            other,
        })
    }

    /// All caches, in order of their names.
    ///
    /// # Errors
    /// The store's. An unreadable manifest is not an error.
    pub async fn caches(&self) -> Result<Vec<Cache>> {
        let room = Semaphore::new(MANIFEST_KIB as usize);
        let mut caches: Vec<Cache> = self
            .names()
            .map_ok(|named| async {
                let kib = u32::try_from(named.info.size >> 10).unwrap_or(u32::MAX);
                let _room = room.acquire_many(kib.clamp(1, MANIFEST_KIB)).await?;
                self.cache(named).await
            })
            .try_buffer_unordered(MANIFESTS)
            .try_filter_map(|cache| std::future::ready(Ok(cache)))
            .try_collect()
            .await?;
        caches.sort_unstable_by(|a, b| a.named.name.cmp(&b.named.name));
        Ok(caches)
    }

    /// One cache, read. `None`: its manifest is gone.
    ///
    /// # Errors
    /// The store's. An unreadable manifest is not an error.
    pub async fn cache(&self, named: Named) -> Result<Option<Cache>> {
        let contents = match self.read_manifest(&named.name).await {
            Ok(None) => return Ok(None),
            Ok(Some(cache)) => Contents::of_manifest(&cache),
            Err(Unread::Invalid(unreadable)) => Err(unreadable),
            Err(Unread::Store(error)) if error.kind == Kind::Missing => return Ok(None),
            Err(Unread::Store(error)) => return Err(error.into()),
        };
        Ok(Some(Cache { named, contents }))
    }
}
