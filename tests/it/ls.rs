//! `layercache ls`.

use std::time::Duration;

use expect_test::expect;

use crate::aftermath::{noise, put_cache};
use crate::program::{Program, Run, s3_manifest};
use crate::server::Server;
use layercache::cache::digest::Digest;

const HOUR: Duration = Duration::from_secs(3600);

fn ls(spec: &str, flags: &[&str]) -> Run {
    Program::new()
        .args(["ls", "--cache-from", spec])
        .args(flags)
        .run()
}

/// Three caches, of which two share blobs and one lacks some; and what is not a cache.
fn bucket() -> Server {
    let server = Server::start();
    put_cache(&server, "main", &[3_000_000, 200_000]);
    put_cache(&server, "feature/login", &[3_000_000, 200_000, 5_000]);
    server.put("manifests/broken", r#"{"layers": "none"}"#);
    server.put("manifests/gone", s3_manifest("max.json"));
    server.put(&format!("blobs/{}", Digest::of(b"orphan")), "orphan");
    server.put("readme.txt", "hello");
    server.age_all(50 * HOUR);
    server.age(
        &format!("blobs/{}", Digest::of(&noise(1, 3_000_000))),
        100 * HOUR,
    );
    server.change("manifests/main", |manifest| manifest.modified += 47 * HOUR);
    server
}

#[test]
fn a_table_shows_all_caches_and_what_else_there_is() {
    let server = bucket();
    ls(&server.spec("name=whatever"), &[])
        .succeeds()
        .prints(expect![[r#"
            name           written  layers      size    unique  oldest blob  missing
            feature/login  2 d ago       3  3.06 MiB  4.88 KiB      6 d ago        0
            gone           2 d ago      10  62.9 KiB  62.9 KiB            -       10
            main           3 h ago       2  3.05 MiB       0 B      6 d ago        0

            3 caches of 13 blobs (3.12 MiB) in s3://cache at http://127.0.0.1:PORT; 6 requests in N s
            no cache needs 1 blob (6 B)
            not part of these caches: 1 object (5 B)
            unreadable: manifests/broken: reading the cache manifest: invalid type: string "none", expected a sequence at line 1 column 17
        "#]], expect![[r#"
            Ns looking at the bucket
        "#]]);
}

#[test]
fn caches_are_chosen_by_name_and_sorted() {
    let server = bucket();
    let spec = server.spec("");
    ls(&spec, &["--name", "[fm]*", "--sort", "written"])
        .succeeds()
        .prints(
            expect![[r#"
                name           written  layers      size    unique  oldest blob  missing
                main           3 h ago       2  3.05 MiB       0 B      6 d ago        0
                feature/login  2 d ago       3  3.06 MiB  4.88 KiB      6 d ago        0

                2 caches of 3 blobs (3.06 MiB) in s3://cache at http://127.0.0.1:PORT; 6 requests in N s
                no cache needs 1 blob (6 B)
                not part of these caches: 1 object (5 B)
            "#]],
            expect![[r#"
            Ns looking at the bucket
        "#]],
        );
    ls(&spec, &["--sort=size"])
        .succeeds()
        .prints(expect![[r#"
            name           written  layers      size    unique  oldest blob  missing
            feature/login  2 d ago       3  3.06 MiB  4.88 KiB      6 d ago        0
            main           3 h ago       2  3.05 MiB       0 B      6 d ago        0
            gone           2 d ago      10  62.9 KiB  62.9 KiB            -       10

            3 caches of 13 blobs (3.12 MiB) in s3://cache at http://127.0.0.1:PORT; 6 requests in N s
            no cache needs 1 blob (6 B)
            not part of these caches: 1 object (5 B)
            unreadable: manifests/broken: reading the cache manifest: invalid type: string "none", expected a sequence at line 1 column 17
        "#]], expect![[r#"
            Ns looking at the bucket
        "#]]);
    ls(&spec, &["--name", "nothing/*"]).succeeds().prints(
        expect![[r#"
            no cache in s3://cache at http://127.0.0.1:PORT matches 'nothing/*'; 6 requests in N s
            no cache needs 1 blob (6 B)
            not part of these caches: 1 object (5 B)
        "#]],
        expect![[r#"
            Ns looking at the bucket
        "#]],
    );
    ls(&spec, &["--name", "[a"])
        .ends_with(2)
        .prints(expect![[""]], expect![[r#"
            error: invalid value '[a' for '--name <GLOB>': Pattern syntax error near position 0: invalid range pattern

            For more information, try '--help'.
        "#]]);
}

#[test]
fn json_has_the_same_and_more() {
    let server = Server::start();
    put_cache(&server, "main", &[300, 20]);
    server.remove(&format!("blobs/{}", Digest::of(&noise(2, 20))));
    server.put("manifests/broken", "");
    let epoch = std::time::SystemTime::UNIX_EPOCH;
    for key in server.keys() {
        server.change(&key, |object| object.modified = epoch + 500_000 * HOUR);
    }
    ls(&server.spec(""), &["--format=json"])
        .succeeds()
        .prints(expect![[r#"
            {
              "version": 1,
              "command": "ls",
              "endpoint": "http://127.0.0.1:PORT",
              "bucket": "cache",
              "caches": [
                {
                  "name": "main",
                  "key": "manifests/main",
                  "written": "2027-01-15T08:00:00Z",
                  "layers": 2,
                  "records": 2,
                  "results": 2,
                  "blobs": 2,
                  "bytes": 320,
                  "uniqueBytes": 320,
                  "oldestBlob": "2027-01-15T08:00:00Z",
                  "missingBlobs": 1,
                  "image": false
                }
              ],
              "unreferenced": {
                "blobs": 0,
                "bytes": 0
              },
              "other": {
                "objects": 0,
                "bytes": 0
              },
              "unreadable": [
                {
                  "key": "manifests/broken",
                  "reason": "manifests/broken is damaged: it is not JSON (EOF while parsing a value at line 1 column 0) (3 tries)"
                }
              ]
            }
        "#]], expect![[r#"
            Ns looking at the bucket
            Ns manifests/broken is damaged: it is not JSON (EOF while parsing a value at line 1 column 0), trying again (2 of 3)
            Ns manifests/broken is damaged: it is not JSON (EOF while parsing a value at line 1 column 0), trying again (3 of 3)
        "#]]);
}

#[test]
fn each_place_is_listed_once_whatever_names_its_specs_have() {
    let server = Server::start();
    put_cache(&server, "main", &[300]);
    server.age_all(HOUR);
    let elsewhere = server.spec("prefix=elsewhere/,name=a");
    let specs = [server.spec("name=a"), server.spec("name=b"), elsewhere];
    let run = Program::new()
        .arg("ls")
        .env("LAYERCACHE_CACHE_FROM", specs.join("\n"))
        .run();
    run.succeeds().prints(
        expect![[r#"
            name  written  layers   size  unique  oldest blob  missing
            main  1 h ago       1  300 B   300 B      1 h ago        0

            1 cache of 1 blob (300 B) in s3://cache at http://127.0.0.1:PORT; 3 requests in N s
            no caches in s3://cache/elsewhere/ at http://127.0.0.1:PORT; 2 requests in N s
        "#]],
        expect![[r#"
            Ns listing the caches of s3://cache at http://127.0.0.1:PORT (1 of 2)
            Ns looking at the bucket
            Ns listing the caches of s3://cache/elsewhere/ at http://127.0.0.1:PORT (2 of 2)
            Ns looking at the bucket
        "#]],
    );
}

#[test]
fn a_bucket_that_is_not_there_is_an_error() {
    let server = Server::start();
    let spec = server.spec("").replace("bucket=cache", "bucket=absent");
    ls(&spec, &[])
        .ends_with(1)
        .prints(expect![[""]], expect![[r#"
            Ns looking at the bucket
            error: http://127.0.0.1:PORT answered 404 NoSuchBucket, listing s3://absent; check bucket, region and endpoint_url
        "#]]);
}
