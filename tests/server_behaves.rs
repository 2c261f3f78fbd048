//! The test server itself. It must be as strict as S3, or tests that pass against it mean nothing.
//!
//! The client is as bare as possible, aws-sigv4's signature and one connection per request, so that no
//! part of the program under test comes between.

mod server;

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime};

use aws_credential_types::Credentials;
use aws_sigv4::http_request::{
    PayloadChecksumKind, PercentEncodingMode, SignableBody, SignableRequest, SigningSettings,
    UriPathNormalizationMode, sign,
};
use aws_sigv4::sign::v4;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use md5::{Digest as _, Md5};
use rustls_pki_types::pem::PemObject as _;
use server::{ACCESS_KEY, Fault, SECRET_KEY, Server};
use sha2::Sha256;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const EMPTY: &[u8] = b"";

struct Got {
    status: StatusCode,
    headers: HeaderMap,
    /// What came of the body, and whether it came to its end.
    body: Result<String, String>,
}

impl Got {
    fn text(&self) -> &str {
        self.body.as_deref().expect("the body came whole")
    }

    fn header(&self, name: &str) -> &str {
        self.headers[name].to_str().expect("an ASCII header")
    }

    /// The text of the first element of this name, with the entities of quotes resolved.
    fn element(&self, name: &str) -> String {
        let text = self.text();
        let rest = text
            .split_once(&format!("<{name}>"))
            .map_or("", |(_, rest)| rest);
        rest.split_once(&format!("</{name}>"))
            .map_or("", |(inner, _)| inner)
            .replace("&quot;", "\"")
    }

    fn elements(&self, name: &str) -> Vec<&str> {
        let open = format!("<{name}>");
        self.text()
            .split(&open)
            .skip(1)
            .filter_map(|rest| rest.split('<').next())
            .collect()
    }

    fn status_and_code(&self) -> (u16, String) {
        (self.status.as_u16(), self.element("Code"))
    }
}

struct Client<'a> {
    server: &'a Server,
    host: String,
    access: &'static str,
    secret: &'static str,
    token: Option<&'static str>,
    claimed_hash: Option<String>,
}

impl<'a> Client<'a> {
    fn new(server: &'a Server) -> Self {
        let host = server.url().replace("http://", "");
        Self {
            server,
            host,
            access: ACCESS_KEY,
            secret: SECRET_KEY,
            token: None,
            claimed_hash: None,
        }
    }

    /// Sends one signed request; an error is a connection that ended before an answer.
    async fn send(
        &self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: impl AsRef<[u8]>,
    ) -> Result<Got, String> {
        let body = Bytes::copy_from_slice(body.as_ref());
        let hash = self
            .claimed_hash
            .clone()
            .unwrap_or_else(|| hex::encode(Sha256::digest(&body)));

        let mut settings = SigningSettings::default();
        settings.percent_encoding_mode = PercentEncodingMode::Single;
        settings.uri_path_normalization_mode = UriPathNormalizationMode::Disabled;
        settings.payload_checksum_kind = PayloadChecksumKind::XAmzSha256;
        let identity = Credentials::new(
            self.access,
            self.secret,
            self.token.map(str::to_owned),
            None,
            "test",
        )
        .into();
        let params = v4::SigningParams::builder()
            .identity(&identity)
            .region("us-east-1")
            .name("s3")
            .time(SystemTime::now())
            .settings(settings)
            .build()
            .expect("all parameters are set")
            .into();
        let uri = format!("http://{}{target}", self.host);
        let signable = SignableRequest::new(
            method,
            &uri,
            headers.iter().copied(),
            SignableBody::Precomputed(hash),
        )
        .expect("signable");
        let (instructions, _) = sign(signable, &params).expect("signed").into_parts();

        let mut request = Request::builder()
            .method(method)
            .uri(target)
            .header("host", &self.host);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut request = request.body(Full::new(body)).expect("a request");
        instructions.apply_to_request_http1x(&mut request);

        let stream = TcpStream::connect(self.server.addr())
            .await
            .expect("the server listens");
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .expect("a connection");
        let connection = tokio::spawn(connection);
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| format!("{error:?}"))?;
        let (parts, body) = response.into_parts();
        let body = body.collect().await.map_err(|error| format!("{error:?}"));
        connection.abort();
        Ok(Got {
            status: parts.status,
            headers: parts.headers,
            body: body.map(|body| String::from_utf8_lossy(&body.to_bytes()).into_owned()),
        })
    }

    async fn ask(
        &self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: impl AsRef<[u8]>,
    ) -> Got {
        self.send(method, target, headers, body)
            .await
            .expect("an answer")
    }

    async fn get(&self, target: &str) -> Got {
        self.ask("GET", target, &[], EMPTY).await
    }

    async fn begin(&self, key: &str) -> String {
        self.ask("POST", &format!("/cache/{key}?uploads"), &[], EMPTY)
            .await
            .element("UploadId")
            .replace('=', "%3D")
    }

    async fn part(&self, key: &str, id: &str, number: u32, body: &[u8]) -> String {
        let got = self
            .ask(
                "PUT",
                &format!("/cache/{key}?partNumber={number}&uploadId={id}"),
                &[],
                body,
            )
            .await;
        assert_eq!(got.status, 200);
        got.header("etag").to_owned()
    }

    async fn complete(&self, key: &str, id: &str, parts: &[(u32, &str)]) -> Got {
        let parts: String = parts
            .iter()
            .map(|(n, etag)| {
                format!("<Part><PartNumber>{n}</PartNumber><ETag>{etag}</ETag></Part>")
            })
            .collect();
        let body = format!("<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>");
        self.ask("POST", &format!("/cache/{key}?uploadId={id}"), &[], body)
            .await
    }
}

