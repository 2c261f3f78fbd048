//! The store against a scripted server on loopback: what is sent, and what becomes of each answer.

use std::io;
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_credential_types::provider::{ProvideCredentials, future};
use bytes::Bytes;
use futures::StreamExt;

pub(crate) use scripted::Reply;
use scripted::{Act, Request, Scripted, response};

use super::credentials::Keyring;
use super::*;
use crate::cache::digest::Digest;
use crate::config::{RetryMode, StaticCredentials};
use crate::store::{ByteStream, Kind};

mod floods;
mod recordings;
mod secrets;
mod stores;
mod strangers;
mod upkeep;

#[path = "../../tests/scripted/mod.rs"]
mod scripted;

pub(super) fn config(endpoint: &str) -> S3Config {
    S3Config {
        region: "us-east-1".into(),
        bucket: "cache".into(),
        endpoint_url: Some(endpoint.parse().unwrap()),
        use_path_style: true,
        prefix: String::new(),
        blobs_prefix: "blobs/".into(),
        manifests_prefix: "manifests/".into(),
        names: vec!["buildkit".into()],
        credentials: Some(StaticCredentials {
            access_key_id: "AKIDTEST".into(),
            secret_access_key: "SECRETTEST".into(),
            session_token: None,
        }),
        retry_mode: RetryMode::Standard,
        retry_max_attempts: 3,
        disable_accept_encoding: false,
        ca_bundle: None,
    }
}

/// A scripted server, and its URL as the store is to be told.
pub(crate) struct Server {
    scripted: Scripted,
    url: String,
}

impl Server {
    pub(crate) async fn new(script: Vec<Reply>) -> Self {
        let scripted = Scripted::replies(script);
        let url = scripted.url();
        Server { scripted, url }
    }

    /// A server that answers each request with what `make` makes of it.
    fn making(make: impl Fn(&Request) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let scripted = Scripted::start(move |_, request| Reply::Answer(make(request)));
        let url = scripted.url();
        Server { scripted, url }
    }

    fn store(&self) -> S3Store {
        self.store_as(|_| {})
    }

    /// For the tests of what is built on a store.
    pub(crate) fn as_store(&self) -> Arc<dyn Store> {
        Arc::new(self.store())
    }

    fn store_as(&self, change: impl FnOnce(&mut S3Config)) -> S3Store {
        let mut config = config(&self.url);
        change(&mut config);
        store_of(&config, soon())
    }

    fn store_at(&self, timing: Timing) -> S3Store {
        store_of(&config(&self.url), timing)
    }

    /// Each request from its first line to the end of its body.
    pub(crate) fn requests(&self) -> Vec<String> {
        let requests = self.scripted.requests().into_iter();
        requests
            .map(|request| request.head + &request.body)
            .collect()
    }
}

/// Retries follow at once.
fn soon() -> Timing {
    Timing {
        backoff: Duration::from_millis(1),
        ..Timing::default()
    }
}

fn store_of(config: &S3Config, timing: Timing) -> S3Store {
    S3Store::new(config, Progress::silent(), timing).unwrap()
}

pub(crate) fn ok(headers: &str, body: &str) -> Reply {
    Reply::Answer(response("200 OK", headers, body))
}

pub(crate) fn status(status: &str) -> Reply {
    Reply::Answer(response(status, "", ""))
}

pub(crate) fn error(status: &str, code: &str) -> Reply {
    let body = format!("<Error><Code>{code}</Code><Message>said so</Message></Error>");
    Reply::Answer(response(status, "", &body))
}

pub(crate) const TAG: &str = "etag: \"abc\"\r\n";

/// A body in memory, in two chunks.
pub(crate) struct Blob {
    bytes: Bytes,
    fails: bool,
}

impl Blob {
    fn new(bytes: impl Into<Bytes>) -> Arc<Self> {
        Arc::new(Blob {
            bytes: bytes.into(),
            fails: false,
        })
    }
}

impl UploadBody for Blob {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }
    fn sha256(&self) -> Option<Digest> {
        Some(Digest::of(&self.bytes))
    }
    fn open(&self) -> ByteStream {
        let mut rest = self.bytes.clone();
        let first = rest.split_to(rest.len() / 2);
        let second = if self.fails {
            Err(io::Error::other("disk on fire"))
        } else {
            Ok(rest)
        };
        futures::stream::iter([Ok(first), second]).boxed()
    }
}

