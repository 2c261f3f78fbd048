//! A lifecycle rule has removed blobs that the manifest still names (moby/buildkit#3223).

use std::collections::BTreeSet;
use std::path::Path;

use expect_test::expect;
use layercache::cache::CacheConfig;
use layercache::cache::digest::Digest;

use crate::program::{Program, Run, files, fixture, s3_manifest};
use crate::server::Server;

/// The base of all layers, and a layer that is no other's parent.
const BASE: &str = "sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2";
const LEAF: &str = "sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece";
/// The parent of two others.
const MIDDLE: &str = "sha256:1538290aa3942dd8d0cb2147837b15b76bacf1fb75179c31710f2ce4a9ab2d4a";

fn exported() -> Server {
    let server = Server::start();
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .run()
        .succeeds();
    server.clear_log();
    server
}

fn digest(text: &str) -> Digest {
    text.parse().expect("a digest")
}

/// The cache under a layout's tag, as an export to a new server writes it.
fn reexported(layout: &Path) -> CacheConfig {
    let server = Server::start();
    Program::export(&server.spec("mode=max"), layout)
        .run()
        .succeeds();
    let objects = server.objects();
    let cache = CacheConfig::parse_s3(&objects["manifests/buildkit"]).expect("a valid manifest");
    for layer in &cache.layers {
        assert!(objects.contains_key(&format!("blobs/{}", layer.blob)));
    }
    cache
}

fn whole() -> CacheConfig {
    CacheConfig::parse_s3(&s3_manifest("max.json")).expect("the fixture is valid")
}

/// For each result, its layer with all ancestors, from the bottom up.
fn results(cache: &CacheConfig) -> BTreeSet<Vec<Digest>> {
    let results = cache.records.iter().flat_map(|record| &record.results);
    results
        .map(|result| {
            let mut path = Vec::new();
            let mut next = Some(result.layer);
            while let Some(at) = next {
                path.push(cache.layers[at].blob);
                next = cache.layers[at].parent;
            }
            path.reverse();
            path
        })
        .collect()
}

