//! Runs over several specs, some of which fail: the others are still tried and reported.

use std::path::Path;

use expect_test::expect;
use serde_json::Value;

use crate::program::{Program, files, fixture, s3_manifest};
use crate::server::{Fault, Server};

fn results(file: &Path) -> Vec<Value> {
    let bytes = std::fs::read(file).expect("the metadata file is there");
    let metadata: Value = serde_json::from_slice(&bytes).expect("JSON");
    metadata["results"].as_array().expect("results").clone()
}

/// The tags of a layout, in index order.
fn tags(layout: &Path) -> Vec<String> {
    let index = std::fs::read(layout.join("index.json")).expect("the index");
    let index: Value = serde_json::from_slice(&index).expect("JSON");
    let entries = index["manifests"].as_array().expect("entries");
    entries
        .iter()
        .filter_map(|entry| entry["annotations"]["org.opencontainers.image.ref.name"].as_str())
        .map(str::to_owned)
        .collect()
}

fn in_bucket(spec: &str, bucket: &str) -> String {
    spec.replace("bucket=cache", &format!("bucket={bucket}"))
}

#[test]
fn a_target_that_fails_keeps_no_other_from_being_written_or_reported() {
    let server = Server::start();
    let folder = tempfile::tempdir().expect("a temporary directory");
    let file = folder.path().join("metadata.json");
    std::fs::write(&file, "of an earlier run").expect("a file can be written");
    let absent = in_bucket(&server.spec("name=b,upload_parallelism=1"), "absent");
    Program::new()
        .arg("export")
        .args(["--cache-to", &server.spec("mode=max,name=a")])
        .args(["--cache-to", &absent])
        .args(["--cache-to", &server.spec("name=c")])
        .arg(fixture("local-max"))
        .arg("--metadata-file")
        .arg(&file)
        .run()
        .ends_with(1)
        .without_blobs()
        .prints(expect![[r#"
            exported 10 blobs to s3://cache/manifests/a at http://127.0.0.1:PORT: 10 uploaded (62.9 KiB), 0 already there, 0 refreshed; 22 requests in N s
            exported 5 of 10 blobs (mode=min; mode=max sends all) to s3://cache/manifests/c at http://127.0.0.1:PORT: 0 uploaded (0 B), 5 already there, 0 refreshed; 7 requests in N s
        "#]], expect![[r#"
            Ns exporting 'a' to s3://cache at http://127.0.0.1:PORT (1 of 3)
            Ns looking for blobs on S3
            Ns uploading (10 blobs, 62.9 KiB)
            Ns wrote manifests/a
            Ns exporting 'b' to s3://absent at http://127.0.0.1:PORT (2 of 3)
            Ns looking for blobs on S3
            Ns uploading (5 blobs, 30.1 KiB)
            Ns exporting 'c' to s3://cache at http://127.0.0.1:PORT (3 of 3)
            Ns looking for blobs on S3
            Ns wrote manifests/c
            error: http://127.0.0.1:PORT answered 404 NoSuchBucket, uploading s3://absent/blobs/sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2; check bucket, region and endpoint_url
        "#]]);
    assert_eq!(server.objects()["manifests/a"], s3_manifest("max.json"));
    assert_eq!(server.objects()["manifests/c"], s3_manifest("min.json"));
    let results = results(&file);
    let of = |key: &str| -> Vec<Value> { results.iter().map(|r| r[key].clone()).collect() };
    assert_eq!(of("bucket"), ["cache", "absent", "cache"]);
    assert_eq!(of("transferred")[..2], [10, 0]);
    assert_eq!(results[0].get("error"), None);
    assert_eq!(results[2].get("error"), None);
    let failed = &results[1];
    assert!(
        failed["error"]
            .as_str()
            .is_some_and(|e| e.contains("absent")),
        "{failed}"
    );
    assert_eq!(failed.get("errorIgnored"), None);
    assert_eq!(failed["names"][0], "b");
    assert_eq!(failed["layout"], fixture("local-max").display().to_string());
    assert!(
        failed["requests"].as_u64().is_some_and(|n| n > 0),
        "{failed}"
    );
    assert!(
        failed["seconds"].as_f64().is_some_and(|s| s > 0.0),
        "{failed}"
    );
}

#[test]
fn a_failure_that_is_ignored_says_what_it_took() {
    let server = Server::start();
    let folder = tempfile::tempdir().expect("a temporary directory");
    let file = folder.path().join("metadata.json");
    let spec = server.spec("ignore-error=true,upload_parallelism=1");
    let spec = in_bucket(&spec, "absent");
    Program::export(&spec, &fixture("local-max"))
        .arg("--metadata-file")
        .arg(&file)
        .run()
        .succeeds()
        .without_blobs()
        .prints(expect![""], expect![[r#"
            Ns looking for blobs on S3
            Ns uploading (5 blobs, 30.1 KiB)
            warning: ignored because of ignore-error=true: http://127.0.0.1:PORT answered 404 NoSuchBucket, uploading s3://absent/blobs/sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2; check bucket, region and endpoint_url
        "#]]);
    let result = &results(&file)[0];
    assert_eq!(result["requests"], server.log().len());
    assert_eq!(result["layout"], fixture("local-max").display().to_string());
    assert_eq!(result["errorIgnored"], true);
}

#[test]
fn a_layout_that_cannot_be_read_is_one_error_and_in_every_result() {
    let server = Server::start();
    let folder = tempfile::tempdir().expect("a temporary directory");
    let file = folder.path().join("metadata.json");
    Program::new()
        .arg("export")
        .args(["--cache-to", &server.spec("name=a")])
        .args(["--cache-to", &server.spec("name=b,ignore-error=true")])
        .arg(folder.path().join("absent"))
        .arg("--metadata-file")
        .arg(&file)
        .run()
        .ends_with(1)
        .prints(
            expect![""],
            expect![[r#"
            error: no OCI layout at TMP/absent: no such directory
        "#]],
        );
    let results = results(&file);
    assert_eq!(results.len(), 2);
    assert_eq!(results[0]["error"], results[1]["error"]);
    assert_eq!(results[0].get("errorIgnored"), None);
    assert_eq!(results[1]["errorIgnored"], true);
}

#[test]
fn a_branch_s_cache_that_fails_does_not_keep_main_s_from_being_imported() {
    let server = Server::start();
    Program::export(&server.spec("mode=max,name=main"), &fixture("local-max"))
        .run()
        .succeeds();
    server.put("manifests/damaged", "no JSON");
    server.put("manifests/denied", s3_manifest("max.json"));
    server.fail(|asked| {
        (asked.key == "manifests/denied").then_some(Fault::Status(403, "AccessDenied"))
    });
    for (branch, stdout, stderr) in [
        (
            "damaged",
            expect![[r#"
                imported 'main' from s3://cache/manifests/main at http://127.0.0.1:PORT into TMP/layout as latest: 10 blobs: 10 fetched (62.9 KiB), 0 already there; 11 requests in N s
            "#]],
            expect![[r#"
                Ns importing 'damaged' from s3://cache at http://127.0.0.1:PORT (1 of 2)
                Ns reading the manifest
                Ns manifests/damaged is damaged: it is not JSON (expected ident at line 1 column 2), trying again (2 of 3)
                Ns manifests/damaged is damaged: it is not JSON (expected ident at line 1 column 2), trying again (3 of 3)
                Ns importing 'main' from s3://cache at http://127.0.0.1:PORT (2 of 2)
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
                error: manifests/damaged is damaged: it is not JSON (expected ident at line 1 column 2) (3 tries) (importing 'damaged' from s3://cache at http://127.0.0.1:PORT)
            "#]],
        ),
        (
            "denied",
            expect![[r#"
                imported 'main' from s3://cache/manifests/main at http://127.0.0.1:PORT into TMP/layout as latest: 10 blobs: 10 fetched (62.9 KiB), 0 already there; 11 requests in N s
            "#]],
            expect![[r#"
                Ns importing 'denied' from s3://cache at http://127.0.0.1:PORT (1 of 2)
                Ns reading the manifest
                Ns importing 'main' from s3://cache at http://127.0.0.1:PORT (2 of 2)
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
                error: http://127.0.0.1:PORT answered 403 AccessDenied (The test server was told to answer AccessDenied.), reading s3://cache/manifests/denied; s3:GetObject may be missing, or the object itself: without s3:ListBucket a missing key answers 403 too; layercache doctor tells which permission is missing
            "#]],
        ),
    ] {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let (layout, file) = (folder.path().join("layout"), folder.path().join("file"));
        Program::new()
            .arg("import")
            .args(["--cache-from", &server.spec(&format!("name={branch}"))])
            .args(["--cache-from", &server.spec("name=main")])
            .arg(&layout)
            .arg("--metadata-file")
            .arg(&file)
            .run()
            .ends_with(1)
            .prints(stdout, stderr);
        assert_eq!(tags(&layout), ["latest"]);
        assert_eq!(files(&layout), files(&fixture("local-max")));
        let results = results(&file);
        assert!(results[0]["error"].is_string(), "{}", results[0]);
        assert_eq!(results[1]["tag"], "latest");
        assert_eq!(results[1]["transferred"], 10);
    }
}

#[test]
fn require_wants_one_of_the_sources_to_be_there() {
    let server = Server::start();
    Program::export(&server.spec("mode=max,name=main"), &fixture("local-max"))
        .run()
        .succeeds();
    let import = |names: [&str; 2], folder: &Path| {
        Program::new()
            .args(["import", "--require"])
            .args(["--cache-from", &server.spec(&format!("name={}", names[0]))])
            .args(["--cache-from", &server.spec(&format!("name={}", names[1]))])
            .arg(folder.join("layout"))
            .arg("--metadata-file")
            .arg(folder.join("file"))
            .run()
    };
    for (names, stdout, stderr) in [
        (
            ["pr-7", "main"],
            expect![[r#"
                no cache named 'pr-7' in s3://cache at http://127.0.0.1:PORT yet: there is no manifests/pr-7; 1 request in N s
                imported 'main' from s3://cache/manifests/main at http://127.0.0.1:PORT into TMP/layout as latest: 10 blobs: 10 fetched (62.9 KiB), 0 already there; 11 requests in N s
            "#]],
            expect![[r#"
                Ns importing 'pr-7' from s3://cache at http://127.0.0.1:PORT (1 of 2)
                Ns reading the manifest
                Ns importing 'main' from s3://cache at http://127.0.0.1:PORT (2 of 2)
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
            "#]],
        ),
        (
            ["main", "pr-7"],
            expect![[r#"
                imported 'main' from s3://cache/manifests/main at http://127.0.0.1:PORT into TMP/layout as latest: 10 blobs: 10 fetched (62.9 KiB), 0 already there; 11 requests in N s
                no cache named 'pr-7' in s3://cache at http://127.0.0.1:PORT yet: there is no manifests/pr-7; 1 request in N s
            "#]],
            expect![[r#"
                Ns importing 'main' from s3://cache at http://127.0.0.1:PORT (1 of 2)
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
                Ns importing 'pr-7' from s3://cache at http://127.0.0.1:PORT (2 of 2)
                Ns reading the manifest
            "#]],
        ),
    ] {
        let folder = tempfile::tempdir().expect("a temporary directory");
        import(names, folder.path())
            .succeeds()
            .prints(stdout, stderr);
        assert_eq!(tags(&folder.path().join("layout")), ["latest"]);
    }
    let folder = tempfile::tempdir().expect("a temporary directory");
    import(["pr-7", "pr-8"], folder.path())
        .ends_with(1)
        .prints(expect![[r#"
            no cache named 'pr-7' in s3://cache at http://127.0.0.1:PORT yet: there is no manifests/pr-7; 1 request in N s
            no cache named 'pr-8' in s3://cache at http://127.0.0.1:PORT yet: there is no manifests/pr-8; 1 request in N s
        "#]], expect![[r#"
            Ns importing 'pr-7' from s3://cache at http://127.0.0.1:PORT (1 of 2)
            Ns reading the manifest
            Ns importing 'pr-8' from s3://cache at http://127.0.0.1:PORT (2 of 2)
            Ns reading the manifest
            error: --require: none of the caches has a usable result
        "#]]);
    for result in results(&folder.path().join("file")) {
        assert_eq!(result["notFound"], true);
        assert!(result["error"].is_string(), "{result}");
    }
}