async fn read(response: Response) -> (Vec<u8>, Option<io::Error>) {
    let mut body = response.body;
    let mut bytes = Vec::new();
    while let Some(chunk) = body.next().await {
        match chunk {
            Ok(chunk) => bytes.extend_from_slice(&chunk),
            Err(e) => return (bytes, Some(e)),
        }
    }
    (bytes, None)
}

fn etag(number: u32) -> Part {
    Part {
        number,
        size: 1,
        etag: "\"abc\"".into(),
    }
}

fn info() -> ObjectInfo {
    ObjectInfo {
        size: 5,
        last_modified: None,
        etag: Some("\"abc\"".into()),
        storage_class: Some("STANDARD_IA".into()),
    }
}

#[tokio::test]
async fn head_tells_what_is_there_and_what_is_not() {
    let described = "etag: \"abc\"\r\nx-amz-storage-class: STANDARD_IA\r\n\
                     last-modified: Thu, 01 Jan 1970 00:00:07 GMT\r\n";
    let server = Server::new(vec![
        Reply::Answer(
            format!("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n{described}\r\n").into_bytes(),
        ),
        error("404 Not Found", "NoSuchKey"),
        status("404 Not Found"),
        status("403 Forbidden"),
        error("403 Forbidden", "AccessDenied"),
    ])
    .await;
    let store = server.store();
    assert_eq!(
        store.head("a").await.unwrap(),
        Some(ObjectInfo {
            last_modified: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(7)),
            ..info()
        })
    );
    assert!(store.get("a", None, None).await.unwrap().is_none());
    assert_eq!(store.head("a").await.unwrap(), None);
    let e = store.head("a").await.unwrap_err();
    assert_eq!((e.kind, e.status), (Kind::Denied, Some(403)));
    assert_eq!(
        e.message,
        format!(
            "{} answered 403 AccessDenied (said so), looking for s3://cache/a; s3:GetObject may be \
             missing, or the object itself: without s3:ListBucket a missing key answers 403 too",
            server.url
        )
    );
    assert_eq!(store.requests(), 5);
}

#[tokio::test]
async fn a_request_says_no_more_than_it_must() {
    let server = Server::new(vec![ok(TAG, "hello"), ok(TAG, "hello"), ok(TAG, "")]).await;
    let key = "blobs/sha256:a+b c";
    server
        .store()
        .get(key, Some(0..5), Some("\"abc\""))
        .await
        .unwrap();
    let quiet = server.store_as(|config| config.disable_accept_encoding = true);
    quiet.get(key, None, None).await.unwrap();
    let blob = Blob::new("hello");
    server.store().put(key, blob.clone()).await.unwrap();

    let requests = server.requests();
    let names = |request: &str| {
        let lines = request.lines().skip(1).take_while(|line| !line.is_empty());
        let mut names: Vec<_> = lines
            .map(|line| line.split(':').next().unwrap().to_owned())
            .collect();
        names.sort();
        names.join(" ")
    };
    assert!(requests[0].starts_with("GET /cache/blobs/sha256%3Aa%2Bb%20c HTTP/1.1\r\n"));
    assert_eq!(
        names(&requests[0]),
        "accept-encoding authorization host if-match range user-agent x-amz-content-sha256 x-amz-date"
    );
    assert!(requests[0].contains("\r\nrange: bytes=0-4\r\n"));
    assert!(requests[0].contains("SignedHeaders=host;x-amz-content-sha256;x-amz-date,"));
    assert_eq!(
        names(&requests[1]),
        "authorization host user-agent x-amz-content-sha256 x-amz-date"
    );
    assert_eq!(
        names(&requests[2]),
        "accept-encoding authorization content-length content-type host user-agent \
         x-amz-content-sha256 x-amz-date"
    );
    assert!(requests[2].contains("\r\ncontent-type: application/octet-stream\r\n"));
    assert!(requests[2].contains(&format!(
        "\r\nx-amz-content-sha256: {}\r\n",
        Digest::of(b"hello").hex()
    )));
    assert!(requests[2].ends_with("\r\n\r\nhello"));
}

