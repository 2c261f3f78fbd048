//! Reads a cache from a layout: from a cache manifest in any of BuildKit's forms, or from an image.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;

use crate::cache::digest::{Digest, Hasher};
use crate::cache::oci::{self, AnyManifest, Descriptor, ImageManifest};
use crate::cache::{CacheConfig, Content, Image, LayerAnnotations, Time, add_blob, diff_id};
use crate::layout::Layout;
use crate::progress::{Blob, Progress, Verb};

/// Indexes within indexes, counted from the chosen one. Real images have two levels; a hostile layout
/// could have any number.
pub(super) const MAX_DEPTH: usize = 8;

/// Bytes of documents to read for one manifest. Otherwise, a hostile layout could make us read one
/// large config over and over, for many small manifests.
const DOCUMENTS_LIMIT: u64 = 512 << 20;

/// Annotation of an index entry that distinguishes attestations from images.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";

impl Layout {
    /// Reads the whole cache (`mode=max`) below the manifest that `root` describes. Computes missing
    /// diffIDs by decompressing the blobs, and shows that in `progress`.
    ///
    /// # Errors
    /// A document is absent, damaged or invalid, or a blob whose diffID is missing cannot be read.
    pub fn read_cache(&self, root: &Descriptor, progress: &Progress) -> Result<CacheConfig> {
        let mut reader = Reader {
            layout: self,
            progress,
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

struct Reader<'a> {
    layout: &'a Layout,
    progress: &'a Progress,
    /// The diffIDs computed so far, by blob.
    diff_ids: HashMap<Digest, Digest>,
    /// Bytes of documents read so far.
    documents: Cell<u64>,
}

impl Reader<'_> {
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
        self.layout
            .read_document(descriptor)
            .with_context(|| format!("reading {kind} {} of the layout", descriptor.digest))
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
            .with_context(|| format!("cache config {} of the layout", config.digest))
    }

