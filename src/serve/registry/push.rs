//! Writing to the registry.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use futures::stream::StreamExt;
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, LOCATION, RANGE};
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use tokio::sync::Mutex;

use super::{CONTENT_DIGEST, content_type, error, header, invalid_digest, unknown_tag};
use crate::cache::DOCUMENT_LIMIT;
use crate::cache::digest::{Digest, Hasher};
use crate::cache::oci::Descriptor;
use crate::serve::Serving;
use crate::serve::kept::Document;
use crate::serve::push::{Push, UnknownBlobs};
use crate::serve::reply::{self, Response};
use crate::serve::repository::{Repository, TAG, manifest_type};
use crate::serve::uploads::{ClientGone, Spool, incoming, whole};
use crate::store::StoreError;
use crate::transfer::arriving::WrongBytes;

/// A blob that is being uploaded.
pub struct Sending {
    repository: String,
    received: Mutex<Received>,
}

/// The bytes that came in PATCHes.
#[derive(Default)]
struct Received {
    spool: Option<Spool>,
    hasher: Hasher,
    first: Option<u8>,
}

fn read_only() -> Response {
    error(
        StatusCode::FORBIDDEN,
        "DENIED",
        "this cache is read-only: give layercache serve its spec as --cache-to",
    )
}

/// `POST …/blobs/uploads/`. A mount from another repository gets the same answer: send it.
pub fn begin(serving: &Arc<Serving>, repository: &Arc<Repository>) -> Response {
    if repository.push.is_none() {
        return read_only();
    }
    let sending = Sending {
        repository: repository.name.clone(),
        received: Mutex::default(),
    };
    match serving.sending.open(sending) {
        Some(id) => located(serving, repository, StatusCode::ACCEPTED, id, 0),
        None => error(
            StatusCode::TOO_MANY_REQUESTS,
            "TOOMANYREQUESTS",
            "too many uploads have been begun",
        ),
    }
}

fn located(
    serving: &Serving,
    repository: &Repository,
    status: StatusCode,
    id: u64,
    length: u64,
) -> Response {
    let (secret, name) = (serving.secret.text(), &repository.name);
    let location = format!("/v2/{secret}/{name}/blobs/uploads/{id}");
    let response = reply::with(reply::empty(status), LOCATION, &location);
    reply::with(response, RANGE, &format!("0-{}", length.max(1) - 1))
}

/// Requests about an upload that has begun.
pub async fn upload(
    serving: &Arc<Serving>,
    repository: &Arc<Repository>,
    id: &str,
    request: Request<Incoming>,
) -> Response {
    let Some(push) = repository.push.clone() else {
        return read_only();
    };
    let found = id
        .parse()
        .ok()
        .and_then(|id| Some((id, serving.sending.get(id)?)));
    let Some((id, sending)) = found.filter(|(_, s)| s.repository == repository.name) else {
        return error(
            StatusCode::NOT_FOUND,
            "BLOB_UPLOAD_UNKNOWN",
            "there is no such upload",
        );
    };
    match *request.method() {
        Method::GET => {
            let length = sending.received.lock().await.hasher.length();
            located(serving, repository, StatusCode::NO_CONTENT, id, length)
        }
        Method::DELETE => {
            serving.sending.close(id);
            reply::empty(StatusCode::NO_CONTENT)
        }
        Method::PATCH => {
            let work = append(sending, content_range(&request), request.into_body());
            match serving.work(work).await {
                Ok(Some(length)) => located(serving, repository, StatusCode::ACCEPTED, id, length),
                Ok(None) => error(
                    StatusCode::RANGE_NOT_SATISFIABLE,
                    "BLOB_UPLOAD_INVALID",
                    "the range does not go on where the upload is",
                ),
                Err(failure) => failed(repository, "an upload", &failure),
            }
        }
        Method::PUT => {
            let digest = query(request.uri().query(), "digest").unwrap_or_default();
            let Ok(digest) = digest.parse::<Digest>() else {
                return invalid_digest(&digest);
            };
            serving.sending.close(id);
            let length = content_length(&request);
            let work = finish(push, sending, digest, length, request.into_body());
            match serving.work(work).await {
                Ok(()) => created(serving, repository, "blobs", &digest),
                Err(failure) => failed(repository, &format!("blob {digest}"), &failure),
            }
        }
        _ => error(
            StatusCode::METHOD_NOT_ALLOWED,
            "UNSUPPORTED",
            "an upload is continued with PATCH and ended with PUT",
        ),
    }
}

