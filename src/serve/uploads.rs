//! Uploads that clients have begun: incoming bodies, and bytes that wait on disk until their digest
//! is known.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use bytes::{Bytes, BytesMut};
use futures::stream::{StreamExt, TryStreamExt};
use http_body_util::BodyExt;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::blocking::blocking;
use crate::transfer::arriving::Incoming;

/// A client that sends nothing for this long in the middle of a body has gone.
const IDLE: Duration = Duration::from_secs(60);

/// An upload that nobody has continued for this long is dropped.
const ABANDONED: Duration = Duration::from_secs(60 * 60);

/// Most uploads that may be unfinished at once.
const MOST: usize = 1024;

/// Bytes written to a file at a time.
const WRITE: usize = 1 << 20;

/// A client stalled in the middle of a body, or broke it off.
#[derive(Debug)]
pub struct ClientGone(String);

impl std::fmt::Display for ClientGone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ClientGone {}

/// The bytes of a request's body.
pub fn incoming(body: hyper::body::Incoming) -> Incoming {
    let chunks = futures::stream::unfold(Some(body), |body| async {
        let mut body = body?;
        loop {
            let frame = tokio::time::timeout(IDLE, body.frame()).await;
            let gone = |why: String| Some((Err(anyhow!(ClientGone(why))), None));
            match frame {
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(chunk) if chunk.is_empty() => {}
                    Ok(chunk) => return Some((Ok(chunk), Some(body))),
                    // Trailers.
                    Err(_) => {}
                },
                Ok(Some(Err(error))) => return gone(format!("the client broke off ({error})")),
                Ok(None) => return None,
                Err(_) => return gone(format!("the client sent nothing for {IDLE:?}")),
            }
        }
    });
    chunks.boxed()
}

/// Reads a whole small body.
///
/// # Errors
/// It has more than `limit` bytes, or the client broke off.
pub async fn whole(body: hyper::body::Incoming, limit: u64) -> Result<Bytes> {
    let mut whole = BytesMut::new();
    let mut chunks = incoming(body);
    while let Some(chunk) = chunks.try_next().await? {
        if (whole.len() + chunk.len()) as u64 > limit {
            bail!("the body has more than {limit} bytes");
        }
        whole.extend_from_slice(&chunk);
    }
    Ok(whole.freeze())
}

/// A file without a name, in the directory for temporary files.
pub struct Spool {
    file: Arc<File>,
}

impl Spool {
    /// # Errors
    /// The file system's.
    pub async fn create() -> Result<Self> {
        let file = blocking(|| tempfile::tempfile().context("creating a temporary file")).await?;
        Ok(Spool {
            file: Arc::new(file),
        })
    }

    /// Writes what arrives from `at` on, and calls `each` with it. Returns where it ended.
    ///
    /// # Errors
    /// The client broke off, sent more than `most` bytes, or the file system fails.
    pub async fn write(
        &self,
        mut at: u64,
        most: u64,
        mut chunks: Incoming,
        mut each: impl FnMut(&Bytes),
    ) -> Result<u64> {
        let end = at.saturating_add(most);
        let mut batch = BytesMut::new();
        loop {
            let chunk = chunks.try_next().await?;
            if let Some(chunk) = &chunk {
                each(chunk);
                batch.extend_from_slice(chunk);
            }
            if batch.len() >= WRITE || (chunk.is_none() && !batch.is_empty()) {
                let (file, bytes) = (Arc::clone(&self.file), batch.split().freeze());
                let length = bytes.len() as u64;
                if at + length > end {
                    bail!("the client sent more bytes than it announced");
                }
                blocking(move || {
                    let written = file.write_all_at(&bytes, at);
                    written.context("writing a temporary file (TMPDIR names the directory)")
                })
                .await?;
                at += length;
            }
            if chunk.is_none() {
                return Ok(at);
            }
        }
    }

    /// A handle on the file.
    ///
    /// # Errors
    /// The system's.
    pub fn file(&self) -> Result<File> {
        self.file.try_clone().context("reading a temporary file")
    }

    /// Reads the whole file, which has `length` bytes.
    ///
    /// # Errors
    /// The file system's.
    pub async fn read(&self, length: u64) -> Result<Bytes> {
        let file = Arc::clone(&self.file);
        blocking(move || {
            let mut bytes = vec![0; usize::try_from(length)?];
            file.read_exact_at(&mut bytes, 0)
                .context("reading a temporary file")?;
            Ok(bytes.into())
        })
        .await
    }
}

/// Uploads that span several requests.
pub struct Sessions<T> {
    open: Mutex<HashMap<u64, (Instant, Arc<T>)>>,
}

impl<T> Default for Sessions<T> {
    fn default() -> Self {
        Sessions {
            open: Mutex::default(),
        }
    }
}

impl<T> Sessions<T> {
    /// Begins an upload, and gives it a positive id that nobody can guess. `None`: there are too
    /// many.
    pub fn open(&self, upload: T) -> Option<u64> {
        let mut open = self.open.lock();
        open.retain(|_, (used, upload)| {
            used.elapsed() < ABANDONED || Arc::strong_count(upload) > 1
        });
        if open.len() >= MOST {
            return None;
        }
        // Small enough for both Go and JavaScript.
        let id = (rand::random::<u64>() >> 12) | 1;
        open.insert(id, (Instant::now(), Arc::new(upload)));
        Some(id)
    }

    pub fn get(&self, id: u64) -> Option<Arc<T>> {
        let mut open = self.open.lock();
        let (used, upload) = open.get_mut(&id)?;
        *used = Instant::now();
        Some(Arc::clone(upload))
    }

    pub fn close(&self, id: u64) -> Option<Arc<T>> {
        self.open.lock().remove(&id).map(|(_, upload)| upload)
    }

    pub fn any(&self, matches: impl Fn(&T) -> bool) -> bool {
        self.open.lock().values().any(|(_, upload)| matches(upload))
    }
}
