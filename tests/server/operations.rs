//! S3's operations over the objects in memory.
//!
//! Where a lenient store would hide a client's mistake, this one is as strict as S3: part ETags and
//! their order, the smallest part, the largest copy, a copy onto itself that changes nothing, a range
//! past the end, a batch delete without a checksum.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::TryStreamExt as _;
use s3s::dto::*;
use s3s::{Body, S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};
use sha2::{Digest as _, Sha256};

use super::store::{PartBody, Store, Stored, Upload};

impl Store {
    fn get(&self, bucket: &str, key: &str) -> S3Result<Stored> {
        let state = self.lock();
        match state.bucket(bucket)?.get(key) {
            Some(object) => Ok(object.clone()),
            None if self.limits.hide_missing => Err(s3_error!(AccessDenied)),
            None => Err(s3_error!(NoSuchKey)),
        }
    }

    fn copied_from(
        &self,
        source: &CopySource,
        if_match: Option<&ETagCondition>,
        if_none_match: Option<&ETagCondition>,
    ) -> S3Result<(String, String, Stored)> {
        let CopySource::Bucket { bucket, key, .. } = source else {
            return Err(s3_error!(NotImplemented));
        };
        let object = self.get(bucket, key)?;
        check_preconditions(
            Some(&object),
            if_match,
            if_none_match,
            S3ErrorCode::PreconditionFailed,
        )?;
        Ok((bucket.to_string(), key.to_string(), object))
    }

    async fn body(
        &self,
        body: Option<StreamingBlob>,
        checksum_sha256: Option<&str>,
    ) -> S3Result<Bytes> {
        let mut whole = Bytes::new();
        if let Some(mut body) = body {
            let failed = |error| S3Error::with_source(S3ErrorCode::InternalError, error);
            while let Some(chunk) = body.try_next().await.map_err(failed)? {
                whole = match whole.is_empty() {
                    true => chunk, // The usual case: the request was read whole, and this is all of it.
                    false => [whole, chunk].concat().into(),
                };
            }
        }
        if whole.len() as u64 > self.limits.put_limit {
            return Err(s3_error!(EntityTooLarge));
        }
        if checksum_sha256.is_some_and(|sum| sum != STANDARD.encode(Sha256::digest(&whole))) {
            return Err(s3_error!(BadDigest));
        }
        Ok(whole)
    }

    fn keep_part(
        &self,
        bucket: &str,
        key: &str,
        upload_id: &str,
        number: i32,
        body: Bytes,
    ) -> S3Result<(ETag, SystemTime)> {
        if !(1..=10_000).contains(&number) {
            return Err(s3_error!(
                InvalidArgument,
                "Part number must be an integer between 1 and 10000, inclusive"
            ));
        }
        let part = PartBody {
            etag: self.etag(&body),
            modified: SystemTime::now(),
            body,
        };
        let kept = (strong(&part.etag), part.modified);
        self.lock()
            .upload(bucket, key, upload_id)?
            .parts
            .insert(number, part);
        Ok(kept)
    }

    /// Deletes one object.
    fn delete(
        &self,
        objects: &mut BTreeMap<String, Stored>,
        key: &str,
        if_match: Option<&ETagCondition>,
    ) -> S3Result<()> {
        if self
            .limits
            .undeletable
            .iter()
            .any(|prefix| key.starts_with(prefix))
        {
            return Err(s3_error!(AccessDenied));
        }
        if let Some(object) = objects.get(key) {
            check_preconditions(
                Some(object),
                if_match,
                None,
                S3ErrorCode::PreconditionFailed,
            )?;
        }
        objects.remove(key);
        Ok(())
    }
}

/// S3 refuses some requests that carry no checksum of their body.
fn require_checksum(headers: &http::HeaderMap) -> S3Result<()> {
    let checked = headers.contains_key("content-md5")
        || headers
            .keys()
            .any(|name| name.as_str().starts_with("x-amz-checksum-"));
    match checked {
        true => Ok(()),
        false => Err(s3_error!(
            InvalidRequest,
            "Missing required header for this request: Content-MD5 OR x-amz-checksum-*"
        )),
    }
}

fn strong(etag: &str) -> ETag {
    ETag::Strong(etag.to_owned())
}