fn created(serving: &Serving, repository: &Repository, kind: &str, digest: &Digest) -> Response {
    let (secret, name) = (serving.secret.text(), &repository.name);
    let location = format!("/v2/{secret}/{name}/{kind}/{digest}");
    let response = reply::with(reply::empty(StatusCode::CREATED), LOCATION, &location);
    reply::with(response, CONTENT_DIGEST, &digest.to_string())
}

/// Appends a PATCH's body. `None`: its range does not continue the upload.
async fn append(sending: Arc<Sending>, begins: Option<u64>, body: Incoming) -> Result<Option<u64>> {
    let mut received = sending.received.lock().await;
    let at = received.hasher.length();
    if begins.is_some_and(|begins| begins != at) {
        return Ok(None);
    }
    received.append(body, u64::MAX).await?;
    Ok(Some(received.hasher.length()))
}

impl Received {
    async fn append(&mut self, body: Incoming, most: u64) -> Result<()> {
        let spool = match self.spool.take() {
            Some(spool) => spool,
            None => Spool::create().await?,
        };
        let (at, mut hasher, mut first) = (self.hasher.length(), self.hasher.clone(), self.first);
        let each = |chunk: &Bytes| {
            hasher.update(chunk);
            first = first.or_else(|| chunk.first().copied());
        };
        let written = spool.write(at, most, incoming(body), each).await;
        // The next request overwrites what a broken one left.
        self.spool = Some(spool);
        written?;
        (self.hasher, self.first) = (hasher, first);
        Ok(())
    }
}

/// Ends an upload: streams its only body to S3, or sends the bytes that arrived before.
async fn finish(
    push: Arc<Push>,
    sending: Arc<Sending>,
    digest: Digest,
    length: Option<u64>,
    body: Incoming,
) -> Result<()> {
    let mut received = sending.received.lock().await;
    if received.spool.is_none()
        && let Some(size) = length
    {
        return stream(&push, digest, size, body).await;
    }
    received.append(body, length.unwrap_or(u64::MAX)).await?;
    let (found, size) = (received.hasher.digest(), received.hasher.length());
    if found != digest {
        return Err(WrongBytes {
            announced: digest,
            found,
        }
        .into());
    }
    let spool = received.spool.take().context("nothing has arrived")?;
    if push.holds_back(received.first, size) {
        push.hold(Document {
            media_type: String::new(),
            digest,
            bytes: spool.read(size).await?,
        });
        return Ok(());
    }
    push.send(digest, size, spool.file()?).await
}

/// A blob whose digest and length are announced goes to S3 while it arrives.
async fn stream(push: &Push, digest: Digest, size: u64, body: Incoming) -> Result<()> {
    let mut chunks = incoming(body).peekable();
    let first = match std::pin::Pin::new(&mut chunks).peek().await {
        Some(Ok(chunk)) => chunk.first().copied(),
        _ => None,
    };
    if !push.holds_back(first, size) {
        return push.receive(digest, size, chunks.boxed()).await;
    }
    let mut bytes = Vec::with_capacity(size as usize);
    while let Some(chunk) = chunks.next().await {
        bytes.extend_from_slice(&chunk?);
    }
    let found = Digest::of(&bytes);
    if found != digest {
        return Err(WrongBytes {
            announced: digest,
            found,
        }
        .into());
    }
    push.hold(Document {
        media_type: String::new(),
        digest,
        bytes: bytes.into(),
    });
    Ok(())
}

