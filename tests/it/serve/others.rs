//! Clients that others wrote.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use layercache::cache::digest::Digest;
use oci_client::Reference;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;
use serde_json::Value;

use super::Serve;
use super::pull::FIXTURES;
use crate::program::{Program, copy_of, files, fixture};
use crate::server::Server;

/// A layout whose index says nothing that a registry is not told.
pub fn bare(name: &str) -> tempfile::TempDir {
    let layout = copy_of(&fixture(name));
    let index = layout.path().join("index.json");
    let bytes = std::fs::read(&index).expect("an index");
    let mut json: Value = serde_json::from_slice(&bytes).expect("JSON");
    let entry = json["manifests"][0].as_object_mut().expect("an entry");
    entry.remove("annotations");
    entry.remove("platform");
    std::fs::write(&index, json.to_string()).expect("written");
    layout
}

fn oci_client(monolithic: bool) -> oci_client::Client {
    // reqwest wants one even for plain HTTP.
    let _ = rustls::crypto::ring::default_provider().install_default();
    oci_client::Client::new(ClientConfig {
        protocol: ClientProtocol::Http,
        use_monolithic_push: monolithic,
        ..ClientConfig::default()
    })
}

fn reference(serve: &Serve, variable: &str) -> Reference {
    let text = serve.attribute(variable, "ref");
    text.parse().expect("a reference")
}

/// A manifest of a layout, and what it names: other manifests, and blobs.
fn read(layout: &Path, digest: &str) -> (Vec<u8>, Vec<String>, Vec<String>) {
    let path = layout.join("blobs").join(digest.replace(':', "/"));
    let bytes = std::fs::read(path).expect("a manifest");
    let json: Value = serde_json::from_slice(&bytes).expect("JSON");
    let (mut manifests, mut blobs) = (Vec::new(), Vec::new());
    let digest = |entry: &Value| entry["digest"].as_str().expect("a digest").to_owned();
    for entry in json["manifests"].as_array().into_iter().flatten() {
        let media_type = entry["mediaType"].as_str().expect("a type");
        match media_type.contains("manifest") {
            true => manifests.push(digest(entry)),
            false => blobs.push(digest(entry)),
        }
    }
    blobs.extend(json["layers"].as_array().into_iter().flatten().map(digest));
    blobs.extend(json.get("config").map(digest));
    (bytes, manifests, blobs)
}

fn root(layout: &Path) -> (String, String) {
    let index = std::fs::read(layout.join("index.json")).expect("an index");
    let index: Value = serde_json::from_slice(&index).expect("JSON");
    let entry = &index["manifests"][0];
    let text = |field: &str| entry[field].as_str().expect("text").to_owned();
    (text("digest"), text("mediaType"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oci_client_pushes_and_pulls_every_fixture() {
    for (nth, name) in FIXTURES.into_iter().enumerate() {
        let layout = bare(name);
        let exported = Server::start();
        let spec = exported.spec("mode=max");
        Program::export(&spec, layout.path()).run().succeeds();

        let server = Server::start();
        let serve = Serve::writing(&server.spec("mode=max"));
        let image = reference(&serve, "LAYERCACHE_TO");
        let client = oci_client(nth % 2 == 0);
        let auth = &RegistryAuth::Anonymous;
        client.store_auth_if_needed(image.registry(), auth).await;
        let (tagged, media_type) = root(layout.path());
        let mut order = vec![tagged.clone()];
        let mut at = 0;
        while let Some(digest) = order.get(at).cloned() {
            at += 1;
            let (_, manifests, blobs) = read(layout.path(), &digest);
            order.extend(manifests);
            for blob in blobs {
                let path = layout.path().join("blobs").join(blob.replace(':', "/"));
                let bytes = std::fs::read(path).expect("a blob");
                if !client.blob_exists(&image, &blob).await.expect("an answer") {
                    client
                        .push_blob(&image, bytes, &blob)
                        .await
                        .expect("it is taken");
                }
            }
        }
        for digest in order.iter().rev() {
            let (bytes, ..) = read(layout.path(), digest);
            let json: Value = serde_json::from_slice(&bytes).expect("JSON");
            let media_type = json["mediaType"].as_str().unwrap_or(&media_type);
            let to = match *digest == tagged {
                true => image.clone(),
                false => image.clone_with_digest(digest.clone()),
            };
            let media_type = media_type.parse().expect("a header");
            let pushed = client.push_manifest_raw(&to, bytes, media_type).await;
            pushed.expect("it is taken");
        }
        assert!(server.objects() == exported.objects(), "{name}");

        let accepted = &["application/vnd.oci.image.index.v1+json", "*/*"];
        let (bytes, digest) = client
            .pull_manifest_raw(&image, auth, accepted)
            .await
            .expect("a manifest");
        assert_eq!(Digest::of(&bytes).to_string(), digest, "{name}");
        assert!(
            name == "local-docker" || name == "local-index" || digest == tagged,
            "{name}"
        );
        let json: Value = serde_json::from_slice(&bytes).expect("JSON");
        for layer in json["layers"].as_array().into_iter().flatten() {
            let digest = layer["digest"].as_str().expect("a digest");
            let mut blob = Vec::new();
            // It verifies the digest.
            client
                .pull_blob(&image, digest, &mut blob)
                .await
                .expect("a blob");
            assert_eq!(blob.len() as u64, layer["size"].as_u64().expect("a size"));
        }
        let tags = client
            .list_tags(&image, auth, None, None)
            .await
            .expect("tags");
        assert_eq!(tags.tags, ["latest"]);
        let referrers = client
            .pull_referrers(&image.clone_with_digest(tagged), None)
            .await
            .expect("referrers");
        assert!(referrers.manifests.is_empty());
    }
}

/// Copies with skopeo. `None`: it is not installed.
fn skopeo(from: &str, to: &str) -> Option<()> {
    let home = tempfile::tempdir().expect("a temporary directory");
    let output = Command::new("skopeo")
        .env("HOME", home.path())
        .env("XDG_RUNTIME_DIR", home.path())
        .args(["--insecure-policy", "copy", "--all", "--preserve-digests"])
        .args([
            "--src-tls-verify=false",
            "--dest-tls-verify=false",
            from,
            to,
        ])
        .output()
        .ok()?;
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{from} to {to}: {error}");
    Some(())
}

#[test]
fn skopeo_copies_images_and_caches_to_s3_and_back() {
    for name in [
        "image-inline",
        "image-multiarch",
        "image-plain",
        "local-max",
        "local-zstd",
    ] {
        let layout = bare(name);
        let exported = Server::start();
        let spec = exported.spec("mode=max");
        Program::export(&spec, layout.path()).run().succeeds();
        let server = Server::start();
        let serve = Serve::writing(&server.spec("mode=max"));
        let registry = format!("docker://{}", serve.attribute("LAYERCACHE_TO", "ref"));
        let from = format!("oci:{}", layout.path().display());
        if skopeo(&from, &registry).is_none() {
            eprintln!("skopeo is not installed: nothing was tested");
            return;
        }
        assert!(server.objects() == exported.objects(), "{name}");
        let copy = tempfile::tempdir().expect("a temporary directory");
        let to = format!("oci:{}", copy.path().display());
        skopeo(&registry, &to).expect("it is there");
        let blobs = |root: &Path| -> BTreeMap<String, Vec<u8>> {
            let mut files = files(root);
            files.retain(|name, _| name.starts_with("blobs/sha256/"));
            files
        };
        assert!(blobs(copy.path()) == blobs(layout.path()), "{name}");
    }
}
