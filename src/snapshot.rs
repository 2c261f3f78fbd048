//! From a manifest in a layout to what an export sends, and from an S3 manifest to the documents
//! that an import writes.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::cache_config::{CacheConfig, Content, Image, LayerAnnotations, Time};
use crate::diff_id;
use crate::digest::Digest;
use crate::layout::Layout;
use crate::oci::{self, Descriptor, Index, Manifest};
use crate::progress::{Activity, Blob, Progress};

/// Indexes within indexes, counted from the chosen one: nobody nests them as deep, and a hostile
/// layout could for ever.
const MAX_DEPTH: usize = 8;

/// The annotation of an index entry that tells attestations from images.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";

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
    pub fn read(layout: &Layout, root: &Descriptor, progress: &Progress) -> Result<Self> {
        let mut reader = Reader {
            layout,
            progress,
            diff_ids: HashMap::new(),
        };
        let cache = match reader.document(root)? {
            Document::Manifest(manifest) if manifest.config.media_type == oci::CACHE_CONFIG => {
                reader.cache(&manifest.config, &manifest.layers)?
            }
            Document::Index(index) => {
                let is_config = |entry: &&Descriptor| entry.media_type == oci::CACHE_CONFIG;
                // BuildKit writes the config last, and reads the last.
                match index.manifests.iter().rfind(is_config) {
                    Some(config) => reader.cache(config, &index.manifests)?,
                    None => reader.image(root, Document::Index(index))?,
                }
            }
            image => reader.image(root, image)?,
        };
        let blobs = blobs_of(&cache)?;
        Ok(Snapshot { cache, blobs })
    }
}

/// Makes sure that everything `root` refers to, directly or through other manifests, is in the
/// layout: what a manifest on S3 said of an image is not trusted.
///
/// # Errors
/// The first blob that is absent or of another size, or a document that makes no sense.
pub fn check_complete(layout: &Layout, root: &Descriptor) -> Result<()> {
    let snapshot = Snapshot::read(layout, root, &Progress::silent())?;
    match snapshot
        .blobs
        .iter()
        .find(|(digest, size)| !layout.has_blob(digest, **size))
    {
        Some((digest, size)) => bail!(
            "{} refers to blob {digest} ({size} bytes), which is not in the layout",
            root.digest
        ),
        None => Ok(()),
    }
}

enum Document {
    Manifest(Manifest),
    Index(Index),
}

/// Of an image's config, what tells of its layers.
#[derive(Deserialize)]
struct ImageConfig {
    #[serde(default, deserialize_with = "oci::null_is_default")]
    rootfs: RootFs,
    #[serde(default, deserialize_with = "oci::null_is_default")]
    history: Vec<History>,
    /// The inline cache: records, as base64 of JSON.
    #[serde(rename = "moby.buildkit.cache.v0")]
    cache: Option<String>,
}

#[derive(Default, Deserialize)]
struct RootFs {
    #[serde(default, deserialize_with = "oci::null_is_default")]
    diff_ids: Vec<String>,
}

#[derive(Deserialize)]
struct History {
    created: Option<String>,
    #[serde(default, deserialize_with = "oci::null_is_default")]
    empty_layer: bool,
}

struct Reader<'a> {
    layout: &'a Layout,
    progress: &'a Progress,
    /// Those computed so far, by blob.
    diff_ids: HashMap<Digest, Digest>,
}

