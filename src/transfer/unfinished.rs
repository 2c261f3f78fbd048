//! Multipart uploads that are neither completed nor aborted: this run's, and those that earlier
//! runs left behind.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use futures::stream::StreamExt;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::progress::count;
use crate::store::{Kind, ObjectInfo, Part, StoreError, Upload};
use crate::transfer::upload::Uploader;

/// An upload older than this has been abandoned, whoever started it.
pub const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);

/// An upload without parts has been abandoned after this time.
const NEVER_BEGUN: Duration = Duration::from_secs(60 * 60);

/// Unfinished uploads of one blob whose parts are listed. There are rarely two.
const EXAMINED: usize = 16;

/// How long to go on aborting uploads at the end of a run.
const PATIENCE: Duration = Duration::from_secs(20);

/// Uploads aborted at once.
const ABORTS: usize = 8;

/// The unfinished multipart uploads of one run.
#[derive(Default)]
pub(super) struct Unfinished {
    /// Keys and ids.
    uploads: Mutex<Vec<(String, String)>>,
    /// Creations that the store has not answered yet.
    creating: AtomicUsize,
    created: Notify,
    /// By key, the ids of the uploads that were there before this run's.
    before: Mutex<BTreeMap<String, Vec<String>>>,
    /// Keys where this run may have started an upload but never received its id.
    unknown: Mutex<BTreeSet<String>>,
}

impl Unfinished {
    pub(super) fn add(&self, key: &str, upload: &str) {
        let upload = (key.to_owned(), upload.to_owned());
        self.uploads.lock().push(upload);
    }

    pub(super) fn remove(&self, key: &str, upload: &str) {
        let mut uploads = self.uploads.lock();
        uploads.retain(|(k, u)| k != key || u != upload);
    }

    fn begin(&self, key: &str, before: &[Upload]) {
        let ids = before.iter().map(|upload| upload.id.clone()).collect();
        // The first look counts: a refresh that failed may have left an upload since.
        self.before.lock().entry(key.to_owned()).or_insert(ids);
    }

    fn end(&self, key: &str) {
        self.before.lock().remove(key);
        self.unknown.lock().remove(key);
    }

    /// If this run may have an unknown upload at `key`: the uploads there before it, which are to
    /// be spared.
    fn spared_at(&self, key: &str) -> Option<Vec<String>> {
        let before = self.before.lock().get(key).cloned().unwrap_or_default();
        self.unknown.lock().contains(key).then_some(before)
    }
}

/// A multipart upload that was there before ours and may be continued or aborted.
pub(super) struct Leftover {
    /// Its id.
    pub(super) upload: String,
    pub(super) parts: Vec<Part>,
}

impl Uploader {
    /// The unfinished uploads to `key` that this run may continue or abort, the latest first: those of
    /// this program, killed or under way, and those that nobody can be working on any more. BuildKit
    /// exports to the same keys, and fails if its upload is taken away.
    pub(super) async fn leftovers(&self, key: &str, size: u64) -> Vec<Leftover> {
        let mut uploads = match self.uploads_to(key).await {
            Ok(uploads) => uploads,
            // Some stores cannot list uploads (OCI, Storj), and some roles may not.
            Err(error) => {
                self.progress
                    .debug(&format!("not looking for interrupted uploads: {error}"));
                Vec::new()
            }
        };
        self.unfinished.begin(key, &uploads);
        uploads.sort_by_key(|upload| std::cmp::Reverse(upload.initiated));
        let mut leftovers = Vec::new();
        for upload in uploads.into_iter().take(EXAMINED) {
            leftovers.extend(self.if_leftover(size, upload).await);
        }
        leftovers
    }

    async fn if_leftover(&self, size: u64, upload: Upload) -> Option<Leftover> {
        let parts = self.store.list_parts(&upload.key, &upload.id).await.ok()?;
        let patience = if parts.is_empty() {
            NEVER_BEGUN
        } else {
            ABANDONED
        };
        let free = is_older(&upload, patience) || self.limits.started(size, &parts);
        free.then_some(Leftover {
            upload: upload.id,
            parts,
        })
    }

    /// Aborts those of `uploads` that are leftovers. Each comes with the size of its blob, which must be in
    /// place, so that a run that is still sending it finds the blob.
    pub async fn abort_pointless(&self, uploads: Vec<(Upload, u64)>) {
        futures::stream::iter(uploads)
            .for_each_concurrent(ABORTS, |(upload, size)| async move {
                let key = upload.key.clone();
                if let Some(found) = self.if_leftover(size, upload).await {
                    self.abort(&key, &found.upload).await;
                }
            })
            .await;
    }

