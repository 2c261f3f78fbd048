//! `layercache verify`.

use std::path::Path;
use std::time::Duration;

use expect_test::expect;
use layercache::cache::digest::Digest;
use serde_json::Value;

use crate::aftermath::{assert_store_is_sound, noise, put_cache};
use crate::program::{Program, Run, copy_of, files, fixture, s3_manifest};
use crate::server::{Fault, Server, Stored};

const LEAF: &str = "blobs/sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece";
const ROOT: &str = "blobs/sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2";

fn program(flags: &[&str]) -> Program {
    Program::new().arg("verify").args(flags)
}

fn verify(server: &Server, flags: &[&str]) -> Run {
    program(&["--cache-from", &server.spec("")])
        .args(flags)
        .run()
        .without_blobs()
}

/// Two caches, of which the smaller needs half of the blobs of the larger.
fn bucket() -> Server {
    let server = Server::start();
    Program::export(&server.spec("mode=max,name=max"), &fixture("local-max"))
        .run()
        .succeeds();
    server.put("manifests/feature/min", s3_manifest("min.json"));
    server.clear_log();
    server
}

fn damage(server: &Server, key: &str) {
    let size = server.objects()[key].len();
    server.put(key, vec![7; size]);
}

#[test]
fn whole_caches_are_ok() {
    let server = bucket();
    verify(&server, &[]).succeeds().prints(
        expect![[r#"
            name         blobs      size  missing  damaged  wrong size  verdict
            feature/min      5  30.1 KiB        0        -           0  ok
            max             10  62.9 KiB        0        -           0  ok

            looked for the blobs of 2 caches in s3://cache at http://127.0.0.1:PORT, 10 blobs (62.9 KiB); 13 requests in N s
        "#]],
        expect![[r#"
            Ns reading the manifests
            Ns looking for blobs on S3
        "#]],
    );
    verify(&server, &["--deep"]).succeeds().prints(
        expect![[r#"
            name         blobs      size  missing  damaged  wrong size  verdict
            feature/min      5  30.1 KiB        0        0           0  ok
            max             10  62.9 KiB        0        0           0  ok

            hashed the blobs of 2 caches in s3://cache at http://127.0.0.1:PORT, 10 blobs (62.9 KiB); 23 requests in N s
        "#]],
        expect![[r#"
            Ns reading the manifests
            Ns looking for blobs on S3
            Ns verifying (10 blobs, 62.9 KiB)
        "#]],
    );
    verify(&Server::start(), &[]).succeeds().prints(
        expect![[r#"
            looked for the blobs of 0 caches in s3://cache at http://127.0.0.1:PORT, 0 blobs (0 B); 1 request in N s
        "#]],
        expect![[r#"
            Ns reading the manifests
            Ns looking for blobs on S3
        "#]],
    );
}

#[test]
fn what_is_wrong_is_listed_and_fails_the_run() {
    let server = bucket();
    server.remove(ROOT);
    server.put(LEAF, "short");
    server.put("manifests/broken", r#"{"layers": 1}"#);
    verify(&server, &[])
        .ends_with(1)
        .prints(expect![[r#"
            name         blobs      size  missing  damaged  wrong size  verdict
            broken           0       0 B        0        -           0  UNREADABLE
            feature/min      5  30.1 KiB        1        -           0  BROKEN
            max             10  62.9 KiB        1        -           1  BROKEN

            looked for the blobs of 3 caches in s3://cache at http://127.0.0.1:PORT, 10 blobs (62.9 KiB); 14 requests in N s
            broken is unreadable: reading the cache manifest: invalid type: integer `1`, expected a sequence at line 1 column 12
            feature/min: 1 blob, missing:
              sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2
            max: 1 blob, missing:
              sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2
            max: 1 blob, wrong size:
              sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece
        "#]], expect![[r#"
            Ns reading the manifests
            Ns looking for blobs on S3
            error: 3 of 3 caches in s3://cache at http://127.0.0.1:PORT are not whole; --repair fixes those whose manifests can be read
        "#]]);
    verify(&server, &["--format=json"])
        .ends_with(1)
        .prints(expect![[r#"
            {
              "version": 1,
              "command": "verify",
              "endpoint": "http://127.0.0.1:PORT",
              "bucket": "cache",
              "caches": [
                {
                  "name": "broken",
                  "key": "manifests/broken",
                  "ok": false,
                  "missing": [],
                  "damaged": [],
                  "wrongSize": [],
                  "unreadable": "reading the cache manifest: invalid type: integer `1`, expected a sequence at line 1 column 12"
                },
                {
                  "name": "feature/min",
                  "key": "manifests/feature/min",
                  "ok": false,
                  "missing": [
                    "sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2"
                  ],
                  "damaged": [],
                  "wrongSize": []
                },
                {
                  "name": "max",
                  "key": "manifests/max",
                  "ok": false,
                  "missing": [
                    "sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2"
                  ],
                  "damaged": [],
                  "wrongSize": [
                    "sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece"
                  ]
                }
              ],
              "blobs": 10,
              "bytes": 64446,
              "deep": false,
              "removed": 0
            }
        "#]], expect![[r#"
            Ns reading the manifests
            Ns looking for blobs on S3
            error: 3 of 3 caches in s3://cache at http://127.0.0.1:PORT are not whole; --repair fixes those whose manifests can be read
        "#]]);
}

#[test]
fn a_glob_chooses_the_caches_that_are_verified() {
    let server = bucket();
    server.remove(LEAF);
    server.put("manifests/broken", r#"{"layers": 1}"#);
    let quiet = |flags: &[&str]| verify(&server, &[flags, &["-q"]].concat());
    quiet(&["--name", "feature/*"])
        .succeeds()
        .prints(expect![[r#"
            name         blobs      size  missing  damaged  wrong size  verdict
            feature/min      5  30.1 KiB        0        -           0  ok

            looked for the blobs of 1 cache in s3://cache at http://127.0.0.1:PORT, 5 blobs (30.1 KiB); 9 requests in N s
        "#]], expect![[""]]);
    quiet(&["--name", "max"])
        .ends_with(1)
        .prints(expect![[r#"
            name  blobs      size  missing  damaged  wrong size  verdict
            max      10  62.9 KiB        1        -           0  BROKEN

            looked for the blobs of 1 cache in s3://cache at http://127.0.0.1:PORT, 10 blobs (62.9 KiB); 14 requests in N s
            max: 1 blob, missing:
              sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece
        "#]], expect![[r#"
            error: 1 of 1 cache in s3://cache at http://127.0.0.1:PORT is not whole; --repair fixes those whose manifests can be read
        "#]]);
    quiet(&["--name", "feature"])
        .ends_with(1)
        .prints(expect![[r#"
            looked for the blobs of 0 caches in s3://cache at http://127.0.0.1:PORT, 0 blobs (0 B); 4 requests in N s
        "#]], expect![[r#"
            error: no cache in s3://cache at http://127.0.0.1:PORT matches 'feature'
        "#]]);
    program(&["--name", "max", "somewhere"])
        .run()
        .ends_with(2)
        .prints(
            expect![[""]],
            expect![[r#"
            error: the argument '--name <GLOB>' cannot be used with '[LAYOUT]'

            Usage: layercache verify --name <GLOB> [LAYOUT]

            For more information, try '--help'.
        "#]],
        );
}

#[test]
fn a_repair_rewrites_only_the_chosen_caches_and_keeps_what_others_need() {
    let server = bucket();
    damage(&server, LEAF);
    damage(&server, ROOT);
    let other = server.objects()["manifests/feature/min"].clone();
    let flags = ["--deep", "--repair", "--name", "max", "-q"];
    verify(&server, &flags)
        .ends_with(1)
        .prints(expect![[r#"
            name  blobs      size  missing  damaged  wrong size  verdict
            max      10  62.9 KiB        0        2           0  repaired

            hashed the blobs of 1 cache in s3://cache at http://127.0.0.1:PORT, 10 blobs (62.9 KiB); 50 requests in N s
            max: 2 blobs, damaged:
              sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece
              sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2
            max: repaired, without 10 layers and 10 results
            1 damaged object: deleted
        "#]], expect![[r#"
            warning: sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2 is damaged and stays: a cache still needs it
            error: 1 damaged object could not be deleted from s3://cache at http://127.0.0.1:PORT
        "#]]);
    let objects = server.objects();
    assert_eq!(objects["manifests/feature/min"], other);
    assert!(objects.contains_key(ROOT) && !objects.contains_key(LEAF));
    // Then the rest.
    verify(&server, &["--deep", "--repair", "-q"]).succeeds();
    assert!(!server.objects().contains_key(ROOT));
}

#[test]
fn only_a_deep_look_finds_wrong_bytes_and_a_hiccup_of_the_network_is_none() {
    let server = bucket();
    server.fail({
        let once = std::sync::atomic::AtomicBool::new(false);
        move |asked| {
            let flips = asked.operation == "GetObject"
                && asked.key == ROOT
                && !once.swap(true, std::sync::atomic::Ordering::Relaxed);
            flips.then_some(Fault::FlipByte(3))
        }
    });
    damage(&server, LEAF);
    verify(&server, &[]).succeeds();
    verify(&server, &["--deep"])
        .ends_with(1)
        .prints(expect![[r#"
            name         blobs      size  missing  damaged  wrong size  verdict
            feature/min      5  30.1 KiB        0        0           0  ok
            max             10  62.9 KiB        0        1           0  BROKEN

            hashed the blobs of 2 caches in s3://cache at http://127.0.0.1:PORT, 10 blobs (62.9 KiB); 28 requests in N s
            max: 1 blob, damaged:
              sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece
        "#]], expect![[r#"
            Ns reading the manifests
            Ns looking for blobs on S3
            Ns verifying (10 blobs, 62.9 KiB)
            error: 1 of 2 caches in s3://cache at http://127.0.0.1:PORT is not whole; --repair fixes those whose manifests can be read
        "#]]);
}

#[test]
fn a_repair_leaves_caches_that_a_build_can_use_and_deletes_what_is_damaged() {
    let server = bucket();
    let absent = "blobs/sha256:6e52fec599f1143ad9ca7bba3be69c6b1cd18e40154c8c03017e1fe2fbbd7317";
    server.remove(absent);
    damage(&server, LEAF);
    server.put("manifests/broken", "{}x");
    verify(&server, &["--deep", "--repair"])
        .ends_with(1)
        .prints(expect![[r#"
            name         blobs      size  missing  damaged  wrong size  verdict
            broken           0       0 B        0        0           0  UNREADABLE
            feature/min      5  30.1 KiB        1        0           0  repaired
            max             10  62.9 KiB        1        1           0  repaired

            hashed the blobs of 3 caches in s3://cache at http://127.0.0.1:PORT, 10 blobs (62.9 KiB); 58 requests in N s
            broken is unreadable: manifests/broken is damaged: it is not JSON (trailing characters at line 1 column 3) (3 tries)
            feature/min: 1 blob, missing:
              sha256:6e52fec599f1143ad9ca7bba3be69c6b1cd18e40154c8c03017e1fe2fbbd7317
            feature/min: repaired, without 3 layers and 3 results
            max: 1 blob, missing:
              sha256:6e52fec599f1143ad9ca7bba3be69c6b1cd18e40154c8c03017e1fe2fbbd7317
            max: 1 blob, damaged:
              sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece
            max: repaired, without 8 layers and 8 results
            1 damaged object: deleted
        "#]], expect![[r#"
            Ns reading the manifests
            Ns manifests/broken is damaged: it is not JSON (trailing characters at line 1 column 3), trying again (2 of 3)
            Ns manifests/broken is damaged: it is not JSON (trailing characters at line 1 column 3), trying again (3 of 3)
            Ns looking for blobs on S3
            Ns verifying (9 blobs, 62.3 KiB)
            Ns repairing
            Ns wrote manifests/feature/min
            Ns wrote manifests/max
            error: 1 of 3 caches in s3://cache at http://127.0.0.1:PORT is not whole
        "#]]);
    server.remove("manifests/broken");
    assert_store_is_sound(&server, "repaired");
    assert!(!server.keys().contains(&LEAF.to_owned()));
    verify(&server, &["--deep"]).succeeds();
    let layout = tempfile::tempdir().expect("a temporary directory");
    Program::import(&server.spec("name=max"), layout.path())
        .args(["--require", "--missing=error"])
        .run()
        .succeeds();

    // The next export sends what was deleted.
    Program::export(&server.spec("mode=max,name=max"), &fixture("local-max"))
        .run()
        .succeeds()
        .says("2 uploaded");
    assert_store_is_sound(&server, "exported again");
    assert_eq!(server.objects()["manifests/max"], s3_manifest("max.json"));
}

#[test]
fn a_repair_in_json_says_what_was_found_and_what_it_took_away() {
    let server = bucket();
    server.remove(LEAF);
    server.put(ROOT, "wrong");
    server.put(
        &format!("blobs/{}", Digest::of(b"orphan")),
        "damaged, but nobody's",
    );
    verify(&server, &["--repair", "--format=json"])
        .succeeds()
        .prints(
            expect![[r#"
                {
                  "version": 1,
                  "command": "verify",
                  "endpoint": "http://127.0.0.1:PORT",
                  "bucket": "cache",
                  "caches": [
                    {
                      "name": "feature/min",
                      "key": "manifests/feature/min",
                      "ok": true,
                      "missing": [],
                      "damaged": [],
                      "wrongSize": [
                        "sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2"
                      ],
                      "repaired": {
                        "layers": 5,
                        "results": 5
                      }
                    },
                    {
                      "name": "max",
                      "key": "manifests/max",
                      "ok": true,
                      "missing": [
                        "sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece"
                      ],
                      "damaged": [],
                      "wrongSize": [
                        "sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2"
                      ],
                      "repaired": {
                        "layers": 10,
                        "results": 10
                      }
                    }
                  ],
                  "blobs": 10,
                  "bytes": 64446,
                  "deep": false,
                  "removed": 1
                }
            "#]],
            expect![[r#"
                Ns reading the manifests
                Ns looking for blobs on S3
                Ns repairing
                Ns wrote manifests/feature/min
                Ns wrote manifests/max
            "#]],
        );
    assert_store_is_sound_but_for_orphans(&server);
    assert!(!server.keys().contains(&ROOT.to_owned()));
}

#[track_caller]
fn assert_store_is_sound_but_for_orphans(server: &Server) {
    server.remove(&format!("blobs/{}", Digest::of(b"orphan")));
    assert_store_is_sound(server, "repaired");
}

#[test]
fn a_manifest_that_is_replaced_during_its_repair_is_repaired_as_it_is_then() {
    let server = bucket();
    server.remove("manifests/feature/min");
    server.remove(LEAF);
    // Read to verify, read to repair, and read again right before it is written.
    server.before(
        2,
        |request| request.operation == "GetObject" && request.key == "manifests/max",
        |store| store.put("manifests/max", s3_manifest("min.json")),
    );
    verify(&server, &["--repair"]).succeeds().prints(
        expect![[r#"
            name  blobs      size  missing  damaged  wrong size  verdict
            max      10  62.9 KiB        1        -           0  ok

            looked for the blobs of 1 cache in s3://cache at http://127.0.0.1:PORT, 10 blobs (62.9 KiB); 30 requests in N s
            max: 1 blob, missing:
              sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece
        "#]],
        expect![[r#"
            Ns reading the manifests
            Ns looking for blobs on S3
            Ns repairing
            Ns max: replaced meanwhile; looking again
        "#]],
    );
    assert_eq!(server.objects()["manifests/max"], s3_manifest("min.json"));
}

#[test]
fn a_blob_that_is_replaced_during_the_repair_is_not_deleted() {
    // Whichever HEAD it is replaced before: the survey's comes first, then two around the second
    // reading, two of the repair, and one before it would be deleted.
    for nth in 1..=5 {
        let server = bucket();
        let good = server.objects()[LEAF].clone();
        damage(&server, LEAF);
        let healed = good.clone();
        server.before(
            nth,
            |request| request.operation == "HeadObject" && request.key == LEAF,
            move |store| store.put(LEAF, healed),
        );
        verify(&server, &["--deep", "--repair"]).succeeds();
        assert_eq!(server.objects()[LEAF], good, "{nth}");
        let is_whole = server.objects()["manifests/max"] == s3_manifest("max.json");
        assert_eq!(is_whole, nth < 5, "{nth}");
    }
}

#[test]
fn a_damaged_object_stays_while_an_export_that_relies_on_it_goes_on() {
    let server = bucket();
    damage(&server, LEAF);
    // Another exporter found the blob "already there", and writes its manifest right after the repair.
    server.after(
        0,
        |request| request.operation == "PutObject" && request.key == "manifests/max",
        |store| store.put("manifests/late", s3_manifest("max.json")),
    );
    verify(&server, &["--deep", "--repair"]).succeeds();
    let objects = server.objects();
    assert!(!objects.contains_key(LEAF));
    assert_eq!(objects["manifests/late"], objects["manifests/max"]);
    assert_store_is_sound(&server, "repaired");
}

#[test]
fn what_may_not_be_deleted_or_written_is_told_and_fails_the_run() {
    let server = Server::builder().undeletable("blobs/").start();
    put_cache(&server, "main", &[100, 200]);
    damage(&server, &format!("blobs/{}", Digest::of(&noise(1, 100))));
    verify(&server, &["--deep", "--repair"])
        .ends_with(1)
        .prints(expect![[r#"
            name  blobs   size  missing  damaged  wrong size  verdict
            main      2  300 B        0        1           0  repaired

            hashed the blobs of 1 cache in s3://cache at http://127.0.0.1:PORT, 2 blobs (300 B); 19 requests in N s
            main: 1 blob, damaged:
              sha256:1fbe0eb2ee7a2b2bb61f66defb77b0e9f513458af8a7f9f13c1e8f4b3fda0bb6
            main: repaired, without 1 layer and 1 result
        "#]], expect![[r#"
            Ns reading the manifests
            Ns looking for blobs on S3
            Ns verifying (2 blobs, 300 B)
            Ns repairing
            Ns wrote manifests/main
            warning: blobs/sha256:1fbe0eb2ee7a2b2bb61f66defb77b0e9f513458af8a7f9f13c1e8f4b3fda0bb6 is damaged and stays: http://127.0.0.1:PORT answered 403 AccessDenied, deleting s3://cache/blobs/sha256:1fbe0eb2ee7a2b2bb61f66defb77b0e9f513458af8a7f9f13c1e8f4b3fda0bb6
            error: 1 damaged object could not be deleted from s3://cache at http://127.0.0.1:PORT
        "#]]);

    let server = Server::builder()
        .refuse("PutObject", 403, "AccessDenied")
        .start();
    put_cache(&server, "main", &[100, 200]);
    let damaged = format!("blobs/{}", Digest::of(&noise(1, 100)));
    damage(&server, &damaged);
    verify(&server, &["--deep", "--repair"])
        .ends_with(1)
        .prints(expect![[r#"
            name  blobs   size  missing  damaged  wrong size  verdict
            main      2  300 B        0        1           0  BROKEN

            hashed the blobs of 1 cache in s3://cache at http://127.0.0.1:PORT, 2 blobs (300 B); 18 requests in N s
            main: 1 blob, damaged:
              sha256:1fbe0eb2ee7a2b2bb61f66defb77b0e9f513458af8a7f9f13c1e8f4b3fda0bb6
            main: not repaired: http://127.0.0.1:PORT answered 403 AccessDenied (The test server was built to refuse this.), uploading s3://cache/manifests/main
        "#]], expect![[r#"
            Ns reading the manifests
            Ns looking for blobs on S3
            Ns verifying (2 blobs, 300 B)
            Ns repairing
            warning: sha256:1fbe0eb2ee7a2b2bb61f66defb77b0e9f513458af8a7f9f13c1e8f4b3fda0bb6 is damaged and stays: a cache still needs it
            error: 1 of 1 cache in s3://cache at http://127.0.0.1:PORT is not whole
        "#]]);
    // Without it, an import of the old manifest would fail in another way, not succeed.
    assert!(server.keys().contains(&damaged));
}

#[test]
fn an_interrupted_deep_verification_continues_where_it_stopped() {
    let server = bucket();
    let home = tempfile::tempdir().expect("a temporary directory");
    let spec = server.spec("");
    let deep = || program(&["--deep", "--cache-from", &spec]).env("HOME", home.path());
    server.fail(|asked| {
        let hangs = asked.operation == "GetObject" && asked.key == LEAF;
        hangs.then_some(Fault::Hang)
    });
    let child = deep().spawn();
    let state = || {
        let entries = std::fs::read_dir(home.path().join(".cache/layercache"));
        let mut entries = entries.into_iter().flatten().flatten();
        entries.next().map(|entry| entry.path())
    };
    let lines = |path: &Path| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().filter(|line| !line.is_empty()).count()
    };
    while state().is_none_or(|path| lines(&path) < 9) {
        std::thread::sleep(Duration::from_millis(5));
    }
    unsafe { libc::kill(i32::try_from(child.id()).expect("a pid"), libc::SIGINT) };
    let run: Run = child.wait_with_output().expect("it ends").into();
    run.ends_with(130);
    server.reset_faults();

    // One that was replaced meanwhile is read again.
    server.age(ROOT, Duration::from_secs(60));
    server.clear_log();
    let run = deep().run().succeeds();
    assert!(
        run.stderr
            .contains("an interrupted run has verified 8 blobs already"),
        "{}",
        run.stderr
    );
    let log = server.log();
    let read = log
        .iter()
        .filter(|request| request.operation == "GetObject");
    let mut read: Vec<&str> = read
        .map(|request| &*request.key)
        .filter(|key| key.starts_with("blobs/"))
        .collect();
    read.sort_unstable();
    assert_eq!(read, [LEAF, ROOT]);

    // A run that came to its end is no reason to skip anything.
    assert_eq!(state(), None);
    server.clear_log();
    deep().run().succeeds();
    assert_eq!(server.count("GetObject"), 12);
}

#[test]
fn a_layout_is_verified_and_its_damaged_blobs_moved_aside() {
    let layout = copy_of(&fixture("local-max"));
    let path = layout.path().display().to_string();
    program(&["--deep", &path])
        .run()
        .without_blobs()
        .succeeds()
        .prints(
            expect![[r#"
            name    blobs      size  missing  damaged  wrong size  verdict
            latest     10  62.9 KiB        0        0           0  ok

            hashed the blobs of 1 cache in TMP, 10 blobs (62.9 KiB); N s
        "#]],
            expect![[r#"
            Ns reading the layout
            Ns verifying (10 blobs, 62.9 KiB)
        "#]],
        );

    let blob = |key: &str| layout.path().join(key.replace("sha256:", "sha256/"));
    let size = std::fs::metadata(blob(LEAF)).expect("a blob").len();
    let size = usize::try_from(size).expect("it is small");
    std::fs::write(blob(LEAF), vec![7; size]).expect("a blob can be written");
    std::fs::write(blob(ROOT), "short").expect("a blob can be written");
    program(&[&path])
        .run()
        .ends_with(1)
        .prints(expect![[r#"
            name    blobs      size  missing  damaged  wrong size  verdict
            latest     10  62.9 KiB        0        -           1  BROKEN

            looked for the blobs of 1 cache in TMP, 10 blobs (62.9 KiB); N s
            latest: 1 blob, wrong size:
              sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2
        "#]], expect![[r#"
            Ns reading the layout
            error: 1 of 1 cache in TMP is not whole; --repair moves damaged blobs aside, so that an import fetches them
        "#]]);
    program(&["--deep", "--repair", &path])
        .run()
        .without_blobs()
        .ends_with(1)
        .prints(
            expect![[r#"
            name    blobs      size  missing  damaged  wrong size  verdict
            latest     10  62.9 KiB        0        1           1  BROKEN

            hashed the blobs of 1 cache in TMP, 10 blobs (62.9 KiB); N s
            latest: 1 blob, damaged:
              sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece
            latest: 1 blob, wrong size:
              sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2
            2 damaged blobs: moved aside
        "#]],
            expect![[r#"
            Ns reading the layout
            Ns verifying (9 blobs, 51.0 KiB)
            error: 1 of 1 cache in TMP is not whole; import or build them again
        "#]],
        );
    assert!(!blob(LEAF).exists() && !blob(ROOT).exists());
    program(&["--format=json", &path])
        .run()
        .ends_with(1)
        .prints(
            expect![[r#"
            {
              "version": 1,
              "command": "verify",
              "layout": "TMP",
              "caches": [
                {
                  "name": "latest",
                  "ok": false,
                  "missing": [
                    "sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece",
                    "sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2"
                  ],
                  "damaged": [],
                  "wrongSize": []
                }
              ],
              "blobs": 10,
              "bytes": 64446,
              "deep": false,
              "removed": 0
            }
        "#]],
            expect![[r#"
            Ns reading the layout
            error: 1 of 1 cache in TMP is not whole; import or build them again
        "#]],
        );

    let server = bucket();
    Program::import(&server.spec("name=max"), layout.path())
        .run()
        .succeeds();
    program(&["--deep", &path]).run().succeeds();
    assert_eq!(files(layout.path()), files(&fixture("local-max")));
}

#[test]
fn entries_of_a_layout_that_cannot_be_read_are_told() {
    let layout = copy_of(&fixture("image-plain"));
    let index = layout.path().join("index.json");
    let mut entries: Value =
        serde_json::from_slice(&std::fs::read(&index).expect("the index")).expect("JSON");
    let list = entries["manifests"].as_array_mut().expect("entries");
    let mut gone = list[0].clone();
    gone["digest"] = Digest::of(b"gone").to_string().into();
    gone["annotations"]["org.opencontainers.image.ref.name"] = "gone".into();
    list.push(gone);
    list.push(serde_json::json!({"digest": "md5:7"}));
    std::fs::write(&index, entries.to_string()).expect("the index can be written");
    let path = layout.path().display().to_string();
    program(&[&path])
        .run()
        .ends_with(1)
        .prints(expect![[r#"
            name                     blobs      size  missing  damaged  wrong size  verdict
            latest                       7  32.7 KiB        0        -           0  ok
            gone                         0       0 B        0        -           0  UNREADABLE
            an entry without a name      0       0 B        0        -           0  UNREADABLE

            looked for the blobs of 3 caches in TMP, 7 blobs (32.7 KiB); N s
            gone is unreadable: reading manifest sha256:283bb9deef02e6843abfb538efa1eca70801bd8a701c3f98191e123496339247 of the layout: blob sha256:283bb9deef02e6843abfb538efa1eca70801bd8a701c3f98191e123496339247 is not in TMP: the layout is incomplete (was it pruned, or copied in part?)
            an entry without a name is unreadable: "md5:7" is not a digest (expected sha256: and 64 lower-case hex digits)
        "#]], expect![[r#"
            Ns reading the layout
            error: 2 of 3 caches in TMP are not whole; import or build them again
        "#]]);
}

#[test]
fn a_blob_to_which_caches_give_two_sizes_is_wrong_for_one_and_stays_for_the_other() {
    let server = Server::start();
    put_cache(&server, "right", &[100]);
    let manifest = String::from_utf8(server.objects()["manifests/right"].to_vec()).expect("JSON");
    let wrong = manifest.replace("\"size\":100", "\"size\":99");
    server.insert("cache", "manifests/wrong", Stored::new(wrong.into()));
    verify(&server, &["--repair"]).succeeds();
    assert_eq!(server.objects()["manifests/right"], manifest);
    assert_eq!(
        server.objects()["manifests/wrong"],
        r#"{"records":[{"digest":"sha256:af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc"}]}"#
    );
    assert_eq!(server.keys().len(), 3);
}