fn meets(condition: &ETagCondition, object: Option<&Stored>) -> bool {
    match (object, condition.as_etag()) {
        (None, _) => false,
        (Some(_), None) => true,
        (Some(object), Some(etag)) => etag.value() == object.etag,
    }
}

fn check_preconditions(
    object: Option<&Stored>,
    if_match: Option<&ETagCondition>,
    if_none_match: Option<&ETagCondition>,
    when_it_matches: S3ErrorCode,
) -> S3Result<()> {
    if if_match.is_some_and(|condition| !meets(condition, object)) {
        return Err(s3_error!(PreconditionFailed));
    }
    if if_none_match.is_some_and(|condition| meets(condition, object)) {
        return Err(S3Error::new(when_it_matches));
    }
    Ok(())
}

/// S3 names a storage class in its answers only when it is not the usual one.
fn class(given: Option<&StorageClass>) -> Option<String> {
    given
        .map(|class| class.as_str().to_owned())
        .filter(|class| class != StorageClass::STANDARD)
}

fn sorted(metadata: Option<Metadata>) -> BTreeMap<String, String> {
    metadata.unwrap_or_default().into_iter().collect()
}

fn unsorted(metadata: &BTreeMap<String, String>) -> Option<Metadata> {
    Some(
        metadata
            .iter()
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect::<HashMap<_, _>>(),
    )
}

/// The byte range of an `x-amz-copy-source-range`, which must lie wholly inside the object.
fn copy_range(header: &str, size: u64) -> S3Result<std::ops::Range<usize>> {
    match Range::parse(header) {
        Ok(Range::Int {
            first,
            last: Some(last),
        }) if first <= last && last < size => Ok(first as usize..last as usize + 1),
        Ok(Range::Int { last: Some(_), .. }) => Err(s3_error!(InvalidRange)),
        _ => Err(s3_error!(InvalidArgument)),
    }
}

fn page(asked: Option<i32>, most: usize) -> S3Result<usize> {
    match asked {
        None => Ok(most),
        Some(n) => Ok(usize::try_from(n)
            .map_err(|_| s3_error!(InvalidArgument))?
            .min(most)),
    }
}

/// Keys as a listing writes them: percent-encoded only when asked for.
fn encoder(encoding: Option<&EncodingType>) -> S3Result<impl Fn(&str) -> String + use<>> {
    const SAFE: &percent_encoding::AsciiSet = &percent_encoding::NON_ALPHANUMERIC
        .remove(b'-')
        .remove(b'_')
        .remove(b'.')
        .remove(b'*')
        .remove(b'/');
    let url = match encoding.map(EncodingType::as_str) {
        None => false,
        Some(EncodingType::URL) => true,
        Some(_) => return Err(s3_error!(InvalidArgument)),
    };
    Ok(move |text: &str| match url {
        true => percent_encoding::utf8_percent_encode(text, SAFE).to_string(),
        false => text.to_owned(),
    })
}

/// One page of a listing, both versions.
struct Listing {
    objects: Vec<Object>,
    prefixes: Vec<CommonPrefix>,
    /// The last key or common prefix of this page, when another page follows.
    next: Option<String>,
}

fn list(
    objects: &BTreeMap<String, Stored>,
    prefix: &str,
    delimiter: Option<&str>,
    after: Option<&str>,
    most: usize,
    in_reverse: bool,
    encode: &impl Fn(&str) -> String,
) -> Listing {
    let mut listing = Listing {
        objects: Vec::new(),
        prefixes: Vec::new(),
        next: None,
    };
    let from = match after {
        Some(after) if after >= prefix => Bound::Excluded(after),
        _ => Bound::Included(prefix),
    };
    let mut last: Option<String> = None;
    let keys: Box<dyn Iterator<Item = _>> = match in_reverse {
        false => Box::new(objects.range::<str, _>((from, Bound::Unbounded))),
        true => {
            let to = after.map_or(Bound::Unbounded, Bound::Excluded);
            Box::new(objects.range::<str, _>((Bound::Unbounded, to)).rev())
        }
    };
    // Keys are sorted: those with the prefix lie together.
    let keys = keys.skip_while(|(key, _)| !key.starts_with(prefix));
    for (key, object) in keys {
        let Some(rest) = key.strip_prefix(prefix) else {
            break;
        };
        let common = delimiter
            .filter(|d| !d.is_empty())
            .and_then(|d| rest.find(d).map(|at| &key[..prefix.len() + at + d.len()]));
        // A page that ended on a common prefix is followed by what lies beyond all its keys.
        if let Some(common) = common
            && (after.is_some_and(|after| after.starts_with(common))
                || last.as_deref() == Some(common))
        {
            continue;
        }
        if listing.objects.len() + listing.prefixes.len() == most {
            listing.next = last;
            break;
        }
        match common {
            Some(common) => {
                listing.prefixes.push(CommonPrefix {
                    prefix: Some(encode(common)),
                });
                last = Some(common.to_owned());
            }
            None => {
                listing.objects.push(Object {
                    key: Some(encode(key)),
                    e_tag: Some(strong(&object.etag)),
                    size: Some(object.body.len() as i64),
                    last_modified: Some(object.modified.into()),
                    storage_class: Some(ObjectStorageClass::from(
                        object
                            .storage_class
                            .clone()
                            .unwrap_or_else(|| "STANDARD".to_owned()),
                    )),
                    ..Default::default()
                });
                last = Some(key.clone());
            }
        }
    }
    listing
}