    /// The unfinished uploads to exactly `key`.
    async fn uploads_to(&self, key: &str) -> Result<Vec<Upload>, StoreError> {
        let mut uploads = self.store.list_uploads(key).await?;
        uploads.retain(|upload| upload.key == key);
        Ok(uploads)
    }

    /// Creates an upload. Its id is recorded even if the caller stops waiting for the answer.
    pub(super) async fn create(
        &self,
        key: &str,
        refreshed: Option<&ObjectInfo>,
    ) -> Result<String, StoreError> {
        let (store, unfinished) = (Arc::clone(&self.store), Arc::clone(&self.unfinished));
        let (key, refreshed) = (key.to_owned(), refreshed.cloned());
        unfinished.creating.fetch_add(1, Ordering::SeqCst);
        let creating = tokio::spawn(async move {
            let created = store.create_upload(&key, refreshed.as_ref()).await;
            if let Ok(upload) = &created {
                unfinished.add(&key, upload);
            }
            if created.is_err() || store.may_hold_unknown_upload(&key) {
                unfinished.unknown.lock().insert(key);
            }
            unfinished.creating.fetch_sub(1, Ordering::SeqCst);
            unfinished.created.notify_waiters();
            created
        });
        creating.await.unwrap_or_else(|panic| {
            Err(StoreError {
                kind: Kind::Other,
                status: None,
                code: None,
                message: format!("creating a multipart upload: {panic}"),
                located: false,
            })
        })
    }

    pub(super) async fn abort(&self, key: &str, upload: &str) {
        match self.store.abort_upload(key, upload).await {
            Ok(()) => self.unfinished.remove(key, upload),
            Err(error) => self.progress.debug(&format!("aborting an upload: {error}")),
        }
    }

    /// Aborts the uploads that a finished blob has made pointless: the leftovers other than
    /// `finished`, and those of this run whose id never arrived. If one belongs to a run that is still
    /// working, that run finds the blob in place.
    pub(super) async fn abort_superseded(
        &self,
        key: &str,
        leftovers: impl IntoIterator<Item = &Leftover>,
        finished: &str,
    ) {
        for found in leftovers {
            if found.upload != finished {
                self.abort(key, &found.upload).await;
            }
        }
        if let Some(spared) = self.unfinished.spared_at(key) {
            self.abort_unknown(key, &spared).await;
        }
        self.unfinished.end(key);
    }

    /// Aborts the uploads to `key` that are not among `spared` and hold nothing: this run never sent
    /// a part to an upload whose id it does not know.
    async fn abort_unknown(&self, key: &str, spared: &[String]) {
        let found = match self.uploads_to(key).await {
            Ok(found) => found,
            Err(error) => {
                self.progress.warn(&format!(
                    "a multipart upload to {key} may be left whose id the store never sent ({error}); a lifecycle rule that aborts incomplete uploads removes it"
                ));
                return;
            }
        };
        for upload in found.iter().filter(|upload| !spared.contains(&upload.id)) {
            let parts = self.store.list_parts(key, &upload.id).await;
            if parts.is_ok_and(|parts| parts.is_empty()) {
                self.abort(key, &upload.id).await;
            }
        }
    }

    /// Aborts what is unfinished, for at most 20 s. To be called at the end of a run.
    pub async fn abort_unfinished(&self) {
        let aborting = async {
            loop {
                let created = self.unfinished.created.notified();
                if self.unfinished.creating.load(Ordering::SeqCst) == 0 {
                    break;
                }
                created.await;
            }
            let uploads = self.unfinished.uploads.lock().clone();
            futures::stream::iter(uploads)
                .for_each_concurrent(ABORTS, |(key, upload)| async move {
                    self.abort(&key, &upload).await;
                })
                .await;
            let unknown = self.unfinished.unknown.lock().clone();
            futures::stream::iter(unknown)
                .for_each_concurrent(ABORTS, |key| async move {
                    let spared = self.unfinished.spared_at(&key).unwrap_or_default();
                    self.abort_unknown(&key, &spared).await;
                })
                .await;
        };
        let in_time = tokio::time::timeout(PATIENCE, aborting).await.is_ok();
        let left = self.unfinished.uploads.lock().len();
        if !in_time || left > 0 {
            let left = match left {
                0 => "multipart uploads whose ids are not known".to_owned(),
                left => count(left as u64, "multipart upload"),
            };
            self.progress.warn(&format!(
                "{left} could not be aborted; a lifecycle rule for incomplete uploads removes what is left"
            ));
        }
    }
}

fn is_older(upload: &Upload, age: Duration) -> bool {
    upload
        .initiated
        .and_then(|then| SystemTime::now().duration_since(then).ok())
        .is_some_and(|since| since > age)
}
