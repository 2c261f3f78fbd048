//! Answers that are too long, too slow or too many.

use super::*;

#[tokio::test]
async fn a_listing_without_end_and_any_other_long_answer_are_cut_off() {
    let endless = |status: &str, start: &str, bytes: usize| {
        let mut answer = format!("HTTP/1.1 {status}\r\n\r\n{start}").into_bytes();
        answer.resize(bytes, b' ');
        Reply::AnswerAndClose(answer)
    };
    let server = Server::new(vec![endless("200 OK", "<ListBucketResult>", 20 << 20); 3]).await;
    let e = server.store().list("", None).await.unwrap_err();
    assert!(e.message.contains("longer than 16 MiB"), "{e}");
    let server = Server::new(vec![endless("200 OK", "<R><UploadId>", 1 << 20); 3]).await;
    let e = server.store().create_upload("a", None).await.unwrap_err();
    assert!(e.message.contains("longer than 64 KiB"), "{e}");
    // Of an error that goes on, the beginning counts.
    let denied = "<Error><Code>AccessDenied</Code><Message>no</Message>";
    for status in ["403 Forbidden", "200 OK"] {
        let server = Server::new(vec![endless(status, denied, 1 << 20); 3]).await;
        let e = server.store().list("", None).await.unwrap_err();
        assert!(e.message.contains(" AccessDenied (no), listing "), "{e}");
    }
}

#[tokio::test]
async fn answers_held_in_memory_share_one_budget() {
    let server = Server::new(Vec::new()).await;
    let store = server.store();
    let mut held = Vec::new();
    while let Some(Some(room)) = store.remote.room(1 << 20).now_or_never() {
        held.push(room);
        assert!(held.len() <= 32);
    }
    assert_eq!(held.len(), 32);
    assert!(store.remote.room(16 << 20).now_or_never().is_none());
    held.truncate(16);
    assert!(store.remote.room(16 << 20).now_or_never().is_some());
}

#[tokio::test]
async fn no_more_than_ten_thousand_uploads_or_parts_are_looked_at() {
    let upload = "<Upload><Key>a</Key><UploadId>u</UploadId></Upload>".repeat(1000);
    let pages = (0..11).map(|page| {
        let body = format!(
            "<ListMultipartUploadsResult><IsTruncated>true</IsTruncated>\
             <NextKeyMarker>a{page}</NextKeyMarker>{upload}</ListMultipartUploadsResult>"
        );
        ok("", &body)
    });
    let server = Server::new(pages.collect()).await;
    let found = server.store().list_uploads("a").await.unwrap();
    assert_eq!((found.len(), server.requests().len()), (10_000, 10));

    let part = "<Part><PartNumber>1</PartNumber><Size>1</Size><ETag>e</ETag></Part>".repeat(1000);
    let pages = (1..12).map(|page| {
        let body = format!(
            "<ListPartsResult><IsTruncated>true</IsTruncated>\
             <NextPartNumberMarker>{page}</NextPartNumberMarker>{part}</ListPartsResult>"
        );
        ok("", &body)
    });
    let server = Server::new(pages.collect()).await;
    let found = server.store().list_parts("a", "u").await.unwrap();
    assert_eq!((found.len(), server.requests().len()), (10_000, 10));
}

#[tokio::test]
async fn headers_that_drip_or_never_end_are_given_up() {
    let continues: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
    for (first, then) in [
        (&b"HTTP/1.1 200 OK\r\nx-y: "[..], &b"z"[..]),
        (continues, continues),
    ] {
        let pause = Duration::from_millis(10);
        let acts = vec![Act::Send(first.to_vec()), Act::Repeat(then.to_vec(), pause)];
        let server = Server::new(vec![Reply::Play(acts); 3]).await;
        let store = server.store_at(Timing {
            headers: Duration::from_millis(300),
            ..soon()
        });
        let found = tokio::time::timeout(Duration::from_secs(20), store.head("a")).await;
        let e = found.expect("it ends").unwrap_err();
        assert_eq!(e.kind, Kind::Unavailable, "{e}");
    }
}