#[test]
fn an_import_drops_exactly_the_results_that_stand_on_a_missing_blob() {
    for (missing, stdout, stderr) in [
        (
            LEAF,
            expect![[r#"
                imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP as latest: 9 blobs: 9 fetched (56.8 KiB), 0 already there; 11 requests in N s
            "#]],
            expect![[r#"
                Ns reading the manifest
                Ns fetching (10 blobs, 62.9 KiB)
                Ns [N/10] downloaded sha256:01a37f800d03 159 B
                Ns [N/10] downloaded sha256:0d68a9c7a878 8.46 KiB
                Ns [N/10] downloaded sha256:1538290aa394 9.00 KiB
                Ns [N/10] downloaded sha256:230a4b9dd0a4 8.51 KiB
                Ns [N/10] downloaded sha256:662e50c29c13 9.03 KiB
                Ns [N/10] downloaded sha256:6e52fec599f1 635 B
                Ns [N/10] downloaded sha256:aa969215ace4 8.98 KiB
                Ns [N/10] downloaded sha256:b95b63489f91 12.0 KiB
                Ns [N/10] downloaded sha256:f898e33dc2c9 90 B
                Ns sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece is not on S3 any more
                warning: S3 lacks 1 blob of the cache (expired?): left out 5 results and 5 layers
            "#]],
        ),
        (
            MIDDLE,
            expect![[r#"
                imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP as latest: 9 blobs: 9 fetched (53.9 KiB), 0 already there; 11 requests in N s
            "#]],
            expect![[r#"
                Ns reading the manifest
                Ns fetching (10 blobs, 62.9 KiB)
                Ns [N/10] downloaded sha256:01a37f800d03 159 B
                Ns [N/10] downloaded sha256:0d68a9c7a878 8.46 KiB
                Ns [N/10] downloaded sha256:230a4b9dd0a4 8.51 KiB
                Ns [N/10] downloaded sha256:662e50c29c13 9.03 KiB
                Ns [N/10] downloaded sha256:6e52fec599f1 635 B
                Ns [N/10] downloaded sha256:710869d00fd0 6.12 KiB
                Ns [N/10] downloaded sha256:aa969215ace4 8.98 KiB
                Ns [N/10] downloaded sha256:b95b63489f91 12.0 KiB
                Ns [N/10] downloaded sha256:f898e33dc2c9 90 B
                Ns sha256:1538290aa3942dd8d0cb2147837b15b76bacf1fb75179c31710f2ce4a9ab2d4a is not on S3 any more
                warning: S3 lacks 1 blob of the cache (expired?): left out 4 results and 4 layers
            "#]],
        ),
        (
            BASE,
            expect![[r#"
                imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP as latest: 9 blobs: 9 fetched (51.0 KiB), 0 already there; 11 requests in N s
            "#]],
            expect![[r#"
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
                Ns [N/10] downloaded sha256:f898e33dc2c9 90 B
                Ns sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2 is not on S3 any more
                warning: S3 lacks 1 blob of the cache (expired?): left out 10 results and 10 layers
            "#]],
        ),
    ] {
        let server = exported();
        assert!(server.remove(&format!("blobs/{missing}")));
        let layout = tempfile::tempdir().expect("a temporary directory");
        Program::import(&server.spec(""), layout.path())
            .run()
            .succeeds()
            .prints(stdout, stderr);
        assert!(!layout.path().join(".layercache").exists());
        let kept = reexported(layout.path());
        let mut expected = results(&whole());
        expected.retain(|path| !path.contains(&digest(missing)));
        assert_eq!(results(&kept), expected, "without {missing}");
        // BuildKit finds results through records and links, so all of these stay.
        assert_eq!(kept.records.len(), whole().records.len());
    }
}

#[test]
fn with_every_blob_gone_an_import_still_succeeds_and_keeps_the_records() {
    let server = exported();
    for layer in whole().layers {
        server.remove(&format!("blobs/{}", layer.blob));
    }
    let layout = tempfile::tempdir().expect("a temporary directory");
    Program::import(&server.spec(""), layout.path())
        .run()
        .succeeds()
        .prints(expect![[r#"
            imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP as latest: 0 blobs: 0 fetched (0 B), 0 already there; 11 requests in N s
        "#]], expect![[r#"
            Ns reading the manifest
            Ns fetching (10 blobs, 62.9 KiB)
            Ns sha256:01a37f800d030bb622b32a3aa014438f04bb5207297f713f966e0ae4dc5e1f0b is not on S3 any more
            Ns sha256:0d68a9c7a878208cd83549b2d815b496a7a54bc7898d03e01a4dc38f885120b8 is not on S3 any more
            Ns sha256:1538290aa3942dd8d0cb2147837b15b76bacf1fb75179c31710f2ce4a9ab2d4a is not on S3 any more
            Ns sha256:230a4b9dd0a461dbf8fdb958a9f425a53fbcd80184c6f09587938ee923aa9eda is not on S3 any more
            Ns sha256:662e50c29c1360b57af3adbf5fd1aed547ac1f0ec630a8e88f3624954cf7b9a0 is not on S3 any more
            Ns sha256:6e52fec599f1143ad9ca7bba3be69c6b1cd18e40154c8c03017e1fe2fbbd7317 is not on S3 any more
            Ns sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece is not on S3 any more
            Ns sha256:aa969215ace405520c7048a4522c13688572ca691e3f45fa6567b0ac1e97157f is not on S3 any more
            Ns sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2 is not on S3 any more
            Ns sha256:f898e33dc2c9e1987672cf111dd3909a8a2331a1c9c2490a329d25ab46c16d4f is not on S3 any more
            warning: S3 lacks 10 blobs of the cache (expired?): left out 10 results and 10 layers
        "#]]);
    let kept = reexported(layout.path());
    assert!(kept.layers.is_empty());
    assert_eq!(results(&kept), BTreeSet::new());
    assert_eq!(kept.records.len(), whole().records.len());
}

#[test]
fn under_missing_error_an_import_fails_names_the_blob_and_sets_no_tag() {
    let server = exported();
    server.remove(&format!("blobs/{LEAF}"));
    let layout = tempfile::tempdir().expect("a temporary directory");
    Program::import(&server.spec(""), layout.path())
        .args(["--missing", "error"])
        .run()
        .ends_with(1)
        .without_blobs()
        .prints(expect![[""]], expect![[r#"
            Ns reading the manifest
            Ns fetching (10 blobs, 62.9 KiB)
            error: S3 lacks 1 blob of the cache (expired?): sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece; export the cache again, or let --missing=drop leave out what needs them (importing 'buildkit' from s3://cache at http://127.0.0.1:PORT)
        "#]]);
    assert!(!layout.path().join("index.json").exists());
    assert!(!layout.path().join(".layercache").exists());
}

#[test]
fn a_dry_run_says_which_blobs_are_gone_and_fails_where_the_import_would() {
    let server = exported();
    server.remove(&format!("blobs/{MIDDLE}"));
    let folder = tempfile::tempdir().expect("a temporary directory");
    let layout = folder.path().join("layout");
    let import = || Program::import(&server.spec(""), &layout);
    let run = import()
        .arg("--dry-run")
        .run()
        .succeeds()
        .prints(expect![[r#"
            dry run: would import 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP/layout as latest: 9 blobs: would fetch 9 (53.9 KiB), 0 already there; 11 requests in N s
        "#]], expect![[r#"
            Ns reading the manifest
            Ns looking for blobs on S3
            Ns sha256:1538290aa3942dd8d0cb2147837b15b76bacf1fb75179c31710f2ce4a9ab2d4a is not on S3 any more
            Ns would fetch sha256:01a37f800d030bb622b32a3aa014438f04bb5207297f713f966e0ae4dc5e1f0b (159 B)
            Ns would fetch sha256:0d68a9c7a878208cd83549b2d815b496a7a54bc7898d03e01a4dc38f885120b8 (8.46 KiB)
            Ns would fetch sha256:230a4b9dd0a461dbf8fdb958a9f425a53fbcd80184c6f09587938ee923aa9eda (8.51 KiB)
            Ns would fetch sha256:662e50c29c1360b57af3adbf5fd1aed547ac1f0ec630a8e88f3624954cf7b9a0 (9.03 KiB)
            Ns would fetch sha256:6e52fec599f1143ad9ca7bba3be69c6b1cd18e40154c8c03017e1fe2fbbd7317 (635 B)
            Ns would fetch sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece (6.12 KiB)
            Ns would fetch sha256:aa969215ace405520c7048a4522c13688572ca691e3f45fa6567b0ac1e97157f (8.98 KiB)
            Ns would fetch sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2 (12.0 KiB)
            Ns would fetch sha256:f898e33dc2c9e1987672cf111dd3909a8a2331a1c9c2490a329d25ab46c16d4f (90 B)
            warning: S3 lacks 1 blob of the cache (expired?): would leave out 4 results and 4 layers
        "#]]);
    import()
        .args(["--dry-run", "--missing=error"])
        .run()
        .ends_with(1)
        .prints(expect![[""]], expect![[r#"
            Ns reading the manifest
            Ns looking for blobs on S3
            Ns would fetch sha256:01a37f800d030bb622b32a3aa014438f04bb5207297f713f966e0ae4dc5e1f0b (159 B)
            Ns would fetch sha256:0d68a9c7a878208cd83549b2d815b496a7a54bc7898d03e01a4dc38f885120b8 (8.46 KiB)
            Ns would fetch sha256:230a4b9dd0a461dbf8fdb958a9f425a53fbcd80184c6f09587938ee923aa9eda (8.51 KiB)
            Ns would fetch sha256:662e50c29c1360b57af3adbf5fd1aed547ac1f0ec630a8e88f3624954cf7b9a0 (9.03 KiB)
            Ns would fetch sha256:6e52fec599f1143ad9ca7bba3be69c6b1cd18e40154c8c03017e1fe2fbbd7317 (635 B)
            Ns would fetch sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece (6.12 KiB)
            Ns would fetch sha256:aa969215ace405520c7048a4522c13688572ca691e3f45fa6567b0ac1e97157f (8.98 KiB)
            Ns would fetch sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2 (12.0 KiB)
            Ns would fetch sha256:f898e33dc2c9e1987672cf111dd3909a8a2331a1c9c2490a329d25ab46c16d4f (90 B)
            error: S3 lacks 1 blob of the cache (expired?): sha256:1538290aa3942dd8d0cb2147837b15b76bacf1fb75179c31710f2ce4a9ab2d4a; export the cache again, or let --missing=drop leave out what needs them (importing 'buildkit' from s3://cache at http://127.0.0.1:PORT)
        "#]]);
    assert!(!layout.exists());
    assert_eq!(server.count("GetObject"), 2, "the manifest, twice");

    // The real run leaves out what was announced.
    let warning = |run: &Run| {
        let mut lines = run.stderr.lines().map(str::to_owned);
        lines
            .find(|line| line.starts_with("warning: "))
            .expect("a warning")
    };
    let done = import().run().succeeds();
    assert_eq!(
        warning(&run).replace("would leave out", "left out"),
        warning(&done)
    );
}

#[test]
fn a_dry_run_fails_of_a_blob_that_has_another_size() {
    let server = exported();
    server.put(&format!("blobs/{LEAF}"), "short");
    let layout = tempfile::tempdir().expect("a temporary directory");
    Program::import(&server.spec(""), layout.path())
        .arg("--dry-run")
        .run()
        .ends_with(1)
        .without_blobs()
        .prints(expect![[""]], expect![[r#"
            Ns reading the manifest
            Ns looking for blobs on S3
            error: blob blobs/sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece on S3 is damaged: it has 5 bytes where the manifest says 6265; export the cache again (importing 'buildkit' from s3://cache at http://127.0.0.1:PORT)
        "#]]);
}

#[test]
fn an_export_uploads_blobs_that_are_gone_though_a_manifest_names_them() {
    let server = exported();
    server.remove(&format!("blobs/{LEAF}"));
    server.remove(&format!("blobs/{BASE}"));
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .run()
        .succeeds()
        .prints(expect![[r#"
            exported 10 blobs to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 2 uploaded (18.1 KiB), 8 already there, 0 refreshed; 22 requests in N s
        "#]], expect![[r#"
            Ns looking for blobs on S3
            Ns uploading (2 blobs, 18.1 KiB)
            Ns [N/2] uploaded sha256:710869d00fd0 6.12 KiB
            Ns [N/2] uploaded sha256:b95b63489f91 12.0 KiB
            Ns wrote manifests/buildkit
        "#]]);
    let mut put: Vec<String> = server
        .log()
        .into_iter()
        .filter(|logged| logged.method == "PUT")
        .map(|logged| logged.key)
        .collect();
    put.sort();
    let mut expected = vec![
        format!("blobs/{LEAF}"),
        format!("blobs/{BASE}"),
        "manifests/buildkit".to_owned(),
    ];
    expected.sort();
    assert_eq!(put, expected);
}

#[test]
fn the_import_after_the_blobs_are_back_is_whole_again() {
    let server = exported();
    server.remove(&format!("blobs/{MIDDLE}"));
    let layout = tempfile::tempdir().expect("a temporary directory");
    Program::import(&server.spec(""), layout.path())
        .run()
        .succeeds();
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .run()
        .succeeds();
    Program::import(&server.spec(""), layout.path())
        .run()
        .succeeds()
        .prints(expect![[r#"
            imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP as latest: 10 blobs: 1 fetched (9.00 KiB), 9 already there; 2 requests in N s
        "#]], expect![[r#"
            Ns reading the manifest
            Ns fetching (1 blob, 9.00 KiB)
            Ns [N/1] downloaded sha256:1538290aa394 9.00 KiB
        "#]]);
    assert_eq!(reexported(layout.path()), whole());
}

#[test]
fn an_image_with_a_missing_blob_comes_back_as_the_cache_that_is_left() {
    let server = Server::start();
    let spec = server.spec("mode=max");
    Program::export(&spec, &fixture("image-inline"))
        .run()
        .succeeds();
    let cache = CacheConfig::parse_s3(&server.objects()["manifests/buildkit"]).expect("valid");
    // A blob that only the image needs: its manifest.
    let root = cache.image.expect("an image").root.digest;
    assert!(server.remove(&format!("blobs/{root}")));
    let layout = tempfile::tempdir().expect("a temporary directory");
    Program::import(&spec, layout.path())
        .run()
        .succeeds()
        .prints(expect![[r#"
            imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP as latest: 6 blobs: 6 fetched (34.6 KiB), 0 already there; 8 requests in N s
        "#]], expect![[r#"
            warning: --cache-from: mode: ignored: it means something on --cache-to only
            Ns reading the manifest
            Ns fetching (7 blobs, 35.9 KiB)
            Ns [N/7] downloaded sha256:0d68a9c7a878 8.46 KiB
            Ns [N/7] downloaded sha256:14b83d454ab7 4.53 KiB
            Ns [N/7] downloaded sha256:6e52fec599f1 635 B
            Ns [N/7] downloaded sha256:aa969215ace4 8.98 KiB
            Ns [N/7] downloaded sha256:b95b63489f91 12.0 KiB
            Ns [N/7] downloaded sha256:f898e33dc2c9 90 B
            Ns sha256:00afeaf117419cda1c679efc7c21a51d9cda419781b1e754014f68a7042c9668 is not on S3 any more
            warning: S3 lacks 1 blob of the cache (expired?): left out 0 results and 0 layers, and the image cannot be restored
        "#]]);
    let kept = reexported(layout.path());
    assert_eq!(kept.image, None);
    assert_eq!(kept.layers, cache.layers);
    assert_eq!(kept.records, cache.records);
    assert!(
        files(layout.path())
            .keys()
            .all(|name| !name.contains(&root.hex()))
    );
}
