//! The store that is S3: the only place that names rusoto.
//!
//! rusoto_s3 (unmaintained since 2022) is kept for its typed requests and answers; `dispatch` does
//! what it does badly or not at all, and decides what rusoto gets to see.

mod answer;
mod credentials;
mod dispatch;
mod endpoint;
mod outgoing;
mod sign;
mod timing;
mod tls;
mod wire;

use std::collections::HashMap;
use std::future::Future;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use anyhow::{Context, Result};
use async_trait::async_trait;
use futures::{FutureExt, StreamExt};
use percent_encoding::percent_decode_str;
use rusoto_core::{Region, RusotoError};
use rusoto_s3::{
    AbortMultipartUploadRequest, CompleteMultipartUploadRequest, CompletedMultipartUpload,
    CompletedPart, CopyObjectRequest, CreateMultipartUploadRequest, GetObjectRequest,
    HeadObjectRequest, ListMultipartUploadsRequest, ListObjectsV2Request, ListPartsRequest,
    PutObjectRequest, S3, S3Client, UploadPartCopyRequest, UploadPartRequest,
};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::OnceCell;

use self::credentials::Keyring;
use self::dispatch::{Call, Connection, Dispatcher, Expect};
use self::endpoint::{Endpoint, encode_key};
pub use self::timing::Timing;
use self::tls::Trust;
use crate::config::S3Config;
use crate::progress::Progress;
use crate::quote;
use crate::retry::RetryPolicy;
use crate::store::{
    Kind, ObjectInfo, Page, Part, Response, Store, StoreError, StoreResult, Upload, UploadBody,
};

/// A listing that goes on for longer than this many pages is the store's mistake.
const MOST_PAGES: usize = 1_000;
/// What a blob is, to a store that asks.
const OCTETS: &str = "application/octet-stream";

/// Connects to the bucket that `config` describes. Sends nothing yet.
pub async fn connect(config: &S3Config, progress: Progress) -> Result<Arc<dyn Store>> {
    connect_with(config, progress, Timing::default()).await
}

/// As [`connect`], at another pace.
pub async fn connect_with(
    config: &S3Config,
    progress: Progress,
    timing: Timing,
) -> Result<Arc<dyn Store>> {
    Ok(Arc::new(S3Store::new(config, progress, timing)?))
}

struct S3Store {
    connection: Arc<Connection>,
}

impl S3Store {
    fn new(config: &S3Config, progress: Progress, timing: Timing) -> Result<Self> {
        let reports = progress.clone();
        let retry = RetryPolicy::new(
            config.retry_mode,
            config.retry_max_attempts,
            timing.backoff,
            move |text| reports.note(text),
        );
        let trust = Trust::from_env();
        let endpoint = Endpoint::new(config)
            .with_context(|| format!("cannot reach bucket {:?}", config.bucket))?;
        Ok(S3Store {
            connection: Arc::new(Connection {
                keyring: Keyring::new(config.credentials.as_ref(), &config.region, trust.clone()),
                endpoint,
                bucket: config.bucket.clone(),
                region: config.region.clone(),
                retry,
                timing,
                unanswered: Mutex::default(),
                requests: AtomicU64::new(0),
                accept_encoding: !config.disable_accept_encoding,
                trust,
                wire: OnceCell::new(),
                progress,
                warned: AtomicBool::new(false),
            }),
        })
    }

    fn bucket(&self) -> String {
        self.connection.bucket.clone()
    }

    /// Does one operation through a client of rusoto's that is made for it: cheap, and so what is
    /// not in rusoto's request travels beside it.
    async fn run<T, E, F>(&self, call: Call, send: impl FnOnce(S3Client) -> F) -> StoreResult<T>
    where
        F: Future<Output = Result<T, RusotoError<E>>>,
    {
        let call = Arc::new(call);
        let dispatcher = Dispatcher {
            connection: self.connection.clone(),
            call: call.clone(),
        };
        let client = S3Client::new_with_client(
            rusoto_core::Client::new_not_signing(dispatcher),
            // Addressing and signing are the dispatcher's.
            Region::Custom {
                name: self.connection.region.clone(),
                endpoint: String::new(),
            },
        );
        // What would make rusoto panic is kept from it; should something be left, it ends one call.
        let why = match AssertUnwindSafe(send(client)).catch_unwind().await {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(RusotoError::ParseError(why))) => why,
            Ok(Err(_)) => "rusoto does not take it".to_owned(),
            Err(_) => "rusoto panicked over it".to_owned(),
        };
        Err(call.failure().unwrap_or_else(|| {
            let why = format!(
                "the store's answer makes no sense: {}",
                quote::printable(&why)
            );
            call.error(Kind::Nonsense, &self.connection, &why)
        }))
    }

    /// An answer without something that belongs into it.
    fn lacks(&self, doing: &'static str, key: &str, what: &str) -> StoreError {
        Call::new(doing, Some(key), Expect::Nothing).error(
            Kind::Nonsense,
            &self.connection,
            &format!("the store's answer makes no sense: {what}"),
        )
    }

    /// `x-amz-copy-source` for an object of this bucket.
    fn copy_source(&self, key: &str) -> String {
        encode_key(&format!("{}/{key}", self.connection.bucket))
    }
}

