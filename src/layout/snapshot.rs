//! From a manifest in a layout to what an export sends, and from an S3 manifest to the documents
//! that an import writes.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::cache::diff_id;
use crate::cache::digest::Digest;
use crate::cache::oci::{self, Descriptor, Index, Manifest};
use crate::cache::{CacheConfig, Content, Image, LayerAnnotations, Time};
use crate::layout::Layout;
use crate::progress::{Blob, Progress, Verb};

/// Indexes within indexes, counted from the chosen one: nobody nests them as deep, and a hostile
/// layout could for ever.
const MAX_DEPTH: usize = 8;

/// Bytes of documents that one manifest can make us read. Many manifests may share a large config,
/// each of them small: a hostile layout could have it read without end.
const DOCUMENTS_LIMIT: u64 = 512 << 20;

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
    /// tells, by decompressing; `progress` is told of each such blob.
    pub fn read(layout: &Layout, root: &Descriptor, progress: &Progress) -> Result<Self> {
        let mut reader = Reader {
            layout,
            progress,
            diff_ids: HashMap::new(),
            documents: Cell::new(0),
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
    /// Bytes of documents read so far.
    documents: Cell<u64>,
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
        let read = self.documents.get().saturating_add(descriptor.size);
        if read > DOCUMENTS_LIMIT {
            bail!(
                "reading {kind} {}: the documents before it have more than {DOCUMENTS_LIMIT} bytes \
                 with it",
                descriptor.digest
            );
        }
        self.documents.set(read);
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

    /// When the layer was made, where the descriptor tells.
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
        let image: ImageConfig = oci::object_from_json(&bytes)
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
        let shown = self.progress.blob(Verb::Hash, blob, size);
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
        let computed = computed?;
        shown.done();
        Ok(computed)
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

/// The blobs that `cache` needs, with their sizes. Fails where two sizes are given for one, and where
/// all sizes together are more than can be counted: whoever adds some of them up need not fear.
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
    let total: u128 = blobs.values().map(|&size| u128::from(size)).sum();
    if i64::try_from(total).is_err() {
        bail!("the blobs are said to have {total} bytes together, which cannot be");
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::{Path, PathBuf};
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;
    use crate::layout::Selection;

    fn fixture(path: &str) -> PathBuf {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        fixtures.join(path)
    }

    fn s3(name: &str) -> Vec<u8> {
        std::fs::read(fixture(&format!("s3-manifests/{name}.json"))).unwrap()
    }

    fn read(folder: &Path) -> Result<Snapshot> {
        let layout = Layout::open(folder, Duration::ZERO)?;
        let root = layout.select(&Selection::Default)?;
        Snapshot::read(&layout, &root, &Progress::silent())
    }

    fn text(bytes: Vec<u8>) -> String {
        String::from_utf8(bytes).unwrap()
    }

    fn s3_of(name: &str) -> String {
        text(read(&fixture(name)).unwrap().cache.to_s3().unwrap())
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

        fn read(&self, root: &Descriptor) -> Result<Snapshot> {
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
        let max = read(&fixture("local-max")).unwrap().cache;
        assert_eq!(text(max.min().to_s3().unwrap()), text(s3("min")));
    }

    #[test]
    fn the_zstd_cache_has_the_same_records_over_its_own_layers() {
        let zstd = read(&fixture("local-zstd")).unwrap().cache;
        let max = read(&fixture("local-max")).unwrap().cache;
        // Layers sort by blob, so that results have other numbers: the diffIDs are the same.
        let results = |cache: &CacheConfig| -> Vec<_> {
            let diff_id = |at: usize| cache.layers[at].annotations.as_ref().unwrap().diff_id;
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
            let annotations = layer.annotations.as_ref().unwrap();
            assert!(annotations.media_type.ends_with(".tar+zstd"));
            assert!(annotations.created_at.is_unknown());
        }
    }

    #[test]
    fn the_documents_of_each_cache_are_the_ones_that_buildkit_wrote() {
        for (name, folder) in [
            ("max", "local-max"),
            ("min", "local-min"),
            ("multiarch", "local-multiarch"),
        ] {
            let cache = CacheConfig::parse_s3(&s3(name)).unwrap();
            let documents = documents(&cache).unwrap();
            let layout = Layout::open(&fixture(folder), Duration::ZERO).unwrap();
            let mut root = layout.select(&Selection::Default).unwrap();
            let manifest = layout.read_document(&root).unwrap();
            assert_eq!(text(documents.manifest), text(manifest.clone()), "{name}");
            root.annotations.clear();
            assert_eq!(documents.descriptor, root);
            let config = Manifest::parse(&root, &manifest).unwrap().config;
            let config = layout.read_document(&config).unwrap();
            assert_eq!(text(documents.config), text(config), "{name}");
        }
    }

    #[test]
    fn an_empty_cache_has_an_empty_array_of_layers() {
        let documents = documents(&CacheConfig::default()).unwrap();
        assert_eq!(text(documents.config), "{}");
        assert_eq!(
            text(documents.manifest),
            format!(
                r#"{{"schemaVersion":2,"mediaType":"{}","config":{{"mediaType":"{}","digest":"{}","size":2}},"layers":[]}}"#,
                oci::IMAGE_MANIFEST,
                oci::CACHE_CONFIG,
                Digest::of(b"{}")
            )
        );
    }

    #[test]
    fn an_inline_cache_gives_the_min_manifest_and_the_image() {
        let snapshot = read(&fixture("image-inline")).unwrap();
        let mut cache = snapshot.cache.clone();
        let image = cache.image.take().unwrap();
        assert_eq!(text(cache.to_s3().unwrap()), text(s3("min")));
        assert_eq!(image.contents.len(), 7);
        let with_image = text(snapshot.cache.to_s3().unwrap());
        let min = text(s3("min"));
        let start = min.strip_suffix('}').unwrap();
        assert!(with_image.starts_with(&format!("{start},\"layercache\":{{\"version\":1,")));
    }

    #[test]
    fn an_image_is_every_blob_of_its_layout() {
        for name in ["image-plain", "image-inline", "image-multiarch"] {
            let snapshot = read(&fixture(name)).unwrap();
            let image = snapshot.cache.image.as_ref().unwrap();
            let mut files = BTreeMap::new();
            for file in std::fs::read_dir(fixture(name).join("blobs/sha256")).unwrap() {
                let file = file.unwrap();
                let digest = format!("sha256:{}", file.file_name().to_str().unwrap());
                files.insert(digest.parse().unwrap(), file.metadata().unwrap().len());
            }
            assert_eq!(snapshot.blobs, files, "{name}");
            let contents = image.contents.iter().map(|c| (c.digest, c.size));
            assert!(contents.eq(files), "{name}");
            let index = std::fs::read(fixture(name).join("index.json")).unwrap();
            let index: Index = serde_json::from_slice(&index).unwrap();
            assert_eq!(image.root, index.manifests[0]);
            let bytes = snapshot.cache.to_s3().unwrap();
            assert_eq!(CacheConfig::parse_s3(&bytes).unwrap(), snapshot.cache);
        }
    }

    #[test]
    fn the_layers_of_two_platforms_are_those_of_the_cache_of_both() {
        let image = read(&fixture("image-multiarch")).unwrap().cache;
        let cache = CacheConfig::parse_s3(&s3("multiarch")).unwrap();
        assert_eq!(image.layers, cache.layers);
        assert_eq!(image.records, []);
    }

    #[test]
    fn diff_ids_that_nothing_tells_are_computed() {
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
        let snapshot = made.read(&made.manifest(&config, &layers)).unwrap();
        let diff_ids: Vec<_> = snapshot
            .cache
            .layers
            .iter()
            .map(|layer| layer.annotations.as_ref().unwrap())
            .map(|annotations| (annotations.media_type.as_str(), annotations.diff_id))
            .collect();
        let (one, two) = (Digest::of(b"one"), Digest::of(b"two"));
        assert_eq!(diff_ids, [(TAR, two), (TAR_GZIP, one), (TAR, two)]);
        let sizes = layers.map(|layer| (layer.digest, layer.size));
        assert_eq!(snapshot.blobs, BTreeMap::from(sizes));
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
        let snapshot = made.read(&made.index(&[image, nested])).unwrap();
        let layers = &snapshot.cache.layers;
        assert_eq!(layers.len(), 1);
        assert_eq!(layers[0].blob, layer.digest);
        let annotations = layers[0].annotations.as_ref().unwrap();
        assert_eq!(annotations.diff_id, Digest::of(b"told"));
        let files: BTreeSet<String> = std::fs::read_dir(made.path().join("blobs/sha256"))
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        let blobs: BTreeSet<String> = snapshot.blobs.keys().map(Digest::hex).collect();
        assert_eq!(blobs, files);
    }

    #[test]
    fn layers_that_their_vendor_keeps_may_be_absent() {
        let made = Made::new();
        let config = made.blob(oci::IMAGE_CONFIG, b"{}");
        let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
        let absent = Descriptor::new(foreign, Digest::of(b"absent"), 6);
        let present = made.blob(TAR, b"present");
        let snapshot = made
            .read(&made.manifest(&config, &[absent.clone(), present.clone()]))
            .unwrap();
        assert_eq!(snapshot.cache.layers, []);
        assert!(!snapshot.blobs.contains_key(&absent.digest));
        assert!(snapshot.blobs.contains_key(&present.digest));
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
    fn indexes_are_not_followed_for_ever() {
        let made = Made::new();
        let mut root = made.index(&[]);
        for _ in 0..MAX_DEPTH - 1 {
            root = made.index(&[root]);
        }
        assert_eq!(made.read(&root).unwrap().blobs.len(), MAX_DEPTH);
        root = made.index(&[root]);
        let error = made.error(&root);
        assert!(error.contains("is nested in more than 8 others"), "{error}");
    }

    #[test]
    fn what_is_no_manifest_is_refused_by_its_name() {
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
    fn an_inline_cache_that_is_none_is_an_error_that_names_the_config() {
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