fn base64_md5(body: &[u8]) -> String {
    STANDARD.encode(Md5::digest(body))
}

fn quoted_md5(body: &[u8]) -> String {
    format!("\"{}\"", hex::encode(Md5::digest(body)))
}

#[tokio::test]
async fn an_object_keeps_its_body_metadata_and_storage_class() {
    let server = Server::start();
    let client = Client::new(&server);
    let headers = [
        ("x-amz-meta-updated-at", "now"),
        ("x-amz-storage-class", "STANDARD_IA"),
        ("content-type", "a/b"),
    ];

    let put = client
        .ask(
            "PUT",
            "/cache/blobs/sha256%3Aab%20%2B%C3%A9",
            &headers,
            "hello",
        )
        .await;
    let head = client
        .ask("HEAD", "/cache/blobs/sha256%3Aab%20%2B%C3%A9", &[], EMPTY)
        .await;

    assert_eq!(
        (put.status, put.header("etag")),
        (StatusCode::OK, quoted_md5(b"hello").as_str())
    );
    assert_eq!(head.status, 200);
    assert_eq!(head.header("content-length"), "5");
    assert_eq!(head.header("etag"), quoted_md5(b"hello"));
    assert_eq!(head.header("x-amz-meta-updated-at"), "now");
    assert_eq!(head.header("x-amz-storage-class"), "STANDARD_IA");
    assert_eq!(head.header("content-type"), "a/b");
    assert_eq!(
        client
            .get("/cache/blobs/sha256%3Aab%20%2B%C3%A9")
            .await
            .text(),
        "hello"
    );
    assert_eq!(
        server.objects().into_iter().collect::<Vec<_>>(),
        [("blobs/sha256:ab +é".to_owned(), "hello".into())]
    );

    let deleted = client
        .ask("DELETE", "/cache/blobs/sha256%3Aab%20%2B%C3%A9", &[], EMPTY)
        .await;
    assert_eq!(deleted.status, 204);
    assert_eq!(
        client
            .get("/cache/blobs/sha256%3Aab%20%2B%C3%A9")
            .await
            .status_and_code(),
        (404, "NoSuchKey".into())
    );
    assert_eq!(
        client.get("/nowhere/key").await.status_and_code(),
        (404, "NoSuchBucket".into())
    );
}

