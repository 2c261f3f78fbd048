//! Many processes at once, on one bucket and name and in one layout.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Child;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use layercache::cache::digest::Digest;
use layercache::config::{RetryMode, S3Config, Selection, StaticCredentials};
use layercache::layout::Layout;
use layercache::progress::Progress;
use layercache::store::{Part, Store};
use layercache::transfer::body::InMemory;
use layercache::transfer::limits::Limits;

use crate::aftermath::{
    assert_layout_is_sound, assert_store_is_sound, layout_of, noise, put_cache, soak,
};
use crate::program::{Program, Run, copy_of, files, fixture};
use crate::server::{ACCESS_KEY, BUCKET, Fault, Logged, SECRET_KEY, Server};

const MIB: usize = 1 << 20;

fn all_succeed(children: Vec<Child>) -> Vec<Run> {
    let runs = children
        .into_iter()
        .map(|child| Run::from(child.wait_with_output().expect("the program ends")));
    runs.map(Run::succeeds).collect()
}

fn tags(layout: &Path) -> BTreeSet<String> {
    let index = std::fs::read(layout.join("index.json")).expect("the index");
    let index: serde_json::Value = serde_json::from_slice(&index).expect("JSON");
    let entries = index["manifests"].as_array().expect("entries").iter();
    entries
        .filter_map(|entry| entry["annotations"]["org.opencontainers.image.ref.name"].as_str())
        .map(str::to_owned)
        .collect()
}

#[test]
fn sixteen_exporters_to_one_name_and_importers_beside_them_never_meet_a_manifest_that_dangles() {
    let layouts = ["local-max", "local-multiarch"];
    let references = layouts.map(|layout| files(&fixture(layout)));
    for _ in 0..if soak() { 10 } else { 2 } {
        let server = Arc::new(Server::start());
        // Whenever a manifest is about to be written, the blobs it may name are already there.
        let (seen, early) = (Arc::clone(&server), Arc::new(Mutex::new(Vec::new())));
        let found = Arc::clone(&early);
        let blobs: [BTreeSet<String>; 2] = layouts.map(|layout| {
            let clean = Server::start();
            Program::export(&clean.spec("mode=max"), &fixture(layout))
                .run()
                .succeeds();
            let keys = clean.objects().into_keys();
            keys.filter(|key| key.starts_with("blobs/")).collect()
        });
        server.fail(move |asked| {
            if asked.key == "manifests/buildkit" && asked.operation == "PutObject" {
                let there: BTreeSet<String> = seen.objects().into_keys().collect();
                if !blobs.iter().any(|blobs| blobs.is_subset(&there)) {
                    found.lock().expect("a lock").push(there);
                }
            }
            None
        });
        let spec = server.spec("mode=max");
        let exporters: Vec<Child> = (0..16)
            .map(|nth| Program::export(&spec, &fixture(layouts[nth % 2])).spawn())
            .collect();
        let imported: Vec<_> = (0..8)
            .map(|_| tempfile::tempdir().expect("a temporary directory"))
            .collect();
        let importers = imported
            .iter()
            .map(|layout| Program::import(&spec, layout.path()).spawn())
            .collect();
        all_succeed(exporters);
        for (run, layout) in all_succeed(importers).iter().zip(&imported) {
            if run.stdout.starts_with("no cache named") {
                assert_eq!(files(layout.path()), BTreeMap::new());
            } else {
                assert!(references.contains(&files(layout.path())), "{run:?}");
            }
        }
        server.reset_faults();
        assert_eq!(early.lock().expect("a lock").len(), 0);
        assert_store_is_sound(&server, "at the end");
        let last = tempfile::tempdir().expect("a temporary directory");
        Program::import(&spec, last.path())
            .arg("--require")
            .run()
            .succeeds();
        assert!(references.contains(&files(last.path())));
    }
}

