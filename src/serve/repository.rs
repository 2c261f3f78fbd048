//! One cache as a repository with the single tag `latest`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use parking_lot::Mutex;

use crate::blocking::blocking;
use crate::bucket::{Bucket, Certainty};
use crate::cache::digest::Digest;
use crate::cache::documents::{BUILDKIT_CONFIG_LIMIT, Documents};
use crate::cache::oci::{self, Descriptor};
use crate::cache::{CacheConfig, Image};
use crate::progress::count;
use crate::progress::{self, Progress};
use crate::serve::blobs::{Blobs, Traffic};
use crate::serve::kept::{Document, Kept};
use crate::serve::push::Push;

/// The tag of every cache.
pub const TAG: &str = "latest";

/// Counts of lookups and hits.
#[derive(Debug, Default)]
pub struct Lookups {
    pub all: AtomicU64,
    pub hits: AtomicU64,
}

impl Lookups {
    /// Counts a lookup, and returns what it found.
    pub fn count<T>(&self, found: Option<T>) -> Option<T> {
        self.all.fetch_add(1, Ordering::Relaxed);
        self.hits
            .fetch_add(u64::from(found.is_some()), Ordering::Relaxed);
        found
    }
}

/// A cache that clients can reach.
pub struct Repository {
    /// Valid in a registry, and unique in this run.
    pub name: String,
    pub bucket: Bucket,
    /// Whether it is a `--cache-from`.
    pub source: bool,
    /// Set if it is the `--cache-to`.
    pub push: Option<Arc<Push>>,
    pub blobs: Arc<Blobs>,
    /// Documents made from the S3 manifest.
    pub generated: Arc<Kept>,
    pub lookups: Lookups,
    pub traffic: Arc<Traffic>,
    pub progress: Progress,
    /// Warnings already shown: each only once for each state of the cache.
    said: Mutex<BTreeSet<String>>,
}

/// The manifest that the tag names.
pub struct Tagged {
    pub manifest: Document,
    /// The cache config's digest; `None` for an image.
    pub config: Option<Digest>,
    pub cache: CacheConfig,
}

impl Repository {
    pub fn new(
        name: String,
        bucket: Bucket,
        progress: &Progress,
        (traffic, blobs): (Arc<Traffic>, Arc<Blobs>),
        push: Option<Arc<Push>>,
        source: bool,
    ) -> Self {
        Repository {
            name,
            bucket,
            source,
            push,
            blobs,
            generated: Arc::default(),
            lookups: Lookups::default(),
            traffic,
            progress: progress.clone(),
            said: Mutex::default(),
        }
    }

    /// The manifest that the tag names now: the one that an import would write, without what is
    /// missing on S3.
    /// `None`: there is no such cache.
    ///
    /// # Errors
    /// The store's, or the S3 manifest is not one.
    pub async fn tagged(&self) -> Result<Option<Tagged>> {
        let Some(cache) = self.bucket.manifest(self.cache_name()).await? else {
            return Ok(None);
        };
        let cache = self.without_missing(cache).await?;
        if let Some(image) = &cache.image
            && let Some(manifest) = self.image_root(image).await?
        {
            self.generated.keep(manifest.clone());
            return Ok(Some(Tagged {
                manifest,
                config: None,
                cache,
            }));
        }
        let (documents, cache) = blocking(move || Ok((Documents::of(&cache)?, cache))).await?;
        let config = self.keep_config(documents.config);
        let manifest = Document {
            media_type: documents.descriptor.media_type,
            digest: documents.descriptor.digest,
            bytes: documents.manifest.into(),
        };
        self.generated.keep(manifest.clone());
        Ok(Some(Tagged {
            manifest,
            config: Some(config),
            cache,
        }))
    }

    /// The cache's name on S3. Like BuildKit, an import reads the first name only.
    pub fn cache_name(&self) -> &str {
        &self.bucket.config().names[0]
    }

