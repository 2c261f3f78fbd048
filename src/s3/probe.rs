//! What the fuzz targets call: an answer's way through the checks and then through rusoto, without a
//! network. Not part of the program.

use std::collections::HashMap;

use bytes::Bytes;
use futures::FutureExt;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use rusoto_core::Region;
use rusoto_core::request::{
    DispatchSignedRequest, DispatchSignedRequestFuture, HttpDispatchError, HttpResponse,
};
use rusoto_core::signature::SignedRequest;
use rusoto_s3::{
    CompleteMultipartUploadRequest, CopyObjectRequest, CreateMultipartUploadRequest,
    HeadObjectRequest, ListMultipartUploadsRequest, ListObjectsV2Request, ListPartsRequest, S3,
    S3Client, UploadPartCopyRequest,
};

use super::answer::{self, Content};

/// The elements under which S3 answers, in the order of `operation` of [`answered`].
pub const ROOTS: [&str; 7] = [
    "ListBucketResult",
    "ListMultipartUploadsResult",
    "ListPartsResult",
    "InitiateMultipartUploadResult",
    "CompleteMultipartUploadResult",
    "CopyObjectResult",
    "CopyPartResult",
];

struct Canned {
    headers: HeaderMap,
    body: Bytes,
}

impl DispatchSignedRequest for Canned {
    fn dispatch(
        &self,
        _request: SignedRequest,
        _timeout: Option<std::time::Duration>,
    ) -> DispatchSignedRequestFuture {
        let kept: HashMap<String, String> =
            answer::kept_headers(&self.headers).into_iter().collect();
        let body = self.body.clone();
        Box::pin(async move {
            let headers = (&kept)
                .try_into()
                .map_err(|_| HttpDispatchError::new("malformed headers".into()))?;
            Ok(HttpResponse {
                status: 200u16
                    .try_into()
                    .map_err(|_| HttpDispatchError::new("no status".into()))?,
                headers,
                body: rusoto_core::ByteStream::new(futures::stream::iter([Ok(body)])),
            })
        })
    }
}

fn headers_of(pairs: &[(String, Vec<u8>)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        if let (Ok(name), Ok(value)) = (
            HeaderName::from_bytes(name.as_bytes()),
            HeaderValue::from_bytes(value),
        ) {
            headers.append(name, value);
        }
    }
    headers
}

fn client(headers: HeaderMap, body: Bytes) -> S3Client {
    let dispatcher = Canned { headers, body };
    S3Client::new_with_client(
        rusoto_core::Client::new_not_signing(dispatcher),
        Region::Custom {
            name: "us-east-1".into(),
            endpoint: String::new(),
        },
    )
}

/// What becomes of a 200 to `operation` (an index into [`ROOTS`]): `None` if it is refused before
/// rusoto sees it, else whether rusoto could parse it. Panics if rusoto does.
pub fn answered(operation: usize, headers: &[(String, Vec<u8>)], body: &[u8]) -> Option<bool> {
    let root = ROOTS.get(operation)?;
    let Content::Good { start } = answer::examine(body, root, 200) else {
        return None;
    };
    let body = Bytes::copy_from_slice(body.get(start..)?);
    let client = client(headers_of(headers), body);
    let parsed = async {
        match operation {
            0 => {
                let found = client.list_objects_v2(ListObjectsV2Request::default());
                found.await.is_ok()
            }
            1 => {
                let found = client.list_multipart_uploads(ListMultipartUploadsRequest::default());
                found.await.is_ok()
            }
            2 => client.list_parts(ListPartsRequest::default()).await.is_ok(),
            3 => {
                let made = client.create_multipart_upload(CreateMultipartUploadRequest::default());
                made.await.is_ok()
            }
            4 => {
                let done =
                    client.complete_multipart_upload(CompleteMultipartUploadRequest::default());
                done.await.is_ok()
            }
            5 => client
                .copy_object(CopyObjectRequest::default())
                .await
                .is_ok(),
            _ => {
                let copied = client.upload_part_copy(UploadPartCopyRequest::default());
                copied.await.is_ok()
            }
        }
    };
    // Nothing in it waits.
    parsed.now_or_never()
}

/// What becomes of an answer that describes an object by its headers: whether rusoto takes them.
/// Panics if rusoto does.
pub fn described(headers: &[(String, Vec<u8>)]) -> bool {
    let headers = headers_of(headers);
    if let Some(range) = headers.get("content-range").and_then(|v| v.to_str().ok())
        && let Some((first, last, total)) = answer::content_range(range)
    {
        assert!(first <= last && last < total, "{range:?} passed as a range");
    }
    let client = client(headers, Bytes::new());
    let described = client.head_object(HeadObjectRequest::default());
    described.now_or_never().is_some_and(|found| found.is_ok())
}

/// What is said of an answer that is not success. Never has a line break or a control character.
pub fn refused(status: u16, headers: &[(String, Vec<u8>)], body: &[u8]) -> String {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST);
    let refusal = answer::refusal(status, &headers_of(headers), body);
    let _ = refusal.verdict();
    refusal.explain("us-east-1", "bucket", true)
}