#[tokio::test]
async fn signatures_and_payload_hashes_are_verified() {
    let server = Server::start();
    let put = async |client: Client<'_>| {
        client
            .ask("PUT", "/cache/key", &[], "hello")
            .await
            .status_and_code()
    };
    let client = || Client::new(&server);

    let hash = Some(hex::encode(Sha256::digest(b"other")));
    assert_eq!(
        put(Client {
            claimed_hash: hash,
            ..client()
        })
        .await,
        (400, "XAmzContentSHA256Mismatch".into())
    );
    assert_eq!(
        put(Client {
            secret: "wrong",
            ..client()
        })
        .await,
        (403, "SignatureDoesNotMatch".into())
    );
    assert_eq!(
        put(Client {
            access: "AKIANOBODY",
            ..client()
        })
        .await,
        (403, "InvalidAccessKeyId".into())
    );
    let reader = Client {
        access: server::READER_ACCESS_KEY,
        secret: server::READER_SECRET_KEY,
        ..client()
    };
    assert_eq!(put(reader).await, (403, "AccessDenied".into()));
    let guest = || Client {
        access: server::SESSION_ACCESS_KEY,
        secret: server::SESSION_SECRET_KEY,
        ..client()
    };
    assert_eq!(put(guest()).await, (400, "InvalidToken".into()));
    assert!(server.objects().is_empty());

    assert_eq!(
        put(Client {
            token: Some(server::SESSION_TOKEN),
            ..guest()
        })
        .await,
        (200, String::new())
    );
    let unsigned = Some("UNSIGNED-PAYLOAD".to_owned());
    assert_eq!(
        put(Client {
            claimed_hash: unsigned,
            ..client()
        })
        .await,
        (200, String::new())
    );

    let bad_md5 = client()
        .ask(
            "PUT",
            "/cache/key",
            &[("content-md5", "AAAAAAAAAAAAAAAAAAAAAA==")],
            "hello",
        )
        .await;
    assert_eq!(bad_md5.status_and_code(), (400, "BadDigest".into()));

    let late = Server::builder()
        .clock_ahead(Duration::from_secs(3600))
        .start();
    assert_eq!(
        Client::new(&late).get("/cache/key").await.status_and_code(),
        (403, "RequestTimeTooSkewed".into())
    );
    let abroad = Server::builder().region("eu-west-1").start();
    let got = Client::new(&abroad).get("/cache/key").await;
    assert_eq!(
        got.status_and_code(),
        (400, "AuthorizationHeaderMalformed".into())
    );
    assert_eq!(got.header("x-amz-bucket-region"), "eu-west-1");
}

#[tokio::test]
async fn a_bucket_is_named_by_the_path_or_by_the_host() {
    let server = Server::start();
    server.put("key", "hello");
    let port = server.addr().port();

    let virtual_hosted = Client {
        host: format!("cache.localhost:{port}"),
        ..Client::new(&server)
    };
    let path_style = Client {
        host: format!("localhost:{port}"),
        ..Client::new(&server)
    };

    assert_eq!(virtual_hosted.get("/key").await.text(), "hello");
    assert_eq!(path_style.get("/cache/key").await.text(), "hello");
    let logged: Vec<_> = server
        .log()
        .into_iter()
        .map(|l| (l.operation, l.bucket, l.key, l.status))
        .collect();
    assert_eq!(
        logged,
        [
            ("GetObject", "cache".into(), "key".into(), 200),
            ("GetObject", "cache".into(), "key".into(), 200)
        ]
    );
}

#[tokio::test]
async fn ranges_and_conditions_are_honoured() {
    let server = Server::start();
    server.put("key", "0123456789");
    let client = Client::new(&server);
    let range = async |range: &str| {
        client
            .ask("GET", "/cache/key", &[("range", range)], EMPTY)
            .await
    };

    let got = range("bytes=2-4").await;
    assert_eq!(
        (got.status.as_u16(), got.text(), got.header("content-range")),
        (206, "234", "bytes 2-4/10")
    );
    assert_eq!(range("bytes=8-99").await.text(), "89");
    assert_eq!(
        range("bytes=10-12").await.status_and_code(),
        (416, "InvalidRange".into())
    );
    let other = client
        .ask("GET", "/cache/key", &[("if-match", "\"00\"")], EMPTY)
        .await;
    assert_eq!(other.status_and_code(), (412, "PreconditionFailed".into()));
    let same = client
        .ask(
            "GET",
            "/cache/key",
            &[("if-match", &quoted_md5(b"0123456789"))],
            EMPTY,
        )
        .await;
    assert_eq!(same.text(), "0123456789");
    let again = client
        .ask("PUT", "/cache/key", &[("if-none-match", "*")], "new")
        .await;
    assert_eq!(again.status_and_code(), (412, "PreconditionFailed".into()));

    let whole = Server::builder().ignore_range().start();
    whole.put("key", "0123456789");
    let got = Client::new(&whole)
        .ask("GET", "/cache/key", &[("range", "bytes=2-4")], EMPTY)
        .await;
    assert_eq!((got.status.as_u16(), got.text()), (200, "0123456789"));
}