    /// When the layer was created, if its descriptor says so.
    fn created_at(&self, descriptor: &Descriptor) -> Time {
        let Some(text) = descriptor.annotations.get(oci::CREATED_AT) else {
            return Time::UNKNOWN;
        };
        text.parse().unwrap_or_else(|error| {
            self.progress.warn(&format!(
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
            // Windows base layers stay with their vendor.
            if oci::is_nondistributable(&layer.media_type)
                && !self.layout.has_blob(&layer.digest, layer.size)
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
            .with_context(|| format!("reading image config {} of the layout", config.digest))?;
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
            .with_context(|| format!("image config {} of the layout", config.digest))
            .map(Some)
    }

    fn image_layers(
        &mut self,
        image: &ImageConfig,
        layers: &[Descriptor],
    ) -> Result<Vec<(Digest, LayerAnnotations)>> {
        // Where their number is not that of the layers, they say nothing about any of them.
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
            .compute_diff_id(&blob, descriptor.size)
            .with_context(|| format!("computing the diffID of layer {blob}"))?;
        self.diff_ids.insert(blob, computed);
        Ok(computed)
    }

    fn compute_diff_id(&self, blob: &Digest, size: u64) -> Result<Digest> {
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::{Path, PathBuf};
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;
    use crate::cache::oci::ImageIndex;
    use crate::layout::Selection;

    fn fixture(path: &str) -> PathBuf {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        fixtures.join(path)
    }

    fn s3(name: &str) -> Vec<u8> {
        std::fs::read(fixture(&format!("s3-manifests/{name}.json"))).unwrap()
    }

    fn read(folder: &Path) -> Result<CacheConfig> {
        let layout = Layout::open(folder, Duration::ZERO)?;
        let root = layout.select(&Selection::Default)?;
        layout.read_cache(&root, &Progress::silent())
    }

    fn text(bytes: Vec<u8>) -> String {
        String::from_utf8(bytes).unwrap()
    }

    fn s3_of(name: &str) -> String {
        text(read(&fixture(name)).unwrap().to_s3().unwrap())
    }

    fn error_of(folder: &Path) -> String {
        format!("{:#}", read(folder).unwrap_err())
    }

    /// A layout made by hand, with one entry.
    struct Made {
        folder: tempfile::TempDir,
    }

    impl Made {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            std::fs::create_dir_all(folder.path().join("blobs/sha256")).unwrap();
            let version = br#"{"imageLayoutVersion":"1.0.0"}"#;
            std::fs::write(folder.path().join("oci-layout"), version).unwrap();
            Made { folder }
        }

        fn path(&self) -> &Path {
            self.folder.path()
        }

        fn blob_path(&self, digest: &Digest) -> PathBuf {
            self.path().join("blobs/sha256").join(digest.hex())
        }

        /// Adds a blob, and gives its descriptor.
        fn blob(&self, media_type: &str, bytes: &[u8]) -> Descriptor {
            let digest = Digest::of(bytes);
            std::fs::write(self.blob_path(&digest), bytes).unwrap();
            Descriptor::new(media_type, digest, bytes.len() as u64)
        }

        fn document(&self, media_type: &str, mut document: Value) -> Descriptor {
            document["schemaVersion"] = 2.into();
            self.blob(media_type, &serde_json::to_vec(&document).unwrap())
        }

        fn manifest(&self, config: &Descriptor, layers: &[Descriptor]) -> Descriptor {
            let document = json!({"config": config, "layers": layers});
            self.document(oci::IMAGE_MANIFEST, document)
        }

        fn index(&self, manifests: &[Descriptor]) -> Descriptor {
            self.document(oci::IMAGE_INDEX, json!({ "manifests": manifests }))
        }

        fn read(&self, root: &Descriptor) -> Result<CacheConfig> {
            let index = json!({"schemaVersion": 2, "manifests": [root]});
            std::fs::write(self.path().join("index.json"), index.to_string()).unwrap();
            read(self.path())
        }

        fn error(&self, root: &Descriptor) -> String {
            format!("{:#}", self.read(root).unwrap_err())
        }
    }

    const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
    const TAR_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::read::GzEncoder::new(content, flate2::Compression::fast());
        let mut bytes = Vec::new();
        encoder.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn each_form_of_the_cache_gives_the_manifest_that_buildkit_wrote() {
        for name in ["local-max", "local-index", "local-docker"] {
            assert_eq!(s3_of(name), text(s3("max")), "{name}");
        }
        assert_eq!(s3_of("local-min"), text(s3("min")));
        assert_eq!(s3_of("local-multiarch"), text(s3("multiarch")));
        let max = read(&fixture("local-max")).unwrap();
        assert_eq!(text(max.min().to_s3().unwrap()), text(s3("min")));
    }

    #[test]
    fn the_zstd_cache_has_the_same_records_over_its_own_layers() {
        let zstd = read(&fixture("local-zstd")).unwrap();
        let max = read(&fixture("local-max")).unwrap();
        // Layers sort by blob, so that results have other numbers: the diffIDs are the same.
        let results = |cache: &CacheConfig| -> Vec<_> {
            let diff_id = |at: usize| cache.layers[at].annotations.diff_id;
            let records = cache.records.iter();
            records
                .map(|record| {
                    let results = record.results.iter();
                    let results = results.map(|r| (diff_id(r.layer), r.created_at));
                    let results: Vec<_> = results.collect();
                    (record.digest.clone(), record.inputs.clone(), results)
                })
                .collect()
        };
        assert_eq!(results(&zstd), results(&max));
        for layer in &zstd.layers {
            let annotations = &layer.annotations;
            assert!(annotations.media_type.ends_with(".tar+zstd"));
            assert!(annotations.created_at.is_unknown());
        }
    }

    #[test]
    fn an_inline_cache_gives_the_min_manifest_and_the_image() {
        let whole = read(&fixture("image-inline")).unwrap();
        let mut cache = whole.clone();
        let image = cache.image.take().unwrap();
        assert_eq!(text(cache.to_s3().unwrap()), text(s3("min")));
        assert_eq!(image.contents.len(), 7);
        let with_image = text(whole.to_s3().unwrap());
        let min = text(s3("min"));
        let start = min.strip_suffix('}').unwrap();
        assert!(with_image.starts_with(&format!("{start},\"layercache\":{{\"version\":1,")));
    }

    #[test]
    fn an_image_is_every_blob_of_its_layout() {
        for name in ["image-plain", "image-inline", "image-multiarch"] {
            let cache = read(&fixture(name)).unwrap();
            let image = cache.image.as_ref().unwrap();
            let mut files = BTreeMap::new();
            for file in std::fs::read_dir(fixture(name).join("blobs/sha256")).unwrap() {
                let file = file.unwrap();
                let digest = format!("sha256:{}", file.file_name().to_str().unwrap());
                files.insert(digest.parse().unwrap(), file.metadata().unwrap().len());
            }
            assert_eq!(cache.blobs().unwrap(), files, "{name}");
            let contents = image.contents.iter().map(|c| (c.digest, c.size));
            assert!(contents.eq(files), "{name}");
            let index = std::fs::read(fixture(name).join("index.json")).unwrap();
            let mut index: ImageIndex = serde_json::from_slice(&index).unwrap();
            index.manifests[0].annotations.remove(oci::REF_NAME);
            assert_eq!(image.root, index.manifests[0]);
            let bytes = cache.to_s3().unwrap();
            assert_eq!(CacheConfig::parse_s3(&bytes).unwrap(), cache);
        }
    }

    #[test]
    fn the_layers_of_two_platforms_are_those_of_the_cache_of_both() {
        let image = read(&fixture("image-multiarch")).unwrap();
        let cache = CacheConfig::parse_s3(&s3("multiarch")).unwrap();
        assert_eq!(image.layers, cache.layers);
        assert_eq!(image.records, []);
    }

    #[test]
    fn missing_diff_ids_are_computed() {
        let made = Made::new();
        let layers = [
            made.blob(
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
                &gzip(b"one"),
            ),
            made.blob(TAR, b"two"),
        ];
        let cache = json!({"layers": [
            {"blob": layers[1].digest, "parent": 1},
            {"blob": layers[0].digest, "parent": -1},
            {"blob": layers[1].digest, "parent": -1},
        ]});
        let config = made.blob(oci::CACHE_CONFIG, cache.to_string().as_bytes());
        let cache = made.read(&made.manifest(&config, &layers)).unwrap();
        let diff_ids: Vec<_> = cache
            .layers
            .iter()
            .map(|layer| &layer.annotations)
            .map(|annotations| (annotations.media_type.as_str(), annotations.diff_id))
            .collect();
        let (one, two) = (Digest::of(b"one"), Digest::of(b"two"));
        assert_eq!(diff_ids, [(TAR, two), (TAR_GZIP, one), (TAR, two)]);
        let sizes = layers.map(|layer| (layer.digest, layer.size));
        assert_eq!(cache.blobs().unwrap(), BTreeMap::from(sizes));
    }

    #[test]
    fn a_damaged_blob_gives_no_diff_id() {
        let made = Made::new();
        let layer = made.blob(TAR_GZIP, &gzip(b"one"));
        for damaged in [gzip(b"two"), b"\x1f\x8b\x08 and no more gzip.".to_vec()] {
            let mut bytes = damaged;
            bytes.resize(layer.size as usize, 0);
            std::fs::write(made.blob_path(&layer.digest), bytes).unwrap();
            let cache = json!({"layers": [{"blob": layer.digest, "parent": -1}]});
            let config = made.blob(oci::CACHE_CONFIG, cache.to_string().as_bytes());
            let error = made.error(&made.manifest(&config, std::slice::from_ref(&layer)));
            assert!(error.contains(&layer.digest.to_string()), "{error}");
            assert!(error.contains("is damaged"), "{error}");
        }
    }

    #[test]
    fn a_layer_without_a_descriptor_is_named() {
        let made = Made::new();
        let blob = Digest::of(b"elsewhere");
        let cache = json!({"layers": [{"blob": blob, "parent": -1}]});
        let config = made.blob(oci::CACHE_CONFIG, cache.to_string().as_bytes());
        let error = made.error(&made.manifest(&config, &[]));
        let expected = format!("no descriptor of its blob {blob}");
        assert!(error.contains(&expected), "{error}");
    }

    #[test]
    fn attestations_and_artifacts_are_contents_and_no_layers() {
        let made = Made::new();
        let image_config = |diff_ids: &[Digest]| {
            let config = json!({"rootfs": {"type": "layers", "diff_ids": diff_ids}});
            made.blob(oci::IMAGE_CONFIG, config.to_string().as_bytes())
        };
        let layer = made.blob(TAR_GZIP, &gzip(b"one"));
        let image = made.manifest(
            &image_config(&[Digest::of(b"told")]),
            std::slice::from_ref(&layer),
        );
        let statement = made.blob("application/vnd.in-toto+json", b"{}");
        let mut attestation = made.manifest(&image_config(&[]), &[statement]);
        attestation
            .annotations
            .insert(REFERENCE_TYPE.to_owned(), "attestation-manifest".to_owned());
        let helm = made.blob("application/vnd.cncf.helm.config.v1+json", b"{\"a\":1}");
        let chart = made.blob(
            "application/vnd.cncf.helm.chart.content.v1.tar+gzip",
            &gzip(b"chart"),
        );
        let helm = made.manifest(&helm, &[chart]);
        let nested = made.index(&[helm, attestation]);
        let cache = made.read(&made.index(&[image, nested])).unwrap();
        let layers = &cache.layers;
        assert_eq!(layers.len(), 1);
        assert_eq!(layers[0].blob, layer.digest);
        let annotations = &layers[0].annotations;
        assert_eq!(annotations.diff_id, Digest::of(b"told"));
        let files: BTreeSet<String> = std::fs::read_dir(made.path().join("blobs/sha256"))
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        let blobs: BTreeSet<String> = cache.blobs().unwrap().keys().map(Digest::hex).collect();
        assert_eq!(blobs, files);
    }

    #[test]
    fn layers_that_have_to_come_from_their_vendor_may_be_absent() {
        let made = Made::new();
        let config = made.blob(oci::IMAGE_CONFIG, b"{}");
        let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
        let absent = Descriptor::new(foreign, Digest::of(b"absent"), 6);
        let present = made.blob(TAR, b"present");
        let cache = made
            .read(&made.manifest(&config, &[absent.clone(), present.clone()]))
            .unwrap();
        assert_eq!(cache.layers, []);
        assert!(!cache.blobs().unwrap().contains_key(&absent.digest));
        assert!(cache.blobs().unwrap().contains_key(&present.digest));
    }

    #[test]
    fn a_blob_of_two_sizes_is_an_error() {
        let made = Made::new();
        let config = made.blob(oci::IMAGE_CONFIG, b"{}");
        let layer = made.blob(TAR, b"layer");
        let mut longer = layer.clone();
        longer.size += 1;
        let error = made.error(&made.manifest(&config, &[layer, longer]));
        assert!(error.contains("two sizes, 5 and 6 bytes"), "{error}");
    }

    #[test]
    fn indexes_nested_too_deep_are_refused() {
        let made = Made::new();
        let mut root = made.index(&[]);
        for _ in 0..MAX_DEPTH - 1 {
            root = made.index(&[root]);
        }
        assert_eq!(made.read(&root).unwrap().blobs().unwrap().len(), MAX_DEPTH);
        root = made.index(&[root]);
        let error = made.error(&root);
        assert!(error.contains("is nested in more than 8 others"), "{error}");
    }

    #[test]
    fn what_is_not_a_manifest_is_refused_by_its_media_type() {
        let made = Made::new();
        for (media_type, expected) in [
            (
                "application/vnd.docker.distribution.manifest.v1+prettyjws",
                "schema 1, which is not supported",
            ),
            (
                "text/plain",
                "the media type \"text/plain\", which is not supported",
            ),
        ] {
            let error = made.error(&made.blob(media_type, b"{}"));
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn an_invalid_inline_cache_is_an_error_that_names_the_config() {
        let made = Made::new();
        for (cache, expected) in [
            ("%%%", "decoding the inline cache"),
            ("W10", "decoding the inline cache"),
            ("W3sibGF5ZXJzIjpbeyJsYXllciI6NX1dfV0=", "layer 5"),
        ] {
            let config = json!({ "moby.buildkit.cache.v0": cache });
            let config = made.blob(oci::IMAGE_CONFIG, config.to_string().as_bytes());
            let error = made.error(&made.manifest(&config, &[made.blob(TAR, b"layer")]));
            assert!(error.contains(expected), "{error}");
            assert!(error.contains(&config.digest.to_string()), "{error}");
        }
    }

    #[test]
    fn a_document_that_is_gone_is_named() {
        let made = Made::new();
        let root = Descriptor::new(oci::IMAGE_MANIFEST, Digest::of(b"gone"), 4);
        let index = json!({"schemaVersion": 2, "manifests": [&root]});
        std::fs::write(made.path().join("index.json"), index.to_string()).unwrap();
        let error = error_of(made.path());
        assert!(error.contains(&root.digest.to_string()), "{error}");
    }
}
