//! The JSON documents of a cache in a layout or a registry.

use anyhow::{Context, Result};

use super::{CacheConfig, check_written};
use crate::cache::digest::Digest;
use crate::cache::oci::{self, Descriptor, ImageManifest};

/// Bytes of the largest cache config that BuildKit's local and registry imports read.
pub const BUILDKIT_CONFIG_LIMIT: u64 = 1 << 20;

/// A cache as BuildKit's image-manifest form: what an import writes, and what `serve` answers.
pub struct Documents {
    pub config: Vec<u8>,
    pub manifest: Vec<u8>,
    /// Of `manifest`, without annotations.
    pub descriptor: Descriptor,
}

impl Documents {
    /// Byte for byte what BuildKit's `--cache-to type=local` writes for this cache.
    ///
    /// # Errors
    /// One of them would exceed [`super::DOCUMENT_LIMIT`].
    pub fn of(cache: &CacheConfig) -> Result<Self> {
        let config = cache.to_local();
        let layers = cache.layers.iter().map(|layer| {
            let annotations = &layer.annotations;
            let mut descriptor =
                Descriptor::new(&annotations.media_type, layer.blob, annotations.size);
            let mut annotate = |name: &str, value: String| {
                descriptor.annotations.insert(name.to_owned(), value);
            };
            if !annotations.created_at.is_unknown() {
                annotate(oci::CREATED_AT, annotations.created_at.to_string());
            }
            annotate(oci::UNCOMPRESSED, annotations.diff_id.to_string());
            descriptor
        });
        let manifest = oci::to_json(&ImageManifest {
            schema_version: 2,
            media_type: oci::IMAGE_MANIFEST.to_owned(),
            config: Descriptor::new(oci::CACHE_CONFIG, Digest::of(&config), config.len() as u64),
            layers: layers.collect(),
        })
        .context("writing the cache's manifest")?;
        check_written("config", &config)?;
        check_written("manifest", &manifest)?;
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::oci::ImageIndex;

    fn fixture(name: &str) -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures")
            .join(name)
    }

    fn s3(name: &str) -> CacheConfig {
        let path = fixture(&format!("s3-manifests/{name}.json"));
        CacheConfig::parse_s3(&std::fs::read(path).unwrap()).unwrap()
    }

    fn text(bytes: &[u8]) -> &str {
        std::str::from_utf8(bytes).unwrap()
    }

    #[test]
    fn the_documents_of_each_cache_are_the_ones_that_buildkit_wrote() {
        for (name, folder) in [
            ("max", "local-max"),
            ("min", "local-min"),
            ("multiarch", "local-multiarch"),
        ] {
            let documents = Documents::of(&s3(name)).unwrap();
            let blob = |descriptor: &Descriptor| {
                let path = format!("{folder}/blobs/sha256/{}", descriptor.digest.hex());
                std::fs::read(fixture(&path)).unwrap()
            };
            let index = std::fs::read(fixture(&format!("{folder}/index.json"))).unwrap();
            let index: ImageIndex = serde_json::from_slice(&index).unwrap();
            let mut root = index.manifests[0].clone();
            let manifest = blob(&root);
            assert_eq!(text(&documents.manifest), text(&manifest), "{name}");
            root.annotations.clear();
            assert_eq!(documents.descriptor, root);
            let config = ImageManifest::parse(&root, &manifest).unwrap().config;
            assert_eq!(text(&documents.config), text(&blob(&config)), "{name}");
        }
    }

    #[test]
    fn an_empty_cache_has_an_empty_array_of_layers() {
        let documents = Documents::of(&CacheConfig::default()).unwrap();
        assert_eq!(text(&documents.config), "{}");
        assert_eq!(
            text(&documents.manifest),
            format!(
                r#"{{"schemaVersion":2,"mediaType":"{}","config":{{"mediaType":"{}","digest":"{}","size":2}},"layers":[]}}"#,
                oci::IMAGE_MANIFEST,
                oci::CACHE_CONFIG,
                Digest::of(b"{}")
            )
        );
    }
}
