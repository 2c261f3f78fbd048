//! What prune, copy and lifecycle need: deleting, copying from anywhere, the bucket's rules.

use md5::Md5;

use super::*;

fn keys(keys: &[&str]) -> Vec<String> {
    keys.iter().map(|key| (*key).to_owned()).collect()
}

#[tokio::test]
async fn many_objects_are_deleted_in_one_request_with_its_digest() {
    let body = "<DeleteResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">\
        <Deleted><Key>a&amp;b</Key></Deleted>\
        <Error><Key>c</Key><Code>AccessDenied</Code><Message>no</Message></Error>\
        <Error><Key>d</Key><Code>NoSuchKey</Code></Error></DeleteResult>";
    let server = Server::new(vec![ok("", body)]).await;
    let done = server
        .store()
        .delete(&keys(&["a&b", "c", "d", "e"]))
        .await
        .unwrap();
    let said: Vec<_> = done
        .into_iter()
        .map(|done| done.map_err(|e| (e.kind, e.message)))
        .collect();
    let url = &server.url;
    assert_eq!(
        said,
        [
            Ok(()),
            Err((
                Kind::Denied,
                format!("{url} answered 200 AccessDenied (no), deleting s3://cache/c")
            )),
            Ok(()),
            Err((
                Kind::Nonsense,
                format!(
                    "unexpected response from {url}: nothing about this key, deleting s3://cache/e"
                )
            )),
        ]
    );
    let request = &server.requests()[0];
    assert!(request.starts_with("POST /cache?delete= "), "{request}");
    let (_, sent) = request.split_once("\r\n\r\n").unwrap();
    assert!(sent.contains("<Key>a&amp;b</Key>"), "{sent}");
    let digest = <Md5 as md5::Digest>::digest(sent);
    let digest = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, digest);
    assert!(request.contains(&format!("\r\ncontent-md5: {digest}\r\n")));
}

#[tokio::test]
async fn where_a_store_deletes_no_batches_each_object_is_deleted() {
    let done = Reply::Answer(b"HTTP/1.1 204 No Content\r\n\r\n".to_vec());
    let server = Server::making(|request| match request.method.as_str() {
        "POST" => response(
            "501 Not Implemented",
            "",
            "<Error><Code>NotImplemented</Code></Error>",
        ),
        _ if request.path.ends_with("/a") => response(
            "403 Forbidden",
            "",
            "<Error><Code>AccessDenied</Code></Error>",
        ),
        _ => b"HTTP/1.1 204 No Content\r\n\r\n".to_vec(),
    });
    let results = server
        .store()
        .delete(&keys(&["a", "b", "c"]))
        .await
        .unwrap();
    let denied: Vec<_> = results.iter().map(Result::is_err).collect();
    assert_eq!(denied, [true, false, false]);
    // What XML cannot carry is not sent in it.
    let server = Server::new(vec![done.clone(), done]).await;
    let results = server
        .store()
        .delete(&keys(&["a\u{1}", "b"]))
        .await
        .unwrap();
    assert!(results.iter().all(Result::is_ok));
    assert!(server.requests()[0].starts_with("DELETE /cache/"));
}

#[tokio::test]
async fn an_object_is_copied_from_another_bucket_while_it_stays_the_same() {
    let server = Server::new(vec![
        ok(
            "",
            "<CopyObjectResult><ETag>\"x\"</ETag></CopyObjectResult>",
        ),
        error("404 Not Found", "NoSuchKey"),
        error("412 Precondition Failed", "PreconditionFailed"),
    ])
    .await;
    let store = server.store();
    let from = ("other", "p/blobs/sha256:a");
    assert!(store.copy(from, "blobs/sha256:a", &info()).await.unwrap());
    assert!(!store.copy(from, "blobs/sha256:a", &info()).await.unwrap());
    let e = store
        .copy(from, "blobs/sha256:a", &info())
        .await
        .unwrap_err();
    assert_eq!(e.kind, Kind::Changed);
    let request = &server.requests()[0];
    assert!(request.starts_with("PUT /cache/blobs/sha256%3Aa "));
    for line in [
        "x-amz-copy-source: other/p/blobs/sha256%3Aa",
        "x-amz-copy-source-if-match: \"abc\"",
        "x-amz-storage-class: STANDARD_IA",
    ] {
        assert!(request.contains(&format!("\r\n{line}\r\n")), "{request}");
    }
    assert!(!request.contains("x-amz-metadata-directive"));
}

#[tokio::test]
async fn lifecycle_rules_come_and_go_as_they_are() {
    let rules = "<LifecycleConfiguration xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Rule><ID>x</ID>\
                 <Filter><ObjectSizeGreaterThan>7</ObjectSizeGreaterThan></Filter><Status>Enabled</Status>\
                 <Expiration><Days>7</Days></Expiration></Rule></LifecycleConfiguration>";
    let server = Server::new(vec![
        ok("", rules),
        error("404 Not Found", "NoSuchLifecycleConfiguration"),
        error("403 Forbidden", "AccessDenied"),
        ok("", ""),
    ])
    .await;
    let store = server.store();
    assert_eq!(store.lifecycle().await.unwrap().as_deref(), Some(rules));
    assert_eq!(store.lifecycle().await.unwrap(), None);
    assert_eq!(store.lifecycle().await.unwrap_err().kind, Kind::Denied);
    store.set_lifecycle(rules).await.unwrap();
    let requests = server.requests();
    assert!(requests[0].starts_with("GET /cache?lifecycle= "));
    assert!(requests[3].starts_with("PUT /cache?lifecycle= "));
    assert!(requests[3].ends_with(&format!("\r\n\r\n{rules}")));
    assert!(requests[3].contains("\r\ncontent-md5: "));
}

#[tokio::test]
async fn deletes_are_conditional_until_the_store_refuses_that() {
    let done = |keys: [&str; 2]| {
        let keys = keys.map(|key| format!("<Deleted><Key>{key}</Key></Deleted>"));
        ok(
            "",
            &format!("<DeleteResult>{}</DeleteResult>", keys.concat()),
        )
    };
    let changed = "<DeleteResult><Deleted><Key>a&amp;b</Key></Deleted><Error><Key>c</Key>\
                   <Code>PreconditionFailed</Code><Message>no</Message></Error></DeleteResult>";
    let server = Server::new(vec![
        ok("", changed),
        error("400 Bad Request", "MalformedXML"),
        done(["a&amp;b", "c"]),
        done(["a&amp;b", "c"]),
    ])
    .await;
    let store = server.store();
    let objects = [("a&b", "\"1\""), ("c", "\"2\"")];
    let objects = objects.map(|(key, etag)| (key.to_owned(), etag.to_owned()));
    let results = store.delete_unchanged(&objects).await.unwrap();
    assert!(results[0].is_ok());
    assert_eq!(results[1].as_ref().unwrap_err().kind, Kind::Changed);
    for _ in 0..2 {
        let results = store.delete_unchanged(&objects).await.unwrap();
        assert!(results.iter().all(Result::is_ok));
    }
    let requests = server.requests();
    let conditional: Vec<_> = requests.iter().map(|r| r.contains("<ETag>")).collect();
    assert_eq!(conditional, [true, true, false, false]);
    let sent = "<Object><Key>a&amp;b</Key><ETag>\"1\"</ETag></Object>";
    assert!(requests[0].contains(sent), "{}", requests[0]);
}
