//! Reads over the real store, from a server that breaks off, lies and forgets.

use super::*;
use crate::s3::tests::{Reply, Server, TAG, error as refusal, ok, status};

const BLOB: Expected = Expected {
    size: Some(10),
    content_addressed: true,
};
const DOCUMENT: Expected = Expected {
    size: None,
    content_addressed: false,
};

/// The headers of an object without an ETag.
const UNTAGGED: &str = "last-modified: Thu, 01 Jan 1970 00:00:07 GMT\r\n";

/// `0123456789` from `at` on, of which `body` comes before the connection closes.
fn part(at: usize, body: &str) -> Reply {
    part_tagged(at, body, "\"abc\"")
}

fn part_tagged(at: usize, body: &str, etag: &str) -> Reply {
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\ncontent-length: {}\r\ncontent-range: bytes {at}-9/10\r\netag: {etag}\r\n\r\n",
        10 - at
    );
    Reply::AnswerAndClose([head.as_bytes(), body.as_bytes()].concat())
}

/// A whole object of ten bytes that breaks off after `body`.
fn whole(body: &str, headers: &str) -> Reply {
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n{headers}\r\n");
    Reply::AnswerAndClose([head.as_bytes(), body.as_bytes()].concat())
}

fn chunked(headers: &str, chunks: &[&str]) -> Reply {
    let mut text = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n{headers}\r\n");
    for chunk in chunks {
        text.push_str(&format!("{:x}\r\n{chunk}\r\n", chunk.len()));
    }
    text.push_str("0\r\n\r\n");
    Reply::Answer(text.into_bytes())
}

/// Each request's Range and If-Match.
fn asked(server: &Server) -> Vec<(Option<String>, Option<String>)> {
    let header = |request: &str, name: &str| {
        let start = format!("{name}: ");
        let found = request.lines().find_map(|line| line.strip_prefix(&start));
        found.map(str::to_owned)
    };
    let requests = server.requests();
    requests
        .iter()
        .map(|request| (header(request, "range"), header(request, "if-match")))
        .collect()
}