#[tokio::test]
async fn a_bucket_that_is_a_host_name_goes_before_the_host() {
    let server = Server::new(vec![ok(TAG, "hello")]).await;
    let port = server.url.rsplit(':').next().unwrap().to_owned();
    let store = server.store_as(|config| {
        config.endpoint_url = Some(format!("http://localhost:{port}").parse().unwrap());
        config.use_path_style = false;
    });
    store.get("a", None, None).await.unwrap();
    let request = &server.requests()[0];
    assert!(request.starts_with("GET /a HTTP/1.1\r\n"));
    assert!(request.contains(&format!("\r\nhost: cache.localhost:{port}\r\n")));
}

#[tokio::test]
async fn what_passes_is_tried_again() {
    for trouble in [
        status("500 Internal Server Error"),
        status("503 Slow Down"),
        status("429 Too Many Requests"),
        error("400 Bad Request", "RequestTimeout"),
        error("200 OK", "InternalError"),
        Reply::Close,
        Reply::AnswerAndClose(b"HTTP/1.1 200 OK\r\ncontent-le".to_vec()),
        Reply::AnswerAndClose(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n".to_vec()),
        ok("", "<html>Sign in</html>"),
    ] {
        let server = Server::new(vec![trouble.clone(), trouble, ok(TAG, "")]).await;
        let store = server.store();
        store.put("a", Blob::new("hello")).await.unwrap();
        assert_eq!(store.requests(), 3);
        assert!(server.requests()[2].ends_with("hello"));
    }
}

#[tokio::test]
async fn the_last_try_s_failure_is_told_with_the_number_of_tries() {
    let server = Server::new(vec![error("503 Slow Down", "SlowDown"); 3]).await;
    let e = server.store().head("a").await.unwrap_err();
    assert_eq!(e.kind, Kind::Unavailable);
    assert_eq!(
        e.message,
        format!(
            "{} answered 503 (3 tries), looking for s3://cache/a",
            server.url
        )
    );
    let nobody = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let refused = |attempts: u32| {
        server.store_as(|config| {
            config.endpoint_url = Some(format!("http://{nobody}").parse().unwrap());
            config.retry_max_attempts = attempts;
        })
    };
    let e = refused(1).head("a").await.unwrap_err();
    assert_eq!(e.kind, Kind::Unavailable);
    assert_eq!(
        e.message,
        format!("connection to {nobody} refused, looking for s3://cache/a")
    );
    let store = refused(2);
    let e = store.head("a").await.unwrap_err();
    let tries = store.requests();
    assert!(tries >= 2, "{tries} tries");
    assert!(
        e.message.contains(&format!("refused ({tries} tries), ")),
        "{e}"
    );
}

#[tokio::test]
async fn what_is_wrong_is_not_tried_again() {
    for (reply, kind) in [
        (error("400 Bad Request", "InvalidArgument"), Kind::Other),
        (error("403 Forbidden", "AccessDenied"), Kind::Denied),
        (error("404 Not Found", "NoSuchBucket"), Kind::NoBucket),
        (
            error("501 Not Implemented", "NotImplemented"),
            Kind::Unsupported,
        ),
        (error("400 Bad Request", "ExpiredToken"), Kind::Denied),
        (status("301 Moved Permanently"), Kind::Other),
    ] {
        let server = Server::new(vec![reply]).await;
        let e = server.store().get("a", None, None).await.err().unwrap();
        assert_eq!(e.kind, kind, "{e}");
        assert_eq!(server.requests().len(), 1);
    }
}

#[tokio::test]
async fn an_early_answer_counts_more_than_the_broken_pipe() {
    for _ in 0..20 {
        let body = "<Error><Code>AccessDenied</Code></Error>";
        let server = Server::new(vec![Reply::AnswerEarly(response(
            "403 Forbidden",
            "",
            body,
        ))])
        .await;
        let blob = Blob::new(vec![7; 8 << 20]);
        let e = server.store().put("a", blob).await.unwrap_err();
        assert_eq!(e.kind, Kind::Denied, "{e}");
        assert_eq!(e.code.as_deref(), Some("AccessDenied"));
    }
}

#[tokio::test]
async fn a_body_that_cannot_be_read_is_no_fault_of_the_store() {
    let server = Server::new(vec![ok(TAG, "")]).await;
    let blob = Arc::new(Blob {
        bytes: "hello".into(),
        fails: true,
    });
    let store = server.store();
    let e = store.put("a", blob).await.unwrap_err();
    assert_eq!(e.kind, Kind::LocalBody);
    assert_eq!(e.message, "disk on fire");
    assert_eq!(store.requests(), 1);
}

#[tokio::test]
async fn get_streams_the_object_and_says_how_much_there_is() {
    let part = Reply::Answer(response(
        "206 Partial Content",
        "content-range: bytes 1-3/5\r\netag: \"abc\"\r\n",
        "ell",
    ));
    let server = Server::new(vec![
        ok(TAG, "hello"),
        part,
        error("404 Not Found", "NoSuchKey"),
    ])
    .await;
    let store = server.store();
    let whole = store.get("a", None, None).await.unwrap().unwrap();
    assert_eq!(whole.size, Some(5));
    assert_eq!(read(whole).await.0, b"hello");
    let part = store.get("a", Some(1..4), None).await.unwrap().unwrap();
    assert_eq!(part.size, Some(5));
    assert_eq!(read(part).await.0, b"ell");
    assert!(store.get("a", None, None).await.unwrap().is_none());
}

#[tokio::test]
async fn a_range_must_be_answered_with_that_range() {
    let ranged = |range: &str, body: &str| {
        let headers = format!("content-range: bytes {range}\r\n{TAG}");
        Reply::Answer(response("206 Partial Content", &headers, body))
    };
    for (reply, kind) in [
        (ok(TAG, "hello"), Kind::NoRanges),
        (ranged("0-2/5", "hel"), Kind::Nonsense),
        (ranged("1-2/5", "el"), Kind::Nonsense),
        (ranged("1-3/*", "ell"), Kind::Nonsense),
        (ranged("1-3/5", "el"), Kind::Nonsense),
        (
            error("416 Range Not Satisfiable", "InvalidRange"),
            Kind::Other,
        ),
        (
            error("412 Precondition Failed", "PreconditionFailed"),
            Kind::Changed,
        ),
    ] {
        let tries = if kind == Kind::Nonsense { 3 } else { 1 };
        let server = Server::new(vec![reply; tries]).await;
        let e = server
            .store()
            .get("a", Some(1..4), Some("\"abc\""))
            .await
            .err();
        assert_eq!(e.map(|e| e.kind), Some(kind));
    }
    let server = Server::new(vec![ok(TAG, "hello"), ranged("3-4/5", "lo")]).await;
    let store = server.store();
    let covered = store.get("a", Some(0..9), None).await.unwrap().unwrap();
    assert_eq!(covered.size, Some(5));
    let clipped = store.get("a", Some(3..9), None).await.unwrap().unwrap();
    assert_eq!(clipped.size, Some(5));
}

#[tokio::test]
async fn a_download_that_breaks_off_ends_with_an_error() {
    let cut = b"HTTP/1.1 200 OK\r\netag: \"a\"\r\ncontent-length: 9\r\n\r\nhello".to_vec();
    let server = Server::new(vec![Reply::AnswerAndClose(cut)]).await;
    let object = server.store().get("a", None, None).await.unwrap().unwrap();
    assert_eq!(object.size, Some(9));
    let (bytes, e) = read(object).await;
    assert_eq!(bytes, b"hello");
    assert!(e.is_some());
}

#[tokio::test]
async fn hostile_headers_panic_nothing() {
    let odd = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\netag: \"caf\xe9\"\r\n\
        last-modified: yesterday\r\nx-amz-delete-marker: maybe\r\nx-amz-mp-parts-count: many\r\n\
        x-amz-missing-meta: x\r\nx-amz-tagging-count: -\r\nx-amz-meta-a: \xff\r\n\
        x-amz-server-side-encryption-bucket-key-enabled: 7\r\n\r\n";
    let server = Server::new(vec![
        Reply::Answer(odd.to_vec()),
        Reply::Answer([odd.as_slice(), b"hello"].concat()),
    ])
    .await;
    let store = server.store();
    let found = store.head("a").await.unwrap().unwrap();
    assert_eq!(
        (found.size, found.etag, found.last_modified),
        (5, None, None)
    );
    let object = store.get("a", None, None).await.unwrap().unwrap();
    assert_eq!(read(object).await.0, b"hello");
}

#[tokio::test]
async fn touch_copies_the_object_onto_itself() {
    let copied = "<CopyObjectResult><ETag>\"abc\"</ETag></CopyObjectResult>";
    let server = Server::new(vec![
        error("200 OK", "InternalError"),
        ok("", copied),
        error("404 Not Found", "NoSuchKey"),
        error("412 Precondition Failed", "PreconditionFailed"),
    ])
    .await;
    let store = server.store();
    assert!(store.touch("blobs/a:b+c", &info()).await.unwrap());
    assert!(!store.touch("a", &info()).await.unwrap());
    assert!(store.touch("a", &info()).await.unwrap());
    let request = server.requests()[1].clone();
    for line in [
        "x-amz-copy-source: cache/blobs/a%3Ab%2Bc",
        "x-amz-copy-source-if-match: \"abc\"",
        "x-amz-metadata-directive: REPLACE",
        "x-amz-storage-class: STANDARD_IA",
        "content-length: 0",
    ] {
        assert!(
            request.contains(&format!("\r\n{line}\r\n")),
            "{line}\n{request}"
        );
    }
    assert!(request.contains("\r\nx-amz-meta-updated-at: 20"));
    assert!(request.contains(
        "SignedHeaders=content-type;host;x-amz-content-sha256;x-amz-copy-source;\
         x-amz-copy-source-if-match;x-amz-date;x-amz-meta-updated-at;x-amz-metadata-directive;\
         x-amz-storage-class,"
    ));
}

#[tokio::test]
async fn a_multipart_upload_is_begun_filled_completed_and_aborted() {
    let server = Server::new(vec![
        ok("", "<InitiateMultipartUploadResult><UploadId>u/1</UploadId></InitiateMultipartUploadResult>"),
        ok(TAG, ""),
        ok("", "<CopyPartResult><ETag>\"def\"</ETag></CopyPartResult>"),
        error("200 OK", "InternalError"),
        ok("", "  \n<CompleteMultipartUploadResult><ETag>\"ghi\"</ETag></CompleteMultipartUploadResult>"),
        error("404 Not Found", "NoSuchUpload"),
        error("404 Not Found", "NoSuchUpload"),
        Reply::Answer(b"HTTP/1.1 204 No Content\r\n\r\n".to_vec()),
    ])
    .await;
    let store = server.store();
    assert_eq!(store.create_upload("a", None).await.unwrap(), "u/1");
    let part = store.upload_part("a", "u/1", 1, Blob::new("hello")).await;
    assert_eq!(part.unwrap(), "\"abc\"");
    let part = store
        .copy_part(None, "a", "u/1", 2, 5..10, Some("\"abc\""))
        .await;
    assert_eq!(part.unwrap(), "\"def\"");
    store
        .complete_upload("a", "u/1", &[etag(1), etag(2)])
        .await
        .unwrap();
    let gone = store.complete_upload("a", "u/1", &[etag(1)]).await;
    assert_eq!(gone.unwrap_err().kind, Kind::NoSuchUpload);
    store.abort_upload("a", "u/1").await.unwrap();
    store.abort_upload("a", "u/1").await.unwrap();

    let requests = server.requests();
    assert!(requests[0].starts_with("POST /cache/a?uploads= "));
    assert!(requests[1].starts_with("PUT /cache/a?partNumber=1&uploadId=u%2F1 "));
    assert!(requests[2].contains("\r\nx-amz-copy-source-range: bytes=5-9\r\n"));
    assert!(requests[3].contains("<PartNumber>2</PartNumber>"));
    assert_eq!(requests[3].lines().last(), requests[4].lines().last());
    assert!(requests[6].starts_with("DELETE /cache/a?uploadId=u%2F1 "));
}

#[tokio::test]
async fn a_success_that_lacks_what_it_should_bring_is_a_failure() {
    for body in [
        "",
        "<html></html>",
        "<InitiateMultipartUploadResult></InitiateMultipartUploadResult>",
        "<InitiateMultipartUploadResult><UploadId></UploadId></InitiateMultipartUploadResult>",
        "<InitiateMultipartUploadResult>",
    ] {
        let server = Server::new(vec![ok("", body); 3]).await;
        let e = server.store().create_upload("a", None).await.unwrap_err();
        assert_eq!(e.kind, Kind::Nonsense, "{body}");
        assert!(
            e.message
                .starts_with("unexpected response from http://127.0.0.1:"),
            "{e}"
        );
    }
}

#[tokio::test]
async fn a_page_lists_what_has_the_prefix() {
    let page = "<ListBucketResult><IsTruncated>true</IsTruncated><EncodingType>url</EncodingType>\
        <NextContinuationToken>t/1</NextContinuationToken>\
        <Contents><Key>p/a%2Bb+c%C3%A9</Key><Size>5</Size><ETag>&quot;abc&quot;</ETag>\
        <LastModified>1970-01-01T00:00:07.000Z</LastModified><StorageClass>STANDARD_IA</StorageClass></Contents>\
        <Contents><Key>other</Key><Size>5</Size></Contents>\
        <Contents><Key>p/x</Key><Size>6</Size><LastModified>soon</LastModified></Contents>\
        </ListBucketResult>";
    let endless = page.replace("t/1", "t/2");
    let lost = "<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>";
    let server = Server::new(vec![
        ok("", page),
        ok("", &endless),
        ok("", lost),
        error("501 Not Implemented", "NotImplemented"),
    ])
    .await;
    let store = server.store();
    let found = store.list("p/", None).await.unwrap();
    let keys: Vec<_> = found.objects.iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(keys, ["p/a+b cé", "p/x"]);
    assert_eq!(
        found.objects[0].1,
        ObjectInfo {
            last_modified: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(7)),
            ..info()
        }
    );
    assert_eq!(found.objects[1].1.last_modified, None);
    assert_eq!(found.next.as_deref(), Some("t/1"));
    let e = store.list("p/", Some("t/2")).await.unwrap_err();
    assert_eq!(e.kind, Kind::Nonsense);
    assert_eq!(
        store.list("p/", None).await.unwrap_err().kind,
        Kind::Nonsense
    );
    assert_eq!(
        store.list("", None).await.unwrap_err().kind,
        Kind::Unsupported
    );
    assert!(
        server.requests()[0]
            .starts_with("GET /cache?encoding-type=url&list-type=2&max-keys=1000&prefix=p%2F ")
    );
}

