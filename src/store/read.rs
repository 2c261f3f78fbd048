//! Reads objects: the one place where a body that broke off is resumed, and its length enforced.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use futures::stream::{BoxStream, StreamExt};

use super::{ByteStream, Kind, ObjectInfo, Response, Store, StoreError, StoreResult};
use crate::retry::{Tries, Trouble};

/// A body that yields this much, or a quarter of what was asked for, before it breaks off is making
/// progress: its retries start over. A few bytes at a time are not progress.
const STRIDE: u64 = 512 << 10;

/// A document whose size the store does not announce is read up to here.
const UNANNOUNCED: u64 = 16 << 20;

/// What the reader knows about an object.
#[derive(Debug, Clone, Copy, Default)]
pub struct Expected {
    /// Bytes of the whole object.
    pub size: Option<u64>,
    /// The key names the content, and the reader verifies it: if the object is replaced during the
    /// read, the rest is taken from its replacement.
    pub content_addressed: bool,
}

/// An object, or a range of one, being read.
pub struct Object {
    pub info: ObjectInfo,
    /// Bytes that `body` yields.
    pub length: u64,
    /// Yields exactly `length` bytes or ends with an error. [`Kind::Missing`]: the object was removed
    /// during the read. [`Kind::Changed`]: it was replaced, and is not content-addressed.
    pub body: BoxStream<'static, StoreResult<Bytes>>,
}