/// Whether an error says that the object is not there.
fn is_missing(e: &StoreError) -> bool {
    e.status == Some(404)
        && !matches!(e.kind, Kind::NoBucket | Kind::NoSuchUpload)
        && e.code.as_deref().is_none_or(|code| {
            // Some gateways are less precise than S3.
            matches!(
                code,
                "NoSuchKey" | "NotFound" | "404" | "NoSuchObject" | "KeyNotFound"
            )
        })
        || e.code.as_deref() == Some("NoSuchKey")
}

/// With 404s on the upload itself said plainly. Some gateways answer without a code.
fn of_upload(e: StoreError) -> StoreError {
    if e.status == Some(404) && e.kind == Kind::Other {
        return StoreError {
            kind: Kind::NoSuchUpload,
            ..e
        };
    }
    e
}

fn http_date(text: Option<String>) -> Option<SystemTime> {
    httpdate::parse_http_date(&text?).ok()
}

fn xml_date(text: Option<String>) -> Option<SystemTime> {
    OffsetDateTime::parse(&text?, &Rfc3339).ok().map(Into::into)
}

/// An ETag that can be sent back.
fn printable(etag: Option<String>) -> Option<String> {
    etag.filter(|etag| !etag.is_empty() && etag.bytes().all(|c| (b' '..=b'~').contains(&c)))
}

/// STANDARD is what an object gets when none is named; naming it is refused by some.
fn storage_class(info: &ObjectInfo) -> Option<String> {
    info.storage_class
        .clone()
        .filter(|class| class != "STANDARD")
}

/// The metadata that BuildKit writes when it refreshes an object. Its name has no underscore, which
/// some gateways fail at (buildkit#3444).
fn touched_now() -> HashMap<String, String> {
    let now = OffsetDateTime::now_utc();
    let now = now.replace_nanosecond(0).unwrap_or(now);
    let text = now.format(&Rfc3339).unwrap_or_default();
    HashMap::from([("updated-at".to_owned(), text)])
}

/// Undoes `encoding-type=url`, which S3 does as forms do: a space is a plus.
fn decode(text: &str, encoded: bool) -> Option<String> {
    if !encoded {
        return Some(text.to_owned());
    }
    let spaced = text.replace('+', " ");
    let decoded = percent_decode_str(&spaced).decode_utf8().ok()?;
    Some(decoded.into_owned())
}

fn is_url(encoding: Option<&str>) -> bool {
    encoding.is_some_and(|encoding| encoding.eq_ignore_ascii_case("url"))
}

/// What `complete`, `copy` and so on answer under.
const COPIED: Expect = Expect::Xml("CopyObjectResult");
const COPIED_PART: Expect = Expect::Xml("CopyPartResult");
const CREATED: Expect = Expect::Xml("InitiateMultipartUploadResult");
const COMPLETED: Expect = Expect::Xml("CompleteMultipartUploadResult");
const LISTED: Expect = Expect::Xml("ListBucketResult");
const LISTED_UPLOADS: Expect = Expect::Xml("ListMultipartUploadsResult");
const LISTED_PARTS: Expect = Expect::Xml("ListPartsResult");

#[async_trait]
impl Store for S3Store {
    async fn head(&self, key: &str) -> StoreResult<Option<ObjectInfo>> {
        let request = HeadObjectRequest {
            bucket: self.bucket(),
            key: key.to_owned(),
            ..Default::default()
        };
        let call = Call::new("look for", Some(key), Expect::Description);
        let sent = self.run(
            call,
            |client| async move { client.head_object(request).await },
        );
        let found = match sent.await {
            Ok(found) => found,
            Err(e) if is_missing(&e) => return Ok(None),
            Err(e) => return Err(e),
        };
        let size = found
            .content_length
            .and_then(|length| u64::try_from(length).ok())
            .ok_or_else(|| self.lacks("look for", key, "an object without a size"))?;
        Ok(Some(ObjectInfo {
            size,
            last_modified: http_date(found.last_modified),
            etag: printable(found.e_tag),
            storage_class: found.storage_class,
        }))
    }