impl Reader<'_> {
    fn document(&self, descriptor: &Descriptor) -> Result<Document> {
        let digest = &descriptor.digest;
        let read = || self.read_document("manifest", descriptor);
        match descriptor.media_type.as_str() {
            oci::IMAGE_MANIFEST | oci::DOCKER_MANIFEST => {
                Ok(Document::Manifest(Manifest::parse(descriptor, &read()?)?))
            }
            oci::IMAGE_INDEX | oci::DOCKER_LIST => {
                Ok(Document::Index(Index::parse(descriptor, &read()?)?))
            }
            "application/vnd.docker.distribution.manifest.v1+json"
            | "application/vnd.docker.distribution.manifest.v1+prettyjws" => {
                bail!("manifest {digest} is of Docker's schema 1, which is not supported")
            }
            other => bail!(
                "manifest {digest} has the media type {other:?}, which is not supported (expected \
                 an image manifest or an image index, of OCI or Docker)"
            ),
        }
    }

    fn read_document(&self, kind: &str, descriptor: &Descriptor) -> Result<Vec<u8>> {
        self.layout
            .read_document(descriptor)
            .with_context(|| format!("reading {kind} {} of the layout", descriptor.digest))
    }

    /// A cache: its config, and descriptors of its layers' blobs.
    fn cache(&mut self, config: &Descriptor, descriptors: &[Descriptor]) -> Result<CacheConfig> {
        let bytes = self.read_document("cache config", config)?;
        let mut cache = CacheConfig::parse_local(&bytes)
            .with_context(|| format!("cache config {} of the layout", config.digest))?;
        let by_digest: HashMap<Digest, &Descriptor> =
            descriptors.iter().map(|d| (d.digest, d)).collect();
        for (at, layer) in cache.layers.iter_mut().enumerate() {
            // BuildKit writes one descriptor a layer in the same order, so that layers of the same
            // blob have each their own; it reads them by digest.
            let same_place = descriptors.get(at).filter(|d| d.digest == layer.blob);
            let Some(descriptor) = same_place.or(by_digest.get(&layer.blob).copied()) else {
                bail!(
                    "layer {at} of cache config {}: the manifest has no descriptor of its blob {}",
                    config.digest,
                    layer.blob
                );
            };
            layer.annotations = Some(LayerAnnotations {
                media_type: oci::normalise_layer(&descriptor.media_type).to_owned(),
                diff_id: self.diff_id(descriptor)?,
                size: descriptor.size,
                created_at: self.created_at(descriptor),
            });
        }
        Ok(cache)
    }

    /// What BuildKit did when it made the layer: the time, if it says so in the right form.
    fn created_at(&self, descriptor: &Descriptor) -> Time {
        let Some(text) = descriptor.annotations.get(oci::CREATED_AT) else {
            return Time::UNKNOWN;
        };
        text.parse().unwrap_or_else(|error| {
            self.progress.warn(&format!(
                "layer {}: its time of making is taken as unknown: {error}",
                descriptor.digest
            ));
            Time::UNKNOWN
        })
    }

    /// An image, or an index of images, with all that belongs to it.
    fn image(&mut self, root: &Descriptor, document: Document) -> Result<CacheConfig> {
        let mut contents = BTreeMap::new();
        let mut platforms = Vec::new();
        add(&mut contents, root.digest, root.size)?;
        let mut unread = Vec::new();
        let mut next = Some((root.clone(), document, 0));
        while let Some((descriptor, document, depth)) = next {
            match document {
                Document::Manifest(manifest) => {
                    platforms.extend(self.platform(&descriptor, &manifest, &mut contents)?);
                }
                Document::Index(index) => {
                    if depth == MAX_DEPTH {
                        bail!(
                            "index {} is nested in more than {MAX_DEPTH} others",
                            descriptor.digest
                        );
                    }
                    let entries = index.manifests.into_iter().rev();
                    unread.extend(entries.map(|entry| (entry, depth + 1)));
                }
            }
            next = None;
            while let Some((descriptor, depth)) = unread.pop() {
                if add(&mut contents, descriptor.digest, descriptor.size)? {
                    let document = self.document(&descriptor)?;
                    next = Some((descriptor, document, depth));
                    break;
                }
            }
        }

        let mut cache = CacheConfig::merged(platforms);
        let contents = contents.into_iter();
        cache.image = Some(Image {
            root: root.clone(),
            contents: contents
                .map(|(digest, size)| Content { digest, size })
                .collect(),
        });
        Ok(cache)
    }

    /// One manifest of an image: adds its blobs to `contents`, and gives the cache that its layers
    /// make, unless they are no layers of a file system.
    fn platform(
        &mut self,
        descriptor: &Descriptor,
        manifest: &Manifest,
        contents: &mut BTreeMap<Digest, u64>,
    ) -> Result<Option<CacheConfig>> {
        let config = &manifest.config;
        add(contents, config.digest, config.size)?;
        let is_attestation = descriptor
            .annotations
            .get(REFERENCE_TYPE)
            .is_some_and(|kind| kind == "attestation-manifest");
        let is_image = matches!(
            config.media_type.as_str(),
            oci::IMAGE_CONFIG | oci::DOCKER_CONFIG
        );
        let mut has_layers = is_image && !is_attestation;
        for layer in &manifest.layers {
            has_layers &= oci::is_layer(&layer.media_type);
            // Base layers of Windows are left where their vendor has them.
            if oci::is_nondistributable(&layer.media_type)
                && !self.layout.has_blob(&layer.digest, layer.size)
            {
                has_layers = false;
            } else {
                add(contents, layer.digest, layer.size)?;
            }
        }
        if !has_layers {
            return Ok(None);
        }

        let bytes = self.read_document("image config", config)?;
        let image: ImageConfig = serde_json::from_slice(&bytes)
            .with_context(|| format!("reading image config {} of the layout", config.digest))?;
        let layers = self.image_layers(&image, &manifest.layers)?;
        let records = match &image.cache {
            None => b"[]".to_vec(),
            Some(text) => {
                // Go's decoder passes over line breaks.
                let text: String = text.chars().filter(|c| !matches!(c, '\r' | '\n')).collect();
                BASE64.decode(text).with_context(|| {
                    format!(
                        "decoding the inline cache of image config {}",
                        config.digest
                    )
                })?
            }
        };
        CacheConfig::from_inline(&records, &layers)
            .with_context(|| format!("image config {} of the layout", config.digest))
            .map(Some)
    }

    fn image_layers(
        &mut self,
        image: &ImageConfig,
        layers: &[Descriptor],
    ) -> Result<Vec<(Digest, LayerAnnotations)>> {
        let diff_ids = Some(&image.rootfs.diff_ids).filter(|ids| ids.len() == layers.len());
        let made_layers = image.history.iter().filter(|entry| !entry.empty_layer);
        let times: Vec<Time> = made_layers
            .map(|entry| entry.created.as_ref()?.parse().ok())
            .map(Option::unwrap_or_default)
            .collect();
        let times = Some(times).filter(|times| times.len() == layers.len());

        let mut annotated = Vec::with_capacity(layers.len());
        for (at, layer) in layers.iter().enumerate() {
            let told = diff_ids.and_then(|ids| ids.get(at)?.parse().ok());
            let annotations = LayerAnnotations {
                media_type: oci::normalise_layer(&layer.media_type).to_owned(),
                diff_id: match told {
                    Some(diff_id) => diff_id,
                    None => self.diff_id(layer)?,
                },
                size: layer.size,
                created_at: match &times {
                    Some(times) => times.get(at).copied().unwrap_or_default(),
                    None => self.created_at(layer),
                },
            };
            annotated.push((layer.digest, annotations));
        }
        Ok(annotated)
    }

    /// The diffID that the descriptor tells, else the blob's own.
    fn diff_id(&mut self, descriptor: &Descriptor) -> Result<Digest> {
        let blob = descriptor.digest;
        if let Some(told) = descriptor.annotations.get(oci::UNCOMPRESSED)
            && !told.is_empty()
        {
            return told
                .parse()
                .with_context(|| format!("layer {blob}: its annotation {}", oci::UNCOMPRESSED));
        }
        if let Some(known) = self.diff_ids.get(&blob) {
            return Ok(*known);
        }
        let computed = self
            .compute_diff_id(&blob, descriptor.size)
            .with_context(|| format!("computing the diffID of layer {blob}"))?;
        self.diff_ids.insert(blob, computed);
        Ok(computed)
    }

    fn compute_diff_id(&self, blob: &Digest, size: u64) -> Result<Digest> {
        let shown = self.progress.blob(Activity::Hash, blob, size);
        let mut file = Hashing {
            inner: self.layout.open_blob(blob, size)?,
            hasher: Sha256::new(),
            shown: Arc::clone(&shown),
        };
        let computed = diff_id::compute(&mut file);
        if computed.is_err() {
            // Whether it is the blob that is damaged tells only the whole of it.
            io::copy(&mut file, &mut io::sink()).context("reading the blob")?;
        }
        let actual = Digest::from_hasher(file.hasher);
        if actual != *blob {
            bail!("the blob in the layout is damaged: its bytes hash to {actual}");
        }
        shown.done();
        computed
    }
}

