//! Keeps track of the caches that need blobs while blobs are deleted.
//!
//! Several specs can share blobs: each has its own prefix of manifests. So everything below the
//! spec's prefix that is not a blob is examined; anything that begins like a cache manifest is one,
//! and needs its blobs. A look costs a listing without the blobs, and reads only what is new or has
//! changed.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use futures::stream::{StreamExt, TryStreamExt};

use crate::bucket::manifest::Unread;
use crate::bucket::{Bucket, Cache, Contents, Key, Named};
use crate::cache::digest::Digest;
use crate::store::{Expected, Kind, ObjectInfo, read};

/// Objects that are neither blobs nor the spec's manifests: at most this many are examined.
pub const MOST_OTHERS: usize = 10_000;

/// Objects read at once.
const READS: usize = 16;

/// Bytes by which a manifest is recognised.
const HEAD: u64 = 1 << 10;

/// Where a manifest is: 0 for the bucket, further on for the places elsewhere; and its key.
type Id = (usize, String);

/// The caches that need a bucket's blobs.
pub struct Watch {
    /// The bucket, and places elsewhere.
    places: Vec<Bucket>,
    /// Whether not to look for caches of other specs.
    only_own: bool,
    /// Objects that have been read and are not manifests.
    seen: BTreeMap<Id, ObjectInfo>,
    caches: BTreeMap<Id, Watched>,
    /// There are more than [`MOST_OTHERS`].
    pub too_many_others: bool,
}

/// A cache that needs blobs.
#[derive(Debug, Clone)]
pub struct Watched {
    pub cache: Cache,
    /// Whether it is one of the spec's.
    pub ours: bool,
    /// `s3://bucket/key`
    pub address: String,
}

/// How an object was found.
struct Found {
    id: Id,
    info: ObjectInfo,
    /// The cache's name. `None`: it must be examined.
    name: Option<String>,
}

impl Watch {
    /// Sends nothing. `also` are places elsewhere whose caches need the blobs, too.
    pub fn new(bucket: &Bucket, also: &[Bucket], only_own: bool) -> Self {
        let places = std::iter::once(bucket).chain(also).cloned().collect();
        Watch {
            places,
            only_own,
            seen: BTreeMap::new(),
            caches: BTreeMap::new(),
            too_many_others: false,
        }
    }

    /// The spec's caches first, each group in order of their keys.
    pub fn caches(&self) -> impl Iterator<Item = &Watched> {
        let of = |ours: bool| self.caches.values().filter(move |cache| cache.ours == ours);
        of(true).chain(of(false))
    }

    /// Looks at everything, and reads what is new or has changed. Returns the caches that it read.
    ///
    /// # Errors
    /// The store's. An unreadable manifest is not an error.
    pub async fn look(&mut self) -> Result<Vec<Watched>> {
        let mut found = Vec::new();
        for at in 0..self.places.len() {
            found.extend(self.list(at).await?);
        }
        self.take_in(found).await
    }

    /// Looks at objects of the bucket that [`look`](Self::look) does not see, because their keys begin
    /// like a blob's.
    ///
    /// # Errors
    /// As [`look`](Self::look).
    pub async fn look_at(&mut self, objects: Vec<(String, ObjectInfo)>) -> Result<Vec<Watched>> {
        let found = objects
            .into_iter()
            .filter_map(|(key, info)| self.found(0, key, info))
            .collect();
        self.take_in(found).await
    }

    /// Notes that the manifest at `key` is deleted: if it appears again, it is another one.
    pub fn forget(&mut self, key: &str) {
        let id = (0, key.to_owned());
        self.seen.remove(&id);
        self.caches.remove(&id);
    }

    /// Everything at a place except blobs.
    async fn list(&mut self, at: usize) -> Result<Vec<Found>> {
        let place = self.places[at].clone();
        if at == 0 && !self.only_own && !self.too_many_others {
            let prefix = &place.config.prefix;
            if let Some(found) = self.list_below(at, prefix).await? {
                return Ok(found);
            }
            self.too_many_others = true;
        }
        let found = self.list_below(at, &place.manifests()).await?;
        Ok(found.unwrap_or_default())
    }

    /// Everything below a prefix except blobs. `None`: too many of the objects are not manifests.
    async fn list_below(&self, at: usize, prefix: &str) -> Result<Option<Vec<Found>>> {
        let mut pages = self.places[at].all_but_blobs(prefix);
        let mut found = Vec::new();
        let mut others = 0;
        while let Some(objects) = pages.try_next().await? {
            for (key, info) in objects {
                if let Some(object) = self.found(at, key, info) {
                    others += usize::from(object.name.is_none());
                    found.push(object);
                }
            }
            if others > MOST_OTHERS {
                return Ok(None);
            }
        }
        Ok(Some(found))
    }

