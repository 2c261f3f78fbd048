//! Which blobs a bucket holds, in as few round trips as it allows.

use std::collections::BTreeMap;

use anyhow::Result;
use futures::stream::{StreamExt, TryStreamExt};

use crate::bucket::Bucket;
use crate::bucket::listing::LISTINGS;
use crate::cache::digest::Digest;
use crate::process;
use crate::store::{Kind, ObjectInfo};

/// HEADs in flight at once: 3,000 blobs are looked up in a third of a second at 20 ms.
const HEADS: usize = 192;

/// Up to this many blobs are looked up by HEADs alone: one round trip, like a listing's first page.
const FEW: usize = 16;

/// Pages of keys that are not blobs, after which listing is given up.
const FOREIGN_PAGES: usize = 4;

/// Parallel listings cost at least sixteen requests, so they are worth it only from this many pages
/// on.
const MANY_PAGES: f64 = 8.0;

/// Whether the bucket itself is known to exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Certainty {
    /// Yes: something was read from it, or will be written to it.
    Known,
    /// This survey is the only request. A 404 to a HEAD has no body that says whether the key or the
    /// bucket is missing; a listing's 404 has.
    Unknown,
}

impl Bucket {
    /// What the store says about those of `digests` that it has.
    ///
    /// A listing of 1,000 keys costs one round trip and as much as a dozen HEADs, so it wins unless
    /// the bucket is far larger than the cache. Digests are spread evenly: the first page tells how
    /// many more there are. Many are listed in parallel.
    ///
    /// # Errors
    /// The store's.
    pub async fn survey(
        &self,
        digests: impl IntoIterator<Item = Digest>,
        bucket: Certainty,
    ) -> Result<BTreeMap<Digest, ObjectInfo>> {
        let mut wanted: Vec<Digest> = digests.into_iter().collect();
        wanted.sort_unstable();
        wanted.dedup();
        let mut found = BTreeMap::new();
        if wanted.len() > FEW || bucket == Certainty::Unknown {
            self.list_blobs(&mut wanted, &mut found).await?;
        }
        let mut heads = futures::stream::iter(wanted)
            .map(|digest| async move { anyhow::Ok((digest, self.blob(&digest).await?)) })
            .buffer_unordered(process::within_open_files(HEADS, 1));
        while let Some((digest, info)) = heads.try_next().await? {
            found.extend(info.map(|info| (digest, info)));
        }
        Ok(found)
    }

    /// Lists for as long as that is cheaper than HEADs; `wanted` keeps the digests that are still
    /// unknown.
    async fn list_blobs(
        &self,
        wanted: &mut Vec<Digest>,
        found: &mut BTreeMap<Digest, ObjectInfo>,
    ) -> Result<()> {
        let blobs = self.blobs();
        let prefix = format!("{blobs}sha256:");
        let all = wanted.clone();
        let mut next: Option<String> = None;
        let mut previous: Option<Digest> = None;
        // Twice as many pages as HEADs would take rounds: a listing that goes on for longer is not what
        // its first pages promised, and might never end.
        let most_pages = 2 * wanted.len().div_ceil(HEADS) + 8;
        for pages in 1..=most_pages {
            let page = match self.store.list(&prefix, next.as_deref()).await {
                Ok(page) => page,
                Err(error) if matches!(error.kind, Kind::Unavailable | Kind::NoBucket) => {
                    return Err(error.into());
                }
                // HEADs may still work without the permission to list, or where only version 1 exists.
                Err(error) => {
                    self.progress.debug(&format!(
                        "cannot list the blobs, looking up each instead: {error}"
                    ));
                    return Ok(());
                }
            };
            let mut last = None;
            let mut is_sorted = true;
            for (key, info) in page.objects {
                let Some(Ok(digest)) = key.strip_prefix(&blobs).map(str::parse::<Digest>) else {
                    continue;
                };
                is_sorted &= previous
                    .replace(digest)
                    .is_none_or(|before| before < digest);
                last = last.max(Some(digest));
                if all.binary_search(&digest).is_ok() {
                    found.insert(digest, info);
                }
            }
            next = page.next;
            if next.is_none() {
                wanted.clear();
                return Ok(());
            }
            if !is_sorted {
                // Then a page does not tell what is absent, nor how many follow.
                *wanted = all;
                wanted.retain(|digest| !found.contains_key(digest));
                return Ok(());
            }
            if let Some(last) = last {
                // Keys come in order: what sorts before the last one and was not listed is not there.
                wanted.retain(|digest| *digest > last);
                let covered = fraction(&last);
                let pages_left = (1.0 - covered) / covered.max(f64::MIN_POSITIVE) * pages as f64;
                let head_rounds = wanted.len().div_ceil(HEADS) as f64;
                let listing_rounds = (pages_left / LISTINGS as f64).ceil();
                if wanted.is_empty() {
                    return Ok(());
                }
                if pages_left >= MANY_PAGES && listing_rounds < head_rounds {
                    let most_pages = 2 * pages_left as usize + LISTINGS;
                    return self.list_in_parallel(wanted, found, most_pages).await;
                }
                if pages_left > head_rounds + 1.0 {
                    return Ok(());
                }
            } else if pages > FOREIGN_PAGES {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Lists all blobs in parallel; `wanted` keeps the digests that are still unknown afterwards.
    async fn list_in_parallel(
        &self,
        wanted: &mut Vec<Digest>,
        found: &mut BTreeMap<Digest, ObjectInfo>,
        most_pages: usize,
    ) -> Result<()> {
        let blobs = self.blobs();
        let mut pages = self.blobs_in_parallel().take(most_pages);
        let mut count = 0;
        while let Some(objects) = pages.try_next().await? {
            count += 1;
            for (key, info) in objects {
                let digest = key.strip_prefix(&blobs).map(str::parse::<Digest>);
                if let Some(Ok(digest)) = digest
                    && wanted.binary_search(&digest).is_ok()
                {
                    found.insert(digest, info);
                }
            }
        }
        match count < most_pages {
            true => wanted.clear(),
            // More than the first page promised: not evenly spread, or endless.
            false => wanted.retain(|digest| !found.contains_key(digest)),
        }
        Ok(())
    }
}

/// Where a digest lies among all digests, from 0 to 1.
fn fraction(digest: &Digest) -> f64 {
    let mut head = [0; 8];
    head.copy_from_slice(&digest.bytes()[..8]);
    u64::from_be_bytes(head) as f64 / u64::MAX as f64
}
