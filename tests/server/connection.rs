//! A client's connection: plain or TLS, and at most so many bytes a second in each direction.

use std::future::Future as _;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

enum Wire {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// An accepted connection.
pub struct Connection {
    wire: Wire,
    up: Pace,
    down: Pace,
}

impl Connection {
    /// Completes the TLS handshake, if `tls` is given. `rate` is bytes a second; 0 is no limit.
    ///
    /// # Errors
    /// If the handshake fails.
    pub async fn accept(
        stream: TcpStream,
        tls: Option<&TlsAcceptor>,
        rate: u64,
    ) -> io::Result<Self> {
        let _ = stream.set_nodelay(true);
        let wire = match tls {
            Some(tls) => Wire::Tls(Box::new(tls.accept(stream).await?)),
            None => Wire::Plain(stream),
        };
        Ok(Self {
            wire,
            up: Pace::new(rate),
            down: Pace::new(rate),
        })
    }

    /// Closes with a TCP reset.
    pub fn reset(self) {
        let stream = match &self.wire {
            Wire::Plain(stream) => stream,
            Wire::Tls(stream) => stream.get_ref().0,
        };
        let _ = stream.set_zero_linger();
    }

    /// Closes in good order, reading what the client still sends: unread bytes would turn the close
    /// into a reset.
    pub async fn close(mut self) {
        let _ = self.shutdown().await;
        let mut rest = [0; 4096];
        while self.read(&mut rest).await.is_ok_and(|read| read > 0) {}
    }

    fn wire(&mut self) -> Pin<&mut (dyn ReadWrite + Unpin)> {
        match &mut self.wire {
            Wire::Plain(stream) => Pin::new(stream),
            Wire::Tls(stream) => Pin::new(stream.as_mut()),
        }
    }
}

trait ReadWrite: AsyncRead + AsyncWrite {}
impl<T: AsyncRead + AsyncWrite> ReadWrite for T {}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let limit = ready!(self.up.poll(cx));
        let before = buffer.filled().len();
        if limit >= buffer.remaining() {
            ready!(self.wire().poll_read(cx, buffer))?;
        } else {
            let mut part = ReadBuf::new(buffer.initialize_unfilled_to(limit));
            ready!(self.wire().poll_read(cx, &mut part))?;
            let read = part.filled().len();
            buffer.advance(read);
        }
        let read = buffer.filled().len() - before;
        self.up.passed(read);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let limit = ready!(self.down.poll(cx)).min(bytes.len());
        let written = ready!(self.wire().poll_write(cx, &bytes[..limit]))?;
        self.down.passed(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut limit = ready!(self.down.poll(cx));
        let mut part = Vec::with_capacity(slices.len());
        for slice in slices {
            let take = slice.len().min(limit);
            part.push(IoSlice::new(&slice[..take]));
            limit -= take;
            if limit == 0 {
                break;
            }
        }
        let written = ready!(self.wire().poll_write_vectored(cx, &part))?;
        self.down.passed(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.wire().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.wire().poll_shutdown(cx)
    }
}

/// When the next byte may pass, in one direction.
struct Pace {
    /// Nanoseconds a byte takes; `None` is no limit.
    byte: Option<f64>,
    free_at: Instant,
    sleep: Pin<Box<tokio::time::Sleep>>,
}

/// How far a direction may run ahead or fall behind. Timers are good to a millisecond, so finer
/// pacing would lose throughput to them.
const SLACK: Duration = Duration::from_millis(4);

impl Pace {
    fn new(rate: u64) -> Self {
        Self {
            byte: (rate > 0).then(|| 1e9 / rate as f64),
            free_at: Instant::now(),
            sleep: Box::pin(tokio::time::sleep(Duration::ZERO)),
        }
    }

    /// Ready when bytes may pass again, with how many at once.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<usize> {
        let Some(byte) = self.byte else {
            return Poll::Ready(usize::MAX);
        };
        if self.free_at > Instant::now() + SLACK {
            self.sleep.as_mut().reset(self.free_at.into());
            ready!(self.sleep.as_mut().poll(cx));
        }
        Poll::Ready(((SLACK.as_nanos() as f64 / byte) as usize).max(1))
    }

    fn passed(&mut self, bytes: usize) {
        if let Some(byte) = self.byte {
            // An idle connection saves up no more than the slack.
            let from = Instant::now()
                .checked_sub(SLACK)
                .map_or(self.free_at, |early| self.free_at.max(early));
            self.free_at = from + Duration::from_nanos((bytes as f64 * byte) as u64);
        }
    }
}
