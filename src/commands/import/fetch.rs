//! Blobs from the bucket into the layout: staged, downloaded, and published in batches.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use futures::stream::{StreamExt, TryStreamExt};
use tokio::sync::{Semaphore, mpsc};

use super::ImportFrom;
use crate::blocking::blocking;
use crate::cache::digest::Digest;
use crate::config::Missing;
use crate::layout::{Layout, Staged};
use crate::process;
use crate::progress::Verb;
use crate::transfer::download::{Damaged, Downloader, Fetched};

/// Blobs fetched at once. The bound on buffers decides how many of them are large.
const BLOBS: usize = 160;

/// Open files that a blob in flight needs: its file twice and a connection, and as many for a blob
/// that waits to be published.
const FILES: usize = 6;

/// Verified blobs that may wait to be published. Each holds a file open.
const VERIFIED: usize = 32;

/// Verified blobs published together: that shares the cost of syncing.
const BATCH: usize = 256;

/// What came of fetching blobs.
#[derive(Default)]
pub(super) struct Haul {
    /// Those that S3 does not have.
    pub(super) missing: BTreeSet<Digest>,
    /// Those that are damaged on S3.
    pub(super) damaged: BTreeSet<Digest>,
    /// How many other processes have fetched meanwhile.
    pub(super) present: u64,
    /// What came over the network.
    pub(super) bytes: u64,
}

/// What the fetches of a run share.
struct Means<'a> {
    downloader: &'a Downloader,
    /// Limits how many staging files are opened at once.
    stagings: &'a Arc<Semaphore>,
    verified: &'a mpsc::Sender<Staged>,
    /// Held, as a clone, by any blocking thread that works on staging files.
    busy: &'a mpsc::Sender<()>,
}

impl ImportFrom<'_> {
    /// Fetches `blobs` into the layout.
    pub(super) async fn fetch(&self, blobs: Vec<(Digest, u64)>) -> Result<Haul> {
        if !blobs.is_empty() {
            let bytes = blobs.iter().map(|(_, size)| size).sum();
            self.progress.stage("fetching", blobs.len() as u64, bytes);
        }
        let store = Arc::clone(self.bucket.store());
        let downloader = Downloader::new(store, self.progress.clone(), self.limits);
        let stagings = Arc::new(Semaphore::new(process::OPENINGS));
        let (verified, publishing) = mpsc::channel(process::within_open_files(VERIFIED, FILES));
        let publishing = publish(self.layout.clone(), publishing);
        let (busy, mut idle) = mpsc::channel(1);
        let fetching = async {
            // Moved in: the receivers see the end when the last sender is dropped.
            let (verified, busy) = (verified, busy);
            let mut fetches = futures::stream::iter(blobs)
                .map(|(digest, size)| {
                    let means = Means {
                        downloader: &downloader,
                        stagings: &stagings,
                        verified: &verified,
                        busy: &busy,
                    };
                    async move { anyhow::Ok((digest, self.fetch_one(digest, size, means).await?)) }
                })
                .buffer_unordered(process::within_open_files(BLOBS, FILES));
            let mut haul = Haul::default();
            while let Some((digest, fetched)) = fetches.try_next().await? {
                match fetched {
                    None => haul.present += 1,
                    Some(Fetched::Missing) => {
                        haul.missing.insert(digest);
                    }
                    Some(Fetched::Whole { bytes }) => haul.bytes += bytes,
                    Some(Fetched::Damaged) => {
                        haul.damaged.insert(digest);
                    }
                }
            }
            Ok(haul)
        };
        // Both run to completion: what was verified before a failure is kept for the next run.
        let (fetched, published) = tokio::join!(fetching, publishing);
        // Dropping a fetch does not stop what it started on a blocking thread, and nothing may
        // create or remove files any more when the caller cleans up.
        idle.recv().await;
        published?;
        fetched
    }

    /// `None`: another process has fetched it meanwhile.
    async fn fetch_one(
        &self,
        digest: Digest,
        size: u64,
        means: Means<'_>,
    ) -> Result<Option<Fetched>> {
        let blob = self.progress.blob(Verb::Download, &digest, size);
        // Released before waiting for another process, so that other fetches can go on.
        let permit = Arc::clone(means.stagings).acquire_owned().await.ok();
        let mut turn = Some((permit, means.busy.clone()));
        let waited_for = Arc::clone(&blob);
        let waiting = move || {
            waited_for.waiting();
            drop(turn.take());
        };
        let (layout, replace) = (self.layout.clone(), self.task.verify);
        let staging = blocking(move || match replace {
            true => layout.stage_replacement(&digest, size, waiting),
            false => layout.stage(&digest, size, waiting),
        });
        let Some(staged) = staging.await? else {
            blob.present();
            return Ok(None);
        };
        let key = self.bucket.blob_key(&digest);
        let mut fetched = means.downloader.fetch(&key, &staged.growing, &blob).await;
        if self.task.missing == Missing::Drop
            && let Err(error) = &fetched
            && let Some(damaged) = error.downcast_ref::<Damaged>()
            // A store that answers with another size may only be in trouble now; the object may be
            // fine.
            && damaged.unnoticed
        {
            self.progress.warn(&damaged.to_string());
            fetched = Ok(Fetched::Damaged);
        }
        let Ok(Fetched::Whole { bytes }) = fetched else {
            let (layout, busy) = (self.layout.clone(), means.busy.clone());
            blocking(move || {
                layout.discard_empty(staged);
                drop(busy);
                Ok(())
            })
            .await?;
            return fetched.map(Some);
        };
        blob.done();
        let sent = means.verified.send(staged).await.ok();
        sent.context("the task that publishes blobs has ended")?;
        Ok(Some(Fetched::Whole { bytes }))
    }
}

/// Publishes verified blobs as they arrive. Ends when every sender is gone.
async fn publish(layout: Layout, mut verified: mpsc::Receiver<Staged>) -> Result<()> {
    let mut batch = Vec::new();
    while verified.recv_many(&mut batch, BATCH).await > 0 {
        let (layout, staged) = (layout.clone(), std::mem::take(&mut batch));
        blocking(move || layout.publish(staged)).await?;
    }
    Ok(())
}
