//! Blobs that a lifecycle rule removed while the manifest still names them (moby/buildkit#3223).

use std::collections::BTreeSet;
use std::path::Path;

use layercache::cache::CacheConfig;
use layercache::cache::digest::Digest;

use crate::program::{Program, files, fixture, s3_manifest};
use crate::server::Server;

/// The base of every layer, and a layer that nothing stands on.
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

/// The cache that a layout's tag leads to, on S3's side of the world: exported to a server of its own.
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

/// Every layer of a cache with its ancestors, from the bottom up, for each result.
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
    for missing in [LEAF, MIDDLE, BASE] {
        let server = exported();
        assert!(server.remove(&format!("blobs/{missing}")));
        let layout = tempfile::tempdir().expect("a temporary directory");
        Program::import(&server.spec(""), layout.path())
            .run()
            .succeeds()
            .says(&format!("{missing} is not on s3 any more"))
            .says("1 blob(s) that the manifest names are not on s3");
        assert!(!layout.path().join(".layercache").exists());
        let kept = reexported(layout.path());
        let mut expected = results(&whole());
        expected.retain(|path| !path.contains(&digest(missing)));
        assert_eq!(results(&kept), expected, "without {missing}");
        // BuildKit finds results by way of records and links: all of them stay.
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
        .says("10 blob(s)");
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
        .says(LEAF);
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
        .says(&format!("{MIDDLE} is not on s3 any more"))
        .says("would be left out")
        .says("would fetch 9 ")
        .says("would leave out");
    assert!(!run.stderr.contains(&format!("would fetch {MIDDLE}")));
    import()
        .args(["--dry-run", "--missing=error"])
        .run()
        .ends_with(1)
        .says(MIDDLE);
    assert!(!layout.exists());
    assert_eq!(server.count("GetObject"), 2, "the manifest, twice");

    // What the real run leaves out is what was announced.
    let announced = run.stdout.lines().nth(1).expect("a second line");
    let done = import().run().succeeds().stdout;
    let done = done.lines().nth(1).expect("a second line");
    assert_eq!(announced.replace("would leave out", "left out"), done);
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
        .says("it has 5 bytes");
}

#[test]
fn an_export_uploads_blobs_that_are_gone_though_a_manifest_names_them() {
    let server = exported();
    server.remove(&format!("blobs/{LEAF}"));
    server.remove(&format!("blobs/{BASE}"));
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .run()
        .succeeds()
        .says("2 uploaded");
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
        .says("1 fetched");
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
    // A blob that only the image needs: its own manifest.
    let root = cache.image.expect("an image").root.digest;
    assert!(server.remove(&format!("blobs/{root}")));
    let layout = tempfile::tempdir().expect("a temporary directory");
    Program::import(&spec, layout.path())
        .run()
        .succeeds()
        .says("the image cannot be restored");
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
