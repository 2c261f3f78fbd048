//! Attacks: malicious manifests, layouts and servers. Each ends in a clear error or is tolerated, in
//! bounded time and memory and without a panic. Everything outside the layout stays as it was, and
//! every blob inside matches its name.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use layercache::cache::digest::Digest;
use layercache::cache::oci::Descriptor;
use layercache::layout::Layout;
use serde_json::{Value, json};

use crate::aftermath::soak;
use crate::program::{Program, Run, copy_of, files, fixture};
use crate::scripted::{Reply, Scripted};
use crate::server::{ACCESS_KEY, SECRET_KEY, Server};

const MIB: u64 = 1 << 20;
const CACHE_CONFIG: &str = "application/vnd.buildkit.cacheconfig.v0";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// Runs the program, and checks that it ends in time and does not panic. Also returns its peak memory
/// in bytes.
fn watched(program: Program) -> (Run, u64) {
    let mut child = program.spawn();
    fn drain(from: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = from.map(|mut from| from.read_to_end(&mut bytes));
            bytes
        })
    }
    let (stdout, stderr) = (drain(child.stdout.take()), drain(child.stderr.take()));
    let began = Instant::now();
    let mut peak = 0;
    let status = loop {
        peak = peak.max(peak_memory(&child));
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            break status;
        }
        if began.elapsed() > Duration::from_secs(180) {
            let _ = child.kill();
            let _ = child.wait();
            let said = stderr.join().expect("read");
            panic!("it did not end: {}", String::from_utf8_lossy(&said));
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the program writes UTF-8");
    let run = Run {
        code: status.code(),
        stdout: text(stdout.join().expect("read")),
        stderr: text(stderr.join().expect("read")),
    };
    assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    let steers = |c: char| c != '\n' && (c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c));
    assert!(!run.stderr.contains(steers), "{:?}", run.stderr);
    assert!(run.stderr.len() < 20_000, "{} bytes", run.stderr.len());
    (run, peak)
}

/// VmHWM, where the system has it.
fn peak_memory(child: &Child) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id()));
    let status = status.unwrap_or_default();
    // For a moment after the spawn, a child still shows the memory of the tests.
    if !status.starts_with("Name:\tlayercache\n") {
        return 0;
    }
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// A directory with a layout, surrounded by files that must stay as they are.
struct Place {
    folder: tempfile::TempDir,
    before: BTreeMap<String, Vec<u8>>,
}

impl Place {
    fn new() -> Place {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let inner = folder.path().join("in/here");
        std::fs::create_dir_all(inner.join("precious")).expect("a directory can be made");
        for name in ["in/passwd", "in/here/precious/file", "in/here/index.json"] {
            std::fs::write(folder.path().join(name), name).expect("a file can be written");
        }
        let before = files(folder.path());
        Place { folder, before }
    }

    /// With a copy of a fixture as the layout.
    fn with(layout: &str) -> Place {
        let place = Place::new();
        let copy = copy_of(&fixture(layout));
        std::fs::rename(copy.path(), place.layout()).expect("the same file system");
        place
    }

    fn layout(&self) -> PathBuf {
        self.folder.path().join("in/here/layout")
    }

    fn precious(&self) -> PathBuf {
        self.folder.path().join("in/here/precious/file")
    }

    /// Checks that the layout's surroundings are as they were.
    #[track_caller]
    fn untouched(&self) {
        let read = |path: &Path| std::fs::read(path).unwrap_or_default();
        for (name, bytes) in &self.before {
            if !name.ends_with('/') {
                assert_eq!(&read(&self.folder.path().join(name)), bytes, "{name}");
            }
        }
        let names = |path: &str| -> Vec<String> {
            let listed = std::fs::read_dir(self.folder.path().join(path)).expect("it is there");
            let names = listed.map(|entry| entry.expect("an entry").file_name());
            let mut names: Vec<String> = names.map(|name| name.to_string_lossy().into()).collect();
            names.retain(|name| name != "layout");
            names.sort();
            names
        };
        assert_eq!(names(""), ["in"]);
        assert_eq!(names("in"), ["here", "passwd"]);
        assert_eq!(names("in/here"), ["index.json", "precious"]);
        assert_eq!(names("in/here/precious"), ["file"]);
    }

    /// Checks that every blob matches its digest, and that everything in the index is complete.
    #[track_caller]
    fn sound(&self) {
        self.untouched();
        let root = self.layout();
        let blobs = root.join("blobs/sha256");
        for entry in std::fs::read_dir(&blobs).into_iter().flatten() {
            let entry = entry.expect("an entry");
            if entry.file_type().expect("a type").is_file() {
                let found = Digest::of(&std::fs::read(entry.path()).expect("a blob"));
                assert_eq!(found.hex(), entry.file_name().to_string_lossy());
            }
        }
        let Ok(index) = std::fs::read(root.join("index.json")) else {
            return;
        };
        let index: Value = serde_json::from_slice(&index).expect("the index is JSON");
        let layout = Layout::open(&root, Duration::ZERO).expect("a layout");
        for entry in index["manifests"].as_array().expect("manifests") {
            let entry: Descriptor = serde_json::from_value(entry.clone()).expect("a descriptor");
            layout.check_complete(&entry).expect("all of it is there");
        }
        let partial = root.join(".layercache");
        for entry in std::fs::read_dir(partial).into_iter().flatten() {
            use std::os::unix::fs::MetadataExt;
            let data = entry.expect("an entry").metadata().expect("metadata");
            assert!(
                data.blocks() * 512 <= 64 * MIB,
                "{} blocks are held",
                data.blocks()
            );
        }
    }
}

fn blob(n: u64) -> Vec<u8> {
    format!("the content of layer {n}").into_bytes()
}

fn layer(n: u64, parent: i64) -> Value {
    let bytes = blob(n);
    let digest = Digest::of(&bytes);
    json!({"blob": digest, "parent": parent, "annotations": {
        "mediaType": TAR, "diffID": digest, "size": bytes.len(), "createdAt": "2026-01-01T00:00:00Z"}})
}

