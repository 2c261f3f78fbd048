//! Reading from the registry.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::Result;
use bytes::Bytes;
use http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, RANGE};
use http::{Method, Request, StatusCode};
use serde_json::json;

use super::{
    CONTENT_DIGEST, bad_gateway, error, header, unknown_blob, unknown_manifest, unknown_tag,
};
use crate::cache::digest::Digest;
use crate::serve::in_time;
use crate::serve::kept::Document;
use crate::serve::reply::{self, Response};
use crate::serve::repository::{Repository, TAG, Tagged};

/// `GET` or `HEAD` of a manifest, by tag or digest.
pub async fn manifest(repository: &Arc<Repository>, reference: &str, head: bool) -> Response {
    if let Ok(digest) = reference.parse::<Digest>() {
        return match repository.manifest(&digest).await {
            Ok(Some(document)) => of_manifest(document),
            Ok(None) => unknown_manifest(&format!("{digest} is not a manifest of this cache")),
            Err(error) => bad_gateway(repository, &format!("manifest {digest}"), &error),
        };
    }
    if reference != TAG {
        return unknown_tag(reference);
    }
    let tagged = tagged(repository).await;
    let Some(tagged) = repository.lookups.count(tagged) else {
        return unknown_manifest("there is no such cache yet");
    };
    if head {
        again(repository, &tagged).await;
    }
    of_manifest(tagged.manifest)
}

/// The manifest that the tag names. If S3 fails, there is none, and the build goes on without a
/// cache.
async fn tagged(repository: &Arc<Repository>) -> Option<Tagged> {
    in_time(repository.tagged()).await.unwrap_or_else(|error| {
        let name = crate::quote::printable(repository.cache_name());
        repository.progress.warn(&format!(
            "no cache for the build, because '{name}' cannot be read: {error:#}"
        ));
        None
    })
}

/// A client that has pushed all blobs of the cache asks for the tag, and if it finds the manifest that it
/// would push, does not push it. The manifest on S3 would then stay old, as would those under the spec's
/// other names: so they are written now. Only once for each push: builds that import look the tag up as well,
/// and must not put what it names in the place of a newer cache.
async fn again(repository: &Arc<Repository>, tagged: &Tagged) {
    let Some(push) = &repository.push else { return };
    let last = tagged.config.unwrap_or(tagged.manifest.digest);
    if push.take_offer(&last)
        && let Err(error) = push.publish(tagged.cache.clone()).await
    {
        repository.progress.warn(&format!("{error:#}"));
    }
}

fn of_manifest(document: Document) -> Response {
    let response = reply::bytes(StatusCode::OK, &document.media_type, document.bytes);
    reply::with(response, CONTENT_DIGEST, &document.digest.to_string())
}

/// `GET` or `HEAD` of a blob.
pub async fn blob<B>(
    repository: &Arc<Repository>,
    digest: &Digest,
    request: &Request<B>,
) -> Response {
    let head = request.method() == Method::HEAD;
    let range = header(request, &RANGE);
    if let Some(document) = repository.document(digest) {
        if head && let Some(push) = &repository.push {
            push.offer(*digest);
        }
        return of_document(document, range);
    }
    let found = match &repository.push {
        // A client asks before pushing.
        Some(push) if head => push.look(digest).await,
        _ => repository.blobs.size(digest).await,
    };
    let size = match found {
        Ok(Some(size)) => size,
        Ok(None) => return unknown_blob(digest),
        Err(error) => return bad_gateway(repository, &format!("blob {digest}"), &error),
    };
    if head {
        let response = of_blob(reply::empty(StatusCode::OK), digest);
        return reply::with(response, CONTENT_LENGTH, &size.to_string());
    }
    match read(repository, digest, size, range).await {
        Ok(Some(response)) => response,
        Ok(None) => unknown_blob(digest),
        // Already logged.
        Err(_) => error(StatusCode::BAD_GATEWAY, "UNKNOWN", reply::FAILED),
    }
}

/// A blob of `size` bytes, or the range of it that a client asks for. `None`: it is not there.
///
/// # Errors
/// The first bytes do not arrive.
pub async fn read(
    repository: &Arc<Repository>,
    digest: &Digest,
    size: u64,
    range: Option<&str>,
) -> Result<Option<Response>> {
    let wanted = match Asked::parse(range, size) {
        Asked::Whole => 0..size,
        Asked::Range(range) => range,
        Asked::Beyond => return Ok(Some(beyond(size))),
    };
    repository.traffic.blobs.fetch_add(1, Ordering::Relaxed);
    let whole = wanted == (0..size);
    let body = repository.blobs.read(*digest, size, wanted.clone()).await?;
    Ok(body.map(|body| {
        let status = match whole && range.is_none() {
            true => StatusCode::OK,
            false => StatusCode::PARTIAL_CONTENT,
        };
        let response = reply::stream(status, wanted.end - wanted.start, body);
        of_range(of_blob(response, digest), status, &wanted, size)
    }))
}

