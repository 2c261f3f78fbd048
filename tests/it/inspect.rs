//! `layercache inspect`.

use expect_test::expect;

use crate::aftermath::put_cache;
use crate::program::{Program, Run, copy_of, fixture, s3_manifest};
use crate::server::Server;

const LEAF: &str = "blobs/sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece";

fn inspect(flags: &[&str]) -> Run {
    Program::new().arg("inspect").args(flags).run()
}

/// A cache of several stages that shares blobs with another one.
fn bucket() -> Server {
    let server = Server::start();
    Program::export(&server.spec("mode=max,name=main"), &fixture("local-max"))
        .run()
        .succeeds();
    server.put("manifests/feature/min", s3_manifest("min.json"));
    put_cache(&server, "unrelated", &[100]);
    server.put("manifests/broken", "[]");
    server.age_all(std::time::Duration::from_secs(3600 * 5));
    server
}

#[test]
fn a_tree_shows_the_layers_and_lines_below_it_the_rest() {
    let server = bucket();
    server.remove(LEAF);
    inspect(&["--cache-from", &server.spec("name=main")])
        .succeeds()
        .prints(expect![[r#"
            layer                                                                                 size  created              shared by  state
            └─ sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2        12.0 KiB  2026-11-21 20:37:36          1  ok
               sha256:f898e33dc2c9e1987672cf111dd3909a8a2331a1c9c2490a329d25ab46c16d4f            90 B  2026-11-21 20:37:36          1  ok
               ├─ sha256:6e52fec599f1143ad9ca7bba3be69c6b1cd18e40154c8c03017e1fe2fbbd7317        635 B  2026-11-21 20:37:36          1  ok
               │  sha256:aa969215ace405520c7048a4522c13688572ca691e3f45fa6567b0ac1e97157f     8.98 KiB  2026-11-21 20:37:37          1  ok
               │  sha256:0d68a9c7a878208cd83549b2d815b496a7a54bc7898d03e01a4dc38f885120b8     8.46 KiB  2026-11-21 20:37:37          1  ok
               └─ sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece     6.12 KiB  2026-11-21 20:37:36          0  MISSING
                  sha256:1538290aa3942dd8d0cb2147837b15b76bacf1fb75179c31710f2ce4a9ab2d4a     9.00 KiB  2026-11-21 20:37:36          0  ok
                  ├─ sha256:01a37f800d030bb622b32a3aa014438f04bb5207297f713f966e0ae4dc5e1f0b     159 B  2026-11-21 20:37:36          0  ok
                  │  sha256:662e50c29c1360b57af3adbf5fd1aed547ac1f0ec630a8e88f3624954cf7b9a0  9.03 KiB  2026-11-21 20:37:37          0  ok
                  └─ sha256:230a4b9dd0a461dbf8fdb958a9f425a53fbcd80184c6f09587938ee923aa9eda  8.51 KiB  2026-11-21 20:37:37          0  ok

            'main' in s3://cache/manifests/main at http://127.0.0.1:PORT, written 5 h ago; 16 requests in N s
            10 layers, 14 records, 10 results; 10 blobs (62.9 KiB)
            mode=min would keep 5 layers, 5 results; 5 blobs (30.1 KiB)
            shares 5 blobs (30.1 KiB) with 'feature/min'; 32.8 KiB in no other cache
            1 other manifest could not be read, and may share more
            missing: 1 blob
        "#]], expect![[r#"
            Ns reading the manifest
            Ns looking for blobs on S3
            Ns reading the other manifests
        "#]]);
    inspect(&["-v", "--cache-from", &server.spec("name=unrelated")])
        .succeeds()
        .prints(expect![[r#"
            layer                                                                        size  created              shared by  state  diffID
            └─ sha256:1fbe0eb2ee7a2b2bb61f66defb77b0e9f513458af8a7f9f13c1e8f4b3fda0bb6  100 B  2026-11-21 20:37:36          0  ok     sha256:1fbe0eb2ee7a2b2bb61f66defb77b0e9f513458af8a7f9f13c1e8f4b3fda0bb6

            'unrelated' in s3://cache/manifests/unrelated at http://127.0.0.1:PORT, written 5 h ago; 7 requests in N s
            1 layer, 1 record, 1 result; 1 blob (100 B)
            mode=min would keep 1 layer, 1 result; 1 blob (100 B)
            1 other manifest could not be read, and may share more
        "#]], expect![[r#"
            Ns reading the manifest
            Ns looking for blobs on S3
            Ns reading the other manifests
        "#]]);
}

#[test]
fn json_has_a_document_for_each_spec() {
    let server = Server::start();
    put_cache(&server, "a", &[100]);
    put_cache(&server, "b", &[100, 20]);
    let epoch = std::time::SystemTime::UNIX_EPOCH;
    for key in server.keys() {
        server.change(&key, |object| {
            object.modified = epoch + std::time::Duration::from_secs(1_800_000_000);
        });
    }
    let (a, b) = (server.spec("name=a"), server.spec("name=b"));
    let flags = ["--cache-from", &a, "--cache-from", &b, "--format", "json"];
    inspect(&flags)
        .succeeds()
        .prints(expect![[r#"
            {
              "version": 1,
              "command": "inspect",
              "endpoint": "http://127.0.0.1:PORT",
              "bucket": "cache",
              "names": [
                "a"
              ],
              "keys": [
                "manifests/a"
              ],
              "written": "2027-01-15T08:00:00Z",
              "layers": [
                {
                  "blob": "sha256:1fbe0eb2ee7a2b2bb61f66defb77b0e9f513458af8a7f9f13c1e8f4b3fda0bb6",
                  "diffID": "sha256:1fbe0eb2ee7a2b2bb61f66defb77b0e9f513458af8a7f9f13c1e8f4b3fda0bb6",
                  "mediaType": "application/vnd.oci.image.layer.v1.tar",
                  "size": 100,
                  "created": "2026-11-21T20:37:36.959076185Z",
                  "parent": null,
                  "state": "ok",
                  "sharedBy": 1
                }
              ],
              "records": 1,
              "results": 1,
              "blobs": 1,
              "bytes": 100,
              "uniqueBytes": 0,
              "image": false,
              "min": {
                "layers": 1,
                "results": 1,
                "blobs": 1,
                "bytes": 100
              },
              "sharedWith": [
                {
                  "name": "b",
                  "blobs": 1,
                  "bytes": 100
                }
              ],
              "unreadable": 0,
              "missing": [],
              "wrongSize": []
            }
            {
              "version": 1,
              "command": "inspect",
              "endpoint": "http://127.0.0.1:PORT",
              "bucket": "cache",
              "names": [
                "b"
              ],
              "keys": [
                "manifests/b"
              ],
              "written": "2027-01-15T08:00:00Z",
              "layers": [
                {
                  "blob": "sha256:0832a0525708629f173c6d97388c2520a5f2b1f1f99df095e0fd6c2b3d7074e2",
                  "diffID": "sha256:0832a0525708629f173c6d97388c2520a5f2b1f1f99df095e0fd6c2b3d7074e2",
                  "mediaType": "application/vnd.oci.image.layer.v1.tar",
                  "size": 20,
                  "created": "2026-11-21T20:37:36.959076185Z",
                  "parent": null,
                  "state": "ok",
                  "sharedBy": 0
                },
                {
                  "blob": "sha256:1fbe0eb2ee7a2b2bb61f66defb77b0e9f513458af8a7f9f13c1e8f4b3fda0bb6",
                  "diffID": "sha256:1fbe0eb2ee7a2b2bb61f66defb77b0e9f513458af8a7f9f13c1e8f4b3fda0bb6",
                  "mediaType": "application/vnd.oci.image.layer.v1.tar",
                  "size": 100,
                  "created": "2026-11-21T20:37:36.959076185Z",
                  "parent": null,
                  "state": "ok",
                  "sharedBy": 1
                }
              ],
              "records": 2,
              "results": 2,
              "blobs": 2,
              "bytes": 120,
              "uniqueBytes": 20,
              "image": false,
              "min": {
                "layers": 2,
                "results": 2,
                "blobs": 2,
                "bytes": 120
              },
              "sharedWith": [
                {
                  "name": "a",
                  "blobs": 1,
                  "bytes": 100
                }
              ],
              "unreadable": 0,
              "missing": [],
              "wrongSize": []
            }
        "#]], expect![[r#"
            Ns inspecting 'a' in s3://cache at http://127.0.0.1:PORT (1 of 2)
            Ns reading the manifest
            Ns looking for blobs on S3
            Ns reading the other manifests
            Ns inspecting 'b' in s3://cache at http://127.0.0.1:PORT (2 of 2)
            Ns reading the manifest
            Ns looking for blobs on S3
            Ns reading the other manifests
        "#]]);
}

#[test]
fn a_layout_is_inspected_in_the_same_way() {
    let layout = copy_of(&fixture("image-inline"));
    let server = Server::start();
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .run()
        .succeeds();
    Program::import(&server.spec(""), layout.path())
        .args(["--tag", "cache"])
        .run()
        .succeeds();
    let path = layout.path().display().to_string();
    inspect(&[&path])
        .succeeds()
        .prints(expect![[r#"
            layer                                                                           size  created              shared by  state
            └─ sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2  12.0 KiB  2026-11-21 20:37:36          1  ok
               sha256:f898e33dc2c9e1987672cf111dd3909a8a2331a1c9c2490a329d25ab46c16d4f      90 B  2026-11-21 20:37:36          1  ok
               sha256:6e52fec599f1143ad9ca7bba3be69c6b1cd18e40154c8c03017e1fe2fbbd7317     635 B  2026-11-21 20:37:36          1  ok
               sha256:aa969215ace405520c7048a4522c13688572ca691e3f45fa6567b0ac1e97157f  8.98 KiB  2026-11-21 20:37:37          1  ok
               sha256:0d68a9c7a878208cd83549b2d815b496a7a54bc7898d03e01a4dc38f885120b8  8.46 KiB  2026-11-21 20:37:37          1  ok

            sha256:00afeaf117419cda1c679efc7c21a51d9cda419781b1e754014f68a7042c9668 in TMP; N s
            5 layers, 14 records, 5 results; 7 blobs (35.9 KiB), which also make an image
            mode=min would keep 5 layers, 5 results; 7 blobs (35.9 KiB)
            shares 5 blobs (30.1 KiB) with 'cache'; 5.73 KiB in no other cache
        "#]], expect![[r#"
            Ns reading the layout
        "#]]);
    inspect(&["--tag=cache", &path])
        .succeeds()
        .prints(expect![[r#"
            layer                                                                                 size  created              shared by  state
            └─ sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2        12.0 KiB  2026-11-21 20:37:36          1  ok
               sha256:f898e33dc2c9e1987672cf111dd3909a8a2331a1c9c2490a329d25ab46c16d4f            90 B  2026-11-21 20:37:36          1  ok
               ├─ sha256:6e52fec599f1143ad9ca7bba3be69c6b1cd18e40154c8c03017e1fe2fbbd7317        635 B  2026-11-21 20:37:36          1  ok
               │  sha256:aa969215ace405520c7048a4522c13688572ca691e3f45fa6567b0ac1e97157f     8.98 KiB  2026-11-21 20:37:37          1  ok
               │  sha256:0d68a9c7a878208cd83549b2d815b496a7a54bc7898d03e01a4dc38f885120b8     8.46 KiB  2026-11-21 20:37:37          1  ok
               └─ sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece     6.12 KiB  2026-11-21 20:37:36          0  ok
                  sha256:1538290aa3942dd8d0cb2147837b15b76bacf1fb75179c31710f2ce4a9ab2d4a     9.00 KiB  2026-11-21 20:37:36          0  ok
                  ├─ sha256:01a37f800d030bb622b32a3aa014438f04bb5207297f713f966e0ae4dc5e1f0b     159 B  2026-11-21 20:37:36          0  ok
                  │  sha256:662e50c29c1360b57af3adbf5fd1aed547ac1f0ec630a8e88f3624954cf7b9a0  9.03 KiB  2026-11-21 20:37:37          0  ok
                  └─ sha256:230a4b9dd0a461dbf8fdb958a9f425a53fbcd80184c6f09587938ee923aa9eda  8.51 KiB  2026-11-21 20:37:37          0  ok

            sha256:3ad8fd726190cfb2a0575cbc1a775dfb7a14653b764c594dba744cf2e69744ad in TMP; N s
            10 layers, 14 records, 10 results; 10 blobs (62.9 KiB)
            mode=min would keep 5 layers, 5 results; 5 blobs (30.1 KiB)
            shares 5 blobs (30.1 KiB) with 'latest'; 32.8 KiB in no other cache
        "#]], expect![[r#"
            Ns reading the layout
        "#]]);
    inspect(&["--tag=none", &path])
        .ends_with(1)
        .prints(expect![[""]], expect![[r#"
            Ns reading the layout
            error: inspecting TMP: cannot choose from TMP/index.json: no tag "none": it has tag "latest" (sha256:00afeaf117419cda1c679efc7c21a51d9cda419781b1e754014f68a7042c9668), tag "cache" (sha256:3ad8fd726190cfb2a0575cbc1a775dfb7a14653b764c594dba744cf2e69744ad)
        "#]]);
}

#[test]
fn a_cache_that_is_not_there_or_cannot_be_read_is_an_error() {
    let server = bucket();
    for name in ["absent", "broken"] {
        let spec = server.spec(&format!("name={name}"));
        let expected = match name {
            "absent" => expect![[r#"
                Ns reading the manifest
                error: there is no cache named 'absent'; layercache ls lists those that are there (inspecting 'absent' in s3://cache at http://127.0.0.1:PORT)
            "#]],
            _ => expect![[r#"
                Ns reading the manifest
                error: the manifest manifests/broken is damaged: reading the cache manifest: it is not a JSON object (inspecting 'broken' in s3://cache at http://127.0.0.1:PORT)
            "#]],
        };
        inspect(&["--cache-from", &spec])
            .ends_with(1)
            .prints(expect![[""]], expected);
    }
}

#[test]
fn without_the_permission_to_list_only_the_sharing_is_unknown() {
    let server = Server::builder().no_list().start();
    put_cache(&server, "a", &[100]);
    inspect(&["--cache-from", &server.spec("name=a")])
        .succeeds()
        .prints(expect![[r#"
            layer                                                                        size  created              shared by  state
            └─ sha256:1fbe0eb2ee7a2b2bb61f66defb77b0e9f513458af8a7f9f13c1e8f4b3fda0bb6  100 B  2026-11-21 20:37:36          -  ok

            'a' in s3://cache/manifests/a at http://127.0.0.1:PORT; 3 requests in N s
            1 layer, 1 record, 1 result; 1 blob (100 B)
            mode=min would keep 1 layer, 1 result; 1 blob (100 B)
        "#]], expect![[r#"
            Ns reading the manifest
            Ns looking for blobs on S3
            Ns reading the other manifests
            warning: cannot tell what other caches share: http://127.0.0.1:PORT answered 403 AccessDenied (The test server was built to refuse this.), listing s3://cache
        "#]]);
    let run = inspect(&["--cache-from", &server.spec("name=a"), "--format", "json"]).succeeds();
    let document: serde_json::Value = serde_json::from_str(&run.stdout).expect("JSON");
    let unknown = [
        &document["layers"][0]["sharedBy"],
        &document["uniqueBytes"],
        &document["sharedWith"],
        &document["unreadable"],
    ];
    assert!(unknown.iter().all(|field| field.is_null()), "{document:#}");
    let fields = document.as_object().expect("an object");
    assert!(fields.contains_key("uniqueBytes"), "{document:#}");
}

#[test]
fn a_name_in_place_of_a_layout_is_told_where_it_belongs() {
    inspect(&["app", "-q"])
        .ends_with(1)
        .prints(expect![[""]], expect![[r#"
            error: inspecting app: no OCI layout at app: no such directory; a cache on S3 is named in its spec: --cache-from ...,name=...
        "#]]);
}

#[test]
fn a_layout_and_a_spec_exclude_each_other() {
    let server = Server::start();
    inspect(&["--cache-from", &server.spec(""), "somewhere"])
        .ends_with(2)
        .prints(
            expect![[""]],
            expect![[r#"
            error: the argument '--cache-from <SPEC>' cannot be used with '[LAYOUT]'

            Usage: layercache inspect --cache-from <SPEC> [LAYOUT]

            For more information, try '--help'.
        "#]],
        );
    inspect(&["--tag", "latest", "--cache-from", &server.spec("")])
        .ends_with(2)
        .prints(
            expect![[""]],
            expect![[r#"
            error: --tag and --digest choose from a LAYOUT, but none is given
        "#]],
        );
}