/// A valid manifest with two layers and two records.
fn manifest() -> Value {
    json!({
        "layers": [layer(0, -1), layer(1, 0)],
        "records": [
            {"layers": [{"layer": 0, "createdAt": "2026-01-01T00:00:00Z"}], "digest": "sha256:a"},
            {"layers": [{"layer": 1, "createdAt": "2026-01-01T00:00:00Z"}], "digest": "sha256:b",
             "inputs": [[{"link": 0}]]},
        ],
    })
}

fn with_blobs() -> Server {
    let server = Server::start();
    for n in 0..3 {
        server.put(&format!("blobs/{}", Digest::of(&blob(n))), blob(n));
    }
    server
}

/// The valid manifest, with the JSON text of one node replaced.
fn with(pointer: &str, text: &str) -> Vec<u8> {
    let mut manifest = manifest();
    let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
    manifest
        .pointer_mut(parent)
        .and_then(Value::as_object_mut)
        .expect("an object")
        .insert(key.into(), json!("@@"));
    manifest.to_string().replace("\"@@\"", text).into_bytes()
}

#[test]
fn a_manifest_that_is_not_true_is_refused_and_nothing_is_written() {
    let good = Digest::of(&blob(0)).to_string();
    let mut cases: Vec<(String, Vec<u8>)> = Vec::new();
    let texts = [
        "sha256:../../../../in/passwd".to_owned(),
        "../../../../in/passwd".into(),
        "/etc/passwd".into(),
        "sha256:/etc/passwd".into(),
        format!("sha256:{}/../passwd", &good[7..60]),
        good.to_uppercase(),
        good.replace("sha256", "SHA256"),
        good[..70].into(),
        format!("{good}0"),
        format!("{good}\u{0}"),
        format!("\u{1b}]0;owned\u{7}{good}"),
        format!("sha512:{}", "0".repeat(128)),
        String::new(),
        "x".repeat(1 << 20),
    ];
    for text in texts {
        for pointer in ["/layers/0/blob", "/layers/1/annotations/diffID"] {
            cases.push((pointer.into(), with(pointer, &json!(text).to_string())));
        }
    }
    let numbers = [
        "2",
        "-2",
        "9223372036854775807",
        "-9223372036854775808",
        "9223372036854775808",
        "18446744073709551615",
        "18446744073709551616",
        "1.5",
        "1e400",
        "-1e400",
        "1e3",
        "\"0\"",
        "[0]",
        "{}",
        "true",
    ];
    for number in numbers {
        for pointer in [
            "/layers/1/parent",
            "/records/1/layers/0/layer",
            "/records/1/inputs/0/0/link",
        ] {
            // Inside an array, a second pointer names the element.
            let mut manifest = manifest();
            *manifest.pointer_mut(pointer).expect("it is there") = json!("@@");
            let text = manifest.to_string().replace("\"@@\"", number);
            cases.push((format!("{pointer} {number}"), text.into_bytes()));
        }
        if number != "2" && number != "9223372036854775807" {
            let pointer = "/layers/1/annotations/size";
            cases.push((format!("{pointer} {number}"), with(pointer, number)));
        }
    }
    for (what, pointer, text) in [
        ("its own parent", "/layers/0/parent", "0"),
        ("parents in a circle", "/layers/0/parent", "1"),
        ("links in a circle", "/records/0/inputs", "[[{\"link\":1}]]"),
        ("its own input", "/records/0/inputs", "[[{\"link\":0}]]"),
        (
            "no time",
            "/records/0/layers",
            "[{\"createdAt\":\"yesterday\"}]",
        ),
        (
            "a chain out of range",
            "/records/0/chains",
            "[{\"layers\":[0,2]}]",
        ),
        ("no annotations", "/layers/0/annotations", "null"),
    ] {
        cases.push((what.into(), with(pointer, text)));
    }
    let deep = |open: &str, close: &str| [open.repeat(10_000), close.repeat(10_000)].concat();
    for (what, text) in [
        ("nothing", String::new()),
        ("an array", "[]".into()),
        ("a string", "\"\"".into()),
        ("broken off", manifest().to_string()[..300].into()),
        ("followed", format!("{} {{}}", manifest())),
        (
            "twice the layers",
            format!("{{\"layers\":[],{}", &manifest().to_string()[1..]),
        ),
        ("deep layers", format!("{{\"layers\":{}}}", deep("[", "]"))),
        (
            "deep objects",
            format!(
                "{{\"layers\":[{{\"annotations\":{}1{}}}]}}",
                "{\"annotations\":".repeat(10_000),
                "}".repeat(10_000)
            ),
        ),
        (
            "deep image",
            format!("{{\"layercache\":{}}}", deep("[", "]")),
        ),
    ] {
        cases.push((what.into(), text.into_bytes()));
    }
    cases.push((
        "not UTF-8".into(),
        b"{\"layers\":[{\"blob\":\"\xff\xfe\"}]}".to_vec(),
    ));

    let server = with_blobs();
    let count = cases.len();
    for (what, bytes) in cases {
        server.put("manifests/buildkit", bytes);
        let place = Place::new();
        let (run, _) = watched(Program::import(&server.spec(""), &place.layout()));
        assert_eq!(run.code, Some(1), "{what}: {}", run.stderr);
        assert!(run.stderr.contains("manifest"), "{what}: {}", run.stderr);
        assert!(!place.layout().exists(), "{what}: a layout was made");
        place.untouched();
    }
    assert_eq!(count, 28 + 45 + 13 + 7 + 9 + 1);
}

