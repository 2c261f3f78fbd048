//! Reads a cache from the documents that describe it: a cache manifest in any of BuildKit's forms, or an
//! image. Where the documents are, in a layout or among what a client pushed, is a trait.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;

use super::{CacheConfig, Content, Image, LayerAnnotations, Time, add_blob};
use crate::cache::digest::Digest;
use crate::cache::oci::{self, AnyManifest, Descriptor, ImageManifest};

/// Indexes within indexes, counted from the chosen one. Real images have two levels; a hostile layout
/// could have any number.
pub(crate) const MAX_DEPTH: usize = 8;

/// Bytes of documents to read for one manifest. Otherwise, a hostile layout could make us read one
/// large config over and over, for many small manifests.
const DOCUMENTS_LIMIT: u64 = 512 << 20;

/// Annotation of an index entry that distinguishes attestations from images.
pub(crate) const REFERENCE_TYPE: &str = "vnd.docker.reference.type";

/// Where the blobs of a cache are.
pub trait Blobs {
    /// The place in the words of an error, as in "of the layout".
    const PLACE: &'static str;

    /// Reads a whole small blob, its size and digest verified.
    ///
    /// # Errors
    /// It is absent, damaged, or too large for a document.
    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>>;

    /// Whether the blob is there, with this size in bytes.
    fn has(&self, digest: &Digest, size: u64) -> bool;

    /// The digest of a layer's decompressed content.
    ///
    /// # Errors
    /// The blob is absent, damaged, or cannot be decompressed.
    fn diff_id(&self, blob: &Digest, size: u64) -> Result<Digest>;

    /// Reports something odd that is not an error.
    fn warn(&self, text: &str);
}

/// Reads the whole cache (`mode=max`) below the manifest that `root` describes. A diffID that no
/// document gives is computed.
///
/// # Errors
/// A document is absent, damaged or invalid, or a blob whose diffID is missing cannot be read.
pub fn read_cache(root: &Descriptor, blobs: &impl Blobs) -> Result<CacheConfig> {
    let mut reader = Reader {
        blobs,
        diff_ids: HashMap::new(),
        documents: Cell::new(0),
    };
    match reader.manifest(root)? {
        AnyManifest::Image(manifest) if manifest.config.media_type == oci::CACHE_CONFIG => {
            reader.cache(&manifest.config, &manifest.layers)
        }
        AnyManifest::Index(index) => {
            let is_config = |entry: &&Descriptor| entry.media_type == oci::CACHE_CONFIG;
            // BuildKit writes the config last, and reads the last one.
            match index.manifests.iter().rfind(is_config) {
                Some(config) => reader.cache(config, &index.manifests),
                None => reader.image(root, AnyManifest::Index(index)),
            }
        }
        image => reader.image(root, image),
    }
}

/// The fields of an image's config that describe its layers.
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

struct Reader<'a, B> {
    blobs: &'a B,
    /// The diffIDs computed so far, by blob.
    diff_ids: HashMap<Digest, Digest>,
    /// Bytes of documents read so far.
    documents: Cell<u64>,
}