    fn found(&self, at: usize, key: String, info: ObjectInfo) -> Option<Found> {
        let name = match self.places[at].parse_key(&key, info.size) {
            Key::Blob(_) => return None,
            Key::Manifest(name) => Some(name.to_owned()),
            // Another spec's blobs.
            Key::Other if is_digest(&key) || info.size == 0 || self.only_own => return None,
            Key::Other => None,
        };
        let id = (at, key);
        Some(Found { id, info, name })
    }

    async fn take_in(&mut self, mut found: Vec<Found>) -> Result<Vec<Watched>> {
        found.retain(|object| self.seen.get(&object.id) != Some(&object.info));
        let mut reads = futures::stream::iter(found)
            .map(|found| {
                let place = self.places[found.id.0].clone();
                async move {
                    let watched = read_one(&place, &found).await?;
                    anyhow::Ok((found, watched))
                }
            })
            .buffer_unordered(READS);
        let mut changed = Vec::new();
        let mut done = Vec::new();
        while let Some((found, watched)) = reads.try_next().await? {
            done.push((found.id, found.info, watched));
        }
        drop(reads);
        for (id, info, watched) in done {
            self.seen.insert(id.clone(), info);
            match watched {
                Some(watched) => {
                    changed.push(watched.clone());
                    self.caches.insert(id, watched);
                }
                None => drop(self.caches.remove(&id)),
            }
        }
        Ok(changed)
    }

    /// The blobs that any of the caches needs.
    pub fn needed(&self) -> BTreeSet<Digest> {
        let contents = self.caches.values().flat_map(|cache| &cache.cache.contents);
        let blobs = contents.flat_map(|contents| &contents.blobs);
        blobs.map(|(digest, _)| *digest).collect()
    }
}

/// Reads a cache. `None`: there is none.
async fn read_one(place: &Bucket, found: &Found) -> Result<Option<Watched>> {
    let key = &found.id.1;
    let ours = found.id.0 == 0 && found.name.is_some();
    let watched = |contents| Watched {
        cache: Cache {
            named: Named {
                name: found.name.clone().unwrap_or_else(|| key.clone()),
                key: key.clone(),
                info: found.info.clone(),
            },
            contents,
        },
        ours,
        address: format!("s3://{}/{key}", place.config.bucket),
    };
    if found.name.is_none() {
        match begins_like_a_manifest(place, key, found.info.size).await {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            Err(Unread::Store(error)) if error.kind == Kind::Missing => return Ok(None),
            Err(Unread::Store(error)) => return Err(error.into()),
            Err(Unread::Invalid(unreadable)) => return Ok(Some(watched(Err(unreadable)))),
        }
    }
    let contents = match place.read_manifest_at(key).await {
        Ok(None) => return Ok(None),
        Ok(Some(cache)) => Contents::of_manifest(&cache),
        Err(Unread::Invalid(unreadable)) => Err(unreadable),
        Err(Unread::Store(error)) if error.kind == Kind::Missing => return Ok(None),
        Err(Unread::Store(error)) => return Err(error.into()),
    };
    Ok(Some(watched(contents)))
}

async fn begins_like_a_manifest(place: &Bucket, key: &str, size: u64) -> Result<bool, Unread> {
    let range = Some(0..size.min(HEAD));
    let Some(mut object) = read(&place.store, key, range, Expected::default()).await? else {
        return Ok(false);
    };
    let mut head = Vec::new();
    while let Some(chunk) = object.body.next().await {
        head.extend_from_slice(&chunk?);
    }
    Ok(is_manifest_head(&head))
}

/// Whether bytes begin as BuildKit's manifests do, in whatever layout.
fn is_manifest_head(head: &[u8]) -> bool {
    let dense: Vec<u8> = head
        .iter()
        .copied()
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    [&b"{\"layers\":[{\""[..], b"{\"records\":[{\""]
        .iter()
        .any(|start| dense.starts_with(start))
}

fn is_digest(key: &str) -> bool {
    let name = key.rsplit('/').next().unwrap_or(key);
    name.parse::<Digest>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifests_are_recognised_by_their_first_bytes() {
        for manifest in [
            "{\"layers\":[{\"blob\":\"sha256:",
            "{\n  \"records\": [\n    {\n      \"digest\"",
        ] {
            assert!(is_manifest_head(manifest.as_bytes()), "{manifest}");
        }
        for other in [
            "",
            "{}",
            "{\"schemaVersion\":2,\"layers\":[{\"mediaType\"",
            "{\"layers\":[\"a\"]}",
            "x{\"layers\":[{\"",
        ] {
            assert!(!is_manifest_head(other.as_bytes()), "{other}");
        }
        assert!(is_digest(&format!("ci/blobs/{}", Digest::of(b""))));
        assert!(!is_digest("ci/blobs/sha256:00"));
    }
}
