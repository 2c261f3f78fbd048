//! Which blobs a bucket holds already, found out in as few round trips as the bucket allows.

use std::collections::BTreeMap;

use anyhow::Result;
use futures::stream::{StreamExt, TryStreamExt};

use crate::cache::digest::Digest;
use crate::config::S3Config;
use crate::progress::Progress;
use crate::store::{Kind, ObjectInfo, Store};

/// HEADs in flight at once.
const HEADS: usize = 128;

/// Up to this many blobs are asked for by HEAD at once: one round trip, as a listing's first page.
const FEW: usize = 16;

/// How much the bucket itself is to be trusted to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bucket {
    /// Something was read from it, or will be written to it.
    Sure,
    /// Nothing else will be asked of it. A HEAD's 404 has no body to say whether key or bucket is
    /// what is missing; a listing's has.
    Unseen,
}

/// What the store holds of `digests`.
///
/// A listing of 1,000 keys costs one round trip and the price of a dozen HEADs, so it wins wherever
/// the bucket is not far larger than the cache. Digests are spread evenly, so the first page tells
/// how many more there are, and the rest is decided by that.
pub async fn survey(
    store: &dyn Store,
    config: &S3Config,
    digests: impl IntoIterator<Item = Digest>,
    bucket: Bucket,
    progress: &Progress,
) -> Result<BTreeMap<Digest, ObjectInfo>> {
    let mut wanted: Vec<Digest> = digests.into_iter().collect();
    wanted.sort_unstable();
    wanted.dedup();
    let mut found = BTreeMap::new();
    if wanted.len() > FEW || bucket == Bucket::Unseen {
        list(store, config, &mut wanted, &mut found, progress).await?;
    }
    let mut heads = futures::stream::iter(wanted)
        .map(|digest| async move {
            let info = store.head(&config.blob_key(&digest)).await?;
            Ok::<_, anyhow::Error>((digest, info))
        })
        .buffer_unordered(HEADS);
    while let Some((digest, info)) = heads.try_next().await? {
        found.extend(info.map(|info| (digest, info)));
    }
    Ok(found)
}

/// Lists as long as that is cheaper than HEADs; `wanted` keeps what is not known yet.
async fn list(
    store: &dyn Store,
    config: &S3Config,
    wanted: &mut Vec<Digest>,
    found: &mut BTreeMap<Digest, ObjectInfo>,
    progress: &Progress,
) -> Result<()> {
    let blobs = format!("{}{}", config.prefix, config.blobs_prefix);
    let prefix = format!("{blobs}sha256:");
    let mut next: Option<String> = None;
    let mut pages = 0u32;
    // Twice as many pages as HEADs would take rounds: a listing that goes on for longer did not keep
    // what its first pages promised, and might never end.
    let most_pages = 2 * wanted.len().div_ceil(HEADS) + 8;
    while (pages as usize) < most_pages {
        let page = match store.list(&prefix, next.as_deref()).await {
            Ok(page) => page,
            // Down is down; anything else (no permission, version 1 only, an answer that is no
            // listing) HEADs may still get around.
            Err(error) if matches!(error.kind, Kind::Unavailable | Kind::NoBucket) => {
                return Err(error.into());
            }
            Err(error) => {
                progress.debug(&format!(
                    "listing the blobs does not work, asking for each: {error}"
                ));
                return Ok(());
            }
        };
        pages += 1;
        let mut last = None;
        for (key, info) in page.objects {
            let Some(Ok(digest)) = key.strip_prefix(&blobs).map(str::parse::<Digest>) else {
                continue;
            };
            last = last.max(Some(digest));
            if wanted.binary_search(&digest).is_ok() {
                found.insert(digest, info);
            }
        }
        next = page.next;
        if next.is_none() {
            wanted.clear();
            return Ok(());
        }
        if let Some(last) = last {
            // A listing is in order: what sorts before its last key and was not in it is not there.
            wanted.retain(|digest| *digest > last);
            let covered = fraction(&last);
            let pages_left = (1.0 - covered) / covered.max(f64::MIN_POSITIVE) * f64::from(pages);
            let head_rounds = wanted.len().div_ceil(HEADS);
            if wanted.is_empty() || pages_left > head_rounds as f64 + 1.0 {
                return Ok(());
            }
        } else if pages > 4 {
            // Keys that are no blobs: whatever this is, it does not help.
            return Ok(());
        }
    }
    Ok(())
}

/// Where a digest lies in the space of all digests, from 0 to 1.
fn fraction(digest: &Digest) -> f64 {
    let mut head = [0; 8];
    head.copy_from_slice(&digest.bytes()[..8]);
    u64::from_be_bytes(head) as f64 / u64::MAX as f64
}
