//! What real stores answer that S3 does not: docs/s3-stores.md has the list.

use super::*;

pub(super) fn described(size: u64, modified: u64) -> Reply {
    let date = SystemTime::UNIX_EPOCH + Duration::from_secs(modified);
    let date = httpdate::fmt_http_date(date);
    let head =
        format!("HTTP/1.1 200 OK\r\ncontent-length: {size}\r\nlast-modified: {date}\r\n\r\n");
    Reply::Answer(head.into_bytes())
}

fn thrice(script: [Reply; 2]) -> Vec<Reply> {
    let all = [script.clone(), script.clone(), script];
    all.into_iter().flatten().collect()
}

pub(super) fn old() -> ObjectInfo {
    ObjectInfo {
        last_modified: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(7)),
        ..info()
    }
}

#[tokio::test]
async fn a_completion_without_an_etag_is_believed_if_the_object_is_there() {
    let parts = [etag(1), etag(2)];
    for body in [
        // Ceph RGW 16.2.
        "<CompleteMultipartUploadResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><ETag></ETag></CompleteMultipartUploadResult>",
        "<CompleteMultipartUploadResult/>",
        "<CompleteMultipartUpload/>",
    ] {
        let server = Server::new(vec![ok("", body), described(2, 7)]).await;
        let done = server.store().complete_upload("a", "u", &parts).await;
        done.unwrap_or_else(|e| panic!("{body}: {e}"));
        assert!(server.requests()[1].starts_with("HEAD /cache/a "));

        // Believed after none of the tries, otherwise.
        let script = [ok("", body), described(3, 7)];
        let server = Server::new(thrice(script)).await;
        let e = server.store().complete_upload("a", "u", &parts).await;
        assert_eq!(
            e.unwrap_err().message,
            format!(
                "unexpected response from {}: success, but the object has 3 bytes instead of 2, \
                 completing the upload of s3://cache/a",
                server.url
            )
        );
    }
    // What is nothing of S3's is asked for again, in vain if it was done.
    for body in ["<html/>", "ok", "", "<Compl"] {
        let gone = error("404 Not Found", "NoSuchUpload");
        let server = Server::new(vec![ok("", body), gone]).await;
        let e = server.store().complete_upload("a", "u", &parts).await;
        assert_eq!(e.unwrap_err().kind, Kind::NoSuchUpload);
    }
    // An error is one under any status.
    let server = Server::new(vec![error("200 OK", "InvalidPart")]).await;
    let e = server.store().complete_upload("a", "u", &parts).await;
    assert_eq!(e.unwrap_err().code.as_deref(), Some("InvalidPart"));
}

#[tokio::test]
async fn an_etag_in_entities_or_without_quotes_is_one() {
    for etag in ["&#34;0123-2&#34;", "0123-2"] {
        let body = format!(
            "<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>"
        );
        let server = Server::new(vec![ok("", &body)]).await;
        let done = server.store().complete_upload("a", "u", &[]).await;
        done.unwrap();
    }
}

#[tokio::test]
async fn an_upload_id_is_one_under_any_root() {
    // rclone serve s3 1.75.
    let body = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<InitiateMultipartUpload \
                xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Bucket>cache</Bucket><Key>a</Key>\
                <UploadId>7</UploadId></InitiateMultipartUpload>";
    let server = Server::new(vec![ok("", body)]).await;
    assert_eq!(server.store().create_upload("a", None).await.unwrap(), "7");
}

#[tokio::test]
async fn a_copy_without_an_etag_is_believed_if_last_modified_moved() {
    // rclone serve s3 1.75, and what a store could do that copies.
    let copied = ok("", "<CopyObjectResult></CopyObjectResult>");
    let server = Server::new(vec![copied.clone(), described(5, 8)]).await;
    assert!(server.store().touch("a", &old()).await.unwrap());

    let server = Server::new(vec![copied.clone(), described(5, 7)]).await;
    let e = server.store().touch("a", &old()).await.unwrap_err();
    assert_eq!(e.kind, Kind::Unsupported);
    assert_eq!(
        e.message,
        format!(
            "{} leaves Last-Modified as it was, refreshing s3://cache/a",
            server.url
        )
    );
    let server = Server::new(thrice([copied, described(4, 8)])).await;
    let e = server.store().touch("a", &old()).await.unwrap_err();
    assert_eq!(e.kind, Kind::Nonsense);
}

#[tokio::test]
async fn an_upload_without_an_etag_is_believed_if_the_object_is_there() {
    let server = Server::new(vec![ok("", ""), described(5, 7)]).await;
    server.store().put("a", Blob::new("hello")).await.unwrap();
    let gone = error("404 Not Found", "NoSuchKey");
    let mut script = vec![gone];
    script.extend(thrice([ok("", ""), status("404 Not Found")]));
    let server = Server::new(script).await;
    let store = server.store();
    assert!(store.get("a", None, None).await.unwrap().is_none());
    let e = store.put("a", Blob::new("hello")).await.unwrap_err();
    assert_eq!(e.kind, Kind::Nonsense);
}
