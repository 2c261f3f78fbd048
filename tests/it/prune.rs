//! `layercache prune` on a bucket.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use expect_test::{Expect, expect};
use layercache::cache::digest::Digest;
use serde_json::{Value, json};

use crate::aftermath::{assert_store_is_sound, soak};
use crate::crashes::run_under;
use crate::program::{Program, Run, fixture};
use crate::server::{Fault, Logged, OTHER_BUCKET, Server, Store, Stored};

const DAY: Duration = Duration::from_secs(86_400);

fn prune(server: &Server, extra: &str, flags: &[&str]) -> Program {
    Program::new()
        .args(["prune", "--cache-to", &server.spec(extra)])
        .args(flags)
        .env("BUILDKIT_PROGRESS", "quiet")
}

fn blob(text: &str) -> String {
    format!("blobs/{}", Digest::of(text.as_bytes()))
}

/// A cache whose blobs are short texts.
fn manifest(blobs: &[&str]) -> String {
    let created = "2026-11-21T20:37:36.959076185Z";
    let layers = blobs.iter().map(|text| {
        let digest = Digest::of(text.as_bytes()).to_string();
        json!({"blob": digest, "parent": -1, "annotations": {"diffID": digest, "size": text.len(),
            "mediaType": "application/vnd.oci.image.layer.v1.tar", "createdAt": created}})
    });
    let records = (0..blobs.len()).map(|layer| {
        json!({"digest": Digest::of(blobs[layer].as_bytes()).to_string(),
            "layers": [{"layer": layer, "createdAt": created}]})
    });
    json!({"layers": layers.collect::<Vec<_>>(), "records": records.collect::<Vec<_>>()})
        .to_string()
}

/// Puts a cache there, as BuildKit would.
fn put(store: &Store, name: &str, blobs: &[&str]) {
    for text in blobs {
        store.put(&blob(text), text.to_string());
    }
    store.put(&format!("manifests/{name}"), manifest(blobs));
}

/// A bucket as it grows: three caches, ten days old, and blobs that none needs any more.
fn bucket() -> Server {
    let server = Server::start();
    fill(&server);
    server
}

fn fill(server: &Server) {
    put(server, "main", &["base", "main"]);
    put(server, "pr-1", &["base", "one"]);
    put(server, "pr-2", &["base", "two"]);
    for garbage in ["garbage 1", "garbage 2", "young"] {
        server.put(&blob(garbage), garbage);
    }
    server.put("manifests/", "");
    server.put("README", "not ours");
    server.put("blobs/sha256:not-a-digest", "not ours");
    server.age_all(10 * DAY);
    server.age("manifests/pr-1", 30 * DAY);
    server.put(&blob("young"), "young");
}

/// The blobs that are there, by their texts.
fn texts(server: &Server) -> String {
    let objects = server.objects();
    let blobs = objects
        .iter()
        .filter(|(key, body)| **key == format!("blobs/{}", Digest::of(body)));
    let mut texts: Vec<_> = blobs
        .map(|(_, body)| String::from_utf8_lossy(body).into_owned())
        .collect();
    texts.sort();
    texts.join(", ")
}

fn caches(server: &Server) -> String {
    let keys = server.keys().into_iter();
    let names = keys.filter_map(|key| Some(key.strip_prefix("manifests/")?.to_owned()));
    names
        .filter(|name| !name.is_empty())
        .collect::<Vec<_>>()
        .join(", ")
}

#[track_caller]
fn prints(mut run: Run, code: i32, stdout: Expect, stderr: Expect) {
    // One look at the manifests serves several listings that wait for one: how often is a matter of timing.
    if let Some((before, after)) = run.stdout.rsplit_once(" requests in ")
        && let Some((start, _)) = before.rsplit_once("; ")
    {
        run.stdout = format!("{start}; N requests in {after}");
    }
    run.ends_with(code).prints(stdout, stderr);
}