    async fn get(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        if_match: Option<&str>,
    ) -> StoreResult<Option<Response>> {
        const DOING: &str = "get";
        let call = Call::new(DOING, Some(key), Expect::Object);
        let asked = match &range {
            None => None,
            Some(range) => match range.end.checked_sub(1) {
                Some(last) if range.start <= last => Some(format!("bytes={}-{last}", range.start)),
                _ => return Err(call.error(Kind::Other, &self.connection, "an empty range")),
            },
        };
        let request = GetObjectRequest {
            bucket: self.bucket(),
            key: key.to_owned(),
            range: asked,
            if_match: if_match.map(str::to_owned),
            ..Default::default()
        };
        let sent = self.run(
            call,
            |client| async move { client.get_object(request).await },
        );
        let found = match sent.await {
            Ok(found) => found,
            Err(e) if is_missing(&e) => return Ok(None),
            Err(e) => return Err(e),
        };
        let announced = found
            .content_length
            .and_then(|length| u64::try_from(length).ok());
        let given = match found.content_range.as_deref() {
            None => None,
            Some(text) => Some(
                answer::content_range(text)
                    .ok_or_else(|| self.lacks(DOING, key, &format!("Content-Range {:?}", text)))?,
            ),
        };
        let size = match (range, given) {
            (None, None) => announced,
            (None, Some(_)) => {
                return Err(self.lacks(DOING, key, "part of an object that was asked for whole"));
            }
            (Some(range), Some((first, last, size))) => {
                if first != range.start || last != range.end.min(size) - 1 {
                    return Err(self.lacks(DOING, key, "another range than was asked for"));
                }
                if announced.is_some_and(|announced| announced != last - first + 1) {
                    return Err(self.lacks(DOING, key, "a length that is not the range's"));
                }
                Some(size)
            }
            // The whole object is a fine answer to a range that covers it.
            (Some(range), None) => match announced {
                Some(size) if range.start == 0 && range.end >= size => Some(size),
                _ => {
                    return Err(Call::new(DOING, Some(key), Expect::Object).error(
                        Kind::NoRanges,
                        &self.connection,
                        "the store does not do ranges",
                    ));
                }
            },
        };
        let body = found
            .body
            .ok_or_else(|| self.lacks(DOING, key, "an object without a body"))?;
        Ok(Some(Response {
            size,
            last_modified: http_date(found.last_modified),
            etag: printable(found.e_tag),
            storage_class: found.storage_class,
            body: body.boxed(),
        }))
    }

    async fn put(&self, key: &str, body: Arc<dyn UploadBody>) -> StoreResult<()> {
        let request = PutObjectRequest {
            bucket: self.bucket(),
            key: key.to_owned(),
            content_type: Some(OCTETS.into()),
            ..Default::default()
        };
        let call = Call::new("upload", Some(key), Expect::ETag).with_body(body);
        self.run(
            call,
            |client| async move { client.put_object(request).await },
        )
        .await?;
        Ok(())
    }

    async fn touch(&self, key: &str, info: &ObjectInfo) -> StoreResult<bool> {
        let request = CopyObjectRequest {
            bucket: self.bucket(),
            key: key.to_owned(),
            copy_source: self.copy_source(key),
            copy_source_if_match: info.etag.clone(),
            metadata_directive: Some("REPLACE".into()),
            metadata: Some(touched_now()),
            storage_class: storage_class(info),
            content_type: Some(OCTETS.into()),
            ..Default::default()
        };
        let call = Call::new("refresh", Some(key), COPIED).slow();
        let sent = self.run(
            call,
            |client| async move { client.copy_object(request).await },
        );
        match sent.await {
            Ok(done) => {
                let etag = done.copy_object_result.and_then(|result| result.e_tag);
                if printable(etag).is_none() {
                    return Err(self.lacks("refresh", key, "a copy without an ETag"));
                }
                Ok(true)
            }
            // Whoever replaced it has refreshed it.
            Err(e) if e.kind == Kind::Changed => Ok(true),
            Err(e) if is_missing(&e) => Ok(false),
            Err(e) => Err(e),
        }
    }