#[tokio::test]
async fn a_multipart_upload_is_complete_only_with_its_parts_etags_in_order() {
    let server = Server::builder().min_part(4).start();
    let client = Client::new(&server);
    let id = client.begin("key").await;
    let one = client.part("key", &id, 1, b"aaaa").await;
    let two = client.part("key", &id, 2, b"bb").await;
    let three = client.part("key", &id, 3, b"c").await;
    let attempt =
        async |parts: &[(u32, &str)]| client.complete("key", &id, parts).await.status_and_code();

    assert_eq!(
        attempt(&[(1, &one), (2, &one)]).await,
        (400, "InvalidPart".into())
    );
    assert_eq!(
        attempt(&[(1, &one), (4, &two)]).await,
        (400, "InvalidPart".into())
    );
    assert_eq!(
        attempt(&[(2, &two), (1, &one)]).await,
        (400, "InvalidPartOrder".into())
    );
    assert_eq!(
        attempt(&[(1, &one), (2, &two), (3, &three)]).await,
        (400, "EntityTooSmall".into())
    );
    assert_eq!((server.uploads(), server.objects().len()), (1, 0));

    let done = client.complete("key", &id, &[(1, &one), (2, &two)]).await;
    let md5s = [Md5::digest(b"aaaa"), Md5::digest(b"bb")].concat();
    assert_eq!(
        (done.status.as_u16(), done.element("ETag")),
        (200, format!("\"{}-2\"", hex::encode(Md5::digest(md5s))))
    );
    assert_eq!(server.objects()["key"], "aaaabb");
    assert_eq!(server.uploads(), 0);

    assert_eq!(attempt(&[(1, &one)]).await, (404, "NoSuchUpload".into()));
    let target = format!("/cache/key?partNumber=1&uploadId={id}");
    assert_eq!(
        client.ask("PUT", &target, &[], "x").await.status_and_code(),
        (404, "NoSuchUpload".into())
    );
    let target = format!("/cache/key?uploadId={id}");
    assert_eq!(
        client
            .ask("DELETE", &target, &[], EMPTY)
            .await
            .status_and_code(),
        (404, "NoSuchUpload".into())
    );
}

#[tokio::test]
async fn uploads_and_parts_are_listed_page_by_page() {
    let server = Server::builder().page_size(2).start();
    let client = Client::new(&server);
    let first = client.begin("b").await;
    for key in ["b", "a", "c"] {
        client.begin(key).await;
    }
    for number in 1..=3 {
        client.part("b", &first, number, b"x").await;
    }

    let page = client.get("/cache/?uploads").await;
    assert_eq!(
        (page.elements("Key"), page.element("IsTruncated")),
        (vec!["a", "b"], "true".into())
    );
    let (key, id) = (
        page.element("NextKeyMarker"),
        page.element("NextUploadIdMarker").replace('=', "%3D"),
    );
    let page = client
        .get(&format!(
            "/cache/?key-marker={key}&upload-id-marker={id}&uploads"
        ))
        .await;
    assert_eq!(
        (page.elements("Key"), page.element("IsTruncated")),
        (vec!["b", "c"], "false".into())
    );

    let page = client.get(&format!("/cache/b?uploadId={first}")).await;
    assert_eq!(
        (
            page.elements("PartNumber"),
            page.element("NextPartNumberMarker")
        ),
        (vec!["1", "2"], "2".into())
    );
    let page = client
        .get(&format!("/cache/b?part-number-marker=2&uploadId={first}"))
        .await;
    assert_eq!(
        (page.elements("PartNumber"), page.element("IsTruncated")),
        (vec!["3"], "false".into())
    );

    let aborted = client
        .ask("DELETE", &format!("/cache/b?uploadId={first}"), &[], EMPTY)
        .await;
    assert_eq!((aborted.status.as_u16(), server.uploads()), (204, 3));
}

#[tokio::test]
async fn a_copy_onto_itself_must_change_something() {
    let server = Server::builder().copy_limit(10).start();
    server.put("a:b", "0123456789");
    server.change("a:b", |object| {
        object.storage_class = Some("STANDARD_IA".into())
    });
    server.put("big", "0123456789+");
    server.age("a:b", Duration::from_secs(3600));
    let client = Client::new(&server);
    let before = server.last_modified("a:b");
    let copy = async |source: &str, headers: &[(&str, &str)]| {
        let headers = [&[("x-amz-copy-source", source)], headers].concat();
        client
            .ask("PUT", "/cache/a%3Ab", &headers, EMPTY)
            .await
            .status_and_code()
    };
    let replace = ("x-amz-metadata-directive", "REPLACE");
    let invalid = (400, "InvalidRequest".to_owned());

    assert_eq!(copy("cache/a%3Ab", &[]).await, invalid);
    assert_eq!(copy("cache/big", &[]).await, invalid);
    let stale = ("x-amz-copy-source-if-match", "\"00\"");
    assert_eq!(
        copy("cache/a%3Ab", &[replace, stale]).await,
        (412, "PreconditionFailed".into())
    );
    assert_eq!(server.last_modified("a:b"), before);

    assert_eq!(
        copy("cache/a%3Ab", &[replace, ("x-amz-meta-updated-at", "now")]).await,
        (200, String::new())
    );
    let object = server.object("a:b").expect("it is still there");
    assert_eq!(object.body, "0123456789");
    assert_eq!(object.metadata["updated-at"], "now");
    assert_eq!(
        object.storage_class, None,
        "a copy that names no storage class gets the usual one"
    );
    assert!(Some(object.modified) > before);
}