impl<B: Blobs> Reader<'_, B> {
    fn manifest(&self, descriptor: &Descriptor) -> Result<AnyManifest> {
        AnyManifest::check_type(descriptor)?;
        AnyManifest::parse(descriptor, &self.document("manifest", descriptor)?)
    }

    fn document(&self, kind: &str, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let read = self.documents.get().saturating_add(descriptor.size);
        if read > DOCUMENTS_LIMIT {
            bail!(
                "reading {kind} {}: with it, the documents of this manifest have more than \
                 {DOCUMENTS_LIMIT} bytes",
                descriptor.digest
            );
        }
        self.documents.set(read);
        self.blobs
            .document(descriptor)
            .with_context(|| format!("reading {kind} {} {}", descriptor.digest, B::PLACE))
    }

    /// Reads a cache from its config and the descriptors of its blobs.
    fn cache(&mut self, config: &Descriptor, descriptors: &[Descriptor]) -> Result<CacheConfig> {
        let bytes = self.document("cache config", config)?;
        let by_digest: HashMap<Digest, &Descriptor> =
            descriptors.iter().map(|d| (d.digest, d)).collect();
        let annotate = |at: usize, blob: &Digest| {
            // BuildKit writes one descriptor a layer in the same order, so that layers with the same
            // blob each have their own, but it reads them by digest.
            let same_place = descriptors.get(at).filter(|d| d.digest == *blob);
            let Some(descriptor) = same_place.or(by_digest.get(blob).copied()) else {
                bail!("the manifest has no descriptor of its blob {blob}");
            };
            Ok(LayerAnnotations {
                media_type: oci::normalise_layer(&descriptor.media_type).to_owned(),
                diff_id: self.diff_id(descriptor)?,
                size: descriptor.size,
                created_at: self.created_at(descriptor),
            })
        };
        CacheConfig::parse_local(&bytes, annotate)
            .with_context(|| format!("cache config {} {}", config.digest, B::PLACE))
    }

    /// When the layer was created, if its descriptor says so.
    fn created_at(&self, descriptor: &Descriptor) -> Time {
        let Some(text) = descriptor.annotations.get(oci::CREATED_AT) else {
            return Time::UNKNOWN;
        };
        text.parse().unwrap_or_else(|error| {
            self.blobs.warn(&format!(
                "layer {}: ignoring its time of creation: {error}",
                descriptor.digest
            ));
            Time::UNKNOWN
        })
    }

    /// Reads an image, or an index of images, with all that belongs to it.
    fn image(&mut self, root: &Descriptor, manifest: AnyManifest) -> Result<CacheConfig> {
        let mut contents = BTreeMap::new();
        let mut platforms = Vec::new();
        add_blob(&mut contents, root.digest, root.size)?;
        let mut unread = Vec::new();
        let mut next = Some((root.clone(), manifest, 0));
        while let Some((descriptor, manifest, depth)) = next {
            match manifest {
                AnyManifest::Image(manifest) => {
                    platforms.extend(self.platform(&descriptor, &manifest, &mut contents)?);
                }
                AnyManifest::Index(index) => {
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
                if add_blob(&mut contents, descriptor.digest, descriptor.size)? {
                    let manifest = self.manifest(&descriptor)?;
                    next = Some((descriptor, manifest, depth));
                    break;
                }
            }
        }

        let mut cache = CacheConfig::merged(platforms);
        let contents = contents.into_iter();
        cache.image = Some(Image {
            root: root.unnamed(),
            contents: contents
                .map(|(digest, size)| Content { digest, size })
                .collect(),
        });
        Ok(cache)
    }

    /// Reads one manifest of an image: adds its blobs to `contents`, and returns the cache of its layers,
    /// if they are those of a file system.
    fn platform(
        &mut self,
        descriptor: &Descriptor,
        manifest: &ImageManifest,
        contents: &mut BTreeMap<Digest, u64>,
    ) -> Result<Option<CacheConfig>> {
        let config = &manifest.config;
        add_blob(contents, config.digest, config.size)?;
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
            // Windows base layers are fetched from their vendor.
            if oci::is_nondistributable(&layer.media_type)
                && !self.blobs.has(&layer.digest, layer.size)
            {
                has_layers = false;
            } else {
                add_blob(contents, layer.digest, layer.size)?;
            }
        }
        if !has_layers {
            return Ok(None);
        }

        let bytes = self.document("image config", config)?;
        let image: ImageConfig = oci::object_from_json(&bytes)
            .with_context(|| format!("reading image config {} {}", config.digest, B::PLACE))?;
        let layers = self.image_layers(&image, &manifest.layers)?;
        let records = match &image.cache {
            None => b"[]".to_vec(),
            Some(text) => {
                // Go's decoder ignores line breaks.
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
            .with_context(|| format!("image config {} {}", config.digest, B::PLACE))
            .map(Some)
    }

    fn image_layers(
        &mut self,
        image: &ImageConfig,
        layers: &[Descriptor],
    ) -> Result<Vec<(Digest, LayerAnnotations)>> {
        // If there are more or fewer of them than layers, they cannot be matched.
        let diff_ids = Some(&image.rootfs.diff_ids).filter(|ids| ids.len() == layers.len());
        let times: Vec<Time> = image
            .history
            .iter()
            .filter(|entry| !entry.empty_layer)
            .map(|entry| entry.created.as_ref()?.parse().ok())
            .map(Option::unwrap_or_default)
            .collect();
        let times = Some(times).filter(|times| times.len() == layers.len());

        let mut annotated = Vec::with_capacity(layers.len());
        for (at, layer) in layers.iter().enumerate() {
            let annotations = LayerAnnotations {
                media_type: oci::normalise_layer(&layer.media_type).to_owned(),
                diff_id: match diff_ids.and_then(|ids| ids[at].parse().ok()) {
                    Some(diff_id) => diff_id,
                    None => self.diff_id(layer)?,
                },
                size: layer.size,
                created_at: match &times {
                    Some(times) => times[at],
                    None => self.created_at(layer),
                },
            };
            annotated.push((layer.digest, annotations));
        }
        Ok(annotated)
    }

    /// The diffID in the descriptor, or else computed from the blob.
    fn diff_id(&mut self, descriptor: &Descriptor) -> Result<Digest> {
        let blob = descriptor.digest;
        if let Some(written) = descriptor.annotations.get(oci::UNCOMPRESSED)
            && !written.is_empty()
        {
            return written
                .parse()
                .with_context(|| format!("its annotation {}", oci::UNCOMPRESSED));
        }
        if let Some(known) = self.diff_ids.get(&blob) {
            return Ok(*known);
        }
        let computed = self
            .blobs
            .diff_id(&blob, descriptor.size)
            .with_context(|| format!("computing the diffID of layer {blob}"))?;
        self.diff_ids.insert(blob, computed);
        Ok(computed)
    }
}
