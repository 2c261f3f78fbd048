//! Writing through the registry.

use std::time::{Duration, SystemTime};

use expect_test::expect;
use layercache::cache::digest::Digest;
use serde_json::json;

use super::client::{Client, IMAGE_MANIFEST};
use super::others::bare;
use super::pull::FIXTURES;
use super::{Reply, Serve};
use crate::aftermath::{assert_store_is_sound, layout_of, noise};
use crate::program::{Program, fixture, s3_manifest};
use crate::server::{Fault, Server};

const MIB: usize = 1 << 20;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

#[track_caller]
fn error_code(reply: &Reply) -> String {
    let code = &reply.json()["errors"][0]["code"];
    code.as_str().expect("a code").to_owned()
}

#[test]
fn every_fixture_becomes_the_objects_that_an_export_writes() {
    for name in FIXTURES {
        for mode in ["min", "max"] {
            let layout = bare(name);
            let exported = Server::start();
            let spec = exported.spec(&format!("mode={mode},name=a;b"));
            Program::export(&spec, layout.path()).run().succeeds();
            let server = Server::start();
            let serve = Serve::writing(&server.spec(&format!("mode={mode},name=a;b")));
            serve.client("LAYERCACHE_TO").push(&fixture(name)).is(201);
            serve.stop().succeeds();
            let (mut found, expected) = (server.objects(), exported.objects());
            if mode == "min" {
                // The client has sent what the manifest leaves out as well; BuildKit would not.
                found.retain(|key, _| expected.contains_key(key));
            }
            assert_eq!(
                found.keys().collect::<Vec<_>>(),
                expected.keys().collect::<Vec<_>>(),
                "{name} mode={mode}"
            );
            assert!(found == expected, "{name} mode={mode}");
        }
    }
}

