//! What others do to the bucket while an export runs.

use std::time::Duration;

use layercache::cache::digest::Digest;

use crate::aftermath::assert_store_is_sound;
use crate::program::{Program, fixture, s3_manifest};
use crate::server::Server;

/// The base layer of `local-max`, which most results stand on.
const BASE: &str = "blobs/sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2";
/// Another blob of it.
const LEAF: &str = "blobs/sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece";

fn exported() -> Server {
    let server = Server::start();
    let spec = server.spec("mode=max");
    Program::export(&spec, &fixture("local-max"))
        .run()
        .succeeds();
    server.clear_log();
    server
}

#[test]
fn a_blob_that_is_deleted_while_others_are_sent_is_sent_again_before_the_manifest() {
    let server = exported();
    server.remove("manifests/buildkit");
    server.remove(LEAF);
    // The survey has found it by then.
    server.before(
        0,
        |request| request.operation == "PutObject" && request.key == LEAF,
        |store| {
            store.remove(BASE);
        },
    );
    let spec = server.spec("mode=max");
    let run = Program::export(&spec, &fixture("local-max"))
        .run()
        .succeeds();
    assert!(
        run.stdout
            .starts_with("exported 10 blobs to s3://cache/manifests/buildkit at ")
            && run.stdout.contains(": 2 uploaded "),
        "{}",
        run.stdout
    );
    assert_eq!(
        server.objects()["manifests/buildkit"],
        s3_manifest("max.json")
    );
    assert_store_is_sound(&server, "after the export");
}

#[test]
fn a_blob_that_is_deleted_while_others_are_refreshed_is_sent_again_before_the_manifest() {
    let server = exported();
    server.age_all(Duration::from_secs(48 * 60 * 60));
    server.age(BASE, Duration::ZERO);
    server.put(BASE, server.objects()[BASE].clone());
    server.before(
        0,
        |request| request.operation == "CopyObject",
        |store| {
            store.remove(BASE);
        },
    );
    let spec = server.spec("mode=max");
    Program::export(&spec, &fixture("local-max"))
        .run()
        .succeeds();
    assert_store_is_sound(&server, "after the export");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abandoned_upload_of_a_blob_that_is_in_place_is_aborted() {
    let server = exported();
    let config = layercache::cli::spec::cache_to(&server.spec(""), &|_| None)
        .expect("a good spec")
        .config
        .s3;
    let store = layercache::s3::connect(&config, layercache::progress::Progress::silent())
        .await
        .expect("a store");
    store.create_upload(BASE, None).await.expect("an upload");
    let foreign = format!("blobs/{}", Digest::of(b"another cache's"));
    store
        .create_upload(&foreign, None)
        .await
        .expect("an upload");
    let spec = server.spec("mode=max");
    let export = || {
        Program::export(&spec, &fixture("local-max"))
            .run()
            .succeeds();
    };
    export();
    assert_eq!(server.uploads(), 2, "someone may be working on them");
    server.age_uploads(Duration::from_secs(2 * 60 * 60));
    export();
    assert_eq!(
        server.uploads(),
        1,
        "the other cache's is not ours to judge"
    );
}

#[test]
fn a_refresh_that_the_store_refuses_is_an_upload_and_if_that_fails_a_warning() {
    let old = Duration::from_secs(48 * 60 * 60);
    let server = Server::builder()
        .refuse("CopyObject", 403, "AccessDenied")
        .start();
    let spec = server.spec("mode=max");
    let export = || Program::export(&spec, &fixture("local-max"));
    export().run().succeeds();
    server.age_all(old);
    let run = export().run().succeeds();
    assert!(
        run.stdout
            .contains("10 uploaded (62.9 KiB), 0 already there, 0 refreshed"),
        "{}",
        run.stdout
    );
    server.age_all(old);
    server.fail(|asked| {
        (asked.operation == "PutObject" && asked.key == BASE)
            .then_some(crate::server::Fault::Status(403, "AccessDenied"))
    });
    export().run().succeeds().says(&format!(
        "warning: blob {} could not be refreshed: a lifecycle rule may delete it before the next export",
        BASE.trim_start_matches("blobs/")
    ));
    assert_store_is_sound(&server, "in the end");
}