#[test]
fn sizes_that_lie_are_found_out_without_memory_or_disk_space() {
    let server = with_blobs();
    let huge = i64::MAX as u64;
    for (first, second) in [
        (huge, huge),
        (huge, 1),
        (1 << 62, 1 << 61),
        (1 << 50, 21),
        (1 << 33, 21),
        (0, 21),
        (20, 21),
    ] {
        let mut manifest = manifest();
        manifest["layers"][0]["annotations"]["size"] = json!(first);
        manifest["layers"][1]["annotations"]["size"] = json!(second);
        server.put("manifests/buildkit", manifest.to_string());
        for flag in [None, Some("--verify"), Some("--dry-run")] {
            let place = Place::new();
            let program = Program::import(&server.spec(""), &place.layout()).args(flag);
            let (run, peak) = watched(program);
            assert_eq!(run.code, Some(1), "{first} {flag:?}: {}", run.stderr);
            assert!(
                peak < 200 * MIB,
                "{first} {second} {flag:?}: {peak} bytes of memory"
            );
            place.sound();
            assert!(!place.layout().join("index.json").exists());
        }
    }
    // An absent object, so the size cannot be checked: no disk space stays reserved.
    let mut lost = manifest();
    lost["layers"][1] = layer(9, 0);
    lost["layers"][1]["annotations"]["size"] = json!(1u64 << 30);
    server.put("manifests/buildkit", lost.to_string());
    let place = Place::new();
    let (run, _) = watched(Program::import(&server.spec(""), &place.layout()));
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    place.sound();
    assert!(!place.layout().join(".layercache").exists());
}

/// An S3 server that holds documents, and their descriptors.
struct Documents(Server);