    /// The cache without the results whose blobs are not on S3, or damaged there.
    async fn without_missing(&self, cache: CacheConfig) -> Result<CacheConfig> {
        let blobs = cache.blobs()?;
        let digests = blobs.keys().copied();
        let found = self.bucket.survey(digests, Certainty::Known).await?;
        self.blobs.surveyed(blobs.keys(), &found);
        let is_there = |digest: &Digest, size| {
            found.get(digest).is_some_and(|info| info.size == size)
                && !self.blobs.is_damaged(digest)
        };
        let missing: BTreeSet<Digest> = blobs
            .iter()
            .filter(|(digest, size)| !is_there(digest, **size))
            .map(|(digest, _)| *digest)
            .collect();
        if missing.is_empty() {
            return Ok(cache);
        }
        let (kept, dropped) = cache.without_blobs(&missing);
        self.say_once(&format!(
            "{} that the manifest of '{}' names {} missing or damaged on S3: {} and {} left out",
            count(missing.len() as u64, "blob"),
            crate::quote::printable(self.cache_name()),
            if missing.len() == 1 { "is" } else { "are" },
            count(dropped.results as u64, "result"),
            count(dropped.layers as u64, "layer"),
        ));
        Ok(kept)
    }

    fn keep_config(&self, config: Vec<u8>) -> Digest {
        let size = config.len() as u64;
        if size > BUILDKIT_CONFIG_LIMIT {
            self.say_once(&format!(
                "the cache config has {}: BuildKit's registry import refuses more than 1 MiB; use the type=gha line, or export with mode=min, or fewer stages",
                progress::bytes(size)
            ));
        }
        let digest = Digest::of(&config);
        self.generated.keep(Document {
            media_type: oci::CACHE_CONFIG.to_owned(),
            digest,
            bytes: config.into(),
        });
        digest
    }

    /// The root of an image; `None` if it does not match the S3 manifest.
    async fn image_root(&self, image: &Image) -> Result<Option<Document>> {
        let Descriptor {
            media_type,
            digest,
            size,
            ..
        } = &image.root;
        let reading = || format!("reading the image {digest} on S3");
        let bytes = self.blobs.document(digest).await.with_context(reading)?;
        Ok(bytes
            .filter(|bytes| bytes.len() as u64 == *size)
            .map(|bytes| Document {
                media_type: media_type.clone(),
                digest: *digest,
                bytes,
            }))
    }

    /// A document that was generated or pushed in this run.
    pub fn document(&self, digest: &Digest) -> Option<Document> {
        let pushed = self.push.as_ref().and_then(|push| push.document(digest));
        pushed.or_else(|| self.generated.get(digest))
    }

    /// The manifest with this digest: one of this run, or one of an image on S3.
    ///
    /// # Errors
    /// The store's.
    pub async fn manifest(&self, digest: &Digest) -> Result<Option<Document>> {
        if let Some(document) = self.document(digest) {
            return Ok(Some(document));
        }
        let Some(bytes) = self.blobs.document(digest).await? else {
            return Ok(None);
        };
        Ok(manifest_type(&bytes).map(|media_type| Document {
            media_type,
            digest: *digest,
            bytes,
        }))
    }

    fn say_once(&self, text: &str) {
        if self.said.lock().insert(text.to_owned()) {
            self.progress.warn(text);
        }
    }
}

/// The media type of a manifest, as it states or as its fields imply; `None` if it is not a
/// manifest.
pub fn manifest_type(bytes: &Bytes) -> Option<String> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Manifest {
        #[serde(default)]
        media_type: String,
        config: Option<serde::de::IgnoredAny>,
        manifests: Option<serde::de::IgnoredAny>,
    }
    let manifest: Manifest = oci::object_from_json(bytes).ok()?;
    let known = [
        oci::IMAGE_MANIFEST,
        oci::IMAGE_INDEX,
        oci::DOCKER_MANIFEST,
        oci::DOCKER_LIST,
    ];
    match (manifest.config, manifest.manifests) {
        _ if known.contains(&&*manifest.media_type) => Some(manifest.media_type),
        _ if !manifest.media_type.is_empty() => None,
        (Some(_), _) => Some(oci::IMAGE_MANIFEST.to_owned()),
        (_, Some(_)) => Some(oci::IMAGE_INDEX.to_owned()),
        _ => None,
    }
}
