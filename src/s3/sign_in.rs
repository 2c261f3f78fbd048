//! The HTTP client of AWS's credential providers: sign-in endpoints (STS, SSO) and the metadata services
//! are reached through the same TLS, proxies and resolver as S3.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use http::Request;
use http::header::PROXY_AUTHORIZATION;
use http_body_util::{BodyExt as _, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;

use super::failure::Causes;
use super::timing::Timing;
use super::tls::{self, Trust};
use super::wire;

/// Bytes of a response. Credentials take a few thousand.
const MOST: usize = 1 << 20;

/// The metadata services, which no proxy reaches.
const METADATA: [&str; 5] = [
    "169.254.169.254",
    "169.254.170.2",
    "169.254.170.23",
    "[fd00:ec2::254]",
    "[fd00:ec2::23]",
];

#[derive(Debug, Clone)]
pub(super) struct SignIn {
    /// `None`: there are no certificates to trust.
    tls: Option<Arc<rustls::ClientConfig>>,
    /// For a TCP connection.
    connect: Duration,
    /// For a connection with DNS, proxy and TLS.
    ready: Duration,
    /// From the request to the end of the response.
    answer: Duration,
}

impl SignIn {
    pub(super) fn new(trust: &Trust, timing: &Timing) -> Result<Self> {
        Ok(SignIn {
            tls: trust.client_if_any()?.map(Arc::new),
            connect: timing.connect,
            ready: timing.ready,
            answer: timing.headers,
        })
    }

    async fn exchange(&self, mut request: Request<SdkBody>) -> Result<HttpResponse> {
        let to = request.uri();
        let host = to.host().context("no host")?;
        let proxy = match METADATA.contains(&host) {
            true => None,
            false => wire::proxy_to(to)?,
        };
        let config = match &self.tls {
            Some(config) => Arc::clone(config),
            None if wire::needs_tls(to, proxy.as_ref()) => anyhow::bail!(tls::NO_CERTIFICATES),
            None => Arc::new(Trust::nobody()?),
        };
        if let Some(proxy) = &proxy
            && !wire::is_https(to)
            && let Some(secret) = proxy.basic_auth()
        {
            let secret = secret.clone();
            request.headers_mut().insert(PROXY_AUTHORIZATION, secret);
        }
        let connector = wire::connector(proxy, &config, self.connect, self.ready);
        // There are few requests, far apart.
        let client = Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(0)
            .build(connector);
        let (head, body) = client.request(request).await?.into_parts();
        let body = Limited::new(body, MOST).collect().await;
        let body = body.map_err(anyhow::Error::from_boxed)?.to_bytes();
        let response = http::Response::from_parts(head, SdkBody::from(body));
        HttpResponse::try_from(response).context("a response that is none")
    }
}

impl HttpClient for SignIn {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        _: &RuntimeComponents,
    ) -> SharedHttpConnector {
        SharedHttpConnector::new(SignIn {
            connect: settings.connect_timeout().unwrap_or(self.connect),
            answer: settings.read_timeout().unwrap_or(self.answer),
            ..self.clone()
        })
    }
}

impl HttpConnector for SignIn {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let this = self.clone();
        HttpConnectorFuture::new(async move {
            let request = request.try_into_http1x();
            let request = request.map_err(|error| ConnectorError::user(error.into()))?;
            let peer = request.uri().authority().map(ToString::to_string);
            let exchanged = tokio::time::timeout(this.answer, this.exchange(request)).await;
            match exchanged {
                Ok(Ok(response)) => Ok(response),
                Ok(Err(error)) => {
                    let causes = Causes::of(error.as_ref());
                    let untrusted = causes.untrusted(&peer.unwrap_or_default(), &causes.text);
                    let text = match untrusted {
                        Some((cause, advice)) => format!("{cause}; {advice}"),
                        None => causes.text,
                    };
                    Err(ConnectorError::io(text.into()))
                }
                Err(late) => Err(ConnectorError::timeout(late.into())),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_endpoint_that_does_not_answer_is_given_up() {
        let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let timing = Timing {
            headers: Duration::from_millis(50),
            ..Timing::default()
        };
        let client = SignIn::new(&Trust::default(), &timing).unwrap();
        let request = Request::get(format!("http://{}/", mute.local_addr().unwrap()))
            .body(SdkBody::empty())
            .unwrap();
        let error = client.call(request.try_into().unwrap()).await.unwrap_err();
        assert!(error.is_timeout(), "{error:?}");
    }
}
