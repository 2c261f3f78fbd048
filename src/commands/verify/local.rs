//! Verifies a layout: every entry of its index.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Result;
use futures::stream::{StreamExt, TryStreamExt};

use super::{Verdict, VerifyDetails};
use crate::blocking::blocking;
use crate::bucket::Contents;
use crate::cache::digest::Digest;
use crate::commands::LOCK_WAIT;
use crate::config::VerifyTask;
use crate::layout::Layout;
use crate::progress::{Progress, Verb};

/// Blobs hashed at once.
const HASHES: usize = 4;

/// The caches of a layout: their names, and what they need or why they cannot be read.
type Caches = Vec<(String, Result<Contents, String>)>;

pub(super) async fn verify(
    task: &VerifyTask,
    root: &Path,
    progress: &Progress,
) -> Result<VerifyDetails> {
    progress.stage("reading the layout", 0, 0);
    let (layout, caches) = read(root, progress).await?;
    let named = caches.iter().flat_map(|(_, contents)| contents);
    let named = named.flat_map(|contents| &contents.blobs);
    let mut details = VerifyDetails::new(task);
    details.count(named.clone());
    let (mut found, mut damaged) = (BTreeMap::new(), BTreeSet::new());
    for (blob, _) in named.clone() {
        found.extend(layout.blob_size(blob)?.map(|size| (*blob, size)));
    }
    if task.deep {
        let there = named
            .clone()
            .filter(|(blob, size)| found.get(blob) == Some(size));
        let there: BTreeSet<(Digest, u64)> = there.copied().collect();
        damaged = hash(&layout, there, progress).await?;
    }
    if task.repair {
        let bad = named.filter(|(blob, size)| {
            let wrong_size = found.get(blob).is_some_and(|found| found != size);
            wrong_size || damaged.contains(blob)
        });
        let bad: BTreeMap<Digest, u64> = bad.copied().collect();
        for (blob, size) in bad {
            let layout = layout.clone();
            let moved = blocking(move || layout.set_damaged_aside(&blob, size)).await?;
            if let Some(path) = moved {
                details.removed += 1;
                progress.note(&format!("moved {blob} to {}", path.display()));
            }
        }
    }
    for (name, contents) in caches {
        let mut verdict = match contents {
            Ok(contents) => {
                let mut verdict = Verdict::new(name, &contents.blobs);
                for (blob, size) in contents.blobs {
                    let there = found.get(&blob).copied();
                    verdict.blob(blob, size, there, damaged.contains(&blob));
                }
                verdict
            }
            Err(reason) => Verdict {
                unreadable: Some(reason),
                ..Verdict::new(name, &[])
            },
        };
        // A blob that was moved aside is missing now.
        verdict.ok = verdict.is_intact();
        details.caches.push(verdict);
    }
    Ok(details)
}

async fn read(root: &Path, progress: &Progress) -> Result<(Layout, Caches)> {
    let (root, progress) = (root.to_owned(), progress.clone());
    blocking(move || {
        let layout = Layout::open(&root, LOCK_WAIT)?;
        let mut caches = Vec::new();
        for (name, descriptor) in layout.entries()? {
            let digest = descriptor.as_ref().map(|found| found.digest.to_string());
            let name = name.or(digest.ok());
            let name = name.unwrap_or_else(|| "an entry without a name".to_owned());
            let contents = descriptor.and_then(|descriptor| {
                let read = layout.read_cache(&descriptor, &progress);
                read.and_then(|cache| Contents::of(&cache))
                    .map_err(|error| format!("{error:#}"))
            });
            caches.push((name, contents));
        }
        Ok((layout, caches))
    })
    .await
}

/// Those of the blobs whose bytes are wrong.
async fn hash(
    layout: &Layout,
    blobs: BTreeSet<(Digest, u64)>,
    progress: &Progress,
) -> Result<BTreeSet<Digest>> {
    let sizes = blobs.iter().map(|(_, size)| *size);
    let bytes = sizes.fold(0, u64::saturating_add);
    progress.stage("verifying", blobs.len() as u64, bytes);
    let checks = blobs.into_iter().map(|(blob, size)| {
        let (layout, progress) = (layout.clone(), progress.clone());
        blocking(move || {
            let shown = progress.blob(Verb::Hash, &blob, size);
            let good = layout.verify_blob(&blob, size, |read| shown.advance(read))?;
            shown.done();
            Ok((!good).then_some(blob))
        })
    });
    let wrong: Vec<_> = futures::stream::iter(checks)
        .buffer_unordered(HASHES)
        .try_collect()
        .await?;
    Ok(wrong.into_iter().flatten().collect())
}