#[tokio::test]
async fn parts_are_copied_by_ranges_inside_the_source() {
    let server = Server::builder().copy_limit(6).min_part(1).start();
    server.put("key", "0123456789");
    let client = Client::new(&server);
    let id = client.begin("key").await;
    let copy = async |number: u32, range: &str| {
        let target = format!("/cache/key?partNumber={number}&uploadId={id}");
        let headers = [
            ("x-amz-copy-source", "cache/key"),
            ("x-amz-copy-source-range", range),
        ];
        client.ask("PUT", &target, &headers, EMPTY).await
    };

    assert_eq!(
        copy(1, "bytes=5-10").await.status_and_code(),
        (416, "InvalidRange".into())
    );
    assert_eq!(
        copy(1, "bytes=0-6").await.status_and_code(),
        (400, "InvalidRequest".into())
    );
    let one = copy(1, "bytes=0-5").await.element("ETag");
    let two = copy(2, "bytes=6-9").await.element("ETag");
    assert_eq!(one, quoted_md5(b"012345"));
    assert_eq!(
        client
            .complete("key", &id, &[(1, &one), (2, &two)])
            .await
            .status,
        200
    );
    assert_eq!(server.objects()["key"], "0123456789");
}

#[tokio::test]
async fn objects_are_listed_page_by_page_in_order() {
    let server = Server::builder().page_size(2).start();
    for key in ["p/a b", "p/b+&", "p/c", "q", "a"] {
        server.put(key, key.to_owned());
    }
    let client = Client::new(&server);

    let page = client
        .get("/cache/?encoding-type=url&list-type=2&prefix=p%2F")
        .await;
    assert_eq!(page.elements("Key"), ["p/a%20b", "p/b%2B%26"]);
    assert_eq!(
        (page.elements("Size"), page.element("IsTruncated")),
        (vec!["5", "5"], "true".into())
    );
    let token = page
        .element("NextContinuationToken")
        .replace('+', "%2B")
        .replace('/', "%2F")
        .replace('=', "%3D");
    let page = client
        .get(&format!(
            "/cache/?continuation-token={token}&list-type=2&prefix=p%2F"
        ))
        .await;
    assert_eq!(
        (page.elements("Key"), page.element("IsTruncated")),
        (vec!["p/c"], "false".into())
    );
    assert_eq!(
        client
            .get("/cache/?list-type=2&start-after=p%2Fc")
            .await
            .elements("Key"),
        ["q"]
    );
    assert_eq!(
        client
            .get("/cache/?list-type=2&max-keys=1")
            .await
            .elements("Key"),
        ["a"]
    );
    let page = client.get("/cache/?delimiter=%2F&list-type=2").await;
    assert_eq!(
        (page.elements("Key"), page.element("CommonPrefixes")),
        (vec!["a"], "<Prefix>p/</Prefix>".into())
    );
    assert_eq!(
        client
            .get("/cache/?marker=p%2Fb%2B%26")
            .await
            .elements("Key"),
        ["p/c", "q"]
    );

    let closed = Server::builder()
        .no_list()
        .no_uploads_listing()
        .hide_missing()
        .start();
    let client = Client::new(&closed);
    assert_eq!(
        client.get("/cache/?list-type=2").await.status_and_code(),
        (403, "AccessDenied".into())
    );
    assert_eq!(
        client.get("/cache/?uploads").await.status_and_code(),
        (501, "NotImplemented".into())
    );
    assert_eq!(
        client.get("/cache/key").await.status_and_code(),
        (403, "AccessDenied".into())
    );
}