impl Documents {
    fn put(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        self.0.put(&format!("blobs/{digest}"), bytes.to_vec());
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    fn json(&self, media_type: &str, document: Value) -> Value {
        self.put(media_type, document.to_string().as_bytes())
    }
}

/// What BuildKit finds: by containerd's annotation first, then by OCI's.
fn found_by_buildkit(index: &Value, tag: &str) -> Option<String> {
    let entries = index["manifests"].as_array().expect("entries");
    [
        "io.containerd.image.name",
        "org.opencontainers.image.ref.name",
    ]
    .iter()
    .find_map(|name| {
        entries
            .iter()
            .find(|entry| entry["annotations"][name] == tag)
    })
    .map(|entry| entry["digest"].to_string())
}

#[test]
fn a_manifest_on_s3_cannot_take_over_another_tag() {
    let docs = Documents(with_blobs());
    let layer = docs.put(TAR, &blob(0));
    let config = docs.json(
        CONFIG,
        json!({"rootfs": {"diff_ids": [Digest::of(&blob(0))]}}),
    );
    let plain = docs.json(
        MANIFEST,
        json!({"schemaVersion": 2, "config": config, "layers": [layer]}),
    );
    let mut root = plain.clone();
    root["annotations"] = json!({
        "io.containerd.image.name": "latest",
        "org.opencontainers.image.ref.name": "latest",
        "vnd.docker.reference.type": "attestation-manifest",
    });
    root["urls"] = json!(["https://example.org/elsewhere"]);
    root["data"] = json!("e30=");
    root["artifactType"] = json!("application/x");
    let mut branch = manifest();
    docs.0.put("manifests/main", branch.to_string());
    branch["layercache"] = json!({"version": 1, "root": root, "contents": [layer, config, plain]});
    docs.0.put("manifests/branch", branch.to_string());

    let folder = tempfile::tempdir().expect("a temporary directory");
    let import = |name: &str, tag: &str| {
        let spec = docs.0.spec(&format!("name={name}"));
        Program::import(&spec, folder.path())
            .args(["--tag", tag])
            .run()
            .succeeds();
        let index = std::fs::read(folder.path().join("index.json")).expect("the index");
        serde_json::from_slice::<Value>(&index).expect("JSON")
    };
    let main = found_by_buildkit(&import("main", "latest"), "latest").expect("it is tagged");
    let index = import("branch", "branch");
    assert_eq!(found_by_buildkit(&index, "latest"), Some(main));
    let mut entry = plain.clone();
    entry["annotations"] = json!({"org.opencontainers.image.ref.name": "branch"});
    assert_eq!(index["manifests"][1], entry);
}

#[test]
fn an_image_that_is_not_what_the_manifest_says_is_never_tagged() {
    let docs = Documents(with_blobs());
    let layer_0 = docs.put(TAR, &blob(0));
    let config = docs.json(
        CONFIG,
        json!({"rootfs": {"diff_ids": [Digest::of(&blob(0))]}}),
    );
    let image = docs.json(
        MANIFEST,
        json!({"schemaVersion": 2, "config": config, "layers": [layer_0]}),
    );
    let all = [&layer_0, &config, &image].map(Value::clone).to_vec();
    let twin = |descriptor: &Value, field: &str, value: Value| {
        let mut twin = descriptor.clone();
        twin[field] = value;
        twin
    };
    let absent = json!({"mediaType": TAR, "digest": Digest::of(b"absent"), "size": 6});
    let of = |layers: Value| json!({"schemaVersion": 2, "config": config, "layers": layers});
    let lacking = docs.json(MANIFEST, of(json!([absent])));
    let lying = docs.json(MANIFEST, of(json!([twin(&layer_0, "size", json!(4))])));
    let text = docs.put(MANIFEST, b"not JSON");
    let cache = docs.put(CACHE_CONFIG, b"{}");
    let mut nested = image.clone();
    let mut indexes = Vec::new();
    for _ in 0..20 {
        nested = docs.json(INDEX, json!({"schemaVersion": 2, "manifests": [nested]}));
        indexes.push(nested.clone());
    }
    let both = docs.json(
        INDEX,
        json!({"schemaVersion": 2, "manifests": [image, lacking]}),
    );
    let broken = docs.json(
        MANIFEST,
        json!({"schemaVersion": 2, "config": docs.put(CACHE_CONFIG, b"{\"layers\":[{}]}"), "layers": []}),
    );

    let joined = |more: &[Value]| json!([all.as_slice(), more].concat());
    let huge = twin(&absent, "size", json!(i64::MAX));
    let cases = [
        ("root not in contents", json!(lacking), json!(all)),
        (
            "root of another size",
            twin(&image, "size", json!(5)),
            json!(all),
        ),
        (
            "root is a layer",
            twin(&layer_0, "mediaType", json!(MANIFEST)),
            json!(all),
        ),
        (
            "root is no document",
            text.clone(),
            joined(std::slice::from_ref(&text)),
        ),
        (
            "root is a cache config",
            cache.clone(),
            joined(std::slice::from_ref(&cache)),
        ),
        (
            "root is of no known kind",
            twin(&image, "mediaType", json!("text/html")),
            json!(all),
        ),
        (
            "root calls itself an index",
            twin(&image, "mediaType", json!(INDEX)),
            json!(all),
        ),
        (
            "root's digest is a path",
            twin(&image, "digest", json!("sha256:../../passwd")),
            json!(all),
        ),
        (
            "root's size is negative",
            twin(&image, "size", json!(-1)),
            json!(all),
        ),
        (
            "a layer is not there",
            lacking.clone(),
            joined(std::slice::from_ref(&lacking)),
        ),
        (
            "a layer is of another size",
            lying.clone(),
            joined(std::slice::from_ref(&lying)),
        ),
        (
            "one of two platforms lacks a layer",
            both.clone(),
            joined(&[both.clone(), lacking.clone()]),
        ),
        ("indexes in indexes", nested.clone(), joined(&indexes)),
        (
            "a cache without blobs",
            broken.clone(),
            joined(std::slice::from_ref(&broken)),
        ),
        ("contents twice", image.clone(), joined(&all[..1])),
        (
            "contents of a negative size",
            image.clone(),
            joined(&[twin(&absent, "size", json!(-1))]),
        ),
        ("contents of absurd size", image.clone(), joined(&[huge])),
        (
            "contents that are a path",
            image.clone(),
            joined(&[twin(&absent, "digest", json!("sha256:../../passwd"))]),
        ),
        ("contents that are nothing", image.clone(), json!([])),
        ("contents that are no list", image.clone(), json!({"a": 1})),
        (
            "contents that contradict a layer",
            image.clone(),
            joined(&[twin(&docs.put(TAR, &blob(1)), "size", json!(3))]),
        ),
    ];
    for (what, root, contents) in cases {
        let mut manifest = manifest();
        manifest["layercache"] = json!({"version": 1, "root": root, "contents": contents});
        docs.0.put("manifests/buildkit", manifest.to_string());
        let place = Place::new();
        let (run, _) = watched(Program::import(&docs.0.spec(""), &place.layout()));
        assert_eq!(run.code, Some(1), "{what}: {}", run.stderr);
        place.sound();
        assert!(
            !place.layout().join("index.json").exists(),
            "{what}: it was tagged"
        );
    }
    for version in [
        "0",
        "2",
        "-1",
        "1.5",
        "18446744073709551616",
        "\"1\"",
        "null",
    ] {
        let mut manifest = manifest();
        manifest["layercache"] = json!({"version": "@@", "root": image, "contents": all});
        docs.0.put(
            "manifests/buildkit",
            manifest.to_string().replace("\"@@\"", version),
        );
        let place = Place::new();
        watched(Program::import(&docs.0.spec(""), &place.layout()))
            .0
            .ends_with(1);
        place.untouched();
    }
    // The valid one, to know that the others fail for their own reasons.
    let mut good = manifest();
    good["layercache"] = json!({"version": 1, "root": image, "contents": all});
    docs.0.put("manifests/buildkit", good.to_string());
    let place = Place::new();
    watched(Program::import(&docs.0.spec(""), &place.layout()))
        .0
        .succeeds();
    place.sound();
}

#[test]
fn a_hundred_thousand_layers_and_records_in_one_line_are_borne() {
    let count = if soak() { 100_000u64 } else { 10_000 };
    let server = with_blobs();
    // All layers use one blob, and each is the parent of the next; likewise the records.
    let one = layer(0, -1);
    let layers = (0..count).map(|n| {
        let mut layer = one.clone();
        layer["parent"] = json!(n as i64 - 1);
        layer
    });
    let records = (0..count).map(|n| {
        let inputs = if n == 0 {
            json!([])
        } else {
            json!([[{"link": n - 1}]])
        };
        json!({"layers": [{"layer": n}], "digest": format!("sha256:{n}"), "inputs": inputs})
    });
    let manifest =
        json!({"layers": layers.collect::<Value>(), "records": records.collect::<Value>()});
    server.put("manifests/buildkit", manifest.to_string());
    let place = Place::new();
    watched(Program::import(&server.spec(""), &place.layout()))
        .0
        .succeeds();
    let back = server.spec("name=back,mode=min");
    watched(Program::export(&back, &place.layout()))
        .0
        .succeeds();
    place.sound();
}

#[test]
fn counts_that_would_take_all_memory_are_refused_before_they_do() {
    let server = Server::start();
    for element in ["{},", "[],", "0,", "{\"digest\":\"\"},"] {
        for field in ["layers", "records", "other"] {
            // Less than the 64 MiB of the largest document.
            let list = element.repeat((5 << 20).min((60 << 20) / element.len()));
            let text = format!("{{\"{field}\":[{}]}}", list.trim_end_matches(','));
            server.put("manifests/buildkit", text);
            let place = Place::new();
            let (run, peak) = watched(Program::import(&server.spec(""), &place.layout()));
            run.ends_with(1).says("too many elements");
            assert!(peak < 300 * MIB, "{peak} bytes of memory");
            place.untouched();
        }
    }
}

#[test]
fn a_layout_with_something_else_in_place_of_files_is_not_exported() {
    use rustix_like::{fifo, socket};
    let server = Server::start();
    let blob = "blobs/sha256/b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2";
    type Attack = fn(&Path, &Path);
    let attacks: [(&str, Attack); 7] = [
        ("a symlink to a file", |path, precious| {
            symlink(precious, path).expect("a symlink")
        }),
        ("a symlink to a device", |path, _| {
            symlink("/dev/zero", path).expect("a symlink")
        }),
        ("a symlink to itself", |path, _| {
            symlink(path, path).expect("a symlink")
        }),
        ("a symlink to nothing", |path, _| {
            symlink("/nonexistent/x", path).expect("a symlink")
        }),
        ("a FIFO", |path, _| fifo(path)),
        ("a socket", |path, _| socket(path)),
        ("a directory", |path, _| {
            std::fs::create_dir(path).expect("a directory")
        }),
    ];
    for place_of in [blob, "index.json", "oci-layout", "blobs", "blobs/sha256"] {
        for (what, attack) in &attacks {
            if *what == "a directory" && place_of.starts_with("blobs") && place_of != blob {
                continue;
            }
            let place = Place::with("local-max");
            let path = place.layout().join(place_of);
            std::fs::rename(&path, place.folder.path().join("moved")).expect("renamed");
            attack(&path, &place.precious());
            let (run, _) = watched(Program::export(&server.spec("mode=max"), &place.layout()));
            assert_eq!(run.code, Some(1), "{place_of} is {what}: {}", run.stderr);
            std::fs::rename(
                place.folder.path().join("moved"),
                place.folder.path().join("in/here/layout/x"),
            )
            .expect("renamed");
            place.untouched();
            let keys: Vec<String> = server.objects().into_keys().collect();
            assert!(
                !keys.iter().any(|key| key.starts_with("manifests/")),
                "{keys:?}"
            );
        }
    }
}

#[test]
fn an_index_that_names_paths_or_nonsense_is_refused() {
    let server = Server::start();
    let good: Value = serde_json::from_slice(
        &std::fs::read(fixture("local-max").join("index.json")).expect("the index"),
    )
    .expect("JSON");
    let digest = good["manifests"][0]["digest"].clone();
    for (pointer, value) in [
        (
            "/manifests/0/digest",
            json!("sha256:../../../precious/file"),
        ),
        ("/manifests/0/digest", json!("/etc/passwd")),
        (
            "/manifests/0/digest",
            json!(digest.as_str().expect("text").to_uppercase()),
        ),
        ("/manifests/0/size", json!(-1)),
        ("/manifests/0/size", json!(u64::MAX)),
        ("/manifests/0/size", json!(i64::MAX)),
        ("/manifests/0/size", json!(1.5)),
        (
            "/manifests/0/mediaType",
            json!("\u{1b}[31mtext/html\u{202e}"),
        ),
        ("/manifests/0/mediaType", json!(CACHE_CONFIG)),
        ("/manifests/0", json!(null)),
        ("/manifests", json!({})),
        ("/manifests", json!([])),
    ] {
        let place = Place::with("local-max");
        let mut index = good.clone();
        *index.pointer_mut(pointer).expect("it is there") = value.clone();
        std::fs::write(place.layout().join("index.json"), index.to_string()).expect("written");
        let (run, _) = watched(Program::export(&server.spec(""), &place.layout()));
        assert_eq!(run.code, Some(1), "{pointer} {value}: {}", run.stderr);
        place.untouched();
    }
    for text in [
        "[".repeat(100_000),
        format!("{{\"manifests\":[{}]}}", "[".repeat(10_000)),
        format!("{{\"manifests\":[{}0]}}", "0,".repeat(5 << 20)),
        "{\"manifests\":[1e400]}".into(),
    ] {
        let place = Place::with("local-max");
        std::fs::write(place.layout().join("index.json"), text).expect("written");
        watched(Program::export(&server.spec(""), &place.layout()))
            .0
            .ends_with(1);
        watched(Program::import(&server.spec("name=x"), &place.layout()));
        place.untouched();
    }
    assert!(server.objects().is_empty());
}

#[test]
fn an_import_does_not_follow_or_wait_for_what_lies_in_the_layout() {
    let server = with_blobs();
    server.put("manifests/buildkit", manifest().to_string());
    let hex = Digest::of(&blob(0)).hex();
    let partial = format!(".layercache/{hex}.partial");
    let names = [
        format!("blobs/sha256/{hex}"),
        partial.clone(),
        ".layercache/index.json.partial".into(),
        ".layercache".into(),
        "blobs".into(),
        "blobs/sha256".into(),
        "index.json".into(),
        "index.json.lock".into(),
        "oci-layout".into(),
    ];
    type Attack = fn(&Path, &Place);
    let attacks: [(&str, Attack); 5] = [
        ("a symlink to a file", |path, place| {
            symlink(place.precious(), path).expect("a symlink")
        }),
        ("a symlink to a directory", |path, place| {
            symlink(place.precious().parent().expect("a parent"), path).expect("a symlink")
        }),
        ("a symlink to nothing", |path, place| {
            symlink(place.folder.path().join("in/new"), path).expect("a symlink")
        }),
        ("a FIFO", |path, _| rustix_like::fifo(path)),
        ("a hard link", |path, place| {
            std::fs::hard_link(place.precious(), path).expect("a link")
        }),
    ];
    for name in &names {
        for (what, attack) in &attacks {
            let place = Place::new();
            let path = place.layout().join(name);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            if name != "oci-layout" {
                std::fs::copy(
                    fixture("local-max").join("oci-layout"),
                    place.layout().join("oci-layout"),
                )
                .expect("copied");
            }
            attack(&path, &place);
            let (run, _) = watched(Program::import(&server.spec(""), &place.layout()));
            assert!(matches!(run.code, Some(0 | 1)), "{name} is {what}: {run:?}");
            place.untouched();
            if run.code == Some(0) {
                place.sound();
            }
        }
    }
}

/// A cache of blobs without diffIDs, as a layout.
fn made(layout: &Path, blobs: &[Vec<u8>]) {
    let folder = layout.join("blobs/sha256");
    std::fs::create_dir_all(&folder).expect("made");
    let put = |media_type: &str, bytes: &[u8]| {
        let digest = Digest::of(bytes);
        std::fs::write(folder.join(digest.hex()), bytes).expect("written");
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    };
    let layers: Vec<Value> = blobs.iter().map(|blob| put(TAR, blob)).collect();
    let graph = layers
        .iter()
        .map(|layer| json!({"blob": layer["digest"], "parent": -1}));
    let results =
        (0..layers.len()).map(|n| json!({"layer": n, "createdAt": "2026-01-01T00:00:00Z"}));
    let records = json!([{"layers": results.collect::<Value>(), "digest": "sha256:a"}]);
    let config = json!({"layers": graph.collect::<Value>(), "records": records});
    let config = put(CACHE_CONFIG, config.to_string().as_bytes());
    let manifest =
        json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
    let root = put(MANIFEST, manifest.to_string().as_bytes());
    let index = json!({"schemaVersion": 2, "manifests": [root]});
    std::fs::write(layout.join("index.json"), index.to_string()).expect("written");
    std::fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .expect("written");
}

#[test]
fn bombs_are_decompressed_in_constant_memory() {
    let server = Server::start();
    let zeros = vec![0; 16 << 20];
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(&zeros).expect("memory takes it");
    let gzip = encoder.finish().expect("memory takes it");
    let zstd = zstd::encode_all(zeros.as_slice(), 1).expect("memory takes it");
    // Consecutive members and frames are one content: 256 MiB of gzip, 1 GiB of zstd.
    for bomb in [gzip.repeat(16), zstd.repeat(64)] {
        let place = Place::new();
        made(&place.layout(), std::slice::from_ref(&bomb));
        let spec = server.spec(&format!("mode=max,name={}", bomb.len()));
        let (run, peak) = watched(Program::export(&spec, &place.layout()));
        run.succeeds();
        assert!(peak < 200 * MIB, "{peak} bytes of memory");
    }
    // A frame that demands a window of 2 GiB.
    let window = [
        0x28,
        0xb5,
        0x2f,
        0xfd,
        0x00,
        (31 - 10) << 3,
        0x01,
        0x00,
        0x00,
    ]
    .to_vec();
    let place = Place::new();
    made(&place.layout(), &[window]);
    let (run, peak) = watched(Program::export(&server.spec("name=w"), &place.layout()));
    run.ends_with(1).says("zstd");
    assert!(peak < 200 * MIB, "{peak} bytes of memory");
    assert!(!server.objects().contains_key("manifests/w"));
}

/// System calls that std lacks.
mod rustix_like {
    use std::path::Path;