/// A document in memory, or the range of it that a client asks for.
pub fn of_document(document: Document, range: Option<&str>) -> Response {
    let Document { digest, bytes, .. } = document;
    let size = bytes.len() as u64;
    let (status, wanted) = match Asked::parse(range, size) {
        Asked::Whole => (StatusCode::OK, 0..size),
        Asked::Range(range) => (StatusCode::PARTIAL_CONTENT, range),
        Asked::Beyond => return beyond(size),
    };
    let body: Bytes = bytes.slice(wanted.start as usize..wanted.end as usize);
    let response = reply::bytes(status, "application/octet-stream", body);
    of_range(of_blob(response, &digest), status, &wanted, size)
}

fn of_blob(response: Response, digest: &Digest) -> Response {
    let response = reply::with(response, CONTENT_DIGEST, &digest.to_string());
    reply::with(response, ACCEPT_RANGES, "bytes")
}

fn of_range(response: Response, status: StatusCode, range: &Range<u64>, size: u64) -> Response {
    if status != StatusCode::PARTIAL_CONTENT {
        return response;
    }
    let value = format!("bytes {}-{}/{size}", range.start, range.end.max(1) - 1);
    reply::with(response, CONTENT_RANGE, &value)
}

fn beyond(size: u64) -> Response {
    let response = error(
        StatusCode::RANGE_NOT_SATISFIABLE,
        "SIZE_INVALID",
        "the range begins after the blob's end",
    );
    reply::with(response, CONTENT_RANGE, &format!("bytes */{size}"))
}

/// Which bytes of a blob a request asks for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Whole,
    Range(Range<u64>),
    /// No byte of the blob.
    Beyond,
}

impl Asked {
    /// Parses a Range header. A header that is not understood, or has several ranges, may be
    /// ignored.
    fn parse(header: Option<&str>, size: u64) -> Self {
        let Some((first, last)) = header
            .and_then(|header| header.trim().strip_prefix("bytes="))
            .and_then(|range| range.split_once('-'))
        else {
            return Asked::Whole;
        };
        let number = |text: &str| text.trim().parse::<u64>();
        let range = match (first.trim(), last.trim()) {
            ("", last) => match number(last) {
                Ok(0) => return Asked::Beyond,
                Ok(suffix) => size.saturating_sub(suffix)..size,
                Err(_) => return Asked::Whole,
            },
            (first, "") => match number(first) {
                Ok(first) => first..size,
                Err(_) => return Asked::Whole,
            },
            (first, last) => match (number(first), number(last)) {
                (Ok(first), Ok(last)) if first <= last => first..last.saturating_add(1).min(size),
                _ => return Asked::Whole,
            },
        };
        match range.start < range.end {
            true => Asked::Range(range),
            false => Asked::Beyond,
        }
    }
}

/// `GET` of the tags: at most one.
pub async fn tags(repository: &Arc<Repository>) -> Response {
    let key = repository
        .bucket
        .config()
        .manifest_key(repository.cache_name());
    let tags = match repository.bucket.store().head(&key).await {
        Ok(Some(_)) => vec![TAG],
        Ok(None) => Vec::new(),
        Err(error) => return bad_gateway(repository, "looking for the tag", &error.into()),
    };
    reply::json(
        StatusCode::OK,
        &json!({"name": repository.name, "tags": tags}),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_one_that_is_there_or_the_whole() {
        let asked = |header| Asked::parse(Some(header), 10);
        assert_eq!(Asked::parse(None, 10), Asked::Whole);
        assert_eq!(asked("bytes=0-"), Asked::Range(0..10));
        assert_eq!(asked("bytes=3-"), Asked::Range(3..10));
        assert_eq!(asked("bytes=3-3"), Asked::Range(3..4));
        assert_eq!(asked("bytes=3-99"), Asked::Range(3..10));
        assert_eq!(asked("bytes=-4"), Asked::Range(6..10));
        assert_eq!(asked("bytes=-99"), Asked::Range(0..10));
        for beyond in ["bytes=10-", "bytes=10-12", "bytes=-0"] {
            assert_eq!(asked(beyond), Asked::Beyond, "{beyond}");
        }
        for ignored in [
            "",
            "bytes",
            "bytes=a-",
            "bytes=4-3",
            "items=1-",
            "bytes=1-2,4-5",
        ] {
            assert_eq!(asked(ignored), Asked::Whole, "{ignored}");
        }
        assert_eq!(Asked::parse(Some("bytes=0-"), 0), Asked::Beyond);
    }
}