#[tokio::test]
async fn objects_are_deleted_together_and_each_refusal_is_named() {
    let server = Server::builder().undeletable("kept/").start();
    for key in ["a", "b", "kept/c"] {
        server.put(key, key.to_owned());
    }
    let client = Client::new(&server);
    let body = format!(
        "<Delete><Object><Key>a</Key></Object><Object><Key>none</Key></Object><Object><Key>b</Key>\
         <ETag>{}</ETag></Object><Object><Key>kept/c</Key></Object></Delete>",
        quoted_md5(b"other")
    );
    let delete =
        async |headers: &[(&str, &str)]| client.ask("POST", "/cache/?delete", headers, &body).await;

    assert_eq!(
        delete(&[]).await.status_and_code(),
        (400, "InvalidRequest".into())
    );
    assert_eq!(
        delete(&[("content-md5", &base64_md5(b"other"))])
            .await
            .status_and_code(),
        (400, "BadDigest".into())
    );
    assert_eq!(server.keys(), ["a", "b", "kept/c"]);
    let deleted = delete(&[("content-md5", &base64_md5(body.as_bytes()))]).await;
    assert_eq!(deleted.status, 200);
    assert_eq!(deleted.elements("Key"), ["a", "none", "b", "kept/c"]);
    assert_eq!(
        deleted.elements("Code"),
        ["PreconditionFailed", "AccessDenied"]
    );
    assert_eq!(server.keys(), ["b", "kept/c"]);
    let alone = client.ask("DELETE", "/cache/kept/c", &[], EMPTY).await;
    assert_eq!(alone.status_and_code(), (403, "AccessDenied".into()));
}

#[tokio::test]
async fn a_bucket_keeps_the_lifecycle_rules_it_is_given() {
    let server = Server::start();
    let client = Client::new(&server);
    let get = async || client.get("/cache/?lifecycle").await;
    let rule = |id: &str| {
        format!(
            "<Rule><ID>{id}</ID><Filter><Prefix>blobs/</Prefix></Filter><Status>Enabled</Status>\
             <Expiration><Days>7</Days></Expiration></Rule>"
        )
    };
    let put = async |rules: &str, checked: bool| {
        let body = format!("<LifecycleConfiguration>{rules}</LifecycleConfiguration>");
        let md5 = base64_md5(body.as_bytes());
        let headers = [("content-md5", md5.as_str())];
        let headers = if checked { &headers[..] } else { &[] };
        client.ask("PUT", "/cache/?lifecycle", headers, &body).await
    };

    let none = (404, "NoSuchLifecycleConfiguration".to_owned());
    assert_eq!(get().await.status_and_code(), none);
    let unchecked = put(&rule("a"), false).await;
    assert_eq!(unchecked.status_and_code(), (400, "InvalidRequest".into()));
    let twice = put(&format!("{}{}", rule("a"), rule("a")), true).await;
    assert_eq!(twice.status_and_code(), (400, "InvalidArgument".into()));
    assert_eq!(server.lifecycle(), []);

    let both = format!("{}{}", rule("a"), rule("b"));
    assert_eq!(put(&both, true).await.status, 200);
    assert_eq!(get().await.elements("ID"), ["a", "b"]);
    assert_eq!(get().await.elements("Days"), ["7", "7"]);
    let rules = server.lifecycle();
    assert_eq!(rules[1].id.as_deref(), Some("b"));
    let deleted = client.ask("DELETE", "/cache/?lifecycle", &[], EMPTY).await;
    assert_eq!(deleted.status, 204);
    assert_eq!(get().await.status_and_code(), none);
    let operations: Vec<_> = server.log().iter().map(|l| l.operation).collect();
    assert_eq!(operations[0], "GetBucketLifecycleConfiguration");
    assert_eq!(operations[1], "PutBucketLifecycleConfiguration");
    assert_eq!(operations[6], "DeleteBucketLifecycle");
}

#[tokio::test]
async fn a_hook_runs_once_right_before_or_after_the_request_it_waits_for() {
    let server = Server::start();
    server.put("blob", "hello");
    let client = Client::new(&server);
    server.before(
        1,
        |logged| logged.operation == "GetObject",
        |store| assert!(store.remove("blob")),
    );
    server.after(
        0,
        |logged| logged.method == "PUT" && logged.key.starts_with("manifests/"),
        |store| store.put("seen", store.objects()["manifests/a"].clone()),
    );

    assert_eq!(client.get("/cache/blob").await.status, 200);
    assert_eq!(client.get("/cache/blob").await.status, 404);
    server.put("blob", "again");
    assert_eq!(client.get("/cache/blob").await.status, 200);
    for body in ["1", "2"] {
        let put = client.ask("PUT", "/cache/manifests/a", &[], body).await;
        assert_eq!(put.status, 200);
    }
    assert_eq!(server.objects()["seen"], "1");
}

#[tokio::test]
async fn over_tls_the_server_is_trusted_by_its_authority_s_certificate() {
    let authority = server::Authority::new();
    let server = Server::builder().tls(&authority).start();
    server.put("key", "hello");
    assert_eq!(server.url(), format!("https://{}", server.addr()));

    let pem = std::fs::read(authority.bundle()).expect("the bundle");
    let mut roots = rustls::RootCertStore::empty();
    for certificate in rustls_pki_types::CertificateDer::pem_slice_iter(&pem) {
        roots
            .add(certificate.expect("a certificate"))
            .expect("a root");
    }
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    for name in ["127.0.0.1", "localhost", "cache.s3.localhost"] {
        let stream = TcpStream::connect(server.addr()).await.expect("connected");
        let name = name.try_into().expect("a name");
        let mut stream = connector.connect(name, stream).await.expect("trusted");
        let request = b"GET /cache/key HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        stream.write_all(request).await.expect("sent");
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    }
}

