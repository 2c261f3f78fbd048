//! Writes a cache into a layout: as BuildKit's image-manifest form, or as the image it came with.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use super::Layout;
use super::tag::Tagged;
use crate::cache::CacheConfig;
use crate::cache::digest::Digest;
use crate::cache::documents::Documents;
use crate::cache::oci::Descriptor;
use crate::progress::Progress;

/// How often documents that another process keeps deleting are written again.
const ATTEMPTS: usize = 10;

/// What `Layout::publish_cache` did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Published {
    /// The tag is set to this manifest. `config_size` is that of the cache config in bytes, 0 for an
    /// image.
    Done { manifest: Digest, config_size: u64 },
    /// Nothing is set: another process has deleted these blobs of the cache. Fetch them and try again.
    Gone(Vec<(Digest, u64)>),
}

impl Layout {
    /// Writes the documents of `cache` and points `tag` to it, provided that all its blobs are there
    /// at that moment. For a cache with an image, the image is what the tag points to; what the
    /// manifest on S3 says of it is not trusted.
    ///
    /// # Errors
    /// The image is not what the cache says, a document is too large, or the layout cannot be
    /// written to.
    pub fn publish_cache(&self, tag: &str, cache: &CacheConfig) -> Result<Published> {
        let blobs = cache.blobs()?;
        match &cache.image {
            Some(image) => self.publish_image(tag, &image.root, &blobs),
            None => self.publish_documents(tag, &Documents::of(cache)?, blobs),
        }
    }

    fn publish_image(
        &self,
        tag: &str,
        root: &Descriptor,
        blobs: &BTreeMap<Digest, u64>,
    ) -> Result<Published> {
        if let Err(error) = self.check_complete(root) {
            let gone = self.gone(blobs)?;
            if gone.is_empty() {
                return Err(error.context("checking the image that came from S3"));
            }
            return Ok(Published::Gone(gone));
        }
        Ok(match self.publish_tag(tag, root, blobs)? {
            Tagged::Done => Published::Done {
                manifest: root.digest,
                config_size: 0,
            },
            Tagged::Gone(gone) => Published::Gone(gone),
        })
    }

    fn publish_documents(
        &self,
        tag: &str,
        documents: &Documents,
        mut blobs: BTreeMap<Digest, u64>,
    ) -> Result<Published> {
        let entry = &documents.descriptor;
        let config = Digest::of(&documents.config);
        let config_size = documents.config.len() as u64;
        blobs.extend([(config, config_size), (entry.digest, entry.size)]);
        for _ in 0..ATTEMPTS {
            self.write_document(&config, &documents.config)?;
            self.write_document(&entry.digest, &documents.manifest)?;
            match self.publish_tag(tag, entry, &blobs)? {
                Tagged::Done => {
                    return Ok(Published::Done {
                        manifest: entry.digest,
                        config_size,
                    });
                }
                Tagged::Gone(mut gone) => {
                    gone.retain(|(digest, _)| *digest != config && *digest != entry.digest);
                    if !gone.is_empty() {
                        return Ok(Published::Gone(gone));
                    }
                }
            }
        }
        bail!(
            "another process keeps deleting the cache's documents from {}",
            self.root.display()
        )
    }

    /// Makes sure that everything `root` refers to, directly or through other manifests, is in the
    /// layout.
    ///
    /// # Errors
    /// The first blob that is absent or of another size, or an invalid document.
    pub fn check_complete(&self, root: &Descriptor) -> Result<()> {
        let blobs = self.read_cache(root, &Progress::silent())?.blobs()?;
        match self.gone(&blobs)?.first() {
            Some((digest, size)) => bail!(
                "{} refers to blob {digest} ({size} bytes), which is not in the layout",
                root.digest
            ),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::Selection;
    use crate::layout::tests::{fixture, prepared, put};

    fn s3(name: &str) -> CacheConfig {
        let path = fixture(&format!("s3-manifests/{name}.json"));
        CacheConfig::parse_s3(&std::fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn a_cache_is_tagged_only_when_all_its_blobs_are_there() {
        let (dir, layout) = prepared();
        let cache = s3("min");
        let mut gone: Vec<(Digest, u64)> = cache.blobs().unwrap().into_iter().collect();
        while !gone.is_empty() {
            let published = layout.publish_cache("latest", &cache).unwrap();
            assert_eq!(published, Published::Gone(gone.clone()));
            assert!(!dir.path().join("index.json").exists());
            let (digest, _) = gone.pop().unwrap();
            let blob = format!("local-max/blobs/sha256/{}", digest.hex());
            put(dir.path(), &std::fs::read(fixture(&blob)).unwrap());
        }
        let published = layout.publish_cache("latest", &cache).unwrap();
        let documents = Documents::of(&cache).unwrap();
        let expected = Published::Done {
            manifest: documents.descriptor.digest,
            config_size: documents.config.len() as u64,
        };
        assert_eq!(published, expected);
        let entry = layout.select(&Selection::Default).unwrap();
        layout.check_complete(&entry).unwrap();

        // Again with the tag in place: it is not enough that the index needs no change.
        let (digest, size) = cache.blobs().unwrap().pop_first().unwrap();
        let path = dir.path().join("blobs/sha256").join(digest.hex());
        std::fs::remove_file(path).unwrap();
        let published = layout.publish_cache("latest", &cache).unwrap();
        assert_eq!(published, Published::Gone(vec![(digest, size)]));
    }

    #[test]
    fn a_document_that_was_deleted_since_is_written_again() {
        let (dir, layout) = prepared();
        let cache = CacheConfig::default();
        let Documents { descriptor, .. } = Documents::of(&cache).unwrap();
        let manifest = dir
            .path()
            .join("blobs/sha256")
            .join(descriptor.digest.hex());
        layout.publish_cache("latest", &cache).unwrap();
        std::fs::remove_file(&manifest).unwrap();
        layout.publish_cache("latest", &cache).unwrap();
        layout.select(&Selection::Default).unwrap();
    }

    #[test]
    fn an_image_whose_listed_blob_has_gone_is_to_be_fetched_again_and_an_unlisted_one_is_an_error()
    {
        let (dir, layout) = prepared();
        let original = Layout::open(&fixture("image-inline"), Duration::ZERO).unwrap();
        let root = original.select(&Selection::Default).unwrap();
        let mut cache = original.read_cache(&root, &Progress::silent()).unwrap();
        for blob in std::fs::read_dir(fixture("image-inline/blobs/sha256")).unwrap() {
            put(dir.path(), &std::fs::read(blob.unwrap().path()).unwrap());
        }
        let (gone, size) = cache
            .blobs()
            .unwrap()
            .into_iter()
            .find(|(digest, _)| *digest != root.digest)
            .unwrap();
        let path = dir.path().join("blobs/sha256").join(gone.hex());
        std::fs::remove_file(path).unwrap();
        let published = layout.publish_cache("latest", &cache).unwrap();
        assert_eq!(published, Published::Gone(vec![(gone, size)]));

        cache.layers.clear();
        cache.records.clear();
        let image = cache.image.as_mut().unwrap();
        image.contents.retain(|content| content.digest != gone);
        let error = layout.publish_cache("latest", &cache).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains(&gone.to_string()), "{error}");
        assert!(!dir.path().join("index.json").exists());
    }
}