#[tokio::test]
async fn uploads_to_all_keys_with_the_prefix_are_listed_over_all_pages() {
    let page = "<ListMultipartUploadsResult><IsTruncated>true</IsTruncated>\
        <NextKeyMarker>a</NextKeyMarker><NextUploadIdMarker>2</NextUploadIdMarker>\
        <Upload><Key>a</Key><UploadId>1</UploadId><Initiated>1970-01-01T00:00:07Z</Initiated></Upload>\
        <Upload><Key>a</Key><UploadId>2</UploadId></Upload></ListMultipartUploadsResult>";
    let last = "<ListMultipartUploadsResult><IsTruncated>false</IsTruncated>\
        <Upload><Key>ab</Key><UploadId>3</UploadId></Upload>\
        <Upload><Key>b</Key><UploadId>4</UploadId></Upload></ListMultipartUploadsResult>";
    let server = Server::new(vec![ok("", page), ok("", last)]).await;
    let uploads = server.store().list_uploads("a").await.unwrap();
    let found: Vec<_> = uploads
        .iter()
        .map(|upload| (upload.key.as_str(), upload.id.as_str()))
        .collect();
    assert_eq!(found, [("a", "1"), ("a", "2"), ("ab", "3")]);
    assert_eq!(
        uploads[0].initiated,
        Some(SystemTime::UNIX_EPOCH + Duration::from_secs(7))
    );
    assert!(server.requests()[1].contains("key-marker=a&prefix=a&upload-id-marker=2&uploads="));
}

