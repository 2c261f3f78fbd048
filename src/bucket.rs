//! A cache's home on S3, the counterpart of [`Layout`](crate::layout::Layout): where its manifests
//! and blobs are, which of them exist, and what else is stored there.
//!
//! - `survey` finds out which of some blobs exist.
//! - `listing` lists all objects below a prefix, in parallel where there are many.
//! - `names` lists the manifests.
//! - `manifest` reads one, and writes one.
//! - `rewrite` writes one without its bad blobs.
//! - `watch` follows the caches that need blobs while blobs are deleted.
//! - `inventory` is the whole bucket in one value: every cache, every blob that one needs, and how
//!   much else there is.
//! - `publish` brings a cache to the bucket.
//! - `rules` are its lifecycle rules.

mod inventory;
mod listing;
mod manifest;
mod names;
pub mod publish;
mod rewrite;
pub mod rules;
mod survey;
pub mod watch;

use std::sync::Arc;

use anyhow::Result;

pub use self::inventory::{Cache, Contents, Inventory, Tally};
pub use self::listing::Pages;
pub use self::manifest::Unreadable;
pub use self::names::Named;
pub use self::survey::Certainty;
use crate::cache::digest::Digest;
use crate::config::S3Config;
use crate::progress::Progress;
use crate::store::{ObjectInfo, Store, Upload};

/// What a key stands for. Blobs and manifests may share a prefix, or one prefix may contain the
/// other: a key that can be a blob's is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key<'a> {
    Blob(Digest),
    /// The name of a cache, which may contain slashes.
    Manifest(&'a str),
    /// Neither.
    Other,
}

/// A bucket, and where a spec's caches are in it. Cheap to clone.
#[derive(Clone)]
pub struct Bucket {
    store: Arc<dyn Store>,
    config: S3Config,
    progress: Progress,
}

impl Bucket {
    /// Sends nothing.
    pub fn new(store: Arc<dyn Store>, config: &S3Config, progress: &Progress) -> Self {
        Bucket {
            store,
            config: config.clone(),
            progress: progress.clone(),
        }
    }

    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    pub fn config(&self) -> &S3Config {
        &self.config
    }

    /// The key of a blob.
    pub fn blob_key(&self, digest: &Digest) -> String {
        self.config.blob_key(digest)
    }

    /// What `key` stands for, given the object's size in bytes: an empty object whose key ends with a
    /// slash is what consoles make as a folder.
    pub fn parse_key<'a>(&self, key: &'a str, size: u64) -> Key<'a> {
        if let Some(Ok(digest)) = key.strip_prefix(&self.blobs()).map(str::parse) {
            return Key::Blob(digest);
        }
        match key.strip_prefix(&self.manifests()) {
            None | Some("") => Key::Other,
            Some(name) if name.ends_with('/') && size == 0 => Key::Other,
            Some(name) => Key::Manifest(name),
        }
    }

    /// What the keys of all blobs begin with.
    fn blobs(&self) -> String {
        format!("{}{}", self.config.prefix, self.config.blobs_prefix)
    }

    /// What the keys of all manifests begin with.
    fn manifests(&self) -> String {
        format!("{}{}", self.config.prefix, self.config.manifests_prefix)
    }

    /// The unfinished multipart uploads of blobs. Empty if the store or the role does not allow
    /// listing them.
    pub async fn unfinished_uploads(&self) -> Vec<(Digest, Upload)> {
        let blobs = self.blobs();
        match self.store.list_uploads(&blobs).await {
            Ok(uploads) => uploads
                .into_iter()
                .filter_map(|upload| {
                    let digest = upload.key.strip_prefix(&blobs)?.parse().ok()?;
                    Some((digest, upload))
                })
                .collect(),
            Err(error) => {
                self.progress
                    .debug(&format!("not looking for abandoned uploads: {error}"));
                Vec::new()
            }
        }
    }

    /// What the store says about a blob; `None` if it is not there.
    ///
    /// # Errors
    /// The store's.
    pub async fn blob(&self, digest: &Digest) -> Result<Option<ObjectInfo>> {
        Ok(self.store.head(&self.blob_key(digest)).await?)
    }
}