    pub fn fifo(path: &Path) {
        let made = std::process::Command::new("mkfifo").arg(path).status();
        assert!(made.expect("mkfifo runs").success());
    }

    pub fn socket(path: &Path) {
        // A socket's path has to be short, so it is made elsewhere and moved.
        let folder = tempfile::tempdir_in("/tmp").expect("a temporary directory");
        let short = folder.path().join("s");
        std::os::unix::net::UnixListener::bind(&short).expect("a socket");
        std::fs::rename(short, path).expect("the same file system");
    }
}

// Servers that answer anything.

/// A server that answers each request by its script, and closes.
struct Liar(Scripted);

impl Liar {
    fn start(script: impl Fn(&str, &str, Option<&str>) -> Vec<u8> + Send + Sync + 'static) -> Liar {
        Liar(Scripted::start(move |_, request| {
            let range = request.header("range");
            Reply::AnswerAndClose(script(&request.method, &request.path, range))
        }))
    }

    fn spec(&self) -> String {
        format!(
            "type=s3,region=us-east-1,bucket=cache,use_path_style=true,retry_max_attempts=1,mode=max,\
             endpoint_url={},access_key_id={ACCESS_KEY},secret_access_key={SECRET_KEY}",
            self.0.url()
        )
    }

    fn count(&self, what: &str) -> usize {
        let asked = self.0.requests().into_iter();
        asked
            .filter(|request| format!("{} {}", request.method, request.path).contains(what))
            .count()
    }
}

fn said(status: &str, headers: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let length = if headers.to_lowercase().contains("content-length") {
        String::new()
    } else {
        format!("content-length: {}\r\n", body.len())
    };
    let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\n{length}{headers}\r\n");
    [head.as_bytes(), body].concat()
}

/// What an honest, empty store answers to an export, except that listings come from `list`.
fn empty_but(
    list: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static,
) -> impl Fn(&str, &str, Option<&str>) -> Vec<u8> + Send + Sync + 'static {
    move |method, path, _| match method {
        "GET" if path.contains("list-type=2") => list(path),
        "PUT" => said("200 OK", "etag: \"e\"\r\n", ""),
        _ => said("404 Not Found", "x-amz-request-id: 1\r\n", ""),
    }
}

