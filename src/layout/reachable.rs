//! Which blobs `index.json` reaches, through manifests of all forms. Pruning relies on it, so whatever
//! cannot be understood is an error.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};

use super::Layout;
use super::index::IndexJson;
use crate::cache::digest::Digest;
use crate::cache::oci::{AnyManifest, Descriptor};

/// What an index reaches.
#[derive(Debug, Default)]
pub(super) struct Reachable {
    /// All blobs that are named, whether or not they are in the layout.
    pub(super) blobs: BTreeSet<Digest>,
    /// The entries whose manifest is absent: what to call each, and the digest.
    pub(super) dangling: Vec<(String, Digest)>,
}

impl Layout {
    /// Follows every entry of `index`. Manifests below an entry may be absent, as in a copy of one
    /// platform.
    ///
    /// # Errors
    /// An entry or a manifest cannot be read or understood, so that what it reaches is unknown.
    pub(super) fn reachable(&self, index: &IndexJson) -> Result<Reachable> {
        let mut reachable = Reachable::default();
        let mut unread = Vec::new();
        for (label, descriptor) in index.entries() {
            let descriptor = match descriptor {
                Ok(descriptor) => descriptor,
                Err(reason) => bail!("the entry of {label} cannot be understood: {reason}"),
            };
            if self.blob_size(&descriptor.digest)?.is_none() {
                reachable.dangling.push((label, descriptor.digest));
                continue;
            }
            AnyManifest::check_type(&descriptor)
                .with_context(|| format!("the entry of {label} cannot be understood"))?;
            unread.push(descriptor);
        }
        while let Some(descriptor) = unread.pop() {
            let is_new = reachable.blobs.insert(descriptor.digest);
            if is_new && is_manifest(&descriptor) && self.blob_size(&descriptor.digest)?.is_some() {
                let bytes = self.read_document(&descriptor)?;
                match AnyManifest::parse(&descriptor, &bytes)? {
                    AnyManifest::Image(manifest) => {
                        let layers = manifest.layers.iter().map(|layer| layer.digest);
                        reachable
                            .blobs
                            .extend(layers.chain([manifest.config.digest]));
                    }
                    // Of a cache, its blobs and its config; of an image, its manifests.
                    AnyManifest::Index(index) => unread.extend(index.manifests),
                }
            }
        }
        Ok(reachable)
    }
}

/// Whether a blob refers to others. Unknown kinds of manifests count too: they fail to parse, so that
/// nothing they refer to is lost.
fn is_manifest(descriptor: &Descriptor) -> bool {
    let media_type = descriptor.media_type.as_str();
    AnyManifest::check_type(descriptor).is_ok()
        || media_type.contains("manifest")
        || media_type.contains(".index.")
}
