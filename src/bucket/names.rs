//! The caches of a bucket: what is below the manifests' prefix and not a blob.

use anyhow::Result;
use futures::stream::{BoxStream, StreamExt, TryStreamExt};

use crate::bucket::{Bucket, Key};
use crate::store::ObjectInfo;

/// A cache's name, and its manifest as a listing describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    pub name: String,
    pub key: String,
    pub info: ObjectInfo,
}

impl Bucket {
    /// The manifests, in no particular order. Ends after an error, which is the store's.
    pub fn names(&self) -> BoxStream<'_, Result<Named>> {
        self.objects_below(&self.manifests())
            .err_into::<anyhow::Error>()
            .map_ok(|objects| {
                let named = objects.into_iter().filter_map(|(key, info)| {
                    let Key::Manifest(name) = self.parse_key(&key, info.size) else {
                        return None;
                    };
                    let name = name.to_owned();
                    Some(Ok(Named { name, key, info }))
                });
                futures::stream::iter(named.collect::<Vec<_>>())
            })
            .try_flatten()
            .boxed()
    }
}
