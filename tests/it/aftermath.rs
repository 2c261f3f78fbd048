//! What must hold after any run, however it ended, and caches large enough to interrupt a blob midway.

use std::collections::BTreeSet;
use std::path::Path;

use bytes::Bytes;
use layercache::cache::digest::Digest;
use serde_json::{Value, json};

use crate::program::Program;
use crate::server::Server;

/// Whether the long tests run at full size.
pub fn soak() -> bool {
    std::env::var_os("LAYERCACHE_SOAK").is_some_and(|value| value == "1")
}

/// Every object under `blobs/` matches its digest, and no manifest names an absent blob.
#[track_caller]
pub fn assert_store_is_sound(server: &Server, when: &str) {
    let objects = server.objects();
    for (key, bytes) in &objects {
        if let Some(digest) = key.strip_prefix("blobs/") {
            assert_eq!(Digest::of(bytes).to_string(), digest, "{when}");
            continue;
        }
        let manifest: Value = serde_json::from_slice(bytes)
            .unwrap_or_else(|error| panic!("{when}: {key} is torn: {error}"));
        for layer in manifest["layers"].as_array().into_iter().flatten() {
            let blob = layer["blob"].as_str().expect("a digest");
            let object = objects.get(&format!("blobs/{blob}"));
            assert_eq!(
                object.map(|object| object.len() as u64),
                layer["annotations"]["size"].as_u64(),
                "{when}: {key} names {blob}"
            );
        }
    }
}

/// Every blob matches its name, no partial file is outside `.layercache/`, and every manifest in the
/// index is complete.
#[track_caller]
pub fn assert_layout_is_sound(root: &Path, when: &str) {
    let names = |path: &Path| -> BTreeSet<String> {
        let Ok(entries) = std::fs::read_dir(path) else {
            return BTreeSet::new();
        };
        entries
            .map(|entry| {
                let entry = entry.expect("an entry");
                entry.file_name().to_string_lossy().into_owned()
            })
            .collect()
    };
    let visible = [
        ".layercache",
        "blobs",
        "index.json",
        "index.json.lock",
        "oci-layout",
    ];
    for name in names(root) {
        assert!(visible.contains(&name.as_str()), "{when}: {name}");
    }
    let blobs = root.join("blobs/sha256");
    let there = names(&blobs);
    for name in &there {
        let bytes = std::fs::read(blobs.join(name)).expect("a blob can be read");
        assert_eq!(&Digest::of(&bytes).hex(), name, "{when}");
    }
    let Ok(index) = std::fs::read(root.join("index.json")) else {
        return;
    };
    let index: Value = serde_json::from_slice(&index)
        .unwrap_or_else(|error| panic!("{when}: index.json is torn: {error}"));
    assert!(root.join("oci-layout").is_file(), "{when}");
    for entry in index["manifests"].as_array().expect("entries") {
        let hex = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().expect("a digest");
            digest.strip_prefix("sha256:").expect("sha256").to_owned()
        };
        let manifest = std::fs::read(blobs.join(hex(entry)))
            .unwrap_or_else(|error| panic!("{when}: the index names {entry}: {error}"));
        let manifest: Value = serde_json::from_slice(&manifest).expect("a manifest is JSON");
        let config = Some(&manifest["config"]).filter(|config| config.is_object());
        let children = ["layers", "manifests"].map(|list| manifest[list].as_array());
        for child in children.into_iter().flatten().flatten().chain(config) {
            assert!(there.contains(&hex(child)), "{when}: {child} is absent");
        }
    }
}

/// Incompressible bytes, the same for the same seed.
pub fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut noise = Vec::with_capacity(bytes + 8);
    while noise.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend_from_slice(&state.to_le_bytes());
    }
    noise.truncate(bytes);
    noise
}

/// Puts a cache with one layer for each of `sizes` on the server, under `name`, as BuildKit would.
pub fn put_cache(server: &Server, name: &str, sizes: &[usize]) {
    let mut blobs: Vec<(Digest, Bytes)> = (1u64..)
        .zip(sizes)
        .map(|(seed, &size)| {
            let bytes = noise(seed, size);
            (Digest::of(&bytes), bytes.into())
        })
        .collect();
    blobs.sort_by_key(|(digest, _)| *digest);
    let created = "2026-11-21T20:37:36.959076185Z";
    let layers: Vec<Value> = blobs
        .iter()
        .map(|(digest, bytes)| {
            json!({"blob": digest.to_string(), "parent": -1, "annotations": {
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "diffID": digest.to_string(), "size": bytes.len(), "createdAt": created,
            }})
        })
        .collect();
    let records: Vec<Value> = (0..blobs.len())
        .map(|layer| {
            json!({"layers": [{"layer": layer, "createdAt": created}],
                "digest": Digest::of(&layer.to_le_bytes()).to_string()})
        })
        .collect();
    for (digest, bytes) in blobs {
        server.put(&format!("blobs/{digest}"), bytes);
    }
    let manifest = json!({"layers": layers, "records": records});
    server.put(&format!("manifests/{name}"), manifest.to_string());
}

/// A layout with such a cache under the tag `latest`.
pub fn layout_of(sizes: &[usize]) -> tempfile::TempDir {
    let server = Server::start();
    put_cache(&server, "buildkit", sizes);
    let layout = tempfile::tempdir().expect("a temporary directory");
    Program::import(&server.spec(""), layout.path())
        .run()
        .succeeds();
    layout
}
