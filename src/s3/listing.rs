//! Listing objects.

use std::sync::Arc;
use std::time::SystemTime;

use percent_encoding::percent_decode_str;
use rusoto_s3::{ListObjectsV2Request, S3};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::S3Store;
use super::call::{Call, Expect};
use super::objects::entity_tag;
use super::page;
use crate::store::{ObjectInfo, Page, StoreResult};

const DOING: &str = "listing";

impl S3Store {
    pub(super) async fn list_objects(
        &self,
        prefix: &str,
        next: Option<&str>,
        after: Option<&str>,
    ) -> StoreResult<Page> {
        let request = ListObjectsV2Request {
            bucket: self.bucket(),
            // Keys can hold what XML cannot.
            encoding_type: Some("url".into()),
            max_keys: Some(1000),
            prefix: Some(prefix.to_owned()),
            continuation_token: next.map(str::to_owned),
            start_after: after.map(str::to_owned),
            ..Default::default()
        };
        let page = Arc::default();
        let call = Call::new(DOING, None, Expect::Listing(page::ROOT)).reading(&page);
        let sent = self.run(call, |client| async move {
            client.list_objects_v2(request).await
        });
        sent.await?;
        let found = std::mem::take(&mut *page.lock());
        let encoded = is_url(found.encoding_type.as_deref());
        let mut objects = Vec::with_capacity(found.contents.len());
        for object in found.contents {
            let key = object.key.and_then(|raw| {
                let key = decode(&raw, encoded);
                // s3s-fs says that it encodes keys, but does not.
                match key.as_ref().is_some_and(|key| key.starts_with(prefix)) {
                    true => key,
                    false => Some(raw).filter(|raw| raw.starts_with(prefix)),
                }
            });
            let (Some(key), Some(size)) = (key, object.size) else {
                continue;
            };
            let info = ObjectInfo {
                size,
                last_modified: xml_date(object.last_modified),
                etag: entity_tag(object.etag),
                storage_class: object.storage_class,
            };
            objects.push((key, info));
        }
        let truncated = found.is_truncated;
        let token = found
            .next_continuation_token
            .filter(|token| !token.is_empty());
        // A repeated token would list without end.
        let stuck = truncated && (token.is_none() || token.as_deref() == next);
        if stuck {
            let what = "a page that does not say where the next begins";
            return Err(self.lacks(DOING, None, what));
        }
        Ok(Page {
            objects,
            next: token.filter(|_| truncated),
        })
    }

    /// Lists at most one key of the bucket.
    pub(super) async fn list_first(&self) -> StoreResult<()> {
        let request = ListObjectsV2Request {
            bucket: self.bucket(),
            max_keys: Some(1),
            ..Default::default()
        };
        let call = Call::new(DOING, None, Expect::Listing(page::ROOT));
        let sent = self.run(call, |client| async move {
            client.list_objects_v2(request).await
        });
        sent.await.map(drop)
    }
}

pub(super) fn xml_date(text: Option<String>) -> Option<SystemTime> {
    OffsetDateTime::parse(&text?, &Rfc3339).ok().map(Into::into)
}

/// Undoes `encoding-type=url`, which S3 does as forms do: a space is a plus.
pub(super) fn decode(text: &str, encoded: bool) -> Option<String> {
    if !encoded {
        return Some(text.to_owned());
    }
    let spaced = text.replace('+', " ");
    let decoded = percent_decode_str(&spaced).decode_utf8().ok()?;
    Some(decoded.into_owned())
}

pub(super) fn is_url(encoding: Option<&str>) -> bool {
    encoding.is_some_and(|encoding| encoding.eq_ignore_ascii_case("url"))
}
