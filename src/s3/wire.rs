//! The connections: hyper's pool over TCP or TLS, through a proxy where the environment names one,
//! with timeouts, and with the moment at which a byte last moved.

use std::future::Future;
use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Result;
use http::{HeaderValue, Uri};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::legacy::connect::{
    CaptureConnection, Connected, Connection, HttpConnector,
};
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tower_service::Service;

use super::endpoint::{Endpoint, is_localhost};
use super::outgoing::Outgoing;
use super::timing::Timing;
use super::tls::Trust;

/// Servers close idle connections after some time (S3 after 20 s or so); we do it first.
const POOL_IDLE: Duration = Duration::from_secs(15);
/// Blobs move many at once, each in several ranges.
const POOL_SIZE: usize = 256;
/// What is read or gathered for writing at once. More costs memory on each connection and gains
/// nothing: measured on loopback.
const BUFFER: usize = 64 << 10;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The pool of connections to one endpoint.
pub(super) struct Wire {
    pub(super) client: Client<InTime<HttpsConnector<Connector>>, Outgoing>,
    /// For a proxy that is not tunnelled through, and asks who we are.
    pub(super) proxy_authorization: Option<HeaderValue>,
}

impl Wire {
    pub(super) fn new(endpoint: &Endpoint, trust: &Trust, timing: &Timing) -> Result<Self> {
        let tls = if endpoint.is_https() {
            trust.client()?
        } else {
            Trust::nobody()?
        };
        // As Go does, and so BuildKit: what is on this machine needs no proxy.
        let proxy = (!endpoint.is_loopback()).then(|| Arc::new(Matcher::from_env()));
        let mut proxy_authorization = None;
        if let (Some(proxy), false) = (&proxy, endpoint.is_https())
            && let Ok(uri) = endpoint.uri(None, "").parse::<Uri>()
        {
            proxy_authorization = proxy
                .intercept(&uri)
                .and_then(|found| found.basic_auth().cloned());
        }
        let mut tcp = HttpConnector::new_with_resolver(Resolver);
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_keepalive(Some(Duration::from_secs(30)));
        tcp.set_connect_timeout(Some(timing.connect));
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(Connector { tcp, proxy });
        let connector = InTime {
            connector,
            limit: timing.ready,
        };
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(POOL_IDLE)
            .pool_max_idle_per_host(POOL_SIZE)
            .http1_max_buf_size(BUFFER)
            .http1_writev(true)
            .build(connector);
        Ok(Wire {
            client,
            proxy_authorization,
        })
    }
}

/// A connector that is given only so long until requests can be sent. It lies around all others: a
/// peer may as well stay silent when it is greeted over TLS, and nothing else would notice, as
/// [`idle`] begins with a connection that is ready.
#[derive(Clone)]
pub(super) struct InTime<C> {
    connector: C,
    limit: Duration,
}

impl<C> Service<Uri> for InTime<C>
where
    C: Service<Uri, Error = BoxError>,
    C::Future: Send + 'static,
{
    type Response = C::Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<C::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.connector.poll_ready(cx)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let limit = self.limit;
        let connecting = tokio::time::timeout(limit, self.connector.call(to));
        Box::pin(async move {
            connecting.await.unwrap_or_else(|_| {
                let why = format!("no connection that is ready within {limit:?}");
                Err(io::Error::new(io::ErrorKind::TimedOut, why).into())
            })
        })
    }
}

/// DNS, but for `localhost` and all below it, which resolvers often do not know.
#[derive(Clone)]
pub(super) struct Resolver;

impl Service<Name> for Resolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        Box::pin(async move {
            let name = name.as_str();
            let found: Vec<SocketAddr> = if is_localhost(name) {
                vec![
                    SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
                    SocketAddr::from((Ipv6Addr::LOCALHOST, 0)),
                ]
            } else {
                tokio::net::lookup_host((name, 0)).await?.collect()
            };
            Ok(found.into_iter())
        })
    }
}

