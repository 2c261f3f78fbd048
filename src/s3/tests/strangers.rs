//! Endpoints that are not S3: a cache that is not there must not be mistaken for one.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const NGINX: &str = "<html>\r\n<head><title>404 Not Found</title></head>\r\n<body>\r\n\
                     <center><h1>404 Not Found</h1></center>\r\n</body>\r\n</html>";

fn with_body(status: &str, body: &str) -> Reply {
    Reply::Answer(response(status, "", body))
}

#[tokio::test]
async fn a_404_that_is_not_from_s3_is_an_error_that_names_the_endpoint() {
    for (body, words) in [
        (NGINX, "404 Not Found 404 Not Found"),
        ("404 page not found\n", "404 page not found"),
        (
            "{\"error\":\"no such route\"}",
            "{\"error\":\"no such route\"}",
        ),
    ] {
        let server = Server::new(vec![with_body("404 Not Found", body)]).await;
        let e = server.store().get("a", None, None).await.err().unwrap();
        assert_eq!(e.kind, Kind::NotS3);
        assert_eq!(
            e.message,
            format!(
                "{} answered 404, but not like S3 ({words}), reading s3://cache/a; check endpoint_url",
                server.url
            )
        );
    }
}

#[tokio::test]
async fn a_404_without_a_body_counts_only_where_the_bucket_is_found_to_be_s3_s() {
    let nothing = || status("404 Not Found");
    let list = ok(
        "",
        "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>",
    );
    // A listing, or its refusal in S3's words, decides for the whole run.
    for decides in [list, error("403 Forbidden", "AccessDenied")] {
        let script = vec![nothing(), decides, nothing(), nothing()];
        let server = Server::new(script).await;
        let store = server.store();
        assert!(store.get("a", None, None).await.unwrap().is_none());
        assert!(store.head("a").await.unwrap().is_none());
        assert!(store.get("b", None, None).await.unwrap().is_none());
        let asked = &server.requests()[1];
        assert!(
            asked.starts_with("GET /cache?list-type=2&max-keys=1 "),
            "{asked}"
        );
    }
    // So does the bucket's own HEAD, where listings of version 2 are not known.
    let server = Server::new(vec![nothing(), nothing(), status("200 OK")]).await;
    assert!(server.store().head("a").await.unwrap().is_none());

    let server = Server::new(vec![nothing(), nothing(), nothing()]).await;
    let e = server.store().get("a", None, None).await.err().unwrap();
    assert_eq!(e.kind, Kind::NotS3);
    assert_eq!(
        e.message,
        format!(
            "{} answered 404, but not like S3, reading s3://cache/a; check endpoint_url, bucket and \
             use_path_style",
            server.url
        )
    );
    let missing = error("404 Not Found", "NoSuchBucket");
    let server = Server::new(vec![nothing(), missing]).await;
    let e = server.store().head("a").await.unwrap_err();
    assert_eq!(e.kind, Kind::NoBucket);
    // Only S3 has such headers.
    let own = Reply::Answer(response("404 Not Found", "x-amz-request-id: 1\r\n", ""));
    let server = Server::new(vec![own]).await;
    assert!(server.store().head("a").await.unwrap().is_none());
}

#[tokio::test]
async fn what_other_servers_answer_is_quoted() {
    for (status, body, says) in [
        (
            "401 Unauthorized",
            "Please sign in",
            "answered 401, but not like S3 (Please sign in), reading s3://cache/a; check endpoint_url",
        ),
        (
            "501 Not Implemented",
            "Unsupported method",
            "answered 501, but not like S3 (Unsupported method), reading s3://cache/a; check endpoint_url",
        ),
        (
            "400 Bad Request",
            "Client sent an HTTP request to an HTTPS server.\n",
            "answered 400, but not like S3 (Client sent an HTTP request to an HTTPS server.), reading \
             s3://cache/a; that port speaks https: use endpoint_url=https://…",
        ),
    ] {
        let server = Server::new(vec![with_body(status, body)]).await;
        let e = server.store().get("a", None, None).await.err().unwrap();
        assert_eq!(e.message, format!("{} {says}", server.url));
        assert_eq!(e.kind, Kind::NotS3);
    }
}

