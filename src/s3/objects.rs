//! Operations on whole objects, and whether to believe a 404.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use futures::StreamExt;
use rusoto_s3::{
    CopyObjectRequest, GetObjectRequest, HeadBucketRequest, HeadObjectRequest, PutObjectRequest, S3,
};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::S3Store;
use super::call::{Call, Expect, Failure};
use super::endpoint::encode_key;
use super::response::content_range;
use crate::store::{Kind, ObjectInfo, Response, StoreError, StoreResult, UploadBody};

/// The content type of all that we store.
pub(super) const OCTETS: &str = "application/octet-stream";
const LOOKING: &str = "looking for";

impl S3Store {
    pub(super) async fn head_object(&self, key: &str) -> StoreResult<Option<ObjectInfo>> {
        let request = HeadObjectRequest {
            bucket: self.bucket(),
            key: key.to_owned(),
            ..Default::default()
        };
        let call = Call::new(LOOKING, Some(key), Expect::Description);
        let sent = self.run(
            call,
            |client| async move { client.head_object(request).await },
        );
        let found = match sent.await {
            Ok(found) => found,
            Err(e) => return self.absent(e, LOOKING, key).await.map(|()| None),
        };
        let size = found
            .content_length
            .and_then(|length| u64::try_from(length).ok())
            .ok_or_else(|| self.lacks(LOOKING, Some(key), "an object without a size"))?;
        Ok(Some(ObjectInfo {
            size,
            last_modified: http_date(found.last_modified),
            etag: entity_tag(found.e_tag),
            storage_class: found.storage_class,
        }))
    }

    pub(super) async fn get_object(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        if_match: Option<&str>,
    ) -> StoreResult<Option<Response>> {
        const DOING: &str = "reading";
        let call = Call::new(DOING, Some(key), Expect::Object).with_range(range.clone());
        let asked = match range {
            None => None,
            Some(range) if range.is_empty() => {
                let empty = Failure::new(Kind::Other, "an empty range");
                return Err(empty.into_error(&self.remote, &call, None));
            }
            Some(range) => Some(format!("bytes={}-{}", range.start, range.end - 1)),
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
            Err(e) => return self.absent(e, DOING, key).await.map(|()| None),
        };
        // The dispatcher has checked that it is the range that was asked for.
        let range = found.content_range.as_deref().and_then(content_range);
        let size = match range {
            Some((_, _, size)) => Some(size),
            None => found
                .content_length
                .and_then(|length| u64::try_from(length).ok()),
        };
        let body = found
            .body
            .ok_or_else(|| self.lacks(DOING, Some(key), "an object without a body"))?;
        Ok(Some(Response {
            size,
            last_modified: http_date(found.last_modified),
            etag: entity_tag(found.e_tag),
            storage_class: found.storage_class,
            body: body.boxed(),
        }))
    }

    pub(super) async fn put_object(&self, key: &str, body: Arc<dyn UploadBody>) -> StoreResult<()> {
        const DOING: &str = "uploading";
        let size = body.len();
        let request = PutObjectRequest {
            bucket: self.bucket(),
            key: key.to_owned(),
            content_type: Some(OCTETS.into()),
            ..Default::default()
        };
        let call = Call::new(DOING, Some(key), Expect::Stored).with_body(body);
        let sent = self.run(
            call,
            |client| async move { client.put_object(request).await },
        );
        if entity_tag(sent.await?.e_tag).is_none() {
            self.confirm(DOING, key, size).await?;
        }
        Ok(())
    }

    pub(super) async fn copy_onto_itself(&self, key: &str, info: &ObjectInfo) -> StoreResult<bool> {
        let request = CopyObjectRequest {
            bucket: self.bucket(),
            key: key.to_owned(),
            copy_source: encode_key(&format!("{}/{key}", self.remote.bucket)),
            copy_source_if_match: info.etag.clone(),
            metadata_directive: Some("REPLACE".into()),
            metadata: Some(touched_now()),
            storage_class: storage_class(info),
            content_type: Some(OCTETS.into()),
            ..Default::default()
        };
        const DOING: &str = "refreshing";
        let call = Call::new(DOING, Some(key), Expect::Xml("CopyObjectResult")).slow();
        let sent = self.run(
            call,
            |client| async move { client.copy_object(request).await },
        );
        let done = match sent.await {
            Ok(done) => done,
            // Whoever replaced it has also refreshed it.
            Err(e) if e.kind == Kind::Changed => return Ok(true),
            Err(e) => return self.absent(e, DOING, key).await.map(|()| false),
        };
        let etag = done.copy_object_result.and_then(|result| result.e_tag);
        if entity_tag(etag).is_none() {
            let copied = self.confirm(DOING, key, info.size).await?;
            // rclone leaves it unchanged; lifecycle rules go by Last-Modified, so it must move.
            if copied.last_modified.is_some() && copied.last_modified <= info.last_modified {
                let peer = self.remote.endpoint.name();
                let cause = format!("{peer} leaves Last-Modified as it was");
                let call = Call::new(DOING, Some(key), Expect::Nothing);
                let unsupported = Failure::new(Kind::Unsupported, cause);
                return Err(unsupported.into_error(&self.remote, &call, None));
            }
        }
        Ok(true)
    }