#[async_trait::async_trait]
impl S3 for Store {
    async fn head_bucket(
        &self,
        req: S3Request<HeadBucketInput>,
    ) -> S3Result<S3Response<HeadBucketOutput>> {
        self.lock().bucket(&req.input.bucket)?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn get_object(
        &self,
        req: S3Request<GetObjectInput>,
    ) -> S3Result<S3Response<GetObjectOutput>> {
        let input = req.input;
        let object = self.get(&input.bucket, &input.key)?;
        check_preconditions(
            Some(&object),
            input.if_match.as_ref(),
            input.if_none_match.as_ref(),
            S3ErrorCode::NotModified,
        )?;
        let mut body = object.body.clone();
        let mut content_range = None;
        if let Some(range) = input.range.filter(|_| !self.limits.ignore_range) {
            let wanted = range.check(object.size()).map_err(S3Error::from)?;
            content_range = Some(format!(
                "bytes {}-{}/{}",
                wanted.start,
                wanted.end - 1,
                object.size()
            ));
            body = object
                .body
                .slice(wanted.start as usize..wanted.end as usize);
        }
        Ok(S3Response::new(GetObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            content_length: Some(body.len() as i64),
            content_range,
            body: Some(StreamingBlob::from(Body::from(body))),
            content_type: object.content_type.clone(),
            e_tag: Some(strong(&object.etag)),
            last_modified: Some(object.modified.into()),
            metadata: unsorted(&object.metadata),
            storage_class: object.storage_class.map(StorageClass::from),
            ..Default::default()
        }))
    }

