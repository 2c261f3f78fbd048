//! One connection: plain HTTP/1.1. Clients that try TLS first get an answer; clients that stall are
//! cut off.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::serve::{Serving, routes};

/// The first byte of a TLS handshake.
const HANDSHAKE: u8 = 0x16;

/// Go's TLS client recognises a response that begins like this as plain HTTP, and dockerd then
/// falls back to it. It gives up on an endpoint that merely closes the connection.
const PLAIN: &[u8] = b"HTTP/1.0 400 Bad Request\r\nConnection: close\r\n\r\nthis is plain http\n";

/// A client that has not shown the secret by then is cut off.
const STRANGER: Duration = Duration::from_secs(10);

/// How long a request's head may take, and a connection be idle between requests. It is longer than
/// Go's client keeps one, so that the client closes it.
const HEAD: Duration = Duration::from_secs(120);

/// A client that reads nothing of a response for this long is cut off.
const STALLED: Duration = Duration::from_secs(60);

/// Bytes of a request's head.
const LARGEST_HEAD: usize = 64 << 10;
const MOST_HEADERS: usize = 100;

/// Serves a connection to its end, or until `closing` and the request in flight is answered.
pub async fn serve(serving: Arc<Serving>, stream: TcpStream, mut closing: watch::Receiver<bool>) {
    let _ = stream.set_nodelay(true);
    let mut first = [0];
    match tokio::time::timeout(STRANGER, stream.peek(&mut first)).await {
        Ok(Ok(1)) if first[0] == HANDSHAKE => return answer_tls(stream).await,
        Ok(Ok(1)) => {}
        _ => return,
    }
    let known = Arc::new(AtomicBool::new(false));
    let stalled = Arc::new(Stall::new());
    let stream = Watched {
        stream,
        stalled: Arc::clone(&stalled),
    };
    let service = service_fn(|request| {
        let (serving, known) = (Arc::clone(&serving), Arc::clone(&known));
        async move { Ok::<_, Infallible>(routes::answer(serving, request, known).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(LARGEST_HEAD)
        .max_header_size(LARGEST_HEAD)
        .max_headers(MOST_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let stranger = async {
        tokio::time::sleep(STRANGER).await;
        if known.load(Ordering::Relaxed) {
            std::future::pending().await
        }
    };
    tokio::pin!(stranger);
    let mut asked_to_close = false;
    loop {
        tokio::select! {
            _ = &mut connection => return,
            () = &mut stranger => return,
            () = stalled.for_too_long() => return,
            _ = closing.wait_for(|closing| *closing), if !asked_to_close => {
                asked_to_close = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

async fn answer_tls(mut stream: TcpStream) {
    let answering = async {
        stream.write_all(PLAIN).await?;
        stream.shutdown().await?;
        // Closing with unread input would reset the connection and lose the answer.
        let mut rest = [0; 1024];
        while stream.read(&mut rest).await? > 0 {}
        io::Result::Ok(())
    };
    let _ = tokio::time::timeout(STRANGER, answering).await;
}

/// Since when a client has read nothing of a response.
struct Stall {
    began: Instant,
    /// Milliseconds from `began`, plus 1; 0: it is reading.
    since: AtomicU64,
}

impl Stall {
    fn new() -> Self {
        Stall {
            began: Instant::now(),
            since: AtomicU64::new(0),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn note<T>(&self, written: Poll<T>) -> Poll<T> {
        if written.is_ready() {
            self.since.store(0, Ordering::Relaxed);
        } else if self.since.load(Ordering::Relaxed) == 0 {
            self.since.store(self.now() + 1, Ordering::Relaxed);
        }
        written
    }

    /// Returns once the client has stalled for too long.
    async fn for_too_long(&self) {
        loop {
            let since = self.since.load(Ordering::Relaxed);
            let stalled = match since {
                0 => Duration::ZERO,
                since => Duration::from_millis((self.now() + 1).saturating_sub(since)),
            };
            if stalled >= STALLED {
                return;
            }
            tokio::time::sleep(STALLED - stalled).await;
        }
    }
}

/// A stream whose writes are watched.
struct Watched {
    stream: TcpStream,
    stalled: Arc<Stall>,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.stalled.note(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.stalled.note(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