    pub(super) async fn copy_object(
        &self,
        (bucket, source): (&str, &str),
        key: &str,
        info: &ObjectInfo,
    ) -> StoreResult<bool> {
        const DOING: &str = "copying to";
        let request = CopyObjectRequest {
            bucket: self.bucket(),
            key: key.to_owned(),
            copy_source: encode_key(&format!("{bucket}/{source}")),
            copy_source_if_match: info.etag.clone(),
            storage_class: storage_class(info),
            ..Default::default()
        };
        let call = Call::new(DOING, Some(key), Expect::Xml("CopyObjectResult")).slow();
        let sent = self.run(
            call,
            |client| async move { client.copy_object(request).await },
        );
        let done = match sent.await {
            Ok(done) => done,
            Err(e) => return self.absent(e, DOING, key).await.map(|()| false),
        };
        let etag = done.copy_object_result.and_then(|result| result.e_tag);
        if entity_tag(etag).is_none() {
            self.confirm(DOING, key, info.size).await?;
        }
        Ok(true)
    }

    /// Ok if S3 says, by `e`, that the object is not there. At a wrong endpoint every cache would look
    /// empty, and a 404 without a body could be any server's: unless the endpoint has already responded
    /// as only S3 does, list the bucket to find out.
    pub(super) async fn absent(
        &self,
        e: StoreError,
        doing: &'static str,
        key: &str,
    ) -> StoreResult<()> {
        if e.kind != Kind::Missing {
            return Err(e);
        }
        let _one = self.remote.finding_out.lock().await;
        if e.code.is_some() || self.remote.is_genuine() {
            return Ok(());
        }
        match self.list_first().await {
            Ok(()) => return Ok(()),
            Err(e) if matches!(e.kind, Kind::NoBucket | Kind::Unavailable) => return Err(e),
            Err(_) if self.remote.is_genuine() => return Ok(()),
            Err(_) => {}
        }
        // Some stores know only version 1 of the listing.
        let request = HeadBucketRequest {
            bucket: self.bucket(),
            ..Default::default()
        };
        let call = Call::new(LOOKING, None, Expect::Nothing);
        let sent = self.run(
            call,
            |client| async move { client.head_bucket(request).await },
        );
        if sent.await.is_ok() || self.remote.is_genuine() {
            self.remote.note_genuine();
            return Ok(());
        }
        let cause = format!(
            "{} answered 404, but not like S3",
            self.remote.endpoint.name()
        );
        let call = Call::new(doing, Some(key), Expect::Nothing);
        Err(Failure::new(Kind::NotS3, cause)
            .advise("check endpoint_url, bucket and use_path_style")
            .into_error(&self.remote, &call, None))
    }
}

pub(super) fn http_date(text: Option<String>) -> Option<SystemTime> {
    httpdate::parse_http_date(&text?).ok()
}

/// An ETag that can be sent back. Some stores leave out the quotes in XML, and not in headers: two looks
/// at one object must agree.
pub(super) fn entity_tag(found: Option<String>) -> Option<String> {
    let is_sendable = |tag: &String| tag.bytes().all(|c| (b' '..=b'~').contains(&c));
    let tag = found.filter(|tag| !tag.is_empty() && is_sendable(tag))?;
    Some(match tag.contains('"') {
        true => tag,
        false => format!("\"{tag}\""),
    })
}

/// STANDARD is the default, and some stores refuse it by name.
pub(super) fn storage_class(info: &ObjectInfo) -> Option<String> {
    info.storage_class
        .clone()
        .filter(|class| class != "STANDARD")
}

/// The metadata that BuildKit writes when it refreshes an object. Some gateways fail at underscores in
/// its name (buildkit#3444).
pub(super) fn touched_now() -> HashMap<String, String> {
    let now = OffsetDateTime::now_utc();
    let now = now.replace_nanosecond(0).unwrap_or(now);
    let text = now.format(&Rfc3339).unwrap_or_default();
    HashMap::from([("updated-at".to_owned(), text)])
}
