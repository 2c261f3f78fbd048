//! The body of a request while it is sent.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::StreamExt;
use http_body::{Body, Frame, SizeHint};
use parking_lot::Mutex;

use crate::store::{ByteStream, UploadBody};

/// The state of a body being sent.
#[derive(Debug)]
pub(super) enum Fate {
    /// Part of it has been handed to hyper.
    Underway,
    /// All of it has been handed to hyper.
    Sent,
    /// It could not be read, or had another length than announced.
    Local(io::Error),
}

/// Shares the state of a body that hyper owns.
#[derive(Clone)]
pub(super) struct Watch(Arc<Mutex<Fate>>);

impl Watch {
    fn new(fate: Fate) -> Self {
        Watch(Arc::new(Mutex::new(fate)))
    }

    fn set(&self, fate: Fate) {
        *self.0.lock() = fate;
    }

    /// Takes the state; call once.
    pub(super) fn fate(&self) -> Fate {
        let mut fate = self.0.lock();
        std::mem::replace(&mut fate, Fate::Underway)
    }
}

/// A request's body: in memory, or read as it is sent.
pub(super) enum Outgoing {
    Memory(Option<Bytes>),
    Stream {
        chunks: ByteStream,
        /// Bytes not yet read.
        left: u64,
        /// The last chunk, held back until the stream has ended without an error, because its last byte
        /// completes the request.
        last: Option<Bytes>,
        /// Bytes not yet handed over.
        unsent: u64,
        watch: Watch,
    },
}

impl Outgoing {
    pub(super) fn memory(bytes: Bytes) -> (Self, Watch) {
        let body = Outgoing::Memory(Some(bytes).filter(|bytes| !bytes.is_empty()));
        (body, Watch::new(Fate::Sent))
    }

    pub(super) fn stream(body: &dyn UploadBody) -> (Self, Watch) {
        if body.is_empty() {
            return Self::memory(Bytes::new());
        }
        let watch = Watch::new(Fate::Underway);
        let stream = Outgoing::Stream {
            chunks: body.open(),
            left: body.len(),
            last: None,
            unsent: body.len(),
            watch: watch.clone(),
        };
        (stream, watch)
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let (chunks, left, last, unsent, watch) = match self.get_mut() {
            Outgoing::Memory(bytes) => return Poll::Ready(bytes.take().map(Frame::data).map(Ok)),
            Outgoing::Stream {
                chunks,
                left,
                last,
                unsent,
                watch,
            } => (chunks, left, last, unsent, watch),
        };
        let fail = |e: io::Error| {
            let end = io::Error::new(e.kind(), "the body to send broke off");
            watch.set(Fate::Local(e));
            Poll::Ready(Some(Err(end)))
        };
        loop {
            if *unsent == 0 {
                return Poll::Ready(None);
            }
            return match chunks.poll_next_unpin(cx) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(Some(Ok(chunk))) => {
                    let length = chunk.len() as u64;
                    if length == 0 {
                        continue;
                    }
                    let Some(rest) = left.checked_sub(length) else {
                        return fail(io::Error::new(
                            io::ErrorKind::InvalidData,
                            "it is longer than it was",
                        ));
                    };
                    *left = rest;
                    if rest == 0 {
                        *last = Some(chunk);
                        continue;
                    }
                    *unsent -= length;
                    Poll::Ready(Some(Ok(Frame::data(chunk))))
                }
                Poll::Ready(Some(Err(e))) => fail(e),
                Poll::Ready(None) => match last.take() {
                    Some(chunk) => {
                        *unsent = 0;
                        watch.set(Fate::Sent);
                        Poll::Ready(Some(Ok(Frame::data(chunk))))
                    }
                    None => fail(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        format!("it is {left} bytes shorter than it was"),
                    )),
                },
            };
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Outgoing::Memory(bytes) => bytes.is_none(),
            Outgoing::Stream { unsent, .. } => *unsent == 0,
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(match self {
            Outgoing::Memory(bytes) => bytes.as_ref().map_or(0, |bytes| bytes.len() as u64),
            Outgoing::Stream { unsent, .. } => *unsent,
        })
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;
    use crate::cache::digest::Digest;

    struct Script(u64, Vec<Result<&'static str, io::ErrorKind>>);

    impl UploadBody for Script {
        fn len(&self) -> u64 {
            self.0
        }
        fn sha256(&self) -> Option<Digest> {
            None
        }
        fn open(&self) -> ByteStream {
            let chunks: Vec<_> = self.1.to_vec();
            futures::stream::iter(chunks)
                .map(|chunk| chunk.map(Bytes::from).map_err(io::Error::from))
                .boxed()
        }
    }

    async fn send(length: u64, chunks: Vec<Result<&'static str, io::ErrorKind>>) -> (String, Fate) {
        let (mut body, watch) = Outgoing::stream(&Script(length, chunks));
        let mut sent = String::new();
        while let Some(Ok(frame)) = body.frame().await {
            sent.push_str(std::str::from_utf8(&frame.into_data().unwrap()).unwrap());
        }
        (sent, watch.fate())
    }

    #[tokio::test]
    async fn a_body_as_long_as_it_said_is_sent_whole() {
        let (sent, fate) = send(5, vec![Ok("ab"), Ok(""), Ok("cde")]).await;
        assert_eq!(sent, "abcde");
        assert!(matches!(fate, Fate::Sent));
    }

    #[tokio::test]
    async fn an_error_after_the_last_byte_still_keeps_the_request_incomplete() {
        let (sent, fate) = send(5, vec![Ok("ab"), Ok("cde"), Err(io::ErrorKind::Other)]).await;
        assert_eq!(sent, "ab");
        assert!(matches!(fate, Fate::Local(e) if e.kind() == io::ErrorKind::Other));
    }

    #[tokio::test]
    async fn a_body_that_grew_or_shrank_is_cut_off() {
        let (sent, fate) = send(3, vec![Ok("ab"), Ok("cd")]).await;
        assert_eq!(sent, "ab");
        assert!(matches!(fate, Fate::Local(e) if e.to_string() == "it is longer than it was"));
        let (sent, fate) = send(3, vec![Ok("ab"), Ok("c"), Ok("d")]).await;
        assert_eq!(sent, "ab");
        assert!(matches!(fate, Fate::Local(e) if e.to_string() == "it is longer than it was"));
        let (sent, fate) = send(5, vec![Ok("ab")]).await;
        assert_eq!(sent, "ab");
        assert!(
            matches!(fate, Fate::Local(e) if e.to_string() == "it is 3 bytes shorter than it was")
        );
    }

    #[tokio::test]
    async fn an_empty_body_is_not_even_opened() {
        let (sent, fate) = send(0, vec![Err(io::ErrorKind::Other)]).await;
        assert_eq!(sent, "");
        assert!(matches!(fate, Fate::Sent));
    }
}