#[test]
fn processes_importing_into_one_layout_lose_no_tag_and_tear_nothing() {
    let server = Server::start();
    for (name, layout) in [("a", "local-max"), ("b", "local-multiarch")] {
        let spec = server.spec(&format!("mode=max,name={name}"));
        Program::export(&spec, &fixture(layout)).run().succeeds();
    }
    put_cache(&server, "c", &[9 * MIB, 2 * MIB, 100]);
    for _ in 0..if soak() { 10 } else { 2 } {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let layout = directory.path().join("cache");
        // Four imports of one cache under one tag, and of two caches under four tags each.
        let mut wanted = BTreeSet::new();
        let mut importers = Vec::new();
        for nth in 0..4 {
            for (name, tag) in [
                ("a", "main".to_owned()),
                ("b", format!("b-{nth}")),
                ("c", format!("c-{nth}")),
            ] {
                let spec = server.spec(&format!("name={name}"));
                let program = Program::import(&spec, &layout).args(["--tag", &tag]);
                importers.push(program.spawn());
                wanted.insert(tag);
            }
        }
        all_succeed(importers);
        assert_eq!(tags(&layout), wanted);
        assert_layout_is_sound(&layout, "at the end");
        for left in [".layercache", "index.json.lock"] {
            assert!(!layout.join(left).exists(), "{left}");
        }
        // And each tag leads to its complete cache.
        for (tag, name) in [("main", "a"), ("b-2", "b"), ("c-3", "c")] {
            let spec = server.spec(&format!("mode=max,name=again-{name}"));
            Program::export(&spec, &layout)
                .args(["--tag", tag])
                .run()
                .succeeds();
            let objects = server.objects();
            assert_eq!(
                objects[&format!("manifests/again-{name}")],
                objects[&format!("manifests/{name}")]
            );
        }
    }
}

#[test]
fn one_layout_is_exported_while_others_import_into_it() {
    let server = Server::start();
    let spec = server.spec("mode=max,name=arm");
    Program::export(&spec, &fixture("local-multiarch"))
        .run()
        .succeeds();
    let layout = copy_of(&fixture("local-max"));
    let mut all = Vec::new();
    for nth in 0..6 {
        let export = server.spec(&format!("mode=max,name=max-{nth}"));
        let tag = format!("arm-{nth}");
        all.push(
            Program::export(&export, layout.path())
                .args(["--tag", "latest"])
                .spawn(),
        );
        all.push(
            Program::import(&server.spec("name=arm"), layout.path())
                .args(["--tag", &tag])
                .spawn(),
        );
    }
    all_succeed(all);
    assert_eq!(tags(layout.path()).len(), 7);
    assert_layout_is_sound(layout.path(), "at the end");
    assert_store_is_sound(&server, "at the end");
    let expected = crate::program::s3_manifest("max.json");
    for nth in 0..6 {
        assert_eq!(server.objects()[&format!("manifests/max-{nth}")], expected);
    }
}

/// Two processes export the same blob in parts; `signal` hits the first of them midway.
fn two_in_parts(signal: Option<i32>) {
    let layout = layout_of(&[40 * MIB, 100]);
    let reference = Server::start();
    let spec = reference.spec("mode=max");
    Program::export(&spec, layout.path()).run().succeeds();

    let server = Server::start();
    let spec = server.spec("mode=max");
    // The first waits midway until the second has found its upload.
    let (reached, first_stands) = std::sync::mpsc::channel();
    let (listed, second_listed) = std::sync::mpsc::channel();
    server.fail(move |asked| {
        match (asked.operation, asked.nth) {
            ("UploadPart", 3) => {
                let _ = reached.send(());
                return Some(Fault::Delay(Duration::from_secs(1)));
            }
            ("ListParts", 0) => {
                let _ = listed.send(());
            }
            _ => {}
        }
        None
    });
    let first = Program::export(&spec, layout.path()).spawn();
    first_stands.recv().expect("the first sends parts");
    let second = Program::export(&spec, layout.path()).spawn();
    second_listed
        .recv()
        .expect("the second finds the first one's upload");
    if let Some(signal) = signal {
        let pid = i32::try_from(first.id()).expect("a process id");
        unsafe { libc::kill(pid, signal) };
    }
    let first: Run = first.wait_with_output().expect("it ends").into();
    match signal {
        None => assert_eq!(first.code, Some(0), "{}", first.stderr),
        // It may have finished already.
        Some(libc::SIGINT) => assert!(matches!(first.code, Some(0 | 130)), "{first:?}"),
        Some(_) => assert!(matches!(first.code, Some(0) | None), "{first:?}"),
    }
    all_succeed(vec![second]);
    assert_eq!(server.objects(), reference.objects());
    assert_eq!(server.uploads(), 0);
}