    async fn list(&self, prefix: &str, next: Option<&str>) -> StoreResult<Page> {
        let request = ListObjectsV2Request {
            bucket: self.bucket(),
            // Keys can hold what XML cannot.
            encoding_type: Some("url".into()),
            max_keys: Some(1000),
            prefix: Some(prefix.to_owned()),
            continuation_token: next.map(str::to_owned),
            ..Default::default()
        };
        let call = Call::new("list the objects of", None, LISTED);
        let sent = self.run(call, |client| async move {
            client.list_objects_v2(request).await
        });
        let found = sent.await?;
        let encoded = is_url(found.encoding_type.as_deref());
        let mut objects = Vec::new();
        for object in found.contents.unwrap_or_default() {
            let Some(key) = object.key.and_then(|key| decode(&key, encoded)) else {
                continue;
            };
            let Some(size) = object.size.and_then(|size| u64::try_from(size).ok()) else {
                continue;
            };
            if !key.starts_with(prefix) {
                continue;
            }
            let info = ObjectInfo {
                size,
                last_modified: xml_date(object.last_modified),
                etag: printable(object.e_tag),
                storage_class: object.storage_class,
            };
            objects.push((key, info));
        }
        let truncated = found.is_truncated == Some(true);
        let token = found
            .next_continuation_token
            .filter(|token| !token.is_empty());
        // A token that comes again would list for ever.
        let stuck = truncated && (token.is_none() || token.as_deref() == next);
        if stuck {
            let call = Call::new("list the objects of", None, LISTED);
            return Err(call.error(
                Kind::Nonsense,
                &self.connection,
                "the store's answer makes no sense: a page that does not say where the next begins",
            ));
        }
        Ok(Page {
            objects,
            next: token.filter(|_| truncated),
        })
    }

    async fn create_upload(&self, key: &str, touched: Option<&ObjectInfo>) -> StoreResult<String> {
        const DOING: &str = "begin the upload of";
        let request = CreateMultipartUploadRequest {
            bucket: self.bucket(),
            key: key.to_owned(),
            content_type: Some(OCTETS.into()),
            metadata: touched.map(|_| touched_now()),
            storage_class: touched.and_then(storage_class),
            ..Default::default()
        };
        let call = Call::new(DOING, Some(key), CREATED).begins_upload();
        let sent = self.run(call, |client| async move {
            client.create_multipart_upload(request).await
        });
        let id = sent.await?.upload_id.filter(|id| !id.is_empty());
        id.ok_or_else(|| self.lacks(DOING, key, "an upload without an id"))
    }

    async fn upload_part(
        &self,
        key: &str,
        upload: &str,
        number: u32,
        body: Arc<dyn UploadBody>,
    ) -> StoreResult<String> {
        const DOING: &str = "upload part of";
        let request = UploadPartRequest {
            bucket: self.bucket(),
            key: key.to_owned(),
            upload_id: upload.to_owned(),
            part_number: number.into(),
            ..Default::default()
        };
        let call = Call::new(DOING, Some(key), Expect::ETag).with_body(body);
        let sent = self.run(
            call,
            |client| async move { client.upload_part(request).await },
        );
        let etag = printable(sent.await.map_err(of_upload)?.e_tag);
        etag.ok_or_else(|| self.lacks(DOING, key, "a part without an ETag"))
    }

    async fn copy_part(
        &self,
        key: &str,
        upload: &str,
        number: u32,
        range: Range<u64>,
        etag: Option<&str>,
    ) -> StoreResult<String> {
        const DOING: &str = "copy part of";
        let call = Call::new(DOING, Some(key), COPIED_PART).slow();
        // The last byte is part of the range (BuildKit's own arithmetic was one off here).
        let last = match range.end.checked_sub(1) {
            Some(last) if range.start <= last => last,
            _ => return Err(call.error(Kind::Other, &self.connection, "an empty range")),
        };
        let request = UploadPartCopyRequest {
            bucket: self.bucket(),
            key: key.to_owned(),
            upload_id: upload.to_owned(),
            part_number: number.into(),
            copy_source: self.copy_source(key),
            copy_source_if_match: etag.map(str::to_owned),
            copy_source_range: Some(format!("bytes={}-{last}", range.start)),
            ..Default::default()
        };
        let sent = self.run(call, |client| async move {
            client.upload_part_copy(request).await
        });
        let copied = sent.await?.copy_part_result;
        printable(copied.and_then(|copied| copied.e_tag))
            .ok_or_else(|| self.lacks(DOING, key, "a part without an ETag"))
    }

