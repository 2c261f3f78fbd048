//! Reading through the registry.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use expect_test::expect;
use layercache::cache::digest::Digest;

use super::Serve;
use super::client::Client;
use crate::aftermath::{noise, put_cache};
use crate::program::{Program, files, fixture};
use crate::server::{Fault, Server};

const MIB: usize = 1 << 20;

/// Everything that BuildKit or buildx wrote for us.
pub const FIXTURES: [&str; 9] = [
    "image-inline",
    "image-multiarch",
    "image-plain",
    "local-docker",
    "local-index",
    "local-max",
    "local-min",
    "local-multiarch",
    "local-zstd",
];

/// The blobs of the layout that an import writes, and the digest that its tag has.
fn imported(spec: &str) -> (String, BTreeMap<String, Vec<u8>>) {
    let layout = tempfile::tempdir().expect("a temporary directory");
    Program::import(spec, layout.path()).run().succeeds();
    let files = files(layout.path());
    let index: serde_json::Value = serde_json::from_slice(&files["index.json"]).expect("JSON");
    let root = index["manifests"][0]["digest"].as_str().expect("a digest");
    let blobs = files.iter().filter_map(|(name, bytes)| {
        let hex = name
            .strip_prefix("blobs/sha256/")
            .filter(|hex| !hex.is_empty())?;
        Some((format!("sha256:{hex}"), bytes.clone()))
    });
    (root.to_owned(), blobs.collect())
}

#[test]
fn every_fixture_is_read_as_an_import_writes_it() {
    for name in FIXTURES {
        let server = Server::start();
        let spec = server.spec("mode=max");
        Program::export(&spec, &fixture(name)).run().succeeds();
        let serve = Serve::reading(&server.spec(""));
        let (root, blobs) = serve.client("LAYERCACHE_FROM").pull();
        let (expected_root, expected) = imported(&server.spec(""));
        assert_eq!(root, expected_root, "{name}");
        assert!(blobs == expected, "{name}: {:?}", blobs.keys());
        serve.stop().succeeds();
    }
}