#[test]
fn a_run_says_what_was_stored() {
    let server = Server::start();
    let serve = Serve::writing(&server.spec("mode=max"));
    let client = serve.client("LAYERCACHE_TO");
    client.push(&fixture("local-max")).is(201);
    serve.stop().succeeds().prints(expect![[r#"
        served 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 1 lookup, 0 found; 0 blobs (0 B) read, 0 B fetched from S3; 24 requests in N s
        stored 1 manifest in s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 10 blobs uploaded (62.9 KiB), 0 already there, 0 refreshed
    "#]], expect![[r#"
        Ns serving: builds on this machine can use the cache now
        Ns wrote manifests/buildkit
    "#]]);
    // What is there is not sent again, and what is old is refreshed. The manifest is written again even
    // if the client sees that it is the same.
    server.age_all(2 * DAY);
    let serve = Serve::writing(&server.spec("mode=max"));
    let before = SystemTime::now() - Duration::from_secs(60);
    serve
        .client("LAYERCACHE_TO")
        .push(&fixture("local-max"))
        .is(201);
    for key in server.keys() {
        assert!(
            server.last_modified(&key).expect("a time") > before,
            "{key}"
        );
    }
    serve.stop().succeeds().prints(expect![[r#"
        served 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 1 lookup, 1 found; 0 blobs (0 B) read, 0 B fetched from S3; 44 requests in N s
        stored 1 manifest in s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 0 blobs uploaded (0 B), 0 already there, 10 refreshed
    "#]], expect![[r#"
        Ns serving: builds on this machine can use the cache now
        Ns wrote manifests/buildkit
    "#]]);
    assert_eq!(
        server.objects()["manifests/buildkit"],
        s3_manifest("max.json")
    );
}

#[test]
fn a_large_blob_is_sent_in_parts_and_comes_back() {
    let server = Server::start();
    let layout = layout_of(&[40 * MIB, 6 * MIB, 100]);
    let serve = Serve::writing(&server.spec("mode=max"));
    let client = serve.client("LAYERCACHE_TO");
    client.push(layout.path()).is(201);
    assert!(server.count("UploadPart") > 8);
    assert_eq!(server.uploads(), 0);
    assert_store_is_sound(&server, "after a push");
    let (_, blobs) = client.pull();
    assert_eq!(blobs.len(), 5);
}

#[test]
fn a_manifest_is_written_only_if_all_its_blobs_are_there() {
    let server = Server::start();
    let serve = Serve::writing(&server.spec("mode=max"));
    let client = serve.client("LAYERCACHE_TO");
    client.push(&fixture("local-max")).is(201);
    // A lifecycle rule deletes a blob that was found.
    let serve = Serve::writing(&server.spec("mode=max,name=again"));
    let client = serve.client("LAYERCACHE_TO");
    let mut keys = server.keys().into_iter();
    let blob = keys.find(|key| key.starts_with("blobs/")).expect("a blob");
    let gone = blob.clone();
    server.before(
        0,
        |asked| asked.key == "manifests/again" && asked.operation == "GetObject",
        move |store| {
            store.remove(&gone);
        },
    );
    let refused = client.push(&fixture("local-max")).is(400);
    assert_eq!(error_code(&refused), "MANIFEST_BLOB_UNKNOWN");
    assert!(!server.keys().contains(&"manifests/again".to_owned()));
    let absent = Digest::of(b"absent");
    let manifest = json!({"schemaVersion": 2, "mediaType": IMAGE_MANIFEST,
        "config": {"mediaType": "application/vnd.buildkit.cacheconfig.v0",
            "digest": absent.to_string(), "size": 6}, "layers": []});
    let bytes = manifest.to_string().into_bytes();
    let refused = client
        .put_manifest("latest", IMAGE_MANIFEST, &bytes)
        .is(400);
    assert_eq!(error_code(&refused), "MANIFEST_BLOB_UNKNOWN");
    for wrong in [&b"{}"[..], b"[]", b"no json", b""] {
        let refused = client.put_manifest("latest", IMAGE_MANIFEST, wrong).is(400);
        assert_eq!(error_code(&refused), "MANIFEST_INVALID");
    }
    let refused = client.put_manifest("other", IMAGE_MANIFEST, b"{}").is(404);
    assert_eq!(error_code(&refused), "MANIFEST_UNKNOWN");
    let digest = absent.to_string();
    let refused = client.put_manifest(&digest, IMAGE_MANIFEST, b"{}").is(400);
    assert_eq!(error_code(&refused), "DIGEST_INVALID");
}

#[test]
fn a_build_right_after_the_push_asks_s3_for_the_tag_alone() {
    let server = Server::start();
    let serve = Serve::writing(&server.spec("mode=max"));
    let client = serve.client("LAYERCACHE_TO");
    client.push(&fixture("local-max")).is(201);
    server.clear_log();
    client.push(&fixture("local-max")).is(201);
    // The manifest and its ten blobs, and the manifest written again.
    assert_eq!(server.count("GetObject"), 1);
    assert_eq!(server.count("HeadObject"), 10);
    assert_eq!(server.count("ListMultipartUploads"), 1);
    assert_eq!(server.count("PutObject"), 1);
    assert_eq!(server.log().len(), 13);
}

#[test]
fn what_a_run_has_sent_long_ago_is_looked_at_again() {
    let server = Server::start();
    let serve = Serve::writing(&server.spec("mode=max,touch_refresh=1s"));
    let client = serve.client("LAYERCACHE_TO");
    client.push(&fixture("local-max")).is(201);
    let later = || {
        std::thread::sleep(Duration::from_millis(1100));
        server.age_all(3 * DAY);
    };
    later();
    client.push(&fixture("local-max")).is(201);
    let yesterday = SystemTime::now() - DAY;
    for key in server.keys() {
        let modified = server.last_modified(&key).expect("a time");
        assert!(modified > yesterday, "{key}");
    }
    // Another cache took its place, and a prune removed its blobs.
    later();
    let spec = server.spec("mode=max,touch_refresh=1s");
    Program::export(&spec, &fixture("local-multiarch"))
        .run()
        .succeeds();
    let prune = Program::new().args(["prune", "--cache-to", &spec, "--yes"]);
    prune.arg("--grace").arg("1d").run().succeeds();
    // The other cache's three blobs, one of which both need, and the manifest.
    assert_eq!(server.keys().len(), 4);
    client.push(&fixture("local-max")).is(201);
    assert_eq!(server.keys().len(), 13);
    assert_store_is_sound(&server, "after the prune");
}

#[test]
fn a_blob_that_a_read_found_missing_is_asked_for_again() {
    let server = Server::start();
    let serve = Serve::writing(&server.spec("mode=max"));
    let client = serve.client("LAYERCACHE_TO");
    client.push(&fixture("local-max")).is(201);
    let mut keys = server.keys().into_iter();
    let blob = keys.find(|key| key.starts_with("blobs/")).expect("a blob");
    server.remove(&blob);
    client.get(&blob).is(404);
    client.head(&blob).is(404);
    client.push(&fixture("local-max")).is(201);
    assert_store_is_sound(&server, "after the second push");
}

#[test]
fn a_blob_that_was_refreshed_is_looked_at_again_before_the_manifest_is_written() {
    let server = Server::start();
    let spec = server.spec("mode=max");
    Program::export(&spec, &fixture("local-max"))
        .run()
        .succeeds();
    server.age_all(2 * DAY);
    server.remove("manifests/buildkit");
    let serve = Serve::writing(&spec);
    let client = serve.client("LAYERCACHE_TO");
    let mut keys = server.keys().into_iter();
    let blob = keys.find(|key| key.starts_with("blobs/")).expect("a blob");
    let gone = blob.clone();
    // The client has asked about all blobs by now.
    server.before(
        0,
        |asked| asked.operation == "GetObject",
        move |store| {
            store.remove(&gone);
        },
    );
    let refused = client.push(&fixture("local-max")).is(400);
    assert_eq!(error_code(&refused), "MANIFEST_BLOB_UNKNOWN");
    assert!(!server.objects().contains_key("manifests/buildkit"));
    client.push(&fixture("local-max")).is(201);
    assert_store_is_sound(&server, "after the second push");
}

#[test]
fn a_lookup_of_the_tag_writes_nothing_once_the_push_is_over() {
    let server = Server::start();
    let serve = Serve::writing(&server.spec("mode=max,name=pr;main"));
    let client = serve.client("LAYERCACHE_TO");
    let push = || client.push(&fixture("local-max")).is(201);
    let replace = || {
        let spec = server.spec("mode=max,name=main");
        Program::export(&spec, &fixture("local-multiarch"))
            .run()
            .succeeds();
        server.objects()["manifests/main"].clone()
    };
    push();
    let newer = replace();
    client.resolve();
    assert!(server.objects()["manifests/main"] == newer);
    // The next build pushes the same cache: it asks for the config and for the tag, and sends nothing.
    push();
    let objects = server.objects();
    assert!(objects["manifests/main"] == objects["manifests/pr"]);
    let newer = replace();
    client.resolve();
    assert!(server.objects()["manifests/main"] == newer);
}

#[test]
fn wrong_bytes_are_never_visible() {
    let server = Server::start();
    let serve = Serve::writing(&server.spec("mode=max"));
    let client = serve.client("LAYERCACHE_TO");
    for size in [10, 6 * MIB, 40 * MIB] {
        let mut bytes = noise(1, size);
        let digest = Digest::of(&bytes);
        bytes[size / 2] ^= 1;
        let begun = client.send("POST", "blobs/uploads/", &[], &[]).is(202);
        let put = format!("{}?digest={digest}", begun.header("location"));
        let refused = client.send("PUT", &put, &[], &bytes).is(400);
        assert_eq!(error_code(&refused), "DIGEST_INVALID");
        client.head(&format!("blobs/{digest}")).is(404);
    }
    serve.stop().succeeds();
    assert_eq!((server.keys().len(), server.uploads()), (0, 0));
}

fn patch(client: &Client, location: &str, range: Option<&str>, bytes: &[u8]) -> Reply {
    let headers: Vec<_> = range
        .map(|range| ("Content-Range", range))
        .into_iter()
        .collect();
    client.send("PATCH", location, &headers, bytes)
}

#[test]
fn pieces_arrive_in_order_or_not_at_all() {
    let server = Server::start();
    let serve = Serve::writing(&server.spec("mode=max"));
    let client = serve.client("LAYERCACHE_TO");
    let bytes = noise(1, 3 * MIB);
    let digest = Digest::of(&bytes);
    // A mount from elsewhere is answered as any other beginning.
    let mount = format!("blobs/uploads/?mount={digest}&from=other");
    let begun = client.send("POST", &mount, &[], &[]).is(202);
    let location = begun.header("location").to_owned();
    let first = patch(&client, &location, Some("0-999999"), &bytes[..1_000_000]).is(202);
    assert_eq!(first.header("range"), "0-999999");
    let gap = patch(&client, &location, Some("1000001-1000001"), &bytes[..1]).is(416);
    assert_eq!(error_code(&gap), "BLOB_UPLOAD_INVALID");
    let status = client.send("GET", &location, &[], &[]).is(204);
    assert_eq!(status.header("range"), "0-999999");
    let chunked = format!("{:x}\r\n", 2_000_000 - 1_000_000);
    let body = [
        chunked.as_bytes(),
        &bytes[1_000_000..2_000_000],
        b"\r\n0\r\n\r\n",
    ]
    .concat();
    client
        .send(
            "PATCH",
            &location,
            &[("Transfer-Encoding", "chunked")],
            &body,
        )
        .is(202);
    let end = format!("{location}?digest={digest}");
    client.send("PUT", &end, &[], &bytes[2_000_000..]).is(201);
    assert!(client.get(&format!("blobs/{digest}")).is(200).body == bytes);
    client.send("PUT", &end, &[], &[]).is(404);
    // One that is given up leaves nothing, and neither does one that turns out wrong.
    for end in ["DELETE", "PUT"] {
        let begun = client.send("POST", "blobs/uploads/", &[], &[]).is(202);
        let location = begun.header("location").to_owned();
        patch(&client, &location, None, b"abc").is(202);
        match end {
            "DELETE" => client.send("DELETE", &location, &[], &[]).is(204),
            _ => client
                .send("PUT", &format!("{location}?digest={digest}"), &[], &[])
                .is(400),
        };
        client.send("GET", &location, &[], &[]).is(404);
    }
    assert_eq!(server.keys(), [format!("blobs/{digest}")]);
}

#[test]
fn a_blob_that_cannot_be_refreshed_is_asked_for_again() {
    let server = Server::builder()
        .refuse("CopyObject", 501, "NotImplemented")
        .start();
    let bytes = noise(1, 1000);
    let key = format!("blobs/{}", Digest::of(&bytes));
    server.put(&key, bytes.clone());
    server.age(&key, 2 * DAY);
    let serve = Serve::writing(&server.spec("mode=max"));
    let client = serve.client("LAYERCACHE_TO");
    client.head(&key).is(404);
    client.push_blob(&Digest::of(&bytes).to_string(), &bytes);
    assert!(server.last_modified(&key).expect("a time") > SystemTime::now() - DAY);
}

#[test]
fn faults_of_s3_are_told_and_leave_nothing_that_dangles() {
    let layout = layout_of(&[12 * MIB, 100]);
    for operation in [
        "HeadObject",
        "PutObject",
        "CreateMultipartUpload",
        "UploadPart",
        "CompleteMultipartUpload",
    ] {
        let server = Server::start();
        server.fail_all(operation, Fault::Status(403, "AccessDenied"));
        let serve = Serve::writing(&server.spec("mode=max"));
        let client = serve.client("LAYERCACHE_TO");
        let pushed = std::panic::catch_unwind(|| client.push(layout.path()).is(201));
        assert!(pushed.is_err(), "{operation}");
        server.reset_faults();
        let run = serve.stop().succeeds();
        assert!(
            run.stderr.contains("answered 403"),
            "{operation}: {}",
            run.stderr
        );
        assert_store_is_sound(&server, operation);
        assert_eq!(server.uploads(), 0, "{operation}");
    }
}
