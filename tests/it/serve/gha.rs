//! GitHub's cache service, with the requests of go-actions-cache.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use expect_test::expect;
use layercache::cache::digest::Digest;
use serde_json::{Value, json};

use super::Serve;
use super::client::{Reply, request};
use super::pull::FIXTURES;
use crate::aftermath::{noise, put_cache};
use crate::program::{Program, fixture, s3_manifest};
use crate::server::{Fault, Server};

const MIB: usize = 1 << 20;

/// BuildKit's client for one token.
struct Gha {
    host: String,
    token: String,
    scope: String,
}

impl Gha {
    fn new(serve: &Serve, variable: &str) -> Gha {
        let url = serve.attribute(variable, "url");
        let host = url
            .strip_prefix("http://")
            .and_then(|url| url.strip_suffix('/'));
        assert_eq!(serve.attribute(variable, "version"), "1");
        Gha {
            host: host.expect("a URL").to_owned(),
            token: serve.attribute(variable, "token"),
            scope: serve.attribute(variable, "scope"),
        }
    }

    /// The scopes in the token, with their permissions.
    fn scopes(&self) -> Vec<(String, u64)> {
        let payload = self.token.split('.').nth(1).expect("a payload");
        let payload = URL_SAFE_NO_PAD.decode(payload).expect("base64");
        let payload: Value = serde_json::from_slice(&payload).expect("JSON");
        let scopes: Value =
            serde_json::from_str(payload["ac"].as_str().expect("a string")).expect("JSON");
        let scopes = scopes.as_array().expect("scopes").iter();
        scopes
            .map(|scope| {
                let name = scope["Scope"].as_str().expect("a scope").to_owned();
                (name, scope["Permission"].as_u64().expect("a permission"))
            })
            .collect()
    }

    fn index_key(&self, scope: &str) -> String {
        let digest = Digest::of(scope.as_bytes()).hex();
        format!("index-{}-1-{}", self.scope, &digest[..8])
    }

    fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let bearer = format!("Bearer {}", self.token);
        let mut all = vec![
            ("Authorization", bearer.as_str()),
            ("Accept", "application/json;api-version=6.0-preview.1"),
        ];
        all.extend(headers);
        let head = format!("{method} /_apis/artifactcache/{path}");
        request(&self.host, &head, &all, body)
    }

    /// A lookup: the entry, if there is one.
    fn load(&self, key: &str) -> Option<Value> {
        let key = key.replace('#', "%23");
        let reply = self.send("GET", &format!("cache?keys={key}&version=v"), &[], &[]);
        match reply.status {
            204 => None,
            _ => Some(reply.is(200).json()),
        }
    }

    fn download(&self, entry: &Value, range: Option<&str>) -> Reply {
        let location = entry["archiveLocation"].as_str().expect("a location");
        let rest = location.strip_prefix("http://").expect("a URL");
        let (host, path) = rest.split_once('/').expect("a path");
        let headers: Vec<_> = range.map(|range| ("Range", range)).into_iter().collect();
        request(host, &format!("GET /{path}"), &headers, &[])
    }

    fn reserve(&self, key: &str) -> Reply {
        let body = json!({"key": key, "version": "v"}).to_string();
        self.send(
            "POST",
            "caches",
            &[("Content-Type", "application/json")],
            body.as_bytes(),
        )
    }

    /// Sends a piece.
    fn patch(&self, id: u64, at: usize, bytes: &[u8]) -> Reply {
        let range = format!("bytes {at}-{}/*", at + bytes.len() - 1);
        let headers = [("Content-Range", range.as_str())];
        self.send("PATCH", &format!("caches/{id}"), &headers, bytes)
    }

    fn commit(&self, id: u64, size: usize) -> Reply {
        let body = json!({"size": size}).to_string();
        self.send("POST", &format!("caches/{id}"), &[], body.as_bytes())
    }

    /// Saves an entry in pieces, the last one first.
    fn save(&self, key: &str, bytes: &[u8], piece: usize) -> Reply {
        let id = self.reserve(key).is(201).json()["cacheId"]
            .as_u64()
            .expect("an id");
        assert!(id > 0);
        let pieces: Vec<_> = bytes.chunks(piece).enumerate().collect();
        for (nth, chunk) in pieces.into_iter().rev() {
            self.patch(id, nth * piece, chunk).is(204);
        }
        self.commit(id, bytes.len())
    }

    /// As go-actions-cache's SaveMutable.
    fn save_index(&self, scope: &str, bytes: &[u8]) -> Reply {
        let key = self.index_key(scope);
        let last = self.load(&format!("{key}#")).map(|entry| {
            let found = entry["cacheKey"].as_str().expect("a key").to_owned();
            let number = found.strip_prefix(&format!("{key}#")).expect("its own key");
            number.parse::<u64>().expect("a number")
        });
        self.save(&format!("{key}#{}", last.unwrap_or(0) + 1), bytes, 32 * MIB)
    }
}

