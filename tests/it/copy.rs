//! `layercache copy`.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use expect_test::expect;
use layercache::cache::digest::Digest;
use layercache::transfer::limits::Limits;
use serde_json::{Value, json};

use crate::aftermath::{assert_store_is_sound, noise, put_cache};
use crate::inside::{self, Inside};
use crate::program::{Program, fixture, s3_manifest};
use crate::server::{Asked, Fault, OTHER_BUCKET, Server};

const OLD: Duration = Duration::from_secs(48 * 60 * 60);
const CREATED: &str = "2026-11-21T20:37:36.959076185Z";

fn copy(from: &[String], to: &str) -> Program {
    let mut program = Program::new().arg("copy").env("BUILDKIT_PROGRESS", "quiet");
    for spec in from {
        program = program.args(["--cache-from", spec]);
    }
    program.args(["--cache-to", to])
}

/// A server with the cache of `local-max` under `manifests/buildkit`.
fn exported() -> Server {
    let server = Server::start();
    let spec = server.spec("mode=max");
    Program::export(&spec, &fixture("local-max"))
        .run()
        .succeeds();
    server.clear_log();
    server
}

#[test]
fn another_name_beside_the_cache_costs_a_manifest() {
    let server = exported();
    let run = copy(&[server.spec("")], &server.spec("mode=max,name=a;b")).run();
    run.succeeds().prints(expect![[r#"
        copied 10 blobs from s3://cache/manifests/buildkit to s3://cache/manifests/a, s3://cache/manifests/b at http://127.0.0.1:PORT: 0 copied (0 B), 10 already there, 0 refreshed; 24 requests in N s
    "#]], expect![[""]]);
    for name in ["a", "b"] {
        let manifest = &server.objects()[&format!("manifests/{name}")];
        assert_eq!(*manifest, s3_manifest("max.json"));
    }
    assert_eq!(
        (server.count("PutObject"), server.count("CopyObject")),
        (2, 0)
    );
}

#[test]
fn at_one_endpoint_the_server_copies_and_no_blob_travels() {
    let server = exported();
    let run = copy(&[server.spec("")], &server.spec("mode=max,prefix=release/")).run();
    run.succeeds().prints(expect![[r#"
        copied 10 blobs from s3://cache/manifests/buildkit to s3://cache/release/manifests/buildkit at http://127.0.0.1:PORT: 10 copied (62.9 KiB, 10 on the server), 0 already there, 0 refreshed; 33 requests in N s
    "#]], expect![[""]]);
    assert_eq!(
        (server.count("GetObject"), server.count("PutObject")),
        (1, 1)
    );
    let objects = server.objects();
    let copies = objects
        .iter()
        .filter_map(|(key, body)| Some((key.strip_prefix("release/")?, body)));
    let originals = objects
        .iter()
        .filter(|(key, _)| !key.starts_with("release/"));
    let originals = originals.map(|(key, body)| (key.as_str(), body));
    assert!(copies.eq(originals));
    // The other bucket, as mode=min.
    let to = server
        .spec("mode=min")
        .replace("bucket=cache", "bucket=other");
    let run = copy(&[server.spec("")], &to).run();
    run.succeeds().prints(expect![[r#"
        copied 5 of 10 blobs (mode=min; mode=max copies all) from s3://cache/manifests/buildkit to s3://other/manifests/buildkit at http://127.0.0.1:PORT: 5 copied (30.1 KiB, 5 on the server), 0 already there, 0 refreshed; 28 requests in N s
    "#]], expect![[""]]);
    let manifest = &server.objects_in(OTHER_BUCKET)["manifests/buildkit"];
    assert_eq!(*manifest, s3_manifest("min.json"));
}

#[test]
fn between_endpoints_blobs_pass_through_verified() {
    let (from, to) = (exported(), Server::start());
    let program = || copy(&[from.spec("")], &to.spec("mode=max"));
    let run = program().args(["--dry-run", "--progress", "plain"]).run();
    run.succeeds().prints(expect![[r#"
        dry run: would copy 10 blobs from s3://cache/manifests/buildkit to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: would copy 10 (62.9 KiB), 0 already there, would refresh 0; 12 requests in N s
    "#]], expect![[r#"
        Ns reading the manifest
        Ns looking for blobs on S3
        Ns looking for blobs on S3
        Ns would copy sha256:01a37f800d030bb622b32a3aa014438f04bb5207297f713f966e0ae4dc5e1f0b (159 B)
        Ns would copy sha256:0d68a9c7a878208cd83549b2d815b496a7a54bc7898d03e01a4dc38f885120b8 (8.46 KiB)
        Ns would copy sha256:1538290aa3942dd8d0cb2147837b15b76bacf1fb75179c31710f2ce4a9ab2d4a (9.00 KiB)
        Ns would copy sha256:230a4b9dd0a461dbf8fdb958a9f425a53fbcd80184c6f09587938ee923aa9eda (8.51 KiB)
        Ns would copy sha256:662e50c29c1360b57af3adbf5fd1aed547ac1f0ec630a8e88f3624954cf7b9a0 (9.03 KiB)
        Ns would copy sha256:6e52fec599f1143ad9ca7bba3be69c6b1cd18e40154c8c03017e1fe2fbbd7317 (635 B)
        Ns would copy sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece (6.12 KiB)
        Ns would copy sha256:aa969215ace405520c7048a4522c13688572ca691e3f45fa6567b0ac1e97157f (8.98 KiB)
        Ns would copy sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2 (12.0 KiB)
        Ns would copy sha256:f898e33dc2c9e1987672cf111dd3909a8a2331a1c9c2490a329d25ab46c16d4f (90 B)
        Ns would write manifests/buildkit
    "#]]);
    assert_eq!(to.keys().len(), 0);
    program().run().succeeds().prints(expect![[r#"
        copied 10 blobs from s3://cache/manifests/buildkit to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 10 copied (62.9 KiB), 0 already there, 0 refreshed; 43 requests in N s
    "#]], expect![[""]]);
    assert_eq!(to.objects(), from.objects());
    program().run().succeeds().prints(expect![[r#"
        copied 10 blobs from s3://cache/manifests/buildkit to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 0 copied (0 B), 10 already there, 0 refreshed; 23 requests in N s
    "#]], expect![[""]]);
}

#[test]
fn where_the_server_refuses_to_copy_blobs_pass_through() {
    for code in ["AccessDenied", "NotImplemented"] {
        let status = if code == "AccessDenied" { 403 } else { 501 };
        let server = Server::builder().refuse("CopyObject", status, code).start();
        let spec = server.spec("mode=max");
        Program::export(&spec, &fixture("local-max"))
            .run()
            .succeeds();
        let run = copy(&[spec], &server.spec("mode=max,prefix=release/")).run();
        run.succeeds().says("10 copied (62.9 KiB), 0 already there");
        let objects = server.objects();
        assert_eq!(objects.len(), 22);
        for (key, body) in &objects {
            if let Some(original) = key.strip_prefix("release/") {
                assert_eq!(objects[original], body, "{code}");
            }
        }
    }
}

#[test]
fn blobs_that_are_there_stay_and_old_ones_are_refreshed() {
    let (from, to) = (exported(), exported());
    to.age_all(OLD);
    to.remove("manifests/buildkit");
    let run = copy(&[from.spec("")], &to.spec("mode=max")).run();
    run.succeeds().prints(expect![[r#"
        copied 10 blobs from s3://cache/manifests/buildkit to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 0 copied (0 B), 0 already there, 10 refreshed; 53 requests in N s
    "#]], expect![[""]]);
    assert_eq!(to.count("PutObject"), 1);
    assert_eq!(to.objects(), from.objects());
}

#[test]
fn a_blob_that_disappears_from_the_target_is_copied_again_before_the_manifest() {
    let (from, to) = (exported(), exported());
    let [kept, sent] = [0, 1].map(|n| to.keys()[n].clone());
    to.remove("manifests/buildkit");
    to.remove(&sent);
    to.before(
        0,
        move |request| request.operation == "PutObject" && request.key == sent,
        move |store| {
            store.remove(&kept);
        },
    );
    let run = copy(&[from.spec("")], &to.spec("mode=max")).run();
    run.succeeds().says("2 copied (");
    assert_eq!(to.objects(), from.objects());
}

#[test]
fn what_is_gone_is_left_out_and_a_damaged_blob_does_not_arrive() {
    let (from, to) = (exported(), Server::start());
    from.remove("blobs/sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece");
    let run = copy(&[from.spec("")], &to.spec("mode=max")).run();
    run.succeeds().prints(expect![[r#"
        copied 5 blobs from s3://cache/manifests/buildkit to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 5 copied (30.1 KiB), 0 already there, 0 refreshed; 33 requests in N s
    "#]], expect![[r#"
        warning: S3 lacks 1 blob of the cache (expired?): left out 5 results and 5 layers
    "#]]);
    assert_store_is_sound(&to, "after the copy");

    let key = "blobs/sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2";
    let mut bytes = from.objects()[key].to_vec();
    bytes[7] ^= 1;
    from.put(key, bytes);
    let empty = Server::start();
    let run = copy(&[from.spec("")], &empty.spec("mode=max")).run();
    run.ends_with(1).prints(expect![[""]], expect![[r#"
        warning: S3 lacks 1 blob of the cache (expired?): left out 5 results and 5 layers
        error: blob blobs/sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2 on S3 is damaged: its bytes hash to sha256:88695fd454ee20c4eb578946bda9be07e8cfcd141b962f57ebb90fad5acf0a8d; export the cache again with --verify-remote (copying 'buildkit' to s3://cache at http://127.0.0.1:PORT)
    "#]]);
    assert!(
        !empty
            .keys()
            .iter()
            .any(|k| k == key || k.starts_with("manifests/"))
    );
    let (other, target) = (exported(), Server::start());
    let run = copy(&[from.spec(""), other.spec("")], &target.spec("mode=max")).run();
    run.succeeds();
    assert_eq!(target.objects()[key], other.objects()[key]);
    assert_store_is_sound(&target, "with another source");
}

#[test]
fn all_is_copied_unless_the_spec_says_otherwise() {
    let server = exported();
    let run = copy(&[server.spec("")], &server.spec("name=b")).run();
    run.succeeds().prints(expect![[r#"
        copied 10 blobs from s3://cache/manifests/buildkit to s3://cache/manifests/b at http://127.0.0.1:PORT: 0 copied (0 B), 10 already there, 0 refreshed; 23 requests in N s
    "#]], expect![[""]]);
    let objects = server.objects();
    assert_eq!(objects["manifests/b"], objects["manifests/buildkit"]);
}

#[test]
fn a_cache_is_not_copied_onto_itself_but_may_be_merged_into() {
    let server = exported();
    let spec = server.spec("");
    for (from, to) in [("", ""), ("prefix=", "mode=min,name=buildkit;buildkit")] {
        let run = copy(&[server.spec(from)], &server.spec(to)).run();
        run.ends_with(2).prints(expect![[""]], expect![[r#"
            error: --cache-to: s3://cache/manifests/buildkit is the cache that --cache-from names: there is nothing to copy
        "#]]);
    }
    assert_eq!(server.log().len(), 0);

    Program::export(&server.spec("name=pr-7"), &fixture("local-multiarch"))
        .run()
        .succeeds();
    let merged = copy(&[spec.clone(), server.spec("name=pr-7")], &spec).run();
    merged.succeeds().prints(expect![[r#"
        copied 12 blobs from s3://cache/manifests/buildkit and s3://cache/manifests/pr-7 to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 0 copied (0 B), 12 already there, 0 refreshed; 29 requests in N s
    "#]], expect![[""]]);
    copy(
        std::slice::from_ref(&spec),
        &server.spec("name=buildkit;other"),
    )
    .run()
    .succeeds();
    assert_store_is_sound(&server, "after the copies");
    // The manifest stays where it is, but its blobs do not.
    let run = copy(&[spec], &server.spec("blobs_prefix=layers/")).run();
    run.succeeds().says("12 copied (");
}

#[test]
fn if_there_is_no_cache_nothing_is_written() {
    let server = Server::start();
    let run = copy(&[server.spec("name=none")], &server.spec("name=b")).run();
    run.ends_with(1).prints(
        expect![[""]],
        expect![[r#"
            error: there is no cache named 'none' (s3://cache/manifests/none); layercache ls lists those that are there
        "#]],
    );
    let from = [server.spec("name=none"), server.spec("name=neither")];
    copy(&from, &server.spec("name=b"))
        .run()
        .ends_with(1)
        .prints(
            expect![[""]],
            expect![[r#"
                warning: there is no cache named 'none' (s3://cache/manifests/none)
                warning: there is no cache named 'neither' (s3://cache/manifests/neither)
                error: there is no cache at any --cache-from
            "#]],
        );
    assert_eq!(server.keys().len(), 0);
}

fn layer(bytes: &[u8], parent: i64) -> Value {
    json!({"blob": Digest::of(bytes).to_string(), "parent": parent, "annotations": {
        "mediaType": "application/vnd.oci.image.layer.v1.tar", "size": bytes.len(),
        "diffID": Digest::of(bytes).to_string(), "createdAt": CREATED,
    }})
}

fn key(name: &str) -> String {
    Digest::of(name.as_bytes()).to_string()
}

/// Puts a cache there whose blobs are short texts.
fn put(server: &Server, name: &str, blobs: &[&str], manifest: &Value) {
    for blob in blobs {
        let digest = Digest::of(blob.as_bytes());
        server.put(&format!("blobs/{digest}"), blob.to_string());
    }
    server.put(&format!("manifests/{name}"), manifest.to_string());
}

/// A manifest with short names in place of digests.
fn shortened(manifest: &[u8], names: &[&str]) -> String {
    let mut text = format!(
        "{:#}",
        serde_json::from_slice::<Value>(manifest).expect("JSON")
    );
    for name in names {
        text = text.replace(&key(name), name);
    }
    text
}

#[test]
fn several_caches_become_one_as_buildkit_would_have_written_it() {
    let server = Server::start();
    let results = |layer: u64| json!([{"layer": layer, "createdAt": CREATED}]);
    // A source, a base on it, and what each branch builds on that.
    put(
        &server,
        "main",
        &["base", "main"],
        &json!({"layers": [layer(b"base", -1), layer(b"main", 0)], "records": [
            {"digest": key("source")},
            {"digest": key("run-base"), "layers": results(0), "inputs": [[{"link": 0}]]},
            {"digest": key("run-main"), "layers": results(1), "inputs": [[{"link": 1}]]},
        ]}),
    );
    put(
        &server,
        "branch",
        &["base", "branch"],
        &json!({"layers": [layer(b"branch", 1), layer(b"base", -1)], "records": [
            {"digest": key("run-branch"), "layers": results(0), "inputs": [[{"link": 1}]]},
            {"digest": key("run-base"), "layers": results(1), "inputs": [[{"link": 2}]]},
            {"digest": key("source")},
            {"digest": key("nothing-came-of-it"), "inputs": [[{"link": 2}]]},
        ]}),
    );
    let run = copy(
        &[server.spec("name=main"), server.spec("name=branch")],
        &server.spec("name=all,mode=max"),
    )
    .run();
    run.succeeds().prints(expect![[r#"
        copied 3 blobs from s3://cache/manifests/main and s3://cache/manifests/branch to s3://cache/manifests/all at http://127.0.0.1:PORT: 0 copied (0 B), 3 already there, 0 refreshed; 11 requests in N s
    "#]], expect![[""]]);
    let names = [
        "source",
        "run-base",
        "run-main",
        "run-branch",
        "base",
        "main",
        "branch",
    ];
    let merged = server.objects()["manifests/all"].clone();
    expect![[r#"
        {
          "layers": [
            {
              "blob": "main",
              "parent": 1,
              "annotations": {
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "diffID": "main",
                "size": 4,
                "createdAt": "2026-11-21T20:37:36.959076185Z"
              }
            },
            {
              "blob": "base",
              "parent": -1,
              "annotations": {
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "diffID": "base",
                "size": 4,
                "createdAt": "2026-11-21T20:37:36.959076185Z"
              }
            },
            {
              "blob": "branch",
              "parent": 1,
              "annotations": {
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "diffID": "branch",
                "size": 6,
                "createdAt": "2026-11-21T20:37:36.959076185Z"
              }
            }
          ],
          "records": [
            {
              "layers": [
                {
                  "layer": 1,
                  "createdAt": "2026-11-21T20:37:36.959076185Z"
                }
              ],
              "digest": "run-base",
              "inputs": [
                [
                  {
                    "link": 1
                  }
                ]
              ]
            },
            {
              "digest": "source"
            },
            {
              "layers": [
                {
                  "layer": 0,
                  "createdAt": "2026-11-21T20:37:36.959076185Z"
                }
              ],
              "digest": "run-main",
              "inputs": [
                [
                  {
                    "link": 0
                  }
                ]
              ]
            },
            {
              "layers": [
                {
                  "layer": 2,
                  "createdAt": "2026-11-21T20:37:36.959076185Z"
                }
              ],
              "digest": "run-branch",
              "inputs": [
                [
                  {
                    "link": 0
                  }
                ]
              ]
            }
          ]
        }"#]]
    .assert_eq(&shortened(&merged, &names));
    // In the other order it is the same cache.
    let from = [server.spec("name=branch"), server.spec("name=main")];
    copy(&from, &server.spec("name=again,mode=max"))
        .run()
        .succeeds();
    assert_eq!(server.objects()["manifests/again"], merged);
    // mode=min keeps what each build's own results need.
    let run = copy(&from, &server.spec("name=min,mode=min"))
        .run()
        .succeeds();
    run.says("copied 3 blobs");
    // Read back, it is a cache.
    let layout = tempfile::tempdir().expect("a temporary directory");
    let spec = server.spec("name=all");
    Program::import(&spec, layout.path()).run().succeeds();
}

#[test]
fn the_parts_of_a_matrix_build_merge_into_what_one_build_writes() {
    let server = exported();
    let spec = server.spec("mode=max,name=multi");
    Program::export(&spec, &fixture("local-multiarch"))
        .run()
        .succeeds();
    let from = [server.spec("name=multi"), server.spec("name=multi;other")];
    copy(&from, &server.spec("name=merged,mode=max"))
        .run()
        .succeeds();
    let objects = server.objects();
    assert_eq!(
        objects["manifests/merged"], objects["manifests/multi"],
        "merged with itself, a cache stays what it is"
    );
    assert_store_is_sound(&server, "after the merge");
}

#[test]
fn a_blob_over_the_limit_is_copied_in_parts_or_passes_through_in_parts() {
    for refuse in [false, true] {
        let mut builder = Server::builder().copy_limit(10_000).min_part(1000);
        if refuse {
            builder = builder.no_part_copy();
        }
        let server = builder.start();
        put_cache(&server, "buildkit", &[25_000, 500]);
        let mut inside = Inside::fast();
        inside.limits = Limits {
            multipart: 8000,
            part: 5000,
            copy: 10_000,
            copy_part: 5000,
            piece: 3000,
            ..Limits::default()
        };
        let task = inside::copy(&server.spec(""), &server.spec("prefix=p/,mode=max"));
        inside::runtime()
            .block_on(inside.run(&task))
            .expect("a copy");
        let large = format!("p/blobs/{}", Digest::of(&noise(1, 25_000)));
        assert_eq!(server.objects()[&large].len(), 25_000);
        assert_eq!(server.objects()[&large], noise(1, 25_000));
        let parts = match refuse {
            true => server.count("UploadPart"),
            false => server.count("UploadPartCopy"),
        };
        assert_eq!((parts, server.uploads()), (5, 0));
    }
}

#[test]
fn a_copy_that_fails_or_is_killed_at_any_request_leaves_nothing_wrong() {
    let from = exported();
    let undisturbed = Server::start();
    copy(&[from.spec("")], &undisturbed.spec("mode=max"))
        .run()
        .succeeds();
    let requests = undisturbed.log().len();
    for nth in 0..requests {
        let to = Server::start();
        let refused = Arc::new(OnceLock::new());
        let operation = Arc::clone(&refused);
        to.fail(move |asked: &Asked| {
            let fault = Fault::Status(403, "AccessDenied");
            (asked.index == nth && operation.set(asked.operation).is_ok()).then_some(fault)
        });
        let run = copy(&[from.spec("")], &to.spec("mode=max")).run();
        to.reset_faults();
        let refused = *refused.get().expect("the request comes");
        // Nobody needs the permission to list.
        assert!(
            run.code == Some(1) || refused.starts_with("List"),
            "request {nth}, {refused}: {}",
            run.stderr
        );
        assert_store_is_sound(&to, &format!("request {nth}"));
        copy(&[from.spec("")], &to.spec("mode=max"))
            .run()
            .succeeds();
        assert_eq!(to.objects(), undisturbed.objects(), "request {nth}");
    }
}

#[test]
fn the_metadata_file_says_what_was_copied_how() {
    let server = exported();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("metadata.json");
    copy(&[server.spec("")], &server.spec("mode=max,prefix=p/"))
        .args(["--metadata-file".as_ref(), file.as_os_str()])
        .run()
        .succeeds();
    let mut document = json_of(&file);
    document["results"][0]["seconds"] = 0.into();
    document["results"][0]["endpoint"] = "URL".into();
    expect![[r#"
        {
          "version": 1,
          "results": [
            {
              "command": "copy",
              "endpoint": "URL",
              "bucket": "cache",
              "names": [
                "buildkit"
              ],
              "keys": [
                "p/manifests/buildkit"
              ],
              "sources": [
                "s3://cache/manifests/buildkit"
              ],
              "dryRun": false,
              "transferred": 10,
              "present": 0,
              "refreshed": 0,
              "bytes": 64446,
              "onServer": 10,
              "leftOut": 0,
              "droppedLayers": 0,
              "droppedResults": 0,
              "requests": 33,
              "seconds": 0
            }
          ]
        }"#]]
    .assert_eq(&format!("{document:#}"));
}

fn json_of(file: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(file).expect("the file is there")).expect("JSON")
}