#[tokio::test]
async fn parts_are_listed_over_all_pages() {
    let page = |more: bool, number: u32| {
        format!(
            "<ListPartsResult><IsTruncated>{more}</IsTruncated>\
             <NextPartNumberMarker>{number}</NextPartNumberMarker><Part><PartNumber>{number}\
             </PartNumber><Size>1</Size><ETag>\"abc\"</ETag></Part></ListPartsResult>"
        )
    };
    let server = Server::new(vec![
        ok("", &page(true, 1)),
        ok("", &page(false, 2)),
        status("404 Not Found"),
    ])
    .await;
    let store = server.store();
    assert_eq!(
        store.list_parts("a", "u").await.unwrap(),
        [etag(1), etag(2)]
    );
    let e = store.list_parts("a", "u").await.unwrap_err();
    assert_eq!(e.kind, Kind::NoSuchUpload);
}

#[tokio::test]
async fn a_store_that_says_nothing_is_given_up_after_half_a_minute() {
    let server = Server::new(vec![Reply::Play(vec![Act::Hang])]).await;
    let store = server.store_as(|config| config.retry_max_attempts = 1);
    let head = tokio::spawn(async move { store.head("a").await });
    while server.requests().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    tokio::time::pause();
    let e = head.await.unwrap().unwrap_err();
    assert_eq!(e.kind, Kind::Unavailable);
    assert!(e.message.contains(" after 30 s, "), "{e}");
}