    async fn complete_upload(&self, key: &str, upload: &str, parts: &[Part]) -> StoreResult<()> {
        let parts = parts
            .iter()
            .map(|part| CompletedPart {
                e_tag: Some(part.etag.clone()),
                part_number: Some(part.number.into()),
            })
            .collect();
        let request = CompleteMultipartUploadRequest {
            bucket: self.bucket(),
            key: key.to_owned(),
            upload_id: upload.to_owned(),
            multipart_upload: Some(CompletedMultipartUpload { parts: Some(parts) }),
            ..Default::default()
        };
        let call = Call::new("complete the upload of", Some(key), COMPLETED).slow();
        let sent = self.run(call, |client| async move {
            client.complete_multipart_upload(request).await
        });
        let done = sent.await.map_err(of_upload)?;
        if printable(done.e_tag).is_none() {
            return Err(self.lacks("complete the upload of", key, "an object without an ETag"));
        }
        Ok(())
    }

    async fn abort_upload(&self, key: &str, upload: &str) -> StoreResult<()> {
        let request = AbortMultipartUploadRequest {
            bucket: self.bucket(),
            key: key.to_owned(),
            upload_id: upload.to_owned(),
            ..Default::default()
        };
        let call = Call::new("abort the upload of", Some(key), Expect::Nothing);
        let sent = self.run(call, |client| async move {
            client.abort_multipart_upload(request).await
        });
        match sent.await.map_err(of_upload) {
            Ok(_) => Ok(()),
            Err(e) if e.kind == Kind::NoSuchUpload => Ok(()),
            Err(e) => Err(e),
        }
    }

    async fn list_uploads(&self, prefix: &str) -> StoreResult<Vec<Upload>> {
        let mut uploads = Vec::new();
        let (mut key_marker, mut id_marker) = (None, None);
        for _ in 0..MOST_PAGES {
            let request = ListMultipartUploadsRequest {
                bucket: self.bucket(),
                encoding_type: Some("url".into()),
                prefix: Some(prefix.to_owned()),
                key_marker: key_marker.clone(),
                upload_id_marker: id_marker.clone(),
                ..Default::default()
            };
            let call = Call::new("list the uploads to", None, LISTED_UPLOADS);
            let sent = self.run(call, |client| async move {
                client.list_multipart_uploads(request).await
            });
            let found = sent.await?;
            let encoded = is_url(found.encoding_type.as_deref());
            for upload in found.uploads.unwrap_or_default() {
                let key = upload.key.and_then(|key| decode(&key, encoded));
                let id = upload.upload_id.filter(|id| !id.is_empty());
                if let (Some(key), Some(id)) = (key, id)
                    && key.starts_with(prefix)
                {
                    uploads.push(Upload {
                        key,
                        id,
                        initiated: xml_date(upload.initiated),
                    });
                }
            }
            let next_key = found
                .next_key_marker
                .and_then(|marker| decode(&marker, encoded))
                .filter(|marker| !marker.is_empty());
            let next_id = found.next_upload_id_marker.filter(|id| !id.is_empty());
            let more = found.is_truncated == Some(true)
                && next_key.is_some()
                && (&next_key, &next_id) != (&key_marker, &id_marker);
            if !more {
                break;
            }
            (key_marker, id_marker) = (next_key, next_id);
        }
        Ok(uploads)
    }

    async fn list_parts(&self, key: &str, upload: &str) -> StoreResult<Vec<Part>> {
        const DOING: &str = "list the parts of";
        let mut parts: Vec<Part> = Vec::new();
        let mut marker: Option<i64> = None;
        for _ in 0..MOST_PAGES {
            let request = ListPartsRequest {
                bucket: self.bucket(),
                key: key.to_owned(),
                upload_id: upload.to_owned(),
                part_number_marker: marker,
                ..Default::default()
            };
            let call = Call::new(DOING, Some(key), LISTED_PARTS);
            let sent = self.run(
                call,
                |client| async move { client.list_parts(request).await },
            );
            let found = sent.await.map_err(of_upload)?;
            for part in found.parts.unwrap_or_default() {
                let number = part.part_number.and_then(|n| u32::try_from(n).ok());
                let size = part.size.and_then(|size| u64::try_from(size).ok());
                let (Some(number), Some(size), Some(etag)) = (number, size, printable(part.e_tag))
                else {
                    return Err(self.lacks(DOING, key, "a part without number, size or ETag"));
                };
                parts.push(Part { number, size, etag });
            }
            let next = found.next_part_number_marker;
            if found.is_truncated != Some(true) || next.is_none() || next <= marker {
                break;
            }
            marker = next;
        }
        parts.sort_by_key(|part| part.number);
        Ok(parts)
    }

    fn may_hold_unknown_upload(&self, key: &str) -> bool {
        self.connection.is_unanswered(key)
    }

    fn requests(&self) -> u64 {
        self.connection.requests.load(Ordering::Relaxed)
    }

    fn retries(&self) -> &RetryPolicy {
        &self.connection.retry
    }
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
pub(crate) mod tests;