#[tokio::test]
async fn delays_and_rates_hold_a_client_back() {
    let server = Server::builder()
        .delay(Duration::from_millis(80))
        .rate(1 << 20)
        .start();
    server.put("key", vec![7; 256 << 10]);
    let client = Client::new(&server);
    for sends in [true, false] {
        let begun = Instant::now();
        let got = match sends {
            true => {
                client
                    .ask("PUT", "/cache/key", &[], vec![7; 256 << 10])
                    .await
            }
            false => client.get("/cache/key").await,
        };
        assert_eq!(got.status, 200);
        // A quarter of a second for the body, less what the slack lets through.
        assert!(begun.elapsed() > Duration::from_millis(280), "{sends}");
    }
}

#[tokio::test]
async fn a_server_for_benchmarks_believes_its_client_and_keeps_no_blob_it_has() {
    let blob = Bytes::from("hello, hello");
    let hex = hex::encode(Sha256::digest(&blob));
    let blobs = HashMap::from([(hex.clone(), blob.clone())]);
    let server = Server::builder().unverified(blobs).start();
    let client = Client {
        secret: "wrong",
        claimed_hash: Some(hex::encode(Sha256::digest(b"other"))),
        ..Client::new(&server)
    };
    let key = format!("blobs/sha256:{hex}");

    let put = client
        .ask("PUT", &format!("/cache/{key}"), &[], "HELLO, HELLO")
        .await;
    assert_eq!(put.status, 200);
    assert!(put.header("etag").ends_with("-1\""));
    assert_eq!(server.objects()[&key], blob);
    assert_eq!(client.get(&format!("/cache/{key}")).await.text(), blob);

    assert!(server.remove(&key));
    let id = client.begin(&key).await;
    let one = client.part(&key, &id, 1, b"HELLO, ").await;
    let two = client.part(&key, &id, 2, b"HELLO").await;
    let done = client.complete(&key, &id, &[(1, &one), (2, &two)]).await;
    // S3's smallest part holds here as well.
    assert_eq!(done.status_and_code(), (400, "EntityTooSmall".into()));

    client.ask("PUT", "/cache/manifests/a", &[], "{}").await;
    assert_eq!(server.objects()["manifests/a"], "{}");
    let chunked = [
        ("content-encoding", "aws-chunked"),
        ("x-amz-decoded-content-length", "12"),
    ];
    let target = format!("/cache/blobs/{hex}");
    let put = client
        .ask("PUT", &target, &chunked, "c\r\nHELLO, HELLO\r\n0\r\n\r\n")
        .await;
    assert_eq!(put.status, 200);
    assert_eq!(server.objects()[&format!("blobs/{hex}")], blob);
}

#[tokio::test]
async fn round_trips_are_the_longest_chain_of_requests_that_waited_for_each_other() {
    let server = Server::builder().delay(Duration::from_millis(50)).start();
    let client = Client::new(&server);
    tokio::join!(client.get("/cache/a"), client.get("/cache/b"));
    client.get("/cache/c").await;
    server.settle();
    let log = server.log();
    assert_eq!(log.len(), 3);
    assert_eq!(server::round_trips(&log), 2);
    assert_eq!(server::round_trips(&log[..2]), 1);
    assert_eq!(server.peak_in_flight(), 2);
}

