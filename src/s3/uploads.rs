//! Multipart uploads.

use std::ops::Range;
use std::sync::Arc;

use rusoto_s3::{
    AbortMultipartUploadRequest, CompleteMultipartUploadRequest, CompletedMultipartUpload,
    CompletedPart, CreateMultipartUploadRequest, ListMultipartUploadsRequest, ListPartsRequest, S3,
    UploadPartCopyRequest, UploadPartRequest,
};

use super::S3Store;
use super::call::{Call, Expect, Failure};
use super::endpoint::encode_key;
use super::listing::{decode, is_url, xml_date};
use super::objects::{OCTETS, entity_tag, storage_class, touched_now};
use crate::store::{Kind, ObjectInfo, Part, StoreError, StoreResult, Upload, UploadBody};

/// S3's limit for the parts of an upload, and ours for the uploads that we look at.
const MOST: usize = 10_000;

impl S3Store {
    pub(super) async fn create_multipart(
        &self,
        key: &str,
        touched: Option<&ObjectInfo>,
    ) -> StoreResult<String> {
        const DOING: &str = "starting the upload of";
        let request = CreateMultipartUploadRequest {
            bucket: self.bucket(),
            key: key.to_owned(),
            content_type: Some(OCTETS.into()),
            metadata: touched.map(|_| touched_now()),
            storage_class: touched.and_then(storage_class),
            ..Default::default()
        };
        let call = Call::new(DOING, Some(key), Expect::XmlWith("UploadId")).begins_upload();
        let sent = self.run(call, |client| async move {
            client.create_multipart_upload(request).await
        });
        let id = sent.await?.upload_id.filter(|id| !id.is_empty());
        id.ok_or_else(|| self.lacks(DOING, Some(key), "an upload without an id"))
    }

    pub(super) async fn send_part(
        &self,
        key: &str,
        upload: &str,
        number: u32,
        body: Arc<dyn UploadBody>,
    ) -> StoreResult<String> {
        const DOING: &str = "uploading part of";
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
        let etag = entity_tag(sent.await.map_err(of_upload)?.e_tag);
        etag.ok_or_else(|| self.lacks(DOING, Some(key), "a part without an ETag"))
    }

    pub(super) async fn send_copied_part(
        &self,
        from: Option<(&str, &str)>,
        key: &str,
        upload: &str,
        number: u32,
        range: Range<u64>,
        etag: Option<&str>,
    ) -> StoreResult<String> {
        const DOING: &str = "copying part of";
        let call = Call::new(DOING, Some(key), Expect::XmlWith("ETag")).slow();
        // The range includes its last byte (BuildKit's own arithmetic was one off here).
        let last = match range.end.checked_sub(1) {
            Some(last) if range.start <= last => last,
            _ => {
                let empty = Failure::new(Kind::Other, "an empty range");
                return Err(empty.into_error(&self.remote, &call, None));
            }
        };
        let (bucket, source) = from.unwrap_or((&self.remote.bucket, key));
        let request = UploadPartCopyRequest {
            bucket: self.bucket(),
            key: key.to_owned(),
            upload_id: upload.to_owned(),
            part_number: number.into(),
            copy_source: encode_key(&format!("{bucket}/{source}")),
            copy_source_if_match: etag.map(str::to_owned),
            copy_source_range: Some(format!("bytes={}-{last}", range.start)),
            ..Default::default()
        };
        let sent = self.run(call, |client| async move {
            client.upload_part_copy(request).await
        });
        let copied = sent.await?.copy_part_result;
        entity_tag(copied.and_then(|copied| copied.e_tag))
            .ok_or_else(|| self.lacks(DOING, Some(key), "a part without an ETag"))
    }

    pub(super) async fn complete_multipart(
        &self,
        key: &str,
        upload: &str,
        parts: &[Part],
    ) -> StoreResult<()> {
        const DOING: &str = "completing the upload of";
        let size = parts.iter().map(|part| part.size).sum();
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
        let call = Call::new(
            DOING,
            Some(key),
            Expect::Xml("CompleteMultipartUploadResult"),
        )
        .slow();
        let sent = self.run(call, |client| async move {
            client.complete_multipart_upload(request).await
        });
        let done = sent.await.map_err(of_upload)?;
        if entity_tag(done.e_tag).is_none() {
            self.confirm(DOING, key, size).await?;
        }
        Ok(())
    }

    pub(super) async fn abort_multipart(&self, key: &str, upload: &str) -> StoreResult<()> {
        let request = AbortMultipartUploadRequest {
            bucket: self.bucket(),
            key: key.to_owned(),
            upload_id: upload.to_owned(),
            ..Default::default()
        };
        let call = Call::new("aborting the upload of", Some(key), Expect::Nothing);
        let sent = self.run(call, |client| async move {
            client.abort_multipart_upload(request).await
        });
        match sent.await.map_err(of_upload) {
            Ok(_) => Ok(()),
            Err(e) if e.kind == Kind::NoSuchUpload => Ok(()),
            Err(e) => Err(e),
        }
    }

    pub(super) async fn list_multiparts(&self, prefix: &str) -> StoreResult<Vec<Upload>> {
        let mut uploads: Vec<Upload> = Vec::new();
        let (mut key_marker, mut id_marker) = (None, None);
        while uploads.len() < MOST {
            let request = ListMultipartUploadsRequest {
                bucket: self.bucket(),
                // No encoding-type: Ceph RGW encodes the keys when asked, but does not say that it did.
                prefix: Some(prefix.to_owned()),
                key_marker: key_marker.clone(),
                upload_id_marker: id_marker.clone(),
                ..Default::default()
            };
            let call = Call::new(
                "listing the uploads to",
                None,
                Expect::Listing("ListMultipartUploadsResult"),
            );
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
        uploads.truncate(MOST);
        Ok(uploads)
    }

    pub(super) async fn list_held_parts(&self, key: &str, upload: &str) -> StoreResult<Vec<Part>> {
        const DOING: &str = "listing the parts of";
        let mut parts: Vec<Part> = Vec::new();
        let mut marker: Option<i64> = None;
        while parts.len() < MOST {
            let request = ListPartsRequest {
                bucket: self.bucket(),
                key: key.to_owned(),
                upload_id: upload.to_owned(),
                part_number_marker: marker,
                ..Default::default()
            };
            let call = Call::new(DOING, Some(key), Expect::Listing("ListPartsResult"));
            let sent = self.run(
                call,
                |client| async move { client.list_parts(request).await },
            );
            let found = sent.await.map_err(of_upload)?;
            for part in found.parts.unwrap_or_default() {
                let number = part.part_number.and_then(|n| u32::try_from(n).ok());
                let size = part.size.and_then(|size| u64::try_from(size).ok());
                let (Some(number), Some(size), Some(etag)) = (number, size, entity_tag(part.e_tag))
                else {
                    return Err(self.lacks(
                        DOING,
                        Some(key),
                        "a part without number, size or ETag",
                    ));
                };
                parts.push(Part { number, size, etag });
            }
            let next = found.next_part_number_marker;
            if found.is_truncated != Some(true) || next.is_none() || next <= marker {
                break;
            }
            marker = next;
        }
        parts.truncate(MOST);
        parts.sort_by_key(|part| part.number);
        Ok(parts)
    }
}

/// Maps 404 to [`Kind::NoSuchUpload`]: some gateways send no code.
fn of_upload(e: StoreError) -> StoreError {
    if e.status == Some(404) && matches!(e.kind, Kind::Missing | Kind::Other) {
        return StoreError {
            kind: Kind::NoSuchUpload,
            ..e
        };
    }
    e
}