    async fn head_object(
        &self,
        req: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        let input = req.input;
        let object = self.get(&input.bucket, &input.key)?;
        check_preconditions(
            Some(&object),
            input.if_match.as_ref(),
            input.if_none_match.as_ref(),
            S3ErrorCode::NotModified,
        )?;
        Ok(S3Response::new(HeadObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            content_length: Some(object.body.len() as i64),
            content_type: object.content_type.clone(),
            e_tag: Some(strong(&object.etag)),
            last_modified: Some(object.modified.into()),
            metadata: unsorted(&object.metadata),
            storage_class: object.storage_class.map(StorageClass::from),
            ..Default::default()
        }))
    }

    async fn put_object(
        &self,
        req: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        let input = req.input;
        let body = self
            .body(input.body, input.checksum_sha256.as_deref())
            .await?;
        let object = Stored {
            metadata: sorted(input.metadata),
            content_type: input.content_type,
            storage_class: class(input.storage_class.as_ref()),
            ..Stored::with_etag(self.etag(&body), body)
        };
        let etag = strong(&object.etag);
        let mut state = self.lock();
        let bucket = state.bucket_mut(&input.bucket)?;
        check_preconditions(
            bucket.get(&input.key),
            input.if_match.as_ref(),
            input.if_none_match.as_ref(),
            S3ErrorCode::PreconditionFailed,
        )?;
        bucket.insert(input.key, object);
        Ok(S3Response::new(PutObjectOutput {
            e_tag: Some(etag),
            ..Default::default()
        }))
    }

    async fn copy_object(
        &self,
        req: S3Request<CopyObjectInput>,
    ) -> S3Result<S3Response<CopyObjectOutput>> {
        let input = req.input;
        let (from_bucket, from_key, source) = self.copied_from(
            &input.copy_source,
            input.copy_source_if_match.as_ref(),
            input.copy_source_if_none_match.as_ref(),
        )?;
        let replace = input
            .metadata_directive
            .as_ref()
            .map(MetadataDirective::as_str)
            == Some(MetadataDirective::REPLACE);
        let onto_itself = from_bucket == input.bucket && from_key == input.key;
        if onto_itself && !replace && input.storage_class.is_none() {
            return Err(s3_error!(
                InvalidRequest,
                "This copy request is illegal because it is trying to copy an object to itself without changing \
                 the object's metadata, storage class, website redirect location or encryption attributes."
            ));
        }
        if source.size() > self.limits.copy_limit {
            return Err(s3_error!(
                InvalidRequest,
                "The specified copy source is larger than the maximum allowable size for a copy source: {}",
                self.limits.copy_limit
            ));
        }
        let (metadata, content_type) = match replace {
            true => (sorted(input.metadata), input.content_type),
            false => (source.metadata, source.content_type),
        };
        let mut object = Stored {
            metadata,
            content_type,
            storage_class: class(input.storage_class.as_ref()),
            ..Stored::with_etag(self.etag(&source.body), source.body)
        };
        if onto_itself && self.limits.stale_copies {
            object.modified = source.modified;
        }
        let result = CopyObjectResult {
            e_tag: Some(strong(&object.etag)),
            last_modified: Some(object.modified.into()),
            ..Default::default()
        };
        self.lock()
            .bucket_mut(&input.bucket)?
            .insert(input.key, object);
        Ok(S3Response::new(CopyObjectOutput {
            copy_object_result: Some(result),
            ..Default::default()
        }))
    }

    async fn delete_object(
        &self,
        req: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        let input = req.input;
        let mut state = self.lock();
        let objects = state.bucket_mut(&input.bucket)?;
        self.delete(objects, &input.key, input.if_match.as_ref())?;
        Ok(S3Response::with_status(
            DeleteObjectOutput::default(),
            http::StatusCode::NO_CONTENT,
        ))
    }

    async fn delete_objects(
        &self,
        req: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        // A server for benchmarks has dropped what it does not verify.
        if self.at_hand.is_none() {
            require_checksum(&req.headers)?;
        }
        let Delete { objects, quiet } = req.input.delete;
        if objects.len() > 1000 {
            return Err(s3_error!(MalformedXML));
        }
        let mut state = self.lock();
        let bucket = state.bucket_mut(&req.input.bucket)?;
        let (mut deleted, mut errors) = (Vec::new(), Vec::new());
        for object in objects {
            let condition = object.e_tag.map(ETagCondition::ETag);
            match self.delete(bucket, &object.key, condition.as_ref()) {
                Ok(()) => deleted.push(DeletedObject {
                    key: Some(object.key),
                    ..Default::default()
                }),
                Err(error) => errors.push(Error {
                    code: Some(error.code().as_str().to_owned()),
                    key: Some(object.key),
                    message: Some("The test server was told to refuse this.".to_owned()),
                    ..Default::default()
                }),
            }
        }
        Ok(S3Response::new(DeleteObjectsOutput {
            deleted: (quiet != Some(true)).then_some(deleted),
            errors: Some(errors),
            ..Default::default()
        }))
    }

    async fn get_bucket_lifecycle_configuration(
        &self,
        req: S3Request<GetBucketLifecycleConfigurationInput>,
    ) -> S3Result<S3Response<GetBucketLifecycleConfigurationOutput>> {
        let state = self.lock();
        state.bucket(&req.input.bucket)?;
        match state.lifecycles.get(&req.input.bucket) {
            Some(rules) => Ok(S3Response::new(GetBucketLifecycleConfigurationOutput {
                rules: Some(rules.clone()),
                ..Default::default()
            })),
            None => Err(s3_error!(NoSuchLifecycleConfiguration)),
        }
    }

    async fn put_bucket_lifecycle_configuration(
        &self,
        req: S3Request<PutBucketLifecycleConfigurationInput>,
    ) -> S3Result<S3Response<PutBucketLifecycleConfigurationOutput>> {
        // A server for benchmarks has dropped what it does not verify.
        if self.at_hand.is_none() {
            require_checksum(&req.headers)?;
        }
        let Some(configuration) = req.input.lifecycle_configuration else {
            return Err(s3_error!(MalformedXML));
        };
        let mut ids = std::collections::BTreeSet::new();
        for id in configuration
            .rules
            .iter()
            .filter_map(|rule| rule.id.as_ref())
        {
            if !ids.insert(id) {
                return Err(s3_error!(InvalidArgument, "Rule ID must be unique"));
            }
        }
        let mut state = self.lock();
        state.bucket(&req.input.bucket)?;
        state
            .lifecycles
            .insert(req.input.bucket, configuration.rules);
        Ok(S3Response::new(
            PutBucketLifecycleConfigurationOutput::default(),
        ))
    }

    async fn delete_bucket_lifecycle(
        &self,
        req: S3Request<DeleteBucketLifecycleInput>,
    ) -> S3Result<S3Response<DeleteBucketLifecycleOutput>> {
        let mut state = self.lock();
        state.bucket(&req.input.bucket)?;
        state.lifecycles.remove(&req.input.bucket);
        Ok(S3Response::with_status(
            DeleteBucketLifecycleOutput::default(),
            http::StatusCode::NO_CONTENT,
        ))
    }

    async fn list_objects_v2(
        &self,
        req: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = req.input;
        let encode = encoder(input.encoding_type.as_ref())?;
        let after = match &input.continuation_token {
            Some(token) => Some(
                STANDARD
                    .decode(token)
                    .ok()
                    .and_then(|key| String::from_utf8(key).ok())
                    .ok_or_else(|| {
                        s3_error!(
                            InvalidArgument,
                            "The continuation token provided is incorrect"
                        )
                    })?,
            ),
            None if self.limits.ignore_start_after => None,
            None => input.start_after.clone(),
        };
        let most = page(input.max_keys, self.limits.page_size)?;
        let state = self.lock();
        let listing = list(
            state.bucket(&input.bucket)?,
            input.prefix.as_deref().unwrap_or_default(),
            input.delimiter.as_deref(),
            after.as_deref().filter(|after| !after.is_empty()),
            most,
            self.limits.lists_in_reverse,
            &encode,
        );
        Ok(S3Response::new(ListObjectsV2Output {
            key_count: Some((listing.objects.len() + listing.prefixes.len()) as i32),
            is_truncated: Some(listing.next.is_some()),
            // Base64's `+`, `/` and `=` punish a client that does not encode the token it was given.
            next_continuation_token: listing.next.map(|key| STANDARD.encode(key)),
            contents: Some(listing.objects),
            common_prefixes: Some(listing.prefixes),
            name: Some(input.bucket),
            prefix: input.prefix.as_deref().map(&encode),
            delimiter: input.delimiter.as_deref().map(&encode),
            start_after: input.start_after.as_deref().map(&encode),
            continuation_token: input.continuation_token,
            encoding_type: input.encoding_type,
            max_keys: Some(input.max_keys.unwrap_or(1000)),
            ..Default::default()
        }))
    }

    async fn list_objects(
        &self,
        req: S3Request<ListObjectsInput>,
    ) -> S3Result<S3Response<ListObjectsOutput>> {
        let input = req.input;
        let encode = encoder(input.encoding_type.as_ref())?;
        let most = page(input.max_keys, self.limits.page_size)?;
        let state = self.lock();
        let listing = list(
            state.bucket(&input.bucket)?,
            input.prefix.as_deref().unwrap_or_default(),
            input.delimiter.as_deref(),
            input.marker.as_deref().filter(|marker| !marker.is_empty()),
            most,
            self.limits.lists_in_reverse,
            &encode,
        );
        Ok(S3Response::new(ListObjectsOutput {
            is_truncated: Some(listing.next.is_some()),
            // S3 names the next marker only when there is a delimiter; else it is the last key.
            next_marker: listing
                .next
                .filter(|_| input.delimiter.is_some())
                .as_deref()
                .map(&encode),
            contents: Some(listing.objects),
            common_prefixes: Some(listing.prefixes),
            name: Some(input.bucket),
            prefix: input.prefix.as_deref().map(&encode),
            delimiter: input.delimiter.as_deref().map(&encode),
            marker: input.marker.as_deref().map(&encode),
            encoding_type: input.encoding_type,
            max_keys: Some(input.max_keys.unwrap_or(1000)),
            ..Default::default()
        }))
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let input = req.input;
        let mut state = self.lock();
        state.bucket(&input.bucket)?;
        state.uploads_begun += 1;
        let id = format!("upload-{:06}_a.b==", state.uploads_begun);
        state.uploads.insert(
            id.clone(),
            Upload {
                bucket: input.bucket.clone(),
                key: input.key.clone(),
                initiated: SystemTime::now(),
                metadata: sorted(input.metadata),
                content_type: input.content_type,
                storage_class: class(input.storage_class.as_ref()),
                parts: BTreeMap::new(),
            },
        );
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(id),
            ..Default::default()
        }))
    }

    async fn upload_part(
        &self,
        req: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        let input = req.input;
        let body = self
            .body(input.body, input.checksum_sha256.as_deref())
            .await?;
        let etag = self
            .keep_part(
                &input.bucket,
                &input.key,
                &input.upload_id,
                input.part_number,
                body,
            )?
            .0;
        Ok(S3Response::new(UploadPartOutput {
            e_tag: Some(etag),
            ..Default::default()
        }))
    }

    async fn upload_part_copy(
        &self,
        req: S3Request<UploadPartCopyInput>,
    ) -> S3Result<S3Response<UploadPartCopyOutput>> {
        let input = req.input;
        let (_, _, source) = self.copied_from(
            &input.copy_source,
            input.copy_source_if_match.as_ref(),
            input.copy_source_if_none_match.as_ref(),
        )?;
        let range = match &input.copy_source_range {
            Some(header) => copy_range(header, source.size())?,
            None => 0..source.body.len(),
        };
        if range.len() as u64 > self.limits.copy_limit {
            return Err(s3_error!(
                InvalidRequest,
                "The specified copy source is larger than the maximum allowable size for a copy source: {}",
                self.limits.copy_limit
            ));
        }
        let body = source.body.slice(range);
        let (etag, modified) = self.keep_part(
            &input.bucket,
            &input.key,
            &input.upload_id,
            input.part_number,
            body,
        )?;
        Ok(S3Response::new(UploadPartCopyOutput {
            copy_part_result: Some(CopyPartResult {
                e_tag: Some(etag),
                last_modified: Some(modified.into()),
                ..Default::default()
            }),
            ..Default::default()
        }))
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = req.input;
        let mut state = self.lock();
        let upload = state.upload(&input.bucket, &input.key, &input.upload_id)?;
        let named = input
            .multipart_upload
            .and_then(|upload| upload.parts)
            .unwrap_or_default();
        if named.is_empty() {
            return Err(s3_error!(
                MalformedXML,
                "You must specify at least one part"
            ));
        }

        // S3 looks at the order first, whatever else is wrong.
        if named
            .windows(2)
            .any(|pair| pair[0].part_number >= pair[1].part_number)
        {
            return Err(s3_error!(InvalidPartOrder));
        }
        let mut parts = Vec::new();
        for (at, part) in named.iter().enumerate() {
            let number = part.part_number.ok_or_else(|| s3_error!(MalformedXML))?;
            let held = upload
                .parts
                .get(&number)
                .ok_or_else(|| s3_error!(InvalidPart))?;
            if part.e_tag.as_ref().map(ETag::value) != Some(held.etag.as_str()) {
                return Err(s3_error!(InvalidPart));
            }
            if at + 1 < named.len() && (held.body.len() as u64) < self.limits.min_part {
                return Err(s3_error!(EntityTooSmall));
            }
            parts.push(held);
        }
        let (body, etag) = self.joined(&input.key, &parts);
        let object = Stored {
            body,
            etag,
            modified: SystemTime::now(),
            metadata: upload.metadata.clone(),
            content_type: upload.content_type.clone(),
            storage_class: upload.storage_class.clone(),
        };
        let etag = strong(&object.etag);

        let bucket = state.bucket_mut(&input.bucket)?;
        check_preconditions(
            bucket.get(&input.key),
            input.if_match.as_ref(),
            input.if_none_match.as_ref(),
            S3ErrorCode::PreconditionFailed,
        )?;
        bucket.insert(input.key.clone(), object);
        state.uploads.remove(&input.upload_id);
        Ok(S3Response::new(CompleteMultipartUploadOutput {
            location: Some(format!("/{}/{}", input.bucket, input.key)),
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag: Some(etag),
            ..Default::default()
        }))
    }

    async fn abort_multipart_upload(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let input = req.input;
        let mut state = self.lock();
        state.upload(&input.bucket, &input.key, &input.upload_id)?;
        state.uploads.remove(&input.upload_id);
        Ok(S3Response::with_status(
            AbortMultipartUploadOutput::default(),
            http::StatusCode::NO_CONTENT,
        ))
    }

    async fn list_parts(
        &self,
        req: S3Request<ListPartsInput>,
    ) -> S3Result<S3Response<ListPartsOutput>> {
        let input = req.input;
        let most = page(input.max_parts, self.limits.page_size)?;
        let after = input.part_number_marker.unwrap_or(0);
        let mut state = self.lock();
        let upload = state.upload(&input.bucket, &input.key, &input.upload_id)?;
        let mut parts: Vec<Part> = upload
            .parts
            .range((Bound::Excluded(after), Bound::Unbounded))
            .take(most + 1)
            .map(|(number, part)| Part {
                part_number: Some(*number),
                e_tag: Some(strong(&part.etag)),
                size: Some(part.body.len() as i64),
                last_modified: Some(part.modified.into()),
                ..Default::default()
            })
            .collect();
        let truncated = parts.len() > most;
        parts.truncate(most);
        Ok(S3Response::new(ListPartsOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(input.upload_id),
            part_number_marker: Some(after),
            next_part_number_marker: parts.last().and_then(|part| part.part_number),
            max_parts: Some(input.max_parts.unwrap_or(1000)),
            is_truncated: Some(truncated),
            parts: Some(parts),
            ..Default::default()
        }))
    }

    async fn list_multipart_uploads(
        &self,
        req: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        let input = req.input;
        let encode = encoder(input.encoding_type.as_ref())?;
        let most = page(input.max_uploads, self.limits.page_size)?;
        let state = self.lock();
        state.bucket(&input.bucket)?;
        let prefix = input.prefix.as_deref().unwrap_or_default();
        // S3 orders uploads by key, then by when they began; so do the ids of this store.
        let mut found: Vec<(&str, &str, &Upload)> = state
            .uploads
            .iter()
            .map(|(id, upload)| (upload.key.as_str(), id.as_str(), upload))
            .filter(|(key, id, upload)| {
                upload.bucket == input.bucket
                    && key.starts_with(prefix)
                    && match (
                        input.key_marker.as_deref(),
                        input.upload_id_marker.as_deref(),
                    ) {
                        (None | Some(""), _) => true,
                        (Some(marker), None | Some("")) => *key > marker,
                        (Some(marker), Some(id_marker)) => (*key, *id) > (marker, id_marker),
                    }
            })
            .collect();
        found.sort_by_key(|(key, id, _)| (*key, *id));
        let truncated = found.len() > most;
        found.truncate(most);
        let last = found
            .last()
            .filter(|_| truncated)
            .map(|(key, id, _)| (encode(key), (*id).to_owned()));
        let uploads = found
            .into_iter()
            .map(|(key, id, upload)| MultipartUpload {
                key: Some(encode(key)),
                upload_id: Some(id.to_owned()),
                initiated: Some(upload.initiated.into()),
                storage_class: Some(StorageClass::from(
                    upload
                        .storage_class
                        .clone()
                        .unwrap_or_else(|| "STANDARD".to_owned()),
                )),
                ..Default::default()
            })
            .collect();
        Ok(S3Response::new(ListMultipartUploadsOutput {
            is_truncated: Some(truncated),
            next_key_marker: last.as_ref().map(|(key, _)| key.clone()),
            next_upload_id_marker: last.map(|(_, id)| id),
            uploads: Some(uploads),
            bucket: Some(input.bucket.clone()),
            prefix: input.prefix.as_deref().map(&encode),
            key_marker: input.key_marker.as_deref().map(&encode),
            upload_id_marker: input.upload_id_marker.clone(),
            encoding_type: input.encoding_type.clone(),
            max_uploads: Some(input.max_uploads.unwrap_or(1000)),
            ..Default::default()
        }))
    }
}