#[test]
fn an_import_reads_every_scope_of_its_token_and_the_index_is_the_manifest() {
    let server = Server::start();
    for (name, fixture_name) in [("main", "local-max"), ("feature/x", "local-multiarch")] {
        let spec = server.spec(&format!("mode=max,name={name}"));
        Program::export(&spec, &fixture(fixture_name))
            .run()
            .succeeds();
    }
    let (branch, main) = (server.spec("name=feature/x"), server.spec("name=main"));
    let serve = Serve::start(&["--cache-from", &branch, "--cache-from", &main]);
    assert_eq!(serve.variables["LAYERCACHE_FROM"].lines().count(), 2);
    let gha = Gha::new(&serve, "LAYERCACHE_GHA_FROM");
    let scopes = gha.scopes();
    assert_eq!(scopes[0].0, gha.scope);
    assert_eq!(
        (scopes[1].clone(), scopes.len()),
        (("main".to_owned(), 1), 2)
    );
    for ((scope, _), manifest) in scopes.iter().zip(["multiarch.json", "max.json"]) {
        let key = gha.index_key(scope);
        let entry = gha.load(&key).expect("an index");
        assert_eq!(entry["cacheKey"], format!("{key}#1"));
        assert_eq!(&entry["scope"], scope);
        let index = gha.download(&entry, None).is(200);
        assert!(index.body == s3_manifest(manifest), "{manifest}");
        let index: Value = index.json();
        for layer in index["layers"].as_array().expect("layers") {
            let digest = layer["blob"].as_str().expect("a digest");
            let entry = gha
                .load(&format!("buildkit-blob-1-{digest}"))
                .expect("a blob");
            assert_eq!(entry["cacheKey"], format!("buildkit-blob-1-{digest}"));
            let blob = gha.download(&entry, None).is(200).body;
            assert_eq!(Digest::of(&blob).to_string(), digest);
            let rest = gha.download(&entry, Some("bytes=1-")).is(206);
            assert!(rest.body == blob[1..]);
        }
    }
    assert_eq!(gha.load(&gha.index_key("other")), None);
    assert_eq!(
        gha.reserve(&gha.index_key("main")).is(403).json()["message"],
        "this token only reads"
    );
    let run = serve.stop().succeeds();
    expect![[r#"
        Ns serving: builds on this machine can use the cache now
        warning: this token only reads
    "#]]
    .assert_eq(&crate::output::lasting(&run.stderr));
}

#[test]
fn a_blob_that_has_expired_is_a_miss() {
    let server = Server::start();
    put_cache(&server, "buildkit", &[1000, 100]);
    let serve = Serve::reading(&server.spec(""));
    let gha = Gha::new(&serve, "LAYERCACHE_GHA_FROM");
    let digest = Digest::of(&noise(1, 1000));
    let key = format!("buildkit-blob-1-{digest}");
    let entry = gha.load(&key).expect("it is there");
    server.remove(&format!("blobs/{digest}"));
    assert_eq!(gha.load(&key), None);
    gha.download(&entry, None).is(404);
    server.fail_all("HeadObject", Fault::Status(403, "AccessDenied"));
    assert_eq!(gha.load(&key), None);
    let run = serve.stop().succeeds();
    expect![[r#"
        Ns serving: builds on this machine can use the cache now
        warning: no cache for the build: http://127.0.0.1:PORT answered 403, looking for s3://cache/blobs/sha256:273816f02c495d10f4d7dc5588e38c2e2e6afc181f68ab00fc0d14ae1731c603; the keys may be wrong, or s3:GetObject missing, or the object itself: without s3:ListBucket a missing key answers 403 too
    "#]].assert_eq(&crate::output::lasting(&run.stderr));
}

/// Images too: their index is the manifest of their inline cache.
#[test]
fn every_fixture_is_read_as_its_manifest_and_the_blobs_of_its_layers() {
    for name in FIXTURES {
        let server = Server::start();
        Program::export(&server.spec("mode=max"), &fixture(name))
            .run()
            .succeeds();
        let objects = server.objects();
        let serve = Serve::reading(&server.spec(""));
        let gha = Gha::new(&serve, "LAYERCACHE_GHA_FROM");
        let entry = gha.load(&gha.index_key("buildkit")).expect("an index");
        let index = gha.download(&entry, None).is(200);
        assert!(index.body == objects["manifests/buildkit"], "{name}");
        let index = index.json();
        for layer in index["layers"].as_array().into_iter().flatten() {
            let digest = layer["blob"].as_str().expect("a digest");
            let entry = gha.load(&format!("buildkit-blob-1-{digest}"));
            let blob = gha.download(&entry.expect("a blob"), None).is(200);
            assert!(
                blob.body == objects[&format!("blobs/{digest}")],
                "{name}: {digest}"
            );
        }
        serve.stop().succeeds();
    }
}

/// Not images: a builder exports a cache with gha, never an image.
#[test]
fn an_export_becomes_the_objects_that_an_export_of_ours_writes() {
    for name in FIXTURES {
        if name.starts_with("image-") {
            continue;
        }
        let exported = Server::start();
        Program::export(&exported.spec("mode=max"), &fixture(name))
            .run()
            .succeeds();
        let server = Server::start();
        let serve = Serve::writing(&server.spec("mode=max"));
        let gha = Gha::new(&serve, "LAYERCACHE_GHA_TO");
        assert_eq!(gha.scopes(), [("buildkit".to_owned(), 3)]);
        for (key, bytes) in exported.objects() {
            let Some(digest) = key.strip_prefix("blobs/") else {
                continue;
            };
            let key = format!("buildkit-blob-1-{digest}");
            assert_eq!(gha.load(&key), None);
            gha.save(&key, &bytes, 1000).is(204);
            let again = gha.reserve(&key).is(409).json();
            assert!(
                again["message"]
                    .as_str()
                    .expect("text")
                    .contains("already exists")
            );
        }
        let index = exported.objects()["manifests/buildkit"].clone();
        gha.save_index("buildkit", &index).is(204);
        gha.save_index("buildkit", &index).is(204);
        let entry = gha.load(&gha.index_key("buildkit")).expect("an index");
        assert!(entry["cacheKey"].as_str().expect("a key").ends_with("#3"));
        serve.stop().succeeds();
        assert!(server.objects() == exported.objects(), "{name}");
    }
}

#[test]
fn what_does_not_match_its_key_or_names_absent_blobs_is_refused() {
    let server = Server::start();
    let serve = Serve::writing(&server.spec("mode=max"));
    let gha = Gha::new(&serve, "LAYERCACHE_GHA_TO");
    let digest = Digest::of(b"other");
    gha.save(&format!("buildkit-blob-1-{digest}"), b"bytes", 100)
        .is(400);
    gha.save_index("buildkit", &s3_manifest("min.json")).is(400);
    gha.save_index("buildkit", b"[]").is(400);
    gha.reserve("something else").is(400);
    gha.reserve(&gha.index_key("other scope")).is(400);
    let id = gha.reserve(&format!("buildkit-blob-1-{digest}")).is(201);
    let id = id.json()["cacheId"].as_u64().expect("an id");
    gha.send("PATCH", &format!("caches/{id}"), &[], b"x")
        .is(400);
    let headers = [("Content-Range", "bytes 0-99/*")];
    gha.send("PATCH", &format!("caches/{id}"), &headers, b"other")
        .is(400);
    gha.patch(id, 0, b"other").is(204);
    gha.commit(id, 6).is(400);
    gha.commit(id, 5).is(404);
    let run = serve.stop().succeeds();
    expect![[r#"
        Ns serving: builds on this machine can use the cache now
        warning: buildkit-blob-1-sha256:d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa was not saved: the bytes sent as sha256:d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa hash to sha256:277089d91c0bdf4f2e6862ba7e4a07605119431f5d13f726dd352b06f1b206a9
        warning: index-buildkit-1-f32de15d#1 was not saved: the manifest names 5 blobs missing or damaged on S3 and not pushed: sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2, sha256:aa969215ace405520c7048a4522c13688572ca691e3f45fa6567b0ac1e97157f, sha256:0d68a9c7a878208cd83549b2d815b496a7a54bc7898d03e01a4dc38f885120b8, sha256:6e52fec599f1143ad9ca7bba3be69c6b1cd18e40154c8c03017e1fe2fbbd7317, sha256:f898e33dc2c9e1987672cf111dd3909a8a2331a1c9c2490a329d25ab46c16d4f
        warning: index-buildkit-1-f32de15d#1 was not saved: reading the cache manifest: it is not a JSON object
        warning: "something else" is no key of BuildKit's for this cache
        warning: "index-buildkit-1-ed214218" is no key of BuildKit's for this cache
        warning: no Content-Range: bytes A-B/*
        warning: a piece has 5 bytes instead of 100
        warning: buildkit-blob-1-sha256:d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa was not saved: 5 bytes were sent instead of 6
        warning: there is no such upload
    "#]].assert_eq(&crate::output::lasting(&run.stderr));
    assert_eq!(server.keys(), Vec::<String>::new());
}

#[test]
fn an_object_of_another_size_is_a_miss_once_a_manifest_names_it() {
    let server = Server::start();
    let spec = server.spec("mode=max");
    Program::export(&spec, &fixture("local-max"))
        .run()
        .succeeds();
    let whole = server.objects();
    let mut keys = server.keys().into_iter();
    let object = keys.find(|key| key.starts_with("blobs/")).expect("a blob");
    server.change(&object, |object| object.body = object.body.slice(..17));
    let serve = Serve::writing(&spec);
    let gha = Gha::new(&serve, "LAYERCACHE_GHA_TO");
    let key = object.replace("blobs/", "buildkit-blob-1-");
    assert!(gha.load(&key).is_some());
    let index = &whole["manifests/buildkit"];
    gha.save_index("buildkit", index).is(400);
    assert_eq!(gha.load(&key), None);
    gha.save(&key, &whole[&object], MIB).is(204);
    gha.save_index("buildkit", index).is(204);
    assert!(server.objects() == whole);
}

#[test]
fn a_blob_that_was_read_as_damaged_is_a_miss_even_if_it_has_just_been_refreshed() {
    let server = Server::start();
    let spec = server.spec("mode=max");
    Program::export(&spec, &fixture("local-max"))
        .run()
        .succeeds();
    let whole = server.objects();
    let mut keys = server.keys().into_iter();
    let object = keys.find(|key| key.starts_with("blobs/")).expect("a blob");
    server.change(&object, |object| {
        let mut bytes = object.body.to_vec();
        bytes[0] ^= 1;
        object.body = bytes.into();
    });
    server.age_all(Duration::from_secs(2 * 24 * 60 * 60));
    let serve = Serve::writing(&spec);
    let gha = Gha::new(&serve, "LAYERCACHE_GHA_TO");
    let key = object.replace("blobs/", "buildkit-blob-1-");
    let entry = gha.load(&key).expect("a blob");
    assert_eq!(server.count("CopyObject"), 1);
    gha.download(&entry, None).is(502);
    let index = &whole["manifests/buildkit"];
    gha.save_index("buildkit", index).is(400);
    assert_eq!(gha.load(&key), None);
    gha.save(&key, &whole[&object], MIB).is(204);
    gha.save_index("buildkit", index).is(204);
    assert!(server.objects() == whole);
}

#[test]
fn only_the_tokens_of_the_run_are_accepted() {
    let server = Server::start();
    let (serve, other) = (
        Serve::writing(&server.spec("")),
        Serve::writing(&server.spec("")),
    );
    let mut gha = Gha::new(&serve, "LAYERCACHE_GHA_TO");
    gha.token = Gha::new(&other, "LAYERCACHE_GHA_TO").token;
    let refused = gha.send("GET", "cache?keys=a&version=v", &[], &[]).is(401);
    assert_eq!(
        refused.text(),
        r#"{"message":"the token is not of this run"}"#
    );
    let refused = request(&gha.host, "GET /_apis/artifactcache/cache?keys=a", &[], &[]);
    refused.is(401);
}