#[test]
fn a_run_says_what_was_read_and_writes_nothing() {
    let server = Server::start();
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .run()
        .succeeds();
    let before = server.objects();
    let serve = Serve::reading(&server.spec(""));
    let client = serve.client("LAYERCACHE_FROM");
    assert_eq!(client.send("GET", "/v2/", &[], &[]).is(200).text(), "{}");
    client.pull();
    let tags = client.get("tags/list").is(200);
    assert_eq!(tags.text(), r#"{"name":"buildkit","tags":["latest"]}"#);
    let some = Digest::of(b"");
    assert_eq!(
        client.get(&format!("referrers/{some}")).is(200).text(),
        r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#
    );
    for (path, status, body) in [
        (
            "manifests/other".to_owned(),
            404,
            r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"a cache has the tag latest only, not \"other\""}]}"#.to_owned(),
        ),
        (
            format!("blobs/{some}"),
            404,
            format!(r#"{{"errors":[{{"code":"BLOB_UNKNOWN","message":"{some} is not on S3"}}]}}"#),
        ),
        (
            format!("manifests/{some}"),
            404,
            format!(r#"{{"errors":[{{"code":"MANIFEST_UNKNOWN","message":"{some} is not a manifest of this cache"}}]}}"#),
        ),
        (
            "blobs/sha256:..".to_owned(),
            400,
            r#"{"errors":[{"code":"DIGEST_INVALID","message":"\"sha256:..\" is not a sha256 digest"}]}"#.to_owned(),
        ),
    ] {
        assert_eq!(client.get(&path).is(status).text(), body);
    }
    let denied = client.send("POST", "blobs/uploads/", &[], &[]).is(403);
    assert_eq!(denied.json()["errors"][0]["code"], "DENIED");
    client
        .put_manifest("latest", super::client::IMAGE_MANIFEST, b"{}")
        .is(403);
    let deleted = client.send("DELETE", "manifests/latest", &[], &[]).is(405);
    assert_eq!(deleted.json()["errors"][0]["code"], "UNSUPPORTED");
    serve.stop().succeeds().prints(expect![[r#"
        served 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 1 lookup, 1 found; 10 blobs (62.9 KiB) read, 62.9 KiB fetched from S3; 24 requests in N s
    "#]], expect![[r#"
        Ns serving: builds on this machine can use the cache now
    "#]]);
    assert_eq!(server.objects(), before);
}

#[test]
fn what_is_missing_on_s3_is_left_out_and_what_comes_back_is_there_at_the_next_head() {
    let server = Server::start();
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .run()
        .succeeds();
    let serve = Serve::reading(&server.spec(""));
    let client = serve.client("LAYERCACHE_FROM");
    let (whole, manifest) = client.resolve();
    let layers = manifest["layers"].as_array().expect("layers");
    let gone = layers.last().expect("a layer")["digest"]
        .as_str()
        .expect("a digest");
    let bytes = server.objects()[&format!("blobs/{gone}")].clone();
    server.remove(&format!("blobs/{gone}"));
    let (partial, _) = client.pull();
    assert_ne!(partial, whole);
    let (expected, _) = imported(&server.spec(""));
    assert_eq!(partial, expected);
    client.get(&format!("blobs/{gone}")).is(404);
    // The build that began before goes on with what it was given.
    client.get(&format!("manifests/{whole}")).is(200);
    server.put(&format!("blobs/{gone}"), bytes);
    assert_eq!(client.resolve().0, whole);
    serve.stop().succeeds().prints(expect![[r#"
        served 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 3 lookups, 3 found; 1 blob (12.0 KiB) read, 12.0 KiB fetched from S3; 35 requests in N s
    "#]], expect![[r#"
        Ns serving: builds on this machine can use the cache now
        warning: 1 blob that the manifest of 'buildkit' names is missing or damaged on S3: 9 results and 9 layers left out
    "#]]);
}

#[test]
fn ranges_of_a_large_blob_are_exact_and_the_blob_is_fetched_side_by_side() {
    let server = Server::start();
    put_cache(&server, "buildkit", &[20 * MIB, 100]);
    let bytes = noise(1, 20 * MIB);
    let digest = Digest::of(&bytes);
    let serve = Serve::reading(&server.spec(""));
    let client = serve.client("LAYERCACHE_FROM");
    client.resolve();
    let path = format!("blobs/{digest}");
    let head = client.head(&path).is(200);
    assert_eq!(head.header("content-length"), (20 * MIB).to_string());
    assert_eq!(head.header("accept-ranges"), "bytes");
    server.clear_log();
    assert!(client.get(&path).is(200).body == bytes);
    assert_eq!(server.count("HeadObject"), 0);
    assert_eq!(server.count("GetObject"), 10);
    for (range, from, to) in [
        ("bytes=0-", 0, 20 * MIB),
        ("bytes=12345678-", 12345678, 20 * MIB),
        ("bytes=7-1048582", 7, 1048583),
        ("bytes=-5", 20 * MIB - 5, 20 * MIB),
    ] {
        let reply = client.range(&path, range).is(206);
        assert!(reply.body == bytes[from..to], "{range}");
        assert_eq!(
            reply.header("content-range"),
            format!("bytes {from}-{}/{}", to - 1, 20 * MIB)
        );
    }
    let beyond = client.range(&path, &format!("bytes={}-", 20 * MIB)).is(416);
    assert_eq!(
        beyond.header("content-range"),
        format!("bytes */{}", 20 * MIB)
    );
    // In a run that has not verified it before, a range is verified from the beginning on.
    let again = Serve::reading(&server.spec(""));
    let reply = again
        .client("LAYERCACHE_FROM")
        .range(&path, "bytes=15000000-");
    assert!(reply.is(206).body == bytes[15_000_000..]);
}

#[test]
fn readers_of_one_blob_share_one_download() {
    let server = Server::builder().delay(Duration::from_millis(200)).start();
    put_cache(&server, "buildkit", &[8 * MIB]);
    let bytes = noise(1, 8 * MIB);
    let path = format!("blobs/{}", Digest::of(&bytes));
    let serve = Serve::reading(&server.spec(""));
    let client = serve.client("LAYERCACHE_FROM");
    client.resolve();
    server.clear_log();
    let readers: Vec<_> = (0..8)
        .map(|_| {
            let (client, path) = (client.clone(), path.clone());
            std::thread::spawn(move || client.get(&path).is(200).body)
        })
        .collect();
    for reader in readers {
        assert!(reader.join().expect("a reply") == bytes);
    }
    assert_eq!(server.count("GetObject"), 4);
}

#[test]
fn a_damaged_blob_is_cut_off_before_its_end_and_left_out_from_then_on() {
    let server = Server::start();
    put_cache(&server, "buildkit", &[5 * MIB, 100]);
    let mut bytes = noise(1, 5 * MIB);
    let digest = Digest::of(&bytes);
    bytes[4 * MIB] ^= 1;
    server.put(&format!("blobs/{digest}"), bytes);
    let serve = Serve::reading(&server.spec(""));
    let client = serve.client("LAYERCACHE_FROM");
    let (_, manifest) = client.resolve();
    assert_eq!(manifest["layers"].as_array().expect("layers").len(), 2);
    let reply = client.get(&format!("blobs/{digest}")).is(200);
    assert!(!reply.is_whole() && reply.body.len() < 5 * MIB);
    // A client that goes on where it was would end with a wrong blob.
    let rest = format!("bytes={}-", reply.body.len());
    client.range(&format!("blobs/{digest}"), &rest).is(404);
    // Whether it is damaged on S3 is looked up once more: the manifest, three pieces, the whole.
    while server.count("GetObject") < 5 {
        std::thread::sleep(Duration::from_millis(5));
    }
    server.settle();
    let (_, manifest) = client.resolve();
    assert_eq!(manifest["layers"].as_array().expect("layers").len(), 1);
    serve.stop().succeeds().prints(expect![[r#"
        served 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 2 lookups, 2 found; 1 blob (4.00 MiB) read, 4.00 MiB fetched from S3; 10 requests in N s
    "#]], expect![[r#"
        Ns serving: builds on this machine can use the cache now
        warning: blob blobs/sha256:7762f243a4babd7adf1f86c69fdbf80b3edf0b5b4ac4062021e43416f47ddac2 on S3 is damaged: its bytes hash to sha256:96638e53f2caeb7589836791fd7a42f83b777b9271d54497a67dc97a9b74db72; export the cache again with --verify-remote
        warning: 1 blob that the manifest of 'buildkit' names is missing or damaged on S3: 1 result and 1 layer left out
    "#]]);
}

#[test]
fn interruptions_on_the_side_of_s3_do_not_show() {
    let server = Server::start();
    put_cache(&server, "buildkit", &[9 * MIB, 3 * MIB]);
    server.fail(|asked| match asked.nth % 3 {
        0 if asked.operation == "GetObject" => Some(Fault::Truncate(300_000)),
        1 if asked.operation == "GetObject" => Some(Fault::Status(503, "SlowDown")),
        _ => None,
    });
    let serve = Serve::reading(&server.spec("retry_max_attempts=10"));
    serve.client("LAYERCACHE_FROM").pull();
}

#[test]
fn without_s3_there_is_no_cache_and_the_log_says_why() {
    let server = Server::start();
    put_cache(&server, "buildkit", &[100]);
    server.fail_all("GetObject", Fault::Status(403, "AccessDenied"));
    let serve = Serve::reading(&server.spec(""));
    let reply = serve
        .client("LAYERCACHE_FROM")
        .get("manifests/latest")
        .is(404);
    assert_eq!(
        reply.text(),
        r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"there is no such cache yet"}]}"#
    );
    serve.stop().succeeds().prints(expect![[r#"
        served 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 1 lookup, 0 found; 0 blobs (0 B) read, 0 B fetched from S3; 1 request in N s
    "#]], expect![[r#"
        Ns serving: builds on this machine can use the cache now
        warning: no cache for the build, because 'buildkit' cannot be read: http://127.0.0.1:PORT answered 403 AccessDenied (The test server was told to answer AccessDenied.), reading s3://cache/manifests/buildkit; s3:GetObject may be missing, or the object itself: without s3:ListBucket a missing key answers 403 too
    "#]]);
}

/// Sends a request for a blob, and waits for the first byte of it, but for no more.
fn first_byte(client: &Client, digest: &Digest) -> u8 {
    let stream = TcpStream::connect(&client.host).expect("it listens");
    let head = format!("GET /v2/{}/blobs/{digest} HTTP/1.1", client.repository);
    (&stream)
        .write_all(format!("{head}\r\nHost: x\r\n\r\n").as_bytes())
        .expect("sent");
    let mut response = BufReader::new(stream);
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        assert_ne!(response.read_line(&mut line).expect("a head"), 0);
    }
    let mut first = [0];
    response.read_exact(&mut first).expect("a byte");
    first[0]
}

#[test]
fn the_first_byte_needs_the_answers_to_two_requests_and_to_one_once_the_manifest_was_read() {
    let bytes = noise(1, 20 * MIB);
    let digest = Digest::of(&bytes);
    for (resolved, needed) in [(false, 2), (true, 1)] {
        let server = Server::start();
        put_cache(&server, "buildkit", &[20 * MIB]);
        let serve = Serve::reading(&server.spec(""));
        let client = serve.client("LAYERCACHE_FROM");
        if resolved {
            client.resolve();
        }
        server.clear_log();
        // All others are held until the test ends: the last one answered asks for the first byte.
        server.fail(move |asked| {
            let range = asked.headers.get("range");
            let range = range.and_then(|range| range.to_str().ok());
            let answered = range.is_some_and(|range| range.starts_with("bytes=0-"))
                || asked.index + 1 < needed;
            (!answered).then_some(Fault::Hang)
        });
        assert_eq!(first_byte(&client, &digest), bytes[0]);
        let log = server.log();
        let answered = log.iter().filter(|request| request.status != 0);
        assert_eq!(answered.count(), needed, "{log:?}");
    }
}

#[test]
fn a_small_blob_takes_two_round_trips_and_one_once_its_size_is_known() {
    let server = Server::builder().delay(Duration::from_millis(50)).start();
    put_cache(&server, "buildkit", &[MIB]);
    let path = format!("blobs/{}", Digest::of(&noise(1, MIB)));
    let serve = Serve::reading(&server.spec(""));
    let client = serve.client("LAYERCACHE_FROM");
    client.get(&path).is(200);
    assert_eq!(crate::server::round_trips(&server.log()), 2);
    // Its size is known now.
    server.clear_log();
    client.get(&path).is(200);
    assert_eq!(crate::server::round_trips(&server.log()), 1);
}