/// TCP, directly or by way of a proxy.
#[derive(Clone)]
pub(super) struct Connector {
    tcp: HttpConnector<Resolver>,
    proxy: Option<Arc<Matcher>>,
}

impl Service<Uri> for Connector {
    type Response = Watched;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Watched, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.tcp.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let mut tcp = self.tcp.clone();
        let proxy = self.proxy.as_ref().and_then(|proxy| proxy.intercept(&to));
        Box::pin(async move {
            let Some(proxy) = proxy else {
                return Ok(Watched::new(tcp.call(to).await?, false));
            };
            if to.scheme() == Some(&http::uri::Scheme::HTTPS) {
                let mut tunnel = Tunnel::new(proxy.uri().clone(), tcp);
                if let Some(auth) = proxy.basic_auth() {
                    tunnel = tunnel.with_auth(auth.clone());
                }
                let tunnelled = tunnel.call(to).await;
                let stream = tunnelled.map_err(|e| format!("proxy {}: {e}", host(proxy.uri())))?;
                Ok(Watched::new(stream, false))
            } else {
                let connected = tcp.call(proxy.uri().clone()).await;
                let stream = connected.map_err(|e| format!("proxy {}: {e}", host(proxy.uri())))?;
                Ok(Watched::new(stream, true))
            }
        })
    }
}

/// A proxy's name without the password that its URI may hold.
fn host(uri: &Uri) -> &str {
    uri.host().unwrap_or("without a name")
}

/// When a byte last moved on a connection, either way.
#[derive(Clone)]
pub(super) struct Activity {
    start: Instant,
    last: Arc<AtomicU64>,
}

impl Activity {
    fn new() -> Self {
        Activity {
            start: Instant::now(),
            last: Arc::new(AtomicU64::new(0)),
        }
    }

    fn now(&self) {
        let millis = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(millis, Ordering::Relaxed);
    }

    fn at(&self) -> Instant {
        self.start + Duration::from_millis(self.last.load(Ordering::Relaxed))
    }
}

/// Returns once nothing has moved on the captured connection for `limit`.
pub(super) async fn idle(mut capture: CaptureConnection, limit: Duration) {
    // Connecting has a timeout of its own.
    drop(capture.wait_for_connection_metadata().await);
    let mut since = Instant::now();
    loop {
        // Looked up each time: a request that met a closed connection moves to another one.
        let mut extras = http::Extensions::new();
        if let Some(connected) = &*capture.connection_metadata() {
            connected.get_extras(&mut extras);
        }
        if let Some(activity) = extras.get::<Activity>() {
            since = since.max(activity.at());
        }
        if since.elapsed() >= limit {
            return;
        }
        tokio::time::sleep_until(since + limit).await;
    }
}

/// A TCP stream that notes when it moves.
pub(super) struct Watched {
    stream: TokioIo<TcpStream>,
    activity: Activity,
    proxied: bool,
    /// Writing failed. A server that answers early closes before it has read our body: what it said
    /// is still there to be read, and so writing pretends to be slow until reading has come to its
    /// end. A closed socket always has one.
    deaf: bool,
}

impl Watched {
    fn new(stream: TokioIo<TcpStream>, proxied: bool) -> Self {
        Watched {
            stream,
            activity: Activity::new(),
            proxied,
            deaf: false,
        }
    }

    fn wrote<T>(&mut self, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match &result {
            Poll::Ready(Ok(_)) => self.activity.now(),
            Poll::Ready(Err(e))
                if matches!(
                    e.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                self.deaf = true;
                return Poll::Pending;
            }
            _ => {}
        }
        result
    }
}

impl Connection for Watched {
    fn connected(&self) -> Connected {
        Connected::new()
            .proxy(self.proxied)
            .extra(self.activity.clone())
    }
}

impl Read for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if let Poll::Ready(Ok(())) = result {
            self.activity.now();
        }
        result
    }
}

impl Write for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.deaf {
            return Poll::Pending;
        }
        let result = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.wrote(result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.deaf {
            return Poll::Pending;
        }
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.wrote(result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.deaf {
            return Poll::Pending;
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.deaf {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
