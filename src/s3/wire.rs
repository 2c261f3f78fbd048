//! Connections: hyper's pool over TCP or TLS, through a proxy if the environment names one, with timeouts
//! and the time of the last byte.

use std::future::Future;
use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Result, bail};
use http::{HeaderValue, Uri};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::legacy::connect::{
    CaptureConnection, Connected, Connection, HttpConnector,
};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tower_service::Service;

use super::early::Early;
use super::endpoint::{Endpoint, is_localhost, is_loopback};
use super::outgoing::Outgoing;
use super::timing::Timing;
use super::tls::Trust;

/// Servers close idle connections (S3 after about 20 s); we do it first.
const POOL_IDLE: Duration = Duration::from_secs(15);
/// Many blobs move at once, each in several ranges.
const POOL_SIZE: usize = 256;
/// Bytes of a connection's read and write buffers, at most: hyper begins with fewer.
const BUFFER: usize = 256 << 10;

pub(super) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The pool of connections to one endpoint.
pub(super) struct Wire {
    pub(super) client: Client<Early<InTime<HttpsConnector<Connector>>>, Outgoing>,
    /// For a proxy that is not tunnelled through.
    pub(super) proxy_authorization: Option<HeaderValue>,
    /// The credentials sent to the proxy, tunnelled through or not.
    pub(super) proxy_secret: Option<HeaderValue>,
}

impl Wire {
    /// Opens the first connection at once, in the background.
    pub(super) fn new(endpoint: &Endpoint, trust: &Trust, timing: &Timing) -> Result<Self> {
        let to: Uri = endpoint.uri(None, "").parse()?;
        let proxy = proxy_to(&to)?;
        let tls = match needs_tls(&to, proxy.as_ref()) {
            true => trust.client()?,
            false => Trust::nobody()?,
        };
        let proxy_secret = proxy.as_ref().and_then(|proxy| proxy.basic_auth().cloned());
        let proxy_authorization = proxy_secret.clone().filter(|_| !endpoint.is_https());
        let connector = connector(proxy, &tls, timing.connect, timing.ready);
        let connector = Early::begin(connector, to);
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
            proxy_secret,
        })
    }
}

/// Opens connections: TCP within `connect`, all of it within `ready`.
pub(super) fn connector(
    proxy: Option<Intercept>,
    tls: &rustls::ClientConfig,
    connect: Duration,
    ready: Duration,
) -> InTime<HttpsConnector<Connector>> {
    let mut tcp = HttpConnector::new_with_resolver(Resolver);
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_keepalive(Some(Duration::from_secs(30)));
    tcp.set_connect_timeout(Some(connect));
    let connector = Connector {
        direct: tcp.clone(),
        proxy: proxy.map(|intercept| Proxy {
            intercept,
            connector: over_tls(tcp, tls),
        }),
    };
    InTime {
        connector: over_tls(connector, tls),
        limit: ready,
    }
}

/// A name that could not be resolved.
#[derive(Debug)]
pub(super) struct Unresolved(io::Error);

impl std::fmt::Display for Unresolved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Unresolved {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

/// A connector with a time limit. It wraps all others, as a peer may also stay silent during the TLS
/// handshake, before [`silent`] begins.
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

/// DNS, except for `localhost` and its subdomains, which resolvers often do not know.
#[derive(Clone)]
pub(super) struct Resolver;

impl Service<Name> for Resolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = Unresolved;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Unresolved>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Unresolved>> {
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
                let found = tokio::net::lookup_host((name, 0)).await;
                found.map_err(Unresolved)?.collect()
            };
            Ok(found.into_iter())
        })
    }
}

fn over_tls<C>(connector: C, tls: &rustls::ClientConfig) -> HttpsConnector<C> {
    hyper_rustls::HttpsConnectorBuilder::new()
        .with_tls_config(tls.clone())
        .https_or_http()
        .enable_http1()
        .wrap_connector(connector)
}

/// TCP, directly or through a proxy.
#[derive(Clone)]
pub(super) struct Connector {
    direct: HttpConnector<Resolver>,
    proxy: Option<Proxy>,
}

#[derive(Clone)]
struct Proxy {
    intercept: Intercept,
    connector: HttpsConnector<HttpConnector<Resolver>>,
}

impl Service<Uri> for Connector {
    type Response = Watched;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Watched, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.direct.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let Some(proxy) = self.proxy.clone() else {
            let connecting = self.direct.call(to);
            return Box::pin(async move {
                let stream = MaybeHttpsStream::Http(connecting.await?);
                Ok(Watched::new(stream, false))
            });
        };
        Box::pin(async move {
            let failed = |source: BoxError| ProxyError {
                proxy: host_and_port(proxy.intercept.uri()),
                source,
            };
            let mut connector = proxy.connector;
            let address = proxy.intercept.uri().clone();
            if is_https(&to) {
                let mut tunnel = Tunnel::new(address, connector);
                if let Some(auth) = proxy.intercept.basic_auth() {
                    tunnel = tunnel.with_auth(auth.clone());
                }
                let stream = tunnel.call(to).await.map_err(|e| failed(e.into()))?;
                Ok(Watched::new(stream, false))
            } else {
                let stream = connector.call(address).await.map_err(failed)?;
                Ok(Watched::new(stream, true))
            }
        })
    }
}