fn page(contents: &str, token: Option<&str>) -> Vec<u8> {
    let (truncated, token) = match token {
        Some(token) => (
            true,
            format!("<NextContinuationToken>{token}</NextContinuationToken>"),
        ),
        None => (false, String::new()),
    };
    let body = format!(
        "<?xml version=\"1.0\"?><ListBucketResult><EncodingType>url</EncodingType>\
         <IsTruncated>{truncated}</IsTruncated>{token}{contents}</ListBucketResult>"
    );
    said("200 OK", "", body)
}

fn object(key: &str, size: &str) -> String {
    format!(
        "<Contents><Key>{key}</Key><LastModified>2026-11-21T20:37:36Z</LastModified>\
         <ETag>\"e\"</ETag><Size>{size}</Size></Contents>"
    )
}

/// Enough blobs to make an export list them.
fn many() -> Place {
    let place = Place::new();
    let blobs: Vec<Vec<u8>> = (0..40).map(blob).collect();
    made(&place.layout(), &blobs);
    place
}

#[test]
fn a_listing_may_say_what_it_likes() {
    let place = many();
    let laughs: String = (1..20)
        .map(|n| format!("<!ENTITY l{n} \"{}\">", format!("&l{};", n - 1).repeat(10)))
        .collect();
    let laughs = format!(
        "<?xml version=\"1.0\"?><!DOCTYPE l [<!ENTITY l0 \"lol\">{laughs}]>\
         <ListBucketResult><Prefix>&l19;</Prefix></ListBucketResult>"
    );
    let wide = format!(
        "<?xml version=\"1.0\"?><!DOCTYPE l [<!ENTITY a \"{}\">]><ListBucketResult><Prefix>{}</Prefix></ListBucketResult>",
        "a".repeat(900_000),
        "&a;".repeat(1 << 16)
    );
    let utf16: Vec<u8> = [0xff, 0xfe]
        .into_iter()
        .chain(laughs.encode_utf16().flat_map(u16::to_le_bytes))
        .collect();
    let known = Digest::of(&blob(0));
    let low = format!("sha256:{}", "0".repeat(64));
    let elsewhere = [
        "../../x",
        "other/k",
        "blobs",
        "%00",
        "%ff",
        "blobs/sha256:..",
        "",
    ];
    let elsewhere: String = elsewhere.map(|key| object(key, "1")).concat();
    let crowd = object(&format!("blobs/{low}"), "1").repeat(20_000);
    let lists: Vec<(&str, Vec<u8>)> = vec![
        ("billion laughs", said("200 OK", "", laughs)),
        ("one entity very often", said("200 OK", "", wide)),
        ("billion laughs in UTF-16", said("200 OK", "", utf16)),
        ("keys that are elsewhere", page(&elsewhere, None)),
        ("twenty thousand keys", page(&crowd, None)),
        (
            "a size that lies",
            page(
                &object(&format!("blobs/{known}"), "9223372036854775807"),
                None,
            ),
        ),
        (
            "a size that overflows",
            page(
                &object(&format!("blobs/{known}"), "9223372036854775808"),
                None,
            ),
        ),
        (
            "a size below nothing",
            page(&object(&format!("blobs/{known}"), "-1"), None),
        ),
        (
            "nested",
            said(
                "200 OK",
                "",
                format!("<ListBucketResult>{}", "<a>".repeat(1 << 16)),
            ),
        ),
        (
            "without an end",
            said(
                "200 OK",
                "content-length: 999999999999\r\n",
                "<ListBucketResult>",
            ),
        ),
        ("too long", said("200 OK", "", vec![b' '; 17 << 20])),
        ("nothing", said("200 OK", "", "")),
        ("a token that comes again", page("", Some("t"))),
    ];
    for (what, list) in lists {
        let liar = Liar::start(empty_but(move |_| list.clone()));
        let (run, peak) = watched(Program::export(&liar.spec(), &place.layout()));
        // Without a listing, each blob is looked up; a listing that breaks off ends the run.
        let code = run.code;
        assert!(
            code == Some(0) || what == "without an end" || what == "too long",
            "{what}: {}",
            run.stderr
        );
        assert!(peak < 300 * MIB, "{what}: {peak} bytes of memory");
        if code == Some(0) {
            assert_eq!(liar.count("PUT /cache/blobs/"), 40, "{what}");
        } else {
            assert_eq!(liar.count("PUT /cache/manifests/"), 0, "{what}");
        }
    }
}

