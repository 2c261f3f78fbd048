//! What the commands do in everyday cases: run again, with other prefixes, interrupted, or used wrongly.

use std::time::Duration;

use expect_test::expect;

use crate::output::lasting;
use crate::program::{Program, copy_of, files, fixture, s3_manifest};
use crate::server::{ACCESS_KEY, SECRET_KEY, Server};

const BLOBS_OF_MAX: usize = 10;

#[test]
fn a_second_export_sends_no_blob() {
    let server = Server::start();
    let spec = server.spec("mode=max");
    Program::export(&spec, &fixture("local-max"))
        .run()
        .succeeds();
    assert_eq!(server.count("PutObject"), BLOBS_OF_MAX + 1);
    server.clear_log();
    Program::export(&spec, &fixture("local-max"))
        .run()
        .succeeds()
        .prints(expect![[r#"
            exported 10 blobs to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 0 uploaded (0 B), 10 already there, 0 refreshed; 12 requests in N s
        "#]], expect![[r#"
            Ns looking for blobs on S3
            Ns wrote manifests/buildkit
        "#]]);
    let written: Vec<String> = server
        .log()
        .into_iter()
        .filter(|l| l.method == "PUT")
        .map(|l| l.key)
        .collect();
    assert_eq!(written, ["manifests/buildkit"]);
}

#[test]
fn touch_refresh_0s_copies_each_blob_once_and_last_modified_moves() {
    let server = Server::start();
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .run()
        .succeeds();
    server.age_all(Duration::from_secs(3600));
    let before: Vec<_> = server
        .objects()
        .into_keys()
        .map(|key| (server.last_modified(&key), key))
        .collect();
    server.clear_log();
    Program::export(
        &server.spec("mode=max,touch_refresh=0s"),
        &fixture("local-max"),
    )
    .run()
    .succeeds()
    .prints(expect![[r#"
        exported 10 blobs to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 0 uploaded (0 B), 0 already there, 10 refreshed; 42 requests in N s
    "#]], expect![[r#"
        Ns looking for blobs on S3
        Ns refreshing (10 blobs, 62.9 KiB)
        Ns [N/10] refreshed sha256:01a37f800d03 159 B
        Ns [N/10] refreshed sha256:0d68a9c7a878 8.46 KiB
        Ns [N/10] refreshed sha256:1538290aa394 9.00 KiB
        Ns [N/10] refreshed sha256:230a4b9dd0a4 8.51 KiB
        Ns [N/10] refreshed sha256:662e50c29c13 9.03 KiB
        Ns [N/10] refreshed sha256:6e52fec599f1 635 B
        Ns [N/10] refreshed sha256:710869d00fd0 6.12 KiB
        Ns [N/10] refreshed sha256:aa969215ace4 8.98 KiB
        Ns [N/10] refreshed sha256:b95b63489f91 12.0 KiB
        Ns [N/10] refreshed sha256:f898e33dc2c9 90 B
        Ns wrote manifests/buildkit
    "#]]);
    assert_eq!(server.count("CopyObject"), BLOBS_OF_MAX);
    for (then, key) in before {
        assert!(
            server.last_modified(&key) > then,
            "{key} is as old as before"
        );
    }
}

#[test]
fn only_blobs_older_than_touch_refresh_are_refreshed_and_keep_their_storage_class() {
    let server = Server::start();
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .run()
        .succeeds();
    let old: Vec<String> = server
        .objects()
        .into_keys()
        .filter(|key| key.starts_with("blobs/"))
        .take(3)
        .collect();
    for key in &old {
        server.age(key, Duration::from_secs(25 * 3600));
        server.change(key, |object| {
            object.storage_class = Some("STANDARD_IA".into())
        });
    }
    server.clear_log();
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .run()
        .succeeds()
        .prints(expect![[r#"
            exported 10 blobs to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 0 uploaded (0 B), 7 already there, 3 refreshed; 28 requests in N s
        "#]], expect![[r#"
            Ns looking for blobs on S3
            Ns refreshing (3 blobs, 17.6 KiB)
            Ns [N/3] refreshed sha256:01a37f800d03 159 B
            Ns [N/3] refreshed sha256:0d68a9c7a878 8.46 KiB
            Ns [N/3] refreshed sha256:1538290aa394 9.00 KiB
            Ns wrote manifests/buildkit
        "#]]);
    let mut copied: Vec<String> = server
        .log()
        .into_iter()
        .filter(|l| l.operation == "CopyObject")
        .map(|l| l.key)
        .collect();
    copied.sort();
    assert_eq!(copied, old);
    for key in &old {
        let object = server.object(key).expect("it is still there");
        assert_eq!(object.storage_class.as_deref(), Some("STANDARD_IA"));
        assert!(object.metadata.contains_key("updated-at"));
    }
}

#[test]
fn the_manifest_is_written_last_and_once_for_each_name() {
    let server = Server::start();
    Program::export(
        &server.spec("mode=max,name=main;pr-7"),
        &fixture("local-max"),
    )
    .run()
    .succeeds();
    let puts: Vec<String> = server
        .log()
        .into_iter()
        .filter(|l| l.method == "PUT")
        .map(|l| l.key)
        .collect();
    assert_eq!(puts[puts.len() - 2..], ["manifests/main", "manifests/pr-7"]);
    assert!(
        puts[..puts.len() - 2]
            .iter()
            .all(|key| key.starts_with("blobs/sha256:"))
    );
    assert_eq!(
        server.objects()["manifests/main"],
        server.objects()["manifests/pr-7"]
    );
}

#[test]
fn every_prefix_is_put_before_the_keys_as_it_is() {
    let server = Server::start();
    let spec = server.spec("mode=max,prefix=team a/,blobs_prefix=b+,manifests_prefix=ü/,name=n");
    Program::export(&spec, &fixture("local-multiarch"))
        .run()
        .succeeds();
    let keys: Vec<String> = server.objects().into_keys().collect();
    assert_eq!(
        keys.iter()
            .filter(|key| key.starts_with("team a/b+sha256:"))
            .count(),
        3
    );
    assert!(keys.contains(&"team a/ü/n".to_owned()), "{keys:?}");
    let imported = tempfile::tempdir().expect("a temporary directory");
    Program::import(&spec, imported.path()).run().succeeds();
    assert_eq!(files(imported.path()), files(&fixture("local-multiarch")));
}

#[test]
fn one_prefix_for_blobs_and_manifests_works() {
    let server = Server::start();
    let spec = server.spec("mode=max,blobs_prefix=c/,manifests_prefix=c/,name=n");
    Program::export(&spec, &fixture("local-max"))
        .run()
        .succeeds();
    Program::export(&spec, &fixture("local-max"))
        .run()
        .succeeds()
        .prints(expect![[r#"
            exported 10 blobs to s3://cache/c/n at http://127.0.0.1:PORT: 0 uploaded (0 B), 10 already there, 0 refreshed; 12 requests in N s
        "#]], expect![[r#"
            Ns looking for blobs on S3
            Ns wrote c/n
        "#]]);
    let imported = tempfile::tempdir().expect("a temporary directory");
    Program::import(&spec, imported.path()).run().succeeds();
    assert_eq!(files(imported.path()), files(&fixture("local-max")));
}

#[test]
fn stray_blobs_in_the_directory_are_not_uploaded() {
    let server = Server::start();
    let layout = copy_of(&fixture("local-max"));
    let stray = "d7a8fbb307d7809469ca9abcb0082e4f8d5651e46d3cdb762d02d0bf37c9e592";
    std::fs::write(
        layout.path().join("blobs/sha256").join(stray),
        "The quick brown fox jumps over the lazy dog",
    )
    .expect("a file can be written");
    Program::export(&server.spec("mode=max"), layout.path())
        .run()
        .succeeds();
    assert_eq!(server.objects().len(), BLOBS_OF_MAX + 1);
}

#[test]
fn a_damaged_local_blob_never_reaches_the_store_and_no_manifest_is_written() {
    let server = Server::start();
    let layout = copy_of(&fixture("local-max"));
    let blob = "b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2";
    let path = layout.path().join("blobs/sha256").join(blob);
    let mut bytes = std::fs::read(&path).expect("the blob is there");
    bytes[6000] ^= 1;
    std::fs::write(&path, bytes).expect("a file can be written");
    Program::export(&server.spec("mode=max"), layout.path())
        .run()
        .ends_with(1)
        .without_blobs()
        .prints(expect![[""]], expect![[r#"
            Ns looking for blobs on S3
            Ns uploading (10 blobs, 62.9 KiB)
            error: TMP/blobs/sha256/b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2 is damaged: its bytes hash to sha256:5e24ca26a0182e81046a65aec7c6399b5b46042c3806d0f19b4191d47cfe56ca; remove it, and build or import it again (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
        "#]]);
    let objects = server.objects();
    assert!(!objects.contains_key(&format!("blobs/sha256:{blob}")));
    assert!(!objects.keys().any(|key| key.starts_with("manifests/")));
}

#[test]
fn an_object_of_the_wrong_size_is_uploaded_again() {
    let server = Server::start();
    let key = "blobs/sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2";
    server.put(key, "short");
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .run()
        .succeeds();
    assert_eq!(server.objects()[key].len(), 12259);
}

#[test]
fn a_missing_diff_id_is_computed() {
    let server = Server::start();
    let layout = copy_of(&fixture("local-max"));
    // The same cache, with a manifest that lacks the annotations for diffIDs.
    let index = layout.path().join("index.json");
    let mut entry: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&index).expect("the index is there")).expect("JSON");
    let blob = |digest: &serde_json::Value| {
        layout
            .path()
            .join("blobs/sha256")
            .join(&digest.as_str().expect("a digest")[7..])
    };
    let mut manifest: serde_json::Value = serde_json::from_slice(
        &std::fs::read(blob(&entry["manifests"][0]["digest"])).expect("the manifest is there"),
    )
    .expect("JSON");
    for layer in manifest["layers"].as_array_mut().expect("layers") {
        layer["annotations"]
            .as_object_mut()
            .expect("annotations")
            .remove("containerd.io/uncompressed");
    }
    let manifest = manifest.to_string();
    let digest = layercache::cache::digest::Digest::of(manifest.as_bytes()).to_string();
    entry["manifests"][0]["digest"] = digest.clone().into();
    entry["manifests"][0]["size"] = manifest.len().into();
    std::fs::write(blob(&digest.into()), manifest).expect("a file can be written");
    std::fs::write(&index, entry.to_string()).expect("a file can be written");

    Program::export(&server.spec("mode=max"), layout.path())
        .run()
        .succeeds();
    assert_eq!(
        server.objects()["manifests/buildkit"],
        s3_manifest("max.json")
    );
}

#[test]
fn dry_run_says_what_would_be_sent_and_writes_nothing() {
    let server = Server::start();
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .arg("--dry-run")
        .run()
        .succeeds()
        .prints(expect![[r#"
            dry run: would export 10 blobs to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: would upload 10 (62.9 KiB), 0 already there, would refresh 0; 1 request in N s
        "#]], expect![[r#"
            Ns looking for blobs on S3
            Ns would upload sha256:01a37f800d030bb622b32a3aa014438f04bb5207297f713f966e0ae4dc5e1f0b (159 B)
            Ns would upload sha256:0d68a9c7a878208cd83549b2d815b496a7a54bc7898d03e01a4dc38f885120b8 (8.46 KiB)
            Ns would upload sha256:1538290aa3942dd8d0cb2147837b15b76bacf1fb75179c31710f2ce4a9ab2d4a (9.00 KiB)
            Ns would upload sha256:230a4b9dd0a461dbf8fdb958a9f425a53fbcd80184c6f09587938ee923aa9eda (8.51 KiB)
            Ns would upload sha256:662e50c29c1360b57af3adbf5fd1aed547ac1f0ec630a8e88f3624954cf7b9a0 (9.03 KiB)
            Ns would upload sha256:6e52fec599f1143ad9ca7bba3be69c6b1cd18e40154c8c03017e1fe2fbbd7317 (635 B)
            Ns would upload sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece (6.12 KiB)
            Ns would upload sha256:aa969215ace405520c7048a4522c13688572ca691e3f45fa6567b0ac1e97157f (8.98 KiB)
            Ns would upload sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2 (12.0 KiB)
            Ns would upload sha256:f898e33dc2c9e1987672cf111dd3909a8a2331a1c9c2490a329d25ab46c16d4f (90 B)
            Ns would write manifests/buildkit
        "#]]);
    assert!(server.objects().is_empty());
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .run()
        .succeeds();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let absent = directory.path().join("absent");
    Program::import(&server.spec(""), &absent)
        .arg("--dry-run")
        .run()
        .succeeds()
        .prints(expect![[r#"
            dry run: would import 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP/absent as latest: 10 blobs: would fetch 10 (62.9 KiB), 0 already there; 11 requests in N s
        "#]], expect![[r#"
            Ns reading the manifest
            Ns looking for blobs on S3
            Ns would fetch sha256:01a37f800d030bb622b32a3aa014438f04bb5207297f713f966e0ae4dc5e1f0b (159 B)
            Ns would fetch sha256:0d68a9c7a878208cd83549b2d815b496a7a54bc7898d03e01a4dc38f885120b8 (8.46 KiB)
            Ns would fetch sha256:1538290aa3942dd8d0cb2147837b15b76bacf1fb75179c31710f2ce4a9ab2d4a (9.00 KiB)
            Ns would fetch sha256:230a4b9dd0a461dbf8fdb958a9f425a53fbcd80184c6f09587938ee923aa9eda (8.51 KiB)
            Ns would fetch sha256:662e50c29c1360b57af3adbf5fd1aed547ac1f0ec630a8e88f3624954cf7b9a0 (9.03 KiB)
            Ns would fetch sha256:6e52fec599f1143ad9ca7bba3be69c6b1cd18e40154c8c03017e1fe2fbbd7317 (635 B)
            Ns would fetch sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece (6.12 KiB)
            Ns would fetch sha256:aa969215ace405520c7048a4522c13688572ca691e3f45fa6567b0ac1e97157f (8.98 KiB)
            Ns would fetch sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2 (12.0 KiB)
            Ns would fetch sha256:f898e33dc2c9e1987672cf111dd3909a8a2331a1c9c2490a329d25ab46c16d4f (90 B)
        "#]]);
    assert!(!absent.exists());
}

#[test]
fn a_dry_run_of_an_export_notices_that_there_is_no_such_bucket() {
    let server = Server::start();
    let spec = server
        .spec("mode=max")
        .replace("bucket=cache", "bucket=absent");
    Program::export(&spec, &fixture("local-max"))
        .arg("--dry-run")
        .run()
        .ends_with(1)
        .prints(expect![[""]], expect![[r#"
            Ns looking for blobs on S3
            error: http://127.0.0.1:PORT answered 404 NoSuchBucket, listing s3://absent; check bucket, region and endpoint_url
        "#]]);
    assert!(server.log().iter().all(|logged| logged.method != "PUT"));
}

#[test]
fn a_dry_run_of_an_export_asks_for_each_blob_where_it_may_not_list() {
    let server = Server::builder().no_list().start();
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .arg("--dry-run")
        .run()
        .succeeds()
        .prints(expect![[r#"
            dry run: would export 10 blobs to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: would upload 10 (62.9 KiB), 0 already there, would refresh 0; 11 requests in N s
        "#]], expect![[r#"
            Ns looking for blobs on S3
            Ns would upload sha256:01a37f800d030bb622b32a3aa014438f04bb5207297f713f966e0ae4dc5e1f0b (159 B)
            Ns would upload sha256:0d68a9c7a878208cd83549b2d815b496a7a54bc7898d03e01a4dc38f885120b8 (8.46 KiB)
            Ns would upload sha256:1538290aa3942dd8d0cb2147837b15b76bacf1fb75179c31710f2ce4a9ab2d4a (9.00 KiB)
            Ns would upload sha256:230a4b9dd0a461dbf8fdb958a9f425a53fbcd80184c6f09587938ee923aa9eda (8.51 KiB)
            Ns would upload sha256:662e50c29c1360b57af3adbf5fd1aed547ac1f0ec630a8e88f3624954cf7b9a0 (9.03 KiB)
            Ns would upload sha256:6e52fec599f1143ad9ca7bba3be69c6b1cd18e40154c8c03017e1fe2fbbd7317 (635 B)
            Ns would upload sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece (6.12 KiB)
            Ns would upload sha256:aa969215ace405520c7048a4522c13688572ca691e3f45fa6567b0ac1e97157f (8.98 KiB)
            Ns would upload sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2 (12.0 KiB)
            Ns would upload sha256:f898e33dc2c9e1987672cf111dd3909a8a2331a1c9c2490a329d25ab46c16d4f (90 B)
            Ns would write manifests/buildkit
        "#]]);
    assert_eq!(server.count("HeadObject"), BLOBS_OF_MAX);
}

#[test]
fn an_export_of_few_blobs_asks_for_them_without_a_listing() {
    let server = Server::start();
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .run()
        .succeeds();
    let listings = server.log().into_iter();
    let listings = listings.filter(|logged| logged.operation.starts_with("ListObjects"));
    assert_eq!(listings.count(), 0);
}

#[test]
fn a_second_import_asks_for_the_manifest_alone_and_changes_nothing() {
    let server = Server::start();
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .run()
        .succeeds();
    let imported = tempfile::tempdir().expect("a temporary directory");
    Program::import(&server.spec(""), imported.path())
        .run()
        .succeeds();
    server.clear_log();
    Program::import(&server.spec(""), imported.path())
        .run()
        .succeeds()
        .prints(expect![[r#"
            imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP as latest: 10 blobs: 0 fetched (0 B), 10 already there; 1 request in N s
        "#]], expect![[r#"
            Ns reading the manifest
        "#]]);
    let asked: Vec<String> = server
        .log()
        .into_iter()
        .map(|l| format!("{} {}", l.method, l.key))
        .collect();
    assert_eq!(asked, ["GET manifests/buildkit"]);
    assert_eq!(files(imported.path()), files(&fixture("local-max")));
}

#[test]
fn verify_finds_a_damaged_blob_and_fetches_it_again() {
    let server = Server::start();
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .run()
        .succeeds();
    let layout = copy_of(&fixture("local-max"));
    let blob = "b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2";
    let path = layout.path().join("blobs/sha256").join(blob);
    let mut bytes = std::fs::read(&path).expect("the blob is there");
    bytes[6000] ^= 1;
    std::fs::write(&path, bytes).expect("a file can be written");
    Program::import(&server.spec(""), layout.path())
        .arg("--verify")
        .run()
        .succeeds()
        .prints(expect![[r#"
            imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP as latest: 10 blobs: 1 fetched (12.0 KiB), 9 already there; 2 requests in N s
        "#]], expect![[r#"
            Ns reading the manifest
            Ns verifying (10 blobs, 62.9 KiB)
            Ns [N/10] hashed sha256:01a37f800d03 159 B
            Ns [N/10] hashed sha256:0d68a9c7a878 8.46 KiB
            Ns [N/10] hashed sha256:1538290aa394 9.00 KiB
            Ns [N/10] hashed sha256:230a4b9dd0a4 8.51 KiB
            Ns [N/10] hashed sha256:662e50c29c13 9.03 KiB
            Ns [N/10] hashed sha256:6e52fec599f1 635 B
            Ns [N/10] hashed sha256:710869d00fd0 6.12 KiB
            Ns [N/10] hashed sha256:aa969215ace4 8.98 KiB
            Ns [N/10] hashed sha256:b95b63489f91 12.0 KiB
            Ns [N/10] hashed sha256:f898e33dc2c9 90 B
            Ns fetching (1 blob, 12.0 KiB)
            Ns [N/1] downloaded sha256:b95b63489f91 12.0 KiB
        "#]]);
    assert_eq!(files(layout.path()), files(&fixture("local-max")));
}

#[test]
fn a_name_that_does_not_exist_is_a_warning_or_with_require_an_error() {
    let server = Server::start();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let absent = directory.path().join("absent");
    Program::import(&server.spec("name=first-run"), &absent)
        .run()
        .succeeds()
        .prints(expect![[r#"
            no cache named 'first-run' in s3://cache at http://127.0.0.1:PORT yet: there is no manifests/first-run (--require makes this an error); 1 request in N s
        "#]], expect![[r#"
            Ns reading the manifest
        "#]]);
    assert!(!absent.exists());
    Program::import(&server.spec("name=first-run"), &absent)
        .arg("--require")
        .run()
        .ends_with(1)
        .prints(expect![""], expect![[r#"
            Ns reading the manifest
            error: there is no cache yet, and --require was given (importing 'first-run' from s3://cache at http://127.0.0.1:PORT)
        "#]]);
}

#[test]
fn several_sources_are_imported_the_first_found_under_latest_the_others_under_their_names() {
    let server = Server::start();
    Program::export(&server.spec("mode=max,name=main"), &fixture("local-max"))
        .run()
        .succeeds();
    Program::export(
        &server.spec("mode=max,name=arm"),
        &fixture("local-multiarch"),
    )
    .run()
    .succeeds();
    let imported = tempfile::tempdir().expect("a temporary directory");
    Program::new()
        .args(["import", "--cache-from", &server.spec("name=pr-7")])
        .args(["--cache-from", &server.spec("name=main")])
        .args(["--cache-from", &server.spec("name=arm")])
        .arg(imported.path())
        .run()
        .succeeds();
    let index: serde_json::Value = serde_json::from_slice(
        &std::fs::read(imported.path().join("index.json")).expect("the index"),
    )
    .expect("JSON");
    let tags: Vec<&str> = index["manifests"]
        .as_array()
        .expect("entries")
        .iter()
        .filter_map(|entry| entry["annotations"]["org.opencontainers.image.ref.name"].as_str())
        .collect();
    assert_eq!(tags, ["latest", "arm"]);
}

#[test]
fn importing_into_a_layout_in_use_keeps_its_other_tags_and_blobs() {
    let server = Server::start();
    Program::export(&server.spec("mode=max"), &fixture("local-multiarch"))
        .run()
        .succeeds();
    let layout = copy_of(&fixture("local-max"));
    Program::import(&server.spec(""), layout.path())
        .args(["--tag", "arm"])
        .run()
        .succeeds();
    let before = files(&fixture("local-max"));
    let after = files(layout.path());
    for (name, bytes) in &before {
        if name != "index.json" {
            assert_eq!(after.get(name), Some(bytes), "{name}");
        }
    }
    Program::export(&server.spec("mode=max,name=back"), layout.path())
        .args(["--tag", "latest"])
        .run()
        .succeeds();
    assert_eq!(server.objects()["manifests/back"], s3_manifest("max.json"));
}

#[test]
fn specs_come_from_the_environment_one_a_line() {
    let server = Server::start();
    let specs = format!(
        "{}\n{}\n",
        server.spec("mode=max,name=a"),
        server.spec("name=b")
    );
    Program::new()
        .arg("export")
        .arg(fixture("local-max"))
        .env("LAYERCACHE_CACHE_TO", specs)
        .run()
        .succeeds();
    assert_eq!(server.objects()["manifests/a"], s3_manifest("max.json"));
    assert_eq!(server.objects()["manifests/b"], s3_manifest("min.json"));
}

#[test]
fn credentials_region_bucket_and_endpoint_come_from_the_environment() {
    let server = Server::start();
    Program::export(
        "type=s3,use_path_style=true,mode=max",
        &fixture("local-max"),
    )
    .env("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    .env("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    .env("AWS_REGION", "us-east-1")
    .env("AWS_BUCKET", "cache")
    .env("AWS_ENDPOINT_URL_S3", server.url())
    .run()
    .succeeds();
    assert_eq!(
        server.objects()["manifests/buildkit"],
        s3_manifest("max.json")
    );
}

#[test]
fn a_profile_and_a_credential_process_give_credentials() {
    let server = Server::start();
    let home = tempfile::tempdir().expect("a temporary directory");
    let keys =
        serde_json::json!({"Version": 1, "AccessKeyId": ACCESS_KEY, "SecretAccessKey": SECRET_KEY});
    std::fs::write(home.path().join("keys.json"), keys.to_string()).expect("a file can be written");
    std::fs::write(
        home.path().join("config"),
        format!(
            "[profile ci]\ncredential_process = cat {}/keys.json\n",
            home.path().display()
        ),
    )
    .expect("a file can be written");
    Program::export(&server.keyless_spec("mode=max"), &fixture("local-max"))
        .env("AWS_CONFIG_FILE", home.path().join("config"))
        .env("AWS_PROFILE", "ci")
        .run()
        .succeeds();
    assert_eq!(
        server.objects()["manifests/buildkit"],
        s3_manifest("max.json")
    );
}

#[test]
fn no_credentials_is_an_error_that_names_the_sources_tried() {
    let server = Server::start();
    Program::export(&server.keyless_spec(""), &fixture("local-max"))
        .arg("--dry-run")
        .run()
        .ends_with(1)
        .prints(expect![[""]], expect![[r#"
            Ns looking for blobs on S3
            error: no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the job a role (tried: environment, profile, web identity, container endpoint, EC2 metadata service: IMDS disabled by AWS_EC2_METADATA_DISABLED env var set to `true`) (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
        "#]]);
}

#[test]
fn a_failed_export_under_ignore_error_is_a_warning() {
    let server = Server::start();
    let spec = server.spec("ignore-error=true,upload_parallelism=1");
    let spec = spec.replace("bucket=cache", "bucket=absent");
    Program::export(&spec, &fixture("local-max"))
        .run()
        .succeeds()
        .without_blobs()
        .prints(expect![""], expect![[r#"
            Ns looking for blobs on S3
            Ns uploading (5 blobs, 30.1 KiB)
            warning: ignored because of ignore-error=true: http://127.0.0.1:PORT answered 404 NoSuchBucket, uploading s3://absent/blobs/sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2; check bucket, region and endpoint_url
        "#]]);
}

#[test]
fn wrong_usage_ends_with_2_before_any_request() {
    let server = Server::start();
    for (extra, stderr) in [
        (
            "use_path_stile=true",
            expect![[r#"
                error: --cache-to: use_path_stile: unknown attribute (did you mean `use_path_style`?)
            "#]],
        ),
        (
            "mode=maximal",
            expect![[r#"
                error: --cache-to: mode: "maximal" is not a mode (accepted: min, max)
            "#]],
        ),
        (
            "touch_refresh=1d",
            expect![[r#"
                error: --cache-to: touch_refresh: "1d" is not a duration (days are not a Go unit; write 24h)
            "#]],
        ),
        (
            "upload_parallelism=0",
            expect![[r#"
                error: --cache-to: upload_parallelism: "0" is not a positive whole number (accepted: 1 and above)
            "#]],
        ),
        (
            "ignore-error=yes",
            expect![[r#"
                error: --cache-to: ignore-error: "yes" is not a boolean (accepted: 1, t, T, TRUE, true, True, 0, f, F, FALSE, false, False)
            "#]],
        ),
        (
            "name=",
            expect![[r#"
                error: --cache-to: name: "" holds an empty name (expected one name, or several as a;b)
            "#]],
        ),
        (
            "region=us-east-1",
            expect![[r#"
                error: --cache-to: region: given twice (field 8)
            "#]],
        ),
    ] {
        Program::export(&server.spec(extra), &fixture("local-max"))
            .run()
            .ends_with(2)
            .prints(expect![[""]], stderr);
    }
    Program::export("type=registry,ref=x", &fixture("local-max"))
        .run()
        .ends_with(2)
        .prints(
            expect![[""]],
            expect![[r#"
                error: --cache-to: type: "registry" is not supported (accepted: s3)
            "#]],
        );
    Program::new()
        .arg("export")
        .arg(fixture("local-max"))
        .run()
        .ends_with(2)
        .prints(expect![[""]], expect![[r#"
            error: no cache is given (use --cache-to type=s3,region=...,bucket=..., or set LAYERCACHE_CACHE_TO to one spec per line)
        "#]]);
    assert_eq!(server.log().len(), 0);
}

#[test]
fn a_spec_pasted_from_buildx_works_with_warnings() {
    let server = Server::start();
    let pasted = "mode=max,compression=zstd,oci-mediatypes=true,image-manifest=true";
    Program::export(&server.spec(pasted), &fixture("local-max"))
        .run()
        .succeeds()
        .prints(expect![[r#"
            exported 10 blobs to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 10 uploaded (62.9 KiB), 0 already there, 0 refreshed; 22 requests in N s
        "#]], expect![[r#"
            warning: --cache-to: compression: ignored: blobs are moved as they are, never compressed again
            warning: --cache-to: oci-mediatypes: ignored: a cache on S3 has one form only
            warning: --cache-to: image-manifest: ignored: a cache on S3 has one form only
            Ns looking for blobs on S3
            Ns uploading (10 blobs, 62.9 KiB)
            Ns [N/10] uploaded sha256:01a37f800d03 159 B
            Ns [N/10] uploaded sha256:0d68a9c7a878 8.46 KiB
            Ns [N/10] uploaded sha256:1538290aa394 9.00 KiB
            Ns [N/10] uploaded sha256:230a4b9dd0a4 8.51 KiB
            Ns [N/10] uploaded sha256:662e50c29c13 9.03 KiB
            Ns [N/10] uploaded sha256:6e52fec599f1 635 B
            Ns [N/10] uploaded sha256:710869d00fd0 6.12 KiB
            Ns [N/10] uploaded sha256:aa969215ace4 8.98 KiB
            Ns [N/10] uploaded sha256:b95b63489f91 12.0 KiB
            Ns [N/10] uploaded sha256:f898e33dc2c9 90 B
            Ns wrote manifests/buildkit
        "#]]);
    let imported = tempfile::tempdir().expect("a temporary directory");
    Program::import(&server.spec("mode=max"), imported.path())
        .run()
        .succeeds()
        .prints(expect![[r#"
            imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP as latest: 10 blobs: 10 fetched (62.9 KiB), 0 already there; 11 requests in N s
        "#]], expect![[r#"
            warning: --cache-from: mode: ignored: it means something on --cache-to only
            Ns reading the manifest
            Ns fetching (10 blobs, 62.9 KiB)
            Ns [N/10] downloaded sha256:01a37f800d03 159 B
            Ns [N/10] downloaded sha256:0d68a9c7a878 8.46 KiB
            Ns [N/10] downloaded sha256:1538290aa394 9.00 KiB
            Ns [N/10] downloaded sha256:230a4b9dd0a4 8.51 KiB
            Ns [N/10] downloaded sha256:662e50c29c13 9.03 KiB
            Ns [N/10] downloaded sha256:6e52fec599f1 635 B
            Ns [N/10] downloaded sha256:710869d00fd0 6.12 KiB
            Ns [N/10] downloaded sha256:aa969215ace4 8.98 KiB
            Ns [N/10] downloaded sha256:b95b63489f91 12.0 KiB
            Ns [N/10] downloaded sha256:f898e33dc2c9 90 B
        "#]]);
}

#[test]
fn the_metadata_file_holds_the_summary_as_json() {
    let server = Server::start();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("metadata.json");
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .arg("--metadata-file")
        .arg(&file)
        .run()
        .succeeds();
    let metadata: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&file).expect("the file")).expect("JSON");
    let result = &metadata["results"][0];
    assert_eq!(result["command"], "export");
    assert_eq!(result["transferred"], 10);
    assert_eq!(result["present"], 0);
    assert_eq!(result["requests"], server.log().len());
}

#[test]
fn under_rawjson_each_line_of_a_run_that_fails_is_json_and_the_last_is_the_error() {
    let server = Server::start();
    let absent = server.spec("upload_parallelism=1");
    let absent = absent.replace("bucket=cache", "bucket=absent");
    for (spec, code, text) in [
        (
            absent,
            1,
            expect![
                "http://127.0.0.1:PORT answered 404 NoSuchBucket, uploading s3://absent/blobs/sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2; check bucket, region and endpoint_url"
            ],
        ),
        (
            server.spec("mode=maximal"),
            2,
            expect![[r#"--cache-to: mode: "maximal" is not a mode (accepted: min, max)"#]],
        ),
    ] {
        let run = Program::export(&spec, &fixture("local-max"))
            .args(["--progress", "rawjson"])
            .run()
            .ends_with(code);
        let events: Vec<serde_json::Value> = run
            .stderr
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}")))
            .collect();
        let last = events.last().expect("an event");
        assert_eq!(last["event"], "error");
        text.assert_eq(&lasting(last["text"].as_str().expect("a text")));
        assert!(last["time"].is_string());
    }
}

#[test]
fn results_go_to_stdout_and_all_else_to_stderr() {
    let server = Server::start();
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .run()
        .succeeds()
        .prints(expect![[r#"
            exported 10 blobs to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 10 uploaded (62.9 KiB), 0 already there, 0 refreshed; 22 requests in N s
        "#]], expect![[r#"
            Ns looking for blobs on S3
            Ns uploading (10 blobs, 62.9 KiB)
            Ns [N/10] uploaded sha256:01a37f800d03 159 B
            Ns [N/10] uploaded sha256:0d68a9c7a878 8.46 KiB
            Ns [N/10] uploaded sha256:1538290aa394 9.00 KiB
            Ns [N/10] uploaded sha256:230a4b9dd0a4 8.51 KiB
            Ns [N/10] uploaded sha256:662e50c29c13 9.03 KiB
            Ns [N/10] uploaded sha256:6e52fec599f1 635 B
            Ns [N/10] uploaded sha256:710869d00fd0 6.12 KiB
            Ns [N/10] uploaded sha256:aa969215ace4 8.98 KiB
            Ns [N/10] uploaded sha256:b95b63489f91 12.0 KiB
            Ns [N/10] uploaded sha256:f898e33dc2c9 90 B
            Ns wrote manifests/buildkit
        "#]]);
    let imported = tempfile::tempdir().expect("a temporary directory");
    Program::import(&server.spec(""), imported.path())
        .run()
        .succeeds()
        .prints(expect![[r#"
            imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP as latest: 10 blobs: 10 fetched (62.9 KiB), 0 already there; 11 requests in N s
        "#]], expect![[r#"
            Ns reading the manifest
            Ns fetching (10 blobs, 62.9 KiB)
            Ns [N/10] downloaded sha256:01a37f800d03 159 B
            Ns [N/10] downloaded sha256:0d68a9c7a878 8.46 KiB
            Ns [N/10] downloaded sha256:1538290aa394 9.00 KiB
            Ns [N/10] downloaded sha256:230a4b9dd0a4 8.51 KiB
            Ns [N/10] downloaded sha256:662e50c29c13 9.03 KiB
            Ns [N/10] downloaded sha256:6e52fec599f1 635 B
            Ns [N/10] downloaded sha256:710869d00fd0 6.12 KiB
            Ns [N/10] downloaded sha256:aa969215ace4 8.98 KiB
            Ns [N/10] downloaded sha256:b95b63489f91 12.0 KiB
            Ns [N/10] downloaded sha256:f898e33dc2c9 90 B
        "#]]);
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .args(["--progress", "quiet"])
        .run()
        .succeeds()
        .prints(expect![[r#"
            exported 10 blobs to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 0 uploaded (0 B), 10 already there, 0 refreshed; 12 requests in N s
        "#]], expect![[""]]);
}
