//! The store's answers, mutated: on their way through the checks and then through rusoto, without a
//! network. rusoto must not panic on anything that the checks let pass.

use std::collections::HashMap;

use bytes::Bytes;
use futures::FutureExt;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use proptest::prelude::*;
use proptest::sample::Index;
use rusoto_core::Region;
use rusoto_core::request::{
    DispatchSignedRequest, DispatchSignedRequestFuture, HttpDispatchError, HttpResponse,
};
use rusoto_core::signature::SignedRequest;
use rusoto_s3::{
    CompleteMultipartUploadRequest, CopyObjectRequest, CreateMultipartUploadRequest,
    HeadObjectRequest, ListMultipartUploadsRequest, ListPartsRequest, S3, S3Client,
    UploadPartCopyRequest,
};

use super::page;
use super::response::{self, Content, Wanted};
use crate::cache::digest::Digest;
use crate::redact::Secrets;

/// The elements under which S3 answers, in the order of `operation` of [`answered`].
const ROOTS: [&str; 7] = [
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
            response::kept_headers(&self.headers).into_iter().collect();
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
/// rusoto sees it, else whether rusoto could parse it. Panics if rusoto does. Pages we parse ourselves.
fn answered(operation: usize, headers: &[(String, Vec<u8>)], body: &[u8]) -> Option<bool> {
    if operation == 0 {
        return page::read(body).map(|_| true);
    }
    let wanted = match operation {
        3 => Wanted::Element("UploadId"),
        1..=5 => Wanted::Root(ROOTS[operation]),
        _ => Wanted::Element("ETag"),
    };
    let Content::Good { start } = response::examine(body, wanted, 200, &Secrets::default()) else {
        return None;
    };
    let body = Bytes::copy_from_slice(body.get(start..)?);
    let client = client(headers_of(headers), body);
    let parsed = async {
        match operation {
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
fn described(headers: &[(String, Vec<u8>)]) -> bool {
    let headers = headers_of(headers);
    if let Some(range) = headers.get("content-range").and_then(|v| v.to_str().ok())
        && let Some((first, last, total)) = response::content_range(range)
    {
        assert!(first <= last && last < total, "{range:?} passed as a range");
    }
    let client = client(headers, Bytes::new());
    let described = client.head_object(HeadObjectRequest::default());
    described.now_or_never().is_some_and(|found| found.is_ok())
}

/// What is said of an answer that is not success. Never has a line break or a control character.
fn refused(status: u16, headers: &[(String, Vec<u8>)], body: &[u8]) -> String {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST);
    let headers = headers_of(headers);
    let refusal = response::refusal(status, &headers, body, &Secrets::default());
    let _ = refusal.verdict(false);
    let advice = refusal.advice("us-east-1", true);
    format!("{}; {}", refusal.cause("S3"), advice.unwrap_or_default())
}

#[derive(Debug, Clone)]
enum Edit {
    Flip(Index, u8),
    Cut(Index, usize),
    Repeat(Index, usize),
    End(Index),
}

fn edits(most: usize) -> impl Strategy<Value = Vec<Edit>> {
    let at = any::<Index>;
    let edit = prop_oneof![
        4 => (at(), 1..=255u8).prop_map(|(at, bits)| Edit::Flip(at, bits)),
        2 => (at(), 1..40usize).prop_map(|(at, length)| Edit::Cut(at, length)),
        2 => (at(), 1..200usize).prop_map(|(at, length)| Edit::Repeat(at, length)),
        1 => at().prop_map(Edit::End),
    ];
    prop::collection::vec(edit, 0..=most)
}

fn edited(mut bytes: Vec<u8>, edits: &[Edit]) -> Vec<u8> {
    for edit in edits {
        let (Edit::Flip(at, _) | Edit::Cut(at, _) | Edit::Repeat(at, _) | Edit::End(at)) = edit;
        let at = at.index(bytes.len() + 1);
        let end = |length: &usize| bytes.len().min(at + length);
        match edit {
            Edit::Flip(_, bits) => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= bits;
                }
            }
            Edit::Cut(_, length) => {
                let end = end(length);
                bytes.drain(at..end);
            }
            Edit::Repeat(_, length) => {
                let again = bytes[at..end(length)].to_vec();
                bytes.splice(at..at, again);
            }
            Edit::End(_) => bytes.truncate(at),
        }
    }
    bytes
}

fn answers() -> Vec<(usize, String)> {
    let objects: String = (0..3)
        .map(|n| {
            let digest = Digest::of(&[n]);
            format!(
                "<Contents><Key>blobs%2F{digest}</Key><LastModified>2026-11-21T20:37:36.000Z\
                 </LastModified><ETag>&quot;abc-{n}&quot;</ETag><Size>{n}23</Size>\
                 <StorageClass>STANDARD</StorageClass><Owner><ID>x</ID></Owner></Contents>"
            )
        })
        .collect();
    let bodies = [
        format!(
            "<Name>b</Name><Prefix>blobs/</Prefix><KeyCount>3</KeyCount><MaxKeys>1000</MaxKeys>\
             <EncodingType>url</EncodingType><IsTruncated>true</IsTruncated>{objects}\
             <CommonPrefixes><Prefix>p/</Prefix></CommonPrefixes>\
             <NextContinuationToken>abc==</NextContinuationToken>"
        ),
        "<Bucket>b</Bucket><KeyMarker/><UploadIdMarker/><NextKeyMarker>k</NextKeyMarker>\
         <NextUploadIdMarker>u</NextUploadIdMarker><MaxUploads>1000</MaxUploads>\
         <IsTruncated>false</IsTruncated><Upload><Key>k</Key><UploadId>u</UploadId>\
         <Initiator><ID>i</ID></Initiator><Initiated>2026-11-21T20:37:36Z</Initiated></Upload>"
            .into(),
        "<Bucket>b</Bucket><Key>k</Key><UploadId>u</UploadId><PartNumberMarker>0</PartNumberMarker>\
         <NextPartNumberMarker>2</NextPartNumberMarker><MaxParts>1000</MaxParts>\
         <IsTruncated>false</IsTruncated><Part><PartNumber>1</PartNumber>\
         <ETag>\"e\"</ETag><Size>5242880</Size></Part>"
            .into(),
        "<Bucket>b</Bucket><Key>k</Key><UploadId>u</UploadId>".into(),
        "<Location>l</Location><Bucket>b</Bucket><Key>k</Key><ETag>\"e-2\"</ETag>".into(),
        "<LastModified>2026-11-21T20:37:36Z</LastModified><ETag>\"e\"</ETag>".into(),
        "<ETag>\"e\"</ETag><LastModified>2026-11-21T20:37:36Z</LastModified>".into(),
    ];
    let whole = bodies.into_iter().zip(ROOTS).enumerate();
    whole
        .map(|(operation, (body, root))| {
            let document = format!(
                "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
                 <{root} xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">{body}</{root}>"
            );
            (operation, document)
        })
        .collect()
}

/// Values where S3 has one, and elements of S3's at the wrong place.
fn xml_changes() -> impl Strategy<Value = Vec<(Index, &'static str)>> {
    let inserted = prop::sample::select(vec![
        "",
        "-1",
        "+1",
        " 1",
        "1 ",
        "0x10",
        "1.5",
        "NaN",
        "99999999999999999999",
        "9223372036854775807",
        "True",
        "<Size>1</Size>",
        "<Size/>",
        "<PartNumber>x</PartNumber>",
        "<IsTruncated/>",
        "<IsTruncated>true</IsTruncated>",
        "<MaxKeys><a/></MaxKeys>",
        "<Contents/>",
        "<Contents>",
        "</Contents>",
        "<Part/>",
        "<Part><Size>1</Size></Part>",
        "<Upload/>",
        "<Owner/>",
        "<ETag/>",
        "<a:Size xmlns:a=\"x\">z</a:Size>",
        "<![CDATA[1]]>",
        "<!-- c -->",
        "<?pi?>",
        "&#49;",
        "&amp;",
        "&x;",
        "\u{feff}",
        "\r\n",
    ]);
    prop::collection::vec((any::<Index>(), inserted), 0..4)
}

/// Puts each text behind a tag of the document.
fn xml_changed(document: &str, changes: &[(Index, &'static str)]) -> String {
    let mut document = document.to_owned();
    for (at, text) in changes {
        let ends: Vec<usize> = document.match_indices('>').map(|(at, _)| at + 1).collect();
        if !ends.is_empty() {
            document.insert_str(*at.get(&ends), text);
        }
    }
    document
}

fn headers() -> impl Strategy<Value = Vec<(String, Vec<u8>)>> {
    let name = prop::sample::select(vec![
        "content-length",
        "content-range",
        "etag",
        "last-modified",
        "x-amz-storage-class",
        "x-amz-delete-marker",
        "x-amz-mp-parts-count",
        "x-amz-missing-meta",
        "x-amz-meta-updated-at",
        "x-amz-bucket-region",
        "x-amz-retry-after",
        "retry-after",
        "date",
        "x-amz-expiration",
        "x-amz-server-side-encryption-bucket-key-enabled",
    ]);
    let text = prop_oneof![
        "(bytes )?[-+]?[0-9]{0,22}-[0-9]{0,22}/([0-9]{0,22}|\\*)",
        "[-+]?[0-9]{0,25}",
        "\"[ -~]{0,20}\"",
        "[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT",
        "true|false|maybe",
    ];
    let value = prop_oneof![
        4 => text.prop_map(String::into_bytes),
        1 => prop::collection::vec(any::<u8>(), 0..30),
    ];
    prop::collection::vec((name.prop_map(str::to_owned), value), 0..6)
}

proptest! {
    #[test]
    fn xml_answers_of_the_store(
        which in any::<Index>(),
        operation in prop::option::of(0..7usize),
        changes in xml_changes(),
        edits in prop_oneof![1 => Just(Vec::new()), 1 => edits(3)],
        headers in headers(),
    ) {
        let answers = answers();
        let (own, document) = which.get(&answers);
        let body = edited(xml_changed(document, &changes).into_bytes(), &edits);
        let found = answered(operation.unwrap_or(*own), &headers, &body);
        if operation.is_none() && changes.is_empty() && edits.is_empty() {
            prop_assert_eq!(found, Some(true));
        }
    }

    #[test]
    fn headers_of_the_store(headers in headers()) {
        described(&headers);
    }

    #[test]
    fn refusals_of_the_store(
        status in 100..1000u16,
        headers in headers(),
        code in "[A-Za-z\u{1b}\n]{0,20}",
        message in ".{0,400}",
        edits in edits(2),
    ) {
        let body = format!("<Error><Code>{code}</Code><Message>{message}</Message><Region>eu</Region></Error>");
        let said = refused(status, &headers, &edited(body.into_bytes(), &edits));
        prop_assert!(!said.contains(char::is_control), "{said:?}");
        prop_assert!(said.chars().count() < 1000);
    }
}