#[test]
fn a_listing_that_never_ends_is_given_up() {
    let place = many();
    let highest = format!("sha256:fe{}", "0".repeat(62));
    let low = format!("sha256:{}", "0".repeat(64));
    for key in [low, highest, "x".into()] {
        let turn = AtomicUsize::new(0);
        let liar = Liar::start(empty_but(move |_| {
            let turn = turn.fetch_add(1, Ordering::Relaxed);
            page(
                &object(&format!("blobs/{key}"), "1"),
                Some(&turn.to_string()),
            )
        }));
        let (run, _) = watched(Program::export(&liar.spec(), &place.layout()));
        run.succeeds();
        assert!(
            liar.count("list-type=2") <= 12,
            "{} pages",
            liar.count("list-type=2")
        );
    }
}

#[test]
fn answers_to_an_import_that_lie_are_refused() {
    let content = vec![b'x'; 9 << 20];
    let digest = Digest::of(&content);
    let manifest = json!({"layers": [{"blob": digest, "parent": -1, "annotations": {
        "mediaType": TAR, "diffID": digest, "size": content.len()}}],
        "records": [{"layers": [{"layer": 0}], "digest": "sha256:a"}]})
    .to_string();
    let total = content.len();
    let etag = "etag: \"e\"\r\n";
    let ranges = [
        format!("bytes -1-4194303/{total}"),
        "bytes 0--1/9".into(),
        "bytes 4194303-0/9437184".into(),
        "bytes 0-4194303/18446744073709551615".into(),
        "bytes 0-18446744073709551615/18446744073709551616".into(),
        format!("bytes 0-4194303/-{total}"),
        "bytes */9437184".into(),
        "bytes 1-4194304/9437184".into(),
        "\t".into(),
        "items 0-1/2".into(),
    ];
    let mut blobs: Vec<(String, Vec<u8>)> = ranges
        .iter()
        .map(|range| {
            let headers = format!("{etag}content-range: {range}\r\n");
            (
                range.clone(),
                said("206 Partial Content", &headers, &content[..4 << 20]),
            )
        })
        .collect();
    let good = format!("{etag}content-range: bytes 0-4194303/{total}\r\n");
    blobs.push((
        "more than the range".into(),
        said("206 Partial Content", &good, &content),
    ));
    blobs.push((
        "a whole that is longer".into(),
        said("200 OK", etag, [&content[..], b"more"].concat()),
    ));
    blobs.push((
        "no length".into(),
        said(
            "200 OK",
            "transfer-encoding: chunked\r\ncontent-length: 3\r\n",
            "0\r\n\r\n",
        ),
    ));
    blobs.push((
        "a length below nothing".into(),
        said(
            "206 Partial Content",
            &format!("{good}content-length: -1\r\n"),
            "",
        ),
    ));
    blobs.push((
        "two lengths".into(),
        said("200 OK", "content-length: 1\r\ncontent-length: 2\r\n", "xx"),
    ));
    blobs.push(("no HTTP".into(), b"220 ftp\r\n".to_vec()));
    blobs.push((
        "many headers".into(),
        said("200 OK", &"a: b\r\n".repeat(100_000), ""),
    ));
    for (what, blob) in blobs {
        let manifest = manifest.clone();
        let liar = Liar::start(move |_, path, _| {
            if path.contains("manifests") {
                said("200 OK", "etag: \"m\"\r\n", &manifest)
            } else {
                blob.clone()
            }
        });
        let place = Place::new();
        let spec = liar.spec().replace(",mode=max", "");
        let (run, _) = watched(Program::import(&spec, &place.layout()));
        assert_eq!(run.code, Some(1), "{what}: {}", run.stderr);
        place.sound();
        assert!(!place.layout().join("index.json").exists(), "{what}");
    }
    for (what, headers, body) in [
        (
            "a manifest of 8 EiB",
            "content-length: 9223372036854775807\r\n",
            "{}",
        ),
        (
            "a manifest of 300 MiB",
            "content-length: 314572800\r\n",
            "{}",
        ),
        (
            "a manifest of no length",
            "content-length: 18446744073709551616\r\n",
            "{}",
        ),
    ] {
        let liar = Liar::start(move |_, _, _| said("200 OK", headers, body));
        let place = Place::new();
        let spec = liar.spec().replace(",mode=max", "");
        let (run, peak) = watched(Program::import(&spec, &place.layout()));
        assert_eq!(run.code, Some(1), "{what}: {}", run.stderr);
        assert!(peak < 200 * MIB, "{what}: {peak} bytes of memory");
        place.untouched();
    }
}

