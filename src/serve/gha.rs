//! GitHub's cache service, version 1, as BuildKit's `type=gha` uses it. The index of a scope is the S3
//! manifest, byte for byte; blobs are those on S3.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use http::header::{AUTHORIZATION, CONTENT_RANGE, HOST, RANGE};
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::json;

use crate::cache::digest::Digest;
use crate::cache::{CacheConfig, DOCUMENT_LIMIT};
use crate::quote::{printable, quoted};
use crate::serve::kept::Document;
use crate::serve::push::Push;
use crate::serve::registry::{header, of_document, query, read};
use crate::serve::reply::{self, Response};
use crate::serve::repository::Repository;
use crate::serve::uploads::{Spool, incoming, whole};
use crate::serve::{Serving, in_time};

/// Most bytes of a request that is not a piece of a blob.
const SMALL: u64 = 64 << 10;

/// What a client looks up or saves.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Key {
    Blob(Digest),
    /// The index of a scope.
    Index {
        /// The index's key, without the number that a writer appends.
        key: String,
        /// The first digits of the scope's digest.
        scope: String,
    },
}

impl Key {
    fn parse(text: &str) -> Option<Self> {
        if let Some(digest) = text.strip_prefix("buildkit-blob-1-") {
            return digest.parse().ok().map(Key::Blob);
        }
        let key = text.split_once('#').map_or(text, |(key, _)| key);
        let (name, scope) = key.strip_prefix("index-")?.rsplit_once('-')?;
        let is_digits = scope.len() == DIGITS && scope.bytes().all(|c| c.is_ascii_hexdigit());
        (is_digits && name.ends_with("-1")).then(|| Key::Index {
            key: key.to_owned(),
            scope: scope.to_owned(),
        })
    }
}

/// Digits of a scope's digest in a key.
const DIGITS: usize = 8;

/// The part of an index's key that names a scope.
fn digits(scope: &str) -> String {
    let mut digits = Digest::of(scope.as_bytes()).hex();
    digits.truncate(DIGITS);
    digits
}

/// An entry that is being saved.
pub struct Saving {
    /// Its key, as the client names it.
    name: String,
    key: Key,
    spool: Spool,
}

/// What a token permits: to read every source, or to write the target.
struct Holder<'a> {
    serving: &'a Arc<Serving>,
    writes: bool,
}

impl Holder<'_> {
    /// The caches to look in, in order, each with its index among all.
    fn repositories(&self) -> impl Iterator<Item = (usize, &Arc<Repository>)> {
        let all = self.serving.repositories.iter().enumerate();
        all.filter(|(_, repository)| match self.writes {
            true => repository.push.is_some(),
            false => repository.source,
        })
    }

    fn target(&self) -> Option<(&Arc<Repository>, &Arc<Push>)> {
        let mut all = self.repositories().filter(|_| self.writes);
        all.find_map(|(_, repository)| Some((repository, repository.push.as_ref()?)))
    }
}

