//! The registry: OCI distribution 1.1, as containerd's client and others use it.

mod pull;
mod push;

use std::sync::Arc;

use http::header::{CONTENT_TYPE, HeaderName};
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use serde_json::json;

use crate::cache::digest::Digest;
use crate::cache::oci;
use crate::serve::Serving;
use crate::serve::reply::{self, Response};
use crate::serve::repository::{Repository, TAG};

pub use self::pull::{of_document, read};
pub use self::push::{Sending, query};

pub const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
const FILTERS_APPLIED: HeaderName = HeaderName::from_static("oci-filters-applied");

/// What a request asks for below a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path<'a> {
    Manifest(&'a str),
    Blob(&'a str),
    Uploads,
    Upload(&'a str),
    Tags,
    Referrers(&'a str),
}

impl<'a> Path<'a> {
    /// Splits `NAME/what/…` into the repository's name and the rest.
    pub fn parse(path: &'a str) -> Option<(&'a str, Self)> {
        if let Some(name) = path.strip_suffix("/tags/list") {
            return Some((name, Path::Tags));
        }
        if let Some((name, id)) = path.split_once("/blobs/uploads/") {
            return Some((
                name,
                match id {
                    "" => Path::Uploads,
                    id => Path::Upload(id),
                },
            ));
        }
        if let Some(name) = path.strip_suffix("/blobs/uploads") {
            return Some((name, Path::Uploads));
        }
        let one = |at: &str, make: fn(&'a str) -> Self| {
            let (name, rest) = path.split_once(at)?;
            (!rest.contains('/')).then(|| (name, make(rest)))
        };
        one("/manifests/", Path::Manifest)
            .or_else(|| one("/blobs/", Path::Blob))
            .or_else(|| one("/referrers/", Path::Referrers))
    }
}

/// `GET /v2/`: this is a registry.
pub fn base() -> Response {
    let response = reply::json(StatusCode::OK, &json!({}));
    reply::with(response, API_VERSION, "registry/2.0")
}

/// Answers a request to a repository.
pub async fn answer(
    serving: &Arc<Serving>,
    repository: &Arc<Repository>,
    path: Path<'_>,
    request: Request<Incoming>,
) -> Response {
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    match path {
        Path::Manifest(reference) if reads => {
            pull::manifest(repository, reference, request.method() == Method::HEAD).await
        }
        Path::Blob(digest) if reads => match digest.parse() {
            Ok(digest) => pull::blob(repository, &digest, &request).await,
            Err(_) => invalid_digest(digest),
        },
        Path::Tags if reads => pull::tags(repository).await,
        Path::Referrers(digest) if reads => match digest.parse::<Digest>() {
            Ok(_) => referrers(),
            Err(_) => invalid_digest(digest),
        },
        Path::Manifest(reference) if request.method() == Method::PUT => {
            push::manifest(serving, repository, reference, request).await
        }
        Path::Uploads if request.method() == Method::POST => push::begin(serving, repository),
        Path::Upload(id) => push::upload(serving, repository, id, request).await,
        _ => error(
            StatusCode::METHOD_NOT_ALLOWED,
            "UNSUPPORTED",
            "this endpoint does not do that",
        ),
    }
}

/// A cache has no referrers: an empty index, as the specification requires.
fn referrers() -> Response {
    let index = json!({"schemaVersion": 2, "mediaType": oci::IMAGE_INDEX, "manifests": []});
    let response = reply::bytes(StatusCode::OK, oci::IMAGE_INDEX, index.to_string());
    reply::with(response, FILTERS_APPLIED, "artifactType")
}

/// An error in the specification's format.
fn error(status: StatusCode, code: &str, message: &str) -> Response {
    let errors = json!({"errors": [{"code": code, "message": message}]});
    reply::json(status, &errors)
}

fn invalid_digest(digest: &str) -> Response {
    error(
        StatusCode::BAD_REQUEST,
        "DIGEST_INVALID",
        &format!("{} is not a sha256 digest", crate::quote::quoted(digest)),
    )
}

/// The error for a repository that does not exist.
pub fn unknown_name(name: &str) -> Response {
    let message = format!("there is no cache {} here", crate::quote::quoted(name));
    error(StatusCode::NOT_FOUND, "NAME_UNKNOWN", &message)
}

fn unknown_blob(digest: &Digest) -> Response {
    let message = format!("{digest} is not on S3");
    error(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", &message)
}

fn unknown_manifest(message: &str) -> Response {
    error(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", message)
}

fn unknown_tag(tag: &str) -> Response {
    let tag = crate::quote::quoted(tag);
    unknown_manifest(&format!("a cache has the tag {TAG} only, not {tag}"))
}

/// The error when S3 failed.
fn bad_gateway(repository: &Repository, doing: &str, failure: &anyhow::Error) -> Response {
    repository.progress.warn(&format!("{doing}: {failure:#}"));
    error(StatusCode::BAD_GATEWAY, "UNKNOWN", reply::FAILED)
}

/// The value of a header, if it is text.
pub(super) fn header<'a, B>(request: &'a Request<B>, name: &HeaderName) -> Option<&'a str> {
    request.headers().get(name)?.to_str().ok()
}

/// The media type that a client gives a manifest, without parameters.
fn content_type<B>(request: &Request<B>) -> Option<String> {
    let value = header(request, &CONTENT_TYPE)?;
    let media_type = value.split(';').next()?.trim();
    (!media_type.is_empty()).then(|| media_type.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_names_a_repository_and_what_of_it_is_wanted() {
        assert_eq!(
            Path::parse("team/app/manifests/latest"),
            Some(("team/app", Path::Manifest("latest")))
        );
        assert_eq!(
            Path::parse("a/blobs/sha256:0"),
            Some(("a", Path::Blob("sha256:0")))
        );
        assert_eq!(Path::parse("a/blobs/uploads/"), Some(("a", Path::Uploads)));
        assert_eq!(
            Path::parse("a/blobs/uploads/7"),
            Some(("a", Path::Upload("7")))
        );
        assert_eq!(Path::parse("a/tags/list"), Some(("a", Path::Tags)));
        assert_eq!(
            Path::parse("a/referrers/sha256:0"),
            Some(("a", Path::Referrers("sha256:0")))
        );
        for none in ["", "a", "a/blobs/b/c", "a/manifests", "manifests/latest"] {
            assert_eq!(Path::parse(none), None, "{none}");
        }
    }
}
