//! Stands in for hyper-tls. rusoto_core names `HttpsConnector` as the default of an HTTP client that
//! layercache never constructs; the real crate would bring OpenSSL into the build for it. This one
//! refuses every connection.

use std::future::{Ready, ready};
use std::io::{Error, ErrorKind};
use std::task::{Context, Poll};

use hyper::Uri;

/// A connector that connects to nothing. `T` is the plain connector that the real crate would wrap.
#[derive(Clone, Debug, Default)]
pub struct HttpsConnector<T>(std::marker::PhantomData<T>);

impl<T> HttpsConnector<T> {
    pub fn new() -> Self {
        HttpsConnector(std::marker::PhantomData)
    }
}

impl<T> tower_service::Service<Uri> for HttpsConnector<T> {
    type Response = tokio::net::TcpStream;
    type Error = Error;
    type Future = Ready<Result<Self::Response, Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        ready(Err(ErrorKind::Unsupported.into()))
    }
}