/// Answers a request below `/_apis/artifactcache/`.
pub async fn answer(serving: &Arc<Serving>, path: &str, request: Request<Incoming>) -> Response {
    let claimed = header(&request, &AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer "));
    let token = claimed.and_then(|claimed| serving.tokens.iter().find(|t| t.is(claimed)));
    let Some(token) = token else {
        return error(StatusCode::UNAUTHORIZED, "the token is not of this run");
    };
    let holder = Holder {
        serving,
        writes: token.writes,
    };
    let id = path.strip_prefix("caches/").map(str::parse::<u64>);
    match (request.method(), path, id) {
        (&Method::GET, "cache", _) => look_up(&holder, &request).await,
        (&Method::POST, "caches", _) => reserve(&holder, request).await,
        (&Method::PATCH, _, Some(Ok(id))) => append(&holder, id, request).await,
        (&Method::POST, _, Some(Ok(id))) => commit(&holder, id, request).await,
        _ => error(StatusCode::NOT_FOUND, "this endpoint does not do that"),
    }
}

/// `GET cache?keys=…`: 204 if nothing is found.
async fn look_up(holder: &Holder<'_>, request: &Request<Incoming>) -> Response {
    let keys = query(request.uri().query(), "keys").unwrap_or_default();
    for key in keys.split(',').filter_map(Key::parse) {
        let found = in_time(find(holder, &key)).await.unwrap_or_else(|failure| {
            let progress = &holder.serving.progress;
            progress.warn(&format!("no cache for the build: {failure:#}"));
            None
        });
        if let Some((cache_key, scope, path)) = found {
            let host = host(request).unwrap_or_else(|| holder.serving.address.to_string());
            let secret = holder.serving.secret.text();
            let location = format!("http://{host}/{secret}/gha/{path}");
            return reply::json(
                StatusCode::OK,
                &json!({"cacheKey": cache_key, "scope": scope, "archiveLocation": location}),
            );
        }
    }
    reply::empty(StatusCode::NO_CONTENT)
}

/// An entry's key, its scope, and its path below the secret.
async fn find(holder: &Holder<'_>, key: &Key) -> Result<Option<(String, String, String)>> {
    match key {
        Key::Blob(digest) => {
            for (at, repository) in holder.repositories() {
                let found = match &repository.push {
                    Some(push) if holder.writes => push.look(digest).await?,
                    _ => repository.blobs.look(digest).await?,
                };
                if repository.lookups.count(found).is_some() {
                    let cache_key = format!("buildkit-blob-1-{digest}");
                    let path = format!("{at}/blobs/{digest}");
                    return Ok(Some((cache_key, repository.name.clone(), path)));
                }
            }
            Ok(None)
        }
        Key::Index { key, scope } => {
            let mut all = holder.repositories();
            let Some((at, repository)) = all.find(|(_, found)| digits(&found.name) == *scope)
            else {
                return Ok(None);
            };
            let name = repository.cache_name();
            let found = repository.bucket.manifest_bytes(name).await?;
            let Some(bytes) = repository.lookups.count(found) else {
                return Ok(None);
            };
            let digest = Digest::of(&bytes);
            repository.generated.keep(Document {
                media_type: String::new(),
                digest,
                bytes,
            });
            let saved = repository.push.as_ref().map(|push| push.pushed().manifests);
            let cache_key = format!("{key}#{}", saved.unwrap_or(0) + 1);
            let path = format!("{at}/index/{digest}");
            Ok(Some((cache_key, repository.name.clone(), path)))
        }
    }
}

/// The host by which a client reached us, if it is valid in a URL.
fn host<B>(request: &Request<B>) -> Option<String> {
    let host = header(request, &HOST)?;
    let fits = |c: u8| c.is_ascii_alphanumeric() || b".-:[]".contains(&c);
    (!host.is_empty() && host.bytes().all(fits)).then(|| host.to_owned())
}

/// `GET` of what a lookup found: `PLACE/blobs/DIGEST` or `PLACE/index/DIGEST`.
pub async fn archive(serving: &Arc<Serving>, path: &str, request: &Request<Incoming>) -> Response {
    let unknown = || error(StatusCode::NOT_FOUND, "there is no such entry");
    let mut parts = path.splitn(3, '/');
    let mut part = || parts.next().unwrap_or_default();
    let repository = part().parse().ok();
    let repository = repository.and_then(|at: usize| serving.repositories.get(at));
    let (kind, digest) = (part(), part().parse::<Digest>());
    let (Some(repository), Ok(digest)) = (repository, digest) else {
        return unknown();
    };
    let range = header(request, &RANGE);
    match (request.method(), kind) {
        (&Method::GET, "index") => match repository.generated.get(&digest) {
            Some(document) => of_document(document, range),
            None => unknown(),
        },
        (&Method::GET, "blobs") => {
            let reading = async {
                match repository.blobs.size(&digest).await? {
                    Some(size) => read(repository, &digest, size, range).await,
                    None => Ok(None),
                }
            };
            match reading.await {
                Ok(Some(response)) => response,
                Ok(None) => unknown(),
                Err(failure) => {
                    let progress = &repository.progress;
                    progress.warn(&format!("blob {digest}: {failure:#}"));
                    error(StatusCode::BAD_GATEWAY, reply::FAILED)
                }
            }
        }
        _ => unknown(),
    }
}

#[derive(Deserialize)]
struct Reservation {
    key: String,
}

/// `POST caches`: begins saving an entry.
async fn reserve(holder: &Holder<'_>, request: Request<Incoming>) -> Response {
    let Some((repository, push)) = holder.target() else {
        return refuse(holder, StatusCode::FORBIDDEN, "this token only reads");
    };
    let body = whole(request.into_body(), SMALL).await;
    let reservation = body.and_then(|body| Ok(serde_json::from_slice::<Reservation>(&body)?));
    let name = match reservation {
        Ok(reservation) => reservation.key,
        Err(failure) => {
            return refuse(holder, StatusCode::BAD_REQUEST, &format!("{failure:#}"));
        }
    };
    let key = match Key::parse(&name) {
        Some(Key::Index { scope, .. }) if scope != digits(&repository.name) => None,
        key => key,
    };
    let Some(key) = key else {
        let message = format!("{} is no key of BuildKit's for this cache", quoted(&name));
        return refuse(holder, StatusCode::BAD_REQUEST, &message);
    };
    let taken = match &key {
        // Two clients may send the same blob.
        Key::Blob(digest) => matches!(push.look(digest).await, Ok(Some(_))),
        Key::Index { .. } => holder.serving.saving.any(|saving| saving.name == name),
    };
    if taken {
        let body = json!({
            "typeKey": "ArtifactCacheItemAlreadyExistsException",
            "message": format!("the entry {} already exists", quoted(&name)),
        });
        return reply::json(StatusCode::CONFLICT, &body);
    }
    let spool = match Spool::create().await {
        Ok(spool) => spool,
        Err(failure) => {
            let message = format!("{failure:#}");
            return refuse(holder, StatusCode::INTERNAL_SERVER_ERROR, &message);
        }
    };
    let saving = Saving { name, key, spool };
    match holder.serving.saving.open(saving) {
        Some(id) => reply::json(StatusCode::CREATED, &json!({"cacheId": id})),
        // The only status on which the client retries.
        None => error(
            StatusCode::TOO_MANY_REQUESTS,
            "too many entries are being saved",
        ),
    }
}

/// `PATCH caches/ID`: a piece, in any order.
async fn append(holder: &Holder<'_>, id: u64, request: Request<Incoming>) -> Response {
    let Some(saving) = holder.serving.saving.get(id).filter(|_| holder.writes) else {
        return refuse(holder, StatusCode::NOT_FOUND, "there is no such upload");
    };
    let Some((first, length)) = header(&request, &CONTENT_RANGE).and_then(content_range) else {
        return refuse(
            holder,
            StatusCode::BAD_REQUEST,
            "no Content-Range: bytes A-B/*",
        );
    };
    let body = incoming(request.into_body());
    let work = async move {
        let end = saving.spool.write(first, length, body, |_| {}).await?;
        if end - first != length {
            bail!("a piece has {} bytes instead of {length}", end - first);
        }
        Ok(())
    };
    match holder.serving.work(work).await {
        Ok(()) => reply::empty(StatusCode::NO_CONTENT),
        Err(failure) => refuse(holder, StatusCode::BAD_REQUEST, &format!("{failure:#}")),
    }
}

/// Where a piece begins, and its length.
fn content_range(value: &str) -> Option<(u64, u64)> {
    let range = value.trim().strip_prefix("bytes")?.trim_start();
    let (first, last) = range.split('/').next()?.split_once('-')?;
    let (first, last) = (
        first.trim().parse::<u64>().ok()?,
        last.trim().parse::<u64>().ok()?,
    );
    Some((first, last.checked_sub(first)?.checked_add(1)?))
}

#[derive(Deserialize)]
struct Commit {
    size: u64,
}

/// `POST caches/ID`: all pieces have been sent.
async fn commit(holder: &Holder<'_>, id: u64, request: Request<Incoming>) -> Response {
    let Some((_, push)) = holder.target() else {
        return refuse(holder, StatusCode::FORBIDDEN, "this token only reads");
    };
    let Some(saving) = holder.serving.saving.close(id) else {
        return refuse(holder, StatusCode::NOT_FOUND, "there is no such upload");
    };
    let (push, name) = (Arc::clone(push), saving.name.clone());
    let work = async move {
        let body = whole(request.into_body(), SMALL).await?;
        let Commit { size } = serde_json::from_slice(&body).context("reading the request")?;
        save(&push, &saving, size).await
    };
    match holder.serving.work(work).await {
        Ok(()) => reply::empty(StatusCode::NO_CONTENT),
        Err(failure) => {
            let message = format!("{} was not saved: {failure:#}", printable(&name));
            refuse(holder, StatusCode::BAD_REQUEST, &message)
        }
    }
}

async fn save(push: &Push, saving: &Saving, size: u64) -> Result<()> {
    let file = saving.spool.file()?;
    let found = file.metadata().context("reading a temporary file")?.len();
    if found != size {
        bail!("{found} bytes were sent instead of {size}");
    }
    match &saving.key {
        Key::Blob(digest) => push.send(*digest, size, file).await,
        Key::Index { .. } => {
            if size > DOCUMENT_LIMIT {
                bail!("it has {size} bytes, more than the {DOCUMENT_LIMIT} of a manifest");
            }
            let manifest = saving.spool.read(size).await?;
            let parsed = manifest.clone();
            let blobs = crate::blocking::blocking(move || CacheConfig::parse_s3(&parsed)?.blobs());
            push.publish_manifest(manifest, blobs.await?).await
        }
    }
}

/// An error that is also logged: BuildKit does not show errors of saving.
fn refuse(holder: &Holder<'_>, status: StatusCode, message: &str) -> Response {
    holder.serving.progress.warn(message);
    error(status, message)
}

fn error(status: StatusCode, message: &str) -> Response {
    reply::json(status, &json!({"message": message}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_that_buildkit_uses() {
        let digest = Digest::of(b"");
        assert_eq!(
            Key::parse(&format!("buildkit-blob-1-{digest}")),
            Some(Key::Blob(digest))
        );
        let index = |key: &str| {
            Some(Key::Index {
                key: key.to_owned(),
                scope: "0123abcd".to_owned(),
            })
        };
        let key = "index-team-app-1-0123abcd";
        for text in [
            key,
            "index-team-app-1-0123abcd#",
            "index-team-app-1-0123abcd#17",
        ] {
            assert_eq!(Key::parse(text), index(key), "{text}");
        }
        for none in [
            "",
            "index-",
            "index-app-1-0123",
            "index-app-2-0123abcd",
            "buildkit-blob-1-sha256:12",
        ] {
            assert_eq!(Key::parse(none), None, "{none}");
        }
    }

    #[test]
    fn a_piece_says_where_it_begins_and_ends() {
        assert_eq!(content_range("bytes 0-9/*"), Some((0, 10)));
        assert_eq!(content_range("bytes 10-10/20"), Some((10, 1)));
        for none in [
            "",
            "0-9/*",
            "bytes 9-0/*",
            "bytes */10",
            "bytes 0-18446744073709551615/*",
        ] {
            assert_eq!(content_range(none), None, "{none}");
        }
    }
}
