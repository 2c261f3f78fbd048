//! An object with the right size and the wrong bytes.

use expect_test::expect;

use crate::aftermath::assert_store_is_sound;
use crate::program::{Program, fixture};
use crate::server::Server;

const LEAF: &str = "blobs/sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece";

fn with_a_damaged_blob() -> Server {
    let server = Server::start();
    let spec = server.spec("mode=max");
    Program::export(&spec, &fixture("local-max"))
        .run()
        .succeeds();
    server.put(LEAF, vec![7; server.objects()[LEAF].len()]);
    server
}

#[test]
fn an_import_leaves_out_what_needs_a_damaged_blob_and_lists_it() {
    let server = with_a_damaged_blob();
    let folder = tempfile::tempdir().expect("a temporary directory");
    let file = folder.path().join("metadata.json");
    Program::import(&server.spec(""), &folder.path().join("layout"))
        .arg("--metadata-file")
        .arg(&file)
        .run()
        .succeeds()
        .without_blobs()
        .prints(expect![[r#"
            imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP/layout as latest: 9 blobs: 9 fetched (56.8 KiB), 0 already there; 13 requests in N s
        "#]], expect![[r#"
            Ns reading the manifest
            Ns fetching (10 blobs, 62.9 KiB)
            warning: blob blobs/sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece on S3 is damaged: its bytes hash to sha256:0a1e876600d4a1f403ab4c7f96c18d845200198b551881be7b94fff4581027f1; export the cache again with --verify-remote
            warning: S3 lacks 1 blob of the cache (gone or damaged): left out 5 results and 5 layers
        "#]]);
    let metadata = std::fs::read(&file).expect("the metadata file");
    let metadata: serde_json::Value = serde_json::from_slice(&metadata).expect("JSON");
    assert_eq!(
        metadata["results"][0]["damaged"],
        serde_json::json!([LEAF.trim_start_matches("blobs/")])
    );
}

#[test]
fn under_missing_error_a_damaged_blob_fails_the_import() {
    let server = with_a_damaged_blob();
    let folder = tempfile::tempdir().expect("a temporary directory");
    Program::import(&server.spec(""), &folder.path().join("layout"))
        .arg("--missing=error")
        .run()
        .ends_with(1)
        .without_blobs()
        .prints(expect![[""]], expect![[r#"
            Ns reading the manifest
            Ns fetching (10 blobs, 62.9 KiB)
            error: blob blobs/sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece on S3 is damaged: its bytes hash to sha256:0a1e876600d4a1f403ab4c7f96c18d845200198b551881be7b94fff4581027f1; export the cache again with --verify-remote (importing 'buildkit' from s3://cache at http://127.0.0.1:PORT)
        "#]]);
}

#[test]
fn only_an_export_that_reads_back_or_is_forced_heals_it() {
    let damaged = vec![7; 6265];
    for (flag, heals) in [
        (None, false),
        (Some("--verify-remote"), true),
        (Some("--force"), true),
    ] {
        let server = with_a_damaged_blob();
        let spec = server.spec("mode=max");
        let mut export = Program::export(&spec, &fixture("local-max"));
        if let Some(flag) = flag {
            export = export.arg(flag);
        }
        let run = export.run().succeeds();
        assert_eq!(server.objects()[LEAF] != damaged, heals, "{flag:?}");
        let uploaded = match flag {
            None => "0 uploaded (0 B), 10 already there",
            Some("--force") => "10 uploaded (62.9 KiB), 0 already there",
            Some(_) => "1 uploaded (6.12 KiB), 9 already there",
        };
        assert!(run.stdout.contains(uploaded), "{}", run.stdout);
        if heals {
            assert_store_is_sound(&server, "healed");
        }
    }
}
