//! Routes requests to the parts of the endpoint. Clients without the secret learn no more than that
//! this is a registry.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use http::{Method, Request, StatusCode};
use hyper::body::Incoming;

use crate::serve::Serving;
use crate::serve::reply::{self, Response};
use crate::serve::{gha, registry};

/// Answers one request. `known` is set once the client has shown that it knows the secret.
pub async fn answer(
    serving: Arc<Serving>,
    request: Request<Incoming>,
    known: Arc<AtomicBool>,
) -> Response {
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let response = route(&serving, &path, request, &known).await;
    let shown = path.replace(serving.secret.text(), "SECRET");
    let shown = crate::quote::printable(&shown);
    let status = response.status().as_u16();
    serving
        .progress
        .debug(&format!("{method} {shown}: {status}"));
    response
}

async fn route(
    serving: &Arc<Serving>,
    path: &str,
    request: Request<Incoming>,
    known: &AtomicBool,
) -> Response {
    let not_found = || reply::empty(StatusCode::NOT_FOUND);
    if matches!(path, "/v2/" | "/v2") {
        return match *request.method() {
            Method::GET | Method::HEAD => registry::base(),
            _ => not_found(),
        };
    }
    if let Some(path) = path.strip_prefix("/_apis/artifactcache/") {
        let response = gha::answer(serving, path, request).await;
        known.fetch_or(
            response.status() != StatusCode::UNAUTHORIZED,
            Ordering::Relaxed,
        );
        return response;
    }
    if let Some(path) = path.strip_prefix("/v2/") {
        let Some(path) = serving.without_secret(path) else {
            return not_found();
        };
        known.store(true, Ordering::Relaxed);
        let Some((name, path)) = registry::Path::parse(path) else {
            return not_found();
        };
        let mut all = serving.repositories.iter();
        return match all.find(|repository| repository.name == name) {
            Some(repository) => registry::answer(serving, repository, path, request).await,
            None => registry::unknown_name(name),
        };
    }
    let path = path
        .strip_prefix('/')
        .and_then(|path| serving.without_secret(path));
    match path.and_then(|path| path.strip_prefix("gha/")) {
        Some(path) => {
            known.store(true, Ordering::Relaxed);
            gha::archive(serving, path, &request).await
        }
        None => not_found(),
    }
}