#[test]
fn two_exporters_of_one_large_blob_share_its_upload() {
    two_in_parts(None);
}

#[test]
fn an_exporter_that_shares_an_upload_survives_the_other_ones_abort() {
    two_in_parts(Some(libc::SIGINT));
}

#[test]
fn an_exporter_that_shares_an_upload_survives_the_other_ones_death() {
    two_in_parts(Some(libc::SIGKILL));
}

#[test]
fn an_upload_whose_parts_another_run_replaced_is_begun_anew() {
    let layout = layout_of(&[40 * MIB]);
    let server = Server::start();
    // With server-side encryption, the same bytes can have different ETags.
    server.fail_first(
        1,
        "UploadPart",
        Fault::Header("etag", "\"0123456789abcdef0123456789abcdef\""),
    );
    Program::export(&server.spec("mode=max"), layout.path())
        .run()
        .succeeds();
    assert_store_is_sound(&server, "at the end");
    assert_eq!(server.count("CreateMultipartUpload"), 2);
    assert_eq!(server.uploads(), 0);
}

#[test]
fn an_import_waits_for_a_build_to_let_go_of_the_index() {
    let server = Server::start();
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .run()
        .succeeds();
    let reference = files(&fixture("local-max"));
    let layout = tempfile::tempdir().expect("a temporary directory");
    let path = layout.path().join("index.json.lock");
    let lock = std::fs::File::create(&path).expect("a lock file");
    lock.lock().expect("a free lock");
    let mut import = Program::import(&server.spec(""), layout.path()).spawn();
    for blob in reference.keys().filter(|name| name.len() > 64) {
        while !layout.path().join(blob).exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    assert!(import.try_wait().expect("it can be asked").is_none());
    assert!(!layout.path().join("index.json").exists());
    // BuildKit removes the file after unlocking it.
    lock.unlock().expect("it is ours");
    std::fs::remove_file(path).ok();
    all_succeed(vec![import]);
    assert_eq!(files(layout.path()), reference);
}

#[test]
fn a_lock_that_is_never_let_go_of_is_named_in_the_end() {
    let directory = copy_of(&fixture("local-max"));
    let before = files(directory.path());
    let path = directory.path().join("index.json.lock");
    let lock = std::fs::File::create(&path).expect("a lock file");
    lock.lock().expect("a free lock");
    // The program waits `layercache::LOCK_WAIT`, one minute.
    let wait = Duration::from_millis(120);
    let layout = Layout::open_for_import(directory.path(), wait).expect("opening locks nothing");
    let Err(error) = layout.select(&Selection::Default) else {
        panic!("the index was read without its lock");
    };
    let error = format!("{error:#}");
    assert!(error.contains("index.json.lock"), "{error}");
    assert!(
        error.contains("locked by another process for more than 120ms"),
        "{error}"
    );
    drop(lock);
    let entry = layout.select(&Selection::Default).expect("it is free now");
    layout
        .publish_tag("other", &entry, &BTreeMap::new())
        .expect("it is free now");
    layout.tidy();
    assert_eq!(tags(directory.path()).len(), 2);
    assert_eq!(files(directory.path()).len(), before.len());
}

/// A store for the test's own requests to `server`, and the key of a blob there.
async fn another_client(server: &Server, blob: &[u8]) -> (Arc<dyn Store>, String) {
    let config = S3Config {
        region: "us-east-1".into(),
        bucket: BUCKET.into(),
        endpoint_url: Some(server.url().parse().expect("a URL")),
        use_path_style: true,
        prefix: String::new(),
        blobs_prefix: "blobs/".into(),
        manifests_prefix: "manifests/".into(),
        names: vec!["buildkit".into()],
        credentials: Some(StaticCredentials {
            access_key_id: ACCESS_KEY.into(),
            secret_access_key: SECRET_KEY.into(),
            session_token: None,
        }),
        retry_mode: RetryMode::Standard,
        retry_max_attempts: 3,
        disable_accept_encoding: false,
        ca_bundle: None,
    };
    let store = layercache::s3::connect(&config, Progress::silent())
        .await
        .expect("a store");
    let key = config.blob_key(&Digest::of(blob));
    (store, key)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_holds_other_bytes_is_not_taken_up_and_aborted_in_the_end() {
    let layout = layout_of(&[40 * MIB]);
    let server = Server::start();
    let (store, key) = another_client(&server, &noise(1, 40 * MIB)).await;
    let upload = store.create_upload(&key, None).await.expect("an upload");
    let part = usize::try_from(Limits::default().part).expect("it fits");
    let other = InMemory(noise(2, part).into());
    store
        .upload_part(&key, &upload, 1, Arc::new(other))
        .await
        .expect("a part");
    Program::export(&server.spec("mode=max"), layout.path())
        .run()
        .succeeds();
    assert_store_is_sound(&server, "at the end");
    assert_eq!(server.count("CreateMultipartUpload"), 2);
    assert_eq!(server.uploads(), 0);
    // A run may be working on it, and the store may give parts that are sent again other ETags.
    let mut log = server.log();
    log.retain(|l| l.operation == "UploadPart");
    let id = |l: &Logged| {
        let mut words = l.query.split('&').map(str::to_owned);
        words.find(|word| word.starts_with("uploadId="))
    };
    let (theirs, all) = (id(&log[0]), log.len());
    log.retain(|l| id(l) == theirs);
    assert_eq!((log.len(), all), (1, 1 + 40usize.div_ceil(5)));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_uploads_of_another_client_are_left_alone_until_they_are_a_day_old() {
    let layout = layout_of(&[40 * MIB]);
    let blob = noise(1, 40 * MIB);
    let server = Server::start();
    let (store, key) = another_client(&server, &blob).await;
    // As BuildKit does it, in parts of 5 MiB: one upload with some parts sent, one just started.
    let theirs = store.create_upload(&key, None).await.expect("an upload");
    let begun = store.create_upload(&key, None).await.expect("an upload");
    let mut parts = Vec::new();
    for (number, bytes) in (1..).zip(blob.chunks(5 * MIB)) {
        if number == 5 {
            Program::export(&server.spec("mode=max"), layout.path())
                .run()
                .succeeds();
            assert_store_is_sound(&server, "beside another client");
        }
        let body = Arc::new(InMemory(bytes.to_vec().into()));
        let etag = store.upload_part(&key, &theirs, number, body).await;
        let (size, etag) = (bytes.len() as u64, etag.expect("a part"));
        parts.push(Part { number, size, etag });
    }
    let completed = store.complete_upload(&key, &theirs, &parts).await;
    completed.expect("it is still theirs");
    assert_store_is_sound(&server, "after the other client");

    server.age_uploads(Duration::from_secs(25 * 60 * 60));
    server.remove(&key);
    Program::export(&server.spec("mode=max"), layout.path())
        .run()
        .succeeds();
    assert_store_is_sound(&server, "at the end");
    let listed = store.list_uploads(&key).await.expect("a list");
    assert!(listed.is_empty(), "{begun} is still there");
}
