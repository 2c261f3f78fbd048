//! Between rusoto's typed requests and the network. A request is addressed, signed, sent with timeouts
//! and retried. rusoto sees the response only if it is the expected success; otherwise the call keeps the
//! [`StoreError`] for its caller.

use std::sync::Arc;
use std::time::Duration;

use aws_credential_types::Credentials;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Method};
use md5::{Digest as _, Md5};
use rusoto_core::request::{
    DispatchSignedRequest, DispatchSignedRequestFuture, HttpDispatchError, HttpResponse,
};
use rusoto_core::signature::{SignedRequest, SignedRequestPayload};

use super::call::{Call, Expect, Failure};
use super::endpoint::encode_query;
use super::exchange::attempt;
use super::remote::Remote;
use crate::store::{Kind, StoreError};

/// Sends the requests of one call.
pub(super) struct Dispatcher {
    pub(super) remote: Arc<Remote>,
    pub(super) call: Arc<Call>,
}

impl DispatchSignedRequest for Dispatcher {
    fn dispatch(
        &self,
        request: SignedRequest,
        _timeout: Option<Duration>,
    ) -> DispatchSignedRequestFuture {
        let (remote, call) = (self.remote.clone(), self.call.clone());
        let ready = Ready::new(&remote, &call, request);
        Box::pin(async move {
            let sent = match ready {
                Ok(ready) => send(&remote, &call, &ready).await,
                Err(failure) => Err(failure.into_error(&remote, &call, None)),
            };
            sent.map_err(|error| {
                call.fail(error);
                HttpDispatchError::new("failed; the reason is beside the call".into())
            })
        })
    }
}

/// A request that lacks only its signature.
#[derive(Clone)]
pub(super) struct Ready {
    pub(super) method: Method,
    pub(super) uri: String,
    pub(super) headers: HeaderMap,
    pub(super) payload: Bytes,
}

impl Ready {
    fn new(remote: &Remote, call: &Call, request: SignedRequest) -> Result<Self, Failure> {
        let unsendable =
            |what: &str| Failure::new(Kind::Other, format!("the request cannot be sent: {what}"));
        let method = Method::from_bytes(request.method.as_bytes())
            .map_err(|_| unsendable("its method is malformed"))?;
        let query: Vec<String> = request
            .params
            .iter()
            .map(|(name, value)| {
                let value = value.as_deref().unwrap_or_default();
                format!("{}={}", encode_query(name), encode_query(value))
            })
            .collect();
        let uri = remote.endpoint.uri(call.key.as_deref(), &query.join("&"));
        let has_body = !matches!(method, Method::GET | Method::HEAD | Method::DELETE);

        let mut headers = HeaderMap::new();
        for (name, values) in &request.headers {
            // rusoto sets these for its own client, or for a request with a body.
            if matches!(name.as_str(), "host" | "content-length")
                || (name == "content-type" && !has_body)
            {
                continue;
            }
            let header = HeaderName::from_bytes(name.as_bytes());
            for value in values {
                let (Ok(header), Ok(value)) = (&header, HeaderValue::from_bytes(value)) else {
                    return Err(unsendable(&format!("header {name} is malformed")));
                };
                headers.append(header.clone(), value);
            }
        }
        let mut set = |name: HeaderName, value: &str| match HeaderValue::from_str(value) {
            Ok(value) => {
                headers.insert(name, value);
                Ok(())
            }
            Err(_) => Err(unsendable(&format!("{name} is malformed"))),
        };
        set(header::HOST, remote.endpoint.authority())?;
        set(
            header::USER_AGENT,
            concat!("layercache/", env!("CARGO_PKG_VERSION")),
        )?;
        if remote.accept_encoding {
            // Otherwise a gateway might compress the response.
            set(header::ACCEPT_ENCODING, "identity")?;
        }
        let payload = match (&call.payload, request.payload) {
            (Some(payload), _) => {
                // The operations with such a payload want its digest.
                let digest = BASE64.encode(Md5::digest(payload));
                set(HeaderName::from_static("content-md5"), &digest)?;
                payload.clone()
            }
            (None, Some(SignedRequestPayload::Buffer(bytes))) => bytes,
            _ => Bytes::new(),
        };
        if has_body {
            let length = match &call.body {
                Some(body) => body.len(),
                None => payload.len() as u64,
            };
            set(header::CONTENT_LENGTH, &length.to_string())?;
        }
        Ok(Ready {
            method,
            uri,
            headers,
            payload,
        })
    }
}

/// Sends until it succeeds, or no retry is worthwhile.
async fn send(remote: &Remote, call: &Call, ready: &Ready) -> Result<HttpResponse, StoreError> {
    let denied =
        |e: anyhow::Error| Failure::general(Kind::Denied, &e).into_error(remote, call, None);
    let mut tries = remote.retry.tries();
    let mut renewed = false;
    loop {
        tries.permit().await;
        let credentials = remote.keyring.get().await.map_err(denied)?;
        remote.warn_of_open_token(&credentials);
        let mut failure = match attempt(remote, call, ready, &credentials).await {
            Ok(response) => {
                tries.progressed();
                return Ok(response);
            }
            Err(failure) => failure,
        };
        call.hold(None);
        // 4xx is a refusal. After any other failure the upload may exist.
        let refused = matches!(failure.status, Some(400..=499));
        if call.begins_upload
            && !refused
            && let Some(key) = &call.key
        {
            remote.unanswered.lock().insert(key.clone());
        }
        if is_mute(call, &failure)
            && let Some(told) = reason(remote, call, ready, &credentials, failure.status).await
        {
            failure = told;
        }
        if failure.renew && !renewed {
            renewed = true;
            remote
                .progress
                .debug(&format!("{}, looking for new credentials", failure.cause));
            if remote.keyring.renew(&credentials).await.map_err(denied)? {
                continue;
            }
        }
        if let Some(trouble) = failure.again
            && tries.again(trouble, &failure.cause).await
        {
            continue;
        }
        let tries = tries.summary();
        return Err(failure.into_error(remote, call, tries.as_deref()));
    }
}

/// Whether this is a refused HEAD. Its response has no body to give the reason.
fn is_mute(call: &Call, failure: &Failure) -> bool {
    call.expect == Expect::Description
        && failure
            .refusal
            .as_ref()
            .is_some_and(|refusal| refusal.code.is_none() && refusal.region.is_none())
        && matches!(failure.status, Some(400..=403 | 405..=499))
}

/// Why a HEAD was refused, according to one GET per status and run.
async fn reason(
    remote: &Remote,
    call: &Call,
    ready: &Ready,
    credentials: &Credentials,
    status: Option<u16>,
) -> Option<Failure> {
    let status = status?;
    let mut reasons = remote.reasons.lock().await;
    let told = match reasons.get(&status) {
        Some(told) => told.clone(),
        None => {
            let mut get = ready.clone();
            get.method = Method::GET;
            let first = HeaderValue::from_static("bytes=0-0");
            get.headers.insert(header::RANGE, first);
            let asking =
                Call::new(call.doing, call.key.as_deref(), Expect::Object).with_range(Some(0..1));
            let told = match attempt(remote, &asking, &get, credentials).await {
                Err(failure) => failure.refusal.map(|told| *told),
                Ok(_) => None,
            };
            let told = told.filter(|told| told.status == status && told.code.is_some());
            // New credentials may remove this reason.
            if !told.as_ref().is_some_and(|told| told.verdict(true).renew) {
                reasons.insert(status, told.clone());
            }
            told
        }
    };
    told.map(|told| Failure::refused(remote, call, told))
}