#[tokio::test]
async fn a_peer_that_says_nothing_when_it_is_greeted_over_tls_is_given_up() {
    // To the scripted server the greeting is the beginning of a request that never ends.
    let mut server = Server::new(vec![]).await;
    server.url = server.url.replace("http://", "https://");
    let store = server.store_at(Timing {
        ready: Duration::from_millis(200),
        ..soon()
    });
    let head = tokio::time::timeout(Duration::from_secs(20), store.head("a"));
    let e = head.await.expect("it gives up").unwrap_err();
    assert_eq!(server.scripted.connections(), 3);
    assert_eq!(e.kind, Kind::Unavailable);
    let host = server.url.trim_start_matches("https://");
    assert_eq!(
        e.message,
        format!(
            "cannot connect to {host} (no connection that is ready within 200ms) (3 tries), looking \
             for s3://cache/a"
        )
    );
}

/// Gives other credentials each time.
#[derive(Debug, Default)]
struct Chain(std::sync::atomic::AtomicU32);

impl ProvideCredentials for Chain {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        let key = format!("KEY{}", self.0.fetch_add(1, Ordering::SeqCst));
        future::ProvideCredentials::ready(Ok(Credentials::new(key, "s", None, None, "test")))
    }
}

#[tokio::test]
async fn an_expired_token_is_renewed_once_and_the_request_sent_again() {
    let expired = error("400 Bad Request", "ExpiredToken");
    let server = Server::new(vec![
        expired.clone(),
        ok(TAG, "hello"),
        expired.clone(),
        expired,
    ])
    .await;
    // The renewal takes no attempt.
    let mut store = server.store_as(|config| config.retry_max_attempts = 1);
    Arc::get_mut(&mut store.remote).unwrap().keyring = Keyring::with_chain(Chain::default());
    store.get("a", None, None).await.unwrap();
    let requests = server.requests();
    assert!(requests[0].contains("Credential=KEY0/"));
    assert!(requests[1].contains("Credential=KEY1/"));
    let e = store.get("a", None, None).await.err().unwrap();
    assert_eq!(e.kind, Kind::Denied);
    assert_eq!(store.requests(), 4);
}

/// A server that sends an object's first bytes, and then one more every `pause`.
async fn dripping(pause: Duration) -> Server {
    let head = b"HTTP/1.1 200 OK\r\netag: \"a\"\r\ncontent-length: 1000\r\n\r\nhello";
    let acts = vec![Act::Send(head.to_vec()), Act::Repeat(b"!".to_vec(), pause)];
    Server::new(vec![Reply::Play(acts)]).await
}

#[tokio::test]
async fn a_download_that_stops_or_drips_is_given_up() {
    for (pause, why) in [(3600, "no byte came for 30 s"), (10, "only ")] {
        let server = dripping(Duration::from_secs(pause)).await;
        let object = server.store().get("a", None, None).await.unwrap().unwrap();
        // Not before the connection is there: a paused clock runs ahead of the network.
        tokio::time::pause();
        let (bytes, e) = read(object).await;
        tokio::time::resume();
        assert!(bytes.starts_with(b"hello"));
        let e = e.unwrap();
        assert_eq!(e.kind(), io::ErrorKind::TimedOut);
        assert!(e.to_string().starts_with(why), "{e}");
    }
}