/// The bytes that came, and how they ended.
async fn read_all(
    server: &Server,
    range: Option<Range<u64>>,
    expected: Expected,
) -> (String, Result<(), Kind>) {
    let store = server.as_store();
    let mut object = match read(&store, "a", range, expected).await {
        Ok(object) => object.expect("it is there"),
        Err(e) => return (String::new(), Err(e.kind)),
    };
    let mut bytes = Vec::new();
    let mut end = Ok(());
    while let Some(chunk) = object.body.next().await {
        match chunk {
            Ok(chunk) => bytes.extend_from_slice(&chunk),
            Err(e) => end = Err(e.kind),
        }
    }
    if end.is_ok() {
        assert_eq!(bytes.len() as u64, object.length);
    }
    (String::from_utf8(bytes).unwrap(), end)
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

#[tokio::test]
async fn a_body_that_breaks_off_is_resumed_where_it_broke_off_while_the_etag_stays() {
    for expected in [BLOB, DOCUMENT] {
        let server = Server::new(vec![whole("0123", TAG), part(4, "45"), part(6, "6789")]).await;
        let read = read_all(&server, None, expected).await;
        assert_eq!(read, ("0123456789".into(), Ok(())));
        assert_eq!(
            asked(&server),
            [
                (None, None),
                (some("bytes=4-9"), some("\"abc\"")),
                (some("bytes=6-9"), some("\"abc\"")),
            ]
        );
    }
}

#[tokio::test]
async fn a_replaced_object_is_continued_only_if_its_key_names_its_content() {
    let replaced = || {
        vec![
            whole("0123", TAG),
            refusal("412 Precondition Failed", "PreconditionFailed"),
        ]
    };
    let mut script = replaced();
    script.push(part_tagged(4, "456789", "\"new\""));
    let server = Server::new(script).await;
    let read = read_all(&server, None, BLOB).await;
    assert_eq!(read, ("0123456789".into(), Ok(())));
    assert_eq!(asked(&server)[2], (some("bytes=4-9"), None));

    let server = Server::new(replaced()).await;
    let read = read_all(&server, None, DOCUMENT).await;
    assert_eq!(read, ("0123".into(), Err(Kind::Changed)));
    // Without an ETag there is no telling.
    let server = Server::new(vec![whole("0123", UNTAGGED)]).await;
    let read = read_all(&server, None, DOCUMENT).await;
    assert_eq!(read, ("0123".into(), Err(Kind::Changed)));
}

#[tokio::test]
async fn a_body_that_brings_a_few_bytes_at_a_time_is_given_up_and_one_that_progresses_is_not() {
    let mut script = vec![whole("0", TAG)];
    script.extend((1..3).map(|at| part(at, &at.to_string())));
    let server = Server::new(script).await;
    let read = read_all(&server, None, BLOB).await;
    assert_eq!(read, ("012".into(), Err(Kind::Unavailable)));

    let mut script = vec![whole("012", TAG)];
    script.extend([part(3, "345"), part(6, "678"), part(9, "9")]);
    let server = Server::new(script).await;
    let read = read_all(&server, None, BLOB).await;
    assert_eq!(read, ("0123456789".into(), Ok(())));
}

#[tokio::test]
async fn an_object_deleted_during_the_read_is_told_apart_from_one_that_cannot_be_read() {
    let gone = refusal("404 Not Found", "NoSuchKey");
    let server = Server::new(vec![whole("0123", TAG), gone]).await;
    let read = read_all(&server, None, BLOB).await;
    assert_eq!(read, ("0123".into(), Err(Kind::Missing)));
    let denied = refusal("403 Forbidden", "AccessDenied");
    let server = Server::new(vec![whole("0123", TAG), denied]).await;
    let read = read_all(&server, None, BLOB).await;
    assert_eq!(read, ("0123".into(), Err(Kind::Denied)));
}

#[tokio::test]
async fn an_object_of_another_size_is_asked_for_again_and_then_refused() {
    let server = Server::new(vec![ok(TAG, "short"); 3]).await;
    let read = read_all(&server, None, BLOB).await;
    assert_eq!(read, (String::new(), Err(Kind::WrongSize { found: 5 })));
    let server = Server::new(vec![ok(TAG, "short"), whole("0123456789", TAG)]).await;
    let read = read_all(&server, None, BLOB).await;
    assert_eq!(read, ("0123456789".into(), Ok(())));
}

#[tokio::test]
async fn a_body_without_a_length_is_accepted_if_the_size_is_known() {
    let server = Server::new(vec![chunked(TAG, &["01234", "56789"])]).await;
    let read = read_all(&server, None, BLOB).await;
    assert_eq!(read, ("0123456789".into(), Ok(())));
    // Closing the connection ends such a body, too.
    let closed = format!("HTTP/1.1 200 OK\r\n{TAG}\r\n0123456789").into_bytes();
    let server = Server::new(vec![Reply::AnswerAndClose(closed)]).await;
    let read = read_all(&server, None, BLOB).await;
    assert_eq!(read, ("0123456789".into(), Ok(())));

    let server = Server::new(vec![chunked(TAG, &["01234"]), part(5, "56789")]).await;
    let read = read_all(&server, None, BLOB).await;
    assert_eq!(read, ("0123456789".into(), Ok(())));
    let server = Server::new(vec![chunked(TAG, &["01234567", "89more"])]).await;
    let read = read_all(&server, None, BLOB).await;
    assert_eq!(read, ("0123456789".into(), Ok(())));
    let server = Server::new(vec![chunked(TAG, &["0123456789"])]).await;
    let read = read_all(&server, None, DOCUMENT).await;
    assert_eq!(read, (String::new(), Err(Kind::Nonsense)));
}

#[tokio::test]
async fn a_store_that_ignores_ranges_is_read_in_one_stream() {
    // A range to the object's end is found by skipping; any other would be fetched many times over.
    let server = Server::new(vec![ok(TAG, "0123456789"); 2]).await;
    let read = read_all(&server, Some(4..10), BLOB).await;
    assert_eq!(read, ("456789".into(), Ok(())));
    assert_eq!(asked(&server), [(some("bytes=4-9"), None), (None, None)]);
    let server = Server::new(vec![ok(TAG, "0123456789")]).await;
    let read = read_all(&server, Some(0..4), BLOB).await;
    assert_eq!(read, (String::new(), Err(Kind::NoRanges)));

    let whole_again = ok(TAG, "0123456789");
    let script = vec![whole("0123", TAG), whole_again.clone(), whole_again];
    let server = Server::new(script).await;
    let read = read_all(&server, None, BLOB).await;
    assert_eq!(read, ("0123456789".into(), Ok(())));
}

async fn document(server: &Server, limit: u64) -> StoreResult<Option<Bytes>> {
    let store = server.as_store();
    let check = |bytes: &[u8]| match bytes.starts_with(b"0") {
        true => Ok(()),
        false => Err("it does not begin with 0".to_owned()),
    };
    read_whole(&store, "a", limit, check).await
}

#[tokio::test]
async fn a_document_that_is_damaged_or_replaced_is_read_from_its_start() {
    let replaced = refusal("412 Precondition Failed", "PreconditionFailed");
    let server = Server::new(vec![
        whole("0123", TAG),
        replaced,
        ok(UNTAGGED, "<html>"),
        chunked(UNTAGGED, &["01", "2"]),
    ])
    .await;
    assert_eq!(document(&server, 10).await.unwrap().unwrap(), "012");
    let server = Server::new(vec![ok(UNTAGGED, "<html>"); 3]).await;
    assert_eq!(
        document(&server, 10).await.unwrap_err().to_string(),
        "a is damaged: it does not begin with 0 (3 tries)"
    );
    let server = Server::new(vec![refusal("404 Not Found", "NoSuchKey")]).await;
    assert_eq!(document(&server, 10).await.unwrap(), None);
}

#[tokio::test]
async fn a_document_that_is_too_large_is_not_read() {
    for reply in [whole("", TAG), chunked(TAG, &["01234", "56789"])] {
        let server = Server::new(vec![reply]).await;
        let error = document(&server, 9).await.unwrap_err();
        assert_eq!(error.to_string(), "a has 10 bytes, and at most 9 are read");
    }
}

#[tokio::test]
async fn what_is_absent_is_no_error() {
    let gone = refusal("404 Not Found", "NoSuchKey");
    let server = Server::new(vec![gone]).await;
    let store = server.as_store();
    assert!(read(&store, "a", None, BLOB).await.unwrap().is_none());
    let server = Server::new(vec![status("403 Forbidden")]).await;
    let store = server.as_store();
    assert!(read(&store, "a", None, BLOB).await.is_err());
}