#[test]
fn without_options_only_garbage_goes() {
    let server = bucket();
    let before = server.objects();
    let run = prune(&server, "", &["--dry-run"]).run();
    prints(
        run,
        0,
        expect![[r#"
            name   written  size  action  reason
            main  10 d ago   8 B  keep    no option selects it
            pr-1  40 d ago   7 B  keep    no option selects it
            pr-2  10 d ago   7 B  keep    no option selects it

            to remove: 0 caches, 2 blobs (18 B)
            to keep: 3 caches, 4 blobs (14 B), and 1 blob that no cache needs but that may be part of an export under way
            dry run: nothing was removed from s3://cache at http://127.0.0.1:PORT; N requests in N s
        "#]],
        expect![[""]],
    );
    assert_eq!(server.objects(), before);
    assert_eq!(
        server.count("DeleteObjects") + server.count("DeleteObject"),
        0
    );

    let run = prune(&server, "", &["--yes"]).run();
    prints(
        run,
        0,
        expect![[r#"
            name   written  size  action  reason
            main  10 d ago   8 B  keep    no option selects it
            pr-1  40 d ago   7 B  keep    no option selects it
            pr-2  10 d ago   7 B  keep    no option selects it

            to remove: 0 caches, 2 blobs (18 B)
            to keep: 3 caches, 4 blobs (14 B), and 1 blob that no cache needs but that may be part of an export under way
            pruned s3://cache at http://127.0.0.1:PORT: removed 0 caches, 2 blobs (18 B); N requests in N s
        "#]],
        expect![[""]],
    );
    assert_eq!(texts(&server), "base, main, one, two, young");
    let gone = ["garbage 1", "garbage 2"].map(blob);
    let left = before.into_iter().filter(|(key, _)| !gone.contains(key));
    assert!(
        server.objects().into_iter().eq(left),
        "nothing else has changed"
    );
    let run = prune(&server, "", &["--yes"]).run();
    prints(
        run,
        0,
        expect![[r#"
            name   written  size  action  reason
            main  10 d ago   8 B  keep    no option selects it
            pr-1  40 d ago   7 B  keep    no option selects it
            pr-2  10 d ago   7 B  keep    no option selects it

            to remove: nothing
            to keep: 3 caches, 4 blobs (14 B), and 1 blob that no cache needs but that may be part of an export under way
            nothing to prune in s3://cache at http://127.0.0.1:PORT; N requests in N s
        "#]],
        expect![[""]],
    );
}

#[test]
fn caches_go_that_options_choose_and_with_them_their_own_blobs() {
    let server = bucket();
    let run = prune(&server, "", &["--yes", "--older-than", "720h"]).run();
    prints(
        run,
        0,
        expect![[r#"
            name   written  size  action  reason
            main  10 d ago   8 B  keep    not older than 30 d
            pr-1  40 d ago   7 B  remove  older than 30 d
            pr-2  10 d ago   7 B  keep    not older than 30 d

            to remove: 1 cache, 3 blobs (21 B)
            to keep: 2 caches, 3 blobs (11 B), and 1 blob that no cache needs but that may be part of an export under way
            pruned s3://cache at http://127.0.0.1:PORT: removed 1 cache, 3 blobs (21 B); N requests in N s
        "#]],
        expect![[""]],
    );
    assert_eq!(
        (&*caches(&server), &*texts(&server)),
        ("main, pr-2", "base, main, two, young")
    );

    server.age("manifests/main", DAY);
    for flags in [
        &["--older-than", "5d", "--keep", "main", "--name", "m*"][..],
        &["--keep-last", "2"],
        &["--max-size", "1KiB"],
        &["--name", "pr-1"],
        &["--older-than", "5d", "--keep-last", "2"],
    ] {
        prune(&server, "", &[&["--yes"], flags].concat())
            .run()
            .succeeds();
        assert_eq!(caches(&server), "main, pr-2", "{flags:?}");
    }
    // The older one goes.
    let run = prune(&server, "", &["--yes", "--max-size", "8B"]).run();
    prints(
        run,
        0,
        expect![[r#"
            name   written  size  action  reason
            main  11 d ago   8 B  remove  over --max-size 8 B
            pr-2  10 d ago   7 B  keep    fits --max-size

            to remove: 1 cache, 1 blob (4 B)
            to keep: 1 cache, 2 blobs (7 B), and 1 blob that no cache needs but that may be part of an export under way
            pruned s3://cache at http://127.0.0.1:PORT: removed 1 cache, 1 blob (4 B); N requests in N s
        "#]],
        expect![[""]],
    );
    assert_eq!(
        (&*caches(&server), &*texts(&server)),
        ("pr-2", "base, two, young")
    );
}

#[test]
fn the_last_cache_goes_only_with_allow_empty() {
    let server = bucket();
    let all = ["--yes", "--older-than", "1h"];
    let run = prune(&server, "", &all).run();
    prints(
        run,
        1,
        expect![[""]],
        expect![[r#"
            error: this would remove every cache ('main', 'pr-1', 'pr-2'): --allow-empty allows it (pruning s3://cache at http://127.0.0.1:PORT)
        "#]],
    );
    assert_eq!(caches(&server), "main, pr-1, pr-2");
    prune(&server, "", &[&all[..], &["--allow-empty"]].concat())
        .run()
        .succeeds();
    assert_eq!((&*caches(&server), &*texts(&server)), ("", "young"));
    for foreign in ["README", "manifests/", "blobs/sha256:not-a-digest"] {
        assert!(server.object(foreign).is_some(), "{foreign}");
    }
}

#[test]
fn json_has_the_whole_plan_and_what_was_done() {
    let server = bucket();
    let flags = ["--yes", "--format", "json", "--older-than", "30d"];
    let run = prune(&server, "", &flags).run().succeeds();
    let mut document: Value = serde_json::from_str(&run.stdout).expect("JSON");
    for cache in document["caches"].as_array_mut().expect("caches") {
        cache["written"] = json!("…");
    }
    document["endpoint"] = json!("…");
    expect![[r#"
        {
          "version": 1,
          "command": "prune",
          "endpoint": "…",
          "bucket": "cache",
          "dryRun": false,
          "caches": [
            {
              "name": "main",
              "key": "manifests/main",
              "written": "…",
              "bytes": 8,
              "action": "keep",
              "reasons": [
                "not older than 30 d"
              ]
            },
            {
              "name": "pr-1",
              "key": "manifests/pr-1",
              "written": "…",
              "bytes": 7,
              "action": "remove",
              "reasons": [
                "older than 30 d"
              ]
            },
            {
              "name": "pr-2",
              "key": "manifests/pr-2",
              "written": "…",
              "bytes": 7,
              "action": "keep",
              "reasons": [
                "not older than 30 d"
              ]
            }
          ],
          "blobs": {
            "remove": 3,
            "removeBytes": 21,
            "keep": 3,
            "keepBytes": 11,
            "tooYoung": 1
          },
          "uploads": {
            "abort": 0
          },
          "deleted": {
            "caches": 1,
            "blobs": 3,
            "bytes": 21,
            "uploads": 0
          },
          "problems": []
        }"#]]
    .assert_eq(&format!("{document:#}"));
    let run = prune(&server, "", &["--format", "json"]).run();
    run.ends_with(2).says("--format json cannot ask");
}

#[test]
fn without_a_terminal_and_without_yes_nothing_goes() {
    let server = bucket();
    let before = server.objects();
    let run = prune(&server, "", &[]).run();
    prints(
        run,
        2,
        expect![[r#"
            name   written  size  action  reason
            main  10 d ago   8 B  keep    no option selects it
            pr-1  40 d ago   7 B  keep    no option selects it
            pr-2  10 d ago   7 B  keep    no option selects it

            to remove: 0 caches, 2 blobs (18 B)
            to keep: 3 caches, 4 blobs (14 B), and 1 blob that no cache needs but that may be part of an export under way
        "#]],
        expect![[r#"
            error: nothing was removed: there is no terminal to ask on (--yes skips the question)
        "#]],
    );
    assert_eq!(server.objects(), before);
}

#[test]
fn the_grace_is_at_least_touch_refresh() {
    let server = bucket();
    let run = prune(&server, "touch_refresh=48h", &["--yes", "--grace", "47h"]).run();
    prints(
        run,
        2,
        expect![[""]],
        expect![[r#"
            error: --grace: it must not be below touch_refresh (48h): exports rely on blobs younger than that
        "#]],
    );
    server.age(&blob("young"), 50 * Duration::from_secs(3600));
    // By default it is a day more.
    prune(&server, "touch_refresh=48h", &["--yes"])
        .run()
        .succeeds();
    assert!(texts(&server).contains("young"));
    prune(&server, "touch_refresh=48h", &["--yes", "--grace", "48h"])
        .run()
        .succeeds();
    assert!(!texts(&server).contains("young"));
}

#[test]
fn what_is_written_in_the_future_is_never_old() {
    let server = bucket();
    for key in [blob("garbage 1"), "manifests/pr-1".to_owned()] {
        server.change(&key, |object| {
            object.modified = SystemTime::now() + 300 * DAY
        });
    }
    prune(
        &server,
        "",
        &["--yes", "--older-than", "1d", "--keep", "main"],
    )
    .run()
    .succeeds();
    assert_eq!(
        (&*caches(&server), &*texts(&server)),
        ("main, pr-1", "base, garbage 1, main, one, young")
    );
}

#[test]
fn blobs_and_manifests_may_share_a_prefix() {
    let server = Server::start();
    let shared = "blobs_prefix=c/,manifests_prefix=c/";
    for text in ["a", "b", "garbage"] {
        server.put(&format!("c/{}", Digest::of(text.as_bytes())), text);
    }
    server.put("c/main", manifest(&["a"]));
    server.put("c/old", manifest(&["b"]));
    server.put("c/sha256:0", manifest(&["b"]));
    server.age_all(10 * DAY);
    let run = prune(&server, shared, &["--yes", "--name", "old"]).run();
    prints(
        run,
        0,
        expect![[r#"
            name       written  size  action  reason
            main      10 d ago   1 B  keep    not matched by --name
            old       10 d ago   1 B  remove  matched by --name
            sha256:0  10 d ago   1 B  keep    not matched by --name

            to remove: 1 cache, 1 blob (7 B)
            to keep: 2 caches, 2 blobs (2 B)
            pruned s3://cache at http://127.0.0.1:PORT: removed 1 cache, 1 blob (7 B); N requests in N s
        "#]],
        expect![[""]],
    );
    let b = format!("c/{}", Digest::of(b"b"));
    let a = format!("c/{}", Digest::of(b"a"));
    let mut left = vec!["c/main".to_owned(), "c/sha256:0".to_owned(), a, b];
    left.sort();
    assert_eq!(server.keys(), left, "the cache with the odd name needs b");
}

#[test]
fn caches_of_other_specs_over_the_same_blobs_keep_theirs() {
    let server = bucket();
    server.put("teams/x/release", manifest(&["garbage 1"]));
    server.age("teams/x/release", 5 * DAY);
    server.put(
        "teams/y/notes.json",
        "{\"schemaVersion\":2,\"layers\":[{\"mediaType\":\"x\"}]}",
    );
    let run = prune(&server, "", &["--yes"]).run();
    prints(
        run,
        0,
        expect![[r#"
            name              written  size  action  reason
            main             10 d ago   8 B  keep    no option selects it
            pr-1             40 d ago   7 B  keep    no option selects it
            pr-2             10 d ago   7 B  keep    no option selects it
            teams/x/release   5 d ago   9 B  keep    another spec's, and may need the same blobs

            to remove: 0 caches, 1 blob (9 B)
            to keep: 4 caches, 5 blobs (23 B), and 1 blob that no cache needs but that may be part of an export under way
            pruned s3://cache at http://127.0.0.1:PORT: removed 0 caches, 1 blob (9 B); N requests in N s
        "#]],
        expect![[""]],
    );
    assert_eq!(texts(&server), "base, garbage 1, main, one, two, young");
    // Nobody looks for it when told not to.
    prune(&server, "", &["--yes", "--assume-no-others"])
        .run()
        .succeeds();
    assert_eq!(texts(&server), "base, main, one, two, young");
}

#[test]
fn caches_elsewhere_keep_theirs_if_they_are_named() {
    let server = bucket();
    let release = Stored::new(manifest(&["garbage 2"]).into());
    let modified = release.modified - 5 * DAY;
    server.insert(
        OTHER_BUCKET,
        "m/release",
        Stored {
            modified,
            ..release
        },
    );
    let also = server
        .spec("manifests_prefix=m/")
        .replace("bucket=cache", "bucket=other");
    let run = prune(&server, "", &["--yes", "--also", &also]).run();
    prints(
        run,
        0,
        expect![[r#"
            name      written  size  action  reason
            main     10 d ago   8 B  keep    no option selects it
            pr-1     40 d ago   7 B  keep    no option selects it
            pr-2     10 d ago   7 B  keep    no option selects it
            release   5 d ago   9 B  keep    another spec's, and may need the same blobs

            to remove: 0 caches, 1 blob (9 B)
            to keep: 4 caches, 5 blobs (23 B), and 1 blob that no cache needs but that may be part of an export under way
            pruned s3://cache at http://127.0.0.1:PORT: removed 0 caches, 1 blob (9 B); N requests in N s
        "#]],
        expect![[""]],
    );
    assert_eq!(texts(&server), "base, garbage 2, main, one, two, young");
}

#[test]
fn among_more_than_ten_thousand_unknown_objects_no_blob_goes() {
    let server = bucket();
    for n in 0..10_001 {
        server.put(&format!("logs/{n}"), "x");
    }
    let run = prune(&server, "", &["--yes", "--name", "pr-1"]).run();
    prints(
        run,
        1,
        expect![[r#"
            name   written  size  action  reason
            main  10 d ago   8 B  keep    not matched by --name
            pr-1  40 d ago   7 B  remove  matched by --name
            pr-2  10 d ago   7 B  keep    not matched by --name

            to remove: 1 cache, 0 blobs (0 B)
            to keep: 2 caches, 3 blobs (11 B), and 1 blob that no cache needs but that may be part of an export under way
            pruned s3://cache at http://127.0.0.1:PORT: removed 1 cache, 0 blobs (0 B); N requests in N s
        "#]],
        expect![[r#"
            error: no blob is deleted, because more than 10000 objects below the prefix are neither blobs nor manifests, and any may be a cache of another spec: --assume-no-others says that none is (pruning s3://cache at http://127.0.0.1:PORT)
        "#]],
    );
    assert_eq!(server.count("GetObject"), 3);
    assert_eq!(
        (&*caches(&server), texts(&server).contains("one")),
        ("main, pr-2", true)
    );
    prune(&server, "", &["--yes", "--assume-no-others"])
        .run()
        .succeeds();
    assert_eq!(texts(&server), "base, main, two, young");
    assert!(server.object("logs/10000").is_some());
}

#[test]
fn while_a_cache_cannot_be_read_no_blob_goes() {
    let torn = |server: &Server| server.put("manifests/torn", "{\"layers\":[{\"blob\":\"sha256:");
    let unknown = |server: &Server| server.put("x/torn", "{\"layers\":[{\"blob\":\"sha256:");
    for make in [torn, unknown] {
        let server = bucket();
        make(&server);
        server.age_all(30 * DAY);
        let run = prune(&server, "", &["--yes", "--older-than", "45d"])
            .run()
            .ends_with(1);
        let run = run.says("no blob is deleted, because a cache cannot be read: s3://cache/");
        assert!(run.stdout.contains("torn"), "{}", run.stdout);
        assert!(texts(&server).contains("garbage 1, garbage 2"));
    }
    let server = bucket();
    server.fail(|asked| {
        (asked.key == "manifests/main").then_some(Fault::Status(403, "AccessDenied"))
    });
    let run = prune(&server, "", &["--yes"]).run();
    prints(
        run,
        1,
        expect![[r#"
            name   written  size  action  reason
            main  10 d ago   0 B  keep    its manifest cannot be read
            pr-1  40 d ago   7 B  keep    no option selects it
            pr-2  10 d ago   7 B  keep    no option selects it

            to remove: nothing
            to keep: 3 caches, 3 blobs (10 B), and 1 blob that no cache needs but that may be part of an export under way
            pruned s3://cache at http://127.0.0.1:PORT: removed 0 caches, 0 blobs (0 B); N requests in N s
        "#]],
        expect![[r#"
            error: no blob is deleted, because a cache cannot be read: s3://cache/manifests/main (http://127.0.0.1:PORT answered 403 AccessDenied (The test server was told to answer AccessDenied.), reading s3://cache/manifests/main; s3:GetObject may be missing, or the object itself: without s3:ListBucket a missing key answers 403 too) (pruning s3://cache at http://127.0.0.1:PORT)
        "#]],
    );
    assert!(texts(&server).contains("garbage 1, garbage 2"));
}

#[test]
fn a_damaged_manifest_goes_if_it_is_named_and_then_blobs_go() {
    let server = bucket();
    server.put("manifests/broken", "{\"layers\":\"none\"}");
    server.put("manifests/torn", "{\"layers\":[{\"blob\":\"sha256:");
    for name in ["broken", "torn"] {
        server.age(&format!("manifests/{name}"), 5 * DAY);
    }
    let run = prune(&server, "", &["--yes", "--name", "broken"]).run();
    prints(
        run,
        1,
        expect![[r#"
            name     written  size  action  reason
            broken   5 d ago   0 B  remove  matched by --name
            main    10 d ago   8 B  keep    not matched by --name
            pr-1    40 d ago   7 B  keep    not matched by --name
            pr-2    10 d ago   7 B  keep    not matched by --name
            torn     5 d ago   0 B  keep    its manifest is damaged: --name removes it

            to remove: 1 cache, 0 blobs (0 B)
            to keep: 4 caches, 4 blobs (14 B), and 1 blob that no cache needs but that may be part of an export under way
            pruned s3://cache at http://127.0.0.1:PORT: removed 1 cache, 0 blobs (0 B); N requests in N s
        "#]],
        expect![[r#"
        error: no blob is deleted, because a cache cannot be read: s3://cache/manifests/torn (manifests/torn is damaged: it is not JSON (EOF while parsing a string at line 1 column 27) (3 tries)) (pruning s3://cache at http://127.0.0.1:PORT)
    "#]],
    );
    assert_eq!(caches(&server), "main, pr-1, pr-2, torn");
    assert!(texts(&server).contains("garbage 1, garbage 2"));

    let run = prune(&server, "", &["--yes", "--name", "torn"]).run();
    prints(
        run,
        0,
        expect![[r#"
            name   written  size  action  reason
            main  10 d ago   8 B  keep    not matched by --name
            pr-1  40 d ago   7 B  keep    not matched by --name
            pr-2  10 d ago   7 B  keep    not matched by --name
            torn   5 d ago   0 B  remove  matched by --name

            to remove: 1 cache, 2 blobs (18 B)
            to keep: 3 caches, 4 blobs (14 B), and 1 blob that no cache needs but that may be part of an export under way
            pruned s3://cache at http://127.0.0.1:PORT: removed 1 cache, 2 blobs (18 B); N requests in N s
        "#]],
        expect![[""]],
    );
    assert_eq!(caches(&server), "main, pr-1, pr-2");
    assert_eq!(texts(&server), "base, main, one, two, young");
}

#[test]
fn a_damaged_manifest_that_cannot_be_deleted_keeps_all_blobs() {
    let server = Server::builder().undeletable("manifests/broken").start();
    fill(&server);
    server.put("manifests/broken", "{\"layers\":\"none\"}");
    server.age("manifests/broken", 5 * DAY);
    let run = prune(&server, "", &["--yes", "--name", "broken"]).run();
    prints(
        run,
        1,
        expect![[r#"
            name     written  size  action  reason
            broken   5 d ago   0 B  remove  matched by --name
            main    10 d ago   8 B  keep    not matched by --name
            pr-1    40 d ago   7 B  keep    not matched by --name
            pr-2    10 d ago   7 B  keep    not matched by --name

            to remove: 1 cache, 2 blobs (18 B)
            to keep: 3 caches, 4 blobs (14 B), and 1 blob that no cache needs but that may be part of an export under way
            pruned s3://cache at http://127.0.0.1:PORT: removed 0 caches, 0 blobs (0 B); N requests in N s
        "#]],
        expect![[r#"
        error: no blob is deleted, because a cache cannot be read: s3://cache/manifests/broken (reading the cache manifest: invalid type: string "none", expected a sequence at line 1 column 16) (pruning s3://cache at http://127.0.0.1:PORT)
        error: 1 object could not be deleted: http://127.0.0.1:PORT answered 200 AccessDenied (The test server was told to refuse this.), deleting s3://cache/manifests/broken (pruning s3://cache at http://127.0.0.1:PORT)
    "#]],
    );
    assert!(texts(&server).contains("garbage 1, garbage 2"));

    // As does one that is another by then.
    let server = bucket();
    server.put("manifests/broken", "{\"layers\":\"none\"}");
    server.before(
        0,
        |request| request.operation == "HeadObject" && request.key == "manifests/broken",
        |store| store.put("manifests/broken", "{\"layers\":\"nothing\"}"),
    );
    let run = prune(&server, "", &["--yes", "--name", "broken"]).run();
    run.ends_with(1)
        .says("no blob is deleted, because a cache cannot be read");
    assert!(texts(&server).contains("garbage 1, garbage 2"));
}

#[test]
fn a_prune_that_may_not_delete_does_not_speak_of_deleting_the_bucket() {
    let server = Server::builder()
        .refuse("DeleteObjects", 403, "AccessDenied")
        .start();
    fill(&server);
    let run = prune(&server, "", &["--yes"]).run();
    prints(
        run,
        1,
        expect![[r#"
        name   written  size  action  reason
        main  10 d ago   8 B  keep    no option selects it
        pr-1  40 d ago   7 B  keep    no option selects it
        pr-2  10 d ago   7 B  keep    no option selects it

        to remove: 0 caches, 2 blobs (18 B)
        to keep: 3 caches, 4 blobs (14 B), and 1 blob that no cache needs but that may be part of an export under way
    "#]],
        expect![[r#"
        error: stopped after 0 caches and 0 blobs; the next prune continues: http://127.0.0.1:PORT answered 403 AccessDenied (The test server was built to refuse this.), deleting objects in s3://cache; layercache doctor tells which permission is missing
    "#]],
    );
}

#[test]
fn caches_written_in_the_same_second_as_the_last_are_kept_and_the_plan_says_so() {
    let server = bucket();
    let then = SystemTime::now() - 10 * DAY;
    for key in ["manifests/main", "manifests/pr-2"] {
        server.change(key, |object| object.modified = then);
    }
    // A dry run stays one, whatever else is typed.
    let run = prune(&server, "", &["--yes", "--dry-run", "--keep-last", "1"]).run();
    prints(
        run,
        0,
        expect![[r#"
        name   written  size  action  reason
        main  10 d ago   8 B  keep    among the last 1
        pr-1  40 d ago   7 B  remove  not among the last 1
        pr-2  10 d ago   7 B  keep    written in the same second as the last 1

        to remove: 1 cache, 3 blobs (21 B)
        to keep: 2 caches, 3 blobs (11 B), and 1 blob that no cache needs but that may be part of an export under way
        dry run: nothing was removed from s3://cache at http://127.0.0.1:PORT; N requests in N s
    "#]],
        expect![[""]],
    );
}

#[test]
fn what_cannot_be_deleted_is_reported_and_the_rest_goes() {
    let server = Server::builder().undeletable(&blob("garbage 1")).start();
    fill(&server);
    let run = prune(&server, "", &["--yes"]).run();
    prints(
        run,
        1,
        expect![[r#"
            name   written  size  action  reason
            main  10 d ago   8 B  keep    no option selects it
            pr-1  40 d ago   7 B  keep    no option selects it
            pr-2  10 d ago   7 B  keep    no option selects it

            to remove: 0 caches, 2 blobs (18 B)
            to keep: 3 caches, 4 blobs (14 B), and 1 blob that no cache needs but that may be part of an export under way
            pruned s3://cache at http://127.0.0.1:PORT: removed 0 caches, 1 blob (9 B); N requests in N s
        "#]],
        expect![[r#"
            error: 1 object could not be deleted: http://127.0.0.1:PORT answered 200 AccessDenied (The test server was told to refuse this.), deleting s3://cache/blobs/sha256:24a453ff47846cf5e1b661da836243b70ccf27ccaad0cb0ecfefa6a807278ecb (pruning s3://cache at http://127.0.0.1:PORT)
        "#]],
    );
    assert_eq!(texts(&server), "base, garbage 1, main, one, two, young");

    let server = Server::builder().undeletable("manifests/pr-1").start();
    fill(&server);
    prune(&server, "", &["--yes", "--older-than", "30d"])
        .run()
        .ends_with(1);
    assert_eq!(
        texts(&server),
        "base, main, one, two, young",
        "its blobs are needed"
    );
}

#[test]
fn a_store_without_batches_deletes_one_by_one() {
    let server = Server::builder()
        .refuse("DeleteObjects", 501, "NotImplemented")
        .start();
    fill(&server);
    let run = prune(&server, "", &["--yes", "--older-than", "30d"])
        .run()
        .succeeds();
    run.says("removed 1 cache, 3 blobs (21 B)");
    assert_eq!(texts(&server), "base, main, two, young");
}

#[test]
fn uploads_that_were_abandoned_are_aborted() {
    let server = bucket();
    let config = layercache::cli::spec::cache_to(&server.spec(""), &|_| None)
        .expect("a good spec")
        .config
        .s3;
    let begin = |key: String| {
        let config = config.clone();
        crate::inside::runtime().block_on(async move {
            let progress = layercache::progress::Progress::silent();
            let store = layercache::s3::connect(&config, progress)
                .await
                .expect("a store");
            store.create_upload(&key, None).await.expect("an upload")
        })
    };
    begin(blob("old"));
    begin("elsewhere/file".to_owned());
    server.age_uploads(2 * DAY);
    begin(blob("new"));
    let run = prune(&server, "", &["--yes"]).run().succeeds();
    run.says("removed 0 caches, 2 blobs (18 B), 1 unfinished upload");
    assert_eq!(server.uploads(), 2);
}

#[test]
fn a_layout_is_pruned_with_the_same_plan() {
    let layout = crate::program::copy_of(&fixture("local-max"));
    let blobs = layout.path().join("blobs/sha256");
    let orphan = blobs.join(Digest::of(b"orphan").hex());
    std::fs::write(&orphan, "orphan").expect("a blob can be written");
    let prune = |flags: &[&str]| {
        Program::new()
            .arg("prune")
            .args(flags)
            .arg(layout.path())
            .env("BUILDKIT_PROGRESS", "quiet")
            .run()
    };
    prints(
        prune(&["--yes"]),
        0,
        expect![[r#"
            to remove: nothing
            to keep: 12 blobs (70.0 KiB), and 1 blob that nothing reaches but that may be part of a build under way
            nothing to prune in TMP; N s
        "#]],
        expect![[""]],
    );
    assert!(orphan.exists(), "it is younger than an hour");
    prints(
        prune(&["--dry-run", "--grace", "0s"]),
        0,
        expect![[r#"
            to remove: 1 blob (6 B)
            to keep: 12 blobs (70.0 KiB)
            dry run: nothing was removed from TMP; N s
        "#]],
        expect![[""]],
    );
    prints(
        prune(&["--grace", "0s"]),
        2,
        expect![[r#"
        to remove: 1 blob (6 B)
        to keep: 12 blobs (70.0 KiB)
    "#]],
        expect![[r#"
        error: pruning TMP: nothing was removed: there is no terminal to ask on (--yes skips the question)
    "#]],
    );
    assert!(orphan.exists());
    let run = prune(&["--grace", "0s", "--yes", "--format", "json"]).succeeds();
    expect![[r#"
        {
          "version": 1,
          "command": "prune",
          "layout": "LAYOUT",
          "dryRun": false,
          "entries": [],
          "blobs": {
            "remove": 1,
            "removeBytes": 6,
            "keep": 12,
            "keepBytes": 71691,
            "tooYoung": 0
          },
          "deleted": {
            "entries": 0,
            "blobs": 1,
            "bytes": 6
          }
        }
    "#]]
    .assert_eq(
        &run.stdout
            .replace(&layout.path().display().to_string(), "LAYOUT"),
    );
    assert!(!orphan.exists());
    assert_eq!(
        crate::program::files(layout.path()),
        crate::program::files(&fixture("local-max"))
    );
    let run = prune(&["--older-than", "1d"]);
    run.ends_with(2).says("cannot be used with");
}

// What others do to the bucket meanwhile.

fn is(operation: &'static str) -> impl Fn(&Logged) -> bool + Send {
    move |logged| logged.operation == operation
}

/// The plan needs two looks: at the manifests, and at the blobs by sixteen listings. What comes after
/// them is the deletion.
const LISTINGS_OF_THE_PLAN: usize = 1 + 16;

#[test]
fn a_blob_that_an_export_refreshes_after_the_plan_stays() {
    let server = bucket();
    server.before(LISTINGS_OF_THE_PLAN, is("ListObjectsV2"), |store| {
        store.change(&blob("garbage 1"), |object| {
            object.modified = SystemTime::now()
        });
    });
    prune(&server, "", &["--yes"]).run().succeeds();
    assert_eq!(texts(&server), "base, garbage 1, main, one, two, young");
}

#[test]
fn a_cache_that_is_written_after_the_plan_keeps_its_blobs() {
    let server = bucket();
    server.put("teams/x/release", manifest(&["main"]));
    server.before(LISTINGS_OF_THE_PLAN, is("ListObjectsV2"), |store| {
        store.put("manifests/new", manifest(&["garbage 1"]));
        store.put("teams/x/release", manifest(&["main", "garbage 2"]));
    });
    prune(&server, "", &["--yes"]).run().succeeds();
    assert_eq!(
        texts(&server),
        "base, garbage 1, garbage 2, main, one, two, young"
    );
}

#[test]
fn a_cache_that_is_written_again_after_the_plan_stays() {
    let server = bucket();
    server.before(
        0,
        |logged| logged.operation == "HeadObject",
        |store| {
            store.put("manifests/pr-1", manifest(&["base", "one", "garbage 1"]));
        },
    );
    let run = prune(&server, "", &["--yes", "--older-than", "30d"])
        .run()
        .succeeds();
    run.says("removed 0 caches, 1 blob (9 B)");
    assert_eq!(caches(&server), "main, pr-1, pr-2");
    assert_eq!(texts(&server), "base, garbage 1, main, one, two, young");
}

#[test]
fn a_cache_that_is_removed_and_at_once_written_again_keeps_its_blobs() {
    let server = bucket();
    let old = server.object("manifests/pr-1").expect("it is there");
    // Not even its date tells that it is another one.
    server.after(0, is("DeleteObjects"), move |store| {
        let again = Stored {
            modified: old.modified,
            ..old
        };
        store.insert("cache", "manifests/pr-1", again);
    });
    prune(&server, "", &["--yes", "--older-than", "30d"])
        .run()
        .succeeds();
    assert_eq!(texts(&server), "base, main, one, two, young");
}

#[test]
fn an_object_that_is_replaced_right_before_its_deletion_stays() {
    let server = bucket();
    server.before(0, is("DeleteObjects"), |store| {
        let refreshed = Stored::with_etag("0123456789abcdef-2".to_owned(), "garbage 1".into());
        store.insert("cache", &blob("garbage 1"), refreshed);
    });
    let run = prune(&server, "", &["--yes"]).run().succeeds();
    run.says("removed 0 caches, 1 blob (9 B)");
    assert_eq!(texts(&server), "base, garbage 1, main, one, two, young");
}

/// The one moment in which S3 offers no protection: an export refreshes a blob and writes its manifest
/// between the listing and the deletion.
fn race_at_the_last_moment(server: &Server) {
    for nth in 0..2 {
        server.before(nth, is("DeleteObjects"), |store| {
            for text in ["garbage 1", "garbage 2"] {
                if store.object(&blob(text)).is_some() {
                    store.change(&blob(text), |object| object.modified = SystemTime::now());
                }
            }
            store.put(
                "manifests/new",
                manifest(&["main", "garbage 1", "garbage 2"]),
            );
        });
    }
}

#[test]
fn a_cache_that_lost_blobs_at_the_last_moment_is_reported() {
    let server = bucket();
    race_at_the_last_moment(&server);
    let run = prune(&server, "", &["--yes"]).run().ends_with(1);
    run.says("s3://cache/manifests/new was written meanwhile and names");
}

#[test]
fn a_cache_that_lost_blobs_at_the_last_moment_is_repaired_if_asked() {
    let server = bucket();
    race_at_the_last_moment(&server);
    let run = prune(&server, "", &["--yes", "--repair"]).run().succeeds();
    run.says("rewrote s3://cache/manifests/new");
    for foreign in ["README", "manifests/", "blobs/sha256:not-a-digest"] {
        server.remove(foreign);
    }
    assert_store_is_sound(&server, "after the repair");
    assert!(server.object("manifests/new").is_some());
}

#[test]
fn a_prune_that_fails_at_any_request_leaves_a_sound_bucket_and_the_next_one_finishes() {
    let flags = ["--yes", "--older-than", "30d"];
    let server = bucket();
    prune(&server, "", &flags).run().succeeds();
    let (reference, requests) = (server.objects(), server.log().len());
    for nth in (0..requests).step_by(if soak() { 1 } else { 5 }) {
        for fault in [
            Fault::Status(403, "AccessDenied"),
            Fault::ApplyThenStatus(403, "AccessDenied"),
        ] {
            let server = bucket();
            server.fail(move |asked| (asked.index == nth).then(|| fault.clone()));
            let run = prune(&server, "", &flags).run();
            server.reset_faults();
            // Only the listing of uploads may fail.
            assert!(
                matches!(run.code, Some(0 | 1)),
                "request {nth}: {}",
                run.stderr
            );
            check(&server, &format!("request {nth}"));
            prune(&server, "", &flags).run().succeeds();
            assert_eq!(server.objects(), reference, "request {nth}");
        }
    }
}

#[test]
fn a_prune_that_is_interrupted_says_what_it_has_deleted() {
    let server = bucket();
    let folder = tempfile::tempdir().expect("a temporary directory");
    let file = folder.path().join("metadata.json");
    let program = prune(&server, "", &["--yes", "--older-than", "20d"])
        .arg("--metadata-file")
        .arg(&file);
    let deleted = AtomicBool::new(false);
    run_under(program, &server, move |asked, victim| {
        if asked.operation.starts_with("Delete") {
            deleted.store(true, Ordering::Relaxed);
        } else if asked.operation == "ListObjectsV2" && deleted.load(Ordering::Relaxed) {
            victim.signal(libc::SIGTERM);
            return Some(Fault::Hang);
        }
        None
    })
    .ends_with(143)
    .says("interrupted");
    assert_eq!(caches(&server), "main, pr-2");
    let metadata = std::fs::read(&file).expect("the file");
    let metadata: Value = serde_json::from_slice(&metadata).expect("JSON");
    assert_eq!(
        metadata["results"][0]["deleted"]["caches"], 1,
        "{metadata:#}"
    );
}

/// No manifest names an absent blob, and what is not ours is there.
fn check(server: &Server, when: &str) {
    let objects = server.objects();
    for foreign in ["README", "manifests/", "blobs/sha256:not-a-digest"] {
        assert!(objects.contains_key(foreign), "{when}: {foreign}");
    }
    for (key, body) in &objects {
        if key.starts_with("manifests/") && key.len() > "manifests/".len() {
            let cache: Value = serde_json::from_slice(body).expect("JSON");
            for layer in cache["layers"].as_array().expect("layers") {
                let blob = format!("blobs/{}", layer["blob"].as_str().expect("a digest"));
                assert!(objects.contains_key(&blob), "{when}: {key} names {blob}");
            }
        }
    }
}
