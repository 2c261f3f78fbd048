//! The program writes what BuildKit writes, byte for byte, in both directions.

use std::collections::BTreeMap;

use crate::program::{Program, files, fixture, s3_manifest};
use crate::server::Server;

fn specs(server: &Server, extra: &str) -> [String; 2] {
    [server.spec(extra), server.virtual_hosted_spec(extra)]
}

#[test]
fn exporting_a_cache_in_any_form_puts_the_manifest_on_s3_that_buildkit_wrote() {
    for (layout, mode, expected) in [
        ("local-max", "max", "max.json"),
        ("local-index", "max", "max.json"),
        ("local-docker", "max", "max.json"),
        ("local-min", "max", "min.json"),
        ("local-multiarch", "max", "multiarch.json"),
        ("local-max", "min", "min.json"),
        ("local-index", "min", "min.json"),
        ("local-docker", "min", "min.json"),
    ] {
        for style in 0..2 {
            let server = Server::start();
            let spec = &specs(&server, &format!("name=n,mode={mode}"))[style];
            Program::export(spec, &fixture(layout)).run().succeeds();
            let objects = server.objects();
            assert_eq!(
                String::from_utf8_lossy(&objects["manifests/n"]),
                String::from_utf8_lossy(&s3_manifest(expected)),
                "{layout} mode={mode}"
            );
            assert_every_blob_is_its_digest(&objects);
        }
    }
}

fn assert_every_blob_is_its_digest(objects: &BTreeMap<String, bytes::Bytes>) {
    for (key, bytes) in objects {
        if let Some(digest) = key.strip_prefix("blobs/") {
            assert_eq!(
                layercache::cache::digest::Digest::of(bytes).to_string(),
                digest
            );
        }
    }
}

#[test]
fn min_is_the_mode_unless_told_otherwise() {
    let server = Server::start();
    Program::export(&server.spec(""), &fixture("local-max"))
        .run()
        .succeeds();
    assert_eq!(
        server.objects()["manifests/buildkit"],
        s3_manifest("min.json")
    );
}

#[test]
fn a_zstd_cache_has_the_same_records_over_its_own_layers() {
    let server = Server::start();
    Program::export(&server.spec("mode=max,name=z"), &fixture("local-zstd"))
        .run()
        .succeeds();
    let written: serde_json::Value =
        serde_json::from_slice(&server.objects()["manifests/z"]).expect("JSON");
    let gzip: serde_json::Value = serde_json::from_slice(&s3_manifest("max.json")).expect("JSON");
    let layers = written["layers"].as_array().expect("layers");
    let of_record =
        |manifest: &serde_json::Value| -> BTreeMap<String, (serde_json::Value, Vec<String>)> {
            let records = manifest["records"].as_array().expect("records").iter();
            records
                .map(|record| {
                    let diff_ids =
                        record["layers"]
                            .as_array()
                            .into_iter()
                            .flatten()
                            .map(|result| {
                                let layer = &manifest["layers"]
                                    [result["layer"].as_u64().expect("an index") as usize];
                                layer["annotations"]["diffID"].to_string()
                            });
                    (
                        record["digest"].to_string(),
                        (record["inputs"].clone(), diff_ids.collect()),
                    )
                })
                .collect()
        };
    assert_eq!(of_record(&written), of_record(&gzip));
    for layer in layers {
        assert_eq!(
            layer["annotations"]["mediaType"],
            "application/vnd.oci.image.layer.v1.tar+zstd"
        );
    }
}

#[test]
fn importing_what_buildkit_put_on_s3_gives_the_layout_that_buildkit_writes() {
    for (manifest, layout, blobs_of) in [
        ("max.json", "local-max", "local-max"),
        ("min.json", "local-min", "local-max"),
        ("multiarch.json", "local-multiarch", "local-multiarch"),
    ] {
        let server = Server::start();
        server.put("manifests/buildkit", s3_manifest(manifest));
        for (name, bytes) in files(&fixture(blobs_of)) {
            if let Some(hex) = name
                .strip_prefix("blobs/sha256/")
                .filter(|hex| !hex.is_empty())
            {
                server.put(&format!("blobs/sha256:{hex}"), bytes);
            }
        }
        for spec in specs(&server, "") {
            let directory = tempfile::tempdir().expect("a temporary directory");
            let imported = directory.path().join("new/cache");
            Program::import(&spec, &imported).run().succeeds();
            assert_eq!(files(&imported), files(&fixture(layout)), "{manifest}");
        }
    }
}

#[test]
fn an_image_comes_back_from_s3_as_it_was() {
    for layout in ["image-plain", "image-multiarch", "image-inline"] {
        for mode in ["min", "max"] {
            let server = Server::start();
            let spec = server.spec(&format!("name=image,mode={mode}"));
            Program::export(&spec, &fixture(layout)).run().succeeds();
            let imported = tempfile::tempdir().expect("a temporary directory");
            Program::import(&server.spec("name=image"), imported.path())
                .run()
                .succeeds();
            assert_eq!(
                files(imported.path()),
                files(&fixture(layout)),
                "{layout} mode={mode}"
            );
        }
    }
}

#[test]
fn inline_cache_becomes_the_manifest_that_buildkit_writes_for_the_same_build() {
    let server = Server::start();
    Program::export(&server.spec("name=i,mode=max"), &fixture("image-inline"))
        .run()
        .succeeds();
    let mut written: serde_json::Value =
        serde_json::from_slice(&server.objects()["manifests/i"]).expect("JSON");
    let ours = written
        .as_object_mut()
        .expect("an object")
        .remove("layercache");
    assert!(ours.is_some_and(|ours| ours["root"]["digest"].is_string()));
    assert_eq!(written.to_string().into_bytes(), s3_manifest("min.json"));
}