/// The proxy that the environment names for requests to `to`. Loopback needs none; Go, and so BuildKit,
/// skips it as well.
pub(super) fn proxy_to(to: &Uri) -> Result<Option<Intercept>> {
    if to.host().is_some_and(is_loopback) {
        return Ok(None);
    }
    let Some(proxy) = Matcher::from_env().intercept(to) else {
        return Ok(None);
    };
    let scheme = proxy.uri().scheme_str().unwrap_or_default();
    // The matcher's other schemes are SOCKS.
    if !matches!(scheme, "http" | "https") {
        let own = match is_https(to) {
            true => ["HTTPS_PROXY", "https_proxy"],
            false => ["HTTP_PROXY", "http_proxy"],
        };
        let start = format!("{scheme}://");
        let variable = own
            .into_iter()
            .chain(["ALL_PROXY", "all_proxy"])
            .find(|name| std::env::var(name).is_ok_and(|value| value.starts_with(&start)))
            .unwrap_or("the environment");
        bail!(
            "{variable} names a {scheme}:// proxy, but only http:// and https:// proxies are supported: \
             set another, or NO_PROXY to reach {} directly",
            to.host().unwrap_or_default()
        );
    }
    Ok(Some(proxy))
}

/// Whether there is TLS on the way to `to`.
pub(super) fn needs_tls(to: &Uri, proxy: Option<&Intercept>) -> bool {
    is_https(to) || proxy.is_some_and(|proxy| is_https(proxy.uri()))
}

pub(super) fn is_https(uri: &Uri) -> bool {
    uri.scheme() == Some(&http::uri::Scheme::HTTPS)
}

/// A proxy's host and port, without the password that its URI may contain.
fn host_and_port(uri: &Uri) -> String {
    let host = uri.host().unwrap_or("without a name");
    let port = uri
        .port_u16()
        .unwrap_or(if is_https(uri) { 443 } else { 80 });
    format!("{host}:{port}")
}

/// A failure at a proxy.
#[derive(Debug)]
pub(super) struct ProxyError {
    /// Host and port.
    pub(super) proxy: String,
    source: BoxError,
}

impl std::fmt::Display for ProxyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "proxy {}", self.proxy)
    }
}

impl std::error::Error for ProxyError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.source)
    }
}

/// When bytes last moved on a connection.
#[derive(Clone)]
pub(super) struct LastBytes {
    start: Instant,
    /// Milliseconds after `start`: either way, and out.
    moved: Arc<AtomicU64>,
    sent: Arc<AtomicU64>,
}

impl LastBytes {
    fn new() -> Self {
        LastBytes {
            start: Instant::now(),
            moved: Arc::default(),
            sent: Arc::default(),
        }
    }

    fn note(&self, sent: bool) {
        let millis = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.moved.store(millis, Ordering::Relaxed);
        if sent {
            self.sent.store(millis, Ordering::Relaxed);
        }
    }

    fn at(&self, millis: &AtomicU64) -> Instant {
        self.start + Duration::from_millis(millis.load(Ordering::Relaxed))
    }
}

/// Returns once nothing has moved on the captured connection for `idle`, or the response's headers are
/// still incomplete `headers` after the last byte was sent. Returns which of the two limits it was.
pub(super) async fn silent(
    mut capture: CaptureConnection,
    idle: Duration,
    headers: Duration,
) -> Duration {
    // Connecting has a timeout of its own.
    drop(capture.wait_for_connection_metadata().await);
    let (mut moved, mut sent) = (Instant::now(), Instant::now());
    loop {
        // Looked up each time: a request that met a closed connection moves to another one.
        let mut extras = http::Extensions::new();
        if let Some(connected) = &*capture.connection_metadata() {
            connected.get_extras(&mut extras);
        }
        if let Some(last) = extras.get::<LastBytes>() {
            moved = moved.max(last.at(&last.moved));
            sent = sent.max(last.at(&last.sent));
        }
        for (since, limit) in [(moved, idle), (sent, headers)] {
            if since.elapsed() >= limit {
                return limit;
            }
        }
        tokio::time::sleep_until((moved + idle).min(sent + headers)).await;
    }
}

/// A stream that records when bytes move. It is plain TCP, or TLS to a proxy.
pub(super) struct Watched {
    stream: MaybeHttpsStream<TokioIo<TcpStream>>,
    last: LastBytes,
    proxied: bool,
    /// Writing failed. A server that responds early closes before it has read our body. Its response can
    /// still be read, so writing stays pending until reading reaches the end.
    deaf: bool,
}

impl Watched {
    fn new(stream: MaybeHttpsStream<TokioIo<TcpStream>>, proxied: bool) -> Self {
        Watched {
            stream,
            last: LastBytes::new(),
            proxied,
            deaf: false,
        }
    }

    fn wrote<T>(&mut self, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match &result {
            Poll::Ready(Ok(_)) => self.last.note(true),
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
            .extra(self.last.clone())
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
            self.last.note(false);
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