#[tokio::test]
async fn a_console_that_answers_every_path_with_its_page_is_no_store() {
    let headers = "content-type: text/html; charset=utf-8\r\nlast-modified: Thu, 01 Jan 1970 00:00:07 GMT\r\n";
    let page = ok(headers, "<html><title>MinIO Console</title></html>");
    let head = Reply::Answer(
        format!("HTTP/1.1 200 OK\r\ncontent-length: 41\r\n{headers}\r\n").into_bytes(),
    );
    let says = |url: &str, doing: &str| {
        format!(
            "unexpected response from {url}: a web page, which is not what S3 answers (3 tries), \
             {doing} s3://cache/a; check endpoint_url (MinIO's S3 is at port 9000, its console at 9001)"
        )
    };
    let server = Server::new(vec![page; 3]).await;
    let e = server.store().get("a", None, None).await.err().unwrap();
    assert_eq!(e.message, says(&server.url, "reading"));
    let server = Server::new(vec![head; 3]).await;
    let e = server.store().head("a").await.unwrap_err();
    assert_eq!(e.message, says(&server.url, "looking for"));
}

#[tokio::test]
async fn a_head_that_fails_is_explained_by_one_get_for_all() {
    for (bare, code, kind, says) in [
        (
            "403 Forbidden",
            "SignatureDoesNotMatch",
            Kind::Denied,
            "check access_key_id and secret_access_key",
        ),
        (
            "403 Forbidden",
            "RequestTimeTooSkewed",
            Kind::Other,
            "this machine's clock is off: set it",
        ),
        (
            "400 Bad Request",
            "ExpiredToken",
            Kind::Denied,
            "the session token has expired: sign in again",
        ),
        (
            "403 Forbidden",
            "InvalidObjectState",
            Kind::Other,
            "the object is archived, and must be restored first",
        ),
    ] {
        let head = status(bare);
        let script = vec![head.clone(), error(bare, code), head.clone(), head];
        let server = Server::new(match code {
            // What new credentials may cure is asked each time.
            "ExpiredToken" => script[..2].to_vec(),
            _ => script,
        })
        .await;
        let store = server.store();
        let e = store.head("a").await.unwrap_err();
        assert_eq!(e.kind, kind, "{e}");
        let status = &bare[..3];
        assert_eq!(
            e.message,
            format!(
                "{} answered {status} {code} (said so), looking for s3://cache/a; {says}",
                server.url
            )
        );
        assert!(server.requests()[1].contains("\r\nrange: bytes=0-0\r\n"));
        if code != "ExpiredToken" {
            store.head("b").await.unwrap_err();
            store.head("c").await.unwrap_err();
            assert_eq!(server.requests().len(), 4);
        }
    }
}

#[tokio::test]
async fn https_to_an_http_port_and_http_to_an_https_port_are_told_apart_from_other_breaks() {
    let bad = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n".to_vec();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 64]).await;
            let _ = stream.write_all(&bad).await;
        }
    });
    let store = store_of(&config(&format!("https://{host}")), soon());
    let e = store.head("a").await.unwrap_err();
    assert!(
        e.message
            .starts_with(&format!("{host} does not speak https ("))
            && e.message.ends_with(&format!(
                ", looking for s3://cache/a; check endpoint_url, or write http://{host}"
            )),
        "{e}"
    );

    // A TLS server's alert to what is no greeting.
    let alert = Reply::AnswerAndClose(vec![0x15, 3, 1, 0, 2, 2, 10]);
    let server = Server::new(vec![alert; 3]).await;
    let host = server.url.trim_start_matches("http://");
    let e = server.store().head("a").await.unwrap_err();
    assert!(
        e.message
            .starts_with(&format!("{host} does not speak http ("))
            && e.message.ends_with(&format!(
                "; if it speaks https, write endpoint_url=https://{host}"
            )),
        "{e}"
    );
}

#[tokio::test]
async fn what_comes_without_an_object_s_headers_is_no_object() {
    let body = "<Error><Code>InternalError</Code></Error>";
    let server = Server::new(vec![ok("", body), ok("", ""), ok(TAG, "hello")]).await;
    let found = server.store().get("a", None, None).await.unwrap().unwrap();
    assert_eq!(found.size, Some(5));
    let server = Server::new(vec![ok("", body); 3]).await;
    let e = server.store().get("a", None, None).await.err().unwrap();
    assert_eq!(
        e.message,
        format!(
            "unexpected response from {}: an object without ETag and Last-Modified (3 tries), reading \
             s3://cache/a",
            server.url
        )
    );
}