/// `PUT` of a manifest, by tag or digest.
pub async fn manifest(
    serving: &Arc<Serving>,
    repository: &Arc<Repository>,
    reference: &str,
    request: Request<Incoming>,
) -> Response {
    let Some(push) = repository.push.clone() else {
        return read_only();
    };
    let announced = reference.parse::<Digest>().ok();
    if announced.is_none() && reference != TAG {
        return unknown_tag(reference);
    }
    let media_type = content_type(&request);
    let work = {
        let repository = Arc::clone(repository);
        let body = request.into_body();
        async move { take_manifest(&repository, &push, announced, media_type, body).await }
    };
    match serving.work(work).await {
        Ok(digest) => created(serving, repository, "manifests", &digest),
        Err(failure) => failed(repository, "a pushed manifest", &failure),
    }
}

async fn take_manifest(
    repository: &Repository,
    push: &Arc<Push>,
    announced: Option<Digest>,
    media_type: Option<String>,
    body: Incoming,
) -> Result<Digest> {
    let bytes = whole(body, DOCUMENT_LIMIT).await.map_err(invalid)?;
    let digest = Digest::of(&bytes);
    if let Some(announced) = announced
        && announced != digest
    {
        return Err(WrongBytes {
            announced,
            found: digest,
        }
        .into());
    }
    let media_type = manifest_type(&bytes).or(media_type).unwrap_or_default();
    let root = Descriptor::new(&media_type, digest, bytes.len() as u64);
    push.hold(Document {
        media_type,
        digest,
        bytes,
    });
    if announced.is_some() {
        return Ok(digest);
    }
    let generated = Arc::clone(&repository.generated);
    let cache = push.read(root, generated).await.map_err(invalid)?;
    push.publish(cache).await?;
    Ok(digest)
}

/// The error for a manifest that cannot be understood.
#[derive(Debug)]
struct Invalid(String);

impl std::fmt::Display for Invalid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Invalid {}

/// Tells the client what is wrong with what it pushed, unless S3 or the client itself failed.
fn invalid(error: anyhow::Error) -> anyhow::Error {
    if error.is::<UnknownBlobs>() || error.is::<StoreError>() || error.is::<ClientGone>() {
        return error;
    }
    Invalid(format!("{error:#}")).into()
}

/// What a client learns about a failure; the log has the details.
fn failed(repository: &Repository, what: &str, failure: &anyhow::Error) -> Response {
    repository
        .progress
        .warn(&format!("{what} was refused: {failure:#}"));
    let (status, code) = if failure.is::<WrongBytes>() {
        (StatusCode::BAD_REQUEST, "DIGEST_INVALID")
    } else if failure.is::<UnknownBlobs>() {
        (StatusCode::BAD_REQUEST, "MANIFEST_BLOB_UNKNOWN")
    } else if failure.is::<Invalid>() {
        (StatusCode::BAD_REQUEST, "MANIFEST_INVALID")
    } else if failure.is::<ClientGone>() {
        (StatusCode::REQUEST_TIMEOUT, "BLOB_UPLOAD_INVALID")
    } else {
        return error(StatusCode::BAD_GATEWAY, "UNKNOWN", reply::FAILED);
    };
    error(status, code, &format!("{failure:#}"))
}

fn content_length<B>(request: &Request<B>) -> Option<u64> {
    header(request, &CONTENT_LENGTH)?.parse().ok()
}

/// Where the body of a PATCH begins, by its header: `A-B`, as the specification has it, or `bytes
/// A-B/*`.
fn content_range<B>(request: &Request<B>) -> Option<u64> {
    let value = header(request, &CONTENT_RANGE)?.trim();
    let value = value.strip_prefix("bytes").unwrap_or(value);
    value
        .trim_start_matches([' ', '='])
        .split('-')
        .next()?
        .parse()
        .ok()
}

/// The value of a parameter of a query.
pub fn query(query: Option<&str>, name: &str) -> Option<String> {
    let mut pairs = url::form_urlencoded::parse(query?.as_bytes());
    pairs.find_map(|(key, value)| (key == name).then(|| value.into_owned()))
}