#[tokio::test]
async fn faults_that_are_answers_answer_without_performing() {
    let server = Server::start();
    let client = Client::new(&server);
    let put = async |fault: Fault| {
        server.fail_all("PutObject", fault);
        client.ask("PUT", "/cache/key", &[], "hello").await
    };

    assert_eq!(
        put(Fault::Status(500, "InternalError"))
            .await
            .status_and_code(),
        (500, "InternalError".into())
    );
    assert_eq!(
        put(Fault::ErrorIn200("SlowDown")).await.status_and_code(),
        (200, "SlowDown".into())
    );
    let throttled = put(Fault::Throttle {
        retry_after: Some(3),
    })
    .await;
    assert_eq!(
        (throttled.status.as_u16(), throttled.header("retry-after")),
        (503, "3")
    );
    let elsewhere = put(Fault::Redirect {
        region: "eu-west-1",
    })
    .await;
    assert_eq!(
        (
            elsewhere.status.as_u16(),
            elsewhere.header("x-amz-bucket-region")
        ),
        (301, "eu-west-1")
    );
    let got = put(Fault::StatusEmpty(502)).await;
    assert_eq!((got.status.as_u16(), got.text()), (502, ""));
    assert_eq!(put(Fault::Empty200).await.text(), "");
    assert!(put(Fault::Html200).await.text().contains("<html>"));
    assert!(put(Fault::BadXml).await.text().ends_with("</Is"));
    assert_eq!(
        put(Fault::EarlyAnswer(403)).await.status_and_code(),
        (403, "AccessDenied".into())
    );
    assert!(server.objects().is_empty());

    assert_eq!(
        put(Fault::ApplyThenStatus(500, "InternalError"))
            .await
            .status,
        500
    );
    assert_eq!(server.objects()["key"], "hello");
}

#[tokio::test]
async fn faults_that_end_the_connection_give_no_answer() {
    let server = Server::start();
    let client = Client::new(&server);
    for fault in [
        Fault::Reset,
        Fault::ResetBeforeReading,
        Fault::ResetWhileReading(1 << 20),
    ] {
        server.fail_all("PutObject", fault.clone());
        let sent = client
            .send("PUT", "/cache/key", &[], vec![7; 4 << 20])
            .await;
        assert!(sent.is_err(), "{fault:?} was answered");
        assert!(server.objects().is_empty(), "{fault:?} was performed");
    }

    server.fail_first(1, "PutObject", Fault::ApplyThenReset);
    assert!(
        client
            .send("PUT", "/cache/key", &[], "hello")
            .await
            .is_err()
    );
    assert_eq!(server.objects()["key"], "hello");
    assert_eq!(
        client.ask("PUT", "/cache/key", &[], "again").await.status,
        200
    );

    let statuses: Vec<u16> = server.log().iter().map(|logged| logged.status).collect();
    assert_eq!(statuses, [0, 0, 0, 0, 200]);
}

#[tokio::test]
async fn faults_of_a_body_are_seen_by_its_reader() {
    let server = Server::start();
    server.put("key", "0123456789");
    let client = Client::new(&server);
    let get = async |fault: Fault| {
        server.fail(move |asked| (asked.key == "key").then(|| fault.clone()));
        client.get("/cache/key").await
    };

    for fault in [
        Fault::Truncate(4),
        Fault::ResetMidBody(4),
        Fault::WrongLength,
    ] {
        let got = get(fault.clone()).await;
        assert_eq!(got.status, 200);
        assert!(got.body.is_err(), "{fault:?} ended in good order");
    }
    assert_eq!(get(Fault::ShortLength).await.text(), "012345678");
    assert_eq!(
        get(Fault::FlipByte(0))
            .await
            .text()
            .chars()
            .skip(1)
            .collect::<String>(),
        "123456789"
    );
    assert_eq!(
        get(Fault::Header("x-amz-delete-marker", "maybe"))
            .await
            .header("x-amz-delete-marker"),
        "maybe"
    );
    assert_eq!(
        get(Fault::NonAsciiHeader).await.headers["x-amz-meta-note"].as_bytes(),
        b"caf\xe9"
    );
    assert_eq!(
        get(Fault::SlowDrip {
            bytes: 3,
            tick: Duration::from_millis(1)
        })
        .await
        .text(),
        "0123456789"
    );
    assert_eq!(
        get(Fault::Delay(Duration::from_millis(1))).await.text(),
        "0123456789"
    );
    assert_eq!(
        get(Fault::Rewrite(|body| body.replace("234", "-")))
            .await
            .text(),
        "01-56789"
    );
    assert_eq!(
        get(Fault::EndlessBody { length: Some(12) }).await.text(),
        "xxxxxxxxxxxx"
    );
    server.reset_faults();
    assert_eq!(client.get("/cache/key").await.text(), "0123456789");
}

#[tokio::test]
async fn a_hanging_request_and_an_endless_body_end_with_the_server() {
    for fault in [Fault::Hang, Fault::EndlessBody { length: None }] {
        let server = Server::start();
        server.fail_all("GetObject", fault);
        let mut stream = TcpStream::connect(server.addr())
            .await
            .expect("the server listens");
        let addr = server.addr();
        stream
            .write_all(b"GET /cache/key HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .expect("sent");
        while server.log().is_empty() {
            tokio::task::yield_now().await;
        }

        drop(server);

        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
        assert!(
            TcpStream::connect(addr).await.is_err(),
            "the port is still open"
        );
    }
}