/// A reader that hashes what it gives.
struct Hashing<R> {
    inner: R,
    hasher: Sha256,
    shown: Arc<Blob>,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(buffer.get(..read).unwrap_or_default());
        self.shown.advance(read as u64);
        Ok(read)
    }
}

/// The blobs that `cache` needs, with their sizes. Fails where two sizes are given for one.
pub fn blobs_of(cache: &CacheConfig) -> Result<BTreeMap<Digest, u64>> {
    let mut blobs = BTreeMap::new();
    for content in cache.image.iter().flat_map(|image| &image.contents) {
        add(&mut blobs, content.digest, content.size)?;
    }
    for (at, layer) in cache.layers.iter().enumerate() {
        match &layer.annotations {
            Some(annotations) => add(&mut blobs, layer.blob, annotations.size)?,
            None => bail!("layer {at} ({}) has no annotations", layer.blob),
        };
    }
    Ok(blobs)
}

/// Whether the blob is new to `blobs`.
fn add(blobs: &mut BTreeMap<Digest, u64>, digest: Digest, size: u64) -> Result<bool> {
    match blobs.insert(digest, size) {
        None => Ok(true),
        Some(other) if other == size => Ok(false),
        Some(other) => bail!("blob {digest} is given two sizes, {other} and {size} bytes"),
    }
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
    let config = cache.to_local();
    let mut layers = Vec::with_capacity(cache.layers.len());
    for (at, layer) in cache.layers.iter().enumerate() {
        let Some(annotations) = &layer.annotations else {
            bail!("layer {at} ({}) has no annotations", layer.blob);
        };
        let mut descriptor = Descriptor::new(&annotations.media_type, layer.blob, annotations.size);
        if !annotations.created_at.is_unknown() {
            let created_at = annotations.created_at.to_string();
            descriptor
                .annotations
                .insert(oci::CREATED_AT.to_owned(), created_at);
        }
        let diff_id = annotations.diff_id.to_string();
        descriptor
            .annotations
            .insert(oci::UNCOMPRESSED.to_owned(), diff_id);
        layers.push(descriptor);
    }
    let manifest = oci::to_json(&Manifest {
        schema_version: 2,
        media_type: oci::IMAGE_MANIFEST.to_owned(),
        config: Descriptor::new(oci::CACHE_CONFIG, Digest::of(&config), config.len() as u64),
        layers,
    })
    .context("writing the cache's manifest")?;
    Ok(Documents {
        descriptor: Descriptor::new(
            oci::IMAGE_MANIFEST,
            Digest::of(&manifest),
            manifest.len() as u64,
        ),
        config,
        manifest,
    })
}
