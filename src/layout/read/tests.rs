use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::cache::oci::{self, ImageIndex};
use crate::cache::read::{MAX_DEPTH, REFERENCE_TYPE};
use crate::config::Selection;

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