#[test]
fn a_web_server_in_place_of_the_store_is_no_empty_cache() {
    let nginx = "<html>\n<head><title>404 Not Found</title></head>\n<body><hr>nginx</body></html>";
    for (status, headers, body, says) in [
        (
            "404 Not Found",
            "content-type: text/html\r\n",
            nginx,
            "answered 404, but not like S3 (404 Not Found nginx), reading s3://cache/manifests/buildkit; \
             check endpoint_url\n",
        ),
        (
            "404 Not Found",
            "",
            "",
            "answered 404, but not like S3, reading s3://cache/manifests/buildkit; check endpoint_url, \
             bucket and use_path_style\n",
        ),
        (
            "200 OK",
            "content-type: text/html\r\n",
            "<html><title>MinIO Console</title></html>",
            "a web page, which is not what S3 answers, reading s3://cache/manifests/buildkit; check \
             endpoint_url (MinIO's S3 is at port 9000, its console at 9001)\n",
        ),
    ] {
        let liar = Liar::start(move |_, _, _| said(status, headers, body));
        let place = Place::new();
        let spec = liar.spec().replace(",mode=max", "");
        let (run, _) = watched(Program::import(&spec, &place.layout()));
        run.ends_with(1).says(says);
        place.untouched();
        let place = Place::with("local-min");
        let (run, _) = watched(Program::export(&liar.spec(), &place.layout()));
        assert_eq!(run.code, Some(1), "{}", run.stderr);
        assert_eq!(liar.count("PUT /cache/manifests/"), 0);
    }
}

#[test]
fn a_store_that_ignores_ranges_or_gives_no_lengths_is_imported_from() {
    let content = vec![b'x'; 5 << 20];
    let digest = Digest::of(&content);
    let manifest = json!({"layers": [{"blob": digest, "parent": -1, "annotations": {
        "mediaType": TAR, "diffID": digest, "size": content.len()}}],
        "records": [{"layers": [{"layer": 0}], "digest": "sha256:a"}]})
    .to_string();
    for chunked in [false, true] {
        let (manifest, content) = (manifest.clone(), content.clone());
        let liar = Liar::start(move |_, path, _| {
            let body = match path.contains("manifests") {
                true => manifest.as_bytes(),
                false => &content,
            };
            if !chunked {
                return said("200 OK", "etag: \"e\"\r\n", body);
            }
            let head = "HTTP/1.1 200 OK\r\nconnection: close\r\netag: \"e\"\r\ntransfer-encoding: chunked\r\n\r\n";
            let chunk = format!("{:x}\r\n", body.len());
            [head.as_bytes(), chunk.as_bytes(), body, b"\r\n0\r\n\r\n"].concat()
        });
        let place = Place::new();
        let spec = liar.spec().replace(",mode=max", "");
        watched(Program::import(&spec, &place.layout()))
            .0
            .succeeds();
        place.sound();
        let blob = place.layout().join("blobs/sha256").join(digest.hex());
        assert_eq!(std::fs::read(blob).expect("it is there").len(), 5 << 20);
        // In pieces at first, and then in one stream.
        assert!(liar.count("GET /cache/blobs/") <= 8);
    }
}

#[test]
fn what_others_say_does_not_steer_the_terminal() {
    // `watched` checks for control characters.
    let message = "\u{9b}31m\u{202e}gnp.exe\u{85}line\u{2028}";
    let body = format!(
        "<Error><Code>Bad{message}</Code><Message>{message}{}</Message></Error>",
        "x".repeat(100_000)
    );
    for status in [
        "403 Forbidden",
        "400 Bad Request",
        "301 Moved",
        "200 OK",
        "404 Not Found",
    ] {
        let body = body.clone();
        let liar = Liar::start(move |_, _, _| said(status, "x-amz-bucket-region: \teu\r\n", &body));
        for more in [
            "",
            "name=\u{1b}[31mevil\u{202e}",
            "prefix=\u{1b}]0;owned\u{7}",
        ] {
            let place = Place::new();
            let spec = format!("{},{more}", liar.spec().replace(",mode=max", ""));
            let (run, _) = watched(
                Program::import(spec.trim_end_matches(','), &place.layout()).arg("--require"),
            );
            assert!(matches!(run.code, Some(1 | 2)), "{}", run.stderr);
            let place = Place::with("local-min");
            let spec = format!("{},{more}", liar.spec());
            let (run, _) = watched(Program::export(spec.trim_end_matches(','), &place.layout()));
            assert!(matches!(run.code, Some(1 | 2)), "{}", run.stderr);
        }
    }
}