/// Reads an object, or the bytes of `range`. `None`: the object is not there.
///
/// A body that breaks off is resumed where it broke off, under the store's retry policy, as long as
/// the object's ETag stays the same.
///
/// # Errors
/// [`Kind::WrongSize`] if the object does not have the expected size. [`Kind::NoRanges`] if the store
/// ignores Range and `range` ends before the object does: ask for one range up to the object's end,
/// which is then read by skipping what comes before it.
pub async fn read(
    store: &Arc<dyn Store>,
    key: &str,
    range: Option<Range<u64>>,
    expected: Expected,
) -> StoreResult<Option<Object>> {
    let mut reader = Reader::new(store, key, range, expected);
    let Some(response) = reader.open().await? else {
        return Ok(None);
    };
    let Some((size, length)) = reader.size.zip(reader.left()) else {
        return Err(error(
            Kind::Nonsense,
            format!("the response does not give the size of {key}"),
        ));
    };
    let info = ObjectInfo {
        size,
        last_modified: response.last_modified,
        etag: response.etag,
        storage_class: response.storage_class,
    };
    reader.body = response.body;
    let chunks = futures::stream::unfold(Some(Box::new(reader)), |reader| async {
        let mut reader = reader?;
        match reader.next().await {
            Ok(Some(chunk)) => Some((Ok(chunk), Some(reader))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    });
    Ok(Some(Object {
        info,
        length,
        body: chunks.boxed(),
    }))
}

/// Reads a small object whole. Nothing vouches for its bytes, so a response that `check` rejects (a
/// proxy's page under a 200) is asked for again, and so is an object that is replaced during the
/// read.
///
/// # Errors [`Kind::Nonsense`] if it was damaged each time, [`Kind::WrongSize`] if the object has
/// more than `limit` bytes.
pub async fn read_whole(
    store: &Arc<dyn Store>,
    key: &str,
    limit: u64,
    check: impl Fn(&[u8]) -> Result<(), String>,
) -> StoreResult<Option<Bytes>> {
    let mut tries = store.retries().tries();
    loop {
        let mut reader = Reader::new(store, key, None, Expected::default());
        let Some(response) = reader.open().await? else {
            return Ok(None);
        };
        reader.body = response.body;
        let why = match reader.collect(limit).await {
            Ok(bytes) => match check(&bytes) {
                Ok(()) => return Ok(Some(bytes)),
                Err(why) => error(Kind::Nonsense, format!("{key} is damaged: {why}")),
            },
            Err(error) => match error.kind {
                // Retried already, or the same the next time.
                Kind::Unavailable | Kind::Missing | Kind::WrongSize { .. } => return Err(error),
                _ => error,
            },
        };
        if !tries.again(Trouble::default(), &why.message).await {
            let message = tried(why.message, &tries);
            return Err(StoreError { message, ..why });
        }
    }
}

/// One read, from the first request to the last byte.
struct Reader {
    store: Arc<dyn Store>,
    key: String,
    content_addressed: bool,
    /// Bytes of the whole object, once known.
    size: Option<u64>,
    /// Where the range begins, and the position of the next byte.
    start: u64,
    at: u64,
    /// Where the range ends. `None`: with the object, whose size is not known.
    end: Option<u64>,
    etag: Option<String>,
    tries: Tries,
    body: ByteStream,
    /// Bytes before the next one that the current response repeats.
    skip: u64,
    /// Bytes that the current response has brought.
    came: u64,
}

impl Reader {
    fn new(
        store: &Arc<dyn Store>,
        key: &str,
        range: Option<Range<u64>>,
        expected: Expected,
    ) -> Self {
        let (start, end) = match range {
            Some(range) => (range.start, Some(range.end)),
            None => (0, expected.size),
        };
        Reader {
            store: Arc::clone(store),
            key: key.to_owned(),
            content_addressed: expected.content_addressed,
            size: expected.size,
            start,
            at: start,
            end,
            etag: None,
            tries: store.retries().tries(),
            body: futures::stream::empty().boxed(),
            skip: 0,
            came: 0,
        }
    }

    /// Bytes still to come.
    fn left(&self) -> Option<u64> {
        Some(self.end? - self.at)
    }

    /// Asks for what is left.
    async fn open(&mut self) -> StoreResult<Option<Response>> {
        let mut ranged = self.at > 0 || self.end != self.size;
        loop {
            let range = self.end.filter(|_| ranged).map(|end| self.at..end);
            let asked = self.store.get(&self.key, range, self.etag.as_deref());
            let response = match asked.await {
                Ok(Some(response)) => response,
                Ok(None) => return Ok(None),
                Err(e) if e.kind == Kind::NoRanges && ranged && self.end == self.size => {
                    ranged = false;
                    continue;
                }
                Err(e) => {
                    let replaced = e.kind == Kind::Changed && self.content_addressed;
                    let why = format!("{} was replaced while it was read", self.key);
                    if replaced
                        && self.etag.take().is_some()
                        && self.tries.again(Trouble::default(), &why).await
                    {
                        continue;
                    }
                    return Err(e);
                }
            };
            if let (Some(expected), Some(found)) = (self.size, response.size)
                && expected != found
            {
                // The response may be for another object, so forget the ETag.
                self.etag = self.etag.take().filter(|_| !self.content_addressed);
                let why = format!("{} has {found} bytes instead of {expected}", self.key);
                if self.tries.again(Trouble::default(), &why).await {
                    continue;
                }
                return Err(error(Kind::WrongSize { found }, tried(why, &self.tries)));
            }
            self.size = self.size.or(response.size);
            // The range may end after the object.
            self.end = match (self.end, self.size) {
                (Some(end), Some(size)) => Some(end.min(size)),
                (end, size) => end.or(size),
            };
            self.etag.clone_from(&response.etag);
            self.skip = if ranged { 0 } else { self.at };
            self.came = 0;
            return Ok(Some(response));
        }
    }

    /// Reads all of it, if that is at most `limit` bytes.
    async fn collect(&mut self, limit: u64) -> StoreResult<Bytes> {
        let mut whole = BytesMut::new();
        loop {
            let (found, limit) = match self.size {
                Some(size) => (size, limit),
                None => (whole.len() as u64, limit.min(UNANNOUNCED)),
            };
            if found > limit {
                let why = format!(
                    "{} has {found} bytes, and at most {limit} are read",
                    self.key
                );
                return Err(error(Kind::WrongSize { found }, why));
            }
            match self.next().await? {
                Some(chunk) => whole.extend_from_slice(&chunk),
                None => return Ok(whole.freeze()),
            }
        }
    }

    /// The next bytes; `None` at the end.
    async fn next(&mut self) -> StoreResult<Option<Bytes>> {
        loop {
            if self.left() == Some(0) && self.content_addressed {
                return Ok(None);
            }
            let broke = match self.body.next().await {
                Some(Ok(chunk)) => {
                    if let Some(chunk) = self.accept(chunk)? {
                        return Ok(Some(chunk));
                    }
                    continue;
                }
                Some(Err(e)) => Some(e),
                None => None,
            };
            if self.left() == Some(0) || (self.end.is_none() && broke.is_none()) {
                return Ok(None);
            }
            self.resume(broke.unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into()))
                .await?;
        }
    }

    /// What is new in a chunk.
    fn accept(&mut self, mut chunk: Bytes) -> StoreResult<Option<Bytes>> {
        self.came += chunk.len() as u64;
        let again = self.skip.min(chunk.len() as u64);
        self.skip -= again;
        chunk.advance(again as usize);
        if chunk.is_empty() {
            return Ok(None);
        }
        if let Some(left) = self.left()
            && left < chunk.len() as u64
        {
            if !self.content_addressed {
                let why = format!("the body of {} is longer than announced", self.key);
                return Err(error(Kind::Nonsense, why));
            }
            // The digest decides whether the bytes fit.
            chunk.truncate(left as usize);
        }
        self.at += chunk.len() as u64;
        Ok(Some(chunk))
    }

    /// Resumes where the body broke off.
    async fn resume(&mut self, broke: io::Error) -> StoreResult<()> {
        let done = self.at - self.start;
        let length = self.end.map(|end| end - self.start);
        let of = length.map_or_else(String::new, |length| format!(" of {length}"));
        let why = format!(
            "the download of {} broke off after {done}{of} bytes ({broke})",
            self.key
        );
        if self.etag.is_none() && !self.content_addressed {
            return Err(error(Kind::Changed, why));
        }
        if self.came >= length.map_or(STRIDE, |length| (length / 4).clamp(1, STRIDE)) {
            self.tries.progressed();
        }
        if !self.tries.again(Trouble::default(), &why).await {
            return Err(error(Kind::Unavailable, tried(why, &self.tries)));
        }
        match self.open().await? {
            Some(response) => {
                self.body = response.body;
                Ok(())
            }
            None => Err(error(
                Kind::Missing,
                format!("{} was deleted while it was read", self.key),
            )),
        }
    }
}

fn tried(why: String, tries: &Tries) -> String {
    match tries.summary() {
        Some(tries) => format!("{why} ({tries})"),
        None => why,
    }
}

fn error(kind: Kind, message: String) -> StoreError {
    StoreError {
        kind,
        status: None,
        code: None,
        message,
        located: false,
    }
}

#[cfg(test)]
mod tests;
